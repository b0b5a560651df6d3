"""Does the attention term survive bfloat16? RAL's gradient is proportional to what a step changed.

    python benchmarks/reproduce.py --claims "table 3" --cells KD --results runs/mine.jsonl
    python benchmarks/rounding.py     # from the cold starts that the first line leaves in runs/

For each cold start and learning rate it samples 8 responses to each of 64 prompts, takes one
optimiser step of GRPO on float32 weights, and then computes the terms of RAL's loss twice: in
float32, and as on a GPU, where the passes at the rollout and after the step both run on bfloat16
copies of the weights. It prints the divergence of the two attention policies, and the cosine of the
gradients in the two precisions, of the attention term and of the token term. Intervals are of 95%,
Student's t over the cold starts. Results: `results/rounding.json`.
"""

import json
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import Module

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import directions
from directions import cosine, direction, losses, opened
from reproduce import commit, markdown, words

import ral_grpo
from support import cli
from support.prompts import collate

TERMS = {"attention": "attn_loss", "token": "pg_loss"}


@dataclass
class Args(directions.Args):
    rates: tuple[float, ...] = (6e-4, 1e-4, 3e-5, 1e-5)
    """Learning rates of the step: that of the toy, and down to the paper's."""
    prompts: int = 64
    """Prompts that are answered, a multiple of 16."""
    results: Path = ROOT / "benchmarks" / "results" / "rounding.json"
    """Where the numbers go."""


def in_bfloat16(model: Module) -> Module:
    """A copy of the model that computes on bfloat16 weights."""
    model = deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def measure(path: Path, seed: int, rate: float, count: int) -> dict[str, float]:
    """One cold start at one rate: the divergences, and the cosines of the gradients."""
    model, processor, args, prompts = opened(path, count, seed=seed, beta=0.0, num_iterations=1)
    pad = processor.tokenizer.pad_token_id
    inputs = collate(model, prompts, pad)
    rollout, _, rewards, _ = ral_grpo.roll_out(model, processor, prompts, inputs, args)
    advantages = ral_grpo.group_advantages(rewards)

    def batches_of(model: Module) -> list[ral_grpo.Batch]:
        """The rollout with this model's old log-probabilities and old attention."""
        own = replace(rollout, prompts=collate(model, prompts, pad))
        cuts = [slice(i, i + 16) for i in range(0, count, 16)]
        batches = [ral_grpo.Batch(own[cut], advantages[cut]) for cut in cuts]
        with torch.no_grad():
            for batch in batches:
                ral_grpo.score_policy(model, batch, args)
        return batches

    kept = {"float32": batches_of(model), "bfloat16": batches_of(in_bfloat16(model))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    ral_grpo.update(model, optimizer, batches_of(model), replace(args, lambda_attn=0.0))
    after = {"float32": model, "bfloat16": in_bfloat16(model)}
    found, both = {}, {term: [] for term in TERMS}
    for name, batches in kept.items():
        given = after[name], ral_grpo, batches
        with torch.no_grad():
            values = [loss() for loss in losses(*given, "attn_jsd", args)]
        found[f"JSD, {name}"] = torch.cat(values).mean().item()
        for term, key in TERMS.items():
            both[term].append(direction(after[name], losses(*given, key, args)).float())
    return found | {f"cosine, {term}": cosine(*pair) for term, pair in both.items()}


def table(rows: dict[float, list[dict[str, float]]]) -> str:
    """A line for each rate; `rows` has what `measure` found for each cold start."""

    def cell(name: str, values: list[float]) -> str:
        return f"{sum(values) / len(values):.1e}" if "JSD" in name else words(values)

    return markdown([
        {"learning rate": f"{float(rate):g}"}
        | {name: cell(name, [row[name] for row in found]) for name in found[0]}
        for rate, found in rows.items()
    ])  # fmt: skip


def main(args: Args) -> None:
    rows = {}
    for rate in args.rates:
        for seed in args.seeds:
            path = args.cold_starts / f"images-{seed}" / "checkpoint"
            rows.setdefault(rate, []).append(measure(path, seed, rate, args.prompts))
    result = {"commit": commit(), "prompts": args.prompts, "seeds": args.seeds, "rates": rows}
    args.results.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__)
