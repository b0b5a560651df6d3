"""Run scripts' `main`: in this process, or in each that torchrun started with this file."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import runs
import toy


def by_length(group_size: int, idle: bool):
    """A reward that random weights earn. If `idle`, prompts of odd number earn nothing: all that
    the second of two ranks has."""
    calls = 0

    def accuracy(text: str, *_) -> float:
        nonlocal calls
        number = calls // group_size * runs.world_size() + runs.rank()
        calls += 1
        return 0.0 if idle and number % 2 else float(len(text) % 2)

    return accuracy


def run_all(jobs: list[tuple[str, dict, bool]], out: Path, names=("0123456789")) -> None:
    """Run each job (script, fields of its Args, idle) in a directory of its own under `out`."""
    for number, (name, fields, idle) in zip(names, jobs, strict=False):
        script = importlib.import_module(name)
        kept = common.accuracy
        if "group_size" in fields:
            common.accuracy = by_length(fields["group_size"], idle)
        model = fields.get("model")
        is_toy = model is None or toy.Task.load(Path(model)) is not None
        defaults = script.TOY if is_toy else {}
        script.main(script.Args(**defaults | fields, out=str(out / number)))
        common.accuracy = kept


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    runs.start_ranks()
    if runs.rank() != 0:  # one process reads the checkpoint for all
        import common

        common.AutoModelForImageTextToText.from_pretrained = None
    run_all(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        runs.leave_ranks()
