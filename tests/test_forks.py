"""The forks of `ral_grpo.py` in benchmarks/forks: each is that script but for a few lines, and each
does what its header says."""

import difflib
import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load, make_rollout, terms_of, toy_args
from test_siblings import ROOT, code_lines

import common
import ral_grpo
import sft
from support import ranks, toy
from support.prompts import collate, encode_prompt

# Lines that are added to and removed from `ral_grpo.py`, at most.
DIFF = {"fixed_fraction": (20, 3), "one_sided": (20, 1), "oracle": (20, 0)}
DIFF |= {"posterior_gaze": (96, 10)}  # its divergence is the forward KL
FORKS = sorted(path.stem for path in (ROOT / "benchmarks" / "forks").glob("*.py"))


def fork(name: str):
    return importlib.import_module(f"benchmarks.forks.{name}")


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_differs_by_its_idea_alone(name):
    """So a change of `ral_grpo.py` that a fork does not follow fails here."""
    ours, theirs = (
        code_lines(path)
        for path in (ROOT / "ral_grpo.py", ROOT / "benchmarks" / "forks" / f"{name}.py")
    )
    ours.remove("import support.startup")  # a script's first import; a fork's is the path
    diff = [line for line in difflib.ndiff(ours, theirs) if line[:2] in ("+ ", "- ")]
    added = sum(line.startswith("+ ") for line in diff)
    max_added, max_removed = DIFF[name]
    assert added <= max_added and len(diff) - added <= max_removed, "\n".join(diff)


@pytest.fixture
def batch(cold_start):
    """(model, prompts, a batch of two groups that was scored once, with other weights since)."""
    model, processor = load(cold_start)
    examples = [toy.training_example(toy.Task(), 1, number) for number in range(2)]
    prompts = [encode_prompt(processor, example) for example in examples]
    rollout = make_rollout(model, processor, prompts)
    rollout.prompts = collate(model, prompts, 0)
    batch = ral_grpo.Batch(rollout, torch.tensor([[1.0, -2.0, 1.0], [0.5, 0.5, -1.0]])[..., None])
    terms_of(ral_grpo, model, batch, toy_args(ral_grpo))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, prompts, batch


def test_one_sided_weighs_the_attention_term_by_one_half_of_the_advantages(batch):
    model, _, batch = batch
    plain = terms_of(ral_grpo, model, batch, toy_args(ral_grpo))
    advantages, jsd = batch.advantages[..., 0], plain["attn_jsd"]
    halves = {"both": advantages, "pull": advantages.clamp_min(0), "push": advantages.clamp_max(0)}
    for which, weights in (halves | {"reversed": -advantages}).items():
        args = toy_args(fork("one_sided"), attn_advantages=which, lambda_attn=3.0)
        terms = terms_of(fork("one_sided"), model, batch, args)
        torch.testing.assert_close(terms["attn_loss"], weights * jsd)
        loss = plain["pg_loss"] + args.beta * plain["kl"] + 3 * weights * jsd
        torch.testing.assert_close(terms["loss"], loss)


def test_the_oracle_is_told_where_the_target_is(batch):
    model, prompts, batch = batch
    oracle = fork("oracle")
    scores = common.score(model, batch.rollout, attn_layers=[-1])
    told = oracle.Batch(**vars(batch), target=oracle.target_mask(prompts, batch.rollout.prompts))
    terms = terms_of(oracle, model, told, toy_args(oracle))
    for b, prompt in enumerate(prompts):
        image = prompt.ids.tolist().index(model.config.image_token_id)
        cells = [image + token for token in prompt.target]
        for g in range(3):
            mass = sum(scores.attentions[-1][b, g, 1, cell] for cell in cells)
            torch.testing.assert_close(terms["attn_loss"][b, g], -mass.log())
    part = terms_of(oracle, model, told, toy_args(oracle, rewarded_only=True))["attn_loss"]
    torch.testing.assert_close(part, terms["attn_loss"] * (batch.advantages[..., 0] > 0))


def test_fixed_fraction_scales_the_attention_gradient(batch, monkeypatch):
    model, _, batch = batch
    script = fork("fixed_fraction")
    batch = script.Batch(batch.rollout, batch.advantages)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lambdas, terms = [], script.loss_terms

    def keep(scores, batch, args):
        lambdas.append(args.lambda_attn)
        return terms(scores, batch, args)

    monkeypatch.setattr(script, "loss_terms", keep)
    args = toy_args(script, num_iterations=2, attn_fraction=0.25)
    metrics = script.update(model, optimizer, [batch], args)
    assert lambdas[0] == 0 and lambdas[-1] > 0
    weighted = lambdas[-1] * metrics["train/attn_grad_norm"]
    assert weighted == pytest.approx(0.25 * metrics["train/pg_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_trains(cold_start, tmp_path, name):
    out, fields = tmp_path / "run", {"eval_examples": 8, "prompts_per_step": 2, "steps": 2}
    args = toy_args(fork(name), model=str(cold_start), out=str(out), group_size=4, **fields)
    fork(name).main(replace(args, micro_batch_size=1))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["train/grad_norm"] > 0 for line in lines[1:])
    assert Path(out, "checkpoint", "prompt.json").is_file()


@pytest.mark.parametrize("layer", [0, -1])
def test_posterior_gaze_asks_where_a_response_should_have_looked(batch, monkeypatch, layer):
    """Against the whole model run again for one token and one key, its attention moved there."""
    model, _, batch = batch
    script = fork("posterior_gaze")
    targets, plain = [], script.posterior_gaze
    monkeypatch.setattr(
        script, "posterior_gaze", lambda *x: targets.append(plain(*x)) or targets[0]
    )
    args = toy_args(script, eta=2.0, attn_layer=layer)
    batch = script.Batch(batch.rollout, batch.advantages)
    terms = terms_of(script, model, batch, args)
    rollout, target = batch.rollout, targets[0]
    scores = common.score(model, rollout, attn_layers=[layer])
    old = scores.attentions[layer][:, :, :-1].detach()
    kl = (target * (target.clamp_min(1e-30) / old.clamp_min(1e-30)).log()).sum(-1)
    weights = batch.advantages.clamp_min(0) * (1 - scores.logps.detach().exp())
    expected = common.response_mean(weights * kl, scores.mask)
    torch.testing.assert_close(terms["attn_loss"], expected, atol=1e-6, rtol=1e-4)
    p, t = rollout.prompts.ids.shape[1], rollout.response_ids.shape[2]
    visual = rollout.prompts.patches >= 0
    torch.testing.assert_close(target.sum(-1), old.sum(-1))
    unmoved = (~(batch.advantages > 0) | ~rollout.response_mask).nonzero().tolist()
    assert all(torch.equal(target[tuple(x)], old[tuple(x)]) for x in unmoved)
    moved_layer = layer % model.config.text_config.num_hidden_layers
    for b, g, s in [(0, 0, 0), (0, 2, 1), (1, 1, int(rollout.response_mask[1, 1].sum()) - 1)]:
        row = p - 1 if s == 0 else p + t * g + s - 1
        log_l, keys = [], visual[b].nonzero()[:, 0]
        for key_position in keys:

            def attention(
                module, query, key, value, *rest, b=b, row=row, at=key_position, **kwargs
            ):
                out, rows = common.grouped_attention(module, query, key, value, *rest, **kwargs)
                if module.layer_idx == moved_layer:
                    out = out.clone()
                    out[b, row] = value[b, :, at].repeat_interleave(
                        query.shape[1] // value.shape[1], 0
                    )
                return out, rows

            try:
                common.AttentionInterface.register("grouped_sdpa", attention)
                with torch.no_grad():
                    log_l.append(common.score(model, rollout).logps[b, g, s])
            finally:
                common.AttentionInterface.register("grouped_sdpa", common.grouped_attention)
        looked = old[b, g, s, keys]
        expected = looked * (2 * torch.stack(log_l)).exp()
        expected *= looked.sum() / expected.sum()
        assert expected.sub(looked).abs().max() > 1e-3  # it does move
        torch.testing.assert_close(target[b, g, s, keys], expected, atol=1e-6, rtol=1e-3)
        text = ~F.pad(visual[b], (0, t))
        assert torch.equal(target[b, g, s, text], old[b, g, s, text])


def test_posterior_gaze_refuses_what_it_would_ignore(cold_start, tmp_path):
    script = fork("posterior_gaze")
    with pytest.raises(ranks.UsageError, match="--attn-anchor: not in this fork"):
        script.Args(attn_anchor="reference")
    with pytest.raises(ranks.UsageError, match="--num-minibatches 2: must be 1"):
        script.Args(num_minibatches=2)
    real = tmp_path / "real"  # a checkpoint without a toy's task
    shutil.copytree(cold_start, real)
    (real / "toy_task.json").unlink()
    with pytest.raises(ranks.UsageError, match="this fork is for the toy"):
        script.main(toy_args(script, model=str(real), out=str(tmp_path / "run")))


def test_directions_are_those_of_descent(cold_start, monkeypatch):
    """Against the loss after a small step; a direction agrees with itself."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    directions = importlib.import_module("directions")
    model, processor = load(cold_start)
    prompts = [encode_prompt(processor, toy.training_example(toy.Task(), 1, n)) for n in range(4)]
    rollout = sft.demonstrations(model, processor, prompts)
    losses = [lambda: sft.loss_terms(model, rollout)["loss"].mean()]
    step, before = 1e-4 * directions.direction(model, losses), losses[0]().item()
    with torch.no_grad():
        parameters = [p for p in model.parameters() if p.requires_grad]
        parts = step.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter += part.view_as(parameter)
    assert losses[0]().item() - before == pytest.approx(-1e4 * step.square().sum().item(), rel=0.05)
    found = directions.measure(cold_start, 1, 32)
    assert found["oracle"]["with the oracle"] == pytest.approx(1)
    assert found["SFT"]["with SFT"] == pytest.approx(1)
    assert found["SFT"]["with the oracle"] == pytest.approx(found["oracle"]["with SFT"])
    assert abs(found["RAL, own row"]["with the oracle"]) < 0.5 < found["oracle"]["halves"]
    assert 0 < found["layer 1, own row"]["left_row"] <= 1
