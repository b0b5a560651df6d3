"""Two processes compute what one does on the same prompts."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_all
from safetensors.torch import load_file
from shared import make_prompts, make_rollout
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

import common
import eval
from support import checkpoints

RL = {"group_size": 4, "micro_batch_size": 2, "max_new_tokens": 6, "eval_examples": 5}
RL |= {"learning_rate": 3e-4, "steps": 2, "eval_every": 2, "save_every": 0}
NAMES = ("sft", "grpo_baseline, idle rank", "attn_distill", "ral_grpo, LoRA")
NAMES += ("ral_grpo, tied embeddings", "uneven lengths in minibatches", "vppo")
LORA, IDLE = NAMES.index("ral_grpo, LoRA"), NAMES.index("grpo_baseline, idle rank")


def jobs(real: Path, cold_start: Path, processes: int) -> list:
    """Four prompts a step, whatever the number of processes."""
    fields = RL | {"prompts_per_step": 4 // processes, "workers": 0}
    data = {"data": str(real / "rows.json"), "media_root": (str(real / "media"),), "frames": 4}
    data |= {"image_tokens": 9, "frame_tokens": 4, "max_skipped": 0.3}
    data |= {"model": str(real / "qwen2_5_vl")}
    third = {name: str(real / "qwen3_vl") for name in ("model", "teacher")}
    strong = {"lambda_attn": 10.0}
    on_toy = {"model": str(cold_start), "num_iterations": 2}
    # One prompt a forward: both compute in the same shapes, and round in the same way.
    one_prompt = {"micro_batch_size": 1}
    demonstrations = {k: v for k, v in fields.items() if k != "group_size"}
    evaluation = {name: (data[name],) for name in ("frames", "image_tokens", "frame_tokens")}
    evaluation |= {"max_new_tokens": 6, "batch_size": 3, "workers": 0, "gaze": 2}
    return [
        ("sft", demonstrations | data, ""),
        ("grpo_baseline", fields | data | {"num_iterations": 2}, "idle"),
        ("attn_distill", fields | data | third | one_prompt | {"train_vision": True}, ""),
        ("ral_grpo", fields | data | strong | {"lora_rank": 4, "save_every": 1, "steps": 3}, ""),
        ("ral_grpo", fields | data | strong | one_prompt | {"model": str(real / "tied")}, ""),
        ("ral_grpo", fields | strong | on_toy | {"num_minibatches": 2}, "uneven"),
        ("benchmarks.forks.vppo", fields | on_toy, ""),
        ("eval", data | evaluation, ""),
    ]


def read(path: Path) -> list[dict]:
    with path.open() as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def both(run, real, cold_start, tmp_path_factory) -> tuple[Path, Path]:
    """The runs of one process and of two."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "jobs.json").write_text(json.dumps(jobs(real, cold_start, 2)))
    status, output = run("ranks", [folder / "jobs.json", folder / "two"])
    assert status == 0, output[-5000:]
    run_all(jobs(real, cold_start, 1), folder / "one")
    return folder / "one", folder / "two"


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_two_processes_are_one(both, number):
    one, two = (folder / str(number) for folder in both)
    lines = [read(folder / "metrics.jsonl") for folder in (one, two)]
    assert len(lines[0]) > 2
    if number:
        samples = [sorted(map(json.dumps, read(folder / "samples.jsonl"))) for folder in (one, two)]
        assert samples[0] == samples[1] and len(samples[0]) == 4 * 4 * (len(lines[0]) - 1)
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not name.startswith("perf/") and name != "train/padding_frac":
                assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-6), name
    weights, others = (load_file(x / "checkpoint" / "model.safetensors") for x in (one, two))
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], atol=1e-5, rtol=0, msg=name)
    assert lines[0][-1]["train/grad_norm"] > 0


def test_adapters_are_saved_whole(both):
    one, two = (load_file(x / str(LORA) / "adapter" / "adapter_model.safetensors") for x in both)
    assert one.keys() == two.keys() and len(one) == 2 * 7 * 2  # A and B of each linear layer
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=name)
        assert ("lora_A" in name) or one[name].any(), name


def test_one_process_goes_on_where_two_stopped(both, real, cold_start):
    """From step 2, whose state has the moments and adapters of both."""
    _, fields, _ = jobs(real, cold_start, 1)[LORA]
    out = both[1] / str(LORA)
    state = str(out / "state" / "step-000002")
    run_all([("ral_grpo", fields | {"resume": state}, "")], out, names=["."])
    weights, others = (
        load_file(folder / str(LORA) / "checkpoint" / "model.safetensors") for folder in both
    )
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], atol=1e-5, rtol=0, msg=name)
    assert len(read(out / "metrics.jsonl")) == 4


def test_an_idle_rank_was_idle(both):
    lines = read(both[1] / str(IDLE) / "metrics.jsonl")
    assert min(line["rollout/frac_zero_std"] for line in lines[1:]) >= 0.5


@pytest.fixture
def group_of_one(monkeypatch):
    """As on a GPU: sharded weights, computing in bfloat16."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    for module in (common, checkpoints):
        monkeypatch.setattr(module, "compute_dtype", lambda: torch.bfloat16)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_bfloat16_trains_float32_weights(group_of_one, cold_start, tmp_path, lora_rank):
    fields = RL | {"prompts_per_step": 4, "model": str(cold_start), "lora_rank": lora_rank}
    fields |= {"lambda_attn": 10.0, "save_every": 2, "num_iterations": 2}
    fields |= {"gradient_checkpointing": True}
    run_all([("ral_grpo", fields, "")], tmp_path)
    lines = read(tmp_path / "0" / "metrics.jsonl")
    assert lines[1]["train/attn_jsd_1"] == 0 < lines[1]["train/attn_jsd_2"] < 1e-2
    assert 0 <= lines[1]["train/kl"] < 1e-2 and lines[1]["train/grad_norm"] > 0
    files = (tmp_path / "0" / "state" / "step-000002").glob("*.safetensors")
    saved = {tensor.dtype for file in files for tensor in load_file(file).values()}
    assert saved == {torch.float32}
    config = AutoConfig.from_pretrained(tmp_path / "0" / "checkpoint")
    assert config.dtype == config.text_config.dtype == torch.bfloat16
    before = load_file(cold_start / "model.safetensors")
    after = load_file(tmp_path / "0" / "checkpoint" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {
        name for name in before if not torch.equal(before[name].to(after[name].dtype), after[name])
    }
    assert any("q_proj" in name for name in changed) and not any("visual" in n for n in changed)
    assert (tmp_path / "0" / "adapter").exists() == (lora_rank > 0)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_sharded_model_computes_what_the_saved_one_does(
    group_of_one, checkpoints, family, lora_rank
):
    """To the bit: the rotary tables of the vision encoder, too, keep their dtype."""
    processor = common.load_processor(checkpoints[family])
    scores, features = [], []
    for fields in ({"frozen": True}, {"lora_rank": lora_rank}):
        model = common.load_model(checkpoints[family], **fields)
        assert bool(lora_rank or fields.get("frozen")) or isinstance(model.lm_head.weight, DTensor)
        prompts = make_prompts(model, processor, ("mixed", "video"))
        rollout = make_rollout(model, processor, prompts)
        with torch.no_grad():
            scores.append(common.score(model, rollout, attn_layers=[-1]))
        rows = rollout.prompts.features
        features.append([level for row in rows for block in row for level in block])
    assert torch.equal(scores[0].logps, scores[1].logps)
    assert torch.equal(scores[0].attentions[-1], scores[1].attentions[-1])
    assert all(torch.equal(*pair) for pair in zip(*features, strict=True))


@pytest.mark.parametrize("model", ["qwen3_vl", "tied"])
def test_what_is_not_sharded_is_loaded_once(group_of_one, real, monkeypatch, model):
    """Weights in one dictionary are on the GPU together, beside the model's own."""
    given = []

    def load(model, weights, **options):
        given.extend(weights)
        return set_model_state_dict(model, weights, **options)

    monkeypatch.setattr(common, "set_model_state_dict", load)
    loaded = common.load_model(real / model, lora_rank=4)
    assert given and all("lora_" in name for name in given)
    frozen = common.load_model(real / model, frozen=True).state_dict()
    for name, parameter in loaded.named_parameters(remove_duplicate=False):
        if "lora_" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_computes_what_peft_computes(real, dtype):
    torch.manual_seed(0)
    model = common.load_model(real / "qwen2_vl", lora_rank=4)
    layer = model.model.language_model.layers[0].mlp.up_proj.to(dtype)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 3, layer.in_features, dtype=dtype, requires_grad=True)
    weights = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    results = []
    for forward in (layer.forward, partial(type(layer).forward, layer)):
        out = forward(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), weights)])
        with common.without_adapters(model):
            results[-1].append(forward(x))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert not torch.equal(results[0][0], results[0][-1])


def test_gathered_weights_need_no_hooks(group_of_one, real):
    model = common.load_model(real / "qwen2_vl")
    layer = model.model.language_model.layers[0]
    before = [dict(x) for x in (layer._forward_pre_hooks, layer._forward_hooks)]
    assert all(before)
    with common.gathered(model):
        assert not layer._forward_pre_hooks and not layer._forward_hooks
        handle = layer.register_forward_hook(lambda *_: None)  # as transformers does
    assert list(layer._forward_pre_hooks) == list(before[0])
    assert list(layer._forward_hooks) == [*before[1], handle.id]


@pytest.mark.parametrize("evaluated", [False, True])
def test_nothing_of_a_frozen_model_stays_gathered(group_of_one, real, monkeypatch, evaluated):
    """Nor its embeddings and output layer, although no backward pass frees them."""
    monkeypatch.setattr(common, "world_size", lambda: 2)  # alone it is not sharded
    model = common.load_model(real / "qwen2_vl", frozen=True)
    processor = common.load_processor(real / "qwen2_vl")
    if evaluated:
        with common.gathered(model):
            assert not isinstance(model.lm_head.weight, DTensor)
    rollout = make_rollout(model, processor, make_prompts(model, processor, ("mixed", "video")))
    with torch.no_grad():
        common.score(model, rollout)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_an_evaluation_is_the_same_to_the_letter(both, real, cold_start):
    """Two ranks answer what one does, and one finishes what two began."""
    one, two = (folder / "e" for folder in both)
    files = ("predictions.jsonl", "skipped.jsonl", "table.txt", "gaze.html")
    expected = [(one / name).read_bytes() for name in files]
    assert len(read(one / files[0])) == 18 and len(read(one / files[1])) == 2
    assert [(two / name).read_bytes() for name in files] == expected
    lines = expected[0].splitlines(keepends=True)
    (two / files[0]).write_bytes(b"".join(lines[:7]) + lines[7][:30])
    _, fields, _ = jobs(real, cold_start, 1)[-1]
    eval.main(eval.Args(**fields, out=str(two)))
    assert [(two / name).read_bytes() for name in files] == expected
