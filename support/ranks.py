"""Errors, processes and devices: what several ranks do together, and how a process ends."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from threading import Thread
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class UsageError(Exception):
    """An error that the user can fix; its one line names the field, the value and the remedy."""


class Ended(Exception):
    """The process ends here, without an error: it prints the message and ends with `status`. That
    is 0 if nothing is left to do, as a queue that starts a finished run again expects, and 128
    plus the signal's number after a signal, so that a shell does not go on to the next command."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


def require(condition: bool, message: str) -> None:
    """Raise `UsageError(message)` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def first_line(error: Exception) -> str:
    """The message of a library's error in one line, behind its type if it needs that."""
    words = getattr(error, "strerror", None) or str(error)  # without the number and the path
    lines = [line.strip(" .") for line in words.strip().splitlines()] or [""]
    text = " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:200]
    known = text and isinstance(error, OSError | ValueError)
    return text if known else f"{type(error).__name__}: {text}".rstrip(": ")


# A scheduler sends one of them some time before it kills a job.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


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


def end_with_parent(parent: int) -> None:
    """End this process, a reader or a rank, within a second of its parent, even if the parent was
    killed.

    PyTorch's workers watch their parent too. But a worker inside a decoder does not check, and one
    that has sent more than a pipe holds waits for a receiver. Ranks would go on without torchrun.
    """
    process = multiprocessing.parent_process()  # of a reader, perhaps not its `parent`
    while os.getppid() == parent and (process is None or process.is_alive()):
        time.sleep(1)
    os._exit(1)


def start_ranks() -> None:
    """Join the other ranks if torchrun started this process. On a GPU, a single process forms a
    group of one, so there is only one code path. Refuses several processes that a scheduler
    announces without torchrun."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    lacking = [name for name in names if not os.environ.get(name)]
    announced = os.environ.get("WORLD_SIZE") or "1"
    remedy = "start with torchrun, or unset WORLD_SIZE for a single process"
    several = f"WORLD_SIZE={announced} is set, but not {', '.join(lacking)}; {remedy}"
    require(announced == "1" or not lacking, several)
    on_gpu = torch.cuda.is_available()
    if dist.is_initialized() or (lacking and not on_gpu):
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    if on_gpu and not lacking:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if lacking else {}
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    # The other ranks wait while rank 0 writes a state of 85 GB (7B, all weights).
    dist.init_process_group(backend, timeout=timedelta(hours=2), **alone)


def leave_ranks(status: int) -> None:
    """End this process together with the other ranks. Several ranks skip the interpreter's cleanup:
    in about one of sixty launches, a process aborted there after its work was done."""
    if world_size() > 1:
        dist.barrier()
        leave(status)
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


print_once = cache(print_on_rank_0)  # a run loads a processor several times


def gather(items: list) -> list:
    """Concatenate the lists of all ranks, in rank order."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def together(action: Callable[[], Any]) -> Any:
    """Run `action` on every rank and return its result. A `UsageError` on any rank is raised on
    all, so that none waits."""
    result, refusals = None, []
    try:
        result = action()
    except UsageError as error:
        refusals = [str(error)]
    for refusal in gather(refusals)[:1]:
        raise UsageError(refusal)
    return result


def on_rank_0(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result there, None on the other ranks. A `UsageError`
    is raised on all."""
    return together(lambda: action() if rank() == 0 else None)


def from_rank_0(action: Callable[[], Any]) -> Any:
    """Like `on_rank_0`, but all ranks get the result, as of files that only rank 0's disk holds."""
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
    parts = gather([metrics])

    def combine(name: str) -> float:
        values = [part[name] for part in parts]
        if name == "perf/tokens_per_s":
            return sum(values)
        return max(values) if name.startswith("perf/") else sum(values) / len(values)

    return {name: combine(name) for name in metrics}


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all ranks; return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` with the sharding and device of `other`."""
    if isinstance(other, DTensor):
        device = other.device_mesh.device_type
        return distribute_tensor(tensor.to(device), other.device_mesh, other.placements)
    return tensor.to(other.device)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype() -> torch.dtype:
    """Dtype of forward and backward passes: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32
