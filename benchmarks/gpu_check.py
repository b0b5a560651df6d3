"""Does a new GPU compute what the CPU does, in the memory that was estimated, and how fast?

    python benchmarks/gpu_check.py                        # ten minutes on one GPU
    python benchmarks/gpu_check.py --parts env numerics   # some parts only
    python benchmarks/gpu_check.py --rehearse             # tiny, on a CPU; numerics of one family

    env       versions, the card, attention kernels, sampling
    numerics  log-probabilities, attention rows, gradients and tokens of each model family, against
              float32 on the CPU; a sharded model against its own checkpoint, to the bit
    toy       every script on the toy: all weights, adapters, a trained vision encoder
    resume    a run that was stopped and resumed, against one that was not
    real7b    GRPO and RAL at 7B on 32-frame videos: memory against the estimate, seconds
    real2b    the same at 2B with all weights

Nothing is downloaded: weights are random and videos are drawn, so responses have the full length.
Each part is a process of its own. Every finding is appended to OUT/gpu.jsonl at once, and the table
OUT/gpu.md, failures first, is written after each part. The exit status is 1 if anything failed.
"""

import json
import math
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the scripts have it

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import real_size
from real import write_checkpoint
from safetensors.torch import load_file, save_file

import attn_distill
import common
import eval
import grpo_baseline
import kd_baseline
import ral_grpo
import sft
from support import disk, memory, ranks, runs, toy
from support.memory import GIB
from support.prompts import Prompt, PromptConfig, collate, encode_prompt

GPU = torch.cuda.is_available()
LIMITS = {"env": 90, "numerics": 120, "toy": 150, "resume": 90, "real7b": 300, "real2b": 150}
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "tied")
VERDICTS = {None: "", True: "yes", False: "**no**"}


@dataclass
class Args:
    parts: tuple[str, ...] = tuple(LIMITS)
    """Which parts to run, each for at most its `LIMITS` in seconds."""
    out: Path = Path("runs/gpu_check")
    """Directory of the findings."""
    rehearse: bool = False
    """Run tiny sizes, in this process, on a CPU."""


@dataclass
class Findings:
    """What a part has found, one JSON line each."""

    out: Path
    part: str = "main"

    def note(self, what: str, value: Any, ok: bool | None = None, trace: str = "") -> None:
        """Append a finding; `ok` is None where there is nothing to judge."""
        line = {"part": self.part, "what": what, "value": short(value), "ok": ok, "trace": trace}
        with (self.out / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{self.part}: {what}: {line['value']}{': FAILED' if ok is False else ''}", flush=True
        )

    def attempt(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function; an exception is a finding, and the part continues."""
        try:
            return function(*args)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            self.note(what, reason, False, traceback.format_exc()[-3000:])


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {short(x)}" for name, x in value.items())
    return ", ".join(map(short, value)) if isinstance(value, (list, tuple)) else str(value)


def write_table(out: Path) -> bool:
    """Write gpu.md; returns whether nothing failed."""
    lines = [json.loads(x) for x in (out / "gpu.jsonl").read_text().splitlines()]
    lines.sort(key=lambda x: x["ok"] is not False)
    failed, good = (sum(x["ok"] is ok for x in lines) for ok in (False, True))
    text = [f"# GPU check: {failed} failed, {good} as expected", ""]
    text += ["| part | what | value | as expected |", "|---|---|---|---|"]
    for x in lines:
        value = x["value"].replace("|", "/").replace("\n", " ")
        text.append(f"| {x['part']} | {x['what']} | {value} | {VERDICTS[x['ok']]} |")
    text += [f"\n```\n{x['trace']}```" for x in lines if x["trace"]]
    (out / "gpu.md").write_text("\n".join(text) + "\n")
    return failed == 0


def distance(a: Tensor, b: Tensor) -> float:
    """Relative error of `a`."""
    return ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12)).item()


# env


def env(found: Findings, work: Path) -> None:
    names = ("torch", "transformers", "peft", "numpy", "av", "datasets", "safetensors")
    found.note("versions", {"python": platform.python_version()} | {x: version(x) for x in names})
    found.note("GPU", torch.cuda.get_device_name() if GPU else "none: a rehearsal")
    if GPU:
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found.note("card", {"GiB": total, "CUDA": torch.version.cuda, "NCCL": nccl})
    for function in (attention, sampling):
        found.attempt(function.__name__, function, found)


def attention(found: Findings) -> None:
    """Flash attention, aligned to the lower right corner, against an additive mask."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Query and key heads, their width, positions of a prompt and of a response, responses.
    h, k, d, p, t, g = (28, 4, 128, 2112, 768, 8) if GPU else (4, 2, 16, 32, 8, 2)
    options = {"device": common.device(), "dtype": common.compute_dtype(), "requires_grad": True}
    for prompt, tokens in ((p, t), (37, 1), (200, 129)):
        qkv = [torch.randn(1, n, prompt + g * tokens, d, **options) for n in (h, k, k)]
        results, weight = [], None
        own = torch.full((tokens, tokens), -torch.inf, device=qkv[0].device).triu(1)
        bias = F.pad(own, (prompt, 0))[None, None].repeat(1, 1, h // k, 1)
        for mask in (None, bias, bias):
            layout = common.Layout(prompt, g, None, response_bias=mask)
            out = common.response_attention(*qkv, d**-0.5, layout)
            weight = torch.randn_like(out) if weight is None else weight
            results.append([out, *torch.autograd.grad((out * weight).sum(), qkv)])
        flash, masked, again = results
        error = max(distance(*pair) for pair in zip(flash, masked, strict=True))
        what = f"attention of {tokens} tokens behind {prompt}, flash against a mask"
        found.note(f"{what}: relative error", error, error < 2e-2)
        same = all(torch.equal(*pair) for pair in zip(masked, again, strict=True))
        found.note("its backward pass repeats to the bit", same)


def sampling(found: Findings) -> None:
    vocabulary = 152064 if GPU else 512
    logits = torch.randn(64, vocabulary, device=common.device(), dtype=common.compute_dtype())
    logits[:, -4:] = -torch.inf
    noise = torch.rand(64, device=logits.device)
    noise[0] = 1 - 2**-24
    largest, allowed = int(common.pick_tokens(logits, noise, 1.0, 1.0).max()), vocabulary - 5
    found.note("the largest id sampled, of allowed", [largest, allowed], largest <= allowed)


# numerics


@contextmanager
def computing(device: str, dtype: torch.dtype, sharded: bool) -> Iterator[None]:
    with (
        mock.patch.object(common, "device", lambda: device),
        mock.patch.object(common, "compute_dtype", lambda: dtype),
        mock.patch.object(dist, "is_initialized", lambda: sharded),
    ):
        yield


def numerics(found: Findings, work: Path) -> None:
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding's convolution
    for family in FAMILIES if GPU else FAMILIES[1:2]:
        found.attempt(family, compare, found, work / family, family)


def compare(found: Findings, directory: Path, family: str) -> None:
    """A small checkpoint whose weights are large enough to tell tokens apart."""
    directory.mkdir(parents=True)
    write_checkpoint(directory, "qwen2_vl" if family == "tied" else family, tied=family == "tied")
    weights = load_file(directory / "model.safetensors")
    for name, x in weights.items():
        scale = 3 if "language_model.layers" in name and "_proj.weight" in name else 1
        weights[name] = (x * scale).bfloat16().float()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with computing("cpu", torch.float32, sharded=False):
        wanted = measure(common.load_model(directory), directory)
    kinds = {
        "float32": (torch.float32, {}),
        "bfloat16": (torch.bfloat16, {}),
        "bfloat16, adapters": (torch.bfloat16, {"lora_rank": 4}),
    }
    device = common.device()
    for kind, (dtype, fields) in kinds.items():
        with computing(device, dtype, sharded=False):
            frozen = measure(common.load_model(directory, frozen=True), directory)
        with computing(device, dtype, sharded=True):
            got = measure(common.load_model(directory, **fields), directory)
        errors = {x: (got[x] - wanted[x]).abs().max().item() for x in ("logps", "rows")}
        exact = dtype == torch.float32
        bounds = {"logps": 1e-3, "rows": 1e-4} if exact else {"logps": 0.15, "rows": 0.05}
        good = all(errors[x] < bounds[x] for x in bounds)
        found.note(f"{family}, {kind}: largest difference from the CPU", errors, good)
        if not fields:
            error = distance(got["gradient"], wanted["gradient"])
            good = error < (1e-3 if exact else 0.15)
            found.note(f"{family}, {kind}: relative error of the gradient", error, good)
        tokens = (got["tokens"] == wanted["tokens"]).float().mean().item()
        verdict = tokens == 1 if exact else None
        found.note(f"{family}, {kind}: share of greedy tokens equal to the CPU's", tokens, verdict)
        gaps = {x: (got[x] - frozen[x]).abs().max().item() for x in ("features", "logps", "rows")}
        what = f"{family}, {kind}: difference from a frozen copy, as the first KL"
        found.note(what, gaps, not any(gaps.values()))


def small_prompts(directory: Path) -> list[Prompt]:
    """A long video and a small image."""
    processor, rng = common.load_processor(directory), random.Random(0)
    processor.prompt_config = PromptConfig({}, question_first=True)
    tasks = (toy.Task(grid=4, frames=6), toy.Task(grid=3))
    return [encode_prompt(processor, toy.sample_example(rng, task)) for task in tasks]


def measure(model: torch.nn.Module, directory: Path) -> dict[str, Tensor]:
    """Scores of both prompts, one of them padded, the gradient, and greedy tokens."""
    batch, device = collate(model, small_prompts(directory), 0), model.device
    lengths = torch.tensor([[9, 5, 12], [3, 12, 7]])
    ids = torch.randint(1, 300, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    mask, cut = torch.arange(12) < lengths[..., None], torch.zeros(2, 3, dtype=torch.bool)
    rollout = common.Rollout(batch, ids.to(device), mask.to(device), cut.to(device))
    scores = common.score(model, rollout, attn_layers=[-1])
    seen, rows = scores.mask[..., None], scores.attentions[-1]
    gradient = torch.zeros(1)
    if any(p.requires_grad for p in model.parameters()):
        (0.1 * scores.logps.sum() + (rows[:, :, 1:] * seen).square().sum()).backward()
        grads = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
        gradient = torch.cat([ranks.full_tensor(x).float().cpu().flatten() for x in grads])
        model.zero_grad()
    model.generation_config.eos_token_id = [3]
    tokens = common.generate_group(model, batch, 1, 8).response_ids.cpu()
    features = [level for row in batch.features for block in row for level in block]
    values = {"logps": scores.logps, "rows": rows[:, :, 1:] * seen, "features": torch.cat(features)}
    values = {name: x.detach().float().cpu() for name, x in values.items()}
    return values | {"gradient": gradient, "tokens": F.pad(tokens, (0, 8 - tokens.shape[-1]))}


# toy, resume


TINY = {"prompts_per_step": 2, "micro_batch_size": 2}
SHORT = TINY | {"eval_examples": 4, "group_size": 2, "num_iterations": 2, "max_new_tokens": 6}


def run(found: Findings, script: Any, what: str, **fields: Any) -> None:
    """A script's own `main`; notes its last metrics."""
    script.main(script.Args(**script.TOY | fields))
    lines = read_metrics(fields["out"])
    training = [v for x in lines for name, v in x.items() if name.startswith("train/")]
    names = ("train/loss", "train/kl", "eval/accuracy", "perf/step_s", "perf/peak_mem_gb")
    shown = {name: lines[-1][name] for name in names if name in lines[-1]}
    found.note(what, shown, bool(training) and all(map(math.isfinite, training)))


def read_metrics(out: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def start_toy(found: Findings, work: Path, name: str = "sft", **fields: Any) -> str:
    given = {"eval_examples": 8, "eval_above": 1.0, "stop_accuracy": 2.0}
    given |= {"steps": 60} if GPU else {"steps": 2} | TINY
    run(found, sft, f"{name}, toy", out=str(work / name), **given | fields)
    return str(work / name / "checkpoint")


def toys(found: Findings, work: Path) -> None:
    model = start_toy(found, work)
    taught = {"teacher": start_toy(found, work, "large", toy_size="large", steps=2)}
    jobs = {
        "grpo_baseline": (grpo_baseline, {}),
        "ral_grpo": (ral_grpo, {}),
        "ral_grpo, predicting row": (ral_grpo, {"attn_row": "predicting"}),
        "ral_grpo, adapters": (ral_grpo, {"lora_rank": 4}),
        "ral_grpo, trained vision": (ral_grpo, {"train_vision": True, "steps": 1}),
        "kd_baseline": (kd_baseline, taught),
        "attn_distill": (attn_distill, taught),
        "attn_distill, adapters": (attn_distill, taught | {"lora_rank": 4}),
    }
    for name in jobs if GPU else ("ral_grpo", "attn_distill, adapters"):
        script, fields = jobs[name]
        given = {"model": model, "out": str(work / name)}
        given |= {"steps": 3} if GPU else {"steps": 1} | SHORT
        found.attempt(name, partial(run, found, script, name, **given | fields))
    fields = {"model": model, "examples": 8, "out": str(work / "eval")}
    found.attempt("eval", eval.main, eval.Args(**eval.TOY | fields))


def resume(found: Findings, work: Path) -> None:
    fields = {"model": start_toy(found, work), "save_every": 2, "eval_every": 2}
    fields |= {} if GPU else SHORT
    for name, more in (("all weights", {}), ("adapters", {"lora_rank": 4})):
        found.attempt(name, stop_and_resume, found, work / name, name, fields | more)


def stop_and_resume(found: Findings, work: Path, name: str, fields: dict[str, Any]) -> None:
    """Four steps in one run, and in one that goes on after two."""
    kept = []
    for what, stops in (("whole", (4,)), ("cut", (2, 4))):
        given = fields | {"out": str(work / what), "resume": "auto"}
        for steps in stops:
            run(found, ral_grpo, f"{name}: {what}, {steps} steps", **given, steps=steps)
        lines = [{name: x for name, x in line.items() if not name.startswith("perf/")}
                 for line in read_metrics(given["out"])]  # fmt: skip
        kept.append((lines, load_file(work / what / "checkpoint" / "model.safetensors")))
    (lines, weights), (ours, its) = kept
    same = ours == lines and all(torch.equal(its[x], weights[x]) for x in weights)
    gap = max((its[x].float() - weights[x].float()).abs().max().item() for x in weights)
    steps = [x["step"] for x in ours] == [x["step"] for x in lines]
    # CUDA adds in an order of its own, so only a CPU promises the same bits.
    good = steps and gap < 1e-2 and (same or GPU)
    found.note(f"{name}, resumed: same bits, largest difference of a weight", [same, gap], good)


# real7b, real2b


def real(found: Findings, work: Path, size: str, lora_rank: int | None) -> None:
    """Both scripts at real size, with the peak of each phase against its estimate."""
    work.mkdir(parents=True)
    config = real_size.write_inputs(work, size if GPU else "small")
    fields = {"data": str(work / "rows.jsonl"), "model": str(work), "lora_rank": lora_rank}
    fields |= {"eval_examples": 1, "eval_every": 1000, "save_every": 0}
    fields |= {"gradient_checkpointing": True}
    sizes = {"steps": 3, "frames": 32, "workers": 4}
    tiny = {"steps": 1, "frames": 2, "workers": 0, "frame_tokens": 16}
    fields |= sizes if GPU else tiny | SHORT
    last = {}
    for script in (grpo_baseline, ral_grpo):
        args = script.Args(**fields | {"out": str(work / script.__name__)})
        last[script] = found.attempt(script.__name__, one_run, found, script, args, config)
    if all(last.values()):
        grpo, ral = last.values()
        ratios = {x: ral[f"perf/{x}_s"] / grpo[f"perf/{x}_s"] for x in ("update", "step")}
        found.note("RAL / GRPO, seconds", ratios)


def one_run(found: Findings, script: Any, args: Any, config: Any) -> dict[str, float]:
    """Run a script and meter it; returns the metrics of its last step."""
    name, peaks, lap = script.__name__, {}, runs.Stopwatch.lap

    def metered(self: Any, phase: str) -> None:
        lap(self, phase)
        if GPU:
            peaks[phase] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()

    with mock.patch.object(runs.Stopwatch, "lap", metered):
        script.main(args)
    last = read_metrics(args.out)[-1]
    for other in ("perf/tokens_per_s", "perf/run_s", "perf/eval_s"):  # not seconds of the step
        del last[other]
    seconds = {x[5:-2]: v for x, v in last.items() if x.startswith("perf/") and x.endswith("_s")}
    found.note(f"{name}: seconds of the last step", seconds, all(map(math.isfinite, last.values())))
    token = 1000 * last["perf/rollout_s"] / args.max_new_tokens
    found.note(f"{name}: ms of a rollout per decoded token", token)
    chosen = SimpleNamespace(**disk.read_record(Path(args.out)))
    found.note(f"{name}: adapters' rank, 0 for all weights", chosen.lora_rank)
    frozen = [] if chosen.lora_rank else [config]
    needed = memory.memory_gb(config, chosen, chosen.lora_rank, frozen)
    for phase in peaks.keys() & needed.keys():
        estimate = sum(needed[phase].values())
        value = {"estimate": estimate, "measured": peaks[phase]}
        found.note(f"{name}, {phase}: GB", value, 0.7 < peaks[phase] / estimate < 1.05)
    return last


# The driver


PARTS = {"env": env, "numerics": numerics, "toy": toys, "resume": resume}
PARTS["real7b"] = partial(real, size="7B", lora_rank=None if GPU else 4)
PARTS["real2b"] = partial(real, size="2B", lora_rank=0)


def run_part(out: Path, part: str, work: Path) -> None:
    """Run a part in this process, which is a group of one."""
    start, found = time.time(), Findings(out, part)
    ranks.start_ranks()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # What random weights say is rewarded by its length.
    with mock.patch.object(common, "accuracy", lambda text, *_: float(len(text) % 2)):
        found.attempt(part, PARTS[part], found, work / part)
    found.note("seconds of the part", time.time() - start)


def main(args: Args) -> int:
    unknown = set(args.parts) - set(LIMITS)
    ranks.require(not unknown, f"--parts {' '.join(unknown)}: choose from {', '.join(LIMITS)}")
    remedy = "--rehearse checks what a CPU can"
    ranks.require(GPU or args.rehearse, f"no GPU is visible to PyTorch; {remedy}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.jsonl").write_text("")
    passed = False
    for part in args.parts:
        with TemporaryDirectory() as work:
            given = (args.out, part, Path(work))
            if args.rehearse:
                run_part(*given)
            else:
                os.environ["HF_HUB_OFFLINE"] = "1"
                process = get_context("spawn").Process(target=run_part, args=given)
                process.start()
                process.join(LIMITS[part])
                if process.is_alive():
                    process.kill()
                    process.join()
                    Findings(args.out).note(part, f"not finished after {LIMITS[part]} s", False)
                elif process.exitcode:
                    Findings(args.out).note(f"{part}: exit status", process.exitcode, False)
        passed = write_table(args.out)
    print(f"{args.out / 'gpu.md'}: {'as expected' if passed else 'something failed'}")
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except ranks.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
