"""Stage 1, supervised fine-tuning: teach a model to answer in tags, with or without a thought.

On the toy this is a *cold start*, not convergence. It begins with random weights and stops at the
first evaluation that reaches `--stop-accuracy` (0.42), so that reinforcement learning can still
improve the model. Half of the batches ask the question. The other half ask for every shape's colour
in a random order: without these captions the model does not learn the lookup within minutes. It
learns the lookup suddenly, at a step that depends on the seed, so a measured accuracy ends the run.
The model is evaluated at once whenever the mean probability of the demonstrations of a batch of
fresh questions exceeds `--eval-above`. Video training (`--frames N`) starts on images, since N
frames from scratch take far longer.

The paper trains stage 1 on Video-R1-CoT-165k at a learning rate of 5e-6, with thought and answer in
tags, and for RAL-zero without the thoughts (`--no-think`). [ours] marks what it does not say: the
loss is -log p of the response, averaged over the tokens of a response and then over responses, as
in the RL scripts; AdamW's betas and its decay of 0, the schedule, the warm-up, the clipping of
gradients, the number of epochs and of demonstrations a step.

    python sft.py                        # the toy from scratch, one or two minutes on two cores
    python sft.py --think                # the same, with a thought before the answer
    python sft.py --frames 8             # the same, on videos of 8 frames
    python sft.py --model runs/sft/checkpoint --stop-accuracy 0.9 --out runs/sft2   # train further

With --think, rows of data files need a thought (docs/data.md). `--epochs` says how often they are
read.
"""

import support.startup  # first: it sets Ctrl-C and the allocator of PyTorch

import math
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import common
from eval import evaluate
from support import cli, ranks, runs, toy
from support.media import BadRow
from support.prompts import Example, Processor, Prompt, collate, encode_prompt

# 1. Arguments


@dataclass
class Args(cli.RunArgs):
    model: str | None = None
    """Checkpoint directory or hub name. Unset: a toy model with random weights."""
    out: str = f"runs/{Path(__file__).stem}"
    """Run directory. A run that is already there is moved to OUT.1, OUT.2 and so on."""
    think: bool = True
    """Respond with a thought, then the answer, or with the answer alone. Paper: the first, and in
    both stages the second for RAL-zero, with a format reward for the answer alone."""
    steps: int | None = None
    """Largest number of training steps. Unset: as many as --epochs needs, or 800 without --data."""
    learning_rate: float | None = None
    """Learning rate of AdamW after the warm-up. Unset: 5e-6 (paper), or 1e-4 for adapters [ours];
    1.5e-3 for the small toy and 1e-3 for the large one."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm. [ours]"""
    prompts_per_step: int = 8
    """Demonstrations per step on each rank. [ours]"""
    max_new_tokens: int = 768
    """Longest response in an evaluation, in tokens."""
    epochs: float = 1.0
    """Passes over --data; used if --steps is not set. [ours]"""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Schedule of the learning rate after the warm-up. [ours]"""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0. [ours]"""
    toy_size: Literal["small", "large"] = "small"
    """Size of a new toy model: 0.7 M or 3.9 M parameters."""
    stop_accuracy: float = 2.0
    """Stop at the first evaluation that reaches this accuracy; above 1: never stop early."""
    eval_above: float = 0.2
    """Toy: evaluate after a batch of questions whose demonstrations have a mean probability above
    this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.require_positive(self, "warmup_steps", "epochs", "stop_accuracy", "eval_above")
        new = self.model is None or self.toy_size == "small"
        size = f"--toy-size {self.toy_size}: sets the size of a new toy"
        ranks.require(new, f"{size}; leave it out with --model")

    def may_change(self) -> set[str]:
        fixed = {"steps"} if self.schedule == "cosine" else set()
        fixed |= {"eval_every"} if self.stop_accuracy <= 1 else set()  # it decides when to stop
        return super().may_change() - fixed


# Defaults of a toy, new or continued, in place of those of `Args`.
TOY = toy.RUN | {
    "steps": 2000,
    "stop_accuracy": 0.42,
    "train_vision": True,
    "schedule": "constant",
    "prompts_per_step": 32,
    "micro_batch_size": 32,
    "eval_every": 100,
    "think": False,
    "max_new_tokens": 16,  # 64 with a thought
}


# 2. Prompt and reward

# The request after the question: to think (with --think), to answer, and the form of the answer by
# problem type. It is saved with the weights, and eval.py reads it from there.
PROMPTS = {
    "think": "Think first, inside <think> </think> tags.",
    "answer": "Give the answer alone inside <answer> </answer> tags.",
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is a number.",
    "regression": "The answer is a number.",
    "OCR": "The answer is the text exactly as shown.",
    "free-form": "The answer is a short text.",
}


def encode_demonstration(processor: Processor, example: Example) -> Prompt:
    """The prompt of a data file's row with the demonstration to learn: its thought and its answer,
    or its answer alone."""
    think, thought = processor.prompt_config.think, example.response or ""
    if think and not thought:
        where = "no text in 'process' or 'thought', no <think> in its answer"
        raise BadRow(f"has no thought to learn: {where}; --no-think learns answers alone")
    thought = thought if "<think>" in thought else f"<think>{thought}</think>"
    answer = f"<answer>{example.solution}</answer>"
    example.response = f"{thought}\n{answer}" if think else answer
    return encode_prompt(processor, example)


# 3. Rollout
# SFT has no rollout: demonstrations take the place of sampled responses.


def demonstrations(model: nn.Module, processor: Processor, prompts: list[Prompt]) -> common.Rollout:
    """A rollout of group size 1: the prompts, with their demonstrations and an EOS as responses."""
    tokenizer = processor.tokenizer
    encode = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
    ids = [encode(processor.written(prompt.example.response)) for prompt in prompts]
    rows = [torch.tensor([*row, tokenizer.eos_token_id], device=model.device) for row in ids]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, None]
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    mask = torch.arange(padded.shape[-1], device=model.device) < lengths[:, None, None]
    batch = collate(model, prompts, tokenizer.pad_token_id)
    return common.Rollout(batch, padded, mask, torch.zeros(len(prompts), 1, dtype=torch.bool))


# 4. Loss


def loss_terms(model: nn.Module, rollout: common.Rollout) -> dict[str, Tensor]:
    """For each response, (B, 1): the loss -log p in nats per token, the probability of the whole
    response, and its length in tokens."""
    scores = common.score(model, rollout)
    return {
        "loss": -common.response_mean(scores.logps, scores.mask),
        "demo_prob": scores.logps.sum(-1).exp().detach(),
        "completion_len": scores.mask.sum(-1).float(),
    }


# 5. Update


def default_learning_rate(args: Args, config: Any, is_toy: bool) -> float:
    """What an unset `--learning-rate` means, see there."""
    if is_toy:
        return 1.5e-3 if config.text_config.hidden_size < 256 else 1e-3
    return 1e-4 if args.lora_rank else 5e-6


def learning_rate(step: int, args: Args) -> float:
    """The learning rate of a step: a linear rise over `warmup_steps`, then constant, or half a
    cosine down to 0."""
    rate = args.learning_rate * min(1.0, step / args.warmup_steps)
    if args.schedule == "cosine" and step > args.warmup_steps:
        done = (step - args.warmup_steps) / (args.steps - args.warmup_steps + 1)
        rate *= (1 + math.cos(math.pi * done)) / 2
    return rate


def update(
    model: nn.Module, processor: Processor, optimizer: Optimizer, prompts: list[Prompt], args: Args
) -> dict[str, float]:
    """Take one optimiser step over all demonstrations and return its metrics.

    Demonstrations of similar length share a microbatch, so that there is little padding. The
    microbatches do not change the update.
    """
    model.train()
    metrics = defaultdict(float)
    if len(prompts) > args.micro_batch_size:
        prompts = sorted(prompts, key=lambda p: (len(p.ids), len(p.example.response)))
    positions = used = 0
    for i in range(0, len(prompts), args.micro_batch_size):
        chunk = prompts[i : i + args.micro_batch_size]
        rollout = demonstrations(model, processor, chunk)
        positions += rollout.prompts.ids.numel() + rollout.response_ids.numel()
        used += sum(len(prompt.ids) for prompt in chunk) + int(rollout.response_mask.sum())
        terms = loss_terms(model, rollout)
        (terms["loss"].sum() / len(prompts)).backward()
        for name, term in terms.items():
            metrics[f"train/{name}"] += term.detach().sum().item() / len(prompts)
    norm = ranks.full_tensor(nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm))
    metrics |= {"train/grad_norm": norm.item(), "train/padding_frac": 1 - used / positions}
    if torch.isfinite(norm):  # otherwise the training loop stops the run
        optimizer.step()
    optimizer.zero_grad()
    return dict(metrics)


# 6. Training loop


def main(args: Args) -> dict[str, float]:
    """Train until `stop_accuracy` and write the run directory. Returns the metrics of the last step
    and its evaluation in one dictionary."""
    with tempfile.TemporaryDirectory() as scratch:
        if args.model is None:
            toy.write_base(Path(scratch), args.seed, args.toy_size)
        prepared = common.prepare(
            args,
            PROMPTS,
            learning_rate=default_learning_rate,
            base=args.model or scratch,
            encode=encode_demonstration if args.data else encode_prompt,
        )
    args, processor, model = prepared.args, prepared.processor, prepared.model
    is_toy, task, train = prepared.is_toy, prepared.task, prepared.train
    if is_toy:
        processor.files |= task.files()
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": parameters[0].is_cuda}
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, **settings)

    options = {"max_new_tokens": args.max_new_tokens, "batch_size": 2 * args.prompts_per_step}
    before = after = evaluate(model, processor, prepared.held_out, **options)
    accuracy = before.metrics["eval/accuracy"]
    done = accuracy >= args.stop_accuracy
    reached = f"the model already has accuracy {accuracy:.3f}; raise it"
    ranks.require(not done, f"--stop-accuracy {args.stop_accuracy}: {reached}")
    run = runs.Run(args, prepared.train.bad_rows, prepared.state, prepared.start)
    first, extra = run.start(before.metrics, model, optimizer)
    stream = train.begin(first, args.prompts_per_step)
    # A new toy for videos learns the lookup on images first.
    images_only = is_toy and task.frames is not None and args.model is None
    images_only = extra.get("images_only", images_only)
    if args.stop_accuracy <= 1:
        goal = f"the first evaluation with accuracy {args.stop_accuracy} (--stop-accuracy)"
        ranks.print_on_rank_0(f"training stops at {goal}, or after {args.steps} steps")
    bar = tqdm(range(first, args.steps + 1), desc=Path(__file__).stem, disable=ranks.rank() != 0)
    for step in bar:
        clock = runs.Stopwatch()
        caption = is_toy and step % 2 == 0
        if is_toy:
            train.prompts.source.caption = caption
            train.prompts.source.task = replace(task, frames=None) if images_only else task
        prompts = list(islice(stream, args.prompts_per_step))
        clock.lap("data_wait")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        # The same on all ranks, since `learned` decides below when they evaluate.
        metrics = ranks.over_ranks(update(model, processor, optimizer, prompts, args))
        clock.lap("update")
        metrics |= clock.stop(tokens=round(metrics["train/completion_len"] * len(prompts)))
        run.require_finite(step, metrics, prompts)
        learned = is_toy and not caption and metrics["train/demo_prob"] > args.eval_above
        images_only = images_only and not learned
        if learned or step % args.eval_every == 0 or step == args.steps:
            after = evaluate(model, processor, prepared.held_out, **options)
            metrics |= after.metrics
            done = after.metrics["eval/accuracy"] >= args.stop_accuracy
        run.log(step, metrics)
        bar.set_postfix(loss=metrics["train/loss"], eval=after.metrics["eval/accuracy"])
        if done or step == args.steps:
            break
        run.save_state(step, model, optimizer, {"images_only": images_only})
    bar.close()
    if args.stop_accuracy <= 1 and not done:
        remedy = "try more --steps or another --seed"
        ranks.print_on_rank_0(f"did not reach --stop-accuracy {args.stop_accuracy}; {remedy}")
    evaluations = {"before": before, "after": after}
    plotted = ("train/loss", "train/demo_prob", "eval/accuracy", "eval/target_attn")
    save = partial(common.save_model, model=model, processor=processor)
    trained = None if args.out == Args.out else f"{run.out}/checkpoint"
    run.finish(
        step,
        model,
        optimizer,
        save,
        evaluations,
        plotted,
        then="ral_grpo.py",
        inputs=replace(args, model=trained, toy_size="small"),
        extra={"images_only": images_only},
    )
    return metrics


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__, partial(toy.defaults, TOY, unset=None))
