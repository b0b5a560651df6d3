"""Minibatches of different prompts, and RAL's term as the paper writes out its gradient."""

from types import SimpleNamespace

import pytest
import torch
from shared import load, make_prompts, make_rollout, terms_of, toy_args

import attn_distill
import common
import grpo_baseline
import kd_baseline
import ral_grpo
from support import ranks

SCRIPTS = (grpo_baseline, ral_grpo, kd_baseline, attn_distill)


def test_cuts_cover_every_prompt_once_and_none_crosses_a_minibatch():
    for prompts, minibatches, size in ((8, 1, 3), (8, 2, 3), (8, 4, 16), (6, 3, 1)):
        cuts = common.cut_prompts(of_lengths(*range(prompts)), minibatches, size)
        cuts = [list(range(prompts))[cut] for cut in cuts]
        assert [i for cut in cuts for i in cut] == list(range(prompts))
        assert max(map(len, cuts)) <= size
        part = prompts // minibatches
        assert len(cuts) % minibatches == 0
        assert all(cut[0] // part == cut[-1] // part for cut in cuts)
    cuts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert common.cut_prompts(of_lengths(*range(5)), 1, 2) == cuts


def of_lengths(*lengths: int) -> SimpleNamespace:
    """A rollout whose prompts and responses have these lengths."""
    return SimpleNamespace(lengths=lambda: torch.tensor(lengths))


def test_several_ranks_take_microbatches_of_like_length_together(monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 2)
    cuts = common.cut_prompts(of_lengths(9, 9, 1, 2, 7, 7, 3, 3), 2, 2)
    assert [cut.start for cut in cuts] == [2, 0, 6, 4]


def test_the_lengths_of_a_rollout_are_those_of_its_prompts_and_responses(checkpoints):
    model, processor = load(checkpoints["qwen2_vl"])
    prompts = make_prompts(model, processor)
    rollout = make_rollout(model, processor, prompts)
    responses = torch.tensor([5 + 3 + 6, 1 + 6 + 2])
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts]) + responses
    assert torch.equal(rollout.lengths(), lengths)
    assert torch.equal(rollout[:1].lengths(), lengths[:1])  # without padding


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_pass_takes_a_step_for_each_minibatch(script, monkeypatch):
    """Two microbatches in each of four minibatches, two passes."""
    taken = []
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_post_hook(lambda *_: taken.append("step"))

    def loss_terms(*inputs):
        taken.append(inputs[-2].number)
        value = model.weight.expand(1, 2)
        return {"loss": value, "attn_jsd": value}

    monkeypatch.setattr(script, "loss_terms", loss_terms)
    for name in ("score_policy", "score_teacher"):
        monkeypatch.setattr(script, name, lambda *_: None, raising=False)
    rollout = SimpleNamespace(num_responses=2)
    batches = [SimpleNamespace(rollout=rollout, number=n) for n in range(8)]
    args = toy_args(script, num_iterations=2, num_minibatches=4)
    teacher = [model] * ("teacher" in script.update.__annotations__)
    script.update(model, *teacher, optimizer, batches, args)
    assert taken == 2 * [0, 1, "step", 2, 3, "step", 4, 5, "step", 6, 7, "step"]


FOUR = {"prompts_per_step": 4, "num_minibatches": 2, "num_iterations": 1}


@pytest.mark.parametrize("script", [grpo_baseline, ral_grpo])
def test_the_policy_to_compare_with_is_the_rollouts_for_every_prompt(script, train, monkeypatch):
    """In the first minibatch the ratio is 1 and the divergence 0, in the second not, although the
    weights of its first pass are those of the whole step's first."""
    seen = []
    loss_terms = script.loss_terms

    def keep(scores, batch, args):
        seen.append((scores.logps - batch.old_logps).abs().max().item())
        return loss_terms(scores, batch, args)

    monkeypatch.setattr(script, "loss_terms", keep)
    lines, _ = train(script, **FOUR)
    assert len(seen) == 4 and seen[0] == seen[2] == 0 < min(seen[1], seen[3])
    if script is ral_grpo:
        assert lines[1]["train/attn_jsd_1"] == 0 < lines[1]["train/attn_jsd_2"]


def test_the_reference_stays_the_anchor(train):
    lines, _ = train(ral_grpo, attn_anchor="reference", **FOUR)
    assert lines[1]["train/attn_jsd_1"] == 0 < lines[2]["train/attn_jsd_1"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_update_does_not_depend_on_the_size_of_microbatches(script, train, teacher):
    """Two prompts and one, or three. The gradient norm, of before the clipping, sees a wrong scale,
    which AdamW's step would not."""
    fields = FOUR | {"prompts_per_step": 6, "learning_rate": 1e-4, "steps": 1}
    fields |= {"teacher": str(teacher)} if script in SCRIPTS[2:] else {}
    fields |= {"lambda_attn": 100.0} if script is ral_grpo else {}
    lines, weights = train(script, micro_batch_size=2, **fields)
    others, same_weights = train(script, micro_batch_size=3, **fields)
    assert lines[1]["train/grad_norm"] > 1e-3
    for ours, theirs in zip(lines, others, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for name in weights:
        torch.testing.assert_close(same_weights[name], weights[name], atol=2e-5, rtol=0)
    whole, _ = train(script, micro_batch_size=3, **fields | {"num_minibatches": 1})
    assert whole[1]["rollout/reward"] == lines[1]["rollout/reward"]
    assert whole[1]["train/grad_norm"] != lines[1]["train/grad_norm"]


def test_minibatches_are_of_equal_size():
    with pytest.raises(ranks.UsageError, match="--num-minibatches 3: must divide --prompts-per-st"):
        ral_grpo.Args(prompts_per_step=8, num_minibatches=3)


@pytest.mark.parametrize("length", [1, 6])
def test_the_sum_is_the_mean_with_lambda_times_the_length(checkpoints, length):
    model, processor = load(checkpoints["qwen2_vl"])
    rollout = make_rollout(model, processor, make_prompts(model, processor), ((length,) * 3,) * 2)
    batch = ral_grpo.Batch(rollout, torch.randn(2, 3, 1))
    ral_grpo.score_policy(model, batch, toy_args(ral_grpo))
    batch.old_attn = batch.old_attn.roll(1, dims=1)
    gradients = []
    for reduction, weight in (("sum", 1.0), ("mean", float(length))):
        args = toy_args(ral_grpo, attn_reduction=reduction, lambda_attn=weight)
        model.zero_grad()
        terms_of(ral_grpo, model, batch, args)["loss"].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_total_gradient_is_the_papers():
    """A plain loop over its unnumbered equations, with one head, whose logits e_{t,i} = x_t W k_i:
    dJSD/dp = 1/2 ln(2p / (p + p_old)), the softmax Jacobian, and the sum of A dJ/de de/dW."""
    torch.manual_seed(0)
    (g, t, p, d), lengths = (3, 5, 4, 6), (5, 2, 4)
    kinds = {"dtype": torch.float64}
    x, keys = torch.randn(g, t, d, **kinds), torch.randn(g, p + t, d, **kinds)
    weight = torch.randn(d, d, **kinds, requires_grad=True)
    mask = torch.arange(t) < torch.tensor(lengths)[:, None]
    advantages = torch.tensor([1.3, -0.4, 0.0], **kinds)
    later = torch.ones(t, p + t, dtype=torch.bool).triu(p + 1)

    def rows(weight: torch.Tensor) -> torch.Tensor:  # (1, G, T + 1, P + T); row 0 is not used
        logits = (x @ weight @ keys.mT).masked_fill(later, -torch.inf)
        return torch.cat([torch.zeros(g, 1, p + t, **kinds), logits.softmax(-1)], dim=1)[None]

    zeros = torch.zeros(1, g, t, **kinds)
    scores = common.Scores(zeros, zeros, mask[None], None, {-1: rows(weight)}, torch.tensor([]))
    moved = weight.detach() + 0.3 * torch.randn(d, d, **kinds)
    old = ral_grpo.attention_policy(rows(moved), "own").detach()
    rollout = SimpleNamespace()
    batch = ral_grpo.Batch(rollout, advantages[None, :, None], None, torch.zeros(1, g, t), old)
    args = toy_args(ral_grpo, attn_reduction="sum")
    ral_grpo.loss_terms(scores, batch, args)["attn_loss"].sum().backward()

    expected = torch.zeros(d, d, **kinds)
    for i in range(g):
        for s in range(lengths[i]):
            logits = x[i, s] @ weight.detach() @ keys[i, : p + s].T
            now, before = logits.exp() / logits.exp().sum(), old[0, i, s, : p + s]
            by_p = (2 * now / (now + before)).log() / 2
            by_e = now * (by_p - (now * by_p).sum())
            for j in range(p + s):
                expected += advantages[i] * by_e[j] * torch.outer(x[i, s], keys[i, j])
    assert expected.norm() > 1e-3
    torch.testing.assert_close(weight.grad, expected, atol=1e-9, rtol=1e-6)
