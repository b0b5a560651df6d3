"""What any paper on Qwen-VL would have identically: models, data, attention, rollout, scoring,
reward, evaluation, runs.

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
import resource
import shutil
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
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

from data import Example, Processor, Prompt, PromptBatch, collate, encoder_outputs

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


def load_model(
    path: str | Path, train_vision: bool = False, field: str = "--model"
) -> tuple[Module, Processor]:
    """Load a Qwen2-VL or Qwen2.5-VL checkpoint whose text layers run `grouped_attention`.

    The vision encoder and its projector are frozen unless `train_vision` [paper: frozen]. Weights
    are float32: in pure bfloat16 an update at learning rate 1e-6 is below the resolution of most
    weights. Safetensors only, and no code from the checkpoint is run.

    Raises:
        UsageError: `path` is neither a checkpoint directory nor a hub name, lacks a part, or holds
        another family of models.
    """
    remedy = "give a checkpoint directory or a hub name (owner/name)"
    named = f"{field} {path}"
    is_name = str(path).count("/") == 1 and not str(path).startswith((".", "/", "runs/"))
    require(Path(path).is_dir() or is_name, f"{named}: no such directory; {remedy}")
    families = ("qwen2_vl", "qwen2_5_vl")
    try:
        config = AutoConfig.from_pretrained(path)
        family = f"{named}: is a {config.model_type!r} model"
        require(config.model_type in families, f"{family}; supported are {' and '.join(families)}")
        sliding = "sliding_attention" in config.text_config.layer_types
        require(not sliding, f"{family} with sliding-window attention, which is not supported")
        tokenizer = AutoTokenizer.from_pretrained(path)
        require(bool(tokenizer.chat_template), f"{named}: has no chat template; use a chat model")
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            attn_implementation={"text_config": "grouped_sdpa", "vision_config": "sdpa"},
            dtype=torch.float32,
            use_safetensors=True,
        )
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise UsageError(f"{named}: {reason}; {remedy}") from None
    ends = model.generation_config.eos_token_id is not None
    require(ends, f"{named}: names no end-of-turn token; add eos_token_id to its generation config")
    model.model.visual.requires_grad_(train_vision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), Processor(tokenizer, image_processor)


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
        "mm_encoder_outputs": encoder_outputs(prompts),
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
        mm_encoder_outputs=encoder_outputs(prompts),
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


def accuracy(text: str, solution: str) -> float:
    """Eq. 7: 1 if what stands in the first answer tags is exactly the solution, else 0."""
    return float(extract_answer(text) == solution.strip())


# 7. Evaluation and pictures


@dataclass
class Look:
    """One held-out example after an evaluation: response, verdict, and where the model looked when
    it answered."""

    example: Example
    response: str
    correct: bool
    attention: Tensor  # (visual tokens,): mass in the row that first names the answer
    grid: tuple[int, int, int]  # temporal patches, rows and columns of visual tokens


@torch.no_grad()
def evaluate(
    model: Module,
    processor: Processor,
    prompts: Sequence[Prompt],
    think: bool,
    max_new_tokens: int,
    attn_layer: int = -1,
    batch_size: int = 64,
) -> tuple[dict[str, float], list[Look]]:
    """Greedy accuracy, format and length over all prompts, and on the toy the attention mass on the
    target.

    `eval/target_attn` is the mass on the target's visual tokens in layer `attn_layer`, in the row
    that predicts the first token of the answer where the response first names it, counted as 0 for
    a response without an answer; `eval/target_attn_l<i>` is the same for every layer.
    """
    has_targets = all(prompt.example.target for prompt in prompts)
    layers = range(model.config.text_config.num_hidden_layers) if has_targets else [attn_layer]
    merge = model.config.vision_config.spatial_merge_size
    placeholders = torch.tensor([model.config.image_token_id, model.config.video_token_id])
    looks, on_target, lengths, formats = [], [], [], []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        batch = collate(model, chunk, processor.tokenizer.pad_token_id)
        rollout = generate_group(model, batch, 1, max_new_tokens)
        texts = rollout.texts(processor.tokenizer)
        attentions = torch.stack(score(model, rollout, attn_layers=layers).attentions).cpu()
        for row, (prompt, (text,)) in enumerate(zip(chunk, texts, strict=True)):
            ids = rollout.completion_ids[row, 0][rollout.completion_mask[row, 0]]
            visual = torch.isin(batch.ids[row].cpu(), placeholders).nonzero()[:, 0]
            mass = torch.zeros(len(layers), len(visual))
            if (token := answer_token(processor.tokenizer, ids.tolist(), text)) is not None:
                mass = attentions[:, row, 0, token, visual]
            t, h, w = prompt.grid.tolist()
            correct = accuracy(text, prompt.example.solution) == 1.0
            grid = (t, h // merge, w // merge)
            gaze = mass[attn_layer if has_targets else 0]
            looks.append(Look(prompt.example, text, correct, gaze, grid))
            on_target.append(mass[:, list(prompt.example.target)].sum(dim=1))
            lengths.append(len(ids))
            formats.append(has_format(text, think) and not bool(rollout.truncated[row, 0]))
    metrics = {
        "eval/accuracy": float(np.mean([look.correct for look in looks])),
        "eval/format": float(np.mean(formats)),
        "eval/completion_len": float(np.mean(lengths)),
    }
    if has_targets:
        by_layer = torch.stack(on_target).mean(dim=0).tolist()
        metrics["eval/target_attn"] = by_layer[attn_layer]
        metrics |= {f"eval/target_attn_l{layer}": by_layer[layer] for layer in layers}
    return metrics, looks


def answer_token(tokenizer: Any, ids: list[int], text: str) -> int | None:
    """Index of the response token that begins the first mention of the answer, or None if there is
    no answer.

    A thinking response names its finding in the thought; the row that looks is the one that
    predicts it there.
    """
    answer = extract_answer(text)
    if not answer:
        return None
    mention = text.find(answer)

    def reached(t: int) -> bool:
        return len(tokenizer.decode(ids[: t + 1])) > mention

    return bisect_left(range(len(ids)), True, key=reached)


def draw_looks(path: Path, rows: dict[str, list[Look]], count: int = 6) -> None:
    """Draw where the model looked when it answered: a row of held-out examples for each entry of
    `rows`.

    Bright cells hold attention mass (heads averaged), the rest is dimmed; a frame marks the target.
    A video is a mosaic of its temporal patches, in reading order, of which the first frame is
    shown. Without an answer there is nothing to show, and nothing is dimmed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    count = min([count, *map(len, rows.values())])
    size = (2.3 * count, 2.8 * len(rows))
    figure, axes = pyplot.subplots(len(rows), count, figsize=size, squeeze=False)
    for (label, looks), line in zip(rows.items(), axes, strict=True):
        for look, axis in zip(looks[:count], line, strict=True):
            t, h, w = look.grid
            frames = look.example.media[:: 2 if look.example.is_video else 1][:t]
            width, height = frames[0].size
            columns = math.ceil(math.sqrt(t))
            heat = look.attention.view(t, h, w).numpy()
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
            mass = look.attention[list(look.example.target)].sum()
            verdict, colour = ("right", "green") if look.correct else ("WRONG", "red")
            said = extract_answer(look.response) or "no answer"
            axis.set_title(
                f"{verdict}: {said[:16]}\nmass on target {mass:.2f}", color=colour, fontsize=9
            )
            axis.set_xlabel(look.example.problem[:32], fontsize=8)
            right = (columns * 1.05 - 0.05) * width
            bottom = (math.ceil(t / columns) * 1.05 - 0.05) * height
            axis.set(xlim=(0, right), ylim=(bottom, 0))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def draw_curves(path: Path, metrics: Path, names: Sequence[str]) -> None:
    """Draw the named metrics of a run's `metrics.jsonl` against the step, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


# 8. Runs


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


class Run:
    """A run directory, all there is to know of a run: `args.json`, `metrics.jsonl`,
    `samples.jsonl`, `tensorboard/`, pictures and `checkpoint/`.

    A run already at `out` is moved to `<out>.1` and so on, or replaced with `--overwrite`; see
    `check_run` for what is never touched. `--track` sends the metrics to Weights & Biases too.
    """

    def __init__(self, args: Any):
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

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics, to every sink."""
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

    def save_checkpoint(
        self, model: Module, processor: Processor, extra: Callable[[Path], None]
    ) -> Path:
        """Write `checkpoint/`, which plain `from_pretrained` loads: aside first, then renamed, so
        never half-written."""
        final = self.out / "checkpoint"
        aside = Path(tempfile.mkdtemp(prefix="checkpoint.", dir=self.out))
        model.save_pretrained(aside)
        processor.save(aside)
        extra(aside)
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
