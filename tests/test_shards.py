"""Sets of several files: no row is lost, what differs is named, and damage ends no process."""

import json
import os
from decimal import Decimal
from functools import partial

import pyarrow
import pytest
from pyarrow import ipc, parquet

from support import datafiles
from support.media import BadRow
from support.ranks import UsageError

DataFile = partial(datafiles.DataFile, text_only=True)
STRINGS = pyarrow.list_(pyarrow.string())


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The Arrow copies of Parquet files."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield folder


def write(folder, *tables, end="parquet"):
    """Write one file for each table of answers, or of whole columns."""
    for number, columns in enumerate(tables):
        columns = columns if isinstance(columns, dict) else {"answer": columns}
        count = len(next(iter(columns.values())))
        table = pyarrow.table({"problem": ["p"] * count} | columns)
        path = folder / f"train-{number:05}.{end}"
        if end == "parquet":
            parquet.write_table(table, path)
        else:
            with ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
    return folder


def answers(path) -> list[str]:
    file = DataFile(str(path))
    return [file.example(row).solution for row in range(len(file))]


def options(values, kind=STRINGS):
    return {"answer": ["red"] * len(values), "options": pyarrow.array(values, kind)}


@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_shards_are_one_set(tmp_path, end):
    empty = pyarrow.array([], pyarrow.string())
    assert answers(write(tmp_path, empty, ["1", "2"], ["3"], end=end)) == ["1", "2", "3"]


def test_a_column_without_values_suits_any_other(tmp_path):
    nothing = options([None], pyarrow.null()), options([[]], pyarrow.list_(pyarrow.null()))
    file = DataFile(str(write(tmp_path, *nothing, options([["red", "a"]]))))
    assert file.example(2).options == ("A. red", "B. a") and len(file) == 3


def test_columns_of_each_file_are_its_own(tmp_path, capsys):
    """The note says what is read in each."""
    both = {"answer": ["red"], "label": ["cat"], "text": ["t"], "x": [1]}
    write(tmp_path, {"problem": []}, {"solution": ["1"], "label": [1]}, {"answer": [2]}, both)
    parquet.write_table(pyarrow.table({}), tmp_path / "train-00000.parquet")
    assert answers(tmp_path) == ["1", "2", "red"]
    noted = [line.partition("; no prob")[0] for line in capsys.readouterr().out.splitlines()]
    assert [line.partition("1 rows, question in problem, ")[2] for line in noted] == [
        "answer in solution, also read: nothing, not read: label",
        "answer in answer, also read: nothing, not read: nothing",
        "answer in answer, also read: nothing, not read: label, text, x",
    ]
    parquet.write_table(pyarrow.table({"problem": ["p"]}), tmp_path / "train-00003.parquet")
    with pytest.raises(UsageError, match=r"/train-00003\.parquet has the columns problem;"):
        answers(tmp_path)


@pytest.mark.parametrize("layout", ["lines", "arrays"])
def test_several_json_files_are_one_set(tmp_path, layout):
    """Whatever they are called: shards named .parquet may hold JSON lines."""
    for number in range(3):
        rows = [{"problem": "p", "answer": str(2 * number + i)} for i in range(2)]
        text = json.dumps(rows) if layout == "arrays" else "\n\n".join(map(json.dumps, rows))
        (tmp_path / f"x-{number}.parquet").write_text(text)
    file = DataFile(str(tmp_path))
    assert [file.example(row).solution for row in range(6)] == list("012345")
    place = " (line 3)" if layout == "lines" else ""
    assert file.place(3) == f"{tmp_path.name}/x-1.parquet row 2{place}"


def test_a_directory_of_json_files_is_one_set(tmp_path):
    for number in range(2):
        row = {"problem": "p", "answer": str(number)}
        (tmp_path / f"x-{number}.jsonl").write_text(json.dumps(row))
    assert answers(tmp_path) == ["0", "1"]


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "x-1.jsonl is empty"), (b"PAR1", "x-1.jsonl: .*free space in")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, words):
    (tmp_path / "x-0.jsonl").write_text('{"problem": "p", "answer": "a"}')
    (tmp_path / "x-1.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        answers(tmp_path)


def test_a_decimal_is_its_text(tmp_path):
    assert answers(write(tmp_path, [Decimal("42.00"), Decimal("-0.25")])) == ["42.00", "-0.25"]


@pytest.mark.parametrize(
    "kind", [pyarrow.date64(), pyarrow.timestamp("s"), pyarrow.duration("s"), pyarrow.time64("ns")]
)
def test_a_time_out_of_range_is_a_bad_row(tmp_path, kind):
    write(tmp_path, pyarrow.array([2**62], pyarrow.int64()).view(kind), end="arrow")
    with pytest.raises(BadRow):
        answers(tmp_path)


def test_a_categorical_column_is_its_text(tmp_path):
    write(tmp_path, pyarrow.array(["a", "b", "a"]).dictionary_encode())
    assert answers(tmp_path) == ["a", "b", "a"]


def test_a_damaged_row_of_arrow_is_bad_and_no_crash(tmp_path):
    """The offsets of a text point far outside its buffer."""
    write(tmp_path, ["first", "second", "third"], end="arrow")
    path = tmp_path / "train-00000.arrow"
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 5, 11, 16))
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f" + offsets[12:]))
    file = DataFile(str(path))
    assert file.example(0).solution == "first"
    for row in (1, 2):
        with pytest.raises(BadRow, match=r"cannot be read .Column 1"):
            file.example(row)


def test_a_column_whose_name_is_no_text_is_one_line(tmp_path):
    path = write(tmp_path, ["a"], end="arrow") / "train-00000.arrow"
    path.write_bytes(path.read_bytes().replace(b"answer", b"\xffnswer"))
    with pytest.raises(UsageError, match=r"train-00000.arrow: 'utf-8' codec"):
        answers(path)


def test_a_change_is_read_whatever_its_size_and_time(tmp_path, cache):
    path = write(tmp_path, ["1"]) / "train-00000.parquet"
    before = path.stat()
    assert answers(path) == ["1"]
    copies = set((cache / "rows").iterdir())
    write(tmp_path, ["2"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and answers(path) == ["2"]
    write(tmp_path, ["1"])
    assert answers(path) == ["1"] and len({*(cache / "rows").iterdir()} - copies) == 2


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_file_that_grows_beyond_measure_is_one_line(tmp_path, cache, dictionary, monkeypatch):
    """A dictionary's text is announced once, compressed text as often as it is there."""
    monkeypatch.setattr(datafiles, "LEAST_GROWTH", 2**20)
    table = pyarrow.table({"problem": ["a" * 2**15] * 1000, "answer": ["b"] * 1000})
    path = tmp_path / "x.parquet"
    parquet.write_table(table, path, compression="zstd", use_dictionary=dictionary)
    assert path.stat().st_size < 50_000
    files = set((cache / "rows").glob("*.arrow"))
    with pytest.raises(UsageError, match=r"hold more than .* bytes of rows"):
        answers(path)
    assert set((cache / "rows").glob("*[!k]")) == files
