"""An evaluation that is stopped and started again covers every row once."""

import json
import os
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from shared import load, make_prompts, toy_args

import common
import eval
from support import disk, memory, pictures, ranks, results, states
from support.grounding import Box, fourfold
from support.pictures import Gaze
from support.prompts import Block, Example, Media, Prompt, PromptConfig, collate


def predictions(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def page(path):
    """What a gaze page holds."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>',
                         path.read_text(), re.DOTALL)  # fmt: skip
    return json.loads(text)


def test_it_goes_on_where_it_stopped(cold_start, tmp_path):
    args = toy_args(eval, model=str(cold_start), examples=20, batch_size=8, gaze=2)
    whole = eval.main(replace(args, out=str(tmp_path / "whole")))
    shown = page(tmp_path / "whole" / "gaze.html")["examples"]
    assert [x["question"] for x in shown] == [
        line["problem"] for line in predictions(tmp_path / "whole")[:2]
    ]
    part = tmp_path / "part"
    eval.main(replace(args, out=str(part)))
    file = part / "predictions.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:7]) + lines[7][:30])  # killed in the middle of a line
    assert eval.main(replace(args, out=str(part), batch_size=5)) == whole
    assert predictions(part) == predictions(tmp_path / "whole")
    assert page(part / "gaze.html")["examples"] == shown  # answered again for the page alone
    assert eval.main(replace(args, out=str(part))) == whole  # nothing left to do
    assert len(predictions(part)) == 20


def test_long_prompts_are_decoded_in_smaller_batches(cold_start, monkeypatch):
    """Of at most `batch_tokens` padded positions, or one prompt; the answers are the same."""

    def generate_group(model, batch, group_size, max_new_tokens):
        batches.append(tuple(batch.ids.shape))
        return common.generate_group(model, batch, group_size, max_new_tokens)

    model, processor = load(cold_start, frozen=True)
    grids = (3, 3, 4, 3, 9, 3, 5)
    prompts = make_prompts(model, processor, ["image"] * len(grids), grids, grids)
    lengths, found = [len(prompt.ids) for prompt in prompts], []
    monkeypatch.setattr(eval, "generate_group", generate_group)
    for bound in (2**16, 3 * (max(lengths[:4]) + 16)):
        batches = []
        options = {"max_new_tokens": 16, "batch_size": 5, "batch_tokens": bound, "gazes": 0}
        predictions = eval.predict(model, processor, prompts, **options)
        found.append([(x.record["problem"], x.record["response"]) for x in predictions])
        if bound == 2**16:
            assert [rows for rows, _ in batches] == [5, 2]
    assert [rows for rows, _ in batches] == [3, 1, 1, 2]
    assert all(rows == 1 or rows * (longest + 16) <= bound for rows, longest in batches)
    assert found[0] == found[1]
    assert [problem for problem, _ in found[0]] == [x.example.problem for x in prompts]


def test_a_prompt_of_the_toy_that_is_too_long_is_a_bad_row(cold_start, tmp_path):
    fields = {"model": str(cold_start), "out": str(tmp_path / "out"), "max_prompt_tokens": 5}
    with pytest.raises(ranks.UsageError, match=r"--max-skipped .* above --max-prompt-tokens 5"):
        eval.main(toy_args(eval, **fields, examples=4))


def test_another_evaluation_is_not_mixed_in(cold_start, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = toy_args(eval, model=str(cold_start), examples=4, out=str(out))
    eval.main(args)
    with pytest.raises(ranks.UsageError, match="different --examples 4 -> 5; give"):
        eval.main(replace(args, examples=5))
    eval.main(replace(args, examples=5, overwrite=True))
    assert len(predictions(out)) == 5
    monkeypatch.setattr(states, "DEFINITIONS", 0)  # answers were judged by other rules
    with pytest.raises(ranks.UsageError, match="different definitions, of another version"):
        eval.main(replace(args, examples=5))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").touch()
    with pytest.raises(ranks.UsageError, match="holds no evaluation"):
        eval.main(replace(args, out=str(tmp_path / "thesis"), overwrite=True))


def test_what_does_not_fit_is_refused_before_it_is_loaded(cold_start, tmp_path, monkeypatch):
    """The weights are 2.6 MB, and 64 prompts decoded together take 43 MB."""

    class Loaded(Exception):
        pass

    def load_model(*args, **options):
        raise Loaded

    args = toy_args(eval, model=str(cold_start), examples=4, out=str(tmp_path / "out"))
    monkeypatch.setattr(memory, "available_gb", lambda: 0.03)
    monkeypatch.setattr(eval, "load_model", load_model)
    with pytest.raises(ranks.UsageError, match=r"--model .* needs about .* or --batch-size, or"):
        eval.main(args)
    assert not (tmp_path / "out").exists()
    with pytest.raises(Loaded):
        eval.main(replace(args, batch_size=1))
    needs, too_large = [], memory.too_large
    monkeypatch.setattr(memory, "available_gb", lambda: 0.0)
    monkeypatch.setattr(memory, "too_large", lambda *x: needs.append(x[2]) or too_large(*x))
    for size in (1, 2, 3):
        with pytest.raises(ranks.UsageError):
            eval.main(replace(args, batch_size=size))
    assert needs[0] < needs[1] < needs[2]


def test_the_largest_setting_must_fit(monkeypatch):
    seen = []
    monkeypatch.setattr(eval, "require_evaluation_fits", lambda given, _: seen.append(given))
    sweep = {"frames": (8, 32, 16), "image_tokens": (64, 512), "data": ("rows.json",)}
    for fields in (sweep, {"benchmark": ("images",)}, {"benchmark": ("vstar", "nextqa")}):
        eval.check_settings(eval.Args(model="m", **fields), SimpleNamespace(config=None), False)
    # Without a number, a video has up to 128 frames; image benchmarks have no videos.
    assert [(x.frames, x.image_tokens) for x in seen] == [(32, 512), (2, 5120), (None, 5120)]
    assert all(x.data for x in seen)


def test_another_model_at_the_same_place_is_not_taken_for_the_old_one(cold_start, tmp_path):
    model = tmp_path / "run" / "checkpoint"
    shutil.copytree(cold_start, model)
    args = toy_args(eval, model=str(model), examples=4, out=str(tmp_path / "out"))
    eval.main(args)
    os.utime(model / "model.safetensors", (1, 1))
    eval.main(args)  # a copy on another machine
    for name in ("model.safetensors", "config.json", "tokenizer_config.json", "prompt.json"):
        kept = (model / name).read_bytes()
        (model / name).write_bytes(kept[:-2] + b" " + kept[-2:])
        with pytest.raises(ranks.UsageError, match=f"different --model .*{name}; .*--overwrite"):
            results.open_out(args)
        (model / name).write_bytes(kept)
    disk.write_record(tmp_path / "run", disk.TRAINING_RUN, {})
    for out in (tmp_path / "run", model):
        with pytest.raises(ranks.UsageError, match=r"holds --model .*, which this command reads"):
            eval.main(replace(args, out=str(out), overwrite=True))
    assert (model / "model.safetensors").exists()


def test_the_tokens_of_an_answer_are_those_in_its_tags(cold_start):
    """A short answer is in many words of a thought; the toy's thought names its finding."""
    tokenizer = common.load_processor(cold_start).tokenizer
    text = "<think> star red </think> <answer> red </answer>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    at = [i for i, x in enumerate(ids) if x == tokenizer.convert_tokens_to_ids("red")]
    text = tokenizer.decode(ids)
    for first_mention, expected in ((True, at[0]), (False, at[1])):
        tokens = eval.answer_tokens(tokenizer, ids, text, first_mention)
        assert list(tokens) == [expected]


def test_the_toys_pictures_are_not_resized(cold_start, tmp_path):
    args = toy_args(eval, model=str(cold_start), out=str(tmp_path / "out"), image_tokens=(8,))
    with pytest.raises(ranks.UsageError, match=r"--image-tokens.*on the toy a cell is a token"):
        eval.main(args)
    grid = toy_args(eval, model=str(cold_start), out=str(tmp_path / "out"), grid=(17,), examples=2)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval, "collate", lambda *a: seen.append(collate(*a)) or seen[-1])
        eval.main(grid)
    assert [block.shape for (block,) in seen[0].blocks] == [(1, 17, 17)] * 2


def test_a_model_is_asked_as_it_was_trained(real, tmp_path, monkeypatch, capsys):
    """In the words of a fork, without a thought, by its accuracy rule."""
    asked = PromptConfig({"answer": "Say it.", "OCR": "In capitals."}, False, "exact")
    processor = common.load_processor(real / "qwen2_vl")
    processor.prompt_config = asked
    shutil.copytree(real / "qwen2_vl", tmp_path / "checkpoint")
    processor.save(tmp_path / "checkpoint")
    texts, models = [], (tmp_path / "checkpoint", real / "qwen2_vl")
    encode = eval.encode_prompt

    def keep(processor, example):
        prompt = encode(processor, example)
        texts.append(processor.tokenizer.decode(prompt.ids))
        return prompt

    monkeypatch.setattr(eval, "encode_prompt", keep)
    for model in models:
        monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(model)])
        fields = {"examples": 1, "workers": 0, "max_new_tokens": 4}
        fields |= {"out": str(tmp_path / f"eval-{model.name}")}
        fields |= {"data": str(real / "rows.json"), "media_root": (str(real / "media"),)}
        args = eval.Args(**eval.defaults() | fields | {"out": str(tmp_path / f"eval-{model.name}")})
        own = model.name == "checkpoint"
        assert (args.think, args.accuracy_rule) == ((False, "exact") if own else (True, "by-type"))
        eval.main(args)
    assert "Say it." in texts[0] and "<think>" not in texts[0]
    assert "Think first, inside <think>" in texts[1] and "Say it." not in texts[1]
    assert "has no prompt.json" in capsys.readouterr().out


def test_a_prompt_configuration_that_cannot_be_used_is_one_line(real, tmp_path, monkeypatch):
    shutil.copytree(real / "qwen2_vl", tmp_path / "checkpoint")
    broken = ["[", '{"prompts": {"answer": 3}}', '{"prompt": {}}', '{"prompts": []}']
    broken += ['{"prompts": {}, "think": "no"}', '{"prompts": {}, "accuracy_rule": "foo"}']
    for content in broken:
        (tmp_path / "checkpoint" / "prompt.json").write_text(content)
        with pytest.raises(ranks.UsageError, match=r"^--model .*: its prompt\.json: "):
            common.load_processor(tmp_path / "checkpoint")


def test_a_rank_whose_rows_are_all_bad_draws_nothing(drawn, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n')
    pictures.draw_run(tmp_path, {"before": [], "after": []}, ["train/loss"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_dollars_are_no_formula(drawn, tmp_path):
    """Rows of geometry have LaTeX in questions and answers."""
    record = {"accuracy": 0.0, "response": r"<answer>$$ \foo$</answer>"}
    record |= {"problem": r"Is $\parallelogram ABCD$ a square?", "solution": "$x"}
    media = [Media([Image.new("RGB", (56, 56))])]
    rows = {0: torch.ones(2, 5) / 5}
    example = Example(record["problem"], "$x", media)
    block = Block(torch.empty(0), (1, 2, 2))
    prompt = Prompt(torch.zeros(4), None, [block], example, grids=[block.shape])
    shown = Gaze(prompt, ["$$"], rows)
    prediction = pictures.Prediction(record, shown, range(0, 1), 0)
    pictures.draw_attention(tmp_path / "a.png", {"$": [prediction] * 6})
    width, height = Image.open(tmp_path / "a.png").size
    assert width > 1000 and 200 < height < 300  # six pictures in a row


def test_bad_rows_of_an_interrupted_evaluation_do_not_stop_the_next(real, tmp_path):
    out = tmp_path / "out"
    fields = {"data": str(real / "rows.json"), "media_root": (str(real / "media"),)}
    fields |= {"model": str(real / "qwen2_vl"), "image_tokens": (4,), "max_new_tokens": 4}
    fields |= {"frame_tokens": (4,), "frames": (2,), "workers": 0, "out": str(out)}
    eval.main(toy_args(eval, **fields, max_skipped=0.2))
    lines = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "predictions.jsonl").write_bytes(b"".join(lines[:-1]))
    skipped = (out / "skipped.jsonl").read_bytes()
    (out / "skipped.jsonl").write_bytes(skipped + b'{"row": "cut o')
    eval.main(toy_args(eval, **fields, max_skipped=0.15))
    assert (out / "skipped.jsonl").read_bytes() == skipped and len(predictions(out)) == 18


@pytest.mark.parametrize("line", ["{", "[1]", '{"accuracy": 1}', '{"setting": 1}'])
def test_predictions_that_are_damaged_are_one_line(tmp_path, line):
    (tmp_path / "predictions.jsonl").write_text(line + "\n")
    with pytest.raises(
        ranks.UsageError, match=r"predictions\.jsonl: line 1 is damaged: .*evaluate again"
    ):
        results.read_predictions(tmp_path / "predictions.jsonl")


def test_a_sweep_over_the_toys_grid(cold_start, tmp_path, monkeypatch):
    args = toy_args(eval, model=str(cold_start), examples=4, grid=(3, 5), out=str(tmp_path / "out"))
    drawn, errorbar = [], Axes.errorbar

    def keep(axis, *values, **options):
        drawn.append(values)
        return errorbar(axis, *values, **options)

    monkeypatch.setattr(Axes, "errorbar", keep)
    eval.main(args)
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "grid 3" in table and "grid 5" in table and "on target, own row" in table
    by_grid = defaultdict(list)
    for line in predictions(tmp_path / "out"):
        by_grid[line["setting"][-1]].append(line["accuracy"])
    ((grids, means, _),) = drawn
    assert grids == (3, 5) and list(means) == [sum(by_grid[n]) / 4 for n in grids]
    assert Image.open(tmp_path / "out" / "sweep.png").size == (400, 288)


def test_a_sweep_over_frames_with_real_data(real, tmp_path):
    out = tmp_path / "out"
    args = toy_args(
        eval,
        model=str(real / "qwen2_5_vl"),
        data=str(real / "rows.json"),
        media_root=(str(real / "media"),),
        frames=(2, 6),
        image_tokens=(4,),
        frame_tokens=(4,),
        max_new_tokens=4,
        max_skipped=0.2,
        gaze=17,
        out=str(out),
    )
    metrics = eval.main(args)
    lines = predictions(out)
    assert [line["setting"][1] for line in lines] == [2] * 18 + [6] * 18
    for frames in (2, 6):
        shown = page(out / f"gaze-frames{frames}.html")["examples"]
        assert len(shown) == 16  # of the first 17 rows, one is bad
        assert {len(x["pictures"][0]) for x in shown} == {1, frames}
    for frames in (2, 6):
        skipped = (out / f"skipped-frames{frames}.jsonl").read_text().splitlines()
        assert len(skipped) == 2
    table = (out / "table.txt").read_text()
    assert all(word in table for word in ("frames 2", "multiple choice", "OCR", "left", "right"))
    values = [line["accuracy"] for line in lines if line["setting"][1] == 6]
    assert metrics["eval/accuracy"] == pytest.approx(sum(values) / 18)
    kinds = [line for line in lines if line["setting"][1] == 6 and line["problem_type"] == "OCR"]
    expected = sum(line["accuracy"] for line in kinds) / len(kinds)
    assert metrics["eval/accuracy_OCR"] == pytest.approx(expected)


@pytest.mark.parametrize("patch", [0, 2])
def test_a_picture_shows_what_gets_most_attention(loaded, patch):
    """Of an image of 4 x 4 tokens, a video of three pairs of frames and an image, of 3 x 3 each."""
    (prompt,) = make_prompts(*loaded, kinds=("mixed",), grids=(4,), frames=(6,))
    attention = torch.ones(16 + 4 * 9)
    first, count = (0, 16) if patch == 0 else (16 + 9, 9)  # the image, or the second pair
    attention[first : first + count] = torch.arange(10.0, 10.0 + count)
    boxes = (Box(28, 56, 42, 70), Box(21, 42, 63, 84, medium=1, start=0.9, end=1.2))
    prompt.example.boxes = boxes
    shown = pictures.make_gaze(prompt, [], loaded[1].tokenizer, {})
    axis = pictures.load_pyplot().figure().add_subplot()
    pictures.draw_gaze(axis, shown, attention)
    drawn, dimmed = axis.images
    assert drawn.get_array().shape[0] == (112 if patch == 0 else 84)
    bright = (1 - dimmed.get_array()[..., 3] / 0.85).flatten()
    np.testing.assert_allclose(bright, torch.arange(10.0, 10.0 + count) / (9 + count), atol=1e-6)
    (outline,) = axis.patches
    box = boxes[0] if patch == 0 else boxes[1]
    place = (*outline.get_xy(), outline.get_width(), outline.get_height())
    expected = (box.left, box.top, box.right - box.left, box.bottom - box.top)
    np.testing.assert_allclose(place, expected)


def test_a_character_of_several_tokens_belongs_to_the_last(real):
    tokenizer = common.load_processor(real / "qwen2_vl").tokenizer
    text = "a 😀 é 中 b"
    tokens = pictures.token_texts(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(tokens) == text and "\ufffd" not in "".join(tokens)
    assert {"😀", "é", "中"} <= {token.strip() for token in tokens}
    cut = tokenizer.encode(text, add_special_tokens=False)[:3]  # in the middle of the first
    assert "".join(pictures.token_texts(tokenizer, cut)) == tokenizer.decode(cut)


def test_rows_without_a_type_have_a_line_of_the_table():
    records = [{"problem_type": kind, "source": "", "accuracy": a, "format": 1, "completion_len": 2}
               for kind, a in (("", 1.0), ("", 0.0), ("numerical", 1.0))]  # fmt: skip
    lines = results.table({(None,) * 5: records}).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["all", "no type", "numerical"]
    assert lines[3].split()[2:4] == ["2", "0.500"]


def test_right_and_looked_are_counted_apart():
    """Over the rows with boxes; half right is right, and a benchmark's own score counts first."""
    judged = [({"accuracy": 1.0}, 1.0), ({"accuracy": 0.5}, 0.0), ({"accuracy": 0.4}, 1.0)]
    judged += [({"accuracy": 1.0, "score": 0.0}, 0.0), ({"accuracy": 0.0, "score": 0.6}, 1.0)]
    records = [fields | {"problem_type": "", "pointing": looked} for fields, looked in judged]
    records.append({"accuracy": 1.0, "problem_type": ""})  # without boxes
    shares = {"right_looked": 0.4, "right_unlooked": 0.2, "wrong_looked": 0.2}
    assert fourfold(records) == shares | {"wrong_unlooked": 0.2}
    metrics = eval.summarise(records)
    assert metrics["eval/right_looked"] == 0.4 and metrics["eval/pointing"] == 0.6
    assert fourfold(records[-1:]) == {}


def test_tables_say_where_the_rows_with_boxes_looked():
    plain = {"problem_type": "", "source": "", "accuracy": 0.0, "format": 1.0, "completion_len": 2}
    looks = dict.fromkeys(results.MEASURES, 0.25) | {"target_attn_generic": 0.1, "pointing": 1.0}
    boxes = [plain | looks, plain | looks | {"accuracy": 1.0, "pointing": 0.0}]
    boxes.append(plain | looks | {"target_attn": 1.0, "target_attn_generic": 0.4})
    lines = results.table({(None,) * 5: [plain, *boxes]}).splitlines()
    cells = [re.split("  +", line) for line in lines[3:]]
    assert cells == [
        ["rows with boxes", "3"],
        ["with an answer", "3"],
        ["right and looked", "0 (0.000)"],
        ["right and did not", "1 (0.333)"],
        ["wrong and looked", "2 (0.667)"],
        ["wrong and did not", "0 (0.000)"],
        ["on target, predicting row", "0.500"],
        *([label, "0.250"] for label in list(results.MEASURES.values())[1:]),
        ["on target, times a general request", "2.500"],  # 1.5 / 0.6
    ]
    assert len(results.table({(None,) * 5: [plain]}).splitlines()) == 3
    silent = plain | looks | {"answered": 0.0}
    measured = results.measures([silent, silent | {"answered": 1.0}])
    assert measured["with an answer"] == "1" and measured["on target, own row"] == "0.250"
    none = results.measures([silent])  # no row to measure, rather than 0
    assert none.keys() == measured.keys() - {
        *(label for name, label in results.MEASURES.items() if not name.endswith("_mean")),
        "on target, times a general request",
    }
    several = {("a", *(None,) * 5): [plain], ("b", *(None,) * 5): boxes}
    lines = [line.split(" | ") for line in results.side_by_side(several).splitlines()]
    head, _, without, having = lines[-4:]
    assert head[7:10] == ["rows with boxes", "with an answer", "right and looked"]
    assert not any(without[7:-1]) and having[7:10] == ["3", "3", "0 (0.000)"]
    assert "boxes" not in results.side_by_side({("a", *(None,) * 5): [plain]})


def test_evaluations_with_and_without_a_number_or_a_benchmark_are_named_and_not_plotted(tmp_path):
    settings = [("a", None, 16, 5120), ("a", None, 32, 5120), ("b", "vstar", None, 5120)]
    settings = [(*setting, 128, None) for setting in settings]
    assert list(results.labels(settings).values()) == [
        "a, frames 16",
        "a, frames 32",
        "b, vstar, frames None",
    ]
    results.plot(tmp_path / "sweep.png", {x: [{"accuracy": 1.0}] for x in settings})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("fields", [{"frames": (None, 16)}, {"image_tokens": (64, None)}])
def test_a_sweep_takes_numbers(fields):
    with pytest.raises(ranks.UsageError, match="None alone"):
        eval.Args(model="m", **fields)
