"""The run directory: everything that a run writes, and what it prints at its end."""

import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from support import cli, disk, ranks, states
from support.data import BadRows
from support.pictures import draw_run
from support.ranks import UsageError, require
from support.states import State

EQUAL_STEPS = 10  # in a row with equal rewards in every group, before a note says so
WHY_EQUAL = "if all are wrong or without the format, train with sft.py first or on easier data"
WHY_EQUAL += "; if all are right, train on harder data; if all are cut off, raise --max-new-tokens"


class Stopwatch:
    """Seconds of each phase of a step, and the peak memory so far, for the metrics `perf/*`."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.metrics: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Record the time since the last lap as `perf/<phase>_s`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.metrics[f"perf/{phase}_s"] = now - self.last
        self.last = now

    def stop(self, tokens: int) -> dict[str, float]:
        """The seconds of every phase and of the step, tokens per second, and peak memory (of the
        GPU, if there is one)."""
        seconds = self.last - self.start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        self.metrics |= {"perf/step_s": seconds, "perf/tokens_per_s": tokens / seconds}
        return self.metrics | {"perf/peak_mem_gb": peak / 2**30}


# 1. Before a run


def check_run(args: Any, *models: str, kind: str = disk.TRAINING_RUN) -> None:
    """Refuse, before any work is done, arguments that differ between ranks, a default checkpoint
    that is not there (`models` names the arguments with checkpoints that the run reads), and an
    `--out` that cannot become the directory of this `kind` of program."""
    ranks.require_same_on_ranks(cli.options(args))
    ranks.on_rank_0(partial(check_out, args, kind))
    for name in models:
        path = getattr(args, name)
        made = path is None or path != getattr(type(args), name) or Path(path).is_dir()
        command = "python sft.py"
        if name == "teacher":
            command += " --toy-size large --stop-accuracy 0.99 --eval-above 0.8 --out runs/teacher"
        require(made, f"--{name}: there is no checkpoint at {path}; make it with `{command}`")
    if args.track:
        ranks.on_rank_0(lambda: with_wandb(lambda wandb: wandb.login(verify=True)))


def check_out(args: Any, kind: str) -> None:
    """Refuse an `--out` that cannot become the directory of this `kind` of program. `Run` locks it
    and checks again."""
    out = Path(args.out)
    disk.require_kind(out, kind)
    disk.require_outside(out, args)
    if (out / disk.LOCK).exists() and not args.check_data:
        with disk.writing(out, disk.LOCK):
            disk.lock_directory(out).close()
    place = next(x for x in (out.resolve(), *out.resolve().parents) if x.exists())
    writable = place.is_dir() and os.access(place, os.W_OK)
    require(writable, f"--out {out}: {place} cannot be written to; choose another")
    kept = getattr(args, "resume", None) or args.overwrite or not disk.content_of(out)
    movable = kept or os.access(out.resolve().parent, os.W_OK)
    blocked = f"--out {out}: holds a run that cannot be moved, as the folder above is read-only"
    require(movable, f"{blocked}; choose another, or give --overwrite")


def with_wandb(call: Callable[[Any], Any]) -> Any:
    """Return what `call(wandb)` returns; its errors, and a missing package, are one line."""
    remedy = "`pip install wandb` and `wandb login`, set WANDB_MODE=offline, or omit --track"
    with disk.loading("--track", remedy):
        import wandb  # perhaps an empty package: a folder `wandb/` that an earlier run left

        return call(wandb)


# 2. The run


class Run:
    """The directory of a run, see docs/scaling.md, and all that is written there, by rank 0 alone.

    An existing run at `out` is moved to `<out>.1` and so on, or replaced with `--overwrite`. With a
    `state`, it is resumed instead: `start` cuts its files back to the state. The directory stays
    locked until the script's `main` returns.
    """

    def __init__(
        self, args: Any, bad_rows: BadRows, state: State | None = None, start: float | None = None
    ):
        self.began = start or time.time()
        self.out, self.args, self.wandb, self.bad_rows = Path(args.out), args, None, bad_rows
        self.state, self.signal, self.files, self.tensorboard = state, None, {}, None
        self.equal = 0  # steps with equal rewards in a row, see `note_equal_rewards`
        # At the start of the run, as they may change while it trains.
        self.inputs = ranks.on_rank_0(partial(states.fingerprint_inputs, args))
        self.handlers = {s: signal.getsignal(s) for s in ranks.STOP_SIGNALS}
        if self.handlers[signal.SIGHUP] == signal.SIG_IGN:  # as nohup wants it
            del self.handlers[signal.SIGHUP]
        for number in self.handlers:
            signal.signal(number, self.interrupt)
        self.lock = ranks.on_rank_0(self.claim)
        if state is None:
            ranks.on_rank_0(self.begin)

    def claim(self) -> TextIO:
        """Lock the directory, and make room in it for a new run; returns the lock."""
        with disk.writing(self.out, "the run directory"):
            self.out.mkdir(parents=True, exist_ok=True)
            lock = disk.lock_directory(self.out)
        disk.require_kind(self.out, disk.TRAINING_RUN)
        if self.args.track:  # before anything is moved, as it may fail
            options = {"project": "ral", "name": self.out.name, "config": asdict(self.args)}
            if self.state and self.state.wandb:  # which ignores the steps that it already has
                options |= {"id": self.state.wandb, "resume": "allow"}
            self.wandb = with_wandb(lambda wandb: wandb.init(**options))
        with disk.writing(self.out, "the run directory"):
            return lock if self.state else self.make_room(lock)

    def make_room(self, lock: TextIO) -> TextIO:
        """Move or delete an earlier run; returns the lock of the directory, or of the one that
        takes its place."""
        if self.args.overwrite:
            disk.clear(self.out, disk.RUN_FILES)
        elif disk.content_of(self.out):
            numbers = range(1, sys.maxsize)
            aside = next(p for n in numbers if not (p := Path(f"{self.out}.{n}")).exists())
            self.out.rename(aside)
            print(f"moved the run at {self.out} to {aside}")
            self.out.mkdir(exist_ok=True)
            with lock:  # the lock moved along; hold it until the new one is taken
                return disk.lock_directory(self.out)
        return lock

    def begin(self) -> None:
        """Open the files of the run, cut back to the state."""
        names = ["metrics.jsonl", "samples.jsonl"] + ["skipped.jsonl"] * bool(self.args.data)
        lengths = {name: self.state.lengths.get(name, 0) if self.state else 0 for name in names}
        with disk.writing(self.out, "the run directory"):
            for name, length in lengths.items():
                path = self.out / name
                whole = length == 0 or (path.exists() and path.stat().st_size >= length)
                short = f"{path} is shorter than at the state ({length} bytes); give an earlier one"
                require(whole, f"--resume {self.args.resume}: {short}")
            for folder in (self.out, self.out / "state"):
                disk.install(folder)  # what a killed process has not finished
            self.move_later_states()
            record = asdict(self.args) | {"inputs": self.inputs}
            disk.write_record(self.out, disk.TRAINING_RUN, record)
            for name, length in lengths.items():
                self.files[name] = disk.open_lines(self.out / name)
                self.files[name].seek(self.files[name].truncate(length))
            if self.args.data:
                self.bad_rows.attach(self.files["skipped.jsonl"])
            # TensorBoard's own `SummaryWriter` writes from a thread, which prints a traceback when
            # the disk is full. A resumed run writes its events again.
            shutil.rmtree(self.out / "tensorboard", ignore_errors=True)
            (self.out / "tensorboard").mkdir()
            name = f"tensorboard/events.out.tfevents.{time.time():.0f}"
            self.tensorboard = RecordWriter((self.out / name).open("wb"))
            self.add_event(file_version="brain.Event:2")
        written = (self.out / "metrics.jsonl").read_bytes().splitlines()
        for number, line in enumerate(written, 1):
            named = f"{self.out}/metrics.jsonl: line {number} is damaged"
            with disk.loading(named, "repair it, or begin again with --overwrite"):
                metrics = json.loads(line)
                self.add_metrics(metrics.pop("step"), metrics)

    def move_later_states(self) -> None:
        """Rename the states after the resumed one, so that `auto` does not find them. `write_state`
        deletes them once it has written a new state."""
        for later in disk.good_states(self.out):
            if self.state is not None and disk.step_of(later) > self.state.step:
                aside = later.with_suffix(".later")
                shutil.rmtree(aside, ignore_errors=True)
                later.rename(aside)

    def start(
        self, before: dict[str, float], model: Module, optimizer: Optimizer
    ) -> tuple[int, dict[str, Any]]:
        """Log the metrics before the first step or, with a state, continue from it: load it into
        model and optimizer, restore the random numbers, and only then cut the files back
        to the state. Returns the number of the first step, and the state's `extra`."""
        if self.state is None:
            self.log(0, before)
            return 1, {}
        named = f"--resume {self.args.resume}"
        states.load_state(named, self.out, self.state, model, optimizer)
        ranks.on_rank_0(self.begin)
        self.bad_rows.read = self.state.read // ranks.world_size()
        return self.state.step + 1, self.state.extra

    def log(self, step: int, metrics: dict[str, float], learns_from_reward: bool = True) -> None:
        """Write one line of metrics to every sink: means over ranks, but maxima for `perf/*`. A run
        that `learns_from_reward` prints a note if the rewards can teach it nothing."""
        metrics = ranks.over_ranks(metrics | {"perf/run_s": time.time() - self.began})
        for bad in ranks.gather([dict(self.bad_rows.bad)]):
            self.bad_rows.name(bad)
        if ranks.rank() != 0:
            return
        if self.args.data:
            metrics = metrics | {"data/skipped": len(self.bad_rows.bad)}
        disk.append(self.files["metrics.jsonl"], [{"step": step, **metrics}])
        self.add_metrics(step, metrics)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if learns_from_reward:
            self.note_equal_rewards(step, metrics)

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics to TensorBoard."""
        values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        self.add_event(step=step, summary=Summary(value=values))

    def add_event(self, **fields: Any) -> None:
        """Write an event to TensorBoard."""
        with disk.writing(self.out, "tensorboard"):
            self.tensorboard.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self.tensorboard.flush()

    def sample(
        self, step: int, prompts: Sequence[Any], texts: list[list[str]], rewards: Tensor
    ) -> None:
        """Write the sampled responses of all ranks, see `sample_rows`."""
        rows = ranks.gather(sample_rows(prompts, texts, rewards))
        if ranks.rank() == 0:
            disk.append(self.files["samples.jsonl"], [{"step": step, **row} for row in rows])

    def note_equal_rewards(self, step: int, metrics: dict[str, float]) -> None:
        """Print one line, once, if the rewards in every group were equal for `EQUAL_STEPS` steps in
        a row. The advantages are then 0, and GRPO learns nothing from them."""
        if self.equal is None:
            return
        self.equal = self.equal + 1 if metrics.get("rollout/frac_zero_std") == 1.0 else 0
        if self.equal == EQUAL_STEPS:
            steps = f"steps {step - EQUAL_STEPS + 1} to {step}"
            what = "all responses to a prompt got the same reward, so all advantages are zero"
            print(f"\nnote: {steps}: {what}; {WHY_EQUAL}")
            self.equal = None

    def require_finite(self, step: int, metrics: dict[str, float], prompts: Sequence[Any]) -> None:
        """Stop if the gradient is not finite; `update` skipped the optimiser step for it."""
        if math.isfinite(metrics["train/grad_norm"]):
            return
        names = [prompt.example.name for prompt in prompts[:8]]
        rows = ", ".join(filter(None, names)) or "of the toy"
        saved = ranks.from_rank_0(partial(disk.good_states, self.out))
        last = f"the last good state is {saved[-1]}" if saved else "no state is saved yet"
        what = f"step {step}: the gradient is not finite; prompts: {rows}"
        remedy = "resume from it with a lower --learning-rate and --allow-changed-args"
        raise UsageError(f"{what}; {last}{'; ' + remedy if saved else ''}")

    def interrupt(self, number: int, frame: Any) -> None:
        """Handle one of `STOP_SIGNALS`: let the step finish. A second signal ends a run of one
        process at once. With several processes it is ignored, because the scheduler and torchrun
        may each send one."""
        self.signal = number
        if ranks.world_size() == 1:
            signal.signal(number, self.handlers[number])

    def save_checkpoint(self, save: Callable[[Path | None], None]) -> None:
        """Write `checkpoint/` with `save(directory)`, and the `adapter/` that it may create beside
        it. All ranks must call it; ranks other than 0 call `save(None)`. If it cannot be written,
        an earlier checkpoint is unchanged."""
        if ranks.rank() != 0:
            save(None)
            return
        with disk.written_aside(self.out, "checkpoint") as new:
            save(new)
            for path in new.parent.rglob("*.safetensors"):  # safetensors makes them owner-only
                path.chmod(new.stat().st_mode & 0o666)

    def save_state(
        self,
        step: int,
        model: Module,
        optimizer: Optimizer,
        extra: dict[str, Any] | None = None,
        done: bool = False,
    ) -> None:
        """Save what `--resume` needs every `save_every` steps, after the last step (`done`), and
        after a signal, which ends the run: this raises `Ended`. `extra` holds anything else that
        the script needs to resume."""
        stop = 0 if done else max(ranks.gather([self.signal or 0]))
        due = self.args.save_every > 0 and (done or step % self.args.save_every == 0)
        if not due and not stop:
            return
        state = State(
            step=step,
            done=done,
            lengths={name: file.tell() for name, file in self.files.items()},
            prompts=self.args.prompts_per_step * ranks.world_size(),
            read=self.bad_rows.read * ranks.world_size(),
            extra=extra or {},
            args=asdict(self.args),
            inputs=self.inputs,
            random=torch.get_rng_state().tolist(),
            wandb=self.wandb and self.wandb.id,
        )
        tensors = states.state_tensors(model, optimizer)

        def write() -> None:
            try:
                for name, file in self.files.items():
                    with disk.writing(self.out, name):
                        os.fsync(file.fileno())
                if ranks.rank() == 0:
                    states.write_state(self.out, state, tensors, self.args.keep)
            finally:
                for _ in tensors:  # every rank gathers to the end, even if rank 0 cannot write
                    pass

        ranks.together(write)
        if stop:
            self.close()
            here = os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size())  # on this host
            several = f"torchrun --shutdown-timeout 1800 --nproc_per_node={here}"
            launch = "python" if ranks.world_size() == 1 else several
            # Of two --resume the last counts, and a state that was named is not the newest now.
            resume = [] if self.args.resume == "auto" else ["--resume", "auto"]
            words = shlex.join([*sys.argv, *resume])
            stopped = f"\nstopped after step {step}; resume with: {launch} {words}"
            raise ranks.Ended(stopped, status=128 + stop)

    def finish(
        self,
        step: int,
        model: Module,
        optimizer: Optimizer,
        save: Callable[[Path | None], None],
        evaluations: dict[str, Any],
        plotted: Sequence[str],
        *,
        then: str,
        inputs: Any = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Write the checkpoint with `save`, the pictures and the last state, and print a summary.

        `evaluations` are those to show, by name: first the one before training, then the one after
        it. `plotted` are the metrics of `curves.png`. The summary names the script to run `then`,
        with the model and data of `inputs` (default: those of this run).
        """
        self.save_checkpoint(save)
        draw_run(self.out, {name: x.predictions for name, x in evaluations.items()}, plotted)
        self.save_state(step, model, optimizer, extra, done=True)
        self.close()
        before, after, *_ = (evaluation.metrics for evaluation in evaluations.values())
        print_summary(self, before, after, step, then, inputs or self.args)

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for file in self.files.values():
            file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


# 3. What a run says


def sample_rows(
    prompts: Sequence[Any], texts: list[list[str]], rewards: Tensor
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl for G responses to each of B prompts and their rewards (B, G)."""
    groups = zip((prompt.example for prompt in prompts), texts, rewards.tolist(), strict=True)
    return [
        {"row": x.name, "problem": x.problem, "solution": x.solution, "response": t, "reward": r}
        for x, group, values in groups
        for t, r in zip(group, values, strict=True)
    ]


def print_summary(run: Run, before: dict, after: dict, steps: int, script: str, args: Any) -> None:
    """Print a short table at the end of a run: changes in held-out metrics, duration, files, and
    the next command, which runs `script` on the inputs of `args`."""
    if ranks.rank() != 0:
        return
    print(f"\n{'held-out':<24}{'before':>8}{'after':>8}")
    for name in after:
        missing = name == "eval/answered" and min(before[name], after[name]) < 1
        if missing or name == "eval/accuracy" or name.startswith("eval/target_attn_l"):
            label = name.removeprefix("eval/").replace("target_attn_l", "on target, layer ")
            print(f"{label:<24}{before[name]:>8.3f}{after[name]:>8.3f}")
    seconds = round(time.time() - run.began)
    for label, value in (("steps", steps), ("seconds", seconds), ("run", run.out)):
        print(f"{label:<24}{value!s:>16}")
    drawn = (run.out / name for name in ("gaze.html", "attention.png", "curves.png"))
    print("pictures:", ", ".join(str(path) for path in drawn if path.exists()))
    path = Path(__file__).parents[1] / script
    if path.exists():  # a fork may lack the sibling scripts
        print(f"next: python {shlex.quote(os.path.relpath(path))}{cli.same_inputs(args)}")
