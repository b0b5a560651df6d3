"""Evaluate a checkpoint: accuracy by problem type and by data source, sweeps over frames and pixels
(the paper's Figure 3), and pictures of the model's attention.

    python evaluate.py --model runs/ral_grpo/checkpoint --overlay 8
    python evaluate.py --model DIR_OR_HUB_NAME --data test.json --frames 16 32 64

Each answer adds one line to `predictions.jsonl` in the output directory. After an interruption, the
same command resumes the evaluation, and its averages cover all rows. The first section is the
evaluation that the training scripts call.
"""

import json
import math
import warnings
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from textwrap import fill
from typing import Any, Literal, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

import toy
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
from data import DataFile, Prompts, Reader
from prompts import Example, Processor, Prompt, collate, encode_prompt
from runs import (
    DEFINITIONS,
    Skipped,
    append,
    clear,
    content_of,
    fill_defaults,
    gather,
    lock_directory,
    open_lines,
    rank,
    require,
    require_not_empty,
    require_not_negative,
    require_positive,
    run_script,
    world_size,
    writing,
)

# 1. Evaluation


@dataclass
class Look:
    """One evaluated example.

    `record` is its line of predictions.jsonl. `attention` (N, visual tokens) is the attention in
    the N rows that emit the answer, and `tokens` is the text of their tokens. `grid` is the number
    of temporal patches, and of rows and columns of visual tokens.
    """

    record: dict[str, Any]
    example: Example
    attention: Tensor
    tokens: list[str]
    grid: tuple[int, int, int]


@torch.no_grad()
def judge(
    model: Module,
    processor: Processor,
    prompts: Iterable[Prompt],
    think: bool,
    max_new_tokens: int,
    attn_layer: int = -1,
    batch_size: int = 64,
    reward: str = "by-type",
    looks: int = 6,
) -> Iterator[Look]:
    """Answer every prompt greedily and judge each answer.

    The first `looks` examples keep their pictures and attention. Examples with a known target also
    get the attention mass on it, layer by layer. Both use the rows that emit the answer, which are
    the rows of the positions before each of its tokens, whatever `--attn-row` the run was trained
    with.
    """
    config = model.config
    merge, layers = config.vision_config.spatial_merge_size, config.text_config.num_hidden_layers
    placeholders = torch.tensor([config.image_token_id, config.video_token_id])
    stream, done = iter(prompts), 0
    while chunk := list(islice(stream, batch_size)):
        batch = collate(model, chunk, processor.tokenizer.pad_token_id)
        rollout = generate_group(model, batch, 1, max_new_tokens)
        texts = rollout.texts(processor.tokenizer)
        has_targets = all(prompt.example.target for prompt in chunk)
        wanted = list(range(layers)) if has_targets else [attn_layer % layers]
        # Score only the examples that are measured or drawn; logits are large.
        shown = len(chunk) if has_targets else max(0, looks - done)
        if shown:
            part = rollout[:shown]
            attentions = score(model, part, attn_layers=wanted).attentions
        for row, (prompt, (text,)) in enumerate(zip(chunk, texts, strict=True)):
            ids = rollout.completion_ids[row, 0][rollout.completion_mask[row, 0]].tolist()
            tokens = answer_tokens(processor.tokenizer, ids, text, first_mention=has_targets)
            mass = []
            if row < shown:  # row t of a layer emits token t, row t + 1 is that token's own
                visual = torch.isin(part.prompts.ids[row].cpu(), placeholders).nonzero()[:, 0]
                rows = slice(tokens.start, tokens.stop)
                mass = [layer[row, 0, rows].cpu()[:, visual] for layer in attentions]
            example = prompt.example
            record = {
                "row": example.name,
                "problem_type": example.problem_type,
                "source": example.source,
                "problem": example.problem,
                "solution": example.solution,
                "response": text,
                "accuracy": accuracy(text, example, reward),
                "format": has_format(text, think) and not bool(rollout.truncated[row, 0]),
                "completion_len": len(ids),
            }
            if has_targets:
                # Mass in the row that emits the first token of the answer; 0 without an answer.
                target = list(example.target)
                on_target = [layer[:1, target].sum().item() for layer in mass]
                record |= {"target_attn": on_target[attn_layer]}
                record |= {f"target_attn_l{i}": value for i, value in enumerate(on_target)}
                own_mass = 0.0
                if tokens:  # in that token's own row, relative to the mass on all other tokens
                    own = attentions[attn_layer][row, 0, tokens.start + 1].cpu()
                    own[part.prompts.ids.shape[1] + tokens.start] = 0.0
                    own_mass = (own[visual[target]].sum() / own.sum().clamp_min(1e-9)).item()
                record |= {"target_attn_own": own_mass}
            t, h, w = prompt.grid.tolist()
            gaze, kept = torch.zeros(0, 0), done < looks and bool(example.media)
            if kept:
                gaze = mass[attn_layer if has_targets else 0]
            said = [processor.tokenizer.decode([ids[i]]).strip() for i in tokens]
            example = example if kept else replace(example, media=[])
            yield Look(record, example, gaze, said, (t, h // merge, w // merge))
            done += 1


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over all records and, if there are several problem types, the accuracy of each."""
    numeric = ("accuracy", "format", "completion_len")
    names = [name for name in records[0] if name in numeric or name.startswith("target_attn")]
    metrics = {f"eval/{name}": mean(records, name) for name in names}
    kinds = sorted({record["problem_type"] for record in records})
    for kind in kinds if len(kinds) > 1 else []:
        chosen = [record for record in records if record["problem_type"] == kind]
        metrics[f"eval/accuracy_{kind.replace(' ', '-')}"] = mean(chosen, "accuracy")
    return metrics


def mean(records: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([record[name] for record in records]))


def evaluate(
    model: Module, processor: Processor, prompts: Iterable[Prompt], **options: Any
) -> tuple[dict[str, float], list[Look]]:
    """Metrics over the prompts of all ranks, and this rank's results of `judge`, which takes
    `options`.

    `eval/target_attn` is the mass on the target's visual tokens in layer `attn_layer`, in the row
    that emits the first token of the answer where the response first names it (the row of the
    position before that token). A response without an answer counts as 0. `eval/target_attn_l<i>`
    is the same for layer i. `eval/target_attn_own` is for layer `attn_layer` and that token's own
    row, the row that `--attn-row own` uses: the mass on the target as a fraction of the mass on all
    positions but the token itself.
    """
    # A real model takes minutes, and nothing is printed before the first evaluation.
    bar = tqdm(prompts, desc="evaluate", delay=10, leave=False, disable=rank() != 0)
    with gathered(model):
        looks = list(judge(model, processor, bar, **options))
    records = gather([look.record for look in looks])
    require(len(records) > 0, "none of the rows to evaluate on can be used; see --check-data")
    return summarise(records), looks


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


# 2. Pictures


def draw_gaze(axis: Any, look: Look, attention: Tensor) -> None:
    """Draw the picture or video of `look` with one row of attention over visual tokens.

    A brighter cell has more attention mass (averaged over heads), and a box marks the target. A
    video is shown as a mosaic of its temporal patches in reading order, with the first frame of
    each. Without an answer there is no attention to show, and nothing is dimmed.
    """
    from matplotlib.patches import Rectangle

    t, h, w = look.grid
    frames = look.example.media[:: 2 if look.example.is_video else 1][:t]
    width, height = frames[0].size
    columns = math.ceil(math.sqrt(t))
    heat = attention.view(t, h, w).numpy()
    for patch, frame in enumerate(frames):
        left, top = patch % columns * width * 1.05, patch // columns * height * 1.05
        extent = (left, left + width, top + height, top)
        axis.imshow(np.asarray(frame.convert("RGB")), extent=extent)
        if heat.max() > 0:
            dim = np.zeros((h, w, 4))
            dim[..., 3] = 0.85 * (1 - heat[patch] / heat.max())
            axis.imshow(dim, extent=extent, interpolation="nearest")
        for token in look.example.target:
            if token // (h * w) == patch:
                row, column = divmod(token % (h * w), w)
                corner = (left + column * width / w, top + row * height / h)
                box = (corner, width / w, height / h)
                axis.add_patch(Rectangle(*box, fill=False, edgecolor="magenta", lw=2))
    right = (columns * 1.05 - 0.05) * width
    bottom = (math.ceil(t / columns) * 1.05 - 0.05) * height
    axis.set(xlim=(0, right), ylim=(bottom, 0), xticks=[], yticks=[])


def verdict(look: Look) -> tuple[str, str]:
    """Title and colour of a picture."""
    value = look.record["accuracy"]
    said = (extract_answer(look.record["response"]) or "no answer")[:16]
    if 0 < value < 1:
        return f"{value:.2f}: {said}", "darkorange"
    return (f"right: {said}", "green") if value else (f"WRONG: {said}", "red")


def draw_looks(path: Path, rows: dict[str, list[Look]], count: int = 6) -> None:
    """Draw the attention of the model's answers: one row of held-out examples for each entry of
    `rows`; see `draw_gaze`."""
    pyplot = load_pyplot()
    rows = {label: [x for x in looks if x.example.media] for label, looks in rows.items()}
    count = min([count, *map(len, rows.values())])
    if count == 0:  # none of this rank's rows could be read
        return
    size = (2.3 * count, 2.9 * len(rows) + 0.4)  # the last for the title
    figure, axes = pyplot.subplots(len(rows), count, figsize=size, squeeze=False)
    for (label, looks), line in zip(rows.items(), axes, strict=True):
        for look, axis in zip(looks[:count], line, strict=True):
            blank = torch.zeros(math.prod(look.grid))
            attention = look.attention[0] if len(look.attention) else blank
            draw_gaze(axis, look, attention)
            title, colour = verdict(look)
            if look.example.target:
                title += f"\nmass on target {attention[list(look.example.target)].sum():.2f}"
            axis.set_title(title, color=colour, fontsize=9)
            axis.set_xlabel(look.example.problem[:32], fontsize=8)
        line[0].set_ylabel(label, fontsize=10)
    figure.suptitle("attention in the row that emits the answer", fontsize=10)
    figure.tight_layout()
    with writing(path.parent, path.name):
        figure.savefig(path, dpi=80)
    pyplot.close(figure)


def draw_overlay(path: Path, look: Look, most: int = 12) -> None:
    """Draw the attention of each token of the model's answer, beside the question and response."""
    pyplot = load_pyplot()
    rows = list(zip(look.tokens, look.attention, strict=True))[:most]
    rows = rows or [("no answer", torch.zeros(math.prod(look.grid)))]
    figure, axes = pyplot.subplots(1, len(rows) + 1, figsize=(3.6 * (len(rows) + 1), 4))
    for (token, attention), axis in zip(rows, axes[1:], strict=True):
        draw_gaze(axis, look, attention)
        title = f"row that emits {token!r}: mass on the picture {attention.sum():.2f}"
        axis.set_title(title, fontsize=9)
    record, (title, colour) = look.record, verdict(look)
    lines = [record["problem"], f"response: {record['response']}"]
    lines = [*lines, f"solution: {record['solution']}"]
    text = "\n\n".join(fill(line[:600], 44) for line in lines)
    axes[0].text(0, 1, text, va="top", fontsize=8, transform=axes[0].transAxes)
    axes[0].set_title(title, color=colour, fontsize=10)
    axes[0].axis("off")
    figure.tight_layout()
    with writing(path.parent, path.name):
        figure.savefig(path, dpi=80)
    pyplot.close(figure)


def draw_curves(path: Path, metrics: Path, names: Sequence[str]) -> None:
    """Draw the named metrics of a run's `metrics.jsonl` against the step, one panel each."""
    pyplot = load_pyplot()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = [name for name in names if any(name in line for line in lines)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), squeeze=False)
    for name, axis in zip(names, axes[0], strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(
            *zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3
        )
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with writing(path.parent, path.name):
        figure.savefig(path, dpi=80)
    pyplot.close(figure)


def load_pyplot() -> Any:
    """Import pyplot, set to draw to files. The import is slow, so callers do it on demand."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # text may contain dollar signs
    warnings.filterwarnings("ignore", message="Glyph")  # and any other character
    from matplotlib import pyplot

    return pyplot


# 3. The command line

# Fields that are None take their values from one of these tables: the toy's or a real model's.
TOY = {"examples": 512, "batch_size": 64, "workers": 0}
TOY |= {"max_pixels": (None,), "frame_pixels": (None,)}
REAL = {"batch_size": 16, "workers": 4, "max_prompt_tokens": 32768}
REAL |= {"max_pixels": (256 * 28 * 28,), "frame_pixels": (256 * 28 * 28,)}
NEW_TOKENS = {"toy": {False: 16, True: 64}, "real": {False: 768, True: 768}}  # direct, thinking


@dataclass
class Args:
    model: str
    """Checkpoint directory or hub name."""
    data: str | None = None
    """JSON or JSON lines file with Video-R1's fields, see data.py; unset: the built-in task."""
    media_root: tuple[str, ...] = ()
    """Folders that the rows' paths are relative to; unset: the data file's own."""
    out: str = f"runs/{Path(__file__).stem}"
    """Directory of predictions, table and pictures; the same command resumes there."""
    overwrite: bool = False
    """Start over and replace the content of OUT."""
    think: bool | None = None
    """`--think`: a thought, then the answer; `--no-think`: the answer alone. Unset: as in the run
    that wrote the checkpoint, or with a thought."""
    frames: tuple[int | None, ...] = (None,)
    """Frames per video, one setting per value; unset: 16, on the toy those of its checkpoint."""
    fps: float | None = None
    """Frames per second of each video instead, with --frames as the maximum."""
    max_pixels: tuple[int, ...] | None = None
    """Maximum pixels of an image, one setting per value; a visual token covers 28 x 28. Real: 256
    tokens."""
    frame_pixels: tuple[int, ...] | None = None
    """Maximum pixels of a video frame, one setting per value; two frames share their tokens. Real:
    256 tokens."""
    grid: tuple[int | None, ...] = (None,)
    """Toy: cells along each side of the pictures, one setting per value; unset: the
    checkpoint's."""
    toy_order: Literal["question-first", "image-first"] | None = None
    """Toy: which part of the prompt comes first; unset: the checkpoint's."""
    max_prompt_tokens: int | None = None
    """Maximum length of a prompt; rows with a longer one are skipped. Real: 32768."""
    max_skipped: float = 0.01
    """Stop if more than this fraction of the rows cannot be used."""
    examples: int | None = None
    """Number of rows to evaluate, from the first; unset: all. Toy: 512."""
    max_new_tokens: int | None = None
    """Maximum length of a response in tokens. Toy: 16, or 64 with a thought. Real: 768."""
    reward: Literal["by-type", "exact"] = "by-type"
    """Accuracy by the example's problem type, as in Video-R1, or by exact match. Paper: exact."""
    attn_layer: int = -1
    """Decoder layer whose attention is drawn, counted from 0, or from the end if negative."""
    overlay: int = 0
    """Number of examples whose attention is drawn, for each setting."""
    batch_size: int | None = None
    """Prompts decoded together. Toy: 64. Real: 16."""
    workers: int | None = None
    """Processes that read and encode rows ahead. Toy: 0. Real: 4."""

    def __post_init__(self) -> None:
        for name in ("frames", "max_pixels", "frame_pixels", "grid"):
            values = getattr(self, name)
            if values is None:
                continue
            option = f"--{name.replace('_', '-')}"
            require(len(values) > 0, f"{option}: needs a value")
            require(all(v is None or v > 0 for v in values), f"{option} {values}: must be above 0")
        enough = all(grid is None or grid >= 3 for grid in self.grid)
        require(enough, f"--grid {self.grid}: needs 3 or more")
        require_not_empty(self, "model", "data", "out")
        require_positive(self, "fps", "max_prompt_tokens", "examples", "max_new_tokens")
        require_positive(self, "batch_size")
        require_not_negative(self, "max_skipped", "overlay")


# The wording of a question, as in the training scripts.

DIRECT = "Give the answer alone inside <answer> </answer> tags."
THINK = f"Think first, inside <think> </think> tags. {DIRECT}"
ANSWER = {  # the requested answer, by problem type
    "multiple choice": "The answer is the letter of one option.",
    "numerical": "The answer is a number.",
    "regression": "The answer is a number.",
    "OCR": "The answer is the text exactly as shown.",
    "free-form": "The answer is a short text.",
}


def ask(example: Example, think: bool) -> str:
    """The user's text beside the image or video: question, options and instructions."""
    options = ["Options:", *example.options] if example.options else []
    request = f"{THINK if think else DIRECT} {ANSWER.get(example.problem_type, '')}"
    return "\n".join([example.problem, *options, request.strip()])


def encode(
    example: Example, processor: Processor, config: Any, think: bool, task: toy.Task, is_toy: bool
) -> Prompt:
    """The prompt of an example. For a toy it is the bare question: a toy knows only its words."""
    text = example.problem if is_toy else ask(example, think)
    return encode_prompt(processor, config, example, text, task.order == "question-first")


Setting = tuple[
    int | None, int | None, int | None, int | None
]  # frames, max_pixels, frame_pixels, grid
NAMES = ("frames", "max_pixels", "frame_pixels", "grid")


def asks_to_think(model: Path) -> bool:
    """Whether the run that wrote this checkpoint asked for a thought; True if no run is found."""
    file = model.resolve().parent / "args.json"
    args = json.loads(file.read_text()) if file.is_file() else {}
    return not isinstance(args, dict) or args.get("think") is not False


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Read the predictions of an interrupted evaluation, and remove an incomplete last line from
    the file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if len(whole) < len(lines):
        path.write_bytes(b"".join(whole))
    return [json.loads(line) for line in whole]


def open_out(args: Args) -> tuple[Path, TextIO]:
    """Open the output directory, new or left by the same command; returns it with its lock.

    Raises:
        UsageError: the directory belongs to something else, is in use by another process, or cannot
            be written.
    """
    out, file = Path(args.out), Path(args.out) / "args.json"
    trained = (out / "metrics.jsonl").exists() or (out / "checkpoint").exists()
    holds = out.resolve() in (Path(args.model).resolve(), *Path(args.model).resolve().parents)
    require(not trained and not holds, f"--out {out}: holds a training run; choose another")
    mathematics = asdict(args)
    for name in ("out", "overwrite", "overlay", "batch_size", "workers", "max_skipped"):
        del mathematics[name]  # these affect no prediction
    inputs = [Path(args.data)] if args.data else []
    inputs += sorted(Path(args.model).glob("*.safetensors"))
    stats = {str(path): path.stat() for path in inputs}
    mathematics["inputs"] = {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}
    mathematics["definitions"] = DEFINITIONS
    mathematics = json.loads(json.dumps(mathematics))  # JSON turns tuples into lists
    busy = out.is_file() or (not file.exists() and bool(content_of(out)))
    require(not busy, f"--out {out}: exists and is no evaluation; choose another")
    with writing(out, "the directory"):
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(out)
        if args.overwrite:
            clear(out)
        if file.exists():
            before = json.loads(file.read_text())
            differ = [name for name in mathematics if mathematics[name] != before.get(name)]
            remedy = "give another --out, or --overwrite"
            require(not differ, f"--out {out}: was made with another {', '.join(differ)}; {remedy}")
        else:
            aside = out.with_name(f"{out.name}.args")
            aside.write_text(json.dumps(mathematics, indent=2) + "\n")
            aside.rename(file)
    return out, lock


def prompts_of(
    args: Args, setting: Setting, processor: Processor, config: Any, task: toy.Task, is_toy: bool
) -> tuple[list[str], Callable[[list[int]], Iterable[Prompt]], Skipped]:
    """The names of all examples of a setting, a function from example numbers to prompts, and the
    record of bad rows."""
    frames, max_pixels, frame_pixels, grid = setting
    processor = replace(processor, max_pixels=max_pixels, frame_pixels=frame_pixels)
    turn = partial(encode, processor=processor, config=config, think=args.think)
    turn = partial(turn, task=task, is_toy=is_toy)
    if args.data is None:
        task = replace(task, frames=frames or task.frames, grid=grid or task.grid)
        examples = toy.held_out_examples(task, args.examples or 512)
        names = [example.name for example in examples]
        return names, lambda numbers: (turn(examples[n]) for n in numbers), Skipped()
    frames = frames or (None if args.fps else 16)
    file = DataFile(args.data, args.media_root, frames, args.fps)
    rows = range(len(file))[: args.examples]
    prompts = Prompts(file, turn, rows, None, args.max_prompt_tokens, keep_media=2 * args.overlay)
    skipped = Skipped(args.max_skipped, len(file))
    names = [file.name(row) for row in rows]
    return names, lambda numbers: Reader(prompts, numbers, args.workers, skipped), skipped


def table(results: dict[Setting, list[dict[str, Any]]], varied: list[int]) -> str:
    """Accuracy over all rows, by problem type and by source; format rate and response length."""
    lines = []
    for setting, records in results.items():
        label = ", ".join(f"{NAMES[i]} {setting[i]}" for i in varied)
        groups = [("all", records)]
        for field in ("problem_type", "source"):
            for value in sorted({record[field] for record in records} - {""}):
                groups.append((value, [record for record in records if record[field] == value]))
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


def draw_sweep(path: Path, results: dict[Setting, list[dict[str, Any]]], varied: list[int]) -> None:
    """Plot accuracy with its standard error against the first varied argument, with one line per
    combination of the others."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(5, 3.6))
    lines = defaultdict(list)
    for setting, records in results.items():
        rest = ", ".join(f"{NAMES[i]} {setting[i]}" for i in varied[1:])
        error = np.std([record["accuracy"] for record in records]) / math.sqrt(len(records))
        lines[rest].append((setting[varied[0]], mean(records, "accuracy"), error))
    for label, points in lines.items():
        x, y, error = zip(*sorted(points), strict=True)
        axis.errorbar(x, y, error, marker="o", capsize=3, label=label)
    axis.set(xlabel=NAMES[varied[0]], ylabel="accuracy")
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=8)
    figure.tight_layout()
    with writing(path.parent, path.name):
        figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(args: Args) -> dict[str, float]:
    """Evaluate every setting of the sweep; returns the metrics of the last one."""
    one = f"--out {args.out}: is written by one process; start it without torchrun"
    require(world_size() == 1, one)
    base = Path(args.model)
    is_toy = toy.Task.load(base) is not None
    require(not (is_toy and args.data), f"--data {args.data}: the toy knows only its own task")
    for name in () if args.data else ("fps", "media_root"):
        require(not getattr(args, name), f"--{name.replace('_', '-')}: needs --data")
    of_toy = args.grid != (None,) or args.toy_order is not None
    require(not (args.data and of_toy), "--grid, --toy-order: not with --data")
    bounded = args.max_pixels is not None or args.frame_pixels is not None
    require(not (is_toy and bounded), "--max-pixels, --frame-pixels: not for the toy; use --grid")
    task = toy.Task.load(base) or toy.Task(order="image-first")
    images_only = is_toy and task.frames is None and args.frames != (None,)
    asked = f"--frames {' '.join(map(str, args.frames))}: {args.model} has learned images only"
    require(not images_only, f"{asked}; leave it out, or train a toy with sft.py --frames")
    task = replace(task, order=args.toy_order or task.order)
    args = fill_defaults(args, {"think": task.think if is_toy else asks_to_think(base)})
    args = fill_defaults(args, TOY if is_toy else REAL)
    new_tokens = NEW_TOKENS["toy" if is_toy else "real"][args.think]
    args = fill_defaults(args, {"max_new_tokens": new_tokens})
    config, processor = load_processor(args.model)
    require_layer("--attn-layer", args.attn_layer, config)
    sweep = list(product(args.frames, args.max_pixels, args.frame_pixels, args.grid))
    varied = [i for i, values in enumerate(zip(*sweep, strict=True)) if len(set(values)) > 1]
    opened = {s: prompts_of(args, s, processor, config, task, is_toy) for s in sweep}
    model = load_model(args.model, frozen=True)[0]
    out, lock = open_out(args)
    results = defaultdict(list)
    for record in read_predictions(out / "predictions.jsonl"):
        results[tuple(record.pop("setting"))].append(record)
    with gathered(model), open_lines(out / "predictions.jsonl") as file:
        for setting, (names, prompts, skipped) in opened.items():
            label = "-".join(f"{NAMES[i]}{setting[i]}" for i in varied)
            if args.data:
                skipped.attach(open_lines(out / f"skipped{label and f'-{label}'}.jsonl"))
            done = {record["row"] for record in results[setting]}
            skipped.read = len(done) + len(skipped.bad)
            todo = [n for n, name in enumerate(names) if name not in done]
            looks = max(0, args.overlay - len(done))
            options = {"think": args.think, "max_new_tokens": args.max_new_tokens, "looks": looks}
            options |= {"attn_layer": args.attn_layer, "reward": args.reward}
            bar = tqdm(total=len(todo), desc=label or "evaluate", dynamic_ncols=True)
            for look in judge(
                model, processor, prompts(todo), batch_size=args.batch_size, **options
            ):
                append(file, [{"setting": setting} | look.record])
                results[setting].append(look.record)
                if look.example.media and len(results[setting]) <= args.overlay:
                    number = f"{len(results[setting]):03}"
                    draw_overlay(out / f"overlay{label and f'-{label}'}-{number}.png", look)
                bar.update()
            bar.close()
            require(len(results[setting]) > 0, f"--data {args.data}: no row can be used")
    results = {setting: results[setting] for setting in sweep}
    text = table(results, varied)
    with writing(out, "table.txt"):
        (out / "table.txt").write_text(text.strip() + "\n")
    print(text)
    if varied:
        draw_sweep(out / "sweep.png", results, varied)
    lock.close()
    print(f"results: {out}")
    return summarise(results[sweep[-1]])


if __name__ == "__main__":
    run_script(Args, main, __doc__)
