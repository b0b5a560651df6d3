"""The forks in benchmarks/forks: each is its parent but for a few lines, and each does what its
header says."""

import copy
import difflib
import importlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from shared import FAMILIES, load_copy, make_rollout, terms_of, toy_args, unpacked
from test_siblings import ROOT, code_lines, top_level

import common
import eval
import grpo_baseline
import ral_grpo
import sft
from support import ranks, toy
from support.prompts import Example, Media, blacken, collate, encode_prompt

# The parent of each fork, and the lines that are added to it and removed, at most.
DIFF = {"fixed_fraction": ("ral_grpo", 20, 3), "one_sided": ("ral_grpo", 20, 1)}
DIFF |= {"oracle": ("ral_grpo", 20, 0)}
DIFF |= {"posterior_gaze": ("ral_grpo", 96, 10)}  # its divergence is the forward KL
DIFF |= {"papo": ("grpo_baseline", 28, 2), "vppo": ("grpo_baseline", 52, 6)}
DIFF |= {"attention_advantage": ("grpo_baseline", 19, 2), "looked_reward": ("grpo_baseline", 40, 8)}
FORKS = sorted(path.stem for path in (ROOT / "benchmarks" / "forks").glob("*.py"))


def fork(name: str):
    return importlib.import_module(f"benchmarks.forks.{name}")


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_differs_by_its_idea_alone(name):
    """So a change of its parent that a fork does not follow fails here."""
    parent, max_added, max_removed = DIFF[name]
    ours = code_lines(ROOT / f"{parent}.py")
    theirs = code_lines(ROOT / "benchmarks" / "forks" / f"{name}.py")
    ours.remove("import support.startup")  # a script's first import; a fork's is the path
    diff = [line for line in difflib.ndiff(ours, theirs) if line[:2] in ("+ ", "- ")]
    added = sum(line.startswith("+ ") for line in diff)
    assert added <= max_added and len(diff) - added <= max_removed, "\n".join(diff)


@pytest.fixture
def batch(cold_start):
    """(model, prompts, a batch of two groups that was scored once, with other weights since)."""
    model, processor = load_copy(cold_start)
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
    thinks = terms_of(oracle, model, told, toy_args(oracle, think=True))
    for b, prompt in enumerate(prompts):
        image = prompt.ids.tolist().index(model.config.image_token_id)
        cells = [image + token for token in prompt.target]
        for g in range(3):
            for row, found in ((1, terms), (2, thinks)):  # the second emits a thought's colour
                mass = sum(scores.attentions[-1][b, g, row, cell] for cell in cells)
                torch.testing.assert_close(found["attn_loss"][b, g], -mass.log())
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
    out, fields = tmp_path / "run", {"eval_examples": 2, "prompts_per_step": 2, "steps": 2}
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
    model, processor = load_copy(cold_start)
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


def test_only_rounding_parts_the_two_precisions(cold_start, monkeypatch):
    """A small step is lost in it for the attention term, and not for the token term."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rounding = importlib.import_module("rounding")
    small, large = (rounding.measure(cold_start, 1, rate, 16) for rate in (1e-5, 6e-4))
    assert small["JSD, bfloat16"] > 2 * small["JSD, float32"] > 0
    assert large["JSD, bfloat16"] == pytest.approx(large["JSD, float32"], rel=0.2)
    assert small["cosine, attention"] < 0.9 < small["cosine, token"]
    monkeypatch.setattr(rounding, "in_bfloat16", copy.deepcopy)
    same = rounding.measure(cold_start, 1, 1e-5, 16)
    assert same["JSD, bfloat16"] == same["JSD, float32"] == small["JSD, float32"]
    assert same["cosine, attention"] == pytest.approx(same["cosine, token"]) == pytest.approx(1)


def test_papo_and_vppo_share_the_blackened_pass_to_the_letter():
    papo, vppo = (top_level(f"benchmarks/forks/{name}.py") for name in ("papo", "vppo"))
    for name in ("Batch", "score_masked", "visual_dependence", "score_policy"):
        assert papo[name] == vppo[name], name


def noise_picture(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pictured(processor, number: int = 0):
    """A question about an image and a video of three frames that need no resizing. It is in two
    sizes, the number's."""
    side = 2 * processor.image_processor.patch_size
    size = (16 * side, (8 + number) * side)
    frames = [noise_picture(size, 10 * number + i) for i in range(4)]
    media = [Media(frames[:1]), Media(frames[1:], is_video=True)]
    prompt = encode_prompt(processor, Example("what is it ?" * (1 + number), "red", media))
    prompt.number = number
    return prompt


def painted(processor, prompt, black: list[torch.Tensor]):
    """The prompt of the same question, with the patches at the `black` rows of each medium painted
    over in the pictures themselves."""
    side, example = processor.image_processor.patch_size, prompt.example
    media = []
    for medium, rows in zip(example.media, black, strict=True):
        frames = [np.array(frame) for frame in medium.frames]
        width, height = (edge // (2 * side) for edge in medium.size)
        for row in rows.tolist():  # by temporal patch, token row and column, patch row and column
            t, y, x, dy, dx = np.unravel_index(row, (len(rows), height, width, 2, 2))
            top, left = side * (2 * y + dy), side * (2 * x + dx)
            for frame in frames[2 * t : 2 * t + 2] if medium.is_video else frames:
                frame[top : top + side, left : left + side] = 0
        frames = [Image.fromarray(frame) for frame in frames]
        media.append(replace(medium, frames=frames))
    return encode_prompt(processor, replace(example, media=media))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blackened_pass_is_a_plain_forward_of_painted_pictures(real, family):
    model, processor = load_copy(real / family)
    prompts = [pictured(processor, number) for number in range(2)]
    rollout = make_rollout(model, processor, prompts)
    black = blacken(prompts, processor.image_processor, 0.6, seed=3)
    args = fork("papo").Args(temperature=0.7)
    batches = [fork("papo").Batch(rollout[cut], None) for cut in (slice(0, 1), slice(1, 2))]
    cuts = [slice(0, 1), slice(1, 2)]
    fork("papo").score_masked(model, batches, collate(model, black, 0), cuts, args)
    suppressed = common.vision_token_ids(model.config)
    for b, (prompt, blackened) in enumerate(zip(prompts, black, strict=True)):
        changed = [
            (ours.pixels != theirs.pixels).any(1)
            for ours, theirs in zip(blackened.blocks, prompt.blocks, strict=True)
        ]
        image, video = changed[0], torch.cat(changed[1:])  # Qwen3-VL has a block for each pair
        assert 0.5 < image.float().mean() < 0.7 and 0.5 < video.float().mean() < 0.7
        half = len(video) // 2
        assert not torch.equal(video[:half], video[half:])  # each pair of frames has its own
        paint = painted(processor, prompt, [rows.nonzero()[:, 0] for rows in (image, video)])
        for ours, theirs in zip(blackened.blocks, paint.blocks, strict=True):
            torch.testing.assert_close(ours.pixels, theirs.pixels, atol=1e-5, rtol=0)
        for g in range(3):
            ids = rollout.response_ids[b, g][rollout.response_mask[b, g]]
            with torch.no_grad():
                logits = unpacked(model, paint, ids).logits[0, len(paint.ids) - 1 : -1] / 0.7
            logits[:, suppressed] = -torch.inf
            logps = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            ours = batches[b].masked_logps[0, g, : len(ids)]
            torch.testing.assert_close(ours, logps, atol=1e-4, rtol=0)


def test_a_prompt_is_blackened_alike_in_every_batch(real):
    _, processor = load_copy(real / "qwen2_vl")
    first, second = pictured(processor), pictured(processor)
    second.number = 1

    def pixels(prompts, seed=3):
        black = blacken(prompts, processor.image_processor, 0.6, seed)
        return [torch.cat([block.pixels for block in prompt.blocks]) for prompt in black]

    before = [block.pixels.clone() for block in first.blocks]
    (a, b), (c,) = pixels([first, second]), pixels([second])
    assert torch.equal(b, c) and not torch.equal(a[:512], b[:512])
    assert not torch.equal(pixels([second], seed=4)[0], c)
    for block, whole in zip(first.blocks, before, strict=True):
        assert torch.equal(block.pixels, whole)  # the prompts themselves stay as they are


@pytest.fixture
def masked(batch):
    """(model, a batch as in `batch`, which was also scored with its pictures blackened)."""
    model, _, batch = batch
    batch = fork("papo").Batch(batch.rollout, batch.advantages, old_logps=batch.old_logps)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch.old_logps.shape, generator=generator)
    batch.masked_logps = (batch.old_logps + 2 * noise) * batch.rollout.response_mask
    return model, batch


def dependence(logp: float, masked_logp: float) -> float:
    ratio = math.exp(masked_logp - logp)
    return min(ratio - math.log(ratio) - 1, 10.0)


def test_papo_adds_what_it_says(masked):
    model, batch = masked
    fields = {"gamma_perception": 0.3, "eta_entropy": 0.7}
    terms = terms_of(fork("papo"), model, batch, toy_args(fork("papo"), **fields))
    plain = terms_of(grpo_baseline, model, batch, toy_args(grpo_baseline))
    logps = common.score(model, batch.rollout).logps
    for b, g in [(0, 0), (0, 1), (1, 1), (1, 2)]:
        length = int(batch.rollout.response_mask[b, g].sum())
        pairs = zip(logps[b, g].tolist(), batch.masked_logps[b, g].tolist(), strict=True)
        pairs = list(pairs)[:length]
        kl = sum(dependence(*pair) for pair in pairs) / length
        surprisal = -sum(logp for logp, _ in pairs) / length
        loss = plain["loss"][b, g].item() - 0.3 * kl + 0.7 * surprisal
        assert terms["perception"][b, g].item() == pytest.approx(kl, rel=1e-4)
        assert terms["loss"][b, g].item() == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert fork("papo").visual_dependence(torch.tensor(-1.0), torch.tensor(-90.0)) == 10


def test_vppo_weighs_responses_and_keeps_their_most_visual_tokens(masked):
    model, whole = masked
    script, args = fork("vppo"), toy_args(fork("vppo"), shaping_min=0.8, eta_entropy=0.7)
    keep = whole.rollout.response_mask
    old, black = (x.flatten(0, 1).tolist() for x in (whole.old_logps, whole.masked_logps))
    lengths = keep.sum(-1).flatten().tolist()
    values = [
        [dependence(*pair) for pair in zip(a[:n], b[:n], strict=True)]
        for a, b, n in zip(old, black, lengths, strict=True)
    ]
    means = [sum(row) / len(row) for row in values]
    low, mean = min(means), sum(means) / len(means)
    expected = torch.zeros(6, keep.shape[2])
    for i, (row, advantage) in enumerate(zip(values, whole.advantages.flatten(), strict=True)):
        weight = 0.8 + 0.2 * (means[i] - low) / (mean - low)
        for t in sorted(range(len(row)), key=lambda t: -row[t])[: math.ceil(0.4 * len(row))]:
            expected[i, t] = weight * advantage
    for cuts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):  # whatever the microbatch
        batches = [
            script.Batch(
                replace(whole.rollout, response_mask=keep[cut]),
                whole.advantages[cut],
                None,
                whole.old_logps[cut],
                whole.masked_logps[cut],
            )
            for cut in cuts
        ]
        script.shape_advantages(batches, args)
        shaped = torch.cat([batch.advantages for batch in batches]).flatten(0, 1)
        torch.testing.assert_close(shaped, expected, rtol=1e-4, atol=1e-6)
    batch = replace(whole, advantages=expected.view(2, 3, -1))
    plain = terms_of(grpo_baseline, model, batch, toy_args(grpo_baseline))
    terms = terms_of(script, model, script.Batch(**vars(batch)), args)
    loss = plain["loss"] + 0.7 * terms["surprisal"]
    torch.testing.assert_close(terms["loss"], loss)
    ones = script.shaping(torch.zeros(3), torch.zeros(3), 0.9)
    assert torch.equal(ones, torch.ones(3))  # as where no prompt has a picture
    kept = script.most_visual(torch.rand(25), torch.ones(25).bool(), 0.6)
    assert kept.sum() == 15  # not rounded up from a float32 just above it


@pytest.mark.parametrize("row", ["own", "predicting"])
def test_attention_advantage_weighs_tokens_by_their_mass_on_vision(batch, row):
    model, prompts, batch = batch
    script = fork("attention_advantage")
    fresh = script.Batch(batch.rollout, batch.advantages)
    terms_of(script, model, fresh, toy_args(script, attn_layer=0, attn_row=row))
    rows = common.score(model, batch.rollout, attn_layers=[0]).attentions[0]
    p = batch.rollout.prompts.ids.shape[1]
    for b, prompt in enumerate(prompts):
        start = p - len(prompt.ids) + prompt.blocks[0].start
        for g in range(3):
            length = int(batch.rollout.response_mask[b, g].sum())
            shift = row == "own"
            mass = [
                sum(rows[b, g, t + shift, start + i].item() for i in range(prompt.blocks[0].tokens))
                for t in range(length)
            ]
            weights = torch.tensor(mass) / (sum(mass) / length)
            assert length == 1 or weights.std() > 0.01  # they differ
            expected = batch.advantages[b, g] * weights
            torch.testing.assert_close(
                fresh.advantages[b, g, :length], expected, rtol=1e-4, atol=1e-5
            )
    assert not fresh.advantages.requires_grad
    again = fresh.advantages
    terms_of(script, model, fresh, toy_args(script, attn_layer=0, attn_row=row))
    assert fresh.advantages is again  # those of the rollout, in every pass


RELATIVES = ("papo", "vppo", "attention_advantage")


@pytest.mark.parametrize(("name", "family"), list(zip(RELATIVES, FAMILIES, strict=True)))
def test_a_relative_trains_a_real_model(real, tmp_path, monkeypatch, name, family):
    """With a trained encoder, every pass encodes its own pictures."""
    monkeypatch.setattr(common, "accuracy", lambda text, *_: float(len(text) % 2))
    data = {"data": str(real / "rows.json"), "media_root": (str(real / "media"),), "workers": 0}
    data |= {"frames": 4, "image_tokens": 9, "frame_tokens": 4, "max_skipped": 0.2}
    fields = {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 6, "num_minibatches": 2}
    fields |= {"steps": 2, "train_vision": name == "papo", "model": str(real / family)}
    args = fork(name).Args(out=str(tmp_path / "run"), learning_rate=1e-3, **data, **fields)
    fork(name).main(args)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["train/grad_norm"] > 0 for line in lines[1:])
    if name == "papo":
        assert all(line["train/perception"] > 0 for line in lines[1:])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("papo", "black_prob", 1.5),
        ("papo", "gamma_perception", -1.0),
        ("vppo", "top_share", 0.0),
        ("vppo", "shaping_min", 1.5),
        ("vppo", "eta_entropy", -1.0),
    ],
)
def test_a_relative_names_a_value_out_of_range(name, field, value):
    with pytest.raises(ranks.UsageError, match=f"--{field.replace('_', '-')} {value}: must be"):
        fork(name).Args(**{field: value})


@pytest.mark.parametrize("name", ["attention_advantage", "looked_reward"])
def test_the_layer_that_is_trained_is_evaluated(cold_start, tmp_path, monkeypatch, name):
    def evaluate(*_, attn_layer, **options):
        raise LookupError(attn_layer)

    monkeypatch.setattr(fork(name), "evaluate", evaluate)
    with pytest.raises(LookupError, match=r"^0$"):
        options = {"model": str(cold_start), "out": str(tmp_path), "eval_examples": 2}
        fork(name).main(toy_args(fork(name), attn_layer=0, **options))


@pytest.mark.parametrize("rule", ["above-chance", "brightest"])
def test_a_look_at_the_box_is_rewarded(cold_start, rule):
    """Against a plain loop, on two demonstrations and a response without an answer."""
    script, (model, processor) = fork("looked_reward"), load_copy(cold_start)
    processor.prompt_config = toy.Task().prompt_config()
    examples = [toy.training_example(toy.Task(), 3, number) for number in range(48)]
    prompts = [encode_prompt(processor, example) for example in examples]
    prompts[1].target = ()  # a row without boxes
    said = ["<answer> red </answer>", "<answer> blue </answer>", "red </answer> </answer>"]
    ids = torch.tensor([processor.tokenizer.encode(text) for text in said]).expand(48, 3, -1)
    rollout = common.Rollout(
        collate(model, prompts, 0), ids, torch.ones(48, 3, 3).bool(), torch.ones(48, 3).bool()
    )
    args = toy_args(script, looked_rule=rule, micro_batch_size=20)
    processor = replace(processor, response_prefix=4 * " ")  # it is in the texts, not in the ids
    looked = script.which_looked(model, processor, prompts, rollout, args)
    attention = common.score(model, rollout, attn_layers=[-1]).attentions[-1]
    for b, prompt in enumerate(prompts):
        image = prompt.ids.tolist().index(model.config.image_token_id)
        for g in range(3):
            mass = attention[b, g, 1, image : image + 16]  # emits the colour behind <answer>
            share = sum(mass[cell] for cell in prompt.target) / mass.sum()
            enough = share > len(prompt.target) / 16
            if rule == "brightest":
                enough = mass.argmax().item() in prompt.target
            assert looked[b][g] == bool(prompt.target and g < 2 and enough)
    assert 0 < sum(map(sum, looked)) < 2 * 47
    text = f"<answer> {examples[0].solution} </answer>"
    parts = script.reward(prompts[0], text, False, True, replace(args, think=False))
    assert parts["reward"] == pytest.approx(1.0) and parts["looked"] is True
    parts = script.reward(prompts[0], text, True, False, replace(args, think=False))
    assert parts["reward"] == pytest.approx(0.8)


@pytest.mark.parametrize("rule", ["above-chance", "brightest"])
def test_responses_that_share_their_beginning_look_alike(cold_start, rule):
    """So on images, where all begin with <answer>, a reward for looking cancels in a group."""
    script, (model, processor) = fork("looked_reward"), load_copy(cold_start)
    processor.prompt_config = toy.Task().prompt_config()
    examples = [toy.training_example(toy.Task(), 5, number) for number in range(16)]
    prompts = [encode_prompt(processor, example) for example in examples]
    prompts = [replace(prompt, number=number) for number, prompt in enumerate(prompts)]
    args = toy_args(script, looked_rule=rule)
    batch = collate(model, prompts, 0)
    rollout, texts, *_ = script.roll_out(model, processor, prompts, batch, args)
    looked = script.which_looked(model, processor, prompts, rollout, args)
    formed = [all(common.has_format(text, think=False) for text in group) for group in texts]
    alike = [len(set(group)) == 1 for group, whole in zip(looked, formed, strict=True) if whole]
    assert len(alike) > 8 and all(alike)
    assert any(len(set(group)) > 1 for group in texts)  # the colours differ


def test_the_fork_that_calls_layers_by_their_parts_runs_on_sharded_weights(cold_start, tmp_path):
    """On a GPU, one process is a group of one, and its weights are sharded."""
    script = fork("posterior_gaze")
    fields = {"model": str(cold_start), "steps": 1, "prompts_per_step": 2, "eval_examples": 2}
    lines = []
    for name in ("plain", "sharded"):
        if name == "sharded":
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            script.main(toy_args(script, **fields, out=str(tmp_path / name)))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        metrics = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        lines.append({x: y for x, y in metrics.items() if x.startswith("train/")})
    assert lines[0]["train/attn_loss"] > 0
    assert lines[1] == pytest.approx(lines[0], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("task", ["three shapes", "half of the shapes", "guessable"])
def test_tasks_that_the_results_change_are_drawn_and_counted(task):
    probe = importlib.import_module("benchmarks.probes").__dict__[task.replace(" ", "_")]
    with probe():
        examples = toy.held_out_examples(toy.Task(), 8)
        training = [toy.training_example(toy.Task(), 1, number) for number in range(8)]
        fields = {"accuracy": 1.0, "problem_type": "", "target_attn": 0.5}
        metrics = eval.summarise([fields | {"source": x.source} for x in examples])
    assert metrics["eval/accuracy"] == 1.0 and all(x.boxes for x in examples)
    colours = [len(x.solution.split()) for x in (*examples, *training)]
    assert set(colours) == {3 if task == "three shapes" else 1}
    held_back = {x.source for x in examples} == {"trained", "held back"}
    assert held_back == (task == "half of the shapes") == ("eval/accuracy, trained" in metrics)
