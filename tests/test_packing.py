"""One packed forward says what one plain forward a response says, in value and in gradient."""

import pytest
import torch
from shared import make_prompts, make_rollout, unpacked

import common
from support.prompts import encode_prompt

KINDS = [("image", "image"), ("video", "image"), ("text", "mixed"), ("text", "text")]


@pytest.mark.parametrize("kinds", KINDS)
def test_packed_logps_are_unpacked_logps(loaded, kinds, monkeypatch):
    monkeypatch.setitem(common.in_chunks.__kwdefaults__, "elements", 200)  # several chunks of rows
    (model, processor), temperature = loaded, 0.7
    suppressed = common.vision_token_ids(model.config)
    prompts = make_prompts(model, processor, kinds)
    rollout = make_rollout(model, processor, prompts)
    scores = common.score(model, rollout, temperature)
    ours, theirs = 0.0, 0.0
    for b, prompt in enumerate(prompts):
        for g in range(3):
            ids = rollout.response_ids[b, g][rollout.response_mask[b, g]]
            logits = unpacked(model, prompt, ids).logits[0, len(prompt.ids) - 1 : -1] / temperature
            logits[:, suppressed] = -torch.inf  # the prompt's last row predicts the first token
            distribution = torch.distributions.Categorical(logits=logits)
            logps = distribution.log_prob(ids)
            torch.testing.assert_close(scores.logps[b, g, : len(ids)], logps, atol=1e-5, rtol=0)
            entropy = torch.special.entr(distribution.probs).sum(-1)
            torch.testing.assert_close(scores.entropy[b, g, : len(ids)], entropy, atol=1e-4, rtol=0)
            weight = (-1) ** g * (b + 1)
            ours, theirs = (
                ours + weight * scores.logps[b, g, : len(ids)].sum(),
                theirs + weight * logps.sum(),
            )
    grads = torch.autograd.grad(ours, list(model.parameters()))
    # The encoder has a gradient without media too: with FSDP, the other ranks wait for it.
    expected = torch.autograd.grad(theirs, list(model.parameters()), materialize_grads=True)
    for (name, _), grad, wanted in zip(model.named_parameters(), grads, expected, strict=True):
        error = (grad - wanted).norm() / wanted.norm().clamp_min(1e-3)
        assert error < 1e-4, (name, error)


def test_padding_has_no_influence(loaded):
    """Neither what follows a response's end, nor a longer prompt in the same batch."""
    model, processor = loaded
    prompts = make_prompts(model, processor)
    rollout = make_rollout(model, processor, prompts)
    together = common.score(model, rollout, attn_layers=[-1])
    noise = torch.where(rollout.response_mask, rollout.response_ids, 3)
    other = common.Rollout(rollout.prompts, noise, rollout.response_mask, rollout.truncated)
    assert torch.equal(common.score(model, other).logps, together.logps)
    alone = make_rollout(model, processor, prompts[1:])
    alone.response_ids, alone.response_mask = (rollout.response_ids[1:], rollout.response_mask[1:])
    logps = common.score(model, alone).logps
    torch.testing.assert_close(logps, together.logps[1:], atol=1e-5, rtol=0)
    assert together.logps[~rollout.response_mask].abs().max() == 0


def test_vision_token_in_a_response_is_masked_and_disturbs_nobody(loaded):
    model, processor = loaded
    rollout = make_rollout(model, processor, make_prompts(model, processor))
    clean = common.score(model, rollout)
    rollout.response_ids[0, 1, 1] = model.config.image_token_id
    scores = common.score(model, rollout)
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    assert torch.equal(scores.logps[others], clean.logps[others])
    assert scores.logps.isfinite().all()
    assert not scores.mask[0, 1, 1]
    assert scores.mask[0, 1].sum() == clean.mask[0, 1].sum() - 1
    (-scores.logps.sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_placeholder_in_a_question_stays_text(loaded):
    model, processor = loaded
    example = make_prompts(model, processor)[0].example
    example.problem = "what <|image_pad|> colour is the star ?"
    prompt = encode_prompt(processor, example)
    assert int((prompt.ids == model.config.image_token_id).sum()) == 16


def test_response_mean_is_a_plain_loop():
    x, mask = torch.randn(2, 3, 5), torch.rand(2, 3, 5) > 0.4
    mask[1, 2] = False
    expected = torch.zeros(2, 3)
    for b in range(2):
        for g in range(3):
            values = [float(x[b, g, t]) for t in range(5) if mask[b, g, t]]
            expected[b, g] = sum(values) / len(values) if values else 0.0
    torch.testing.assert_close(common.response_mean(x, mask), expected)
