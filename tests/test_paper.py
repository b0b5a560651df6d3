"""Every command of docs/paper.md that trains or evaluates runs, in order, each on what the ones
before it wrote: on small checkpoints in place of the released ones, and with smaller numbers."""

import importlib
import json
import re
import subprocess
import sys
from itertools import combinations, cycle
from pathlib import Path

import pytest
import torch
from launch import defaults_of
from real import write_checkpoint, write_rows
from safetensors.torch import load_file
from shared import same
from standins import STANDINS, write_standin

import common
from support import benchmarks, cli
from support.benchmarks import BENCHMARKS, GROUPS

PAGE = Path(__file__).parents[1] / "docs" / "paper.md"
STUDENT, TEACHER = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-32B-Instruct"
# What is appended to a command line: of two equal flags, the later one counts.
SMALL = "--max-new-tokens 4 --workers 0 --image-tokens 9 --min-image-tokens 1 --frame-tokens 4"
TRAIN = f"{SMALL} --steps 1 --prompts-per-step 2 --eval-examples 1 --save-every 0"
RL = f"{TRAIN} --rows 10 --group-size 2"
APPENDED = {"eval": f"{SMALL} --batch-size 16", "sft": TRAIN}


def commands() -> list[list[str]]:
    """Each Python script on the page with its arguments, as a shell expands them: bash runs the
    page with a `python` and a `torchrun` that print what they are given, and no other program."""
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
    stubs = r"""
        command_not_found_handle() { :; }
        python() { printf '%s\0' "$@" $'\n'; }
        torchrun() { while [[ $1 == --* ]]; do shift; done; python "$@"; }
    """
    bash = ["/bin/bash", "-euc", stubs + blocks]
    printed = subprocess.check_output(bash, env={"PATH": "/none"}, text=True)
    return [line.split("\0")[:-1] for line in printed.split("\n\0")[:-1]]


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """The working directory gets what the page downloads: checkpoints, rows and their media."""
    monkeypatch.chdir(tmp_path)
    for name, layers in ((STUDENT, 2), (TEACHER, 3)):
        Path(name).mkdir(parents=True)
        write_checkpoint(Path(name), "qwen2_5_vl", layers=layers)
    folder = Path("Video-R1-data")
    folder.mkdir()
    rows = [row for row in write_rows(folder) if row["problem_id"] not in (14, 19)]  # broken
    for name in ("Video-R1-260k", "Video-R1-COT-165k"):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    for name, entry in BENCHMARKS.items():
        place = Path("hub" if name in GROUPS["images"] else "downloads", entry.folder)
        write_standin(name, place, folder / "video3.mp4")
    here = str(Path("hub").resolve())  # in place of the hub, which no test reaches
    place_of = benchmarks.place_of
    monkeypatch.setattr(
        benchmarks,
        "place_of",
        lambda name, root: place_of(name, root if name in GROUPS["videos"] else here),
    )


@pytest.mark.usefixtures("downloads")
def test_the_page_runs(monkeypatch):
    rewards = cycle((0.0, 1.0))  # random weights answer nothing
    monkeypatch.setattr(common, "accuracy", lambda *_: next(rewards))
    for script, *argv in commands():
        name = Path(script).stem
        assert name == "eval" or {"--save-every", "--check-data"} & {*argv}  # a state has 85 GB
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [script, *argv, *APPENDED.get(name, RL).split()])
        cli.run_script(module.Args, module.main, module.__doc__, defaults_of(module))

    weights = {}
    for path in Path("runs").glob("*/checkpoint"):
        args = json.loads((path.parent / "args.json").read_text())
        before = load_file(Path(args["model"]) / "model.safetensors")
        after = weights[path.parent.name] = load_file(path / "model.safetensors")
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed and not any("visual" in key for key in changed), path
        asked = json.loads((path / "prompt.json").read_text())
        assert asked["think"] is ("zero" not in path.parent.name)
        assert args["learning_rate"] == (5e-6 if "epochs" in args else 1e-5)
    assert len(weights) == 11
    assert not [pair for pair in combinations(weights, 2) if same(*map(weights.get, pair))]
    rows = sum(len(expected) for _, expected in STANDINS.values())
    for run in ("base", *weights):
        lines = Path("runs/eval", run, "predictions.jsonl").read_text().splitlines()
        assert len(lines) == rows
    table = Path("runs/tables/table.md").read_text()
    assert all(
        f"| runs/eval/{run} | MME, points of 2,800 | " in table for run in ("base", "grpo", "ral-1")
    )
    assert len(list(Path("runs").glob("figure-3-*/table.md"))) == 2
