"""What a script does with its output, the variables of its launcher, and its readers' messages."""

import errno
import io
import math
import multiprocessing
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
from ast import literal_eval
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval
import ral_grpo
import sft
from support import cli, data, disk, ranks, startup
from support.data import Prompts, Reader
from support.datafiles import DataFile

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_output_that_cannot_be_printed_is_dropped(monkeypatch, tmp_path, number):
    if number == errno.EPIPE:
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    errors = cli.keep_printing()
    for _ in range(3):
        print("caf\u00e9 \udcff " * 10_000)
        print("caf\u00e9", file=sys.stderr, flush=True)
    sys.stdout.close()
    assert [error.errno for error in errors] == [number]


def test_output_in_ascii_is_escaped(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
    assert cli.keep_printing() == []
    print("caf\u00e9", flush=True)
    assert content.getvalue() == b"caf\\xe9\n"


def test_processes_of_a_scheduler_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks.start_ranks()
    assert ranks.world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    words = (
        "^WORLD_SIZE=8 is set, but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with torchrun"
    )
    with pytest.raises(ranks.UsageError, match=words):
        ranks.start_ranks()


def test_a_rank_ends_with_its_torchrun(monkeypatch):
    """Even if that was killed."""
    reader, writer = os.pipe()
    if (torchrun := os.fork()) == 0:
        parent = os.getpid()
        if os.fork() == 0:
            ranks.end_with_parent(parent)
        os._exit(0)
    os.close(writer)
    os.waitpid(torchrun, 0)
    assert select.select([reader], [], [], 60)[0] and os.read(reader, 1) == b""  # none writes more
    watched = queue.Queue()
    monkeypatch.setattr(ranks, "end_with_parent", watched.put)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *_, **__: None)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in (*names, "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0")
    ranks.start_ranks()
    assert watched.get(timeout=60) == os.getppid()


@pytest.mark.parametrize("script", ["sft", "ral_grpo", "eval"])
def test_ctrl_c_during_imports_is_one_line(tmp_path, script):
    for library in ("numpy", "torch"):
        (tmp_path / f"{library}.py").write_text("print(flush=True); import time; time.sleep(99)")
    program = subprocess.Popen(
        [sys.executable, ROOT / f"{script}.py"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    program.stdout.readline()
    program.send_signal(signal.SIGINT)
    assert program.communicate()[1] == b"\nstopped by Ctrl-C before the start\n"
    assert program.returncode == 130
    assert signal.getsignal(signal.SIGINT) is not startup.stop  # though scripts are imported here


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_of_gpu_memory_grow_unless_the_user_decides(tmp_path, name):
    """Before PyTorch is imported, which reads the newer name first."""
    for library in ("numpy", "torch"):
        (tmp_path / f"{library}.py").write_text("import os; print(dict(os.environ)); exit()")
    own = {} if name is None else {name: "max_split_size_mb:128"}
    environment = {"PYTHONPATH": str(tmp_path)} | own
    shown = subprocess.check_output([sys.executable, ROOT / "sft.py"], env=environment, text=True)
    decided = {key: value for key, value in literal_eval(shown).items() if "ALLOC" in key}
    assert decided == (own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


WRONG = {
    "temperature": (math.inf, math.nan),
    "learning_rate": (math.inf, math.nan),
    "fps": (math.inf, 0.0),
    "max_grad_norm": (math.inf,),
    "epochs": (1e300,),
    "seed": (2**64,),
    "steps": (10**30,),
    "out": ("",),
    "data": ("",),
    "media_root": (("",),),
}


@pytest.mark.parametrize("script", [sft, ral_grpo, eval])
@pytest.mark.parametrize("name", WRONG)
def test_values_that_nothing_can_compute_with_are_refused(script, name):
    needed = {"model": "x"} if script is eval else {}
    for value in WRONG[name] if name in script.Args.__dataclass_fields__ else ():
        with pytest.raises(ranks.UsageError, match=rf"\A--{name.replace('_', '-')} [^\n]+\Z"):
            script.Args(**needed | {name: value})


@pytest.mark.parametrize("words", [["--data"], ["--data", "--model", "x"], ["--eval_data"]])
def test_an_option_without_its_values_is_not_unset(monkeypatch, words):
    """As from `--data $FILE` without a FILE: the built-in task would be trained."""
    monkeypatch.setattr(sys, "argv", ["sft.py", *words])
    with pytest.raises(ranks.UsageError, match=f"^{words[0]}: needs a value"):
        cli.parse(sft.Args, "", {})


def test_a_forks_argument_may_have_a_list_as_its_default(monkeypatch):
    @dataclass
    class Args(sft.Args):
        layers: list[int] = field(default_factory=lambda: [-1])

    monkeypatch.setattr(sys, "argv", ["mine.py"])
    assert cli.parse(Args, "", {}).layers == [-1]
    table = {"layers": [0, 1]}
    assert cli.parse(Args, "", table).layers == [0, 1]
    with pytest.raises(ranks.UsageError, match=r"names no argument of its own: layer$"):
        cli.parse(Args, "", {"layer": 0})


def test_data_that_would_wait_is_refused(tmp_path, monkeypatch):
    pipe = tmp_path / "train.parquet"
    os.mkfifo(pipe)
    for path, words in (
        (tmp_path, f"{pipe} is not a regular file"),
        (pipe, "is neither a file nor a directory"),
        ("/dev/zero", "is neither a file nor a directory"),
    ):
        with pytest.raises(ranks.UsageError, match=f"^--data {path}: {words}$"):
            DataFile(str(path))
    monkeypatch.setattr(disk, "MOST_FILES", 20)
    with pytest.raises(ranks.UsageError, match=r"^--data /: holds more than 20 files"):
        DataFile("/")


def test_help_joins_no_group(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "start_ranks", None)
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.run_script(cli.RunArgs, None, "What it is.")
    assert ended.value.code == 0 and "What it is." in capsys.readouterr().out


def test_help_lists_the_scripts_own_arguments_first(monkeypatch, capsys):
    """A text of several lines is one paragraph."""
    monkeypatch.setattr(sys, "argv", ["ral_grpo.py", "--help"])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        cli.parse(ral_grpo.Args, "", {"steps": 7})
    shown = capsys.readouterr().out
    flags = re.findall(r"^[^\w\n]*(--[a-z][a-z-]*)", shown, re.MULTILINE)
    assert flags[0] == "--model" and flags.index("--lambda-attn") < flags.index("--data")
    assert "see docs/data.md. Unset: the built-in task." in shown and "(default: 7)" in shown


def test_readers_use_no_shared_memory(monkeypatch):
    """Of which a container has little. Each tensor there would be an open file, too."""
    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, lambda _: (str, ("shared",)))
    source = SimpleNamespace(example=lambda row: row, place=str)

    def encode(row: int) -> SimpleNamespace:
        return SimpleNamespace(ids=torch.full((100_000,), row))

    prompts = Prompts(source, encode, np.arange(9), keep_media=9)
    reader = Reader(prompts, range(9), 2, data.BadRows())
    assert [prompt.ids.unique().tolist() for prompt in reader] == [[row] for row in range(9)]


class Arrival:
    """Becomes the thread that unpickles it."""

    def __reduce__(self):
        return threading.current_thread, ()


@pytest.fixture
def pipe_on_gpu(monkeypatch) -> Callable[[Callable], Iterator]:
    """Prompts that two readers encode with a given function, as on a GPU."""
    device = {"is_available": True, "current_accelerator": torch.device("cpu")}
    device |= {"current_device_index": 0, "set_device_index": None}
    for name, value in device.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    source = SimpleNamespace(example=lambda row: row, place=str)

    def stream(encode: Callable) -> Iterator:
        prompts = Prompts(source, encode, np.arange(99), keep_media=99)
        return iter(Reader(prompts, range(99), 2, data.BadRows()))

    return stream


def test_on_a_gpu_a_thread_takes_prompts_from_the_pipe(pipe_on_gpu):
    """Training would wait while the pixels of a video arrive. It may end before the readers do."""
    others = multiprocessing.active_children()  # of other tests in this process
    stream = pipe_on_gpu(lambda row: SimpleNamespace(ids=Arrival()))
    threads = {next(stream).ids for _ in range(9)}
    assert threading.main_thread() not in threads and len(threads) == 1
    stream.close()
    assert not {*multiprocessing.active_children()} - {*others} and not threads.pop().is_alive()
    assert not data.BROKEN


def test_a_reader_killed_while_it_sends_is_not_waited_for(pipe_on_gpu):
    def die(connection, content):
        os.write(connection.fileno(), content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def encode(row: int) -> SimpleNamespace:
        Connection._send = die  # in the reader
        return SimpleNamespace()

    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid"):
        next(pipe_on_gpu(encode))
    assert len(data.BROKEN) == 1
    ranks.end_readers()


def test_readers_that_cannot_start_are_one_line(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.multiprocessing.Process, "start", full)
    reader = Reader(Prompts(None, None, np.arange(9)), range(9), 2, data.BadRows())
    words = r"^--workers 2: the readers cannot start: No space .*; free some space, or give fewer"
    with pytest.raises(ranks.UsageError, match=words):
        list(reader)
