"""Every end of a process, wanted or not, comes within seconds and ends its readers too."""

import re
import shutil
import signal
from pathlib import Path

import pytest

LOOP = "support.runs.Stopwatch.lap"  # what every training loop calls, with readers at work
STOPPED = "\nstopped by Ctrl-C; what was saved before is intact\n"


def argv(real: Path, folder: Path, script: str, workers: int = 2) -> list:
    """The command line of two steps on real data."""
    words = [
        "--model",
        real / "qwen2_vl",
        "--data",
        real / "rows.json",
        "--media-root",
        real / "media",
    ]
    words += ["--out", folder / "run", "--workers", workers, "--max-skipped", 0.3, "--frames", 4]
    words += ["--image-tokens", 9, "--frame-tokens", 4, "--max-new-tokens", 4]
    if script != "eval":
        words += ["--steps", 2, "--prompts-per-step", 2, "--eval-examples", 2, "--save-every", 0]
        words += [] if script == "sft" else ["--group-size", 2]
    if script in ("kd_baseline", "attn_distill"):
        words += ["--teacher", real / "qwen2_vl"]
    return [str(word) for word in words]


@pytest.mark.parametrize("script", ["sft", "attn_distill"])  # ral_grpo: with two ranks, below
def test_a_finished_run_ends(run, real, tmp_path, script):
    """Whatever keeps its variables alive, as here the frame of `main`. A signal to all processes of
    a job does not end the readers that are just starting."""
    words = [*argv(real, tmp_path, script), "--steps", "1"]
    plants = [(LOOP, "keep"), ("support.data.guard_reader", "terminate")]
    status, output = run(script, words, plants)
    assert status == 0 and "\nnext: python" in output, output[-3000:]


def test_a_finished_run_ends_though_a_reader_hangs(run, real, tmp_path):
    words = argv(real, tmp_path, "ral_grpo", workers=1)
    status, output = run("ral_grpo", words, [("support.data.Prompts.__getitem__", "hang")])
    assert status == 0 and "\nnext: python" in output, output[-3000:]


# What reads with readers at work: script, more of its command line, what it calls then.
AT_WORK = {
    "training": ("ral_grpo", [], LOOP),
    "evaluation": ("eval", [], "eval.collate"),
    "checking": ("sft", ["--check-data"], "support.data.read_number"),
}


@pytest.mark.parametrize("work", AT_WORK)
def test_an_error_ends_the_process(run, real, tmp_path, work):
    script, more, place = AT_WORK[work]
    status, output = run(script, argv(real, tmp_path, script) + more, [(place, "fail")])
    assert status == 1 and "\nRuntimeError: planted\n" in output
    assert "readers: 2" in output


def test_a_reader_that_hangs_is_one_line(run, real, tmp_path):
    plants = [("common.load_model", "hurry"), ("support.data.Prompts.__getitem__", "hang")]
    words = [*argv(real, tmp_path, "ral_grpo"), "--steps", "3"]
    status, output = run("ral_grpo", words, plants)
    assert status == 2 and "Traceback" not in output
    assert re.search(
        r"^error: rows.json row \d+, or .*: not read within 3 seconds; remove", output, re.M
    )


def test_a_thread_left_behind_does_not_keep_a_failed_process(run, real, tmp_path):
    """Nor does it abort, as the threads that read Parquet did."""
    status, output = run("sft", argv(real, tmp_path, "sft"), [("common.load_model", "strand")])
    assert status == 2 and output.endswith("error: planted\n")


@pytest.mark.parametrize("work", AT_WORK)
def test_a_killed_reader_is_one_line(run, real, tmp_path, work):
    script, more, place = AT_WORK[work]
    status, output = run(script, argv(real, tmp_path, script) + more, [(place, "kill")])
    assert status == 2 and "Traceback" not in output, output[-3000:]
    assert "error: --workers: a reader process has ended" in output.splitlines()[-1]


LOST = {
    "fill_output": (1, "(No space left on device); the files are complete\n"),
    "close_output": (141, ""),
}


@pytest.mark.parametrize("how", LOST)
def test_work_whose_output_is_lost_is_complete(run, real, tmp_path, how):
    status, words = LOST[how]
    plants = [("eval.collate", how)]
    ended, output = run("eval", argv(real, tmp_path, "eval"), plants)
    assert ended == status and "Traceback" not in output and output.endswith(words)
    assert "held-out" not in output and (tmp_path / "run" / "table.txt").exists()


# A signal to the process alone reaches it alike at any work.
@pytest.mark.parametrize(
    ("work", "sign"), [("training", 1), *((work, -1) for work in AT_WORK)], ids=str
)
def test_ctrl_c_ends_the_process_with_one_line(run, real, tmp_path, work, sign):
    """In training it is the second one."""
    script, more, place = AT_WORK[work]
    signals = (sign * signal.SIGINT,) * (2 if work == "training" else 1)
    status, output = run(script, argv(real, tmp_path, script) + more, [(place, "wait")], signals)
    assert status == 130 and "Traceback" not in output
    assert STOPPED in output
    assert output.count("readers: 2") == len(signals)


def test_ctrl_c_while_loading_is_one_line(run, real, tmp_path):
    plants = [("common.load_model", "wait")]
    status, output = run("ral_grpo", argv(real, tmp_path, "ral_grpo"), plants, (signal.SIGINT,))
    assert status == 130 and "Traceback" not in output
    assert STOPPED in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_to_all_processes_finishes_the_step(run, real, tmp_path, number):
    plants = [(LOOP, "wait", 1, 1)]
    status, output = run("ral_grpo", argv(real, tmp_path, "ral_grpo"), plants, (-number,))
    assert status == 128 + number and "Traceback" not in output
    assert "stopped after step 1; resume with: python" in output
    assert "readers: 2" in output


KILLED = [(work, signal.SIGKILL) for work in AT_WORK]
KILLED += [("training", signal.SIGTERM)]  # the others leave this signal to the system, too


@pytest.mark.parametrize(("work", "number"), KILLED)
def test_readers_end_with_a_process_that_is_killed(run, real, tmp_path, work, number):
    """In the evaluation they have more to send than a pipe holds, and nobody takes it."""
    script, more, place = AT_WORK[work]
    words = argv(real, tmp_path, script) + more
    words += ["--gaze", "20"] if script == "eval" else []
    plants = [(place, "wait"), ("support.data.Prompts.__getitem__", "hang")]
    signals = (number,) * (2 if number == signal.SIGTERM else 1)
    status, output = run(script, words, plants, signals)
    assert status == -number and "readers: 2" in output and "Traceback" not in output


RANKS = {  # what is planted, exit status, what must be in the output
    "end": ([(LOOP, "keep")], 0, "\nnext: python"),
    "error": ([(LOOP, "fail")], 1, "RuntimeError: planted"),
    "Ctrl-C": ([("common.load_model", "wait")], 130, STOPPED),
    "signal": ([(LOOP, "terminate", 1, 1)], 143, "\nstopped after step 1; resume with: torchrun"),
}


@pytest.mark.parametrize("how", RANKS)
def test_two_ranks_end_with_their_readers(run, real, tmp_path, how):
    plants, status, words = RANKS[how]
    signals = (-signal.SIGINT,) if how == "Ctrl-C" else ()
    ended, output = run("ral_grpo", argv(real, tmp_path, "ral_grpo"), plants, signals, ranks=2)
    assert ended == status and words in output, output[-3000:]
    assert ("Traceback" in output) == (how == "error")


def test_two_ranks_are_told_of_a_broken_checkpoint(run, real, tmp_path):
    """One of them reads it."""
    broken = tmp_path / "broken"
    shutil.copytree(real / "qwen2_vl", broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    words = [*argv(real, tmp_path, "ral_grpo"), "--model", str(broken)]
    status, output = run("ral_grpo", words, [], ranks=2)
    assert status == 2 and "Traceback" not in output
    assert f"error: --model {broken}: " in output


def test_two_ranks_are_told_of_a_full_disk(run, real, tmp_path):
    """One of them writes the state; the other takes part in gathering the rest of it."""
    words = [*argv(real, tmp_path, "ral_grpo"), "--save-every", "1"]
    status, output = run("ral_grpo", words, [("support.states.save_file", "full")], ranks=2)
    assert status == 2 and "Traceback" not in output, output[-3000:]
    full = "state/step-000001 cannot be written (No space left on device)"
    assert output.count(full) == 2, output[-3000:]
    assert not list((tmp_path / "run" / "state").iterdir())
