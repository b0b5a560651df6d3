"""Rows that name a part of a video or its frames, and prompts that cannot be made of a row."""

import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from test_media import level, seen, write

from support import data
from support.datafiles import DataFile
from support.media import BadRow
from support.prompts import Example, Media, PromptConfig, encode_prompt
from support.ranks import print_once

ROW = {"problem": "p", "answer": "a"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video of 60 frames, ten a second, images of its first eight, and a folder of more."""
    folder = tmp_path_factory.mktemp("clips")
    write(folder / "v.mp4", "libx264")
    (folder / "frames").mkdir()
    for i in range(12):
        path = folder / f"{i}.png" if i < 8 else folder / "frames" / f"{i}.png"
        Image.new("L", (64, 48), level(i)).save(path)
    return folder


def videos(folder, row, **options) -> list[list[int]]:
    """The numbers of the frames of each video of a row."""
    (folder / "rows.jsonl").write_text(json.dumps(ROW | row))
    file = DataFile(str(folder / "rows.jsonl"), **options)
    return [seen(medium.frames) for medium in file.example(0).media if medium.is_video]


CLIP = {"video": "v.mp4", "video_start": 2, "video_end": 4}
TURN = {"type": "video", "video": "v.mp4", "video_start": 2.0, "video_end": 4}
FRAMES = [f"{i}.png" for i in range(8)]
ROWS = [
    (CLIP, [20, 30, 40]),
    ({"path": "v.mp4", "data_type": "video", "start": 2, "end": 4}, [20, 30, 40]),
    ({"videos": [{"path": "v.mp4", "start": 2}]}, [20, 40, 59]),
    (
        {"problem": [{"role": "user", "content": [TURN, {"type": "text", "text": "p"}]}]},
        [20, 30, 40],
    ),
    (CLIP | {"nframes": 2}, [20, 40]),
    (CLIP | {"fps": 1.0}, [20, 40]),
    ({"video": "v.mp4", "start": None, "end": None, "fps": None}, [0, 30, 59]),
    ({"video": FRAMES}, [0, 4, 7]),
    ({"videos": [FRAMES[:2]]}, [0, 1]),
    ({"video": {"path": FRAMES, "sample_fps": 2.0, "start": 1, "end": 2}}, [2, 3, 4]),
    ({"video": FRAMES, "fps": 4, "end": 0.5}, [0, 1, 2]),
    ({"video": "frames", "fps": 4, "end": 0.5}, [8, 9, 10]),
    ({"video": {"path": "frames"}}, [8, 10, 11]),
]


@pytest.mark.parametrize(("row", "expected"), ROWS)
def test_the_frames_that_a_row_names(folder, row, expected):
    assert videos(folder, row, frames=3) == [expected]


@pytest.mark.parametrize("row", [CLIP | {"nframes": 5}, {"video": FRAMES, "nframes": 5}])
def test_a_number_of_frames_takes_the_place_of_a_frame_a_second(folder, row):
    assert [len(frames) for frames in videos(folder, row)] == [5]


def test_each_video_has_its_own_clip(folder):
    two = [{"path": "v.mp4", "start": 0, "end": 1}, {"path": "v.mp4", "start": 5, "end": 5.5}]
    assert videos(folder, {"videos": two}, frames=2) == [[0, 10], [50, 55]]
    two = [{"path": FRAMES[:2]}, {"path": FRAMES[4:6]}]
    assert videos(folder, {"videos": two}) == [[0, 1], [4, 5]]
    assert videos(folder, {"videos": ["frames", "v.mp4"]}, frames=2) == [[8, 11], [0, 59]]


def test_the_note_says_what_chooses_frames(folder, capsys):
    print_once.cache_clear()
    videos(folder, CLIP)
    assert "also read: video, video_end, video_start, not read: nothing" in capsys.readouterr().out


def test_the_note_names_columns_that_are_not_read(tmp_path, capsys):
    row = ROW | {"where": "a/0.PNG", "video_path": "v.mp4", "answer_options": ["red", "blue"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    table = pyarrow.table({key: [value] for key, value in row.items()} | {"thumb": [b"x"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for name, thumb in (("rows.jsonl", ""), ("rows.parquet", "thumb, ")):
        DataFile(str(tmp_path / name))
        noted = f"also read: video_path, not read: answer_options, {thumb}where; no problem_type"
        assert noted in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"image_list": ["0.png"]}, "image"),
        ({"video_path": "v.mp4"}, "video"),
        ({"image_1": None, "image_2": {"path": "0.png"}, "image": None}, "image"),
    ],
)
def test_more_names_of_columns(folder, fields, expected, capsys):
    row = {"text": "p", "label": "blue", "candidates": ["red", "blue"]} | fields
    (folder / "rows.jsonl").write_text(json.dumps(row))
    table = pyarrow.table({key: [value] for key, value in row.items()})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        print_once.cache_clear()
        example = DataFile(str(folder / name)).example(0)
        noted = capsys.readouterr().out
        assert "not read: nothing" in noted
        assert (example.problem, example.solution) == ("p", "B")
        assert [medium.kind for medium in example.media] == [expected]


BAD = [
    (CLIP | {"video_start": "00:02"}, "video_start is '00:02', not a number"),
    (CLIP | {"video_end": float("inf")}, "video_end is 'inf', not a number"),
    (CLIP | {"video_start": -1}, "video_start is '-1', not a number"),
    (CLIP | {"nframes": 2.5}, "nframes is '2.5', not a number of seconds or frames"),
    (CLIP | {"fps": 0}, "fps is '0', not a number"),
    (CLIP | {"video_end": 1}, "has no frame from 2 to 1 seconds"),
    ({"videos": ["v.mp4", "v.mp4"], "start": 1}, "has a start or an end for 2 videos"),
    ({"video": "v.mp4", "crop": [0, 0, 1, 1]}, "crop asks for other pixels or frames"),
    ({"video": {"path": "v.mp4", "max_pixels": 9}}, "max_pixels asks for other pixels"),
    (
        {"video": ["0.png"] * 10_001},
        "'video' has a list of 10,001 files; only a video has a list of frames, at most 10,000",
    ),
    ({"videos": [["0.png", "frames"]]}, "'videos' has a folder among its frames"),
    ({"videos": [["0.png", "../x.png"]]}, "is no file under --media-root"),
    ({"images": [["0.png"]]}, "'images' has a list of 1 files; only a video"),
]


@pytest.mark.parametrize(("row", "words"), BAD)
def test_a_part_that_cannot_be_shown_is_a_bad_row(folder, row, words):
    with pytest.raises(BadRow) as reason:
        videos(folder, row, frames=3)
    assert words in str(reason.value)


@pytest.mark.parametrize("key", ["image", "image_url", "url", "path"])
@pytest.mark.parametrize("path", ["0.png", "data:image/png;base64,iVBORw0KGgo"])
def test_parts_of_a_chat_in_other_notations(folder, key, path):
    part = {"type": "image", key: path}
    if key == "image_url":
        part = {"type": "image_url", "image_url": {"url": path}}
    turn = {"role": "user", "content": [part, {"type": "text", "text": "p"}]}
    (folder / "rows.jsonl").write_text(json.dumps({"messages": [turn], "answer": "a"}))
    file = DataFile(str(folder / "rows.jsonl"))
    if path == "0.png":
        assert file.example(0).media[0].frames[0].size == (64, 48)
    else:
        with pytest.raises(BadRow, match="addresses and base64 are not read"):
            file.example(0)


SIX = "{% if messages[0].content | length > 6 %}"
FAILS = SIX + "{{ messages[0].content + 'text' }}{% endif %}"
RECURS = "{% macro f() %}{{ f() }}{% endmacro %}" + SIX + "{{ f() }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "request_text", "words"),
    [
        (FAILS, "", "its chat template raises TypeError"),
        (RECURS, "", "its chat template raises RecursionError"),
        ("", "See <image>.", "text has the markers <image>"),
    ],
)
def test_a_row_that_cannot_be_asked_is_bad(checkpoints, template, request_text, words):
    """The template fails on the sixth image alone; the request names an image that is not there."""
    from shared import load

    processor = load(checkpoints["qwen2_vl"])[1]
    processor.tokenizer.chat_template = template + processor.tokenizer.chat_template
    processor.prompt_config = PromptConfig({"answer": request_text})
    images = [Media([Image.new("RGB", (56, 56))])] * (6 if template else 0)
    source = SimpleNamespace(example=lambda row: Example("p", "a", images), place=str)
    prompts = data.Prompts(source, lambda example: encode_prompt(processor, example))
    prompt, bad = prompts[0]
    assert prompt is None and words in bad["0"]
