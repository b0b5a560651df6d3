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
media come first. Data files are untrusted: a row that cannot be used is reported with its reason
and skipped, and no path leads outside the media roots.
"""

import glob
import hashlib
import json
import math
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from filelock import FileLock
from huggingface_hub import snapshot_download
from pyarrow import ipc, parquet, types

from support.answers import MAX_ANSWER, extract_answer, folded, option_letter, option_texts
from support.disk import data_files
from support.media import (
    MAX_FRAME_BYTES,
    BadRow,
    MediaBytes,
    first_line,
    is_video,
    read_frames,
    read_image,
    read_video,
)
from support.prompts import Example, Media
from support.ranks import UsageError, print_once, require

# Accepted column names of each field. If a file has several of them, the first is read.
COLUMNS = {
    "problem": ("problem", "question", "prompt", "query", "text", "conversations", "messages"),
    "solution": ("solution", "answer", "ground_truth", "label"),
    "process": ("process", "thought"),
    "options": ("options", "choices", "candidates"),
    "problem_type": ("problem_type",),
    "data_type": ("data_type",),
    "data_source": ("data_source",),
}
CHATS = ("conversations", "messages")  # they hold the answer, too
MEDIA_COLUMNS = {
    "image": ("images", "image", "image_list"),
    "video": ("videos", "video", "video_path"),
    None: ("path",),
}
PERHAPS_MEDIA = re.compile("image|img|picture|photo|video|clip|frame", re.I)  # in a column's name
MEDIA_PATH = re.compile(r".*\.(jpe?g|png|webp|gif|bmp|tiff?|mp4|mkv|webm|avi|mov|flv)", re.I)
# Keys of a row, or of one medium of it, that say which frames of a video are shown, as in Qwen's
# own tools. For a list of frames, `fps` says how many of them are a second.
CLIP = {"start": ("video_start", "start"), "end": ("video_end", "end"), "frames": ("nframes",)}
CLIP |= {"fps": ("sample_fps", "fps")}
# Keys that ask for other pixels or frames; such a row is bad.
CHANGES = ("crop", "resized_height", "resized_width", "min_pixels", "max_pixels", "total_pixels")
CHANGES += ("min_frames", "max_frames", "start_time", "end_time", "start_frame", "end_frame")
CHANGES += ("frame_indices",)
KNOWN = (*COLUMNS.values(), *MEDIA_COLUMNS.values(), *CLIP.values(), CHANGES)
KNOWN = sum(KNOWN, ())  # columns that are read
ROLES = (["user"], ["human"], ["user", "assistant"], ["human", "gpt"])  # of a chat's turns
PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
EXPECTED = "expected a JSON array of objects, one JSON object a line, or Parquet or Arrow files"
# First bytes of files that hold no rows, and what those files are.
NOT_ROWS = {b"\xff\xfe": "is UTF-16 text", b"\xfe\xff": "is UTF-16 text", b"PK": "is compressed"}
NOT_ROWS |= {b"\x1f\x8b": "is compressed"} | dict.fromkeys((b"\x80\4", b"\x80\5"), "is a pickle")
# First bytes of files that hold rows.
KINDS = {b"PAR1": "Parquet", b"ARROW1": "an Arrow file", b"\xff\xff\xff\xff": "an Arrow stream"}
KINDS |= {b"{": "JSON lines", b"[": "a JSON array"}
HUB_NAME = re.compile(r"(?!.*\.(?:jsonl?|parquet|arrow|csv)$)[\w-][\w.-]*/[\w-][\w.-]*")
SHARD = re.compile(r"(^|[-_/])\d+(-of-\d+)?(-[0-9a-f]{16})?$")  # the number in a file's name
# A row that exceeds a limit is bad. MAX_ROW is in bytes, MAX_MEDIA in images and videos, MAX_LISTED
# in files that are the frames of a video, the others are in characters.
MAX_ROW, MAX_PROBLEM, MAX_SOLUTION, MAX_THOUGHT = 2**20, 100_000, MAX_ANSWER, 50_000
MAX_MEDIA, MAX_LISTED = 64, 10_000
# Parquet files may grow to so many times their size, or to so many bytes.
MAX_GROWTH, LEAST_GROWTH = 100, 2**30


class JsonLines:
    """The rows of JSON lines files. Only the place of each line is in memory: the number of its
    file, its offset and its own number."""

    def __init__(self, files: list[Path]):
        self.files, places = files, array("q")
        for number, path in enumerate(files):
            at, line, begins = 0, 1, True
            with path.open("rb") as file:
                for piece in iter(partial(file.readline, MAX_ROW), b""):  # a long line has several
                    if begins and piece.strip():
                        places.extend((number, at, line))
                    at, begins = at + len(piece), piece.endswith(b"\n")
                    line += begins
        self.places = np.array(places).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> Any:
        number, at, _ = self.places[row]
        with self.files[number].open("rb") as file:
            file.seek(at)
            content = file.readline(MAX_ROW + 1)
        if len(content) > MAX_ROW:
            raise BadRow(f"is longer than {MAX_ROW:,} bytes")
        return json.loads(content.decode("utf-8-sig"))

    def place(self, row: int) -> str:
        number, _, line = self.places[row]
        name = f"{self.files[number].name} " if len(self.files) > 1 else ""
        return f" ({name}line {line})"


def find_files(path: str) -> tuple[Path, list[Path]]:
    """The directory of a data set, and the files of one of its splits.

    `path` is a file, a directory of Parquet or Arrow files, or a data set's hub name, whose Parquet
    files are downloaded. `:SPLIT` after a directory or a hub name chooses one of several splits.
    """
    place, split = Path(path), ""
    if ":" in path and not place.exists():
        place, split = Path(path.rpartition(":")[0]), path.rpartition(":")[2]
    named = str(place)
    if not place.exists() and HUB_NAME.fullmatch(named):
        download = partial(snapshot_download, named, repo_type="dataset")
        chosen = f"*{glob.escape(split)}*.parquet"
        try:  # choose before anything is downloaded
            names = [file.filename for file in download(allow_patterns=chosen, dry_run=True)]
            chosen = [glob.escape(name) for name in one_split(names, split, named)]
        except (OSError, ValueError):
            pass  # offline: an earlier download is read
        try:
            place = Path(download(allow_patterns=chosen))
        except (OSError, ValueError) as error:
            raise UsageError(f"is neither here nor on the hub ({first_line(error)})") from None
    require(place.exists(), "no such file or directory")
    if place.is_file():
        require(not split, f"is one file; leave out :{split}")
        return place.parent, [place]
    require(place.is_dir(), "is neither a file nor a directory")
    files = {file.relative_to(place).as_posix(): file for file in data_files(str(place))}
    return place, [files[name] for name in one_split(list(files), split, named)]


def one_split(names: list[str], split: str, place: str) -> list[str]:
    """The names of the files of one split: they differ only in a number."""
    splits = defaultdict(list)
    for name in names:
        label = SHARD.sub("", os.path.splitext(name)[0])
        if not split or f"/{split}/" in f"/{label}/":
            splits[label].append(name)
    of_split = f" of a split {split!r}" if split else ""
    require(splits, f"has no data files{of_split}; {EXPECTED}")
    several = f"has the splits {', '.join(splits)[:300]}; choose one, as in {place}:{min(splits)}"
    require(len(splits) == 1, several)
    return splits.popitem()[1]


def open_rows(files: list[Path]) -> tuple[Any, pyarrow.Schema | None]:
    """The rows of data files, as a sequence of parsed JSON or of Arrow tables of one row, and the
    types of all columns if the files state them."""
    kinds = {}
    for file in files:
        try:
            kinds.setdefault(file_kind(file), file)
        except UsageError as error:
            raise UsageError(f"{file.name} {error}" if len(files) > 1 else error) from None
    different = " and ".join(f"{kind} ({file.name})" for kind, file in kinds.items())
    require(len(kinds) == 1, f"has files of different kinds, {different}; keep one kind")
    (kind,) = kinds
    if kind == "JSON lines":
        return JsonLines(files), None
    if kind == "a JSON array":
        return [row for file in files for row in read_array(file)], None
    return open_arrow(files, kind)


def file_kind(file: Path) -> str:
    """What a data file is, by its first bytes."""
    with file.open("rb") as opened:
        start = opened.read(2**12).removeprefix(b"\xef\xbb\xbf").lstrip()
    require(start, "is empty")
    for first, kind in KINDS.items():
        if start.startswith(first):
            return kind
    kind = NOT_ROWS.get(start[:2], f"begins with {start[:40].decode(errors='replace')!r}")
    raise UsageError(f"{kind}; {EXPECTED}")


def read_array(file: Path) -> list[Any]:
    content = file.read_bytes()
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        before = content[: getattr(error, "start", 0)]  # of a byte that is not UTF-8
        line = getattr(error, "lineno", before.count(b"\n") + 1)
        reason = getattr(error, "msg", first_line(error))
        raise UsageError(f"its array is not JSON, line {line}: {reason}") from None


def open_arrow(files: list[Path], kind: str) -> tuple[Any, pyarrow.Schema]:
    """The rows of Parquet or Arrow files, and the types of all columns. The rows stay on disk, and
    their media stay undecoded."""
    import datasets  # takes a second

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised, too
    cache, parts, copied = Path(datasets.config.HF_DATASETS_CACHE), [], ""
    try:
        if kind == "Parquet":
            copied, schemas = f" or copied to {cache}", map(parquet.read_schema, files)
            schema = next((x for x in schemas if x.names), pyarrow.schema([]))
            files = [arrow_copy(files, cache)]
        for file in files:
            if kind == "an Arrow file":
                table = ipc.open_file(pyarrow.memory_map(str(file))).read_all()
                table = datasets.table.InMemoryTable(table)
                parts.append(datasets.Dataset(table, fingerprint=file.name))  # not hashed
            else:
                parts.append(datasets.Dataset.from_file(str(file)))
        rows = datasets.concatenate_datasets(parts)
        schema = schema if copied else rows.data.schema
        require(schema.names, "has no columns")  # names that are not text raise here
        known = [name for name in rows.column_names if name in KNOWN]
        return rows.with_format("arrow", known), schema
    except UsageError:
        raise
    except Exception as error:  # hostile bytes raise any error of either library
        raise UsageError(f"cannot be read{copied} ({first_line(error)})") from None


def arrow_copy(files: list[Path], cache: Path) -> Path:
    """Copy those columns of Parquet files that are used to an Arrow file, whose rows can be read
    one by one.

    The copy is named by a hash of each file's size, first and last MB. The last MB has the footer
    with the statistics of each column. So the copy is made once, and again after a change.

    Raises:
        UsageError: a column differs between files, or the copy is far larger than the files.
    """
    digest, total = hashlib.sha256(repr(KNOWN).encode()), 0
    for file in files:
        size = file.stat().st_size
        total += size
        with file.open("rb") as opened:
            digest.update(b"%d" % size + opened.read(2**20))
            opened.seek(max(0, size - 2**20))
            digest.update(opened.read())
    limit = max(MAX_GROWTH * total, LEAST_GROWTH)
    large = f"its {total:,} bytes hold more than {limit:,} bytes of rows"
    target = cache / "rows" / f"{digest.hexdigest()[:32]}.arrow"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        schema, announced = shared_schema(files)
        require(announced <= limit, large)
        part = target.with_suffix(".part")
        try:
            with pyarrow.OSFile(str(part), "wb") as sink, ipc.new_stream(sink, schema) as stream:
                for file in files:
                    with parquet.ParquetFile(file) as rows:  # a row may hold many pictures
                        for batch in rows.iter_batches(16, columns=schema.names, use_threads=False):
                            table = pyarrow.Table.from_batches([batch])
                            stream.write_table(table.select(schema.names).cast(schema))
                            require(sink.tell() <= limit, large)
            part.rename(target)
        finally:
            part.unlink(missing_ok=True)
    return target


def read_columns(names: Sequence[str]) -> list[str]:
    """Those of the columns `names` that are read: of several names of a field, the first."""
    unread = {x for known in COLUMNS.values() for x in [y for y in known if y in names][1:]}
    return [name for name in names if name in KNOWN and name not in unread]


def shared_schema(files: list[Path]) -> tuple[pyarrow.Schema, int]:
    """The columns of Parquet files that are used, with types that suit all files with rows, and the
    size in bytes that the footers announce for all rows."""
    shared, first, announced = None, "", 0
    for file in files:
        with parquet.ParquetFile(file) as rows:
            schema, footer = rows.schema_arrow, rows.metadata
            groups = [footer.row_group(n) for n in range(footer.num_row_groups)]
            announced += sum(group.total_byte_size for group in groups)
            count = footer.num_rows
        if not count:
            continue
        plain = {name: schema.field(name).type for name in read_columns(schema.names)}
        for name, kind_of in plain.items():
            if types.is_dictionary(kind_of):  # pandas' categories
                plain[name] = kind_of.value_type
        schema = pyarrow.schema(plain)
        shared, first = shared or schema, first or file.name
        for name in {*schema.names} ^ {*shared.names}:
            has, lacks = (first, file.name) if name in shared.names else (file.name, first)
            raise UsageError(f"{has} has the column {name}, but {lacks} does not")
        try:
            shared = pyarrow.unify_schemas([shared, schema])
        except pyarrow.ArrowException as error:
            raise UsageError(f"{file.name} differs from {first}: {first_line(error)}") from None
    require(shared is not None, "has no rows")
    return shared, announced


class DataFile:
    """The rows of a data file as `Example`s, read one at a time.

    `path` is passed to `find_files`, `frames` and `fps` to `frame_indices`. Without both, a video
    gives one frame a second, as in the paper. Media are searched for under `roots`, by default the
    file's own directory. Rank 0 prints which columns are read.

    Raises:
        UsageError: the file or a root does not exist, or the file holds no questions.
    """

    def __init__(
        self,
        path: str,
        roots: Sequence[str] = (),
        frames: int | None = None,
        fps: float | None = None,
        option: str = "--data",
    ):
        self.file, self.frames = Path(path).name, frames
        self.fps = 1.0 if frames is None and fps is None else fps
        for root in roots:
            require(Path(root).is_dir(), f"--media-root {root}: no such directory")
        try:
            folder, files = find_files(path)
            self.roots = [Path(root).resolve() for root in roots or [folder]]
            self.rows, self.schema = open_rows(files)
            self.columns, note = self.find_columns()
        except UsageError as error:
            raise UsageError(f"{option} {path}: {error}") from None
        print_once(f"{option} {path}: {len(self):,} rows, {note}")

    def __len__(self) -> int:
        return len(self.rows)

    def find_columns(self) -> tuple[dict[str, str], str]:
        """The file's name for each of `COLUMNS`, and a note that says which are read. JSON rows may
        differ, so the first 100 are inspected."""
        require(len(self) > 0, "has no rows")
        present, reason = set(self.schema.names if self.schema else ()), ""
        unread = {name for name in present if PERHAPS_MEDIA.search(name)}
        # The type of a column of {bytes, path} has "binary" in it, too.
        unread |= {field.name for field in self.schema or () if "binary" in str(field.type)}
        for row in range(0 if present else min(100, len(self))):
            try:
                fields = self.fields(row)
                present |= fields.keys()
                for name, value in fields.items():
                    value = value[0] if isinstance(value, list) and value else value
                    is_path = isinstance(value, str) and MEDIA_PATH.fullmatch(value[:1000])
                    if is_path or PERHAPS_MEDIA.search(name):
                        unread.add(name)
            except BadRow as error:
                reason = reason or f"{self.place(row)} {error}"
                if row == 1 and not present:  # not JSON lines, perhaps a dictionary around rows
                    break
        require(present, f"{reason or 'its rows are empty'}; {EXPECTED}")
        columns = {
            field: next((name for name in names if name in present), None)
            for field, names in COLUMNS.items()
        }
        question, answer = columns["problem"], columns["solution"]
        answer = answer or (question if question in CHATS else None)
        wanted = [" or ".join(COLUMNS[field]) for field in ("problem", "solution")]
        expected = f"expected a question in {wanted[0]}, and an answer in {wanted[1]}"
        found = f"has the columns {', '.join(sorted(present))[:300]}"
        require(question and answer, f"{found}; {expected}")
        media = [name for names in MEDIA_COLUMNS.values() for name in names if name in present]
        media = ", ".join(media) or "no column"
        note = f"question in {question}, answer in {answer}, media in {media}"
        if unread := ", ".join(sorted(unread - {*KNOWN}))[:300]:
            note += f"; not read, but perhaps media: {unread}"
        clip = [name for names in CLIP.values() for name in names if name in present]
        note += f"; the part of a video in {', '.join(clip)}" if clip else ""
        if columns["problem_type"] is None:
            note += "; no problem_type: multiple choice with options, else exact match"
        return {field: name or field for field, name in columns.items()}, note

    def name(self, row: int) -> str:
        return f"{self.file} row {row + 1}"

    def place(self, row: int) -> str:
        """The name of a row and, in JSON lines, the number of its line, both counted from 1."""
        is_lines = isinstance(self.rows, JsonLines)
        return self.name(row) + (self.rows.place(row) if is_lines else "")

    def fields(self, row: int) -> dict[str, Any]:
        """The columns of a row, as the file has them."""
        try:
            fields = self.rows[row]
            if isinstance(fields, pyarrow.Table):
                fields.validate(full=True)  # a column with bad offsets would end the process
                (fields,) = fields.to_pylist()
        except json.JSONDecodeError as error:
            raise BadRow(f"is not JSON: {error.msg} at column {error.colno}") from None
        except BadRow:
            raise
        except Exception as error:  # hostile bytes make pyarrow raise any error
            raise BadRow(f"cannot be read: {first_line(error)}") from None
        if not isinstance(fields, dict):
            raise BadRow("is not a JSON object")
        return fields

    def example(self, row: int) -> Example:
        """Row number `row` (from 0) with its media.

        Raises:
            BadRow: the row cannot be used.
        """
        fields = self.fields(row)
        fields = fields | {field: fields.get(column) for field, column in self.columns.items()}
        if isinstance(fields["problem"], list):
            chat = read_chat(fields["problem"])
            fields |= {x: y for x, y in chat.items() if x == "problem" or not fields.get(x)}
        example = read_example(fields)
        media, size = [], 0
        for kind, source, clip in self.media_sources(fields, example):
            flags = {"frames": self.frames, "fps": None if "frames" in clip else self.fps}
            if kind == "image":
                medium = Media([read_image(source)])
            elif isinstance(source, list):
                rate = clip.pop("fps", 2.0)
                medium = read_frames(source, rate, **flags | clip)
            else:
                medium = read_video(source, **flags | clip)
            media.append(medium)
            size += sum(3 * frame.width * frame.height for frame in medium.frames)
            if size > MAX_FRAME_BYTES:
                raise BadRow("its media take more than 4 GB")
        return replace(example, media=media, name=self.name(row))

    def media_sources(
        self, fields: dict[str, Any], example: Example
    ) -> list[tuple[str, Any, dict[str, float]]]:
        """For each medium of a row: "image" or "video", its file or content (a list, if a video is
        given as frames), and the result of `read_clip`. The order is that of the markers in the
        text; without markers, images come first."""
        found, data_type = [], fields["data_type"] or None
        for kind, names in MEDIA_COLUMNS.items():
            name = next(filter(fields.get, names), None)
            if name is None or (name == "path" and found):
                continue
            if name == "path" and data_type not in ("image", "video", None):
                raise BadRow(f"data_type is {str(data_type)[:40]!r}; known are image and video")
            kind = kind or data_type
            items = fields[name] if isinstance(fields[name], list) else [fields[name]]
            if kind == "video" and len(items) > 1 and not isinstance(items[0], list):
                is_frames = not is_video(self.source(items[0], name, 1))
                items = [items] if is_frames else items
            if len(items) > MAX_MEDIA:
                raise BadRow(f"{name!r} has {len(items):,} files; at most {MAX_MEDIA} are allowed")
            for number, item in enumerate(items, 1):
                listed = medium_source(item)
                if kind == "video" and isinstance(listed, list) and listed:
                    if len(listed) > MAX_LISTED:
                        raise BadRow(f"{name!r} has {len(listed):,} frames; at most {MAX_LISTED:,}")
                    source = [self.source(frame, name, number) for frame in listed]
                else:
                    source = self.source(item, name, number)
                medium = kind or ("video" if is_video(source) else "image")
                found.append((medium, source, read_clip(item if isinstance(item, dict) else {})))
        of_row = read_clip(fields) if found else {}
        videos = [clip for kind, _, clip in found if kind == "video"]
        if len(videos) > 1 and {"start", "end"} & of_row.keys():
            raise BadRow(f"has a start or an end for {len(videos)} videos; give each its own")
        for clip in videos:
            clip.update(of_row | clip)
        if not found and data_type in ("image", "video"):
            raise BadRow(f"has no {data_type} in 'path' or another column")
        markers = re.findall("<(image|video)>", "\n".join([example.problem, *example.options]))
        if not markers:
            return found
        kinds = Counter(kind for kind, *_ in found)
        if Counter(markers) != kinds:
            placed = f"places {markers.count('image')} images and {markers.count('video')} videos"
            raise BadRow(f"its text {placed}, but it has {kinds['image']} and {kinds['video']}")
        return [found.pop([kind for kind, *_ in found].index(marker)) for marker in markers]

    def source(self, item: Any, name: str, number: int) -> Path | MediaBytes:
        """The file or content of an item of the column `name`."""
        content = medium_source(item)
        if isinstance(content, bytes):
            return MediaBytes(f"{name} {number}", content)
        if isinstance(content, str) and content:
            return self.find(content)
        raise BadRow(f"{name!r} has {str(item)[:40]}, not the path or bytes of a file")

    def find(self, path: str) -> Path:
        """The file that `path` names under one of the roots; targets of links are checked too."""
        outside = folder = False
        wanted = "give a path under --media-root, or the bytes in Parquet"
        if scheme := re.match(r"(data:|[a-z][a-z0-9+]+://)", path):
            raise BadRow(f"path {path[:40]!r} is an address ({scheme[0]}); {wanted}")
        for root in self.roots:
            try:
                target = (root / path).resolve()
                if any(target.is_relative_to(allowed) for allowed in self.roots):
                    if target.is_file():
                        return target
                    folder = folder or target.is_dir()
                else:
                    outside = True
            except (OSError, ValueError, RuntimeError):  # too long, has a NUL, or a loop of links
                continue
        if folder:
            raise BadRow(f"path {path[:200]!r} is a folder; list its frames in order")
        if re.fullmatch(r"[\w+/\s-]{99,}=*\s*", path):
            raise BadRow(f"path {path[:40]!r}... is base64; {wanted}")
        raise BadRow(f"path {path[:200]!r} {'leaves' if outside else 'is not under'} --media-root")


def medium_source(item: Any) -> Any:
    """The path, bytes or address of a medium, which may have other keys beside it."""
    if not isinstance(item, dict):
        return item
    return item.get("bytes") or item.get("path") or item.get("url") or item.get("base64")


def read_clip(fields: dict[str, Any]) -> dict[str, float]:
    """The part of a video that a row or one of its media asks for, as arguments of `read_video`."""
    clip = {}
    for name in CHANGES:
        if fields.get(name) is not None:
            raise BadRow(f"{name} asks for other pixels or frames, which is not supported")
    for key, names in CLIP.items():
        name = next((name for name in names if fields.get(name) is not None), None)
        if name is None:
            continue
        value = fields[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (0 if key == "start" else 1e-6) <= value < 1e9:
            raise BadRow(f"{name} is {str(value)[:40]!r}, not a number of seconds or frames")
        if key == "frames" and value != int(value):
            raise BadRow(f"{name} is {value}, not a whole number")
        clip[key] = int(value) if key == "frames" else float(value)
    return clip


def read_chat(turns: list[Any]) -> dict[str, Any]:
    """The fields of a row whose question, and perhaps its answer, are the turns of a chat."""
    fields = {"images": [], "videos": []}
    try:
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
    except (AttributeError, TypeError, KeyError):
        raise BadRow("has a turn without a role or a text") from None
    return fields


def read_example(fields: dict[str, Any]) -> Example:
    """The example of a row without its media.

    Raises:
        BadRow: a field is missing or invalid.
    """
    texts = []
    for field, name in (("problem", "question"), ("solution", "answer")):
        text = fields[field]
        if isinstance(text, int) or (isinstance(text, float) and math.isfinite(text)):
            text = str(text)
        elif isinstance(text, Decimal):
            text = re.sub(r"\.0*$|(\.\d*[1-9])0+$", r"\1", f"{text:f}")
        if not isinstance(text, str) or not text.strip():
            raise BadRow(f"has no text for its {name}")
        texts.append(text)
    problem, solution = texts
    thought = fields["process"] if isinstance(fields["process"], str) else ""
    before, end, after = solution.partition("</think>")
    if end:
        thought, solution = thought.strip() or before + end, after
    answer = extract_answer(solution)
    solution = solution.strip() if answer is None else answer
    if not solution or "<answer>" in solution or "</answer>" in solution:
        raise BadRow("has an unpaired answer tag, or nothing between the tags")
    options = fields["options"] or []
    if not isinstance(options, list) or not all(isinstance(x, str) for x in options):
        raise BadRow("options is not a list of texts")
    for name, text, limit in (
        ("question", problem, MAX_PROBLEM),
        ("answer", solution, MAX_SOLUTION),
        ("options", "\n".join(options), MAX_SOLUTION),
        ("thought", thought, MAX_THOUGHT),
    ):
        if len(text) > limit:
            raise BadRow(f"{name}: {len(text):,} characters; at most {limit:,} are allowed")
        if re.search("[\ud800-\udfff]", text):
            raise BadRow(f"{name}: has half a character (a lone surrogate)")
    problem_type = fields["problem_type"] or ("multiple choice" if options else "")
    if problem_type not in (*PROBLEM_TYPES, ""):
        known = ", ".join(PROBLEM_TYPES)
        raise BadRow(f"problem_type is {str(problem_type)[:40]!r}; known are {known}")
    if problem_type == "multiple choice":
        options, solution = choices(options, solution)
    return Example(
        problem=problem,
        solution=solution,
        media=[],
        response=thought.strip() or None,
        problem_type=problem_type,
        options=tuple(options),
        source=str(fields["data_source"] or "").encode(errors="replace").decode()[:200],
    )


def choices(options: list[str], solution: str) -> tuple[list[str], str]:
    """The options with their letters, which the prompt asks for, and the letter of the solution.

    Options without letters get the letters of their positions. If no options are listed (the
    problem may contain them), a solution that is not a letter remains unchanged.
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
    if list(texts.values()) == options:
        options = [f"{name}. {text}" for name, text in texts.items()]
    return options, letter or solution
