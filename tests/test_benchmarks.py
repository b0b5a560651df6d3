"""The benchmarks, read from stand-ins with the published columns, types and folders: what is asked,
what is right, and how each benchmark counts it."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
from matplotlib.axes import Axes
from pyarrow import parquet
from real import write_video
from standins import ABOUT, DIRECTLY, NEXT, STANDINS, VIZWIZ, write_standin

import eval
from common import Rollout
from support import benchmarks
from support.benchmarks import BENCHMARKS, GROUPS, PAPER, BenchmarkFile
from support.grounding import Box
from support.media import BadRow
from support.prompts import Example
from support.ranks import UsageError


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """What `--benchmark-root` names: a folder with every benchmark."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_video(folder / "clip.mp4", 20)  # two seconds
    for name, entry in BENCHMARKS.items():
        write_standin(name, folder / entry.hub.replace("/", "--"), folder / "clip.mp4")
    return folder


def opened(name: str, root: Path | None, **options) -> BenchmarkFile:
    return BenchmarkFile(name, root and str(root), **{"frames": 4, "fps": None} | options)


def check(name: str, file: BenchmarkFile) -> list[Example]:
    examples, expected = [file.example(row) for row in range(len(file))], STANDINS[name][1]
    found = [(len(x.media), x.options, x.solution, x.source) for x in examples]
    assert found == expected
    asked = [{medium.kind for medium in x.media} for x in examples]
    assert asked == [{"video" if name in GROUPS["videos"] else "image"}] * len(expected)
    assert all(
        x.problem and "(A)" not in x.problem and "<image " not in x.problem for x in examples
    )
    return examples


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_become_questions_with_media(name, root):
    assert check(name, opened(name, root))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_has_them_too(name, root, tmp_path, monkeypatch):
    """As a download lies in the cache, whose files are links to blobs. Videos are zip files
    there."""
    entry = BENCHMARKS[name]
    folder = entry.hub.replace("/", "--")
    cache = tmp_path / f"datasets--{folder}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("1234")
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted((root / folder).rglob("*"))):
        link = cache / "snapshots" / "1234" / file.relative_to(root / folder)
        if file.is_file() and (file.suffix != ".jpg" or not entry.videos) and file.suffix != ".mp4":
            shutil.copy(file, cache / "blobs" / str(number))
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(cache / "blobs" / str(number))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if name in GROUPS["images"]:
        check(name, opened(name, tmp_path))  # where it is not
        return
    words = f"^--benchmark {name}: {entry.hub} has no videos, such as .*--local-dir DIR/{folder}"
    with pytest.raises(UsageError, match=f"{words}`.*and give --benchmark-root DIR$"):
        opened(name, None)


def test_special_cases(root, tmp_path):
    """The order of marked images, seconds of a clip, folders of frames."""
    standard, _ = check("mmmu_pro", opened("mmmu_pro", root))
    assert [medium.frames[0].width for medium in standard.media] == [31, 30, 32]
    assert standard.problem == "Which of <image> and <image>?"
    clip, frames = check("mvbench", opened("mvbench", root, frames=None, fps=10))
    assert clip.media[0].times == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert frames.media[0].times == pytest.approx([1, 4 / 3, 5 / 3, 2])
    assert [frame.getpixel((0, 0))[0] for frame in frames.media[0].frames] == [80, 100, 120, 140]
    assert "Unanswerable" in check("vizwiz", opened("vizwiz", root))[0].problem
    assert DIRECTLY not in check("vstar", opened("vstar", root))[0].problem


def test_a_side_file_says_where_the_target_is(root, tmp_path):
    """It is as untrusted as any other file."""
    (example,) = check("vstar", opened("vstar", root))
    assert example.boxes == (Box(20, 10, 28, 16), Box(30, 20, 40, 30))
    place = tmp_path / "craigwu--vstar_bench"
    shutil.copytree(root / place.name, place)
    file, side = opened("vstar", tmp_path), place / "direct_attributes/sa_1.json"
    for content in ("[]", "{", "[" * 10_000, "\xff", json.dumps({"a": "b" * 2**20})):
        side.write_bytes(content.encode("latin-1"))
        assert file.example(0).boxes == ()  # and the question counts
    for box in ([20, 10, 28, 36], [1, 2, 3], [[[]]], {"bbox": 1}):
        side.write_text(json.dumps({"bbox": [box]}))
        assert file.example(0).boxes == ()
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps(ABOUT))
    side.unlink()
    assert file.example(0).boxes == ()
    side.symlink_to(outside)
    assert file.example(0).boxes == ()


def edited(root: Path, to: Path, name: str, file: str, **change) -> Path:
    """A copy of a benchmark whose first row in `file` differs; returns the root."""
    place = to / BENCHMARKS[name].hub.replace("/", "--")
    shutil.copytree(root / place.name, place)
    rows = [row | change for row in STANDINS[name][0][file]]
    rows = [{key: value for key, value in row.items() if value != "gone"} for row in rows]
    if file.endswith("parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), place / file)
    else:
        text = json.dumps(rows) if file.endswith(".json") else "\n".join(map(json.dumps, rows))
        (place / file).write_text(text)
    return to


TEST = "data/test-00000-of-00001.parquet"
STANDARD_FILE = "standard (10 options)/test-00000-of-00002.parquet"


@pytest.mark.parametrize(
    ("name", "file", "change", "reason"),
    [
        ("vstar", "test_questions.jsonl", {"text": "Red?\nAnswer."}, "lists no options"),
        ("vstar", "test_questions.jsonl", {"label": "D"}, "is 'D', but it has 2 options"),
        ("mme", TEST, {"image": "gone"}, "is not as published .KeyError: 'image'"),
        ("muirbench", TEST, {"image_list": []}, "has no image or video"),
        ("blink", "IQ_Test/val-00000-of-00001.parquet", {"image_1": None}, "no image or video"),
        ("mmmu_pro", STANDARD_FILE, {"options": "(" * 9000}, "is not as published"),
        ("mmmu_pro", STANDARD_FILE, {"options": "__import__('os')"}, "is not as published"),
        ("mmmu_pro", STANDARD_FILE, {"options": "[" + "1," * 9000}, "more than 10,000 characters"),
        ("nextqa", "MC/test-00000-of-00001.parquet", {"answer": 7}, "is 7, but it has 5"),
        ("mvbench", "json/action_sequence.json", {"answer": "left"}, "is not as published"),
        ("vizwiz", "data/val-00000-of-00001.parquet", {"question_id": "x" * 10**5}, "its texts"),
    ],
)  # fmt: skip
def test_another_layout_is_refused_before_any_work(root, tmp_path, name, file, change, reason):
    words = f"^--benchmark {name}: .* is not laid out as {BENCHMARKS[name].hub} was: .*{reason}"
    with pytest.raises(UsageError, match=words):
        opened(name, edited(root, tmp_path, name, file, **change))


def test_an_absent_benchmark_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"^--benchmark blink BLINK-Benchmark/BLINK:val: .*cache"):
        opened("blink", tmp_path)
    with pytest.raises(UsageError, match=r"^--benchmark-root \S+nowhere: no such directory"):
        opened("blink", tmp_path / "nowhere")
    (tmp_path / "BLINK-Benchmark--BLINK").mkdir()
    with pytest.raises(
        UsageError, match=r"^--benchmark blink .*has no data files of a split 'val'"
    ):
        opened("blink", tmp_path)


def test_a_missing_video_is_a_bad_row_and_no_path_leads_outside(root, tmp_path):
    rows = [NEXT | {"video": name} for name in ("4010", "4011", "x" * 5000, "\0")]
    place = tmp_path / "lmms-lab--NExTQA"
    shutil.copytree(root / place.name, place)
    parquet.write_table(pyarrow.Table.from_pylist(rows), place / "MC/test-00000-of-00001.parquet")
    file = opened("nextqa", tmp_path)
    assert len(file.example(0).media) == 1
    with pytest.raises(BadRow, match=r"path '4011\.mp4' is no file under"):
        file.example(1)
    for row in (2, 3):
        with pytest.raises(BadRow, match="is no file under"):
            file.example(row)
    episodic = "json/episodic_reasoning.json"
    for number, video in enumerate(("../../../../..", "../../../../../clip.mp4")):
        away = edited(root, tmp_path / str(number), "mvbench", episodic, video=video)
        with pytest.raises(BadRow, match="is no file under"):
            opened("mvbench", away).example(1)


def example(solution: str, answers=(), **fields) -> Example:
    return Example("", solution, [], extra={"answers": [*answers]}, **fields)


TEN = [*VIZWIZ["answers"]]  # three of them are "dark red"


@pytest.mark.parametrize(
    ("name", "solution", "answers", "scores"),
    [
        ("mme", "Yes", (), {"Yes": 1, "yes.": 1, "Yes, it is": 1, "No": 0, "": 0, "red": 0}),
        ("chartqa", "42", (), {"41": 1, "44": 1, "44.2": 0, "41%": 0, "forty-two": 0}),
        ("chartqa", "50%", (), {"0.51": 1, "48%": 1, "50": 0}),
        ("chartqa", "0", (), {"0": 1, "0.0": 0}),
        ("chartqa", "Red", (), {"red": 1, "reddish": 0}),
        ("vizwiz", "", TEN, {"dark red": 0.9, "Dark-red!": 0.9, "red": 1, "blue": 0}),
        ("vizwiz", "", TEN, {"rose": 0.3, "0": 0.3, "the rose.": 0.3}),
        ("vizwiz", "", ["dont", "Don't know", "it's 1.5"] * 4, {"don't": 1, "IT'S one.5": 0}),
        ("videommmu", "3.5", (), {"3.50": 1, "3.6": 0}),
    ],
)  # fmt: skip
def test_metrics(name, solution, answers, scores):
    metric = BENCHMARKS[name].metric
    found = {answer: metric(answer, example(solution, answers)) for answer in scores}
    assert found == pytest.approx(scores)


def test_letters_count_by_any_notation():
    asked = example("B", options=("A. B", "B. A"), problem_type="multiple choice")
    found = {x: BENCHMARKS["blink"].metric(x, asked) for x in ("B", "(b)", "B. A", "A", "C", "")}
    assert found == {"B": 1, "(b)": 1, "B. A": 1, "A": 0, "C": 0, "": 0}


def records(*rows) -> list[dict]:
    return [dict(zip(("source", "score", "question_id"), row, strict=False)) for row in rows]


def test_totals():
    three = records(("a", 1), ("a", 0), ("b", 1))
    assert BENCHMARKS["blink"].total(three) == pytest.approx(200 / 3)
    assert BENCHMARKS["mvbench"].total(three) == pytest.approx(75)
    cv = records(("ADE20K", 1), ("COCO", 0), ("COCO", 1), ("Omni3D", 0), ("Omni3D", 0))
    assert BENCHMARKS["cv_bench"].total(cv) == pytest.approx(37.5)
    # One image of two is right in both questions, the other in one: 75 and 50.
    ocr = [("OCR", 1, "1"), ("OCR", 1, "1"), ("OCR", 1, "2"), ("OCR", 0, "2")]
    count = [("count", 1, "1"), ("count", 1, "1")]
    assert BENCHMARKS["mme"].total(records(*ocr)) == 125
    assert BENCHMARKS["mme"].total(records(*ocr, *count)) == 325
    assert BENCHMARKS["mme"].total(records(*ocr, count[0])) == 225  # the other row is missing


def test_missing_rows_stand_beside_the_number():
    assert benchmarks.number("blink", records(*[("a", 1)] * 1901)) == "100.0"
    assert benchmarks.number("nextqa", records(*[("a", 0)] * 1512)) == "0.0 (rows 1,512 of 8,564)"


@pytest.fixture
def evaluate(real, root, tmp_path, monkeypatch):
    """Run eval.py on benchmarks with a model that always says the same; returns the directory and
    what it was asked."""

    def run(said: str, **fields) -> tuple[Path, list[str]]:
        asked, encode = [], eval.encode_prompt

        def keep(processor, example):
            prompt = encode(processor, example)
            asked.append(processor.tokenizer.decode(prompt.ids))
            return prompt

        monkeypatch.setattr(eval, "encode_prompt", keep)
        monkeypatch.setattr(Rollout, "texts", lambda self, _: [[said]] * len(self.response_ids))
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        small = {"image_tokens": (4,), "min_image_tokens": 1, "frame_tokens": (4,), "workers": 0}
        small |= {"frames": (2,), "max_new_tokens": 2, "benchmark_root": str(root)}
        small |= {"model": str(real / "qwen2_5_vl"), "out": str(out)}
        eval.main(eval.Args(**small | fields))
        return out, asked

    return run


def test_an_evaluation_has_the_benchmarks_own_numbers(evaluate):
    out, asked = evaluate("<think> </think><answer>Yes</answer>", benchmark=("mme", "mvbench"))
    assert "Please answer yes or no.\nThink first" in asked[0] and "A. up" in asked[2]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [1, 0, 0, 0]
    assert lines[1]["question_id"] == "OCR/1.png"
    assert "\nMME, points of 2,800: 50.0 (rows 2 of 2,374)" in (out / "table.txt").read_text()
    images, _, details = (out / "table.md").read_text().partition("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in images.splitlines()]
    assert [row[0] for row in rows[2:]] == [*(f"{name} (paper)" for name in PAPER), str(out)]
    assert [row[3] for row in rows] == ["MME", "---", "2309.3", "2258.7", "2352.8", rows[5][3]]
    assert rows[5][1:4] == ["", "", "50.0 (rows 2 of 2,374)"] and "| LongVideoBench |" in details
    assert (
        f"| {out} | MME, points of 2,800 | 50.0 (rows 2 of 2,374) | 2 | 0.500 | 0.000 | 2.0 |"
        in details
    )


def test_the_attention_on_the_boxes_is_measured(evaluate):
    out, _ = evaluate("<answer>B</answer>", benchmark=("vstar",), relative=True, max_new_tokens=4)
    (record,) = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
    assert record["score"] == 1 and {"target_attn_generic", "pointing"} <= record.keys()
    assert record["target_attn_mean"] > 0


def test_a_base_model_is_asked_in_the_benchmarks_words(evaluate):
    out, asked = evaluate("C", benchmark=("nextqa", "videomme"), bare=True)
    assert all("<answer>" not in text and DIRECTLY in text for text in asked)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [(line["score"], line["accuracy"]) for line in lines] == [(0, 0), (1, 1)]


def test_the_answer_of_a_base_model_begins_with_its_response(evaluate):
    """In the row of the prompt's last position, as there are no tags."""
    out, _ = evaluate("B", benchmark=("vstar",), bare=True, max_new_tokens=4)
    (record,) = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
    assert record["score"] == 1 and record["target_attn"] > 0


def test_missing_videos_are_named_and_counted(evaluate, root, tmp_path):
    place = tmp_path / "lmms-lab--NExTQA"
    shutil.copytree(root / place.name, place)
    table = pyarrow.Table.from_pylist([NEXT, NEXT | {"video": 4011}])
    parquet.write_table(table, place / "MC/test-00000-of-00001.parquet")
    fields = {"benchmark": ("nextqa",), "benchmark_root": str(tmp_path)}
    with pytest.raises(UsageError, match=r"--max-skipped 0\.01: 1 of .*'4011\.mp4'"):
        evaluate("<answer>D</answer>", **fields)
    out, _ = evaluate("<answer>D</answer>", **fields, max_skipped=0.5)
    assert "NExT-QA, %: 100.0 (rows 1 of 8,564)" in (out / "table.txt").read_text()
    assert "4011.mp4" in (out / "skipped.jsonl").read_text()


def test_evaluations_stand_side_by_side(evaluate, tmp_path, monkeypatch, capsys):
    drawn, errorbar = [], Axes.errorbar

    def keep(axis, *values, label, **options):
        drawn.append((label, *values[:2]))
        return errorbar(axis, *values, label=label, **options)

    fields = {"benchmark": ("mvbench",), "frames": (2, 4)}
    right, _ = evaluate("<answer>C</answer>", **fields)
    wrong, _ = evaluate("<answer>A</answer>", **fields)
    monkeypatch.setattr(Axes, "errorbar", keep)
    both = {"compare": (str(right), str(wrong))}
    eval.main(eval.Args(**both, out=str(tmp_path / "both")))
    assert drawn == [
        (f"evaluation {right}", (2, 4), (1, 1)),
        (f"evaluation {wrong}", (2, 4), (0, 0)),
    ]
    table = (tmp_path / "both" / "table.md").read_text()
    assert table in capsys.readouterr().out
    for out, number in ((right, "100.0"), (wrong, "0.0")):
        for frames in (2, 4):
            cell = f"{number} (rows 2 of 4,000)"
            assert f"| {out}, frames {frames} |  |  |  |  |  | {cell} |  |" in table
    assert "| RAL (paper) | 60.1 | 74.1 |" in table and "V*" not in table
    with pytest.raises(UsageError, match="is not an output directory of eval"):
        eval.main(eval.Args(compare=(str(tmp_path),), out=str(tmp_path / "more")))
    with pytest.raises(UsageError, match="another program's evaluation"):
        eval.main(eval.Args(**both, out=str(right)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"benchmark": ("vstarr",)}, "--benchmark vstarr: known are all, images, videos, vstar"),
        ({"benchmark": ("blink",), "data": ("x.json",)}, "give one of them"),
        ({"bare": True}, "--bare: needs --benchmark"),
        ({"benchmark": ("mme",), "text_only": True}, "--text-only: not with --benchmark"),
        ({"model": None}, "--model: is missing"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(fields, words):
    with pytest.raises(UsageError, match=words):
        eval.Args(**{"model": "m"} | fields)


def test_groups_stand_for_the_papers_tables():
    assert benchmarks.chosen(["blink", "all"])[0] == "blink"
    assert len(benchmarks.chosen(["images", "vstar"])) == 8 and len(GROUPS["videos"]) == 7
    assert {len(row.split()) for row in PAPER.values()} == {len(BENCHMARKS)}
