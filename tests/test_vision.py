"""The vision encoder takes a batch in pieces, on every rank equally many, and computes attention in
few calls."""

import pytest
import torch
import torch.nn.functional as F
from shared import make_prompts
from torch.testing import assert_close

from support import prompts as prompts_module
from support.prompts import collate, encoder_outputs, visual_features


@pytest.mark.parametrize("others", [1, 7])
def test_features_do_not_depend_on_the_calls_of_the_encoder(loaded, monkeypatch, others):
    """One rank has `others` calls; a rank with fewer encodes blank images as often."""
    model, processor = loaded
    batch = collate(model, make_prompts(model, processor, ("mixed", "video", "text"), (4, 3, 3)), 0)
    together, calls, encode = visual_features(model, batch.blocks), [], model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda *x: calls.append(x) or encode(*x))
    monkeypatch.setattr(prompts_module, "ENCODER_CHUNK", 64)
    monkeypatch.setattr(prompts_module, "gather", lambda items: [*items, others])
    rows = visual_features(model, batch.blocks)
    sizes = [len(pixels) for pixels, _ in calls]
    largest = max(len(block.pixels) for row in batch.blocks for block in row)
    assert len(calls) >= max(others, 2) and max(sizes) <= max(64, largest)
    for row, blocks, whole in zip(rows, batch.blocks, together, strict=True):
        blank = row[len(blocks) :]
        assert all(len(level) == 0 and level.requires_grad for block in blank for level in block)
        for ours, theirs in zip(row[: len(blocks)], whole[: len(blocks)], strict=True):
            assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    media = encoder_outputs(model, batch)  # with the blank images, whatever kinds the rows have
    assert set(media) == {"image", "video"}
    assert torch.cat(media["video"].pooler_output).shape[0] == sum(
        block.tokens for row in batch.blocks for block in row if block.is_video
    )
    calls.clear()
    model.is_gathered = True  # it may be called at different times on each rank
    visual_features(model, batch.blocks)
    assert len(calls) == sum(size > 4 for size in sizes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_segments_of_one_length_share_a_call_of_attention(loaded, monkeypatch, checkpointing):
    """Features and gradients are, to the bit, those of a call for each image, frame or window."""
    visual = loaded[0].model.visual.train(checkpointing)
    config = visual.config
    assert config._attn_implementation == "flash_by_length"
    assert loaded[0].config.vision_config._attn_implementation == "sdpa"  # others may share it
    if checkpointing:
        visual.gradient_checkpointing_enable({"use_reentrant": False})
    grids = torch.tensor([[1, 6, 10], [4, 8, 12], [1, 14, 12], [3, 8, 12], [1, 6, 10]])
    values = 3 * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(int(grids.prod(1).sum()), values)
    attend, results, calls = F.scaled_dot_product_attention, [], []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *x, **y: calls.append(q) or attend(q, *x, **y)
    )
    for name in ("sdpa", "flash_by_length"):
        monkeypatch.setattr(config, "_attn_implementation", name)
        calls.clear()
        output = visual(pixels, grid_thw=grids)
        lengths = [q.shape[2] for q in calls]
        levels = [output.pooler_output, *getattr(output, "deepstack_features", ())]
        loss = sum(x.square().sum() for x in levels)
        parameters = [p for p in visual.parameters() if p.requires_grad]
        results.append([*levels, *torch.autograd.grad(loss, parameters)])
    assert len(lengths) == 3 * config.depth  # images and frames have 60, 96 or 168 patches,
    assert set(lengths) <= {60, 96, 168, 4, 8, 16}  # and Qwen2.5-VL's windows 4, 8 or 16
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
