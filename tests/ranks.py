"""Run scripts' `main`: in this process, or in two ranks."""

import importlib
import json
from pathlib import Path

import torch
import transformers
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import common
from support import ranks, toy


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


FOLDERS = (*"0123456", "e")


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


def run_rank(jobs: str, out: str) -> None:
    """The jobs of a file as one of several ranks."""
    ranks.start_ranks()
    if ranks.rank() != 0:  # one process reads the checkpoint for all
        transformers.AutoModelForImageTextToText.from_pretrained = None
    run_all(json.loads(Path(jobs).read_text()), Path(out))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_two(jobs: str, out: str) -> None:
    """As torchrun does, but in forks of this process: that saves their imports of PyTorch."""
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
    launch = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="two", **options)
    elastic_launch(launch, run_rank)(jobs, out)
