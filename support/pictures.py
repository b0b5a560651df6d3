"""Pictures of a run: where the model looks (`attention.png` and the page `gaze.html`), and curves
of its metrics."""

import base64
import hashlib
import io
import json
import math
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from support import disk, grounding, ranks
from support.answers import extract_answer
from support.prompts import Prompt

LIMIT = 10_000_000  # bytes of a page
LARGE = LIMIT // 4  # bytes of an example, above which its videos are sampled
KEPT = 0.95  # share of a row's mass on vision whose cells are stored
PIXELS = 1_000_000  # of all pictures of an example together
LONGEST = 896  # pixels, the longer side of a picture


@dataclass
class Gaze:
    """Where one response looked; T response tokens follow P prompt positions.

    `prompt` has its media, but no pixels, and `response` holds the text of each token. `rows` maps
    a layer to its attention (T + 1, P + T), averaged over heads. Its row 0 is that of the prompt's
    last position, and row t that of response token t; each sums to 1.
    """

    prompt: Prompt
    response: list[str]
    rows: dict[int, Tensor]

    @property
    def visual(self) -> Tensor:
        """The indices of all visual tokens in the prompt."""
        return (self.prompt.patches() >= 0).nonzero()[:, 0]

    def places(self, stride: int = 1) -> list[tuple[float, ...]]:
        """Where the boxes are drawn: a temporal patch, counted over every `stride`-th patch of all
        media, and left, top, width and height in percent of the picture."""
        places, first, example = [], 0, self.prompt.example
        for number, (t, _, _) in enumerate(self.prompt.grids):
            medium = example.media[number]
            x, y = (100 / edge for edge in medium.size)
            for box in (box for box in example.boxes if box.medium == number):
                place = (box.left * x, box.top * y)
                place += ((box.right - box.left) * x, (box.bottom - box.top) * y)
                shown = [i for i, p in enumerate(range(0, t, stride)) if box.holds(medium, p)]
                places += [(first + i, *place) for i in shown]
            first += len(range(0, t, stride))
        return places


@dataclass
class Prediction:
    """One evaluated example. `record` is its line of predictions.jsonl.

    An example that is shown has a `gaze`. `answer` are the indices of the response tokens that
    spell the answer, and `layer` is the layer whose attention is drawn.
    """

    record: dict[str, Any]
    gaze: Gaze | None
    answer: range
    layer: int

    def attention(self) -> Tensor:
        """Attention to the visual tokens in the row that predicts the answer's first token; zeros
        without an answer."""
        if not self.answer:
            return torch.zeros(len(self.gaze.visual))
        return self.gaze.rows[self.layer][self.answer.start, self.gaze.visual]


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds to the response, with the spaces between words."""
    # A character may be spelt by several tokens: it belongs to the last of them.
    texts = [tokenizer.decode(ids[:end]).rstrip("\ufffd") for end in range(len(ids))]
    texts.append(tokenizer.decode(ids))
    return [after[len(before) :] for before, after in pairwise(texts)]


def make_gaze(prompt: Prompt, ids: list[int], tokenizer: Any, rows: dict[int, Tensor]) -> Gaze:
    """Where the response `ids` looked; `rows` are without padding."""
    blocks = [replace(block, pixels=torch.empty(0)) for block in prompt.blocks]
    return Gaze(replace(prompt, blocks=blocks), token_texts(tokenizer, ids), rows)


def draw_run(out: Path, shown: dict[str, list[Prediction]], names: Sequence[str]) -> None:
    """Draw a run into its directory: where it looked "before" and "after", as a page, these and any
    other entries of `shown` as a picture, and curves of the named metrics. Only rank 0 draws."""
    if ranks.rank() == 0:
        draw_page(out / "gaze.html", {x: shown[x] for x in ("before", "after")}, title=str(out))
        draw_attention(out / "attention.png", shown)
        draw_curves(out / "curves.png", out / "metrics.jsonl", names)


# 1. Pictures


def load_pyplot() -> Any:
    """Import pyplot, set to draw to files. The import is slow, so callers do it on demand."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # text may contain dollar signs
    warnings.filterwarnings("ignore", message="Glyph")  # and any other character
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    figure.tight_layout()
    with disk.writing(path.parent, path.name):
        figure.savefig(path, dpi=80)
    load_pyplot().close(figure)


def draw_gaze(axis: Any, gaze: Gaze, attention: Tensor) -> None:
    """Draw the picture that most of one row's attention over visual tokens goes to: an image, or
    the first frame of a temporal patch.

    A brighter cell has more attention mass (averaged over heads), and outlines mark the boxes.
    Without an answer there is no attention to show, and nothing is dimmed.
    """
    from matplotlib.patches import Rectangle

    media, grids = gaze.prompt.example.media, gaze.prompt.grids
    frames = [f for medium in media for f in medium.frames[:: 2 if medium.is_video else 1]]
    shapes = [(h, w) for t, h, w in grids for _ in range(t)]
    cells = attention.split([h * w for h, w in shapes])
    patch = int(torch.stack([x.sum() for x in cells]).argmax())
    frame, heat = frames[patch], cells[patch].view(shapes[patch]).numpy()
    extent = (0, frame.width, frame.height, 0)
    axis.imshow(np.asarray(frame.convert("RGB")), extent=extent)
    if attention.max() > 0:
        dim = np.zeros((*heat.shape, 4))
        dim[..., 3] = 0.85 * (1 - heat / heat.max())
        axis.imshow(dim, extent=extent, interpolation="nearest")
    for at, *place in gaze.places():
        if at == patch:
            x, y, *edges = np.multiply(place, frame.size * 2) / 100
            axis.add_patch(Rectangle((x, y), *edges, fill=False, edgecolor="magenta", lw=2))
    axis.set(xticks=[], yticks=[])


def verdict(prediction: Prediction) -> tuple[str, str]:
    """Title and colour of a picture."""
    value = prediction.record["accuracy"]
    said = (extract_answer(prediction.record["response"]) or "no answer")[:16]
    if 0 < value < 1:
        return f"{value:.2f}: {said}", "darkorange"
    return (f"right: {said}", "green") if value else (f"WRONG: {said}", "red")


def draw_attention(path: Path, rows: dict[str, list[Prediction]], count: int = 6) -> None:
    """Draw the attention of the model's answers: one row of held-out examples for each entry of
    `rows`; see `draw_gaze`. The page shows all pictures of an example."""
    rows = {
        label: [x for x in row if x.gaze and x.gaze.prompt.grids] for label, row in rows.items()
    }
    count = min([count, *map(len, rows.values())])
    if count == 0:  # none of this rank's rows could be read
        return
    size = (2.3 * count, 2.9 * len(rows) + 0.4)  # the last for the title
    figure, axes = load_pyplot().subplots(len(rows), count, figsize=size, squeeze=False)
    for (label, predictions), line in zip(rows.items(), axes, strict=True):
        for prediction, axis in zip(predictions[:count], line, strict=True):
            prompt, attention = prediction.gaze.prompt, prediction.attention()
            draw_gaze(axis, prediction.gaze, attention)
            title, colour = verdict(prediction)
            if prompt.target and prediction.answer:
                title += f"\nmass on target {attention[list(prompt.target)].sum():.2f}"
            axis.set_title(title, color=colour, fontsize=9)
            axis.set_xlabel(prompt.example.problem[:32], fontsize=8)
        line[0].set_ylabel(label, fontsize=10)
    figure.suptitle("attention in the row that predicts the answer", fontsize=10)
    save(figure, path)


def draw_curves(path: Path, metrics: Path, names: Sequence[str]) -> None:
    """Draw the named metrics of a run's `metrics.jsonl` against the step, one panel each."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = [name for name in names if any(name in line for line in lines)]
    size = (3.2 * len(names), 2.8)
    figure, axes = load_pyplot().subplots(1, len(names), figsize=size, squeeze=False)
    for name, axis in zip(names, axes[0], strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        marker = "o" if len(points) < 30 else None
        axis.plot(*zip(*points, strict=True), marker=marker, markersize=3)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    save(figure, path)


def draw_sweep(path: Path, name: str, lines: dict[str, list[tuple[float, float, float]]]) -> None:
    """Plot lines of (number, accuracy, its standard error); `name` says what the number is."""
    figure, axis = load_pyplot().subplots(figsize=(5, 3.6))
    for label, points in lines.items():
        x, y, error = zip(*sorted(points), strict=True)
        axis.errorbar(x, y, error, marker="o", capsize=3, label=label)
    axis.set(xlabel=name, ylabel="accuracy")
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=8)
    save(figure, path)


# 2. The gaze page


def draw_page(path: Path, predictions: dict[str, list[Prediction]], title: str) -> int:
    """Write one HTML page to `path` and return the number of examples that it holds. The page needs
    no server and sends no request, so it can be mailed or kept beside a run.

    The keys of `predictions` are labels such as "before" and "after". Each has the same examples in
    the same order, and the page shows those that all of them have kept side by side; without any,
    there is no page. An example above 2.5 MB shows every second pair of frames of its videos, or
    every fourth, and so on. Examples that would make the page larger than 10 MB are left out. The
    page says both.
    """
    shown = ([x for x in row if x.gaze] for row in predictions.values())
    examples = list(zip(*shown, strict=False))
    if not examples:
        return 0
    template = Path(__file__).with_name("gaze.html").read_text(encoding="utf-8")
    layers = sorted({layer for sides in examples for x in sides for layer in x.gaze.rows})
    page = {"title": title, "labels": list(predictions), "of": len(examples), "layers": layers}
    page["outcomes"] = grounding.OUTCOMES
    head, texts = as_text(page), []
    room = LIMIT - len((template + head).encode()) - 4 * 64  # it holds the nonce four times
    for sides in examples:
        longest = max((t for t, _, _ in sides[0].gaze.prompt.grids), default=1)
        stride, text = 1, as_text(example_data(sides, layers))
        while len(text) > LARGE and stride < longest:
            stride *= 2
            text = as_text(example_data(sides, layers, stride))
        if len(text) < room:
            room -= len(text) + 1
            texts.append(text)
    data = f'{head[:-1]},"examples":[{",".join(texts)}]}}'
    # Questions and responses come from data files and models. They reach the page as JSON and
    # become text nodes. Its policy runs nothing without the nonce, a hash of all of them, which
    # none of them can hold.
    nonce = hashlib.sha256(data.encode()).hexdigest()
    html = template.replace("{{nonce}}", nonce).replace("{{data}}", data)
    with disk.writing(path.parent, path.name):
        disk.write_aside(path, html)
    return len(texts)


def as_text(value: dict) -> str:
    """Return `value` as JSON in ASCII that holds no markup: a `</script>` would end its element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def sampled(gaze: Gaze, stride: int) -> tuple[list[list[Image.Image]], list[tuple], list[int]]:
    """Return the frames and the grid of each medium with every `stride`-th of its temporal patches,
    and the visual tokens of those."""
    frames, grids, cells, start = [], [], [], 0
    for medium, (t, h, w) in zip(gaze.prompt.example.media, gaze.prompt.grids, strict=True):
        chosen = range(0, t, stride)
        frames.append([frame for p in chosen for frame in medium.frames[2 * p : 2 * p + 2]])
        grids.append((len(chosen), h, w))
        cells += [start + p * h * w + cell for p in chosen for cell in range(h * w)]
        start += t * h * w
    return frames, grids, cells


def example_data(sides: Sequence[Prediction], layers: list[int], stride: int = 1) -> dict:
    """Return one example as the page reads it, with every `stride`-th temporal patch of its videos.
    What the sides share comes from the first."""
    first = sides[0].gaze
    frames, grids, _ = sampled(first, stride)
    longest = min(LONGEST, math.isqrt(PIXELS // max(sum(map(len, frames)), 1)))
    pictures = [[jpeg(frame, longest) for frame in some] for some in frames]
    answers = [
        {
            "tokens": x.gaze.response,
            "accuracy": x.record["accuracy"],
            "layers": [pack(x.gaze, n, stride) for n in layers],
        }
        for x in sides
    ]
    example = first.prompt.example
    return {
        "name": example.name,
        "question": example.problem,
        "solution": example.solution,
        "grids": grids,
        "boxes": [[round(number, 2) for number in place] for place in first.places(stride)],
        "outcome": grounding.outcome(sides[-1].record),
        "target": bool(first.prompt.target),
        "pictures": pictures,
        "sides": answers,
        "stride": stride,
    }


def jpeg(picture: Image.Image, longest: int) -> str:
    """Return a picture as a JPEG in base64, its longer side at most `longest` pixels."""
    picture, file = picture.convert("RGB"), io.BytesIO()
    picture.thumbnail((longest, longest))
    picture.save(file, "JPEG", quality=90, subsampling=0)
    return base64.b64encode(file.getvalue()).decode()


def pack(gaze: Gaze, layer: int, stride: int = 1) -> str:
    """Return the T + 1 rows of a layer as the page reads them, deflated, in base64. Of a video they
    hold every `stride`-th temporal patch.

    First comes a 32-bit float per row for the mass on vision, on the question, on earlier response
    tokens, on the row's own column, on the brightest cell and on the target, then one for each
    temporal patch. Then comes a byte for each row and visual token. Byte b is the mass
    (b / 255)^2 x brightest cell; 0 is a cell outside the brightest ones that hold 95% of the
    row's mass on vision.
    """
    rows, prompt = gaze.rows[layer].float(), len(gaze.prompt.ids)
    _, grids, cells = sampled(gaze, stride)
    seen = rows[:, gaze.visual]  # (T + 1, visual tokens)
    own = pad(rows[1:, prompt:].diagonal(), (1, 0))  # the prompt's last row has its own in P - 1
    brightest = pad(seen[:, cells], (1, 0)).amax(1)  # 0 without vision
    sums = [seen.sum(1), rows[:, :prompt].sum(1) - seen.sum(1), rows[:, prompt:].sum(1) - own]
    sums += [own, brightest, seen[:, list(gaze.prompt.target)].sum(1)]
    seen = seen[:, cells]
    patches = seen.split([h * w for t, h, w in grids for _ in range(t)], dim=1)
    sums = torch.stack(sums + [patch.sum(1) for patch in patches], dim=1)
    ranked, order = seen.sort(descending=True)
    before = ranked.cumsum(1) - ranked  # mass of the brighter cells
    kept = torch.zeros_like(seen, dtype=torch.bool)
    kept.scatter_(1, order, before < KEPT * seen.sum(1, keepdim=True))
    code = (seen / brightest[:, None]).sqrt().mul(255).round().clamp(min=1) * kept
    content = sums.clamp(min=0).numpy().astype("<f4").tobytes()
    content += code.nan_to_num().to(torch.uint8).numpy().tobytes()
    return base64.b64encode(zlib.compress(content)).decode()
