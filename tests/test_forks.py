"""The forks of `ral_grpo.py` in benchmarks/forks: each is that script but for a few lines, and each
does what its header says."""

import difflib
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import load, make_rollout, toy_args
from test_siblings import ROOT, code_lines

import ral_grpo
import toy
from prompts import collate, encode_prompt

REMOVED = {"fixed_fraction": 3, "one_sided": 1, "oracle": 0}  # lines of ral_grpo.py
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
    diff = [line for line in difflib.ndiff(ours, theirs) if line[:2] in ("+ ", "- ")]
    added = sum(line.startswith("+ ") for line in diff)
    assert added <= 25 and len(diff) - added == REMOVED[name], "\n".join(diff)


@pytest.fixture
def batch(cold_start):
    """(model, prompts, a batch of two groups that was scored once, with other weights since)."""
    model, processor = load(cold_start)
    examples = [toy.training_example(toy.Task(), 1, number) for number in range(2)]
    prompts = [encode_prompt(processor, example) for example in examples]
    rollout = make_rollout(model, processor, prompts)
    rollout.prompts = collate(model, prompts, 0)
    batch = ral_grpo.Batch(rollout, torch.tensor([[1.0, -2.0, 1.0], [0.5, 0.5, -1.0]])[..., None])
    ral_grpo.loss_terms(model, batch, toy_args(ral_grpo))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, prompts, batch


def test_one_sided_weighs_the_attention_term_by_one_half_of_the_advantages(batch):
    model, _, batch = batch
    plain = ral_grpo.loss_terms(model, batch, toy_args(ral_grpo))
    advantages, jsd = batch.advantages[..., 0], plain["attn_jsd"]
    halves = {"both": advantages, "pull": advantages.clamp_min(0), "push": advantages.clamp_max(0)}
    for which, weights in (halves | {"reversed": -advantages}).items():
        args = toy_args(fork("one_sided"), attn_advantages=which, lambda_attn=3.0)
        terms = fork("one_sided").loss_terms(model, batch, args)
        torch.testing.assert_close(terms["attn_loss"], weights * jsd)
        loss = plain["pg_loss"] + args.beta * plain["kl"] + 3 * weights * jsd
        torch.testing.assert_close(terms["loss"], loss)


def test_the_oracle_is_told_where_the_target_is(batch):
    model, prompts, batch = batch
    oracle = fork("oracle")
    scores = ral_grpo.score(model, batch.rollout, attn_layers=[-1])
    told = oracle.Batch(**vars(batch), target=oracle.target_mask(prompts, batch.rollout.prompts))
    terms = oracle.loss_terms(model, told, toy_args(oracle))
    for b, prompt in enumerate(prompts):
        image = prompt.ids.tolist().index(model.config.image_token_id)
        cells = [image + token for token in prompt.example.target]
        for g in range(3):
            mass = sum(scores.attentions[-1][b, g, 1, cell] for cell in cells)
            torch.testing.assert_close(terms["attn_loss"][b, g], -mass.log())


def test_fixed_fraction_scales_the_attention_gradient(batch, monkeypatch):
    model, _, batch = batch
    script = fork("fixed_fraction")
    batch = script.Batch(batch.rollout, batch.advantages)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lambdas, terms = [], script.loss_terms

    def keep(model, batch, args):
        lambdas.append(args.lambda_attn)
        return terms(model, batch, args)

    monkeypatch.setattr(script, "loss_terms", keep)
    args = toy_args(script, num_iterations=2, attn_fraction=0.25)
    metrics = script.update(model, optimizer, [batch], args, measure=False)
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
