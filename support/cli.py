"""The arguments that every run has, and the command line."""

import errno
import math
import os
import re
import shlex
import signal
import sys
import traceback
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from inspect import get_annotations
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal, TextIO, get_origin, get_type_hints

import docstring_parser
import torch.distributed as dist
import tyro

from support import ranks, startup
from support.ranks import UsageError, require


@dataclass
class RunArgs:
    """The arguments of every training run, whatever its method."""

    data: tuple[str, ...] = ()
    """JSON, JSON lines, Parquet, a directory of a data set, or a hub name, one or several; see
    docs/data.md. Unset: the built-in task."""
    eval_data: tuple[str, ...] = ()
    """Data to evaluate on. Unset: rows of --data after the first ROWS, or else up to a tenth of its
    rows, which are then not trained on."""
    media_root: tuple[str, ...] = ()
    """Folders that the paths in the rows are relative to. Unset: the folder of the data file."""
    text_only: bool = False
    """Accept data without images and videos."""
    rows: int | None = None
    """Train on the first ROWS rows of --data. Unset: all. Paper: 51,200 of Video-R1-260k."""
    check_data: bool = False
    """Read every row once (with --rows, those of --data that the run would use), report the rows
    that cannot be used, and stop."""
    frames: int | None = None
    """Frames of each video, evenly spaced; with --fps, the maximum. Unset: --fps a second, at most
    128 (paper); on the toy, as in its checkpoint."""
    fps: float | None = None
    """Frames per second of video. Unset: 1 (paper), or --frames in total."""
    image_tokens: int | None = 5120
    """Maximum visual tokens of an image. Paper: 5120."""
    min_image_tokens: int | None = 128
    """Minimum visual tokens of an image, at most --image-tokens: smaller images are enlarged.
    Paper: 128."""
    frame_tokens: int | None = 128
    """Maximum visual tokens of a pair of video frames, which share them. Paper: 128."""
    max_prompt_tokens: int | None = 16384
    """Skip rows whose prompt has more tokens than this. A row of several images may have more than
    the memory estimate assumes."""
    max_skipped: float = 0.01
    """Stop when more than this fraction of the rows cannot be used."""
    workers: int = 4
    """Worker processes that read and encode prompts ahead; 0: the training process reads them."""
    grid: int | None = None
    """Cells along each side of the toy's images (3 or more). Unset: as in the checkpoint, or 4."""
    toy_order: Literal["question-first", "image-first"] | None = None
    """Order of the toy's prompt. Unset: as in the checkpoint, or question-first."""
    train_vision: bool = False
    """Also train the vision encoder; every pass then recomputes its features. Paper: frozen.
    sft.py trains that of a toy, whose weights are new."""
    lora_rank: int | None = None
    """Rank of the adapters that are trained instead of the weights; 0: train the weights. Unset: 0,
    or 64 if training the weights does not fit into memory."""
    gradient_checkpointing: bool | None = None
    """Store one activation per layer and recompute the rest. Unset: only on a GPU."""
    micro_batch_size: int = 1
    """Prompts in a forward pass of training, with all their responses. It changes memory and speed,
    not the update."""
    eval_every: int = 100
    """Steps between evaluations on held-out examples."""
    eval_examples: int = 128
    """Held-out examples per evaluation."""
    seed: int = 1
    """Seed of data, sampling and new weights. It reproduces a run on the same machine."""
    out: str = "runs"
    """Run directory. A run that is already there is moved to OUT.1, OUT.2 and so on."""
    overwrite: bool = False
    """Replace a run that is already at OUT instead of moving it. Not when a run is resumed."""
    track: bool = False
    """Also send the metrics to Weights & Biases."""
    save_every: int = 50
    """Steps between saved states in OUT/state, for --resume; 0: save none."""
    keep: int = 2
    """Number of states to keep; older ones are deleted."""
    resume: str | None = None
    """Resume from this state; `auto`: from the newest intact state in OUT, if there is one."""
    allow_changed_args: bool = False
    """Resume even if input files, or arguments that affect the result, have changed since the
    state was saved."""

    def __post_init__(self) -> None:
        """Check the ranges of these arguments, and of those that most scripts declare."""
        check_values(self)
        positive = "rows frames fps max_prompt_tokens image_tokens min_image_tokens frame_tokens"
        positive += " micro_batch_size eval_every eval_examples keep steps learning_rate"
        positive += " max_grad_norm prompts_per_step num_iterations num_minibatches"
        positive += " max_new_tokens temperature clip_eps"
        not_negative = "save_every max_skipped seed workers lora_rank beta"
        require_positive(self, *(name for name in positive.split() if hasattr(self, name)))
        require_not_negative(self, *(name for name in not_negative.split() if hasattr(self, name)))
        require(self.grid is None or self.grid >= 3, f"--grid {self.grid}: needs 3 or more")

    def may_change(self) -> set[str]:
        """Names of the arguments that `--resume` may change: they do not affect what is computed.
        Some are declared by the scripts."""
        names = "out overwrite track save_every keep resume allow_changed_args"
        names += " workers check_data max_skipped text_only gradient_checkpointing"
        names += " steps eval_every micro_batch_size prompts_per_step"
        return set(names.split())


# 1. Values


def option(name: str) -> str:
    """The option of the command line that sets the field `name`."""
    return f"--{name.replace('_', '-')}"


def options(args: Any) -> dict[str, Any]:
    """The value of every option."""
    return {option(name): value for name, value in asdict(args).items()}


def each(value: Any) -> tuple:
    """The values of an argument that may take several."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def require_positive(args: Any, *names: str) -> None:
    """Refuse fields that are not above zero. None means "unset" and passes."""
    for name in names:
        for value in each(getattr(args, name)):
            require(value is None or value > 0, f"{option(name)} {value}: must be above 0")


def require_not_negative(args: Any, *names: str) -> None:
    """Refuse fields below zero. None means "unset" and passes."""
    for name in names:
        value = getattr(args, name)
        require(value is None or value >= 0, f"{option(name)} {value}: must be 0 or above")


LARGEST = 2**31 - 1  # of an integer argument


def check_values(args: Any) -> None:
    """Refuse numbers that are not finite or too large to compute with, and an empty name, as from
    an unset shell variable, which would otherwise mean "unset"."""
    for name, value in ((name, value) for name, x in vars(args).items() for value in each(x)):
        named = f"{option(name)} {value!r}"
        require(value != "", f"{named}: is empty; give a value or omit it")
        home = f"{named}: the shell has not replaced the ~; give the whole path"
        require(not str(value).startswith("~"), home)
        if isinstance(value, int | float):
            require(math.isfinite(value), f"{named}: must be a finite number")
            largest = LARGEST if isinstance(value, int) else 1e15
            require(abs(value) <= largest, f"{named}: must be at most {largest}")


def same_inputs(args: Any) -> str:
    """The model and data arguments of a run as command-line text, for the next command."""
    words = []
    names = "model teacher data eval_data media_root text_only rows frames fps"
    names += " image_tokens min_image_tokens frame_tokens think" if args.data else ""
    for name in names.split():
        value = getattr(args, name, None)
        if value is False and getattr(type(args), name):
            words += [option(f"no_{name}")]
        elif value and value != getattr(type(args), name):
            words += [option(name), *(() if value is True else map(str, each(value)))]
    return "".join(f" {shlex.quote(word)}" for word in words)


# 2. The command line


def run_script(
    args_class: type,
    main: Callable,
    description: str,
    defaults: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Parse the command line into `args_class`, with `defaults()` in place of the class's own
    defaults, and run `main`. A `UsageError` becomes one line and exit status 2, Ctrl-C one line and
    130, `Ended` one line and its status."""
    unprinted, status = keep_printing(), 0
    try:
        if signal.getsignal(signal.SIGINT) is startup.stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if defaults is not dict:
            description += "\nDefaults depend on the model: name it with --model before --help."
        args = parse(args_class, description, defaults())  # --help ends here
        ranks.start_ranks()
        main(args)
    except KeyboardInterrupt:
        ranks.fail(130, "\nstopped by Ctrl-C; what was saved before is intact")
    except UsageError as error:
        ranks.fail(2, f"error: {error}")
    except ranks.Ended as end:
        ranks.print_on_rank_0(str(end))
        status = end.status
    except Exception as error:
        if str(error).startswith("DataLoader worker (pid"):  # in PyTorch's words, and at any time
            remedy = "if it was killed because memory is full, give fewer --workers"
            ranks.fail(2, f"error: --workers: a reader process has ended ({error}); {remedy}")
        ranks.fail(1, traceback.format_exc())
    sys.stdout.flush()
    if dist.is_initialized():
        ranks.leave_ranks(status)
    if unprinted and unprinted[0].errno == errno.EPIPE:
        ranks.leave(128 + signal.SIGPIPE)  # a program that ends by SIGPIPE is silent, too
    if unprinted:
        reason = unprinted[0].strerror
        complete = "" if status else "; the files are complete"
        ranks.fail(status or 1, f"error: the output cannot be printed ({reason}){complete}")
    if status:
        sys.exit(status)


def parse(args_class: type, description: str, defaults: dict[str, Any]) -> Any:
    """Parse the command line. `--help` lists the script's own arguments before those of `RunArgs`;
    each help text and each paragraph of the description is one line, which tyro or the terminal
    wraps.
    """
    require_values(get_type_hints(args_class))
    known, bases = args_class.__dataclass_fields__, args_class.__mro__[:-1]
    unknown = ", ".join(defaults.keys() - known.keys())
    require(not unknown, f"the script's table of defaults names no argument of its own: {unknown}")
    for base in reversed(bases):
        for param in docstring_parser.parse_from_object(base).params:
            if param.arg_name in known:
                known[param.arg_name].metadata = {"help": " ".join(param.description.split())}
    # A class with the fields in another order, which leaves their check to `args_class`.
    form = type(args_class.__name__, (args_class,), {"__post_init__": lambda self: None})
    names = (name for base in bases for name in get_annotations(base) if name in known)
    form.__dataclass_fields__ = {name: known[name] for name in names}
    paragraphs = re.sub(r"(?<=\S)\n(?=\S)", " ", description or "")
    given = tyro.cli(form, description=paragraphs, default=SimpleNamespace(**defaults))
    return args_class(**vars(given))


def require_values(hints: dict[str, Any]) -> None:
    """Refuse an option of several values without any, which would count as unset (as from an unset
    shell variable). `hints` are the types of the arguments by name."""
    several = {option(name) for name, hint in hints.items() if get_origin(hint) in (tuple, list)}
    for word, following in pairwise([*sys.argv[1:], "--"]):
        # tyro takes `_` for `-`
        given = word.replace("_", "-") not in several or not following.startswith("--")
        require(given, f"{word}: needs a value, or leave it out")


def given_options() -> Namespace:
    """`--model` and `--think` as the command line gives them (None if it does not), before it is
    parsed: some defaults depend on them."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", nargs="?")  # one without a value is reported later
    parser.add_argument("--think", action=BooleanOptionalAction)
    return parser.parse_known_args()[0]


def keep_printing() -> list[OSError]:
    """Let a run continue when its output cannot be printed, because the pipe is closed or the disk
    is full: the rest of the output is dropped. Returns a list, to which such errors are added.

    Characters that the output cannot encode are printed as escape sequences. An output that was
    closed before the start is opened on the null device, so that no file of the run gets its
    descriptor."""
    errors = []

    def guard(stream: TextIO, write: Callable) -> Callable:
        def guarded(*args: Any) -> Any:
            try:
                return write(*args)
            except OSError as error:
                errors.append(error)
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

        return guarded

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        stream.reconfigure(errors="backslashreplace")
        stream.write, stream.flush = guard(stream, stream.write), guard(stream, stream.flush)
        setattr(sys, name, stream)
    return errors
