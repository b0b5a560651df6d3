"""What the tests of real models and data need: small checkpoints of each family in the form of a
downloaded one, and a data set with images, videos and broken rows."""

import json
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3-VL has no system turn of its own, and a thinking checkpoint opens the thought.
TEMPLATE_3 = TEMPLATE[: TEMPLATE.index("{% if loop")] + TEMPLATE[TEMPLATE.index("<|im_start|>{{") :]
THINKING = TEMPLATE_3.replace("assistant\n", "assistant\n<think>\n")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|image_pad|>", "<|video_pad|>")
CORPUS = [
    "You are a helpful assistant. system user assistant What is the man holding in the video?",
    "Think first, inside <think> </think> tags. Give the answer alone inside <answer> </answer>",
    "The answer is the letter of one option. Options: A. a red car B. a blue car 1234567890",
]


def write_tokenizer(directory: Path, corpus=CORPUS, template=TEMPLATE) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of the family's class, trained here."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus, vocab_size=400, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    if template != TEMPLATE:
        tokenizer.add_tokens(["<think>", "</think>"])  # not special, as in Qwen3's
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", template
    tokenizer.save_pretrained(directory)
    return tokenizer


def write_checkpoint(
    directory: Path,
    family: str,
    seed: int = 0,
    tied: bool = False,
    template: str | None = None,
    layers: int = 2,
) -> None:
    """Random weights behind the real configuration classes, with all files of a downloaded one.
    `tied`, as at 2B, the output layer is the embedding."""
    template = template or (TEMPLATE_3 if family == "qwen3_vl" else TEMPLATE)
    tokenizer = write_tokenizer(directory, template=template)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    special = {name: ids[token] for name, token in zip(names, tokens, strict=True)}
    torch.manual_seed(seed)
    if family == "qwen2_vl":
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
        config = Qwen2VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied, **special
        )
        model = Qwen2VLForConditionalGeneration(config)
    elif family == "qwen3_vl":
        text |= {"head_dim": 24, "num_hidden_layers": 3}
        rope = text["rope_parameters"]
        rope |= {"mrope_section": [4, 4, 4], "mrope_interleaved": True}
        vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2}
        vision |= {"intermediate_size": 64, "deepstack_visual_indexes": [0, 1, 2]}
        vision["num_position_embeddings"] = 64
        config = Qwen3VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied, **special
        )
        model = Qwen3VLForConditionalGeneration(config)
    else:
        vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2}
        vision |= {"intermediate_size": 64, "fullatt_block_indexes": [1], "window_size": 56}
        vision |= {"tokens_per_second": 2}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.save_pretrained(directory)
    image_processor(family).save_pretrained(directory)
    # Files that these scripts have no use for, and other programs have.
    video = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "temporal_patch_size": 2}
    (directory / "video_preprocessor_config.json").write_text(json.dumps(video))
    if family != "qwen3_vl":
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (directory / "merges.txt").write_text("#version: 0.2\n")


def image_processor(family: str) -> Qwen2VLImageProcessorPil:
    """With the settings of the released checkpoints."""
    if family != "qwen3_vl":
        return Qwen2VLImageProcessorPil()
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    return Qwen2VLImageProcessorPil(
        size=size, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


# Chat templates of base models, none of which asks about an image or a video.
BASE_TEMPLATES = {
    # As the released Qwen2-VL base models: made for a list of parts, not of messages.
    "empty": "{% if messages is string %}{{ messages }}{% else %}{% for part in messages %}"
    "{% if 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}",
    # As a language model's, which adds a string and a list.
    "fails": "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}",
    "ignores media": "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "absent": None,
}


def write_base_model(directory: Path, family: str, template: str = "empty") -> None:
    """A checkpoint as hubs have the base models: a flat configuration and the tokenizer files of
    transformers 4, whose turns do not end, and one of `BASE_TEMPLATES`."""
    write_checkpoint(directory, family)

    def edit(name: str, change) -> None:
        path = directory / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    def flat(config: dict) -> dict:
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope["rope_theta"], "sliding_window": 32768}
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        for part in (config, text, config["vision_config"]):
            for name in ("dtype", "rope_parameters", "layer_types"):
                part.pop(name, None)
        del text["model_type"], config["vision_config"]["model_type"]
        config |= {"torch_dtype": "bfloat16", "transformers_version": "4.41.2"}
        return text | config | {"bos_token_id": ids["<|endoftext|>"]}

    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    edit("config.json", flat)
    end = {"eos_token_id": ids["<|endoftext|>"], "bos_token_id": ids["<|endoftext|>"]}
    end |= {"pad_token_id": ids["<|endoftext|>"], "do_sample": False, "max_new_tokens": 2048}
    (directory / "generation_config.json").write_text(json.dumps(end))
    decoder = {str(i): {"content": token, "special": True} for token, i in ids.items()}
    for token in decoder.values():
        token |= dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").unlink()
    if text := BASE_TEMPLATES[template]:
        settings["chat_template"] = text
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer["model"]["merges"])]
    (directory / "merges.txt").write_text("\n".join(merges) + "\n")
    edit("preprocessor_config.json", lambda x: x | {"processor_class": "Qwen2VLProcessor"})


def write_video(path: Path, frames: int, rate: int = 10, size=(64, 48)) -> None:
    """Frame i is grey of level 4 + 8 i (modulo 256): a decoded frame tells its number."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), (4 + 8 * i) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")
SOLUTIONS = ("<answer>A</answer>", "<answer>3.14</answer>", "<answer>STOP</answer>")
SOLUTIONS += ("<answer>a man in a red coat</answer>", "<answer>12</answer>")


def write_rows(directory: Path) -> list[dict]:
    """20 rows: 14 images, 4 videos, and one broken one of each."""
    rng = np.random.default_rng(0)
    for i in range(14):
        noise = rng.integers(0, 255, (40 + 8 * i, 56, 3), dtype=np.uint8)
        Image.fromarray(noise).save(directory / f"image{i}.png")
    for i, frames in enumerate((1, 7, 12, 25)):
        write_video(directory / f"video{i}.mp4", frames)
    (directory / "image14.png").write_bytes((directory / "image0.png").read_bytes()[:60])
    whole = (directory / "video3.mp4").read_bytes()
    (directory / "video4.mp4").write_bytes(whole[: len(whole) // 2])
    rows = []
    media = [f"./image{i}.png" for i in range(15)] + [f"./video{i}.mp4" for i in range(5)]
    for i, path in enumerate(media):
        rows.append(
            {
                "problem_id": i,
                "problem": f"What is there in number {i}? Ünïcode “quotes” {{ }} [ ]",
                "data_type": "video" if "video" in path else "image",
                "problem_type": TYPES[i % 5],
                "options": ["A. a red car", "B. a blue car"] if i % 5 == 0 else [],
                "process": "<think>It is what it is.</think>",
                "solution": SOLUTIONS[i % 5],
                "path": path,
                "data_source": ("left", "right")[i % 2],
            }
        )
    return rows
