"""Data files: every row is found, every bad one is named, and what is read does not depend on who
reads it."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from real import write_rows, write_video

import data
import grpo_baseline
from answers import option_texts
from common import accuracy
from prompts import Prompt, PromptConfig
from runs import BadRows, UsageError

ROW = {
    "problem": "What is it?",
    "data_type": "image",
    "path": "a.png",
    "problem_type": "free-form",
    "solution": "<answer>a cat</answer>",
}


def open_rows(tmp_path, content: str | bytes) -> data.DataFile:
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return data.DataFile(str(path))


def contents(file: data.DataFile) -> list[bytes]:
    whole = file.path.read_bytes()
    return [whole[start:end] for start, end in file.offsets]


def test_a_row_reads_as_written(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    fields = {"options": ["A. x", "B. y"], "data_source": "s", "process": "<think>t</think>"}
    example = open_rows(tmp_path, json.dumps(ROW | fields)).example(0)
    assert (example.problem, example.solution) == ("What is it?", "a cat")
    assert (example.problem_type, example.options) == ("free-form", ("A. x", "B. y"))
    assert (example.source, example.response) == ("s", "<think>t</think>")
    assert example.name == "rows.json row 1" and not example.media[0].is_video
    assert example.media[0].frames[0].size == (40, 30)


texts = st.text(st.characters(codec="utf-8"), max_size=20)
values = st.one_of(texts, st.integers(), st.none(), st.lists(texts, max_size=3))
values = st.one_of(values, st.dictionaries(texts, values, max_size=2))
rows = st.lists(st.dictionaries(texts, values, max_size=5), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
@given(rows, st.sampled_from([None, 0, 2]), st.booleans(), st.booleans())
def test_every_row_is_found_in_every_layout(tmp_path_factory, rows, indent, ascii, mark):
    folder = tmp_path_factory.mktemp("layout")
    for text in (
        json.dumps(rows, indent=indent, ensure_ascii=ascii),
        "\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows),
        "\r\n\n".join(json.dumps(row, ensure_ascii=ascii) for row in rows) + "\n",
    ):
        file = open_rows(folder, text.encode("utf-8-sig" if mark else "utf-8"))
        assert [json.loads(content) for content in contents(file)] == rows


BROKEN = [
    ('[{"a": 1}, {"a": 2', ['{"a": 1}', '{"a": 2']),
    ('[{"a": 1}', ['{"a": 1}', ""]),
    ('[{"a": 1},\n{"a: 2},\n{"a": 3}]', ['{"a": 1}', '{"a: 2}', '{"a": 3}']),
    ('[{"a": 1}, 2, {"a": 3}]', ['{"a": 1}', "2, ", '{"a": 3}']),
    ('{"a": 1}\n{"a"\n{"a": 3}', ['{"a": 1}', '{"a"', '{"a": 3}']),
    ('[{"a": {"b": {"c": {}}}}, {"a": "}"}]', ['{"a": {"b": {"c": {}}}}', '{"a": "}"}']),
    ('[{"a": 1}]\n{"b": 2}\n', ['{"a": 1}', '{"b": 2}\n']),
    ('[{"a": 1}]\n\n', ['{"a": 1}']),
]


@pytest.mark.parametrize(("text", "found"), BROKEN)
def test_what_is_broken_is_a_row_too(tmp_path, text, found):
    assert [x.decode() for x in contents(open_rows(tmp_path, text))] == found


def test_a_bad_row_is_named_with_its_line(tmp_path):
    file = open_rows(tmp_path, '[\n  {"a": 1},\n\n  {"a": }\n]')
    assert file.place(1) == "rows.json row 2 (line 4)"
    with pytest.raises(data.BadRow, match="is not JSON"):
        file.example(1)


CHOICE = {"problem_type": "multiple choice", "options": ["A. red", "B. blue"]}
BAD_ROWS = [
    ({"problem": None}, "'problem'"),
    ({"problem": " "}, "'problem'"),
    ({"solution": ["a"]}, "'solution'"),
    ({"solution": "<answer> </answer>"}, "solution has 0 characters"),
    ({"solution": "a" * 20_000}, "solution has 20,000 characters"),
    ({"solution": "a" * 10_000_000}, "bytes long"),
    ({"process": "a" * 60_000}, "process has 60,000"),
    ({"path": ""}, "'path'"),
    ({"data_type": "audio"}, "'audio'"),
    ({"problem_type": "essay"}, "'essay'"),
    ({"options": "A"}, "options"),
    ({"options": [1]}, "options"),
    ({"options": ["a" * 10_001]}, "an option has more than"),
    ({"solution": "a</answer>"}, "half a pair"),
    ({"solution": "<answer>a"}, "half a pair"),
    ({"solution": float("nan")}, "'solution'"),
    (CHOICE | {"solution": "green"}, "'green' is not one of the options A, B"),
    (CHOICE | {"solution": "0"}, "'0' is not one of the options A, B"),
    (CHOICE | {"solution": "C"}, "'C' is not one of the options A, B"),
    (CHOICE | {"solution": "A or B"}, "'A or B' is not one of"),
    (CHOICE | {"solution": "B. red"}, "'B. red' is not one of"),
    (CHOICE | {"solution": "\ud800" * 9}, "is not one of"),
    (CHOICE | {"options": ["red", "red"], "solution": "red"}, "'red' is not one of"),
    (CHOICE | {"options": ["A. red", "A. blue"]}, "share a letter"),
    (CHOICE | {"options": [str(i) for i in range(27)]}, "more than 26"),
    ({"path": "missing.png"}, "missing.png"),
    ({"path": "../outside.png"}, "leaves --media-root"),
    ({"path": "/etc/passwd"}, "leaves --media-root"),
    ({"path": "link.png"}, "leaves --media-root"),
    ({"path": "a\0.png"}, "is not under"),
    ({"path": "a" * 5000}, "is not under"),
    ({"path": "."}, "is not under"),
    ({"path": "pipe"}, "is not under"),
    ({"path": "empty.png"}, "not a readable image"),
    ({"path": "cut.png"}, "not a readable image"),
    ({"path": "code.eps"}, "not a readable image"),
    ({"path": "thin.png"}, "too unequal"),
    ({"path": "bomb.png"}, "not a readable image"),
    ({"path": "a.png", "data_type": "video"}, "video"),
    ({"path": "empty.png", "data_type": "video"}, "not a video"),
    ({"path": "list.m3u8", "data_type": "video"}, "not a video"),
    ({"path": "list.mp4", "data_type": "video"}, "not a video"),
    ({"path": "cut.mp4", "data_type": "video"}, "not a readable video"),
    ({"path": "loop"}, "is not under"),
    ({"path": "float.tiff"}, "mode F"),
    ({"problem": "a\ud83d"}, "surrogate"),
    ({"process": "a\ud83d"}, "surrogate"),
]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
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
    Image.new("RGB", (4, 1000)).save(root / "thin.png")
    Image.new("1", (20_000, 20_000)).save(root / "bomb.png")
    (root / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n../outside.mp4\n")
    (root / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n../outside.mp4\n#EXT-X-ENDLIST\n#\0")
    (root / "loop").symlink_to(root / "loop")
    Image.fromarray(np.ones((30, 40), np.float32)).save(root / "float.tiff")
    write_video(root / "whole.mp4", 20)
    whole = (root / "whole.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.mark.parametrize(("fields", "words"), BAD_ROWS)
def test_a_bad_row_says_why(media, fields, words):
    with pytest.raises(data.BadRow) as reason:
        open_rows(media, json.dumps(ROW | fields)).example(0)
    assert words in str(reason.value) and len(str(reason.value)) < 400


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
    (("(A) red", "(C) blue"), "blue", ("(A) red", "(C) blue"), "C"),
    (("a) red", "b) blue"), "blue", ("a) red", "b) blue"), "B"),
    (("A", "B"), "b", ("A", "B"), "B"),
    (("X", "Y"), "Y", ("A. X", "B. Y"), "B"),
    ((), "(b)", (), "B"),
    ((), "yes", (), "yes"),
]


@pytest.mark.parametrize(("options", "solution", "shown", "letter"), CHOICES)
def test_a_solution_is_the_letter_of_an_option_that_the_prompt_shows(
    media, options, solution, shown, letter
):
    fields = {"problem_type": "multiple choice", "options": options, "solution": solution}
    example = open_rows(media, json.dumps(ROW | fields)).example(0)
    assert (example.options, example.solution) == (shown, letter)
    lines = PromptConfig(grpo_baseline.PROMPTS).ask(example).splitlines()
    assert all(option in lines for option in shown)


def test_options_of_other_types_stay_as_they_are(media):
    fields = {"options": ["3", "4"], "solution": "4", "problem_type": "numerical"}
    example = open_rows(media, json.dumps(ROW | fields)).example(0)
    assert (example.options, example.solution) == (("3", "4"), "4")


def test_check_data_names_rows_whose_numbers_are_judged_as_text(media, capsys):
    rows = [ROW | {"problem_type": "numerical", "solution": x} for x in ("50%", "2:30", "4,2")]
    rows.append(ROW | CHOICE | {"solution": "green"})
    path = media / "numbers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    args = SimpleNamespace(data=str(path), eval_data=None, media_root=(), frames=None, fps=None)
    vars(args).update(max_prompt_tokens=None, workers=0, max_skipped=1.0, reward="by-type")
    no_tensors = [torch.zeros(1)] * 4
    data.check_data(args, lambda example: Prompt(*no_tensors, example))
    report = capsys.readouterr().out
    assert "only the same text is right: 2, as numbers.jsonl row 2\n" in report
    assert "bad: numbers.jsonl row 4 (line 4): solution 'green' is not one of the" in report
    args.reward = "exact"
    data.check_data(args, lambda example: Prompt(*no_tensors, example))
    assert "only the same text" not in capsys.readouterr().out


pieces = ["A", "b", "A. ", "(b)", "red", "blue", " ", "<answer>", "</answer>", "½", "42", "%", "**"]
field_texts = st.lists(st.one_of(st.sampled_from(pieces), st.text(max_size=3)), max_size=5)
field_texts = field_texts.map("".join)


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from(data.PROBLEM_TYPES),
    st.one_of(field_texts, st.integers(), st.floats()),
    st.lists(field_texts, max_size=4),
)
def test_a_row_earns_its_own_reward_or_is_bad(tmp_path_factory, kind, solution, options):
    fields = ROW | {"problem_type": kind, "solution": solution, "options": options}
    file = data.DataFile.__new__(data.DataFile)
    try:
        example = file.parse(fields)
    except data.BadRow:
        return
    assert accuracy(f"<answer>{example.solution}</answer>", example) == 1
    assert accuracy(f"<answer>{example.solution}</answer>", example, "exact") == 1
    if kind == "multiple choice" and options:
        assert example.solution in option_texts(example.options)
        assert option_texts(example.options).keys() == option_texts(options).keys()
    assert accuracy("<answer></answer>", example) == 0


def test_a_link_into_another_root_is_followed(media):
    path = media / "rows.jsonl"
    path.write_text(json.dumps(ROW | {"path": "link.png"}))
    roots = [str(media), str(media.parent)]
    assert data.DataFile(str(path), roots).example(0).media[0].frames[0].size == (40, 30)


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert data.read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_and_a_turned_camera(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    grey = np.asarray(data.read_image(tmp_path / "a.png"))[..., 0].astype(int)
    assert np.abs(grey - ramp // 257).max() <= 1
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (80, 40)).save(tmp_path / "b.jpg", exif=exif)
    assert data.read_image(tmp_path / "b.jpg").size == (40, 80)


@settings(deadline=None)
@given(
    st.integers(1, 5000),
    st.floats(1, 120),
    st.one_of(st.none(), st.integers(1, 300)),
    st.one_of(st.none(), st.floats(0.1, 60)),
)
def test_frame_indices(total, rate, frames, fps):
    indices = data.frame_indices(total, rate, frames, fps)
    assert indices == sorted(set(indices)) and 0 == indices[0] <= indices[-1] < total
    most = min(total, frames or data.MAX_FRAMES)
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
    pictures, seconds = data.read_video(tmp_path / "v.mp4", frames, fps)
    levels = [np.asarray(picture).mean() for picture in pictures]
    assert np.abs(np.array(levels) - [4 + 8 * i for i in expected]).max() < 4
    gap = (expected[-1] - expected[0]) / 10 / (len(expected) - 1)
    assert seconds == pytest.approx(2 * gap)  # a temporal patch has two frames


def test_fps_alone_takes_frames_at_that_rate(tmp_path):
    write_video(tmp_path / "v.mp4", 25, rate=10)
    pictures, seconds = data.read_video(tmp_path / "v.mp4", None, 4.0)
    assert len(pictures) == 10 and seconds == pytest.approx(2 * 2.4 / 9)


def test_without_pyav_a_video_is_one_line(media, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UsageError, match="pip install av"):
        data.read_video(media / "whole.mp4", 2, None)


class Rows:
    """A source in which every fifth row is bad."""

    def __len__(self):
        return 50

    def example(self, row):
        if row % 5 == 0:
            raise data.BadRow("is a multiple of 5")
        return data.Example(str(row), "", [])

    def place(self, row):
        return f"row {row}"


def encode(example):
    ids = torch.tensor([int(example.problem)])
    return Prompt(ids, torch.zeros(3, 1), torch.zeros(1), torch.ones(3), example)


def read(workers=0, seed=1, count=100, most=1.0):
    prompts = data.Prompts(Rows(), encode, np.arange(50), seed)
    skipped = BadRows(most, 50)
    reader = data.Reader(prompts, range(count), workers, skipped)
    return [int(prompt.ids) for prompt in reader], skipped


def test_an_epoch_has_every_good_row_and_others_for_the_bad_ones():
    numbers, skipped = read()
    good = {n for n in range(50) if n % 5}
    for epoch in (numbers[:50], numbers[50:]):
        assert set(epoch) == good and len(epoch) == 50
    assert numbers[:50] != numbers[50:]
    assert set(skipped.bad) == {f"row {n}" for n in range(0, 50, 5)}


def test_what_is_read_depends_on_the_seed_and_the_number_alone():
    numbers, skipped = read()
    others, same = read(workers=2)
    assert numbers == others and skipped.bad == same.bad
    assert read(seed=2)[0] != numbers
    prompts = data.Prompts(Rows(), encode, np.arange(50), 1)
    for n in (99, 3, 50, 17):  # in any order
        assert int(prompts[n][0].ids) == numbers[n]


def test_too_many_bad_rows_stop_the_run(tmp_path):
    with pytest.raises(UsageError, match=r"--max-skipped 0.1: 6 bad rows among the first \d+"):
        read(most=0.1)
    skipped = BadRows(0.01, 100_000)
    for n in range(10):
        skipped.add({f"row {n}": "x"})  # 1% of the first 1,000 rows
        skipped.add({f"row {n}": "x"})  # met again, counted once
    with pytest.raises(UsageError):
        skipped.add({"row 10": "x"})


def test_a_missing_library_is_told_from_a_worker_too(monkeypatch):
    def fail(self, row):
        raise UsageError("pip install it")

    monkeypatch.setattr(Rows, "example", fail)
    for workers in (0, 1):
        with pytest.raises(UsageError, match=r"^pip install it$"):
            read(workers=workers)


def test_the_generated_rows_are_what_they_should_be(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(write_rows(tmp_path), indent=1))
    file = data.DataFile(str(tmp_path / "rows.json"), frames=4)
    bad = []
    for row in range(len(file)):
        try:
            example = file.example(row)
            assert example.media[0].is_video or len(example.media[0].frames) == 1
        except data.BadRow:
            bad.append(row)
    assert len(file) == 20 and bad == [14, 19]
    assert [len(file.example(row).media[0].frames) for row in (15, 16, 17, 18)] == [1, 4, 4, 4]
