"""Distillation against SciPy and plain loops, from oneself, and with its attention term off."""

import importlib
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from shared import load_copy, make_prompts, make_rollout, same, terms_of, toy_args
from test_siblings import ROOT

import attn_distill
import common
import kd_baseline
import ral_grpo
from benchmarks import probes
from support import ranks
from support.prompts import visual_features

PAIR = (kd_baseline, attn_distill)
NONE = torch.tensor([], dtype=torch.long)


def logits(seed: int, words: int = 11) -> torch.Tensor:
    return 2 * torch.randn(2, 3, 4, words, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("script", PAIR)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gkd_is_scipys(script, beta, temperature):
    student, teacher = logits(0), logits(1)
    suppressed = [2, 5]
    distance = script.gkd(student, teacher, beta, temperature, torch.tensor(suppressed))
    words = [i for i in range(11) if i not in suppressed]
    s, t = ((x[..., words].double() / temperature).softmax(-1).numpy() for x in (student, teacher))
    m = (1 - beta) * s + beta * t
    if beta in (0, 1):
        expected = entropy(s, t, axis=-1) if beta == 1 else entropy(t, s, axis=-1)
    else:
        expected = beta * entropy(t, m, axis=-1) + (1 - beta) * entropy(s, m, axis=-1)
    np.testing.assert_allclose(distance.numpy(), expected, atol=1e-6, rtol=1e-5)


def test_generalised_jsd_vanishes_toward_both_ends():
    student, teacher = logits(0), logits(1)
    for beta in (1e-4, 1 - 1e-4):
        assert kd_baseline.gkd(student, teacher, beta, 1.0, NONE).max() < 1e-2
    for beta in (0, 1):
        assert kd_baseline.gkd(student, teacher, beta, 1.0, NONE).max() > 0.5


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_chunks_change_neither_value_nor_gradient(beta, monkeypatch):
    results = []
    for chunk in (2**24, 40):
        monkeypatch.setitem(common.in_chunks.__kwdefaults__, "elements", chunk)
        student = logits(0).requires_grad_(True)
        distance = kd_baseline.gkd(student, logits(1), beta, 0.8, torch.tensor([3]))
        (distance * torch.arange(24).view(2, 3, 4)).sum().backward()
        results.append((distance.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)
    assert results[0][1].isfinite().all() and results[0][1][..., 3].abs().max() == 0


def test_a_vocabulary_padded_further_is_cut():
    student, teacher = logits(0), logits(1)
    expected = kd_baseline.gkd(student, teacher, 1.0, 1.0, NONE)
    longer = torch.cat([teacher, torch.full((2, 3, 4, 5), 9.0)], dim=-1)
    assert torch.equal(kd_baseline.gkd(student, longer, 1.0, 1.0, NONE), expected)
    longer = torch.cat([student, torch.full((2, 3, 4, 5), 9.0)], dim=-1)
    assert torch.equal(kd_baseline.gkd(longer, teacher, 1.0, 1.0, NONE), expected)


def test_jsd_is_that_of_ral():
    p, q = logits(0).softmax(-1), logits(1).softmax(-1)
    assert torch.equal(attn_distill.divergence(p, q), ral_grpo.divergence(p, q))


def distilled(model, processor, lengths, **fields):
    """Terms of the loss for random responses of these lengths, taught by a random model."""
    prompts = make_prompts(model, processor, grids=(4, 4))
    rollout = make_rollout(model, processor, prompts, lengths=lengths)
    batch = attn_distill.Batch(rollout, torch.zeros(*rollout.truncated.shape, 1), rollout)
    return batch, toy_args(attn_distill, rl_coef=0.0, mu_gkd=0.0, **fields)


def test_the_sum_is_the_mean_times_the_length(checkpoints, monkeypatch):
    """By hand: divergences 1, 2, 3, ... nats at tokens 1, 2, 3, ...; padding is not counted."""
    model, processor = load_copy(checkpoints["qwen2_vl"])
    lengths = ((5, 3, 6), (1, 4, 2))
    monkeypatch.setattr(
        attn_distill, "divergence", lambda p, q: 0 * p.sum(-1) + torch.arange(1, p.shape[2] + 1)
    )
    for reduction, expected in (
        ("sum", [[15.0, 6.0, 21.0], [1.0, 10.0, 3.0]]),
        ("mean", [[3.0, 2.0, 3.5], [1.0, 2.5, 1.5]]),
    ):
        batch, args = distilled(model, processor, lengths, attn_reduction=reduction, gamma_attn=0.5)
        with torch.no_grad():
            terms = terms_of(attn_distill, model, batch, args, model)
        torch.testing.assert_close(terms["attn_loss"], torch.tensor(expected))
        torch.testing.assert_close(terms["loss"], torch.tensor(expected) / 2)
        # What is logged is the mean over tokens, whatever the loss takes.
        means = torch.tensor([[3.0, 2.0, 3.5], [1.0, 2.5, 1.5]])
        torch.testing.assert_close(terms["attn_distill"], means)
    assert attn_distill.Args().attn_reduction == "sum"


def test_the_gradient_of_long_responses_is_finite_and_logged(checkpoints):
    """768 tokens: the sum's gradient is 768 times the mean's, and the step is bounded."""
    student, processor = load_copy(checkpoints["qwen2_vl"])
    teacher, _ = load_copy(checkpoints["qwen2_vl"])
    with torch.no_grad():
        for parameter in teacher.model.language_model.parameters():
            parameter += 0.3 * torch.randn_like(parameter) * parameter.std()
    norms, parameters = {}, [p for p in student.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    for reduction, rate in (("mean", 0.0), ("sum", 1.0)):
        batch, args = distilled(student, processor, ((768,),) * 2, attn_reduction=reduction)
        args = replace(args, num_iterations=1, gamma_attn=1.0)
        optimizer = torch.optim.SGD(parameters, lr=rate)
        norms[reduction] = attn_distill.update(student, teacher, optimizer, [batch], args)
        assert all(math.isfinite(value) for value in norms[reduction].values())
    moved = [(p - q).norm() for p, q in zip(parameters, before, strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(args.max_grad_norm, rel=1e-3)
    mean, total = (norms[x]["train/grad_norm"] for x in ("mean", "sum"))
    assert total == pytest.approx(768 * mean, rel=1e-3)
    assert norms["sum"]["train/attn_distill"] == pytest.approx(norms["mean"]["train/attn_distill"])


def test_gamma_0_is_kd_to_the_bit(train, teacher):
    fields = {"teacher": str(teacher), "num_iterations": 2, "steps": 1, "eval_examples": 2}
    _, kd = train(kd_baseline, **fields)
    lines, both = train(attn_distill, gamma_attn=0, **fields)
    assert same(kd, both) and lines[1]["train/attn_distill"] > 0.01
    lines, _ = train(attn_distill, gamma_attn=2.0, rl_coef=0.0, **fields)
    loss = lines[1]["train/gkd"] + 2 * lines[1]["train/attn_loss"]
    assert lines[1]["train/loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("script", PAIR)
def test_one_seed_reproduces_a_run_without_rewards(train, teacher, script):
    fields = {"teacher": str(teacher), "rl_coef": 0.0, "eval_examples": 2}
    runs = [train(script, **fields) for _ in range(2)]
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert runs[0][0][1]["train/grad_norm"] > 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distilling_a_model_from_itself_does_nothing(checkpoints, cold_start, beta):
    model, processor = load_copy(cold_start)
    itself, _ = load_copy(cold_start)
    other, _ = load_copy(checkpoints["qwen2_vl"])
    prompts = make_prompts(model, processor, ("video", "image"))
    rollout = make_rollout(model, processor, prompts)
    args = toy_args(attn_distill, rl_coef=0.0, gkd_beta=beta)
    norms = []
    for teacher in (itself, other):
        with torch.no_grad():
            features = visual_features(teacher, rollout.prompts.blocks)
            seen = replace(rollout.prompts, features=features)
        batch = attn_distill.Batch(rollout, torch.ones(2, 3, 1), replace(rollout, prompts=seen))
        terms = terms_of(attn_distill, model, batch, args, teacher)
        model.zero_grad()
        terms["loss"].sum().backward()
        norm = math.sqrt(sum(p.grad.pow(2).sum() for p in model.parameters() if p.grad is not None))
        norms.append(norm)
        if teacher is itself:
            assert terms["loss"].abs().max() < 1e-6
    assert norms[0] < 1e-6 * norms[1]


def test_a_teacher_that_does_not_fit_is_refused(train, teacher, tmp_path):
    with pytest.raises(ranks.UsageError, match=r"--teacher nowhere: no such directory"):
        train(kd_baseline, teacher="nowhere")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in teacher.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "toy_task.json").write_text((copy / "toy_task.json").read_text().replace("4", "5"))
    with pytest.raises(ranks.UsageError, match="was trained on another task"):
        train(kd_baseline, teacher=str(copy))
    (copy / "toy_task.json").write_bytes((teacher / "toy_task.json").read_bytes())
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["crimson"] = tokenizer["model"]["vocab"].pop("red")
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ranks.UsageError, match="tokenizer is not the student's"):
        train(attn_distill, teacher=str(copy))
    with pytest.raises(ranks.UsageError, match="--teacher-attn-layer 3: the model has 3 layers"):
        train(attn_distill, teacher=str(teacher), teacher_attn_layer=3)


@pytest.mark.parametrize("kinds", [("video", "image"), ("video", "video")])
def test_frame_bins_are_a_plain_loop(loaded, kinds):
    """Per temporal patch, rest of the prompt, earlier response; padded prompts and an odd video."""
    model, processor = loaded
    prompts = make_prompts(model, processor, kinds, frames=(7, 4))
    rollout = make_rollout(model, processor, prompts)
    with torch.no_grad():
        rows = common.score(model, rollout, attn_layers=[-1]).attentions[-1]
    attention = attn_distill.attention_policy(rows, "own")
    bins = probes.binned(attention, rollout.prompts)
    longest = rollout.prompts.ids.shape[1]
    assert bins.shape == (2, 3, 6, 4 + 2)
    torch.testing.assert_close(bins.sum(-1), torch.ones(2, 3, 6))
    placeholders = (model.config.image_token_id, model.config.video_token_id)
    for b, prompt in enumerate(prompts):
        expected = torch.zeros(3, 6, 6)
        _, rows, columns = prompt.blocks[0].shape
        seen, per_patch = 0, rows * columns
        for position, token in enumerate(rollout.prompts.ids[b].tolist()):
            column = 4
            if token in placeholders:
                column, seen = seen // per_patch, seen + 1
            expected[..., column] += attention[b, ..., position]
        expected[..., 5] = attention[b, ..., longest:].sum(-1)
        torch.testing.assert_close(bins[b], expected)


def test_reproduce_measures_a_students_gaze_against_its_teachers(
    cold_start, teacher, tmp_path, monkeypatch
):
    """One cell of distillation, whole, from a cold start and a teacher that are there."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    reproduce = importlib.import_module("reproduce")
    task = replace(reproduce.TASKS["images, taught"], examples=32)
    monkeypatch.setitem(reproduce.TASKS, "images, taught", task)
    monkeypatch.setattr(reproduce, "STEPS", 5)
    monkeypatch.setattr(reproduce, "COLD_STARTS", tmp_path / "cold-starts")
    for name, checkpoint in (("images-1", cold_start), ("teacher", teacher)):
        shutil.copytree(checkpoint.parent, tmp_path / "cold-starts" / name)
    results, cell = tmp_path / "results" / "reproduce.jsonl", "KD + attention, gamma 1"
    chosen = {"claims": ["relatives, distilled"], "cells": [cell], "seeds": [1]}
    reproduce.main(reproduce.Args(**chosen, results=results))
    lines = results.read_text().splitlines()
    rows = {row["cell"]: row for row in map(json.loads, lines)}
    assert list(rows) == ["teacher", "cold start", "KD + attention, gamma 1"]
    student, start = rows["KD + attention, gamma 1"], rows["cold start"]
    assert rows["teacher"]["own_jsd_to_teacher"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < student["own_jsd_to_teacher"] < start["own_jsd_to_teacher"] < math.log(2)
    outcomes = ("right_looked", "right_unlooked", "wrong_looked", "wrong_unlooked")
    assert sum(student[name] for name in outcomes) == pytest.approx(1.0)
