"""An evaluation that is stopped and started again covers every row once."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

import common
import evaluate
import runs
from prompts import Example, collate


def predictions(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_it_goes_on_where_it_stopped(cold_start, tmp_path):
    args = evaluate.Args(model=str(cold_start), examples=20, batch_size=8, overlay=2)
    whole = evaluate.main(replace(args, out=str(tmp_path / "whole")))
    assert len(list((tmp_path / "whole").glob("overlay-*.png"))) == 2
    part = tmp_path / "part"
    evaluate.main(replace(args, out=str(part)))
    file = part / "predictions.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:7]) + lines[7][:30])  # killed in the middle of a line
    assert evaluate.main(replace(args, out=str(part), batch_size=5)) == whole
    assert predictions(part) == predictions(tmp_path / "whole")
    assert evaluate.main(replace(args, out=str(part))) == whole  # nothing left to do
    assert len(predictions(part)) == 20


def test_another_evaluation_is_not_mixed_in(cold_start, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = evaluate.Args(model=str(cold_start), examples=4, out=str(out))
    evaluate.main(args)
    with pytest.raises(runs.UsageError, match="another examples"):
        evaluate.main(replace(args, examples=5))
    evaluate.main(replace(args, examples=5, overwrite=True))
    assert len(predictions(out)) == 5
    monkeypatch.setattr(evaluate, "DEFINITIONS", 0)  # answers were judged by other rules
    with pytest.raises(runs.UsageError, match="another definitions"):
        evaluate.main(replace(args, examples=5))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").touch()
    with pytest.raises(runs.UsageError, match="is no evaluation"):
        evaluate.main(replace(args, out=str(tmp_path / "thesis"), overwrite=True))


def test_another_model_at_the_same_place_is_not_taken_for_the_old_one(cold_start, tmp_path):
    model = tmp_path / "run" / "checkpoint"
    shutil.copytree(cold_start, model)
    args = evaluate.Args(model=str(model), examples=4, out=str(tmp_path / "out"))
    evaluate.main(args)
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(runs.UsageError, match="another inputs"):
        evaluate.main(args)
    (tmp_path / "run" / "args.json").write_text("{}")
    for out in (tmp_path / "run", model):
        with pytest.raises(runs.UsageError, match="holds a training run"):
            evaluate.main(replace(args, out=str(out), overwrite=True))
    assert (model / "model.safetensors").exists()


def test_the_tokens_of_an_answer_are_those_in_its_tags(cold_start):
    """A short answer is in many words of a thought; the toy's thought names its finding."""
    tokenizer = common.load_processor(cold_start)[1].tokenizer
    text = "<think> star red </think> <answer> red </answer>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    at = [i for i, x in enumerate(ids) if x == tokenizer.convert_tokens_to_ids("red")]
    text = tokenizer.decode(ids)
    for first_mention, expected in ((True, at[0]), (False, at[1])):
        tokens = evaluate.answer_tokens(tokenizer, ids, text, first_mention)
        assert list(tokens) == [expected]


def test_the_toys_pictures_are_not_resized(cold_start, tmp_path):
    args = evaluate.Args(model=str(cold_start), out=str(tmp_path / "out"), max_pixels=(6272,))
    with pytest.raises(runs.UsageError, match=r"--max-pixels.*not for the toy"):
        evaluate.main(args)
    grid = evaluate.Args(model=str(cold_start), out=str(tmp_path / "out"), grid=(17,), examples=2)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "collate", lambda *a: seen.append(collate(*a)) or seen[-1])
        evaluate.main(grid)
    assert seen[0].grids.tolist() == [[1, 34, 34]] * 2


def test_a_model_is_asked_as_it_was_trained(tmp_path):
    for think in (True, False):
        (tmp_path / "args.json").write_text(json.dumps({"think": think}))
        assert evaluate.asks_to_think(tmp_path / "checkpoint") is think
    (tmp_path / "args.json").write_text("[]")
    for model in (tmp_path / "checkpoint", tmp_path / "elsewhere" / "checkpoint"):
        assert evaluate.asks_to_think(model) is True


def test_a_rank_whose_rows_are_all_bad_draws_nothing(tmp_path):
    evaluate.draw_looks(tmp_path / "a.png", {"before": [], "after": []})
    assert not (tmp_path / "a.png").exists()


def test_dollars_are_no_formula(cold_start, tmp_path):
    """Rows of geometry have LaTeX in questions and answers."""
    record = {"accuracy": 0.0, "response": r"<answer>$$ \foo$</answer>"}
    record |= {"problem": r"Is $\parallelogram ABCD$ a square?", "solution": "$x"}
    media = [Image.new("RGB", (56, 56))]
    example = Example(record["problem"], "$x", media, False)
    look = evaluate.Look(record, example, torch.ones(1, 4) / 4, ["$$"], (1, 2, 2))
    evaluate.draw_overlay(tmp_path / "a.png", look)
    evaluate.draw_looks(tmp_path / "b.png", {"$": [look]})
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "b.png"))


def test_bad_rows_of_an_interrupted_evaluation_do_not_stop_the_next(real, tmp_path):
    out = tmp_path / "out"
    fields = {"data": str(real / "rows.json"), "media_root": (str(real / "media"),)}
    fields |= {"model": str(real / "qwen2_vl"), "max_pixels": (56 * 56,), "max_new_tokens": 4}
    fields |= {"frame_pixels": (56 * 56,), "frames": (2,), "workers": 0, "out": str(out)}
    evaluate.main(evaluate.Args(**fields, max_skipped=0.2))
    lines = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "predictions.jsonl").write_bytes(b"".join(lines[:-1]))
    skipped = (out / "skipped.jsonl").read_bytes()
    (out / "skipped.jsonl").write_bytes(skipped + b'{"row": "cut o')
    evaluate.main(evaluate.Args(**fields, max_skipped=0.15))
    assert (out / "skipped.jsonl").read_bytes() == skipped and len(predictions(out)) == 18


def test_a_sweep_over_the_toys_grid(cold_start, tmp_path):
    args = evaluate.Args(model=str(cold_start), examples=4, grid=(3, 5), out=str(tmp_path / "out"))
    evaluate.main(args)
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "grid 3" in table and "grid 5" in table and "on target, row own" in table
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 1000


def test_a_sweep_over_frames_with_real_data(real, tmp_path):
    out = tmp_path / "out"
    args = evaluate.Args(
        model=str(real / "qwen2_5_vl"),
        data=str(real / "rows.json"),
        media_root=(str(real / "media"),),
        frames=(2, 6),
        max_pixels=(56 * 56,),
        frame_pixels=(56 * 56,),
        max_new_tokens=4,
        max_skipped=0.2,
        overlay=17,
        out=str(out),
    )
    metrics = evaluate.main(args)
    lines = predictions(out)
    assert [line["setting"][0] for line in lines] == [2] * 18 + [6] * 18
    assert len(list(out.glob("overlay-frames6-*.png"))) == 17
    for frames in (2, 6):
        skipped = (out / f"skipped-frames{frames}.jsonl").read_text().splitlines()
        assert len(skipped) == 2
    table = (out / "table.txt").read_text()
    assert all(word in table for word in ("frames 2", "multiple choice", "OCR", "left", "right"))
    values = [line["accuracy"] for line in lines if line["setting"][0] == 6]
    assert metrics["eval/accuracy"] == pytest.approx(sum(values) / 18)
    kinds = [line for line in lines if line["setting"][0] == 6 and line["problem_type"] == "OCR"]
    expected = sum(line["accuracy"] for line in kinds) / len(kinds)
    assert metrics["eval/accuracy_OCR"] == pytest.approx(expected)
