"""A run directory belongs to one process at a time, and a failure to write it is one line."""

import errno
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import defaults_of
from safetensors import SafetensorError
from shared import SMALL, load, toy_args
from torch.utils.data import DataLoader

import attn_distill
import common
import eval
import grpo_baseline
import kd_baseline
import ral_grpo
import sft
from support import cli, data, disk, pictures, ranks, runs

ROOT = Path(__file__).parents[1]
FIELDS = SMALL | {"steps": 4, "save_every": 2, "eval_every": 4, "learning_rate": 1e-3}
FIELDS |= {"num_iterations": 1}


@pytest.fixture(autouse=True)
def restored():
    """A run that fails leaves its signal handlers."""
    handlers = {number: signal.getsignal(number) for number in ranks.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def locked(out: Path) -> bool:
    """Whether another process is refused the lock of `out`."""
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code, out / ".lock"]
    return subprocess.run(command, capture_output=True).returncode != 0


# The lock


def hold(run: Path, evaluation: Path, pipe) -> None:
    """Run and evaluate without end, with two readers, whose ids go to the pipe."""
    held = (runs.Run(grpo_baseline.Args(out=str(run)), data.BadRows()),)
    held += (disk.lock_directory(evaluation),)
    readers = iter(DataLoader(range(1000), num_workers=2))
    next(readers)
    pipe.send([reader.pid for reader in readers._workers])
    time.sleep(600)


@pytest.fixture
def holder(cold_start, tmp_path):
    """A process with a run at `run` and an evaluation at `eval`, and the ids of its readers."""
    args = toy_args(eval, model=str(cold_start), examples=2, out=str(tmp_path / "eval"))
    eval.main(args)
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=hold, args=(tmp_path / "run", tmp_path / "eval", theirs))
    process.start()
    theirs.close()  # so that the pipe ends with the process
    yield process, ours.recv()
    process.kill()
    process.join()


def test_a_directory_in_use_is_refused_until_its_process_is_gone(holder, cold_start, tmp_path):
    process, readers = holder
    fields = FIELDS | {"model": str(cold_start), "out": str(tmp_path / "run"), "steps": 1}
    in_use = rf"^--out .*: in use by process {process.pid} on [^\n]*$"
    before = sorted(tmp_path.rglob("*"))
    for changed in ({}, {"overwrite": True}, {"resume": "auto"}):
        with pytest.raises(ranks.UsageError, match=in_use):
            grpo_baseline.main(toy_args(grpo_baseline, **fields | changed))
    args = toy_args(eval, model=str(cold_start), examples=2, out=str(tmp_path / "eval"))
    for overwrite in (False, True):
        with pytest.raises(ranks.UsageError, match=in_use):
            eval.main(replace(args, overwrite=overwrite))
    assert sorted(tmp_path.rglob("*")) == before
    process.kill()
    process.join()
    for reader in readers:  # they outlive it for a while, and must not keep the lock
        os.kill(reader, signal.SIGSTOP)
    assert not locked(tmp_path / "run") and not locked(tmp_path / "eval")
    for reader in readers:
        os.kill(reader, signal.SIGKILL)
    grpo_baseline.main(toy_args(grpo_baseline, **fields))
    assert (tmp_path / "run" / "checkpoint").is_dir() and (tmp_path / "run.1").is_dir()
    eval.main(args)


def test_the_lock_stays_with_the_name_when_a_run_is_moved_or_replaced(tmp_path):
    args = toy_args(grpo_baseline, out=str(tmp_path / "run"))
    run = runs.Run(args, data.BadRows())
    run.close()
    assert locked(tmp_path / "run")  # pictures are still to come
    del run
    assert not locked(tmp_path / "run")
    for changed in ({}, {"overwrite": True}):
        run = runs.Run(replace(args, **changed), data.BadRows())
        assert locked(tmp_path / "run") and not locked(tmp_path / "run.1")
        run.close()
        del run
    assert not (tmp_path / "run.2").exists()


def test_a_run_killed_after_it_took_the_lock_is_not_in_the_way(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("1 on a host\n")
    args = toy_args(grpo_baseline, out=str(tmp_path / "run"))
    runs.check_run(args)
    runs.Run(args, data.BadRows()).close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("writable", "out"), [("run", "run"), (".", "other/run")])
def test_what_out_will_be_written_to_is_writable(tmp_path, monkeypatch, writable, out):
    """A container may have the directory itself mounted in a folder that is not."""
    (tmp_path / "run").mkdir()
    args = toy_args(grpo_baseline, out=str(tmp_path / out))
    monkeypatch.setattr(os, "access", lambda path, mode: path == tmp_path / writable)
    runs.check_run(args)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / writable)
    with pytest.raises(ranks.UsageError, match=f"^--out .*: {tmp_path / writable} cannot be wr"):
        runs.check_run(args)


def test_checking_data_needs_no_lock(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    disk.write_record(tmp_path / "run", disk.TRAINING_RUN, {})
    monkeypatch.setattr(disk, "lock_directory", lambda out: pytest.fail("locked"))
    runs.check_run(toy_args(grpo_baseline, out=str(tmp_path / "run"), check_data=True))


def test_all_ranks_learn_of_a_refusal(run, cold_start, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    disk.write_record(out, disk.TRAINING_RUN, {})
    with disk.lock_directory(out):
        words = ["--model", cold_start, "--out", out]
        status, output = run("grpo_baseline", words, [], ranks=2)
    errors = {line for line in output.splitlines() if line.startswith("error: ")}
    assert status == 2 and len(errors) == 1 and "Traceback" not in output, output
    assert f"--out {out}: in use by process {os.getpid()} on" in errors.pop()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# A disk that is full or read-only


def limit_files(size: int) -> None:
    """No file of this process may grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def limits_end():
    """Before the test ends: pytest writes its result into what may be a file, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("function", "call", "size", "name", "intact"),
    [
        ("update", 1, 100, "samples.jsonl", "nothing is saved there yet"),
        ("log", 2, 3000, "metrics.jsonl", "nothing is saved there yet"),
        ("update", 2, 300_000, "state/step-000002", "nothing is saved there yet"),
        ("save_model", 1, 100_000, "checkpoint", "step-000002"),
        ("draw_attention", 1, 1000, "attention.png", "step-000002, .*/checkpoint"),
        ("draw_curves", 1, 1000, "curves.png", "step-000002, .*/checkpoint"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    drawn, cold_start, tmp_path, monkeypatch, capsys, function, call, size, name, intact
):
    owners = {"update": grpo_baseline, "log": runs.Run, "save_model": common}
    owner = owners.get(function, pictures)
    out, original, calls = tmp_path / "run", getattr(owner, function), []

    def limited(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            written = (out / "metrics.jsonl").stat().st_size
            limit_files(min(size, written) if name == "metrics.jsonl" else size)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, function, limited)
    words = rf"^--out {out}: ({name}) cannot be written \([^\n]*File too large[^\n]*{intact}$"
    with limits_end(), pytest.raises(ranks.UsageError, match=words):
        grpo_baseline.main(toy_args(grpo_baseline, **FIELDS, model=str(cold_start), out=str(out)))
    assert not list(out.rglob(disk.PART))


# What fills the disk before the third update: another program, or this run's own states.
FULL = {
    "fill": ([("grpo_baseline.update", "fill_disk", 3, 3)], {}),
    "grow": ([], {"save_every": 1, "keep": 9}),
}


@pytest.mark.parametrize("mode", FULL)
def test_a_full_disk_is_one_line(run, cold_start, tmp_path, mode):
    plants, changed = FULL[mode]
    disk, fields = tmp_path / "disk", FIELDS | {"model": cold_start} | changed
    disk.mkdir()
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in fields.items()] + ["--out", disk / "run"]
    plants = [("support.ranks.start_ranks", "mount_disk"), *plants]
    status, output = run("grpo_baseline", argv, plants, folders=[disk])
    if output == "error: no mounts here\n":
        pytest.skip("no mounts here")
    lines = [line for line in output.splitlines() if "error" in line.lower()]
    assert status == 2 and "Traceback" not in output, output
    assert len(lines) == 1 and "Exception" not in output, output
    assert "cannot be written (" in lines[0] and "No space left" in lines[0], lines
    assert (mode == "grow") == ("state/step-000003 cannot be written" in lines[0])
    assert lines[0].endswith(f"intact: {disk}/run/state/step-000002")


def test_an_evaluation_that_cannot_be_written_is_one_line(cold_start, tmp_path, capsys):
    (tmp_path / "file").touch()
    args = toy_args(eval, model=str(cold_start), examples=20, batch_size=4, max_new_tokens=3)
    for out, reason in ((tmp_path / "file" / "x", "Not a directory"), (Path("/dev/null/x"), "")):
        with pytest.raises(
            ranks.UsageError, match=rf"^--out {out}: [^\n]*written \({reason}[^\n]*$"
        ):
            eval.main(replace(args, out=str(out)))
    out = tmp_path / "out"
    whole = eval.main(replace(args, out=str(tmp_path / "whole")))
    size = (tmp_path / "whole" / "predictions.jsonl").stat().st_size
    words = r"predictions.jsonl cannot be written \(File too large\).*intact: .*predictions.jsonl$"
    with limits_end(), pytest.raises(ranks.UsageError, match=words):
        limit_files(size // 2)
        eval.main(replace(args, out=str(out)))
    assert eval.main(replace(args, out=str(out))) == whole


def test_a_failed_checkpoint_leaves_the_old_one(tmp_path):
    out = tmp_path / "run"
    run = runs.Run(toy_args(grpo_baseline, out=str(out)), data.BadRows())
    run.save_checkpoint(lambda folder: (folder / "weights").write_text("old"))

    def broken(folder):
        (folder / "weights").write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(ranks.UsageError, match=f"checkpoint cannot be .*intact: {out}/checkpoint"):
        run.save_checkpoint(broken)
    assert (out / "checkpoint" / "weights").read_text() == "old"
    assert not (out / disk.PART).exists()
    run.close()


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_process_killed_at_any_rename_leaves_a_whole_checkpoint(tmp_path, monkeypatch, call):
    """Or the next one that writes there makes it whole, and the adapter beside it is of the same
    run."""
    rename, calls = Path.rename, []

    def write(text):
        with disk.written_aside(tmp_path, "checkpoint") as folder:
            for path in (folder, folder.parent / "adapter"):
                path.mkdir(exist_ok=True)
                (path / "weights").write_text(text)

    def killed(path, target):
        calls.append(path)
        if len(calls) == call:
            raise KeyboardInterrupt
        return rename(path, target)

    write("old")
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    monkeypatch.undo()
    disk.install(tmp_path)
    found = [(tmp_path / name / "weights").read_text() for name in ("checkpoint", "adapter")]
    assert found == ["old" if call == 1 else "new"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoint"]


# States of earlier versions


def edit(path: Path, **changed) -> None:
    """Change entries of a file of JSON; None deletes one."""
    content = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({k: v for k, v in content.items() if changed.get(k, 0) is not None}))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "x: out of memory; free some, or give a smaller one"),
        (torch.OutOfMemoryError("CUDA"), "x: out of memory; free some, or give a smaller one"),
        (
            OSError(errno.ENOSPC, "No space left", "/far/x"),
            "x: No space left; free some space, or repair",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "x: Permission denied; repair"),
        (ValueError("no header.\nand more"), "x: no header; repair"),
        (KeyError("weights"), "x: KeyError: 'weights'; repair"),
        (ranks.UsageError("another line"), "another line"),
    ],
)
def test_an_error_of_a_library_is_one_line_with_its_remedy(error, line):
    with pytest.raises(ranks.UsageError) as caught, disk.loading("x", "repair"):
        raise error
    assert str(caught.value) == line


def test_a_state_with_other_definitions_is_refused(cold_start, tmp_path):
    out = tmp_path / "run"
    fields = FIELDS | {"model": str(cold_start), "out": str(out)}
    ral_grpo.main(toy_args(ral_grpo, **fields | {"steps": 2}))
    file = out / "state" / "step-000002" / "state.json"
    kept = file.read_text()
    for number in (2, 99):
        edit(file, definitions=number)
        other = "was written by a version that computes something else"
        line = rf"^--resume auto: [^\n]*step-000002 {other}; [^\n]*--allow-changed-args$"
        with pytest.raises(ranks.UsageError, match=line):
            ral_grpo.main(toy_args(ral_grpo, **fields, resume="auto"))
    edit(file, definitions=2)
    again = {"resume": "auto", "allow_changed_args": True}
    ral_grpo.main(
        toy_args(ral_grpo, **fields | again, attn_row=json.loads(kept)["args"]["attn_row"])
    )
    assert (out / "state" / "step-000004").is_dir()


def test_a_state_that_lacks_arguments_or_parts_is_one_line(cold_start, tmp_path):
    out = tmp_path / "run"
    fields = FIELDS | {"model": str(cold_start), "out": str(out), "resume": "auto"}
    ral_grpo.main(toy_args(ral_grpo, **fields | {"steps": 2}))
    file = out / "state" / "step-000002" / "state.json"
    kept = file.read_text()
    args = json.loads(kept)["args"]
    older = {k: v for k, v in args.items() if k not in ("lora_rank", "attn_row", "steps")}
    edit(file, args=older | {"an_old_one": 3})
    words = "--an-old-one 3 -> no such argument; .*--attn-row no such argument -> own"
    with pytest.raises(ranks.UsageError, match=words):
        ral_grpo.main(toy_args(ral_grpo, **fields))
    with pytest.raises(ranks.UsageError, match=r"--lambda-attn 1.0 -> no such argument; "):
        file.write_text(kept)
        grpo_baseline.main(toy_args(grpo_baseline, **fields))
    for part in ("args", "extra", "lengths", "prompts"):
        file.write_text(kept)
        edit(file, **{part: None})
        with pytest.raises(ranks.UsageError, match=r"^--resume auto: .*not readable"):
            ral_grpo.main(toy_args(ral_grpo, **fields))
    file.write_text("[]")
    with pytest.raises(ranks.UsageError, match=r"^--resume auto: .*not readable"):
        ral_grpo.main(toy_args(ral_grpo, **fields))


# Arguments


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (script, name)
        for script in (sft, grpo_baseline, ral_grpo, kd_baseline, attn_distill)
        for name in ("model", "data", "eval-data", "teacher")
        if name != "teacher" or hasattr(script.Args, "teacher")
    ],
)
def test_an_empty_name_is_not_the_default(script, name, cold_start, tmp_path, monkeypatch, capsys):
    """As of `--model "$MODEL"` where the variable is not set."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(cold_start, tmp_path / "runs" / "sft" / "checkpoint")
    shutil.copytree(cold_start, tmp_path / "runs" / "teacher" / "checkpoint")
    monkeypatch.setattr(sys, "argv", [script.__file__, f"--{name}", ""])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        cli.run_script(script.Args, script.main, script.__doc__, defaults_of(script))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --{name} '': is empty; give a value or omit it"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sft", "teacher"]


def test_an_evaluation_takes_no_empty_name():
    for fields in ({"model": ""}, {"model": "x", "data": ""}):
        with pytest.raises(ranks.UsageError, match="'': is empty"):
            toy_args(eval, **fields)


def test_a_toy_of_images_is_not_asked_about_videos(cold_start, tmp_path):
    args = toy_args(eval, model=str(cold_start), examples=2, out=str(tmp_path / "out"))
    with pytest.raises(ranks.UsageError, match=r"--frames 8 32: .* has learned images only"):
        eval.main(replace(args, frames=(8, 32)))
    with pytest.raises(ranks.UsageError, match=r"--grid \(2,\): needs 3 or more"):
        replace(args, grid=(2,))
    assert not (tmp_path / "out").exists()
    video = tmp_path / "video"
    shutil.copytree(cold_start, video)
    edit(video / "toy_task.json", frames=4)
    eval.main(replace(args, model=str(video), frames=(4, 8)))
    assert "frames 8" in (tmp_path / "out" / "table.txt").read_text()


def test_a_leftover_folder_is_not_taken_for_wandb(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    args = toy_args(grpo_baseline, out=str(tmp_path / "run"), track=True)
    with pytest.raises(ranks.UsageError, match="no attribute 'login'; `pip install wandb`"):
        runs.check_run(args)
    (tmp_path / "wandb" / "__init__.py").write_text("def login(verify): pass")
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    runs.check_run(args)


def test_what_to_run_next_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = SimpleNamespace(out=Path("runs/x"), began=0.0)
    answered, next_args = {"eval/answered": 0.5}, ral_grpo.Args(model="a b.py")
    end = (run, answered, {"eval/answered": 1.0}, 1, "ral_grpo.py", next_args)
    runs.print_summary(*end)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [x for x in lines if x.startswith("next: ")]
    assert lines[2].split() == ["answered", "0.500", "1.000"]  # said where some are missing
    script, rest = line.removeprefix("next: python ").split(" ", 1)
    assert Path(script).samefile(ROOT / "ral_grpo.py") and rest == "--model 'a b.py'"
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "support" / "runs.py"))
    runs.print_summary(*end)
    assert "next" not in capsys.readouterr().out


def test_a_text_that_cannot_take_its_place_leaves_nothing(tmp_path):
    (tmp_path / "args.json" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        disk.write_aside(tmp_path / "args.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["args.json"]


# Rewards that teach nothing


def test_equal_rewards_are_said_once(tmp_path, capsys):
    metrics = {"rollout/accuracy": 0.0}
    run = runs.Run(toy_args(grpo_baseline, out=str(tmp_path / "run")), data.BadRows())
    run.log(0, {"eval/accuracy": 0.5})
    for step in range(1, 40):
        run.log(step, metrics | {"rollout/frac_zero_std": 0.99 if step in (9, 30) else 1.0})
        assert ("note: " in capsys.readouterr().out) == (step == 19)
    run.close()
    run = runs.Run(toy_args(grpo_baseline, out=str(tmp_path / "run")), data.BadRows())
    for step in range(5, 15):
        run.log(step, metrics | {"rollout/frac_zero_std": 1.0})
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
    assert "steps 5 to 14: all responses to a prompt got the same reward" in line
    assert line.endswith(runs.WHY_EQUAL)
    run.close()


def test_distillation_without_a_reward_says_nothing_of_it(tmp_path, capsys):
    equal = {"rollout/frac_zero_std": 1.0, "rollout/format": 0.0, "rollout/accuracy": 0.0}
    for rl_coef in (0.0, 0.5):
        args = toy_args(kd_baseline, out=str(tmp_path / "run"), rl_coef=rl_coef)
        run = runs.Run(args, data.BadRows())
        for step in range(1, 12):
            metrics = equal | {"rollout/truncated_frac": 0.0}
            run.log(step, metrics, learns_from_reward=rl_coef > 0)
        run.close()
        assert ("note: " in capsys.readouterr().out) == (rl_coef > 0)


def test_a_main_called_from_python_joins_the_ranks(cold_start, monkeypatch):
    """On a GPU, one process is a group too: else the trained weights compute in float32 and the
    reference in bfloat16."""
    joined = []
    monkeypatch.setattr(common, "start_ranks", lambda: joined.append(True))
    load(cold_start)
    assert joined == [True]
    with pytest.raises(ranks.UsageError, match="there is no checkpoint"):
        ral_grpo.main(ral_grpo.Args())
    assert joined == [True, True]
