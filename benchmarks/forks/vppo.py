"""A fork of `grpo_baseline.py`: `diff grpo_baseline.py benchmarks/forks/vppo.py` shows all of it.

VPPO (arXiv 2510.09285) learns from the tokens that depend on the picture. The responses are also
scored with a picture of which half the patches of 14 x 14 are black. With v_t the KL between the
two policies at token t (its eq. 3), and v its mean in a response:

    m_t   = 1 for the 40% of a response's tokens with the largest v_t, rounded up, otherwise 0
    alpha = 0.9 + 0.1 * (v - min v) / (mean v - min v), so that its mean is 1
    loss  = L_GRPO with the advantages m_t * alpha * A, + 0.06 * -log pi(y_t)

The values are those of the authors' script for 7B (github.com/huaixuheqing/VPPO-RL). From their
code, too: v_t is the k3 estimate of the rollout's policy, at most 10 for a token, with log-ratios
within 20 of 0; a response's loss is still divided by the number of all its tokens.
[ours] The rest is the baseline's: the clip range, the KL to the starting model (authors: none), and
the mean over a response's tokens (as in the paper; the code averages over all tokens). None of
DAPO's parts are here. min v and mean v are those of the whole step on all ranks (authors: of a
minibatch and of a microbatch of one rank). All responses to a prompt share a blackened picture
(authors: each has its own). A patch is the vision encoder's, see `blacken`. The fork takes two more
forward passes per rollout, one of them because pi_old is needed before the first update.

    python sft.py && python benchmarks/forks/vppo.py
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

import common
from eval import evaluate
from support import cli, ranks, runs, toy
from support.prompts import Processor, Prompt, PromptBatch, blacken, collate

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
    top_share: float = 0.4
    """Share of a response's tokens with a policy gradient. Paper: 0.4."""
    shaping_min: float = 0.9
    """The least weight of a response. Paper: 0.9."""
    eta_entropy: float = 0.06
    """Weight of the estimated entropy. Authors: 0.06 at 7B."""
    black_prob: float = 0.5
    """Probability that a patch of the picture is black. Authors: 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cli.require_not_negative(self, "eta_entropy")
        black = f"--black-prob {self.black_prob}: must be in [0, 1]"
        ranks.require(0 <= self.black_prob <= 1, black)
        ranks.require(0 < self.top_share <= 1, f"--top-share {self.top_share}: must be in (0, 1]")
        least = f"--shaping-min {self.shaping_min}: must be in [0, 1]"
        ranks.require(0 <= self.shaping_min <= 1, least)
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
    masked_logps: Tensor | None = None  # with the picture blackened


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


@torch.no_grad()
def score_masked(
    model: nn.Module, batches: list[Batch], masked: PromptBatch, cuts: list[slice], args: Args
) -> None:
    """Add the policy's scores of the responses, with the picture blackened, to each batch."""
    for batch, cut in zip(batches, cuts, strict=True):
        rollout = replace(batch.rollout, prompts=masked[cut])
        batch.masked_logps = common.score(model, rollout, args.temperature).logps


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


def visual_dependence(logps: Tensor, masked_logps: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || policy with the picture blackened) for each token. It is at
    most 10, and has no gradient there.

    >>> visual_dependence(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, -90.0]))
    tensor([ 0.0000,  0.3679, 10.0000])
    """
    difference = (masked_logps - logps).clamp(-20, 20)  # so that exp is finite
    return (torch.exp(difference) - difference - 1).clamp(max=10)


def most_visual(dependence: Tensor, mask: Tensor, share: float) -> Tensor:
    """Whether a token is among the `share` of its response's tokens, rounded up, that depend most
    on the picture, (B, G, T). Of equal ones, the first.

    >>> dependence, mask = torch.tensor([[[0.1, 0.5, 0.3, 9.0]]]), torch.tensor([[[1, 1, 1, 0]]])
    >>> most_visual(dependence, mask.bool(), 0.4)
    tensor([[[False,  True,  True, False]]])
    """
    order = dependence.masked_fill(~mask, -1.0).argsort(dim=-1, descending=True, stable=True)
    # In float32, 0.6 * 25 is more than 15.
    return (order.argsort(dim=-1) < torch.ceil(share * mask.double().sum(-1, keepdim=True))) & mask


def shaping(dependence: Tensor, everyone: Tensor, least: float) -> Tensor:
    """The weights of responses by their mean dependence, relative to that of all responses: from
    `least` up, with the mean 1 over `everyone`. All are 1 if all depend on their pictures alike.

    >>> dependence = torch.tensor([0.0, 1.0, 5.0])
    >>> shaping(dependence, dependence, 0.9)
    tensor([0.9000, 0.9500, 1.1500])
    """
    lowest = everyone.min()
    if everyone.max() - lowest <= 1e-6:
        return torch.ones_like(dependence)
    return least + (1 - least) * (dependence - lowest) / (everyone.mean() - lowest)


def shape_advantages(batches: list[Batch], args: Args) -> None:
    """Make the advantages (B, G, T): weighted by the dependence of their response, relative to all
    responses of the step on all ranks, and 0 at all but the response's most visual tokens."""
    means = []
    for batch in batches:
        mask = batch.rollout.response_mask
        dependence = visual_dependence(batch.old_logps, batch.masked_logps)
        means.append(common.response_mean(dependence, mask)[..., None])
        batch.advantages = batch.advantages * most_visual(dependence, mask, args.top_share)
    everyone = torch.tensor(ranks.gather(torch.cat(means).flatten().tolist()))
    for batch, mean in zip(batches, means, strict=True):
        batch.advantages *= shaping(mean, everyone.to(mean.device), args.shaping_min)


def loss_terms(scores: common.Scores, batch: Batch, args: Args) -> dict[str, Tensor]:
    """The loss terms, (B, G): means over each response's tokens."""
    pg, clipped = clipped_loss(scores.logps, batch.old_logps, batch.advantages, args.clip_eps)
    kl = torch.zeros_like(pg) if batch.ref_logps is None else k3(scores.logps, batch.ref_logps)
    terms = {"pg_loss": pg, "kl": kl, "entropy": scores.entropy, "clip_frac": clipped}
    terms |= {"surprisal": -scores.logps}
    terms = {name: common.response_mean(term, scores.mask) for name, term in terms.items()}
    terms["loss"] = terms["pg_loss"] + args.beta * terms["kl"]
    terms["loss"] += args.eta_entropy * terms["surprisal"]
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
        black = blacken(prompts, processor.image_processor, args.black_prob, args.seed)
        masked = collate(model, black, processor.tokenizer.pad_token_id)
        score_masked(model, batches, masked, cuts, args)
        clock.lap("reference")
        with torch.no_grad():
            for part in batches:
                score_policy(model, part, args)
        shape_advantages(batches, args)
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
