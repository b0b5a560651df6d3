"""What a state, a run directory and several hosts may and may not do; a model of two numbers is
enough for most of it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import toy_args

import eval
import grpo_baseline
import kd_baseline
from support import cli, data, disk, memory, ranks, results, runs, states


@pytest.fixture(autouse=True)
def restored():
    handlers = {number: signal.getsignal(number) for number in ranks.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def tiny() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 2)
    return model, torch.optim.AdamW(model.parameters())


def train(args, steps) -> None:
    """A run of `tiny`, or the rest of one that is resumed."""
    state = states.find_state(args)
    model, optimizer = tiny()
    run = runs.Run(args, data.BadRows(), state)
    if state is not None:
        run.start({}, model, optimizer)
    for step in steps:
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        run.log(step, {"train/loss": float(step)})
        run.save_state(step, model, optimizer)
    run.close()


@pytest.fixture
def args(tmp_path):
    fields = {"model": str(tmp_path / "model"), "out": str(tmp_path / "run"), "keep": 9}
    (tmp_path / "model").mkdir()
    for name in ("config.json", "chat_template.jinja", "preprocessor_config.json"):
        (tmp_path / "model" / name).write_text(name)
    return toy_args(kd_baseline, **fields, teacher=fields["model"], save_every=1, steps=9)


def tree(folder: Path) -> dict[str, bytes]:
    """All files, but for what a process that is refused may write."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def damage(state: Path, how: str) -> None:
    weight, record = state / "weight.safetensors", state / "state.json"
    content = json.loads(record.read_text())
    if how == "cut":
        os.truncate(weight, 100)
    elif how == "missing":
        weight.unlink()
    elif how == "link":
        weight.rename(state.parent.parent / "elsewhere")
        weight.symlink_to(state.parent.parent / "elsewhere")
    elif how == "size":
        save_file({name: x.flatten()[:1] for name, x in load_file(weight).items()}, weight)
    else:
        record.write_text(json.dumps(content | json.loads(how)))


DAMAGE = ["cut", "missing", "link", "size", '{"step": 3}', '{"step": "2"}']
DAMAGE += ['{"lengths": {"metrics.jsonl": -1}}']
DAMAGE += ['{"lengths": {"metrics.jsonl": 999999}}', '{"lengths": 3}', '{"args": [1]}']
DAMAGE += ['{"extra": 3}', '{"random": [3, 5, null]}']


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_state_costs_nothing(args, how):
    """No file is cut, and no later state deleted, before the state is loaded."""
    train(args, range(1, 7))
    out = Path(args.out)
    state = out / "state" / "step-000002"
    damage(state, how)
    before = tree(out)
    with pytest.raises(ranks.UsageError, match=r"^--resume [^\n]*give an earlier one$"):
        train(replace(args, resume=str(state)), [])
    assert tree(out) == before


@pytest.mark.parametrize("earlier", [False, True])
def test_the_random_numbers_go_on(args, earlier):
    """States of an earlier version hold those of other generators, too."""
    train(args, [1])
    record = Path(args.out, "state", "step-000001", "state.json")
    drawn = torch.Generator().manual_seed(9)
    numbers = drawn.get_state().tolist()
    numbers = {"python": [3, [1], None], "torch": numbers} if earlier else numbers
    record.write_text(json.dumps(json.loads(record.read_text()) | {"random": numbers}))
    train(replace(args, resume="auto"), [])
    assert torch.rand(3).equal(torch.rand(3, generator=drawn))


@pytest.mark.parametrize("first", [b"[", b"\xff"])
def test_damaged_metrics_are_one_line(args, first):
    train(args, [1])
    file = Path(args.out, "metrics.jsonl")
    file.write_bytes(first + file.read_bytes()[1:])
    with pytest.raises(
        ranks.UsageError, match=r"metrics\.jsonl: line 1 is damaged: .*--overwrite$"
    ):
        train(replace(args, resume="auto"), [])


def test_a_run_without_a_state_begins_again_and_says_so(args, capsys):
    args = replace(args, resume="auto")
    assert states.read_state(args) is None and not capsys.readouterr().out
    train(args, [])  # killed before its first state
    ranks.print_once.cache_clear()
    capsys.readouterr()
    for _ in range(2):  # `fit_memory` and `find_state` both read it
        assert states.read_state(args) is None
    assert capsys.readouterr().out.count("has no state, so it begins again") == 1


def test_later_states_stay_until_a_new_one_is_written(args):
    train(args, range(1, 5))
    out = Path(args.out)
    older = replace(args, resume=str(out / "state" / "step-000002"))
    train(older, [])  # killed at once
    names = ["step-000001", "step-000002", "step-000003.later", "step-000004.later"]
    assert sorted(path.name for path in (out / "state").iterdir()) == names
    assert states.find_state(replace(args, resume="auto")).step == 2
    train(older, [3])
    assert sorted(path.name for path in (out / "state").iterdir()) == [*names[:2], "step-000003"]
    assert [line["step"] for line in map(json.loads, (out / "metrics.jsonl").open())] == [1, 2, 3]


# Inputs


def write_weights(path: Path, place: int) -> None:
    content = bytearray(3 * disk.BLOCK)
    content[place] = 1
    path.write_bytes(content)


def test_another_script_is_refused(args, tmp_path, monkeypatch):
    script = tmp_path / "mine.py"
    script.write_text("reward = 1")
    monkeypatch.setattr(kd_baseline, "__file__", str(script))
    train(args, [1])
    again = replace(args, resume="auto")
    assert states.find_state(again).step == 1
    script.write_text("reward = 2")
    assert states.find_state(again).step == 1  # this process imported the other content
    states.script_fingerprint.cache_clear()
    with pytest.raises(ranks.UsageError, match=r"\(other content: the script mine\.py\)"):
        states.find_state(again)
    assert states.find_state(replace(again, allow_changed_args=True)).step == 1


def test_other_inputs_are_refused(args, tmp_path, monkeypatch):
    """Of the same names and sizes; a copy with other times is the same."""
    (tmp_path / "rows.json").write_text('[{"solution": "A"}]')
    write_weights(tmp_path / "model" / "model.safetensors", 5)
    args = replace(args, data=str(tmp_path / "rows.json"))
    train(args, [1])
    again = replace(args, resume="auto")
    inputs = [*(tmp_path / "model").iterdir(), tmp_path / "rows.json"]
    for file in inputs:
        kept = file.read_bytes()
        file.write_bytes(kept[:-4] + b"B" + kept[-3:])
        option = "--data" if file.suffix == ".json" and "rows" in file.name else "--model"
        words = rf"arguments or inputs \(other content: {option} {file}.*allow-changed-args"
        with pytest.raises(ranks.UsageError, match=words):
            states.find_state(again)
        assert states.find_state(replace(again, allow_changed_args=True)).step == 1
        file.write_bytes(kept)
        os.utime(file, (1, 1))
    assert states.find_state(again).step == 1
    (tmp_path / "teacher").mkdir()
    with pytest.raises(ranks.UsageError, match=r"teacher .* -> .*other content: --teacher"):
        states.find_state(replace(again, teacher=str(tmp_path / "teacher")))


def test_a_fingerprint_covers_a_small_file_and_both_ends_of_a_large_one(tmp_path):
    prints = {}
    for place in (0, 300_000, 3 * disk.BLOCK - 1):
        write_weights(tmp_path / "file", place)
        prints[place] = [disk.fingerprint(tmp_path / "file", blocks) for blocks in (2, 3)]
    few, all_of_it = zip(*prints.values(), strict=True)
    assert len(set(all_of_it)) == 3 and few[0] != few[2] and few[1] not in (few[0], few[2])


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "HF_HUB_CACHE", str(tmp_path))
    commit = tmp_path / "models--owner--name" / "refs" / "main"
    commit.parent.mkdir(parents=True)
    for text in ("abc", "def"):
        commit.write_text(text)
        prints = states.fingerprint_inputs(SimpleNamespace(model="owner/name"))
        assert prints == {"--model owner/name": text}


# The run directory


@pytest.mark.parametrize("name", ["model", "teacher", "data", "eval_data", "media_root"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_input_lies_in_out(args, name, overwrite):
    train(args, [1])
    inside = Path(args.out) / "mine"
    inside.mkdir()
    value = f"{inside}:train" if name == "data" else str(inside)
    changed = {name: (str(inside),) if name == "media_root" else value, "overwrite": overwrite}
    words = f"^--out .*: holds --{name.replace('_', '-')} {value}, which this command reads"
    before = tree(Path(args.out))
    with pytest.raises(ranks.UsageError, match=words):
        runs.check_run(replace(args, **changed))
    if name in ("model", "data", "media_root"):
        fields = {"model": args.model, "out": args.out} | changed
        with pytest.raises(ranks.UsageError, match=words):
            results.open_out(eval.Args(**fields))
    assert tree(Path(args.out)) == before


def test_only_what_a_run_writes_is_deleted(args):
    train(args, [1])
    out = Path(args.out)
    (out / "checkpoint.best").mkdir()
    (out / "notes.txt").touch()
    train(replace(args, overwrite=True), [])
    names = {".lock", "args.json", "metrics.jsonl", "samples.jsonl", "tensorboard"}
    assert {path.name for path in out.iterdir()} == names | {"checkpoint.best", "notes.txt"}


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"made_by": "evaluation"}'])
def test_an_args_json_of_another_program_is_no_run(args, content):
    out = Path(args.out)
    out.mkdir()
    (out / "args.json").write_text(content)
    for overwrite in (False, True):
        changed = replace(args, overwrite=overwrite)
        for refused in (runs.check_run, lambda x: runs.Run(x, data.BadRows())):
            with pytest.raises(ranks.UsageError, match=f"^--out {out}: (exists|holds)"):
                refused(changed)
    assert (out / "args.json").read_text() == content and not Path(f"{out}.1").exists()


# Signals and Weights & Biases


@pytest.fixture
def hangup():
    """The tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ranks.STOP_SIGNALS)
def test_each_signal_of_a_scheduler_saves_a_state(hangup, args, number):
    model, optimizer = tiny()
    named = str(Path(args.out) / "state" / "step-000000")  # by now an older state
    run = runs.Run(replace(args, save_every=0, resume=named), data.BadRows())
    os.kill(os.getpid(), number)
    with pytest.raises(ranks.Ended, match="stopped after step 1; resume with: python") as ended:
        run.save_state(1, model, optimizer)
    assert str(ended.value).endswith("--resume auto") and ended.value.status == 128 + number
    assert [path.name for path in disk.good_states(Path(args.out))] == ["step-000001"]


def test_nohup_keeps_its_meaning(hangup, args):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = runs.Run(args, data.BadRows())
    os.kill(os.getpid(), signal.SIGHUP)
    assert run.signal is None
    run.close()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that records its runs."""
    fake = SimpleNamespace(Error=type("Error", (Exception,), {}), runs=[])
    fake.login = lambda verify: True
    run = SimpleNamespace(id="abc", log=lambda *_, **__: None, finish=lambda: None)
    fake.init = lambda **options: fake.runs.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_resumed_run_is_one_run_at_wandb(args, wandb):
    args = replace(args, track=True)
    train(args, [1])
    assert "id" not in wandb.runs[0]
    train(replace(args, resume="auto"), [2])
    assert wandb.runs[1]["id"] == "abc" and wandb.runs[1]["resume"] == "allow"


def test_wandb_starts_after_the_lock_and_its_errors_are_one_line(args, wandb):
    args = replace(args, track=True)
    Path(args.out).mkdir()
    code = "import fcntl, sys, time; x = open(sys.argv[1], 'a'); fcntl.lockf(x, fcntl.LOCK_EX);"
    code += "print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, Path(args.out) / disk.LOCK]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ranks.UsageError, match="in use by process"):
            runs.Run(args, data.BadRows())
        process.kill()
    assert not wandb.runs

    def refuse(**_):
        raise wandb.Error("no API key\nat all")

    wandb.login = wandb.init = refuse
    for start in (runs.check_run, lambda x: runs.Run(x, data.BadRows())):
        with pytest.raises(ranks.UsageError, match=r"^--track: Error: no API key; [^\n]*$"):
            start(args)


# Memory


def test_memory_that_others_use_is_not_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)  # by this process
    assert memory.available_gb() == 31


# Several hosts


def test_what_differs_between_ranks_is_named(args, monkeypatch):
    other = []
    monkeypatch.setattr(ranks, "gather", lambda items: items + other)
    facts = {"--data": "120 rows", "--eval-data": "9 rows"}
    ranks.require_same_on_ranks(facts)
    other.append(facts | {"--data": "100 rows"})
    words = "^--data: rank 1 has 100 rows, rank 0 has 120 rows; start all with the same command"
    with pytest.raises(ranks.UsageError, match=words):
        ranks.require_same_on_ranks(facts)
    other[0] = cli.options(replace(args, seed=2))
    with pytest.raises(ranks.UsageError, match=r"^--seed: rank 1 has 2, rank 0 has 1; start"):
        runs.check_run(args)


def test_only_the_disk_of_rank_0_holds_a_run(run, cold_start, tmp_path):
    """Two processes in two folders, as on two hosts that share no disk, stop and go on; one process
    on the same prompts gives the same weights."""
    fields = {"model": cold_start, "out": "run", "group_size": 4, "micro_batch_size": 1}
    fields |= {"eval_examples": 4, "save_every": 1, "learning_rate": 3e-4, "resume": "auto"}
    fields |= {"num_iterations": 1}
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    for host in hosts:
        host.mkdir()
    words = [f"--{k.replace('_', '-')}={v}" for k, v in (fields | {"prompts_per_step": 1}).items()]
    for steps in (1, 2, 2):  # the last has nothing left to do
        argv = [*words, f"--steps={steps}"]
        status, output = run("grpo_baseline", argv, [], ranks=2, folders=hosts)
        assert status == 0 and "error" not in output.lower(), output[-3000:]
    assert not list(hosts[1].iterdir())
    one = replace(toy_args(grpo_baseline, **fields | {"out": str(tmp_path / "one")}), steps=2)
    grpo_baseline.main(replace(one, model=str(cold_start), prompts_per_step=2))
    metrics = (hosts[0] / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [0, 1, 2]
    runs_of = (hosts[0] / "run", tmp_path / "one")
    ours, other = (load_file(x / "checkpoint" / "model.safetensors") for x in runs_of)
    for name in other:
        torch.testing.assert_close(ours[name], other[name], atol=1e-5, rtol=0, msg=name)
