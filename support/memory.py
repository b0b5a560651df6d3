"""Estimate how much GPU memory a run needs, before any weights are loaded."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import Linear, Module
from transformers import AutoModelForImageTextToText

from support.media import MAX_FRAMES
from support.prompts import ENCODER_CHUNK, FRAME_LEAST
from support.ranks import UsageError, compute_dtype, gather, print_on_rank_0, require, world_size
from support.states import read_state

GIB = 2**30
# Attention weights per chunk: 4 MB fit in a CPU's cache; a GPU needs few kernel launches.
ATTENTION_CHUNK = 2**26 if torch.cuda.is_available() else 2**20
# Logits per chunk, in float32: 256 MB on a GPU, 64 MB elsewhere. The chunks' gradients of `lm_head`
# are summed, in bfloat16 on a GPU, so fewer chunks there mean fewer rounding errors.
LOGIT_CHUNK = 2**26 if torch.cuda.is_available() else 2**24
TEXT = 512  # tokens of system turn, question, options and request
STAMP = 12  # tokens around a pair of frames in Qwen3-VL: its time, and the marks of both ends
# Padded positions of prompts and responses that an evaluation decodes together: 16 rows of 2,048.
DECODED = 2**15  # `eval.py --batch-tokens`


def numel(module: Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def empty_model(config: Any, **options: Any) -> Module:
    """A model with shapes but no weights; `options` are arguments of `from_config`."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, **options)


def memory_gb(
    config: Any,
    args: Any,
    lora_rank: int | None,
    frozen: Sequence[Any] = (),
    evaluated: Any = None,
    processes: int = 1,
    distils: bool = False,
    passes: int = 1,
) -> dict[str, dict[str, float]]:
    """Estimate the GB (2**30 bytes) that each of `processes` ranks needs at the peak of each phase
    of a step, by purpose. With adapters of `lora_rank`, with all weights trained (0), or, for an
    evaluation, with none (None).

    `frozen` are the configs of the frozen models beside the trained one (reference, teacher);
    `evaluated` is the config of the frozen model that is evaluated too, if any. Distillation
    (`distils`) keeps the logits of student and teacher. One attention row per token is always
    counted, as RAL keeps them, even if the method does not. Every prompt is taken to be as long as
    `prompt_tokens`.
    """
    model, text, width = empty_model(config), config.text_config, compute_dtype().itemsize
    layers, visual = model.model.language_model.layers, model.model.visual
    total, layer = numel(model), numel(layers[0])
    root = total - numel(layers) - numel(visual.blocks)  # embeddings, output layer, projector
    visual.requires_grad_(args.train_vision)
    trained, trained_layer = numel(model, trained=True), layer
    trained_root = trained - numel(layers) - numel(visual.blocks, trained=True)
    weights = 4 * total
    if lora_rank:
        linear = [m for m in layers.modules() if isinstance(m, Linear)]
        trained = lora_rank * sum(m.in_features + m.out_features for m in linear)
        trained_layer, trained_root = trained // len(layers), 0
        weights = width * total + 4 * trained
    elif lora_rank is None:
        trained, weights = 0, width * total
    others = [total if other is config else numel(empty_model(other)) for other in frozen]
    standing = {
        "weights": weights / processes,
        "frozen models": width * sum(others) / processes,
        "optimizer": 8 * trained / processes,
    }
    # A single rank also gathers weights, if it holds them in float32 and computes in bfloat16.
    gathers = processes > 1 or (width < 4 and lora_rank == 0)
    prompt, new = prompt_tokens(args, config.model_type), args.max_new_tokens
    group_size = getattr(args, "group_size", 1)  # SFT and evaluations have one response to a prompt
    hidden, wide = text.hidden_size, text.intermediate_size
    heads, shared = text.num_attention_heads, text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    vision = config.vision_config
    levels = len(getattr(vision, "deepstack_visual_indexes", ()))
    # Qwen3-VL's deeper visual features: bytes a token. Each pass makes a second copy.
    deeper = width * hidden * levels
    patches = visual_tokens(args) * vision.spatial_merge_size**2
    dim = visual.patch_embed.embed_dim
    pixels = 3 * vision.temporal_patch_size * vision.patch_size**2

    def encoding(prompts: int) -> float:
        """Bytes of the vision encoder, its pixels and the features of all prompts. Most of the
        encoder's are for the rotation of queries and keys, which is computed in float32."""
        chunk = min(prompts * patches, max(ENCODER_CHUNK, patches))
        features = prompts * prompt * (width * hidden + deeper)
        return chunk * ((5 * width + 28) * dim + (4 + width) * pixels) + features

    def decoding(prompts: int, group: int) -> float:
        """Bytes of the keys and values of the prompts and their responses, and of the prefill's
        last layer."""
        cache = 2 * len(layers) * head_dim * shared * prompts * (prompt + group * new)
        in_layer = width * ((3 * wide if not lora_rank else 4.5 * wide) + 6 * hidden)
        if prompts > 1:
            in_layer = max(in_layer, width * 7 * hidden + mask)
        decoded = width * cache + prompts * prompt * (in_layer + 2 * deeper)
        return max(decoded, encoding(prompts) * args.train_vision)  # each pass encodes

    # Bytes for each position of a padded batch while its mask is made: 0 or 1 twice, and two copies
    # of it in the compute dtype.
    mask = (2 + 2 * width) * prompt
    gathered = width * total if gathers else 0
    if evaluated is not None and processes > 1:
        gathered = max(gathered, width * numel(empty_model(evaluated)))
    step = args.prompts_per_step
    together = getattr(args, "batch_tokens", DECODED) / (prompt + new)
    evaluated_together = max(1, min(2 * step, together))
    need = {
        "vision": {"gathered": gathered, "activations": encoding(max(step, evaluated_together))},
        "rollout": {"gathered": gathered, "activations": decoding(step, group_size)},
        "evaluation": {"gathered": gathered, "activations": decoding(evaluated_together, 1)},
    }
    size, responses = args.micro_batch_size, group_size * new
    tokens = size * (prompt + responses)
    checkpoints = width * tokens * hidden * len(layers)
    in_layer = width * tokens * ((8 if lora_rank else 6) * wide + 12 * hidden)
    if not args.gradient_checkpointing:
        checkpoints = width * tokens * (4 * wide + 10 * hidden) * len(layers)
    head = width * text.vocab_size * hidden if trained_root else 0
    attention = 4 * responses * (prompt + new)  # per prompt, in float32
    # Logits of student and teacher, the student's gradients, and a chunk of their divergence.
    words = size * responses * text.vocab_size
    logits = (3 * width * words + 50 * min(LOGIT_CHUNK, words)) * distils
    # A trained encoder's activations stay until the language model's are gone.
    seen = width * size * patches * dim * args.train_vision
    kept = (1 if args.gradient_checkpointing else 24) * vision.depth + 18 + 23 * levels
    # Float32 gradients still in transit to the other ranks.
    reduced = (width + 4) * trained_layer + 4 * trained_root / processes if processes > 1 else 0
    update = max(
        checkpoints + 2 * head + 16 * LOGIT_CHUNK + logits,
        checkpoints + 2 * size * attention + 12 * ATTENTION_CHUNK,
        checkpoints + head + in_layer + 2 * size * attention + (width + 4) * trained_layer,
        4 * trained_root + reduced,  # when its gathered weights are freed
        29 * seen,
    )
    # Another graph adds its checkpoints and, as traced, as much again.
    update += 2 * (passes - 1) * checkpoints + passes * seen * kept
    need["update"] = {
        "gathered": width * (root + 2 * layer) if gathers else 0,
        "gradients": 4 * trained / processes,
        "activations": update + step * attention + (step + size) * prompt * deeper,
    }
    for phase, parts in need.items():
        need[phase] = {name: value / GIB for name, value in (standing | parts).items()}
    return need


def longest_video(args: Any) -> int:
    """Frames of the longest video; 0 for the built-in task without videos."""
    return args.frames or (MAX_FRAMES if args.data else 0)


def visual_tokens(args: Any) -> int:
    """An upper bound of the visual tokens of one image or of one video, with sides up to 5:2.

    A picture below its minimum is enlarged until neither side is too short, and both are rounded up
    to whole tokens; see `process_media`.
    """

    def enlarged(least: int) -> int:
        return int(((least * 2.5) ** 0.5 + 1) * ((least / 2.5) ** 0.5 + 1))

    most, pair = args.max_prompt_tokens, args.frame_tokens
    image = args.image_tokens if args.data else args.min_image_tokens  # the toy's images are small
    if not (image and pair) and (most or not (image or pair)):
        return most or 16  # without budgets; the toy has 16 visual tokens
    image, pair = image or 0, pair or 0
    pair = max(pair, enlarged(min(FRAME_LEAST, pair)))
    image = max(image, enlarged(min(args.min_image_tokens or 0, image)))
    return min(max(image, (longest_video(args) + 1) // 2 * pair), most or sys.maxsize)


def prompt_tokens(args: Any, family: str) -> int:
    """An upper bound of the positions of a prompt with one image or one video and up to `TEXT`
    tokens of text, of which the built-in task has few. A row with several images, or with more
    text, may have more, up to `--max-prompt-tokens`."""
    text = TEXT if args.data else 64
    if family == "qwen3_vl":
        text += (longest_video(args) + 1) // 2 * STAMP
    return min(text + visual_tokens(args), args.max_prompt_tokens or sys.maxsize)


def available_gb() -> float:
    """GB of memory that this process may use: what other programs leave of its GPU, or its share of
    the machine's."""
    if torch.cuda.is_available():
        return (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def fit_memory(
    args: Any, config: Any, needs_reference: bool = False, teacher: Any = None, passes: int = 1
) -> Any:
    """Choose, before any weights are loaded, what to train: all weights if they fit, otherwise
    adapters of rank 64. `--lora-rank` and the resumed run take precedence. With adapters, the
    reference is the model without them. `config` and `teacher` are model configs. `passes` are the
    forward passes whose graphs an update holds at once: 2 for a loss that also sees a masked image.

    Raises:
        UsageError: nothing fits; the message names what to lower.
    """
    if args.gradient_checkpointing is None:
        args = replace(args, gradient_checkpointing=torch.cuda.is_available())
    if args.lora_rank is None and (state := read_state(args)):  # resuming keeps the choice
        args = replace(args, lora_rank=state.args.get("lora_rank"))
    have = min(gather([available_gb()]))  # ranks on other hosts must not choose differently
    frozen = [teacher] if teacher is not None else []
    evaluated = teacher if getattr(args, "evaluate_teacher", False) else None
    rest = {"evaluated": evaluated, "distils": bool(frozen)}
    rest |= {"processes": world_size(), "passes": passes}

    def need(lora_rank: int) -> float:
        """GB at the peak of a step with adapters of this rank, or with all weights (0)."""
        reference = [config] * (needs_reference and not lora_rank)
        phases = memory_gb(config, args, lora_rank, frozen + reference, **rest)
        return max(sum(parts.values()) for parts in phases.values())

    both = f"--train-vision, --lora-rank {args.lora_rank}: adapters cover only the language model"
    require(not (args.train_vision and args.lora_rank), f"{both}; omit one of them")
    choices = [0, 64] if args.lora_rank is None else [args.lora_rank]
    choices = choices[:1] if args.train_vision else choices
    for lora_rank in choices:
        if need(lora_rank) < 0.95 * have:
            if lora_rank != choices[0]:
                why = f"all weights need about {need(0):.0f} of {have:.0f} GB per process"
                print_on_rank_0(f"{why}: training adapters, --lora-rank {lora_rank}")
            return replace(args, lora_rank=lora_rank)
    last = "" if choices[-1] or args.train_vision else ", pass --lora-rank 64"
    remedy = f"start more processes, lower {{}} or --prompts-per-step{last}"
    raise UsageError(too_large(args, config, need(choices[-1]), have, remedy))


def require_evaluation_fits(args: Any, config: Any) -> None:
    """Refuse, before any weights are loaded, an evaluation that does not fit into memory: of a
    frozen model, with `args.batch_size` prompts decoded together, each as long as it may be."""
    # Training decodes two steps' prompts together in an evaluation.
    step = {"prompts_per_step": args.batch_size / 2, "micro_batch_size": 1}
    step |= {"train_vision": False, "gradient_checkpointing": True}
    given = SimpleNamespace(**vars(args) | step)
    phases = memory_gb(config, given, lora_rank=None, processes=world_size())
    need = max(sum(phases[phase].values()) for phase in ("vision", "evaluation"))
    have = min(gather([available_gb()]))
    remedy = "lower {}, --batch-tokens or --batch-size"
    require(need < 0.95 * have, too_large(args, config, need, have, remedy))


def too_large(args: Any, config: Any, need: float, have: float, remedy: str) -> str:
    """The line that refuses a run or an evaluation; {} in the remedy is what both can lower."""
    longest = prompt_tokens(args, config.model_type)
    short = f"needs about {need:.0f} GB per process for prompts of {longest:,} tokens"
    if args.data and args.frames is None:
        short += ", the longest with a video (without videos, give --frames 2)"
    short += f"; {have:.0f} GB are available, 5% of them reserved"
    remedy = remedy.format("--frames, --image-tokens, --max-prompt-tokens, --max-new-tokens")
    return f"--model {args.model}: {short}; {remedy}, or give a smaller model"
