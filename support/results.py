"""The output directory of an evaluation: its predictions, and the tables and plots of them."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np

from support import cli, disk, grounding, pictures, states
from support.benchmarks import BENCHMARKS, chosen, number, paper_tables, place_of
from support.ranks import require

# What an evaluation writes.
FILES = "args.json predictions.jsonl skipped*.jsonl table.txt table.md gaze*.html sweep.png"
COMPARISON = "comparison"  # what `compare` writes

NAMES = ("benchmark", "frames", "image_tokens", "frame_tokens", "grid")
Setting = tuple[str | int | None, ...]  # a value of each
Records = list[dict[str, Any]]

# Labels of the means over the rows with boxes; see `grounding.look`.
MEASURES = {
    "target_attn": "on target, predicting row",
    "target_attn_own": "on target, own row",
    "target_attn_mean": "on target, mean of own rows",
    "target_lift": "times chance, predicting row",
    "target_lift_mean": "times chance, mean of own rows",
    "vision_attn": "on vision, predicting row",
}


def labels(settings: Iterable[Sequence]) -> dict[tuple, str]:
    """What tells each setting, or the end of one, from the others, as in "nextqa, frames 32".
    Evaluation and benchmark, which may stand before the numbers, go by their names alone."""
    settings = [tuple(setting) for setting in settings]
    names = ("", "", *NAMES[1:])[-len(settings[0]) :]
    varied = [i for i, values in enumerate(zip(*settings, strict=True)) if len(set(values)) > 1]

    def label(setting: tuple) -> str:
        words = (f"{names[i]} {setting[i]}" if names[i] else setting[i] for i in varied)
        return ", ".join(filter(None, words))

    return {setting: label(setting) for setting in settings}


def read_predictions(path: Path) -> tuple[dict[Setting, Records], int]:
    """The records of each setting, and the length of the file up to its last complete line."""
    content, records = path.read_bytes() if path.exists() else b"", defaultdict(list)
    length = content.rfind(b"\n") + 1
    for n, line in enumerate(content[:length].splitlines(), 1):
        with disk.loading(f"{path}: line {n} is damaged", "delete it, and evaluate again"):
            record = json.loads(line)
            records[tuple(record.pop("setting"))].append(record)
    return records, length


def check_out(args: Any) -> dict[str, Any]:
    """Refuse an output directory that belongs to something else, or was made with other arguments
    or inputs. Returns what to record there."""
    out = Path(args.out)
    disk.require_outside(out, args)
    disk.require_kind(out, disk.EVALUATION)
    settings = asdict(args)
    same = "out overwrite gaze batch_size batch_tokens workers max_skipped compare"
    for name in same.split():  # these affect no prediction, but by rounding
        del settings[name]
    read = args.data or [place_of(name, args.benchmark_root) for name in chosen(args.benchmark)]
    inputs = states.fingerprint_inputs(SimpleNamespace(model=args.model, data=read))
    settings |= {"inputs": inputs, "definitions": states.DEFINITIONS}
    settings = json.loads(json.dumps(settings))  # JSON turns tuples into lists
    before = {} if args.overwrite else disk.read_record(out)
    changed = [name for name in settings if before and settings[name] != before.get(name)]
    version = "definitions, of another version of this program"
    differ = [f"{cli.option(x)} {before.get(x)} -> {settings[x]}" if x in vars(args) else version
              for x in changed if x != "inputs"]  # fmt: skip
    if changed == ["inputs"]:
        old = before.get("inputs") or {}
        differ = [name for name in old | inputs if old.get(name) != inputs.get(name)]
    remedy = "give another --out, or --overwrite"
    require(not differ, f"--out {out}: was made with different {', '.join(differ[:4])}; {remedy}")
    return settings


def open_out(args: Any) -> tuple[TextIO, FileIO, dict[Setting, Records]]:
    """Open the output directory, new or left by the same command; returns its lock, the file of
    predictions, and those that it has.

    Raises:
        UsageError: as in `check_out`, or the directory is in use by another process or cannot be
            written.
    """
    out = Path(args.out)
    with disk.writing(out, "the directory"):
        out.mkdir(parents=True, exist_ok=True)
        lock = disk.lock_directory(out)
        settings = check_out(args)  # nobody else changes it now
        if args.overwrite:
            disk.clear(out, FILES)
        if not disk.read_record(out):
            disk.write_record(out, disk.EVALUATION, settings)
        records, length = read_predictions(out / "predictions.jsonl")
        file = disk.open_lines(out / "predictions.jsonl")
        file.truncate(length)
    return lock, file, records


def mean(records: Sequence[dict[str, Any]], name: str) -> float:
    """The mean over the records that have the number."""
    return float(np.mean([record[name] for record in records if name in record]))


def measures(records: Records) -> dict[str, str]:
    """What to print of the rows with boxes, by label: how many there are, `grounding.fourfold`, the
    means and, with `--relative`, the mean `target_attn` over that of a general request. Empty
    without boxes."""
    seen = [record for record in records if "pointing" in record]
    if not seen:
        return {}
    answered = sum(record.get("answered", 1) for record in seen)  # not every file says it
    found = {"rows with boxes": f"{len(seen):,}", "with an answer": f"{answered:,.0f}"}
    for name, share in grounding.fourfold(seen).items():
        found[grounding.OUTCOMES[name]] = f"{round(share * len(seen)):,} ({share:.3f})"
    for name, label in MEASURES.items():
        if answered or name.endswith("_mean"):  # else there is no row to measure
            found[label] = f"{mean(seen, name):.3f}"
    if answered and "target_attn_generic" in seen[0]:
        ratio = mean(seen, "target_attn") / max(mean(seen, "target_attn_generic"), 1e-9)
        found["on target, times a general request"] = f"{ratio:.3f}"
    return found


def table(results: dict[tuple, Records]) -> str:
    """Accuracy over all rows, by problem type and by source; format rate and response length. A
    benchmark's own number follows. Where there are boxes: how many were right and looked, and the
    measures. The keys of `results` are settings, or names of evaluations and settings."""
    lines, named = [], labels(results)
    for setting, records in results.items():
        groups, benchmark = [("all", records)], setting[-5]
        for field, nothing in (("problem_type", "no type"), ("source", "no source")):
            values = sorted({record[field] for record in records})
            for value in values if len(values) > 1 or values[0] else []:
                chosen = [record for record in records if record[field] == value]
                groups.append((value or nothing, chosen))
        label = named[setting] or benchmark or "held-out"
        lines.append(f"\n{label:<36}{'rows':>7}{'accuracy':>10}{'format':>8}{'length':>8}")
        for name, group in groups:
            values = [mean(group, what) for what in ("accuracy", "format", "completion_len")]
            numbers = f"{values[0]:>10.3f}{values[1]:>8.3f}{values[2]:>8.1f}"
            name = "".join(c if c.isprintable() else "?" for c in name[:34])
            lines.append(f"{name:<36}{len(group):>7}{numbers}")
        lines += [f"{label:<36}{text:>17}" for label, text in measures(records).items()]
        if benchmark:
            lines.append(f"{BENCHMARKS[benchmark].heading}: {number(benchmark, records)}")
    return "\n".join(lines)


def side_by_side(results: dict[tuple, Records]) -> str:
    """Markdown: the paper's tables with the measured numbers below, and a line for each evaluation
    and setting. The keys of `results` are the name of an evaluation and a setting."""
    measured, named = defaultdict(dict), labels(numbers for _, _, *numbers in results)
    looks = {key: measures(records) for key, records in results.items()}
    seen = dict.fromkeys(label for look in looks.values() for label in look)
    names = ["evaluation", "benchmark", "number", "rows", "accuracy", "format", "length", *seen]
    lines = [names, ["---"] * len(names)]
    for (name, benchmark, *numbers), records in results.items():
        label = ", ".join(filter(None, (name, named[tuple(numbers)])))
        heading = own = ""
        if benchmark:
            heading, own = BENCHMARKS[benchmark].heading, number(benchmark, records)
            measured[label][benchmark] = own
        rates = [f"{mean(records, what):.3f}" for what in ("accuracy", "format")]
        length = f"{mean(records, 'completion_len'):.1f}"
        looked = [looks[name, benchmark, *numbers].get(x, "") for x in seen]
        lines.append([label, heading, own, f"{len(records):,}", *rates, length, *looked])
    details = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{paper_tables(measured)}\n{details}\n"


def plot(path: Path, results: dict[tuple, Records]) -> None:
    """Plot accuracy, or a benchmark's own score, with its standard error against the first number
    that varies, one line for each value of whatever else does. Nothing is drawn if none varies."""
    columns = list(zip(*results, strict=True))
    numbers = [i for i, column in enumerate(columns)
               if len(set(column)) > 1 and all(isinstance(x, int) for x in column)]  # fmt: skip
    if not numbers:
        return
    place, lines = numbers[0], defaultdict(list)
    others = {setting: (*setting[:place], None, *setting[place + 1 :]) for setting in results}
    named = labels(others.values())
    for setting, records in results.items():
        scores = np.array([record.get("score", record["accuracy"]) for record in records])
        point = (setting[place], scores.mean(), scores.std() / math.sqrt(len(records)))
        lines[named[others[setting]]].append(point)
    pictures.draw_sweep(path, NAMES[place - len(columns)], lines)


def compare(args: Any) -> None:
    """Write `table.md` of the evaluations in `--compare` and, if they are sweeps, one plot of
    all."""
    out, results = Path(args.out), {}
    for name in args.compare:
        is_one = disk.read_record(Path(name)).get("made_by") == disk.EVALUATION
        require(is_one, f"--compare {name}: is not an output directory of eval.py")
        for setting, records in read_predictions(Path(name, "predictions.jsonl"))[0].items():
            results[name, *setting] = records
    require(len(results) > 0, "--compare: none of them has an answered row yet")
    disk.require_kind(out, COMPARISON)
    with disk.writing(out, "the directory"):
        out.mkdir(parents=True, exist_ok=True)
        disk.write_record(out, COMPARISON, {"compare": args.compare})
        disk.write_aside(out / "table.md", text := side_by_side(results))
    print(text)
    plot(out / "sweep.png", results)


def report(args: Any, results: dict[Setting, Records]) -> None:
    """Print and write the tables of an evaluation, and plot a sweep."""
    out, text = Path(args.out), table(results)
    with disk.writing(out, "table.txt"):
        disk.write_aside(out / "table.txt", text.strip() + "\n")
        if args.benchmark:
            named = {(args.out, *setting): records for setting, records in results.items()}
            disk.write_aside(out / "table.md", side_by_side(named))
    print(text)
    plot(out / "sweep.png", results)
    written = sorted({*out.glob("table.*"), *out.glob("gaze*.html"), *out.glob("sweep.png")})
    print(f"results: {', '.join(map(str, written))}")
