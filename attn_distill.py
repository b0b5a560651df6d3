"""On-policy attention distillation (arXiv 2602.04884): teach a student where its teacher looks.

The student samples the responses, and teacher and student score the same tokens. The loss moves the
student toward the teacher's next-token distributions (kd_baseline.py) *and* toward its attention.
For the response token at position t this is its attention alpha_{t,i} to the positions i before it
(one layer of each model, mean over heads), renormalised (eq. 2):

    L_AttnDistill = E[ sum_t JSD(p_student^t, p_teacher^t) ]                       (eq. 5)
    loss = rl_coef * L_RL + mu_gkd * L_GKD + gamma_attn * L_AttnDistill            (eq. 6)

The sum is over a response's tokens and E is the mean over responses. There is no advantage: the
teacher's attention is useful whatever the answer was. The models may differ in layers, heads and
width, since the loss compares only distributions over the same tokens. The method is the lines
marked `# Attention` and the functions `attention_policy` and `divergence`:
`diff kd_baseline.py attn_distill.py`.

Shapes: B prompts of P positions, padded on the left; G responses of T tokens to each; vocabulary V.

[ours] marks what the paper does not say, or says in two ways: the choices of kd_baseline.py, and
  1. gamma_attn is 1. The paper tried 0.05, 0.5 and 1, and does not say which made its tables.
  2. Other rows, reductions and layers than the paper's own row (eq. 2), sum (eq. 5) and last layer
     of each model, which are the defaults.

    python sft.py --toy-size large --stop-accuracy 0.99 --eval-above 0.8 --out runs/teacher
    python attn_distill.py --teacher runs/teacher/checkpoint             # from runs/sft
    python attn_distill.py --teacher runs/teacher/checkpoint --rl-coef 0 # pure distillation
"""

import support.startup  # first: it sets Ctrl-C and the allocator of PyTorch

import math
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
    num_iterations: int = 1
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

    teacher: str = "runs/teacher/checkpoint"
    """Checkpoint directory or hub name of the teacher. It must have the student's tokenizer. Paper:
    Qwen2.5-VL-32B for a student of 7B."""
    evaluate_teacher: bool = False
    """Evaluate the teacher once, before training. With several ranks, each then holds all of the
    teacher's weights: 62 GB at 32B."""
    gkd_beta: float = 1.0
    """1: KL(student || teacher) (paper); 0: KL(teacher || student); between: generalised JSD."""
    mu_gkd: float = 1.0
    """Weight of L_GKD, the distillation of the output distribution. [ours]"""
    rl_coef: float = 1.0
    """Weight of the GRPO loss, including its KL penalty. Paper: 1. 0: pure distillation."""
    gamma_attn: float = 1.0  # Attention (eq. 6)
    """Weight of the attention term; 0: kd_baseline.py. [ours] The paper tried 0.05, 0.5 and 1."""
    attn_layer: int = -1  # Attention
    """The student's layer, from 0, or from the end if negative. Paper: the last."""
    teacher_attn_layer: int = -1  # Attention
    """The teacher's layer, counted in the same way. Paper: the last."""
    attn_row: Literal["own", "predicting"] = "own"  # Attention (eq. 2)
    """Attention row of token y_t. `own`: that of its position, which reads it, renormalised without
    its column (paper). `predicting`: that of the position before, which predicts y_t. [ours]"""
    attn_reduction: Literal["sum", "mean"] = "sum"  # Attention (eq. 5)
    """A response's divergence is the sum over its tokens (paper), or their mean [ours], as in L_RL
    and L_GKD. With 300 tokens, the sum is 300 times as large."""

    def may_change(self) -> set[str]:
        return super().may_change() | {"evaluate_teacher"}

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks.require(self.group_size >= 2, f"--group-size {self.group_size}: needs 2 or more")
        ranks.require(0 < self.top_p <= 1, f"--top-p {self.top_p}: must be in (0, 1]")
        cut = f"--num-minibatches {self.num_minibatches}: must divide --prompts-per-step"
        ranks.require(self.prompts_per_step % self.num_minibatches == 0, cut)
        cli.require_not_negative(self, "mu_gkd", "rl_coef", "gamma_attn")
        ranks.require(0 <= self.gkd_beta <= 1, f"--gkd-beta {self.gkd_beta}: must be in [0, 1]")


# Defaults of a toy checkpoint, in place of those of `Args`.
TOY = toy.RUN | {
    "steps": 60,
    "eval_every": 10,
    "learning_rate": 6e-4,
    "prompts_per_step": 16,
    "micro_batch_size": 16,
    "think": False,
    "max_new_tokens": 16,  # 64 with a thought
    "evaluate_teacher": True,
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
    teacher_rollout: common.Rollout  # the same, with the teacher's visual features
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
    layers = [args.attn_layer]  # Attention
    scores = common.score(model, batch.rollout, args.temperature, layers, keep_logits=True)
    if batch.old_logps is None:
        batch.old_logps = scores.logps.detach()
    return scores


@torch.no_grad()
def score_teacher(teacher: nn.Module, batch: Batch, args: Args) -> common.Scores:
    """The teacher's scores of the responses, anew in every pass: a step's logits are too large to
    keep."""
    layers, rollout = [args.teacher_attn_layer], batch.teacher_rollout  # Attention
    return common.score(teacher, rollout, args.temperature, layers, keep_logits=True)


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


def gkd(
    student: Tensor, teacher: Tensor, beta: float, temperature: float, suppressed: Tensor
) -> Tensor:
    """L_GKD: divergence of next-token distributions, (B, G, T), in nats, from logits (B, G, T, V).

    It is beta * KL(teacher || m) + (1 - beta) * KL(student || m) with m = (1 - beta) * student +
    beta * teacher. This is 0 at both ends, so beta 0 gives KL(teacher || student) instead and
    beta 1 gives KL(student || teacher). Ids in `suppressed` get probability 0. If the two models
    pad their vocabularies differently, both are cut to the shorter one: the rest are not tokens.
    The rows are computed in chunks, see `in_chunks`.
    """
    words = min(student.shape[-1], teacher.shape[-1])

    def log_probs(logits: Tensor) -> Tensor:
        scaled = logits[:, :words].float() / temperature
        return scaled.index_fill(-1, suppressed, -1e30).log_softmax(dim=-1)  # 0 * -inf is NaN

    def chunk(student: Tensor, teacher: Tensor) -> tuple[Tensor]:
        s, t = log_probs(student), log_probs(teacher)
        if beta == 1:
            return ((s.exp() * (s - t)).sum(-1),)
        if beta == 0:
            return ((t.exp() * (t - s)).sum(-1),)
        m = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
        return (beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1),)

    rows = student.flatten(0, 2), teacher.flatten(0, 2)
    return common.in_chunks(chunk, *rows)[0].view(student.shape[:3])


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
    """Jensen-Shannon divergence of distributions along the last axis, in nats: between 0 and ln 2.

    Zeros, which every policy has, are safe in value and gradient. In float32, values below 1e-7 are
    rounding; the gradient is accurate far below that. Rows are computed in chunks (`in_chunks`).

    >>> p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    >>> divergence(p, q)
    tensor([0.6931, 0.0000])
    """

    def kl(p: Tensor, q: Tensor) -> Tensor:
        tiny = torch.finfo(p.dtype).tiny
        return (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1)

    def chunk(p: Tensor, q: Tensor) -> tuple[Tensor]:
        middle = (p + q) / 2
        return ((kl(p, middle) + kl(q, middle)) / 2,)

    rows = (x.reshape(-1, x.shape[-1]) for x in (p, q))
    return common.in_chunks(chunk, *rows, elements=common.ATTENTION_CHUNK)[0].view(p.shape[:-1])


def loss_terms(
    scores: common.Scores, teacher_scores: common.Scores, batch: Batch, args: Args
) -> dict[str, Tensor]:
    """The loss terms, (B, G): means over each response's tokens; `attn_loss` can be a sum."""
    logits = scores.logits, teacher_scores.logits
    distance = gkd(*logits, args.gkd_beta, args.temperature, scores.suppressed)
    rows = scores.attentions[args.attn_layer]  # Attention: (B, G, T + 1, P + T)
    teacher_rows = teacher_scores.attentions[args.teacher_attn_layer]  # Attention
    attn = [attention_policy(x, args.attn_row) for x in (rows, teacher_rows)]  # Attention
    pg, clipped = clipped_loss(scores.logps, batch.old_logps, batch.advantages, args.clip_eps)
    kl = torch.zeros_like(pg) if batch.ref_logps is None else k3(scores.logps, batch.ref_logps)
    terms = {"pg_loss": pg, "kl": kl, "entropy": scores.entropy, "clip_frac": clipped}
    terms |= {"gkd": distance}
    terms |= {"attn_distill": divergence(*attn)}  # Attention
    terms = {name: common.response_mean(term, scores.mask) for name, term in terms.items()}
    weights = scores.mask.sum(-1) if args.attn_reduction == "sum" else 1  # Attention (eq. 5)
    terms["attn_loss"] = weights * terms["attn_distill"]  # Attention (eq. 5): T * mean = sum
    terms["loss"] = args.rl_coef * (terms["pg_loss"] + args.beta * terms["kl"])
    terms["loss"] += args.mu_gkd * terms["gkd"]
    terms["loss"] += args.gamma_attn * terms["attn_loss"]  # Attention (eq. 6)
    return terms


# 5. Update


def update(
    model: nn.Module, teacher: nn.Module, optimizer: Optimizer, batches: list[Batch], args: Args
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
            terms = loss_terms(
                score_policy(model, batch, args), score_teacher(teacher, batch, args), batch, args
            )
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
        needs_reference=args.beta > 0 and args.rl_coef > 0,
        teacher=args.teacher,
        layers=("attn_layer",),  # Attention
        teacher_layers=("teacher_attn_layer",),  # Attention
    )
    args, processor = prepared.args, prepared.processor
    model, reference = prepared.model, prepared.reference
    teacher = prepared.teacher
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": parameters[0].is_cuda}
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, **settings)

    options = {"max_new_tokens": args.max_new_tokens, "batch_size": 2 * args.prompts_per_step}
    options["attn_layer"] = args.attn_layer  # Attention
    before = after = evaluate(model, processor, prepared.held_out, **options)
    teacher_before = None
    if args.evaluate_teacher:
        options_teacher = options | {"attn_layer": args.teacher_attn_layer}  # Attention
        teacher_before = evaluate(teacher, processor, prepared.held_out, **options_teacher)
        found = {"teacher/accuracy": teacher_before.metrics["eval/accuracy"]}
        before = before._replace(metrics=before.metrics | found)
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
        taught = collate(teacher, prompts, processor.tokenizer.pad_token_id)
        teacher_rollout = replace(rollout, prompts=taught)
        clock.lap("teacher_vision")
        cuts = common.cut_prompts(rollout, args.num_minibatches, args.micro_batch_size)
        batches = [Batch(rollout[cut], advantages[cut], teacher_rollout[cut]) for cut in cuts]
        if reference is not None:
            with common.without_adapters(reference):  # it may be the trained model
                score_reference(reference, batches, args)
        clock.lap("reference")
        if args.num_minibatches > 1:  # with one, the first pass gives the same scores
            with torch.no_grad():
                for part in batches:
                    score_policy(model, part, args)
        metrics |= update(model, teacher, optimizer, batches, args)
        clock.lap("update")
        metrics |= clock.stop(tokens=int(rollout.response_mask.sum()))
        run.sample(step, prompts, texts, rewards)
        run.require_finite(step, metrics, prompts)
        if step % args.eval_every == 0 or step == args.steps:
            after = evaluate(model, processor, prepared.held_out, **options)
            metrics |= after.metrics
        run.log(step, metrics, learns_from_reward=args.rl_coef > 0)
        bar.set_postfix(reward=metrics["rollout/reward"], eval=after.metrics["eval/accuracy"])
        if step < args.steps:
            run.save_state(step, model, optimizer)  # and end here, after a signal
    evaluations = {"before": before, "after": after}
    evaluations |= {"teacher": teacher_before} if teacher_before else {}
    plotted = ("rollout/reward", "eval/accuracy", "eval/target_attn", "train/kl", "train/grad_norm")
    plotted += ("train/gkd",)
    plotted += ("train/attn_distill",)  # Attention
    save = partial(common.save_model, model=model, processor=processor)
    run.finish(args.steps, model, optimizer, save, evaluations, plotted, then="kd_baseline.py")
    return metrics


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__, partial(toy.defaults, TOY))
