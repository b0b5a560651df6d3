"""A prompt of any sequence of text and vision blocks is what the family's own processor makes."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from processor_fixture import CASES, FILE, digest, pictures
from real import THINKING, write_checkpoint
from shared import make_prompts
from transformers import AutoConfig

import common
from support import ranks
from support.prompts import Example, Media, PromptConfig, encode_prompt

EXPECTED = json.loads(FILE.read_text())


def example_of(parts: list, side: int) -> Example:
    """The example whose user's turn is `parts`; see processor_fixture.py."""
    text, media = "", []
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        frames, indices = pictures(part, side), part[2:]
        times = [i / indices[1] for i in indices[0]] if indices else ()
        media.append(Media(frames, bool(indices), times))
        text += f"<{media[-1].kind}>"
    return Example(text, "", media)


def without_outer_pair(ids: torch.Tensor, positions: torch.Tensor, config) -> tuple:
    """transformers 5 keeps the template's <|vision_start|> and <|vision_end|> around the frames of
    a Qwen3-VL video. Its models were trained without them: transformers 4 replaced all three."""
    start, end = config.vision_start_token_id, config.vision_end_token_id
    pad = torch.isin(ids, torch.tensor([config.image_token_id, config.video_token_id]))
    outer = (ids == start) & ~pad.roll(-1) | (ids == end) & ~pad.roll(1)
    return ids[~outer], (positions - outer.cumsum(0))[:, ~outer]


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_is_that_of_the_processor(real, family, case):
    processor = common.load_processor(real / family)
    config, side = processor.config, 28 if family != "qwen3_vl" else 32
    whole = {"shortest_edge": 1, "longest_edge": 1 << 30}
    processor.image_processor.size = whole
    prompt = encode_prompt(processor, example_of(CASES[case], side))
    expected = EXPECTED[f"{family} {case}"]
    ids, positions = torch.tensor(expected["ids"]), expected["positions"]
    plain = torch.arange(len(ids)).expand(3, -1)  # transformers computes none for text
    positions = plain if positions is None else torch.tensor(positions)
    if family == "qwen3_vl":
        ids, positions = without_outer_pair(ids, positions, config)
    else:  # transformers starts the text after a video inside the video's own time axis
        for block in prompt.blocks:
            end = block.start + block.tokens
            theirs = positions[0, block.start] + max(block.shape[1:])
            positions[:, end:] += positions[:, block.start : end].max() + 1 - theirs
    assert prompt.ids.tolist() == ids.tolist()
    assert prompt.positions.tolist() == positions.tolist()
    kinds = [[b.pixels for b in prompt.blocks if b.is_video == video] for video in (False, True)]
    found = [digest(torch.cat(pixels)) for pixels in kinds if pixels]
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected["pixels"]), rtol=1e-4, atol=1e-2
    )


def test_an_unknown_family_has_no_layout(real):
    """A family that is added to `FAMILIES` alone would get the layout of another."""
    processor = common.load_processor(real / "qwen2_vl")
    processor.config.model_type = "qwen9_vl"
    for media in (
        [Media([Image.new("RGB", (56, 56))])],
        [Media([Image.new("RGB", (56, 56))], True)],
    ):
        with pytest.raises(ranks.UsageError, match=r"^qwen9_vl: its layout of videos is not known"):
            encode_prompt(processor, Example("So?", "", media))


def test_media_without_markers_come_first_or_last(real):
    processor = common.load_processor(real / "qwen3_vl")
    image, video = (
        Media([Image.new("RGB", (256, 256))]),
        Media([Image.new("RGB", (64, 64))] * 4, True),
    )
    for media in ([], [image], [image, video]):
        marks = "".join(f"<{medium.kind}>" for medium in media)
        for last in (False, True):
            asked = replace(processor.prompt_config, question_first=last)
            plain = encode_prompt(
                replace(processor, prompt_config=asked), Example("So?", "", media)
            )
            text = f"So?{marks}" if last else f"{marks}So?"
            marked = encode_prompt(processor, Example(text, "", media))
            assert plain.ids.tolist() == marked.ids.tolist()
            assert torch.equal(plain.positions, marked.positions)


@pytest.mark.parametrize(
    ("text", "media", "message"),
    [
        ("<image> and <image>?", 1, "has the markers <image>, <image>, but the media are <image>"),
        ("<video>?", 1, "has the markers <video>, but the media are <image>"),
        ("Which? <image>", 0, "has the markers <image>, but the media are none"),
        ("<image>?", 2, "has the markers <image>, but the media are <image>, <image>"),
    ],
)
def test_markers_that_do_not_match_are_named(real, text, media, message):
    processor = common.load_processor(real / "qwen2_vl")
    with pytest.raises(ValueError, match=message):
        encode_prompt(processor, Example(text, "", [Media([Image.new("RGB", (56, 56))])] * media))


def test_an_option_may_be_a_picture(real):
    processor = common.load_processor(real / "qwen2_vl")
    media = [Media([Image.new("RGB", (28 * n, 56))]) for n in (2, 3, 4)]
    options = ("A. <image>", "B. <image>")
    prompt = encode_prompt(processor, Example("As <image>?", "", media, options=options))
    assert [block.shape for block in prompt.blocks] == [(1, 2, 2), (1, 2, 3), (1, 2, 4)]
    between = prompt.ids[prompt.blocks[0].start + 4 : prompt.blocks[1].start]
    assert "A. " in processor.tokenizer.decode(between)


def test_frames_stand_behind_the_mean_of_their_times(real):
    """An odd number repeats the last frame, so its pair has that frame's time."""
    processor = common.load_processor(real / "qwen3_vl")
    video = Media([Image.new("RGB", (64, 64))] * 5, True, times=[0.0, 0.3, 1.0, 4.0, 9.96])
    prompt = encode_prompt(processor, Example("So?", "", [video]))
    text = processor.tokenizer.decode(prompt.ids[prompt.patches() < 0])
    pair = "<|vision_start|><|vision_end|>"
    stamps = [f"<{time} seconds>{pair}" for time in ("0.1", "2.5", "10.0")]
    assert text.startswith("<|im_start|>user\n" + "".join(stamps) + "So?")
    assert prompt.patches().unique().tolist() == [-1, 0, 1, 2] and prompt.blocks[0].is_video


def test_patches_are_counted_over_all_blocks(loaded):
    prompt = make_prompts(*loaded, kinds=("mixed",), grids=(4,), frames=(6,))[0]
    patches = prompt.patches()
    shown = torch.isin(
        prompt.ids, torch.tensor([loaded[0].config.image_token_id, loaded[0].config.video_token_id])
    )
    assert torch.equal(shown, patches >= 0)
    # An image of 4 x 4, a video of three pairs of frames and an image, of 3 x 3 each.
    assert torch.bincount(patches[shown]).tolist() == [16, 9, 9, 9, 9]


def test_a_budget_is_in_tokens(real, family):
    processor = common.load_processor(real / family, image_tokens=12, frame_tokens=6)
    media = [Media([Image.new("RGB", (640, 480))]), Media([Image.new("RGB", (640, 480))] * 4, True)]
    prompt = encode_prompt(processor, Example("So?", "", media))
    assert prompt.blocks[0].shape == (1, 3, 4)
    assert {block.shape[1:] for block in prompt.blocks[1:]} == {(2, 2)}


def test_the_tag_that_the_template_opens_counts_as_the_responses(tmp_path):
    write_checkpoint(tmp_path, "qwen3_vl", template=THINKING)
    processor = common.load_processor(tmp_path)
    tokenizer = processor.tokenizer
    assert processor.response_prefix == "<think>\n"
    prompt = encode_prompt(processor, Example("So?", "", []))
    assert tokenizer.decode(prompt.ids).endswith("assistant\n<think>\n")  # as the model knows it
    processor.prompt_config = PromptConfig({}, think=False)
    with pytest.raises(
        ranks.UsageError, match=r"^--no-think: the chat template of this model opens"
    ):
        encode_prompt(processor, Example("So?", "", []))
    full = "<think> a </think> <answer>A</answer>"
    assert processor.written(full) == "a </think> <answer>A</answer>"
    assert processor.written("a </think>") == "a </think>"
    ids = torch.tensor(tokenizer.encode(processor.written(full)))[None, None]
    rollout = common.Rollout(None, ids, torch.ones_like(ids).bool(), torch.ones(1, 1).bool())
    (((text,),)) = rollout.texts(processor)
    assert text == "<think>\na </think> <answer>A</answer>" and common.has_format(text, think=True)


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen3_5", "qwen2_audio"])
def test_another_kind_of_model_is_refused(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    words = f"is a '{kind}' model; supported are qwen2_vl, qwen2_5_vl, qwen3_vl$"
    with pytest.raises(ranks.UsageError, match=words):
        common.load_processor(tmp_path)
