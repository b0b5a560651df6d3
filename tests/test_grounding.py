"""Boxes become the visual tokens that show them, and the measures are those of an eager model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from shared import load, unpacked
from transformers import AutoModelForImageTextToText

import common
import eval
from support import toy
from support.datafiles import DataFile
from support.grounding import Box, target_tokens
from support.prompts import Example, Media, PromptConfig, encode_prompt

SIZE = (224, 160)  # of a stored picture
# A box that covers tokens and halves of tokens, one inside a token, one across two of them, one
# nearly on the corner of four, and a line.
BOXES = (
    (50, 35, 180, 121),
    (70, 70, 76, 78),
    (100, 37, 118, 43),
    (109, 60, 118, 67),
    (0, 9, 224, 12),
)
ROWS = {
    "image": {"bboxes": BOXES},
    "each box": None,
    "turned": {"orientation": 6, "bboxes": BOXES[:2]},
    "mirrored": {"orientation": 7, "bboxes": BOXES[2:3]},
    "images": {"number": 3, "bboxes": [[BOXES[1]], [], [BOXES[0], BOXES[3]]]},
    "video": {"frames": 5, "bboxes": [{"bbox": BOXES[0], "start": 0.9, "end": 1.1}]},
    "turned video": {
        "frames": 8,
        "orientation": 8,
        "bboxes": [{"bbox": BOXES[0], "end": 0.5}, {"bbox": BOXES[1], "start": 1.2, "end": 3}],
    },
}


def read(folder, paint=None, number=1, frames=0, orientation=1, **fields) -> Example:
    """A row of `number` media of black frames, each white in the box that `paint` gives for the
    medium and the frame."""
    exif, media = Image.Exif(), []
    exif[0x0112] = orientation
    for medium in range(number):
        names = [f"{medium}-{frame}.png" for frame in range(frames or 1)]
        for frame, name in enumerate(names):
            picture = Image.new("RGB", SIZE)
            if paint and (box := paint(medium, frame)):
                picture.paste("white", box)
            picture.save(folder / name, exif=exif)
        media.append(names if frames else names[0])
    row = {"question": "q", "answer": "a", "videos" if frames else "images": media} | fields
    (folder / "rows.json").write_text(json.dumps([row]))
    return DataFile(str(folder / "rows.json"), fps=2.0).example(0)


def brightness(processor, example) -> tuple[torch.Tensor, list[int]]:
    """That of each visual token, of the brighter one of its two frames, and the number of tokens of
    each temporal patch."""
    prompt = encode_prompt(processor, example)
    pixels = torch.cat([block.pixels for block in prompt.blocks])
    means = pixels.unflatten(1, (3, 2, -1)).mean((1, 3)).unflatten(0, (-1, 4)).mean(1)
    return means.amax(-1), [h * w for t, h, w in prompt.grids for _ in range(t)]


@pytest.mark.parametrize("name", ROWS)
def test_the_target_is_what_shows_the_boxes(real, tmp_path, family, name):
    """Every box is painted, and found again in what the encoder gets."""
    processor = common.load_processor(real / family)
    processor = replace(processor, image_tokens=70, min_image_tokens=20, frame_tokens=48)
    for row in [ROWS[name]] if ROWS[name] else [{"bbox": box} for box in BOXES]:
        example = read(tmp_path, **row)
        target = encode_prompt(processor, example).target
        listed = row.get("bboxes") or [row["bbox"]]
        listed = listed if row.get("number") else [listed]
        options = {x: row[x] for x in ("number", "frames", "orientation") if x in row}
        dark, sizes = brightness(processor, read(tmp_path, **options))
        light, _ = brightness(processor, read(tmp_path, lambda *_: (0, 0, *SIZE), **options))
        expected = set()
        for medium, boxes in enumerate(listed):
            for box in boxes:
                box = box if isinstance(box, dict) else {"bbox": box}

                def paint(number, frame, medium=medium, box=box):
                    shown = box.get("start", 0) <= frame / 2 <= box.get("end", np.inf)
                    return box["bbox"] if number == medium and shown else None

                painted, _ = brightness(processor, read(tmp_path, paint, **options))
                parts, first = (painted - dark) / (light - dark), 0
                for part in parts.split(sizes):
                    if part.sum() > 0.01:
                        least = min(0.5, part.sum() / 2, part.max())
                        expected |= {first + i for i, x in enumerate(part) if x > 0.98 * least}
                    first += len(part)
        assert target == tuple(sorted(expected)) != ()


@pytest.mark.parametrize(
    ("box", "tokens"),
    [
        ((0, 0, 43, 43), {0, 1, 4}),  # of the last token a quarter
        ((0, 0, 50, 28), {0, 1}),
        ((0, 0, 41, 28), {0}),
        ((20, 3, 34, 9), {0}),  # in two tokens, mostly in one
        ((26, 0, 30, 4), {0, 1}),  # half in each
        ((26, 26, 31, 31), {5}),  # a corner of four
        ((26, 26, 30, 30), {0, 1, 4, 5}),  # exactly
        ((0, 10, 112, 12), {0, 1, 2, 3}),
        ((0, 0, 112, 112), set(range(16))),
    ],
)
def test_a_token_shows_half_of_itself_or_half_of_the_box(box, tokens):
    media = [Media([Image.new("RGB", (112, 112))])]
    assert set(target_tokens([Box(*box)], media, [(1, 4, 4)])) == tokens


def test_a_box_between_two_frames_has_no_token():
    media = [Media([Image.new("RGB", (28, 28))] * 3, is_video=True, times=[0, 1, 2])]
    spans = {(0.2, 0.8): (), (1, 1): (0,), (1.5, 9): (1,), (0, 2): (0, 1), (3, 4): ()}
    for (start, end), tokens in spans.items():
        assert target_tokens([Box(0, 0, 28, 28, 0, start, end)], media, [(2, 1, 1)]) == tokens


# What is said before the answer, the answer and what follows; words of the toy.
SAID = (("what colour ? <answer>", "red", "</answer>"), ("what colour ?", "", ""))
SAID += (("blue", "", ""), ("<answer>", "blue", "</answer> red"))


def real_prompts(processor, folder) -> list:
    """Of two images, a video, no boxes, boxes again, no boxes."""
    box = {"bbox": BOXES[0], "start": 0.9, "end": 1.1}
    rows = (
        {"number": 2, "bboxes": [[BOXES[1]], [BOXES[0]]], "question": "<image> or <image>, say?"},
        {"frames": 4, "bboxes": [box], "question": "Which of them is shown for a second here?"},
        {"question": "What?"},
        {"bboxes": [BOXES[2]], "orientation": 6},
        {"question": "Why?"},
    )
    rng = np.random.default_rng(0)
    prompts = []
    for row in rows:
        example = read(folder, **row)
        for medium in example.media:
            noise = rng.integers(0, 255, (2, *medium.size[::-1], 3), dtype=np.uint8)
            medium.frames = [Image.fromarray(noise[i % 2]) for i in range(len(medium.frames))]
        prompts.append(encode_prompt(processor, example))
    return prompts


def toy_prompts(processor) -> list:
    """Of the toy's own; the target is the cell that looks like the shape asked for."""
    prompts = []
    for example in toy.held_out_examples(toy.Task(), 5):
        prompt = encode_prompt(processor, example)
        sprite = toy.sprite(example.problem.split()[-2], example.solution)
        pixels, grid, side = np.asarray(example.media[0].frames[0]), toy.Task().grid, toy.CELL
        cells = [
            np.array_equal(pixels[side * y :, side * x :][:side, :side], np.asarray(sprite))
            for y in range(grid)
            for x in range(grid)
        ]
        assert prompt.target == (cells.index(True),)
        prompts.append(prompt)
    return [replace(x, target=() if i in (2, 4) else x.target) for i, x in enumerate(prompts)]


@pytest.mark.parametrize(
    ("kind", "name"), [("real", "qwen2_5_vl"), ("real", "qwen3_vl"), ("toy", "qwen2_vl")]
)
def test_the_measures_are_those_of_an_eager_model(
    real, checkpoints, tmp_path, monkeypatch, kind, name
):
    """In chunks of which all rows, some and none have boxes, with prompts of different lengths."""
    path = real / name if kind == "real" else checkpoints[name]
    model, processor = load(path)
    if kind == "real":
        processor = replace(processor, image_tokens=70, min_image_tokens=20, frame_tokens=48)
        processor.prompt_config = PromptConfig(eval.PROMPTS)
        prompts = real_prompts(processor, tmp_path)
    else:
        processor.prompt_config = toy.Task().prompt_config()
        prompts = toy_prompts(processor)
    encode, generate = processor.tokenizer.encode, common.generate_group
    end, said = processor.tokenizer.eos_token_id, {}
    for number, prompt in enumerate(prompts):
        before, answer, after = (encode(text) for text in SAID[number % 4])
        start = len(before) if answer else None
        said[tuple(prompt.ids.tolist())] = ([*before, *answer, *after, end], start)

    def demonstrate(model, batch, group_size, max_new_tokens):
        if max_new_tokens == 1:  # to the generic question
            return generate(model, batch, group_size, max_new_tokens)
        kept = batch.ids >= 0 if batch.mask is None else batch.mask
        rows = [said[tuple(x[m].tolist())][0] for x, m in zip(batch.ids, kept, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([[row + [0] * (longest - len(row))] for row in rows])
        mask = torch.arange(longest) < torch.tensor([[[len(row)]] for row in rows])
        return common.Rollout(batch, ids, mask, torch.zeros(len(rows), 1, dtype=torch.bool))

    monkeypatch.setattr(eval, "generate_group", demonstrate)
    options = {"max_new_tokens": 9, "batch_size": 2, "attn_layer": 1, "relative": True}
    predictions = eval.predict(model, processor, prompts, gazes=0, **options)
    records = [prediction.record for prediction in predictions]
    eager = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()
    media = (model.config.image_token_id, model.config.video_token_id)
    for prompt, record in zip(prompts, records, strict=True):
        if not prompt.target:
            assert not any("attn" in x or x.startswith("target") for x in record)
            continue
        ids, start = said[tuple(prompt.ids.tolist())]
        visual = [i for i, x in enumerate(prompt.ids.tolist()) if x in media]
        there, p = [visual[x] for x in prompt.target], len(prompt.ids)
        with torch.no_grad():
            found = unpacked(eager, prompt, torch.tensor(ids), output_attentions=True).attentions
            generic = "list all" if kind == "toy" else eval.GENERIC
            plain = replace(prompt.example, problem=generic, problem_type="", options=())
            none = torch.zeros(0, dtype=torch.long)
            plain = encode_prompt(processor, plain)
            other = unpacked(eager, plain, none, output_attentions=True).attentions[1][0].mean(0)
        by_layer = [x[0].mean(0).tolist() for x in found]
        expected = measures(by_layer[1], p, len(ids), start, visual, there)
        for layer, rows in enumerate(by_layer):
            mass = measures(rows, p, len(ids), start, visual, there)["target_attn"]
            expected[f"target_attn_l{layer}"] = mass
        places = [i for i, x in enumerate(plain.ids.tolist()) if x in media]
        expected["target_attn_generic"] = sum(other[-1, places[x]].item() for x in prompt.target)
        numbers = {x: record[x] for x in record if "attn" in x or "target" in x or x == "pointing"}
        assert numbers == pytest.approx(expected, abs=1e-5, rel=1e-4)
        assert (record["target_attn"] > 0) == (start is not None)
        assert record["target_attn_mean"] > 0


def measures(rows, p, n, start, visual, there) -> dict[str, float]:
    """The measures of one layer's whole attention (P + T, P + T), by loops over its numbers."""
    on_target, on_vision, own = 0.0, 0.0, []
    for t in range(n):
        others = sum(rows[p + t][i] for i in range(p + t))
        own.append(sum(rows[p + t][i] for i in there) / others)
        on_target += own[-1] / n
        on_vision += sum(rows[p + t][i] for i in visual) / others / n
    chance = len(there) / len(visual)
    found = {"target_attn_mean": on_target, "target_lift_mean": on_target / on_vision / chance}
    if start is None:
        names = ("target_attn", "target_attn_own", "target_lift", "vision_attn", "pointing")
        return found | dict.fromkeys(names, 0.0)
    row = rows[p + start - 1]
    target, vision = sum(row[i] for i in there), sum(row[i] for i in visual)
    brightest = max(visual, key=lambda i: row[i])
    found |= {"target_attn": target, "vision_attn": vision, "pointing": float(brightest in there)}
    return found | {"target_lift": target / vision / chance, "target_attn_own": own[start]}
