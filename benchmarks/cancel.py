"""How much of RAL's attention term is left after it is summed over a group?

    python benchmarks/cancel.py --models runs/sft/checkpoint

One rollout of 16 prompts, one step of GRPO on it, and then, for each row of the response, the sum
over groups of |A_i / T_i x divergence| by response i of length T_i, and of the same with the sum
over the group inside. Responses that share their first s tokens share the predicting rows of tokens
1 to s + 1, and the own rows of tokens 1 to s. Of a shared row the divergence times sum_i A_i / T_i
is left: nothing where the responses of a group are equally long.
"""

import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import common
import ral_grpo
import toy
from prompts import collate, encode_prompt


@dataclass
class Args:
    models: list[str]
    """Toy checkpoints."""
    attn_rows: tuple[Literal["own", "predicting"], ...] = ("own", "predicting")
    """Rows of `ral_grpo.py`, a table each."""
    attn_layer: int = -1
    """The layer whose attention is compared."""
    prompts: int = 16
    """Of the rollout."""


def main(args: Args) -> None:
    for path, attn_row in product(args.models, args.attn_rows):
        model, processor = common.load_model(path), common.load_processor(path)
        task = toy.Task.load(Path(path))
        processor.prompt_config = task.prompt_config()
        length = toy.MAX_NEW_TOKENS[task.think]
        fields = {"attn_layer": args.attn_layer, "max_new_tokens": length, "think": task.think}
        fields |= {"attn_row": attn_row, "num_iterations": 1, "beta": 0.0}
        options = ral_grpo.Args(**ral_grpo.TOY | fields)
        numbers = range(args.prompts)
        examples = [toy.training_example(task, 1, number) for number in numbers]
        prompts = [replace(encode_prompt(processor, x), number=n) for n, x in enumerate(examples)]
        batch = collate(model, prompts, processor.tokenizer.pad_token_id)
        rollout, rewards, *_ = ral_grpo.roll_out(model, processor, prompts, batch, options)
        advantages = ral_grpo.group_advantages(rewards)
        part = ral_grpo.Batch(rollout, advantages)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-4)
        ral_grpo.update(model, optimizer, [part], replace(options, lambda_attn=0.0), False)
        with torch.no_grad():
            scores = common.score(model, rollout, attn_layers=[args.attn_layer])
            policy = ral_grpo.attention_policy(scores.attentions[args.attn_layer], attn_row)
            jsd = ral_grpo.divergence(policy, part.old_attn) * scores.mask
        jsd = jsd / scores.mask.sum(-1, keepdim=True)  # as the loss has it
        term = advantages * jsd  # (B, G, T)
        by_response, by_group = term.abs().sum((0, 1)), term.sum(1).abs().sum(0)
        equal = (scores.mask.sum(-1) == scores.mask.sum(-1)[:, :1]).all(-1).float().mean()
        print(f"\n{path}, {attn_row} rows; {equal:.0%} of the groups have one length")
        print(f"{'row of token':>14}{'share of the term':>20}{'left in the group':>20}")
        for t, (one, other) in enumerate(zip(by_response, by_group, strict=True)):
            if one > 0.005 * by_response.sum():
                print(f"{t + 1:>14}{one / by_response.sum():>20.3f}{other / one:>20.4f}")
        left = term.sum((1, 2)).abs().sum() / by_response.sum()
        print(f"{'all':>14}{1.0:>20.3f}{left:>20.4f}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
