"""What only a GPU would show: the scripts' step at 7B width on fake tensors, with the kernels'
layouts, and the memory that it takes."""

from dataclasses import replace
from unittest import mock

import fake_gpu
import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

import attn_distill
import common
import grpo_baseline
import kd_baseline
import ral_grpo
from support import memory, states

SIZES = {
    "7B": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "2B": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "8B": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
IDS = {"image_token_id": 151655, "video_token_id": 151656}
IDS |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}


def config_of(size: str, family=Qwen2VLConfig, layers: int = 2):
    """A released configuration with fewer layers and vision blocks, which are all alike."""
    text = SIZES[size] | {"num_hidden_layers": layers, "pad_token_id": 151643}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {
        "depth": layers,
        "embed_dim": 1280,
        "num_heads": 16,
        "hidden_size": text["hidden_size"],
    }
    if family is Qwen2_5_VLConfig:
        vision = {"depth": layers, "hidden_size": 1280, "out_hidden_size": text["hidden_size"]}
    if family is Qwen3VLConfig:
        rope |= {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
        levels = [min(i, layers - 1) for i in range(3)]
        vision |= {"hidden_size": 1152, "deepstack_visual_indexes": levels}
        vision["out_hidden_size"] = text["hidden_size"]
        del vision["embed_dim"]
    return family(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        tie_word_embeddings=size == "2B",
        **IDS,
    )


def make_args(script, lora_rank: int, size: int = 1, tokens: int = 768):
    fields = {"frames": 32, "max_new_tokens": tokens, "gradient_checkpointing": True}
    fields |= {"lora_rank": lora_rank, "num_iterations": 1, "micro_batch_size": size}
    fields |= {"prompts_per_step": 3 * size}
    return script.Args(**fields)


IMAGE = {"data": "rows.json", "image_tokens": 4096}
SHORT = {"max_new_tokens": 256}  # the fewer tokens, the fewer chunks of logits to compute
STEPS = {  # size, layers, processes, arguments
    # Only where gradients in transit, or the graph's checkpoints, decide does a third layer count.
    "7B, all weights, 8 processes": ("7B", 3, 8, {}),
    "2B, all weights, 1 process": ("2B", 2, 1, SHORT),
    "7B, adapters, 128 frames": ("7B", 2, 1, {"lora_rank": 64, "frames": 128} | SHORT),
    # Two images fill a call of the encoder, as the estimate assumes.
    "7B, adapters, an image": ("7B", 2, 1, {"lora_rank": 64, "frames": 2} | IMAGE),
    "Qwen3-VL-8B, all weights, 128 frames": ("8B", 2, 8, {"frames": 128} | SHORT),
    "2B, trained vision, 1 process": ("2B", 1, 1, {"train_vision": True, "max_new_tokens": 64}),
}


@pytest.mark.parametrize(("size", "layers", "processes", "fields"), STEPS.values(), ids=STEPS)
def test_a_step_runs_in_the_memory_it_was_expected_to_need(size, layers, processes, fields):
    family = Qwen3VLConfig if size == "8B" else Qwen2VLConfig
    config, lora_rank = config_of(size, family, layers), fields.get("lora_rank", 0)
    args = replace(make_args(ral_grpo, lora_rank), **fields)
    fake_gpu.KERNELS.clear()
    peaks = fake_gpu.step(ral_grpo, config, args, processes)
    # One prompt a microbatch: nothing is padded, and no mask keeps flash attention away.
    assert {name for name, _, _ in fake_gpu.KERNELS} == {"flash"}
    with mock.patch.multiple(
        memory, compute_dtype=lambda: torch.bfloat16, LOGIT_CHUNK=2**26, ATTENTION_CHUNK=2**26
    ):
        frozen = [] if lora_rank else [config]
        need = memory.memory_gb(config, args, lora_rank, frozen, processes=processes)
    if args.train_vision:  # each pass encodes
        del need["vision"]
    for phase, parts in need.items():
        traced = peaks[phase].total() / fake_gpu.GIB
        assert sum(parts.values()) == pytest.approx(traced, rel=0.1), phase
    if lora_rank and processes == 1:  # the frozen weights are not gathered into a second copy
        assert peaks["rollout"]["gathered"] < 0.1 * peaks["rollout"]["weights"]


@pytest.mark.parametrize(
    ("script", "tokens", "layers"), [(kd_baseline, 128, 2), (attn_distill, 768, 1)]
)
def test_distillation_counts_the_logits_of_both_models(script, tokens, layers):
    config, args = config_of("7B", layers=layers), make_args(script, lora_rank=64, tokens=tokens)
    peaks = fake_gpu.step(script, config, args, 1, evaluates=False)
    traced = peaks["update"]["activations"] / fake_gpu.GIB
    with mock.patch.multiple(
        memory, compute_dtype=lambda: torch.bfloat16, LOGIT_CHUNK=2**26, ATTENTION_CHUNK=2**26
    ):
        need = memory.memory_gb(config, args, 64, [config], distils=True)["update"]
    assert need["activations"] == pytest.approx(traced, rel=0.1)


def test_a_second_graph_adds_what_it_was_expected_to_add(monkeypatch):
    """As that of a masked image with gradients: `passes=2`."""

    def twice(model, batch, args):
        scores, masked = plain(model, batch, args), plain(model, batch, args)
        return replace(scores, logps=(scores.logps + masked.logps) / 2)

    plain, traced, needed = grpo_baseline.score_policy, [], []
    config, args = config_of("2B", layers=3), make_args(grpo_baseline, lora_rank=64, tokens=256)
    for passes, score in ((1, plain), (2, twice)):
        monkeypatch.setattr(grpo_baseline, "score_policy", score)
        peaks = fake_gpu.step(grpo_baseline, config, args, 1, evaluates=False)
        traced.append(peaks["update"]["activations"] / fake_gpu.GIB)
        with mock.patch.object(memory, "compute_dtype", lambda: torch.bfloat16):
            need = memory.memory_gb(config, args, 64, passes=passes)
        needed.append(need["update"]["activations"])
    assert needed[1] - needed[0] == pytest.approx(traced[1] - traced[0], rel=0.1) != 0


def kernels_of(config) -> set[str]:
    """The kernels that the language model ran; the vision encoder has fewer heads."""
    heads = config.text_config.num_attention_heads
    return {name for name, query, _ in fake_gpu.KERNELS if query[1] == heads}


def test_padded_prompts_run_on_the_memory_efficient_kernel():
    config, args = config_of("7B", Qwen2_5_VLConfig, layers=1), make_args(ral_grpo, 0, 2, tokens=3)
    fake_gpu.KERNELS.clear()
    fake_gpu.step(ral_grpo, config, args, 2, padded=True)
    assert kernels_of(config) == {"memory-efficient"}


@pytest.mark.parametrize(
    ("script", "family", "lora_rank", "processes", "padded"),
    [
        (ral_grpo, Qwen2VLConfig, 0, 8, False),
        (ral_grpo, Qwen2_5_VLConfig, 64, 1, True),
        (attn_distill, Qwen2_5_VLConfig, 64, 2, True),
    ],
)
def test_every_tensor_is_on_the_gpu(script, family, lora_rank, processes, padded):
    config, args = config_of("7B", family, layers=1), make_args(script, lora_rank, 2, tokens=3)
    torch.backends.cuda.enable_cudnn_sdp(True)
    fake_gpu.KERNELS.clear()
    fake_gpu.step(script, config, args, processes, "cuda", padded)
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it would plan for every new shape
    assert kernels_of(config) == {"memory-efficient" if padded else "flash"}


def test_attention_without_a_mask_is_attention_with_it():
    """`causal_lower_right`, which a GPU gets, against the mask, which a CPU gets."""
    torch.manual_seed(0)
    b, g, h, k, p, t, d = 2, 3, 8, 2, 37, 11, 16
    inputs = [torch.randn(b, n, p + g * t, d, requires_grad=True) for n in (h, k, k)]
    own = torch.full((t, t), -torch.inf).triu(1)
    mask = F.pad(own, (p, 0))[None, None].repeat(1, 1, h // k, 1)
    weight, results = None, []
    for bias in (mask, None):
        layout = common.Layout(p, g, None, response_bias=bias)
        out = common.response_attention(*inputs, 0.25, layout)
        weight = torch.randn_like(out) if weight is None else weight
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for masked, causal in zip(*results, strict=True):
        torch.testing.assert_close(causal, masked, atol=1e-5, rtol=1e-5)


def test_the_keys_of_a_prompt_are_laid_out_once():
    """Else the product of every decoded token would copy them."""
    cache = common.GroupCache(group_size=2, max_new_tokens=4)
    cache.add_prompt(*(torch.randn(1, 5, 3, 8).transpose(1, 2) for _ in range(2)))
    assert all(x.is_contiguous() for x in cache.prompt[0])


def test_a_fused_optimizer_resumes_with_its_steps_on_the_gpu(tmp_path):
    """Its kernel reads them there. The device `meta` stands for a GPU."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    fields = {"prompts": 1, "read": 0, "extra": {}, "args": {}, "inputs": {}}
    state = states.State(1, True, {}, **fields, random=torch.get_rng_state().tolist())
    states.write_state(tmp_path, state, states.state_tensors(model, optimizer), keep=1)
    resumed = torch.nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    optimizer.defaults["fused"] = True  # it refuses parameters on that device
    states.load_state("--resume", tmp_path, state, resumed, optimizer)
    on_gpu = dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), "meta")
    for state in optimizer.state.values():
        assert {name: value.device.type for name, value in state.items()} == on_gpu
