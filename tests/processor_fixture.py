"""Write processors.json: prompts by each family's own processor of transformers 5.23, which needs
torchvision. In an environment of its own:

    pip install torch==2.14.1 torchvision==0.29.1 transformers==5.23.0 av
    python tests/processor_fixture.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from real import image_processor, write_checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

FILE = Path(__file__).with_name("processors.json")
PROCESSORS = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}
# An image is (columns, rows) in tokens, a video (columns, rows, frame indices, frames per second).
CASES = {
    "text": ["What is it?"],
    "image": [(3, 2), "What is it?"],
    "images": ["Is", (3, 2), "redder than", (2, 4), "? Answer"],
    "video": [(3, 2, [0, 7, 15, 22, 30], 24), "What is it?"],
    "mixed": ["See:", (2, 2, [0, 9, 19, 29], 30), "and", (2, 2), (3, 3, [0, 1], 2), "What is it?"],
}


def pictures(part: tuple, side: int) -> list[Image.Image]:
    """Noise of the size of whole tokens, `side` pixels each, which no processor needs to resize."""
    columns, rows, *video = part
    rng = np.random.default_rng([columns, rows])
    shape = (len(video[0]) if video else 1, rows * side, columns * side, 3)
    return [Image.fromarray(x) for x in rng.integers(0, 256, shape, dtype=np.uint8)]


def digest(pixels: torch.Tensor) -> list[float]:
    """Some sums that tell a permutation from another."""
    weights = [torch.linspace(0.5, 1.5, n, dtype=torch.float64) for n in pixels.shape]
    pixels = pixels.double()
    return [float(weights[0] @ pixels @ weights[1]), float((pixels.abs() @ weights[1]).sum())]


def by_processor(directory: Path, family: str, parts: list) -> dict:
    """Ids, positions, grids and pixels of a user's turn."""
    kind, video_kind = (getattr(transformers, name) for name in PROCESSORS[family])
    images, videos, metadata, content = [], [], [], []
    own = image_processor(family)
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
            continue
        frames = pictures(part, own.patch_size * own.merge_size)
        content.append({"type": "video" if len(part) > 2 else "image"})
        if len(part) > 2:
            arrays = np.stack([np.asarray(frame) for frame in frames]).transpose(0, 3, 1, 2)
            videos.append(torch.from_numpy(arrays))
            fields = {"fps": part[3], "frames_indices": list(part[2])}
            metadata.append(fields | {"total_num_frames": part[2][-1] + 1})
        else:
            images += frames
    tokenizer = AutoTokenizer.from_pretrained(directory)
    same = {"image_mean": own.image_mean, "image_std": own.image_std}
    video = video_kind(size={"shortest_edge": 1, "longest_edge": 1 << 30}, **same)
    processor = kind(own, tokenizer, video, chat_template=tokenizer.chat_template)
    turn = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    extra = {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
    inputs = processor(
        text=[turn],
        images=images or None,
        images_kwargs={"size": {"shortest_edge": 1, "longest_edge": 1 << 30}},
        return_tensors="pt",
        **(extra if videos else {}),
    )
    seconds = None
    if videos and family == "qwen2_5_vl":
        videos_of = [part for part in parts if not isinstance(part, str) and len(part) > 2]
        seconds = [2 * (i[-1] - i[0]) / (len(i) - 1) / fps for _, _, i, fps in videos_of]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(directory))
    positions = None
    if images or videos:
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            **({"second_per_grid_ts": torch.tensor(seconds)} if seconds else {}),
        )
        positions = positions[:, 0].tolist()
    return {
        "ids": inputs["input_ids"][0].tolist(),
        "positions": positions,
        "pixels": [
            digest(inputs[name])
            for name in ("pixel_values", "pixel_values_videos")
            if name in inputs
        ],
    }


if __name__ == "__main__":
    found = {}
    for family in PROCESSORS:
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(Path(directory), family)
            for name, parts in CASES.items():
                found[f"{family} {name}"] = by_processor(Path(directory), family, parts)
    FILE.write_text(
        "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n"
    )
