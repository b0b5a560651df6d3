"""Pictures of a run: where the model looks (`attention.png`), and curves of its metrics."""

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.answers import extract_answer
from support.disk import writing
from support.gaze import Gaze, write_page
from support.ranks import rank


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
        """Attention to the visual tokens in the row that emits the first token of the answer; zeros
        without an answer."""
        if not self.answer:
            return torch.zeros(len(self.gaze.visual))
        return self.gaze.rows[self.layer][self.answer.start, self.gaze.visual]


def draw_run(out: Path, shown: dict[str, list[Prediction]], names: Sequence[str]) -> None:
    """Draw a run into its directory: where it looked "before" and "after", as a page, these and any
    other entries of `shown` as a picture, and curves of the named metrics. Only rank 0 draws."""
    if rank() == 0:
        draw_page(out / "gaze.html", {x: shown[x] for x in ("before", "after")}, str(out))
        draw_attention(out / "attention.png", shown)
        draw_curves(out / "curves.png", out / "metrics.jsonl", names)


def draw_gaze(axis: Any, gaze: Gaze, attention: Tensor) -> None:
    """Draw the images and videos of an example with one row of attention over visual tokens.

    A brighter cell has more attention mass (averaged over heads), and a box marks the target.
    Images and the temporal patches of a video, with the first frame of each, are shown as a mosaic
    in reading order. Without an answer there is no attention to show, and nothing is dimmed.
    """
    from matplotlib.patches import Rectangle

    frames = [f for medium in gaze.media for f in medium.frames[:: 2 if medium.is_video else 1]]
    shapes = [(h, w) for t, h, w in gaze.grids for _ in range(t)]
    wide, high = (max(edges) for edges in zip(*(frame.size for frame in frames), strict=True))
    columns, first = math.ceil(math.sqrt(len(shapes))), 0
    for patch, (frame, (h, w)) in enumerate(zip(frames, shapes, strict=True)):
        (width, height), heat = frame.size, attention[first : first + h * w].view(h, w).numpy()
        left, top = patch % columns * wide * 1.05, patch // columns * high * 1.05
        extent = (left, left + width, top + height, top)
        axis.imshow(np.asarray(frame.convert("RGB")), extent=extent)
        if attention.max() > 0:
            dim = np.zeros((h, w, 4))
            dim[..., 3] = 0.85 * (1 - heat / attention.max().item())
            axis.imshow(dim, extent=extent, interpolation="nearest")
        for token in gaze.target:
            if first <= token < first + h * w:
                row, column = divmod(token - first, w)
                corner = (left + column * width / w, top + row * height / h)
                box = (corner, width / w, height / h)
                axis.add_patch(Rectangle(*box, fill=False, edgecolor="magenta", lw=2))
        first += h * w
    right = (columns * 1.05 - 0.05) * wide
    bottom = (math.ceil(len(shapes) / columns) * 1.05 - 0.05) * high
    axis.set(xlim=(0, right), ylim=(bottom, 0), xticks=[], yticks=[])


def verdict(prediction: Prediction) -> tuple[str, str]:
    """Title and colour of a picture."""
    value = prediction.record["accuracy"]
    said = (extract_answer(prediction.record["response"]) or "no answer")[:16]
    if 0 < value < 1:
        return f"{value:.2f}: {said}", "darkorange"
    return (f"right: {said}", "green") if value else (f"WRONG: {said}", "red")


def draw_attention(path: Path, rows: dict[str, list[Prediction]], count: int = 6) -> None:
    """Draw the attention of the model's answers: one row of held-out examples for each entry of
    `rows`; see `draw_gaze`."""
    pyplot = load_pyplot()
    rows = {label: [x for x in row if x.gaze and x.gaze.media] for label, row in rows.items()}
    count = min([count, *map(len, rows.values())])
    if count == 0:  # none of this rank's rows could be read
        return
    size = (2.3 * count, 2.9 * len(rows) + 0.4)  # the last for the title
    figure, axes = pyplot.subplots(len(rows), count, figsize=size, squeeze=False)
    for (label, predictions), line in zip(rows.items(), axes, strict=True):
        for prediction, axis in zip(predictions[:count], line, strict=True):
            gaze, attention = prediction.gaze, prediction.attention()
            draw_gaze(axis, gaze, attention)
            title, colour = verdict(prediction)
            if gaze.target:
                title += f"\nmass on target {attention[list(gaze.target)].sum():.2f}"
            axis.set_title(title, color=colour, fontsize=9)
            axis.set_xlabel(gaze.question[:32], fontsize=8)
        line[0].set_ylabel(label, fontsize=10)
    figure.suptitle("attention in the row that emits the answer", fontsize=10)
    figure.tight_layout()
    with writing(path.parent, path.name):
        figure.savefig(path, dpi=80)
    pyplot.close(figure)


def draw_page(path: Path, predictions: dict[str, list[Prediction]], title: str) -> None:
    """Write the gaze page of the examples that every entry of `predictions` shows."""
    gazes = {label: [x.gaze for x in row if x.gaze] for label, row in predictions.items()}
    count = min(map(len, gazes.values()))
    if count:
        write_page(path, {label: row[:count] for label, row in gazes.items()}, title)


def draw_curves(path: Path, metrics: Path, names: Sequence[str]) -> None:
    """Draw the named metrics of a run's `metrics.jsonl` against the step, one panel each."""
    pyplot = load_pyplot()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = [name for name in names if any(name in line for line in lines)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 2.8), squeeze=False)
    for name, axis in zip(names, axes[0], strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(
            *zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3
        )
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with writing(path.parent, path.name):
        figure.savefig(path, dpi=80)
    pyplot.close(figure)


def load_pyplot() -> Any:
    """Import pyplot, set to draw to files. The import is slow, so callers do it on demand."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # text may contain dollar signs
    warnings.filterwarnings("ignore", message="Glyph")  # and any other character
    from matplotlib import pyplot

    return pyplot


def draw_sweep(
    path: Path,
    results: dict[tuple, list[dict[str, Any]]],
    names: Sequence[str],
    varied: Sequence[int],
) -> None:
    """Plot accuracy, or a benchmark's own score, with its standard error against the first varied
    number, with one line per combination of the other varied arguments. Nothing is drawn if no
    number varies."""
    numbers = [i for i in varied if isinstance(next(iter(results))[i], int)]
    if not numbers:
        return
    others = [i for i in varied if i != numbers[0]]
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(5, 3.6))
    lines = defaultdict(list)
    for setting, records in results.items():
        rest = ", ".join(f"{names[i]} {setting[i]}" for i in others)
        accuracies = np.array([record.get("score", record["accuracy"]) for record in records])
        error = accuracies.std() / math.sqrt(len(records))
        lines[rest].append((setting[numbers[0]], accuracies.mean(), error))
    for label, points in lines.items():
        x, y, error = zip(*sorted(points), strict=True)
        axis.errorbar(x, y, error, marker="o", capsize=3, label=label)
    axis.set(xlabel=names[numbers[0]], ylabel="accuracy")
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=8)
    figure.tight_layout()
    with writing(path.parent, path.name):
        figure.savefig(path, dpi=80)
    pyplot.close(figure)
