"""Runs that are killed, and runs of two processes: what the tests show for one case each, for all.

    python benchmarks/soak.py kills --number 100     # SIGKILL at random moments, about 20 minutes
    python benchmarks/soak.py ranks                  # every script and family, about 5 minutes

`kills` starts real processes with `--resume auto`, kills each at a random moment after it has begun
to train or to save, and compares every run that reaches its end with one that was left alone:
metrics, samples and weights must be the same to the bit, as they are on a CPU. `ranks` compares
the weights of one process with those of two on the same prompts.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from real import write_checkpoint, write_rows

from common import FAMILIES

SCRIPTS = ("sft", "grpo_baseline", "ral_grpo", "kd_baseline", "attn_distill")


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["kills", "ranks"]]
    """See above."""
    number: int = 100
    """How many processes are killed."""
    seed: int = 0
    """Of the moments."""


def write_inputs(folder: Path) -> None:
    """A checkpoint of each family, and a data file with images, videos and broken rows."""
    for family in FAMILIES:
        (folder / family).mkdir()
        write_checkpoint(folder / family, family)
    (folder / "rows.json").write_text(json.dumps(write_rows(folder)))


def command(folder: Path, script: str, family: str, out: Path, processes: int, **more) -> list[str]:
    """The command of a small run of four prompts a step, whose responses are rewarded by their
    length: random weights earn nothing else."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    fields = {"model": str(folder / family), "data": str(folder / "rows.json")}
    fields |= {"max_skipped": 0.3, "frames": 4, "image_tokens": 9, "frame_tokens": 4}
    fields |= {"max_new_tokens": 6, "workers": 0, "eval_examples": 4, "learning_rate": 3e-4}
    fields |= {"prompts_per_step": 4 // processes, "micro_batch_size": 2, "steps": 12} | more
    if script != "sft":
        fields["group_size"] = 4
    if script in ("kd_baseline", "attn_distill"):
        fields["teacher"] = str(folder / family)
    jobs = out.with_suffix(".json")
    jobs.write_text(json.dumps([(script, fields, False)]))
    return [*launch, str(ROOT / "tests" / "ranks.py"), str(jobs), str(out)]


def outcome(out: Path) -> tuple:
    """Metrics but for times, samples, skipped rows and weights, of the only run in `out`."""
    out = out / "0"
    lines = []
    for name in ("metrics.jsonl", "samples.jsonl", "skipped.jsonl"):
        if name == "samples.jsonl" and not (out / name).exists():
            continue
        with (out / name).open() as file:
            rows = map(json.loads, file)
            lines.append([{k: v for k, v in x.items() if not k.startswith("perf/")} for x in rows])
    weights = load_file(out / "checkpoint" / "model.safetensors")
    return lines, weights


def start(words: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=environment)


def soak_kills(args: Args, folder: Path) -> None:
    moments, kills, compared = random.Random(args.seed), 0, 0
    log = folder / "log"
    while kills < args.number:
        script = moments.choice(SCRIPTS)
        family = moments.choice(FAMILIES)
        whole, cut = folder / f"{script}-{family}", folder / "cut"
        more = {"save_every": 1, "keep": 1, "lora_rank": moments.choice((0, 4))}
        whole = whole.with_name(f"{whole.name}-{more['lora_rank']}")
        if not whole.exists():
            words = command(folder, script, family, whole, 1, **more)
            assert start(words, log).wait() == 0, log.read_text()[-3000:]
        finished, killed_here = False, 0
        while not finished:
            words = command(folder, script, family, cut, 1, resume="auto", **more)
            process, begun = start(words, log), time.time()
            before = latest(cut)
            while process.poll() is None and latest(cut) == before:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 1.5))
            if process.poll() is None and kills < args.number:
                process.send_signal(signal.SIGKILL)
                kills, killed_here = kills + 1, killed_here + 1
            status = process.wait()
            over = status == 1 and "has finished" in log.read_text()[-500:]
            finished = status == 0 or over
            assert finished or status == -signal.SIGKILL, log.read_text()[-3000:]
            assert time.time() - begun < 600
        (lines, weights), (others, expected) = outcome(cut), outcome(whole)
        same = weights.keys() == expected.keys() and lines == others
        same = same and all(torch.equal(weights[name], expected[name]) for name in weights)
        assert same, f"{script} {family} {more}: not the same"
        compared += 1
        print(f"{kills} kills: {script} {family} the same after {killed_here}", flush=True)
        shutil.rmtree(cut)
    print(f"{kills} processes killed, {compared} runs compared, all the same to the bit")


def latest(out: Path) -> float:
    """When anything in a run directory was written last."""
    times = [0.0]
    for folder, _, names in os.walk(out):
        for name in names:
            try:
                times.append(os.stat(os.path.join(folder, name)).st_mtime)
            except FileNotFoundError:
                continue
    return max(times)


def soak_ranks(folder: Path) -> None:
    for script in SCRIPTS:
        for family in FAMILIES:
            outs = [folder / f"{script}-{family}-{n}" for n in (1, 2)]
            log = folder / f"{script}-{family}.log"
            for n, out in zip((1, 2), outs, strict=True):
                # One prompt a forward: then both compute in the same shapes, whatever is padded.
                words = command(folder, script, family, out, n, steps=3, micro_batch_size=1)
                assert start(words, log).wait() == 0, log.read_text()[-3000:]
            (_, weights), (_, others) = map(outcome, outs)
            worst = max((weights[name] - others[name]).abs().max().item() for name in weights)
            first = load_file(folder / family / "model.safetensors")
            moved = max((weights[name] - first[name]).abs().max().item() for name in weights)
            print(f"{script:<16}{family:<12}weights moved by up to {moved:.1e},"
                  f" differ by up to {worst:.1e}", flush=True)  # fmt: skip
            assert worst < 1e-5 < moved


if __name__ == "__main__":
    parsed = tyro.cli(Args, description=__doc__)
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(Path(directory))
        if parsed.what == "kills":
            soak_kills(parsed, Path(directory))
        else:
            soak_ranks(Path(directory))
