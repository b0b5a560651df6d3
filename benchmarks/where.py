"""Where does a toy model look? Hide the target from some rows of some layers, and see what is lost.

    python benchmarks/where.py --models runs/sft/checkpoint runs/ral_grpo/checkpoint

The demonstrated response is given up to the word that first names the answer, and what the model
puts next is compared with it. Then the target's visual tokens are hidden (attention -inf) from the
rows of one kind, in one layer or in all: where accuracy falls to chance (1 in 8), the looking
happens there. RAL acts on the rows of response tokens in one layer; what the prompt's rows look at
inside the prompt it does not see.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import common
from support import cli, toy
from support.prompts import collate, encode_prompt, encoder_outputs
from support.ranks import require

ROWS = ("image", "text after the image", "response")
HIDDEN = {"layers": (), "mask": None}  # what `knock_out` hides: (B, 1, rows, keys), True if hidden


def knock_out(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """SDPA, causal, with some keys hidden from some rows in the chosen layers."""
    length = query.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = causal.expand(len(query), 1, -1, -1)
    if module.layer_idx in HIDDEN["layers"]:
        allowed = allowed & ~HIDDEN["mask"]
    return sdpa_attention_forward(module, query, key, value, allowed, scaling=scaling)


AttentionInterface.register("knock_out", knock_out)
AttentionMaskInterface.register("knock_out", sdpa_mask)


@dataclass
class Args:
    models: tuple[str, ...]
    """Toy checkpoints."""
    examples: int = 512
    """Held-out examples."""


@torch.no_grad()
def main(args: Args) -> None:
    for path in args.models:
        model = common.load_model(path, frozen=True, field="--models")
        processor = common.load_processor(path, field="--models")
        model.model.language_model.config._attn_implementation = "knock_out"
        task, tokenizer = toy.Task.load(Path(path)), processor.tokenizer
        require(task is not None, f"--models {path}: is not a toy")
        layers = model.config.text_config.num_hidden_layers
        examples = toy.held_out_examples(task, args.examples)
        right = {}
        for start in range(0, len(examples), 64):
            chunk = examples[start : start + 64]
            prompts = [encode_prompt(processor, x) for x in chunk]
            batch = collate(model, prompts, tokenizer.pad_token_id)
            assert batch.mask is None  # every question has the same number of words
            words = [tokenizer.encode(x.response, add_special_tokens=False) for x in chunk]
            answers = [tokenizer.encode(x.solution, add_special_tokens=False)[0] for x in chunk]
            place = words[0].index(answers[0])
            said = torch.tensor([row[:place] for row in words])
            ids = torch.cat([batch.ids, said], dim=1)
            steps = torch.arange(place) + 1
            after = batch.positions[:, :, -1:] + steps
            visual = torch.isin(ids, torch.tensor([model.config.image_token_id,
                                                   model.config.video_token_id]))  # fmt: skip
            position = torch.arange(ids.shape[1])
            last = int(visual[0].nonzero().max())
            prompt_len = batch.ids.shape[1]
            kinds = {
                "image": visual[0],
                "text after the image": (position > last) & (position < prompt_len),
                "response": position >= prompt_len,
            }
            # The row that predicts the first response token is the prompt's last.
            kinds["text after the image"][prompt_len - 1] = False
            kinds["response"][prompt_len - 1] = True
            target = torch.zeros(ids.shape, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                target[row, visual[row].nonzero()[:, 0][list(prompt.target)]] = True
            settings = [("nothing hidden", (), ())]
            settings += [(f"layer {i}", (i,), (kind,)) for i in range(layers) for kind in ROWS]
            settings += [("all layers", tuple(range(layers)), (kind,)) for kind in ROWS]
            for name, chosen, hidden in settings:
                rows = torch.stack([kinds[kind] for kind in hidden or ROWS]).any(0)
                mask = rows[None, :, None] & target[:, None, :]
                mask &= ~torch.eye(ids.shape[1], dtype=torch.bool)  # a token may see itself
                HIDDEN.update(layers=chosen, mask=mask[:, None])
                logits = model(
                    input_ids=ids,
                    position_ids=torch.cat([batch.positions, after], dim=2),
                    mm_encoder_outputs=encoder_outputs(model, batch),
                    logits_to_keep=1,
                    use_cache=False,
                ).logits[:, -1]
                hits = (logits.argmax(-1) == torch.tensor(answers)).float()
                right.setdefault((name, hidden), []).extend(hits.tolist())

        share = {key: f"{sum(values) / len(values):.3f}" for key, values in right.items()}
        print(f"\n{path}: {share['nothing hidden', ()]} with nothing hidden\n")
        print(f"| target hidden from | {' | '.join(ROWS)} |\n|---{'|---' * len(ROWS)}|")
        for name in [*(f"layer {i}" for i in range(layers)), "all layers"]:
            print(f"| {name} | {' | '.join(share[name, (kind,)] for kind in ROWS)} |")


if __name__ == "__main__":
    cli.run_script(Args, main, __doc__)
