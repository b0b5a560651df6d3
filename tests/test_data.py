"""Data files: every layout is understood, every bad row is named, and what is read does not depend
on who reads it."""

import io
import json
import multiprocessing
import os
import tracemalloc
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from real import write_rows, write_video

import sft
from common import accuracy
from support import data, datafiles, media, states
from support.answers import option_texts
from support.data import BadRows
from support.prompts import Media, Prompt, PromptConfig, split_turn
from support.ranks import UsageError, print_once

DataFile = partial(datafiles.DataFile, text_only=True)
ROW = {
    "problem": "What is it?",
    "data_type": "image",
    "path": "a.png",
    "problem_type": "free-form",
    "solution": "<answer>a cat</answer>",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Arrow copies of Parquet files are kept here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        datasets.disable_progress_bars()
        yield


def open_rows(tmp_path, content: str | bytes) -> datafiles.DataFile:
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return DataFile(str(path))


def png(size=(40, 30), colour="red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def sizes(example) -> list[tuple[int, int]]:
    return [medium.frames[0].size for medium in example.media]


def test_a_row_reads_as_written(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    fields = {"options": ["A. x", "B. y"], "data_source": "s", "process": "<think>t</think>"}
    example = open_rows(tmp_path, json.dumps(ROW | fields)).example(0)
    assert (example.problem, example.solution) == ("What is it?", "a cat")
    assert (example.problem_type, example.options) == ("free-form", ("A. x", "B. y"))
    assert (example.source, example.response) == ("s", "<think>t</think>")
    assert example.name == "rows.json row 1"
    (medium,) = example.media
    assert not medium.is_video and medium.frames[0].size == (40, 30)


# 1. JSON

texts = st.text(st.characters(codec="utf-8"), max_size=20)
values = st.one_of(texts, st.integers(), st.none(), st.lists(texts, max_size=3))
values = st.one_of(values, st.dictionaries(texts, values, max_size=2))
rows = st.lists(st.dictionaries(texts, values, max_size=5), min_size=1, max_size=8)


@settings(deadline=None, max_examples=100)
@given(rows, st.sampled_from([None, 0, 2]), st.booleans(), st.booleans())
def test_every_row_is_found_in_every_layout(tmp_path_factory, rows, indent, ascii, mark):
    folder = tmp_path_factory.mktemp("layout")
    rows = [row | {"problem": "", "solution": ""} for row in rows]
    for text in (
        json.dumps(rows, indent=indent, ensure_ascii=ascii),
        "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows),
        "\r\n\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows) + "\n",
    ):
        file = open_rows(folder, text.encode("utf-8-sig" if mark else "utf-8"))
        assert [file.fields(row) for row in range(len(file))] == rows


def test_a_broken_line_is_a_row_with_its_line(tmp_path):
    good = '{"problem": "p", "solution": "s"}'
    long = json.dumps({"problem": "p" * 3 * 2**20, "solution": "s"})
    file = open_rows(tmp_path, "\n\n".join([good, '{"a": }', good, "[1]", good, long, good]))
    reasons = {}
    for row in range(len(file)):
        try:
            file.example(row)
        except media.BadRow as error:
            reasons[file.place(row)] = str(error)
    assert list(reasons) == [f"rows.json row {n} (line {2 * n - 1})" for n in (2, 4, 6)]
    assert [
        words in reason
        for words, reason in zip(
            (
                "cannot be read (Expecting value: line 1 column 7",
                "is not a JSON object",
                "is longer than 1,048,576 bytes",
            ),
            reasons.values(),
            strict=True,
        )
    ] == [True] * 3


def test_only_offsets_of_json_lines_are_in_memory(tmp_path):
    good = json.dumps({"problem": "p", "solution": "s"})
    content = f"{good}\n{'a' * 20 * 2**20}\n{good}".encode()
    tracemalloc.start()
    file = open_rows(tmp_path, content)
    with pytest.raises(media.BadRow, match="is longer than"):
        file.example(1)
    assert file.example(2).problem == "p"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20 and list(vars(file.parts[0].rows)) == ["file", "places"]
    assert file.parts[0].rows.places.nbytes == 3 * 2 * 8  # offset and number of each line


ANYTHING_ELSE = [  # what a file is; what its one line says
    (b"", "is empty"),
    (b" \n", "is empty"),
    (b"question,answer\nWhat?,3\n", "begins with b'question,answer"),
    ('{"problem": "p"}'.encode("utf-16"), "begins with b'\\xff\\xfe{"),
    (b"\x80\x04\x95rows", "begins with b'\\x80"),
    (b'{"data": [{"problem": "p", "solution": "s"}]}', "has the columns data; expected a question"),
    (b'{\n"data": [\n{"problem": "p"},\n{"problem": "q"}\n]\n}', "has the columns problem; "),
    (b'{\n"data": [\n]\n}', "row 1 (line 1) cannot be read (Expecting"),
    (b'[{"problem": "p", "answer": 1},\n{"problem": "q",\n}]', "line 3 column 1"),
    (b'[{"problem": "p", "answer": 1}', "line 1 column 31"),
    (b'[{"problem": "p", "answer": 1}]\n\n{"problem": "p"}', "rows.json: Extra data: line 3"),
    (b'[{"problem": "p"},\n"\xff"]', "rows.json: 'utf-8' codec"),
    (b"[" * 100_000, "rows.json: RecursionError: maximum"),
    (b"[]", "has no rows"),
    (b"[1, 2]", "row 1 is not a JSON object"),
    (b"[{}]", "the rows of rows.json are empty"),
    (b'[{"problem": "p"}]', "has the columns problem; expected an answer in solution or answer"),
    (b'[{"caption": "p", "answer": 1}]', "expected a question in problem or question or prompt or"),
    (b"PAR1" * 100, "rows.json: Parquet file size"),
    (b"ARROW1\0\0" * 100, "begins with b'ARROW1"),
    (b"\xff\xff\xff\xff\xff\xff\0\0", "rows.json: Expected to read"),
]


@pytest.mark.parametrize(("content", "words"), ANYTHING_ELSE)
def test_anything_else_is_one_line(tmp_path, content, words):
    with pytest.raises(UsageError) as error:
        open_rows(tmp_path, content)
    message = str(error.value)
    assert message.startswith(f"--data {tmp_path}/rows.json: ") and words in message
    assert "\n" not in message and len(message) < 600


# 2. The layouts of people's data

GEOMETRY = Features(
    {"images": List(datasets.Image()), "problem": Value("string"), "answer": Value("string")}
)


def geometry(count=3) -> datasets.Dataset:
    """Geometry3K as EasyR1 publishes it."""
    row = {"problem": "<image>Find x.", "answer": "2 \\sqrt { 221 }"}
    images = [[{"bytes": png((40 + i, 30)), "path": None}] for i in range(count)]
    return datasets.Dataset.from_list([row | {"images": x} for x in images], features=GEOMETRY)


def write_hub(folder: Path) -> None:
    """The files of a data set as they lie in a repository of the hub."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\n---\n")
    for split, count in (("train", 3), ("test", 2)):
        geometry(count).to_parquet(folder / f"data/{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("layout", ["file", "parts", "split", "saved", "saved split", "arrow"])
def test_geometry3k(tmp_path, layout, capsys):
    name = str(tmp_path / "it[s]")
    (tmp_path / "it[s]").mkdir()
    if layout == "file":
        geometry().to_parquet(name := name + "/train.parquet")
    elif layout == "parts":
        for i in range(3):
            geometry().select([i]).to_parquet(f"{name}/train-{i:05}-of-00003.parquet")
    elif layout == "split":
        write_hub(Path(name) / "x")
        name += ":train"
    elif layout == "saved":
        geometry().save_to_disk(name, num_shards=2)
    elif layout == "saved split":
        datasets.DatasetDict(train=geometry(), test=geometry(1)).save_to_disk(name)
        name += ":train"
    elif layout == "arrow":
        geometry().save_to_disk(name)
        name += "/data-00000-of-00001.arrow"
    capsys.readouterr()
    before = pyarrow.total_allocated_bytes()
    file = datafiles.DataFile(name)
    noted = f"--data {name}: 3 rows, question in problem, answer in answer, also read: images, "
    noted += "not read: nothing; no problem_type: rows with options are multiple choice"
    assert capsys.readouterr().out.startswith(noted)
    examples = [file.example(row) for row in range(3)]
    assert [sizes(example) for example in examples] == [[(40, 30)], [(41, 30)], [(42, 30)]]
    assert {(x.problem, x.solution, x.problem_type, x.response) for x in examples} == {
        ("<image>Find x.", "2 \\sqrt { 221 }", "", None)
    }
    place = {"parts": "it[s]/train-00002-of-00003.parquet row 1"}
    place |= {"split": "it[s]:train/x/data/train-00000-of-00001.parquet row 3"}
    place |= {"saved": "it[s]/data-00001-of-00002.arrow row 1"}
    place |= {"saved split": "it[s]:train/train/data-00000-of-00001.arrow row 3"}
    assert file.place(2) == place.get(layout, f"{Path(name).name} row 3")
    assert pyarrow.total_allocated_bytes() < before + 1000, "the rows are not on disk"


def test_one_split_is_asked_for(tmp_path):
    write_hub(tmp_path / "geometry3k")
    with pytest.raises(UsageError, match="has the splits data/test, data/train; choose, as in"):
        DataFile(str(tmp_path / "geometry3k"))
    with pytest.raises(UsageError, match="has no data files of a split 'dev'"):
        DataFile(f"{tmp_path}/geometry3k:dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="has no data files; expected a JSON array"):
        DataFile(str(tmp_path / "empty"))
    for name in ("missing", "missing:train", "missing/rows.json"):
        with pytest.raises(UsageError, match=f"--data .*{name}: no such file or directory"):
            DataFile(str(tmp_path / name))


def test_a_split_of_a_hub_name_is_chosen_before_anything_is_downloaded(tmp_path, monkeypatch):
    write_hub(tmp_path)
    names = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.parquet"))
    asked = []

    def download(name, repo_type, allow_patterns, ignore_patterns=(), dry_run=False):
        if dry_run:
            return [SimpleNamespace(filename=name, file_size=9) for name in names]
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(datafiles, "snapshot_download", download)
    words = r"has the splits .*; choose, as in owner/set:data/test"
    with pytest.raises(UsageError, match=words):
        DataFile("owner/set")
    assert asked == []
    DataFile("owner/set:test")
    assert asked == [[name for name in names if "test" in name]]


def test_several_splits_or_files_are_one_set(tmp_path):
    """Each with columns of its own; their names are the data source of rows that name none."""
    for folder in ("a", "b"):
        write_hub(tmp_path / "set" / folder)
    rows = [{"question": "p", "answer": "s"}, {"question": "q", "answer": "t", "data_source": "x"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError) as refused:
        DataFile(str(tmp_path / "set"))
    assert len(DataFile(str(refused.value).rpartition("as in ")[2])) == 2
    file = DataFile([f"{tmp_path}/set:train", f"{tmp_path}/x.jsonl"])
    examples = [file.example(row) for row in range(len(file))]
    sources = ["a/data/train"] * 3 + ["b/data/train"] * 3 + ["x.jsonl", "x"]
    assert [example.source for example in examples] == sources
    assert [examples[n].problem for n in (5, 6, 7)] == ["<image>Find x.", "p", "q"]
    shard = "b/data/train-00000-of-00001.parquet"
    places = [f"set:train/{shard} row 3", "x.jsonl row 2 (line 2)"]
    assert [file.place(5), file.place(7)] == places and examples[7].name == "x.jsonl row 2"
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "x.jsonl").write_text((tmp_path / "x.jsonl").read_text())
    file = DataFile([f"{tmp_path}/x.jsonl", f"{tmp_path}/y/x.jsonl"])
    assert len({file.name(row) for row in range(len(file))}) == 4
    with pytest.raises(UsageError, match="has no data files of a split 'train'"):
        DataFile(f"{tmp_path}/x.jsonl:train")


def test_a_hub_name_reads_the_downloaded_files(tmp_path, monkeypatch):
    cached = tmp_path / "datasets--hiyouga--geometry3k"
    write_hub(cached / "snapshots" / "1234")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1234")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    file = DataFile("hiyouga/geometry3k:test")
    assert len(file) == 2 and file.name(1).startswith("geometry3k:test/data/test-00000")
    assert sizes(file.example(1)) == [(41, 30)]
    with pytest.raises(
        UsageError, match=r"cannot download hiyouga/missing: Cannot find .*check the name, the netw"
    ):
        DataFile("hiyouga/missing")


def test_multimodal_open_r1(tmp_path):
    problem = "In triangle ABC, what is x?\nOptions: A. 3 B. 4\nAnswer with the letter."
    solution = "<think>3 + 1 = 4.</think>\n\n<answer> B </answer>"
    row = {
        "problem": problem,
        "solution": solution,
        "original_answer": "B",
        "original_question": "x",
    }
    features = {name: Value("string") for name in row} | {"image": datasets.Image()}
    rows = [row | {"image": {"bytes": png(), "path": None}}]
    rows = datasets.Dataset.from_list(rows, features=Features(features))
    rows.to_parquet(tmp_path / "r1.parquet")
    example = DataFile(str(tmp_path / "r1.parquet")).example(0)
    assert (example.problem, example.solution, example.problem_type) == (problem, "B", "")
    assert example.response == "<think>3 + 1 = 4.</think>" and sizes(example) == [(40, 30)]


def test_llava_and_messages(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    asked, told = "<image>\nWhat colour is the bus?", "White and red"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": asked[7:]}]
    parts = [{"role": "user", "content": parts}]
    parts += [{"role": "assistant", "content": [{"type": "text", "text": told}]}]
    no_image = [{"type": "image"}, {"type": "text", "text": asked[7:]}]
    for row in (
        {"id": "1", "image": "a.png", "conversations": turns},
        {"messages": messages, "images": ["a.png"]},
        {"messages": parts},
        {"prompt": [{"role": "user", "content": no_image}], "image": "a.png", "answer": told},
    ):
        example = open_rows(tmp_path, json.dumps([row])).example(0)
        assert (example.problem, example.solution) == (asked, told) and sizes(example) == [(40, 30)]
    for wrong, words in (
        (turns * 2, "has the turns \\['human', 'gpt', 'human', 'gpt'\\]; expected one of user"),
        (
            [{"role": "system", "content": "Be brief."}, *messages],
            "has the turns \\['system', 'user',",
        ),
        (turns[1:], "has the turns \\['gpt'\\]"),
        ([], "has the turns \\[\\];"),
        ([None], "a turn without a role or a text"),
        ([{"from": ["human"]}], "has the turns"),
        ([{"from": "\ud83d"}], "has the turns"),
        ([{"from": "human", "value": {"a": "b"}}], "without a role or a text"),
        ([{"from": "human", "value": [{"type": "audio"}]}], "without a role or a text"),
        ([{"from": "human", "value": ["a"]}], "without a role or a text"),
    ):
        file = open_rows(tmp_path, json.dumps([{"image": "a.png", "conversations": wrong}]))
        with pytest.raises(media.BadRow, match=words) as reason:
            file.example(0)
        assert str(reason.value).encode()  # can be printed


def test_video_r1_mixed_with_columns_that_others_have(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png())
    write_video(tmp_path / "v.mp4", 4)
    rows = [
        ROW | {"data_type": "video", "path": "./v.mp4"},
        {"question": "q", "choices": ["red", "blue"], "ground_truth": "blue", "path": "v.mp4"},
        {"question": "q", "ground_truth": 3, "path": ["a.png", "v.mp4"]},
        {"question": "q", "ground_truth": 0.5, "videos": ["v.mp4"], "image": "a.png"},
        {"question": "q", "ground_truth": "3", "image": None, "videos": [], "path": ""},
    ]
    lines = "\n".join(map(json.dumps, rows[1:]))
    file = open_rows(tmp_path, lines)
    assert (
        "question in question, answer in ground_truth, also read: choices, image, path, videos, not"
        in capsys.readouterr().out
    )
    examples = [open_rows(tmp_path, json.dumps(rows[0])).example(0)]
    whole = open_rows(tmp_path, json.dumps(rows[1:]))
    assert (
        whole.example(0).solution == "B" and whole.parts[0].rows == rows[1:]
    )  # reading changes nothing
    file = open_rows(tmp_path, lines)
    examples += [file.example(row) for row in range(4)]
    kinds = [["video" if x.is_video else "image" for x in example.media] for example in examples]
    assert kinds == [["video"], ["video"], ["image", "video"], ["image", "video"], []]
    types = [(example.problem_type, example.solution) for example in examples]
    assert types[1:] == [("multiple choice", "B"), ("", "3"), ("", "0.5"), ("", "3")]


def test_markers_place_the_media(tmp_path):
    (tmp_path / "a.png").write_bytes(png((10, 20)))
    (tmp_path / "b.png").write_bytes(png((30, 20)))
    write_video(tmp_path / "v.mp4", 4)
    row = {"answer": "1", "images": ["a.png", "b.png"], "video": "v.mp4"}

    def read(problem, **fields):
        file = open_rows(tmp_path, json.dumps([row | {"problem": problem} | fields]))
        example = file.example(0)
        parts = split_turn(PromptConfig({}), example)
        assert [part for part in parts if isinstance(part, Media)] == example.media
        return sizes(example)

    assert read("Compare.") == [(10, 20), (30, 20), (64, 48)]
    assert read("<image><video> or <image>?") == [(10, 20), (64, 48), (30, 20)]
    options = ["A. <image>", "B. <image>"]
    assert read("Is <video> in", options=options, answer="B") == [(64, 48), (10, 20), (30, 20)]
    for problem in ("<image>?", "<image><image>?", "<image><video>?", "<image><image><image>?"):
        with pytest.raises(ValueError, match=r"text has the markers <image>.* but the media are"):
            read(problem)
    with pytest.raises(
        ValueError, match="the text has the markers <image>, but the media are none"
    ):
        read("<image>?", images=[], video=None)


def stored(folder, size=(40, 30), box=(30, 2, 36, 12), **options) -> Path:
    """An image whose stored pixels are red in the box."""
    picture = Image.new("RGB", size)
    picture.paste("red", box)
    path = folder / f"{len(list(folder.iterdir()))}.{options.pop('format', 'png')}"
    picture.save(path, **options)
    return path


def painted(box, medium) -> bool:
    """Whether the upright picture is red in the box alone."""
    corners = [box.left, box.top, box.right, box.bottom]
    assert all(x == round(x) for x in corners)
    expected = Image.new("L", medium.size)
    expected.paste(1, tuple(map(int, corners)))
    return all(
        np.array_equal(np.asarray(frame)[..., 0] > 128, np.asarray(expected))
        for frame in medium.frames
    )


@pytest.mark.parametrize("format", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are unknown
def test_a_box_follows_its_picture_as_that_is_turned_upright(tmp_path, format, orientation):
    options = {"lossless": True} if format == "webp" else {"quality": 100, "subsampling": 0}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = stored(tmp_path, format=format, exif=exif, **options)
    row = {"question": "q", "answer": "a", "bbox": [30, 2, 36, 12]}
    (one,) = (
        example := open_rows(tmp_path, json.dumps([row | {"image": path.name}])).example(0)
    ).boxes
    assert painted(one, example.media[0])
    assert example.media[0].size == ((30, 40) if 5 <= orientation <= 8 else (40, 30))
    row |= {"video": [path.name] * 3, "bbox_format": "xywh", "bbox": [30, 2, 6, 10]}
    (two,) = (example := open_rows(tmp_path, json.dumps([row])).example(0)).boxes
    assert two == one and example.media[0].is_video and painted(two, example.media[0])


@pytest.mark.parametrize("kind", ["json", "arrow"])
def test_boxes_are_read_in_every_form(tmp_path, capsys, kind):
    box, other, third = (30, 2, 36, 12), (0, 0, 5, 5), (39, 28, 40, 30)
    names = [stored(tmp_path, box=x).name for x in (box, other, third)]
    write_video(tmp_path / "v.mp4", 20)
    row = {"question": "q", "answer": "a"}

    def read(**fields):
        """Of each box: whether it fits its medium (None: a video), its medium, its time."""
        file = row | {"images": names[:1]} | fields
        file = (
            open_arrow(tmp_path, file)
            if kind == "arrow"
            else open_rows(tmp_path, json.dumps([file]))
        )
        example = file.example(0)
        assert not example.extra
        media = [example.media[x.medium] for x in example.boxes]
        fits = [m.is_video or painted(x, m) for x, m in zip(example.boxes, media, strict=True)]
        assert all(fits)
        return [(x.medium, x.start, x.end) for x in example.boxes]

    always = (0, 0, np.inf)
    for fields in (
        {"bbox": box},
        {"bbox": [30.0, 2.0, 36.0, 12.0], "bbox_format": None},
        {"bbox": {"bbox": box}},
        {"bboxes": [box], "bbox": None},
        {"bboxs": [[box]], "bbox": []},
        {"bboxes": [{"bbox": [30, 2, 6, 10], "end": None}], "bbox_format": "xywh"},
        {"bbox": [-1, -0.5, 41, 31], "images": [stored(tmp_path, box=(0, 0, 40, 30)).name]},
    ):
        assert read(**fields) == [always]
    assert "also read: bbox_format, bboxes, images, not read: nothing" in capsys.readouterr().out
    assert read(bboxes=[box, box]) == [always] * 2
    assert read(bboxes=[]) == read(bboxes=[[]]) == read(bbox=None) == []
    several = {"images": names, "bboxes": [[box], [], [third, third]]}
    for none in ([], None):
        several["bboxes"][1] = none
        assert read(**several) == [always, (2, 0, np.inf), (2, 0, np.inf)]
    times = [[], [{"bbox": [0, 0, 9, 9], "start": 1, "end": 1.5}]]  # listed: image, video
    text = {"question": "<video> or <image>?", "video": "v.mp4"}
    assert read(**text, bboxes=times) == [(0, 1, 1.5)]
    assert read(**text, bboxes=[[{"bbox": box}], []]) == [(1, 0, np.inf)]


scalars = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(0, 40), st.text(max_size=2))
nested = st.recursive(
    st.one_of(scalars, st.lists(st.integers(0, 30), min_size=4, max_size=4)),
    lambda x: (
        st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(["bbox", "start", "end"]), x)
    ),
)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.sampled_from(datafiles.BOX_KEYS), nested, min_size=1), st.integers(0, 2))
def test_anything_may_stand_for_a_box(fields, number):
    """It has boxes inside its media, or is a bad row."""
    picture = Image.new("RGB", (40, 30))
    picture.info["orientation"] = 1
    try:
        for listed in datafiles.listed_boxes(fields, number):
            for item in listed:
                medium = Media([picture], is_video=number == 1)
                box = datafiles.read_box(item, fields.get("bbox_format"), medium, 0)
                assert 0 <= box.left < box.right <= 40 and 0 <= box.top < box.bottom <= 30
    except media.BadRow as error:
        assert len(str(error)) < 300


@pytest.mark.parametrize("orientations", [(None, None), (1, 6)])
def test_frames_turned_otherwise_have_no_boxes(orientations):
    frames = [Image.new("RGB", (30, 30)) for _ in orientations]
    for frame, orientation in zip(frames, orientations, strict=True):
        frame.info["orientation"] = orientation
    with pytest.raises(media.BadRow, match="not turned by quarters, or its frames differ"):
        datafiles.read_box([1, 2, 3, 4], None, Media(frames, is_video=True), 0)


@pytest.mark.parametrize("layout", ["json", "jsonl", "parquet"])
def test_a_file_without_media_is_refused(tmp_path, layout, capsys):
    """As all rows of a benchmark were, whose videos are named in a column that is not read."""
    row = {"question": "What?", "answer": "B", "clip_id": "a7", "where": "clips/a7.mp4"}
    path = tmp_path / f"rows.{layout}"
    if layout == "parquet":
        datasets.Dataset.from_list([row] * 3).to_parquet(path)
    else:
        path.write_text(
            "\n".join([json.dumps(row)] * 3 if layout == "jsonl" else [json.dumps([row] * 3)])
        )
    with pytest.raises(UsageError) as error:
        datafiles.DataFile(str(path))
    note = "question in question, answer in answer, also read: nothing, not read: clip_id, where; "
    words = f"--data {path}: none of the first 3 rows has an image or a video; {note}"
    assert str(error.value).startswith(words)
    assert str(error.value).endswith(", or give --text-only for data without")
    print_once.cache_clear()
    assert len(datafiles.DataFile(str(path), text_only=True)) == 3
    assert f"--data {path}: 3 rows, {note}" in capsys.readouterr().out
    if layout != "parquet":  # a medium that cannot be read is not text
        rows = [row] * 99 + [row | {"path": "missing.png"}]
        path.write_text("\n".join(map(json.dumps, rows)) if layout == "jsonl" else json.dumps(rows))
        assert len(datafiles.DataFile(str(path))) == 100


def test_other_columns_reach_rewards_and_metrics(tmp_path):
    other = {"boxes": [[1, 2, 3, 4]], "about": {"object": "cup", "score": 0.5}, "label": "x"}
    row = {"problem": "p", "answer": "s", "start": None, "long": "a" * 200_000} | other
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    table = {name: [value] for name, value in row.items()}
    thumb = {"path": "a.png", "bytes": png()}
    table |= {"thumbs": [[thumb]], "raw": [b"a"], "cost": [Decimal("1.50")]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    assert DataFile(f"{tmp_path}/rows.json").example(0).extra == other
    more = {"cost": "1.50", "raw": None, "thumbs": [{"path": "a.png", "bytes": None}]}
    assert DataFile(f"{tmp_path}/rows.parquet").example(0).extra == other | more
    assert open_arrow(tmp_path, row).example(0).extra == other


def test_any_answer_of_a_list_is_right(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    row = {"question": "q", "image": "a.png", "label": ["Red.", 3, "<answer>dark red</answer>"]}
    example = open_rows(tmp_path, json.dumps([row])).example(0)
    assert (example.solution, example.also_right) == ("Red.", ("3", "dark red"))
    row = {"question": "q", "choices": ["x", "y", "z"], "answers": ["y", "C"]}
    example = open_rows(tmp_path, json.dumps([row])).example(0)
    assert (example.solution, example.also_right) == ("B", ("C",))


def test_a_repository_of_json_files_is_read(tmp_path, monkeypatch):
    """As V* and MVBench are: their images lie beside, as links to the cache's blobs. Small JSON
    files, which may say more about these, are downloaded, too."""
    cached = tmp_path / "datasets--owner--set"
    folder = cached / "snapshots" / "1234"
    for name in ("refs", "blobs", "snapshots/1234/json"):
        (cached / name).mkdir(parents=True)
    (cached / "refs" / "main").write_text("1234")
    (cached / "blobs" / "5678").write_bytes(png())
    (folder / "a.png").symlink_to("../../blobs/5678")
    for name, answer in (("count", "1"), ("order", "2")):
        row = {"question": "q", "image": "a.png", "answer": answer}
        (folder / "json" / f"{name}.json").write_text(json.dumps([row]))
    asked = []

    def fetch(name, repo_type, allow_patterns, ignore_patterns=(), dry_run=False):
        asked.append((allow_patterns, ignore_patterns))
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*.json")]
        sizes = dict.fromkeys(files, 2**21) | {"sa_1.json": 99, "a/sa[2].json": 2**30}
        files = [SimpleNamespace(filename=name, file_size=sizes[name]) for name in sizes]
        return files if dry_run else str(folder)

    monkeypatch.setattr(datafiles, "snapshot_download", fetch)
    file = datafiles.DataFile("owner/set:json")
    wanted, ignored = asked[1]
    assert wanted[:2] == ["json/count.json", "json/order.json"]
    assert {"*.png", "*.JPG", "*.mov", "*.json"} <= {*wanted} and ignored == ["a/sa[[]2].json"]
    assert [sizes(file.example(row)) for row in range(2)] == [[(40, 30)]] * 2
    assert [file.example(row).source for row in range(2)] == ["json/count", "json/order"]
    assert len(datafiles.DataFile("owner/set:order")) == 1


# 3. Bad rows


@pytest.mark.parametrize(
    ("answer", "solution", "thought"),
    [
        ("<think>So B.</think>\n<answer>B</answer>", "B", "<think>So B.</think>"),
        (
            "<think><answer>A</answer>? No.</think> 42",
            "42",
            "<think><answer>A</answer>? No.</think>",
        ),
        ("<answer>B</answer>", "B", None),
    ],
)
def test_an_answer_may_hold_its_thought(tmp_path, answer, solution, thought):
    for fields in ({}, {"process": " "}):
        row = {"problem": "p", "answer": answer} | fields
        example = open_rows(tmp_path, json.dumps([row])).example(0)
        assert (example.solution, example.response) == (solution, thought)
    example = open_rows(tmp_path, json.dumps([row | {"process": "Mine."}])).example(0)
    assert (example.solution, example.response) == (solution, "Mine.")


CHOICE = {"problem_type": "multiple choice", "options": ["A. red", "B. blue"]}
CLIP = {"path": "whole.mp4", "data_type": "video"}
IMAGES = {"path": None, "data_type": None, "images": [{"bytes": b"", "path": "a.png"}]}
BAD_ROWS = [
    ({"problem": None}, "no text for its question"),
    ({"problem": " "}, "no text for its question"),
    ({"problem": {"a": {"b": "c"}}}, "no text for its question"),
    ({"problem": "a" * 200_000}, "question: 200,000 characters; at most 100,000"),
    ({"solution": []}, "no text for its answer"),
    ({"solution": [["a"]]}, "no text for its answer"),
    ({"solution": "<answer> </answer>"}, "or nothing between the tags"),
    ({"solution": "a" * 20_000}, "answer: 20,000 characters"),
    ({"process": "a" * 60_000}, "thought: 60,000 characters"),
    ({"path": ""}, "has no image in 'path'"),
    ({"path": []}, "has no image in 'path'"),
    ({"path": 3}, "'path' has 3, not the path or bytes"),
    ({"path": [None]}, "'path' has None, not the path or bytes"),
    ({"path": ["a.png"] * 65}, "'path' has 65 files; at most 64"),
    ({"path": [["a.png"]]}, "'path' has a list of 1 files; only a video has"),
    ({"problem_type": "essay"}, "'essay'"),
    ({"problem_type": {"a": 1}}, "is not one of ('multiple choice', "),
    ({"options": "A"}, "options"),
    ({"options": [1]}, "options"),
    ({"options": ["a" * 10_001]}, "options: 10,001 characters"),
    ({"solution": "a</answer>"}, "unpaired answer tag"),
    ({"solution": "<answer>a"}, "unpaired answer tag"),
    ({"solution": float("nan")}, "no text for its answer"),
    ({"solution": float("inf")}, "no text for its answer"),
    (
        CHOICE | {"options": ["2", "0", "1"], "solution": 1},
        "1 is the text of option C or the number",
    ),
    (
        CHOICE | {"options": ["1", "2", "3"], "solution": 2},
        "give a letter, or the text as a string",
    ),
    (CHOICE | {"solution": 1}, "'1' is not one of the options A, B"),
    (CHOICE | {"solution": "green"}, "'green' is not one of the options A, B"),
    (CHOICE | {"solution": "0"}, "'0' is not one of the options A, B"),
    (CHOICE | {"solution": "C"}, "'C' is not one of the options A, B"),
    (CHOICE | {"solution": "A or B"}, "'A or B' is not one of"),
    (CHOICE | {"solution": "B. red"}, "'B. red' is not one of"),
    (CHOICE | {"solution": "C", "problem_type": None}, "'C' is not one of the options"),
    (
        CHOICE | {"options": ["b", "a", "a+b", "2a"], "solution": "a"},
        "is a letter, and the text of option B",
    ),
    (CHOICE | {"options": ["red", "red"], "solution": "red"}, "'red' is not one of"),
    (CHOICE | {"options": ["A. red", "A. blue"]}, "share a letter"),
    (CHOICE | {"options": [str(i) for i in range(27)]}, "more than 26"),
    ({"path": "missing.png"}, "missing.png"),
    ({"path": "../outside.png"}, "is no file under --media-root"),
    ({"path": ["a.png", "../outside.png"]}, "is no file under --media-root"),
    ({"path": "/etc/passwd"}, "is no file under --media-root"),
    ({"path": "link.png"}, "is no file under --media-root"),
    ({"path": "a\0.png"}, "is no file under"),
    ({"path": "a" * 5000}, "is no file under"),
    ({"path": "a." * 2500}, "is no file under"),
    ({"path": "."}, "only a video has a list of frames"),
    ({"path": "pipe"}, "is no file under"),
    ({"path": "http://localhost/a.png"}, "addresses and base64 are not read"),
    ({"path": "iVBORw0KGgo" * 20}, "addresses and base64 are not read"),
    ({"max_pixels": 100}, "max_pixels asks for other pixels or frames"),
    ({"path": "empty.png"}, "not a readable image"),
    ({"path": "cut.png"}, "not a readable image"),
    ({"path": "code.eps"}, "not a readable image"),
    ({"path": "bomb.png"}, "not a readable image"),
    ({"path": "a.png", "data_type": "video"}, "video"),
    ({"path": "empty.png", "data_type": "video"}, "not a video"),
    ({"path": "list.m3u8", "data_type": "video"}, "not a video"),
    ({"path": "list.mp4", "data_type": "video"}, "not a video"),
    ({"path": "list.mp4", "data_type": None}, "not a readable image"),
    ({"path": "cut.mp4", "data_type": "video"}, "not a readable video"),
    ({"path": "whole.mp4"}, "not a readable image"),
    ({"path": "loop"}, "is no file under"),
    ({"path": "float.tiff"}, "mode F"),
    (
        IMAGES | {"images": [{"bytes": None, "path": "../outside.png"}]},
        "is no file under --media-root",
    ),
    (IMAGES | {"images": [{"bytes": None, "path": None}]}, "not the path or bytes"),
    (IMAGES | {"images": {"a": "b"}}, "not the path or bytes"),
    (IMAGES | {"images": [3]}, "'images' has 3, not"),
    (IMAGES | {"images": None, "video": "a.png"}, "a.png: not a video"),
    ({"bbox": [1, 2, 3]}, "box [1, 2, 3] is not four numbers"),
    ({"bbox": [1, 2, 3, None]}, "is not four numbers"),
    ({"bbox": "1, 2, 3, 4"}, "box '1, 2, 3, 4' is not four numbers"),
    ({"bbox": True}, "box True is not four numbers"),
    ({"bbox": [True, True, True, True]}, "is not four numbers"),
    ({"bbox": ["1", "2", "3", "4"]}, "is not four numbers"),
    ({"bbox": [1, 2, 3, float("nan")]}, "nan] is not four numbers"),
    ({"bbox": [1, 2, 3, float("inf")]}, "is not four numbers"),
    ({"bbox": [1, 2, 3, 1e300]}, "is not four numbers"),
    ({"bbox": [1] * 100_000}, "is not four numbers"),
    ({"bboxes": [[[[1, 2, 3, 4]]]]}, "box [[1, 2, 3, 4]] is not four numbers"),
    ({"bbox": {"a": 1}}, "box {'a': 1} is not four numbers"),
    ({"bboxs": [[1, 2, 3, 4], [5, 6]]}, "box [5, 6] is not four numbers"),
    ({"bbox": [20, 20, 10, 10]}, "box [20, 20, 10, 10] has no area, or ends before it starts; [x1"),
    ({"bbox": [20, 20, 20, 25]}, "has no area"),
    ({"bbox": [40, 0, 41, 10]}, "has no area"),
    ({"bbox": [20, 20, 30, 32]}, "leaves its picture of 40 x 30 pixels"),
    ({"bbox": [-2, 0, 30, 30]}, "leaves its picture"),
    ({"bbox": [20, 20, 30, 20], "bbox_format": "xywh"}, "leaves its picture"),
    ({"bbox": [0.1, 0.2, 0.5, 1]}, "has fractions of the picture; pixels are expected"),
    ({"bbox": [1, 2, 3, 4], "bbox_format": "cxcywh"}, "'cxcywh'; known are xyxy and xywh"),
    ({"bbox": [1, 2, 3, 4], "bbox_format": [1]}, "bbox_format is [1]; known are"),
    ({"bboxes": [[[1, 2, 3, 4]], []]}, "bboxes lists the boxes of 2 media, but the row has 1"),
    ({"path": ["a.png"] * 2, "bboxes": [[1, 2, 3, 4]] * 2}, "of 1 media, but the row has 2"),
    (IMAGES | {"images": None, "bbox": [1, 2, 3, 4]}, "of 1 media, but the row has 0"),
    ({"bboxes": [[1, 2, 3, 4]] * 1001}, "bboxes has 1,001 boxes; at most 1,000"),
    (CLIP | {"bbox": {"bbox": [1, 2, 3, 4], "start": 3, "end": 2}}, "ends before it starts"),
    (CLIP | {"bbox": {"bbox": [1, 2, 3, 4], "start": "0:01"}}, "start is '0:01', not a number"),
    (CLIP | {"bbox": {"bbox": [1, 2, 3, 4], "end": float("nan")}}, "end is 'nan', not a number"),
    (CLIP | {"bbox": {"bbox": [1, 2, 3, 4], "start_time": 1}}, "start_time asks for other"),
    ({"bbox": {"bbox": [30, 5, 20, 9], "bbox_format": "xywh"}}, "leaves its picture of 40 x 30"),
    (CLIP | {"bbox": [60, 40, 65, 50]}, "leaves its picture of 64 x 48 pixels"),
]


@pytest.fixture(scope="module")
def media_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outer")
    Image.new("RGB", (40, 30)).save(folder / "outside.png")
    root = folder / "root"
    root.mkdir()
    Image.effect_noise((40, 30), 50).save(root / "a.png")
    (root / "link.png").symlink_to(folder / "outside.png")
    os.mkfifo(root / "pipe")
    (root / "empty.png").touch()
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:100])
    (root / "code.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    (root / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n../outside.mp4\n")
    (root / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n../outside.mp4\n#EXT-X-ENDLIST\n#\0")
    (root / "loop").symlink_to(root / "loop")
    Image.fromarray(np.ones((30, 40), np.float32)).save(root / "float.tiff")
    write_video(root / "whole.mp4", 20)
    whole = (root / "whole.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return root


def open_arrow(folder, *rows) -> datafiles.DataFile:
    """The rows in an Arrow file, which `datasets` reads as it reads Parquet."""
    table = pyarrow.Table.from_pylist(list(rows))
    with pyarrow.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as file:
        file.write_table(table)
    return DataFile(str(folder / "rows.arrow"))


@pytest.mark.parametrize("layout", ["json", "arrow"])
@pytest.mark.parametrize(("fields", "words"), BAD_ROWS)
def test_a_bad_row_says_why(media_dir, layout, fields, words):
    row = ROW | fields
    with pytest.raises(media.BadRow) as reason:
        if layout == "arrow":
            open_arrow(media_dir, row).example(0)
        else:
            for item in row.get("images") or () if isinstance(row.get("images"), list) else ():
                isinstance(item, dict) and item.pop("bytes")
            open_rows(media_dir, json.dumps(row)).example(0)
    assert words in str(reason.value) and len(str(reason.value).encode()) < 400
    assert "BadRow" not in str(reason.value)  # its own reason, not that of another


@pytest.mark.parametrize("field", ["problem", "solution", "process", "options"])
def test_a_lone_surrogate_is_named(media_dir, field):
    value = ["a\ud83d"] if field == "options" else "a\ud83d"
    for name in ("rows.json", "rows.jsonl"):
        (media_dir / name).write_text(json.dumps(ROW | {field: value}))
        with pytest.raises(media.BadRow, match="a lone surrogate"):
            DataFile(str(media_dir / name)).example(0)


def test_bytes_pass_the_checks_of_files(media_dir):
    """Media inside Parquet columns: the same formats, sizes and first bytes as files."""
    reasons = {
        "empty.png": "not the path or bytes",
        "cut.png": "images 1: not a readable image",
        "code.eps": "images 1: not a readable image",
        "bomb.png": "images 1: not a readable image",
        "float.tiff": "images 1: pixels of mode F",
        "whole.mp4": "images 1: not a readable image",
        "list.mp4": "images 1: not a readable image",
    }
    for name, words in reasons.items():
        images = [{"bytes": (media_dir / name).read_bytes(), "path": None}]
        with pytest.raises(media.BadRow, match=words) as reason:
            open_arrow(media_dir, {"problem": "p", "answer": "s", "images": images}).example(0)
        assert "0x" not in str(reason.value)  # the same in every process
    videos = {"cut.mp4": "not a readable video", "list.mp4": "not a video", "a.png": "not a video"}
    for name, words in videos.items():
        row = {"problem": "p", "answer": "s", "video": (media_dir / name).read_bytes()}
        with pytest.raises(media.BadRow, match=f"video 1: {words}"):
            open_arrow(media_dir, row).example(0)


STRINGS = [pyarrow.py_buffer(x) for x in (b"\0\0\0\0\2\0\0\0", b"\xff\xfe")]
STRINGS = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, *STRINGS])  # not UTF-8
FEATURES = {"problem": {"_type": "Image"}, "answer": {"_type": "Audio"}}
HOSTILE = [  # columns; features in the file's metadata; what is said, "" if the row is good
    ({"problem": STRINGS}, None, "Invalid UTF8 sequence"),
    ({"problem": pyarrow.nulls(1)}, None, "has no text for its question"),
    ({"problem": pyarrow.array([b"p"])}, None, "has no text for its question"),
    ({"answer": pyarrow.array([{"a": {"b": 1}}])}, None, "has no text for its answer"),
    ({"images": pyarrow.array([[1, 2]])}, None, "'images' has 1, not the path or bytes"),
    ({"options": pyarrow.array([[[1]]])}, None, "options is not a list of texts"),
    ({"x": pyarrow.array([[("a", 1)]], pyarrow.map_("string", "int8"))}, None, ""),
    ({}, {"problem": {"_type": "os.system"}}, ""),
    ({}, FEATURES, ""),  # nothing is decoded as the file asks
]


@pytest.mark.parametrize(("columns", "features", "words"), HOSTILE)
def test_a_hostile_parquet_file_is_one_line(tmp_path, columns, features, words):
    table = pyarrow.table({"problem": ["p"], "answer": ["s"]} | columns)
    if features is not None:
        asked = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": asked})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    try:
        assert DataFile(str(tmp_path / "rows.parquet")).example(0).problem == "p" and not words
    except (UsageError, media.BadRow) as error:
        assert words and words in str(error) and "\n" not in str(error)


def test_a_changed_data_set_is_noticed(tmp_path):
    """A run is not resumed on other data: the content of its files is compared."""
    write_hub(tmp_path / "hub")
    (tmp_path / "rows.json").write_text("[]")
    args = SimpleNamespace(data=str(tmp_path / "rows.json"), eval_data=f"{tmp_path}/hub:test")
    shards = sorted((tmp_path / "hub" / "data").iterdir())
    before = states.fingerprint_inputs(args)
    rows = f"--data {args.data}"
    assert list(before) == [rows, *(f"--eval-data {path}" for path in shards)]
    (tmp_path / "rows.json").write_text("{}")
    after = states.fingerprint_inputs(args)
    assert [name for name in before if before[name] != after[name]] == [rows]
    args = SimpleNamespace(data="owner/name:train", eval_data=None)
    assert states.fingerprint_inputs(args) == {"--data owner/name:train": "none"}


def test_a_video_in_a_column_reads_like_its_file(media_dir):
    rows = [{"problem": "p", "answer": "s", "video": media_dir / "whole.mp4"}]
    inside = open_arrow(media_dir, rows[0] | {"video": (media_dir / "whole.mp4").read_bytes()})
    inside = inside.example(0).media[0]
    (media_dir / "rows.json").write_text(json.dumps(rows, default=str))
    outside = DataFile(str(media_dir / "rows.json")).example(0).media[0]
    assert inside.is_video and len(inside.frames) == 2  # of two seconds
    assert all(map(np.array_equal, inside.frames, outside.frames))
    assert inside.seconds_per_patch == outside.seconds_per_patch


def test_a_rows_media_are_bounded_together(media_dir, monkeypatch):
    file = open_rows(media_dir, json.dumps(ROW | {"path": ["a.png"] * 3}))
    assert len(file.example(0).media) == 3
    monkeypatch.setattr(media, "MAX_FRAME_BYTES", 3 * 40 * 30 * 3 - 1)
    with pytest.raises(media.BadRow, match="its media take more than 4 GB"):
        file.example(0)


def test_a_gif_is_no_video(tmp_path):
    """The byte at 188 of a GIF may be that of MPEG-TS packets."""
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.gif")
    content = bytearray((tmp_path / "a.gif").read_bytes())
    content[188] = ord("G")
    (tmp_path / "a.gif").write_bytes(content)
    example = open_rows(tmp_path, json.dumps([{"problem": "p", "answer": "s", "path": "a.gif"}]))
    assert not example.example(0).media[0].is_video


LETTERED = ("A. red", "B. blue")
CHOICES = [  # options, solution; options and solution of the example
    (LETTERED, "B", LETTERED, "B"),
    (LETTERED, "b", LETTERED, "B"),
    (LETTERED, "(b)", LETTERED, "B"),
    (LETTERED, "B.", LETTERED, "B"),
    (LETTERED, "Option B", LETTERED, "B"),
    (LETTERED, "<answer> Blue </answer>", LETTERED, "B"),
    (LETTERED, "B. blue", LETTERED, "B"),
    (("red", "blue"), "blue", LETTERED, "B"),
    (("red", "blue"), "B", LETTERED, "B"),
    (("A red", "blue"), "blue", ("A. A red", "B. blue"), "B"),
    (("0", "1"), 0, ("A. 0", "B. 1"), "A"),
    (("2", "0", "1"), "1", ("A. 2", "B. 0", "C. 1"), "C"),
    (("30", "40"), 40, ("A. 30", "B. 40"), "B"),
    (("(A) red", "(C) blue"), "blue", ("(A) red", "(C) blue"), "C"),
    (("a) red", "b) blue"), "blue", ("a) red", "b) blue"), "B"),
    (("A", "B"), "b", ("A", "B"), "B"),
    (("X", "Y"), "Y", ("A. X", "B. Y"), "B"),
    (("A) red", "B) blue"), "B. blue", ("A) red", "B) blue"), "B"),
    (None, "b", (), "B"),
    ((), "(b)", (), "B"),
    ((), "yes", (), "yes"),
]


@pytest.mark.parametrize(("options", "solution", "shown", "letter"), CHOICES)
def test_a_solution_is_the_letter_of_an_option_that_the_prompt_shows(
    media_dir, options, solution, shown, letter
):
    fields = {"problem_type": "multiple choice", "options": options, "solution": solution}
    example = open_rows(media_dir, json.dumps(ROW | fields)).example(0)
    assert (example.options, example.solution) == (shown, letter)
    lines = PromptConfig(sft.PROMPTS).ask(example).splitlines()
    assert all(option in lines for option in shown)


def test_options_of_other_types_stay_as_they_are(media_dir):
    fields = {"options": ["3", "4"], "solution": "4", "problem_type": "numerical"}
    example = open_rows(media_dir, json.dumps(ROW | fields)).example(0)
    assert (example.options, example.solution) == (("3", "4"), "4")


def test_check_data_names_rows_whose_numbers_are_judged_as_text(media_dir, capsys):
    rows = [ROW | {"problem_type": "numerical", "solution": x} for x in ("50%", "2:30", "4,2")]
    rows.append(ROW | CHOICE | {"solution": "green"})
    path = media_dir / "numbers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    args = SimpleNamespace(data=str(path), eval_data=None, media_root=(), frames=None, fps=None)
    vars(args).update(text_only=False, max_prompt_tokens=None, workers=0, max_skipped=1.0)
    args.rows, args.eval_examples = None, 1
    data.check_data(args, encode)
    report = capsys.readouterr().out
    only = "2 solutions are not one number: only identical text is correct"
    assert f"  {only} (example: numbers.jsonl row 2)\n" in report
    assert "bad: numbers.jsonl row 4 (line 4): solution 'green' is not one of the" in report
    args.eval_data = "nowhere.jsonl"
    with pytest.raises(UsageError, match=r"^--eval-data nowhere.jsonl: no such file"):
        data.check_data(args, encode)
    assert capsys.readouterr().out.count("bad:") == 0  # before a row is read
    args.eval_data, args.max_skipped = str(path), 0.1
    with pytest.raises(
        UsageError, match=rf"^--data {path}, --eval-data {path}: more than --max-sk"
    ):
        data.check_data(args, encode)
    assert capsys.readouterr().out.count(": 4 rows, 1 bad") == 2  # both are read before it ends
    args.eval_data, args.max_skipped = None, 1.0
    data.check_data(args, encode, accuracy_rule="exact")
    assert "only identical text" not in capsys.readouterr().out
    args.rows = 1  # and one to evaluate on, of those behind it
    data.check_data(args, encode)
    assert f"--data {path}: 2 rows, " in capsys.readouterr().out
    args.eval_data = str(path)
    data.check_data(args, encode)
    said = capsys.readouterr().out
    assert f"--data {path}: 1 rows, 0 bad" in said and f"--eval-data {path}: 4 rows, 1 bad" in said


pieces = ["A", "b", "A. ", "(b)", "red", "blue", " ", "<answer>", "</answer>", "½", "42", "%", "**"]
field_texts = st.lists(st.one_of(st.sampled_from(pieces), st.text(max_size=3)), max_size=5)
field_texts = field_texts.map("".join)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(datafiles.PROBLEM_TYPES),
    st.one_of(field_texts, st.integers(), st.floats(), st.booleans(), st.lists(field_texts)),
    st.lists(field_texts, max_size=4),
)
def test_a_row_earns_its_own_reward_or_is_bad(tmp_path_factory, kind, solution, options):
    fields = ROW | {"problem_type": kind, "solution": solution, "options": options}
    fields = dict.fromkeys(datafiles.COLUMNS) | fields
    try:
        example = datafiles.read_example(fields)
    except media.BadRow:
        return
    for right in (example.solution, *example.also_right):
        assert accuracy(f"<answer>{right}</answer>", example) == 1
        assert accuracy(f"<answer>{right}</answer>", example, "exact") == 1
    if kind == "multiple choice" and options:
        assert example.solution in option_texts(example.options)
        assert option_texts(example.options).keys() == option_texts(options).keys()
    assert accuracy("<answer></answer>", example) == 0


def test_a_link_into_another_root_is_followed(media_dir):
    path = media_dir / "rows.jsonl"
    path.write_text(json.dumps(ROW | {"path": "link.png"}))
    roots = [str(media_dir), str(media_dir.parent)]
    assert sizes(DataFile(str(path), roots).example(0)) == [(40, 30)]


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert media.read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_and_a_turned_camera(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    grey = np.asarray(media.read_image(tmp_path / "a.png"))[..., 0].astype(int)
    assert np.abs(grey - ramp // 257).max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (80, 40)).save(tmp_path / "b.jpg", exif=exif)
    assert media.read_image(tmp_path / "b.jpg").size == (40, 80)
    Image.fromarray(ramp[:4]).save(tmp_path / "c.png", exif=exif)  # both
    turned = np.asarray(media.read_image(tmp_path / "c.png"))[..., 0].astype(int)
    assert np.abs(turned - np.rot90(ramp[:4] // 257, -1)).max() <= 1


@settings(deadline=None)
@given(
    st.integers(1, 5000),
    st.floats(1, 120),
    st.one_of(st.none(), st.integers(1, 300)),
    st.one_of(st.none(), st.floats(0.1, 60)),
)
def test_frame_indices(total, rate, frames, fps):
    indices = media.frame_indices(total, rate, frames, fps)
    assert indices == sorted(set(indices)) and 0 == indices[0] <= indices[-1] < total
    most = min(total, frames or media.MAX_FRAMES)
    assert len(indices) <= most
    if fps is None:
        assert len(indices) == most
    elif total / rate * fps >= 2:
        wanted = min(total / rate * fps, most)
        assert abs(len(indices) - wanted) <= 0.5
    if len(indices) > 1:
        assert indices[-1] == total - 1
        steps = np.diff(indices)
        assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize(
    ("frames", "fps", "expected"), [(4, None, [0, 8, 16, 24]), (2, 2, [0, 24])]
)
def test_a_video_gives_the_frames_asked_for(tmp_path, frames, fps, expected):
    write_video(tmp_path / "v.mp4", 25, rate=10)
    video = media.read_video(tmp_path / "v.mp4", frames, fps)
    levels = [np.asarray(picture).mean() for picture in video.frames]
    assert np.abs(np.array(levels) - [4 + 8 * i for i in expected]).max() < 4
    gap = (expected[-1] - expected[0]) / 10 / (len(expected) - 1)
    assert video.seconds_per_patch == pytest.approx(2 * gap)  # a temporal patch has two frames


def test_fps_alone_takes_frames_at_that_rate(tmp_path):
    write_video(tmp_path / "v.mp4", 25, rate=10)
    video = media.read_video(tmp_path / "v.mp4", None, 4.0)
    assert len(video.frames) == 10 and video.seconds_per_patch == pytest.approx(2 * 2.4 / 9)


def test_without_pyav_a_video_is_a_bad_row(media_dir, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(media.BadRow, match=r"ModuleNotFoundError: import of av halted"):
        media.read_video(media_dir / "whole.mp4", 2, None)


# 4. Order


class Rows:
    """A source in which every fifth row is bad."""

    def __len__(self):
        return 50

    def example(self, row):
        if row % 5 == 0:
            raise media.BadRow("is a multiple of 5")
        return data.Example(str(row), "", [Media([Image.new("RGB", (4, 4))])])

    def place(self, row):
        return f"row {row}"


def encode(example):
    ids = torch.tensor([int(example.problem) if example.problem.isdigit() else 0])
    return Prompt(ids, torch.zeros(3, 1), [], example)


def read(workers=0, seed=1, count=100, most=1.0):
    prompts = data.Prompts(Rows(), encode, np.arange(50), seed)
    bad_rows = BadRows(most, 50)
    reader = data.Reader(prompts, range(count), workers, bad_rows)
    return [int(prompt.ids) for prompt in reader], bad_rows


def test_an_epoch_has_every_good_row_and_others_for_the_bad_ones():
    numbers, bad_rows = read()
    good = {n for n in range(50) if n % 5}
    for epoch in (numbers[:50], numbers[50:]):
        assert set(epoch) == good and len(epoch) == 50
    assert numbers[:50] != numbers[50:]
    assert set(bad_rows.bad) == {f"row {n}" for n in range(0, 50, 5)}


def test_what_is_read_depends_on_the_seed_and_the_number_alone():
    numbers, bad_rows = read()
    others, same = read(workers=2)
    assert numbers == others and bad_rows.bad == same.bad
    assert read(seed=2)[0] != numbers
    prompts = data.Prompts(Rows(), encode, np.arange(50), 1)
    for n in (99, 3, 50, 17):  # in any order
        assert int(prompts[n][0].ids) == numbers[n]


def test_too_many_bad_rows_stop_the_run(tmp_path):
    with pytest.raises(
        UsageError, match=r"--max-skipped 0.1: 6 of the first \d+ rows cannot be used"
    ):
        read(most=0.1)
    bad_rows = BadRows(0.01, 100_000)
    for n in range(10):
        bad_rows.add({f"row {n}": "x"})  # 1% of the first 1,000 rows
        bad_rows.add({f"row {n}": "x"})  # met again, counted once
    with pytest.raises(UsageError):
        bad_rows.add({"row 10": "x"})
    with pytest.raises(UsageError, match="1 of the first 1 rows"):
        BadRows().add({"row 0": "x"}, good=0)


def test_half_a_character_in_a_name_is_recorded(tmp_path):
    """As the name of a file on disk may have it."""
    with (tmp_path / "skipped.jsonl").open("ab", buffering=0) as file:
        for _ in range(2):
            bad_rows = BadRows(1.0)
            bad_rows.attach(file)
            bad_rows.add({"a\udcff.json row 1": "\ud83d"})
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line) == {"row": "a\udcff.json row 1", "reason": "\ud83d"}


def test_a_missing_library_is_told_from_a_worker_too(monkeypatch):
    def fail(self, row):
        raise UsageError("pip install it")

    monkeypatch.setattr(Rows, "example", fail)
    for workers in (0, 1):
        with pytest.raises(UsageError, match=r"^pip install it$"):
            read(workers=workers)
    assert not multiprocessing.active_children()  # though the error keeps the reader


def test_the_generated_rows_are_what_they_should_be(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(write_rows(tmp_path), indent=1))
    file = DataFile(str(tmp_path / "rows.json"), frames=4)
    bad = []
    for row in range(len(file)):
        try:
            example = file.example(row)
            assert len(example.media) == 1
        except media.BadRow:
            bad.append(row)
    assert len(file) == 20 and bad == [14, 19]
    assert [len(file.example(row).media[0].frames) for row in (15, 16, 17, 18)] == [1, 4, 4, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_media_travel_only_where_they_are_asked_for(tmp_path, workers):
    rows = [
        {"problem": str(n), "answer": "s", "images": [{"bytes": png(), "path": None}]}
        for n in range(20)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    args = SimpleNamespace(
        data=str(tmp_path / "rows.parquet"), eval_data=None, media_root=(), frames=None
    )
    vars(args).update(
        fps=None, text_only=False, max_prompt_tokens=None, workers=workers, max_skipped=0.0, seed=1
    )
    args.eval_examples, args.rows = 2, None
    seen = {}
    for keep_media in (False, True):
        train, held_out = data.open_data(args, encode, keep_media=keep_media)
        stream = train.begin(1, 1)
        prompts = [next(stream) for _ in range(18)]
        del stream
        seen[keep_media] = [prompt.example.problem for prompt in prompts]
        media = [prompt.example.media[0] for prompt in prompts]
        assert {medium.size for medium in media} == {(40, 30)}
        assert {hasattr(medium, "frames") for medium in media} == {keep_media}
        if not keep_media:
            with pytest.raises(AttributeError, match="pass keep_media=True to prepare"):
                len(media[0].frames)
        assert [len(prompt.example.media[0].frames) for prompt in held_out] == [1, 1]
    assert seen[False] == seen[True]
    order = np.random.default_rng([1, 0]).permutation(train.prompts.rows)
    assert seen[True] == [str(row) for row in order]


def test_check_data_counts_media_and_problem_types(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png())
    write_video(tmp_path / "v.mp4", 4)
    row = {"question": "1", "answer": "2"}
    rows = [row | {"image": "a.png"}] * 2 + [row | {"video": "v.mp4"}, row, row]
    rows += [row | {"path": ["a.png", "v.mp4"]}, row | {"choices": ["1", "2"], "image": "a.png"}]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, row | {"image": "b.png"}]))
    args = SimpleNamespace(
        data=str(tmp_path / "rows.json"), eval_data=None, media_root=(), frames=2
    )
    vars(args).update(fps=None, text_only=False, max_prompt_tokens=None, workers=1, max_skipped=0.2)
    args.rows = None
    data.check_data(args, encode)
    lines = capsys.readouterr().out.splitlines()[-8:]
    assert [line.rsplit(maxsplit=1) for line in lines[1:7]] == [
        ["  image, multiple choice", "1"],
        ["  image, no problem type", "2"],
        ["  several, no problem type", "1"],
        ["  text, no problem type", "2"],
        ["  video, no problem type", "1"],
        ["  with boxes", "0"],
    ]
    assert lines[0] == f"--data {args.data}: 8 rows, 1 bad"


@pytest.mark.parametrize("options", [None, []])
def test_a_choice_without_options_is_asked_by_its_letter(tmp_path, options):
    """As the training files have them where the options stand in the question."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    row = {"problem": "Which? A. x B. y", "path": "a.png", "data_type": "image", "options": options}
    row |= {"problem_type": "multiple choice", "solution": "<answer>B</answer>"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    example = DataFile(str(tmp_path / "rows.json")).example(0)
    assert (example.options, example.solution) == ((), "B")


def test_a_file_under_a_later_root_is_found_behind_a_folder_of_its_name(tmp_path):
    """A folder is a video's frames, in the order of their numbers and without hidden files."""
    roots = [tmp_path.resolve() / name for name in ("first", "second")]
    (roots[0] / "a").mkdir(parents=True)
    for name in ("10.png", "2.png", ".DS_Store"):
        (roots[0] / "a" / name).touch()
    roots[1].mkdir()
    (roots[1] / "a").touch()
    assert datafiles.find_medium("a", roots) == roots[1] / "a"
    frames = datafiles.find_medium("a", roots[:1])
    assert frames == [str(roots[0] / "a" / name) for name in ("2.png", "10.png")]
