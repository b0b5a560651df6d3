"""What a real model is trained with unless it is told otherwise: the paper's recipe."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from real import write_video
from shared import toy_args
from test_real import run
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import attn_distill
import common
import eval
import grpo_baseline
import kd_baseline
import ral_grpo
import sft
from support import data, datafiles, memory, ranks
from support.prompts import Example, Media, Processor, PromptConfig, encode_prompt, process_media


@pytest.mark.parametrize("script", [grpo_baseline, ral_grpo, kd_baseline, attn_distill])
def test_the_defaults_are_the_papers(script):
    args = script.Args()
    assert (args.group_size, args.beta, args.temperature, args.think) == (8, 0.04, 1.0, True)
    assert args.image_tokens == 5120 and args.min_image_tokens == 128
    assert args.frame_tokens == 128
    assert args.max_prompt_tokens >= memory.prompt_tokens(args, "qwen3_vl")
    evaluation = eval.Args("model")  # as it was trained
    for name in ("image_tokens", "frame_tokens", "frames"):
        assert getattr(evaluation, name) == (getattr(args, name),)
    assert evaluation.min_image_tokens == args.min_image_tokens and evaluation.fps is args.fps


@pytest.mark.parametrize(
    ("script", "rate"), [(sft, 5e-6), (ral_grpo, 1e-5)], ids=["sft", "ral_grpo"]
)
def test_one_pass_at_the_papers_learning_rate(real, tmp_path, script, rate):
    fields = {"learning_rate": None, "steps": None, "rows": 5, "lora_rank": 0, "eval_examples": 1}
    lines, _ = run(script, real, tmp_path / "run", **fields)
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["learning_rate"] == rate
    assert args["steps"] == len(lines) - 1 == 2  # five rows, three a step


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 128),
        ({"fps": 0.5}, 70),
        ({"fps": 2.0}, 128),
        ({"frames": 150}, 150),
        ({"frames": 20}, 20),
        ({"frames": 150, "fps": 1.0}, 140),
    ],
)
def test_frames_of_a_video_of_140_seconds(tmp_path, fields, expected):
    write_video(tmp_path / "v.mp4", 280, rate=2)
    row = {"problem": "p", "solution": "s", "path": "v.mp4"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    video = datafiles.DataFile(str(tmp_path / "rows.json"), **fields).example(0).media[0]
    assert len(video.frames) == expected


@pytest.mark.parametrize(
    ("limits", "size", "expected"),
    [
        ((None, None), (56, 84), 2 * 3),  # the processor's own minimum is 56 x 56 pixels
        ((5120, 128), (56, 84), 10 * 14),  # sides are rounded up
        ((5120, 128), (560, 560), 20 * 20),
        ((5120, 128), (2044, 2044), 71 * 71),
        ((64, 128), (560, 560), 8 * 8),  # the maximum is never exceeded
        ((64, None), (560, 560), 8 * 8),
    ],
)
def test_an_image_has_between_its_minimum_and_its_maximum_of_tokens(limits, size, expected):
    own = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=2**24)
    names = ("image_tokens", "min_image_tokens")
    fields = dict(zip(names, limits, strict=True))
    processor = Processor(None, None, own, PromptConfig({}), **fields)
    _, (t, h, w) = process_media(processor, Media([Image.new("RGB", size)]))
    assert (t, h * w / 4) == (1, expected)


def open_rows(folder, count=50, **fields):
    """The rows to train on, and those to evaluate on, of a file of `count` rows."""
    rows = [{"problem": str(n), "solution": "s"} for n in range(count)]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    args = toy_args(ral_grpo, data=str(path), eval_examples=6, text_only=True, **fields)
    train, held_out = data.open_data(args, SimpleNamespace)
    return train, held_out.prompts.rows.tolist()


def test_the_first_rows_are_trained_on_and_those_behind_are_held_out(tmp_path):
    train, held_out = open_rows(tmp_path, rows=30)
    assert train.prompts.rows.tolist() == list(range(30)) and train.steps(8) == 4
    assert held_out == sorted(np.random.default_rng(0).permutation(range(30, 50))[:6])
    _, held_out = open_rows(tmp_path, rows=48)
    assert held_out == [48, 49]
    for rows in (None, 50):  # none are left: as many as a tenth, of those themselves
        train, held_out = open_rows(tmp_path, rows=rows)
        assert sorted([*train.prompts.rows, *held_out]) == list(range(50)) and len(held_out) == 5
        assert held_out == sorted(np.random.default_rng(0).permutation(50)[:5])
    train, held_out = open_rows(tmp_path, rows=40, eval_data=str(tmp_path / "rows.json"))
    assert train.prompts.rows.tolist() == list(range(40)) and len(held_out) == 6
    with pytest.raises(ranks.UsageError, match=r"--rows 51: --data .* has 50 rows; lower or omit"):
        open_rows(tmp_path, rows=51)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_no_prompt_is_longer_than_the_memory_estimate_assumes(real, monkeypatch, family):
    """Of awkward videos of 128 frames, small images and a text with options; nor is one much
    shorter."""

    def call_once(self, images, **options):  # frames are all alike here, and only counted
        output = call(self, images=images[:1], **options)
        pixels, n = output["pixel_values"], len(images)
        pixels = torch.zeros(()).expand(n * len(pixels), pixels.shape[1])
        return {"pixel_values": pixels, "image_grid_thw": output["image_grid_thw"].repeat(n, 1)}

    args = ral_grpo.Args(data="rows.json")
    budgets = {x: getattr(args, x) for x in ("image_tokens", "frame_tokens", "min_image_tokens")}
    processor = common.load_processor(real / family, **budgets)
    processor.prompt_config = PromptConfig(ral_grpo.PROMPTS)
    kind = type(processor.image_processor)
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", call_once)
    question = "What is the man in the red coat holding when he walks past the blue car?"
    asked = {"problem_type": "multiple choice", "options": [f"{x}. a blue car" for x in "ABCD"]}
    times, lengths = [37.5 * i for i in range(128)], []
    for size in ((320, 180), (320, 240), (426, 240), (480, 270), (320, 206)):
        media = Media([Image.new("RGB", size)] * 128, is_video=True, times=times)
        row = Example(question, "A", [media], **asked)
        prompt = encode_prompt(processor, row)
        assert sum(block.tokens for block in prompt.blocks) <= memory.visual_tokens(args)
        lengths.append(len(prompt.ids))
    longest = memory.prompt_tokens(args, family)
    assert 0.9 * longest < max(lengths) <= longest
    args = replace(args, frames=2, image_tokens=130)
    processor = replace(processor, image_tokens=130)
    images = [Media([Image.new("RGB", size)]) for size in ((320, 180), (99, 99), (2000, 900))]
    lengths = [len(encode_prompt(processor, replace(row, media=[x])).ids) for x in images]
    assert max(lengths) <= memory.prompt_tokens(args, family)


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({}, 512 + 64 * 154),  # 128 frames
        ({"frames": 32}, 512 + 5120),  # an image
        ({"frames": 33, "image_tokens": 128}, 512 + 17 * 154),
        ({"max_prompt_tokens": 4000}, 4000),
        ({"frame_tokens": None}, 16384),  # as many as are allowed
        ({"frame_tokens": None, "max_prompt_tokens": None}, 512 + 5120),
        ({"image_tokens": None, "max_prompt_tokens": None}, 512 + 64 * 154),
        ({"data": None}, 64 + 154),
        ({"data": None, "frames": 32}, 64 + 16 * 154),
    ],
)
def test_positions_of_the_longest_prompt(fields, positions):
    args = ral_grpo.Args(**{"data": "rows.json"} | fields)
    assert memory.prompt_tokens(args, "qwen2_5_vl") == positions
