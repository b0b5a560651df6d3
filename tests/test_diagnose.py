"""benchmarks/diagnose.py against plain loops over transformers' eager attention."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from itertools import islice

import pytest
import torch
from PIL import Image
from scipy.spatial.distance import jensenshannon
from scipy.stats import ttest_1samp
from shared import load, load_copy, make_prompts, same, toy_args, unpacked
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText

import common
import ral_grpo
from benchmarks import diagnose
from support import disk, ranks, toy
from support.prompts import collate, encode_prompt
from support.ranks import UsageError

SMALL = {"prompts": 4, "group_size": 4, "temperature": 2.0, "learning_rate": 3e-3}
# Responses of several lengths, in microbatches of several paddings.
SMALL |= {"micro_batch_size": 2, "max_new_tokens": 6}


def arguments(**fields) -> diagnose.Args:
    return diagnose.Args(**ral_grpo.TOY | SMALL | fields)


def open_toy(path, args, **options):
    """The model, its processor and the first prompts."""
    model, processor = load(path, **options) if options else load_copy(path)
    task = toy.Task.load(path)
    processor.prompt_config = task.prompt_config()
    train, *_ = task.open_data(args, lambda x: encode_prompt(processor, x))
    return model, processor, list(islice(train.begin(1, args.prompts), args.prompts))


@pytest.fixture(scope="module")
def diagnosed(cold_start):
    """(report, model, processor, prompts, args, weights before, weights after the step)."""
    args = arguments(eval_examples=1, prompts=8)
    model, processor, prompts = open_toy(cold_start, args)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    stepped = {}
    with pytest.MonkeyPatch.context() as patch:

        def norm(*rest):
            assert model.training  # else gradient checkpointing is off
            stepped.update({name: x.clone() for name, x in model.state_dict().items()})
            return plain(*rest)

        plain = diagnose.gradient_norm
        patch.setattr(diagnose, "gradient_norm", norm)
        report, _ = diagnose.diagnose(model, processor, prompts, args, [0, 1])
    return report, model, processor, prompts, args, before, stepped


def roll_out(diagnosed):
    """The rollout of the diagnosis and its advantages, (B, G)."""
    _, model, processor, prompts, args, *_ = diagnosed
    batch = collate(model, prompts, processor.tokenizer.pad_token_id)
    rollout, _, rewards, _ = ral_grpo.roll_out(model, processor, prompts, batch, args)
    return rollout, ral_grpo.group_advantages(rewards)[..., 0]


def words(rollout) -> list[list[list[int]]]:
    """The ids of each response, by prompt."""
    lengths = rollout.response_mask.sum(-1)
    return [
        [ids[:n].tolist() for ids, n in zip(group, size, strict=True)]
        for group, size in zip(rollout.response_ids, lengths, strict=True)
    ]


@pytest.fixture(scope="module")
def eager_rows(diagnosed, cold_start):
    """For the weights before and after the step, the attention of each response in each layer,
    (P + T, P + T), by transformers alone."""
    _, _, _, prompts, _, *both = diagnosed
    eager = AutoModelForImageTextToText.from_pretrained(cold_start, attn_implementation="eager")
    groups, found = words(roll_out(diagnosed)[0]), []
    for weights in both:
        eager.load_state_dict(weights)
        eager.eval()
        found.append([])
        for prompt, group in zip(prompts, groups, strict=True):
            with torch.no_grad():
                outs = [
                    unpacked(eager, prompt, torch.tensor(ids), output_attentions=True)
                    for ids in group
                ]
            rows = [[layer[0].double().mean(0) for layer in out.attentions] for out in outs]
            found[-1].append(rows)
    return found


def eager_policies(diagnosed, rows_of, layer, row):
    """By prompt and response the policy of each token; `rows_of` is one of `eager_rows`."""
    policies = []
    for prompt, group in zip(diagnosed[3], rows_of, strict=True):
        policies.append([])
        for layers in group:
            rows, p = layers[layer], len(prompt.ids)
            steps = range(len(rows) - p)
            if row == "own":
                rows = [rows[p + t, : p + t] / rows[p + t, : p + t].sum() for t in steps]
            else:
                rows = [rows[p + t - 1, : p + t] for t in steps]
            policies[-1].append(rows)
    return policies


def mean(responses) -> float:
    """Mean over tokens, then over all responses."""
    responses = [values for group in responses for values in group]
    return sum(sum(values) / len(values) for values in responses) / len(responses)


def line_of(report, layer, row):
    return next(x for x in report["rows"] if (x["layer"], x["row"]) == (layer, row))


CASES = [(0, "own"), (1, "own"), (1, "predicting")]


@pytest.mark.parametrize(("layer", "row"), CASES)
def test_masses_and_entropy_are_those_of_eager_attention(diagnosed, eager_rows, layer, row):
    report, model, processor, prompts, *_ = diagnosed
    policies = eager_policies(diagnosed, eager_rows[0], layer, row)
    image, totals = model.config.image_token_id, defaultdict(list)
    for prompt, group in zip(prompts, policies, strict=True):
        visual = prompt.ids == image
        assert visual.sum() == 16
        there = visual.nonzero()[list(prompt.target), 0]
        assert len(there) == 1
        looks = defaultdict(list)
        for rows in group:
            parts = [(r[: len(visual)], r[len(visual) :]) for r in rows]
            looks["vision"].append([r[visual].sum().item() for r, _ in parts])
            looks["question"].append([r[~visual].sum().item() for r, _ in parts])
            looks["response"].append([r.sum().item() for _, r in parts])
            looks["target"].append([r[there].sum().item() for r, _ in parts])
            looks["entropy"].append([-(r[r > 0] * r[r > 0].log()).sum().item() for r in rows])
        for name, values in looks.items():
            totals[name].append(values)
    line = line_of(report, layer, row)
    for name, values in totals.items():
        assert line[name] == pytest.approx(mean(values), abs=1e-5), name
    assert sum(line[name] for name in diagnose.MASSES) == pytest.approx(1, abs=1e-5)
    lift = 16 * mean(totals["target"]) / mean(totals["vision"])
    assert line["lift"] == pytest.approx(lift, rel=1e-4)
    gaps, (rollout, _) = [], roll_out(diagnosed)
    for group, prompt, texts in zip(
        totals["target"], prompts, rollout.texts(processor), strict=True
    ):
        means = {True: [], False: []}
        for values, text in zip(group, texts, strict=True):
            answer = text.partition("<answer>")[2].partition("</answer>")[0].strip()
            means[answer == prompt.example.solution].append(sum(values) / len(values))
        if all(means.values()):
            right, wrong = (sum(x) / len(x) for x in (means[True], means[False]))
            gaps.append(right - wrong)
    interval = ttest_1samp(gaps, 0).confidence_interval()
    assert line["gap"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-6) and len(gaps) > 1
    assert 2 * line["interval"] == pytest.approx(interval.high - interval.low, abs=1e-6)


@pytest.mark.parametrize(("layer", "row"), CASES)
def test_movement_and_what_is_left_of_the_term(diagnosed, eager_rows, layer, row):
    line = line_of(diagnosed[0], layer, row)
    was, now = (eager_policies(diagnosed, rows, layer, row) for rows in eager_rows)
    rollout, advantages = roll_out(diagnosed)
    moved, left_group, left_row, total = [], 0.0, 0.0, 0.0
    for b, group in enumerate(words(rollout)):
        shared, everything = defaultdict(float), 0.0
        moved.append([])
        for g, ids in enumerate(group):
            pairs = zip(now[b][g], was[b][g], strict=True)
            values = [jensenshannon(x, y) ** 2 for x, y in pairs]
            moved[-1].append(values)
            for t, value in enumerate(values):
                term = advantages[b, g].item() * value / len(ids)
                total += abs(term)
                shared[tuple(ids[: t + 1 if row == "own" else t]), t] += term
                everything += term
        left_group += abs(everything)
        left_row += sum(map(abs, shared.values()))
    assert len({len(ids) for group in words(rollout) for ids in group}) > 2
    close = {"rel": 1e-2, "abs": 1e-4}
    assert line["moved"] == pytest.approx(mean(moved), rel=1e-2) and line["moved"] > 1e-4
    assert line["left_group"] == pytest.approx(left_group / total, **close)
    assert line["left_row"] == pytest.approx(left_row / total, **close)
    assert left_group / total < 0.9 * left_row / total < 0.9


def test_the_cold_starts_term_cancels_where_its_responses_are_equally_long(cold_start):
    """With the optimiser of `docs/results.md`: what that page says of the cancellation."""
    fields = {"prompts": 16, "group_size": 8, "temperature": 1.0, "eval_examples": 1}
    args = arguments(**ral_grpo.TOY | fields)
    model, processor, prompts = open_toy(cold_start, args)
    batch = collate(model, prompts, processor.tokenizer.pad_token_id)
    rollout, _, rewards, _ = ral_grpo.roll_out(model, processor, prompts, batch, args)
    advantages = ral_grpo.group_advantages(rewards)
    part = ral_grpo.Batch(rollout, advantages)
    report, _ = diagnose.diagnose(model, processor, prompts, args, [1])
    options = toy_args(ral_grpo, num_iterations=1, beta=0.0, lambda_attn=0.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-4)
    for row in diagnose.ROWS:
        options.attn_row, part.old_attn, part.old_logps = row, None, None
        weights = {name: x.clone() for name, x in model.state_dict().items()}
        optimizer.state.clear()
        ral_grpo.update(model, optimizer, [part], options)
        with torch.no_grad():
            scores = common.score(model, rollout, attn_layers=[-1])
            policy = ral_grpo.attention_policy(scores.attentions[-1], row)
            term = ral_grpo.divergence(policy, part.old_attn) * scores.mask
        model.load_state_dict(weights)
        term = advantages * term / scores.mask.sum(-1, keepdim=True)
        left = term.sum((1, 2)).abs().sum() / term.abs().sum()
        line, printed = line_of(report, 1, row), 2e-4  # four decimals
        assert line["left_group"] == pytest.approx(left.item(), abs=printed)


def test_in_bfloat16_a_small_movement_is_mostly_rounding(cold_start, monkeypatch):
    """The estimate is low, and in float32 there is hardly any."""
    reports = {}

    def in_bfloat16(model, rollout, *rest):
        exact = [parameter.data for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        features = [[[x.bfloat16() for x in y] for y in z] for z in rollout.prompts.features]
        prompts = replace(rollout.prompts, features=features)
        scores = plain(model, replace(rollout, prompts=prompts), *rest)
        for parameter, data in zip(model.parameters(), exact, strict=True):
            parameter.data = data
        return scores

    args = arguments(eval_examples=1, prompts=8)
    opened = open_toy(cold_start, args)
    monkeypatch.setattr(diagnose, "gradient_norm", lambda *_: 1.0)  # measured by other tests
    plain = diagnose.score
    for dtype, score in (("float32", plain), ("bfloat16", in_bfloat16)):
        monkeypatch.setattr(diagnose, "score", score)
        for rate in (1e-5, 3e-5, 6e-4):
            report, _ = diagnose.diagnose(*opened, replace(args, learning_rate=rate), [1])
            reports[dtype, rate] = line_of(report, 1, "own")
    for rate in (1e-5, 3e-5, 6e-4):
        exact, other = reports["float32", rate], reports["bfloat16", rate]
        hidden = 1 - exact["moved"] / other["moved"]
        assert exact["rounding"] < (0.2 if rate == 6e-4 else 0.02), rate  # a large step bends
        assert -0.3 < other["rounding"] - hidden < (0.2 if rate == 6e-4 else 0.05), rate
    assert reports["bfloat16", 1e-5]["rounding"] > 0.4 > reports["bfloat16", 3e-5]["rounding"] > 0.1


def test_where_groups_part_and_how_long_responses_are(diagnosed):
    report, (rollout, _) = diagnosed[0], roll_out(diagnosed)
    parting, never = [], 0
    for group in words(rollout):
        longest = max(map(len, group))
        columns = [{tuple(ids[t : t + 1]) for ids in group} for t in range(longest)]
        first = next((t for t, column in enumerate(columns) if len(column) > 1), None)
        never += first is None
        parting += [] if first is None else [first + 1]
    assert report["parting"] == parting and report["never_part"] == never / len(words(rollout))
    assert report["lengths"] == [len(ids) for group in words(rollout) for ids in group]


def test_groups_that_never_part_are_counted():
    ids = torch.tensor([[[5, 6, 0], [5, 6, 0]], [[5, 6, 0], [5, 6, 7]], [[4, 1, 2], [5, 1, 2]]])
    mask = torch.tensor([[[1, 1, 0], [1, 1, 0]], [[1, 1, 0], [1, 1, 1]], [[1] * 3] * 2]).bool()
    shares = diagnose.shares_prefix(common.Rollout(None, ids, mask, None))[:, 0, 1]
    assert shares.tolist() == [[True, True, True], [True, True, False], [False] * 3]


@pytest.mark.parametrize(("layer", "row"), CASES[1:])
def test_lambda_makes_the_ratio_a_tenth_by_finite_differences(diagnosed, layer, row):
    """Each norm is the slope of its term along its gradient."""
    report, model, *_, args, before, stepped = diagnosed
    rollout, advantages = roll_out(diagnosed)
    scores = common.score(model, rollout, args.temperature, [layer])
    old = ral_grpo.attention_policy(scores.attentions[layer], row).detach()
    old_logps, parameters = (
        scores.logps.detach(),
        [p for p in model.parameters() if p.requires_grad],
    )

    def terms() -> dict[str, torch.Tensor]:
        scores = common.score(model, rollout, args.temperature, [layer])
        policy = ral_grpo.attention_policy(scores.attentions[layer], row)
        ratio = (scores.logps - old_logps).exp()
        a = advantages[..., None]
        clipped = ratio.clamp(1 - args.clip_eps, 1 + args.clip_eps)
        each = {"token": -torch.minimum(ratio * a, clipped * a)}
        each["attention"] = a * ral_grpo.divergence(policy.double(), old.double())
        counts = rollout.response_mask.sum(-1)
        return {k: ((x * rollout.response_mask).sum(-1) / counts).mean() for k, x in each.items()}

    norms = {}
    model.load_state_dict(stepped)
    try:
        for name, size in (("token", 1e-3), ("attention", 1e-2)):
            grads = torch.autograd.grad(terms()[name], parameters, allow_unused=True)
            known = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None]
            length = math.sqrt(sum(g.pow(2).sum().item() for _, g in known))
            with torch.no_grad():
                values = []
                for sign in (1, -2):
                    for p, g in known:
                        p += sign * size / length * g
                    values.append(terms()[name].item())
                norms[name] = (values[0] - values[1]) / (2 * size)
            model.load_state_dict(stepped)
    finally:
        model.load_state_dict(before)
    line = line_of(report, layer, row)
    assert line["gradient"] == pytest.approx(norms["attention"] / norms["token"], rel=0.05)
    assert line["lambda"] * norms["attention"] / norms["token"] == pytest.approx(0.1, rel=0.05)


def test_weights_are_afterwards_what_they_were(diagnosed):
    _, model, *_, before, stepped = diagnosed
    assert not same(before, stepped)
    assert same(before, model.state_dict())
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_an_interrupted_diagnosis_restores_the_weights(cold_start, monkeypatch):
    args = arguments(eval_examples=1)
    model, processor, prompts = open_toy(cold_start, args)
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def interrupt(*_):
        assert not same(before, model.state_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnose, "gradient_norm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        diagnose.diagnose(model, processor, prompts, args, [1])
    assert same(before, model.state_dict())


def test_adapters_in_bfloat16_are_diagnosed_and_restored(cold_start, monkeypatch):
    monkeypatch.setattr(common, "compute_dtype", lambda: torch.bfloat16)
    args = arguments(eval_examples=1, lora_rank=4)
    model, processor, prompts = open_toy(cold_start, args, lora_rank=4)
    assert model.lm_head.weight.dtype == torch.bfloat16
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report, _ = diagnose.diagnose(model, processor, prompts, args, [0, 1])
    assert same(before, model.state_dict())
    for line in report["rows"]:
        assert line["moved"] > 0 and 0 < line["lambda"] < math.inf
        assert sum(line[name] for name in diagnose.MASSES) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_sharded_model_as_on_a_gpu_is_diagnosed_and_restored(cold_start, lora_rank):
    args, reports = arguments(eval_examples=1, lora_rank=lora_rank), []
    for sharded in (False, True):
        if sharded:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            torch.manual_seed(0)
            model, processor, prompts = open_toy(cold_start, args, lora_rank=lora_rank)
            trained = [p for p in model.parameters() if p.requires_grad]
            assert all(isinstance(p, DTensor) == sharded for p in trained)
            before = [ranks.full_tensor(p.detach()).clone() for p in trained]
            reports.append(diagnose.diagnose(model, processor, prompts, args, [1])[0])
            after = [ranks.full_tensor(p.detach()) for p in model.parameters() if p.requires_grad]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        finally:
            if sharded:
                torch.distributed.destroy_process_group()
    for one, other in zip(*(report["rows"] for report in reports), strict=True):
        for name in ("vision", "moved", "left_row", "gradient"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)


def test_equal_rewards_are_one_line_and_nothing_is_trained(cold_start, monkeypatch):
    args = arguments(eval_examples=1)
    model, processor, prompts = open_toy(cold_start, args)
    equal = {"reward": 0.9, "accuracy": 1.0, "format": 0.0}
    monkeypatch.setattr(ral_grpo, "reward", lambda *_, **__: equal)
    monkeypatch.setattr(ral_grpo, "update", None)
    report, _ = diagnose.diagnose(model, processor, prompts, args, [1])
    assert len(report["notes"]) == 1
    assert report["notes"][0].startswith("movement, remainders, gradients: the rewards of every")
    assert all(line[name] is None for line in report["rows"] for name in diagnose.AFTER)
    report["planned"] = line_of(report, 1, "own")
    conclusion = diagnose.conclude(report, args)
    assert conclusion[1] == "Groups do not differ in reward: RAL and GRPO learn nothing here."
    assert report["rows"][0]["vision"] > 0.05


def test_what_cannot_be_measured_is_neither_drawn_nor_in_the_table(real, tmp_path, capsys):
    """Random weights answer nothing, and all rewards are 0."""
    diagnose.main(real_args(real, tmp_path / "out", "qwen2_vl"))
    text = capsys.readouterr().out
    assert text.count("not measured: ") == 1 and "lambda can be given" in text
    assert [line.split()[-5:] for line in text.splitlines() if " own   " in line] == [["-"] * 5] * 2
    assert Image.open(tmp_path / "out" / "diagnosis.png").size == (1040, 600)


def test_prompts_of_text_alone_have_no_mass_on_vision(cold_start):
    args = arguments(eval_examples=1)
    model, processor = load_copy(cold_start)
    prompts = make_prompts(model, processor, kinds=("text", "text"))
    report, _ = diagnose.diagnose(model, processor, prompts, args, [1])
    assert "vision: no prompt has an image or a video" in report["notes"]
    assert all(line["vision"] == 0 for line in report["rows"])
    assert all(line["question"] > 0.5 for line in report["rows"])


def real_args(real, out, family, **fields):
    data = {"data": str(real / "rows.json"), "media_root": (str(real / "media"),), "workers": 0}
    data |= {"frames": 4, "image_tokens": 9, "frame_tokens": 4, "max_skipped": 0.2}
    data |= {"max_new_tokens": 6, "prompts": 10, "group_size": 2, "learning_rate": 1e-3}
    data |= {"model": str(real / family), "out": str(out), "micro_batch_size": 4}
    return diagnose.Args(**data | fields)


@pytest.mark.parametrize(("family", "lora_rank"), [("qwen3_vl", 0), ("tied", 4)])
def test_real_models_images_and_videos(real, tmp_path, family, lora_rank, monkeypatch, capsys):
    """And what is printed of the cost is what it costs."""
    if family == "tied":
        monkeypatch.setattr(diagnose, "draw", lambda path, _: path.touch())
    monkeypatch.setattr(common, "accuracy", lambda text, *_: float(len(text) % 2))
    passes, kinds, printed = [], set(), []

    def count(model, rollout, *rest, **options):
        if not passes:
            printed.append(capsys.readouterr().out)
        kinds.update(block.is_video for row in rollout.prompts.blocks for block in row)
        passes.append(torch.is_grad_enabled())
        return score(model, rollout, *rest, **options)

    score = common.score
    for module in (diagnose, common):
        monkeypatch.setattr(module, "score", count)
    report = diagnose.main(real_args(real, tmp_path / "out", family, lora_rank=lora_rank))
    layers = 3 if family == "qwen3_vl" else 2
    cost = f"3 passes forward, {2 + 2 * layers} forward and backward."
    assert cost in printed[0] and "Memory: about" in printed[0]
    batches = 3  # 10 prompts, 4 at a time
    assert passes.count(False) == 3 * batches
    assert passes.count(True) == (2 + 2 * layers) * batches
    assert kinds == {False, True}
    lines = [(x["layer"], x["row"]) for x in report["rows"]]
    assert lines == [(layer, row) for layer in range(layers) for row in diagnose.ROWS]
    for line in report["rows"]:
        assert 0 < line["vision"] < 1 and line["moved"] > 0 and line["gradient"] > 0
        assert line["lambda"] * line["gradient"] == pytest.approx(0.1)
        assert 0 <= line["left_group"] <= line["left_row"] + 1e-9 <= 1 + 1e-6
    assert report["planned"] == line_of(report, layers - 1, "own")
    monkeypatch.setattr(diagnose, "memory_gb", lambda *_: {"update": {"optimizer": 1e6}})
    with pytest.raises(UsageError, match=r"--layers, --prompts: the host has .* choose less"):
        diagnose.main(real_args(real, tmp_path / "large", family, lora_rank=lora_rank))
    stored = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert stored["rows"] == report["rows"] and len(stored["conclusion"]) == 3
    text = (tmp_path / "out" / "diagnosis.txt").read_text()
    assert text.count(" own ") == layers + text.split("\n\n")[-1].count(" own ")
    assert text.strip() in capsys.readouterr().out
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 20
    if family == "qwen3_vl":
        assert Image.open(tmp_path / "out" / "diagnosis.png").size == (1040, 600)


def test_prompts_are_at_most_one_epoch_and_layers_a_choice(real, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnose, "draw", lambda path, _: path.touch())
    chosen = {"layers": (0,), "attn_layer": -1, "micro_batch_size": 18, "max_new_tokens": 2}
    for prompts in (1, 100):  # the second diagnosis replaces the first
        args = real_args(real, tmp_path / "out", "qwen3_vl", prompts=prompts, **chosen)
        report = diagnose.main(args)
    assert len(report["lengths"]) == 2 * 18  # of 20 rows, a tenth is held out
    assert [x["layer"] for x in report["rows"]] == [0, 0, 2, 2]
    stored = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert stored["lengths"] == report["lengths"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (7,)}, "--layers 7: the model has 2 layers; give -2 to 1"),
        ({"model": "nowhere"}, "--model nowhere: no such directory"),
        ({"prompts": 0}, "--prompts 0: must be above 0"),
    ],
)
def test_errors_of_the_user_are_one_line(cold_start, tmp_path, fields, message):
    fields = {"model": str(cold_start), "out": str(tmp_path / "out")} | fields
    with pytest.raises(UsageError, match=message):
        diagnose.main(arguments(**fields))


def in_use(out):
    raise UsageError("in use")


def test_it_writes_into_no_training_run_and_is_one_process(cold_start, tmp_path, monkeypatch):
    args = arguments(model=str(cold_start), out=str(tmp_path))
    for kind in (disk.TRAINING_RUN, disk.EVALUATION):
        disk.write_record(tmp_path, kind, {})
        with pytest.raises(UsageError, match=f"holds another program's {kind}; choose another"):
            diagnose.main(args)
    disk.write_record(tmp_path, disk.DIAGNOSIS, {})
    monkeypatch.setattr(disk, "lock_directory", in_use)
    with pytest.raises(UsageError, match="in use"):
        diagnose.main(args)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="one process; start it without torchrun"):
        diagnose.main(args)


def report_of(**planned):
    line = {"layer": 1, "row": "own", "vision": 0.5, "moved": 1e-3, "left_row": 0.5}
    line |= {"gradient": 0.01, "lambda": 10.0, "rounding": 0.0} | dict.fromkeys(diagnose.AIMED)
    other = line | {"row": "predicting", "vision": 0.01}
    ours = line | planned
    return {"rows": [ours, other], "planned": ours, "parting": [2, 4, 9]}


@pytest.mark.parametrize(
    ("planned", "number", "sentence"),
    [
        ({}, 0, "The own rows of layer 1 look at vision most (50% of their mass), and RAL would"
         " reward them."),
        ({"vision": 0.0}, 0, "No rows look at vision: at most 1.0% of their mass is there."),
        ({}, 1, "Groups part at token 4 (median), and 50% of the term is left in the own rows of"
         " layer 1 once responses that share a row are summed (`left_row`): enough to act on."),
        ({"left_row": 0.1}, 1, "are summed (`left_row`): little to act on."),
        ({"left_row": 0.01}, 1, "are summed (`left_row`): next to nothing to act on."),
        ({}, 2, "At lambda 1 the term's gradient is 0.01 of the token term's; lambda 10 would make"
         " it a tenth."),
        ({"rounding": 0.7}, 2, "70% of what moved is rounding, and more of that gradient is."),
        ({"rounding": 0.7, "moved": 2e-3}, 2, "lambda 10 would make it a tenth."),
        ({"gradient": 0.0, "lambda": None}, 2, "At lambda 1 the term's gradient is 0 of the token"
         " term's."),
    ],
)  # fmt: skip
def test_conclusions(planned, number, sentence):
    assert diagnose.conclude(report_of(**planned), arguments())[number].endswith(sentence)


def test_conclusions_about_the_target_are_those_of_the_rows_that_look_at_it_most():
    report = report_of(target=0.1, lift=3.0, gap=0.02, interval=0.01)
    assert len(diagnose.conclude(report_of(), arguments())) == 3  # without boxes
    other = report["rows"][1]
    other |= {"target": 0.125, "lift": 4.0, "gap": 0.003, "interval": 0.004}
    assert diagnose.conclude(report, arguments())[3:] == [
        "The predicting rows of layer 1 look at the target most (12.5% of their mass, 4 times"
        " chance).",
        "There, right responses have +3.0e-03 ± 4.0e-03 of mass on it relative to wrong ones of the"
        " same group. Where it is 0, no reward can teach these rows where to look.",
    ]
    other |= {"gap": -0.005}
    assert diagnose.conclude(report, arguments())[4].endswith("of the same group.")
    other |= {"lift": 1.1}
    assert diagnose.conclude(report, arguments())[3] == (
        "No rows pick out the target. Most of it is in the predicting rows of layer 1 (12.5% of"
        " their mass, 1.1 times chance)."
    )
    report["planned"]["gap"] = None  # fewer than two groups with right and wrong responses
    assert len(diagnose.conclude(report, arguments())) == 4


def test_the_planned_learning_rate_is_that_of_the_run(monkeypatch):
    """Everything about the one step depends on it."""
    rates = []

    def prepare(*_, learning_rate, **__):
        rates.append([learning_rate(arguments(lora_rank=rank), None, False) for rank in (0, 64)])
        raise ranks.Ended("")

    monkeypatch.setattr(common, "prepare", prepare)
    for program in (ral_grpo, diagnose):
        with pytest.raises(ranks.Ended):
            program.main(arguments())
    assert rates[0] == rates[1]


def test_minibatches_of_the_planned_run_do_not_count(cold_start):
    reports = []
    for number in (1, 4):
        args = arguments(eval_examples=1, num_minibatches=number)
        opened = open_toy(cold_start, args)
        reports.append(diagnose.diagnose(*opened, args, [1])[0])
    assert reports[0] == reports[1] and reports[0]["rows"][0]["gradient"] > 0
