"""Short forks of `ral_grpo.py`, to find out why its attention term does what it does.

Each is a context manager under which `ral_grpo.main` runs with a few lines of it replaced;
`reproduce.py` runs them as cells of the claim "why".
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import evaluate
import ral_grpo
import toy
from prompts import Example, Media


@contextmanager
def replaced(owner: Any, **functions: Callable) -> Iterator[None]:
    kept = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(owner, name, function)


def attention_advantages(change: Callable[[Tensor], Tensor]):
    """RAL whose attention term weighs responses by `change(advantages)`; the token term does not:
    `clamp_min(0)` is the pull alone, `clamp_max(0)` the push alone, `neg` the opposite of the
    paper."""

    @contextmanager
    def probe() -> Iterator[None]:
        plain = ral_grpo.loss_terms

        def loss_terms(model, batch, args):
            terms = plain(model, batch, args)
            advantages = batch.advantages[..., 0]
            attn_loss = change(advantages) * terms["attn_jsd"]
            difference = attn_loss - terms["attn_loss"]
            terms["loss"] = terms["loss"] + args.lambda_attn * difference
            return terms | {"attn_loss": attn_loss}

        with replaced(ral_grpo, loss_terms=loss_terms):
            yield

    return probe


def fixed_fraction(fraction: float):
    """RAL whose lambda is chosen anew in every inner iteration but the first, so that the gradient
    of the attention term is `fraction` of the token term's."""

    @contextmanager
    def probe() -> Iterator[None]:
        plain = ral_grpo.update

        def update(model, optimizer, batches, args, measure):
            metrics = {}
            for iteration in range(args.num_iterations):
                weight = 0.0
                if iteration:
                    model.train()
                    token, attn = (
                        ral_grpo.term_norm(model, batches, args, f"{term}_loss")
                        for term in ("pg", "attn")
                    )
                    weight = min(fraction * token / max(attn, 1e-12), 1e6)
                once = replace(args, num_iterations=1, lambda_attn=weight)
                part = plain(model, optimizer, batches, once, measure and iteration == 3)
                for name, value in part.items():
                    metrics[name] = metrics.get(name, 0.0) + value / args.num_iterations
                metrics |= {n: v for n, v in part.items() if n.endswith("_grad_norm")}
            return metrics

        with replaced(ral_grpo, update=update):
            yield

    return probe


@contextmanager
def told_where_to_look() -> Iterator[None]:
    """In place of the divergence: -log of the attention mass on the target, in the row that emits
    the answer's colour, for every response alike. No method could know it; it shows what there is
    to gain from the attention of this layer."""
    plain_roll_out, plain_terms, seen = ral_grpo.roll_out, ral_grpo.loss_terms, {}

    def roll_out(model, processor, prompts, *rest):
        seen["targets"] = []
        for prompt in prompts:
            visual = torch.isin(prompt.ids, torch.tensor([model.config.image_token_id])).nonzero()[
                :, 0
            ]
            seen["targets"].append(visual[list(prompt.example.target)])
        return plain_roll_out(model, processor, prompts, *rest)

    def loss_terms(model, batch, args):
        terms = plain_terms(model, batch, args)
        layers = [args.attn_layer]
        attn = ral_grpo.score(model, batch.rollout, args.temperature, layers)
        rows = attn.attentions[0][:, :, 1]  # of <answer>, which emits the word after: (B, G, P + T)
        mass = torch.stack(
            [row[:, where].sum(-1) for row, where in zip(rows, seen["targets"], strict=True)]
        )
        told = -mass.clamp_min(1e-4).log()
        terms["loss"] = terms["loss"] + args.lambda_attn * (told - terms["attn_loss"])
        return terms | {"attn_loss": told}

    with replaced(ral_grpo, roll_out=roll_out, loss_terms=loss_terms):
        yield


@contextmanager
def three_shapes() -> Iterator[None]:
    """The question is "list star ring bar", the answer "red blue cyan", right or wrong as a whole.

    Up to the first word of an answer all responses of a group are the same, and so is their
    attention: advantages sum to zero, and the attention term cancels there. The second and third
    looks come after responses have parted.
    """

    def sample_example(rng, task, held_out=False, caption=False):
        if caption:
            return plain(rng, task, held_out, caption)
        scene = toy.sample_scene(rng, task, held_out)
        asked = rng.sample(scene.shapes, 3)
        colours = " ".join(colour for _, _, colour, _, _ in asked)
        return Example(
            problem=f"list {' '.join(shape for shape, *_ in asked)}",
            solution=colours,
            media=[Media(toy.draw_scene(scene, task.grid, task.frames))],
            response=f"<answer> {colours} </answer>",
            target=(asked[0][1],),
        )

    plain = toy.sample_example
    with replaced(toy, sample_example=sample_example):
        yield


@contextmanager
def guessable() -> Iterator[None]:
    """Training in which 9 answers of 16 are one colour, so that saying it pays without looking, and
    at first more than looking does. The evaluation is as ever: all colours alike."""
    plain = toy.training_example

    def training_example(task, seed, index, caption=False):
        rng = random.Random(f"guessable/{seed}/{index}")
        colour = list(toy.COLOURS)[seed % len(toy.COLOURS)] if rng.random() < 0.5 else None
        for attempt in range(1000):
            example = plain(task, seed, index + attempt * 2**32, caption)
            if colour in (None, example.solution):
                return example
        raise AssertionError("no such example in 1,000")

    with replaced(toy, training_example=training_example):
        yield


HELD_BACK = toy.SHAPES[4:]  # shapes that reinforcement learning never asks about


@contextmanager
def half_of_the_shapes() -> Iterator[None]:
    """Training asks about four of the eight shapes; the evaluation about all, judged apart."""
    plain = toy.training_example

    def training_example(task, seed, index, caption=False):
        for attempt in range(1000):
            example = plain(task, seed, index + attempt * 2**32, caption)
            if not any(f" {shape} " in example.problem for shape in HELD_BACK):
                return example
        raise AssertionError("no such example in 1,000")

    def held_out_examples(task, count):
        examples = plain_held_out(task, count)
        kinds = ["held back" if any(f" {s} " in x.problem for s in HELD_BACK) else "trained"
                 for x in examples]  # fmt: skip
        return [replace(x, source=kind) for x, kind in zip(examples, kinds, strict=True)]

    def summarise(records):
        metrics = plain_summarise(records)
        for kind in ("trained", "held back"):
            chosen = [record for record in records if record["source"] == kind]
            for name in ("accuracy", "target_attn"):
                metrics[f"eval/{name}, {kind}"] = evaluate.mean(chosen, name)
        return metrics

    plain_held_out, plain_summarise = toy.held_out_examples, evaluate.summarise
    with (
        replaced(toy, training_example=training_example, held_out_examples=held_out_examples),
        replaced(evaluate, summarise=summarise),
    ):
        yield
