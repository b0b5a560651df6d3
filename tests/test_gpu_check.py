"""The check of a new GPU runs on a CPU in tiny sizes, and finds nothing wrong."""

import json
import subprocess
import sys
from pathlib import Path

CHECK = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"


def check(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(CHECK), *words]
    return subprocess.run(command, capture_output=True, text=True)


PARTS = ["env", "numerics", "real2b"]  # other tests run the toy and resume; 7B is the code of 2B


def test_the_check_of_a_gpu_rehearses_on_a_cpu(tmp_path):
    done = check("--rehearse", "--out", str(tmp_path), "--parts", *PARTS)
    table = (tmp_path / "gpu.md").read_text()
    assert done.returncode == 0, table + done.stderr
    assert table.startswith("# GPU check: 0 failed")
    found = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    judged = [line["part"] for line in found if line["ok"]]
    assert list(dict.fromkeys(judged)) == PARTS and len(judged) > 20


def test_without_a_gpu_the_check_says_so():
    done = check()
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--rehearse" in done.stderr
