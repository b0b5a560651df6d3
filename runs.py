"""The parts of a run that do not depend on a model: command line, one-line errors, ranks, the run
directory, and resuming.

An interrupted run loses nothing that it has saved: states and checkpoints are written aside and
then renamed, an existing run in the way is moved, and `--resume` cuts every file back to its length
at the state, so that no line is written twice.
"""

import startup

import errno
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

import numpy as np
import torch
import torch.distributed as dist
import tyro
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module
from torch.optim import Optimizer

# 1. Command line and errors


class UsageError(Exception):
    """An error that the user can fix; its one line names the field, the value and the remedy."""


class Finished(Exception):
    """Nothing is left to do: the process prints the message and ends with status 0, as a queue
    that starts a finished run again expects."""


def require(condition: bool, message: str) -> None:
    """Raise `UsageError(message)` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


@dataclass
class RunArgs:
    """The arguments of every training run, whatever its method."""

    data: str | None = None
    """JSON, JSON lines, Parquet, a directory of a data set, or a hub name; see datafiles.py. Unset:
    the built-in task."""
    eval_data: str | None = None
    """Data to evaluate on. Unset: rows of --data behind its first ROWS, or else up to a tenth of
    its rows, held out."""
    media_root: tuple[str, ...] = ()
    """Folders that the paths in the rows are relative to. Unset: the folder of the data file."""
    rows: int | None = None
    """Train on the first ROWS rows of --data. Unset: all. Paper: 51,200 of Video-R1-260k."""
    check_data: bool = False
    """Read every row once, report the rows that cannot be used, and stop."""
    frames: int | None = None
    """Frames per video, evenly spaced, or at most with --fps. Unset: --fps a second, at most 128
    (paper); on the toy, as its checkpoint."""
    fps: float | None = None
    """Frames per second of video. Unset: 1 (paper), or --frames in all."""
    image_tokens: int | None = 5120
    """Maximum visual tokens of an image. Paper: 5120."""
    min_image_tokens: int | None = 128
    """Minimum visual tokens of an image, at most --image-tokens: smaller images are enlarged.
    Paper: 128."""
    frame_tokens: int | None = 128
    """Maximum visual tokens of a pair of video frames, which share them. Paper: 128."""
    max_prompt_tokens: int | None = 16384
    """Skip rows whose prompt has more tokens than this."""
    max_skipped: float = 0.01
    """Stop when more than this fraction of the rows cannot be used."""
    workers: int = 4
    """Worker processes that read and encode prompts ahead; 0: the training process reads them."""
    grid: int | None = None
    """Cells along each side of the toy's images (3 or more). Unset: as the checkpoint, or 4."""
    toy_order: Literal["question-first", "image-first"] | None = None
    """Order of the toy's prompt. Unset: as the checkpoint, or question-first."""
    eval_every: int = 100
    """Steps between evaluations on held-out examples."""
    eval_examples: int = 128
    """Held-out examples per evaluation."""
    seed: int = 1
    """Seed of data, sampling and new weights. It reproduces a run on the same machine."""
    out: str = "runs"
    """Run directory. A run that is already there is moved to OUT.1, OUT.2 and so on."""
    overwrite: bool = False
    """Replace a run that is already at OUT instead of moving it."""
    track: bool = False
    """Also send the metrics to Weights & Biases."""
    save_every: int = 50
    """Steps between saved states in OUT/state, for --resume; 0: save none."""
    keep: int = 2
    """Number of states to keep; older ones are deleted."""
    resume: str | None = None
    """Resume from this state; `auto`: from the newest intact state in OUT, if there is one."""
    allow_changed_args: bool = False
    """Resume even if input files, or arguments that affect the result, have changed since the
    state was saved."""

    def __post_init__(self) -> None:
        """Check the ranges of these arguments, and of those that most scripts declare."""
        check_values(self)
        require_positive(self, "rows", "frames", "fps", "max_prompt_tokens")
        require_positive(self, "image_tokens", "min_image_tokens", "frame_tokens")
        require_positive(self, "eval_every", "eval_examples", "keep")
        require_not_negative(self, "save_every", "max_skipped", "seed", "workers")
        positive = ("steps", "learning_rate", "max_grad_norm", "micro_batch_size")
        positive += ("prompts_per_step", "num_iterations", "num_minibatches")
        positive += ("max_new_tokens", "temperature", "clip_eps")
        require_positive(self, *(name for name in positive if hasattr(self, name)))
        not_negative = ("lora_rank", "beta")
        require_not_negative(self, *(name for name in not_negative if hasattr(self, name)))
        require(self.grid is None or self.grid >= 3, f"--grid {self.grid}: needs 3 or more")

    def may_change(self) -> set[str]:
        """Names of the arguments that `--resume` may change: they do not affect what is computed.
        Some are declared by the scripts."""
        files = {"out", "overwrite", "track", "save_every", "keep", "resume", "allow_changed_args"}
        reading = {"workers", "check_data", "max_skipped"}
        steps = {"steps", "eval_every", "micro_batch_size", "prompts_per_step"}
        return files | reading | steps | {"gradient_checkpointing"}


def run_script(
    args_class: type,
    main: Callable,
    description: str,
    defaults: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Parse the command line into `args_class`, with `defaults()` in place of the class's own
    defaults, and run `main`. A `UsageError` becomes one line and exit status 2, Ctrl-C one line and
    130, `Finished` one line and 0."""
    unprinted = keep_printing()
    try:
        if signal.getsignal(signal.SIGINT) is startup.stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        check_switches(args_class)
        changed = defaults()
        default = {"default": args_class(**changed)} if changed else {}
        args = tyro.cli(args_class, description=description, **default)  # --help ends here
        start_ranks()
        main(args)
    except KeyboardInterrupt:
        fail(130, "\nstopped by Ctrl-C; what was saved before is intact")
    except UsageError as error:
        fail(2, f"error: {error}")
    except Finished as message:
        print_on_rank_0(str(message))
    except Exception as error:
        if str(error).startswith("DataLoader worker (pid"):  # in PyTorch's words, and at any time
            remedy = "if it was killed because memory is full, give fewer --workers"
            fail(2, f"error: --workers: a reader process has ended ({error}); {remedy}")
        fail(1, traceback.format_exc())
    sys.stdout.flush()
    if dist.is_initialized():
        leave_ranks()
    if unprinted:
        closed = unprinted[0].errno == errno.EPIPE  # a program that ends by SIGPIPE is silent, too
        what = f"error: the output cannot be printed ({unprinted[0].strerror}); the run is complete"
        if closed:
            leave(128 + signal.SIGPIPE)
        fail(1, what)


def keep_printing() -> list[OSError]:
    """Let a run continue when its output cannot be printed, because the pipe is closed or the disk
    is full: the rest of the output is dropped. Returns a list, to which such errors are added.

    Characters that the output cannot encode are printed as escape sequences. An output that was
    closed before the start is opened on the null device, so that no file of the run gets its
    descriptor."""
    errors = []

    def guard(stream: TextIO, write: Callable) -> Callable:
        def guarded(*args: Any) -> Any:
            try:
                return write(*args)
            except OSError as error:
                errors.append(error)
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

        return guarded

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        stream.reconfigure(errors="backslashreplace")
        stream.write, stream.flush = guard(stream, stream.write), guard(stream, stream.flush)
        setattr(sys, name, stream)
    return errors


def check_switches(args_class: type) -> None:
    """Refuse a value for an option that takes none, such as `--think=false`."""
    switches = {field.name for field in fields(args_class) if field.type is bool}
    for word in sys.argv[1:]:
        name, has_value, _ = word.removeprefix("--").removeprefix("no-").partition("=")
        refused = has_value and name.replace("-", "_") in switches
        require(not refused, f"{word}: takes no value; give --{name} or --no-{name}")


def given_options() -> Namespace:
    """`--model` and `--think` as the command line gives them (None if it does not), before it is
    parsed: some defaults depend on them."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", nargs="?")  # one without a value is reported later
    parser.add_argument("--think", action=BooleanOptionalAction)
    return parser.parse_known_args()[0]


def fail(status: int, message: str) -> NoReturn:
    """Print a message and end this process. The other ranks would wait; torchrun ends them."""
    sys.stdout.flush()
    print(message, file=sys.stderr)
    leave(status)


def leave(status: int) -> NoReturn:
    """End this process and its readers at once. The interpreter's cleanup would wait for libraries'
    threads, such as those that read Parquet, or abort in them."""
    sys.stdout.flush()
    sys.stderr.flush()
    end_readers()
    os._exit(status)


def end_readers() -> None:
    """Kill the remaining readers.

    Python would send them SIGTERM, which they ignore, and then wait for them without limit. Usually
    no readers remain, because PyTorch ends its workers when their iterator is deleted. But an
    exception keeps the iterators alive in its traceback, and a worker inside a decoder does not
    respond.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises if a worker is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def option(name: str) -> str:
    """The option of the command line that sets the field `name`."""
    return f"--{name.replace('_', '-')}"


def options(args: Any) -> dict[str, Any]:
    """The value of every option."""
    return {option(name): value for name, value in asdict(args).items()}


def each(value: Any) -> tuple:
    """The values of an argument that may take several."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def require_positive(args: Any, *names: str) -> None:
    """Refuse fields that are not above zero. None means "unset" and passes."""
    for name in names:
        for value in each(getattr(args, name)):
            require(value is None or value > 0, f"{option(name)} {value}: must be above 0")


def require_not_negative(args: Any, *names: str) -> None:
    """Refuse fields below zero. None means "unset" and passes."""
    for name in names:
        value = getattr(args, name)
        require(value is None or value >= 0, f"{option(name)} {value}: must be 0 or above")


LARGEST = 2**31 - 1  # of an integer argument
# Bounds of floats, beyond which nothing can be computed. Every other float is finite.
BOUNDS = {"learning_rate": (1e-12, 1e3), "temperature": (1e-3, 1e3), "fps": (1e-3, 1e3)}
BOUNDS |= {"epochs": (1e-9, 1e6)}


def check_values(args: Any) -> None:
    """Refuse numbers that are not finite or too large to compute with, and names that no file can
    have. An empty name, as from an unset shell variable, would otherwise mean "unset"."""
    for name, values in vars(args).items():
        named = option(name)
        for value in each(values):
            if isinstance(value, str):
                require(bool(value), f"{named} '': is empty; give a value or leave it out")
                try:
                    os.stat(value.encode())
                except ValueError:
                    raise UsageError(f"{named} {value!r}: has a NUL or is not UTF-8") from None
                except OSError as error:
                    fault = f"{named} {value[:40]}...: is too long for a file name"
                    require(error.errno != errno.ENAMETOOLONG, fault)
            elif isinstance(value, int):
                require(abs(value) <= LARGEST, f"{named} {value}: must be at most {LARGEST}")
            elif isinstance(value, float):
                low, high = BOUNDS.get(name, (-sys.float_info.max, sys.float_info.max))
                bounds = f"must be from {low:g} to {high:g}"
                require(low <= value <= high, f"{named} {value}: {bounds}")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch. On a CPU with a fixed thread count, a run is then reproducible
    bit by bit."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Stopwatch:
    """Seconds of each phase of a step, and the peak memory so far, for the metrics `perf/*`."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.metrics: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Record the time since the last lap as `perf/<phase>_s`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.metrics[f"perf/{phase}_s"] = now - self.last
        self.last = now

    def stop(self, tokens: int) -> dict[str, float]:
        """The seconds of every phase and of the whole step, tokens per second, and peak memory (the
        GPU's, if there is one)."""
        seconds = self.last - self.start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        self.metrics |= {"perf/step_s": seconds, "perf/tokens_per_s": tokens / seconds}
        return self.metrics | {"perf/peak_mem_gb": peak / 2**30}


# 2. Ranks


def start_ranks() -> None:
    """Join the other ranks if torchrun started this process. On a GPU, a single process forms a
    group of one, so there is only one code path.

    Raises:
        UsageError: a scheduler, but not torchrun, announces several processes.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    lacking = [name for name in names if not os.environ.get(name)]
    alone = bool(lacking) and os.environ.get("WORLD_SIZE", "1") == "1"
    announced = f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} is set, but not {', '.join(lacking)}"
    remedy = "start with torchrun, or unset WORLD_SIZE for a single process"
    require(alone or not lacking, f"{announced}; {remedy}")
    if dist.is_initialized() or (alone and not torch.cuda.is_available()):
        return
    if alone:
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # The other ranks wait while rank 0 writes a state of 85 GB (7B, all weights).
    dist.init_process_group(backend, timeout=timedelta(hours=2))


def leave_ranks() -> None:
    """End this process together with the other ranks. Several ranks skip the interpreter's cleanup:
    in about one of sixty launches, a process aborted there after its work was done."""
    if world_size() > 1:
        dist.barrier()
        leave(0)
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_on_rank_0(text: str) -> None:
    """Print `text` on rank 0 only."""
    if rank() == 0:
        print(text)


def gather(items: list) -> list:
    """Concatenate the lists of all ranks, in rank order."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def on_rank_0(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result there, None on the other ranks.

    Raises:
        UsageError: `action` raised it. It is raised on all ranks, so that none waits for rank 0.
    """
    result, refusal = None, ""
    if rank() == 0:
        try:
            result = action()
        except UsageError as error:
            refusal = str(error)
    refusal = gather([refusal])[0]
    require(not refusal, refusal)
    return result


def from_rank_0(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result on all ranks, as for files that only rank 0's
    disk holds. Raises as `on_rank_0` does."""
    return gather([on_rank_0(action)])[0]


def require_same_on_ranks(facts: dict[str, Any]) -> None:
    """Refuse facts that differ between ranks, such as the number of rows that each finds on its
    disk: ranks that decide differently would wait for each other for ever. Keys name the facts."""
    ours, *others = gather([facts])
    for number, theirs in enumerate(others, 1):
        for name in ours | theirs:
            values = [str(x.get(name, "none"))[:80] for x in (theirs, ours)]
            differ = f"{name}: rank {number} has {values[0]}, rank 0 has {values[1]}"
            remedy = "start all with the same command, on the same files"
            require(theirs.get(name) == ours.get(name), f"{differ}; {remedy}")


def over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """Average metrics over ranks; `perf/*` takes the maximum, tokens per second the sum."""
    if world_size() == 1:
        return metrics
    parts = gather([metrics])
    columns = {name: [part[name] for part in parts] for name in metrics}
    metrics = {name: sum(values) / len(values) for name, values in columns.items()}
    metrics |= {name: max(values) for name, values in columns.items() if name[:5] == "perf/"}
    return metrics | {name: sum(columns[name]) for name in ["perf/tokens_per_s"] if name in columns}


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all ranks; return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` with the sharding and device of `other`."""
    if isinstance(other, DTensor):
        device = other.device_mesh.device_type
        return distribute_tensor(tensor.to(device), other.device_mesh, other.placements)
    return tensor.to(other.device)


# 3. The run directory

LOCK = ".lock"  # in a run directory: names and is locked by the process that uses it
PART = ".part"  # ends the name of a file or directory that is still being written


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


TRAINING_RUN, EVALUATION, DIAGNOSIS = "training run", "evaluation", "diagnosis"
RUN_FILES = "args.json metrics.jsonl samples.jsonl skipped.jsonl tensorboard gaze.html"
RUN_FILES += " attention.png curves.png checkpoint .checkpoint-* adapter state"


def write_aside(path: Path, text: str) -> None:
    """Write a text file under another name and rename it, so that it is never incomplete."""
    aside = path.with_name(f".{path.name}{PART}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


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


def without_split(name: str) -> Path:
    """The path in an argument such as `--data`, without a `:SPLIT` after it."""
    return Path(name if Path(name).exists() else name.rpartition(":")[0] or name)


def require_outside(out: Path, args: Any) -> None:
    """Refuse an `--out` that holds anything that `args` read: it would be moved or deleted."""
    for name in ("model", "teacher", "data", "eval_data", "media_root"):
        for value in each(getattr(args, name, None) or ()):
            path = without_split(value)
            inside = out.resolve() in (path.resolve(), *path.resolve().parents)
            holds = f"--out {out}: holds {option(name)} {value}, which this command reads"
            require(not inside or not path.exists(), f"{holds}; choose another")


def clear(out: Path, names: str) -> None:
    """Delete what a program writes into its directory, by patterns of names; keep all else."""
    for path in sorted(path for name in names.split() for path in out.glob(name)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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


def open_lines(path: Path) -> FileIO:
    """Open a file for `append`. It is unbuffered, so an error is raised for the line that causes
    it, and closing the file raises no second error."""
    return path.open("ab", buffering=0)


def append(file: FileIO, rows: Iterable[dict[str, Any]]) -> None:
    """Append one line of JSON per row.

    Raises:
        UsageError: the file cannot be written, as on a full disk.
    """
    path = Path(file.name)
    with writing(path.parent, path.name):
        for row in rows:
            data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            while data:
                data = data[file.write(data) :]


def check_run(args: Any, *models: str, kind: str = TRAINING_RUN) -> None:
    """Refuse, before any work is done, arguments that differ between ranks, a default checkpoint
    that is not there, and an `--out` that cannot become the directory of this `kind` of program.

    `models` are the names of the arguments with checkpoints that the run reads. Nothing that it
    reads may lie in `--out`, which is moved or replaced.

    Raises:
        UsageError: the message names the argument.
    """
    require_same_on_ranks(options(args))
    on_rank_0(partial(check_out, args, kind))
    for name in models:
        path = getattr(args, name)
        if path is None:
            continue
        made = path != getattr(type(args), name) or Path(path).is_dir()
        command = "python sft.py"
        if name == "teacher":
            command += " --toy-size large --stop-accuracy 0.99 --eval-above 0.8 --out runs/teacher"
        require(made, f"--{name}: there is no checkpoint at {path}; make it with `{command}`")
    if args.track:
        on_rank_0(check_wandb)


def check_out(args: Any, kind: str) -> None:
    """Refuse an `--out` that cannot become the directory of this `kind` of program. Only rank 0's
    disk holds a run; `Run` checks again once it has the lock, and keeps it."""
    out = Path(args.out)
    require_kind(out, kind)
    require_outside(out, args)
    if (out / LOCK).exists() and not args.check_data:
        with writing(out, LOCK):
            lock_directory(out).close()
    parent = next(parent for parent in out.resolve().parents if parent.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    require(writable, f"--out {out}: {parent} cannot be written to; choose another")


def check_wandb() -> None:
    """Refuse `--track` where wandb is not installed or not logged in."""
    # `find_spec` also finds a leftover folder `wandb/`, as a package without an origin.
    if getattr(find_spec("wandb"), "origin", None) is None:
        raise UsageError("--track: wandb is not installed; `pip install wandb`, or leave it out")
    import wandb

    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--track: {reason}; `wandb login`, or WANDB_MODE=offline") from None


def start_wandb(args: Any, state: "State | None") -> Any:
    """Start a run at Weights & Biases, or continue the one whose id the state has. It ignores the
    steps that it already has."""
    import wandb

    known = {"id": state.wandb, "resume": "allow"} if state and state.wandb else {}
    try:
        return wandb.init(project="ral", name=Path(args.out).name, config=asdict(args), **known)
    except wandb.Error as error:
        raise UsageError(f"--track: {str(error).splitlines()[0]}; or leave it out") from None


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
        read = self.read * world_size()  # `bad` counts all ranks
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
            self.write(new)

    def attach(self, file: FileIO) -> None:
        """Append the bad rows that `file` lacks, then each new one; drop an incomplete last
        line."""
        content = Path(file.name).read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        file.truncate(len(content))
        earlier = [json.loads(line) for line in content.splitlines()]
        known = {row["row"]: row["reason"] for row in earlier}
        new = {name: reason for name, reason in self.bad.items() if name not in known}
        self.file, self.bad = file, known | self.bad
        self.write(new)

    def write(self, bad: dict[str, str]) -> None:
        append(self.file, [{"row": name, "reason": reason} for name, reason in bad.items()])


# A scheduler sends one of them some time before it kills a job.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Run:
    """The directory of a run, with all its files: `args.json`, `metrics.jsonl`, `samples.jsonl`,
    `skipped.jsonl`, `tensorboard/`, pictures, `state/`, `checkpoint/` and, for a run that trains
    adapters, `adapter/`.

    An existing run at `out` is moved to `<out>.1` and so on, or replaced with `--overwrite`;
    `check_run` says what is never touched. With a `state`, the existing run is resumed instead:
    `restore` cuts its files back to the state. `--track` also sends the metrics to Weights &
    Biases. Only rank 0 writes. The directory stays locked until the script's `main` returns.
    """

    def __init__(self, args: Any, bad_rows: BadRows, state: "State | None" = None):
        self.out, self.args, self.wandb, self.bad_rows = Path(args.out), args, None, bad_rows
        self.state, self.signal, self.files, self.tensorboard = state, None, {}, None
        self.inputs = on_rank_0(partial(fingerprint_inputs, args))  # at the start of the run
        self.handlers = {s: signal.getsignal(s) for s in STOP_SIGNALS}
        if self.handlers[signal.SIGHUP] == signal.SIG_IGN:  # as nohup wants it
            del self.handlers[signal.SIGHUP]
        for number in self.handlers:
            signal.signal(number, self.interrupt)
        self.equal, self.noted = [], False  # see `note_equal_rewards`
        self.lock = on_rank_0(self.claim)
        if state is None:
            on_rank_0(self.begin)

    def claim(self) -> TextIO:
        """Lock the directory, and make room in it for a new run; returns the lock."""
        with writing(self.out, "the run directory"):
            self.out.mkdir(parents=True, exist_ok=True)
            lock = lock_directory(self.out)
        require_kind(self.out, TRAINING_RUN)
        if self.args.track:  # before anything is moved, as it may fail
            self.wandb = start_wandb(self.args, self.state)
        with writing(self.out, "the run directory"):
            return lock if self.state else self.make_room(lock)

    def begin(self) -> None:
        """Open the files of the run, cut back to the state."""
        names = ["metrics.jsonl", "samples.jsonl"] + ["skipped.jsonl"] * bool(self.args.data)
        lengths = {name: self.state.lengths.get(name, 0) if self.state else 0 for name in names}
        with writing(self.out, "the run directory"):
            for name, length in lengths.items():
                self.require_length(name, length)
            self.move_later_states()
            for left in list(self.out.glob(".checkpoint-*")):  # left by a killed process
                if left.suffix == ".old" and not (self.out / "checkpoint").exists():
                    left.rename(self.out / "checkpoint")
                else:
                    shutil.rmtree(left)
            record = asdict(self.args) | {"inputs": self.inputs}
            write_record(self.out, TRAINING_RUN, record)
            for name, length in lengths.items():
                self.files[name] = open_lines(self.out / name)
                self.files[name].seek(self.files[name].truncate(length))
            if self.args.data:
                self.bad_rows.attach(self.files["skipped.jsonl"])
            shutil.rmtree(self.out / "tensorboard", ignore_errors=True)
            self.open_tensorboard()
        for line in self.metrics():
            self.log_tensorboard(line)

    def require_length(self, name: str, length: int) -> None:
        """Refuse a file that is shorter than at the state, or in which no line ends there."""
        path, last = self.out / name, b""
        there = path.stat().st_size if path.exists() else 0
        if there >= length > 0:
            with path.open("rb") as file:
                file.seek(length - 1)
                last = file.read(1)
        short = f"--resume {self.args.resume}: {path} is shorter than at the state, or another file"
        intact = length == 0 or last == b"\n"
        require(intact, f"{short} ({there} of {length} bytes); give an earlier one")

    def move_later_states(self) -> None:
        """Rename the states after the resumed one, so that `auto` does not find them. `write_state`
        deletes them once it has written a new state."""
        for later in good_states(self.out):
            if self.state is not None and step_of(later) > self.state.step:
                aside = later.with_suffix(".later")
                shutil.rmtree(aside, ignore_errors=True)
                later.rename(aside)

    def make_room(self, lock: TextIO) -> TextIO:
        """Move or delete an earlier run; returns the lock of the directory, or of the one that
        takes its place."""
        if self.args.overwrite:
            clear(self.out, RUN_FILES)
        elif content_of(self.out):
            numbers = range(1, sys.maxsize)
            aside = next(p for n in numbers if not (p := Path(f"{self.out}.{n}")).exists())
            self.out.rename(aside)
            print(f"moved the run at {self.out} to {aside}")
            self.out.mkdir(exist_ok=True)
            with lock:  # the lock moved along; hold it until the new one is taken
                return lock_directory(self.out)
        return lock

    def metrics(self) -> list[dict[str, float]]:
        """All lines of metrics written so far."""
        return [json.loads(x) for x in (self.out / "metrics.jsonl").read_text().splitlines()]

    def open_tensorboard(self) -> None:
        """Open a new event file. TensorBoard's own `SummaryWriter` writes from a thread, which
        prints a traceback when the disk is full."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        (self.out / "tensorboard").mkdir()
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.tensorboard = RecordWriter((self.out / "tensorboard" / name).open("wb"))
        version = Event(wall_time=time.time(), file_version="brain.Event:2")
        self.tensorboard.write(version.SerializeToString())

    def log_tensorboard(self, line: dict[str, float]) -> None:
        """Write one line of metrics to TensorBoard."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [{"tag": name, "simple_value": x} for name, x in line.items() if name != "step"]
        summary = Summary(value=[Summary.Value(**value) for value in values])
        event = Event(wall_time=time.time(), step=line["step"], summary=summary)
        with writing(self.out, "tensorboard"):
            self.tensorboard.write(event.SerializeToString())
            self.tensorboard.flush()

    def log(self, step: int, metrics: dict[str, float], learns_from_reward: bool = True) -> None:
        """Write one line of metrics to every sink: means over ranks, but maxima for `perf/*`. A run
        that `learns_from_reward` prints a note if the rewards can teach it nothing."""
        metrics = over_ranks(metrics)
        for bad in gather([dict(self.bad_rows.bad)]):
            self.bad_rows.name(bad)
        if rank() != 0:
            return
        if self.args.data:
            metrics = metrics | {"data/skipped": len(self.bad_rows.bad)}
        append(self.files["metrics.jsonl"], [{"step": step, **metrics}])
        self.log_tensorboard({"step": step, **metrics})
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if learns_from_reward:
            self.note_equal_rewards(step, metrics)

    def sample(
        self, step: int, prompts: Sequence[Any], texts: list[list[str]], rewards: Tensor
    ) -> None:
        """Write the sampled responses of all ranks, see `sample_rows`."""
        rows = gather(sample_rows(prompts, texts, rewards))
        if rank() == 0:
            append(self.files["samples.jsonl"], [{"step": step, **row} for row in rows])

    def note_equal_rewards(self, step: int, metrics: dict[str, float]) -> None:
        """Print one line, once, if the rewards in every group were equal for `EQUAL_STEPS` steps in
        a row. The advantages are then 0, and GRPO learns nothing from them."""
        if metrics.get("rollout/frac_zero_std") != 1.0:
            self.equal.clear()
            return
        self.equal = [*self.equal, metrics][-EQUAL_STEPS:]
        if len(self.equal) == EQUAL_STEPS and not self.noted:
            self.noted = True
            steps = f"steps {step - EQUAL_STEPS + 1} to {step}"
            what = "all responses to a prompt got the same reward, so all advantages are zero"
            print(f"\nnote: {steps}: {what}; {why_equal(self.equal)}")

    def require_finite(self, step: int, metrics: dict[str, float], prompts: Sequence[Any]) -> None:
        """Stop if the gradient is not finite; `update` skipped the optimiser step for it.

        Raises:
            UsageError: the message names the prompts and the last good state.
        """
        if not math.isfinite(metrics["train/grad_norm"]):
            names = [prompt.example.name for prompt in prompts[:8]]
            rows = ", ".join(filter(None, names)) or "of the toy"
            saved = from_rank_0(partial(good_states, self.out))
            last = f"the last good state is {saved[-1]}" if saved else "no state yet"
            raise UsageError(f"step {step}: the gradient is not finite; prompts: {rows}; {last}")

    def interrupt(self, number: int, frame: Any) -> None:
        """Handle one of `STOP_SIGNALS`: let the step finish. A second signal ends a run of one
        process at once. With several processes it is ignored, because the scheduler and torchrun
        may each send one."""
        self.signal = number
        if world_size() == 1:
            signal.signal(number, self.handlers[number])

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for file in self.files.values():
            file.close()
        if self.tensorboard:
            with writing(self.out, "tensorboard"):
                self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def save_checkpoint(self, save: Callable[[Path | None], None]) -> Path:
        """Write `checkpoint/` with `save(directory)`, and the `adapter/` that it may create beside
        it.

        Both are written aside and then renamed, so neither is ever incomplete. All ranks must call
        it; ranks other than 0 call `save(None)`.

        Raises:
            UsageError: it cannot be written, as on a full disk; an earlier checkpoint is unchanged.
        """
        final = self.out / "checkpoint"
        if rank() != 0:
            save(None)
            return final
        with writing(self.out, "checkpoint"):
            aside = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=self.out))
            old = aside.with_suffix(".old")
            try:
                new = aside / final.name
                new.mkdir()
                save(new)
                for path in aside.rglob("*.safetensors"):  # safetensors makes them owner-only
                    path.chmod(new.stat().st_mode & 0o666)
                for path in (*aside.rglob("*"), aside):
                    flush(path)
                if final.exists():
                    final.rename(old)
                new.rename(final)
            except Exception:
                if old.exists():
                    old.rename(final)
                shutil.rmtree(aside, ignore_errors=True)
                raise
            for beside in aside.iterdir():
                shutil.rmtree(self.out / beside.name, ignore_errors=True)
                beside.rename(self.out / beside.name)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(aside)
        return final

    def save_state(
        self,
        step: int,
        model: Module,
        optimizer: Optimizer,
        extra: dict[str, Any] | None = None,
        done: bool = False,
    ) -> bool:
        """Save what `--resume` needs every `save_every` steps, after the last step (`done`), and
        after a signal. Returns whether the run must stop now. `extra` holds anything else that the
        script needs to resume."""
        stop = max(gather([self.signal or 0])) > 0 and not done
        due = self.args.save_every > 0 and (done or step % self.args.save_every == 0)
        if due or stop:
            tensors, failure = state_tensors(model, optimizer), ""
            try:
                if rank() == 0:
                    for name, file in self.files.items():
                        with writing(self.out, name):
                            os.fsync(file.fileno())
                    state = {
                        "step": step,
                        "done": done,
                        "lengths": {name: file.tell() for name, file in self.files.items()},
                        "read": self.bad_rows.read * world_size(),
                        "prompts": self.args.prompts_per_step * world_size(),
                        "extra": extra or {},
                        "inputs": self.inputs,
                        "wandb": self.wandb and self.wandb.id,
                        "definitions": DEFINITIONS,
                    }
                    write_state(self.out, state, tensors, self.args)
            except UsageError as error:
                failure = str(error)
            for _ in tensors:  # every rank gathers to the end, even if rank 0 cannot write
                pass
            failure = gather([failure])[0]
            require(not failure, failure)
        if stop and rank() == 0:
            here = os.environ.get("LOCAL_WORLD_SIZE", world_size())  # on this host
            several = f"torchrun --shutdown-timeout 1800 --nproc_per_node={here}"
            launch = "python" if world_size() == 1 else several
            # Of two --resume the last counts, and a state that was named is not the newest now.
            resume = [] if self.args.resume == "auto" else ["--resume", "auto"]
            words = shlex.join([*sys.argv, *resume])
            print(f"\nstopped after step {step}; resume with: {launch} {words}")
        return stop

    def restore(self, model: Module, optimizer: Optimizer) -> dict[str, Any]:
        """Load the state into model and optimizer, restore the random number generators, and only
        then cut the files back to the state; returns the state's `extra`."""
        if self.state is None:
            return {}
        load_state(f"--resume {self.args.resume}", self.state.path, model, optimizer)
        on_rank_0(self.begin)
        self.bad_rows.read = self.state.read // world_size()
        return self.state.extra


def sample_rows(
    prompts: Sequence[Any], texts: list[list[str]], rewards: Tensor
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl for G responses to each of B prompts and their rewards (B, G)."""
    groups = zip((prompt.example for prompt in prompts), texts, rewards.tolist(), strict=True)
    return [
        {"row": x.name, "problem": x.problem, "solution": x.solution, "response": t, "reward": r}
        for x, group, values in groups
        for t, r in zip(group, values, strict=True)
    ]


EQUAL_STEPS = 10


def why_equal(steps: Sequence[dict[str, float]]) -> str:
    """The likely cause of equal rewards in every group, inferred from the metrics of some steps,
    and its remedy."""
    names = ("format", "accuracy", "truncated_frac")
    formats, accuracies, truncated = (
        sum(x[f"rollout/{n}"] for x in steps) / len(steps) for n in names
    )
    if formats < 0.01 and truncated > 0.5:
        cut = f"{truncated:.0%} of the responses are cut off before their end"
        return f"{cut}: raise --max-new-tokens"
    if formats < 0.01:
        return "no response has the requested format: teach it with sft.py first"
    if accuracies > 0.99:
        return "all are correct: train on harder data"
    if accuracies < 0.01:
        check = "see in samples.jsonl whether responses and solutions can match"
        return f"all are wrong: {check}, train with sft.py first, or on easier data"
    return "responses to one prompt are all alike: raise --temperature or --group-size"


# 4. States to resume from

DEFINITIONS = 3  # raise it, with an entry below, when the same arguments compute something else
CHANGES = {  # by the number that introduced them
    2: "the default attention row of a token is its own (was: the one that predicts it),"
    " attn_distill.py's attention loss is a sum over the response (was: a mean), accuracy by"
    " problem type accepts more notations, and videos have other frames and a minimum size",
    3: "a video without --frames gives one frame a second, or --fps, and at most 128",
}


@dataclass
class State:
    """A state to resume from: its path, the number of steps done, the length of each file, the
    number of rows read, what else the script saved, and the id of the run at Weights & Biases."""

    path: Path
    step: int
    lengths: dict[str, int]
    read: int
    extra: dict[str, Any]
    wandb: str | None = None


def good_states(out: Path) -> list[Path]:
    """Complete states of a run, oldest first. A state still being written has another name."""
    named = (p for p in (out / "state").glob("step-*") if re.fullmatch(r"step-\d{1,9}", p.name))
    return sorted((p for p in named if p.is_dir() and not p.is_symlink()), key=step_of)


def step_of(state: Path) -> int:
    """The number of steps done at a state, from its name."""
    return int(state.name.removeprefix("step-"))


# What the content of a damaged state raises; the files are as untrusted as any other.
BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
BROKEN += (ArithmeticError, SafetensorError)


@contextmanager
def readable(named: str, path: Path) -> Iterator[None]:
    """Turn an exception raised while reading a state into a one-line `UsageError`."""
    try:
        yield
    except BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        reason = f"lacks {reason}" if isinstance(error, KeyError) else reason
        remedy = "give an earlier one"
        raise UsageError(f"{named}: {path} is not readable ({reason}); {remedy}") from None


def own_file(path: Path) -> Path:
    """`path`, if it is a plain file: a state has no links, which might lead anywhere."""
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path.name} is missing or a link")
    return path


def read_state(args: Any) -> dict[str, Any] | None:
    """Read `state.json` of the state that `--resume` names, and add its path and whether the run
    has a checkpoint; None if there is no state to resume. Only rank 0's disk holds a run, so rank 0
    chooses and reads for all.

    Raises:
        UsageError: the state is not one of this run, is unreadable, or was written by a version
            that computes something else.
    """
    return None if args.resume is None else from_rank_0(partial(choose_state, args))


def choose_state(args: Any) -> dict[str, Any] | None:
    """Do what `read_state` says, on this rank's disk."""
    saved = good_states(Path(args.out))
    if args.resume == "auto" and not saved:
        return None
    path = saved[-1] if args.resume == "auto" else Path(args.resume)
    named = f"--resume {args.resume}"
    known = path.resolve() in [p.resolve() for p in saved]
    choices = f"is not a state of --out {args.out}; give one of its state/step-*, or auto"
    require(known, f"{named}: {choices}")
    with readable(named, path):
        state = json.loads(own_file(path / "state.json").read_bytes()) | {"path": path}
        state["checkpoint"] = Path(args.out, "checkpoint").is_dir()
        lengths = [state["step"], state["read"], *state["lengths"].values()]
        counts = all(type(n) is int and n >= 0 for n in lengths)
        if step_of(path) != state["step"] or not counts or type(state["extra"]) is not dict:
            raise ValueError("state.json is damaged")
        by = state.get("definitions", 1)
        changes = [CHANGES[n] for n in range(by + 1, DEFINITIONS + 1)]
        changes = changes or ["it is of a later version"]
        remedy = "finish the run with the version that wrote it, or train again; if your script and"
        remedy += " flags do not depend on this, --allow-changed-args resumes it"
        same = by == DEFINITIONS or args.allow_changed_args
        other = "was written by a version that computes something else"
        require(same, f"{named}: {path} {other}: {'; '.join(changes)}; {remedy}")
        # Arguments added since then count as None.
        return state | {"args": dict.fromkeys(asdict(args)) | state["args"]}


def find_state(args: Any) -> State | None:
    """The state that `--resume` names or, with `auto`, the newest good one of the run; None if
    there is none. Arguments and input files must be the same on all ranks.

    Raises:
        Finished: no steps are left.
        UsageError: there is no such state, or it was made with other arguments or input files.
    """
    inputs = fingerprint_inputs(args)
    require_same_on_ranks(inputs)
    require_same_on_ranks(options(args))
    state, named = read_state(args), f"--resume {args.resume}"
    if state is None:
        return None
    with readable(named, state["path"]):  # it may lack a key
        before, now = state["args"], json.loads(json.dumps(asdict(args)))
        differ = [f"{k} {before[k]} -> {now[k]}" for k in now if now[k] != before[k]]
        gone = {k: value for k, value in before.items() if k not in now and value is not None}
        differ += [f"{k} {value} -> no such argument" for k, value in gone.items()]
        differ = [words for words in differ if words.split()[0] not in args.may_change()]
        prompts = args.prompts_per_step * world_size()
        if state["prompts"] != prompts:
            differ.append(f"prompts_per_step times processes {state['prompts']} -> {prompts}")
        known = state.get("inputs", inputs)
        changed = [x for x in {**known, **inputs} if known.get(x) != inputs.get(x)]
        differ += [f"other content: {', '.join(changed[:3])}"] if changed else []
        remedy = "give them as they were, or --allow-changed-args"
        same = args.allow_changed_args or not differ
        require(same, f"{named}: was made with other arguments ({'; '.join(differ)}); {remedy}")
        stopped = state["done"] and not differ and before["steps"] == args.steps  # as SFT may
        if stopped or state["step"] >= args.steps:
            over = f"the run at {args.out} has finished (step {state['step']})"
            again = "--resume one of its earlier states makes it again"
            require(state["checkpoint"], f"{named}: {over}, but its checkpoint is gone; {again}")
            raise Finished(over)
        names = ("path", "step", "lengths", "read", "extra")
        return State(*(state[name] for name in names), state.get("wandb"))


MOST_FILES = 500_000  # in a directory of a data set, its media included


def data_files(path: str | None) -> list[Path]:
    """The local files that `--data` names: a file, or the data files of a directory.

    Raises:
        UsageError: one of them is not a regular file (a pipe might wait for ever), or the directory
            holds too many files to be a data set.
    """
    if not path:
        return []
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


BLOCK, BLOCKS = 2**18, 2**10  # bytes in a block, and blocks that are read for one argument


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


def fingerprint_inputs(args: Any) -> dict[str, str]:
    """The fingerprint of every file of `--model`, `--teacher`, `--data` and `--eval-data`, by
    argument and name; for a hub name, the commit.

    At most 256 MB are read for one argument, but always both ends of each file. So a changed label
    in a JSON file is noticed up to that size, and a changed Parquet footer at any size.
    """
    prints = {}
    for name in ("model", "teacher", "data", "eval_data"):
        if not (path := getattr(args, name, None)):
            continue
        label, of_data = option(name), name.endswith("data")
        if of_data:
            files = data_files(path)
        else:
            kinds = ("*.json", "*.txt", "*.jinja", "*.safetensors")
            files = sorted(file for kind in kinds for file in Path(path).glob(kind))
        if not files:
            kind = "dataset" if of_data else "model"
            folder = f"{kind}s--{path.partition(':')[0].replace('/', '--')}"
            commit = Path(HF_HUB_CACHE, folder, "refs", "main")
            prints[label] = commit.read_text() if commit.is_file() else "none"
            continue
        root, blocks = os.path.commonpath([file.parent for file in files]), BLOCKS // len(files)
        for file in files:
            try:
                prints[f"{label} {file.relative_to(root)}"] = fingerprint(file, max(2, blocks))
            except OSError as error:
                raise UsageError(f"{label}: {file} cannot be read ({error.strerror})") from None
    return prints


def state_tensors(model: Module, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name of each trained parameter, and its weight and optimizer state as full tensors.
    Gathering them needs all ranks, so each must read to the end."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors = {"weight": parameter.detach(), **optimizer.state[parameter]}
            yield name, {key: full_tensor(x).contiguous() for key, x in tensors.items()}


def write_state(
    out: Path, state: dict[str, Any], tensors: Iterable[tuple[str, dict[str, Tensor]]], args: Any
) -> None:
    """Write a state aside, flush it to disk, rename it, and delete all but the newest `keep`
    states, and those that `Run.move_later_states` has renamed.

    Each trained parameter has its own file, so that rank 0 holds only one at a time.

    Raises:
        UsageError: it cannot be written, as on a full disk; earlier states are unchanged.
    """
    folder = out / "state"
    aside = folder / f"step-{state['step']:06}.part"
    final = aside.with_suffix("")
    with writing(out, f"state/{final.name}"):
        folder.mkdir(exist_ok=True)
        for left in folder.glob("*.part"):
            shutil.rmtree(left)
        aside.mkdir()
        try:
            for name, content in tensors:
                save_file(content, aside / f"{name}.safetensors")
            (aside / "random.json").write_text(json.dumps(random_state()))
            (aside / "state.json").write_text(json.dumps(state | {"args": asdict(args)}, indent=1))
            for path in (*aside.iterdir(), aside):
                flush(path)
        except Exception:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)  # left from before a resume at an earlier step
        aside.rename(final)
        flush(folder)
    for old in (*good_states(out)[: -args.keep], *folder.glob("step-*.later")):
        shutil.rmtree(old)


def flush(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's random number generators. The scripts draw
    nothing from them after the start, but a fork may."""
    kind, keys, *rest = np.random.get_state()
    numpy_state = [kind, keys.tolist(), *rest]
    torch_state = torch.get_rng_state().tolist()
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch_state}


def load_state(named: str, path: Path, model: Module, optimizer: Optimizer) -> None:
    """Load weights, moments and random number generators from a state. Rank 0 reads one parameter
    at a time and sends the other ranks their shards. `named` begins an error message."""

    def read(name: str, shape: torch.Size) -> dict[str, Tensor]:
        with readable(named, path):
            tensors = load_file(own_file(path / f"{name}.safetensors"))
            moments = [x for x in tensors.values() if x.ndim]
            if any(x.shape != shape for x in (tensors["weight"], *moments)):
                raise ValueError(f"{name} has another size")
            return tensors

    def read_random() -> dict[str, Any]:
        with readable(named, path):
            return json.loads(own_file(path / "random.json").read_bytes())

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors = on_rank_0(partial(read, name, parameter.shape)) or {}
            # The other ranks learn shapes and dtypes here, and get the numbers in `shard_like`.
            sent = {key: x.to("meta") if x.ndim else x for key, x in tensors.items()}
            sent = gather([sent])[0]
            empty = {key: torch.empty_like(x, device="cpu") for key, x in sent.items() if x.ndim}
            tensors = tensors or sent | empty
            with torch.no_grad():
                parameter.copy_(shard_like(tensors.pop("weight"), parameter))
            # A fused optimizer counts its steps on the parameter's device.
            device = parameter.device if optimizer.defaults.get("fused") else "cpu"
            optimizer.state[parameter] = {
                key: shard_like(value, parameter) if value.ndim else value.to(device)
                for key, value in tensors.items()
            }
    random_numbers = from_rank_0(read_random)
    with readable(named, path):
        version, keys, gauss = random_numbers["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(random_numbers["numpy"])
        torch.set_rng_state(torch.tensor(random_numbers["torch"], dtype=torch.uint8))


def same_inputs(args: Any) -> str:
    """The model and data arguments of a run as command-line text."""
    words = []
    names = ("model", "teacher", "data", "eval_data", "media_root", "rows", "frames", "fps")
    for name in names:
        value = getattr(args, name, None)
        if value and value != getattr(type(args), name):
            words += [option(name), *map(str, each(value))]
    return "".join(f" {shlex.quote(word)}" for word in words)


def print_summary(
    run: Run, before: dict, after: dict, steps: int, start: float, script: str, args: Any
) -> None:
    """Print a short table at the end of a run: changes in held-out metrics, duration, files, and
    the next command, which runs `script` on the inputs of `args`."""
    if rank() != 0:
        return
    print(f"\n{'held-out':<24}{'before':>8}{'after':>8}")
    for name in after:
        if name == "eval/accuracy" or name.startswith("eval/target_attn_l"):
            label = name.removeprefix("eval/").replace("target_attn_l", "on target, layer ")
            print(f"{label:<24}{before[name]:>8.3f}{after[name]:>8.3f}")
    seconds = round(time.time() - start)
    for label, value in (("steps", steps), ("seconds", seconds), ("run", run.out)):
        print(f"{label:<24}{value!s:>16}")
    drawn = (run.out / name for name in ("gaze.html", "attention.png", "curves.png"))
    print("pictures:", ", ".join(str(path) for path in drawn if path.exists()))
    path = Path(__file__).with_name(script)
    if path.exists():  # a fork may lack the sibling scripts
        print(f"next: python {shlex.quote(os.path.relpath(path))}{same_inputs(args)}")
