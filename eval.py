"""Evaluate a checkpoint: accuracy by problem type and by data source, the paper's benchmarks,
sweeps over frames and visual tokens (its Figure 3), and pictures of the model's attention.

    python eval.py --model runs/ral_grpo/checkpoint --gaze 20
    python eval.py --model DIR_OR_HUB_NAME --data test.json --frames 16 32 64
    torchrun --nproc_per_node=8 eval.py --model DIR_OR_HUB_NAME --benchmark all --benchmark-root DIR
    python eval.py --compare OUT1 OUT2 --out runs/compared

Each answer adds one line to `predictions.jsonl` in the output directory. After an interruption, the
same command resumes the evaluation, and its averages cover all rows. Ranks share the rows; any
number of them gives the same result. The first section is the evaluation that the training scripts
call.
"""

import support.startup  # first: it sets Ctrl-C and the allocator of PyTorch

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from common import accuracy, gathered, generate_group, has_format, load_model, require_layer, score
from support import answers, cli, data, disk, ranks, results, toy
from support.benchmarks import BENCHMARKS, GROUPS, BenchmarkFile, chosen
from support.checkpoints import load_processor
from support.datafiles import DataFile
from support.grounding import fourfold, look
from support.memory import DECODED, require_evaluation_fits
from support.pictures import Prediction, draw_page, make_gaze
from support.prompts import Example, Processor, Prompt, PromptConfig, collate, encode_prompt
from support.results import NAMES, Records, Setting

# 1. Evaluation

FEW_LAYERS = 4  # a model with at most so many is measured in every layer: a toy
GENERIC = "Write a general description of the image."  # as in arXiv 2502.17422


@torch.no_grad()
def predict(
    model: nn.Module,
    processor: Processor,
    prompts: Iterable[Prompt],
    max_new_tokens: int,
    batch_size: int = 64,
    batch_tokens: int = DECODED,
    attn_layer: int = -1,
    gazes: int = 6,
    bare: bool = False,
    metric: Callable[[str | None, Example], float] | None = None,
    relative: bool = False,
) -> Iterator[Prediction]:
    """Answer every prompt greedily and score each answer: in tags or, if the question was asked
    `bare`, the whole response. A benchmark has a `metric` of its own.

    The first `gazes` examples keep their media and attention. Examples with boxes also get the
    measures of `grounding.look` in layer `attn_layer` and, if the model has at most `FEW_LAYERS`,
    `target_attn` in every layer. The row that predicts the first token of the answer is that of the
    position before it, whatever `--attn-row` the run was trained with.

    With `relative`, `target_attn_generic` is the mass on the target in the row that begins the
    answer to a request that is not about it, `GENERIC`, on the same media: some visual tokens get
    much attention whatever is asked (arXiv 2502.17422).
    """
    tokenizer, layers = processor.tokenizer, model.config.text_config.num_hidden_layers
    attn_layer %= layers
    done = 0
    for chunk in decoded_together(prompts, batch_size, batch_tokens, max_new_tokens):
        batch = collate(model, chunk, tokenizer.pad_token_id)
        rollout = generate_group(model, batch, 1, max_new_tokens)
        texts = rollout.texts(processor)
        has_targets = any(prompt.target for prompt in chunk)
        # Score only the examples that are measured or drawn; logits are large.
        scored = len(chunk) if has_targets else min(len(chunk), max(0, gazes - done))
        every = has_targets and layers <= FEW_LAYERS
        wanted = range(layers) if every else [attn_layer]
        if scored:
            part = rollout[:scored]
            found = score(model, part, attn_layers=wanted).attentions
            found = {layer: x[:, 0].cpu() for layer, x in found.items()}
        if relative and has_targets:
            generic = generic_masses(model, processor, chunk, attn_layer)
        for row, (prompt, (text,)) in enumerate(zip(chunk, texts, strict=True)):
            ids = rollout.response_ids[row, 0][rollout.response_mask[row, 0]].tolist()
            truncated = bool(rollout.truncated[row, 0])
            record, answer = record_of(
                processor, prompt.example, text, ids, truncated, bare, metric
            )
            gaze, n = None, len(ids)
            if row < scored:  # row t of a layer predicts token t, row t + 1 is that token's own
                rows = {layer: x[row] for layer, x in found.items()}
                patches = part.prompts.patches[row]
            if done < gazes and all(hasattr(medium, "frames") for medium in prompt.example.media):
                unpadded = slice(len(patches) - len(prompt.ids), len(patches) + n)
                kept = {layer: x[: n + 1, unpadded].clone() for layer, x in rows.items()}
                gaze = make_gaze(prompt, ids, tokenizer, kept)
            if prompt.target:
                visual = (patches >= 0).nonzero()[:, 0]
                start = answer.start if answer else None
                looks = {k: look(x, n, start, visual, prompt.target) for k, x in rows.items()}
                record |= looks[attn_layer]
                if every:
                    record |= {f"target_attn_l{k}": x["target_attn"] for k, x in looks.items()}
                if relative:
                    record["target_attn_generic"] = generic[row]
            yield Prediction(record, gaze, answer, attn_layer)
            done += 1


def record_of(
    processor: Processor,
    example: Example,
    text: str,
    ids: list[int],
    truncated: bool,
    bare: bool,
    metric: Callable[[str | None, Example], float] | None,
) -> tuple[dict[str, Any], range]:
    """The record of a response, and the indices of the tokens that spell its answer; `bare` and
    `metric` are those of `predict`."""
    tokenizer, asked = processor.tokenizer, processor.prompt_config
    said, judged = text.removeprefix(processor.response_prefix), text
    answer = answer_tokens(tokenizer, ids, said, first_mention=not asked.prompts)
    if bare and "<answer>" not in text:  # the whole response, without its EOS
        answer, judged = range(len(ids) - (not truncated)), f"<answer>{text}</answer>"
    record = {
        "row": example.name,
        "problem_type": example.problem_type,
        "source": example.source,
        "problem": example.problem,
        "solution": example.solution,
        "response": text,
        "accuracy": accuracy(judged, example, asked.accuracy_rule),
        "format": has_format(judged, asked.think) and not truncated,
        "completion_len": len(ids),
    }
    if metric is not None:
        record["score"] = metric(answers.extract_answer(judged), example)
        record["question_id"] = example.extra.get("question_id")
    return record, answer


def decoded_together(
    prompts: Iterable[Prompt], batch_size: int, batch_tokens: int, max_new_tokens: int
) -> Iterator[list[Prompt]]:
    """The prompts in order, in batches of at most `batch_size` that, padded, have at most
    `batch_tokens` positions with their responses; a longer prompt is alone. The batches do not
    depend on the memory of a machine."""
    chunk, longest = [], 0
    for prompt in prompts:
        longest = max(longest, len(prompt.ids))
        positions = (len(chunk) + 1) * (longest + max_new_tokens)
        if chunk and (len(chunk) == batch_size or positions > batch_tokens):
            yield chunk
            chunk, longest = [], len(prompt.ids)
        chunk.append(prompt)
    if chunk:
        yield chunk


def generic_masses(
    model: nn.Module, processor: Processor, prompts: list[Prompt], attn_layer: int
) -> dict[int, float]:
    """By its place in `prompts`, which must have their media, the `target_attn_generic` of each
    prompt with a target."""
    problem = GENERIC if processor.prompt_config.prompts else "list all"  # in the toy's words
    other = {"problem": problem, "problem_type": "", "options": ()}
    asked = {
        row: encode_prompt(processor, replace(prompt.example, **other))
        for row, prompt in enumerate(prompts)
        if prompt.target
    }
    batch = collate(model, [*asked.values()], processor.tokenizer.pad_token_id)
    rollout = generate_group(model, batch, 1, 1)
    rows = score(model, rollout, attn_layers=[attn_layer]).attentions[attn_layer][:, 0, 0].cpu()
    masses = {}
    for (row, prompt), attention, patches in zip(asked.items(), rows, batch.patches, strict=True):
        visual = (patches >= 0).nonzero()[:, 0]
        masses[row] = attention[visual[list(prompt.target)]].sum().item()
    return masses


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the records that have a number, the shares of `grounding.fourfold` and, if there
    are several problem types, the accuracy of each."""
    numeric = ("accuracy", "format", "completion_len", "answered", "vision_attn", "pointing")
    found = dict.fromkeys(name for record in records for name in record)
    names = [name for name in found if name in numeric or name.startswith("target_")]
    metrics = {f"eval/{name}": results.mean(records, name) for name in names}
    metrics |= {f"eval/{name}": share for name, share in fourfold(records).items()}
    kinds = sorted({record["problem_type"] for record in records})
    for kind in kinds if len(kinds) > 1 else []:
        chosen = [record for record in records if record["problem_type"] == kind]
        name = kind.replace(" ", "-") or "exact-match"
        metrics[f"eval/accuracy_{name}"] = results.mean(chosen, "accuracy")
    return metrics


class Evaluation(NamedTuple):
    """Metrics over the prompts of all ranks, and this rank's predictions."""

    metrics: dict[str, float]
    predictions: list[Prediction]


def evaluate(
    model: nn.Module, processor: Processor, prompts: Iterable[Prompt], **options: Any
) -> Evaluation:
    """Answer and score the prompts; `options` are those of `predict`.

    `eval/target_attn` and the other measures of `grounding.look` are means over the rows with boxes
    in layer `attn_layer`; a response without an answer counts as 0, and `eval/answered` is the
    share of the others. `eval/target_attn_l<i>` is `target_attn` of layer i.
    """
    # A real model takes minutes, and nothing is printed before the first evaluation.
    bar = tqdm(prompts, desc="evaluate", delay=10, leave=False, disable=ranks.rank() != 0)
    began = time.perf_counter()
    with gathered(model):
        predictions = list(predict(model, processor, bar, **options))
    records = ranks.gather([prediction.record for prediction in predictions])
    ranks.require(len(records) > 0, "none of the rows to evaluate on can be used; see --check-data")
    metrics = summarise(records) | {"perf/eval_s": time.perf_counter() - began}
    return Evaluation(metrics, predictions)


def answer_tokens(tokenizer: Any, ids: list[int], text: str, first_mention: bool) -> range:
    """Indices of the response tokens that spell the answer; empty if there is no answer.

    With `first_mention`, as on the toy, the answer's first occurrence counts. It may be in the
    thought: there, the row that predicts it is the one that looks at the picture. Answers to other
    questions ("B", "2") also occur where they mean something else, so without `first_mention` only
    the text inside the tags counts.
    """
    answer = answers.extract_answer(text)
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
    model: str | None = None
    """Checkpoint directory or hub name."""
    benchmark: tuple[str, ...] = ()
    """The paper's benchmarks, by name: `images`, `videos`, `all`, or some of vstar, mmmu_pro, mme,
    muirbench, chartqa, vizwiz, blink, cv_bench, longvideobench, nextqa, videomme, videommmu,
    lvbench, mvbench, tempcompass."""
    benchmark_root: str | None = None
    """Folder with a folder owner--name for each benchmark, as it is downloaded, its videos
    unpacked. Unset, and for the benchmarks that are not there: the hub."""
    bare: bool = False
    """Ask for the answer in a benchmark's own words, without tags, and judge the whole response:
    for a base model."""
    compare: tuple[str, ...] = ()
    """Output directories of evaluations to set side by side in OUT, with the paper's numbers."""
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
    """Ask for a thought, then the answer, or for the answer alone. A checkpoint of a training run
    is by default asked as in that run."""
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
    match (paper). A checkpoint of a training run is by default judged as in that run."""
    attn_layer: int = -1
    """Decoder layer whose attention is drawn and, for rows with boxes, measured; counted from 0, or
    from the end if negative."""
    relative: bool = False
    """For rows with boxes, also measure the attention on them when the question is a general one,
    with one more pass."""
    gaze: int = 0
    """Number of examples, from the first, on the page `gaze.html` that shows where the model
    looked, for each setting."""
    batch_size: int = 16
    """Maximum number of prompts decoded together."""
    batch_tokens: int = DECODED
    """Maximum number of positions decoded together, padding and responses included; a longer prompt
    is alone. Raise it on a GPU with room."""
    workers: int = 4
    """Processes that read and encode rows ahead; 0: the evaluating process reads them."""

    def __post_init__(self) -> None:
        cli.check_values(self)
        for name in ("frames", "image_tokens", "frame_tokens", "grid"):
            values = getattr(self, name)
            option = cli.option(name)
            ranks.require(len(values) > 0, f"{option}: needs a value")
            alone = len(values) == 1 or None not in values
            ranks.require(alone, f"{option} {values}: give numbers, or None alone")
        positive = "frames image_tokens min_image_tokens frame_tokens max_prompt_tokens grid fps"
        positive += " examples max_new_tokens batch_size batch_tokens"
        cli.require_positive(self, *positive.split())
        cli.require_not_negative(self, "max_skipped", "gaze", "workers")
        unknown = [x for x in self.benchmark if x not in (*GROUPS, *BENCHMARKS)]
        known = ", ".join((*GROUPS, *BENCHMARKS))
        ranks.require(not unknown, f"--benchmark {' '.join(unknown)}: known are {known}")
        one = sum(map(bool, (self.data, self.benchmark, self.compare))) < 2
        ranks.require(one, "--data, --benchmark, --compare: give one of them")
        names = ("media_root", "text_only") if self.benchmark else ("benchmark_root", "bare")
        for name in names:
            wrong = "not with" if self.benchmark else "needs"
            ranks.require(not getattr(self, name), f"{cli.option(name)}: {wrong} --benchmark")
        ranks.require(bool(self.model or self.compare), "--model: is missing; give a checkpoint")
        enough = all(grid is None or grid >= 3 for grid in self.grid)
        ranks.require(enough, f"--grid {self.grid}: needs 3 or more")


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


def open_processor(args: Args, task: toy.Task | None) -> Processor:
    """The checkpoint's processor, which asks as its training script did, or as the arguments
    say."""
    processor = load_processor(args.model)
    require_layer("--attn-layer", args.attn_layer, processor.config)
    config = processor.prompt_config
    if "prompt.json" not in processor.files:
        config = task.prompt_config() if task else PromptConfig(PROMPTS)
        if not task and not args.bare:
            known = f"{args.model} has no prompt.json"
            ranks.print_on_rank_0(f"{known}: it is asked as the training scripts ask")
    first = args.toy_order == "question-first" if args.toy_order else config.question_first
    asked = PromptConfig(config.prompts, args.think, args.accuracy_rule, first)
    return replace(processor, prompt_config=asked)


@dataclass
class Rows:
    """The rows of a setting: their names, their reader, and how they are asked."""

    names: list[str]
    reader: data.Reader
    processor: Processor


def check_settings(args: Args, processor: Processor, is_toy: bool) -> None:
    """Refuse, before any row is read, inconsistent arguments, and an evaluation whose largest
    setting does not fit into memory."""
    most = {name: max(getattr(args, name), key=lambda x: x or 0) for name in NAMES[1:]}
    if args.benchmark and not set(chosen(args.benchmark)) & set(GROUPS["videos"]):
        most["frames"] = 2  # the least: there are no videos
    most |= {"data": args.data or args.benchmark, "eval_data": (), "rows": None}
    given = SimpleNamespace(**vars(args) | most | {"check_data": False})
    data.check_files(given, is_toy)
    require_evaluation_fits(given, processor.config)


def open_rows(args: Args, setting: Setting, processor: Processor, task: toy.Task | None) -> Rows:
    """Open the rows of a setting."""
    benchmark, frames, image_tokens, frame_tokens, grid = setting
    if benchmark and args.bare:
        asked = PromptConfig(dict([BENCHMARKS[benchmark].bare]), False, args.accuracy_rule)
        processor = replace(processor, prompt_config=asked)
    tokens = {"image_tokens": image_tokens, "frame_tokens": frame_tokens}
    processor = replace(processor, **tokens, min_image_tokens=args.min_image_tokens)
    encode = partial(encode_prompt, processor)
    if benchmark:
        file = BenchmarkFile(benchmark, args.benchmark_root, frames, args.fps)
    elif args.data:
        file = DataFile(args.data, args.media_root, frames, args.fps, text_only=args.text_only)
    else:
        task = task or toy.Task(order="image-first")
        task = replace(task, frames=frames or task.frames, grid=grid or task.grid)
        file = toy.HeldOut(toy.held_out_examples(task, args.examples or 512))
    rows = range(len(file))[: args.examples]
    kept = len(rows) if args.relative else args.gaze  # of so many, from the first, the media
    source = data.Prompts(file, encode, rows, None, args.max_prompt_tokens, kept)
    reader = data.Reader(source, (), args.workers, data.BadRows(args.max_skipped, len(file)))
    return Rows([file.name(row) for row in rows], reader, processor)


def in_batches(prompts: Iterable[Prompt], batches: Iterable[range]) -> Iterator[list[Prompt]]:
    """The prompts of each batch of numbers; those of bad rows are missing."""
    stream = iter(prompts)
    prompt = next(stream, None)
    for batch in batches:
        chunk = []
        while prompt is not None and prompt.number in batch:
            chunk.append(prompt)
            prompt = next(stream, None)
        yield chunk


def answer_rows(
    args: Args, setting: Setting, model: nn.Module, rows: Rows, records: Records, to: FileIO | None
) -> list[Prediction]:
    """Answer the rows of a setting that `records` lacks. Only rank 0 appends to `records` and to
    the file `to`; it returns the examples of the gaze page.

    Ranks take batches in turn. A batch is always of the same rows, whatever was answered before an
    interruption and by however many ranks, because its rows are padded to one length: on a GPU,
    another padding may give another answer. So a batch is answered again if a row of it is missing.
    """
    names, size, entry = rows.names, args.batch_size, BENCHMARKS.get(setting[0])
    done = ranks.from_rank_0(lambda: {record["row"] for record in records})
    all_rows = range(len(names))
    batches = [all_rows[first : first + size] for first in all_rows[::size]]
    # The examples of the page are answered again after an interruption.
    todo = [x for x in batches if x[0] < args.gaze or not done.issuperset(names[x[0] : x[-1] + 1])]
    left, several = sum(map(len, todo)), ranks.world_size()
    todo += [range(0)] * (-len(todo) % several)  # every rank has as many
    mine = todo[ranks.rank() :: several]
    bad_rows = rows.reader.bad_rows
    bad_rows.read = (len(done) + len(bad_rows.bad)) // several
    reader = replace(rows.reader, numbers=[n for batch in mine for n in batch])
    same = ("max_new_tokens", "batch_size", "batch_tokens", "attn_layer", "bare", "relative")
    options = {name: getattr(args, name) for name in same} | {"metric": entry and entry.score}
    shown, label, hidden = [], setting[0] or "evaluate", ranks.rank() != 0
    with tqdm(total=left, desc=label, dynamic_ncols=True, disable=hidden) as bar:
        for chunk in in_batches(reader, mine):
            gazes, predictions = sum(prompt.number < args.gaze for prompt in chunk), []
            if gazes or not done.issuperset(prompt.example.name for prompt in chunk):
                predictions = list(predict(model, rows.processor, chunk, gazes=gazes, **options))
            for bad in ranks.gather([dict(bad_rows.bad)]):
                bad_rows.name(bad)
            predictions = ranks.gather(predictions)
            if ranks.rank() == 0:
                new = [x.record for x in predictions if x.record["row"] not in done]
                disk.append(to, [{"setting": setting} | record for record in new])
                records += new
                shown += [x for x in predictions if x.gaze]
            bar.update(len(predictions))
    places = {name: place for place, name in enumerate(names)}
    records.sort(key=lambda record: places[record["row"]])
    return shown


def main(args: Args) -> dict[str, float]:
    """Evaluate every setting of the sweep, or compare evaluations; returns the metrics of the last
    setting."""
    if args.compare:
        ranks.on_rank_0(partial(results.compare, args))
        return {}
    ranks.require_same_on_ranks(cli.options(args))
    task, out = toy.Task.load(Path(args.model)), Path(args.out)
    sweep = (args.frames, args.image_tokens, args.frame_tokens, args.grid)
    settings = list(product(chosen(args.benchmark) or (None,), *sweep))
    learned = "--benchmark: the toy knows only the words of its task; give a real --model"
    ranks.require(not (task and args.benchmark), learned)
    images_only = task is not None and task.frames is None and args.frames != (None,)
    asked = f"--frames {' '.join(map(str, args.frames))}: {args.model} has learned images only"
    ranks.require(not images_only, f"{asked}; leave it out, or train a toy with sft.py --frames")
    processor = open_processor(args, task)
    check_settings(args, processor, task is not None)
    opened = {setting: open_rows(args, setting, processor, task) for setting in settings}
    ranks.require_same_on_ranks({"rows": [len(rows.names) for rows in opened.values()]})
    ranks.on_rank_0(partial(results.check_out, args))
    model = load_model(args.model, frozen=True)
    kept = ranks.on_rank_0(partial(results.open_out, args))
    lock, file, records = kept or (None, None, defaultdict(list))
    named = results.labels(settings)
    with gathered(model):
        for setting, rows in opened.items():
            label = named[setting].replace(", ", "-").replace(" ", "")  # in names of files
            if file and (args.data or args.benchmark):
                skipped = disk.open_lines(out / f"skipped{label and f'-{label}'}.jsonl")
                rows.reader.bad_rows.attach(skipped)
            shown = answer_rows(args, setting, model, rows, records[setting], file)
            if shown:
                page = out / f"gaze{label and f'-{label}'}.html"
                draw_page(page, {label or out.name: shown}, f"{args.model} {label}")
            some = ranks.from_rank_0(partial(len, records[setting])) > 0
            ranks.require(some, f"{label or '--data'}: no row can be used")
            if rows.reader.bad_rows.file is not None:
                rows.reader.bad_rows.file.close()
    chosen_records = {setting: records[setting] for setting in settings}
    ranks.on_rank_0(partial(results.report, args, chosen_records))
    if lock:
        lock.close()
    return ranks.from_rank_0(partial(summarise, records[settings[-1]]))


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__, defaults)
