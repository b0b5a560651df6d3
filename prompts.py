"""Turn a question about an image or a video into prompt tensors for Qwen2-VL and Qwen2.5-VL. The
questions come from toy.py or, for data files, from data.py.

This module uses only a checkpoint's tokenizer and PIL image processor, so results are the same with
and without torchvision.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from torch.nn import Module
from transformers.modeling_outputs import BaseModelOutputWithPooling

# The family's minimum pixels of an image, which its checkpoints state, and of a video frame, which
# they do not: that is the default of Qwen2VLVideoProcessor and of qwen-vl-utils.
IMAGE_LEAST, FRAME_LEAST = 56 * 56, 128 * 28 * 28


@dataclass
class Media:
    """One image, or the frames of one video. `seconds_per_patch` is the time between two temporal
    patches of a video, which determines Qwen2.5-VL's positions."""

    frames: list[Image.Image]
    is_video: bool = False
    seconds_per_patch: float = 1.0


@dataclass
class Example:
    """One question about images or videos.

    `response` is a demonstration for SFT. `target`, on the toy only, holds the indices of the
    visual tokens that show what the question asks about. `problem_type` selects the accuracy
    measure; "" means exact match. `name` identifies the example's row. `source` is its data source.
    """

    problem: str
    solution: str
    media: list[Media]
    response: str | None = None
    target: tuple[int, ...] = ()
    problem_type: str = ""
    options: tuple[str, ...] = ()
    name: str = ""
    source: str = ""


@dataclass
class Prompt:
    """An `Example` as tensors: `ids` (P,), `positions` (3, P), `pixels` (patches, values), `grid`
    (3,) = t, h, w. `number` is the prompt's number in the run, counted from 0."""

    ids: Tensor
    positions: Tensor
    pixels: Tensor
    grid: Tensor
    is_video: bool
    example: Example
    number: int = 0


@dataclass(frozen=True)
class PromptConfig:
    """How questions are asked and responses are judged. It is saved with the weights as
    `prompt.json`, so that `evaluate.py` asks what the training script asked.

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


@dataclass
class Processor:
    """Tokenizer and PIL image processor of a checkpoint, which turn an `Example` into tensors
    without torchvision.

    `config` is the model's. `files` are the checkpoint's own files other than the weights; every
    saved checkpoint includes them. `max_pixels` limits the size of an image and `frame_pixels` that
    of a video frame, before it is cut into patches; None keeps the image processor's own limit.
    `end_ids` are the tokens that end a response according to the tokenizer and the chat template.
    """

    config: Any
    tokenizer: Any
    image_processor: Any
    prompt_config: PromptConfig
    files: dict[str, bytes] = field(default_factory=dict)
    max_pixels: int | None = None
    frame_pixels: int | None = None
    end_ids: set[int] = field(default_factory=set)

    def save(self, directory: Path) -> None:
        files = self.files | {"prompt.json": self.prompt_config.content()}
        for name, content in files.items():
            (directory / name).write_bytes(content)

    def set_in_file(self, name: str, **values: str) -> None:
        """Set values in a JSON file of the checkpoint, if it has that file."""
        if name in self.files:
            content = json.loads(self.files[name]) | values
            self.files[name] = json.dumps(content, indent=2, ensure_ascii=False).encode()


END_OF_TURN = "<|im_end|>"
# The chat template of both families' instruct models, for checkpoints without a usable one.
CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A template is a program, so it may raise many errors. For example, a text-only template adds a
# list of parts to a string.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError)
TEMPLATE_ERRORS += (ValueError,)


def render_turn(
    tokenizer: Any, is_video: bool, question_first: bool = False, template: str | None = None
) -> tuple[str, str]:
    """Render a user's question about one image or video; returns the text before and after the
    question.

    Raises:
        ValueError: the chat template does not render the question and the placeholder exactly once
            each.
    """
    kind = "video" if is_video else "image"
    marker = (
        "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the question while the template is rendered
    )
    content = [{"type": kind}, {"type": "text", "text": marker}]
    messages = [{"role": "user", "content": content[::-1] if question_first else content}]
    turn = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    pad = f"<|{kind}_pad|>"
    wrapped = f"<|vision_start|>{pad}<|vision_end|>"
    if not turn.strip():
        raise ValueError(f"renders nothing for a question about one {kind}")
    if not turn.count(marker) == turn.count(pad) == turn.count(wrapped) == 1:
        raise ValueError(f"does not render the question and {wrapped} once each")
    before, after = turn.split(marker)
    return before, after


def read_prompt_config(files: dict[str, bytes]) -> PromptConfig | None:
    """The prompt configuration among a checkpoint's files, or None if it has none.

    Raises:
        ValueError: `prompt.json` is not a prompt configuration.
    """
    if "prompt.json" not in files:
        return None
    try:
        config = PromptConfig(**json.loads(files["prompt.json"]))
        if not all(isinstance(text, str) for text in config.prompts.values()):
            raise TypeError("a prompt is not text")
        return config
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"its prompt.json cannot be used ({error}); mend or delete it") from None


def template_fault(tokenizer: Any, template: str) -> str:
    """The fault of a chat template in words, or "" if it works."""
    try:
        for is_video in (False, True):
            render_turn(tokenizer, is_video, template=template)
    except TEMPLATE_ERRORS as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return ""


def repair_turns(processor: Processor) -> str:
    """Replace a chat template that cannot ask about images and videos, and make the token that ends
    its turns end a response. Returns the changes in words, or "".

    A base model has a text-only template, one that renders nothing, or none. It gets the template
    of its `chat_template.json` if that one works, otherwise `CHATML`. Each change is also made in
    `files`, wherever a program that loads the checkpoint may look for it.
    """
    tokenizer, files, changes = processor.tokenizer, processor.files, []
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    legacy = files.get("chat_template.json")  # AutoProcessor prefers this one
    if legacy is not None:
        content = json.loads(legacy)
        legacy = content.get("chat_template") if isinstance(content, dict) else None
        if not isinstance(legacy, str):
            raise ValueError(
                "its chat_template.json holds no chat_template; mend or delete that file"
            )
    templates = [x for x in (own, legacy) if isinstance(x, str) and x]
    faults = {template: template_fault(tokenizer, template) for template in templates}
    if not own or any(faults.values()):
        good = [template for template, fault in faults.items() if not fault]
        if not good and END_OF_TURN not in tokenizer.get_vocab():
            raise ValueError(f"it has no chat template that works, and no {END_OF_TURN} for one")
        tokenizer.chat_template = template = good[0] if good else CHATML
        files["chat_template.jinja"] = template.encode()
        processor.set_in_file("tokenizer_config.json", chat_template=template)
        processor.set_in_file("chat_template.json", chat_template=template)
        fault = next(filter(None, faults.values()), "it has none")
        instead = "that of another of its files" if good else "Qwen-VL's ChatML"
        changes.append(f"its chat template cannot be used ({fault}); {instead} takes its place")
    ends = {tokenizer.eos_token_id}
    if tokenizer.eos_token != END_OF_TURN and END_OF_TURN in render_turn(tokenizer, False)[1]:
        changes.append(f"{END_OF_TURN} ends a response, as {tokenizer.eos_token} does")
        tokenizer.eos_token = END_OF_TURN
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            processor.set_in_file(name, eos_token=END_OF_TURN)
    processor.end_ids = (ends | {tokenizer.eos_token_id}) - {None}
    return "; ".join(changes)


def encode_prompt(processor: Processor, example: Example) -> Prompt:
    """Render the chat template, expand the placeholder to one token per visual token, and compute
    the positions.

    The text of the user's turn is tokenised separately from the template, with special tokens
    split, so an `<|image_pad|>` in a data file remains text and never becomes a placeholder.
    """
    (media,) = example.media
    pixels, grid = process_media(processor, media)
    tokenizer, config, asked = processor.tokenizer, processor.config, processor.prompt_config
    before, after = render_turn(tokenizer, media.is_video, asked.question_first)
    ids = tokenizer.encode(before, add_special_tokens=False)
    text = asked.ask(example).strip()
    ids += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    ids += tokenizer.encode(after, add_special_tokens=False)
    placeholder = config.video_token_id if media.is_video else config.image_token_id
    at = ids.index(placeholder)
    visual_tokens = int(grid.prod()) // config.vision_config.spatial_merge_size**2
    ids = ids[:at] + [placeholder] * visual_tokens + ids[at + 1 :]
    positions = mrope_positions(len(ids), at, grid, config, media.is_video, media.seconds_per_patch)
    example = replace(example, target=target_tokens(processor, example, grid))
    return Prompt(torch.tensor(ids), positions, pixels, grid, media.is_video, example)


def target_tokens(processor: Processor, example: Example, grid: Tensor) -> tuple[int, ...]:
    """Indices of the visual tokens that show the target.

    `Example.target` assumes one token per cell. A processor that enlarges small pictures produces
    several tokens per cell.
    """
    if not example.target:
        return ()
    merge = processor.image_processor.merge_size
    side = processor.image_processor.patch_size * merge
    width, height = (edge // side for edge in example.media[0].frames[0].size)  # in cells
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    token = torch.arange(frames * rows * columns)
    frame, row, column = token // (rows * columns), token // columns % rows, token % columns
    cell = (frame * height + row * height // rows) * width + column * width // columns
    return tuple(token[torch.isin(cell, torch.tensor(example.target))].tolist())


def process_media(processor: Processor, media: Media) -> tuple[Tensor, Tensor]:
    """Pixels (patches, channels * 2 * patch * patch) and grid (t, h, w) of one image or one video.

    A temporal patch holds two frames. An odd number of frames is padded by repeating the last, as
    the family's own video processor does. An image fills both halves with itself. Frames pass
    through the image processor, so they are resized and normalised like images.

    A small frame is enlarged to the family's minimum for videos, or to `frame_pixels` if that is
    smaller. The family then rounds both sides up to whole tokens, which may exceed the budget: with
    a budget of 128 tokens, a frame of 320 x 180 gets 9 x 16.
    """
    image_processor = processor.image_processor
    budget = processor.frame_pixels if media.is_video else processor.max_pixels
    least, most = (image_processor.size[edge] for edge in ("shortest_edge", "longest_edge"))
    if media.is_video and least == IMAGE_LEAST:
        least = FRAME_LEAST  # a checkpoint with its own minimum (the toy) keeps it
    most = budget or most
    size = {"shortest_edge": min(least, most), "longest_edge": most}
    output = image_processor(images=media.frames, size=size, return_tensors="pt")
    pixels, grids = output["pixel_values"], output["image_grid_thw"]
    if not media.is_video:
        return pixels, grids[0]
    depth, side = image_processor.temporal_patch_size, image_processor.patch_size
    frames = pixels.view(len(media.frames), -1, 3, depth, side, side)[:, :, :, 0]
    if pad := -len(frames) % depth:
        frames = torch.cat([frames, frames[-1:].expand(pad, -1, -1, -1, -1)])
    patches = frames.unflatten(0, (-1, depth)).permute(
        0, 2, 3, 1, 4, 5
    )  # (t, h * w, channel, depth, side, side)
    grid = torch.tensor([len(patches), grids[0, 1], grids[0, 2]])
    return patches.reshape(-1, pixels.shape[1]), grid


def mrope_positions(
    length: int, start: int, grid: Tensor, config: Any, is_video: bool, seconds_per_patch: float
) -> Tensor:
    """Positions (3, P) on the time, height and width axes for a prompt whose only image or video
    begins at index `start`.

    Text after the vision block continues at the block's largest position + 1 on every axis, as in
    the models' release and in inference servers. transformers 5.23 instead starts text after a
    *video* at max(h, w) / 2 past its start, inside the video's own time axis. For images, both
    rules agree.
    """
    merge = config.vision_config.spatial_merge_size
    t, h, w = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    interval = (
        getattr(config.vision_config, "tokens_per_second", 1) * seconds_per_patch if is_video else 1
    )
    if config.model_type == "qwen2_vl":
        interval = 1  # Qwen2-VL counts temporal patches, Qwen2.5-VL counts time
    axes = ((torch.arange(t) * interval).long(), torch.arange(h), torch.arange(w))
    block = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + start
    after = torch.arange(length - start - block.shape[1]) + block.max() + 1
    return torch.cat([torch.arange(start).expand(3, -1), block, after.expand(3, -1)], dim=1)


@dataclass
class PromptBatch:
    """B prompts, left-padded to P: `ids` (B, P), `positions` (3, B, P), and `mask` (B, P), or None
    without padding.

    `features[b]` are the visual features of prompt b, (visual tokens, hidden), computed once and
    reused by every pass. If the vision encoder is trained, `features` is None: `pixels` are kept
    instead, and every pass computes the features of its own model. `grids` (B, 3) are t, h, w in
    patches before merging.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    features: list[Tensor] | None
    grids: Tensor
    is_video: list[bool]
    pixels: list[Tensor] | None = None

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
            None if self.features is None else self.features[rows],
            self.grids[rows],
            self.is_video[rows],
            None if self.pixels is None else self.pixels[rows],
        )


def visual_features(model: Module, pixels: Sequence[Tensor], grids: Tensor) -> list[Tensor]:
    """Visual features of each prompt, (visual tokens, hidden), in one call of the encoder."""
    joined = torch.cat(list(pixels)).to(model.device)
    return list(model.get_image_features(joined, grids.to(model.device)).pooler_output)


def collate(model: Module, prompts: Sequence[Prompt], pad_id: int) -> PromptBatch:
    """Left-pad prompts into a batch on the model's device, and compute their visual features if the
    vision encoder is frozen."""
    pixels = [prompt.pixels for prompt in prompts]
    grids = torch.stack([prompt.grid for prompt in prompts])
    frozen = not any(p.requires_grad for p in model.model.visual.parameters())
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    positions = torch.zeros(3, len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.ids) :] = prompt.ids
        positions[:, row, longest - len(prompt.ids) :] = prompt.positions
        mask[row, longest - len(prompt.ids) :] = True
    with torch.no_grad():
        features = visual_features(model, pixels, grids) if frozen else None
    return PromptBatch(
        ids.to(model.device),
        positions.to(model.device),
        None if mask.all() else mask.to(model.device),
        features,
        grids,
        [prompt.is_video for prompt in prompts],
        None if frozen else pixels,
    )


def encoder_outputs(model: Module, prompts: PromptBatch) -> dict[str, BaseModelOutputWithPooling]:
    """The visual features in the form that the model's forward takes (`mm_encoder_outputs`)."""
    features = prompts.features
    if features is None:
        features = visual_features(model, prompts.pixels, prompts.grids)
    outputs = {}
    for kind, wanted in (("image", False), ("video", True)):
        chosen = tuple(
            f for f, is_video in zip(features, prompts.is_video, strict=True) if is_video == wanted
        )
        if chosen:
            outputs[kind] = BaseModelOutputWithPooling(pooler_output=chosen)
    return outputs
