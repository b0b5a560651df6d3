"""Rows of data files: questions with their images and videos.

A data file is a JSON array, JSON lines, Parquet, or what `Dataset.save_to_disk` of Hugging Face
`datasets` writes. A row is one question with its answer. A row of Video-R1, one of Geometry3K as
EasyR1 publishes it (Parquet), and one of LLaVA:

    {"problem": "What is the man holding?", "data_type": "video", "path": "./clips/17.mp4",
     "problem_type": "multiple choice", "options": ["A. a cup", "B. a book"],
     "solution": "<answer>A</answer>"}
    {"images": [{"bytes": ..., "path": None}], "problem": "<image>Find x.", "answer": "3"}
    {"image": "train/33471.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat colour is the bus?"},
        {"from": "gpt", "value": "White and red"}]}

`<image>` and `<video>` in the question or its options say where each medium stands; without them,
media come first. `bbox` or `bboxes` say where the media show what the question is about. Data files
are untrusted: a row that cannot be used is reported with its reason and skipped, and no path leads
outside the media roots. Section 1 finds files, section 2 opens their rows, section 3 makes examples
of them.
"""

import glob
import json
import math
import os
import re
import reprlib
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from pyarrow import ipc, parquet

from support import media
from support.answers import MAX_ANSWER, extract_answer, folded, option_letter, option_texts
from support.cli import each
from support.disk import data_files, fingerprint, loading, without_split
from support.grounding import Box
from support.media import BadRow, MediaBytes, reading
from support.prompts import Example, Media
from support.ranks import UsageError, print_once, require

# Accepted column names of each field. If a file has several of them, the first is read.
COLUMNS = {
    "problem": ("problem", "question", "prompt", "query", "text", "conversations", "messages"),
    "solution": ("solution", "answer", "ground_truth", "label", "answers"),
    "process": ("process", "thought"),
    "options": ("options", "choices", "candidates"),
}
COLUMNS |= {name: (name,) for name in ("problem_type", "data_type", "data_source")}
CHATS = ("conversations", "messages")  # they hold the answer, too
# The columns image_1, image_2, ... are one list of images, too.
MEDIA_COLUMNS = {
    "image": ("images", "image", "image_list"),
    "video": ("videos", "video", "video_path"),
    None: ("path",),
}
NUMBERED = re.compile(r"image_(\d{1,3})")
# Keys of a row, or of one medium of it, that say which frames of a video are shown, as in Qwen's
# own tools. For a list of frames, `fps` says how many of them are a second.
CLIP = {"start": ("video_start", "start"), "end": ("video_end", "end"), "frames": ("nframes",)}
CLIP |= {"fps": ("sample_fps", "fps")}
# Keys that ask for other pixels or frames; such a row is bad.
CHANGES = ("crop", "resized_height", "resized_width", "min_pixels", "max_pixels", "total_pixels")
CHANGES += ("min_frames", "max_frames", "start_time", "end_time", "start_frame", "end_frame")
CHANGES += ("frame_indices",)
# Keys that say where a medium shows what the question is about; the first that has boxes is read.
BOXES = ("bbox", "bboxes", "bboxs")
BOX_KEYS = (*BOXES, "bbox_format")
UNREAD = "rename the column to have it left out"
ROW_KEYS = sum((*MEDIA_COLUMNS.values(), *CLIP.values(), CHANGES, BOX_KEYS), ())
MEDIA_ENDS = "jpg jpeg png webp gif bmp tif tiff mp4 m4v mov mkv webm avi flv wmv mpg mpeg ogv"
ROLES = (["user"], ["human"], ["user", "assistant"], ["human", "gpt"])  # of a chat's turns
PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
EXPECTED = "expected a JSON array of objects, one JSON object a line, Parquet or an Arrow stream"
HUB_NAME = re.compile(r"(?!.*\.(?:jsonl?|parquet|arrow|csv)$)[\w-][\w.-]*/[\w-][\w.-]*")
# What is downloaded from a hub's repository beside JSON files, which name media by their paths.
LOOSE_MEDIA = [f"*.{end}" for both in MEDIA_ENDS.split() for end in (both, both.upper())]
SHARD = re.compile(r"(^|[-_/])\d+(-of-\d+)?(-[0-9a-f]{16})?$")  # the number in a file's name
# A row that exceeds a limit is bad. MAX_ROW is in bytes, MAX_MEDIA in images and videos, MAX_LISTED
# in files that are the frames of a video, MAX_BOXES in boxes, the others are in characters.
MAX_ROW, MAX_PROBLEM, MAX_SOLUTION, MAX_THOUGHT = 2**20, 100_000, MAX_ANSWER, 50_000
MAX_MEDIA, MAX_LISTED, MAX_EXTRA, MAX_BOXES = 64, 10_000, 100_000, 1000
# Parquet files may grow to so many times their size, or to so many bytes.
MAX_GROWTH, LEAST_GROWTH = 100, 2**30
INSPECTED = 100  # rows in which columns and media are looked for

# 1. Files


def find_files(path: str) -> tuple[Path, dict[str, list[Path]]]:
    """The directory of a data set, and the files of each of its splits.

    `path` is a file, a directory, or a data set's hub name, whose Parquet files, or else its JSON
    files, are downloaded. `:SPLIT` after a directory or a hub name chooses from several splits.
    """
    place = without_split(path)
    named, split = str(place), "" if place == Path(path) else path.rpartition(":")[2]
    if not place.exists() and HUB_NAME.fullmatch(named):
        place = download(named, split)
    require(place.exists(), "no such file or directory")
    require(place.is_file() or place.is_dir(), "is neither a file nor a directory")
    folder = place.parent if place.is_file() else place
    files = {file.relative_to(folder).as_posix(): file for file in data_files(str(place))}
    splits = choose_splits([*files], split, named)
    return folder, {label: [files[name] for name in names] for label, names in splits.items()}


def download(name: str, split: str) -> Path:
    """Download the chosen splits of a data set of the hub; returns their directory in the cache."""
    fetch = partial(snapshot_download, name, repo_type="dataset")
    chosen, left_out = ["*.parquet", "*.json", "*.jsonl"], []
    with suppress(OSError, ValueError):  # choose first; offline, an earlier download is read
        files = {x.filename: x.file_size or 0 for x in fetch(allow_patterns=chosen, dry_run=True)}
        tables = [x for x in files if x.endswith(".parquet")]
        splits = choose_splits(tables or [*files], split, name).values()
        chosen = [glob.escape(x) for names in splits for x in names]
        if not tables:  # a small JSON file may say more about the medium beside it
            large = {glob.escape(x) for x, size in files.items() if size > MAX_ROW}
            left_out, chosen = sorted(large.difference(chosen)), [*chosen, *LOOSE_MEDIA, "*.json"]
    remedy = "check the name, the network and HF_HUB_OFFLINE, or give a local directory"
    with loading(f"cannot download {name}", remedy):
        return Path(fetch(allow_patterns=chosen, ignore_patterns=left_out))


def choose_splits(names: list[str], split: str, place: str) -> dict[str, list[str]]:
    """The names of the files of each split, which differ only in a number. Of several splits, those
    with the file or folder name `split`, such as the validation splits of all configurations."""
    splits = defaultdict(list)
    for name in sorted(names):
        label = SHARD.sub("", os.path.splitext(name)[0])
        if not split or f"/{split}/" in f"/{label}/":
            splits[label].append(name)
    of_split = f" of a split {split!r}" if split else ""
    require(splits, f"has no data files{of_split}; {EXPECTED}")
    several = f"has the splits {', '.join(splits)[:300]}; choose, as in {place}:{min(splits)}"
    require(len(splits) == 1 or split, several)
    return splits


# 2. Rows


class JsonLines:
    """The rows of a JSON lines file. Only the offset and the number of each line are in memory."""

    def __init__(self, file: Path):
        self.file, places = file, array("q")
        at, line, begins = 0, 1, True
        with file.open("rb") as opened:
            for piece in iter(partial(opened.readline, MAX_ROW), b""):  # a long line has several
                if begins and piece.strip():
                    places.extend((at, line))
                at, begins = at + len(piece), piece.endswith(b"\n")
                line += begins
        self.places = np.array(places).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> Any:
        with self.file.open("rb") as opened:
            opened.seek(self.places[row, 0])
            content = opened.readline(MAX_ROW + 1)
        if len(content) > MAX_ROW:
            raise BadRow(f"is longer than {MAX_ROW:,} bytes")
        return json.loads(content.decode("utf-8-sig"))


class ArrowRows:
    """The rows of an Arrow stream, which stay on disk with their media undecoded."""

    def __init__(self, file: Path):
        self.table = ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
        self.names = self.table.column_names  # here, as they may be no text

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        one = self.table.slice(row, 1)
        one.validate(full=True)  # a column with bad offsets would end the process
        return one.to_pylist()[0]


def open_rows(file: Path) -> Any:
    """The rows of a data file, whose first bytes say what it is."""
    copies = Path(os.environ.get("HF_DATASETS_CACHE") or f"{HF_HOME}/datasets", "rows")
    with loading(file.name, "repair it, or make it readable"):
        with file.open("rb") as opened:
            start = opened.read(2**12).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.startswith(b"{"):
            return JsonLines(file)
        if start.startswith(b"["):
            return json.loads(file.read_bytes().decode("utf-8-sig"))
        if start.startswith(b"\xff\xff\xff\xff"):
            return ArrowRows(file)
        if start.startswith(b"PAR1"):
            with loading(file.name, f"repair it, or free space in {copies}"):
                return ArrowRows(arrow_copy(file, copies))
    found = f"begins with {start[:40]!r}" if start else "is empty"
    raise UsageError(f"{file.name} {found}; {EXPECTED}")


def arrow_copy(file: Path, folder: Path) -> Path:
    """Copy a Parquet file to an Arrow file in `folder`, whose rows can be read one by one.

    It is named by the file's `fingerprint`: a Parquet file ends with the statistics of each column.
    So the copy is made once, and again after a change.

    Raises:
        UsageError: the copy would be far larger than the file.
    """
    size = file.stat().st_size
    limit = max(MAX_GROWTH * size, LEAST_GROWTH)
    large = f"{file.name}: its {size:,} bytes hold more than {limit:,} bytes of rows"
    target = folder / f"{fingerprint(file, 8)}.arrow"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        part = target.with_suffix(".part")
        try:
            with (
                parquet.ParquetFile(file) as rows,
                pyarrow.OSFile(str(part), "wb") as sink,
                ipc.new_stream(sink, rows.schema_arrow) as stream,
            ):
                # Few at a time, as a row may hold many pictures.
                for batch in rows.iter_batches(16, use_threads=False):
                    stream.write_batch(batch)
                    require(sink.tell() <= limit, large)
            part.rename(target)
        finally:
            part.unlink(missing_ok=True)
    return target


# 3. Examples


@dataclass
class Part:
    """The rows of one file, from row `start` of the whole on. `source` is the data source of rows
    that name none."""

    name: str
    source: str
    rows: Any
    roots: list[Path]
    start: int
    columns: dict[str, str] = field(default_factory=dict)  # the name of each field of `COLUMNS`


class DataFile:
    """The rows of data files as `Example`s, read one at a time.

    `paths` are one or several that `find_files` takes; their rows follow one another. `frames` and
    `fps` are passed to `frame_indices`. Without both, a video gives one frame a second, as in the
    paper. Media are searched for under `roots`, by default the directory of each file. Rank 0
    prints which columns are read.

    Raises:
        UsageError: a file or a root does not exist, a file holds no questions or, unless
            `text_only` is set, a split has no media in its first rows.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        roots: Sequence[str] = (),
        frames: int | None = None,
        fps: float | None = None,
        option: str = "--data",
        text_only: bool = False,
    ):
        self.frames, self.fps = frames, 1.0 if frames is None and fps is None else fps
        for root in roots:
            require(Path(root).is_dir(), f"--media-root {root}: no such directory")
        paths, self.parts = each(paths), []
        names = [Path(path).name for path in paths]
        for path, name in zip(paths, names, strict=True):
            name, notes = path if names.count(name) > 1 else name, Counter()
            try:
                folder, splits = find_files(path)
                own = [Path(root).resolve() for root in roots or [folder]]
                for label, files in splits.items():
                    first = len(self)
                    source = label if len(splits) > 1 else name if len(paths) > 1 else ""
                    for file in files:
                        named = name if file == Path(path) else f"{name}/{file.relative_to(folder)}"
                        if len(rows := open_rows(file)):
                            self.parts.append(Part(named, source, rows, [*own], len(self)))
                            note = self.find_columns(self.parts[-1])
                            notes[note] += len(rows)
                    rows = range(first, len(self))[:INSPECTED]
                    require(rows, "has no rows")
                    seen = text_only or any(map(self.has_media, rows))
                    blind = f"none of the first {len(rows)} rows has an image or a video; {note}"
                    named = ", ".join(x for y in MEDIA_COLUMNS.values() for x in y)
                    remedy = f"rename a column that has them to one of {named}"
                    require(seen, f"{blind}; {remedy}, or give --text-only for data without")
            except UsageError as error:
                raise UsageError(f"{option} {path}: {error}") from None
            for note, count in notes.items():
                print_once(f"{option} {path}: {count:,} rows, {note}")

    def __len__(self) -> int:
        return self.parts[-1].start + len(self.parts[-1].rows) if self.parts else 0

    def locate(self, row: int) -> tuple[Part, int]:
        """The part that holds row number `row`, and the number of the row there."""
        part = self.parts[bisect_right(self.parts, row, key=lambda part: part.start) - 1]
        return part, row - part.start

    def name(self, row: int) -> str:
        part, row = self.locate(row)
        return f"{part.name} row {row + 1}"

    def place(self, row: int) -> str:
        """The name of a row and, in JSON lines, the number of its line, both counted from 1."""
        part, number = self.locate(row)
        is_lines = isinstance(part.rows, JsonLines)
        return self.name(row) + (f" (line {part.rows.places[number, 1]})" if is_lines else "")

    def find_columns(self, part: Part) -> str:
        """Find the part's name for each of `COLUMNS`; returns a note that says which columns are
        read. JSON rows may differ, so the first rows are inspected."""
        present, reason, inspected = set(), "", INSPECTED
        if isinstance(part.rows, ArrowRows):  # rows with the same columns, perhaps large ones
            present, inspected = {*part.rows.names}, 10
        for row in range(part.start, len(self))[:inspected]:
            try:
                present.update(self.fields(row))
            except BadRow as error:
                reason = reason or f"{self.place(row)} {error}"
        require(present, f"{reason or f'the rows of {part.name} are empty'}; {EXPECTED}")
        for name, names in COLUMNS.items():
            part.columns[name] = next((x for x in names if x in present), name)
        question, answer = part.columns["problem"], part.columns["solution"]
        if answer not in present and question in CHATS:
            answer = question
        columns = f"{part.name} has the columns {', '.join(sorted(present))[:300]}"
        asked, answered = (" or ".join(COLUMNS[field]) for field in ("problem", "solution"))
        require(question in present, f"{columns}; expected a question in {asked}")
        require(answer in present, f"{columns}; expected an answer in {answered}")
        known = {*part.columns.values(), *ROW_KEYS}
        read = {x for x in present if x in known or NUMBERED.fullmatch(x)}
        others = ", ".join(sorted(read - {question, answer})) or "nothing"
        unread = ", ".join(sorted(present - read))[:300] or "nothing"
        note = f"question in {question}, answer in {answer}"
        note += f", also read: {others}, not read: {unread}"
        if "problem_type" not in present:
            how = "rows with options are multiple choice, others need an equal answer"
            note += f"; no problem_type: {how}"
        return note

    def has_media(self, row: int) -> bool:
        """Whether a row lists an image or a video, readable or not."""
        with suppress(BadRow):
            return bool(listed_media(self.named_fields(row)))
        return False

    def fields(self, row: int) -> dict[str, Any]:
        """The columns of a row, as the file has them."""
        part, number = self.locate(row)
        with reading("cannot be read"):
            fields = part.rows[number]
        if not isinstance(fields, dict):
            raise BadRow("is not a JSON object")
        return fields

    def named_fields(self, row: int) -> dict[str, Any]:
        """The columns of a row, with those of `COLUMNS` and its media under the project's names."""
        own, columns = self.fields(row), self.locate(row)[0].columns
        fields = own | {field: own.get(column) for field, column in columns.items()}
        if isinstance(fields["problem"], list):
            chat = read_chat(fields["problem"])
            fields |= {x: y for x, y in chat.items() if x == "problem" or not fields.get(x)}
        if not any(map(fields.get, MEDIA_COLUMNS["image"])):
            numbered = sorted((int(x[1]), x[0]) for x in map(NUMBERED.fullmatch, own) if x)
            fields["images"] = [own[name] for _, name in numbered if own[name]]
        return fields

    def example(self, row: int) -> Example:
        """Row number `row` (from 0) with its media.

        Raises:
            BadRow: the row cannot be used.
        """
        return self.read(row, self.named_fields(row))

    def read(self, row: int, fields: dict[str, Any]) -> Example:
        """The example of row number `row`, given its `named_fields`."""
        part, _ = self.locate(row)
        example = read_example(fields)
        found, boxes, size, box_format = [], [], 0, fields.get("bbox_format")
        for kind, source, clip, listed in self.media_sources(fields, example, part.roots):
            flags = {"frames": self.frames, "fps": None if "frames" in clip else self.fps}
            if kind == "image":
                medium = Media([media.read_image(source)])
            elif isinstance(source, list):
                rate = clip.pop("fps", 2.0)
                medium = media.read_frames(source, rate, **flags | clip)
            else:
                medium = media.read_video(source, **flags | clip)
            boxes += [read_box(item, box_format, medium, len(found)) for item in listed]
            found.append(medium)
            size += sum(3 * frame.width * frame.height for frame in medium.frames)
            if size > media.MAX_FRAME_BYTES:
                raise BadRow("its media take more than 4 GB")
        extra = other_columns(self.fields(row), read={*part.columns.values(), *ROW_KEYS})
        source = example.source or part.source
        about = {"name": self.name(row), "source": source, "extra": extra}
        return replace(example, media=found, boxes=tuple(boxes), **about)

    def media_sources(
        self, fields: dict[str, Any], example: Example, roots: list[Path]
    ) -> list[tuple[str, Any, dict[str, float], list[Any]]]:
        """For each medium of a row: "image" or "video", its file or content (a list, if a video is
        given by its frames), the result of `read_clip`, and its listed boxes. The order is that of
        the markers in the text; without markers, images come first."""
        data_type = fields["data_type"] if fields["data_type"] in ("image", "video") else None
        found = []
        for column_kind, name, items in listed_media(fields):
            kind = column_kind or data_type
            open_item = partial(open_medium, roots=roots, name=name)
            if kind == "video" and len(items) > 1:
                first = open_item(items[0], number=1)
                items = items if isinstance(first, list) or media.is_video(first) else [items]
            if len(items) > MAX_MEDIA:
                raise BadRow(f"{name!r} has {len(items):,} files; at most {MAX_MEDIA} are allowed")
            for number, item in enumerate(items, 1):
                source = open_item(item, number=number)
                if isinstance(source, list):
                    if kind != "video" or not 0 < len(source) <= MAX_LISTED:
                        frames = f"only a video has a list of frames, at most {MAX_LISTED:,}"
                        raise BadRow(f"{name!r} has a list of {len(source):,} files; {frames}")
                    source = [open_item(frame, number=number) for frame in source]
                    if list in map(type, source):
                        raise BadRow(f"{name!r} has a folder among its frames")
                medium = kind or ("video" if media.is_video(source) else "image")
                found.append((medium, source, read_clip(item if isinstance(item, dict) else {})))
        of_row = read_clip(fields) if found else {}
        videos = [clip for kind, _, clip in found if kind == "video"]
        if len(videos) > 1 and {"start", "end"} & of_row.keys():
            raise BadRow(f"has a start or an end for {len(videos)} videos; give each its own")
        for clip in videos:
            clip.update(of_row | clip)
        if not found and data_type:
            raise BadRow(f"has no {data_type} in 'path' or another column")
        boxes = listed_boxes(fields, len(found))
        found = [(*medium, listed) for medium, listed in zip(found, boxes, strict=True)]
        markers = re.findall("<(image|video)>", "\n".join([example.problem, *example.options]))
        if Counter(markers) != Counter(kind for kind, *_ in found):
            return found  # there are no markers, or `split_turn` refuses the row
        return [found.pop([kind for kind, *_ in found].index(marker)) for marker in markers]


def listed_media(fields: dict[str, Any]) -> list[tuple[str | None, str, list]]:
    """The columns of a row that list its media: the kind (None if the column does not say), the
    name and the items."""
    found = []
    for kind, names in MEDIA_COLUMNS.items():
        name = next(filter(fields.get, names), None)
        if name is not None and not (name == "path" and found):
            found.append((kind, name, [*each(fields[name])]))
    return found


def open_medium(item: Any, roots: list[Path], name: str, number: int) -> media.MediaFile | list:
    """The file or content of an item of the column `name`; a list, or the files in a folder."""
    content = medium_source(item)
    if isinstance(content, list):
        return content
    if isinstance(content, bytes):
        return MediaBytes(f"{name} {number}", content)
    if isinstance(content, str) and content:
        return find_medium(content, roots)
    raise BadRow(f"{name!r} has {str(item)[:40]}, not the path or bytes of a file")


def medium_source(item: Any) -> Any:
    """The path, bytes or address of a medium, which may have other keys beside it."""
    if not isinstance(item, dict):
        return item
    return item.get("bytes") or item.get("path") or item.get("url") or item.get("base64")


def find_medium(path: str, roots: Sequence[Path]) -> Path | list[str]:
    """The file that `path` names under one of the roots, or the files in a folder, in the order of
    their numbers (2.jpg, 10.jpg). Targets of links are checked, too."""
    # The files of a data set in the hub's cache are links to its blobs.
    blobs = [root.parent.parent / "blobs" for root in roots if root.parent.name == "snapshots"]
    folders = []
    for root in roots:
        # The path may be too long, have a NUL, or lead through a loop of links.
        with suppress(OSError, ValueError, RuntimeError):
            target = (root / path).resolve()
            if any(target.is_relative_to(allowed) for allowed in [*roots, *blobs]):
                if target.is_file():
                    return target
                if target.is_dir():
                    files = (str(x) for x in target.iterdir() if not x.name.startswith("."))
                    folders.append([*islice(files, MAX_LISTED + 1)])
    for files in folders[:1]:
        return sorted(files, key=lambda file: (len(file), file))
    where = f"under --media-root {' '.join(map(str, roots))[:200]}"
    raise BadRow(f"path {path[:80]!r} is no file {where}; addresses and base64 are not read")


def read_clip(fields: dict[str, Any]) -> dict[str, float]:
    """The part of a video that a row or one of its media asks for, as arguments of `read_video`."""
    clip = {}
    for name in CHANGES:
        if fields.get(name) is not None:
            raise BadRow(f"{name} asks for other pixels or frames, which is not supported")
    for key, names in CLIP.items():
        name = next((name for name in names if fields.get(name) is not None), None)
        if name is not None:
            value, least = fields[name], 0 if key == "start" else 1e-6
            kind = int if key == "frames" else float
            if type(value) not in (int, float) or not least <= value < 1e9 or kind(value) != value:
                raise BadRow(f"{name} is {str(value)[:40]!r}, not a number of seconds or frames")
            clip[key] = kind(value)
    return clip


def listed_boxes(fields: dict[str, Any], count: int) -> list[list[Any]]:
    """The boxes of each medium of a row, as written, in the order in which its columns list media.
    A row with one medium has one box or a list of boxes, any other a list of boxes for each."""

    def is_list(item: Any) -> bool:  # of boxes, or of such lists
        return isinstance(item, list) and all(isinstance(x, list | dict) for x in item)

    name = next((x for x in BOXES if fields.get(x) not in (None, [])), None)
    if name is None:
        return [[]] * count
    listed = fields[name]
    if isinstance(listed, list) and count > 1:  # Parquet may have null for no boxes
        listed = [[] if boxes is None else boxes for boxes in listed]
    listed = listed if is_list(listed) else [listed]
    boxes = listed if all(map(is_list, listed)) else [listed]
    if len(boxes) != count:
        has = f"the row has {count} images and videos; give a list of boxes for each"
        raise BadRow(f"{name} lists the boxes of {len(boxes):,} media, but {has}")
    if (total := sum(map(len, boxes))) > MAX_BOXES:
        raise BadRow(f"{name} has {total:,} boxes; at most {MAX_BOXES:,} are allowed")
    return boxes


def read_box(item: Any, box_format: Any, medium: Media, number: int) -> Box:
    """A listed box of a row's medium `number`: four numbers in pixels of the stored image, or an
    object with these as `bbox`, perhaps its own `bbox_format` and, for a video, `start` and
    `end`."""
    box, values, span = f"box {reprlib.repr(item)[:60]}", item, {}
    if isinstance(item, dict):
        values, box_format = item.get("bbox"), item.get("bbox_format") or box_format
        span = read_clip({x: item.get(x) for x in ("start", "end", *CHANGES)})
    four = isinstance(values, list) and len(values) == 4
    if not four or not all(type(x) in (int, float) and abs(x) < 1e9 for x in values):
        raise BadRow(f"{box} is not four numbers; {UNREAD}")
    if box_format not in (None, "xyxy", "xywh"):
        raise BadRow(f"bbox_format is {reprlib.repr(box_format)[:60]}; known are xyxy and xywh")
    orientation, *others = {frame.info["orientation"] for frame in medium.frames}
    if others or orientation is None:
        raise BadRow(f"{box}: its video is not turned by quarters, or its frames differ in that")
    width, height = medium.size if orientation < 5 else medium.size[::-1]
    if max(map(abs, values)) <= 1 < max(width, height):
        raise BadRow(f"{box} has fractions of the picture; pixels are expected, or {UNREAD}")
    left, top, right, bottom = values
    if box_format == "xywh":
        right, bottom = left + right, top + bottom
    if min(left, top) < -1 or right > width + 1 or bottom > height + 1:  # 1 for rounding
        raise BadRow(f"{box} leaves its picture of {width} x {height} pixels; {UNREAD}")
    left, right = (min(max(x, 0), width) for x in (left, right))
    top, bottom = (min(max(x, 0), height) for x in (top, bottom))
    if left >= right or top >= bottom or span.get("start", 0) > span.get("end", math.inf):
        expected = "[x1, y1, x2, y2], or bbox_format xywh, is expected"
        raise BadRow(f"{box} has no area, or ends before it starts; {expected}")
    corners = media.upright_box((left, top, right, bottom), medium.size, orientation)
    return Box(*corners, number, **span)


def read_chat(turns: list[Any]) -> dict[str, Any]:
    """The fields of a row whose question, and perhaps its answer, are the turns of a chat."""
    fields = {"images": [], "videos": []}
    with reading("has a turn without a role or a text"):
        roles = [turn.get("from") or turn.get("role") for turn in turns]
        if roles not in ROLES:
            found = f"has the turns {str(roles)[:100]}"
            raise BadRow(f"{found}; expected one of user, then one of assistant")
        for field, turn in zip(("problem", "solution"), turns, strict=False):
            content, text = turn.get("value") or turn.get("content"), ""
            for part in content if isinstance(content, list) else [{"text": content}]:
                kind = str(part.get("type")).removesuffix("_url")
                if kind in ("image", "video"):
                    text += f"<{kind}>"
                    named = part.get(part["type"]) or part.get("path")
                    medium = part | (named if isinstance(named, dict) else {"path": named})
                    fields[f"{kind}s"] += [medium] if medium_source(medium) else []
                else:
                    text += part["text"]
            fields[field] = text
    return fields


def other_columns(fields: dict[str, Any], read: set[str]) -> dict[str, Any]:
    """The columns of a row that nothing reads, as JSON has them: numbers, texts, lists and objects.
    A date or a decimal is its text, and bytes are None. What exceeds `MAX_EXTRA` characters is left
    out."""
    extra, size = {}, 0
    for name in (x for x in fields if x not in read):
        with suppress(TypeError, ValueError, RecursionError):
            text = json.dumps(fields[name], default=lambda x: None if type(x) is bytes else str(x))
            if size + len(text) <= MAX_EXTRA:
                extra[name], size = json.loads(text), size + len(text)
    return extra


def read_example(fields: dict[str, Any]) -> Example:
    """The example of a row without its media.

    Raises:
        BadRow: a field is missing or invalid.
    """
    problem, answers = as_text(fields["problem"], "question"), fields["solution"]
    answers = answers[:MAX_MEDIA] if isinstance(answers, list) and answers else [answers]
    solutions, thought = [], fields["process"] if isinstance(fields["process"], str) else ""
    for answer in answers:
        solution = as_text(answer, "answer")
        before, end, after = solution.partition("</think>")
        if end:
            thought, solution = thought.strip() or before + end, after
        inside = extract_answer(solution)
        solution = solution.strip() if inside is None else inside
        if not solution or "<answer>" in solution or "</answer>" in solution:
            raise BadRow("has an unpaired answer tag, or nothing between the tags")
        solutions.append(solution)
    options = fields["options"] or []
    if not isinstance(options, list) or not all(isinstance(x, str) for x in options):
        raise BadRow("options is not a list of texts")
    for name, text, limit in (
        ("question", problem, MAX_PROBLEM),
        *(("answer", solution, MAX_SOLUTION) for solution in solutions),
        ("options", "\n".join(options), MAX_SOLUTION),
        ("thought", thought, MAX_THOUGHT),
    ):
        if len(text) > limit:
            raise BadRow(f"{name}: {len(text):,} characters; at most {limit:,} are allowed")
        if re.search("[\ud800-\udfff]", text):
            raise BadRow(f"{name}: has half a character (a lone surrogate)")
    problem_type = fields["problem_type"] or ("multiple choice" if options else "")
    if problem_type not in (*PROBLEM_TYPES, ""):
        raise BadRow(f"problem_type {str(problem_type)[:40]!r} is not one of {PROBLEM_TYPES}")
    if problem_type == "multiple choice":
        pairs = zip(answers, solutions, strict=True)
        solutions = [letter_of(text, options, type(answer) is int) for answer, text in pairs]
        texts = option_texts(options)
        if [*texts.values()] == options:  # they have no letters, but the prompt asks for one
            options = [f"{letter}. {text}" for letter, text in texts.items()]
    return Example(
        problem=problem,
        solution=solutions[0],
        also_right=tuple(solutions[1:]),
        media=[],
        response=thought.strip() or None,
        problem_type=problem_type,
        options=tuple(options),
        source=str(fields["data_source"] or "").encode(errors="replace").decode()[:200],
    )


def as_text(value: Any, name: str) -> str:
    """The text of a question or an answer, which may be a number."""
    if isinstance(value, int | Decimal) or (isinstance(value, float) and math.isfinite(value)):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"has no text for its {name}")
    return value


def letter_of(solution: str, options: list[str], is_integer: bool) -> str:
    """The letter of the option that a solution names by letter or text. If no options are listed
    (the problem may contain them), a solution that is not a letter remains unchanged.

    Raises:
        BadRow: it names none, or several.
    """
    texts = option_texts(options)
    if len(texts) < len(options):
        raise BadRow("options share a letter, or are more than 26")
    letter, alone = option_letter(solution, options), re.fullmatch(r"\W*([a-zA-Z])\W*", solution)
    same = [key for key, text in texts.items() if folded(text) == folded(solution)]
    if alone and same and alone[1].upper() in texts and alone[1].upper() not in same:
        raise BadRow(f"solution {solution[:40]!r} is a letter, and the text of option {same[0]}")
    if options and not letter:
        raise BadRow(f"solution {solution[:40]!r} is not one of the options {', '.join(texts)}")
    places = dict(enumerate(texts)) if is_integer else {}
    if places.get(int(solution) if places else 0, letter) != letter:
        either = f"the text of option {letter} or the number of another"
        raise BadRow(f"solution {solution} is {either}; give a letter, or the text as a string")
    return letter or solution
