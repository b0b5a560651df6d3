"""Does a new GPU compute what the CPU does, in the memory that was estimated, and how fast?

    python benchmarks/gpu_check.py                        # ten minutes on one GPU
    python benchmarks/gpu_check.py --parts env numerics   # some parts only
    python benchmarks/gpu_check.py --rehearse             # all of it, tiny, on a CPU

    env       versions, the card, a process group of one, attention kernels, sampling
    numerics  log-probabilities, attention rows, gradients and tokens of each model family, against
              float32 on the CPU; a sharded model against its own checkpoint, to the bit
    toy       every script on the toy: all weights, adapters, a trained vision encoder, videos
    resume    a run that was stopped and resumed, against one that was not
    real7b    GRPO and RAL at 7B on 32-frame videos: memory against the estimate, seconds
    real2b    the same at 2B with all weights

Nothing is downloaded: weights are random and videos are drawn, so responses have the full length.
Each part is a process of its own. Every finding is appended to OUT/gpu.jsonl at once, and the table
OUT/gpu.md, failures first, is written after each part. The exit status is 1 if anything failed.
Model FLOPs count 2 a parameter and token forward and 4 backward, no attention, nothing twice.
"""

import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
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
from support import memory, ranks, runs, toy
from support.prompts import Prompt, PromptConfig, collate, encode_prompt

GIB = 2**30
GPU = torch.cuda.is_available()
LIMITS = {"env": 90, "numerics": 120, "toy": 150, "resume": 90, "real7b": 300, "real2b": 150}
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "tied")


@dataclass
class Args:
    parts: tuple[str, ...] = tuple(LIMITS)
    """Which parts to run."""
    limit: float = 600
    """Seconds for all parts together; a part without time left is a failure."""
    out: Path = Path("runs/gpu_check")
    """Directory of the findings."""
    rehearse: bool = False
    """Run tiny sizes, in this process, on a CPU."""
    part: tyro.conf.Suppress[str] = ""


class Findings:
    """What was found, one JSON line each."""

    def __init__(self, out: Path):
        self.out, self.part = out, "main"

    def note(self, what: str, value: Any, ok: bool | None = None, trace: str = "") -> None:
        """Append a finding; `ok` is None where there is nothing to judge."""
        line = {"part": self.part, "what": what, "value": value, "ok": ok, "trace": trace}
        with (self.out / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
        verdict = {None: "", True: ": as expected", False: ": FAILED"}[ok]
        print(f"{self.part}: {what}: {short(value)}{verdict}", flush=True)

    def attempt(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function; an exception is a finding, and the part continues."""
        try:
            return function(*args)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            self.note(what, reason, False, traceback.format_exc()[-3000:])

    def table(self) -> bool:
        """Write gpu.md; returns whether nothing failed."""
        lines = [json.loads(x) for x in (self.out / "gpu.jsonl").read_text().splitlines()]
        lines.sort(key=lambda x: x["ok"] is not False)
        failed = sum(x["ok"] is False for x in lines)
        good = sum(x["ok"] is True for x in lines)
        text = [f"# GPU check: {failed} failed, {good} as expected", ""]
        text += ["| part | what | value | as expected |", "|---|---|---|---|"]
        for x in lines:
            value = short(x["value"]).replace("|", "/").replace("\n", " ")
            verdict = {None: "", True: "yes", False: "**no**"}[x["ok"]]
            text.append(f"| {x['part']} | {x['what']} | {value} | {verdict} |")
        text += [f"\n```\n{x['trace']}```" for x in lines if x["trace"]]
        (self.out / "gpu.md").write_text("\n".join(text) + "\n")
        return failed == 0


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {short(x)}" for name, x in value.items())
    return ", ".join(map(short, value)) if isinstance(value, (list, tuple)) else str(value)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative error of `a`."""
    return ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12)).item()


# env


def env(found: Findings, work: Path) -> None:
    names = ("torch", "transformers", "peft", "numpy", "av", "datasets", "safetensors")
    found.note("versions", {"python": platform.python_version()} | {x: version(x) for x in names})
    found.note("GPU", torch.cuda.get_device_name() if GPU else "none: a rehearsal")
    if GPU:
        card = torch.cuda.get_device_properties(0)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        value = {"GiB": card.total_memory / GIB, "CUDA": torch.version.cuda, "NCCL": nccl}
        found.note("card", value)
    found.attempt("collectives in a group of one", collectives, found)
    for function in (attention, rows, sampling):
        found.attempt(function.__name__, function, found)


def collectives(found: Findings) -> None:
    total = torch.ones(4, device=common.device())
    dist.all_reduce(total)
    dist.broadcast_object_list([1], src=0)
    found.note("collectives in a group of one", dist.get_backend_config(), bool(total.sum() == 4))


def matrix_rate() -> float:
    """FLOPs a second of a square matrix product in the dtype that the scripts compute in, the
    median of ten after a warm-up."""
    size, times = 8192 if GPU else 256, []
    a = torch.randn(size, size, device=common.device(), dtype=common.compute_dtype())
    for _ in range(11):
        start = time.perf_counter()
        (a @ a).sum().item()  # waits for it
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def shapes() -> tuple[int, ...]:
    """Query and key heads, their width, positions of a prompt and of a response, responses."""
    return (28, 4, 128, 2112, 768, 8) if GPU else (4, 2, 16, 32, 8, 2)


def random_qkv(p: int, t: int, g: int) -> list[Tensor]:
    h, k, d, *_ = shapes()
    options = {"device": common.device(), "dtype": common.compute_dtype(), "requires_grad": True}
    return [torch.randn(1, n, p + g * t, d, **options) for n in (h, k, k)]


def attention(found: Findings) -> None:
    """Flash attention, aligned to the lower right corner, against an additive mask."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    h, k, d, p, t, g = shapes()
    for prompt, tokens in ((p, t), (37, 1), (200, 129)):
        qkv, results, weight = random_qkv(prompt, tokens, g), [], None
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


def rows(found: Findings) -> None:
    *_, d, p, t, g = shapes()
    query, key, _ = random_qkv(p, t, g)
    layout = common.Layout(p, g, None)
    error = (common.attention_rows(query, key, d**-0.5, layout).sum(-1) - 1).abs().max().item()
    found.note("attention rows sum to 1: largest error", error, error < 1e-3)


def sampling(found: Findings) -> None:
    vocabulary = 152064 if GPU else 512
    logits = torch.randn(64, vocabulary, device=common.device(), dtype=common.compute_dtype())
    logits[:, -4:] = -torch.inf
    noise = torch.rand(64, device=logits.device)
    noise[0] = 1 - 2**-24
    largest = int(common.pick_tokens(logits, noise, 1.0, 1.0).max())
    found.note(
        "the largest id sampled, of allowed", [largest, vocabulary - 5], largest < vocabulary - 4
    )


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
    for family in FAMILIES if GPU else FAMILIES[1:3]:
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
    device, copies = common.device(), {}
    for kind, (dtype, fields) in kinds.items():
        if dtype not in copies:
            with computing(device, dtype, sharded=False):
                copies[dtype] = measure(common.load_model(directory, frozen=True), directory)
        frozen = copies[dtype]
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


TINY = {"prompts_per_step": 2, "micro_batch_size": 2, "eval_examples": 4}
SHORT = TINY | {"group_size": 2, "num_iterations": 2, "max_new_tokens": 6}


def run(found: Findings, script: Any, what: str, **fields: Any) -> list[dict[str, float]]:
    """A script's own `main`; returns its metrics."""
    out = fields["out"]
    script.main(script.Args(**script.TOY | fields))
    lines = [json.loads(x) for x in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    training = [v for x in lines for name, v in x.items() if name.startswith("train/")]
    names = ("train/loss", "train/kl", "eval/accuracy", "perf/step_s", "perf/peak_mem_gb")
    shown = {name: lines[-1][name] for name in names if name in lines[-1]}
    found.note(what, shown, bool(training) and all(map(math.isfinite, training)))
    return lines


def start_toy(found: Findings, work: Path, name: str = "sft", **fields: Any) -> str:
    small = {} if GPU else {x: TINY[x] for x in ("prompts_per_step", "micro_batch_size")}
    fields = {"steps": 60 if GPU else 2, "eval_examples": 8, "eval_above": 1.0} | small | fields
    run(found, sft, f"{name}, toy", out=str(work / name), stop_accuracy=2.0, **fields)
    return str(work / name / "checkpoint")


def toys(found: Findings, work: Path) -> None:
    model, quick = start_toy(found, work), {"steps": 3} if GPU else {"steps": 1} | SHORT
    large = start_toy(found, work, "large", toy_size="large", steps=2)
    taught = {"teacher": large}
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
    if not GPU:
        jobs = {name: jobs[name] for name in ("ral_grpo", "attn_distill, adapters")}
    for name, (script, fields) in jobs.items():
        out = str(work / name.replace(", ", "-").replace(" ", "-"))
        fields = {"model": model, "out": out} | quick | fields
        lines = found.attempt(name, lambda s=script, n=name, f=fields: run(found, s, n, **f))
        first = [x["train/attn_jsd_1"] for x in lines or () if "train/attn_jsd_1" in x]
        if first:
            same = all(x == 0 for x in first)
            found.note(f"{name}: divergence in the first pass", max(first), same)
    fields = {"model": model, "examples": 8, "out": str(work / "eval")}
    found.attempt("evaluate", lambda: eval.main(eval.Args(**eval.TOY | fields)))


class Stopped(Exception):
    pass


def resume(found: Findings, work: Path) -> None:
    model = start_toy(found, work)
    fields = {"model": model, "steps": 4, "save_every": 2}
    fields |= {} if GPU else SHORT
    for name, more in (("all weights", {}), ("adapters", {"lora_rank": 4})):
        found.attempt(name, stop_and_resume, found, work, name, fields | more)


def stop_and_resume(found: Findings, work: Path, name: str, fields: dict[str, Any]) -> None:
    results = []
    for what in ("whole", "resumed"):
        out = work / f"{name} {what}"
        if what == "resumed":
            log = runs.Run.log

            def stop(self: Any, step: int, *rest: Any, log=log, **options: Any) -> None:
                if step == 3:
                    raise Stopped
                log(self, step, *rest, **options)

            try:
                with mock.patch.object(runs.Run, "log", stop):
                    ral_grpo.main(ral_grpo.Args(**ral_grpo.TOY | fields | {"out": str(out)}))
            except Stopped:
                pass
            fields = fields | {"resume": "auto"}
        lines = run(found, ral_grpo, f"{name}: {out.name}", **fields | {"out": str(out)})
        lines = [{k: v for k, v in x.items() if not k.startswith("perf/")} for x in lines]
        results.append((lines, load_file(out / "checkpoint" / "model.safetensors")))
    (lines, weights), (ours, its) = results
    same = ours == lines and all(torch.equal(its[x], weights[x]) for x in weights)
    gap = max((its[x].float() - weights[x].float()).abs().max().item() for x in weights)
    steps = [x["step"] for x in ours] == [x["step"] for x in lines]
    # CUDA adds in an order of its own, so only a CPU promises the same bits.
    good = steps and gap < 1e-2 and (same or GPU)
    found.note(f"{name}, resumed: same bits, largest difference of a weight", [same, gap], good)


# real7b, real2b


def real(found: Findings, work: Path, size: str, lora_rank: int | None) -> None:
    """Both scripts at real size, with the peak of each phase against its estimate."""
    folder, frames = work / size, 32 if GPU else 2
    folder.mkdir(parents=True)
    config = real_size.write_inputs(folder, size if GPU else "small")
    if GPU:
        torch.cuda.empty_cache()
    rate, last = matrix_rate(), {}
    fields = {"data": str(folder / "rows.jsonl"), "model": str(folder), "frames": frames}
    fields |= {"steps": 3 if GPU else 1, "eval_examples": 1, "eval_every": 1000, "save_every": 0}
    fields |= {"workers": 4 if GPU else 0, "lora_rank": lora_rank, "gradient_checkpointing": True}
    fields |= {} if GPU else SHORT | {"frame_tokens": 16}
    for script in (grpo_baseline, ral_grpo):
        args = script.Args(**fields | {"out": str(folder / script.__name__)})
        last[script] = found.attempt(script.__name__, one_run, found, script, args)
    steps = {script: x for script, x in last.items() if x}
    for script, x in steps.items():
        model, args = common.empty_model(config), script.Args(**fields)
        weights = sum(p.numel() for p in model.model.language_model.layers.parameters())
        weights += config.text_config.vocab_size * config.text_config.hidden_size
        prompt, new = memory.visual_tokens(args), args.group_size * args.max_new_tokens
        flops = 6 * args.num_iterations * weights * args.prompts_per_step * (prompt + new)
        used = flops / x["perf/update_s"] / rate
        found.note(f"{script.__name__}: FLOP utilisation of the update", used)
        token = 1000 * x["perf/rollout_s"] / args.max_new_tokens
        found.note(f"{script.__name__}: ms of a rollout per decoded token", token)
    if len(steps) == 2:
        grpo, ral = steps.values()
        ratios = {x: ral[f"perf/{x}_s"] / grpo[f"perf/{x}_s"] for x in ("update", "step")}
        found.note("RAL / GRPO, seconds", ratios)


def one_run(found: Findings, script: Any, args: Any) -> dict[str, float]:
    """Run a script and meter it; returns the metrics of its last step."""
    name, needed, peaks = script.__name__, {}, {}
    fit, lap = common.fit_memory, runs.Stopwatch.lap

    def fit_memory(*given: Any, **options: Any) -> Any:
        chosen, config = fit(*given, **options), given[1]
        frozen = [] if chosen.lora_rank else [config]
        needed.update(memory.memory_gb(config, chosen, chosen.lora_rank, chosen.group_size, frozen))
        found.note(f"{name}: adapters' rank, 0 for all weights", chosen.lora_rank)
        return chosen

    def metered(self: Any, phase: str) -> None:
        lap(self, phase)
        if GPU:
            peaks[phase] = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()

    with (
        mock.patch.object(common, "fit_memory", fit_memory),
        mock.patch.object(runs.Stopwatch, "lap", metered),
    ):
        script.main(args)
    lines = (Path(args.out) / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    del last["perf/tokens_per_s"]
    seconds = {x[5:-2]: v for x, v in last.items() if x.startswith("perf/") and x.endswith("_s")}
    found.note(f"{name}: seconds of the last step", seconds, all(map(math.isfinite, last.values())))
    for phase, peak in peaks.items():
        if phase in needed:
            estimate = sum(needed[phase].values())
            value = {"estimate": estimate, "measured": peak}
            found.note(f"{name}, {phase}: GB", value, 0.7 < peak / estimate < 1.05)
    return last


# The driver


PARTS = {"env": env, "numerics": numerics, "toy": toys, "resume": resume}
PARTS["real7b"] = partial(real, size="7B", lora_rank=None if GPU else 4)
PARTS["real2b"] = partial(real, size="2B", lora_rank=0)


def run_part(found: Findings, part: str, work: Path) -> None:
    """Run a part in this process, which is a group of one."""
    start, found.part = time.time(), part
    ranks.start_ranks()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # What random weights say is rewarded by its length.
    with mock.patch.object(common, "accuracy", lambda text, *_: float(len(text) % 2)):
        found.attempt(part, PARTS[part], found, work / part)
    found.note("seconds of the part", time.time() - start)


def start_part(found: Findings, args: Args, part: str, work: Path, limit: float) -> None:
    """Run a part in a process of its own, no longer than its limit."""
    command = [sys.executable, __file__, "--part", part, "--out", str(args.out)]
    environment = os.environ | {"TMPDIR": str(work), "HF_HUB_OFFLINE": "1"}
    try:
        status = subprocess.run(command, env=environment, timeout=limit).returncode
        if status:
            found.note(f"{part}: exit status", status, False)
    except subprocess.TimeoutExpired:
        found.note(part, f"not finished after {limit:.0f} s", False)


def main(args: Args) -> int:
    found = Findings(args.out)
    if args.part:
        with tempfile.TemporaryDirectory() as work:
            run_part(found, args.part, Path(work))
        return 0
    unknown = set(args.parts) - set(LIMITS)
    ranks.require(not unknown, f"--parts {' '.join(unknown)}: choose from {', '.join(LIMITS)}")
    remedy = "see --rehearse for what a CPU can check"
    ranks.require(GPU or args.rehearse, f"no GPU is visible to PyTorch; {remedy}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.jsonl").write_text("")
    end, passed = time.time() + args.limit, False
    with tempfile.TemporaryDirectory() as work:
        for part in args.parts:
            left = min(LIMITS[part], end - time.time())
            if args.rehearse:
                run_part(found, part, Path(work))
            elif left < 15:
                found.note(part, "no time left", False)
            else:
                start_part(found, args, part, Path(work), left)
            passed = found.table()
    print(f"{args.out / 'gpu.md'}: {'as expected' if passed else 'something failed'}")
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except ranks.UsageError as error:
        sys.exit(f"error: {error}")
