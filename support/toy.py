"""The built-in task, visual search that a laptop learns in minutes, and its model, a real Qwen2-VL
with less than a million parameters.

A scene is a grid of cells. Eight shapes (a star, a ring, ...) lie in eight of them, each in a
random colour; clutter dots lie in others. The question is "what colour is the star ?". One cell is
28 x 28 pixels, exactly one visual token of Qwen2-VL (patch 14, merge 2). So the attention mass on
the target's token measures whether the model looks at the right cell. In a video of N frames, each
shape is visible in some frames only, and the target's tokens are its cell in those frames.

The question comes *before* the image (`--toy-order question-first`). With the image first, as in
chat prompts, the words of the question can attend to the target. RAL acts only on the rows of
the response tokens, so it cannot reach this attention. With the question first, the row that
predicts the colour must attend to the target. `--toy-order image-first` is for comparison.

Training and held-out scenes never share an image: a hash of the scene assigns it to one side.
"""

import json
import random
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from support.cli import given_options
from support.data import BadRows, Prompts, Reader
from support.disk import loading
from support.grounding import Box
from support.prompts import Example, Media, Prompt, PromptConfig
from support.ranks import rank, require, world_size
from support.templates import CHATML, SYSTEM

CELL = 28  # pixels; one visual token of Qwen2-VL
STAR = (14, 2, 17, 10, 25, 10, 19, 15, 21, 24, 14, 19, 6, 24, 8, 15, 2, 10, 10, 10)
SHAPES = {  # how each is drawn: a method of ImageDraw, its coordinates and its other arguments
    "star": [("polygon", STAR)],
    "circle": [("ellipse", (4, 4, 23, 23))],
    "square": [("rectangle", (5, 5, 22, 22))],
    "triangle": [("polygon", (14, 3, 24, 23, 3, 23))],
    "cross": [("rectangle", (11, 3, 16, 24)), ("rectangle", (3, 11, 24, 16))],
    "ring": [("arc", (4, 4, 23, 23), ("start", 0), ("end", 360), ("width", 5))],
    "diamond": [("polygon", (14, 2, 22, 14, 14, 25, 5, 14))],
    "bar": [("rectangle", (3, 10, 24, 17))],
}
COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 230),
    "yellow": (240, 200, 20),
    "purple": (150, 50, 190),
    "orange": (250, 130, 20),
    "cyan": (20, 190, 210),
    "black": (20, 20, 20),
}
BACKGROUND = (235, 235, 235)
EVAL_SEED = 20_260_204  # the held-out set is the same for every run, whatever its seed
MAX_NEW_TOKENS = {False: 16, True: 64}  # of a response: without a thought, with one
ORDERS = ("question-first", "image-first")
# Defaults of every script on the toy. There are no token budgets, since a cell is a token.
RUN = {"eval_examples": 512, "workers": 0, "save_every": 0}
RUN |= dict.fromkeys(("max_prompt_tokens", "image_tokens", "min_image_tokens", "frame_tokens"))

# 1. The task


@dataclass(frozen=True)
class Task:
    """What a toy checkpoint was trained on; stored beside its weights as `toy_task.json`."""

    grid: int = 4
    frames: int | None = None
    order: str = "question-first"
    think: bool = False

    def prompt_config(self) -> PromptConfig:
        """How a toy is asked: with the question alone."""
        return PromptConfig({}, self.think, question_first=self.order == "question-first")

    def files(self) -> dict[str, bytes]:
        """The files that store the task in a checkpoint: name to content."""
        return {"toy_task.json": json.dumps(vars(self)).encode()}

    @staticmethod
    def load(directory: Path) -> "Task | None":
        """The task of a toy checkpoint, or None if `directory` is not one."""
        path = directory / "toy_task.json"
        if not path.is_file():
            return None
        with loading(f"{path}: not a toy's task", "train it again"):
            if path.stat().st_size > 2**12:
                raise ValueError("it is larger than 4 kB")
            task = Task(**json.loads(path.read_text()))
            sizes = task.grid in range(3, 65) and (task.frames or 1) in range(1, 1025)
            if not sizes or type(task.think) is not bool or task.order not in ORDERS:
                raise ValueError(f"{task} is out of range")
            return task

    def open_data(
        self, args: Any, encode: Callable[[Example], Prompt], *, keep_media: bool = False
    ) -> tuple[Reader, list[Prompt]]:
        """What `data.open_data` returns, without data files; no row is bad."""
        keep = sys.maxsize if keep_media else 0
        prompts = Prompts(Stream(self, args.seed), encode, keep_media=keep)
        train = Reader(prompts, range(0), 0, BadRows())
        mine = held_out_examples(self, args.eval_examples)[rank() :: world_size()]
        return train, [encode(example) for example in mine]


def defaults(table: dict[str, Any], unset: str | None = "runs/sft/checkpoint") -> dict[str, Any]:
    """Returns `table`, with what follows from its task, if the checkpoint named on the command line
    (or else `unset`) is a toy or does not exist yet; {} (the defaults of `Args`) if it is a real
    model."""
    given = given_options()
    model = given.model or unset
    task = Task.load(Path(model)) if model else Task()
    if task is None and (given.model or Path(model).is_dir()):
        return {}
    think = table["think"] if task is None or not model else task.think
    think = think if given.think is None else given.think
    if think == table["think"]:
        return table
    return table | {"think": think, "max_new_tokens": MAX_NEW_TOKENS[think]}


def resolve_task(args: Any, model: str | None, may_differ: bool = False) -> tuple[bool, Task]:
    """Whether `model` is a toy (None: a new one), and the task of the run: the toy checkpoint's,
    overridden by the arguments that are not None.

    `may_differ` is for SFT, which can teach a checkpoint a new task. The other scripts raise
    `UsageError` for a task that the checkpoint was not trained on.
    """
    known = Task.load(Path(model)) if model else None
    fields = {"grid": args.grid, "frames": args.frames, "order": args.toy_order}
    fields |= {"think": args.think}
    asked = {name: value for name, value in fields.items() if value is not None}
    for name, value in asked.items() if known and not may_differ else ():
        wanted, own = as_option(name, value), as_option(name, getattr(known, name))
        remedy = f"Omit it, or train such a toy: python sft.py {wanted} --out runs/other"
        trained = "on images" if own == "--frames None" else f"with {own}"
        require(wanted == own, f"{wanted}: {model} was trained {trained}. {remedy}")
    # Chat prompts put the image first, so a model that is not a toy gets this order.
    task = replace(known or Task(order="image-first" if model else "question-first"), **asked)
    return model is None or known is not None, task


def as_option(name: str, value: Any) -> str:
    """A field of the task as on the command line."""
    if name == "think":
        return "--think" if value else "--no-think"
    return f"--{'toy-order' if name == 'order' else name} {value}"


@dataclass(frozen=True)
class Scene:
    """The cell and colour of each shape, and the temporal patches (pairs of frames) from `first` to
    `last` that show it."""

    shapes: tuple[tuple[str, int, str, int, int], ...]  # (shape, cell, colour, first, last)
    dots: tuple[tuple[int, int, int, str], ...]  # (cell, x, y, colour), clutter

    def held_out(self) -> bool:
        """Whether the scene is for evaluation, as one in eight is. The hash ignores clutter, so
        the two sides never share an arrangement of shapes."""
        return zlib.crc32(repr(self.shapes).encode()) % 8 == 0


def draw_scene(scene: Scene, grid: int, frames: int | None) -> list[Image.Image]:
    """Render a scene as one image, or as `frames` frames; each picture is (grid * 28) pixels
    square."""
    pictures = []
    for frame in range(frames or 1):
        picture = Image.new("RGB", (grid * CELL, grid * CELL), BACKGROUND)
        draw = ImageDraw.Draw(picture)
        for cell, x, y, colour in scene.dots:
            left, top = cell % grid * CELL + x, cell // grid * CELL + y
            draw.ellipse((left, top, left + 4, top + 4), fill=COLOURS[colour])
        for shape, cell, colour, first, last in scene.shapes:
            if first <= frame // 2 <= last:
                picture.paste(sprite(shape, colour), (cell % grid * CELL, cell // grid * CELL))
        pictures.append(picture)
    return pictures


@cache
def sprite(shape: str, colour: str) -> Image.Image:
    """One cell with one shape on the background."""
    image = Image.new("RGB", (CELL, CELL), BACKGROUND)
    for method, edges, *options in SHAPES[shape]:
        getattr(ImageDraw.Draw(image), method)(edges, fill=COLOURS[colour], **dict(options))
    return image


def sample_scene(rng: random.Random, task: Task, held_out: bool) -> Scene:
    """A random scene from the held-out or the training side of the split."""
    patches = (task.frames + 1) // 2 if task.frames else 1
    while True:
        cells = rng.sample(range(task.grid**2), len(SHAPES))
        shapes = []
        for shape, cell in zip(SHAPES, cells, strict=True):
            length = rng.randint(1, max(1, patches // 2))
            first = rng.randint(0, patches - length)
            shapes.append((shape, cell, rng.choice(list(COLOURS)), first, first + length - 1))
        dots = []
        for cell in range(task.grid**2):
            if cell not in cells and rng.random() < 0.5:
                x, y = rng.randint(3, 20), rng.randint(3, 20)
                dots.append((cell, x, y, rng.choice(list(COLOURS))))
        scene = Scene(tuple(shapes), tuple(dots))
        if scene.held_out() == held_out:
            return scene


def cell_box(task: Task, cell: int) -> Box:
    """The box of a cell, counted row by row."""
    left, top = cell % task.grid * CELL, cell // task.grid * CELL
    return Box(left, top, left + CELL, top + CELL)


def sample_example(
    rng: random.Random, task: Task, held_out: bool = False, caption: bool = False
) -> Example:
    """One question about a random scene, or a request to name every shape's colour in a random
    order.

    A caption teaches the lookup shape -> colour eight times per image; questions alone do not teach
    it within minutes. The example's box is the cell of the shape asked about.
    """
    scene = sample_scene(rng, task, held_out)
    media = [Media(draw_scene(scene, task.grid, task.frames), task.frames is not None)]
    if caption:
        named = rng.sample(scene.shapes, len(scene.shapes))
        response = " ".join(f"{shape} {colour}" for shape, _, colour, _, _ in named)
        return Example("list all", "", media, response=response)
    shape, cell, colour, first, last = rng.choice(scene.shapes)
    box = cell_box(task, cell)
    if task.frames is not None:  # two frames a second, two in a patch
        box = replace(box, start=first, end=last + 0.5)
    thought = f"<think> {shape} {colour} </think> " if task.think else ""
    return Example(
        problem=f"what colour is the {shape} ?",
        solution=colour,
        media=media,
        response=f"{thought}<answer> {colour} </answer>",
        boxes=(box,),
    )


def training_example(task: Task, seed: int, index: int, caption: bool = False) -> Example:
    """Training example number `index`. It depends only on its arguments, so a resumed run needs no
    saved generator."""
    return sample_example(random.Random(f"{seed}/{index}"), task, caption=caption)


def held_out_examples(task: Task, count: int) -> list[Example]:
    """The fixed evaluation set: the same for every seed, method and run."""
    rng = random.Random(EVAL_SEED)
    examples = [sample_example(rng, task, held_out=True) for _ in range(count)]
    return [replace(example, name=f"held-out {i}") for i, example in enumerate(examples, 1)]


class HeldOut(list):
    """Held-out examples, with the interface of a data file."""

    def example(self, row: int) -> Example:
        return self[row]

    def name(self, row: int) -> str:
        return self[row].name

    place = name


@dataclass
class Stream:
    """Training examples by number, with the interface of a data file. SFT changes `task` and
    `caption` during training."""

    task: Task
    seed: int
    caption: bool = False

    def example(self, row: int) -> Example:
        return training_example(self.task, self.seed, row, self.caption)


# 2. The model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|image_pad|>", "<|video_pad|>")
WORDS = ("<unk>", "user", "assistant", "what", "colour", "is", "the", "?", "list", "all")
WORDS += ("<think>", "</think>", "<answer>", "</answer>")

CHAT_TEMPLATE = CHATML.replace(SYSTEM, "")  # the toy does not know the words of a system message
# Hidden size, layers, heads, key-value heads, MLP: 0.7 M and 3.9 M parameters.
SIZES = {"small": (128, 2, 4, 2, 384), "large": (256, 3, 8, 4, 1280)}


def make_tokenizer(words: Iterable[str] = (*WORDS, *SHAPES, *COLOURS)) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens of Qwen2-VL; <|endoftext|> pads and <|im_end|>
    ends a turn.

    The special tokens are added tokens, not words of the vocabulary, so that a special token inside
    a question can be split to <unk>.
    """
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=CHAT_TEMPLATE,
    )


def write_base(directory: Path, seed: int, size: str = "small") -> None:
    """Write an untrained toy checkpoint in the format of a downloaded one, so that
    `from_pretrained` can load it."""
    hidden, layers, heads, kv_heads, mlp = SIZES[size]
    tokenizer = make_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    # The sections are the 16 frequencies of a head: time, height, width.
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
    spread = {"initializer_range": 0.05}  # of the new weights
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": hidden, "num_heads": 4, **spread}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            **spread,
        },
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    Qwen2VLImageProcessorPil(min_pixels=CELL * CELL).save_pretrained(directory)
