"""Grouped, cached, left-padded decoding samples from the very policy that the losses score."""

import json
import shutil

import pytest
import torch
from PIL import Image
from shared import load, make_prompts, plain_media

import common
from support.prompts import Example, Media, collate, load_blocks, mrope_positions, process_media


@pytest.mark.parametrize("kinds", [("image", "text"), ("video", "video"), ("mixed", "image")])
def test_greedy_rollout_is_generate(loaded, kinds):
    """Token for token, on prompts of different lengths; a 14-frame video has more temporal patches
    than rows."""
    model, processor = loaded
    with torch.no_grad():  # a model that says one thing over and over would prove little
        for name, parameter in model.model.language_model.layers.named_parameters():
            parameter.mul_(4.0 if "proj" in name or "self_attn" in name else 1.0)
    model.generation_config.eos_token_id = [28, 29]
    prompts = make_prompts(model, processor, kinds, frames=(14, 8))
    new_tokens, said = 16, set()
    rollout = common.generate_group(model, collate(model, prompts, 0), 2, new_tokens)
    model.set_attn_implementation("sdpa")
    for b, prompt in enumerate(prompts):
        text_positions = torch.arange(len(prompt.ids))[None, None]
        model.model.rope_deltas = prompt.positions[:, -1:].max()[None, None] + 1 - len(prompt.ids)
        generated = model.generate(
            prompt.ids[None],
            attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
            position_ids=torch.cat([text_positions, prompt.positions[:, None]]),
            suppress_tokens=common.vision_token_ids(model.config),
            do_sample=False,
            max_new_tokens=new_tokens,
            **plain_media(prompt),
        )[0, len(prompt.ids) :]
        for g in range(2):
            ids = rollout.response_ids[b, g][rollout.response_mask[b, g]]
            assert ids.tolist() == generated.tolist()
        said |= set(generated.tolist())
    assert len(said) > 5


def test_responses_do_not_depend_on_their_batch(loaded):
    model, processor = loaded
    prompts = make_prompts(model, processor, ("video", "image"))
    noise = common.sampling_noise(3, range(2), 4, 10)
    together = common.generate_group(model, collate(model, prompts, 0), 4, 10, noise)
    alone = common.generate_group(model, collate(model, prompts[1:], 0), 4, 10, noise[4:])
    ids, mask = together.response_ids[1], together.response_mask[1]
    assert [i[m].tolist() for i, m in zip(ids, mask, strict=True)] == [
        i[m].tolist() for i, m in zip(alone.response_ids[0], alone.response_mask[0], strict=True)
    ]


def test_sampling_follows_the_policy():
    """Frequencies of many samples against softmax(logits / temperature), cut at top-p."""
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, -torch.inf])
    noise = (torch.arange(20_000) + 0.5) / 20_000
    for temperature, top_p, kept in [(1.0, 1.0, 4), (0.7, 1.0, 4), (1.0, 0.7, 2), (1.0, 1e-6, 1)]:
        tokens = common.pick_tokens(logits.expand(20_000, -1), noise, temperature, top_p)
        probs = (logits / temperature).softmax(0)
        probs = torch.where(probs >= probs.sort(descending=True).values[kept - 1], probs, 0.0)
        frequencies = torch.bincount(tokens, minlength=5) / 20_000
        torch.testing.assert_close(frequencies, probs / probs.sum(), atol=2e-4, rtol=0)


def test_a_token_of_probability_0_is_never_sampled():
    """Not even where the noise is as close to 1 as float32 comes, and sums are rounded."""
    logits = torch.randn(2000, 997, generator=torch.Generator().manual_seed(0))
    logits[:, 500:] = -torch.inf
    for top_p in (1.0, 0.9999999):
        tokens = common.pick_tokens(logits, torch.full((2000,), 1 - 2**-24), 1.0, top_p)
        assert tokens.max() < 500


def test_vision_tokens_are_never_sampled(loaded):
    model, processor = loaded
    special = common.vision_token_ids(model.config)
    with torch.no_grad():  # a head that wants nothing else
        direction = torch.randn(model.lm_head.in_features)
        model.lm_head.weight.copy_(0.01 * torch.randn_like(model.lm_head.weight))
        model.lm_head.weight[special] += 10 * direction
    batch = collate(model, make_prompts(model, processor), 0)
    noise = common.sampling_noise(0, range(2), 8, 20)
    rollout = common.generate_group(model, batch, 8, 20, noise)
    assert not torch.isin(rollout.response_ids, torch.tensor(special)).any()


def test_a_response_ends_with_its_first_eos(loaded):
    model, processor = loaded
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, 17]
    batch = collate(model, make_prompts(model, processor), 0)
    noise = common.sampling_noise(0, range(2), 16, 30)
    rollout = common.generate_group(model, batch, 16, 30, noise, temperature=3.0)
    eos = torch.tensor(model.generation_config.eos_token_id)
    assert rollout.truncated.any() and not rollout.truncated.all()
    for ids, mask, cut in zip(
        rollout.response_ids.flatten(0, 1),
        rollout.response_mask.flatten(0, 1),
        rollout.truncated.flatten(),
        strict=True,
    ):
        ends = torch.isin(ids[mask], eos)
        assert not ends[:-1].any() and bool(ends[-1]) != bool(cut)


def test_a_turn_ends_as_the_tokenizer_or_the_model_says(checkpoints, tmp_path):
    """Base models are known whose two ends differ; SFT teaches the tokenizer's."""
    path = tmp_path / "model"
    shutil.copytree(checkpoints["qwen2_vl"], path)
    file = path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 17}))
    model, processor = load(path)
    assert model.generation_config.eos_token_id == sorted([17, processor.tokenizer.eos_token_id])


def test_a_part_is_padded_no_further_than_it_needs(loaded):
    """And its scores are those of the whole."""
    model, processor = loaded
    batch = collate(model, make_prompts(model, processor, ("video", "image")), 0)
    noise = common.sampling_noise(0, range(2), 4, 12)
    rollout = common.generate_group(model, batch, 4, 12, noise, temperature=3.0)
    lengths = torch.tensor([[2, 3, 1, 2], [5, 4, 2, 3]], device=model.device)
    longest = rollout.response_ids.shape[-1]
    assert longest > 3
    rollout.response_mask = torch.arange(longest) < lengths[..., None]
    scores = common.score(model, rollout, attn_layers=[-1])
    length = rollout.prompts.mask.sum(1)
    assert length[0] != length[1]
    for row, wide in ((0, 3), (1, 5)):
        part = rollout[row : row + 1]
        assert part.prompts.ids.shape == (1, length[row]) and part.prompts.mask is None
        assert part.response_ids.shape[-1] == wide
        alone = common.score(model, part, attn_layers=[-1])
        torch.testing.assert_close(alone.logps[0], scores.logps[row, :, :wide])
        rows = scores.attentions[-1][row, :, : wide + 1]
        p = batch.ids.shape[1]
        same = torch.cat([rows[..., p - length[row] : p], rows[..., p : p + wide]], dim=-1)
        seen = part.response_mask[0]
        assert alone.attentions[-1][0].shape == same.shape
        torch.testing.assert_close(alone.attentions[-1][0][:, :-1][seen], same[:, :-1][seen])
        torch.testing.assert_close(alone.attentions[-1][0][:, 1:][seen], same[:, 1:][seen])


def test_a_text_ends_before_its_eos_and_hides_nothing(loaded):
    """A special token between the tags stays in the text, where format and accuracy can see it."""
    _, processor = loaded
    tokenizer = processor.tokenizer
    said = tokenizer.encode(
        "<answer> <|im_start|> red </answer> <|im_end|>", add_special_tokens=False
    )
    ids = torch.tensor([[said, said]])
    mask = torch.arange(5) < torch.tensor([5, 4])[:, None]
    rollout = common.Rollout(None, ids, mask[None], torch.tensor([[False, True]]))
    assert rollout.texts(processor) == [["<answer> <|im_start|> red </answer>"] * 2]
    example = Example("", "red", [])
    assert common.accuracy(rollout.texts(processor)[0][0], example) == 0.0


def test_image_positions_are_those_of_transformers(loaded):
    model, processor = loaded
    for prompt in make_prompts(model, processor):
        kinds = (prompt.ids == model.config.image_token_id).int()[None]
        expected, _ = model.model.get_rope_index(
            prompt.ids[None], kinds, image_grid_thw=plain_media(prompt)["image_grid_thw"]
        )
        assert torch.equal(prompt.positions, expected[:, 0])


def test_text_after_a_long_video_starts_after_its_last_position(loaded, family):
    """The release's rule, written out: 3 tokens of text, 7 temporal patches of 2 x 3 tokens, 2
    tokens of text. Each patch of Qwen3-VL is a block of its own."""
    _, processor = loaded
    side = 2 * processor.image_processor.patch_size
    frames = [Image.new("RGB", (3 * side, 2 * side))] * 14
    video = Media(frames, is_video=True, times=[0.75 * i for i in range(14)])
    (_, block), *others = load_blocks(processor, video)
    block.start = 3
    positions = mrope_positions(3 + block.tokens + 2, [block])
    times = {"qwen2_vl": range(7), "qwen3_vl": [0]}  # Qwen2.5-VL: 2 a second, 1.5 s a patch
    times = times.get(family, [0, 3, 6, 9, 12, 15, 18])
    assert len(others) == (6 if family == "qwen3_vl" else 0)
    table = [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    table += [[3 + t, 3 + h, 3 + w] for t in times for h in range(2) for w in range(3)]
    last = max(max(row) for row in table)
    table += [[last + 1] * 3, [last + 2] * 3]
    assert positions.T.tolist() == table


def test_video_patches_are_two_frames_deep(loaded):
    """Against a plain loop over the documented layout; an odd number of frames repeats the last."""
    _, processor = loaded
    (video,) = make_prompts(*loaded, kinds=("video",), frames=(5,))[0].example.media
    side = processor.image_processor.patch_size
    video.frames = [frame.resize((8 * side, 8 * side)) for frame in video.frames]
    pixels, grid = process_media(processor, video)
    assert grid == (3, 8, 8)
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_processor.image_std)[:, None, None]
    array = [
        torch.tensor(list(f.convert("RGB").tobytes())).view(8 * side, 8 * side, 3).permute(2, 0, 1)
        / 255
        for f in video.frames
    ]
    frames = [(frame - mean) / std for frame in [*array, array[-1]]]
    row = 0
    for t in range(3):
        for block_h in range(4):
            for block_w in range(4):
                for h in range(2 * block_h, 2 * block_h + 2):
                    for w in range(2 * block_w, 2 * block_w + 2):
                        cut = [
                            f[:, side * h : side * (h + 1), side * w : side * (w + 1)]
                            for f in frames[2 * t : 2 * t + 2]
                        ]
                        expected = torch.stack(
                            cut, dim=1
                        ).flatten()  # channel, frame, height, width
                        torch.testing.assert_close(pixels[row], expected, atol=1e-5, rtol=0)
                        row += 1
    assert row == len(pixels)
