"""The losses against hand values, plain loops, SciPy and finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

import grpo_baseline
import ral_grpo

SIBLINGS = (grpo_baseline, ral_grpo)


def distributions(kind: str, n: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        p, q = torch.rand(2, 20, n, generator=generator, dtype=torch.float64)
    elif kind == "zeros":
        p, q = torch.rand(2, 20, n, generator=generator, dtype=torch.float64)
        p, q = (
            p * (torch.rand(20, n, generator=generator) > 0.5),
            q * (torch.rand(20, n, generator=generator) > 0.5),
        )
        p[:, 0] += 0.1
        q[:, -1] += 0.1
    elif kind == "one-hot":
        p, q = torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64).roll(1, 0)
        p, q = torch.cat([p, p]), torch.cat([q, p])
    else:
        p = q = torch.rand(20, n, generator=generator, dtype=torch.float64)
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", ["random", "zeros", "one-hot", "equal"])
def test_jsd_is_scipys(kind):
    p, q = distributions(kind)
    expected = jensenshannon(p.numpy(), q.numpy(), axis=1) ** 2
    np.testing.assert_allclose(ral_grpo.divergence(p, q).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(
        ral_grpo.divergence(p.float(), q.float()).numpy(), expected, atol=1e-6
    )
    assert ral_grpo.divergence(p, q).max() <= math.log(2) + 1e-9


def test_gradient_is_that_of_finite_differences():
    p, q = distributions("random")
    p.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda p: ral_grpo.divergence(p, q), (p,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("kind", ["zeros", "one-hot", "equal"])
def test_gradient_through_a_softmax_is_never_nan(kind):
    p, q = (x.float() for x in distributions(kind))
    logits = p.log().requires_grad_(True)  # -inf where p is 0
    value = ral_grpo.divergence(logits.softmax(-1), q)
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()
    if kind == "equal":
        assert logits.grad.abs().max() < 1e-6


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30))
def test_jsd_is_bounded_and_symmetric(weights):
    p, q = torch.tensor(weights).T + 1e-30
    p, q = p / p.sum(), q / q.sum()
    jsd = ral_grpo.divergence(p, q)
    assert -1e-6 <= jsd <= math.log(2) + 1e-6
    torch.testing.assert_close(jsd, ral_grpo.divergence(q, p), atol=1e-6, rtol=0)


@pytest.mark.parametrize("script", SIBLINGS)
def test_advantages_by_hand(script):
    rewards = torch.tensor([[1.0, 0.0, 0.1, 0.9], [0.9] * 4, [0.0] * 4, [1.0, 1.0, 1.0, 0.0]])
    advantages = script.group_advantages(rewards)
    for row, group in enumerate(rewards.tolist()):
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        for column, r in enumerate(group):
            expected = 0.0 if min(group) == max(group) else (r - mean) / (std + 1e-4)
            assert advantages[row, column].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(script.group_advantages(torch.full((1, 8), 0.9)), torch.zeros(1, 8, 1))


def test_near_the_anchor_the_gradient_is_the_movement_since():
    """What the header of ral_grpo.py says of the term: (p - q) / 4q, to first order."""
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(5, 20, generator=generator, dtype=torch.float64).softmax(-1)
    moved = torch.randn(5, 20, generator=generator, dtype=torch.float64) * 1e-6
    p = (q + moved - moved.mean(-1, keepdim=True)).requires_grad_()
    (gradient,) = torch.autograd.grad(ral_grpo.divergence(p, q).sum(), p)
    expected = (p - q).detach() / (4 * q)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-3)
    assert expected.abs().max() > 1e-6


@pytest.mark.parametrize("script", SIBLINGS)
@pytest.mark.parametrize("width", [1, 5])
def test_clipped_loss_is_a_plain_loop(script, width):
    """With an advantage a response, and in a fork with one a token."""
    generator = torch.Generator().manual_seed(0)
    logps, old = -torch.rand(2, 2, 3, 5, generator=generator)
    advantages = torch.randn(2, 3, width, generator=generator)
    loss, clipped = script.clipped_loss(logps, old, advantages, 0.2)
    for b in range(2):
        for g in range(3):
            for t in range(5):
                ratio, a = (
                    math.exp(logps[b, g, t] - old[b, g, t]),
                    advantages[b, g, t % width].item(),
                )
                bounded = min(max(ratio, 0.8), 1.2)
                assert loss[b, g, t].item() == pytest.approx(-min(ratio * a, bounded * a), abs=1e-6)
                held = (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
                assert bool(clipped[b, g, t]) == held
    by_hand, _ = script.clipped_loss(
        torch.tensor([[[math.log(1.5)]]]), torch.zeros(1, 1, 1), torch.ones(1, 1), 0.2
    )
    assert by_hand.item() == pytest.approx(-1.2)


@pytest.mark.parametrize("script", SIBLINGS)
def test_k3_by_hand_and_unbiased(script):
    assert script.k3(torch.tensor(-1.0), torch.tensor(-1.0)).item() == 0
    assert script.k3(torch.tensor(-1.0), torch.tensor(-2.0)).item() == pytest.approx(
        math.exp(-1) + 1 - 1
    )
    p, q = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    expectation = (p * script.k3(p.log(), q.log())).sum().item()
    assert expectation == pytest.approx(entropy(p.numpy(), q.numpy()), abs=1e-6)
