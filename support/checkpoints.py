"""Checkpoint files: the one door through which they are read, and how they are written.

Files of a checkpoint are untrusted: only those of an allow-list are read, with bounds, and no code
of theirs runs.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from huggingface_hub import constants, set_client_factory, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils._http import default_client_factory
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn import Module

from support.disk import loading
from support.prompts import Example, Media, Processor, PromptConfig, encode_prompt
from support.ranks import UsageError, compute_dtype, print_once, require
from support.templates import SLOTS, repair_turns

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
REMEDY = "give a checkpoint directory or a hub name (owner/name)"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# A checkpoint's files other than its weights: they are read, and copied into saved checkpoints.
LARGE = ("tokenizer.json", "vocab.json", "merges.txt", INDEX)  # up to 64 MB, the others 4 MB
FILES = (*LARGE, "config.json", "generation_config.json", "preprocessor_config.json")
FILES += ("video_preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
FILES += ("added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
FILES += ("chat_template.json", "prompt.json", "toy_task.json")


def hub_client() -> Any:
    """A client for huggingface_hub whose requests all time out. Some have no limit of their own and
    would wait for ever."""

    def limit(request: Any) -> None:
        times = request.extensions.get("timeout", {})
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        request.extensions["timeout"] = {k: t or seconds for k, t in times.items()}

    client = default_client_factory()
    client.event_hooks["request"].append(limit)
    return client


set_client_factory(hub_client)


def checkpoint_folder(path: str | Path, field: str, names: Sequence[str]) -> Path:
    """The directory of a checkpoint. For a hub name, it is in the cache, and the files `names` are
    downloaded first."""
    named = f"{field} {path}"
    is_name = str(path).count("/") == 1 and not str(path).startswith((".", "/", "runs/"))
    require(Path(path).is_dir() or is_name, f"{named}: no such directory; {REMEDY}")
    if Path(path).is_dir():
        return Path(path)
    with loading(named):
        try:
            return Path(snapshot_download(str(path), allow_patterns=list(names)))
        except RepositoryNotFoundError:
            reason = "is not on the hub, or needs a login (`hf auth login`)"
            raise UsageError(f"{named}: {reason}; {REMEDY}") from None
        except LocalEntryNotFoundError:
            reason = f"cannot download {path}: no connection, and not in the cache"
            remedy = "Check the network and HF_HUB_OFFLINE, or give a local directory"
            raise UsageError(f"{field}: {reason}. {remedy}") from None


def read_files(folder: Path, named: str) -> dict[str, bytes]:
    """The content of each of `FILES` that a checkpoint has; `named` begins an error message.

    Raises:
        UsageError, ValueError: one of them is too large, is not JSON, or is a link that leaves the
            checkpoint for anything but the hub's cache: a saved checkpoint would pass on what it
            leads to.
    """
    homes = [folder.resolve(), (folder.resolve() / "../../blobs").resolve()]
    files = {}
    for path in (folder / name for name in FILES):
        if not path.is_file():
            continue
        if not any(path.resolve().is_relative_to(home) for home in homes):
            raise ValueError(f"its {path.name} is a link to a file elsewhere")
        limit = 2**26 if path.name in LARGE else 2**22
        if path.stat().st_size > limit:
            raise ValueError(f"its {path.name} is larger than {limit >> 20} MB")
        files[path.name] = path.read_bytes()
        with loading(f"{named}: its {path.name}"):
            if path.suffix == ".json" and not isinstance(json.loads(files[path.name]), dict):
                raise ValueError("is not a JSON object")
    return files


def read_config(content: Any, named: str) -> Any:
    """The config of a model of `FAMILIES`, from the content of its config.json.

    Raises:
        UsageError: it is the config of another model, or of a quantised one.
    """
    family = f"{named}: is a {content['model_type']!r} model"
    require(content["model_type"] in FAMILIES, f"{family}; supported are {', '.join(FAMILIES)}")
    for part in (content, content.get("text_config") or {}, content["vision_config"]):
        quantised = part.get("quantization_config") or part.get("compression_config")
        found = f"{named}: its weights are quantised, as its config.json says"
        require(not quantised, f"{found}; give the checkpoint that it was made from")
        for name, value in part.items():
            limit = 1024 if name in ("num_hidden_layers", "depth") else 2**24
            possible = not isinstance(value, int) or value <= limit or name == "rope_theta"
            require(possible, f"{named}: its config.json has {name} {value}, above {limit}")
    # Keys that name code or other weights, or change how the model computes.
    ours = ("auto_map", "attn_implementation", "_attn_implementation", "fusion_config")
    ours += ("transformers_weights",)
    known = {name: value for name, value in content.items() if name not in ours}
    config = transformers.AutoConfig.for_model(**known)
    layers = getattr(config.get_text_config(), "layer_types", None) or ()
    sliding = "sliding_attention" in layers
    require(not sliding, f"{family} with sliding-window attention, which is not supported")
    return config


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold a checkpoint's weights.

    Raises:
        ValueError: it has none, or its index names other files.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        other = "; convert its .bin files to safetensors" if [*folder.glob("*.bin")] else ""
        raise ValueError(f"has no {WEIGHTS} and no {INDEX}{other}")
    names = sorted({*map(str, json.loads((folder / INDEX).read_text())["weight_map"].values())})
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"its {INDEX} names {name!r}, not a *.safetensors file beside it")
    return names


def load_processor(
    path: str | Path,
    image_tokens: int | None = None,
    frame_tokens: int | None = None,
    min_image_tokens: int | None = None,
    field: str = "--model",
) -> Processor:
    """Load the config and processor of a checkpoint of `FAMILIES`, without its weights, and try
    them on an image and a video.

    The numbers of tokens are the limits of `Processor`. Base models get the chat template of a chat
    model (`repair_turns`). A checkpoint without a `prompt.json` gets an empty prompt configuration.
    No code of the checkpoint runs.

    Raises:
        UsageError: `path` is neither a checkpoint directory nor a hub name, is incomplete or
            inconsistent, or holds a model of another family.
    """
    named = f"{field} {path}"
    folder = checkpoint_folder(path, field, (*FILES, "adapter_config.json"))
    with loading(named):
        adapter = "holds an adapter (adapter_config.json); merge it into its base model, or give"
        whole = not (folder / "adapter_config.json").exists()
        require(whole, f"{named}: {adapter} the checkpoint/ beside it or the base model")
        files = read_files(folder, named)
        if "config.json" not in files:
            inside = f"{path}/checkpoint"
            require(not Path(inside).is_dir(), f"{named}: is a run directory; give {inside}")
            raise ValueError("has no config.json")
        config = read_config(json.loads(files["config.json"]), named)
        images = ("preprocessor_config.json", "processor_config.json")
        for names in (("tokenizer.json", "vocab.json"), images):
            if not files.keys() & {*names}:
                raise ValueError(f"has no {' or '.join(names)}")
        if folder == Path(path):
            for name in weight_files(folder):
                require((folder / name).is_file(), f"{named}: has no {name}; download it again")
        files.pop(INDEX, None)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        image_processor = transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False
        )
        with loading(f"{named}: its prompt.json", "fix or delete it"):
            asked = PromptConfig.read(files.get("prompt.json", b'{"prompts": {}}'))
        tokens = {"image_tokens": image_tokens, "min_image_tokens": min_image_tokens}
        tokens |= {"frame_tokens": frame_tokens}
        processor = Processor(config, tokenizer, image_processor, asked, files, **tokens)
        if changes := repair_turns(processor):
            print_once(f"{named}: {changes}")
        try_processor(processor)
    return processor


def try_processor(processor: Processor) -> None:
    """Encode an image and a video, and give a tokenizer without a usable padding token another.

    Raises:
        ValueError: tokenizer, image processor and config do not fit together.
    """
    config, tokenizer = processor.config, processor.tokenizer
    text, vision = config.get_text_config(), config.vision_config
    largest = max(tokenizer.get_vocab().values())
    if largest >= text.vocab_size:
        raise ValueError(f"its tokenizer has the id {largest}, its config {text.vocab_size} tokens")
    for kind in ("image", "video"):
        names = ("vision_start_token_id", f"{kind}_token_id", "vision_end_token_id")
        known = [getattr(config, name) for name in names]
        ids = tokenizer.encode(SLOTS[kind], add_special_tokens=False)
        if ids != known:
            raise ValueError(f"its tokenizer writes {SLOTS[kind]} as {ids}, its config as {known}")
    # Masks come from lengths, so any token of text can pad.
    usable = set(range(text.vocab_size)) - set(vision_token_ids(config))
    if tokenizer.pad_token_id not in usable:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(usable))
    if text.pad_token_id not in usable:
        text.pad_token_id = min(usable) or None  # `score` takes 0 for None
    if strange := [token for token in processor.end_ids if token not in range(text.vocab_size)]:
        raise ValueError(f"its eos_token_id has {strange}, which the model does not have")
    ours = processor.image_processor
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        values = getattr(ours, name), getattr(vision, name.replace("merge", "spatial_merge"))
        if values[0] != values[1]:
            raise ValueError(f"its image processor has {name} {values[0]}, its config {values[1]}")
    edges = [ours.size.get(edge) or 0 for edge in ("shortest_edge", "longest_edge")]
    if not 0 < edges[0] <= min(edges[1], 2**24):
        needs = f"needs shortest_edge (at most {2**24} pixels) and longest_edge"
        raise ValueError(f"the size {dict(ours.size)} of its image processor {needs}")
    image, plain = Image.new("RGB", (64, 64)), replace(processor, prompt_config=PromptConfig({}))
    prompt = encode_prompt(plain, Example("a", "", [Media([image]), Media([image] * 2, True)]))
    if not all(block.pixels.isfinite().all() for block in prompt.blocks):
        raise ValueError("its image processor makes pixels that are not finite")


def vision_token_ids(config: Any) -> list[int]:
    """The special vision tokens, which no response may contain. Sampling suppresses them, and every
    pass sets their logits to -inf."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return [getattr(config, name) for name in names]


def read_model(
    path: str | Path, field: str, processor: Processor, options: dict[str, Any]
) -> Module:
    """Read the weights of a checkpoint into a new model. `from_pretrained`, which takes `options`,
    sees only the checkpoint's safetensors files."""
    folder = checkpoint_folder(path, field, [WEIGHTS, INDEX])
    names = weight_files(folder)
    if names != [WEIGHTS]:
        names.append(INDEX)
        folder = checkpoint_folder(path, field, names)
    with TemporaryDirectory() as links:
        for name in names:
            (Path(links) / name).symlink_to((folder / name).resolve())
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            links,
            config=processor.config,
            generation_config=transformers.GenerationConfig(eos_token_id=sorted(processor.end_ids)),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    remedies = {"missing": "download it again", "unexpected": "merge an adapter into its weights"}
    remedies["mismatched"] = "give the config.json of these weights"
    for kind, remedy in remedies.items():
        keys = sorted(info[f"{kind}_keys"])
        found = f"its files and its config.json do not agree: {len(keys)} {kind} weights"
        require(not keys, f"{field} {path}: {found}, as {keys[:1]}; {remedy}")
    model.config.tie_word_embeddings = is_tied(model)
    return model


def is_tied(model: Module) -> bool:
    """Whether the output layer shares the embedding's weights. The config may claim it although the
    files hold both."""
    return model.lm_head.weight is model.get_input_embeddings().weight


def write_files(
    directory: Path, model: Module, processor: Processor, weights: dict[str, Tensor]
) -> None:
    """Write a checkpoint: `weights`, and the files of the checkpoint that training started from.

    Raises:
        UsageError: transformers left weights out.
    """
    model.save_pretrained(directory, state_dict=weights)
    processor.save(directory)  # the original config: transformers 4 cannot read that of 5
    tied = model.config.tie_word_embeddings
    set_config(directory / "config.json", tied != processor.config.tie_word_embeddings, tied)
    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += len(file.keys())
    whole = count == len(weights)
    require(whole, f"{directory}: {count} weights were written, the model has {len(weights)}")


def set_config(path: Path, retie: bool, tied: bool) -> None:
    """Write `compute_dtype` into a config.json, under the key that transformers 4 or 5 uses, and
    with `retie` whether the embeddings are `tied`."""
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {})) if retie else ():
        part["tie_word_embeddings"] = tied  # transformers 4 reads that of the text model
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    nested = "text_config" in config  # else the text model's values are at the top level
    for part in (config, config["text_config"], config["vision_config"]) if nested else (config,):
        part.pop("dtype", None)
        part[name] = str(compute_dtype()).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2))
