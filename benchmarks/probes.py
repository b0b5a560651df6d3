"""Other tasks for the toy, another divergence and coarser attention, as context managers.

`reproduce.py` runs the `main` of a script inside them. Other methods are forks, in `forks/`."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import attn_distill
import eval
import ral_grpo
from support import results, toy
from support.prompts import Example, Media, PromptBatch


def forward_kl() -> AbstractContextManager:
    """RAL with KL(anchor || current) in place of the Jensen-Shannon divergence."""

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        tiny = torch.finfo(p.dtype).tiny
        return (q * (q.clamp_min(tiny).log() - p.clamp_min(tiny).log())).sum(-1)

    return mock.patch.object(ral_grpo, "divergence", divergence)


def binned(attention: Tensor, prompts: PromptBatch) -> Tensor:
    """Attention (B, G, T, P + T) summed over temporal patches, (B, G, T, F + 2); an image is one.

    The last two bins hold the rest of the prompt and the earlier response, so rows still sum to 1,
    and the total attention to the video counts too.
    """
    p = prompts.ids.shape[1]
    patches, frames = prompts.patches, int(prompts.patches.max()) + 1
    bins = F.one_hot(torch.where(patches < 0, frames, patches), frames + 1).to(attention)
    looked = attention[..., :p] @ bins[:, None]
    return torch.cat([looked, attention[..., p:].sum(-1, keepdim=True)], dim=-1)


def frame_bins() -> AbstractContextManager:
    """Attention distillation that compares the mass on each pair of frames instead of each token,
    as in CAPD, a successor for videos of 2026."""
    loss_terms, divergence = attn_distill.loss_terms, attn_distill.divergence

    def of_bins(scores, teacher_scores, batch, args):
        def between(*policies: Tensor) -> Tensor:
            return divergence(*(binned(x, batch.rollout.prompts) for x in policies))

        with mock.patch.object(attn_distill, "divergence", between):
            return loss_terms(scores, teacher_scores, batch, args)

    return mock.patch.object(attn_distill, "loss_terms", of_bins)


def three_shapes() -> AbstractContextManager:
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
            boxes=(toy.cell_box(task, asked[0][1]),),
        )

    plain = toy.sample_example
    return mock.patch.object(toy, "sample_example", sample_example)


def only(wanted: Callable[[Example, int, int], bool]) -> AbstractContextManager:
    """Training on the examples that are `wanted`, given each and its seed and number."""
    plain = toy.training_example

    def training_example(task, seed, index, caption=False):
        for attempt in range(1000):
            example = plain(task, seed, index + attempt * 2**32, caption)
            if wanted(example, seed, index):
                return example
        raise AssertionError("no such example in 1,000")

    return mock.patch.object(toy, "training_example", training_example)


def guessable() -> AbstractContextManager:
    """Training in which 9 answers of 16 are one colour, so that saying it pays without looking, and
    at first more than looking does. The evaluation is as ever: all colours alike."""

    def wanted(example: Example, seed: int, index: int) -> bool:
        rng = random.Random(f"guessable/{seed}/{index}")
        colour = list(toy.COLOURS)[seed % len(toy.COLOURS)] if rng.random() < 0.5 else None
        return colour in (None, example.solution)

    return only(wanted)


HELD_BACK = list(toy.SHAPES)[4:]  # shapes that reinforcement learning never asks about


@contextmanager
def half_of_the_shapes() -> Iterator[None]:
    """Training asks about four of the eight shapes; the evaluation about all, judged apart."""
    plain_held_out, plain_summarise = toy.held_out_examples, eval.summarise

    def kind(example: Example, *_) -> str:
        held_back = any(f" {shape} " in example.problem for shape in HELD_BACK)
        return "held back" if held_back else "trained"

    def held_out_examples(task, count):
        return [replace(x, source=kind(x)) for x in plain_held_out(task, count)]

    def summarise(records):
        metrics = plain_summarise(records)
        for kind in ("trained", "held back"):
            chosen = [record for record in records if record["source"] == kind]
            for name in ("accuracy", "target_attn"):
                metrics[f"eval/{name}, {kind}"] = results.mean(chosen, name)
        return metrics

    with (
        only(lambda *example: kind(*example) == "trained"),
        mock.patch.object(toy, "held_out_examples", held_out_examples),
        mock.patch.object(eval, "summarise", summarise),
    ):
        yield
