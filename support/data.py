"""Prompts that worker processes read and encode ahead of training; the options for data files."""

import atexit
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import FileIO
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support import ranks
from support.answers import read_number
from support.cli import each, option
from support.datafiles import DataFile
from support.disk import append, loading
from support.media import BadRow
from support.prompts import Example, Prompt
from support.ranks import UsageError, first_line, require

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes run in parallel instead
# PyTorch's iterators that have lost a reader, kept so that they are not deleted: that could block
# forever, since PyTorch's thread may be waiting for the rest of what the reader was sending.
BROKEN = []
TIMEOUT = 600  # seconds without a prompt from the readers, after which one of them hangs


@dataclass
class BadRows:
    """Counts and names the bad rows. It stops the run when they exceed `max_fraction` of the rows
    read so far, or of 1,000 rows if fewer were read."""

    max_fraction: float = 0.0
    rows: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    read: int = 0
    file: FileIO | None = None  # skipped.jsonl

    def add(self, bad: dict[str, str], good: int = 1) -> None:
        """Count the bad rows and the number of good ones that were read with them."""
        self.read += good + len(bad)
        self.name(bad)
        read = self.read * ranks.world_size()  # `bad` counts all ranks
        if len(self.bad) > self.max_fraction * max(read, min(self.rows, 1000)):
            last = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.items())[-2:])
            count = f"{len(self.bad)} of the first {read} rows cannot be used"
            remedy = "fix them (--check-data of a training script lists all) or raise --max-skipped"
            raise UsageError(f"--max-skipped {self.max_fraction}: {count} ({last}); {remedy}")

    def name(self, bad: dict[str, str]) -> None:
        """Record bad rows that are not yet recorded."""
        new = {name: reason for name, reason in bad.items() if name not in self.bad}
        self.bad |= new
        if self.file is not None:
            append(self.file, [{"row": name, "reason": reason} for name, reason in new.items()])

    def attach(self, file: FileIO) -> None:
        """Append the bad rows that `file` lacks, then each new one; drop an incomplete last
        line."""
        content = Path(file.name).read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        file.truncate(len(content))
        found, self.file = self.bad, file
        self.bad = {row["row"]: row["reason"] for row in map(json.loads, content.splitlines())}
        self.name(found)


@dataclass(eq=False)
class Prompts(Dataset):
    """Prompt number n of a run, counted from 0, and the bad rows met while reading it.

    With a seed, the prompt is a function of (seed, n) alone, so a state need not store the order:
    every epoch has its own order, and a random row replaces a bad one. Without a seed, prompt n is
    row n, or None if that row is bad. `source` must provide `example(row)` and, where rows may be
    bad, `place(row)`. The media of prompts from number `keep_media` on lose their frames, which
    only rewards and pictures need.
    """

    source: Any
    encode: Callable[[Example], Prompt]
    rows: np.ndarray | None = None
    seed: int | None = None
    max_tokens: int | None = None
    keep_media: int = 0
    order: tuple[int, np.ndarray | None] = (-1, None)  # of the epoch last requested

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
        example = self.source.example(row)
        try:
            prompt = self.encode(example)
        except ValueError as error:  # of the chat template, or of markers in the request
            raise BadRow(f"cannot be asked: {first_line(error)}") from None
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
                    media = [medium.without_frames() for medium in prompt.example.media]
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

    def steps(self, prompts_per_step: int, epochs: float = 1.0) -> int:
        """Number of steps, of all ranks together, that read every row `epochs` times. The built-in
        task has no end: 800."""
        if self.prompts.rows is None:
            return 800
        return math.ceil(epochs * len(self.prompts.rows) / (prompts_per_step * ranks.world_size()))

    def begin(self, step: int, prompts_per_step: int) -> Iterator[Prompt]:
        """This rank's prompts from `step` on, counted from 1, without end. Ranks take turns."""
        number = (step - 1) * prompts_per_step * ranks.world_size() + ranks.rank()
        return iter(replace(self, numbers=range(number, 2**62, ranks.world_size())))

    def __iter__(self) -> Iterator[Prompt]:
        # Closed at once: an error would keep the workers until the garbage collector finds their
        # queues and closes these first, and then nothing tells the workers to end.
        with closing(self.read_ahead()) as items:
            for prompt, bad in items:
                self.bad_rows.add(bad, good=int(prompt is not None))
                if isinstance(prompt, UsageError):
                    raise prompt
                if prompt is not None:
                    yield prompt
                elif self.prompts.seed is not None:
                    raise UsageError(f"100 bad rows one after another; the last: {bad.popitem()}")

    def read_ahead(self) -> Iterator[tuple[Prompt | UsageError | None, dict[str, str]]]:
        """The items of `prompts`, read by workers (`guard_reader`) if there are any. On a GPU,
        PyTorch's thread for pinned memory takes them from the pipe, so that training does not wait
        for 150 MB of pixels."""
        if not self.workers:
            yield from map(self.prompts.__getitem__, self.numbers)
            return
        loader = DataLoader(
            self.prompts,
            batch_size=None,
            sampler=self.numbers,
            num_workers=min(self.workers, os.cpu_count()),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=guard_reader,
            prefetch_factor=4,
            timeout=TIMEOUT,
        )
        # Signals wait until a new reader ignores them: PyTorch's own handler would end it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ranks.STOP_SIGNALS)
        try:
            with loading(f"--workers {self.workers}: the readers cannot start", "give fewer, or 0"):
                items = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        received = 0
        try:
            for item in items:
                yield item
                received += 1
        except BaseException as error:
            if "DataLoader timed out" in str(error):
                row = self.prompts.row(self.numbers[received], 0)
                named = f"{self.prompts.source.place(row)}, or a row in place of it"
                slow = f"{named}: not read within {TIMEOUT} seconds; remove or shorten it"
                raise UsageError(slow) from None
            if not all(worker.is_alive() for worker in items._workers):
                BROKEN.append(items)
            raise


def guard_reader(worker: int) -> None:
    """Set up a reader process: it ignores termination signals, ends with its parent, and sends
    tensors by value.

    A scheduler signals all processes of a run, but the training loop still needs its prompts to
    finish the step. PyTorch would put each tensor into shared memory, of which a container has
    little, and open a file for it.
    """
    ForkingPickler.register(Tensor, by_value)
    for number in ranks.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ranks.STOP_SIGNALS)
    Thread(target=ranks.end_with_parent, args=(os.getppid(),), daemon=True).start()


def by_value(tensor: Tensor) -> tuple[Callable, tuple[np.ndarray]]:
    """How a reader pickles a tensor: as an array, with its numbers."""
    return torch.from_numpy, (tensor.numpy(),)


atexit.register(ranks.end_readers)  # for programs that do not end with `leave`, such as a notebook


def check_files(args: Any, is_toy: bool) -> None:
    """Refuse inconsistent arguments about data files.

    Raises:
        UsageError: the message names the arguments.
    """
    bounded = any((args.image_tokens, args.min_image_tokens, args.frame_tokens))
    sizes = "--image-tokens, --min-image-tokens, --frame-tokens: on the toy a cell is a token"
    require(not (is_toy and bounded), f"{sizes}; use sft.py --grid")
    if not args.data:
        for name in ("eval_data", "media_root", "rows", "check_data", "fps", "text_only"):
            require(not getattr(args, name), f"{option(name)}: needs --data")
        if not is_toy:
            ranks.print_on_rank_0("no --data: the built-in task is used, as a smoke test")
        return
    learned = "the toy knows only the words of its task"
    data = " ".join(each(args.data))
    require(not is_toy, f"--data {data}: {learned}; give --model a real checkpoint")
    require(args.grid is None and args.toy_order is None, "--grid, --toy-order: not with --data")


def open_file(args: Any, name: str) -> DataFile:
    """The rows of `--data` or `--eval-data`."""
    paths = args.data if name == "--data" else args.eval_data
    return DataFile(paths, args.media_root, args.frames, args.fps, name, args.text_only)


def open_data(
    args: Any, encode: Callable[[Example], Prompt], task: Any = None, *, keep_media: bool = False
) -> tuple[Reader, Iterable[Prompt]]:
    """Open the training prompts (see `Reader.begin`) and this rank's share of the evaluation
    prompts. Both have one record of bad rows. Without `--data`, the toy's `task` makes the prompts.
    `keep_media` is for rewards that see the training prompts' media.
    """
    if not args.data:
        return task.open_data(args, encode, keep_media=keep_media)
    train = open_file(args, "--data")
    held_out = open_file(args, "--eval-data") if args.eval_data else train
    found = {"--data": f"{len(train)} rows", "--eval-data": f"{len(held_out)} rows"}
    ranks.require_same_on_ranks(found)
    rows, apart = split_rows(args, len(train), len(held_out))
    max_tokens = args.max_prompt_tokens
    mine = range(ranks.rank(), len(apart), ranks.world_size())
    bad_rows = BadRows(args.max_skipped, len(train))
    keep = sys.maxsize if keep_media else 0
    training = Prompts(train, encode, rows, args.seed, max_tokens, keep)
    # Six pictures are drawn; some of the first rows may be bad.
    evaluation = Prompts(held_out, encode, apart, None, max_tokens, keep_media=8 * mine.step)
    reader = Reader(training, range(0), args.workers, bad_rows)
    return reader, replace(reader, prompts=evaluation, numbers=mine)


def split_rows(args: Any, train: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on, of the `train` rows of `--data`, and those to evaluate on, the same for
    every seed: up to `eval_examples` of the `held_out` rows of `--eval-data`; without it, of the
    rows behind those of `--rows`, or else at most a tenth of the rows, which are not trained on."""
    data = f"--data {' '.join(each(args.data))}"
    many = f"--rows {args.rows}: {data} has {train:,} rows; lower or omit --rows"
    require((args.rows or 0) <= train, many)
    rows, behind = np.split(np.arange(train), [args.rows or train])
    shuffled = np.random.default_rng(0).permutation
    if args.eval_data:
        apart = shuffled(held_out)[: args.eval_examples]
    elif len(behind):
        apart = shuffled(behind)[: args.eval_examples]
    else:
        require(len(rows) > 1, f"{data}: has one row; give --eval-data")
        apart, rows = np.split(shuffled(rows), [min(args.eval_examples, max(1, len(rows) // 10))])
    return np.sort(rows), np.sort(apart)


def check_data(
    args: Any, encode: Callable[[Example], Prompt], accuracy_rule: str = "by-type"
) -> None:
    """Read every row of `--data` and `--eval-data` once (with `--rows`, those of `--data` that the
    run would use), and print a summary and all bad rows.

    Raises:
        UsageError: the fraction of bad rows exceeds `--max-skipped`, or several processes were
            started.
    """
    require(ranks.world_size() == 1, "--check-data: runs in one process; start it without torchrun")
    given = ("--data", args.data), ("--eval-data", args.eval_data)
    files = [(flag, paths, open_file(args, flag)) for flag, paths in given if paths]
    many = []
    for flag, paths, file in files:  # all are there before the first is read
        path = " ".join(each(paths))
        bad_rows, rows = BadRows(1.0, len(file)), np.arange(len(file))
        if flag == "--data" and args.rows:
            rows = np.sort(np.concatenate(split_rows(args, len(file), 0)))
        prompts = Prompts(file, encode, rows, max_tokens=args.max_prompt_tokens)
        kinds, lengths, no_number = Counter({"with boxes": 0}), [], []
        reader = Reader(prompts, range(len(rows)), args.workers, bad_rows)
        try:
            for prompt in tqdm(reader, total=len(rows), desc=f"{flag} {path}"):
                example = prompt.example
                media = [medium.kind for medium in example.media]
                kind = "several" if len(media) > 1 else "".join(media) or "text"
                kinds[f"{kind}, {example.problem_type or 'no problem type'}"] += 1
                lengths.append(len(prompt.ids))
                kinds["with boxes"] += bool(example.boxes)
                numeric = example.problem_type in ("numerical", "regression")
                if numeric and accuracy_rule == "by-type" and read_number(example.solution) is None:
                    no_number.append(example.name)
        finally:  # also of a reading that hangs or is stopped
            for name, reason in bad_rows.bad.items():
                print(f"bad: {name}: {reason}")
        print(f"{flag} {path}: {len(rows):,} rows, {len(bad_rows.bad):,} bad")
        for kind, number in sorted(kinds.items()):
            print(f"  {kind:<28}{number:>10,}")
        if no_number:
            count, example = f"{len(no_number):,} solutions are not one number", no_number[0]
            print(f"  {count}: only identical text is correct (example: {example})")
        if lengths:
            print(f"  prompt tokens: median {np.median(lengths):,.0f}, maximum {max(lengths):,}")
        if len(bad_rows.bad) > args.max_skipped * len(rows):
            many.append(f"{flag} {path}")
    limit = f"more than --max-skipped {args.max_skipped} of the rows are bad"
    require(not many, f"{', '.join(many)}: {limit}; repair those named above, or raise it")
