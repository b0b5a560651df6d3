"""What a teacher's words, and its gaze besides, teach the toy's student.

    python benchmarks/distill.py --teacher runs/teacher/checkpoint      # 5 seeds, resumable

For every seed one cold start, and from it kd_baseline.py and attn_distill.py with each gamma,
through their own `main`, with 60 steps of 8 prompts at learning rate 2e-4, a budget at which plain
distillation is far from saturated. On 1,024 held-out examples: greedy accuracy, attention on
target, and the divergence to the teacher's attention (JSD in nats a token, on the student's greedy
responses). Raw numbers go to benchmarks/results/distill.jsonl, one line a run; the table has means
with 95% intervals (Student's t), and paired differences to kd_baseline.py by seed.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy.stats import t as student_t

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import attn_distill
import common
import kd_baseline
import sft
import toy
from evaluate import evaluate
from prompts import collate, encode_prompt, visual_features


@dataclass
class Args:
    teacher: str = "runs/teacher/checkpoint"
    """The teacher."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Seeds; each owns its cold start and its distillation."""
    gammas: list[float] = field(default_factory=lambda: [1.0, 10.0])
    """Weights of the attention term."""
    examples: int = 1024
    """Held-out examples, the same for all."""
    results: Path = ROOT / "benchmarks" / "results" / "distill.jsonl"
    """One line a run; what is there is not run again."""


BUDGET = {"steps": 60, "prompts_per_step": 8, "micro_batch_size": 8, "learning_rate": 2e-4}
BUDGET |= {"eval_every": 60, "eval_examples": 64, "overwrite": True}


@torch.no_grad()
def judge(path: str, teacher_path: str, examples: int) -> dict[str, float]:
    """Accuracy, attention on target, and divergence to the teacher's attention of a checkpoint."""
    model, processor = common.load_model(path)
    teacher = common.load_teacher(teacher_path, model, processor)
    task = toy.Task.load(Path(path))
    first = task.order == "question-first"
    prompts = [
        encode_prompt(processor, model.config, example, question_first=first)
        for example in toy.held_out_examples(task, examples)
    ]
    metrics, _ = evaluate(model, processor, prompts, think=task.think, max_new_tokens=16)
    distances = []
    for start in range(0, examples, 64):
        chunk = prompts[start : start + 64]
        batch = collate(model, chunk, processor.tokenizer.pad_token_id)
        rollout = common.generate_group(model, batch, 1, 16)
        scores = common.score(model, rollout, attn_layers=[-1])
        pixels = [prompt.pixels for prompt in chunk]
        features = visual_features(teacher, pixels, batch.grids)
        seen = replace(batch, features=features, pixels=None)
        taught = common.score(teacher, replace(rollout, prompts=seen), attn_layers=[-1])
        jsd = attn_distill.jsd(scores.attentions[0], taught.attentions[0])
        distances.append(common.response_mean(jsd, scores.mask).flatten())
    return {
        "accuracy": metrics["eval/accuracy"],
        "target": metrics["eval/target_attn"],
        "jsd": torch.cat(distances).mean().item(),
    }


def main(args: Args) -> None:
    args.results.parent.mkdir(exist_ok=True)
    done = {}
    if args.results.exists():
        for line in args.results.read_text().splitlines():
            row = json.loads(line)
            done[row["method"], row["seed"]] = row
    print(f"{len(done)} runs are taken from {args.results}; --results NEW runs all")

    def record(method: str, seed: int, path: Path) -> None:
        row = {"method": method, "seed": seed} | judge(str(path), args.teacher, args.examples)
        done[method, seed] = row
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    methods = {"KD": (kd_baseline, {})}
    for gamma in args.gammas:
        methods[f"KD + attention, gamma {gamma:g}"] = (attn_distill, {"gamma_attn": gamma})
    for seed in args.seeds:
        missing = [m for m in ("cold start", *methods) if (m, seed) not in done]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as directory:
            cold = Path(directory) / "sft"
            sft.main(sft.Args(seed=seed, out=str(cold)))
            if "cold start" in missing:
                record("cold start", seed, cold / "checkpoint")
            for method, (script, fields) in methods.items():
                if method in missing:
                    out = Path(directory) / "student"
                    fields = BUDGET | fields | {"teacher": args.teacher, "seed": seed}
                    script.main(script.Args(model=str(cold / "checkpoint"), out=str(out), **fields))
                    record(method, seed, out / "checkpoint")
    if ("teacher", 0) not in done:
        record("teacher", 0, Path(args.teacher))
    print_table(done, args.seeds)


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95% interval."""
    if len(values) < 2:
        return f"{np.mean(values):.3f}"
    half = student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {half:.3f}"


def print_table(done: dict, seeds: list[int]) -> None:
    columns = ("accuracy", "target", "jsd")
    print("\n| method | seeds | accuracy | attention on target | JSD to the teacher's attention |")
    print("|---|---|---|---|---|")
    for method in dict.fromkeys(method for method, _ in done):
        rows = [row for (m, _), row in done.items() if m == method]
        cells = [interval([row[column] for row in rows]) for column in columns]
        print(f"| {method} | {len(rows)} | {' | '.join(cells)} |")
    for method in dict.fromkeys(method for method, _ in done):
        if method.startswith("KD +"):
            both = [s for s in seeds if (method, s) in done and ("KD", s) in done]
            cells = [
                interval([done[method, s][c] - done["KD", s][c] for s in both]) for c in columns
            ]
            print(f"| {method}, minus KD | {len(both)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
