"""Does RAL work here, by how much, and why? The paper's claims in small, over many seeds.

    python benchmarks/reproduce.py                      # every claim; goes on where it stopped
    python benchmarks/reproduce.py --claims ablations --seeds 1 2 3
    python benchmarks/reproduce.py --quick              # minutes; labelled as no evidence

Each claim is a set of cells (a method and what it is given), each seed of which starts from a cold
start that all its cells share: a seed owns its cold start and its reinforcement learning. The
scripts run unchanged, through their `main`. Every cell is judged on the same 2,048 held-out
examples, whose standard error is 0.01. Raw numbers go to `benchmarks/results/reproduce.jsonl`, one
line a cell and seed, with the commit that made them; tables are printed in Markdown, with means,
95% intervals, and differences to the baseline paired by seed.

The budget was chosen on GRPO alone, seeds 101 and 102 (5e-5: 0.65, 0.67; 1e-4: 0.77, 0.75), so that
it ends near 0.7, where a better method has room to show.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from scipy.stats import t as student_t

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import grpo_baseline
import ral_grpo
import sft

BUDGET = {"steps": 60, "learning_rate": 7e-5}  # of every reinforcement-learning cell
SFT_STEPS = 240  # as many optimiser steps: 60 x 4 inner iterations; SFT has no rollouts to pay for

GRPO, RAL = (grpo_baseline, {}), (ral_grpo, {})
TASKS = {
    "images": {},
    "images, image first": {"toy_order": "image-first"},
    "thinking": {"think": True},
    "videos": {"frames": 8},
}


def ral(**fields) -> tuple:
    return ral_grpo, fields


# Claim: task -> cells, the first of which is the baseline of the differences.
CLAIMS = {
    "table-1": {
        task: {
            "GRPO": GRPO,
            "SFT continued": (sft, {"steps": SFT_STEPS, "stop_accuracy": 2.0, "watch_above": 1.0}),
            "RAL": RAL,
        }
        for task in TASKS
    },
    "ablations": {
        "images": {
            "GRPO": GRPO,
            **{f"RAL, lambda {x:g}": ral(lambda_attn=float(x)) for x in (0.1, 1, 10, 100, 1000)},
            "RAL, layer 0, lambda 100": ral(attn_layer=0, lambda_attn=100.0),
            "RAL, own row, lambda 100": ral(attn_row="own", lambda_attn=100.0),
            "RAL, reference anchor, lambda 10": ral(attn_anchor="reference", lambda_attn=10.0),
            "RAL, forward KL, lambda 100": ral(attn_divergence="forward-kl", lambda_attn=100.0),
        }
    },
    "iterations": {
        "images": {
            f"{name}{n} inner iterations": (script, fields | {"num_iterations": n})
            for n in (1, 2, 8, 16)
            for name, (script, fields) in (
                ("GRPO, ", GRPO),
                ("RAL, ", RAL),
                ("RAL, lambda 100, ", ral(lambda_attn=100.0)),
            )
            if n > 1 or script is grpo_baseline  # with one, RAL is GRPO
        }
    },
}


@dataclass
class Args:
    claims: list[str] = field(default_factory=lambda: list(CLAIMS))
    """Which claims to run."""
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """Which tasks of them."""
    seeds: list[int] = field(default_factory=lambda: list(range(1, 11)))
    """Seeds."""
    examples: int = 2048
    """Held-out examples, the same for every cell."""
    quick: bool = False
    """One seed, ten steps, 64 examples, a file of its own: shows that it runs, and nothing else."""
    results: Path = ROOT / "benchmarks" / "results" / "reproduce.jsonl"
    """Where the numbers go."""


def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def judged(out: Path) -> dict[str, float]:
    """The last evaluation of a run, and the means of what tells how large the attention term is."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval/accuracy" in line][-1]
    row = {name.removeprefix("eval/"): v for name, v in last.items() if name.startswith("eval/")}
    for name in ("attn_jsd", "attn_grad_norm", "pg_grad_norm", "kl"):
        values = [line[f"train/{name}"] for line in lines if f"train/{name}" in line]
        row |= {name: float(np.median(values))} if values else {}
    return row


def main(args: Args) -> None:
    budget, examples = BUDGET, args.examples
    if args.quick:
        budget, examples, args.seeds = BUDGET | {"steps": 10}, 64, args.seeds[:1]
        args.results = args.results.with_name("reproduce-quick.jsonl")
    args.results.parent.mkdir(exist_ok=True)
    rows = (
        [json.loads(x) for x in args.results.read_text().splitlines()]
        if (args.results.exists())
        else []
    )
    done = {(row["task"], row["cell"], row["seed"]): row for row in rows}

    def run(task: str, cell: str, seed: int, script, fields: dict, directory: str) -> Path:
        out, start = Path(directory) / cell.replace(" ", "-"), time.time()
        script.main(script.Args(out=str(out), seed=seed, eval_examples=examples, **fields))
        row = {"task": task, "cell": cell, "seed": seed} | judged(out)
        row |= {"seconds": round(time.time() - start), "commit": commit()}
        done[task, cell, seed] = row
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return out

    for claim in args.claims:
        for task, cells in CLAIMS[claim].items():
            for seed in args.seeds if task in args.tasks else []:
                missing = [cell for cell in cells if (task, cell, seed) not in done]
                if not missing:
                    continue
                with tempfile.TemporaryDirectory() as directory:
                    cold = Path(directory) / "cold-start"
                    if (task, "cold start", seed) in done:  # the same seed makes the same again
                        sft.main(sft.Args(out=str(cold), seed=seed, **TASKS[task]))
                    else:
                        run(task, "cold start", seed, sft, TASKS[task], directory)
                    for cell in missing:
                        script, fields = cells[cell]
                        fields = fields | {"model": str(cold / "checkpoint")}
                        if script is not sft:
                            fields = budget | {"eval_every": budget["steps"]} | fields
                        run(task, cell, seed, script, fields, directory)
            print_table(claim, task, cells, done, args.quick)


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95% interval."""
    if len(values) < 2:
        return f"{np.mean(values):.3f}" if values else "—"
    half = student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {half:.3f}"


def print_table(claim: str, task: str, cells: dict, done: dict, quick: bool) -> None:
    """Means with intervals, and differences to the first cell paired by seed."""
    print(f"\n### {claim}: {task}{' (quick: no evidence)' if quick else ''}\n")
    baseline = next(iter(cells))
    print(f"| method | seeds | accuracy | on target | minus {baseline}: accuracy | on target |"
          " JSD, nats | gradient ratio |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for cell in ("cold start", *cells):
        rows = {seed: row for (t, c, seed), row in done.items() if (t, c) == (task, cell)}
        base = {seed: row for (t, c, seed), row in done.items() if (t, c) == (task, baseline)}
        both = [seed for seed in rows if seed in base and cell not in (baseline, "cold start")]
        line = [cell, str(len(rows))]
        for name in ("accuracy", "target_attn"):
            line.append(interval([row[name] for row in rows.values()]))
        for name in ("accuracy", "target_attn"):
            line.append(interval([rows[s][name] - base[s][name] for s in both]) if both else "")
        sizes = [row["attn_jsd"] for row in rows.values() if "attn_jsd" in row]
        line.append(f"{np.median(sizes):.0e}" if sizes else "")
        ratios = [
            row["attn_grad_norm"] / row["pg_grad_norm"]
            for row in rows.values()
            if row.get("pg_grad_norm")
        ]
        line.append(f"{np.median(ratios):.3f}" if ratios else "")
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
