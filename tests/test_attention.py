"""The captured attention policy is the attention of an eager model, in value and in gradient."""

import pytest
import torch
from conftest import make_prompts, make_rollout, unpacked
from transformers import AutoModelForImageTextToText

import common


def eager_policy(model, prompt, ids, layer, row):
    """Head-averaged attention (T, P + T) by transformers' eager path, one response, unpacked."""
    p, t = len(prompt.ids), len(ids)
    attention = unpacked(model, prompt, ids, output_attentions=True).attentions[layer][0].mean(0)
    if row == "predicting":
        return attention[p - 1 : p + t - 1]
    rows = attention[p:] * (torch.arange(p + t) != torch.arange(p, p + t)[:, None])
    return rows / rows.sum(-1, keepdim=True)


@pytest.mark.parametrize("kinds", [("image", "image"), ("video", "video"), ("video", "image")])
@pytest.mark.parametrize("row", ["predicting", "own"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_captured_attention_is_eager_attention(
    loaded, checkpoints, family, kinds, row, checkpointing, monkeypatch
):
    monkeypatch.setattr(common, "ATTENTION_CHUNK", 2**12)  # several chunks of rows
    model, processor = loaded
    eager = AutoModelForImageTextToText.from_pretrained(
        checkpoints[family], attn_implementation="eager"
    ).eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    prompts = make_prompts(model, processor, kinds)
    rollout = make_rollout(model, processor, prompts)
    layers = [-1, 0] if row == "predicting" else [0]
    generator = torch.Generator().manual_seed(1)
    scores = common.score(model, rollout, attn_layers=layers, attn_row=row)
    longest = rollout.prompts.ids.shape[1]
    captured, expected, ours, theirs = [], [], 0.0, 0.0
    for index, layer in enumerate(sorted(layer % 2 for layer in layers)):
        for b, prompt in enumerate(prompts):
            for g in range(3):
                t = int(rollout.completion_mask[b, g].sum())
                pad = longest - len(prompt.ids)
                policy = scores.attentions[index][b, g, :t]
                assert policy[:, :pad].abs().max() == 0 if pad else True
                policy = torch.cat(
                    [policy[:, pad:longest], policy[:, longest : longest + t]], dim=1
                )
                reference = eager_policy(
                    eager, prompt, rollout.completion_ids[b, g, :t], layer, row
                )
                weights = torch.randn(policy.shape, generator=generator)
                ours, theirs = ours + (policy * weights).sum(), theirs + (reference * weights).sum()
                captured.append(policy.flatten())
                expected.append(reference.flatten())
    torch.testing.assert_close(torch.cat(captured), torch.cat(expected), atol=1e-5, rtol=0)
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


def test_rows_sum_to_one_and_see_no_future(loaded):
    model, processor = loaded
    rollout = make_rollout(model, processor, make_prompts(model, processor))
    policy = common.score(model, rollout, attn_layers=[-1]).attentions[0]
    torch.testing.assert_close(policy.sum(-1), torch.ones(policy.shape[:-1]))
    own = policy[..., -rollout.completion_ids.shape[-1] :]
    assert torch.equal(own, own.tril(-1))


def test_own_row_is_divided_by_what_is_left_even_if_that_is_nothing():
    """A token that looks at nothing but itself leaves a row of zeros, not of NaN."""
    query = torch.zeros(1, 1, 4, 2)
    query[..., 2:, :] = 1e4
    key = torch.zeros(1, 1, 4, 2)
    key[..., 2, :], key[..., 3, :] = 1.0, 2.0
    layout = common.Layout(2, 1, None, attn_row="own")
    policy = common.attention_policy(query, key, 1.0, layout)
    assert torch.equal(policy, torch.zeros(1, 1, 2, 4))


def saved_bytes(model, rollout, layers) -> int:
    """Bytes that autograd keeps of one pass; what a checkpointed chunk recomputes is not among
    them."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = common.score(model, rollout, attn_layers=layers)
        loss = scores.logps.sum() + sum(x.pow(2).sum() for x in scores.attentions)
    del loss
    return sum(kept.values())


def test_the_policys_memory_grows_with_t_times_p(checkpoints):
    """Not with P squared: three times the prompt costs about three times, far from nine."""
    model, processor = common.load_model(checkpoints["qwen2_vl"])
    costs = []
    for grid in (8, 14):  # about 80 and 210 prompt positions
        rollout = make_rollout(model, processor, make_prompts(model, processor, grids=(grid, grid)))
        costs.append(saved_bytes(model, rollout, [-1]) - saved_bytes(model, rollout, []))
    assert costs[0] > 0 and costs[1] / costs[0] < 1.2 * 210 / 78
