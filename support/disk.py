"""Files on disk: the lock of a run directory, what it may be, and writes that leave no file
incomplete."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors import SafetensorError

from support.cli import each, option
from support.ranks import UsageError, first_line, require

LOCK = ".lock"  # in a run directory: names and is locked by the process that uses it
PART = ".part"  # ends the name of a file or directory that is still being written
DONE = ".done"  # a directory of complete ones that are not in their place yet
BLOCK = 2**18  # bytes of a file that go into its fingerprint together
MOST_FILES = 500_000  # in a directory of a data set, its media included
TRAINING_RUN, EVALUATION, DIAGNOSIS = "training run", "evaluation", "diagnosis"
RUN_FILES = "args.json metrics.jsonl samples.jsonl skipped.jsonl tensorboard gaze.html"
RUN_FILES += " attention.png curves.png checkpoint adapter state .part .done"

# 1. A directory and its owner


def lock_directory(out: Path) -> TextIO:
    """Lock the directory `out` for this process; returns the lock file, which the caller must keep
    open.

    It is a POSIX lock: the system releases it when the process ends in any way, and forked
    processes (the readers) do not inherit it. It is also released when the process closes any other
    handle of the same file, so nothing else may open that file.

    Raises:
        UsageError: another process holds the lock.
    """
    path = out / LOCK
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"note: --out {out}: no lock ({error.strerror}); start no other run there")
                return file
            file.seek(0)
            holder = file.read().strip() or "unknown"
            remedy = "wait until it ends, or choose another"
            raise UsageError(f"--out {out}: in use by process {holder}; {remedy}") from None
        # Between `open` and `lockf`, the holder may have moved the directory and ended.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def content_of(out: Path) -> list[Path]:
    """The content of a directory except its lock and a half-written `args.json`; empty if the
    directory does not exist."""
    own = (LOCK, f".args.json{PART}")
    return [path for path in out.iterdir() if path.name not in own] if out.is_dir() else []


def write_record(out: Path, kind: str, settings: dict[str, Any]) -> None:
    """Write `args.json`, the first file of a directory: what made it, and the arguments."""
    write_aside(out / "args.json", json.dumps({"made_by": kind, **settings}, indent=2) + "\n")


def read_record(out: Path) -> dict[str, Any]:
    """The content of `args.json`; empty unless `write_record` wrote that file."""
    try:
        record = json.loads((out / "args.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and "made_by" in record else {}


def require_kind(out: Path, kind: str) -> None:
    """Refuse an `--out` that is a file, or whose content was not made by this `kind` of program."""
    require(not out.exists() or out.is_dir(), f"--out {out}: is a file; choose another")
    found = read_record(out).get("made_by")
    other = f"holds another program's {found}" if found else f"exists, but holds no {kind}"
    require(not content_of(out) or found == kind, f"--out {out}: {other}; choose another")


def require_outside(out: Path, args: Any) -> None:
    """Refuse an `--out` that holds anything that `args` read: it would be moved or deleted."""
    for name in ("model", "teacher", "data", "eval_data", "media_root", "benchmark_root"):
        for value in each(getattr(args, name, None) or ()):
            path = without_split(value)
            inside = out.resolve() in (path.resolve(), *path.resolve().parents)
            holds = f"--out {out}: holds {option(name)} {value}, which this command reads"
            require(not inside or not path.exists(), f"{holds}; choose another")


def clear(out: Path, names: str) -> None:
    """Delete what a program writes into its directory, by patterns of names; keep all else."""
    for path in sorted(path for name in names.split() for path in out.glob(name)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def good_states(out: Path) -> list[Path]:
    """Complete states of a run, oldest first. A state still being written has another name."""
    named = (p for p in (out / "state").glob("step-*") if re.fullmatch(r"step-\d{1,9}", p.name))
    return sorted((p for p in named if p.is_dir() and not p.is_symlink()), key=step_of)


def step_of(state: Path) -> int:
    """The number of steps done at a state, from its name."""
    return int(state.name.removeprefix("step-"))


# 2. Writing


@contextmanager
def writing(out: Path, name: str) -> Iterator[None]:
    """Turn a failure to write `name` in the directory `out`, as on a full disk, into a one-line
    `UsageError` that says what is intact."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        full = "No space" in reason or "quota" in reason
        remedy = "free space there" if full else "choose another"
        kept = [*good_states(out)[-1:], out / "checkpoint", out / "predictions.jsonl"]
        kept = [str(path) for path in kept if os.path.exists(path)]
        last = f"intact: {', '.join(kept)}" if kept else "nothing is saved there yet"
        message = f"--out {out}: {name} cannot be written ({reason}); {remedy}; {last}"
        raise UsageError(message) from None


def write_aside(path: Path, text: str) -> None:
    """Write a text file under another name and rename it, so that it is never incomplete."""
    aside = path.with_name(f".{path.name}{PART}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def written_aside(out: Path, name: str) -> Iterator[Path]:
    """Yield a new directory. When the block ends, it becomes `out / name`, and what the block
    created beside it moves there with it. Until then, what has these names is unchanged. A process
    that is killed at any point leaves no directory incomplete. A failure is that of `writing`.
    """
    place = out / name
    folder, aside = place.parent, place.with_name(PART)
    with writing(out, name):
        install(folder)
        (aside / place.name).mkdir(parents=True)
        try:
            yield aside / place.name
            for path in (*aside.rglob("*"), aside):
                flush(path)
        except Exception:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        aside.rename(folder / DONE)
        install(folder)
        flush(folder)


def install(folder: Path) -> None:
    """Put the content of a complete `DONE` in its place, and delete an incomplete `PART`."""
    shutil.rmtree(folder / PART, ignore_errors=True)
    for new in (folder / DONE).glob("*"):
        if (folder / new.name).exists():
            (folder / new.name).rename(folder / PART)  # deleting takes longer
        new.rename(folder / new.name)
        shutil.rmtree(folder / PART, ignore_errors=True)
    shutil.rmtree(folder / DONE, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def open_lines(path: Path) -> FileIO:
    """Open a file for `append`. It is unbuffered, so an error is raised for the line that causes
    it, and closing the file raises no second error."""
    return path.open("ab", buffering=0)


def append(file: FileIO, rows: Iterable[dict[str, Any]]) -> None:
    """Append one line of JSON per row."""
    path = Path(file.name)
    with writing(path.parent, path.name):
        for row in rows:
            data = (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
            while data:
                data = data[file.write(data) :]


# 3. Reading


@contextmanager
def loading(named: str, remedy: str = "repair it, or give another checkpoint") -> Iterator[None]:
    """Turn any exception of a library into a one-line `UsageError`: what is `named`, the reason and
    the `remedy`. Libraries raise errors of any kind for files that they cannot use."""
    try:
        yield
    except UsageError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise UsageError(f"{named}: out of memory; free some, or give a smaller one") from None
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"free some space, or {remedy}" if full else remedy
        raise UsageError(f"{named}: {first_line(error)}; {remedy}") from None


def fingerprint(path: Path, blocks: int) -> str:
    """A hash of a file's size and content. Of a file with more than `blocks` blocks of 256 KB, only
    so many are read, evenly spaced from its first byte to its last."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for place in np.linspace(0, max(0, size - BLOCK), min(blocks, size // BLOCK + 1)):
            file.seek(int(place))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def without_split(name: str) -> Path:
    """The path in an argument such as `--data`, without a `:SPLIT` after it."""
    return Path(name if Path(name).exists() else name.rpartition(":")[0] or name)


def data_files(path: str) -> list[Path]:
    """The local files that `--data` names: a file, or the data files of a directory. Refuses one
    that is not a regular file (reading a pipe might wait for ever), and a directory with too many
    files to be a data set."""
    place = without_split(path)
    if place.is_file():
        return [place]
    files = []
    inside = (Path(folder, name) for folder, _, names in os.walk(place) for name in names)
    for number, file in enumerate(inside):
        require(number < MOST_FILES, f"holds more than {MOST_FILES:,} files; name a folder in it")
        if file.suffix in (".parquet", ".arrow", ".json", ".jsonl"):
            files.append(file)
    tables = [file for file in files if file.suffix in (".parquet", ".arrow")]
    for file in tables or files:
        require(file.is_file(), f"{file} is not a regular file")
    return sorted(tables or files)
