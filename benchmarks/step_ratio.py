"""How much longer does a step of the toy take with each method? The whole step, in turn.

    python sft.py
    python sft.py --toy-size large --stop-accuracy 0.99 --eval-above 0.8 --out runs/teacher
    OMP_NUM_THREADS=1 python benchmarks/step_ratio.py

Every method takes 11 steps, one after another, `--rounds` times. The first step of a run is left
out. Prints, for each method and its baseline, the median over rounds of the ratio of mean seconds a
step, and its range. The budgets are those of `reproduce.py`. Use an idle machine.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from forks import posterior_gaze
from reproduce import DISTILL, GAZE, GRPO, RELATIVES, SUM, ral

import attn_distill
import grpo_baseline
import kd_baseline
import ral_grpo
from support import cli

CELLS = {
    "GRPO": GRPO,
    "RAL, own row": ral(attn_row="own"),
    "posterior gaze": (posterior_gaze, GAZE),
    **{name: cell for name, cell in RELATIVES.items() if cell[0] not in (grpo_baseline, ral_grpo)},
    "KD": (kd_baseline, DISTILL),
    "KD + attention": (attn_distill, DISTILL | SUM),
}


@dataclass
class Args:
    model: str = "runs/sft/checkpoint"
    """The toy that is trained."""
    teacher: str = "runs/teacher/checkpoint"
    """The toy that teaches."""
    rounds: int = 7
    """Rounds."""


def seconds(script, fields: dict, args: Args) -> float:
    """Mean seconds of a step."""
    given = {"model": args.model, "steps": 11, "eval_every": 1000, "eval_examples": 16}
    if "teacher" in script.Args.__dataclass_fields__:
        given |= {"teacher": args.teacher, "evaluate_teacher": False}
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        out = Path(directory) / "run"
        script.main(script.Args(**script.TOY | given | fields, out=str(out)))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.mean(line["perf/step_s"] for line in lines[2:])


def main(args: Args) -> None:
    rounds = [
        {name: seconds(*cell, args) for name, cell in CELLS.items()} for _ in range(args.rounds)
    ]
    print("| method | baseline | ratio of the time of a step: median, range |\n|---|---|---|")
    for name in CELLS:
        baseline = "KD" if name.startswith("KD") else "GRPO"
        ratios = [row[name] / row[baseline] for row in rounds]
        middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {baseline} | {middle if name != baseline else ''} |")


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__)
