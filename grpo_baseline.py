"""GRPO on images and videos: the baseline of Reinforced Attention Learning (arXiv 2602.04884), with
the token policy alone.

For every prompt, the script samples a group of G responses and rewards each with 0.9 * accuracy +
0.1 * format. It turns the rewards of a group into advantages (eq. 8) and takes clipped
policy-gradient steps on the same responses (eq. 1, with its sign turned: a loss is lowered), with a
KL penalty toward the model that the run started from. `ral_grpo.py` is this file plus the attention
policy: `diff grpo_baseline.py ral_grpo.py` shows the paper's idea.

Shapes: B prompts of P positions, padded on the left; G responses of T tokens to each.

[ours] marks what the paper does not say, or says in two ways. Here it is:
  1. The clip range is 0.2. The KL is estimated with k3. The standard deviation has ddof 1, and
     1e-4 is added to it.
  2. Every response weighs the same: the loss is the mean over its tokens, then over all responses
     of the optimiser step.
  3. There are `num_iterations` passes over a rollout, each in `num_minibatches` minibatches of
     different prompts with an optimiser step each. With one minibatch, the first pass also provides
     the old log-probabilities: the weights are still the rollout's, in the same layout and kernel
     that the later passes use. With several, they are scored before the first step.
  4. A response cut at `--max-new-tokens` stays in the loss and earns no format reward.
  5. The learning rate is constant, and AdamW has betas 0.9 and 0.95 and no weight decay.

    python sft.py && python grpo_baseline.py                    # the toy, on a CPU, in minutes
    python grpo_baseline.py --model DIR_OR_HUB_NAME --data FILE # your own model and data
"""

import support.startup  # first: it sets Ctrl-C and the allocator of PyTorch

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import common
from eval import evaluate
from support import cli, ranks, runs, toy
from support.prompts import Processor, Prompt, PromptBatch, collate

# 1. Arguments


@dataclass
class Args(cli.RunArgs):
    model: str = "runs/sft/checkpoint"
    """Checkpoint directory or hub name. The default is what sft.py writes."""
    out: str = f"runs/{Path(__file__).stem}"
    """Run directory. A run that is already there is moved to OUT.1, OUT.2 and so on."""
    think: bool = True
    """Respond with a thought, then the answer, or with the answer alone. Paper: the first, and in
    both stages the second for RAL-zero, with a format reward for the answer alone."""
    steps: int | None = None
    """Training steps. Unset: one pass over the rows of --data (paper; 51,200 rows are 800 steps of
    8 prompts on each of 8 ranks), or 800 without."""
    learning_rate: float | None = None
    """Learning rate of AdamW, constant [ours]. Unset: 1e-5 (paper), or 2e-5 for adapters [ours]."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm. [ours]"""
    prompts_per_step: int = 8
    """Prompts per rollout on each rank. [ours] The paper's "rollout batch size" of 8 may also count
    the prompts of all ranks (then 1 on each of 8) or the responses to one."""
    group_size: int = 8
    """G, the responses per prompt (2 or more). Paper: 8."""
    num_iterations: int = 2
    """Passes over a rollout, each with an optimiser step per minibatch. [ours]"""
    num_minibatches: int = 1
    """Minibatches of different prompts into which a rollout is cut. [ours]"""
    max_new_tokens: int = 768
    """Longest response in tokens. [ours]"""
    temperature: float = 1.0
    """Temperature in sampling and in every loss. The paper has 1 in table 1 and 0.9 in its text."""
    top_p: float = 1.0
    """Probability mass for nucleus sampling, in (0, 1]. The losses use the full distribution."""
    accuracy_rule: Literal["by-type", "exact"] = "by-type"
    """How an answer is compared with the solution: by problem type [ours, as in Video-R1, whose
    rows have numbers and free text], or by exact match (paper)."""
    clip_eps: float = 0.2
    """The probability ratio is clipped to [1 - clip_eps, 1 + clip_eps]. [ours]"""
    beta: float = 0.04
    """Weight of the KL to the starting model; 0: none. Paper: 0.04."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks.require(self.group_size >= 2, f"--group-size {self.group_size}: needs 2 or more")
        ranks.require(0 < self.top_p <= 1, f"--top-p {self.top_p}: must be in (0, 1]")
        cut = f"--num-minibatches {self.num_minibatches}: must divide --prompts-per-step"
        ranks.require(self.prompts_per_step % self.num_minibatches == 0, cut)


# Defaults of a toy checkpoint, in place of those of `Args`.
TOY = toy.RUN | {
    "steps": 160,
    "eval_every": 20,
    "learning_rate": 6e-4,
    "prompts_per_step": 16,
    "micro_batch_size": 16,
    "num_iterations": 4,
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


def reward(prompt: Prompt, text: str, truncated: bool, args: Args) -> dict[str, float]:
    """The reward of a response, and the parts to log: 0.9 * accuracy + 0.1 * format (paper). A
    response that was cut off earns no format reward [ours]."""
    accuracy = common.accuracy(text, prompt.example, args.accuracy_rule)
    has_format = float(common.has_format(text, args.think) and not truncated)
    return {"reward": 0.9 * accuracy + 0.1 * has_format, "accuracy": accuracy, "format": has_format}


# 3. Rollout


@dataclass
class Batch:
    """A microbatch of a rollout with the tensors that its loss needs."""

    rollout: common.Rollout
    advantages: Tensor  # (B, G, 1); `score_policy` of a fork may make them (B, G, T)
    ref_logps: Tensor | None = None  # (B, G, T)
    old_logps: Tensor | None = None  # (B, G, T)


def roll_out(
    model: nn.Module, processor: Processor, prompts: list[Prompt], batch: PromptBatch, args: Args
) -> tuple[common.Rollout, list[list[str]], Tensor, dict[str, float]]:
    """Sample G responses to each prompt and reward them. Returns the rollout, its texts (B lists of
    G), the rewards (B, G) and the metrics."""
    numbers = [prompt.number for prompt in prompts]
    noise = common.sampling_noise(args.seed, numbers, args.group_size, args.max_new_tokens)
    sampling = {"noise": noise, "temperature": args.temperature, "top_p": args.top_p}
    rollout = common.generate_group(model, batch, args.group_size, args.max_new_tokens, **sampling)
    texts = rollout.texts(processor)
    rewards, metrics = common.judge(partial(reward, args=args), prompts, rollout, texts)
    return rollout, texts, rewards, metrics


@torch.no_grad()
def score_reference(reference: nn.Module, batches: list[Batch], args: Args) -> None:
    """Add the frozen starting model's scores of the responses to each batch."""
    for batch in batches:
        scores = common.score(reference, batch.rollout, args.temperature)
        batch.ref_logps = scores.logps


def score_policy(model: nn.Module, batch: Batch, args: Args) -> common.Scores:
    """The policy's scores of the responses. A batch's first are from before any step, when the
    policy is still that of the rollout: they are kept as the old ones."""
    scores = common.score(model, batch.rollout, args.temperature)
    if batch.old_logps is None:
        batch.old_logps = scores.logps.detach()
    return scores


# 4. Loss


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO's advantages A_i = (r_i - mean) / (std + 1e-4) within each group (eq. 8), (B, G, 1): one
    for all tokens of a response. The std's ddof of 1 and the 1e-4 are [ours]. Exactly 0 if all
    rewards of a group are equal, though in float32 eight of 0.9 have a std of 6e-8.

    >>> rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.9, 0.9, 0.9, 0.9]])
    >>> group_advantages(rewards)[..., 0]
    tensor([[ 0.8659, -0.8659,  0.8659, -0.8659],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    scaled = centred / (rewards.std(dim=1, keepdim=True) + 1e-4)
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return scaled.masked_fill(equal, 0.0)[..., None]


def clipped_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, clip_eps: float
) -> tuple[Tensor, Tensor]:
    """GRPO's loss -min(ratio A, clip(ratio) A) of each token (eq. 1; the clip is [ours]), and 1
    where the clipped term is the smaller one, else 0; both (B, G, T)."""
    ratio = torch.exp(logps - old_logps)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    return -torch.minimum(unclipped, clipped), (clipped < unclipped).float()


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) for each token: exp(d) - d - 1, d = ref - logp. On
    sampled tokens it is unbiased, but its mean gradient is that of KL(reference || policy)."""
    difference = ref_logps - logps
    return torch.exp(difference) - difference - 1


def loss_terms(scores: common.Scores, batch: Batch, args: Args) -> dict[str, Tensor]:
    """The loss terms, (B, G): means over each response's tokens."""
    pg, clipped = clipped_loss(scores.logps, batch.old_logps, batch.advantages, args.clip_eps)
    kl = torch.zeros_like(pg) if batch.ref_logps is None else k3(scores.logps, batch.ref_logps)
    terms = {"pg_loss": pg, "kl": kl, "entropy": scores.entropy, "clip_frac": clipped}
    terms = {name: common.response_mean(term, scores.mask) for name, term in terms.items()}
    terms["loss"] = terms["pg_loss"] + args.beta * terms["kl"]
    return terms


# 5. Update


def update(
    model: nn.Module, optimizer: Optimizer, batches: list[Batch], args: Args
) -> dict[str, float]:
    """Pass over a rollout `num_iterations` times, with an optimiser step for each minibatch.
    Returns the metrics, averaged over these steps."""
    model.train()
    metrics = defaultdict(float)
    size = len(batches) // args.num_minibatches
    minibatches = [batches[i : i + size] for i in range(0, len(batches), size)]
    schedule = args.num_iterations * minibatches
    for minibatch in schedule:
        responses = sum(batch.rollout.num_responses for batch in minibatch)
        for batch in minibatch:
            terms = loss_terms(score_policy(model, batch, args), batch, args)
            (terms["loss"].sum() / responses).backward()
            for name, term in terms.items():
                metrics[f"train/{name}"] += term.detach().sum().item() / responses / len(schedule)
        norm = ranks.full_tensor(nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm))
        metrics["train/grad_norm"] += norm.item() / len(schedule)
        if not torch.isfinite(norm):
            break  # the training loop then stops the run
        optimizer.step()
        optimizer.zero_grad()
    return dict(metrics)


# 6. Training loop


def main(args: Args) -> dict[str, float]:
    """Train, evaluate and write the run directory. Returns the metrics of the last step."""
    prepared = common.prepare(
        args,
        PROMPTS,
        learning_rate=lambda args, *_: 2e-5 if args.lora_rank else 1e-5,
        needs_reference=args.beta > 0,
    )
    args, processor = prepared.args, prepared.processor
    model, reference = prepared.model, prepared.reference
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": parameters[0].is_cuda}
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, **settings)

    options = {"max_new_tokens": args.max_new_tokens, "batch_size": 2 * args.prompts_per_step}
    before = after = evaluate(model, processor, prepared.held_out, **options)
    run = runs.Run(args, prepared.train.bad_rows, prepared.state, prepared.start)
    first, _ = run.start(before.metrics, model, optimizer)
    stream = prepared.train.begin(first, args.prompts_per_step)
    bar = tqdm(range(first, args.steps + 1), desc=Path(__file__).stem, disable=ranks.rank() != 0)
    for step in bar:
        clock = runs.Stopwatch()
        prompts = list(islice(stream, args.prompts_per_step))
        clock.lap("data_wait")
        batch = collate(model, prompts, processor.tokenizer.pad_token_id)
        clock.lap("vision")
        rollout, texts, rewards, metrics = roll_out(model, processor, prompts, batch, args)
        clock.lap("rollout")
        advantages = group_advantages(rewards)
        cuts = common.cut_prompts(rollout, args.num_minibatches, args.micro_batch_size)
        batches = [Batch(rollout[cut], advantages[cut]) for cut in cuts]
        if reference is not None:
            with common.without_adapters(reference):  # it may be the trained model
                score_reference(reference, batches, args)
        clock.lap("reference")
        if args.num_minibatches > 1:  # with one, the first pass gives the same scores
            with torch.no_grad():
                for part in batches:
                    score_policy(model, part, args)
        metrics |= update(model, optimizer, batches, args)
        clock.lap("update")
        metrics |= clock.stop(tokens=int(rollout.response_mask.sum()))
        run.sample(step, prompts, texts, rewards)
        run.require_finite(step, metrics, prompts)
        if step % args.eval_every == 0 or step == args.steps:
            after = evaluate(model, processor, prepared.held_out, **options)
            metrics |= after.metrics
        run.log(step, metrics)
        bar.set_postfix(reward=metrics["rollout/reward"], eval=after.metrics["eval/accuracy"])
        if step < args.steps:
            run.save_state(step, model, optimizer)  # and end here, after a signal
    evaluations = {"before": before, "after": after}
    plotted = ("rollout/reward", "eval/accuracy", "eval/target_attn", "train/kl", "train/grad_norm")
    save = partial(common.save_model, model=model, processor=processor)
    run.finish(args.steps, model, optimizer, save, evaluations, plotted, then="ral_grpo.py")
    return metrics


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__, partial(toy.defaults, TOY))
