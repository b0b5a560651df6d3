"""Data files: JSON rows, their images and videos, and prompts read ahead of training.

A row is an object in a JSON array or on a line of its own, with the fields of Video-R1:

    {"problem": "What is the man holding?", "data_type": "video", "path": "./clips/17.mp4",
     "problem_type": "multiple choice", "options": ["A. a cup", "B. a book"],
     "solution": "<answer>A</answer>"}

`problem_type` is one of PROBLEM_TYPES. `options`, `problem_id`, `data_source` and, for SFT,
`process` (the thought) are optional. Data files are untrusted: a row that cannot be used is
reported with its reason and skipped, and no path leads outside the media roots.
"""

import atexit
import json
import mmap
import multiprocessing
import os
import re
import signal
import sys
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from answers import MAX_ANSWER, option_letter, option_texts, read_number
from common import extract_answer
from prompts import Example, Media, Prompt
from runs import (
    BadRows,
    UsageError,
    print_on_rank_0,
    rank,
    require,
    require_not_negative,
    world_size,
)

PROBLEM_TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no format that runs a program
# MAX_ROW is in bytes, the others are in characters. A row that exceeds a limit is bad.
MAX_ROW, MAX_SOLUTION, MAX_THOUGHT = 2**20, MAX_ANSWER, 50_000
MAX_RATIO = 200  # of an image's sides; the image processor's limit
MAX_FRAMES, MAX_FRAME_BYTES = 768, 2**32  # per video: frames with only --fps, bytes of all frames
# FFmpeg's names of containers with unusable time stamps: AVI stamps the decoding order, and MPEG-PS
# leaves frames unstamped.
UNSTAMPED = ("avi", "mpeg")
# Options for opening a video: it cannot open network addresses, and its metadata may be any bytes.
UNTRUSTED = {"options": {"protocol_whitelist": "file"}, "metadata_errors": "replace"}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes run in parallel instead

# 1. Rows


class BadRow(Exception):
    """A row that cannot be used; the message says why."""


# The first bytes of video files: MP4 and QuickTime, Matroska and WebM, AVI, FLV, WMV, MPEG-PS,
# MPEG-TS, Ogg. A playlist, which could open other files, does not match.
VIDEO = rb"....(?:ftyp|moov|mdat|free|skip|wide|pnot)|\x1aE\xdf\xa3|RIFF....AVI |FLV|0&\xb2u"
VIDEO = re.compile(VIDEO + rb"|\x00\x00\x01[\xba\xb3]|(?:....)?G.{187}(?:....)?G|OggS", re.DOTALL)
TEXT = rb'"(?:[^"\\]++|\\.)*+"'
FLAT = rb'\{(?:[^{}"]++|' + TEXT + rb")*+\}"
ROW = re.compile(rb'\{(?:[^{}"]++|' + TEXT + rb"|" + FLAT + rb")*+\}", re.DOTALL)
TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*+"|[{}]')  # no string spans lines
BETWEEN = re.compile(rb"[\s,]*+")
NEXT_ROW = re.compile(rb"[\n,]\s*+(?=\{)|\Z")


def find_rows(content: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each row in bytes. If the first character is a bracket, the rows
    are the elements of a JSON array; otherwise they are the non-blank lines.

    Nothing is decoded yet. In an array, content that is not an object counts as a row too, up to
    the apparent start of the next one. So does the missing end of an array. Both are later reported
    as unreadable, so nothing is dropped silently.
    """
    at = 3 if content[:3] == b"\xef\xbb\xbf" else 0  # a byte order mark
    at = BETWEEN.match(content, at).end()
    if content[at : at + 1] != b"[":
        while at < len(content):
            end = content.find(b"\n", at)
            end = len(content) if end < 0 else end
            if content[at:end].strip():
                yield at, end
            at = end + 1
        return
    at, end = BETWEEN.match(content, at + 1).end(), 0
    while at < len(content) and content[at : at + 1] != b"]":
        end = object_end(content, at)
        yield at, end or NEXT_ROW.search(content, at).end()
        at = BETWEEN.match(content, end or NEXT_ROW.search(content, at).end()).end()
    rest = BETWEEN.match(content, at + 1).end()
    if at >= len(content) and end != 0:
        yield at, at  # the missing end
    elif rest < len(content):
        yield rest, len(content)  # content after the array


def object_end(content: mmap.mmap, at: int) -> int:
    """The end of the object that begins at `at`, or 0 if it does not end within MAX_ROW bytes."""
    if flat := ROW.match(content, at, at + MAX_ROW):
        return flat.end()
    depth = 0
    for token in TOKEN.finditer(content, at, at + MAX_ROW):
        depth += {b"{": 1, b"}": -1}.get(token[0], 0)
        if depth <= 0:
            return token.end() if token[0] == b"}" and content[at : at + 1] == b"{" else 0
    return 0


class DataFile:
    """The rows of a data file as `Example`s. Rows are read one at a time; only their offsets are in
    memory.

    `frames` and `fps` are those of `frame_indices`. Media are searched for under `roots`, by
    default the file's own folder.

    Raises:
        UsageError: the file or a root does not exist, or the file has no rows.
    """

    def __init__(
        self,
        path: str,
        roots: Sequence[str] = (),
        frames: int | None = 16,
        fps: float | None = None,
        option: str = "--data",
    ):
        self.path, self.frames, self.fps = Path(path), frames, fps
        self.counted = (0, 1)  # an offset, and the line number there
        require(self.path.is_file(), f"{option} {path}: no such file")
        require(self.path.stat().st_size > 0, f"{option} {path}: is empty")
        self.roots = [Path(root).resolve() for root in roots or [self.path.parent]]
        for root in self.roots:
            require(root.is_dir(), f"--media-root {root}: no such directory")
        offsets = array("q")
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            for start, end in find_rows(content):
                offsets.extend((start, end))
        self.offsets = np.array(offsets).reshape(-1, 2)
        require(len(self) > 0, f"{option} {path}: has no rows")

    def __len__(self) -> int:
        return len(self.offsets)

    def name(self, row: int) -> str:
        return f"{self.path.name} row {row + 1}"

    def place(self, row: int) -> str:
        """File, row and line, each counted from 1, for finding the row in an editor."""
        start = int(self.offsets[row, 0])
        at, line = self.counted if self.counted[0] <= start else (0, 1)
        with self.path.open("rb") as file:
            file.seek(at)
            while at < start:
                at += len(chunk := file.read(min(start - at, 2**20)))
                line += chunk.count(b"\n")
        self.counted = (start, line)  # a run of bad rows is counted once
        return f"{self.name(row)} (line {line})"

    def example(self, row: int) -> Example:
        """Row number `row` (from 0) with its media.

        Raises:
            BadRow: the row cannot be used.
        """
        start, end = map(int, self.offsets[row])
        if end - start > MAX_ROW:
            raise BadRow(f"is {end - start:,} bytes long; at most {MAX_ROW:,} are allowed")
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            fields = json.loads(content, parse_constant=lambda name: None)  # NaN is not a solution
        except (ValueError, RecursionError) as error:
            raise BadRow(f"is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise BadRow("is not a JSON object")
        example = self.parse(fields)
        path = self.find(fields["path"])
        if fields["data_type"] == "image":
            media = Media([read_image(path)])
        else:
            media = read_video(path, self.frames, self.fps)
        return replace(example, media=[media], name=self.name(row))

    def parse(self, fields: dict[str, Any]) -> Example:
        """The example of a row, without its media.

        Raises:
            BadRow: a field is missing or invalid.
        """
        for name in ("problem", "solution", "path", "data_type", "problem_type"):
            value = fields.get(name)
            if isinstance(value, int | float) and name == "solution":
                value = fields[name] = str(value)
            if not isinstance(value, str) or not value.strip():
                raise BadRow(f"has no text in {name!r}")
        if fields["data_type"] not in ("image", "video"):
            raise BadRow(f"data_type is {fields['data_type'][:40]!r}; known are image and video")
        if fields["problem_type"] not in PROBLEM_TYPES:
            known = ", ".join(PROBLEM_TYPES)
            raise BadRow(f"problem_type is {fields['problem_type'][:40]!r}; known are {known}")
        solution = extract_answer(fields["solution"])
        solution = fields["solution"].strip() if solution is None else solution
        if not 0 < len(solution) <= MAX_SOLUTION:
            raise BadRow(f"solution has {len(solution):,} characters; allowed are 1 to 10,000")
        if "<answer>" in solution or "</answer>" in solution:
            raise BadRow("solution has half a pair of answer tags")
        options = fields.get("options") or []
        if not isinstance(options, list) or not all(isinstance(x, str) for x in options):
            raise BadRow("options is not a list of texts")
        if any(len(option) > MAX_SOLUTION for option in options):
            raise BadRow("an option has more than 10,000 characters")
        if fields["problem_type"] == "multiple choice":
            options, solution = choices(options, solution)
        try:
            json.dumps([fields["problem"], solution, options], ensure_ascii=False).encode()
            str(fields.get("process")).encode()
        except UnicodeEncodeError:
            raise BadRow("has half a character (a lone surrogate) in its text") from None
        thought = fields.get("process")
        if isinstance(thought, str) and len(thought) > MAX_THOUGHT:
            raise BadRow(f"process has {len(thought):,} characters; at most {MAX_THOUGHT:,}")
        return Example(
            problem=fields["problem"],
            solution=solution,
            media=[],
            response=thought.strip() if isinstance(thought, str) and thought.strip() else None,
            problem_type=fields["problem_type"],
            options=tuple(options),
            source=str(fields.get("data_source") or "").encode(errors="replace").decode()[:200],
        )

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


def read_image(path: Path) -> Image.Image:
    """Read an image as upright RGB; transparent areas become white.

    Raises:
        BadRow: the image cannot be read, or is too large or too narrow.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
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


def read_video(path: Path, frames: int | None, fps: float | None) -> Media:
    """The chosen frames of a video, upright, with the times at which it shows them.

    Raises:
        BadRow: the video is cut off or too large, or a frame cannot be decoded.
        UsageError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        why = "videos need PyAV, which is not installed"
        raise UsageError(f"{path}: {why}; pip install av, or use images only") from None
    try:
        with path.open("rb") as file:
            if not VIDEO.match(file.read(512)):
                raise BadRow(f"{path.name}: not a video, by its first bytes")
        with av.open(str(path), **UNTRUSTED) as container:
            stamps, keys, rate, times, (width, height) = index_video(container, path.name)
        indices = frame_indices(len(stamps), rate, frames, fps, times)
        if max(height, width) > MAX_RATIO * min(height, width):
            raise BadRow(f"{path.name}: sides of {(width, height)} are too unequal")
        if len(indices) * width * height * 3 > MAX_FRAME_BYTES:
            raise BadRow(f"{path.name}: {len(indices)} of its frames take more than 4 GB")
        with av.open(str(path), **UNTRUSTED) as container:
            pictures = seek_frames(container, [stamps[i] for i in indices], keys)
        if not pictures:
            with av.open(str(path), **UNTRUSTED) as container:
                pictures = count_frames(container, indices)
    except (av.FFmpegError, OSError) as error:
        raise BadRow(f"{path.name}: not a readable video ({first_line(error)})") from None
    if len(pictures) < len(indices):
        raise BadRow(f"{path.name}: some of its {len(stamps):,} frames cannot be decoded")
    shown = np.arange(len(stamps)) / rate if times is None else times
    return Media(pictures, is_video=True, times=shown[indices].tolist())


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
    row n, or None if that row is bad. `source` must provide `example(row)`.
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
                if n >= self.keep_media:  # avoid sending them between processes
                    prompt.example = replace(prompt.example, media=[])
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
            collate_fn=same,
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


def same(item: Any) -> Any:
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
    frames = args.frames or (None if args.fps else 16)
    train = held_out = DataFile(args.data, args.media_root, frames, args.fps)
    rows = np.random.default_rng(0).permutation(len(train))
    if args.eval_data:
        held_out = DataFile(args.eval_data, args.media_root, frames, args.fps, "--eval-data")
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
    report, frames = {}, args.frames or (None if args.fps else 16)
    for option, path in (("--data", args.data), ("--eval-data", args.eval_data)):
        if path is None:
            continue
        file = DataFile(path, args.media_root, frames, args.fps, option)
        rows = np.arange(len(file))
        bad_rows = BadRows(1.0, len(file))
        reader = Reader(
            Prompts(file, encode, rows, None, args.max_prompt_tokens), rows, args.workers, bad_rows
        )
        kinds, lengths, no_number = Counter(), [], []
        for prompt in tqdm(reader, total=len(rows), desc=f"{option} {path}"):
            example = prompt.example
            kinds[f"{'video' if prompt.is_video else 'image'}, {example.problem_type}"] += 1
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
