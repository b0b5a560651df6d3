"""What does not depend on the method: models, attention, rollout, scoring and reward.

Shapes use the same letters everywhere: B prompts, G responses per prompt (the group), P prompt
positions (left-padded), T response positions, V vocabulary, H heads, K key-value heads, D their
width, L positions of a pass. The packed layout of section 2 places a prompt and its G responses one
after another on the sequence axis,

    [ prompt (P) | response 1 (T) | response 2 (T) | ... | response G (T) ]

so that the rollout and every training pass compute a prompt and its image once for the whole group.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, set_seed
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from support import answers, checkpoints, cli, data, disk, ranks, runs, toy
from support.checkpoints import load_processor, read_model, vision_token_ids, write_files
from support.memory import ATTENTION_CHUNK, LOGIT_CHUNK, empty_model, fit_memory
from support.prompts import (
    Example,
    Processor,
    Prompt,
    PromptBatch,
    PromptConfig,
    encode_prompt,
    encoder_outputs,
)
from support.ranks import compute_dtype, device, gather, on_rank_0, require, start_ranks, world_size
from support.states import State, find_state

transformers_logging.disable_progress_bar()

# 1. Model


def load_model(
    path: str | Path,
    train_vision: bool = False,
    lora_rank: int = 0,
    gradient_checkpointing: bool = False,
    frozen: bool = False,
    field: str = "--model",
) -> nn.Module:
    """Load a checkpoint of a known family whose text layers run `grouped_attention`.

    The vision encoder and its projector are frozen unless `train_vision` is set (paper: frozen).
    Trained weights are float32, whatever the compute dtype: in pure bfloat16, an update at learning
    rate 1e-5 is below the resolution of most weights. `lora_rank` freezes all weights and trains
    adapters on the language model's linear layers instead. The function reads only safetensors
    files and runs no code from the checkpoint.

    Raises:
        UsageError: as in `load_processor`, or the weights are missing or unreadable.
    """
    start_ranks()  # on a GPU one process is a group, too, whoever calls this
    processor = load_processor(path, field=field)
    options = {
        "attn_implementation": {"text_config": "grouped_sdpa", "vision_config": "sdpa"},
        "dtype": compute_dtype() if frozen or lora_rank else torch.float32,
    }
    if torch.cuda.is_available():
        # cuDNN's attention builds a plan for every new shape, and all shapes of a step differ.
        torch.backends.cuda.enable_cudnn_sdp(False)
    # A frozen model on a single rank needs neither sharding nor a second dtype.
    sharded = dist.is_initialized() and not (frozen and world_size() == 1)
    remedy = "add eos_token_id to its generation config"
    require(bool(processor.end_ids), f"{field} {path}: names no end-of-turn token; {remedy}")

    def read() -> nn.Module:
        with disk.loading(f"{field} {path}"):
            model = read_model(path, field, processor, options)
            if not frozen:  # what could fail at the end fails now
                with TemporaryDirectory() as trial:
                    write_files(Path(trial), model, processor, {})
        return model

    model = on_rank_0(read) if sharded else read()  # rank 0 reads for all ranks
    if sharded:  # the weights say whether they are tied
        processor.config.tie_word_embeddings = gather([model and checkpoints.is_tied(model)])[0]
    if model is None:
        model = empty_model(processor.config, **options)
        model.generation_config.eos_token_id = sorted(processor.end_ids)
    # In a copy, after loading: transformers would look for a package of that name.
    vision = copy(model.config.vision_config)
    vision._attn_implementation = "flash_by_length"
    for module in model.model.visual.modules():
        if hasattr(module, "config"):
            module.config = vision
    model.requires_grad_(not frozen and not lora_rank)
    model.model.visual.requires_grad_(train_vision and not frozen)
    if lora_rank:
        add_adapters(model, lora_rank, str(path))
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
        model.disable_input_require_grads()  # frozen inputs need no gradient
    model.eval()
    model.token_scores = MethodType(token_scores, model)
    if sharded:
        shard(model)
    else:
        model.to(device())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # perf/peak_mem_gb is the peak of the steps
    return model


def add_adapters(model: nn.Module, r: int, base: str) -> None:
    """Add LoRA adapters of rank `r` to every linear layer of the language model.

    The adapters are float32, are scaled by 2 and have no effect at first. Their config names `base`
    as the base model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=layers)
    config.base_model_name_or_path = base
    inject_adapter_in_model(config, model)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.forward = MethodType(adapted_linear, module)
            module.lora_A.float()
            module.lora_B.float()


def adapted_linear(self: nn.Module, x: Tensor) -> Tensor:
    """Compute what peft's own forward does for one adapter without dropout. Peft's bookkeeping
    takes longer than the matrix products of one decoded token."""
    out = self.base_layer(x)
    if self.disable_adapters:
        return out
    a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
    change = F.linear(F.linear(x.to(a.dtype), a), b) * self.scaling["default"]
    return (out + change).to(out.dtype)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Disable the adapters. Where only adapters are trained, this restores the reference model."""
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


def shard(model: nn.Module) -> None:
    """Shard a model's parameters over the process group with FSDP2.

    Only rank 0 holds the weights at first, so the host holds one copy, whatever the number of
    ranks. A layer's weights are gathered in `compute_dtype` when it runs. On a single rank, the
    frozen weights behind adapters are not sharded, because gathering them would hold the model
    twice.
    """
    weights = model.state_dict() if ranks.rank() == 0 else {}
    buffers = dict(model.named_buffers())
    model.to("meta")
    model.tie_weights()  # `to` creates one parameter per name
    # Inputs keep their dtype: the rotary tables of the vision encoder are float32.
    dtypes = {"param_dtype": compute_dtype(), "reduce_dtype": torch.float32}
    policy = fsdp.MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    outside = set()
    if world_size() == 1:
        frozen = (x for x in model.parameters() if not x.requires_grad)
        outside = {x for x in frozen if x.dtype == compute_dtype()}
    for block in (*model.model.language_model.layers, *model.model.visual.blocks):
        fsdp.fully_shard(block, mp_policy=policy, ignored_params=outside)
    fsdp.fully_shard(model, mp_policy=policy, ignored_params=outside)
    reshard_root(model)
    for method in ("get_image_features", "token_scores"):
        fsdp.register_fsdp_forward_method(model, method)
    model.to_empty(device=device())
    model.tie_weights()
    fill(model, weights, buffers)


def reshard_root(model: fsdp.FSDPModule) -> None:
    """Free the weights outside the layers after each pass of a frozen model. By default they stay
    gathered until the backward pass, which only a trained model has."""
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    model.set_reshard_after_forward(frozen, recurse=False)


def fill(model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Send each rank its shard of the weights and a copy of the buffers that rank 0 holds."""
    with torch.no_grad():  # what is not sharded, one at a time, so that it is never held twice
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not isinstance(parameter, DTensor):
                parameter.copy_(weights.pop(name))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, weights, options=options)
    # Checkpoints lack the rotary frequencies.
    for name, buffer in model.named_buffers():
        if ranks.rank() == 0:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep a sharded model's weights gathered while many forward passes run, as in a rollout.

    The weights are gathered once, not once per token, and no rank waits for another in between.
    FSDP's hooks, which would cost a fifth of a decoded token's time on the host, do not run.
    """
    shards = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    if not shards or getattr(model, "is_gathered", False):
        yield
        return
    model.set_reshard_after_forward(False, recurse=False)
    for module in shards:
        module.unshard()
    tables = [x for m in shards for x in (m._forward_pre_hooks, m._forward_hooks)]
    before = [dict(table) for table in tables]
    for table in tables:
        for key, hook in list(table.items()):
            if "_fully_shard" in hook.__module__:
                del table[key]
    model.is_gathered = True
    try:
        yield
    finally:
        model.is_gathered = False
        for table, hooks in zip(tables, before, strict=True):  # in their order
            hooks |= table  # with hooks that were added meanwhile
            table.clear()
            table.update(hooks)
        reshard_root(model)
        for module in shards:
            module.reshard()


def save_model(directory: Path | None, model: nn.Module, processor: Processor) -> None:
    """Write the weights and processor files to a directory that plain `from_pretrained` loads.

    Adapters are merged into the weights. The weights are saved in `compute_dtype`, so the saved
    model is the evaluated one. The adapters alone go to `adapter` beside the directory, for
    `peft.PeftModel.from_pretrained`. All ranks must call this function; ranks that write nothing
    pass None.
    """
    layers = {name: x for name, x in model.named_modules() if hasattr(x, "lora_A")}
    weights, adapters = {}, {}
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = named - {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        tensor = ranks.full_tensor(tensor)  # all ranks take part
        if "lora_" in name:
            if directory is not None:
                name = f"base_model.model.{name.replace('.default.', '.')}"
                adapters[name] = tensor.cpu().contiguous()
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            a, b = (ranks.full_tensor(x["default"].weight) for x in (layer.lora_A, layer.lora_B))
            tensor = tensor.float() + layer.scaling["default"] * (b @ a)
        if directory is not None:
            weights[name.replace(".base_layer", "")] = tensor.to("cpu", compute_dtype())
    if directory is not None:
        write_files(directory, model, processor, weights)
    if adapters:
        folder = directory.parent / "adapter"
        folder.mkdir(exist_ok=True)
        save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        model.peft_config["default"].save_pretrained(folder)
        processor.save(folder)
        (folder / "config.json").unlink(missing_ok=True)  # it would load as a full model


def load_teacher(path: str, processor: Processor, other: Processor) -> nn.Module:
    """Load a frozen teacher that takes the same token ids, positions and pixels as the student.
    `processor` is the student's and `other` the teacher's.

    Raises:
        UsageError: the two do not agree.
    """
    ours, theirs = processor.tokenizer, other.tokenizer
    remedy = "distil within one family of models"
    same = ours.get_vocab() == theirs.get_vocab() and ours.eos_token_id == theirs.eos_token_id
    require(same, f"--teacher {path}: its tokenizer is not the student's; {remedy}")
    for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"):
        same = getattr(processor.image_processor, name) == getattr(other.image_processor, name)
        require(same, f"--teacher {path}: its image processor has another {name}; {remedy}")
    same = processor.config.model_type == other.config.model_type  # it determines positions
    require(same, f"--teacher {path}: its family is not the student's; {remedy}")
    return load_model(path, frozen=True, field="--teacher")


def require_layer(field: str, layer: int, config: Any) -> None:
    """Refuse an index outside the model's decoder layers; negative ones count from the end."""
    layers = config.text_config.num_hidden_layers
    allowed = f"the model has {layers} layers; give {-layers} to {layers - 1}"
    require(-layers <= layer < layers, f"{field} {layer}: {allowed}")


# 2. Attention


class GroupCache:
    """Keys and values of a grouped rollout: the prompt's, stored once, (B, K, P, D), and each
    response's own, (B * G, K, T, D).

    K is the number of key-value heads. Decoding reads a prompt's keys once for its G responses and
    writes new keys in place.
    """

    def __init__(self, group_size: int, max_new_tokens: int):
        self.group_size, self.max_new_tokens = group_size, max_new_tokens
        self.prompt: list[tuple[Tensor, Tensor]] = []  # one pair per layer
        self.own: list[tuple[Tensor, Tensor]] = []
        self.length = 0  # response tokens written; the decoding loop sets it

    def add_prompt(self, key: Tensor, value: Tensor) -> None:
        batch, heads, _, width = key.shape
        # Copy once here, or the matrix products of every decoded token would copy them.
        self.prompt.append((key.contiguous(), value.contiguous()))
        shape = (batch * self.group_size, heads, self.max_new_tokens, width)
        self.own.append((key.new_empty(shape), value.new_empty(shape)))


@dataclass
class Layout:
    """Row layout of one forward pass, passed to `grouped_attention` as a keyword argument of the
    model's forward.

    With `cache`, the pass is a prefill (the cache is empty) or one decoding step. Without it, the
    pass is packed: `response_bias` (1 or B, 1, R * T, P + T), 0 or -inf, is added to the scores of
    a response over prompt keys and its own keys, where R = H / K query heads share a key head.
    `attn_layers` are the layers whose attention rows are returned.
    """

    prompt_len: int
    group_size: int
    prompt_mask: Tensor | None
    response_bias: Tensor | None = None
    cache: GroupCache | None = None
    attn_layers: tuple[int, ...] = ()


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Fused SDPA for a group. On the layers in `attn_layers`, the second return value holds the
    attention rows of the responses.

    query (B, H, L, D), key and value (B, K, L, D) with rotary positions applied; returns (B, L, H,
    D). With `output_attentions=True`, transformers collects the second value, so the rows arrive as
    `outputs.attentions`. Without a `layout` this is the SDPA of transformers.
    """
    if layout is None:
        options = {"scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if layout.cache is not None and len(layout.cache.prompt) > module.layer_idx:
        return decode_attention(query, key, value, scaling, layout, module.layer_idx), None
    p = layout.prompt_len
    of_prompt = (x[:, :, :p] for x in (query, key, value))
    prompt_out = prompt_attention(*of_prompt, scaling, layout.prompt_mask)
    if layout.cache is not None:
        layout.cache.add_prompt(key, value)
        return prompt_out, None
    response_out = response_attention(query, key, value, scaling, layout)
    wanted = module.layer_idx in layout.attn_layers
    rows = attention_rows(query, key, scaling, layout) if wanted else None
    return torch.cat([prompt_out, response_out], dim=1), rows


def attention_by_length(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a vision encoder, within each image, frame or window; (1, N, H, D).

    query, key and value (1, H, N, D) hold the S segments one after another, and `cu_seq_lens_q` (S
    + 1,) their bounds. Segments of equal length share a call of SDPA, which computes the same as
    one for each: a video of 128 frames has 512 windows in every block.
    """
    lengths = cu_seq_lens_q.diff()
    counts = sorted(Counter(lengths.tolist()).items())
    # The positions, those of the shortest segments first.
    order = lengths.repeat_interleave(lengths, output_size=query.shape[2]).argsort(stable=True)
    sizes = [length * count for length, count in counts]
    parts = [x[0][:, order].split(sizes, dim=1) for x in (query, key, value)]
    out = []
    for (length, count), *part in zip(counts, *parts, strict=True):
        rows = [x.unflatten(1, (count, length)).transpose(0, 1) for x in part]  # (count, H, L, D)
        result = F.scaled_dot_product_attention(*rows, scale=scaling)
        out.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(out)[order.argsort()][None], None


AttentionInterface.register("grouped_sdpa", grouped_attention)
AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)
# Where a name contains "flash", transformers leaves the segments to the function.
AttentionInterface.register("flash_by_length", attention_by_length)


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Causal attention within the prompts, (B, P, H, D). Padded keys are hidden; padded rows attend
    to themselves."""
    if on_gpu(query):  # no fused float32 kernel on a GPU lets query heads share a key head
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    allowed = None
    if mask is not None:
        p = mask.shape[1]
        causal = torch.ones(p, p, dtype=torch.bool, device=mask.device).tril()
        itself = torch.eye(p, dtype=torch.bool, device=mask.device)
        allowed = (causal & mask[:, None, None, :]) | itself
    options = {"is_causal": mask is None, "scale": scaling, "enable_gqa": not on_gpu(query)}
    return F.scaled_dot_product_attention(query, key, value, allowed, **options).transpose(1, 2)


def on_gpu(x: Tensor) -> bool:
    """Whether CUDA's attention kernels will compute on `x`."""
    return x.is_cuda


def split_group(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Split (B, heads, P + G * T, D) into the prompt's (B, heads, P, D) and the responses' (B, G,
    heads, T, D)."""
    prompt, responses = x[:, :, : layout.prompt_len], x[:, :, layout.prompt_len :]
    return prompt, responses.unflatten(2, (layout.group_size, -1)).transpose(1, 2)


def response_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Layout
) -> Tensor:
    """Attention of each of the G responses over the prompt and itself, in one batched call; (B, G *
    T, H, D).

    On a GPU, a batch without padding needs no mask: flash attention aligns its causal mask to the
    lower right corner, which gives the same mask. Otherwise the R query heads that share a key head
    become R * T rows of it, so keys are never repeated per head.
    """
    b, h, _, d = query.shape
    g, k = layout.group_size, key.shape[1]

    def keys(x: Tensor) -> Tensor:  # (B * G, K, P + T, D)
        prompt, own = split_group(x, layout)
        return torch.cat([prompt[:, None].expand(-1, g, -1, -1, -1), own], dim=3).flatten(0, 1)

    rows, key, value = split_group(query, layout)[1].flatten(0, 1), keys(key), keys(value)
    mask = layout.response_bias
    if mask is None:
        key, value = (x.repeat_interleave(h // k, dim=1) for x in (key, value))
        mask = causal_lower_right(rows.shape[2], key.shape[2])
    else:
        rows = rows.reshape(b * g, k, -1, d)  # (B * G, K, R * T, D)
        mask = mask.repeat_interleave(g, dim=0) if len(mask) > 1 else mask
        mask = mask.to(rows.dtype)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    # `view` would fail: kernels differ in the memory layout of their output.
    return out.reshape(b, g, h, -1, d).transpose(2, 3).flatten(1, 2)


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Layout, layer: int
) -> Tensor:
    """Attention of one new token per response over the prompt's keys and the response's own keys so
    far; (B * G, 1, H, D).

    The function writes the new keys and values to the cache. In bfloat16, scores are rounded before
    the softmax, as in eager attention. Packed passes keep them in float32, so sampling and scoring
    differ by that rounding.
    """
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


def attention_rows(query: Tensor, key: Tensor, scaling: float, layout: Layout) -> Tensor:
    """Head-averaged attention of the prompt's last position (row 0) and of each response token (row
    t, which attends to itself), (B, G, T + 1, P + T), float32; rows sum to 1.

    The last T columns are the response's own positions. Rows are recomputed in chunks, also in the
    backward pass, so no H x T x (P + T) array is ever kept: memory grows with T x (P + T). Rows
    past the end of a response belong to its padding and are finite.
    """
    prompt_key, own_key = (x.float() for x in split_group(key, layout))
    b, g, k, t, _ = own_key.shape
    prompt_rows, rows = split_group(query, layout)
    last = prompt_rows[:, None, :, -1:].expand(-1, g, -1, -1, -1)
    rows = torch.cat([last, rows], dim=3)
    rows = rows.unflatten(2, (k, -1)).float() * scaling  # (B, G, K, R, T + 1, D)
    # Row 0 attends to no response token, row t to the first t.
    seen = torch.ones(t + 1, t, dtype=torch.bool, device=key.device).tril(-1)
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
    return torch.cat(parts, dim=2)


# 3. Rollout


@dataclass
class Rollout:
    """G responses to each of B prompts: `response_ids` and `response_mask` (B, G, T),
    `truncated` (B, G).

    The mask covers each response up to and including its first EOS. A response without an EOS, cut
    off at `max_new_tokens`, is truncated. Masks come from generated lengths, never from comparing
    ids with the padding id.
    """

    prompts: PromptBatch
    response_ids: Tensor
    response_mask: Tensor
    truncated: Tensor

    @property
    def num_responses(self) -> int:
        """B * G, which the loss divides by."""
        return self.truncated.numel()

    def __getitem__(self, rows: slice) -> "Rollout":
        """The chosen prompts and their responses, with no more padding than they need."""
        mask = self.response_mask[rows]
        longest = int(mask.sum(-1).max())
        ids = self.response_ids[rows, :, :longest]
        return Rollout(self.prompts[rows], ids, mask[..., :longest], self.truncated[rows])

    def lengths(self) -> Tensor:
        """The positions of each prompt and its responses, (B,)."""
        ids, mask = self.prompts.ids, self.prompts.mask
        prompts = ids.shape[1] if mask is None else mask.sum(-1)
        return self.response_mask.sum((1, 2)) + prompts

    def texts(self, processor: Processor) -> list[list[str]]:
        """The responses as text, B lists of G, without their EOS and behind the prefix that the
        prompt holds. Other special tokens are kept, so that the reward sees them."""
        lengths = (self.response_mask.sum(-1) - (~self.truncated).long()).flatten().tolist()
        rows = self.response_ids.flatten(0, 1).tolist()
        rows = [r[:n] for r, n in zip(rows, lengths, strict=True)]
        texts = [processor.response_prefix + x for x in processor.tokenizer.batch_decode(rows)]
        group = self.response_ids.shape[1]
        return [texts[i : i + group] for i in range(0, len(texts), group)]


def cut_prompts(rollout: Rollout, num_minibatches: int, micro_batch_size: int) -> list[slice]:
    """Slices of the prompts of a rollout, one for each microbatch, those of the first minibatch
    first. Every minibatch has as many prompts and slices as the others; `num_minibatches` must
    divide the number of prompts.

    The ranks take turns in drawing prompts, so the minibatches of a step are the same on any number
    of ranks. Several ranks gather each layer together, and all wait for the longest of their
    microbatches. So there, the microbatches of a minibatch are in the order of their lengths.
    """
    lengths, cuts = rollout.lengths(), []
    part = len(lengths) // num_minibatches
    for end in range(part, len(lengths) + 1, part):
        firsts = range(end - part, end, micro_batch_size)
        of_part = [slice(first, min(first + micro_batch_size, end)) for first in firsts]
        if world_size() > 1:
            of_part.sort(key=lambda cut: lengths[cut].sum().item())
        cuts += of_part
    return cuts


def sampling_noise(
    seed: int, prompts: Iterable[int], group_size: int, max_new_tokens: int
) -> Tensor:
    """Uniform numbers in [0, 1) for each token to be sampled, (B * G, T).

    They depend only on the seed, the prompt's number in the run and the response's number in its
    group. So the responses do not depend on the batch or rank that a prompt is assigned to.
    """
    rows = [
        np.random.default_rng([seed, prompt, response]).random(max_new_tokens, dtype=np.float32)
        for prompt in prompts
        for response in range(group_size)
    ]
    return torch.from_numpy(np.stack(rows))


def pick_tokens(logits: Tensor, noise: Tensor | None, temperature: float, top_p: float) -> Tensor:
    """Next tokens (N,) from logits (N, V): the most likely ones without `noise`, otherwise sampled
    by inverting the CDF at `noise`.

    `top_p` keeps the smallest set of tokens whose probability reaches it. It affects sampling only:
    the policy in the losses is softmax(logits / temperature) over the whole vocabulary.
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
    # With noise below the total, a token of probability 0 is never picked.
    below = torch.nextafter(total, torch.zeros_like(total))
    index = torch.searchsorted(cumulative, (noise[:, None] * total).minimum(below), right=True)
    return (index if order is None else order.gather(1, index))[:, 0]


def require_finite(logits: Tensor) -> None:
    """Refuse a model whose logits for the first tokens are not finite."""
    broken = "the model's logits are not finite: its weights are damaged, or training diverged"
    require(bool(logits.isfinite().all()), f"{broken}; try another checkpoint or learning rate")


@torch.no_grad()
def generate_group(
    model: nn.Module,
    prompts: PromptBatch,
    group_size: int,
    max_new_tokens: int,
    noise: Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Rollout:
    """Sample G responses to every prompt, or decode greedily without `noise`. All responses are
    decoded together after one prefill per prompt.

    A response ends with any of the model's EOS ids. Special vision tokens are never generated.
    """
    model.eval()
    config, device = model.config, model.device
    eos = torch.tensor(model.generation_config.eos_token_id, device=device)
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
    position = prompts.positions[:, :, -1:].repeat_interleave(group_size, dim=1)
    noise = None if noise is None else noise.to(device)
    ids = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device)
    done = torch.zeros(n, dtype=torch.bool, device=device)
    lengths = torch.zeros(n, dtype=torch.long, device=device)
    check_every = 1 if device.type == "cpu" else 16  # reading `done` stalls a GPU
    with gathered(model):  # ranks may decode different numbers of tokens
        logits = model(**inputs, layout=layout, use_cache=False, logits_to_keep=1).logits[:, -1]
        require_finite(logits)
        logits = logits.repeat_interleave(group_size, dim=0)
        for t in range(max_new_tokens):
            logits = logits.index_fill(-1, suppressed, -torch.inf)
            noise_t = None if noise is None else noise[:, t]
            ids[:, t] = pick_tokens(logits, noise_t, temperature, top_p)
            lengths += ~done
            done |= torch.isin(ids[:, t], eos)
            last = t + 1 == max_new_tokens
            if last or (t % check_every == check_every - 1 and bool(done.all())):
                break
            cache.length = t
            step = {"input_ids": ids[:, t : t + 1], "position_ids": position + 1 + t}
            logits = model(**step, layout=layout, use_cache=False).logits[:, -1]
    longest = int(lengths.max())
    mask = torch.arange(longest, device=device) < lengths[:, None]
    shape = (batch, group_size, longest)
    return Rollout(prompts, ids[:, :longest].view(shape), mask.view(shape), ~done.view(shape[:2]))


# 4. Log-probabilities


@dataclass
class Scores:
    """Result of one packed pass over the responses, (B, G, T) each: `logps`, the log-probabilities
    of the tokens, and `entropy`, without a gradient, both in nats; `mask`, the response mask
    without special vision tokens. Where it is False, `logps` are 0, but `entropy` is not.

    `logits` (B, G, T, V), if requested, are the model's, before temperature and suppression.
    `attentions` maps each requested layer to its rows, (B, G, T + 1, P + T); see `attention_rows`.
    `suppressed` are the ids whose probability is 0.
    """

    logps: Tensor
    entropy: Tensor
    mask: Tensor
    logits: Tensor | None
    attentions: dict[int, Tensor]
    suppressed: Tensor


def score(
    model: nn.Module,
    rollout: Rollout,
    temperature: float = 1.0,
    attn_layers: Sequence[int] = (),
    keep_logits: bool = False,
) -> Scores:
    """Run one packed forward pass over every prompt and its G responses; returns log-probabilities,
    entropy and attention rows.

    The policy is softmax(logits / temperature) with the special vision tokens at -inf. It is the
    same in sampling and in old, reference and current passes. A vision token inside a response is
    replaced by padding and masked.
    """
    prompts, config = rollout.prompts, model.config
    for layer in attn_layers:
        require_layer("attn_layers", layer, config)
    b, g, t = rollout.response_ids.shape
    p = prompts.ids.shape[1]
    suppressed = torch.tensor(vision_token_ids(config), device=model.device)
    mask = rollout.response_mask & ~torch.isin(rollout.response_ids, suppressed)
    pad = config.text_config.pad_token_id or 0
    ids = torch.where(mask, rollout.response_ids, pad)
    steps = torch.arange(t, device=model.device)
    # Every response continues from the end of the prompt: (3, B, 1, T).
    positions = prompts.positions[:, :, -1:, None] + 1 + steps
    positions = positions.expand(-1, -1, g, -1).flatten(2)
    text = config.text_config
    causal = prompts.mask is None and on_gpu(ids)
    bias = None if causal else response_bias(prompts, t, text)
    layers = tuple(layer % text.num_hidden_layers for layer in attn_layers)
    layout = Layout(p, g, prompts.mask, response_bias=bias, attn_layers=layers)
    # Row t of response g predicts its token t; the prompt's last row predicts every first token.
    rows = p + t * torch.arange(g, device=model.device)[:, None] + steps - 1
    rows[:, 0] = p - 1
    inputs = {
        "input_ids": torch.cat([prompts.ids, ids.flatten(1)], dim=1),
        "position_ids": torch.cat([prompts.positions, positions], dim=2),
        "mm_encoder_outputs": encoder_outputs(model, prompts),
        "layout": layout,
        "output_attentions": bool(attn_layers),
        "use_cache": False,
    }
    options = {"temperature": temperature, "suppressed": suppressed, "keep_logits": keep_logits}
    found = model.token_scores(inputs, rows.flatten(), ids.flatten(), **options)
    logps, entropy, logits, attentions = found
    logps = logps.view(b, g, t).masked_fill(~mask, 0.0)
    logits = None if logits is None else logits.view(b, g, t, -1)
    by_layer = dict(zip(sorted(set(layers)), attentions, strict=True))
    attentions = {n: by_layer[layer] for n, layer in zip(attn_layers, layers, strict=True)}
    return Scores(logps, entropy.view(b, g, t), mask, logits, attentions, suppressed)


def response_bias(prompts: PromptBatch, t: int, config: Any) -> Tensor:
    """Additive mask of a response over the prompt and itself, repeated for the query heads that
    share a key head; see `Layout`."""
    device, p = prompts.ids.device, prompts.ids.shape[1]
    own = torch.full((t, t), -torch.inf, device=device).triu(1)
    mask = F.pad(own, (p, 0))[None, None]  # (1, 1, T, P + T)
    if prompts.mask is not None:
        hidden = torch.zeros(prompts.mask.shape, device=device)
        hidden = hidden.masked_fill(~prompts.mask, -torch.inf)
        mask = mask + F.pad(hidden, (0, t))[:, None, None]
    return mask.repeat(1, 1, config.num_attention_heads // config.num_key_value_heads, 1)


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    *tensors: Tensor,
    elements: int = LOGIT_CHUNK,
    width: int | None = None,
) -> tuple[Tensor, ...]:
    """Apply `function` to tensors of N rows, in chunks that the backward pass recomputes.

    A chunk has about `elements` numbers if a row has `width` of them, by default the last dimension
    of the first tensor. So neither 152k logits per token nor the temporaries of an attention
    divergence are ever all in memory at once.
    """
    size = max(1, elements // (width or tensors[0].shape[-1]))
    chunks = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    parts = [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def token_scores(
    model: nn.Module,
    inputs: dict[str, Any],
    rows: Tensor,
    targets: Tensor,
    temperature: float,
    suppressed: Tensor,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Log-probability of each target and entropy of its row, both (N,) and float32; the logits (N,
    V) if `keep_logits` is set; the attention rows of the requested layers.

    `rows` (N / B,) are the positions in each sequence that predict the targets. `lm_head` runs
    inside the chunks, so all logits are in memory at once only if `keep_logits` is set. The
    function is a method of the model (`load_model` binds it), because FSDP gathers the weights of
    `lm_head` only for forward methods.
    """
    outputs = model.model(**inputs)
    hidden, head = outputs.last_hidden_state[:, rows].flatten(0, 1), model.lm_head
    logits = head(hidden) if keep_logits else None

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scaled = (hidden if keep_logits else head(hidden)).float() / temperature
        logps = scaled.index_fill(-1, suppressed, -torch.inf).log_softmax(dim=-1)
        with torch.no_grad():
            entropy = -torch.nansum(logps.exp() * logps, dim=-1)
        return logps.gather(-1, targets[:, None])[:, 0], entropy

    values = hidden if logits is None else logits
    logps, entropy = in_chunks(chunk, values, targets, width=head.out_features)
    return logps, entropy, logits, outputs.attentions or ()


def response_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (..., T) over the tokens of each response; 0 for a response with an empty mask.

    The losses average this mean over all responses of an optimiser step. So every response has the
    same weight, whatever its length (only an attention term that is a sum over tokens weighs it by
    T), and the update does not depend on how the step is split into microbatches.
    """
    return torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)


# 5. Reward


def judge(
    reward: Callable[..., dict[str, float]],
    prompts: Sequence[Prompt],
    rollout: Rollout,
    texts: list[list[str]],
    *others: list[list[Any]],
) -> tuple[Tensor, dict[str, float]]:
    """Call `reward(prompt, text, truncated, ...)` for every response. Returns the rewards (B, G)
    and the metrics of the rollout, among them the mean of each number that `reward` returns. All
    must be finite, and have the same names for every response.

    `texts`, and any `others` that the reward takes besides, such as the scores of a reward model,
    are B lists of G values.
    """
    rows = zip(prompts, texts, rollout.truncated.tolist(), *others, strict=True)
    judged = [
        [reward(prompt, *response) for response in zip(*group, strict=True)]
        for prompt, *group in rows
    ]
    names = judged[0][0].keys()
    alike = all(response.keys() == names for group in judged for response in group)
    returned = f"the reward function returns {', '.join(names)}"
    remedy = "return the same names for every response, one of them `reward`"
    require(alike and "reward" in names, f"{returned}; {remedy}")
    parts = {
        name: torch.tensor([[float(response[name]) for response in group] for group in judged])
        for name in names
    }
    for name, values in parts.items():
        bad = (~values.isfinite()).any(1).nonzero()[:, 0].tolist()
        row = prompts[bad[0]].example.name or "a row of the toy" if bad else ""
        require(not bad, f"{row}: the reward function returns a `{name}` that is not finite")
    rewards = parts["reward"]
    metrics = {f"rollout/{name}": values.mean().item() for name, values in parts.items()}
    metrics |= {
        "rollout/reward_std": rewards.std(dim=1).mean().item(),
        "rollout/frac_zero_std": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        "rollout/completion_len": rollout.response_mask.sum(-1).float().mean().item(),
        "rollout/truncated_frac": rollout.truncated.float().mean().item(),
    }
    return rewards.to(rollout.response_ids.device), metrics


def has_format(text: str, think: bool) -> bool:
    """Whether `text` is `<think>...</think><answer>...</answer>` or, without `think`, the answer
    alone, as in the paper's RAL-zero.

    Each tag must occur exactly once, in order, and only white space may surround the pairs.

    >>> has_format("<think> the star </think> <answer> red </answer>", think=True)
    True
    """
    tags, form = ["<answer>", "</answer>"], r"\s*<answer>.*</answer>\s*"
    if think:
        tags, form = ["<think>", "</think>", *tags], r"\s*<think>.*</think>" + form
    once = re.findall("</?(?:think|answer)>", text) == tags
    return once and re.fullmatch(form, text, re.DOTALL) is not None


MEASURES = {"numerical": answers.number_accuracy, "regression": answers.regression_accuracy}
MEASURES |= {"OCR": answers.word_accuracy, "free-form": answers.rouge}


def accuracy(text: str, example: Example, rule: str = "by-type") -> float:
    """The score of the first answer in `text`, between 0 and 1.

    With `rule="exact"` (paper), an answer identical to the solution scores 1 and any other scores
    0. Otherwise the problem type selects the measure [ours, as in Video-R1]; without one, equal
    answers are right. See support/answers.py. Of several solutions, the best score counts. An
    answer longer than `MAX_ANSWER` characters scores 0, which bounds the time to score a response.
    """
    answer = answers.extract_answer(text)
    solutions = [solution.strip() for solution in (example.solution, *example.also_right)]
    if answer is None or answer in solutions or rule == "exact" or len(answer) > answers.MAX_ANSWER:
        return float(answer in solutions)
    measure = MEASURES.get(example.problem_type, answers.plain_accuracy)
    if example.problem_type == "multiple choice":
        measure = partial(answers.option_accuracy, options=example.options)
    return max(measure(answer, solution) for solution in solutions)


# 6. Preparation


@dataclass
class Prepared:
    """What a run starts from: `args` with every default filled in, the models, and the data.

    `reference` is the frozen starting model if the run needs one: with adapters, it is the trained
    model, to be used inside `without_adapters`. `task` is the built-in task, and `is_toy` says
    whether the model is one of its own. `state` is the state to resume from, if any, and `start`
    the time at which the preparation began.
    """

    args: Any
    processor: Processor
    model: nn.Module
    reference: nn.Module | None
    teacher: nn.Module | None
    train: data.Reader
    held_out: Iterable[Prompt]
    state: State | None
    task: toy.Task
    is_toy: bool
    start: float


def prepare(
    args: Any,
    prompts: dict[str, str],
    *,
    learning_rate: Callable[[Any, Any, bool], float],
    base: str | None = None,
    encode: Callable[[Processor, Example], Prompt] | None = None,
    layers: Sequence[str] = (),
    teacher: str | None = None,
    teacher_layers: Sequence[str] = (),
    needs_reference: bool = False,
    keep_media: bool = False,
    passes: int = 1,
    kind: str = disk.TRAINING_RUN,
) -> Prepared:
    """Check all arguments and files, then read the data, fit the run into memory, find the state to
    resume from, and load the models. Whatever can fail without the weights fails before they load.

    `prompts` is the wording of the requests, saved with the weights; a toy has none. An unset
    `--learning-rate` becomes `learning_rate(args, config, is_toy)`. `base` is the checkpoint of a
    new toy, in place of `--model`, and `encode` makes the prompt of a row, in place of
    `encode_prompt`. `layers` and `teacher_layers` name the arguments that choose a decoder layer.
    With `keep_media`, rewards see the images and frames of the training prompts. `passes`: see
    `fit_memory`. `--out` becomes the directory of this `kind` of program.

    Raises:
        UsageError: the message names the argument or file and the remedy.
        Ended: `--check-data` has printed its report, or the run to resume has no steps left.
    """
    start = time.time()
    start_ranks()
    runs.check_run(args, "model", *["teacher"] * (teacher is not None), kind=kind)
    is_toy, task = toy.resolve_task(args, args.model, may_differ=base is not None)
    set_seed(args.seed)
    path = base or args.model
    processor = load_processor(path, args.image_tokens, args.frame_tokens, args.min_image_tokens)
    data.check_files(args, is_toy)
    for name in layers:
        for layer in cli.each(getattr(args, name)):
            require_layer(cli.option(name), layer, processor.config)
    if processor.prompt_config.think != args.think and "prompt.json" in processor.files:
        flags = {True: "--think", False: "--no-think"}
        changed = f"was trained with {flags[not args.think]}; this run has {flags[args.think]}"
        ranks.print_on_rank_0(f"note: {path} {changed}")
    asked = {} if is_toy else prompts  # a toy knows only its own words
    rule = getattr(args, "accuracy_rule", "by-type")
    first = task.order == "question-first"
    processor.prompt_config = PromptConfig(asked, args.think, rule, question_first=first)
    encode = partial(encode or encode_prompt, processor)
    if args.check_data:
        data.check_data(args, encode, rule)
        raise ranks.Ended("--check-data: no run was started")
    train, held_out = data.open_data(args, encode, task, keep_media=keep_media)
    if args.steps is None:
        epochs = getattr(args, "epochs", 1.0)
        args = replace(args, steps=train.steps(args.prompts_per_step, epochs))
    other = None
    if teacher is not None:
        other = load_processor(teacher, field="--teacher")
        for name in teacher_layers:
            require_layer(cli.option(name), getattr(args, name), other.config)
        known = toy.Task.load(Path(teacher))
        trained = f"--teacher {teacher}: was trained on another task than the student"
        require(known in (None, task), trained)
    args = fit_memory(args, processor.config, needs_reference, other and other.config, passes)
    if args.learning_rate is None:
        args = replace(args, learning_rate=learning_rate(args, processor.config, is_toy))
    state = find_state(args)
    model = load_model(path, args.train_vision, args.lora_rank, args.gradient_checkpointing)
    frozen_teacher = None if teacher is None else load_teacher(teacher, processor, other)
    reference = None
    if needs_reference:  # with adapters, the same model without them
        reference = model if args.lora_rank else load_model(path, frozen=True)
    return Prepared(
        args=args,
        processor=processor,
        model=model,
        reference=reference,
        teacher=frozen_teacher,
        train=train,
        held_out=held_out,
        state=state,
        task=task,
        is_toy=is_toy,
        start=start,
    )
