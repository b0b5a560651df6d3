"""Print expected and traced memory of a step at real size, as a table. It needs no GPU.

    python benchmarks/real_size.py

It also makes what gpu_check.py measures on a GPU: a random Qwen2-VL with a released configuration,
and 32-frame videos.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
import tyro
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fake_gpu
from real import SPECIAL, write_tokenizer, write_video

import ral_grpo
from support import memory

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIELDS += ("num_key_value_heads", "vocab_size")
SIZES = {  # of the text model, in this order
    "8B": (4096, 12288, 36, 32, 8, 151936),  # Qwen3-VL; for the table alone
    "7B": (3584, 18944, 28, 28, 4, 152064),
    "2B": (1536, 8960, 28, 12, 2, 151936),
    "small": (256, 768, 4, 8, 2, 4096),
}


def config_of(size: str) -> Qwen2VLConfig | Qwen3VLConfig:
    """The released configuration of a size."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = dict(zip(FIELDS, SIZES[size], strict=True)) | {"rope_parameters": rope}
    vision = {"hidden_size": text["hidden_size"]}
    if size == "8B":
        rope |= {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6}
        text["head_dim"] = 128
        vision = {"hidden_size": 1152, "out_hidden_size": text["hidden_size"]}
        return Qwen3VLConfig(text_config=text, vision_config=vision)
    if size == "small":
        rope["mrope_section"] = [4, 6, 6]
        vision |= {"depth": 2, "embed_dim": 64, "num_heads": 2}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size == "2B")


def write_inputs(folder: Path, size: str) -> Qwen2VLConfig:
    """A checkpoint, and a data file of 32-frame videos; prompts differ in length, as real ones do,
    since some of CUDA's kernels plan anew for each shape."""
    tokenizer, config = write_tokenizer(folder), config_of(size)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config.text_config.eos_token_id = ids["<|im_end|>"]
    config.text_config.pad_token_id = ids["<|endoftext|>"]
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id = ids["<|vision_start|>"]
    config.vision_end_token_id = ids["<|vision_end|>"]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    rows = []
    for i in range(10):
        write_video(folder / f"{i}.mp4", frames=32, size=(448, 448 - 64 * (i % 4)))
        problem = "What is the man holding? " * (i + 1)
        row = {"problem": problem, "data_type": "video", "path": f"{i}.mp4"}
        rows.append(row | {"problem_type": "numerical", "solution": str(i)})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return config


FRAMES = [
    ("128 frames", {}),
    ("an image", {"frames": 2}),
    ("32 frames", {"frames": 32, "image_tokens": 2048}),
]
MEMORY = [  # size, rank of adapters (0: all weights), GPUs, number of the inputs in FRAMES
    ("7B", 0, 1, 0), ("7B", 0, 4, 0), ("7B", 0, 8, 0), ("7B", 64, 1, 0), ("7B", 64, 8, 0),
    ("8B", 0, 8, 0), ("8B", 64, 1, 0), ("7B", 0, 8, 1), ("7B", 64, 1, 1), ("8B", 0, 8, 1),
    ("8B", 64, 1, 1), ("2B", 0, 1, 2), ("2B", 64, 1, 2), ("7B", 0, 4, 2), ("7B", 64, 1, 2),
]  # fmt: skip


def print_memory() -> None:
    """What `fit_memory` expects of `ral_grpo.py` on a GPU, beside the peak of what is alive in the
    same step on fake tensors: traced, not measured."""
    standing = ("weights", "frozen models", "optimizer")
    phases = ("vision", "evaluation", "rollout", "update")
    heads = ("model, trained", "GPUs", "longest prompt", *standing, *phases)
    print(f"| {' | '.join(heads)} | peak: estimate, traced |\n{'|---' * (len(heads) + 1)}|")
    always = {"data": "rows.json", "num_iterations": 1, "gradient_checkpointing": True}
    gpu = {"compute_dtype": lambda: torch.bfloat16, "LOGIT_CHUNK": 2**26, "ATTENTION_CHUNK": 2**26}
    for size, lora_rank, processes, number in MEMORY:
        inputs, fields = FRAMES[number]
        config, args = config_of(size), ral_grpo.Args(**always | fields, lora_rank=lora_rank)
        config.text_config.pad_token_id = 0
        with mock.patch.multiple(memory, **gpu):
            frozen = [] if lora_rank else [config]
            need = memory.memory_gb(config, args, lora_rank, frozen, processes=processes)
        traced = fake_gpu.step(ral_grpo, config, args, processes)
        trained = f"LoRA, rank {lora_rank}" if lora_rank else "all weights"
        line = [f"{size.replace('8B', 'Qwen3-VL-8B')}, {trained}", str(processes)]
        line += [f"{inputs}: {memory.prompt_tokens(args, config.model_type):,}"]
        line += [f"{need['rollout'][part]:.1f}" for part in standing]
        expected = {phase: sum(parts.values()) for phase, parts in need.items()}
        found = {phase: traced[phase].total() / memory.GIB for phase in phases}
        line += [f"{expected[phase]:.1f}, {found[phase]:.1f}" for phase in phases]
        line += [f"{max(expected.values()):.0f}, {max(found.values()):.0f}"]
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    tyro.cli(print_memory, description=__doc__)
