"""Where does a toy model look? Hide the target from some rows of some layers, and see what is lost.

    python benchmarks/where.py --models runs/sft/checkpoint runs/ral_grpo/checkpoint

The demonstrated response is given up to the word that first names the answer, and what the model
puts next is compared with it. Then the target's visual tokens are hidden (attention -inf) from the
rows of one kind, in one layer or in all: where accuracy falls to chance (1 in 8), the looking
happens there. RAL acts on the rows of response tokens in one layer; what the prompt's rows look at
inside the prompt it does not see.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from reproduce import markdown

import common
from support import cli, toy
from support.prompts import collate, encode_prompt, encoder_outputs
from support.ranks import require

ROWS = ("image", "text after the image", "response")


def knock_out(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """SDPA, causal, without what `module.hidden` (B, rows, keys) hides in this layer."""
    length = query.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & ~module.hidden
    return sdpa_attention_forward(module, query, key, value, allowed[:, None], scaling=scaling)


AttentionInterface.register("knock_out", knock_out)
AttentionMaskInterface.register("knock_out", sdpa_mask)


@dataclass
class Args:
    models: tuple[str, ...]
    """Toy checkpoints."""
    examples: int = 512
    """Held-out examples."""


@torch.no_grad()
def accuracies(path: str, count: int) -> dict[tuple[str, str], float]:
    """The accuracy of a model by the layer, or all, and the kind of rows that the target is hidden
    from."""
    task = toy.Task.load(Path(path))
    require(task is not None, f"--models {path}: is not a toy")
    model = common.load_model(path, frozen=True, field="--models")
    processor = common.load_processor(path, field="--models")
    tokenizer, text = processor.tokenizer, model.model.language_model
    text.config._attn_implementation = "knock_out"
    places = {f"layer {i}": [layer] for i, layer in enumerate(text.layers)}
    places |= {"all layers": text.layers, "nothing": []}
    examples, right = toy.held_out_examples(task, count), defaultdict(list)
    for start in range(0, count, 64):
        chunk = examples[start : start + 64]
        prompts = [encode_prompt(processor, x) for x in chunk]
        batch = collate(model, prompts, tokenizer.pad_token_id)
        assert batch.mask is None  # every question has the same number of words
        said, answers = (
            torch.tensor([tokenizer.encode(x, add_special_tokens=False) for x in texts])
            for texts in ([x.response for x in chunk], [x.solution for x in chunk])
        )
        length = said[0].tolist().index(answers[0])
        ids = torch.cat([batch.ids, said[:, :length]], dim=1)
        after = batch.positions[:, :, -1:] + torch.arange(length) + 1
        visual = (batch.patches[0] >= 0).nonzero()[:, 0]
        target = torch.zeros(ids.shape, dtype=torch.bool)
        for row, prompt in zip(target, prompts, strict=True):
            row[visual[list(prompt.target)]] = True
        position = torch.arange(ids.shape[1])
        # The row that predicts the first response token is the prompt's last.
        response = position >= batch.ids.shape[1] - 1
        kinds = torch.isin(position, visual), (position > visual.max()) & ~response, response
        for (place, layers), (kind, rows) in product(places.items(), zip(ROWS, kinds, strict=True)):
            hidden = rows[:, None] & target[:, None]
            hidden &= ~torch.eye(ids.shape[1], dtype=torch.bool)  # a token may see itself
            for layer in text.layers:
                layer.self_attn.hidden = hidden & (layer in layers)
            logits = model(
                input_ids=ids,
                position_ids=torch.cat([batch.positions, after], dim=2),
                mm_encoder_outputs=encoder_outputs(model, batch),
                logits_to_keep=1,
                use_cache=False,
            ).logits[:, -1]
            right[place, kind] += (logits.argmax(-1) == answers[:, 0]).tolist()
    return {key: sum(hits) / len(hits) for key, hits in right.items()}


def main(args: Args) -> None:
    for path in args.models:
        found = accuracies(path, args.examples)
        print(f"\n### {path}: {found.pop(('nothing', ROWS[0])):.3f} with nothing hidden\n")
        places = dict.fromkeys(place for place, _ in found if place != "nothing")
        print(markdown([
            {"target hidden from": place} | {kind: f"{found[place, kind]:.3f}" for kind in ROWS}
            for place in places
        ]))  # fmt: skip


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__)
