"""States to resume a run from, and the fingerprints of what a run reads."""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from support import disk, ranks
from support.cli import RunArgs, each, option
from support.ranks import require

DEFINITIONS = 5  # raise it when the same arguments compute something else

# 1. Fingerprints of inputs

BLOCKS = 2**10  # of a fingerprint, for all files of one argument


def fingerprint_inputs(args: Any) -> dict[str, str]:
    """The fingerprint of every file of `--model`, `--teacher`, `--data` and `--eval-data`, by
    argument and path (for a hub name, the commit), and of the training script that declares the
    arguments.

    At most 256 MB are read for one argument, but always both ends of each file. So a changed label
    in a JSON file is noticed up to that size, and a changed Parquet footer at any size.
    """
    prints, script = {}, getattr(sys.modules.get(type(args).__module__), "__file__", None)
    if script and isinstance(args, RunArgs):
        prints[f"the script {Path(script).name}"] = script_fingerprint(script)
    names = ("model", "teacher", "data", "eval_data")
    for name, path in ((x, path) for x in names for path in each(getattr(args, x, None) or ())):
        if name.endswith("data"):
            kind, files = "dataset", disk.data_files(path)
        else:
            patterns = ("*.json", "*.txt", "*.jinja", "*.safetensors")
            kind, files = "model", sorted(x for p in patterns for x in Path(path).glob(p))
        if not files:
            folder = f"{kind}s--{path.partition(':')[0].replace('/', '--')}"
            commit = Path(HF_HUB_CACHE, folder, "refs", "main")
            prints[f"{option(name)} {path}"] = commit.read_text() if commit.is_file() else "none"
        for file in files:
            label = f"{option(name)} {file}"
            with disk.loading(label, "make it readable"):
                prints[label] = disk.fingerprint(file, max(2, BLOCKS // len(files)))
    return prints


@cache
def script_fingerprint(path: str) -> str:
    """The fingerprint of a file when it was first asked for, soon after it was imported."""
    return disk.fingerprint(Path(path), BLOCKS)


# 2. Choosing a state


@dataclass
class State:
    """The content of a state's `state.json`: the number of steps done, and whether the run ended
    there; the length of each file of the run; the prompts per step and the rows read, by all ranks
    together; what else the script saved; arguments and fingerprints of the inputs; the state of
    torch's random numbers on the CPU, which a fork may draw; the id of the run at Weights & Biases.
    """

    step: int
    done: bool
    lengths: dict[str, int]
    prompts: int
    read: int
    extra: dict[str, Any]
    args: dict[str, Any]
    inputs: dict[str, str]
    random: list[int]
    wandb: str | None = None
    definitions: int = DEFINITIONS

    @property
    def name(self) -> str:
        """The name of its directory in `state/`."""
        return f"step-{self.step:06}"


def readable(named: str, path: Path) -> AbstractContextManager:
    """Turn an exception raised while reading a state into a one-line `UsageError`."""
    return disk.loading(f"{named}: {path} is not readable", "give an earlier one")


def own_file(path: Path) -> Path:
    """`path`, if it is a plain file: a state has no links, which might lead anywhere."""
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path.name} is missing or a link")
    return path


def read_state(args: Any) -> State | None:
    """The state that `--resume` names or, with `auto`, the newest of the run; None if there is
    none. Only rank 0's disk holds a run, so rank 0 chooses and reads for all. Refuses a state that
    is not of this run, is unreadable, or was written by a version that computes something else."""

    def read() -> State | None:
        saved = disk.good_states(Path(args.out))
        if args.resume == "auto" and not saved:
            if disk.read_record(Path(args.out)):
                begins = f"the run at {args.out} has no state, so it begins again"
                ranks.print_once(f"--resume auto: {begins}")
            return None
        path = saved[-1] if args.resume == "auto" else Path(args.resume)
        named = f"--resume {args.resume}"
        known = path.resolve() in [p.resolve() for p in saved]
        choices = f"is not a saved state of --out {args.out}; give one of its state/step-*, or auto"
        require(known, f"{named}: {choices}")
        other = f"{path} was written by a version that computes something else"
        remedy = "finish the run with that version, or train again; if your script and flags do not"
        remedy += " depend on the difference, pass --allow-changed-args"
        with readable(named, path):
            content = json.loads(own_file(path / "state.json").read_bytes())
            same = content["definitions"] == DEFINITIONS or args.allow_changed_args
            require(same, f"{named}: {other}; {remedy}")
            if type(content["random"]) is dict:  # of an earlier version, with other generators
                content["random"] = content["random"]["torch"]
            state = State(**content)
            counts = (state.step, state.read, *state.lengths.values())
            intact = all(type(n) is int and n >= 0 for n in counts)
            tables = (state.extra, state.args, state.inputs)
            intact = intact and all(type(x) is dict for x in tables)
            if not intact or disk.step_of(path) != state.step:
                raise ValueError("state.json is damaged")
        return state

    return None if args.resume is None else ranks.from_rank_0(read)


def find_state(args: Any) -> State | None:
    """The state to resume from, see `read_state`. Refuses one that was made with other arguments or
    input files, and input files that differ between ranks; raises `Ended` if no step is left."""
    inputs = fingerprint_inputs(args)
    ranks.require_same_on_ranks(inputs)
    state, named = read_state(args), f"--resume {args.resume}"
    if state is None:
        return None
    of_all, step = "prompts_per_step times processes", args.prompts_per_step * ranks.world_size()
    before = state.args | {of_all: state.prompts}
    now = json.loads(json.dumps(asdict(args))) | {of_all: step}
    differ = []
    for name in before | now:
        old, new = (values.get(name, "no such argument") for values in (before, now))
        if old != new and name not in args.may_change():
            differ.append(f"{option(name)} {old} -> {new}")
    changed = [x for x in inputs | state.inputs if inputs.get(x) != state.inputs.get(x)]
    differ += [f"other content: {', '.join(changed[:3])}"] if changed else []
    other = f"the state was made with other arguments or inputs ({'; '.join(differ)})"
    remedy = "use the original ones, or pass --allow-changed-args"
    require(args.allow_changed_args or not differ, f"{named}: {other}; {remedy}")
    stopped = state.done and not differ and before.get("steps") == args.steps  # as SFT may
    if stopped or state.step >= args.steps:
        over = f"the run at {args.out} has finished (step {state.step})"
        again = "--resume one of its earlier states makes it again"
        kept = ranks.from_rank_0(Path(args.out, "checkpoint").is_dir)
        require(kept, f"{named}: {over}, but its checkpoint is gone; {again}")
        raise ranks.Ended(over)
    return state


# 3. Writing and loading


def state_tensors(model: Module, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name of each trained parameter, and its weight and optimizer state as full tensors.
    Gathering them needs all ranks, so each must read to the end."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors = {"weight": parameter.detach(), **optimizer.state[parameter]}
            yield name, {key: ranks.full_tensor(x).contiguous() for key, x in tensors.items()}


def write_state(
    out: Path, state: State, tensors: Iterable[tuple[str, dict[str, Tensor]]], keep: int
) -> None:
    """Write a state, and then delete all but the newest `keep` states, and those that
    `Run.move_later_states` has renamed. Each trained parameter has its own file, so that rank 0
    holds only one at a time."""
    with disk.written_aside(out, f"state/{state.name}") as folder:
        for name, content in tensors:
            save_file(content, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps(asdict(state)))
    for old in (*disk.good_states(out)[:-keep], *(out / "state").glob("step-*.later")):
        shutil.rmtree(old)


def load_state(named: str, out: Path, state: State, model: Module, optimizer: Optimizer) -> None:
    """Load weights, moments and random numbers from a state. Rank 0 reads one parameter
    at a time and sends the other ranks their shards. `named` begins an error message."""
    path = out / "state" / state.name

    def read(name: str, shape: torch.Size) -> dict[str, Tensor]:
        with readable(named, path):
            tensors = load_file(own_file(path / f"{name}.safetensors"))
            moments = [x for x in tensors.values() if x.ndim]
            if any(x.shape != shape for x in (tensors["weight"], *moments)):
                raise ValueError(f"{name} has another size")
            return tensors

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors = ranks.on_rank_0(partial(read, name, parameter.shape)) or {}
            # The other ranks learn shapes and dtypes here, and get the numbers in `shard_like`.
            facts = {key: x.to("meta") if x.ndim else x for key, x in tensors.items()}
            sent = ranks.gather([facts])[0]
            empty = {key: torch.empty_like(x, device="cpu") for key, x in sent.items() if x.ndim}
            tensors = tensors or sent | empty
            with torch.no_grad():
                parameter.copy_(ranks.shard_like(tensors.pop("weight"), parameter))
            # A fused optimizer counts its steps on the parameter's device.
            device = parameter.device if optimizer.defaults.get("fused") else "cpu"
            optimizer.state[parameter] = {
                key: ranks.shard_like(value, parameter) if value.ndim else value.to(device)
                for key, value in tensors.items()
            }
    with readable(named, path):
        torch.set_rng_state(torch.tensor(state.random, dtype=torch.uint8))
