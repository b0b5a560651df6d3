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
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.nn import Module

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from directions import cosine, direction
from reproduce import OWN, commit, words

import common
import ral_grpo
from support import cli, toy
from support.prompts import collate, encode_prompt

TERMS = {"attention": "attn_loss", "token": "pg_loss"}
PRECISIONS = ("float32", "bfloat16")


@dataclass
class Args:
    seeds: tuple[int, ...] = tuple(OWN)
    """Seeds of the cold starts."""
    cold_starts: Path = ROOT / "runs" / "cold-starts"
    """Directory of the cold starts, `images-<seed>` each."""
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
    model = common.load_model(path, field="--cold-starts")
    processor = common.load_processor(path, field="--cold-starts")
    task = toy.Task.load(path)
    processor.prompt_config = task.prompt_config()
    fields = {"seed": seed, "think": task.think, "beta": 0.0, "num_iterations": 1}
    args = ral_grpo.Args(**ral_grpo.TOY | fields)
    train, *_ = task.open_data(replace(args, eval_examples=1), partial(encode_prompt, processor))
    prompts = list(islice(train.begin(1, count), count))
    inputs = collate(model, prompts, processor.tokenizer.pad_token_id)
    rollout, _, rewards, _ = ral_grpo.roll_out(model, processor, prompts, inputs, args)
    advantages = ral_grpo.group_advantages(rewards)

    def batches_of(model: Module) -> list[ral_grpo.Batch]:
        """The rollout with this model's old log-probabilities and old attention."""
        inputs = collate(model, prompts, processor.tokenizer.pad_token_id)
        own = replace(rollout, prompts=inputs)
        cuts = [slice(i, i + 16) for i in range(0, count, 16)]
        batches = [ral_grpo.Batch(own[cut], advantages[cut]) for cut in cuts]
        with torch.no_grad():
            for batch in batches:
                ral_grpo.score_policy(model, batch, args)
        return batches

    kept = [batches_of(model), batches_of(in_bfloat16(model))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    ral_grpo.update(model, optimizer, batches_of(model), replace(args, lambda_attn=0.0))
    found, directions = {}, {term: [] for term in TERMS}
    for name, after, batches in zip(PRECISIONS, (model, in_bfloat16(model)), kept, strict=True):

        def terms(batch: ral_grpo.Batch, model: Module = after) -> dict[str, torch.Tensor]:
            return ral_grpo.loss_terms(ral_grpo.score_policy(model, batch, args), batch, args)

        with torch.no_grad():
            values = torch.cat([terms(batch)["attn_jsd"] for batch in batches])
        found[f"JSD, {name}"] = values.mean().item()
        for term, key in TERMS.items():
            losses = [lambda b=batch, k=key, f=terms: f(b)[k].sum() for batch in batches]
            directions[term].append(direction(after, losses).float())
    return found | {f"cosine, {term}": cosine(*both) for term, both in directions.items()}


def main(args: Args) -> None:
    rows = {}
    for rate in args.rates:
        for seed in args.seeds:
            path = args.cold_starts / f"images-{seed}" / "checkpoint"
            rows.setdefault(rate, []).append(measure(path, seed, rate, args.prompts))
    result = {"commit": commit(), "prompts": args.prompts, "seeds": args.seeds, "rates": rows}
    args.results.write_text(json.dumps(result, indent=1) + "\n")
    columns = list(rows[args.rates[0]][0])
    print(f"| learning rate | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for rate, found in rows.items():
        cells = [[row[name] for row in found] for name in columns]
        texts = [f"{sum(x) / len(x):.1e}" if "JSD" in name else words(x)
                 for name, x in zip(columns, cells, strict=True)]  # fmt: skip
        print(f"| {rate:g} | {' | '.join(texts)} |")


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__)
