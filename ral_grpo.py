"""Reinforced Attention Learning (arXiv 2602.04884): GRPO, plus the attention of each generated
token as a policy.

GRPO rewards what to say; RAL also rewards where to look. For every response token t take its
attention to the prompt and the earlier response (last layer, heads averaged, its own column left
out and the rest divided by what remains):

    p^t(i) = alpha_{t,i} / sum_{j <= t-1} alpha_{t,j},  i <= t - 1
    L_AttnRL = E_t[ A_t * JSD(p_theta^t, p_old^t) ]             (eq. 3)
    loss = L_RL + lambda_attn * L_AttnRL

with p_old the attention at rollout time: a response with positive advantage keeps its gaze, one
with negative advantage loses it. Lines marked `# RAL` and the functions `attention_policy`,
`divergence` and `term_norm` are all there is to it: `diff grpo_baseline.py ral_grpo.py`.

At p_theta = p_old the divergence *and its gradient* are zero. So with one update per rollout RAL is
GRPO; it acts from the second inner iteration on, which is why `num_iterations` is above 1 here, and
why `train/attn_jsd_<k>` is logged for each. Before you believe in a lambda, two more [ours; tested,
and measured in docs/results.md]:
  - Near p_old the gradient with respect to p_theta is (p_theta - p_old) / 4 p_old. The term knows
    nothing of where else to look: it holds back the movement of attention that the token policy has
    just made where the advantage is positive, and drives it on where it is negative.
  - Where responses of a group share their first s tokens, they share the own rows of tokens 1 to s
    and the predicting rows of tokens 1 to s + 1, and so their divergences D_t. What the loss has of
    such a row is D_t * sum_i A_i / T_i (T_i is the length of response i): nothing where the
    responses are equally long, and a remainder where they are not.

What differs from the paper, or is our reading of it [ours]: the choices of grpo_baseline.py, and
  1. `--attn-row predicting` takes the row of position t - 1, whose output is the prediction of y_t.
     It sees the same positions and needs no denominator.
  2. The attention term's advantage is the response's, as GRPO's is, and E_t the same mean as the
     token loss has.
  3. Options to question the method: layer, row, anchor (rollout or frozen reference), divergence.

    python sft.py && python ral_grpo.py            # the toy, on a CPU, in minutes
    python ral_grpo.py --model DIR_OR_HUB_NAME --data FILE    # your own model and data

Data: the built-in visual-search task (toy.py), or files of Video-R1's form (data.py). Memory and
time: see "Cost" in the README.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
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
from common import (
    ATTENTION_CHUNK,
    Rollout,
    accuracy,
    gathered,
    generate_group,
    has_format,
    in_chunks,
    load_model,
    load_processor,
    require_layer,
    response_mean,
    sampling_noise,
    save_model,
    score,
    without_adapters,
)
from data import check_data, check_files, open_data
from evaluate import draw_curves, draw_looks, evaluate
from memory import fit_memory
from prompts import Example, Processor, Prompt, PromptBatch, collate, encode_prompt
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
    print_summary,
    rank,
    require,
    require_not_negative,
    require_positive,
    run_script,
    same_inputs,
    seed_everything,
    step_numbers,
)

# 1. Arguments

# Fields that are None take their value from one of these: the toy's, or a real model's.
TOY = TOY_RUN | {
    "steps": 160,
    "eval_every": 20,
    "learning_rate": 6e-4,
    "prompts_per_step": 16,
    "micro_batch_size": 16,
    "num_iterations": 4,
    "think": False,
}
REAL = REAL_RUN | {
    "steps": 800,
    "prompts_per_step": 8,
    "micro_batch_size": 1,
    "num_iterations": 2,
    "think": True,
}
RATE = {False: 1e-6, True: 2e-5}  # of a real model: its weights, or adapters, which need more
NEW_TOKENS = {"toy": {False: 16, True: 64}, "real": {False: 768, True: 768}}  # direct, thinking


@dataclass
class Args(RunArgs):
    model: str | None = None
    """Checkpoint directory or hub name; unset: the cold start that sft.py left at
    runs/sft/checkpoint."""
    out: str = f"runs/{Path(__file__).stem}"
    """Run directory. A run that is in the way is moved to OUT.1 and so on."""
    think: bool | None = None
    """`--think`: a thought, then the answer; `--no-think`: the answer alone (RAL-zero). Paper:
    think. Toy: no."""
    steps: int | None = None
    """Optimisation steps, each with a rollout of its own. Paper: 800. Toy: 160."""
    learning_rate: float | None = None
    """AdamW's learning rate, constant. Real: 1e-6, as Video-R1 (a digest: 1e-5), of adapters 2e-5
    [ours]. Toy: 6e-4."""
    train_vision: bool = False
    """Train the vision encoder too; every pass then computes the features anew. Paper: frozen."""
    lora_rank: int | None = None
    """Rank of adapters that are trained instead of the weights; 0: train the weights. Unset: 0, or
    64 where that does not fit into memory."""
    gradient_checkpointing: bool | None = None
    """Keep one activation a layer and compute the rest again. Unset: on a GPU."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    micro_batch_size: int | None = None
    """Prompts (with all their responses) in one forward pass; changes memory and speed, not the
    update."""
    prompts_per_step: int | None = None
    """Prompts in each rollout of a process. Toy: 16. Real: 8 [ours]."""
    group_size: int = 8
    """G, responses to each prompt (2 or more). Paper: 8."""
    num_iterations: int | None = None
    """Optimiser steps on each rollout. Toy: 4. Real: 2 [ours]."""
    max_new_tokens: int | None = None
    """Longest response in tokens. Toy: 16, thinking 64. Real: 768."""
    temperature: float = 1.0
    """Of the policy, in sampling and in every loss. A digest of the paper says 0.9."""
    top_p: float = 1.0
    """Nucleus of the sampling, in (0, 1]; the losses use the whole policy."""
    reward: Literal["by-type", "exact"] = "by-type"
    """Accuracy by the example's problem type, as Video-R1, or by exact match. Paper: exact."""
    clip_eps: float = 0.2
    """The probability ratio is clipped to 1 - clip_eps .. 1 + clip_eps. [ours]"""
    beta: float = 0.04
    """Weight of the KL to the starting model; 0 needs no reference. Paper: 0.04."""

    lambda_attn: float = 1.0  # RAL
    """Weight of the attention term; 0 is GRPO. Paper: 1, tried 0.5 and 5."""
    attn_layer: int = -1  # RAL
    """Decoder layer whose attention is the policy, from 0, or from the end if negative. Paper: the
    last."""
    attn_row: Literal["own", "predicting"] = "own"  # RAL
    """Row of token y_t: its own position, without itself and divided by the rest (paper), or the
    position before, whose output is the prediction of y_t [ours]."""
    attn_anchor: Literal["rollout", "reference"] = "rollout"  # RAL (eq. 3)
    """What the attention is compared with: the policy at rollout time (paper), or the frozen
    reference."""
    attn_divergence: Literal["jsd", "forward-kl", "reverse-kl"] = "jsd"  # RAL
    """JSD (paper); forward is KL(anchor || today), reverse is KL(today || anchor)."""
    attn_norm_every: int = 10  # RAL
    """Steps between measurements of the gradient norm of each term by itself (two passes more); 0:
    never. [ours]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "steps", "learning_rate", "max_grad_norm")
        require_positive(
            self, "micro_batch_size", "prompts_per_step", "num_iterations", "max_new_tokens"
        )
        require_positive(self, "temperature", "clip_eps")
        require(self.group_size >= 2, f"--group-size {self.group_size}: needs 2 or more")
        require(0 < self.top_p <= 1, f"--top-p {self.top_p}: must be in (0, 1]")
        require_not_negative(self, "lora_rank", "beta")
        require_not_negative(self, "lambda_attn", "attn_norm_every")


# 2. Prompt and reward

DIRECT = "Give the answer alone inside <answer> </answer> tags."
THINK = f"Think first, inside <think> </think> tags. {DIRECT}"
ANSWER = {  # what is asked for, by problem type
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is a number.",
    "regression": "The answer is a number.",
    "OCR": "The answer is the text as it stands there.",
    "free-form": "The answer is a short text.",
}


def ask(example: Example, think: bool) -> str:
    """What the user says beside the image or video: question, options, how to answer."""
    options = ["Options:", *example.options] if example.options else []
    request = f"{THINK if think else DIRECT} {ANSWER.get(example.problem_type, '')}"
    return "\n".join([example.problem, *options, request.strip()])


def encode(
    example: Example, processor: Processor, config: Any, think: bool, task: toy.Task, is_toy: bool
) -> Prompt:
    """The prompt of an example; the toy's checkpoints know only their own words."""
    text = example.problem if is_toy else ask(example, think)
    return encode_prompt(processor, config, example, text, task.order == "question-first")


def reward(accuracy: Tensor, format: Tensor) -> Tensor:
    """The paper's reward of each response."""
    return 0.9 * accuracy + 0.1 * format


# 3. Rollout


@dataclass
class Batch:
    """Some prompts of a rollout with what the loss needs: `advantages` (B, G, 1), or (B, G, T) in
    a fork that tells tokens apart; log-probabilities (B, G, T).

    `old_attn` (B, G, T, P + T) is the attention policy to compare with: that of the rollout, or of
    the reference.
    """

    rollout: Rollout
    advantages: Tensor
    ref_logps: Tensor | None = None
    old_logps: Tensor | None = None
    old_attn: Tensor | None = None  # RAL (eq. 3)


def roll_out(
    model: Module,
    processor: Processor,
    prompts: list[Prompt],
    batch: PromptBatch,
    numbers: range,
    args: Args,
) -> tuple[Rollout, Tensor, dict[str, float], list[dict]]:
    """Sample G responses to each prompt and reward them: rollout, rewards (B, G), metrics, lines of
    samples.jsonl. `numbers` count the prompts of the run, and with the seed decide the noise."""
    noise = sampling_noise(args.seed, numbers, args.group_size, args.max_new_tokens)
    with gathered(model):
        rollout = generate_group(
            model, batch, args.group_size, args.max_new_tokens, noise, args.temperature, args.top_p
        )
    texts = rollout.texts(processor.tokenizer)
    examples = [prompt.example for prompt in prompts]
    accuracies = torch.tensor(
        [[accuracy(t, x, args.reward) for t in g] for g, x in zip(texts, examples, strict=True)]
    )
    formats = torch.tensor([[float(has_format(t, args.think)) for t in group] for group in texts])
    formats = formats.masked_fill(rollout.truncated.cpu(), 0.0)
    rewards = reward(accuracies, formats)
    metrics = {
        "rollout/reward": rewards.mean().item(),
        "rollout/accuracy": accuracies.mean().item(),
        "rollout/format": formats.mean().item(),
        "rollout/reward_std": rewards.std(dim=1).mean().item(),
        "rollout/frac_zero_std": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "rollout/completion_len": rollout.completion_mask.sum(-1).float().mean().item(),
        "rollout/truncated_frac": rollout.truncated.float().mean().item(),
    }
    samples = [
        {"row": x.name, "problem": x.problem, "solution": x.solution, "response": t, "reward": r}
        for x, group, values in zip(examples, texts, rewards.tolist(), strict=True)
        for t, r in zip(group, values, strict=True)
    ]
    return rollout, rewards.to(model.device), metrics, samples


@torch.no_grad()
def score_reference(reference: Module, batches: list[Batch], args: Args) -> None:
    """Add what the frozen starting model says of the responses."""
    for batch in batches:
        layers = [args.attn_layer] if args.attn_anchor == "reference" else []  # RAL
        scores = score(reference, batch.rollout, args.temperature, layers)  # RAL
        batch.ref_logps = scores.logps
        if layers:  # RAL
            batch.old_attn = attention_policy(scores.attentions[0], args.attn_row)  # RAL


# 4. Loss


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO's advantages A_i = (r_i - mean) / (std + 1e-4) within each group, (B, G, 1): one for all
    tokens of a response; std with ddof 1 [ours].

    Exactly 0 where all rewards of a group are equal, decided before dividing: eight float32 rewards
    of 0.9 have a standard deviation of 6e-8, and would get an advantage.

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
    """GRPO's -min(ratio A, clip(ratio) A) of each token, and whether the clip held it, both (B, G,
    T)."""
    ratio = torch.exp(logps - old_logps)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    return -torch.minimum(unclipped, clipped), (clipped < unclipped).float()


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """exp(ref - logp) - (ref - logp) - 1 of each token, an unbiased estimate of KL(policy ||
    reference)."""
    difference = ref_logps - logps
    return torch.exp(difference) - difference - 1


def attention_policy(rows: Tensor, row: str) -> Tensor:
    """The attention policy of each response token, (B, G, T, P + T), from the rows of attention of
    the prompt's last position and of each response token, (B, G, T + 1, P + T); rows sum to 1.

    "own" is the paper's: p^t(i) = alpha_{t,i} / sum_{j <= t - 1} alpha_{t,j} for i <= t - 1, the
    row of y_t itself without its own column; 0 throughout where all it saw was itself. "predicting"
    [ours] is the row of position t - 1, whose output is the prediction of y_t: it sees the same
    positions and needs no denominator.

    >>> rows = torch.tensor([[[[0.7, 0.3, 0.0], [0.2, 0.3, 0.5]]]])  # P = 2, T = 1
    >>> attention_policy(rows, "own"), attention_policy(rows, "predicting")
    (tensor([[[[0.4000, 0.6000, 0.0000]]]]), tensor([[[[0.7000, 0.3000, 0.0000]]]]))
    """
    if row == "predicting":
        return rows[:, :, :-1].contiguous()
    earlier = rows[:, :, 1:].tril(rows.shape[3] - rows.shape[2])  # row t up to column P + t - 1
    return earlier / earlier.sum(-1, keepdim=True).clamp_min(1e-30)


def divergence(p: Tensor, q: Tensor, kind: str = "jsd") -> Tensor:
    """Jensen-Shannon divergence of distributions along the last axis, in nats, between 0 and
    ln 2.

    `p` is today's attention, `q` the anchor. Zeros are harmless, in value and in gradient. In row
    chunks, see `in_chunks`.

    >>> p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    >>> divergence(p, q)
    tensor([0.6931, 0.0000])
    """

    def kl(p: Tensor, q: Tensor) -> Tensor:
        tiny = torch.finfo(p.dtype).tiny
        return (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1)

    def chunk(p: Tensor, q: Tensor) -> tuple[Tensor]:
        if kind != "jsd":
            return (kl(q, p) if kind == "forward-kl" else kl(p, q),)
        middle = (p + q) / 2
        return ((kl(p, middle) + kl(q, middle)) / 2,)

    rows = (x.reshape(-1, x.shape[-1]) for x in (p, q))
    return in_chunks(chunk, *rows, elements=ATTENTION_CHUNK)[0].view(p.shape[:-1])


def loss_terms(model: Module, batch: Batch, args: Args) -> dict[str, Tensor]:
    """The terms of the loss for each response, (B, G), in nats a token: means over the response's
    tokens."""
    scores = score(model, batch.rollout, args.temperature, [args.attn_layer])  # RAL
    attn = attention_policy(scores.attentions[0], args.attn_row)  # RAL: (B, G, T, P + T)
    if batch.old_attn is None:  # RAL: as for the log-probabilities below
        batch.old_attn = attn.detach()
    if batch.old_logps is None:  # the first inner iteration: today's policy is still the rollout's
        batch.old_logps = scores.logps.detach()
    pg, clipped = clipped_loss(scores.logps, batch.old_logps, batch.advantages, args.clip_eps)
    kl = torch.zeros_like(pg) if batch.ref_logps is None else k3(scores.logps, batch.ref_logps)
    attn_jsd = divergence(attn, batch.old_attn, args.attn_divergence)  # RAL: (B, G, T)
    terms = {"pg_loss": pg, "kl": kl, "entropy": scores.entropy, "clip_frac": clipped}
    # RAL (eq. 3): its mean over a response's tokens is taken with that of the others.
    terms |= {"attn_jsd": attn_jsd, "attn_loss": batch.advantages * attn_jsd}  # RAL
    terms = {name: response_mean(term, scores.mask) for name, term in terms.items()}
    terms["loss"] = terms["pg_loss"] + args.beta * terms["kl"]
    terms["loss"] = terms["loss"] + args.lambda_attn * terms["attn_loss"]  # RAL
    return terms


# 5. Update


def term_norm(model: Module, batches: list[Batch], args: Args, term: str) -> float:
    """RAL: gradient norm of one term of the loss by itself, before its weight, from a forward and
    backward of its own [ours]."""
    responses = sum(batch.rollout.truncated.numel() for batch in batches)
    for batch in batches:
        terms = loss_terms(model, batch, args)
        # Adds zero so that every FSDP layer's output receives a gradient; else backward fails.
        nothing = 0 * terms["loss"].sum()
        (terms[term].sum() / responses + nothing).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return full_tensor(norm).item()


def update(
    model: Module, optimizer: Optimizer, batches: list[Batch], args: Args, measure: bool
) -> dict[str, float]:
    """`num_iterations` optimiser steps on one rollout, each over all its microbatches; metrics are
    their means.

    `train/attn_jsd_<k>` is the divergence in inner iteration k; `measure` adds the gradient norms
    of the two terms in the last one.
    """
    model.train()
    responses = sum(batch.rollout.truncated.numel() for batch in batches)
    metrics = defaultdict(float)
    for iteration in range(1, args.num_iterations + 1):
        if measure and iteration == args.num_iterations:  # RAL
            for term in ("pg", "attn"):
                metrics[f"train/{term}_grad_norm"] = term_norm(model, batches, args, f"{term}_loss")
        for batch in batches:
            terms = loss_terms(model, batch, args)
            (terms["loss"].sum() / responses).backward()
            for name, term in terms.items():
                metrics[f"train/{name}"] += (
                    term.detach().sum().item() / responses / args.num_iterations
                )
            # RAL: and the divergence of this iteration alone.
            metrics[f"train/attn_jsd_{iteration}"] += terms["attn_jsd"].sum().item() / responses
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm))
        metrics["train/grad_norm"] += norm.item() / args.num_iterations
        if not torch.isfinite(norm):
            break  # and the loop stops the run
        optimizer.step()
        optimizer.zero_grad()
    return dict(metrics)


# 6. Training loop


def main(args: Args) -> dict[str, float]:
    """Train, evaluate, write the run directory; returns the last evaluation and step as one
    dictionary."""
    start = time.time()
    base = args.model or "runs/sft/checkpoint"
    found = args.model is not None or Path(base).is_dir()
    require(found, f"--model: none at {base}; run `python sft.py` first")
    is_toy = toy.Task.load(Path(base)) is not None
    task = toy.resolve_task(args, base)
    args = fill_defaults(args, (TOY | {"think": task.think}) if is_toy else REAL)
    new_tokens = NEW_TOKENS["toy" if is_toy else "real"][args.think]
    args = fill_defaults(args, {"max_new_tokens": new_tokens})
    check_run(args, base)
    check_files(args, is_toy)
    seed_everything(args.seed)
    config, processor = load_processor(base, args.max_pixels, args.frame_pixels)
    require_layer("--attn-layer", args.attn_layer, config)  # RAL
    turn = partial(encode, processor=processor, config=config, think=args.think)
    turn = partial(turn, task=task, is_toy=is_toy)
    if args.check_data:
        return check_data(args, turn)
    open_prompts = open_data if args.data else partial(toy.open_data, task)
    train, held_out, skipped = open_prompts(args, turn)
    needs_reference = args.beta > 0 or args.attn_anchor == "reference"  # RAL
    args = fit_memory(args, config, needs_reference)
    args = fill_defaults(args, {"learning_rate": RATE[args.lora_rank > 0]})
    state = find_state(args)
    trained = (args.train_vision, args.lora_rank, args.gradient_checkpointing)
    model = load_model(base, *trained)[0]
    reference = None
    if needs_reference:  # where adapters are trained, the model without them
        reference = model if args.lora_rank else load_model(base, frozen=True)[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=parameters[0].is_cuda,
    )

    size = args.micro_batch_size
    judge = partial(evaluate, processor=processor, prompts=held_out, think=args.think)
    judge = partial(judge, max_new_tokens=args.max_new_tokens, batch_size=2 * args.prompts_per_step)
    judge = partial(judge, reward=args.reward)
    judge = partial(judge, attn_layer=args.attn_layer)  # RAL
    before, looks_before = judge(model)
    run = Run(args, skipped, state)
    if state is None:
        run.log(0, before)
    after, looks_after = before, looks_before
    run.restore(model, optimizer)
    first = 1 if state is None else state.step + 1
    stream = train.begin(step_numbers(args, first).start)
    bar = tqdm(range(first, args.steps + 1), desc=Path(__file__).stem, disable=rank() != 0)
    for step in bar:
        clock = Stopwatch()
        numbers = step_numbers(args, step)
        prompts = list(islice(stream, args.prompts_per_step))
        clock.lap("data_wait")
        batch = collate(model, prompts, processor.tokenizer.pad_token_id)
        clock.lap("vision")
        rollout, rewards, metrics, samples = roll_out(
            model, processor, prompts, batch, numbers, args
        )
        clock.lap("rollout")
        advantages = group_advantages(rewards)
        cuts = [slice(i, i + size) for i in range(0, len(prompts), size)]
        batches = [Batch(rollout[cut], advantages[cut]) for cut in cuts]
        if reference is not None:
            with without_adapters(reference):
                score_reference(reference, batches, args)
        clock.lap("reference")
        # RAL: the two terms' gradient norms cost two passes, so only now and then.
        measure = args.attn_norm_every > 0 and step % args.attn_norm_every == 0
        metrics |= update(model, optimizer, batches, args, measure)
        run.require_finite(step, metrics, prompts)
        clock.lap("update")
        metrics |= clock.stop(tokens=int(rollout.completion_mask.sum()))
        if step % args.eval_every == 0 or step == args.steps:
            after, looks_after = judge(model)
            metrics |= after
        run.log(step, metrics)
        run.sample(step, samples)
        bar.set_postfix(
            reward=f"{metrics['rollout/reward']:.2f}", eval=f"{after['eval/accuracy']:.3f}"
        )
        if step < args.steps and run.save_state(step, model, optimizer):
            run.close()
            return metrics
    run.save_checkpoint(partial(save_model, model=model, processor=processor))
    run.save_state(args.steps, model, optimizer, done=True)
    run.close()
    if rank() != 0:
        return metrics
    looks = {"before": looks_before, "after": looks_after}
    draw_looks(run.out / "attention.png", looks)
    names = ("rollout/reward", "eval/accuracy", "eval/target_attn", "train/kl", "train/grad_norm")
    names += ("train/attn_jsd",)  # RAL
    draw_curves(run.out / "curves.png", run.out / "metrics.jsonl", names)
    then = f"python grpo_baseline.py{same_inputs(args)}"
    print_summary(run, before, after, args.steps, start, then)
    return metrics


if __name__ == "__main__":
    run_script(Args, main, __doc__)
