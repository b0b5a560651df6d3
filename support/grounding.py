"""Where a question's answer is shown, and whether the model looks there.

A row of a data file may have boxes (see docs/data.md); on the toy, the box is the cell of the shape
that is asked about.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What a response can be, in names and in words.
OUTCOMES = {
    "right_looked": "right and looked",
    "right_unlooked": "right and did not",
    "wrong_looked": "wrong and looked",
    "wrong_unlooked": "wrong and did not",
}


@dataclass(frozen=True)
class Box:
    """What a question is about: an area of medium number `medium` of an example, in pixels of its
    upright picture (`Media.size`). In a video it holds for the frames shown from `start` to `end`,
    in seconds, both included."""

    left: float
    top: float
    right: float
    bottom: float
    medium: int = 0
    start: float = 0.0
    end: float = math.inf

    def holds(self, medium: Any, patch: int) -> bool:
        """Whether one of the frames of a temporal patch of its medium is shown while it holds."""
        times = medium.times[2 * patch : 2 * patch + 2] if medium.is_video else [self.start]
        return any(self.start - 1e-3 < time < self.end + 1e-3 for time in times)


def target_tokens(
    boxes: Sequence[Box], media: Sequence[Any], grids: Sequence[tuple[int, int, int]]
) -> tuple[int, ...]:
    """The visual tokens that show the boxes, in ascending order and counted over all `media`. The
    `grids` of these are their temporal patches, and rows and columns of visual tokens.

    A token shows a box if at least half of the token lies in the box. If none does, because the box
    is small or thin, the token with the largest part of the box shows it, or all with equal parts;
    a token that holds half of the box is one of these. A pair of a video's frames counts if one of
    them is shown while the box holds. A box that holds between two sampled frames has no token.
    """
    tokens, first = set(), 0
    for number, (medium, (patches, rows, columns)) in enumerate(zip(media, grids, strict=True)):
        width, height = medium.size
        for box in (box for box in boxes if box.medium == number):
            x = overlaps(box.left * columns / width, box.right * columns / width, columns)
            y = overlaps(box.top * rows / height, box.bottom * rows / height, rows)
            part = (y[:, None] * x).flatten()  # in tokens
            least = min(0.5, part.max().item()) - 1e-9
            cells = (part >= least).nonzero()[:, 0].tolist()
            for patch in range(patches):
                if box.holds(medium, patch):
                    tokens.update(first + patch * rows * columns + cell for cell in cells)
        first += patches * rows * columns
    return tuple(sorted(tokens))


def overlaps(start: float, end: float, count: int) -> Tensor:
    """How much of the interval [start, end] lies in each of [0, 1], [1, 2], ..., [count - 1,
    count]."""
    left = torch.arange(count, dtype=torch.float64)
    return ((left + 1).clamp(max=end) - left.clamp(min=start)).clamp(min=0)


def look(
    rows: Tensor, length: int, start: int | None, visual: Tensor, target: Sequence[int]
) -> dict[str, float]:
    """Where a response of `length` tokens looks, from one layer's `rows` (T + 1, P + T), in which
    both the prompt and the response may be padded: that of the prompt's last position, and of each
    response token.

    `visual` are the positions of the visual tokens, and `target` counts over these. Token `start`
    is the first of the answer; without one (None), the numbers of its rows are 0.

      answered          1 if there is an answer, else 0
      target_attn       mass on the target in the row that predicts the answer's first token
      target_attn_own   mass on the target in that token's own row, as a fraction of the mass on all
                        positions but the token itself (eq. 2)
      target_attn_mean  the same, averaged over the own rows of all tokens: what RAL acts on by
                        default
      target_lift       (target_attn / vision_attn) / (target tokens / visual tokens): 1 is chance
      target_lift_mean  the same in the rows of `target_attn_mean`
      vision_attn       mass on all visual tokens in the row of `target_attn`
      pointing          1 if the brightest visual token in that row shows the target, else 0 (the
                        pointing game, arXiv 1608.00507)
    """
    there, least = visual[list(target)], 1e-9
    own = rows[1:].tril(rows.shape[1] - len(rows))[:length]  # without the token itself
    share = len(target) / len(visual)
    first = start or 0
    seen, own_sum = rows[first, visual], own[first].sum().clamp_min(least)
    found = {
        "answered": 1.0,
        "target_attn": rows[first, there].sum().item(),
        "target_attn_own": (own[first, there].sum() / own_sum).item(),
        "vision_attn": seen.sum().item(),
        "pointing": float(seen.argmax().item() in target),
    }
    if start is None:
        found = dict.fromkeys(found, 0.0)
    policies = own / own.sum(-1, keepdim=True).clamp_min(least)
    on_target, on_vision = (policies[:, x].sum().item() / max(length, 1) for x in (there, visual))
    return found | {
        "target_attn_mean": on_target,
        "target_lift": found["target_attn"] / max(found["vision_attn"] * share, least),
        "target_lift_mean": on_target / max(on_vision * share, least),
    }


def outcome(record: dict[str, Any]) -> str:
    """Which of `OUTCOMES` a record is; empty for a row without boxes. It is right if its accuracy,
    or a benchmark's own score, is 0.5 or more, and it looked if `pointing` is 1."""
    if "pointing" not in record:
        return ""
    right = record.get("score", record["accuracy"]) >= 0.5
    looked = "looked" if record["pointing"] == 1 else "unlooked"
    return f"{'right' if right else 'wrong'}_{looked}"


def fourfold(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The share of each outcome among the records of rows with boxes; empty if there are none."""
    found = list(filter(None, map(outcome, records)))
    return {name: found.count(name) / len(found) for name in OUTCOMES if found}
