"""States to resume a run from, and the fingerprints of what a run reads."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from support.cli import each, option, options
from support.disk import data_files, flush, good_states, step_of, writing
from support.ranks import (
    Finished,
    UsageError,
    from_rank_0,
    full_tensor,
    gather,
    on_rank_0,
    require,
    require_same_on_ranks,
    shard_like,
    world_size,
)

DEFINITIONS = 4  # raise it, with an entry below, when the same arguments compute something else
CHANGES = {  # by the number that introduced them
    2: "the default attention row of a token is its own (was: the one that predicts it),"
    " attn_distill.py's attention loss is a sum over the response (was: a mean), accuracy by"
    " problem type accepts more notations, and videos have other frames and a minimum size",
    3: "a video without --frames gives one frame a second, or --fps, and at most 128",
    4: "answers to rows without a problem type are right if a reader would call them equal (was: if"
    " they are identical)",
}


@dataclass
class State:
    """A state to resume from: its path, the number of steps done, the length of each file, the
    number of rows read, what else the script saved, and the id of the run at Weights & Biases."""

    path: Path
    step: int
    lengths: dict[str, int]
    read: int
    extra: dict[str, Any]
    wandb: str | None = None


# What the content of a damaged state raises; the files are as untrusted as any other.
BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
BROKEN += (ArithmeticError, SafetensorError)


@contextmanager
def readable(named: str, path: Path) -> Iterator[None]:
    """Turn an exception raised while reading a state into a one-line `UsageError`."""
    try:
        yield
    except BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        reason = f"lacks {reason}" if isinstance(error, KeyError) else reason
        remedy = "give an earlier one"
        raise UsageError(f"{named}: {path} is not readable ({reason}); {remedy}") from None


def own_file(path: Path) -> Path:
    """`path`, if it is a plain file: a state has no links, which might lead anywhere."""
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path.name} is missing or a link")
    return path


def read_state(args: Any) -> dict[str, Any] | None:
    """Read `state.json` of the state that `--resume` names, and add its path and whether the run
    has a checkpoint; None if there is no state to resume. Only rank 0's disk holds a run, so rank 0
    chooses and reads for all.

    Raises:
        UsageError: the state is not one of this run, is unreadable, or was written by a version
            that computes something else.
    """
    return None if args.resume is None else from_rank_0(partial(choose_state, args))


def choose_state(args: Any) -> dict[str, Any] | None:
    """Do what `read_state` says, on this rank's disk."""
    saved = good_states(Path(args.out))
    if args.resume == "auto" and not saved:
        return None
    path = saved[-1] if args.resume == "auto" else Path(args.resume)
    named = f"--resume {args.resume}"
    known = path.resolve() in [p.resolve() for p in saved]
    choices = f"is not a state of --out {args.out}; give one of its state/step-*, or auto"
    require(known, f"{named}: {choices}")
    with readable(named, path):
        state = json.loads(own_file(path / "state.json").read_bytes()) | {"path": path}
        state["checkpoint"] = Path(args.out, "checkpoint").is_dir()
        lengths = [state["step"], state["read"], *state["lengths"].values()]
        counts = all(type(n) is int and n >= 0 for n in lengths)
        if step_of(path) != state["step"] or not counts or type(state["extra"]) is not dict:
            raise ValueError("state.json is damaged")
        by = state.get("definitions", 1)
        changes = [CHANGES[n] for n in range(by + 1, DEFINITIONS + 1)]
        changes = changes or ["it is of a later version"]
        remedy = "finish the run with the version that wrote it, or train again; if your script and"
        remedy += " flags do not depend on this, --allow-changed-args resumes it"
        same = by == DEFINITIONS or args.allow_changed_args
        other = "was written by a version that computes something else"
        require(same, f"{named}: {path} {other}: {'; '.join(changes)}; {remedy}")
        # Arguments added since then count as None.
        return state | {"args": dict.fromkeys(asdict(args)) | state["args"]}


def find_state(args: Any) -> State | None:
    """The state that `--resume` names or, with `auto`, the newest good one of the run; None if
    there is none. Arguments and input files must be the same on all ranks.

    Raises:
        Finished: no steps are left.
        UsageError: there is no such state, or it was made with other arguments or input files.
    """
    inputs = fingerprint_inputs(args)
    require_same_on_ranks(inputs)
    require_same_on_ranks(options(args))
    state, named = read_state(args), f"--resume {args.resume}"
    if state is None:
        return None
    with readable(named, state["path"]):  # it may lack a key
        before, now = state["args"], json.loads(json.dumps(asdict(args)))
        differ = [f"{k} {before[k]} -> {now[k]}" for k in now if now[k] != before[k]]
        gone = {k: value for k, value in before.items() if k not in now and value is not None}
        differ += [f"{k} {value} -> no such argument" for k, value in gone.items()]
        differ = [words for words in differ if words.split()[0] not in args.may_change()]
        prompts = args.prompts_per_step * world_size()
        if state["prompts"] != prompts:
            differ.append(f"prompts_per_step times processes {state['prompts']} -> {prompts}")
        known = state.get("inputs", inputs)
        changed = [x for x in {**known, **inputs} if known.get(x) != inputs.get(x)]
        differ += [f"other content: {', '.join(changed[:3])}"] if changed else []
        remedy = "give them as they were, or --allow-changed-args"
        same = args.allow_changed_args or not differ
        require(same, f"{named}: was made with other arguments ({'; '.join(differ)}); {remedy}")
        stopped = state["done"] and not differ and before["steps"] == args.steps  # as SFT may
        if stopped or state["step"] >= args.steps:
            over = f"the run at {args.out} has finished (step {state['step']})"
            again = "--resume one of its earlier states makes it again"
            require(state["checkpoint"], f"{named}: {over}, but its checkpoint is gone; {again}")
            raise Finished(over)
        names = ("path", "step", "lengths", "read", "extra")
        return State(*(state[name] for name in names), state.get("wandb"))


BLOCK, BLOCKS = 2**18, 2**10  # bytes in a block, and blocks that are read for one argument


def fingerprint(path: Path, blocks: int) -> str:
    """A hash of a file's size and content. Of a file with more than `blocks` blocks of 256 KB, only
    so many are read, evenly spaced from its first byte to its last."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for place in np.linspace(0, max(0, size - BLOCK), min(blocks, size // BLOCK + 1)):
            file.seek(int(place))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def fingerprint_inputs(args: Any) -> dict[str, str]:
    """The fingerprint of every file of `--model`, `--teacher`, `--data` and `--eval-data`, by
    argument and name; for a hub name, the commit.

    At most 256 MB are read for one argument, but always both ends of each file. So a changed label
    in a JSON file is noticed up to that size, and a changed Parquet footer at any size.
    """
    prints = {}
    names = ("model", "teacher", "data", "eval_data")
    for name, path in ((x, path) for x in names for path in each(getattr(args, x, None) or ())):
        label, of_data = option(name), name.endswith("data")
        label += f" {path}" if len(each(getattr(args, name))) > 1 else ""
        if of_data:
            files = data_files(path)
        else:
            kinds = ("*.json", "*.txt", "*.jinja", "*.safetensors")
            files = sorted(file for kind in kinds for file in Path(path).glob(kind))
        if not files:
            kind = "dataset" if of_data else "model"
            folder = f"{kind}s--{path.partition(':')[0].replace('/', '--')}"
            commit = Path(HF_HUB_CACHE, folder, "refs", "main")
            prints[label] = commit.read_text() if commit.is_file() else "none"
            continue
        root, blocks = os.path.commonpath([file.parent for file in files]), BLOCKS // len(files)
        for file in files:
            try:
                prints[f"{label} {file.relative_to(root)}"] = fingerprint(file, max(2, blocks))
            except OSError as error:
                raise UsageError(f"{label}: {file} cannot be read ({error.strerror})") from None
    return prints


def state_tensors(model: Module, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name of each trained parameter, and its weight and optimizer state as full tensors.
    Gathering them needs all ranks, so each must read to the end."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors = {"weight": parameter.detach(), **optimizer.state[parameter]}
            yield name, {key: full_tensor(x).contiguous() for key, x in tensors.items()}


def write_state(
    out: Path, state: dict[str, Any], tensors: Iterable[tuple[str, dict[str, Tensor]]], args: Any
) -> None:
    """Write a state aside, flush it to disk, rename it, and delete all but the newest `keep`
    states, and those that `Run.move_later_states` has renamed.

    Each trained parameter has its own file, so that rank 0 holds only one at a time.

    Raises:
        UsageError: it cannot be written, as on a full disk; earlier states are unchanged.
    """
    folder = out / "state"
    aside = folder / f"step-{state['step']:06}.part"
    final = aside.with_suffix("")
    with writing(out, f"state/{final.name}"):
        folder.mkdir(exist_ok=True)
        for left in folder.glob("*.part"):
            shutil.rmtree(left)
        aside.mkdir()
        try:
            for name, content in tensors:
                save_file(content, aside / f"{name}.safetensors")
            (aside / "random.json").write_text(json.dumps(random_state()))
            (aside / "state.json").write_text(json.dumps(state | {"args": asdict(args)}, indent=1))
            for path in (*aside.iterdir(), aside):
                flush(path)
        except Exception:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)  # left from before a resume at an earlier step
        aside.rename(final)
        flush(folder)
    for old in (*good_states(out)[: -args.keep], *folder.glob("step-*.later")):
        shutil.rmtree(old)


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's random number generators. The scripts draw
    nothing from them after the start, but a fork may."""
    kind, keys, *rest = np.random.get_state()
    numpy_state = [kind, keys.tolist(), *rest]
    torch_state = torch.get_rng_state().tolist()
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch_state}


def load_state(named: str, path: Path, model: Module, optimizer: Optimizer) -> None:
    """Load weights, moments and random number generators from a state. Rank 0 reads one parameter
    at a time and sends the other ranks their shards. `named` begins an error message."""

    def read(name: str, shape: torch.Size) -> dict[str, Tensor]:
        with readable(named, path):
            tensors = load_file(own_file(path / f"{name}.safetensors"))
            moments = [x for x in tensors.values() if x.ndim]
            if any(x.shape != shape for x in (tensors["weight"], *moments)):
                raise ValueError(f"{name} has another size")
            return tensors

    def read_random() -> dict[str, Any]:
        with readable(named, path):
            return json.loads(own_file(path / "random.json").read_bytes())

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors = on_rank_0(partial(read, name, parameter.shape)) or {}
            # The other ranks learn shapes and dtypes here, and get the numbers in `shard_like`.
            sent = {key: x.to("meta") if x.ndim else x for key, x in tensors.items()}
            sent = gather([sent])[0]
            empty = {key: torch.empty_like(x, device="cpu") for key, x in sent.items() if x.ndim}
            tensors = tensors or sent | empty
            with torch.no_grad():
                parameter.copy_(shard_like(tensors.pop("weight"), parameter))
            # A fused optimizer counts its steps on the parameter's device.
            device = parameter.device if optimizer.defaults.get("fused") else "cpu"
            optimizer.state[parameter] = {
                key: shard_like(value, parameter) if value.ndim else value.to(device)
                for key, value in tensors.items()
            }
    random_numbers = from_rank_0(read_random)
    with readable(named, path):
        version, keys, gauss = random_numbers["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(random_numbers["numpy"])
        torch.set_rng_state(torch.tensor(random_numbers["torch"], dtype=torch.uint8))
