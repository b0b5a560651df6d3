"""The captured attention policy is the attention of an eager model, in value and in gradient."""

from functools import cache

import pytest
import torch
from shared import load_copy, make_prompts, make_rollout, terms_of, toy_args, unpacked
from transformers import AutoModelForImageTextToText

import attn_distill
import common
import ral_grpo
from support import ranks


def eager_policy(attention, p, row):
    """The policy (T, P + T) of one unpacked response, from head-averaged attention (P + T, P + T)
    by transformers' eager path."""
    if row == "predicting":
        return attention[p - 1 : -1]
    n = len(attention)
    rows = attention[p:] * (torch.arange(n) != torch.arange(p, n)[:, None])
    return rows / rows.sum(-1, keepdim=True)


@cache
def load_eager(path) -> torch.nn.Module:
    eager = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager")
    return eager.eval()


@pytest.mark.parametrize("kinds", [("image", "image"), ("video", "video"), ("mixed", "text")])
@pytest.mark.parametrize(("row", "checkpointing"), [("predicting", True), ("own", False)])
def test_captured_attention_is_eager_attention(
    loaded, checkpoints, family, kinds, row, checkpointing, monkeypatch
):
    monkeypatch.setattr(common, "ATTENTION_CHUNK", 2**12)  # several chunks of rows
    model, processor = loaded
    eager = load_eager(checkpoints[family])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    prompts = make_prompts(model, processor, kinds)
    rollout = make_rollout(model, processor, prompts)
    layers = [-1, 0] if row == "predicting" else [0]
    generator = torch.Generator().manual_seed(1)
    scores = common.score(model, rollout, attn_layers=layers)
    assert list(scores.attentions) == layers
    depth, rows = model.config.text_config.num_hidden_layers, scores.attentions
    policies = {layer % depth: ral_grpo.attention_policy(rows[layer], row) for layer in layers}
    # Behind short responses too.
    assert all(policy.isfinite().all() for policy in policies.values())
    longest = rollout.prompts.ids.shape[1]
    captured, expected, ours, theirs = [], [], 0.0, 0.0
    for b, prompt in enumerate(prompts):
        for g in range(3):
            ids = rollout.response_ids[b, g][rollout.response_mask[b, g]]
            t, p = len(ids), len(prompt.ids)
            attentions = unpacked(eager, prompt, ids, output_attentions=True).attentions
            for layer in policies:
                policy = policies[layer][b, g, :t]
                assert not policy[:, : longest - p].any()
                policy = policy[:, longest - p : longest + t]
                reference = eager_policy(attentions[layer][0].mean(0), p, row)
                weights = torch.randn(policy.shape, generator=generator)
                ours, theirs = ours + (policy * weights).sum(), theirs + (reference * weights).sum()
                captured.append(policy.flatten())
                expected.append(reference.flatten())
    torch.testing.assert_close(torch.cat(captured), torch.cat(expected), atol=1e-6, rtol=0)
    names = [name for name, _ in model.named_parameters()]
    grads = torch.autograd.grad(ours, list(model.parameters()), allow_unused=True)
    eager_grads = torch.autograd.grad(theirs, list(eager.parameters()), allow_unused=True)
    compared = 0
    for name, grad, wanted in zip(names, grads, eager_grads, strict=True):
        assert (grad is None) == (wanted is None), name
        if grad is not None:
            error = (grad - wanted).norm() / wanted.norm().clamp_min(1e-4)
            assert error < 1e-3, (name, error)
            compared += 1
    assert compared > 20


def test_a_layer_that_the_model_lacks_is_refused(loaded):
    """Or a fork whose `prepare` does not check it would train on another layer."""
    model, processor = loaded
    rollout = make_rollout(model, processor, make_prompts(model, processor, ("text",)))
    depth = model.config.text_config.num_hidden_layers
    for layer in (depth, -depth - 1):
        with pytest.raises(ranks.UsageError, match=f"attn_layers {layer}: the model has {depth}"):
            common.score(model, rollout, attn_layers=[0, layer])


def test_rows_sum_to_one_and_see_no_future(loaded):
    model, processor = loaded
    rollout = make_rollout(model, processor, make_prompts(model, processor))
    rows = common.score(model, rollout, attn_layers=[-1]).attentions[-1]
    b, g, t = rollout.response_ids.shape
    assert rows.shape == (b, g, t + 1, rollout.prompts.ids.shape[1] + t)
    for seen in (rows, *(ral_grpo.attention_policy(rows, row) for row in ("predicting", "own"))):
        torch.testing.assert_close(seen.sum(-1), torch.ones(seen.shape[:-1]))
    own = rows[..., -t:]
    assert torch.equal(own, own.tril(-1)) and own.diagonal(-1, 2, 3).min() > 0  # and see themselves
    for row in ("predicting", "own"):
        own = ral_grpo.attention_policy(rows, row)[..., -t:]
        assert torch.equal(own, own.tril(-1))


@pytest.mark.parametrize("script", [ral_grpo, attn_distill])
def test_the_policy_by_hand(script):
    """P = 2, T = 2. A token that looks at nothing but itself leaves a row of zeros, not of NaN."""
    rows = torch.tensor(
        [[0.7, 0.3, 0.0, 0.0], [0.1, 0.3, 0.6, 0.0], [0.0, 0.0, 0.0, 1.0]], requires_grad=True
    )
    predicting = script.attention_policy(rows[None, None], "predicting")
    assert torch.equal(predicting, rows[None, None, :2])
    own = script.attention_policy(rows[None, None], "own")
    expected = torch.tensor([[[[0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]])
    torch.testing.assert_close(own, expected)
    script.divergence(own, torch.full_like(own, 0.25)).sum().backward()
    assert rows.grad.isfinite().all()


def test_what_is_kept_of_a_rollout_is_its_policy_and_no_more(loaded):
    """(B, G, T, P + T) numbers, not a view into the T + 1 rows they come from."""
    model, processor = loaded
    rollout = make_rollout(model, processor, make_prompts(model, processor))
    for row in ("own", "predicting"):
        for anchor in ("rollout", "reference"):
            args = toy_args(ral_grpo, attn_row=row, attn_anchor=anchor)
            batch = ral_grpo.Batch(rollout, torch.ones(2, 3, 1))
            ral_grpo.score_reference(model, [batch], args)
            assert (batch.old_attn is None) == (anchor == "rollout")
            terms_of(ral_grpo, model, batch, args)
            kept, t = batch.old_attn, rollout.response_ids.shape[-1]
            assert kept.shape == (2, 3, t, rollout.prompts.ids.shape[1] + t)
            assert not kept.requires_grad
            assert kept.untyped_storage().nbytes() == 4 * kept.numel()


def saved_bytes(model, rollout, layers, row="predicting") -> int:
    """Bytes that autograd keeps of one pass and of its policy; what a checkpointed chunk recomputes
    is not among them."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = common.score(model, rollout, attn_layers=layers)
        loss = scores.logps.sum() + sum(
            ral_grpo.attention_policy(rows, row).pow(2).sum() for rows in scores.attentions.values()
        )
    del loss
    return sum(kept.values())


def test_the_policys_memory_grows_with_t_times_p(checkpoints):
    """Not with P squared: three times the prompt costs about three times, far from nine. `own`
    keeps one more copy, of what it divides."""
    model, processor = load_copy(checkpoints["qwen2_vl"])
    costs = {"predicting": [], "own": []}
    for grid in (8, 14):  # about 80 and 210 prompt positions
        rollout = make_rollout(model, processor, make_prompts(model, processor, grids=(grid, grid)))
        without = saved_bytes(model, rollout, [])
        for row, cost in costs.items():
            cost.append(saved_bytes(model, rollout, [-1], row) - without)
    for short, long in costs.values():
        assert short > 0 and long / short < 1.2 * 210 / 78
    b, g, t = rollout.response_ids.shape
    policy = 4 * b * g * t * (rollout.prompts.ids.shape[1] + t)
    assert costs["own"][1] - costs["predicting"][1] < 1.1 * policy
