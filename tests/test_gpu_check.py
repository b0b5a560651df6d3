"""The check of a new GPU runs on a CPU in tiny sizes, and finds nothing wrong."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

CHECK = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


@pytest.fixture
def check(monkeypatch):
    """Runs the file as its command line does, in this process; returns what it exits with."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # it adds to it

    def check(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(CHECK), *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(CHECK), run_name="__main__")
        return ended.value.code

    yield check
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


PARTS = ["env", "numerics", "real2b"]  # other tests run the toy and resume; 7B is the code of 2B


def test_the_check_of_a_gpu_rehearses_on_a_cpu(check, tmp_path):
    status = check("--rehearse", "--out", str(tmp_path), "--parts", *PARTS)
    table = (tmp_path / "gpu.md").read_text()
    assert status == 0, table
    assert table.startswith("# GPU check: 0 failed")
    found = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    judged = [line["part"] for line in found if line["ok"]]
    assert list(dict.fromkeys(judged)) == PARTS and len(judged) >= 15


def test_without_a_gpu_the_check_says_so(check, capsys):
    assert check() == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: no GPU") and "--rehearse" in said
