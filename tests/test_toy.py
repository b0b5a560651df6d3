"""The toy is what it says: targets lie where the shape is, and no held-out scene is trained on."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shared import load

import common
import eval
import ral_grpo
from support import ranks, toy
from support.grounding import target_tokens
from support.prompts import collate, encode_prompt


def cell_pixels(example, task, token: int) -> np.ndarray:
    """The pixels behind a visual token: its cell, in the first frame of its temporal patch."""
    patch, cell = divmod(token, task.grid**2)
    row, column = divmod(cell, task.grid)
    picture = np.asarray(example.media[0].frames[2 * patch if example.media[0].is_video else 0])
    return picture[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]


@pytest.mark.parametrize(
    "task", [toy.Task(), toy.Task(grid=6), toy.Task(frames=8), toy.Task(frames=7)]
)
def test_the_target_is_where_the_shape_is_and_nowhere_else(task):
    rng = random.Random(0)
    for _ in range(50):
        example = toy.sample_example(rng, task)
        shape = example.problem.split()[-2]
        sprite = np.asarray(toy.sprite(shape, example.solution))
        tokens = range(task.grid**2 * (((task.frames or 1) + 1) // 2))
        found = [t for t in tokens if np.array_equal(cell_pixels(example, task, t), sprite)]
        grid = (len(tokens) // task.grid**2, task.grid, task.grid)
        assert tuple(found) == target_tokens(example.boxes, example.media, [grid])
        assert len(example.media[0].frames) == (task.frames or 1)
        assert task.frames is None or len(found) <= len(tokens) // task.grid**2 // 2


def test_another_task_than_that_of_the_checkpoint_says_how_to_train_it(tmp_path):
    (tmp_path / "toy_task.json").write_bytes(toy.Task().files()["toy_task.json"])
    for fields, words in (
        ({"frames": 8}, "--frames 8: .* on images. .* python sft.py --frames 8 --out"),
        ({"think": True}, "--think: .* was trained with --no-think. Omit it, or train such a toy"),
        ({"toy_order": "image-first"}, "--toy-order image-first: .* with --toy-order question"),
    ):
        args = SimpleNamespace(
            **{"grid": None, "frames": None, "toy_order": None} | {"think": None} | fields
        )
        with pytest.raises(ranks.UsageError, match=f"^{words}"):
            toy.resolve_task(args, str(tmp_path))
        assert toy.resolve_task(args, str(tmp_path), may_differ=True)[0]


def test_no_held_out_scene_is_trained_on():
    """Compared by what can be seen, clutter left out."""
    task = toy.Task()

    def pictures(scenes) -> set[bytes]:
        bare = (toy.Scene(scene.shapes, ()) for scene in scenes)
        return {toy.draw_scene(scene, 4, None)[0].tobytes() for scene in bare}

    rng = random.Random(0)
    training = [toy.sample_scene(rng, task, held_out=False) for _ in range(2000)]
    held_out = [toy.sample_scene(rng, task, held_out=True) for _ in range(512)]
    assert not pictures(training) & pictures(held_out)
    assert not any(scene.held_out() for scene in training)
    assert all(scene.held_out() for scene in held_out)
    first, again = (toy.held_out_examples(task, 20) for _ in range(2))
    first, again = ([x.media[0].frames[0].tobytes() for x in side] for side in (first, again))
    assert first == again


@pytest.mark.parametrize("think", [False, True])
def test_evaluation_measures_the_mass_on_the_target(checkpoints, monkeypatch, think):
    """Against a computation by hand, on demonstrations put in place of the greedy responses."""
    model, processor = load(checkpoints["qwen2_vl"])
    task = toy.Task(think=think)
    examples = toy.held_out_examples(task, 3)
    processor.prompt_config = task.prompt_config()
    prompts = [encode_prompt(processor, x) for x in examples]
    tokenizer = processor.tokenizer
    said = [[*tokenizer.encode(x.response), tokenizer.eos_token_id] for x in examples]
    said[2] = [*tokenizer.encode("red </answer>"), tokenizer.eos_token_id]  # answers nothing
    said[2] += [0] * (len(said[0]) - len(said[2]))
    mask = torch.ones(3, 1, len(said[0]), dtype=torch.bool)
    mask[2, 0, 3:] = False
    shape = mask.shape[:2]

    def demonstrate(model, batch, *_):
        ids = torch.tensor(said)[:, None]
        return common.Rollout(batch, ids, mask, torch.zeros(shape, dtype=torch.bool))

    monkeypatch.setattr(eval, "generate_group", demonstrate)
    metrics, predictions = eval.evaluate(model, processor, prompts, max_new_tokens=16, attn_layer=0)
    assert metrics["eval/accuracy"] == pytest.approx(2 / 3) == metrics["eval/format"]
    rollout = demonstrate(model, collate(model, prompts, 0))
    attention = common.score(model, rollout, attn_layers=[0]).attentions[0]
    masses, own_masses = [], []
    for b, (prompt, example) in enumerate(zip(prompts[:2], examples, strict=False)):
        first = tokenizer.convert_tokens_to_ids(example.solution)
        row = said[b].index(first)  # in the thought, if there is one
        image = prompt.ids.tolist().index(model.config.image_token_id)
        masses.append(sum(attention[b, 0, row, image + t].item() for t in prompt.target))
        seen = predictions[b].attention()[list(prompt.target)].sum().item()
        assert seen == pytest.approx(masses[-1])
        policy = ral_grpo.attention_policy(attention, "own")  # of the answer's token
        own_masses.append(sum(policy[b, 0, row, image + t].item() for t in prompt.target))
    assert metrics["eval/target_attn"] == pytest.approx(sum(masses) / 3, abs=1e-6)
    assert metrics["eval/target_attn"] == metrics["eval/target_attn_l0"]
    assert metrics["eval/target_attn_own"] == pytest.approx(sum(own_masses) / 3, abs=1e-6)
    assert abs(sum(own_masses) - sum(masses)) > 1e-4
