"""Evaluate a checkpoint: accuracy by problem type and by data source, sweeps over frames and visual
tokens (the paper's Figure 3), and pictures of the model's attention.

    python eval.py --model runs/ral_grpo/checkpoint --gaze 20
    python eval.py --model DIR_OR_HUB_NAME --data test.json --frames 16 32 64

Each answer adds one line to `predictions.jsonl` in the output directory. After an interruption, the
same command resumes the evaluation, and its averages cover all rows. The first section is the
evaluation that the training scripts call.
"""

import support.startup

import json
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice, pairwise, product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from common import (
    accuracy,
    extract_answer,
    gathered,
    generate_group,
    has_format,
    load_model,
    load_processor,
    require_layer,
    score,
)
from support import cli, data, disk, ranks, states, toy
from support.data import Prompts, Reader
from support.datafiles import DataFile
from support.pictures import Gaze, Prediction, draw_page, draw_sweep
from support.prompts import Processor, Prompt, PromptConfig, collate, encode_prompt

# 1. Evaluation


@torch.no_grad()
def predict(
    model: Module,
    processor: Processor,
    prompts: Iterable[Prompt],
    max_new_tokens: int,
    batch_size: int = 64,
    attn_layer: int = -1,
    gazes: int = 6,
) -> Iterator[Prediction]:
    """Answer every prompt greedily and score each answer.

    The first `gazes` examples keep their media and attention. Examples with a known target also get
    the attention mass on it, layer by layer, in the row that emits the first token of the answer:
    that of the position before it, whatever `--attn-row` the run was trained with.
    """
    tokenizer, asked = processor.tokenizer, processor.prompt_config
    layers = model.config.text_config.num_hidden_layers
    attn_layer %= layers
    stream, done = iter(prompts), 0
    while chunk := list(islice(stream, batch_size)):
        batch = collate(model, chunk, tokenizer.pad_token_id)
        rollout = generate_group(model, batch, 1, max_new_tokens)
        texts = rollout.texts(processor)
        has_targets = all(prompt.example.target for prompt in chunk)
        # Score only the examples that are measured or drawn; logits are large.
        scored = len(chunk) if has_targets else min(len(chunk), max(0, gazes - done))
        if scored:
            part = rollout[:scored]
            wanted = range(layers) if has_targets else [attn_layer]
            attentions = score(model, part, attn_layers=wanted).attentions
        for row, (prompt, (text,)) in enumerate(zip(chunk, texts, strict=True)):
            example = prompt.example
            ids = rollout.response_ids[row, 0][rollout.response_mask[row, 0]].tolist()
            said = text.removeprefix(processor.response_prefix)
            answer = answer_tokens(tokenizer, ids, said, first_mention=has_targets)
            record = {
                "row": example.name,
                "problem_type": example.problem_type,
                "source": example.source,
                "problem": example.problem,
                "solution": example.solution,
                "response": text,
                "accuracy": accuracy(text, example, asked.accuracy_rule),
                "format": has_format(text, asked.think) and not bool(rollout.truncated[row, 0]),
                "completion_len": len(ids),
            }
            gaze = None
            if row < scored:  # row t of a layer emits token t, row t + 1 is that token's own
                rows = {layer: x[row, 0].cpu() for layer, x in attentions.items()}
                longest, n = part.prompts.ids.shape[1], len(ids)
            if done < gazes and all(hasattr(medium, "frames") for medium in example.media):
                unpadded = slice(longest - len(prompt.ids), longest + n)
                kept = {layer: x[: n + 1, unpadded].clone() for layer, x in rows.items()}
                gaze = make_gaze(prompt, record, token_texts(tokenizer, ids), kept)
            if has_targets:
                visual = (part.prompts.patches[row] >= 0).nonzero()[:, 0]
                target, start = visual[list(example.target)], answer.start
                # Without an answer the mass is 0.
                mass = [x[start, target].sum().item() if answer else 0.0 for x in rows.values()]
                record["target_attn"] = mass[attn_layer]
                record |= {f"target_attn_l{layer}": value for layer, value in enumerate(mass)}
                record["target_attn_own"] = 0.0
                if answer:  # in that token's own row, relative to the mass on all other tokens
                    own = rows[attn_layer][start + 1]
                    own[longest + start] = 0.0
                    share = own[target].sum() / own.sum().clamp_min(1e-9)
                    record["target_attn_own"] = share.item()
            yield Prediction(record, gaze, answer, attn_layer)
            done += 1


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to the response, with the spaces between words."""
    # A character may be spelt by several tokens: it belongs to the last of them.
    texts = [tokenizer.decode(ids[:end]).rstrip("\ufffd") for end in range(len(ids))]
    texts.append(tokenizer.decode(ids))
    return [after[len(before) :] for before, after in pairwise(texts)]


def make_gaze(
    prompt: Prompt, record: dict[str, Any], tokens: list[str], rows: dict[int, Tensor]
) -> Gaze:
    """What the gaze page shows of an example; `rows` are without padding."""
    media, shapes, grids = prompt.example.media, prompt.shapes(), []
    for medium in media:
        t = (len(medium.frames) + 1) // 2 if medium.is_video else 1
        grids.append((t, *shapes[sum(count for count, _, _ in grids)]))
    return Gaze(
        question=prompt.example.problem,
        solution=prompt.example.solution,
        response=tokens,
        accuracy=record["accuracy"],
        media=media,
        grids=grids,
        visual=(prompt.patches() >= 0).nonzero()[:, 0].tolist(),
        prompt_len=len(prompt.ids),
        rows=rows,
        target=prompt.example.target,
        name=prompt.example.name,
    )


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over all records and, if there are several problem types, the accuracy of each."""
    numeric = ("accuracy", "format", "completion_len")
    names = [name for name in records[0] if name in numeric or name.startswith("target_attn")]
    metrics = {f"eval/{name}": mean(records, name) for name in names}
    kinds = sorted({record["problem_type"] for record in records})
    for kind in kinds if len(kinds) > 1 else []:
        chosen = [record for record in records if record["problem_type"] == kind]
        name = kind.replace(" ", "-") or "exact-match"
        metrics[f"eval/accuracy_{name}"] = mean(chosen, "accuracy")
    return metrics


def mean(records: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([record[name] for record in records]))


class Evaluation(NamedTuple):
    """Metrics over the prompts of all ranks, and this rank's predictions."""

    metrics: dict[str, float]
    predictions: list[Prediction]


def evaluate(
    model: Module, processor: Processor, prompts: Iterable[Prompt], **options: Any
) -> Evaluation:
    """Answer and score the prompts; `options` are those of `predict`.

    `eval/target_attn` is the mass on the target's visual tokens in layer `attn_layer`, in the row
    that emits the first token of the answer where the response first names it (the row of the
    position before that token). A response without an answer counts as 0. `eval/target_attn_l<i>`
    is the same for layer i. `eval/target_attn_own` is for layer `attn_layer` and that token's own
    row, the row that `--attn-row own` uses: the mass on the target as a fraction of the mass on all
    positions but the token itself.
    """
    # A real model takes minutes, and nothing is printed before the first evaluation.
    bar = tqdm(prompts, desc="evaluate", delay=10, leave=False, disable=ranks.rank() != 0)
    with gathered(model):
        predictions = list(predict(model, processor, bar, **options))
    records = ranks.gather([prediction.record for prediction in predictions])
    ranks.require(len(records) > 0, "none of the rows to evaluate on can be used; see --check-data")
    return Evaluation(summarise(records), predictions)


def answer_tokens(tokenizer: Any, ids: list[int], text: str, first_mention: bool) -> range:
    """Indices of the response tokens that spell the answer; empty if there is no answer.

    With `first_mention`, the answer's first occurrence counts. It may be in the thought, which on
    the toy names the answer: the row that predicts it there is the one that looks at the picture.
    Short answers to other questions ("B") occur inside many words, so without `first_mention` only
    the text inside the tags counts.
    """
    answer = extract_answer(text)
    if not answer:
        return range(0)
    start = text.find(answer, 0 if first_mention else text.find("<answer>") + len("<answer>"))

    def reached(t: int) -> int:
        return len(tokenizer.decode(ids[: t + 1]))

    first = bisect_left(range(len(ids)), True, key=lambda t: reached(t) > start)
    last = bisect_left(range(len(ids)), True, key=lambda t: reached(t) >= start + len(answer))
    return range(first, min(last + 1, len(ids)))


# 2. The command line


@dataclass
class Args:
    model: str
    """Checkpoint directory or hub name."""
    data: tuple[str, ...] = ()
    """JSON, JSON lines, Parquet, a directory of a data set, or a hub name, one or several; see
    docs/data.md. Unset: the built-in task."""
    media_root: tuple[str, ...] = ()
    """Folders that the rows' paths are relative to; unset: the data file's own."""
    text_only: bool = False
    """Accept data without images and videos."""
    out: str = f"runs/{Path(__file__).stem}"
    """Directory of predictions, table and pictures; the same command resumes there."""
    overwrite: bool = False
    """Start over and replace the content of OUT."""
    think: bool = True
    """Ask for a thought, then the answer, or for the answer alone. Default: as in the checkpoint's
    training run."""
    frames: tuple[int | None, ...] = (None,)
    """Frames per video, evenly spaced, or at most with --fps; one setting per value. Unset: --fps a
    second, at most 128, as in training; on the toy, as its checkpoint. The paper's sweep: 32, 64
    and 128; it does not say the frames and pixels of its other evaluations."""
    fps: float | None = None
    """Frames per second of video. Unset: 1, or --frames in all."""
    image_tokens: tuple[int | None, ...] = (5120,)
    """Maximum visual tokens of an image, one setting per value. The paper's sweep: 512, 1024 and
    2048."""
    min_image_tokens: int | None = 128
    """Minimum visual tokens of an image, at most --image-tokens: smaller images are enlarged."""
    frame_tokens: tuple[int | None, ...] = (128,)
    """Maximum visual tokens of a pair of video frames, one setting per value."""
    grid: tuple[int | None, ...] = (None,)
    """Toy: cells along each side of the pictures, one setting per value; unset: the
    checkpoint's."""
    toy_order: Literal["question-first", "image-first"] | None = None
    """Toy: which part of the prompt comes first; unset: the checkpoint's."""
    max_prompt_tokens: int | None = 32768
    """Maximum length of a prompt; rows with a longer one are skipped."""
    max_skipped: float = 0.01
    """Stop if more than this fraction of the rows cannot be used."""
    examples: int | None = None
    """Number of rows to evaluate, from the first; unset: all."""
    max_new_tokens: int = 768
    """Maximum length of a response in tokens."""
    accuracy_rule: Literal["by-type", "exact"] = "by-type"
    """How an answer is compared with the solution: by problem type, as in Video-R1, or by exact
    match (paper). Default: as in the checkpoint's training run."""
    attn_layer: int = -1
    """Decoder layer whose attention is drawn, counted from 0, or from the end if negative."""
    gaze: int = 0
    """Number of examples, from the first, on the page `gaze.html` that shows where the model
    looked, for each setting."""
    batch_size: int = 16
    """Prompts decoded together."""
    workers: int = 4
    """Processes that read and encode rows ahead; 0: the evaluating process reads them."""

    def __post_init__(self) -> None:
        for name in ("frames", "image_tokens", "frame_tokens", "grid"):
            values = getattr(self, name)
            option = cli.option(name)
            ranks.require(len(values) > 0, f"{option}: needs a value")
            alone = len(values) == 1 or None not in values
            ranks.require(alone, f"{option} {values}: give numbers, or None alone")
            cli.require_positive(self, name)
        enough = all(grid is None or grid >= 3 for grid in self.grid)
        ranks.require(enough, f"--grid {self.grid}: needs 3 or more")
        cli.check_values(self)
        cli.require_positive(self, "fps", "max_prompt_tokens", "examples", "max_new_tokens")
        cli.require_positive(self, "batch_size", "min_image_tokens")
        cli.require_not_negative(self, "max_skipped", "gaze", "workers")


# Defaults of a toy, in place of those of `Args`.
TOY = {"examples": 512, "batch_size": 64, "workers": 0, "max_new_tokens": 16, "think": False}
TOY |= {"image_tokens": (None,), "min_image_tokens": None, "frame_tokens": (None,)}
TOY |= {"max_prompt_tokens": None}

# The requests to a checkpoint that has no prompt.json: those of the training scripts.
PROMPTS = {
    "think": "Think first, inside <think> </think> tags.",
    "answer": "Give the answer alone inside <answer> </answer> tags.",
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is a number.",
    "regression": "The answer is a number.",
    "OCR": "The answer is the text exactly as shown.",
    "free-form": "The answer is a short text.",
}

# What an evaluation writes.
FILES = "args.json predictions.jsonl skipped*.jsonl table.txt gaze*.html sweep.png"

NAMES = ("frames", "image_tokens", "frame_tokens", "grid")
Setting = tuple[int | None, ...]  # a value of each


def defaults() -> dict[str, Any]:
    """The defaults for the checkpoint that the command line names: `TOY` for a toy, and what the
    checkpoint's own prompt.json says."""
    model, own = cli.given_options().model, {}
    if not model:
        return {}
    processor = load_processor(model)
    if "prompt.json" in processor.files:
        asked = processor.prompt_config
        own = {"think": asked.think, "accuracy_rule": asked.accuracy_rule}
    return {"model": model} | own | toy.defaults(TOY, unset=None)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Read the predictions of an interrupted evaluation, and remove an incomplete last line from
    the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    os.truncate(path, len(content))
    return [json.loads(line) for line in content.splitlines()]


def open_out(args: Args) -> tuple[Path, TextIO]:
    """Open the output directory, new or left by the same command; returns it with its lock.

    Raises:
        UsageError: the directory belongs to something else, is in use by another process, or cannot
            be written.
    """
    out = Path(args.out)
    disk.require_outside(out, args)
    settings = asdict(args)
    for name in ("out", "overwrite", "gaze", "batch_size", "workers", "max_skipped"):
        del settings[name]  # these affect no prediction
    settings["inputs"] = states.fingerprint_inputs(args)
    settings["definitions"] = states.DEFINITIONS
    settings = json.loads(json.dumps(settings))  # JSON turns tuples into lists
    disk.require_kind(out, disk.EVALUATION)
    with disk.writing(out, "the directory"):
        out.mkdir(parents=True, exist_ok=True)
        lock = disk.lock_directory(out)
        disk.require_kind(out, disk.EVALUATION)  # again: nobody else changes it now
        if args.overwrite:
            disk.clear(out, FILES)
        if before := disk.read_record(out):
            differ = [name for name in settings if settings[name] != before.get(name)]
            if differ == ["inputs"]:
                old, new = before.get("inputs") or {}, settings["inputs"]
                differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            different, remedy = ", ".join(differ[:4]), "give another --out, or --overwrite"
            ranks.require(not differ, f"--out {out}: was made with different {different}; {remedy}")
        else:
            disk.write_record(out, disk.EVALUATION, settings)
    return out, lock


def prompts_of(
    args: Args, setting: Setting, processor: Processor, task: toy.Task
) -> tuple[list[str], Callable[[list[int]], Iterable[Prompt]], data.BadRows]:
    """The names of all examples of a setting, a function from example numbers to prompts, and the
    record of bad rows."""
    frames, image_tokens, frame_tokens, grid = setting
    tokens = {"image_tokens": image_tokens, "min_image_tokens": args.min_image_tokens}
    processor = replace(processor, **tokens, frame_tokens=frame_tokens)
    encode = partial(encode_prompt, processor)
    if not args.data:
        task = replace(task, frames=frames or task.frames, grid=grid or task.grid)
        examples = toy.held_out_examples(task, args.examples or 512)
        names = [example.name for example in examples]
        return names, lambda numbers: (encode(examples[n]) for n in numbers), data.BadRows()
    file = DataFile(args.data, args.media_root, frames, args.fps, text_only=args.text_only)
    rows = range(len(file))[: args.examples]
    prompts = Prompts(file, encode, rows, None, args.max_prompt_tokens, 2 * args.gaze)
    bad_rows = data.BadRows(args.max_skipped, len(file))
    names = [file.name(row) for row in rows]
    return names, lambda numbers: Reader(prompts, numbers, args.workers, bad_rows), bad_rows


def table(results: dict[Setting, list[dict[str, Any]]], varied: list[int]) -> str:
    """Accuracy over all rows, by problem type and by source; format rate and response length."""
    lines = []
    for setting, records in results.items():
        label = ", ".join(f"{NAMES[i]} {setting[i]}" for i in varied)
        groups = [("all", records)]
        for field in ("problem_type", "source"):
            values = sorted({record[field] for record in records})
            for value in values if len(values) > 1 or values[0] else []:
                chosen = [record for record in records if record[field] == value]
                name = value or {"problem_type": "no type", "source": "no source"}[field]
                groups.append((name, chosen))
        lines.append(
            f"\n{label or 'held-out':<36}{'rows':>7}{'accuracy':>10}{'format':>8}{'length':>8}"
        )
        for name, group in groups:
            values = [mean(group, what) for what in ("accuracy", "format", "completion_len")]
            numbers = f"{values[0]:>10.3f}{values[1]:>8.3f}{values[2]:>8.1f}"
            name = "".join(c if c.isprintable() else "?" for c in name[:34])
            lines.append(f"{name:<36}{len(group):>7}{numbers}")
        if "target_attn" in records[0]:
            for name, row in (("target_attn", "that emits the answer"), ("target_attn_own", "own")):
                lines.append(f"{f'on target, row {row}':<43}{mean(records, name):>10.3f}")
    return "\n".join(lines)


def main(args: Args) -> dict[str, float]:
    """Evaluate every setting of the sweep; returns the metrics of the last one."""
    one = f"--out {args.out}: is written by one process; start it without torchrun"
    ranks.require(ranks.world_size() == 1, one)
    base = Path(args.model)
    is_toy = toy.Task.load(base) is not None
    ranks.require(not (is_toy and args.data), "--data: the toy knows only its own task")
    for name in () if args.data else ("fps", "media_root", "text_only"):
        ranks.require(not getattr(args, name), f"{cli.option(name)}: needs --data")
    of_toy = args.grid != (None,) or args.toy_order is not None
    ranks.require(not (args.data and of_toy), "--grid, --toy-order: not with --data")
    bounded = {args.image_tokens, (args.min_image_tokens,), args.frame_tokens} != {(None,)}
    sizes = "--image-tokens, --min-image-tokens, --frame-tokens: not for the toy; use --grid"
    ranks.require(not (is_toy and bounded), sizes)
    task = toy.Task.load(base) or toy.Task(order="image-first")
    images_only = is_toy and task.frames is None and args.frames != (None,)
    asked = f"--frames {' '.join(map(str, args.frames))}: {args.model} has learned images only"
    ranks.require(not images_only, f"{asked}; leave it out, or train a toy with sft.py --frames")
    processor = load_processor(args.model)
    require_layer("--attn-layer", args.attn_layer, processor.config)
    config = processor.prompt_config
    if "prompt.json" not in processor.files:
        config = PromptConfig({} if is_toy else PROMPTS, question_first=task.order[:1] == "q")
        if not is_toy:
            print(f"{args.model} has no prompt.json: it is asked as the training scripts ask")
    order = args.toy_order or ("question-first" if config.question_first else "image-first")
    processor.prompt_config = PromptConfig(
        config.prompts, args.think, args.accuracy_rule, order == "question-first"
    )
    sweep = list(product(args.frames, args.image_tokens, args.frame_tokens, args.grid))
    varied = [i for i, values in enumerate(zip(*sweep, strict=True)) if len(set(values)) > 1]
    opened = {setting: prompts_of(args, setting, processor, task) for setting in sweep}
    model = load_model(args.model, frozen=True)
    out, lock = open_out(args)
    results = defaultdict(list)
    for record in read_predictions(out / "predictions.jsonl"):
        results[tuple(record.pop("setting"))].append(record)
    with gathered(model), disk.open_lines(out / "predictions.jsonl") as file:
        for setting, (names, prompts, bad_rows) in opened.items():
            label = "-".join(f"{NAMES[i]}{setting[i]}" for i in varied)
            if args.data:
                bad_rows.attach(disk.open_lines(out / f"skipped{label and f'-{label}'}.jsonl"))
            done = {record["row"] for record in results[setting]}
            bad_rows.read = len(done) + len(bad_rows.bad)
            options = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
            options |= {"attn_layer": args.attn_layer}
            # The examples of the page are answered again after an interruption.
            first, rest = range(len(names))[: args.gaze], range(len(names))[args.gaze :]
            rest = [n for n in rest if names[n] not in done]
            shown = []
            bar = tqdm(total=len(first) + len(rest), desc=label or "evaluate", dynamic_ncols=True)
            for prediction in chain(
                predict(model, processor, prompts(first), gazes=len(first), **options),
                predict(model, processor, prompts(rest), gazes=0, **options),
            ):
                if prediction.record["row"] not in done:
                    disk.append(file, [{"setting": setting} | prediction.record])
                    results[setting].append(prediction.record)
                shown += [prediction] if prediction.gaze else []
                bar.update()
            bar.close()
            if shown:
                page = out / f"gaze{label and f'-{label}'}.html"
                draw_page(page, {label or base.name: shown}, f"{args.model} {label}")
            if bad_rows.file is not None:
                bad_rows.file.close()
            ranks.require(len(results[setting]) > 0, "--data: no row can be used")
    results = {setting: results[setting] for setting in sweep}
    text = table(results, varied)
    with disk.writing(out, "table.txt"):
        disk.write_aside(out / "table.txt", text.strip() + "\n")
    print(text)
    if varied:
        draw_sweep(out / "sweep.png", results, NAMES, varied)
    lock.close()
    print(f"results: {out}")
    return summarise(results[sweep[-1]])


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__, defaults)
