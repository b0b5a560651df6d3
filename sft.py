"""Stage 1, supervised fine-tuning: teach a model to answer in tags, with or without a thought.

On the toy this is a *cold start*, not convergence. It begins with random weights and stops at the
first evaluation that reaches `--stop-accuracy` (0.42), so that reinforcement learning can still
improve the model. Half of the batches ask the question. The other half ask for every shape's colour
in a random order: without these captions the model does not learn the lookup within minutes. It
learns the lookup suddenly, at a step that depends on the seed, so a measured accuracy ends the run.
The model is evaluated at once whenever the mean probability of the answers to a batch of fresh
questions exceeds `--watch-above`. Video training (`--frames N`) starts on images, since N frames
from scratch take far longer.

Differences from the paper's stage 1 [ours]: the loss is -log p of the response, averaged over the
tokens of a response and then over responses, as in the RL scripts. It uses the same packed layout,
with one response per prompt.

    python sft.py                        # the toy from scratch, about a minute on two cores
    python sft.py --think                # the same, with a thought before the answer
    python sft.py --frames 8             # the same, on videos of 8 frames
    python sft.py --model runs/sft/checkpoint --stop-accuracy 0.9 --out runs/sft2   # train further

Data: the built-in visual-search task (toy.py), or files in Video-R1's format with a thought in each
row (data.py). Training on files is measured in epochs. Memory and time: see "Cost" in the README.
"""

import math
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from tqdm import tqdm

import toy
from common import Rollout, load_model, load_processor, response_mean, save_model, score
from data import BadRow, check_data, check_files, open_data
from evaluate import draw_curves, draw_looks, evaluate
from memory import fit_memory
from prompts import Example, Processor, Prompt, collate, encode_prompt
from runs import (
    REAL_RUN,
    TOY_RUN,
    Run,
    RunArgs,
    Stopwatch,
    check_run,
    fill_defaults,
    find_state,
    full_tensor,
    over_ranks,
    print_on_rank_0,
    print_summary,
    rank,
    require,
    require_not_negative,
    require_positive,
    run_script,
    same_inputs,
    seed_everything,
    step_numbers,
    world_size,
)

# 1. Arguments

# Values of the fields that are None: one set for the toy, one for a real model.
TOY = TOY_RUN | {
    "steps": 2000,
    "stop_accuracy": 0.42,
    "train_vision": True,
    "schedule": "constant",
    "prompts_per_step": 32,
    "micro_batch_size": 32,
    "eval_every": 100,
}
REAL = REAL_RUN | {
    "stop_accuracy": 2.0,
    "train_vision": False,
    "think": True,
    "schedule": "cosine",
    "prompts_per_step": 8,
    "micro_batch_size": 1,
}
# Learning rate of a real model: for its weights, for adapters (which need a higher one).
RATE = {False: 1e-5, True: 1e-4}
TOY_RATE = {"small": 1.5e-3, "large": 1e-3}
# Longest response in tokens: without a thought, with one.
NEW_TOKENS = {"toy": {False: 16, True: 64}, "real": {False: 768, True: 768}}


@dataclass
class Args(RunArgs):
    model: str | None = None
    """Checkpoint directory or hub name. Unset: a toy model with random weights."""
    out: str = f"runs/{Path(__file__).stem}"
    """Run directory. A run that is already there is moved to OUT.1, OUT.2 and so on."""
    think: bool | None = None
    """`--think`: respond with a thought, then the answer; `--no-think`: with the answer alone
    (RAL-zero). Paper: think. Toy: no-think."""
    steps: int | None = None
    """Largest number of training steps. Toy: 2000. With --data: as many as --epochs needs."""
    learning_rate: float | None = None
    """Learning rate of AdamW after the warm-up. Real: 1e-5, as in Video-R1, or 1e-4 for adapters
    [ours]. Toy: 1.5e-3, or 1e-3 for the large one."""
    lora_rank: int | None = None
    """Rank of the adapters that are trained instead of the weights; 0: train the weights. Unset: 0,
    or 64 if training the weights does not fit into memory."""
    gradient_checkpointing: bool | None = None
    """Store one activation per layer and recompute the rest. Unset: only on a GPU."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm."""
    micro_batch_size: int | None = None
    """Prompts per forward pass. It changes memory and speed, not the update."""
    prompts_per_step: int | None = None
    """Demonstrations per step on each rank. Toy: 32. Real: 8 [ours]."""
    max_new_tokens: int | None = None
    """Longest response in an evaluation, in tokens. Toy: 16, or 64 with a thought. Real: 768."""
    epochs: float = 1.0
    """Passes over --data; used if --steps is not set."""
    schedule: Literal["constant", "cosine"] | None = None
    """Schedule of the learning rate after the warm-up. Toy: constant. Real: cosine [ours]."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    toy_size: Literal["small", "large"] | None = None
    """Size of a new toy model: 0.7 M parameters (small, also if unset), or 3.9 M (large)."""
    train_vision: bool | None = None
    """Also train the vision encoder. Paper: frozen. Toy: trained here, frozen in every later
    stage."""
    stop_accuracy: float | None = None
    """Stop at the first evaluation that reaches this accuracy; above 1: never stop early. Toy:
    0.42."""
    watch_above: float = 0.2
    """Toy: evaluate after a batch of questions whose demonstrations have a mean probability above
    this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "steps", "learning_rate", "max_grad_norm")
        require_positive(
            self, "micro_batch_size", "prompts_per_step", "warmup_steps", "max_new_tokens", "epochs"
        )
        require_positive(self, "stop_accuracy", "watch_above")
        require_not_negative(self, "lora_rank")
        known = self.model is None or self.toy_size is None
        require(
            known,
            f"--toy-size {self.toy_size}: sets the size of a new toy; leave it out with --model",
        )


# 2. Prompt and reward

DIRECT = "Give the answer alone inside <answer> </answer> tags."
THINK = f"Think first, inside <think> </think> tags. {DIRECT}"
ANSWER = {  # the form of the answer, by problem type
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is a number.",
    "regression": "The answer is a number.",
    "OCR": "The answer is the text exactly as shown.",
    "free-form": "The answer is a short text.",
}


def ask(example: Example, think: bool) -> str:
    """The text of the prompt beside the image or video: question, options, how to answer."""
    options = ["Options:", *example.options] if example.options else []
    request = f"{THINK if think else DIRECT} {ANSWER.get(example.problem_type, '')}"
    return "\n".join([example.problem, *options, request.strip()])


def encode(
    example: Example, processor: Processor, config: Any, think: bool, task: toy.Task, is_toy: bool
) -> Prompt:
    """The encoded prompt of an example. A toy checkpoint gets the question alone, since it knows
    only its own words. A row of a data file also gets its demonstration: thought and answer, or the
    answer alone."""
    text = example.problem if is_toy else ask(example, think)
    if example.problem_type:
        if think and not example.response:
            raise BadRow("has no text in 'process', the thought to learn")
        thought = example.response or ""
        thought = thought if "<think>" in thought else f"<think>{thought}</think>"
        answer = f"<answer>{example.solution}</answer>"
        example.response = f"{thought}\n{answer}" if think else answer
    return encode_prompt(processor, config, example, text, task.order == "question-first")


# 3. Rollout
# SFT has no rollout: demonstrations take the place of sampled responses.


def demonstrations(model: Module, processor: Processor, prompts: list[Prompt]) -> Rollout:
    """A rollout of group size 1: the prompts, with their demonstrations and an EOS as responses."""
    tokenizer = processor.tokenizer
    encode = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
    ids = [encode(prompt.example.response) for prompt in prompts]
    rows = [torch.tensor([*row, tokenizer.eos_token_id], device=model.device) for row in ids]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:, None]
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    mask = torch.arange(padded.shape[-1], device=model.device) < lengths[:, None, None]
    batch = collate(model, prompts, tokenizer.pad_token_id)
    return Rollout(batch, padded, mask, torch.zeros(len(prompts), 1, dtype=torch.bool))


# 4. Loss


def loss_terms(model: Module, rollout: Rollout) -> dict[str, Tensor]:
    """For each response, (B, 1): the loss -log p in nats per token, the probability of the whole
    response, and its length in tokens."""
    scores = score(model, rollout)
    return {
        "loss": -response_mean(scores.logps, scores.mask),
        "demo_prob": scores.logps.sum(-1).exp().detach(),
        "completion_len": scores.mask.sum(-1).float(),
    }


# 5. Update


def learning_rate(step: int, args: Args) -> float:
    """The learning rate of a step: a linear rise over `warmup_steps`, then constant, or half a
    cosine down to 0."""
    rate = args.learning_rate * min(1.0, step / args.warmup_steps)
    if args.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2
    return rate


def update(
    model: Module, processor: Processor, optimizer: Optimizer, prompts: list[Prompt], args: Args
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
        positions += rollout.prompts.ids.numel() + rollout.completion_ids.numel()
        used += sum(len(prompt.ids) for prompt in chunk) + int(rollout.completion_mask.sum())
        terms = loss_terms(model, rollout)
        (terms["loss"].sum() / len(prompts)).backward()
        for name, term in terms.items():
            metrics[f"train/{name}"] += term.detach().sum().item() / len(prompts)
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm))
    metrics |= {"train/grad_norm": norm.item(), "train/padding_frac": 1 - used / positions}
    if torch.isfinite(norm):  # otherwise the training loop stops the run
        optimizer.step()
    optimizer.zero_grad()
    return dict(metrics)


# 6. Training loop


def main(args: Args) -> dict[str, float]:
    """Train until `stop_accuracy` and write the run directory. Returns the metrics of the last step
    and its evaluation in one dictionary."""
    start = time.time()
    is_toy = args.model is None or toy.Task.load(Path(args.model)) is not None
    task = toy.resolve_task(args, args.model or "", may_differ=True)
    args = fill_defaults(args, (TOY | {"think": task.think}) if is_toy else REAL)
    if not args.data:
        args = fill_defaults(args, {"steps": 800})  # a smoke test of a real model
    new_tokens = NEW_TOKENS["toy" if is_toy else "real"][args.think]
    args = fill_defaults(args, {"max_new_tokens": new_tokens})
    task = replace(task, think=args.think)
    check_run(args, *([args.model] if args.model else []))
    check_files(args, is_toy)
    seed_everything(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        base = args.model or scratch
        if args.model is None:
            toy.write_base(Path(base), args.seed, args.toy_size or "small")
        config, processor = load_processor(base, args.max_pixels, args.frame_pixels)
        turn = partial(encode, processor=processor, config=config, think=args.think)
        turn = partial(turn, task=task, is_toy=is_toy)
        if args.check_data:
            return check_data(args, turn)
        open_prompts = open_data if args.data else partial(toy.open_data, task)
        train, held_out, skipped = open_prompts(args, turn)
        if args.steps is None:  # training on files is measured in epochs
            args.steps = math.ceil(
                args.epochs * train.epoch / (args.prompts_per_step * world_size())
            )
        args = fit_memory(args, config, False)
        size = "small" if config.text_config.hidden_size < 256 else "large"
        rate = TOY_RATE[size] if is_toy else RATE[args.lora_rank > 0]
        args = fill_defaults(args, {"learning_rate": rate})
        state = find_state(args)
        trained = (args.train_vision, args.lora_rank, args.gradient_checkpointing)
        model = load_model(base, *trained)[0]
    if is_toy:
        processor.files |= task.files()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=parameters[0].is_cuda,
    )

    judge = partial(evaluate, processor=processor, prompts=held_out, think=args.think)
    judge = partial(judge, max_new_tokens=args.max_new_tokens, batch_size=2 * args.prompts_per_step)
    before, looks_before = judge(model)
    done = before["eval/accuracy"] >= args.stop_accuracy
    reached = f"{args.model} already has accuracy {before['eval/accuracy']:.3f}; raise it"
    require(not done, f"--stop-accuracy {args.stop_accuracy}: {reached}")
    run = Run(args, skipped, state)
    if state is None:
        run.log(0, before)
    after, looks_after = before, looks_before
    note = run.restore(model, optimizer)
    first = 1 if state is None else state.step + 1
    stream = train.begin(step_numbers(args, first).start)
    growing = is_toy and task.frames is not None and args.model is None
    growing = note.get("growing", growing)
    bar = tqdm(range(first, args.steps + 1), desc=Path(__file__).stem, disable=rank() != 0)
    for step in bar:
        clock = Stopwatch()
        caption = is_toy and step % 2 == 0
        if is_toy:
            train.prompts.source.caption = caption
            train.prompts.source.task = replace(task, frames=None) if growing else task
        prompts = list(islice(stream, args.prompts_per_step))
        clock.lap("data_wait")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        metrics = over_ranks(update(model, processor, optimizer, prompts, args))
        run.require_finite(step, metrics, prompts)
        clock.lap("update")
        metrics |= clock.stop(tokens=round(metrics["train/completion_len"] * len(prompts)))
        arriving = is_toy and not caption and metrics["train/demo_prob"] > args.watch_above
        # Switch from images to videos as soon as the model has learned the lookup.
        growing = growing and not arriving
        if arriving or step % args.eval_every == 0 or step == args.steps:
            after, looks_after = judge(model)
            metrics |= after
            done = after["eval/accuracy"] >= args.stop_accuracy
        run.log(step, metrics)
        bar.set_postfix(loss=f"{metrics['train/loss']:.2f}", eval=f"{after['eval/accuracy']:.3f}")
        if done or step == args.steps:
            break
        if run.save_state(step, model, optimizer, {"growing": growing}):
            run.close()
            return metrics
    bar.close()
    if is_toy and not done:
        print_on_rank_0(
            f"did not reach --stop-accuracy {args.stop_accuracy}; try more --steps or a --seed"
        )
    run.save_checkpoint(partial(save_model, model=model, processor=processor))
    run.save_state(step, model, optimizer, {"growing": growing}, done=True)
    run.close()
    if rank() != 0:
        return metrics
    looks = {"before": looks_before, "after": looks_after}
    draw_looks(run.out / "attention.png", looks)
    names = ("train/loss", "train/demo_prob", "eval/accuracy", "eval/target_attn")
    draw_curves(run.out / "curves.png", run.out / "metrics.jsonl", names)
    trained = None if args.out == "runs/sft" else f"{run.out}/checkpoint"
    then = f"python ral_grpo.py{same_inputs(replace(args, model=trained, toy_size=None))}"
    print_summary(run, before, after, step, start, then)
    return metrics


if __name__ == "__main__":
    run_script(Args, main, __doc__)
