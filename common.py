"""What any paper on Qwen-VL would have identically: models, attention, rollout, scoring, reward,
runs. (From a question to tensors: prompts.py; data files: data.py; evaluation: evaluate.py.)

Nothing here knows about RAL. The shapes are the same everywhere: B prompts, G responses a prompt
(the group), P prompt positions (left-padded), T response positions, V vocabulary, L layers, H
heads. The one idea worth reading first is the packed layout of section 3: a prompt and its G
responses stand behind one another on the sequence axis,

    [ prompt (P) | response 1 (T) | response 2 (T) | ... | response G (T) ]

so that a prompt and its image are computed once for the whole group, in the rollout as in every
training pass.
"""

import json
import math
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from prompts import Example, Processor, PromptBatch, encoder_outputs

transformers_logging.disable_progress_bar()

# 1. Runtime


class UsageError(Exception):
    """Something the user can mend: one line that names the field, the value and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raise `UsageError(message)` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def run_script(args_class: type, main: Callable, description: str) -> None:
    """Parse the command line into `args_class` and run `main`; a `UsageError` becomes one line and
    exit status 2."""
    # A third value, None, means "as the checkpoint", which a plain flag could not say.
    flags = {"--think": "--think=True", "--no-think": "--think=False"}
    argv = [flags.get(word, word) for word in sys.argv[1:]]
    try:
        main(tyro.cli(args_class, args=argv, description=description))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def require_positive(args: Any, *names: str) -> None:
    """Refuse fields that are not above zero; None means "take the default" and passes."""
    for name in names:
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} {value}: must be above 0")


def require_not_negative(args: Any, *names: str) -> None:
    """Refuse fields below zero."""
    for name in names:
        value = getattr(args, name)
        require(value >= 0, f"--{name.replace('_', '-')} {value}: must be 0 or above")


def fill_defaults(args: Any, table: dict[str, Any]) -> Any:
    """`args` with every field that is None taken from `table`, if it is there."""
    return replace(
        args, **{name: value for name, value in table.items() if getattr(args, name) is None}
    )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch. On a CPU with a fixed thread count a run is then reproduced to
    the bit."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Stopwatch:
    """Seconds of each phase of a step, and the peak memory so far, for the metrics `perf/*`."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.metrics: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Put down the time since the last lap as `perf/<phase>_s`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.metrics[f"perf/{phase}_s"] = now - self.last
        self.last = now

    def stop(self, tokens: int) -> dict[str, float]:
        """All phases, the whole step, tokens a second, and peak memory (the GPU's, if any)."""
        seconds = self.last - self.start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        self.metrics |= {"perf/step_s": seconds, "perf/tokens_per_s": tokens / seconds}
        return self.metrics | {"perf/peak_mem_gb": peak / 2**30}


# 2. Model


FAMILIES = ("qwen2_vl", "qwen2_5_vl")
REMEDY = "give a checkpoint directory or a hub name (owner/name)"


@contextmanager
def one_line(named: str) -> Iterator[None]:
    """Turn what loading a checkpoint raises into a `UsageError` of one line."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise UsageError(f"{named}: {reason}; {REMEDY}") from None


def load_processor(
    path: str | Path,
    max_pixels: int | None = None,
    frame_pixels: int | None = None,
    field: str = "--model",
) -> tuple[Any, Processor]:
    """Config and processor of a Qwen2-VL or Qwen2.5-VL checkpoint, without its weights; the pixel
    budgets are those of `Processor`.

    Raises:
        UsageError: `path` is neither a checkpoint directory nor a hub name, lacks a part, or holds
        another family of models.
    """
    named = f"{field} {path}"
    is_name = str(path).count("/") == 1 and not str(path).startswith((".", "/", "runs/"))
    require(Path(path).is_dir() or is_name, f"{named}: no such directory; {REMEDY}")
    with one_line(named):
        config = AutoConfig.from_pretrained(path)
        family = f"{named}: is a {config.model_type!r} model"
        note = "; Qwen3-VL needs a time stamp for each frame in the prompt and positions to match"
        note = note if config.model_type.startswith("qwen3_vl") else ""
        known = config.model_type in FAMILIES
        require(known, f"{family}; supported are {' and '.join(FAMILIES)}{note}")
        sliding = "sliding_attention" in config.text_config.layer_types
        require(not sliding, f"{family} with sliding-window attention, which is not supported")
        tokenizer = AutoTokenizer.from_pretrained(path)
        require(bool(tokenizer.chat_template), f"{named}: has no chat template; use a chat model")
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        kinds = ("*.json", "*.txt", "*.jinja")
        if not (folder := Path(path)).is_dir():
            folder = Path(snapshot_download(str(path), allow_patterns=list(kinds)))
        weights = {"config.json", "generation_config.json", "model.safetensors.index.json"}
        files = {file.name: file for kind in kinds for file in folder.glob(kind)}
        files = {name: file.read_bytes() for name, file in files.items() if name not in weights}
    return config, Processor(tokenizer, image_processor, files, max_pixels, frame_pixels)


def load_model(
    path: str | Path, train_vision: bool = False, field: str = "--model"
) -> tuple[Module, Processor]:
    """Load a Qwen2-VL or Qwen2.5-VL checkpoint whose text layers run `grouped_attention`.

    The vision encoder and its projector are frozen unless `train_vision` [paper: frozen]. Weights
    are float32: in pure bfloat16 an update at learning rate 1e-6 is below the resolution of most
    weights. Safetensors only, and no code from the checkpoint is run.

    Raises:
        UsageError: as `load_processor`, or the weights are missing or unreadable.
    """
    _, processor = load_processor(path, field=field)
    with one_line(f"{field} {path}"):
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            attn_implementation={"text_config": "grouped_sdpa", "vision_config": "sdpa"},
            dtype=torch.float32,
            use_safetensors=True,
        )
    ends = model.generation_config.eos_token_id is not None
    remedy = "add eos_token_id to its generation config"
    require(ends, f"{field} {path}: names no end-of-turn token; {remedy}")
    model.model.visual.requires_grad_(train_vision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), processor


def load_teacher(path: str, model: Module, processor: Processor) -> Module:
    """Load a frozen teacher that reads the student's very token ids, positions and pixels.

    Raises:
        UsageError: there is no such teacher, or it is of another family than the student.
    """
    teacher, other = load_model(path, field="--teacher")
    ours, theirs = processor.tokenizer, other.tokenizer
    remedy = "distil within one family of models"
    same = ours.get_vocab() == theirs.get_vocab() and ours.eos_token_id == theirs.eos_token_id
    require(same, f"--teacher {path}: its tokenizer is not the student's; {remedy}")
    for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"):
        same = getattr(processor.image_processor, name) == getattr(other.image_processor, name)
        require(same, f"--teacher {path}: its image processor has another {name}; {remedy}")
    same = model.config.model_type == teacher.config.model_type  # it decides a video's positions
    require(same, f"--teacher {path}: its family is not the student's; {remedy}")
    return teacher.requires_grad_(False)


def require_layer(field: str, layer: int, model: Module) -> None:
    """Refuse an index that is no decoder layer of the model; negative ones count from the end."""
    layers = model.config.text_config.num_hidden_layers
    allowed = f"give {-layers} to {layers - 1}"
    known = -layers <= layer < layers
    require(known, f"{field} {layer}: the model has {layers} layers; {allowed}")


def vision_token_ids(config: Any) -> list[int]:
    """The special vision tokens, which no response may contain: suppressed while sampling and at
    -inf in every pass."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return [getattr(config, name) for name in names]


# 3. Attention


class GroupCache:
    """Keys and values of a grouped rollout: the prompt's once, (B, K, P, D), and each response's
    own, (B * G, K, T, D).

    K is the number of key-value heads. Decoding reads a prompt's keys once for its G responses, and
    appends in place.
    """

    def __init__(self, group_size: int, max_new_tokens: int):
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.prompt: list[tuple[Tensor, Tensor]] = []  # one pair a layer
        self.own: list[tuple[Tensor, Tensor]] = []
        self.length = 0  # response tokens written; whoever drives the decoding counts it up

    def add_prompt(self, key: Tensor, value: Tensor) -> None:
        batch, heads, _, width = key.shape
        self.prompt.append((key, value))
        shape = (batch * self.group_size, heads, self.max_new_tokens, width)
        self.own.append((key.new_empty(shape), value.new_empty(shape)))


@dataclass
class Layout:
    """How the rows of one forward lie, handed to `grouped_attention` as a keyword argument of the
    model's forward.

    With `cache`, the forward is a prefill (the cache is empty) or one step of decoding. Without, it
    is packed: `response_mask` (1 or B, 1, R * T, P + T) is the additive mask of a response over
    prompt keys and own keys, where R = H / K query heads share a key head. `attn_layers` are the
    layers whose attention policy is handed out.
    """

    prompt_len: int
    group_size: int
    prompt_mask: Tensor | None
    response_mask: Tensor | None = None
    cache: GroupCache | None = None
    attn_layers: tuple[int, ...] = ()
    attn_row: str = "predicting"


def grouped_attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Fused SDPA for a group, and on the chosen layers the attention policy (eq. 2) as the second
    return value.

    query (B, H, L, D), key and value (B, K, L, D) with rotary positions applied; returns (B, L, H,
    D). Transformers collects the second value under `output_attentions=True`, so that the policy
    arrives as `outputs.attentions`. Without a `layout` this is transformers' own SDPA.
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if layout.cache is not None and len(layout.cache.prompt) > module.layer_idx:
        return decode_attention(query, key, value, scaling, layout, module.layer_idx), None
    p = layout.prompt_len
    prompt_out = prompt_attention(
        query[:, :, :p], key[:, :, :p], value[:, :, :p], scaling, layout.prompt_mask
    )
    if layout.cache is not None:
        layout.cache.add_prompt(key, value)
        return prompt_out, None
    response_out = response_attention(query, key, value, scaling, layout)
    policy = None
    if module.layer_idx in layout.attn_layers:
        policy = attention_policy(query, key, scaling, layout)
    return torch.cat([prompt_out, response_out], dim=1), policy


AttentionInterface.register("grouped_sdpa", grouped_attention)
AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Causal attention inside the prompts; (B, P, H, D). Padded keys are hidden, padded rows see
    themselves."""
    if query.is_cuda:  # no fused float32 kernel there lets query heads share a key head
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    allowed = None
    if mask is not None:
        p = mask.shape[1]
        causal = torch.ones(p, p, dtype=torch.bool, device=mask.device).tril()
        itself = torch.eye(p, dtype=torch.bool, device=mask.device)
        allowed = (causal & mask[:, None, None, :]) | itself
    shares = not query.is_cuda
    return F.scaled_dot_product_attention(
        query, key, value, allowed, is_causal=mask is None, scale=scaling, enable_gqa=shares
    ).transpose(1, 2)


def split_group(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """(B, heads, P + G * T, D) to the prompt's (B, heads, P, D) and the responses' (B, G, heads, T,
    D)."""
    prompt, responses = x[:, :, : layout.prompt_len], x[:, :, layout.prompt_len :]
    return prompt, responses.unflatten(2, (layout.group_size, -1)).transpose(1, 2)


def response_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Layout
) -> Tensor:
    """Attention of the G responses, each over the prompt and itself, as one batched call; (B, G *
    T, H, D).

    The R query heads that share a key head become R * T rows of it, so that keys are never repeated
    by head.
    """
    b, h, _, d = query.shape
    g, k = layout.group_size, key.shape[1]

    def keys(x: Tensor) -> Tensor:  # (B * G, K, P + T, D)
        prompt, own = split_group(x, layout)
        return torch.cat([prompt[:, None].expand(-1, g, -1, -1, -1), own], dim=3).flatten(0, 1)

    rows = split_group(query, layout)[1].reshape(b * g, k, -1, d)  # (B * G, K, R * T, D)
    mask = layout.response_mask
    if len(mask) > 1:
        mask = mask.repeat_interleave(g, dim=0)
    out = F.scaled_dot_product_attention(
        rows, keys(key), keys(value), attn_mask=mask, scale=scaling
    )
    return out.view(b, g, h, -1, d).transpose(2, 3).flatten(1, 2)


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Layout, layer: int
) -> Tensor:
    """One new token a response over the prompt's keys and its own so far; (B * G, 1, H, D). Appends
    to the cache."""
    cache = layout.cache
    n, h, _, d = query.shape
    (prompt_key, prompt_value), (own_key, own_value) = cache.prompt[layer], cache.own[layer]
    b, k, p, _ = prompt_key.shape
    own_key[:, :, cache.length] = key[:, :, 0]
    own_value[:, :, cache.length] = value[:, :, 0]
    own_key, own_value = own_key[:, :, : cache.length + 1], own_value[:, :, : cache.length + 1]

    def by_prompt(x: Tensor) -> Tensor:  # (B * G, K, R, -1) to (B, K, G * R, -1)
        return x.view(b, -1, k, h // k, x.shape[-1]).transpose(1, 2).flatten(2, 3)

    def by_response(x: Tensor) -> Tensor:  # and back
        return x.unflatten(2, (-1, h // k)).transpose(1, 2).flatten(0, 1)

    rows = query.view(n, k, h // k, d) * scaling
    prompt_scores = by_prompt(rows) @ prompt_key.mT
    if layout.prompt_mask is not None:
        prompt_scores = prompt_scores.masked_fill(~layout.prompt_mask[:, None, None, :], -torch.inf)
    scores = torch.cat([by_response(prompt_scores), rows @ own_key.mT], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    out = by_response(by_prompt(weights[..., :p]) @ prompt_value) + weights[..., p:] @ own_value
    return out.reshape(n, 1, h, d)


# Attention weights computed at a time: 4 MB stay in a CPU's cache; a GPU wants few launches.
ATTENTION_CHUNK = 2**26 if torch.cuda.is_available() else 2**20


def attention_policy(query: Tensor, key: Tensor, scaling: float, layout: Layout) -> Tensor:
    """Eq. 2: head-averaged attention of the row of each response token, (B, G, T, P + T), float32;
    rows sum to 1 (an "own" row to 0 if all it saw was itself).

    With `attn_row="predicting"` the row of y_t is that of position t - 1, whose output *is* the
    prediction of y_t, so that of y_1 is the prompt's last row. With `attn_row="own"` it is y_t's
    own position with itself masked out: heads averaged first, then divided by what is left [ours:
    the paper does not say which]. The last T columns are the response's own positions. Rows are
    recomputed in chunks, in the backward pass too, so that no H x T x (P + T) array is ever kept:
    memory grows with T x (P + T).
    """
    prompt_key, own_key = (x.float() for x in split_group(key, layout))
    b, g, k, t, _ = own_key.shape
    prompt_rows, rows = split_group(query, layout)
    if layout.attn_row == "predicting":
        last = prompt_rows[:, None, :, -1:].expand(-1, g, -1, -1, -1)
        rows = torch.cat([last, rows[:, :, :, :-1]], dim=3)
    rows = rows.unflatten(2, (k, -1)).float() * scaling  # (B, G, K, R, T, D)
    # The predicting row t is position t - 1 and sees own keys j < t; y_t's own row sees j <= t.
    seen = torch.ones(t, t, dtype=torch.bool, device=key.device)
    seen = seen.tril(-1 if layout.attn_row == "predicting" else 0)
    hidden = None if layout.prompt_mask is None else ~layout.prompt_mask[:, None, None, None, None]

    def chunk(rows: Tensor, prompt_key: Tensor, own_key: Tensor, seen: Tensor) -> Tensor:
        r = rows.shape[3]
        by_prompt = rows.permute(0, 2, 1, 3, 4, 5).flatten(2, 4)  # (B, K, G * R * rows, D)
        prompt_scores = (by_prompt @ prompt_key.mT).unflatten(2, (g, r, -1)).transpose(1, 2)
        if hidden is not None:
            prompt_scores = prompt_scores.masked_fill(hidden, -torch.inf)
        own_scores = (rows.flatten(3, 4) @ own_key.mT).unflatten(3, (r, -1))
        own_scores = own_scores.masked_fill(~seen, -torch.inf)
        return torch.cat([prompt_scores, own_scores], dim=-1).softmax(dim=-1).mean(dim=(2, 3))

    size = max(1, ATTENTION_CHUNK // (b * g * query.shape[1] * (layout.prompt_len + t)))
    pieces = zip(rows.split(size, dim=4), seen.split(size), strict=True)
    parts = [checkpoint(chunk, r, prompt_key, own_key, s, use_reentrant=False) for r, s in pieces]
    policy = torch.cat(parts, dim=2)
    if layout.attn_row == "own":
        itself = F.pad(torch.eye(t, dtype=torch.bool, device=key.device), (policy.shape[-1] - t, 0))
        policy = policy.masked_fill(itself, 0.0)
        policy = policy / policy.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(policy.dtype).tiny)
    return policy


# 4. Rollout


@dataclass
class Rollout:
    """G responses to each of B prompts: `completion_ids` and `completion_mask` (B, G, T),
    `truncated` (B, G).

    The mask covers each response up to and including its first EOS; a response without one, cut at
    `max_new_tokens`, is truncated. Masks come from generated lengths, never from comparing ids with
    the padding id.
    """

    prompts: PromptBatch
    completion_ids: Tensor
    completion_mask: Tensor
    truncated: Tensor

    def __getitem__(self, rows: slice) -> "Rollout":
        return Rollout(
            self.prompts[rows],
            self.completion_ids[rows],
            self.completion_mask[rows],
            self.truncated[rows],
        )

    def texts(self, tokenizer: Any) -> list[list[str]]:
        """The responses as text, B lists of G, without their EOS; other special tokens stay, so
        that no reward overlooks them."""
        lengths = (self.completion_mask.sum(-1) - (~self.truncated).long()).flatten().tolist()
        rows = self.completion_ids.flatten(0, 1).tolist()
        texts = tokenizer.batch_decode([r[:n] for r, n in zip(rows, lengths, strict=True)])
        group = self.completion_ids.shape[1]
        return [texts[i : i + group] for i in range(0, len(texts), group)]


def sampling_noise(
    seed: int, prompts: Iterable[int], group_size: int, max_new_tokens: int
) -> Tensor:
    """Uniform numbers in [0, 1) for each token to be sampled, (B * G, T).

    A function of the seed, the prompt's number in the run and the response's number in its group
    alone: what the responses are does not depend on the batch or process a prompt was put into.
    """
    rows = [
        np.random.default_rng([seed, prompt, response]).random(max_new_tokens, dtype=np.float32)
        for prompt in prompts
        for response in range(group_size)
    ]
    return torch.from_numpy(np.stack(rows))


def pick_tokens(logits: Tensor, noise: Tensor | None, temperature: float, top_p: float) -> Tensor:
    """Next tokens (N,) from logits (N, V): the most likely without `noise`, else sampled by
    inverting the CDF at it.

    `top_p` keeps the smallest set of tokens whose probability reaches it. It shapes sampling only:
    the policy of the losses is softmax(logits / temperature) over the whole vocabulary.
    """
    if noise is None:
        return logits.argmax(dim=-1)
    probs, order = (logits.float() / temperature).softmax(dim=-1), None
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True)
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    if top_p < 1:
        total = cumulative.gather(1, (cumulative < top_p * total).sum(dim=-1, keepdim=True))
    # Below the total, the first sum above the noise is never that of a token of probability 0.
    below = torch.nextafter(total, torch.zeros_like(total))
    rank = torch.searchsorted(cumulative, (noise[:, None] * total).minimum(below), right=True)
    return (rank if order is None else order.gather(1, rank))[:, 0]


@torch.no_grad()
def generate_group(
    model: Module,
    prompts: PromptBatch,
    group_size: int,
    max_new_tokens: int,
    noise: Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Rollout:
    """Sample G responses to every prompt (greedy without `noise`), all decoded together after one
    prefill a prompt.

    A response ends with any of the model's EOS ids. Special vision tokens are never produced.
    """
    model.eval()
    config, device = model.config, model.device
    eos = model.generation_config.eos_token_id
    eos = torch.tensor(eos if isinstance(eos, list) else [eos], device=device)
    suppressed = torch.tensor(vision_token_ids(config), device=device)
    batch, prompt_len = prompts.ids.shape
    n = batch * group_size
    cache = GroupCache(group_size, max_new_tokens)
    layout = Layout(prompt_len, group_size, prompts.mask, cache=cache)
    inputs = {
        "input_ids": prompts.ids,
        "position_ids": prompts.positions,
        "mm_encoder_outputs": encoder_outputs(model, prompts),
    }
    logits = model(**inputs, layout=layout, use_cache=False, logits_to_keep=1).logits[:, -1]
    logits = logits.repeat_interleave(group_size, dim=0)
    position = prompts.positions[:, :, -1:].repeat_interleave(group_size, dim=1)
    noise = None if noise is None else noise.to(device)
    ids = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device)
    done = torch.zeros(n, dtype=torch.bool, device=device)
    lengths = torch.zeros(n, dtype=torch.long, device=device)
    check_every = 1 if device.type == "cpu" else 16  # reading `done` stalls a GPU
    for t in range(max_new_tokens):
        logits = logits.index_fill(-1, suppressed, -torch.inf)
        ids[:, t] = pick_tokens(logits, None if noise is None else noise[:, t], temperature, top_p)
        lengths += ~done
        done |= torch.isin(ids[:, t], eos)
        if t + 1 == max_new_tokens or (t % check_every == check_every - 1 and bool(done.all())):
            break
        cache.length = t
        step = {"input_ids": ids[:, t : t + 1], "position_ids": position + 1 + t}
        logits = model(**step, layout=layout, use_cache=False).logits[:, -1]
    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]
    shape = (batch, group_size, longest)
    return Rollout(prompts, ids[:, :longest].view(shape), mask.view(shape), ~done.view(shape[:2]))


# 5. Log-probabilities


@dataclass
class Scores:
    """What one packed pass says of the responses: `logps` and `entropy` (nats, no gradient), both
    (B, G, T).

    `logits` (B, G, T, V), where asked for, are the model's, before temperature and suppression.
    `attentions` are the policies of the asked layers, (B, G, T, P + T) each, in the order of the
    layers. Where the mask is False, `logps` are 0.
    """

    logps: Tensor
    entropy: Tensor
    mask: Tensor
    logits: Tensor | None
    attentions: tuple[Tensor, ...]


def score(
    model: Module,
    rollout: Rollout,
    temperature: float = 1.0,
    attn_layers: Sequence[int] = (),
    attn_row: str = "predicting",
    keep_logits: bool = False,
) -> Scores:
    """One packed forward over every prompt and its G responses: log-probabilities, entropy and
    attention policy.

    The policy is softmax(logits / temperature) with the special vision tokens at -inf, the same in
    sampling, old, reference and current passes. A vision token inside a response is replaced by
    padding and masked.
    """
    prompts, config = rollout.prompts, model.config
    b, g, t = rollout.completion_ids.shape
    p = prompts.ids.shape[1]
    suppressed = torch.tensor(vision_token_ids(config), device=model.device)
    mask = rollout.completion_mask & ~torch.isin(rollout.completion_ids, suppressed)
    pad = config.text_config.pad_token_id or 0
    ids = torch.where(mask, rollout.completion_ids, pad)
    steps = torch.arange(t, device=model.device)
    # Every response goes on where the prompt ends: (3, B, 1, T).
    positions = prompts.positions[:, :, -1:, None] + 1 + steps
    positions = positions.expand(-1, -1, g, -1).flatten(2)
    text = config.text_config
    layout = Layout(
        p,
        g,
        prompts.mask,
        response_mask=response_mask(prompts, t, text, model.dtype),
        attn_layers=tuple(layer % text.num_hidden_layers for layer in attn_layers),
        attn_row=attn_row,
    )
    # Row t of response g predicts its token t; the prompt's last row predicts every first token.
    rows = p + t * torch.arange(g, device=model.device)[:, None] + steps - 1
    rows[:, 0] = p - 1
    outputs = model(
        input_ids=torch.cat([prompts.ids, ids.flatten(1)], dim=1),
        position_ids=torch.cat([prompts.positions, positions], dim=2),
        mm_encoder_outputs=encoder_outputs(model, prompts),
        logits_to_keep=rows.flatten(),
        layout=layout,
        output_attentions=bool(attn_layers),
        use_cache=False,
    )
    logits = outputs.logits.unflatten(1, (g, t))
    logps, entropy = token_logps(logits.flatten(0, 2), ids.flatten(), temperature, suppressed)
    logps = logps.view(b, g, t).masked_fill(~mask, 0.0)
    kept = logits if keep_logits else None
    return Scores(logps, entropy.view(b, g, t), mask, kept, outputs.attentions or ())


def response_mask(prompts: PromptBatch, t: int, config: Any, dtype: torch.dtype) -> Tensor:
    """Additive mask of a response over (prompt, itself), repeated for the heads that share a key
    head: see `Layout`."""
    device, p = prompts.ids.device, prompts.ids.shape[1]
    own = torch.full((t, t), -torch.inf, device=device).triu(1)
    mask = F.pad(own, (p, 0))[None, None]  # (1, 1, T, P + T)
    if prompts.mask is not None:
        hidden = torch.zeros(prompts.mask.shape, device=device)
        hidden = hidden.masked_fill(~prompts.mask, -torch.inf)
        mask = mask + F.pad(hidden, (0, t))[:, None, None]
    return mask.repeat(1, 1, config.num_attention_heads // config.num_key_value_heads, 1).to(dtype)


LOGIT_CHUNK = 2**24  # logits turned to float32 at a time (64 MB)


def by_rows(
    function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, elements: int = LOGIT_CHUNK
) -> tuple[Tensor, ...]:
    """Apply `function` to tensors of N rows, in chunks that the backward pass recomputes.

    The first one decides how many rows make a chunk of `elements`. So neither the float32 copy of
    152k logits a token nor the temporaries of a divergence of attentions are ever whole.
    """
    size = max(1, elements // tensors[0].shape[-1])
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    parts = [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def token_logps(
    logits: Tensor, targets: Tensor, temperature: float, suppressed: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row, both (N,), float32, from logits
    (N, V) in any dtype."""

    def chunk(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (logits.float() / temperature).index_fill(-1, suppressed, -torch.inf)
        logps = scaled.log_softmax(dim=-1)
        with torch.no_grad():
            entropy = -torch.nansum(logps.exp() * logps, dim=-1)
        return logps.gather(-1, targets[:, None])[:, 0], entropy

    return by_rows(chunk, logits, targets)


def response_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (..., T) over the tokens of each response; 0 for a response with no token left.

    Every loss is the mean of this over all responses of an optimiser step, so every response weighs
    the same whatever its length, and the update does not depend on how the step was cut into
    microbatches.
    """
    return torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)


# 6. Reward


def extract_answer(text: str) -> str | None:
    """What stands in the first `<answer>...</answer>`, stripped, or None.

    >>> extract_answer("<think> no </think> <answer> red </answer>")
    'red'
    """
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    return None if start < 0 or end < 0 else text[start + len("<answer>") : end].strip()


def has_format(text: str, think: bool) -> bool:
    """Whether `text` is `<think>...</think><answer>...</answer>` (eq. 7), or the answer alone
    without `think` [ours].

    Exactly one of each tag, in order, and nothing but white space before, between and after.

    >>> has_format("<think> the star </think> <answer> red </answer>", think=True)
    True
    """
    text = text.strip()
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    if [text.count(tag) for tag in tags] != [int(think), int(think), 1, 1] or not text.endswith(
        "</answer>"
    ):
        return False
    if not think:
        return text.startswith("<answer>")
    close, answer = text.find("</think>"), text.find("<answer>")
    return (
        text.startswith("<think>")
        and close < answer
        and not text[close + len("</think>") : answer].strip()
    )


def accuracy(text: str, example: Example, rule: str = "by-type") -> float:
    """Eq. 7: what the first answer in `text` is worth, between 0 and 1.

    Exactly the solution or nothing (`rule="exact"`, the paper's, and where an example names no
    type), or by its problem type, as Video-R1 judges: options by letter, numbers to two decimals,
    transcriptions by word error rate, free text by ROUGE, regression by relative error. [ours]: an
    option's letter may come with brackets, a point or its text.
    """
    answer, solution = extract_answer(text), example.solution.strip()
    if answer is None:
        return 0.0
    judges = {
        "multiple choice": same_option,
        "numerical": same_number,
        "regression": closeness,
        "OCR": word_accuracy,
        "free-form": rouge,
    }
    judge = judges.get(example.problem_type) if rule == "by-type" else None
    return float(answer == solution) if judge is None else float(judge(answer, solution))


def option_letter(answer: str) -> str:
    """The letter of an option written as `A`, `A.`, `(A)`, `A. a red car` or `(A) a red car`; else
    the answer itself."""
    found = re.fullmatch(r"\(([A-Z])\).*|([A-Z])(?:[.:)].*)?", answer, re.DOTALL)
    return answer if found is None else found[1] or found[2]


def same_option(answer: str, solution: str) -> bool:
    return option_letter(answer) == option_letter(solution)


def number(text: str) -> float:
    """The number in `text`, thousands separated by commas or not; NaN, equal to nothing, if there
    is none."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def same_number(answer: str, solution: str) -> bool:
    """Equal after rounding to two decimals, and both with or both without a decimal point."""
    same = round(number(answer), 2) == round(number(solution), 2)
    return same and ("." in answer) == ("." in solution)


def closeness(answer: str, solution: str) -> float:
    """1 - min(1, |p - g| / |g|); for g = 0 whether p is 0 too."""
    p, g = number(answer), number(solution)
    if math.isnan(p) or math.isnan(g):
        return 0.0
    return float(p == g) if g == 0 else 1 - min(1.0, abs(p - g) / abs(g))


def word_accuracy(answer: str, solution: str) -> float:
    """1 - word error rate, not below 0."""
    import jiwer

    return 1 - min(1.0, jiwer.wer(solution, answer))


@cache
def rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(answer: str, solution: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming."""
    scores = rouge_scorer().score(solution, answer)
    return sum(score.fmeasure for score in scores.values()) / len(scores)


# 7. Runs


def check_run(args: Any, *inputs: str) -> None:
    """Refuse, before any work is done, an `--out` that cannot become this run's directory.

    `inputs` are the checkpoints that the run reads: it must not move or replace them.
    """
    out = Path(args.out)
    require(not out.exists() or out.is_dir(), f"--out {out}: is a file; choose another")
    busy = out.is_dir() and any(out.iterdir())
    is_run = (out / "args.json").is_file()
    require(not busy or is_run, f"--out {out}: exists and is not a run; choose another")
    for path in inputs:
        holds = out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents)
        require(not holds, f"--out {out}: holds {path}, which this run reads; choose another")
    parent = next(parent for parent in out.resolve().parents if parent.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    require(writable, f"--out {out}: {parent} cannot be written to; choose another")
    if args.track and find_spec("wandb") is None:
        raise UsageError("--track: wandb is not installed; `pip install wandb`, or leave it out")


@dataclass
class Skipped:
    """The account of bad rows. It stops the run when more than `most` of the rows read so far, or
    of the file's first 1,000, are bad."""

    most: float = 0.0
    rows: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    read: int = 0
    file: TextIO | None = None  # skipped.jsonl

    def add(self, bad: dict[str, str]) -> None:
        self.read += 1 + len(bad)
        new = {name: reason for name, reason in bad.items() if name not in self.bad}
        self.bad |= new
        if self.file is not None:
            self.write(new)
        if len(self.bad) > self.most * max(self.read, min(self.rows, 1000)):
            last = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.items())[-2:])
            count = f"{len(self.bad)} bad rows among the first {self.read}"
            remedy = "--check-data lists them all; mend them, or raise --max-skipped"
            raise UsageError(f"--max-skipped {self.most}: {count} ({last}); {remedy}")

    def open(self, path: Path) -> None:
        """Write what is known, and from now on each bad row as it is met."""
        self.file = path.open("w")
        self.write(self.bad)

    def write(self, bad: dict[str, str]) -> None:
        for name, reason in bad.items():
            line = json.dumps({"row": name, "reason": reason}, ensure_ascii=False)
            self.file.write(line + "\n")
        self.file.flush()


class Run:
    """A run directory, all there is to know of a run: `args.json`, `metrics.jsonl`,
    `samples.jsonl`, `skipped.jsonl`, `tensorboard/`, pictures and `checkpoint/`.

    A run already at `out` is moved to `<out>.1` and so on, or replaced with `--overwrite`; see
    `check_run` for what is never touched. `--track` sends the metrics to Weights & Biases too.
    """

    def __init__(self, args: Any, skipped: Skipped):
        from torch.utils.tensorboard import SummaryWriter

        self.out, self.args, self.wandb = Path(args.out), asdict(args), None
        if args.track:  # before anything is moved: it may fail
            import wandb

            self.wandb = wandb.init(project="ral", name=self.out.name, config=self.args)
        if self.out.exists() and any(self.out.iterdir()):
            if args.overwrite:
                shutil.rmtree(self.out)
            else:
                numbers = range(1, sys.maxsize)
                aside = next(p for n in numbers if not (p := Path(f"{self.out}.{n}")).exists())
                self.out.rename(aside)
                print(f"the run at {self.out} is now at {aside}")
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "args.json").write_text(json.dumps(self.args, indent=2) + "\n")
        self.metrics_file = (self.out / "metrics.jsonl").open("w")
        self.samples_file = (self.out / "samples.jsonl").open("w")
        self.tensorboard = SummaryWriter(self.out / "tensorboard")
        self.skipped = skipped
        if args.data:
            skipped.open(self.out / "skipped.jsonl")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics, to every sink."""
        if self.skipped.file is not None:
            metrics = metrics | {"data/skipped": len(self.skipped.bad)}
        self.metrics_file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.metrics_file.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def sample(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Write sampled responses with their rewards."""
        for row in rows:
            self.samples_file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        self.samples_file.flush()

    def save_checkpoint(self, model: Module, processor: Processor) -> Path:
        """Write `checkpoint/`, which plain `from_pretrained` loads, with every processor file of
        the model it began with: aside first, then renamed, so never half-written."""
        final = self.out / "checkpoint"
        aside = Path(tempfile.mkdtemp(prefix="checkpoint.", dir=self.out))
        model.save_pretrained(aside)
        processor.save(aside)
        aside.chmod(0o755)
        if final.exists():
            final.rename(aside.with_suffix(".old"))
        aside.rename(final)
        shutil.rmtree(aside.with_suffix(".old"), ignore_errors=True)
        return final

    def close(self) -> None:
        self.metrics_file.close()
        self.samples_file.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def print_summary(run: Run, before: dict, after: dict, steps: int, start: float, then: str) -> None:
    """The short table at the end of a run: what changed, what it took, where it is, what to try
    next."""
    print(f"\n{'held-out':<24}{'before':>8}{'after':>8}")
    for name in after:
        if name == "eval/accuracy" or name.startswith("eval/target_attn_l"):
            label = name.removeprefix("eval/").replace("target_attn_l", "on target, layer ")
            print(f"{label:<24}{before[name]:>8.3f}{after[name]:>8.3f}")
    seconds = round(time.time() - start)
    for label, value in (("steps", steps), ("seconds", seconds), ("run", run.out)):
        print(f"{label:<24}{value!s:>16}")
    print(f"pictures: {run.out}/attention.png, {run.out}/curves.png\nnext: {then}")
