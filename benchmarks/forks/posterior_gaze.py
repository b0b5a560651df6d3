"""A fork of `ral_grpo.py`: `diff ral_grpo.py benchmarks/forks/posterior_gaze.py` shows all of it.

RAL pulls attention toward where a response did look. This fork asks where it should have looked for
the words that it was rewarded for [ours]. L_tj is the probability of response token y_t if the row
that predicts it, in one layer and in every head, attended to visual key j alone, with everything
else as it was:

    q_t ~ p_old,t * L_t ** eta   on the visual keys, whose total mass is kept
    loss = L_RL + lambda_attn * E_t[ max(A_t, 0) * (1 - pi(y_t)) * KL(q_t || p_theta,t) ]

The factor 1 - pi(y_t), without gradient, leaves out the words that the model says anyway, whatever
it looks at. L is computed once per rollout, with its weights: the layer is rerun for the rewarded
tokens alone, and so are the layers above it. The row is always the predicting one, whatever
`--attn-row` says. For one process, on models like the toy's: a real model has too many visual keys.

    python benchmarks/forks/posterior_gaze.py --eta 8 --lambda-attn 10
"""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

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

    lambda_attn: float = 1.0  # RAL (eq. 4)
    """Weight of the attention term; 0: GRPO that logs it. [ours] The paper tried 0.5, 1 and 5."""
    attn_layer: int = -1  # RAL
    """Decoder layer, counted from 0, or from the end if negative. Paper: the last."""
    attn_row: Literal["own", "predicting"] = "own"  # RAL (eq. 2)
    """Attention row of token y_t. `own`: that of its position, which reads it, renormalised without
    its column (paper). `predicting`: that of the position before, which predicts y_t. [ours]"""
    attn_reduction: Literal["mean", "sum"] = "mean"  # RAL (eq. 3)
    """A response's attention term is the mean over its tokens (eq. 3 is an expectation over t) or
    their sum (the paper's total update), which is 300 times as large for 300 tokens. [ours]"""
    attn_anchor: Literal["rollout", "reference"] = "rollout"  # RAL (eq. 3)
    """Anchor p_old: the attention at rollout time ("old" in the paper), or that of the frozen
    reference ("reference" in its introduction). [ours]"""
    eta: float = 8.0
    """Exponent of L: how far the target moves from where the response looked; 0: not at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks.require(self.group_size >= 2, f"--group-size {self.group_size}: needs 2 or more")
        ranks.require(0 < self.top_p <= 1, f"--top-p {self.top_p}: must be in (0, 1]")
        cut = f"--num-minibatches {self.num_minibatches}: must be 1; pass 1 makes the target"
        ranks.require(self.num_minibatches == 1, cut)
        cli.require_not_negative(self, "lambda_attn")
        ranks.require(self.attn_anchor == "rollout", "--attn-anchor: not in this fork")


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
    old_attn: Tensor | None = None  # RAL (eq. 3): p_old, (B, G, T, P + T)


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
        layers = [args.attn_layer] if args.attn_anchor == "reference" else []  # RAL
        scores = common.score(reference, batch.rollout, args.temperature, layers)  # RAL
        batch.ref_logps = scores.logps
        if layers:  # RAL
            rows = scores.attentions[args.attn_layer]  # RAL
            batch.old_attn = attention_policy(rows, args.attn_row)  # RAL


Rotary = tuple[Tensor, Tensor]  # cosines and sines of a position embedding


@contextmanager
def layer_inputs(model: nn.Module) -> Iterator[list[tuple[Tensor, Rotary]]]:
    """Collect the input of every decoder layer (B, P + G * T, hidden) and its rotary embedding."""
    inputs, layers = [], model.model.language_model.layers

    def keep(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append((args[0].detach(), kwargs["position_embeddings"]))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def rerun_layer(
    layer: nn.Module, x: Tensor, states: Tensor, rotary: Rotary, at: Tensor, seen: Tensor
) -> Tensor:
    """The layer's outputs (N, K, hidden) for N positions `at`, of each of which `x` (N, K, hidden)
    holds K versions. `states` (N, L, hidden) are the layer's inputs, `seen` (N, L) the earlier
    positions that a position attends to, and `rotary` their embedding, (N, L, D)."""
    attention, (cos, sin) = layer.self_attn, rotary
    here = [part[torch.arange(len(at)), at][:, None, None] for part in rotary]

    def heads(linear: nn.Module, x: Tensor) -> Tensor:  # (N, L or K, hidden) to (N, heads, -1, D)
        x = linear(layer.input_layernorm(x))
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = rotate(heads(attention.q_proj, x), *here)
    own_key, own_value = rotate(heads(attention.k_proj, x), *here), heads(attention.v_proj, x)
    key = rotate(heads(attention.k_proj, states), cos[:, None], sin[:, None])
    value = heads(attention.v_proj, states)
    shared = query.shape[1] // key.shape[1]
    tensors = (key, value, own_key, own_value)
    key, value, own_key, own_value = (y.repeat_interleave(shared, dim=1) for y in tensors)
    scores = (query @ key.mT).masked_fill(~seen[:, None, None], -torch.inf)
    scores = torch.cat([scores, (query * own_key).sum(-1, keepdim=True)], dim=-1)
    weights = (scores * attention.scaling).softmax(dim=-1)
    out = weights[..., :-1] @ value + weights[..., -1:] * own_value
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (..., D)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


@torch.no_grad()
def posterior_gaze(model: nn.Module, batch: Batch, kept: list, attn: Tensor, args: Args) -> Tensor:
    """The target q (B, G, T, P + T) of the rewarded tokens; where the advantage is not positive, it
    is the policy `attn` itself. `kept` is what `layer_inputs` kept."""
    rollout, text = batch.rollout, model.model.language_model
    p, t = rollout.prompts.ids.shape[1], rollout.response_ids.shape[2]
    rewarded = (batch.advantages > 0) & rollout.response_mask
    b, g, s = rewarded.nonzero(as_tuple=True)  # prompt, response, token
    visual = rollout.prompts.patches.to(attn.device) >= 0
    keys = visual.nonzero()[:, 1].view(len(visual), -1)  # prompts have equally many visual tokens
    # Positions in the packed sequence: of the prompt and this response, and of the row in these.
    own = p + t * g[:, None] + torch.arange(t, device=attn.device)
    places = torch.cat([torch.arange(p, device=attn.device).expand(len(g), -1), own], dim=1)
    at = p - 1 + s
    layer, *above = text.layers[args.attn_layer % len(text.layers) :]
    (states, _), *later = kept[args.attn_layer % len(text.layers) :]
    attention = layer.self_attn
    values = attention.v_proj(layer.input_layernorm(states[:, :p]))
    values = values.unflatten(-1, (-1, attention.head_dim))
    values = values.repeat_interleave(attention.num_key_value_groups, dim=2).flatten(2)
    moved = attention.o_proj(values)[b[:, None], keys[b]]  # (N, K, hidden)
    row = places.gather(1, at[:, None])[:, 0]
    x = states[b, row][:, None] + moved
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    seen = torch.arange(p + t, device=attn.device) < at[:, None]
    if rollout.prompts.mask is not None:
        seen = seen & F.pad(rollout.prompts.mask[b], (0, t), value=True)
    for layer, (states, rotary) in zip(above, later, strict=True):
        rotary = tuple(part[b[:, None], places] for part in rotary)
        x = rerun_layer(layer, x, states[b[:, None], places], rotary, at, seen)
    logits = model.lm_head(text.norm(x)).float() / args.temperature
    suppressed = torch.tensor(common.vision_token_ids(model.config), device=attn.device)
    logits = logits.index_fill(-1, suppressed, -torch.inf)
    answers = rollout.response_ids[b, g, s][:, None, None].expand(-1, x.shape[1], 1)
    log_l = logits.log_softmax(dim=-1).gather(-1, answers)[..., 0]  # (N, K)
    old = attn[b, g, s]
    looked = old.gather(1, keys[b])
    share = (looked.clamp_min(1e-30).log() + args.eta * log_l).softmax(dim=-1)
    target = attn.clone()
    target[b, g, s] = old.scatter(1, keys[b], share * looked.sum(-1, keepdim=True))
    return target


def score_policy(model: nn.Module, batch: Batch, args: Args) -> common.Scores:
    """The policy's scores of the responses. A batch's first are from before any step, when the
    policy is still that of the rollout: they are kept as the old ones."""
    with layer_inputs(model) as inputs:
        scores = common.score(model, batch.rollout, args.temperature, [args.attn_layer])  # RAL
    if batch.old_logps is None:
        batch.old_logps = scores.logps.detach()
    if batch.old_attn is None:
        attn = attention_policy(scores.attentions[args.attn_layer].detach(), "predicting")
        with common.gathered(model):  # it calls layers by their parts
            batch.old_attn = posterior_gaze(model, batch, inputs, attn, args)
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


def attention_policy(rows: Tensor, row: str) -> Tensor:
    """The attention policy of each response token, (B, G, T, P + T).

    `rows` (B, G, T + 1, P + T) are the attention of the prompt's last position (row 0) and of each
    response token y_t (row t, from 1 to T); each sums to 1. "own" is row t without its own column,
    renormalised (eq. 2), and all zeros where y_t attends only to itself. "predicting" [ours] is row
    t - 1, which sees the same positions and needs no denominator.

    >>> rows = torch.tensor([[[[0.7, 0.3, 0.0], [0.2, 0.3, 0.5]]]])  # P = 2, T = 1
    >>> attention_policy(rows, "own"), attention_policy(rows, "predicting")
    (tensor([[[[0.4000, 0.6000, 0.0000]]]]), tensor([[[[0.7000, 0.3000, 0.0000]]]]))
    """
    if row == "predicting":
        return rows[:, :, :-1].contiguous()
    p = rows.shape[3] - rows.shape[2] + 1
    earlier = rows[:, :, 1:].tril(p - 1)  # row t: the P + t - 1 positions before y_t
    return earlier / earlier.sum(-1, keepdim=True).clamp_min(1e-30)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(q || p) of distributions along the last axis, in nats.

    `p` is the current distribution and `q` the anchor. Zeros are safe, in value and in gradient.
    The rows are computed in chunks, see `in_chunks`.
    """

    def kl(p: Tensor, q: Tensor) -> Tensor:
        tiny = torch.finfo(p.dtype).tiny
        return (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1)

    def chunk(p: Tensor, q: Tensor) -> tuple[Tensor]:
        return (kl(q, p),)

    rows = (x.reshape(-1, x.shape[-1]) for x in (p, q))
    return common.in_chunks(chunk, *rows, elements=common.ATTENTION_CHUNK)[0].view(p.shape[:-1])


def loss_terms(scores: common.Scores, batch: Batch, args: Args) -> dict[str, Tensor]:
    """The loss terms, (B, G): means over each response's tokens; `attn_loss` can be a sum.

    `attn_jsd` is KL(q || p) of each token here, and `attn_loss` weighs it as the header says.
    """
    attn = attention_policy(scores.attentions[args.attn_layer], "predicting")
    pg, clipped = clipped_loss(scores.logps, batch.old_logps, batch.advantages, args.clip_eps)
    kl = torch.zeros_like(pg) if batch.ref_logps is None else k3(scores.logps, batch.ref_logps)
    attn_jsd = divergence(attn, batch.old_attn)
    terms = {"pg_loss": pg, "kl": kl, "entropy": scores.entropy, "clip_frac": clipped}
    terms |= {"attn_jsd": attn_jsd, "attn_loss": batch.advantages.clamp_min(0) * attn_jsd}
    terms["attn_loss"] = (1 - scores.logps.detach().exp()) * terms["attn_loss"]
    terms = {name: common.response_mean(term, scores.mask) for name, term in terms.items()}
    if args.attn_reduction == "sum":  # RAL (eq. 3): T * mean = sum
        terms["attn_loss"] *= scores.mask.sum(-1)  # RAL
    terms["loss"] = terms["pg_loss"] + args.beta * terms["kl"]
    terms["loss"] += args.lambda_attn * terms["attn_loss"]  # RAL
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
    for k, minibatch in enumerate(schedule, 1):  # RAL: k counts the optimiser steps
        responses = sum(batch.rollout.num_responses for batch in minibatch)
        for batch in minibatch:
            terms = loss_terms(score_policy(model, batch, args), batch, args)
            (terms["loss"].sum() / responses).backward()
            for name, term in terms.items():
                metrics[f"train/{name}"] += term.detach().sum().item() / responses / len(schedule)
            metrics[f"train/attn_jsd_{k}"] += terms["attn_jsd"].sum().item() / responses  # RAL
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
    ranks.require(toy.Task.load(Path(args.model)) is not None, "--model: this fork is for the toy")
    prepared = common.prepare(
        args,
        PROMPTS,
        learning_rate=lambda args, *_: 2e-5 if args.lora_rank else 1e-5,
        needs_reference=args.beta > 0 or args.attn_anchor == "reference",  # RAL
        layers=("attn_layer",),  # RAL
    )
    args, processor = prepared.args, prepared.processor
    model, reference = prepared.model, prepared.reference
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": parameters[0].is_cuda}
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, **settings)

    options = {"max_new_tokens": args.max_new_tokens, "batch_size": 2 * args.prompts_per_step}
    options["attn_layer"] = args.attn_layer  # RAL
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
    plotted += ("train/attn_jsd",)  # RAL
    save = partial(common.save_model, model=model, processor=processor)
    run.finish(args.steps, model, optimizer, save, evaluations, plotted, then="grpo_baseline.py")
    return metrics


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__, partial(toy.defaults, TOY))
