"""Runs scripts as their command lines do, with something planted in them, up to the end of the
interpreter; started by the fixture `server`. Each line of standard input is a case, which runs in a
fork: that saves the seconds it takes to import PyTorch. Of each, the process id is printed, and
then what `waitpid` says of it."""

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import runpy
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.utils.data
from real import write_checkpoint
from transformers import PreTrainedConfig

import common
from support import cli, data, pictures, ranks, toy

FRAMES = []
DRAW = {name: getattr(pictures, name) for name in ("draw_attention", "draw_curves")}


def leave_out() -> None:
    """Leave out what takes a third of a toy run, and hardly any test looks at: pictures, which
    become empty files, and the text of a config, which transformers makes for logs and errors that
    nobody sees."""
    for name in DRAW:
        setattr(pictures, name, lambda path, *_: path.touch())
    PreTrainedConfig.__repr__ = object.__repr__


def keep(*_) -> None:
    """Keep all variables of the script's `main` alive, as a traceback that is kept somewhere
    does."""
    FRAMES.append(sys._getframe(2))


def wait(*_) -> None:
    """Say that there are readers, and wait until a signal has changed its handler or raised."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    print(f"\nreaders: {len(multiprocessing.active_children())}; waiting", flush=True)
    while before == [signal.getsignal(number) for number in numbers]:
        time.sleep(0.05)


def fail(*_) -> None:
    print(f"\nreaders: {len(multiprocessing.active_children())}", flush=True)
    raise RuntimeError("planted")


def strand(*_) -> None:
    """Fail while a thread runs that Python waits for, as libraries leave one behind."""
    threading.Thread(target=time.sleep, args=(1000,)).start()
    raise ranks.UsageError("planted")


def kill(*_) -> None:
    """Kill a reader, as the system does when memory is full."""
    multiprocessing.active_children()[0].kill()
    time.sleep(1)


def terminate(*_) -> None:
    """Send the signal that a scheduler sends to every process of a job."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)


def fill_output(*_) -> None:
    """Standard output is from here on a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def close_output(*_) -> None:
    """Nobody reads standard output from here on."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def full(*_) -> None:
    raise OSError(28, "No space left on device")


def mount_disk(*_) -> None:
    """Put a disk of 12 MB, which this process alone sees, at the working directory."""
    libc, place = ctypes.CDLL(None), os.getcwd()
    ids = {"uid_map": f"0 {os.getuid()} 1", "setgroups": "deny", "gid_map": f"0 {os.getgid()} 1"}
    if libc.unshare(0x10020000) == 0:  # namespaces of its own, of users and of mounts
        for name, text in ids.items():
            Path("/proc/self", name).write_text(text)
        if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, b"size=12m") == 0:
            return os.chdir(place)
    raise ranks.UsageError("no mounts here")


def fill_disk(*_) -> None:
    """Fill the disk of the working directory to its last byte."""
    with open("filler", "wb", buffering=0) as file:
        for size in (2**20, 2**10, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def hang(prompts, n: int) -> None:
    """Never read the third step's prompts; called by `Prompts.__getitem__` in a reader."""
    while prompts.seed is not None and n >= 4:
        time.sleep(1)


def hurry(*_) -> None:
    """Wait for a reader no longer than three seconds."""
    data.TIMEOUT = 3


def plant(place: str, do: str, first: int = 1, last: int = sys.maxsize) -> None:
    """Call the function `do` before the `first` to the `last` call of `place`, counted from 1."""
    owner, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    if do == "hang":  # PyTorch waits so many seconds for a worker, twice
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
    function, calls = getattr(owner, name), 0

    def planted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if first <= calls <= last:
            globals()[do](*args)
        return function(*args, **kwargs)

    setattr(owner, name, planted)


def defaults_of(script):
    """What the script gives to `run_script`."""
    if script.__name__ == "eval":
        return script.defaults
    unset = {"unset": None} if script.__name__ == "sft" else {}
    return partial(toy.defaults, script.TOY, **unset)


def warm_up() -> None:
    """Do once what each fork would do again: loading the first checkpoint makes transformers build
    its tables, and tries the chat template in a process of its own."""
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), "qwen2_vl")
        common.load_model(folder)


def launch(case: dict) -> None:
    for what in case["plants"]:
        plant(*what)
    script = importlib.import_module(case["script"])
    if script.__name__ == "ranks":
        return script.run_two(*case["argv"])
    sys.argv = [script.__file__, *case["argv"]]
    if not case["plants"]:
        return runpy.run_path(script.__file__, run_name="__main__")
    cli.run_script(script.Args, script.main, script.__doc__, defaults_of(script))


def fork(case: dict) -> int:
    """Start a case in a session of its own, as two ranks if it says so; returns the process id, or
    0 in the new processes. Their output goes to the named pipe `output`, which is at its end when
    no process of the case is left. Given `folders`, each rank works in its own, as on a host of its
    own."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        output = os.open(case["output"], os.O_WRONLY)
        for new, old in ((null, 0), (output, 1), (output, 2)):
            os.dup2(new, old)
        os.close(output)
        sys.stderr = os.fdopen(2, "w", 1, closefd=False)  # of the parent, it may be a file
        folders, rank = case["folders"], 0
        if case["ranks"] == 2:  # torchrun would import PyTorch twice
            with socket.create_server(("localhost", 0)) as free:
                port = str(free.getsockname()[1])
            rank = 0 if os.fork() else 1
            os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(0 if folders else rank)}
        if folders:
            os.chdir(folders[rank])
    return child


if __name__ == "__main__":
    names = ("sft", "grpo_baseline", "ral_grpo", "kd_baseline", "attn_distill", "eval")
    for name in (*names, "ranks", "matplotlib.pyplot", "torch.utils.tensorboard"):
        importlib.import_module(name)
    leave_out()
    warm_up()
    # A shell may have started the tests in the background, where Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # collecting what was imported would copy it in every fork
    for line in sys.stdin:
        child = fork(case := json.loads(line))
        if child == 0:
            launch(case)
            break  # and then the interpreter ends
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
