"""Questions with their images and videos from data files, and prompts read ahead of training.

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

import atexit
import glob
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from answers import MAX_ANSWER, option_letter, option_texts, read_number
from common import extract_answer, print_once
from prompts import Example, Media, Prompt
from runs import (
    BadRows,
    UsageError,
    data_files,
    print_on_rank_0,
    rank,
    require,
    require_not_negative,
    world_size,
)

# Columns by the names that people give them. If a file has several of a line, the first is read.
COLUMNS = {
    "problem": ("problem", "question", "prompt", "query", "conversations", "messages"),
    "solution": ("solution", "answer", "ground_truth"),
    "process": ("process", "thought"),
    "options": ("options", "choices"),
    "problem_type": ("problem_type",),
    "data_type": ("data_type",),
    "data_source": ("data_source",),
}
CHATS = ("conversations", "messages")  # hold the answer, too
MEDIA_COLUMNS = {"image": ("images", "image"), "video": ("videos", "video"), None: ("path",)}
ROLES = (["user"], ["human"], ["user", "assistant"], ["human", "gpt"])  # of a chat's turns
PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
EXPECTED = "expected a JSON array of objects, one JSON object a line, or Parquet or Arrow files"
# What else a file may be, by its first bytes.
NOT_ROWS = {b"\xff\xfe": "is UTF-16 text", b"\xfe\xff": "is UTF-16 text", b"PK": "is compressed"}
NOT_ROWS |= {b"\x1f\x8b": "is compressed"} | dict.fromkeys((b"\x80\4", b"\x80\5"), "is a pickle")
HUB_NAME = re.compile(r"(?!.*\.(?:jsonl?|parquet|arrow|csv)$)[\w-][\w.-]*/[\w-][\w.-]*")
SHARD = re.compile(r"(^|[-_/])\d+(-of-\d+)?(-[0-9a-f]{16})?$")  # the number in a file's name
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no format that runs a program
# A row that exceeds a limit is bad. MAX_ROW is in bytes, MAX_MEDIA in images and videos, the others
# are in characters.
MAX_ROW, MAX_PROBLEM, MAX_SOLUTION, MAX_THOUGHT = 2**20, 100_000, MAX_ANSWER, 50_000
MAX_MEDIA = 64
MAX_RATIO = 200  # of an image's sides; the image processor's limit
MAX_FRAMES, MAX_FRAME_BYTES = 768, 2**32  # of a video with only --fps; of all frames of a row
# FFmpeg's names of containers with unusable time stamps: AVI stamps the decoding order, and MPEG-PS
# leaves frames unstamped.
UNSTAMPED = ("avi", "mpeg")
# Options for opening a video: it cannot open network addresses, and its metadata may be any bytes.
UNTRUSTED = {"options": {"protocol_whitelist": "file"}, "metadata_errors": "replace"}
# The first bytes of video files: MP4 and QuickTime, Matroska and WebM, AVI, FLV, WMV, MPEG-PS,
# MPEG-TS, Ogg. A playlist, which could open other files, does not match; nor does a GIF.
VIDEO = rb"....(?:ftyp|moov|mdat|free|skip|wide|pnot)|\x1aE\xdf\xa3|RIFF....AVI |FLV|0&\xb2u"
VIDEO += rb"|\x00\x00\x01[\xba\xb3]|(?!GIF8)(?:....)?G.{187}(?:....)?G|OggS"
VIDEO = re.compile(VIDEO, re.DOTALL)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes run in parallel instead

# 1. Rows


class BadRow(Exception):
    """A row that cannot be used; the message says why."""


class JsonLines:
    """The rows of a JSON lines file. Only the offset and the number of each line are in memory."""

    def __init__(self, path: Path):
        self.path, places = path, array("q")
        at, line, begins = 0, 1, True
        with path.open("rb") as file:
            for piece in iter(partial(file.readline, MAX_ROW), b""):  # a long line has several
                if begins and piece.strip():
                    places.extend((at, line))
                at, begins = at + len(piece), piece.endswith(b"\n")
                line += begins
        self.places = np.array(places).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, row: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.places[row, 0])
            content = file.readline(MAX_ROW + 1)
        if len(content) > MAX_ROW:
            raise BadRow(f"is longer than {MAX_ROW:,} bytes")
        return json.loads(content.decode("utf-8-sig"))


def find_files(path: str) -> tuple[Path, list[Path]]:
    """The directory of a data set, and the files of one of its splits.

    `path` is a file, a directory of Parquet or Arrow files, or a data set's hub name, whose Parquet
    files are downloaded. `:SPLIT` after a directory or a hub name chooses one of several splits.
    """
    place, split = Path(path), ""
    if ":" in path and not place.exists():
        place, split = Path(path.rpartition(":")[0]), path.rpartition(":")[2]
    if not place.exists() and HUB_NAME.fullmatch(str(place)):
        chosen = f"*{glob.escape(split)}*.parquet"
        try:
            place = Path(snapshot_download(str(place), repo_type="dataset", allow_patterns=chosen))
        except (OSError, ValueError) as error:
            raise UsageError(f"is neither here nor on the hub ({first_line(error)})") from None
    require(place.exists(), "no such file or directory")
    if place.is_file():
        return place.parent, [place]
    splits = defaultdict(list)
    for file in data_files(str(place)):
        name = SHARD.sub("", file.relative_to(place).with_suffix("").as_posix())
        if not split or f"/{split}/" in f"/{name}/":
            splits[name].append(file)
    of_split = f" of a split {split!r}" if split else ""
    require(splits, f"has no Parquet or Arrow files{of_split}; {EXPECTED}")
    several = f"has the splits {', '.join(splits)[:300]}; choose one, as in {path}:{min(splits)}"
    require(len(splits) == 1, several)
    return place, splits.popitem()[1]


def open_rows(files: list[Path]) -> Any:
    """The rows of data files, as a sequence of parsed JSON or of Arrow tables of one row."""
    with files[0].open("rb") as file:
        start = file.read(2**12).removeprefix(b"\xef\xbb\xbf").lstrip()
    require(start, "is empty")
    if start.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return open_arrow(files, start.startswith(b"PAR1"))
    kind = NOT_ROWS.get(start[:2], f"begins with {start[:40].decode(errors='replace')!r}")
    require(start[:1] in (b"[", b"{"), f"{kind}; {EXPECTED}")
    if start[:1] == b"{":
        return JsonLines(files[0])
    content = files[0].read_bytes()
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        before = content[: getattr(error, "start", 0)]  # of a byte that is not UTF-8
        line = getattr(error, "lineno", before.count(b"\n") + 1)
        reason = getattr(error, "msg", first_line(error))
        raise UsageError(f"its array is not JSON, line {line}: {reason}") from None


def open_arrow(files: list[Path], is_parquet: bool) -> Any:
    """The rows of Parquet or Arrow files. They stay on disk, and their media stay undecoded."""
    import datasets  # takes a second
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are raised, too
    try:
        if is_parquet:
            names = [glob.escape(str(file)) for file in files]
            rows = datasets.load_dataset("parquet", data_files=names, split="train")
        else:
            parts = [datasets.Dataset.from_file(str(file)) for file in files]
            rows = datasets.concatenate_datasets(parts)
    except (DatasetsError, ArrowException, OSError, ValueError, TypeError, LookupError) as error:
        raise UsageError(f"cannot be read ({first_line(error.__cause__ or error)})") from None
    known = sum((*COLUMNS.values(), *MEDIA_COLUMNS.values()), ())
    return rows.with_format("arrow", [name for name in rows.column_names if name in known])


@dataclass
class MediaBytes:
    """The content of a media file, opened like a `Path`."""

    name: str
    content: bytes

    def open(self, mode: str) -> BytesIO:
        return BytesIO(self.content)


class DataFile:
    """The rows of a data file as `Example`s, read one at a time.

    `path` is that of `find_files`. `frames` and `fps` are those of `frame_indices`; without both, a
    video gives 16 frames. Media are searched for under `roots`, by default the file's own
    directory. Rank 0 prints which columns are read.

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
        self.file, self.fps = Path(path).name, fps
        self.frames = 16 if frames is None and fps is None else frames
        for root in roots:
            require(Path(root).is_dir(), f"--media-root {root}: no such directory")
        try:
            folder, files = find_files(path)
            self.roots = [Path(root).resolve() for root in roots or [folder]]
            self.rows = open_rows(files)
            self.columns, note = self.find_columns()
        except UsageError as error:
            raise UsageError(f"{option} {path}: {error}") from None
        print_once(f"{option} {path}: {len(self):,} rows, {note}")

    def __len__(self) -> int:
        return len(self.rows)

    def find_columns(self) -> tuple[dict[str, str], str]:
        """The file's name for each of `COLUMNS`, and a note that says which are read. JSON rows may
        differ, so the first 100 are looked at."""
        require(len(self) > 0, "has no rows")
        present, reason = set(getattr(self.rows, "column_names", ())), ""
        for row in range(0 if present else min(100, len(self))):
            try:
                present |= self.fields(row).keys()
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
        if columns["problem_type"] is None:
            note += "; no problem_type: multiple choice with options, else exact match"
        return {field: name or field for field, name in columns.items()}, note

    def name(self, row: int) -> str:
        return f"{self.file} row {row + 1}"

    def place(self, row: int) -> str:
        """The name of a row and, in JSON lines, the number of its line, both counted from 1."""
        is_lines = isinstance(self.rows, JsonLines)
        return self.name(row) + (f" (line {self.rows.places[row, 1]})" if is_lines else "")

    def fields(self, row: int) -> dict[str, Any]:
        """The columns of a row as they are in the file."""
        try:
            fields = self.rows[row]
            if hasattr(fields, "to_pylist"):
                (fields,) = fields.to_pylist()
        except json.JSONDecodeError as error:
            raise BadRow(f"is not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
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
        for kind, source in self.media_sources(fields, example):
            if kind == "video":
                medium = read_video(source, self.frames, self.fps)
            else:
                medium = Media([read_image(source)])
            media.append(medium)
            size += sum(3 * frame.width * frame.height for frame in medium.frames)
            if size > MAX_FRAME_BYTES:
                raise BadRow("its media take more than 4 GB")
        return replace(example, media=media, name=self.name(row))

    def media_sources(
        self, fields: dict[str, Any], example: Example
    ) -> list[tuple[str, Path | MediaBytes]]:
        """For each medium of a row, "image" or "video" and its file or content, in the order of the
        markers in the text; without markers, images come first."""
        found, data_type = [], fields["data_type"] or None
        for kind, names in MEDIA_COLUMNS.items():
            name = next(filter(fields.get, names), None)
            if name is None or (name == "path" and found):
                continue
            if name == "path" and data_type not in ("image", "video", None):
                raise BadRow(f"data_type is {str(data_type)[:40]!r}; known are image and video")
            items = fields[name] if isinstance(fields[name], list) else [fields[name]]
            if len(items) > MAX_MEDIA:
                raise BadRow(f"{name!r} has {len(items):,} files; at most {MAX_MEDIA} are allowed")
            for number, item in enumerate(items, 1):
                content = item
                if isinstance(item, dict):
                    content = item.get("bytes") or item.get("path")
                if isinstance(content, bytes):
                    source = MediaBytes(f"{name} {number}", content)
                elif isinstance(content, str) and content:
                    source = self.find(content)
                else:
                    raise BadRow(f"{name!r} has {str(item)[:40]}, not the path or bytes of a file")
                medium_kind = kind or data_type or ("video" if is_video(source) else "image")
                found.append((medium_kind, source))
        if not found and data_type in ("image", "video"):
            raise BadRow(f"has no {data_type} in 'path' or another column")
        markers = re.findall("<(image|video)>", "\n".join([example.problem, *example.options]))
        if not markers:
            return found
        kinds = Counter(kind for kind, _ in found)
        if Counter(markers) != kinds:
            placed = f"places {markers.count('image')} images and {markers.count('video')} videos"
            raise BadRow(f"its text {placed}, but it has {kinds['image']} and {kinds['video']}")
        return [found.pop([kind for kind, _ in found].index(marker)) for marker in markers]

    def find(self, path: str) -> Path:
        """The file that `path` names under one of the roots; targets of links are checked too."""
        outside = False
        for root in self.roots:
            try:
                target = (root / path).resolve()
                if any(target.is_relative_to(allowed) for allowed in self.roots):
                    if target.is_file():
                        return target
                else:
                    outside = True
            except (OSError, ValueError, RuntimeError):  # too long, has a NUL, or a loop of links
                continue
        raise BadRow(f"path {path[:200]!r} {'leaves' if outside else 'is not under'} --media-root")


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
                if (kind := part.get("type")) in ("image", "video"):
                    text += f"<{kind}>"
                    fields[f"{kind}s"] += [part[kind]] if part.get(kind) else []
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
        raise BadRow("has half a pair of answer tags, or nothing between them")
    options = fields["options"] or []
    if not isinstance(options, list) or not all(isinstance(x, str) for x in options):
        raise BadRow("options is not a list of texts")
    for name, text, most in (
        ("question", problem, MAX_PROBLEM),
        ("answer", solution, MAX_SOLUTION),
        ("options", "\n".join(options), MAX_SOLUTION),
        ("thought", thought, MAX_THOUGHT),
    ):
        if len(text) > most:
            raise BadRow(f"{name}: {len(text):,} characters; at most {most:,} are allowed")
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
    letter = option_letter(solution, options)
    if options and not letter:
        raise BadRow(f"solution {solution[:40]!r} is not one of the options {', '.join(texts)}")
    if list(texts.values()) == options:
        options = [f"{name}. {text}" for name, text in texts.items()]
    return options, letter or solution


# 2. Media


def is_video(path: Path | MediaBytes) -> bool:
    """Whether a file is a video, by its first bytes."""
    try:
        with path.open("rb") as file:
            return VIDEO.match(file.read(512)) is not None
    except OSError as error:
        raise BadRow(f"{path.name}: cannot be read ({error.strerror})") from None


def read_image(path: Path | MediaBytes) -> Image.Image:
    """Read an image as upright RGB; transparent areas become white.

    Raises:
        BadRow: the image cannot be read, or is too large or too narrow.
    """
    try:
        with path.open("rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if max(image.size) > MAX_RATIO * min(image.size):
                raise BadRow(f"{path.name}: sides of {image.size} are too unequal")
            if image.mode in ("I", "F"):  # their value range is unknown
                raise BadRow(f"{path.name}: pixels of mode {image.mode} are not supported")
            if image.mode.startswith("I;16"):  # Pillow would clip at 255, not scale
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadRow(f"{path.name}: not a readable image ({', '.join(IMAGE_FORMATS)})") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRow(f"{path.name}: not a readable image ({first_line(error)})") from None


def frame_indices(
    total: int, rate: float, frames: int | None, fps: float | None, times: np.ndarray | None = None
) -> list[int]:
    """Choose from `total` frames, shown at `rate` per second: `frames` of them, evenly spaced from
    first to last, or `fps` per second, but at most `frames` (768 if None).

    `times` (total,) are the seconds at which the frames of a variable-rate video are shown. With
    `times`, `fps` takes the frames nearest to evenly spaced times. `frames` alone still spaces
    indices evenly, as Video-R1 and the models' release do, which gives exactly the requested
    number. No frame is taken twice: a shorter video gives all its frames.
    """
    count = MAX_FRAMES if frames is None else frames
    if fps is not None:
        count = min(count, max(2, round(total / rate * fps)))
    if fps is None or times is None:
        places = np.linspace(0, total - 1, min(count, total))
    else:  # fractional frame index of each time; rounding gives the nearest frame
        places = np.interp(np.linspace(times[0], times[-1], count), times, np.arange(total))
    return np.unique(places.round().astype(int)).tolist()


def read_video(path: Path | MediaBytes, frames: int | None, fps: float | None) -> Media:
    """The chosen frames of a video, upright, with the times at which it shows them.

    Raises:
        BadRow: the video is cut off or too large, or a frame cannot be decoded.
        UsageError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        why = "videos need PyAV, which is not installed"
        raise UsageError(f"{path.name}: {why}; pip install av, or use images only") from None
    try:
        if not is_video(path):
            raise BadRow(f"{path.name}: not a video, by its first bytes")
        with open_video(path) as container:
            stamps, keys, rate, times, (width, height) = index_video(container, path.name)
        indices = frame_indices(len(stamps), rate, frames, fps, times)
        if max(height, width) > MAX_RATIO * min(height, width):
            raise BadRow(f"{path.name}: sides of {(width, height)} are too unequal")
        if len(indices) * width * height * 3 > MAX_FRAME_BYTES:
            raise BadRow(f"{path.name}: {len(indices)} of its frames take more than 4 GB")
        with open_video(path) as container:
            pictures = seek_frames(container, [stamps[i] for i in indices], keys)
        if not pictures:
            with open_video(path) as container:
                pictures = count_frames(container, indices)
    except (av.FFmpegError, OSError) as error:
        raise BadRow(f"{path.name}: not a readable video ({first_line(error)})") from None
    if len(pictures) < len(indices):
        raise BadRow(f"{path.name}: some of its {len(stamps):,} frames cannot be decoded")
    shown = np.arange(len(stamps)) / rate if times is None else times
    return Media(pictures, is_video=True, times=shown[indices].tolist())


def open_video(path: Path | MediaBytes) -> Any:
    import av

    return av.open(str(path) if isinstance(path, Path) else path.open("rb"), **UNTRUSTED)


def index_video(
    container: Any, name: str
) -> tuple[list[int], list[int], float, np.ndarray | None, tuple[int, int]]:
    """Index the frames of an open video from its packets, without decoding them.

    Returns time stamps in display order, those of keyframes (none if stamps are unreliable), frames
    per second, the seconds at which frames are shown (None at a constant rate), and width and
    height.

    Raises:
        BadRow: the video has no frames or fewer than it announces, or there is no decoder for it.
    """
    video = container.streams.best("video")
    if video is not None and video.codec_context is None:
        mend = "convert it with ffmpeg -i OLD -c:v libx264 -pix_fmt yuv420p NEW.mp4"
        raise BadRow(f"{name}: there is no decoder for its codec; {mend}")
    # Keeping the packets themselves would hold the whole file in memory.
    demuxed = container.demux(video) if video is not None else ()
    packets = [(p.pts, p.is_keyframe, p.is_discard) for p in demuxed if p.size]
    cut = sum(is_discard for _, _, is_discard in packets)  # decoded but not shown
    if len(packets) == cut or not video.width or not video.height:
        raise BadRow(f"{name}: has no frames")
    if len(packets) < 0.9 * video.frames:  # some containers also count dropped frames
        raise BadRow(f"{name}: is cut off, {len(packets):,} of {video.frames:,} frames are there")
    rate, size = float(video.average_rate or video.guessed_rate or 1), (video.width, video.height)
    if container.format.name in UNSTAMPED or any(pts is None for pts, _, _ in packets):
        return list(range(len(packets) - cut)), [], rate, None, size
    stamps = sorted({pts for pts, _, is_discard in packets if not is_discard})
    keys = sorted({pts for pts, is_key, _ in packets if is_key})
    times = (np.array(stamps) - stamps[0]) * float(video.time_base)
    if np.abs(times - np.arange(len(times)) / rate).max() < 0.5 / rate:
        return stamps, keys, rate, None, size
    return stamps, keys, (len(times) - 1) / times[-1], times, size


def seek_frames(container: Any, wanted: list[int], keys: list[int]) -> list[Image.Image]:
    """Decode the frames with the time stamps `wanted` (ascending), each from the keyframe before
    it. Returns no frames if any of them is not found."""
    video, pictures, key = first_video(container), [], None
    for stamp in wanted if keys else ():
        before = keys[max(0, bisect_right(keys, stamp) - 1)]
        if before != key:
            key = before
            container.seek(key, stream=video)
            decoded = container.decode(video)
        frame = next((f for f in decoded if f.pts is not None and f.pts >= stamp), None)
        if frame is None or frame.pts != stamp:
            return []
        pictures.append(upright(frame, video))
    return pictures


def count_frames(container: Any, indices: list[int]) -> list[Image.Image]:
    """Decode the frames with these numbers, counted from the beginning: slower, but correct even if
    time stamps or seeking are not."""
    video, chosen = first_video(container), set(indices)
    decoded = enumerate(islice(container.decode(video), indices[-1] + 1))
    return [upright(frame, video) for number, frame in decoded if number in chosen]


def first_video(container: Any) -> Any:
    video = container.streams.best("video")
    video.codec_context.thread_count = 1  # worker processes run in parallel instead
    # A frame may announce a larger size than the file does. Limit it to 89 MP, as for images.
    video.codec_context.options = {"max_pixels": str(Image.MAX_IMAGE_PIXELS)}
    return video


def upright(frame: Any, video: Any) -> Image.Image:
    """Convert a decoded frame to RGB in the video's initial size, rotated as the file specifies."""
    picture = frame.to_image(width=video.width, height=video.height)
    return picture.rotate(frame.rotation, expand=True)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# 3. Prompts, read ahead


class Prompts(Dataset):
    """Prompt number n of a run, counted from 0, and the bad rows met while reading it.

    With a seed, the prompt is a function of (seed, n) alone, so a state need not store the order:
    every epoch has its own order, and a random row replaces a bad one. Without a seed, prompt n is
    row n, or None if that row is bad. `source` must provide `example(row)`. The media of prompts
    from number `keep_media` on lose their frames, which only rewards and pictures need.
    """

    def __init__(
        self,
        source: Any,
        encode: Callable[[Example], Prompt],
        rows: np.ndarray | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        keep_media: int = 0,
    ):
        self.source, self.encode, self.rows, self.seed = source, encode, rows, seed
        self.max_tokens, self.keep_media = max_tokens, keep_media
        self.order = (-1, rows)  # of the epoch last requested

    def row(self, n: int, attempt: int) -> int:
        if self.rows is None:
            return n
        if self.seed is None:
            return int(self.rows[n])
        if attempt:
            draw = np.random.default_rng([self.seed, n, attempt])
            return int(self.rows[draw.integers(len(self.rows))])
        epoch, place = divmod(n, len(self.rows))
        if self.order[0] != epoch:
            draw = np.random.default_rng([self.seed, epoch])
            self.order = (epoch, draw.permutation(self.rows))
        return int(self.order[1][place])

    def prompt(self, row: int) -> Prompt:
        prompt = self.encode(self.source.example(row))
        if self.max_tokens is not None and len(prompt.ids) > self.max_tokens:
            limit = f"above --max-prompt-tokens {self.max_tokens}"
            raise BadRow(f"its prompt has {len(prompt.ids)} tokens, {limit}")
        return prompt

    def __getitem__(self, n: int) -> tuple[Prompt | UsageError | None, dict[str, str]]:
        bad = {}
        for attempt in range(100 if self.seed is not None else 1):
            row = self.row(n, attempt)
            try:
                prompt = self.prompt(row)
                prompt.number = n
                if n >= self.keep_media:  # avoid sending pictures between processes
                    media = [replace(medium, frames=[]) for medium in prompt.example.media]
                    prompt.example = replace(prompt.example, media=media)
                return prompt, bad
            except BadRow as error:
                bad[self.source.place(row)] = str(error)
            except UsageError as error:  # raised in a worker, it would not arrive as a `UsageError`
                return error, bad
        return None, bad


@dataclass
class Reader:
    """Iterates over the prompts `numbers`, which `workers` processes read and encode ahead. With 0
    workers, this process reads each one on demand."""

    prompts: Prompts
    numbers: Sequence[int]
    workers: int
    bad_rows: BadRows

    @property
    def epoch(self) -> int:
        """Number of rows to train on."""
        return len(self.prompts.rows)

    def begin(self, number: int) -> Iterator[Prompt]:
        """This rank's prompts from `number` on, without end."""
        return iter(replace(self, numbers=range(number, 2**62, world_size())))

    def __iter__(self) -> Iterator[Prompt]:
        loader = DataLoader(
            self.prompts,
            batch_size=None,
            sampler=self.numbers,
            num_workers=min(self.workers, os.cpu_count()),
            collate_fn=unchanged,
            worker_init_fn=guard_reader,
            prefetch_factor=4 if self.workers else None,
        )
        for prompt, bad in loader:
            self.bad_rows.add(bad)
            if isinstance(prompt, UsageError):
                raise prompt
            if prompt is not None:
                yield prompt
            elif self.prompts.seed is not None:
                raise UsageError(f"100 bad rows one after another; the last: {bad.popitem()}")


def unchanged(item: Any) -> Any:
    return item


def guard_reader(worker: int) -> None:
    """Set up a reader process: it ignores termination signals and ends with its parent.

    A scheduler signals all processes of a run, but the training loop still needs its prompts to
    finish the step.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()


def end_with_parent(parent: int) -> None:
    """End this process within a second of its parent, even if the parent was killed.

    PyTorch's workers watch their parent too. But a worker inside a decoder does not check, and one
    that has sent more than a pipe holds waits for a receiver.
    """
    while os.getppid() == parent and multiprocessing.parent_process().is_alive():
        time.sleep(1)
    os._exit(1)


@atexit.register
def end_readers() -> None:
    """Kill the remaining readers when the interpreter exits.

    Python would send them SIGTERM, which they ignore, and then wait for them without limit. Usually
    no readers remain, because PyTorch ends its workers when their iterator is deleted. But an
    exception keeps the iterators alive in its traceback, and a worker inside a decoder does not
    respond.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises if a worker is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def check_files(args: Any, is_toy: bool) -> None:
    """Refuse inconsistent arguments about data files.

    Raises:
        UsageError: the message names the arguments.
    """
    require_not_negative(args, "workers")
    bounded = args.image_tokens is not None or args.frame_tokens is not None
    sizes = "--image-tokens, --frame-tokens: on the toy a cell is a token"
    require(not (is_toy and bounded), f"{sizes}; use sft.py --grid")
    if args.data is None:
        names = ("eval_data", "media_root", "check_data", "fps")
        for name in names:
            given = bool(getattr(args, name))
            require(not given, f"--{name.replace('_', '-')}: needs --data")
        if not is_toy:
            print_on_rank_0("no --data: the built-in task, a smoke run of the model")
        return
    learned = "the toy knows only the words of its task"
    require(not is_toy, f"--data {args.data}: {learned}; give --model a real checkpoint")
    require(args.grid is None and args.toy_order is None, "--grid, --toy-order: not with --data")


def open_data(
    args: Any, encode: Callable[[Example], Prompt], keep_media: bool = False
) -> tuple[Reader, Reader, BadRows]:
    """Open the training prompts of `--data` (see `Reader.begin`) and this rank's share of the
    evaluation prompts; returns both with the record of bad rows.

    Without `--eval-data`, up to `eval_examples` rows, but at most a tenth, are held out from
    training for evaluation. They are the same for every seed.
    """
    train = held_out = DataFile(args.data, args.media_root, args.frames, args.fps)
    rows = np.random.default_rng(0).permutation(len(train))
    if args.eval_data:
        held_out = DataFile(args.eval_data, args.media_root, args.frames, args.fps, "--eval-data")
        apart = np.random.default_rng(0).permutation(len(held_out))[: args.eval_examples]
    else:
        require(len(rows) > 1, f"--data {args.data}: has one row; give --eval-data")
        apart, rows = np.split(rows, [min(args.eval_examples, max(1, len(rows) // 10))])
    apart, rows, most = np.sort(apart), np.sort(rows), args.max_prompt_tokens
    bad_rows = BadRows(args.max_skipped, len(train))
    keep = sys.maxsize if keep_media else 0
    training = Prompts(train, encode, rows, args.seed, most, keep)
    # Six pictures are drawn; some of the first rows may be bad.
    evaluation = Prompts(held_out, encode, apart, None, most, keep_media=8 * world_size())
    return (
        Reader(training, range(0), args.workers, bad_rows),
        Reader(evaluation, range(rank(), len(apart), world_size()), args.workers, bad_rows),
        bad_rows,
    )


def check_data(
    args: Any, encode: Callable[[Example], Prompt], accuracy_rule: str = "by-type"
) -> dict[str, float]:
    """Read every row of `--data` and `--eval-data` once, and print a summary and all bad rows.

    Raises:
        UsageError: the fraction of bad rows exceeds `--max-skipped`, or several processes were
            started.
    """
    require(
        world_size() == 1, "--check-data: is the work of one process; start it without torchrun"
    )
    report = {}
    for option, path in (("--data", args.data), ("--eval-data", args.eval_data)):
        if path is None:
            continue
        file = DataFile(path, args.media_root, args.frames, args.fps, option)
        bad_rows, rows = BadRows(1.0, len(file)), np.arange(len(file))
        prompts = Prompts(file, encode, rows, max_tokens=args.max_prompt_tokens)
        kinds, lengths, no_number = Counter(), [], []
        reader = Reader(prompts, rows, args.workers, bad_rows)
        for prompt in tqdm(reader, total=len(rows), desc=f"{option} {path}"):
            example = prompt.example
            media = [medium.kind for medium in example.media]
            kind = "several" if len(media) > 1 else "".join(media) or "text"
            kinds[f"{kind}, {example.problem_type or 'exact match'}"] += 1
            lengths.append(len(prompt.ids))
            numeric = example.problem_type in ("numerical", "regression")
            if numeric and accuracy_rule == "by-type" and read_number(example.solution) is None:
                no_number.append(example.name)
        for name, reason in bad_rows.bad.items():
            print(f"bad: {name}: {reason}")
        print(f"{option} {path}: {len(rows):,} rows, {len(bad_rows.bad):,} bad")
        for kind, number in sorted(kinds.items()):
            print(f"  {kind:<28}{number:>10,}")
        if no_number:
            only = "so only the same text is right"
            print(f"  solution is not one number, {only}: {len(no_number):,}, as {no_number[0]}")
        if lengths:
            print(f"  prompt tokens: median {np.median(lengths):,.0f}, most {max(lengths):,}")
        report |= {f"{option}/rows": len(rows), f"{option}/bad": len(bad_rows.bad)}
        few = len(bad_rows.bad) <= args.max_skipped * len(rows)
        require(few, f"{option} {path}: more than --max-skipped {args.max_skipped} are bad")
    return report
