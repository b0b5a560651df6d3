"""The vision encoder takes a batch in pieces, on every rank equally many."""

import pytest
import torch
from conftest import make_prompts
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
