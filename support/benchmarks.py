"""The paper's fifteen benchmarks as they are published: rows, media, metrics and totals.

`BENCHMARKS` has one entry for each. Columns, metrics and totals are those of the data cards and of
lmms-eval; [open] marks what neither they nor the paper (arXiv 2602.04884, tables 2 and 3) settle.
A benchmark is read from the hub, or from a folder that is laid out as its download is.
"""

import json
import re
from ast import literal_eval
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from support.answers import MAX_ANSWER, option_accuracy, option_texts, plain_accuracy
from support.datafiles import BOXES, COLUMNS, MAX_ROW, DataFile, Part, find_medium
from support.media import BadRow, reading
from support.prompts import Example
from support.ranks import UsageError, require

Row = dict[str, Any]

# 1. From a published row to the fields of a data file


def ask(problem: str, source: str, right: Row, **media: Any) -> Row:
    """The fields of a question; `right` has the solution and all that belongs to it."""
    return {"problem": problem.strip(), "data_source": str(source)} | right | media


def choice(texts: Sequence[str], right: int | str) -> Row:
    """Options and solution, given the options' texts and the index or letter of the right one. The
    solution is the whole option, so no letter is taken for the text of another option."""
    options = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts, strict=False)]
    index = right if isinstance(right, int) else ascii_uppercase.index(right.strip("( ")[0])
    if not 0 <= index < len(options):
        raise BadRow(f"its answer is {right!r}, but it has {len(options)} options")
    return {"options": options, "solution": options[index], "problem_type": "multiple choice"}


# An option on a line of its own: "(A) red", "A. red", "Option 1: red", "Caption A: red".
LISTED = re.compile(r"^ *(?:\(?[A-Z][.)]|(?:Option|Sentence|Caption) \w:) *(.+?) *$", re.M)


def listed_choice(text: str, right: str) -> Row:
    """Question, options and solution of a text that lists the options, one a line."""
    options = [*LISTED.finditer(text)]
    if len(options) < 2:
        raise BadRow("its question lists no options, one a line")
    texts = [option[1] for option in options]
    named = re.match(r"(?:Option|Sentence|Caption) \w: *(.+?) *$", right)
    problem = text[: options[0].start()].strip()
    return {"problem": problem} | choice(texts, texts.index(named[1]) if named else right)


def numbered_images(row: Row) -> list[Any]:
    names = [name for name in sorted(row) if re.fullmatch(r"image_\d", name)]
    return [row[name] for name in names if row[name]]


def mmmu_pro(row: Row) -> Row:
    """A row of either part. In the vision part the image shows the question and its options."""
    if "question" not in row:
        right = {"solution": row["answer"], "problem_type": "multiple choice"}
        problem = "Answer the multiple-choice question in the image."
        return ask(problem, "vision", right, image=row["image"])
    if len(row["options"]) > MAX_ANSWER:  # a text that holds a Python list
        raise BadRow(f"its options have more than {MAX_ANSWER:,} characters")
    texts = [row["question"], *literal_eval(row["options"])]
    shown = [row[f"image_{n}"] for text in texts for n in re.findall(r"<image (\d)>", text)]
    problem, *options = [re.sub(r"<image \d>", "<image>", text) for text in texts]
    images = shown or numbered_images(row)
    return ask(problem, "standard", choice(options, row["answer"]), images=images)


def vizwiz(row: Row) -> Row:
    told = "When the provided information is insufficient, respond with 'Unanswerable'."
    if sum(len(str(x)) for x in row.values() if isinstance(x, str | list)) > MAX_ANSWER:
        raise BadRow(f"its texts have more than {MAX_ANSWER:,} characters")
    answers = [answer for answer, _ in Counter(row["answers"]).most_common()]
    problem = f"{row['question'].capitalize()}\n{told}"
    return ask(problem, row["category"], {"solution": answers}, image=row["image"])


def videommmu(row: Row) -> Row:
    told = "Please ignore the quiz question in the last frame of the video."
    if row["part"] == "Adaptation":
        told = "The image for this question is at the end of the video."
    right = {"solution": row["answer"]}
    if row["options"]:  # else an open question
        right = choice([*option_texts(row["options"]).values()], row["answer"])
    return ask(f"{row['question']}\n{told}", row["part"], right, video=f"{row['id']}.mp4")


MVBENCH = {  # folders of videos
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
    "clevrer/video_validation": "object_existence moving_direction moving_count moving_attribute"
    " counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "Moments_in_Time_Raw/videos": "fine_grained_action",
    "tvqa/frames_fps3_hq": "episodic_reasoning",  # folders of frames
    "FunQA_test/test": "unexpected_action",
    "scene_qa/video": "scene_transition",
    "sta/sta_video": "action_localization",
    "ssv2_video": "action_antonym",
    "nturgbd": "fine_grained_pose",
    "vlnqa": "egocentric_navigation",
}
MVBENCH = {task: folder for folder, tasks in MVBENCH.items() for task in tasks.split()}


def mvbench(row: Row) -> Row:
    right = choice(row["candidates"], row["candidates"].index(row["answer"]))
    clip = {"start": row.get("start"), "end": row.get("end")}
    clip |= {"sample_fps": 3} if row["part"] == "episodic_reasoning" else {}
    video = f"{MVBENCH[row['part']]}/{row['video']}"
    return ask(row["question"], row["part"], right, video=video, **clip)


def tempcompass(row: Row) -> Row:
    problem, right = f"{row['question']}\nPlease answer yes or no.", {"solution": row["answer"]}
    if row["part"] != "yes_no":
        right = listed_choice(row["question"], row["answer"])
    return ask(problem, row["part"], right, video=f"{row['video_id']}.mp4")


# 2. Metrics of an answer, between 0 and 1


def by_rule(answer: str, example: Example) -> float:
    """1 if the answer names the right option, or begins with the right one of yes and no; of any
    other question, if it equals the solution."""
    if example.problem_type == "multiple choice":
        return option_accuracy(answer, example.solution, example.options)
    right = example.solution.lower()
    if right in ("yes", "no"):
        return float(re.match("(yes|no)?", answer.lower())[1] == right)
    return plain_accuracy(answer, example.solution)


def relaxed(answer: str, example: Example) -> float:
    """ChartQA's relaxed accuracy: a number within 5%, or the same text."""

    def number(text: str) -> float | None:
        with suppress(ValueError):
            return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        return None

    p, g = number(answer), number(example.solution)
    if p is not None and g:
        return float(abs(p - g) / abs(g) <= 0.05)
    return float(answer.lower() == example.solution.lower())


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}


def vqa_text(text: str) -> str:
    """The VQA challenge's normalisation. Where that restores apostrophes in a hundred contractions,
    this removes all but those of `'s`."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = plain = " ".join(text.split())
    for mark in ';/[]"{}()=+\\_-><@`!':
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space else " ")
    words = re.sub(r"\.(?!\d)", "", plain).split()
    words = [NUMBERS.get(word, word if word == "'s" else word.replace("'", "")) for word in words]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def vqa(answer: str, example: Example) -> float:
    """VQA accuracy: the mean over the annotators of min(1, matches among the others / 3)."""
    same = [vqa_text(text) == vqa_text(answer) for text in example.extra["answers"]]
    return float(np.mean([min(1, (sum(same) - hit) / 3) for hit in same]))


# 3. Totals of a benchmark's records, each with a `score`, a `source` and its `question_id`, if any


def percent(records: Sequence[Row]) -> float:
    """The mean over all rows."""
    return 100 * float(np.mean([record["score"] for record in records]))


def by_source(records: Sequence[Row]) -> dict[str, float]:
    """The mean over the rows of each source."""
    groups = defaultdict(list)
    for record in records:
        groups[record["source"]].append(record)
    return {source: percent(group) for source, group in groups.items()}


def mean_of_sources(records: Sequence[Row]) -> float:
    return float(np.mean([*by_source(records).values()]))


def mean_of_2d_and_3d(records: Sequence[Row]) -> float:
    """CV-Bench: the mean of 3D (Omni3D) and of the mean of the 2D sources (ADE20K, COCO)."""
    parts = defaultdict(list)
    for source, value in by_source(records).items():
        parts[source == "Omni3D"].append(value)
    return float(np.mean([np.mean(values) for values in parts.values()]))


def mme_points(records: Sequence[Row]) -> float:
    """MME: accuracy and accuracy+ in percent, summed over the categories. Accuracy+ counts the
    images of which both questions are answered right."""
    scores = defaultdict(list)
    for record in records:
        scores[record["source"], record["question_id"]].append(record["score"])
    images = [{"source": source, "score": sum(x) == 2} for (source, _), x in scores.items()]
    return sum(by_source(records).values()) + sum(by_source(images).values())


# 4. The benchmarks

LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its title in the paper, its name on the hub, the splits or files to read, its
    number of rows, and a function that turns a row, with the name of its `part`, into the fields of
    a data file.

    The unpacked videos lie in the folders `videos`; `unpack` says what to do for that. `bare` is
    a problem type and the benchmark's own request for it. `metric` scores an answer, and `total`
    makes one number, in `unit`, of the records of all rows. If the medium in the column `beside`
    has a JSON file beside it, the row has the object in that file as `row["beside"]`.
    """

    title: str
    hub: str
    splits: tuple[str, ...]
    rows: int
    row: Callable[[Row], Row]
    videos: tuple[str, ...] = ()
    unpack: str = "unpack its zip files there"
    bare: tuple[str, str] = ("multiple choice", LETTER)
    metric: Callable[[str, Example], float] = by_rule
    total: Callable[[Sequence[Row]], float] = percent
    unit: str = "%"
    beside: str = ""

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.unit}"

    @property
    def folder(self) -> str:
        return self.hub.replace("/", "--")

    def score(self, answer: str | None, example: Example) -> float:
        """The score of an answer, which is 0 for none and for one that is too long to judge."""
        usable = answer is not None and len(answer) <= MAX_ANSWER
        return self.metric(answer, example) if usable else 0.0


BENCHMARKS = {
    "vstar": Benchmark(
        "V*", "craigwu/vstar_bench", ("test_questions",), 191,
        lambda row: ask("", row["category"], listed_choice(row["text"], row["label"]),
                        image=row["image"], bboxes=row["beside"].get("bbox"), bbox_format="xywh"),
        beside="image",
    ),
    "mmmu_pro": Benchmark(
        "MMMU-Pro", "MMMU/MMMU_Pro", ("standard (10 options)", "vision"), 3460, mmmu_pro,
        total=mean_of_sources,
    ),
    "mme": Benchmark(
        "MME", "lmms-lab/MME", ("test",), 2374,
        lambda row: ask(row["question"], row["category"], {"solution": row["answer"]},
                        image=row["image"]),
        total=mme_points, unit="points of 2,800",
    ),
    "muirbench": Benchmark(
        "MuirBench", "MUIRBENCH/MUIRBENCH", ("test",), 2600,
        lambda row: ask(row["question"], row["task"], choice(row["options"], row["answer"]),
                        images=row["image_list"]),
    ),
    "chartqa": Benchmark(
        "ChartQA", "lmms-lab/ChartQA", ("test",), 2500,
        lambda row: ask(row["question"], row["type"], {"solution": row["answer"]},
                        image=row["image"]),
        bare=("", "Answer the question with a single word."), metric=relaxed,
    ),
    "vizwiz": Benchmark(
        "VizWiz", "lmms-lab/VizWiz-VQA", ("val",), 4319, vizwiz,
        bare=("", "Answer the question using a single word or phrase."), metric=vqa,
    ),
    "blink": Benchmark(  # [open]: the mean over rows or that of 14 tasks
        "BLINK", "BLINK-Benchmark/BLINK", ("val",), 1901,
        lambda row: ask(row["prompt"].split("(A)")[0], row["sub_task"],
                        choice(row["choices"], row["answer"]), images=numbered_images(row)),
    ),
    "cv_bench": Benchmark(
        "CV-Bench", "nyu-visionx/CV-Bench", ("test_2d", "test_3d"), 2638,
        lambda row: ask(row["prompt"].split("(A)")[0], row["source"],
                        choice(row["choices"], row["answer"]), image=row["image"]),
        total=mean_of_2d_and_3d,
    ),
    "longvideobench": Benchmark(  # without subtitles [open]
        "LongVideoBench", "longvideobench/LongVideoBench", ("validation",), 1337,
        lambda row: ask(row["question"], row["duration_group"],
                        choice([x for n in range(5) if (x := row[f"option{n}"]) != "N/A"],
                               int(row["correct_choice"])), video=row["video_path"]),
        ("videos",), "join videos.tar.part.* into one tar file and unpack it there",
    ),
    "nextqa": Benchmark(
        "NExT-QA", "lmms-lab/NExTQA", ("MC",), 8564,
        lambda row: ask(row["question"], row["type"],
                        choice([row[f"a{n}"] for n in range(5)], int(row["answer"])),
                        video=f"{row['video']}.mp4"),
        ("NExTVideo",),
    ),
    "videomme": Benchmark(  # without subtitles [open]
        "Video-MME", "lmms-lab/Video-MME", ("videomme",), 2700,
        lambda row: ask(row["question"], row["duration"],
                        choice([*option_texts(row["options"]).values()], row["answer"]),
                        video=f"{row['videoID']}.mp4"),
        ("data",),
    ),
    "videommmu": Benchmark(
        "Video-MMMU", "lmms-lab/VideoMMMU", ("Perception", "Comprehension", "Adaptation"), 900,
        videommmu,
        ("Art", "Business", "Engineering", "Humanities", "Medicine", "Science"),
        "accept its terms, and unpack its zip files there", total=mean_of_sources,
    ),
    "lvbench": Benchmark(
        "LVBench", "lmms-lab/LVBench", ("train",), 1549,
        lambda row: ask("", row["type"], listed_choice(row["question"], row["answer"]),
                        video=row["video_path"]),
        ("all_videos", "video_chunks"),
    ),
    "mvbench": Benchmark(
        "MVBench", "OpenGVLab/MVBench", ("json",), 4000, mvbench,
        ("video",), "unpack video/*.zip there, in video/",
        ("multiple choice", "Only give the best option."), total=mean_of_sources,
    ),
    "tempcompass": Benchmark(  # without captioning, which needs a language model as judge
        "TempCompass", "lmms-lab/TempCompass", ("multi-choice", "yes_no", "caption_matching"),
        5536, tempcompass, ("videos",),
        bare=("multiple choice", "Please directly give the best option."),
    ),
}  # fmt: skip
GROUPS = {
    "all": [*BENCHMARKS],
    "images": [name for name, entry in BENCHMARKS.items() if not entry.videos],
    "videos": [name for name, entry in BENCHMARKS.items() if entry.videos],
}
# The paper's tables 3 and 2, in the order of `BENCHMARKS`.
PAPER = {
    "Qwen2.5-VL-7B": "70.7 36.4 2309.3 44.9 84.0 71.2 56.3 77.6 57.0 73.7 61.6 47.6 40.5 63.4 69.5",
    "GRPO": "68.6 36.8 2258.7 43.9 81.7 67.9 54.9 78.1 57.9 70.7 62.0 49.7 43.9 64.0 68.3",
    "RAL": "73.3 37.8 2352.8 47.4 86.4 71.7 57.2 79.0 60.1 74.1 63.4 48.6 44.2 65.5 70.0",
}


def chosen(names: Sequence[str]) -> list[str]:
    """The benchmarks that the names of benchmarks and of `GROUPS` stand for."""
    return [*dict.fromkeys(x for name in names for x in GROUPS.get(name, [name]))]


def place_of(name: str, root: str | None) -> str:
    """The folder of a benchmark below `root`, or else its name on the hub."""
    entry = BENCHMARKS[name]
    local = Path(root or "", entry.folder)
    return str(local) if root and local.is_dir() else entry.hub


class BenchmarkFile(DataFile):
    """The rows of a benchmark as `Example`s, from its folder below `root` or from the hub.

    Raises:
        UsageError: the benchmark is not there, is laid out otherwise, or its videos are missing.
    """

    def __init__(self, name: str, root: str | None, frames: int | None, fps: float | None):
        self.benchmark = benchmark = BENCHMARKS[name]
        missing = root is not None and not Path(root).is_dir()
        require(not missing, f"--benchmark-root {root}: no such directory")
        place, option = place_of(name, root), f"--benchmark {name}"
        paths = [f"{place}:{split}" for split in benchmark.splits]
        super().__init__(paths, (), frames, fps, option, text_only=True)  # `named_fields` checks it
        for part in self.parts:
            part.roots += [(part.roots[0] / folder).resolve() for folder in benchmark.videos]
            try:
                self.named_fields(part.start)
            except BadRow as error:
                other = f"{place} is not laid out as {benchmark.hub} was"
                raise UsageError(f"{option}: {other}: {part.name} row 1 {error}") from None
        some = range(0, len(self), 1 + len(self) // 20)
        if benchmark.videos and not any(map(self.has_video, some)):
            video = f"{benchmark.videos[0]}/{self.named_fields(0)['video']}"
            how = f"`hf download {benchmark.hub} --repo-type dataset --local-dir"
            how += f" DIR/{benchmark.folder}`, {benchmark.unpack}, and give --benchmark-root DIR"
            raise UsageError(f"{option}: {place} has no videos, such as {video}; {how}")

    def find_columns(self, part: Part) -> str:
        return f"read as {self.benchmark.title}"

    def named_fields(self, row: int) -> Row:
        """The fields of a row, by `Benchmark.row`."""
        part, _ = self.locate(row)
        with reading("is not as published"):  # other columns or values
            published = self.fields(row) | {"part": re.split("[:/]", part.source)[-1]}
            if column := self.benchmark.beside:
                published["beside"] = read_beside(published[column], part.roots)
            fields = dict.fromkeys(COLUMNS) | self.benchmark.row(published)
        if not any(fields.get(name) for name in ("image", "images", "video")):
            raise BadRow("has no image or video")
        return fields

    def example(self, row: int) -> Example:
        """Row number `row` with its media. A question counts even if its boxes cannot be used."""
        fields = self.named_fields(row)
        with suppress(BadRow):
            return self.read(row, fields)
        return self.read(row, fields | dict.fromkeys(BOXES))

    def has_video(self, row: int) -> bool:
        with suppress(BadRow):
            return bool(find_medium(self.named_fields(row)["video"], self.locate(row)[0].roots))
        return False


def read_beside(medium: str, roots: Sequence[Path]) -> Row:
    """The object in the JSON file that lies beside a medium; empty if there is no such file, or if
    it is not an object of at most `MAX_ROW` bytes."""
    with suppress(BadRow, OSError, ValueError, AttributeError, RecursionError):
        place = find_medium(str(Path(medium).with_suffix(".json")), roots)
        found = json.loads(place.read_bytes()) if place.stat().st_size <= MAX_ROW else None
        if isinstance(found, dict):
            return found
    return {}


def number(name: str, records: Sequence[Row]) -> str:
    """The benchmark's number, and how many of its rows stand behind it if any is missing."""
    entry = BENCHMARKS[name]
    missing = f" (rows {len(records):,} of {entry.rows:,})" if len(records) != entry.rows else ""
    return f"{entry.total(records):.1f}{missing}"


def paper_tables(measured: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown tables with the paper's columns: the paper's rows, then those of `measured`, which
    has the number of each benchmark by label. A table without measured numbers is left out."""
    lines = []
    known = {f"{label} (paper)": dict(zip(BENCHMARKS, numbers.split(), strict=True))
             for label, numbers in PAPER.items()}  # fmt: skip
    models = known | measured
    for names in (GROUPS["images"], GROUPS["videos"]):
        rows = [["model", *(BENCHMARKS[name].title for name in names)], ["---"] * (len(names) + 1)]
        rows += [[x, *(row.get(name, "") for name in names)] for x, row in models.items()]
        if any(name in row for row in measured.values() for name in names):
            lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(lines)
