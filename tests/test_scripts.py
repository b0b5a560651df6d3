"""The scripts' own `main`: reproducible, GRPO where RAL is off, acting where it is on, clear about
bad input."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from launch import defaults_of
from safetensors.torch import load_file
from shared import load, make_prompts, make_rollout, same, terms_of, toy_args
from transformers import AutoModelForImageTextToText, AutoTokenizer

import attn_distill
import common
import grpo_baseline
import kd_baseline
import ral_grpo
import sft
from support import cli, data, ranks, runs, toy

PLAIN = {"num_iterations": 2}
SAMPLING = PLAIN | {"temperature": 0.8, "top_p": 0.9, "beta": 0.0}


@pytest.mark.parametrize(("script", "mode"), [(grpo_baseline, PLAIN), (ral_grpo, SAMPLING)])
def test_one_seed_reproduces_a_run(train, script, mode):
    metrics, weights = train(script, **mode)
    again, same_weights = train(script, **mode)
    assert metrics == again and same(weights, same_weights)
    assert len(metrics) == 3 and max(line.get("train/grad_norm", 0) for line in metrics) > 0
    other, _ = train(script, seed=2, **mode)
    assert other != metrics


def test_sft_reproduces_a_run(tmp_path):
    runs = []
    for name in ("a", "b"):
        out = tmp_path / name
        fields = {"steps": 2, "prompts_per_step": 4, "eval_examples": 4, "frames": 4}
        sft.main(toy_args(sft, out=str(out), think=True, **fields))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        runs.append([{k: v for k, v in x.items() if not k.startswith("perf/")} for x in lines])
    assert runs[0] == runs[1] and len(runs[0]) == 3


def test_lambda_0_is_grpo_to_the_bit(train, cold_start):
    _, grpo = train(grpo_baseline, num_iterations=2)
    lines, ral = train(ral_grpo, num_iterations=2, lambda_attn=0.0)
    assert same(grpo, ral)
    assert not same(grpo, load_file(cold_start / "model.safetensors"))  # and they have learned
    assert lines[-1]["train/attn_jsd_2"] > 0


def test_with_one_pass_any_lambda_is_grpo(train):
    _, grpo = train(grpo_baseline, num_iterations=1)
    lines, ral = train(ral_grpo, num_iterations=1, lambda_attn=1e3)
    assert max(abs(line["train/attn_loss"]) for line in lines[1:]) == 0
    for name in grpo:
        torch.testing.assert_close(ral[name], grpo[name], atol=1e-7, rtol=1e-6)


def test_lambda_acts_from_the_second_pass_on(train):
    _, grpo = train(grpo_baseline, steps=2, num_iterations=2)
    lines, ral = train(ral_grpo, steps=2, num_iterations=2, lambda_attn=100.0)
    moved = max((ral[name] - grpo[name]).abs().max() for name in grpo)
    assert 1e-4 < moved < 1e-2  # at most what four steps of AdamW at rate 1e-3 can do, twice
    line = lines[1]
    loss = line["train/pg_loss"] + 0.04 * line["train/kl"] + 100 * line["train/attn_loss"]
    assert line["train/loss"] == pytest.approx(loss, rel=1e-4)
    assert lines[1]["train/attn_jsd_1"] == 0 < lines[1]["train/attn_jsd_2"]


def test_options_change_the_term(train):
    """In the second pass of the first step the weights are still the same, since the
    attention term was 0 before it."""
    default, _ = train(ral_grpo, num_iterations=2, lambda_attn=100.0)
    before = default[1]["train/attn_jsd_2"]
    for changed in ({"attn_layer": 0}, {"attn_row": "predicting"}):
        lines, _ = train(ral_grpo, steps=1, num_iterations=2, lambda_attn=100.0, **changed)
        after = lines[1]["train/attn_jsd_2"]
        assert after > 0 and not 0.95 < after / before < 1.05, changed
    fields = {"num_iterations": 2, "attn_anchor": "reference"}
    lines, _ = train(ral_grpo, lambda_attn=100.0, **fields)
    # At first the rollout's model is the reference.
    assert lines[1]["train/attn_jsd_2"] == pytest.approx(before, rel=1e-4)
    assert default[2]["train/attn_jsd_1"] == 0 < lines[2]["train/attn_jsd_1"]


def planted_batch(model, processor, sign: float, row: str) -> tuple[ral_grpo.Batch, torch.Tensor]:
    """A batch whose anchor puts half of the mass of every row on one image token, with advantage
    `sign`."""
    prompts = make_prompts(model, processor, grids=(4, 4))
    rollout = make_rollout(model, processor, prompts)
    with torch.no_grad():
        scores = common.score(model, rollout, attn_layers=[-1])
    attention = ral_grpo.attention_policy(scores.attentions[-1], row)
    target = torch.zeros(attention.shape)
    target[..., 20] = 1.0
    anchor = (attention + target) / 2
    advantages = torch.full((*rollout.truncated.shape, 1), sign)
    return ral_grpo.Batch(rollout, advantages, None, scores.logps, anchor), target


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("row", ["own", "predicting"])
def test_ral_acts(checkpoints, monkeypatch, sign, row):
    """Token term off, anchor planted: one update of the script moves the gaze to it, or away from
    it."""
    model, processor = load(checkpoints["qwen2_vl"])
    monkeypatch.setattr(ral_grpo, "clipped_loss", lambda logps, *_: (0 * logps, 0 * logps))
    args = toy_args(ral_grpo, num_iterations=1, beta=0.0, attn_row=row)
    batch, target = planted_batch(model, processor, sign, row)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)

    def measure() -> tuple[float, float]:
        with torch.no_grad():
            rows = common.score(model, batch.rollout, attn_layers=[-1]).attentions[-1]
        attention = ral_grpo.attention_policy(rows, row)
        seen = batch.rollout.response_mask
        divergence = ral_grpo.divergence(attention, batch.old_attn)[seen].mean()
        return divergence.item(), (attention * target).sum(-1)[seen].mean().item()

    divergence, mass = measure()
    ral_grpo.update(model, optimizer, [batch], args)
    after, mass_after = measure()
    assert (after - divergence) * sign < -1e-6
    assert (mass_after - mass) * sign > 1e-6


@pytest.mark.parametrize("row", ["own", "predicting"])
def test_first_iteration_has_no_attention_gradient(checkpoints, row):
    """At p_theta = p_old the divergence and its gradient are zero: not small, zero."""
    model, processor = load(checkpoints["qwen2_vl"])
    batch, _ = planted_batch(model, processor, 1.0, row)
    batch.old_attn = batch.old_logps = None
    terms = terms_of(ral_grpo, model, batch, toy_args(ral_grpo, attn_row=row))
    terms["attn_loss"].sum().backward()
    assert terms["attn_loss"].abs().max() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize(("row", "shared"), [("predicting", 3), ("own", 2)])
@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 4, 3)])
def test_on_a_prefix_that_a_group_shares_the_attention_term_cancels(
    checkpoints, row, shared, lengths
):
    """Responses that share their first two tokens share the predicting rows of tokens 1 to 3 and
    the own rows of tokens 1 and 2, and so their divergences D_t. What the loss has of them is
    D_t sum_i A_i / T_i: nothing where the responses are equally long, since the A_i sum to 0."""
    model, processor = load(checkpoints["qwen2_vl"])
    prompts = make_prompts(model, processor, grids=(4, 4))
    rollout = make_rollout(model, processor, prompts, lengths=(lengths, lengths))
    rollout.response_ids[:, :, :2] = rollout.response_ids[:, :1, :2]  # and then they part
    rollout.response_ids[:, :, 2] = torch.arange(1, 4)
    advantages = torch.linspace(-1, 1, 3).expand(2, -1)[..., None]
    batch = ral_grpo.Batch(rollout, advantages)
    args = toy_args(ral_grpo, attn_row=row, beta=0.0)
    terms_of(ral_grpo, model, batch, args)  # keeps the anchor
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter += 0.05 * torch.randn_like(parameter) * parameter.std()
    parameters = [p for p in model.parameters() if p.requires_grad]
    mask = rollout.response_mask

    def gradient(weights: torch.Tensor) -> torch.Tensor:  # of the sum of weights (B, G, T) x JSD
        rows = common.score(model, rollout, attn_layers=[-1]).attentions[-1]
        jsd = ral_grpo.divergence(ral_grpo.attention_policy(rows, row), batch.old_attn)
        loss = (weights * jsd).sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    weights = advantages * mask / mask.sum(-1, keepdim=True)  # A_i / T_i
    (loss,) = torch.autograd.grad(
        terms_of(ral_grpo, model, batch, args)["attn_loss"].sum(),
        [model.model.language_model.layers[0].mlp.down_proj.weight],
    )
    position = torch.arange(max(lengths))
    same, parted = gradient(weights * (position < shared)), gradient(weights * (position >= shared))
    assert loss.norm() > 0 and parted.norm() > 0
    if len(set(lengths)) == 1:
        assert same.norm() < 1e-4 * parted.norm()
    else:
        left = sum(a / n for a, n in zip((-1, 0, 1), lengths, strict=True))  # sum_i A_i / T_i
        first = torch.zeros(2, 3, max(lengths))
        first[:, 0, :shared] = left
        expected = gradient(first)
        torch.testing.assert_close(same, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
        assert same.norm() > 1e-2 * parted.norm()
    # The next token's row differs from response to response, and does not cancel.
    assert gradient(weights * (position == shared)).norm() > 1e-2 * parted.norm()


def test_sft_does_not_depend_on_the_microbatches(train):
    """The unclipped gradient norm sees a wrong scale, which AdamW's step would not. The scripts
    that roll out are in test_minibatches.py."""
    fields = {"prompts_per_step": 4, "steps": 1, "learning_rate": 1e-4, "max_grad_norm": 1e9}
    whole, weights = train(sft, **fields | {"micro_batch_size": 4})
    assert whole[1]["train/grad_norm"] > 1e-3
    lines, other = train(sft, **fields | {"micro_batch_size": 3})  # three, and the fourth
    for name in ("train/loss", "train/grad_norm"):
        assert lines[1][name] == pytest.approx(whole[1][name], rel=1e-4, abs=1e-6)
    for name in weights:
        torch.testing.assert_close(other[name], weights[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize("script", [ral_grpo, attn_distill])
def test_gradient_checkpointing_changes_nothing(train, teacher, script):
    fields = {"teacher": str(teacher)} if script is attn_distill else {"lambda_attn": 100.0}
    fields |= {"train_vision": True} if script is ral_grpo else {}
    fields |= {"num_iterations": 2}
    lines, weights = train(script, **fields)
    others, same_weights = train(script, gradient_checkpointing=True, **fields)
    assert lines[1]["train/grad_norm"] > 0
    for ours, theirs in zip(lines, others, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-9)
    for name in weights:
        torch.testing.assert_close(weights[name], same_weights[name], atol=1e-6, rtol=1e-5)


def test_sft_goes_on_from_a_checkpoint(cold_start, tmp_path):
    """It trains until an evaluation of the new weights reaches the accuracy, or says it did not."""
    args = toy_args(
        sft, model=str(cold_start), out=str(tmp_path / "more"), steps=3, eval_examples=4
    )
    metrics = sft.main(replace(args, prompts_per_step=4, stop_accuracy=0.999))
    lines = (tmp_path / "more" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert len(lines) == 4
    assert metrics == {k: v for k, v in last.items() if k not in ("step", "perf/run_s")}
    assert "eval/accuracy" in metrics and 0 < metrics["perf/eval_s"] < last["perf/run_s"]


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["missing", "empty", "pickle"])
def test_a_broken_checkpoint_is_one_line(cold_start, tmp_path, part, harm):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in cold_start.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    if harm == "missing":
        (copy / part).unlink()
    elif harm == "empty":
        (copy / part).write_bytes(b"")
    else:
        torch.save({"a": torch.ones(1)}, copy / part)
    with pytest.raises(ranks.UsageError, match=r"^--model .*copy: [^\n]*$"):
        common.load_model(copy)


def test_zero_variance_groups_are_counted_and_do_nothing(train, monkeypatch, cold_start):
    """The note about them does without the metrics that a fork's reward lacks, and a count is a
    metric, too."""
    monkeypatch.setattr(runs, "EQUAL_STEPS", 2)
    monkeypatch.setattr(grpo_baseline, "reward", lambda *_, **__: {"reward": 0.9, "words": 3})
    lines, weights = train(grpo_baseline, beta=0.0)
    assert [line["rollout/frac_zero_std"] for line in lines[1:]] == [1.0, 1.0]
    assert lines[-1]["rollout/words"] == 3
    before = load_file(cold_start / "model.safetensors")
    assert same(weights, before)


def test_the_run_directory_is_complete(cold_start, train, tmp_path):
    train(ral_grpo)
    (out,) = tmp_path.iterdir()
    names = {path.name for path in out.iterdir()}
    assert names == {
        *(".lock", "args.json", "metrics.jsonl", "samples.jsonl", "tensorboard"),
        *("gaze.html", "attention.png", "curves.png", "checkpoint"),
    }
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert (
        len(samples) == 2 * 2 * 4 and {"step", "problem", "response", "reward"} <= samples[0].keys()
    )
    assert json.loads((out / "args.json").read_text())["learning_rate"] == 1e-3
    model = AutoModelForImageTextToText.from_pretrained(out / "checkpoint")
    ours, _ = load(out / "checkpoint")
    assert same(model.state_dict(), ours.state_dict())
    assert AutoTokenizer.from_pretrained(out / "checkpoint").chat_template == toy.CHAT_TEMPLATE
    files = {path.name for path in (out / "checkpoint").iterdir()}
    assert files >= {path.name for path in cold_start.iterdir()}


def test_a_run_in_the_way_is_moved_or_replaced_but_other_files_never(tmp_path):
    args = toy_args(grpo_baseline, out=str(tmp_path / "run"))
    for expected in (["run"], ["run", "run.1"], ["run", "run.1", "run.2"]):
        runs.check_run(args)
        runs.Run(args, data.BadRows()).close()
        assert sorted(path.name for path in tmp_path.iterdir()) == expected
    runs.Run(replace(args, overwrite=True), data.BadRows()).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("...")
    for overwrite in (False, True):
        with pytest.raises(ranks.UsageError, match="holds no training run"):
            runs.check_run(replace(args, out=str(thesis), overwrite=overwrite))
    assert (thesis / "chapter1.tex").exists()
    (tmp_path / "run" / "checkpoint").mkdir()
    for inside in ("run/checkpoint", "run"):  # a run that is read is neither moved nor replaced
        with pytest.raises(ranks.UsageError, match="which this command reads"):
            runs.check_run(replace(args, model=str(tmp_path / inside)), "model")


def test_the_hint_what_to_run_next_names_model_and_data():
    fields = {"model": "a b", "media_root": ("m", "n"), "rows": 8, "image_tokens": 64}
    args = ral_grpo.Args(**fields, data="rows.json", think=False)
    words = " --model 'a b' --data rows.json --media-root m n --rows 8 --image-tokens 64 --no-think"
    assert cli.same_inputs(args) == words
    assert cli.same_inputs(replace(args, data=(), media_root=(), rows=None)) == " --model 'a b'"
    assert cli.same_inputs(ral_grpo.Args()) == ""


FEW = ["--eval-examples", "64"]  # some are right
BAD = [  # script, command line, what the one line must name
    (grpo_baseline, ["--group-size", "1"], ["--group-size", "1", "2 or more"]),
    (grpo_baseline, ["--steps", "0"], ["--steps", "0", "above 0"]),
    (grpo_baseline, ["--learning-rate", "-1"], ["--learning-rate", "-1"]),
    (grpo_baseline, ["--top-p", "1.5"], ["--top-p", "1.5"]),
    (grpo_baseline, ["--beta", "-0.1"], ["--beta", "-0.1"]),
    (grpo_baseline, ["--grid", "2"], ["--grid", "2", "3 or more"]),
    (grpo_baseline, ["--model", "COLD", "--out", "BUSY/thesis.tex"], ["--out", "is a file"]),
    (grpo_baseline, ["--model", "COLD", "--out", "BUSY/thesis.tex/x"], ["--out", "written to"]),
    (kd_baseline, ["--model", "COLD"], ["--teacher", "python sft.py --toy-size large"]),
    (attn_distill, ["--model", "COLD", "--teacher", "EMPTY", *FEW], ["--teacher", "config.json"]),
    (sft, ["--model", "COLD", "--stop-accuracy", "1e-6", *FEW], ["--stop-accuracy", "raise it"]),
    (grpo_baseline, ["--model", "nowhere"], ["--model", "nowhere", "directory"]),
    (grpo_baseline, [], ["--model", "python sft.py"]),
    (ral_grpo, [], ["--model", "python sft.py"]),
    (ral_grpo, ["--model", "COLD", "--attn-layer", "2", *FEW], ["--attn-layer", "2", "layers"]),
    (ral_grpo, ["--model", "COLD", "--frames", "8"], ["--frames", "8", "sft.py"]),
    (ral_grpo, ["--model", "COLD", "--think"], ["--think", "sft.py"]),
    (ral_grpo, ["--lambda-attn", "-1"], ["--lambda-attn", "-1"]),
    (sft, ["--model", "EMPTY"], ["--model", "config.json"]),
    (sft, ["--model", "COLD", "--toy-size", "large"], ["--toy-size large", "leave it out"]),
    (
        ral_grpo,
        ["--model", "COLD", "--image-tokens", "9999"],
        ["--image-tokens", "a cell is a token"],
    ),
    (sft, ["--track"], ["--track", "wandb", "pip install"]),
    (sft, ["--out", "BUSY"], ["--out", "holds no training run"]),
    (sft, ["--out=~/run"], ["--out '~/run'", "give the whole path"]),
]


OUT_OF_RANGE = {
    0: "steps learning_rate max_grad_norm micro_batch_size prompts_per_step num_iterations"
    " max_new_tokens temperature clip_eps warmup_steps epochs stop_accuracy eval_above top_p keep"
    " eval_every eval_examples rows frames fps image_tokens min_image_tokens frame_tokens"
    " max_prompt_tokens",
    -1: "lora_rank beta lambda_attn gamma_attn mu_gkd rl_coef seed save_every max_skipped",
    1: "group_size",
    2: "gkd_beta grid",
}


@pytest.mark.parametrize("script", [sft, grpo_baseline, ral_grpo, kd_baseline, attn_distill])
def test_every_argument_out_of_range_is_refused(script):
    script.Args()
    names = [(name, value) for value, names in OUT_OF_RANGE.items() for name in names.split()]
    for name, value in names:
        if name in script.Args.__dataclass_fields__:
            with pytest.raises(ranks.UsageError, match=f"--{name.replace('_', '-')} {value}"):
                script.Args(**{name: value})


@pytest.mark.parametrize(("script", "line", "words"), BAD)
def test_bad_input_is_one_line(script, line, words, cold_start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BUSY").mkdir()
    (tmp_path / "BUSY" / "thesis.tex").touch()
    line = [str(cold_start) if word == "COLD" else word for word in line]
    monkeypatch.setattr(sys, "argv", [script.__file__, *line])
    monkeypatch.setattr(ranks, "leave", sys.exit)  # `os._exit` also ends the try of a template
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(script.Args, script.main, script.__doc__, defaults_of(script))
    error = capsys.readouterr().err
    message = [part for part in error.splitlines() if part.startswith("error: ")]
    assert stopped.value.code == 2 and len(message) == 1 and "Traceback" not in error
    assert all(word in message[0] for word in words), message
    assert not (tmp_path / "runs").exists()


def test_a_reward_that_cannot_be_used_is_one_line(checkpoints):
    model, processor = load(checkpoints["qwen2_vl"])
    prompts = make_prompts(model, processor)
    rollout = make_rollout(model, processor, prompts)
    texts = [["a", "b", "c"], ["d", "e", "f"]]

    def judge(last: dict) -> tuple[torch.Tensor, dict[str, float]]:
        reward = lambda prompt, text, truncated: last if text == "f" else {"reward": 1.0}  # noqa: E731
        return common.judge(reward, prompts, rollout, texts)

    assert judge({"reward": 0.0})[1]["rollout/reward"] == pytest.approx(5 / 6)
    for names in ({"reward": 1.0, "length": 2.0}, {"accuracy": 1.0}):
        with pytest.raises(ranks.UsageError, match="returns reward; return the same names for"):
            judge(names)
    with pytest.raises(
        ranks.UsageError,
        match="a row of the toy: the reward function returns a `reward` that is not",
    ):
        judge({"reward": float("nan")})
