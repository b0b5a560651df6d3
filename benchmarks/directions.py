"""Which way does each term of the loss push, and is that toward the right answer?

    python benchmarks/reproduce.py --claims "table 3" --cells KD --results runs/mine.jsonl
    python benchmarks/directions.py     # from the cold starts that the first line leaves in runs/

For each cold start it samples 8 responses to each of 128 prompts, and takes the gradient of every
term alone, all weights together. It prints the cosine of the descent direction with that of two
others: of the oracle, which is told where the target is, and of SFT, which is told the correct
response. Both are taken on the same prompts. "Halves" is the cosine of the term's directions on the
even and on the odd prompts: near 0, the direction is noise.

RAL has no gradient at the rollout's weights (see `ral_grpo.py`), so its terms are taken after one
optimiser step of GRPO at the rate of `reproduce.py`, and all others before it. In "RAL, rollout
perturbed", every response of another rollout looks elsewhere at random, see `perturbed`: that term
compares with these looks, and needs no step. "Told, rollout perturbed" is its positive control: the
advantages come from each response's mass on the target, in place of its reward, so that a cosine
with the oracle should be found. A second table has what `diagnose.py` measures of RAL's term in the
same prompts. Intervals are of 95%, Student's t over the cold starts. Results:
`results/directions.json` and `directions.png`.
"""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Module

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import diagnose
from forks import oracle, posterior_gaze
from reproduce import COLD_STARTS, OWN, TASKS, commit, interval, markdown, words

import common
import ral_grpo
import sft
from support import cli, toy
from support.pictures import load_pyplot, save
from support.prompts import Processor, Prompt, collate, encode_prompt
from support.ranks import require

PERTURBED = {"RAL, rollout perturbed": (1, False), "RAL, rollout perturbed x 3": (3, False)}
PERTURBED |= {"told, rollout perturbed": (1, True), "told, rollout perturbed x 3": (3, True)}
COSINES = ("with the oracle", "with SFT", "halves")  # the last is of two halves
TABLES = {
    "direction": COSINES,
    "policy": ("vision", "left_group", "left_row"),  # columns of diagnose.py
    "rollout": ("JSD", "accuracy", "accuracy, not perturbed"),
}


@dataclass
class Args:
    seeds: tuple[int, ...] = tuple(OWN)
    """Seeds of the cold starts."""
    cold_starts: Path = COLD_STARTS
    """Directory of the cold starts, `images-<seed>` each."""
    prompts: int = 128
    """Prompts that are answered, a multiple of 32."""
    results: Path = ROOT / "benchmarks" / "results" / "directions.json"
    """Where the numbers go."""


def opened(
    path: Path, count: int, **fields: Any
) -> tuple[Module, Processor, ral_grpo.Args, list[Prompt]]:
    """A cold start, its processor, the arguments of RAL with other `fields`, and the first `count`
    prompts of this run."""
    model = common.load_model(path, field="--cold-starts")
    processor = common.load_processor(path, field="--cold-starts")
    task = toy.Task.load(path)
    args = ral_grpo.Args(**ral_grpo.TOY | {"think": task.think} | fields)
    train, *_ = task.open_data(replace(args, eval_examples=1), partial(encode_prompt, processor))
    return model, processor, args, list(islice(train.begin(1, count), count))


def losses(
    model: Module, script, batches: list, name: str, args, sign: int = 0
) -> list[Callable[[], Tensor]]:
    """One term of a script's loss for the responses of each batch, (B, G): of all, or of those
    whose advantage has this `sign`."""

    def loss(batch) -> Tensor:
        terms = script.loss_terms(script.score_policy(model, batch, args), batch, args)
        return terms[name] * (sign * batch.advantages[..., 0] > 0) if sign else terms[name]

    return [partial(loss, batch) for batch in batches]


def direction(model: Module, losses: list[Callable[[], Tensor]]) -> Tensor:
    """Minus the gradient of a sum of mean losses, (number of trained weights,)."""
    model.zero_grad()
    for loss in losses:
        loss().mean().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else -p.grad for p in parameters]
    model.zero_grad()
    return torch.cat([part.flatten() for part in parts])


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


def perturbed(layer: int, noise: Tensor) -> AbstractContextManager:
    """Make every response look elsewhere in one layer: its queries get an offset in a direction of
    its own, `noise` (B, G, H, D) times their size. Decoding and packed rows agree. The first token
    of a response is the prompt's last row's, which a group shares and is left alone."""
    decode, packed = common.decode_attention, common.attention_rows

    def offset(query: Tensor, noise: Tensor) -> Tensor:
        return query + noise * query.pow(2).mean(-1, keepdim=True).sqrt()

    def decode_attention(query: Tensor, *rest) -> Tensor:
        moved = offset(query, noise.flatten(0, 1)[:, :, None]) if rest[-1] == layer else query
        return decode(moved, *rest)

    def attention_rows(query: Tensor, key: Tensor, scaling: float, layout) -> Tensor:
        prompt, responses = query[:, :, : layout.prompt_len], query[:, :, layout.prompt_len :]
        by_response = responses.unflatten(2, (layout.group_size, -1))  # (B, H, G, T, D)
        responses = offset(by_response, noise.transpose(1, 2)[:, :, :, None]).flatten(2, 3)
        return packed(torch.cat([prompt, responses], dim=2), key, scaling, layout)

    replaced = {"decode_attention": decode_attention, "attention_rows": attention_rows}
    return mock.patch.multiple(common, **replaced)


def measure(path: Path, seed: int, count: int) -> dict[str, dict[str, float]]:
    """Measure one cold start: the three cosines of every term, and what `diagnose.py` finds for the
    rows of every layer."""
    rate = TASKS["images"].learning_rate
    model, processor, args, drawn = opened(path, count, seed=seed, learning_rate=rate)
    prompts = [*drawn[::2], *drawn[1::2]]  # the even ones first
    inputs = collate(model, prompts, processor.tokenizer.pad_token_id)
    rollout, _, rewards, metrics = ral_grpo.roll_out(model, processor, prompts, inputs, args)
    advantages = ral_grpo.group_advantages(rewards)
    target = oracle.target_mask(prompts, inputs)
    cuts = [slice(i, i + 16) for i in range(0, count, 16)]
    half = len(cuts) // 2

    def batches(script) -> list:
        return [script.Batch(rollout[cut], advantages[cut]) for cut in cuts]

    def demonstrated(chunk: list[Prompt]) -> Tensor:
        """SFT's loss on the correct responses."""
        return sft.loss_terms(model, sft.demonstrations(model, processor, chunk))["loss"]

    report, _ = diagnose.diagnose(model, processor, prompts, args, [0, 1])
    found = {
        f"layer {line['layer']}, {line['row']} row": {name: line[name] for name in TABLES["policy"]}
        for line in report["rows"]
    }
    model.train()
    other_row = replace(args, attn_row="predicting")
    own, predicting, posterior = map(batches, (ral_grpo, ral_grpo, posterior_gaze))
    posterior = posterior_gaze, posterior, "attn_loss", posterior_gaze.Args(**vars(args))
    told = [oracle.Batch(rollout[cut], advantages[cut], target=target[cut]) for cut in cuts]
    told = oracle, told, "attn_loss", oracle.Args(**vars(args))
    terms = {
        "token": losses(model, ral_grpo, own, "pg_loss", args),
        "token, rewarded responses": losses(model, ral_grpo, own, "pg_loss", args, sign=1),
        "token, penalised responses": losses(model, ral_grpo, own, "pg_loss", args, sign=-1),
        "RAL, own row": losses(model, ral_grpo, own, "attn_loss", args),
        "RAL, predicting row": losses(model, ral_grpo, predicting, "attn_loss", other_row),
        "posterior gaze": losses(model, *posterior),
        "oracle": losses(model, *told),
        "oracle, rewarded responses": losses(model, *told, sign=1),
        "SFT": [partial(demonstrated, prompts[cut]) for cut in cuts],
    }
    text = model.config.text_config
    heads, last = text.num_attention_heads, text.num_hidden_layers - 1
    shape = (count, args.group_size, heads, text.hidden_size // heads)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for name, (size, by_mass) in PERTURBED.items():
        with perturbed(last, size * noise):
            other, _, rewards, moved = ral_grpo.roll_out(model, processor, prompts, inputs, args)
        weights = ral_grpo.group_advantages(rewards)
        elsewhere = [ral_grpo.Batch(other[cut], weights[cut]) for cut in cuts]
        for batch, cut in zip(elsewhere, cuts, strict=True):
            with torch.no_grad(), perturbed(last, size * noise[cut]):
                rows = common.score(model, batch.rollout, args.temperature, [last]).attentions[last]
            batch.old_attn = ral_grpo.attention_policy(rows, "own")
            if by_mass:
                on_target = target[cut][:, None, None, :]
                mass = (batch.old_attn[..., : target.shape[1]] * on_target).sum(-1)
                mass = common.response_mean(mass, batch.rollout.response_mask)
                batch.advantages = ral_grpo.group_advantages(mass)
        model.train()
        terms[name] = losses(model, ral_grpo, elsewhere, "attn_loss", args)
        jsd = losses(model, ral_grpo, elsewhere, "attn_jsd", args)
        with torch.no_grad():
            distances = [loss().mean().item() for loss in jsd]
        found[f"{name}: rollout"] = {
            "JSD": sum(distances) / len(distances),
            "accuracy": moved["rollout/accuracy"],
            "accuracy, not perturbed": metrics["rollout/accuracy"],
        }

    def halves(name: str) -> tuple[Tensor, Tensor]:
        return direction(model, terms[name][:half]), direction(model, terms[name][half:])

    at_step = ("RAL, own row", "RAL, predicting row")
    directions = {name: halves(name) for name in terms if name not in at_step}
    with torch.no_grad():  # the anchors of RAL, at the rollout's weights
        for loss in (loss for name in at_step for loss in terms[name]):
            loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    grpo = replace(args, lambda_attn=0.0, beta=0.0, num_iterations=1)
    ral_grpo.update(model, optimizer, batches(ral_grpo), grpo)
    directions |= {name: halves(name) for name in at_step}
    whole = {name: sum(parts) for name, parts in directions.items()}
    return found | {
        name: {
            "with the oracle": cosine(whole[name], whole["oracle"]),
            "with SFT": cosine(whole[name], whole["SFT"]),
            "halves": cosine(*directions[name]),
        }
        for name in terms
    }


def tables(rows: list[dict[str, dict[str, float]]]) -> str:
    """The three tables; `rows` has what `measure` found for each cold start."""
    texts = []
    for head, columns in TABLES.items():
        lines = []
        for name in [name for name in rows[0] if columns[0] in rows[0][name]]:
            cells = {column: words([row[name][column] for row in rows]) for column in columns}
            lines.append({head: name} | cells)
        texts.append(markdown(lines))
    return "\n".join(texts)


def draw(path: Path, rows: list[dict[str, dict[str, float]]]) -> None:
    """Draw the cosines, means with their intervals over cold starts, one panel a column."""
    names = [name for name, line in rows[0].items() if COSINES[0] in line]
    size = (4 * len(COSINES), 1 + 0.2 * len(names))
    figure, axes = load_pyplot().subplots(1, len(COSINES), figsize=size)
    for column, axis in zip(COSINES, axes, strict=True):
        points = [interval([row[name][column] for row in rows]) for name in names]
        means, halves = zip(*points, strict=True)
        axis.errorbar(means, range(len(names)), xerr=halves, fmt="o", markersize=4)
        axis.axvline(0, color="grey", lw=1)
        title = f"cosine {column.replace('halves', 'of two halves')}"
        axis.set(title=title, ylim=(len(names) - 0.5, -0.5))
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
        axis.grid(axis="x", alpha=0.3)
    save(figure, path)


def main(args: Args) -> None:
    require(args.prompts % 32 == 0, f"--prompts {args.prompts}: must be a multiple of 32")
    rows = {}
    for seed in args.seeds:
        path = args.cold_starts / f"images-{seed}" / "checkpoint"
        rows[seed] = measure(path, seed, args.prompts)
        print(f"seed {seed}: " + json.dumps(rows[seed]["RAL, own row"]))
    result = {"commit": commit(), "prompts": args.prompts, "rows": rows}
    args.results.write_text(json.dumps(result, indent=1) + "\n")
    print(tables([*rows.values()]))
    if len(rows) > 1:
        draw(args.results.with_suffix(".png"), [*rows.values()])


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__)
