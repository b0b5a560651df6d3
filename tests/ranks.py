"""Run scripts' `main`: in this process, or in each that torchrun started with this file."""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch import undraw

import common
from support import checkpoints, ranks, toy


def by_length(group_size: int, idle: bool):
    """A reward that random weights earn. If `idle`, prompts of odd number earn nothing: all that
    the second of two ranks has."""
    calls = 0

    def accuracy(text: str, *_) -> float:
        nonlocal calls
        number = calls // group_size * ranks.world_size() + ranks.rank()
        calls += 1
        return 0.0 if idle and number % 2 else float(len(text) % 2)

    return accuracy


def uneven(generate):
    """A rollout in which the responses to prompts of odd number, all that the second of two ranks
    has, end at their first token, so that the ranks decode for different numbers of tokens."""
    pick = common.pick_tokens

    def generate_group(model, batch, group_size, *rest, **options):
        eos = torch.as_tensor(model.generation_config.eos_token_id).flatten()[0]

        def pick_tokens(*inputs):
            ids = pick(*inputs)
            numbers = torch.arange(len(ids)) // group_size * ranks.world_size() + ranks.rank()
            return torch.where(numbers % 2 == 1, eos, ids)

        common.pick_tokens = pick_tokens
        rollout = generate(model, batch, group_size, *rest, **options)
        common.pick_tokens = pick
        return rollout

    return generate_group


FOLDERS = (*"0123456789", "10", "e")


def run_all(jobs: list[tuple[str, dict, str]], out: Path, names=FOLDERS) -> None:
    """Run each job (script, fields of its Args, "", "idle" or "uneven") in a directory of its own
    under `out`."""
    for number, (name, fields, what) in zip(names, jobs, strict=False):
        script = importlib.import_module(name)
        kept = common.accuracy, common.generate_group
        if "group_size" in fields:
            common.accuracy = by_length(fields["group_size"], what == "idle")
        if what == "uneven":
            common.generate_group = uneven(common.generate_group)
        model = fields.get("model")
        is_toy = model is None or toy.Task.load(Path(model)) is not None
        defaults = script.TOY if is_toy else {}
        script.main(script.Args(**defaults | fields, out=str(out / number)))
        common.accuracy, common.generate_group = kept


if __name__ == "__main__":
    torch.set_num_threads(1)
    undraw()
    ranks.start_ranks()
    if ranks.rank() != 0:  # one process reads the checkpoint for all
        checkpoints.AutoModelForImageTextToText.from_pretrained = None
    run_all(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    if torch.distributed.is_initialized():
        ranks.leave_ranks()
