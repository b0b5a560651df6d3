"""Turn a question about images and videos into prompt tensors of Qwen2-VL, Qwen2.5-VL and
Qwen3-VL. The questions come from support/toy.py or from support/datafiles.py.

A prompt is a sequence of text and vision blocks (`Block`). `load_blocks` handles the differences
between the families, except the DeepStack features of Qwen3-VL's encoder (`visual_features`).

This module uses only a checkpoint's tokenizer and PIL image processor, so results are the same with
and without torchvision.
"""

import json
import math
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from support.grounding import Box, target_tokens
from support.ranks import first_line, gather, require
from support.templates import SLOTS, render_turn

# The minimum tokens of a video frame, as in qwen-vl-utils. Checkpoints do not state it.
FRAME_LEAST = 128
Features = tuple[Tensor, ...]


@dataclass
class Media:
    """One image, or the frames of one video, of `size` (width, height). `times` are the seconds at
    which a video shows its frames, by default two a second. Qwen3-VL reads them, and Qwen2.5-VL's
    positions follow `seconds_per_patch`, the mean time between two pairs of frames."""

    frames: list[Image.Image]
    is_video: bool = False
    times: Sequence[float] = ()
    size: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.times = self.times or [i / 2 for i in range(len(self.frames))]
        self.size = self.frames[0].size if self.frames else (0, 0)

    def without_frames(self) -> "Media":
        """A copy that keeps the size and the times. Its frames raise an error if they are used."""
        bare = copy(self)
        del bare.frames
        return bare

    def __getattr__(self, name: str) -> Any:
        dropped = "the frames of this prompt's media were dropped; pass keep_media=True to prepare"
        raise AttributeError(dropped if name == "frames" else name)

    @property
    def kind(self) -> str:
        return "video" if self.is_video else "image"

    @property
    def seconds_per_patch(self) -> float:
        return 2 * ((self.times[-1] - self.times[0]) / max(1, len(self.times) - 1))


@dataclass
class Example:
    """One question about any number of images and videos.

    `<image>` and `<video>` in `problem` or `options` say where each medium stands. Without them,
    the media come before the text, or after it if `PromptConfig.question_first` is set.
    `response` is a demonstration for SFT. `boxes` say where the media show what the question is
    about, if that is known. `problem_type` selects the accuracy measure; "" means that equal
    answers are right. `name` identifies the example's row, `source` is its data source, and `extra`
    holds the columns of the row that nothing else reads, for rewards and metrics of one's own. Any
    solution of `also_right` is as good as `solution`.
    """

    problem: str
    solution: str
    media: list[Media]
    response: str | None = None
    boxes: tuple[Box, ...] = ()
    problem_type: str = ""
    options: tuple[str, ...] = ()
    name: str = ""
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    also_right: tuple[str, ...] = ()


@dataclass
class Block:
    """A vision block of a prompt: an image, a video or, for Qwen3-VL, a pair of frames.

    `pixels` is (patches, values). `shape` counts temporal patches, rows and columns of visual
    tokens, which begin at index `start` of the prompt's ids. `interval` is the distance in position
    between two temporal patches.
    """

    pixels: Tensor
    shape: tuple[int, int, int]
    is_video: bool = False
    interval: float = 1
    start: int = 0

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)


@dataclass
class Prompt:
    """An `Example` as tensors: `ids` (P,), `positions` (3, P), and the vision blocks in order.
    `target` are the visual tokens that show the example's boxes, counted over all blocks; see
    `target_tokens`. `grids` counts each medium's temporal patches, and rows and columns of visual
    tokens. `number` is the prompt's number in the run, counted from 0."""

    ids: Tensor
    positions: Tensor
    blocks: list[Block]
    example: Example
    target: tuple[int, ...] = ()
    grids: Sequence[tuple[int, int, int]] = ()
    number: int = 0

    def patches(self) -> Tensor:
        """The temporal patch that each position shows, (P,), counted over all blocks: an image is
        one, a video has one for each pair of frames. It is -1 for text."""
        numbers, first = torch.full_like(self.ids, -1), 0
        for block in self.blocks:
            t, h, w = block.shape
            shown = torch.arange(first, first + t).repeat_interleave(h * w)
            numbers[block.start : block.start + block.tokens] = shown
            first += t
        return numbers


@dataclass(frozen=True)
class PromptConfig:
    """How questions are asked and responses are judged. It is saved with the weights as
    `prompt.json`, so that `eval.py` asks what the training script asked.

    `prompts` holds the request for a thought ("think"), the request for the answer ("answer") and,
    by problem type, the form of the answer. They follow the question; a toy, which knows only its
    own words, gets the question alone.
    """

    prompts: dict[str, str]
    think: bool = True
    accuracy_rule: str = "by-type"
    question_first: bool = False

    def ask(self, example: Example) -> str:
        """The text of the user's turn: question, options, request."""
        options = ["Options:", *example.options] if example.options else []
        names = ("think", "answer", example.problem_type)[0 if self.think else 1 :]
        request = " ".join(self.prompts[name] for name in names if name in self.prompts)
        return "\n".join(filter(None, [example.problem, *options, request]))

    def content(self) -> bytes:
        return json.dumps(vars(self), indent=2, ensure_ascii=False).encode()

    @staticmethod
    def read(content: bytes) -> "PromptConfig":
        """The prompt configuration in a `prompt.json`, which may hold anything.

        Raises:
            ValueError, TypeError, AttributeError: it is not a prompt configuration.
        """
        config = PromptConfig(**json.loads(content))
        if any(re.search("<image>|<video>", text) for text in config.prompts.values()):
            raise ValueError("a prompt holds the marker of a medium")
        if not {type(config.think), type(config.question_first)} <= {bool}:
            raise ValueError("think or question_first is not true or false")
        if config.accuracy_rule not in ("by-type", "exact"):
            raise ValueError(f"its accuracy_rule is {config.accuracy_rule!r}")
        return config


@dataclass
class Processor:
    """Tokenizer and PIL image processor of a checkpoint, which turn an `Example` into tensors
    without torchvision.

    `config` is the model's. `files` are the checkpoint's own files other than the weights; every
    saved checkpoint includes them. `image_tokens` and `min_image_tokens` limit the visual tokens of
    an image, and `frame_tokens` those of a pair of video frames; None keeps the image processor's
    own limit. `end_ids` are the tokens that end a response according to the tokenizer, the chat
    template and the generation config.
    `response_prefix` is the `<think>` with which the template of a thinking model opens the
    response inside the prompt: reward and samples see it as part of the response.
    """

    config: Any
    tokenizer: Any
    image_processor: Any
    prompt_config: PromptConfig
    files: dict[str, bytes] = field(default_factory=dict)
    image_tokens: int | None = None
    frame_tokens: int | None = None
    min_image_tokens: int | None = None
    end_ids: set[int] = field(default_factory=set)
    response_prefix: str = ""

    def save(self, directory: Path) -> None:
        files = self.files | {"prompt.json": self.prompt_config.content()}
        generation = json.loads(files.get("generation_config.json", "{}"))
        generation["eos_token_id"] = sorted(self.end_ids)
        files["generation_config.json"] = json.dumps(generation, indent=2).encode()
        for name, content in files.items():
            (directory / name).write_bytes(content)

    def written(self, response: str) -> str:
        """The part of a response that the model itself writes, without `response_prefix`."""
        rest = response.removeprefix(self.response_prefix.strip())
        return rest if rest == response else rest.lstrip()

    def set_in_file(self, name: str, **values: str) -> None:
        """Set values in a JSON file of the checkpoint, if it has that file."""
        if name in self.files:
            content = json.loads(self.files[name]) | values
            self.files[name] = json.dumps(content, indent=2, ensure_ascii=False).encode()


def encode_prompt(processor: Processor, example: Example) -> Prompt:
    """Render the chat template, expand each placeholder to one token per visual token, and compute
    the positions.

    The text of the user's turn is tokenised separately from the template, with special tokens
    split, so an `<|image_pad|>` in a data file remains text and never becomes a placeholder.

    Raises:
        ValueError: the markers in the text do not match the media, or the chat template fails.
        UsageError: the model always thinks, and is asked not to.
    """
    encode = partial(processor.tokenizer.encode, add_special_tokens=False)
    thinks = processor.prompt_config.think or not processor.response_prefix
    require(thinks, "--no-think: the chat template of this model opens a thought; omit --no-think")
    parts = split_turn(processor.prompt_config, example)
    kinds = [part.kind if isinstance(part, Media) else "text" for part in parts]
    ids, blocks, grids = [], [], []
    text = ""  # not yet encoded: its end and a stamp are one text
    try:
        turn = render_turn(processor.tokenizer, kinds)
    except Exception as error:  # a template is a program
        raise ValueError(f"its chat template raises {first_line(error)}") from None
    for around, part in zip(turn, [*parts, ""], strict=True):
        if around:
            ids += encode(text, split_special_tokens=True) + encode(around)
            text = ""
        if isinstance(part, str):
            text += part
            continue
        opening, placeholder, closing = encode(SLOTS[part.kind])
        stamped = load_blocks(processor, part)
        patches = sum(block.shape[0] for _, block in stamped)
        grids.append((patches, *stamped[0][1].shape[1:]))
        for stamp, block in stamped:
            ids += [*encode(text + stamp, split_special_tokens=True), opening]
            block.start, text = len(ids), ""
            ids += [placeholder] * block.tokens + [closing]
            blocks.append(block)
    ids += encode(text, split_special_tokens=True)
    positions = mrope_positions(len(ids), blocks)
    target = target_tokens(example.boxes, example.media, grids)
    return Prompt(torch.tensor(ids), positions, blocks, example, target, grids)


def split_turn(asked: PromptConfig, example: Example) -> list[str | Media]:
    """The text and media of the user's turn, in order."""
    text, media = asked.ask(example).strip(), example.media
    pieces = re.split("(<image>|<video>)", text)
    if len(pieces) == 1:
        parts = [text, *media] if asked.question_first else [*media, text]
        return [part for part in parts if part]
    given = [f"<{medium.kind}>" for medium in media]
    if pieces[1::2] != given:
        found = f"the text has the markers {', '.join(pieces[1::2])}"
        raise ValueError(f"{found}, but the media are {', '.join(given) or 'none'}")
    pieces[1::2] = media
    return [piece for piece in pieces if piece]


def load_blocks(processor: Processor, media: Media) -> list[tuple[str, Block]]:
    """The vision blocks of one image or video, each with the text that precedes it."""
    pixels, (t, h, w) = process_media(processor, media)
    family, merge = processor.config.model_type, processor.image_processor.merge_size
    rows, columns, interval = h // merge, w // merge, 1
    unknown = f"{family}: its layout of videos is not known; add it to load_blocks"
    require(family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), unknown)
    if media.is_video and family == "qwen3_vl":
        # Each pair of frames is a block behind its mean time. The release replaces the template's
        # <|vision_start|> and <|vision_end|> too; transformers 5 keeps an outer pair of them.
        times = [*media.times, media.times[-1]]  # an odd number of frames repeats the last
        stamps = [f"<{(times[2 * i] + times[2 * i + 1]) / 2:.1f} seconds>" for i in range(t)]
        blocks = [Block(x, (1, rows, columns), is_video=True) for x in pixels.chunk(t)]
        return list(zip(stamps, blocks, strict=True))
    if media.is_video and family == "qwen2_5_vl":  # Qwen2-VL counts patches
        interval = processor.config.vision_config.tokens_per_second * media.seconds_per_patch
    return [("", Block(pixels, (t, rows, columns), media.is_video, interval))]


def process_media(processor: Processor, media: Media) -> tuple[Tensor, tuple[int, int, int]]:
    """Pixels (patches, channels * 2 * patch * patch) of one image or video, and its grid (t, h, w)
    in patches.

    A temporal patch holds two frames. An odd number of frames is padded by repeating the last, as
    the family's own video processor does. An image fills both halves with itself. Frames pass
    through the image processor, so they are resized and normalised like images.

    A small frame is enlarged to the family's minimum for videos, or to `frame_tokens` if that is
    smaller. The family then rounds both sides up to whole tokens, which may exceed the budget: with
    a budget of 128 tokens, a frame of 320 x 180 gets 9 x 16.
    """
    image_processor = processor.image_processor
    token = (image_processor.patch_size * image_processor.merge_size) ** 2  # in pixels
    smallest, largest = (image_processor.size[edge] for edge in ("shortest_edge", "longest_edge"))
    if media.is_video and smallest > token:  # the toy's minimum is a token
        smallest = max(smallest, FRAME_LEAST * token)
    if not media.is_video and processor.min_image_tokens:
        smallest = processor.min_image_tokens * token
    budget = processor.frame_tokens if media.is_video else processor.image_tokens
    largest = budget * token if budget else largest
    size = {"shortest_edge": min(smallest, largest), "longest_edge": largest}
    output = image_processor(images=media.frames, size=size, return_tensors="pt")
    pixels, grids = output["pixel_values"], output["image_grid_thw"].tolist()
    if not media.is_video:
        return pixels, tuple(grids[0])
    depth, side = image_processor.temporal_patch_size, image_processor.patch_size
    frames = pixels.view(len(media.frames), -1, 3, depth, side, side)[:, :, :, 0]
    if pad := -len(frames) % depth:
        frames = torch.cat([frames, frames[-1:].expand(pad, -1, -1, -1, -1)])
    # (t, h * w, channel, depth, side, side)
    patches = frames.unflatten(0, (-1, depth)).permute(0, 2, 3, 1, 4, 5)
    return patches.reshape(-1, pixels.shape[1]), (len(patches), *grids[0][1:])


def mrope_positions(length: int, blocks: Sequence[Block]) -> Tensor:
    """Positions (3, P) on the time, height and width axes for a prompt of `length` ids.

    Text after a vision block continues at the block's largest position + 1 on every axis, as in the
    models' release and in inference servers. transformers 5.23 instead starts text after a *video*
    at max(h, w) / 2 past its start, inside the video's own time axis. For images and the frames of
    Qwen3-VL, both rules agree.
    """
    positions, end, following = [], 0, 0  # the next index, and its position
    for block in blocks:
        text = torch.arange(block.start - end) + following
        t, h, w = block.shape
        axes = (torch.arange(t) * block.interval).long(), torch.arange(h), torch.arange(w)
        visual = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        visual = visual + following + len(text)
        positions += [text.expand(3, -1), visual]
        end, following = block.start + block.tokens, int(visual.max()) + 1
    positions.append((torch.arange(length - end) + following).expand(3, -1))
    return torch.cat(positions, dim=1)


@dataclass
class PromptBatch:
    """B prompts, left-padded to P: `ids` (B, P), `positions` (3, B, P), and `mask` (B, P), or None
    without padding. `patches` (B, P) come from `Prompt.patches` and are on the CPU.

    `blocks[b]` are the vision blocks of prompt b, and `features[b]` their visual features, computed
    once and reused by every pass; see `visual_features`. If the vision encoder is trained,
    `features` is None, and every pass computes the features of its own model.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    patches: Tensor
    blocks: list[list[Block]]
    features: list[list[Features]] | None

    def __getitem__(self, rows: slice) -> "PromptBatch":
        """The chosen prompts, with no more padding than they need."""
        mask, start = None, 0
        if self.mask is not None:
            mask = self.mask[rows]
            start = int(mask.any(dim=0).int().argmax())
            mask = None if bool(mask[:, start:].all()) else mask[:, start:]
        return PromptBatch(
            self.ids[rows, start:],
            self.positions[:, rows, start:],
            mask,
            self.patches[rows, start:],
            self.blocks[rows],
            None if self.features is None else self.features[rows],
        )


# Patches that the vision encoder takes at once, unless one block has more. As many as 128 frames
# have at 128 tokens a pair. The encoder needs some 50 KB for each.
ENCODER_CHUNK = 2**15


def visual_features(model: Module, blocks: Sequence[Sequence[Block]]) -> list[list[Features]]:
    """Visual features of each prompt's blocks: (visual tokens, hidden) of each block and, with
    Qwen3-VL, the features that are added after the first layers.

    The encoder takes blocks of up to `ENCODER_CHUNK` patches in a call. Unless the weights are
    gathered, every rank must run it equally often, forward and backward. So a rank that has no
    blocks left encodes a blank image, and an empty slice of its features goes to the last prompt.
    """
    config = model.config.vision_config
    merge, values = config.spatial_merge_size, 3 * config.temporal_patch_size * config.patch_size**2
    calls, room = [], 0
    for block in (block for row in blocks for block in row):
        if not calls or len(block.pixels) > room:
            calls.append([])
            room = ENCODER_CHUNK
        calls[-1].append(block)
        room -= len(block.pixels)
    counts = [len(calls)] if getattr(model, "is_gathered", False) else gather([len(calls)])
    blank = Block(torch.zeros(merge**2, values), (1, 1, 1))
    calls += [[blank]] * (max(1, *counts) - len(calls))
    features = []
    for call in calls:
        pixels = torch.cat([block.pixels for block in call]).to(model.device)
        grids = [(t, merge * h, merge * w) for t, h, w in (block.shape for block in call)]
        output = model.get_image_features(pixels, torch.tensor(grids, device=model.device))
        levels = [output.pooler_output, *getattr(output, "deepstack_features", ())]
        features += zip(*levels, strict=True)
    left = iter(features)
    rows = [[next(left) for _ in row] for row in blocks]
    rows[-1] += [tuple(level[:0] for level in blank) for blank in left]
    return rows


def collate(model: Module, prompts: Sequence[Prompt], pad_id: int) -> PromptBatch:
    """Left-pad prompts into a batch on the model's device, and compute their visual features if the
    vision encoder is frozen."""
    frozen = not any(p.requires_grad for p in model.model.visual.parameters())
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    mask = pad([torch.ones_like(prompt.ids, dtype=torch.bool) for prompt in prompts])
    blocks = [prompt.blocks for prompt in prompts]
    with torch.no_grad():
        features = visual_features(model, blocks) if frozen else None
    return PromptBatch(
        pad([prompt.ids for prompt in prompts], padding_value=pad_id).to(model.device),
        pad([prompt.positions.T for prompt in prompts]).movedim(2, 0).to(model.device),
        None if mask.all() else mask.to(model.device),
        pad([prompt.patches() for prompt in prompts], padding_value=-1),
        blocks,
        features,
    )


def blacken(
    prompts: Sequence[Prompt], image_processor: Any, probability: float, seed: int
) -> list[Prompt]:
    """Copies of the prompts with pictures in which each patch is black with this probability.

    A patch is one of the vision encoder's: 14 x 14 pixels of the resized picture, or 16 x 16 in
    Qwen3-VL, and in a video the same square of the two frames that the encoder takes together. The
    choice depends only on the seed and on the prompt's number in the run, not on its batch or rank.
    """
    mean, std = torch.tensor([image_processor.image_mean, image_processor.image_std])
    black = -mean / std  # 0 in every channel, normalised as the pictures are
    blackened = []
    for prompt in prompts:
        # The 1 sets these numbers apart from those that sample the prompt's responses.
        rng = np.random.default_rng([seed, prompt.number, 0, 1])
        blocks = []
        for block in prompt.blocks:
            is_black = torch.from_numpy(rng.random(len(block.pixels)) < probability)
            values = black.repeat_interleave(block.pixels.shape[1] // len(black))
            pixels = torch.where(is_black[:, None], values, block.pixels)
            blocks.append(replace(block, pixels=pixels))
        blackened.append(replace(prompt, blocks=blocks))
    return blackened


def encoder_outputs(model: Module, prompts: PromptBatch) -> dict[str, Any]:
    """The visual features in the form that the model's forward takes (`mm_encoder_outputs`): those
    of all images in order, and those of all videos."""
    rows = prompts.features or visual_features(model, prompts.blocks)
    features = [feature for row in rows for feature in row]
    kinds = [block.is_video for row in prompts.blocks for block in row]
    kinds += [False] * (len(features) - len(kinds))  # blank images
    outputs = {}
    for kind, is_video in (("image", False), ("video", True)):
        chosen = [f for f, video in zip(features, kinds, strict=True) if video == is_video]
        if chosen:
            first, *deeper = zip(*chosen, strict=True)  # by level
            outputs[kind] = BaseModelOutputWithDeepstackFeatures(
                pooler_output=first, deepstack_features=deeper
            )
    return outputs
