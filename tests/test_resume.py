"""Whatever stops a run, going on gives what an uninterrupted run gives; nothing good is lost."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import SMALL, load, same, toy_args
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import attn_distill
import common
import eval
import grpo_baseline
import ral_grpo
import sft
from support import disk, ranks, runs, states

FIELDS = {"steps": 5, "save_every": 2, "eval_every": 4, "learning_rate": 1e-3}
FIELDS |= {"num_iterations": 2}


class Killed(BaseException):
    """Nothing in the scripts catches this, so that the files are as SIGKILL would leave them."""


def kill(monkeypatch, owner, name: str, call: int, when: str = "before") -> None:
    """Kill the run at a call of `owner.name`, counted from 1: before it, after it, or with what it
    has written cut in half."""
    function, calls = getattr(owner, name), 0

    def killed(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            raise Killed
        result = function(*args, **kwargs)
        if calls == call:
            if when == "halfway":
                path = args[1] if len(args) > 1 else next(args[0].iterdir())
                os.truncate(path, path.stat().st_size // 2)
            raise Killed
        return result

    monkeypatch.setattr(owner, name, killed)


def fields_of(script, model: Path, teacher: Path, **changed) -> dict:
    fields = SMALL | FIELDS | {"model": str(model)}
    if script is sft:
        del fields["group_size"], fields["num_iterations"]
        fields["stop_accuracy"] = 2.0
    if script is attn_distill:
        fields |= {"teacher": str(teacher)}
    return fields | changed


def outcome(out: Path) -> tuple:
    """All that a run leaves behind, but for times."""
    lines = []
    for name in ("metrics.jsonl", "samples.jsonl", "skipped.jsonl"):
        path = out / name
        lines.append([json.loads(x) for x in path.open()] if path.exists() else None)
    lines[0] = [{k: v for k, v in x.items() if not k.startswith("perf/")} for x in lines[0]]
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    drawn = {tag: [x.step for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return lines, drawn, load_file(out / "checkpoint" / "model.safetensors")


def assert_same(out: Path, other: Path) -> None:
    (lines, drawn, weights), (others, also_drawn, same_weights) = outcome(out), outcome(other)
    assert lines == others and drawn == also_drawn and same(weights, same_weights)
    assert len(lines[0]) == FIELDS["steps"] + 1
    assert not list(out.rglob(disk.PART)) and not list(out.rglob(disk.DONE))


@pytest.fixture(scope="module")
def whole_runs(cold_start, teacher, tmp_path_factory) -> dict:
    """Uninterrupted runs, made when they are asked for first."""
    made = {}

    def run(script, **changed) -> Path:
        key = (script.__name__, *sorted(changed.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            fields = fields_of(script, cold_start, teacher, **changed)
            script.main(toy_args(script, out=str(made[key]), **fields))
        return made[key]

    return run


OWNERS = {"script": ral_grpo, "common": common, "runs": runs, "states": states, "disk": disk}
TRAINED = 27  # trained parameters of the toy; a state has a file for each
# Where the processes of one run are killed, one after the other: owner, function, its call in that
# process, when. All of a chain but its first go on from the state in its name, or begin again.
CHAINS = {
    "no state": [
        ("script", "update", 1, "before"),
        ("script", "update", 2, "after"),
        ("states", "state_tensors", 1, "after"),
        ("states", "save_file", 1, "halfway"),
        ("disk", "flush", 1, "before"),
        ("disk", "flush", TRAINED + 3, "after"),  # all but the name is on the disk
        ("disk", "flush", TRAINED + 4, "before"),  # renamed
    ],
    "step-000002": [
        ("script", "update", 4, "before"),
        ("states", "save_file", 2, "halfway"),
        ("disk", "install", 1, "before"),  # complete, but not in its place
        ("disk", "good_states", 4, "before"),  # the older ones are not yet deleted
    ],
    "step-000004": [
        ("common", "save_model", 1, "before"),
        ("common", "save_model", 1, "halfway"),
        ("runs", "draw_run", 1, "before"),
        ("states", "save_file", 1, "halfway"),  # of the state after the last step
        ("runs", "print_summary", 1, "before"),
    ],
}


@pytest.mark.parametrize("state", CHAINS)
def test_a_killed_run_goes_on(whole_runs, cold_start, teacher, tmp_path, monkeypatch, state):
    """As a queue that starts the same command again: at first `auto` finds no state."""
    fields = fields_of(ral_grpo, cold_start, teacher, keep=1, resume="auto")
    args = toy_args(ral_grpo, **fields, out=str(tmp_path / "run"))
    for owner, *where in CHAINS[state]:
        with monkeypatch.context() as patch:
            kill(patch, OWNERS[owner], *where)
            with pytest.raises(Killed):
                ral_grpo.main(args)
        restore_signals()
    if state == "step-000004":  # the run was over, which its state says without its weights
        for file in (tmp_path / "run" / "state").glob("*/*.safetensors"):
            file.unlink()
        with pytest.raises(ranks.Ended, match=r"has finished \(step 5\)"):
            ral_grpo.main(args)
    else:
        ral_grpo.main(args)
    assert_same(tmp_path / "run", whole_runs(ral_grpo))
    drawn = ("gaze.html", "attention.png", "curves.png")
    assert all((tmp_path / "run" / name).exists() for name in drawn)


def restore_signals() -> None:
    """What the end of the process would do."""
    for number in ranks.STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("script", [sft, grpo_baseline, attn_distill])
def test_every_script_goes_on(whole_runs, cold_start, teacher, tmp_path, monkeypatch, script):
    """Also with adapters, and with minibatches, which it takes in the same order."""
    changed = {"lora_rank": 4} if script is attn_distill else {}
    changed |= {"num_minibatches": 2} if script is grpo_baseline else {}
    fields = fields_of(script, cold_start, teacher, out=str(tmp_path / "run"), **changed)
    with monkeypatch.context() as patch:
        kill(patch, script, "update", 4)
        with pytest.raises(Killed):
            script.main(toy_args(script, **fields))
    restore_signals()
    script.main(toy_args(script, resume=str(tmp_path / "run" / "state" / "step-000002"), **fields))
    assert_same(tmp_path / "run", whole_runs(script, **changed))


def test_skipped_rows_are_not_named_twice(real, tmp_path, monkeypatch):
    fields = {"model": str(real / "qwen2_vl"), "data": str(real / "rows.json"), "max_skipped": 0.3}
    fields |= {"media_root": (str(real / "media"),), "max_new_tokens": 4, "frames": 4, "workers": 0}
    fields |= SMALL | FIELDS
    for name in ("whole", "cut"):
        with monkeypatch.context() as patch:
            if name == "cut":
                kill(patch, ral_grpo, "update", 4)
                with pytest.raises(Killed):
                    ral_grpo.main(toy_args(ral_grpo, out=str(tmp_path / name), **fields))
        ral_grpo.main(toy_args(ral_grpo, out=str(tmp_path / name), resume="auto", **fields))
    restore_signals()
    assert_same(tmp_path / "cut", tmp_path / "whole")
    assert outcome(tmp_path / "cut")[0][2]


def test_an_older_state_gives_up_the_branch_after_it(whole_runs, cold_start, teacher, tmp_path):
    fields = fields_of(ral_grpo, cold_start, teacher, out=str(tmp_path / "run"))
    shutil.copytree(whole_runs(ral_grpo), tmp_path / "run")
    older = str(tmp_path / "run" / "state" / "step-000004")
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, ral_grpo, "update", 1)
        with pytest.raises(Killed):
            ral_grpo.main(toy_args(ral_grpo, **fields, resume=older))
    restore_signals()
    names = ["step-000004", "step-000005.later"]  # until the first new state is written
    assert sorted(p.name for p in (tmp_path / "run" / "state").iterdir()) == names
    ral_grpo.main(toy_args(ral_grpo, **fields, resume="auto"))
    assert_same(tmp_path / "run", whole_runs(ral_grpo))


def test_sft_that_stops_by_its_evaluations_keeps_their_interval():
    assert "eval_every" in sft.Args().may_change()
    assert "eval_every" not in sft.Args(stop_accuracy=0.5).may_change()


def test_sft_that_reached_its_accuracy_is_over(cold_start, tmp_path):
    fields = {"model": str(cold_start), "out": str(tmp_path / "run"), "steps": 9, "save_every": 2}
    fields |= {"eval_every": 3, "eval_examples": 8, "prompts_per_step": 2, "micro_batch_size": 2}
    with pytest.MonkeyPatch.context() as patch:
        judged = iter([0.1, 0.9])
        metrics = ({"eval/accuracy": accuracy} for accuracy in judged)
        judge = lambda *_, **__: eval.Evaluation(next(metrics), [])  # noqa: E731
        patch.setattr(sft, "evaluate", judge)
        patch.setattr(runs, "draw_run", lambda *_: None)
        sft.main(toy_args(sft, **fields, stop_accuracy=0.5))
    assert disk.good_states(tmp_path / "run")[-1].name == "step-000003"
    with pytest.raises(ranks.Ended, match=r"has finished \(step 3\)"):
        sft.main(toy_args(sft, **fields, stop_accuracy=0.5, resume="auto"))
    sft.main(toy_args(sft, **fields, stop_accuracy=2.0, resume="auto", allow_changed_args=True))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 10


def test_a_finished_run_can_be_made_longer(whole_runs, four_steps, tmp_path):
    ral_grpo.main(toy_args(ral_grpo, resume="auto", **four_steps))
    assert_same(tmp_path / "run", whole_runs(ral_grpo))


def test_a_signal_finishes_the_step_and_saves(
    whole_runs, cold_start, teacher, tmp_path, monkeypatch
):
    """SIGTERM in the third step, and SIGINT in the fourth, the first of the resumed run."""
    fields = fields_of(ral_grpo, cold_start, teacher, out=str(tmp_path / "run"), save_every=0)
    update, calls = ral_grpo.update, []

    def signalled(*args):
        calls.append(1)
        if number := {3: signal.SIGTERM, 4: signal.SIGINT}.get(len(calls)):
            os.kill(os.getpid(), number)
        return update(*args)

    monkeypatch.setattr(ral_grpo, "update", signalled)
    handlers = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
    for step, resume in ((3, {}), (4, {"resume": "auto"})):
        with pytest.raises(ranks.Ended) as ended:
            ral_grpo.main(toy_args(ral_grpo, **fields | resume))
        assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)] == handlers
        states = [path.name for path in (tmp_path / "run" / "state").iterdir()]
        assert len(calls) == step and f"step-00000{step}" in states
        assert f"stopped after step {step}; resume with: python" in str(ended.value)
        # else it is in the command line
        assert ("--resume auto" in str(ended.value)) == (not resume)
        assert not (tmp_path / "run" / "checkpoint").exists()
    ral_grpo.main(toy_args(ral_grpo, resume="auto", **fields))
    assert_same(tmp_path / "run", whole_runs(ral_grpo))


def test_a_signal_to_all_processes_does_not_end_the_readers(real, tmp_path, monkeypatch):
    fields = {"model": str(real / "qwen2_vl"), "data": str(real / "rows.json"), "max_skipped": 0.3}
    fields |= {"media_root": (str(real / "media"),), "max_new_tokens": 4, "frames": 4, "workers": 2}
    update, steps = ral_grpo.update, []
    others = multiprocessing.active_children()  # of other tests in this process

    def signalled(*args):
        steps.append(1)
        if len(steps) == 2:
            readers = [x for x in multiprocessing.active_children() if x not in others]
            assert len(readers) == 2
            for process in (*(reader.pid for reader in readers), os.getpid()):
                for number in ranks.STOP_SIGNALS if process != os.getpid() else [signal.SIGUSR1]:
                    os.kill(process, number)
            time.sleep(0.2)
            assert all(reader.is_alive() for reader in readers)
        return update(*args)

    monkeypatch.setattr(ral_grpo, "update", signalled)
    out = tmp_path / "run"
    with pytest.raises(ranks.Ended):
        args = fields | SMALL | FIELDS | {"save_every": 0}
        ral_grpo.main(toy_args(ral_grpo, out=str(out), **args))
    assert [p.name for p in (out / "state").iterdir()] == ["step-000002"]


@pytest.fixture
def four_steps(whole_runs, cold_start, teacher, tmp_path) -> dict:
    """The fields of a run of which four of five steps are done, in a directory of its own."""
    shutil.copytree(whole_runs(ral_grpo, steps=4), tmp_path / "run")
    return fields_of(ral_grpo, cold_start, teacher, out=str(tmp_path / "run"))


def test_changed_arguments_are_refused(cold_start, four_steps):
    fields = four_steps
    changed = fields | {"resume": "auto", "lambda_attn": 5.0, "seed": 3}
    words = "--seed 1 -> 3; --lambda-attn 1.0 -> 5.0\\).*--allow-changed-args"
    with pytest.raises(ranks.UsageError, match=words):
        ral_grpo.main(toy_args(ral_grpo, **changed))
    with pytest.raises(ranks.UsageError, match="--prompts-per-step times processes 2 -> 3"):
        ral_grpo.main(toy_args(ral_grpo, **fields | {"resume": "auto", "prompts_per_step": 3}))
    metrics = ral_grpo.main(toy_args(ral_grpo, **changed, allow_changed_args=True))
    assert metrics["train/grad_norm"] > 0
    with pytest.raises(ranks.UsageError, match="is not a saved state of --out"):
        ral_grpo.main(toy_args(ral_grpo, **fields | {"resume": str(cold_start)}))


def test_a_changed_data_file_is_refused_and_a_weaker_limit_is_not(real, tmp_path):
    """Rows are drawn and kept out of training by their number, so another file is another run."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((real / "rows.jsonl").read_bytes())
    fields = {"model": str(real / "qwen2_vl"), "data": str(rows), "out": str(tmp_path / "run")}
    fields |= {"media_root": (str(real / "media"),), "max_new_tokens": 4, "frames": 4, "workers": 0}
    fields |= SMALL | FIELDS
    ral_grpo.main(toy_args(ral_grpo, **fields | {"steps": 2, "max_skipped": 0.3}))
    best = tmp_path / "run" / "checkpoint.best"  # of the user's own
    best.mkdir()
    content = rows.read_bytes()
    rows.write_bytes(content + content.splitlines(keepends=True)[0])
    with pytest.raises(ranks.UsageError, match=f"other content: --data {rows}"):
        ral_grpo.main(toy_args(ral_grpo, **fields, max_skipped=0.3, resume="auto"))
    rows.write_bytes(content)
    ral_grpo.main(toy_args(ral_grpo, **fields, max_skipped=0.4, resume="auto"))
    assert best.is_dir()


def test_what_a_run_trains_does_not_change_when_it_goes_on(cold_start, teacher, tmp_path):
    """Adapters that were chosen because of the memory stay, where there is more of it later."""
    fields = fields_of(ral_grpo, cold_start, teacher, out=str(tmp_path / "run"))
    ral_grpo.main(toy_args(ral_grpo, **fields | {"steps": 2, "lora_rank": 4}))
    ral_grpo.main(toy_args(ral_grpo, **fields, resume="auto"))
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["lora_rank"] == 4


def test_what_is_not_finite_stops_the_run(cold_start, teacher, tmp_path, monkeypatch):
    fields = fields_of(ral_grpo, cold_start, teacher, out=str(tmp_path / "run"))
    advantages, calls = ral_grpo.group_advantages, []

    def broken(rewards):
        calls.append(1)
        return advantages(rewards) * (torch.nan if len(calls) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(ral_grpo, "group_advantages", broken)
        last = "step 4: the gradient is not finite.*the last good state is .*step-000002"
        with pytest.raises(ranks.UsageError, match=last):
            ral_grpo.main(toy_args(ral_grpo, **fields))
    restore_signals()
    last = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 4
    files = list((tmp_path / "run" / "state" / "step-000002").glob("*.safetensors"))
    assert len(files) == TRAINED
    assert all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_full_disk_leaves_the_last_state(whole_runs, cold_start, teacher, tmp_path, monkeypatch):
    fields = fields_of(ral_grpo, cold_start, teacher, out=str(tmp_path / "run"), keep=1)
    save, calls = states.save_file, []

    def full(tensors, path):
        calls.append(1)
        if len(calls) > TRAINED + 1:
            path.write_bytes(b"a part of it")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(states, "save_file", full)
        words = "state/step-000004 cannot be written.*No space left.*intact: .*step-000002"
        with pytest.raises(ranks.UsageError, match=words):
            ral_grpo.main(toy_args(ral_grpo, **fields))
    restore_signals()
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-000002"]
    ral_grpo.main(toy_args(ral_grpo, resume="auto", **fields))
    assert_same(tmp_path / "run", whole_runs(ral_grpo))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("never"),))


def test_a_broken_state_or_a_shorter_file_is_one_line(four_steps, tmp_path):
    fields = four_steps
    for part in ("lm_head.weight.safetensors", "state.json"):
        path = tmp_path / "run" / "state" / "step-000004" / part
        content = path.read_bytes()
        torch.save({"python": Evil()}, path)
        with pytest.raises(ranks.UsageError, match=r"--resume auto: .*step-000004 .*not readable"):
            ral_grpo.main(toy_args(ral_grpo, resume="auto", **fields))
        path.write_bytes(content)
    os.truncate(tmp_path / "run" / "metrics.jsonl", 20)
    with pytest.raises(ranks.UsageError, match=r"metrics.jsonl is shorter than at the state"):
        ral_grpo.main(toy_args(ral_grpo, resume="auto", **fields))
    restore_signals()


def test_adapters_off_are_the_reference_and_merged_they_are_the_policy(cold_start, tmp_path, train):
    lines, weights = train(ral_grpo, steps=3, lora_rank=4, num_iterations=2)
    assert lines[1]["train/kl"] < lines[-1]["train/kl"]
    base = load_file(cold_start / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], weights[name])}
    assert changed and all("proj.weight" in name for name in changed)
    assert not any("visual" in name for name in changed)

    model, _ = load(cold_start, lora_rank=4)
    plain, processor = load(cold_start)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name
            parameter.data.normal_(std=0.1, generator=generator)
    ids = torch.arange(5, 12)[None]
    adapted, reference = model(input_ids=ids).logits, plain(input_ids=ids).logits
    with common.without_adapters(model):
        torch.testing.assert_close(model(input_ids=ids).logits, reference, atol=0, rtol=0)
    assert (adapted - reference).abs().max() > 0.1
    common.save_model(tmp_path / "merged", model, processor)
    merged, _ = load(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted, atol=1e-4, rtol=1e-4)
