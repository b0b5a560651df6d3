"""Steps of GRPO and RAL at real size: a random Qwen2-VL with the 7B configuration, 32-frame videos,
G 8, through the scripts' own command line.

    python benchmarks/real_size.py                     # 7B where there is a GPU, else a small model
    python benchmarks/real_size.py --processes 8 --lora-rank 0     # all weights, on eight GPUs
    python benchmarks/real_size.py --memory            # expected and traced memory, as a table

Nothing is downloaded: weights are random and videos are drawn, so responses have the full length,
which is the worst case. Printed are the medians of `perf/*` over the steps but for the first; a run
of one-token responses tells prefill from decoding. Model FLOPs count 2 a parameter and token
forward and 4 backward, no attention, nothing computed twice; their utilisation is the share of the
matrix rate that this program measures first.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fake_gpu
from real import SPECIAL, write_tokenizer, write_video

import common
import memory
import ral_grpo

SIZES = {  # of the text model
    "8B": {  # Qwen3-VL; for --memory alone
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "2B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}


@dataclass
class Args:
    size: str | None = None
    """7B, 2B or small; unset: 7B on a GPU, small without."""
    processes: int = 1
    """GPUs, with torchrun."""
    lora_rank: int | None = None
    """As in the scripts; unset: what they choose."""
    max_new_tokens: int | None = None
    """Length of the responses; unset: 768, small 64."""
    prompts_per_step: int = 8
    """In all processes together."""
    steps: int = 4
    """The first is not counted."""
    memory: bool = False
    """Print the table of expected and traced memory, which needs no GPU, and stop."""


def config_of(size: str, ids: dict[str, int] | None = None) -> Qwen2VLConfig:
    """The released configuration of a size; special token ids are those of the tokenizer."""
    text = SIZES[size] | {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [4, 6, 6] if size == "small" else [16, 24, 24],
        }
    }
    vision = {"hidden_size": text["hidden_size"]}
    if size == "small":
        vision |= {"depth": 2, "embed_dim": 64, "num_heads": 2}
    special = {}
    if ids:
        text |= {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"]}
        text |= {"pad_token_id": ids["<|endoftext|>"]}
        special = {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }
    if size == "8B":
        rope = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
        text["rope_parameters"] |= rope | {"rope_theta": 5e6}
        vision = {"hidden_size": 1152, "out_hidden_size": text["hidden_size"]}
        return Qwen3VLConfig(text_config=text, vision_config=vision, **special)
    tied = text.pop("tie_word_embeddings", False)
    return Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **special
    )


def write_inputs(folder: Path, size: str) -> Qwen2VLConfig:
    """A checkpoint, and a data file of 32-frame videos; prompts differ in length, as real ones do,
    since some of CUDA's kernels plan anew for each shape."""
    tokenizer = write_tokenizer(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = config_of(size, ids)
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


def matrix_rate(size: int) -> float:
    """FLOPs a second of a square matrix product in the dtype the scripts compute in."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size, size, device=device, dtype=common.compute_dtype())
    best = 0.0
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def measure(script: str, folder: Path, args: Args, tokens: int) -> dict[str, float]:
    """Medians of a run's metrics over its steps but for the first."""
    launch = [sys.executable]
    if args.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc_per_node={args.processes}"]
    words = f"""{ROOT / f"{script}.py"} --model {folder} --data {folder / "rows.jsonl"} --frames 32
        --steps {args.steps} --eval-examples 1 --eval-every 1000 --save-every 0 --overwrite
        --max-new-tokens {tokens} --prompts-per-step {args.prompts_per_step // args.processes}
        --out {folder / "run"}"""
    words += f" --lora-rank {args.lora_rank}" if args.lora_rank is not None else ""
    # The numbers in docs/scaling.md are of the predicting row.
    words += " --attn-norm-every 0 --attn-row predicting" if script == "ral_grpo" else ""
    subprocess.run([*launch, *words.split()], check=True, stdout=sys.stderr)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines][2:]
    names = [name for name in lines[0] if name.startswith("perf/")]
    return {name: float(np.median([line[name] for line in lines])) for name in names}


def main(args: Args) -> None:
    gpu = torch.cuda.is_available()
    size = args.size or ("7B" if gpu else "small")
    tokens = args.max_new_tokens or (64 if size == "small" else 768)
    card = torch.cuda.get_device_name() if gpu else "no GPU: float32 on the CPU"
    rate = matrix_rate(8192 if gpu else 2048)
    print(f"{size}, {card} x {args.processes}, {rate / 1e12:.2f} TFLOP/s in matrix products\n")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        config = write_inputs(folder, size)
        prefill = measure("grpo_baseline", folder, args, 1)["perf/rollout_s"]
        results = {
            script: measure(script, folder, args, tokens)
            for script in ("grpo_baseline", "ral_grpo")
        }
    model = common.empty_model(config)
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters())
    weights += config.text_config.vocab_size * config.text_config.hidden_size
    prompt, responses = 2048 + 64, 8 * tokens  # 32 frames of 128 tokens, two a patch; and the text
    phases = ("data_wait", "vision", "rollout", "reference", "update")
    print("| script | step | data | vision | prefill | decode | reference | update |"
          " tokens/s | peak memory | FLOP utilisation: update, step |")  # fmt: skip
    print("|---" * 11 + "|")
    for script, result in results.items():
        seconds = {phase: result[f"perf/{phase}_s"] for phase in phases}
        step, mine = result["perf/step_s"], args.prompts_per_step // args.processes
        update = 2 * 6 * weights * mine * (prompt + responses)  # two inner iterations
        whole = update + 4 * weights * mine * (prompt + responses)  # reference and rollout
        line = [f"`{script}.py`", f"{step:.1f} s"]
        line += [f"{seconds[phase]:.2f} s" for phase in ("data_wait", "vision")]
        line += [f"{prefill:.2f} s", f"{seconds['rollout'] - prefill:.2f} s"]
        line += [f"{seconds[phase]:.2f} s" for phase in ("reference", "update")]
        line += [f"{result['perf/tokens_per_s']:.0f}", f"{result['perf/peak_mem_gb']:.1f} GB"]
        used = (update / seconds["update"] / rate, whole / step / rate)
        line.append(", ".join(f"{share:.0%}" for share in used))
        print(f"| {' | '.join(line)} |")


FRAMES = [("128 frames", {}), ("an image", {"frames": 2}), ("32 frames", {"frames": 32})]
FRAMES[2][1]["image_tokens"] = 2048
MEMORY = [  # size, rank of adapters (0: all weights), GPUs, number of the inputs in FRAMES
    ("7B", 0, 1, 0), ("7B", 0, 4, 0), ("7B", 0, 8, 0), ("7B", 64, 1, 0), ("7B", 64, 8, 0),
    ("8B", 0, 8, 0), ("8B", 64, 1, 0), ("7B", 0, 8, 1), ("7B", 64, 1, 1), ("8B", 0, 8, 1),
    ("8B", 64, 1, 1), ("2B", 0, 1, 2), ("2B", 64, 1, 2), ("7B", 0, 4, 2), ("7B", 64, 1, 2),
]  # fmt: skip


def print_memory() -> None:
    """What `fit_memory` expects of `ral_grpo.py` on a GPU, beside the peak of what is alive in the
    same step on fake tensors: traced, not measured."""
    always = {"data": "rows.json", "num_iterations": 1, "gradient_checkpointing": True}
    standing, phases = (
        ("weights", "frozen models", "optimizer"),
        ("vision", "evaluation", "rollout", "update"),
    )
    print(f"| model, trained | GPUs | longest prompt | {' | '.join(standing)} |"
          f" {' | '.join(phases)} | peak: estimate, traced |")  # fmt: skip
    print("|---" * (len(standing) + len(phases) + 4) + "|")
    gpu = {"compute_dtype": lambda: torch.bfloat16, "LOGIT_CHUNK": 2**26, "ATTENTION_CHUNK": 2**26}
    for size, lora_rank, processes, number in MEMORY:
        inputs, fields = FRAMES[number]
        config, args = config_of(size), ral_grpo.Args(**always | fields, lora_rank=lora_rank)
        config.text_config.pad_token_id = 0
        with mock.patch.multiple(memory, **gpu):
            frozen = [] if lora_rank else [config]
            group = args.group_size
            need = memory.memory_gb(config, args, lora_rank, group, frozen, processes=processes)
        traced = fake_gpu.step(ral_grpo, config, args, processes)
        line = [f"{size}, {f'LoRA, rank {lora_rank}' if lora_rank else 'all weights'}"]
        line += [str(processes), f"{inputs}: {memory.prompt_tokens(args):,}"]
        line += [*(f"{need['rollout'][part]:.1f}" for part in standing)]
        expected = {phase: sum(parts.values()) for phase, parts in need.items()}
        found = {phase: traced[phase].total() / fake_gpu.GIB for phase in phases}
        line += [f"{expected[phase]:.1f}, {found[phase]:.1f}" for phase in phases]
        line.append(f"{max(expected.values()):.0f}, {max(found.values()):.0f}")
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    parsed = tyro.cli(Args, description=__doc__)
    if parsed.memory:
        print_memory()
    else:
        main(parsed)
