"""Tiny random checkpoints of each model family, examples for them, and runs of the scripts."""

import json
import os
import random
import select
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from real import write_checkpoint, write_rows
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers in the tests are a CPU's

from launch import DRAW, leave_out

import common
import sft
from support import pictures, toy
from support.prompts import Processor, Prompt, PromptConfig, collate, encode_prompt

leave_out()
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much on a busy machine

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def toy_args(script, **fields):
    """The arguments that the command line would give on a toy."""
    return script.Args(**script.TOY | fields)


def load(path, **options) -> tuple[torch.nn.Module, Processor]:
    return common.load_model(path, **options), common.load_processor(path)


def question_first(processor: Processor) -> Processor:
    return replace(processor, prompt_config=PromptConfig({}, question_first=True))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Returns the folder `name`, filled by `write` once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, write) -> Path:
        folder, part = base / name, base / f"{name}.part"
        with FileLock(base / f"{name}.lock"):
            if not folder.exists():
                part.mkdir()
                write(part)
                part.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoints(made_once) -> dict[str, Path]:
    """A directory for each family, with the toy's tokenizer and random weights large enough to look
    somewhere."""
    folder = made_once("toys", write_toys)
    return {family: folder / family for family in FAMILIES}


def write_toys(folder: Path) -> None:
    """A checkpoint of each family, see `checkpoints`."""
    directories = {family: folder / family for family in FAMILIES}
    for directory in directories.values():
        directory.mkdir()
        toy.write_base(directory, seed=0)
    config = AutoConfig.from_pretrained(directories["qwen2_vl"])
    text = config.text_config.to_dict() | {"model_type": "qwen2_5_vl_text"}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "out_hidden_size": 128,
        "num_heads": 4,
        "intermediate_size": 128,
    }
    vision |= {
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "window_size": 56,
        "initializer_range": 0.05,
    }
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(config, name) for name in names}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    )
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.save_pretrained(directories["qwen2_5_vl"])
    for name in ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"):
        text.pop(name, None)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 8, 8]}
    text |= {"head_dim": 48, "rope_parameters": rope | {"mrope_interleaved": True}}
    vision = {name: vision[name] for name in ("hidden_size", "out_hidden_size", "num_heads")}
    vision |= {"intermediate_size": 128, "initializer_range": 0.05, "num_position_embeddings": 36}
    vision |= {"depth": 3, "deepstack_visual_indexes": [0, 1]}
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text | {"model_type": "qwen3_vl_text"}, vision_config=vision, **ids
        )
    )
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.save_pretrained(directories["qwen3_vl"])
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    image_processor = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=32 * 32, **mean)
    image_processor.save_pretrained(directories["qwen3_vl"])


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


load_once = cache(load)


def load_copy(path: Path) -> tuple[torch.nn.Module, Processor]:
    """(model, processor), which a test may change, of a checkpoint that stays as it is."""
    return deepcopy(load_once(path))


@pytest.fixture
def loaded(checkpoints, family):
    """(model, processor) of one family, all weights trainable: a copy, which a test may change."""
    return deepcopy(load_once(checkpoints[family], train_vision=True))


def make_prompts(
    model, processor, kinds=("image", "image"), grids=(4, 3), frames=(14, 6)
) -> list[Prompt]:
    """Prompts of different lengths, each with its own grid size: text, an image, a video, or all of
    them mixed."""
    rng = random.Random(0)
    prompts = []
    for kind, grid, count in zip(kinds, grids, frames, strict=False):
        task = toy.Task(grid=grid, frames=count if kind == "video" else None)
        example = toy.sample_example(rng, task)
        if kind == "text":
            example = replace(example, media=[], boxes=())
        elif kind == "mixed":
            video = toy.sample_example(rng, toy.Task(grid=3, frames=count)).media
            media = [*example.media, *video, *toy.sample_example(rng, toy.Task(grid=3)).media]
            text = "<image> what colour <video> <image> is the star ?"
            example = replace(example, problem=text, media=media, boxes=())
        prompts.append(encode_prompt(question_first(processor), example))
    return prompts


def make_rollout(
    model, processor, prompts, lengths=((5, 3, 6), (1, 6, 2)), seed=0
) -> common.Rollout:
    """A rollout of random word tokens with the given response lengths, B x G."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)[: len(prompts)]
    t = int(lengths.max())
    ids = torch.randint(1, 30, (*lengths.shape, t), generator=generator)
    mask = torch.arange(t) < lengths[..., None]
    batch = collate(model, prompts, processor.tokenizer.pad_token_id)
    return common.Rollout(batch, ids, mask, torch.zeros(lengths.shape, dtype=torch.bool))


def unpacked(model, prompt, response_ids, **kwargs):
    """One plain forward of one prompt and one response, from pixels, by the model's own code;
    returns its output."""
    ids = torch.cat([prompt.ids, response_ids])[None]
    steps = torch.arange(len(response_ids)) + prompt.positions[:, -1:] + 1
    positions = torch.cat([prompt.positions, steps], dim=1)[:, None]
    media = plain_media(prompt)
    return model(input_ids=ids, position_ids=positions, use_cache=False, **media, **kwargs)


def plain_media(prompt) -> dict[str, torch.Tensor]:
    """The pixels and grids of a prompt as transformers takes them; a video has one grid."""
    media = {}
    names = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
    for is_video, (pixels, grid) in enumerate(names):
        blocks = [block for block in prompt.blocks if block.is_video == is_video]
        if not blocks:
            continue
        grids = [[t, 2 * h, 2 * w] for t, h, w in (block.shape for block in blocks)]
        if is_video:  # all of the video's blocks have one size
            grids = [[sum(t for t, _, _ in grids), *grids[0][1:]]]
        media |= {pixels: torch.cat([b.pixels for b in blocks]), grid: torch.tensor(grids)}
    return media


SMALL = {"eval_examples": 4, "prompts_per_step": 2, "group_size": 4, "micro_batch_size": 2}


@pytest.fixture(scope="session")
def cold_start(made_once) -> Path:
    """A toy that has the format and guesses the colour, so that rewards differ within a group."""

    def write(folder: Path) -> None:
        fields = {"steps": 60, "prompts_per_step": 16, "eval_examples": 4, "eval_above": 1.0}
        sft.main(toy_args(sft, out=str(folder / "sft"), **fields))

    return made_once("cold_start", write) / "sft" / "checkpoint"


@pytest.fixture
def drawn(monkeypatch):
    """The pictures of a run are drawn, as they are without `leave_out`."""
    for name, draw in DRAW.items():
        monkeypatch.setattr(pictures, name, draw)


@pytest.fixture
def train(cold_start, tmp_path):
    """Run a script's main for a few steps; returns its metrics by step and its final weights."""

    def run(script, steps=2, **fields):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        fields = {"model": str(cold_start), "steps": steps, "learning_rate": 1e-3} | SMALL | fields
        if script is sft:
            fields = {k: v for k, v in fields.items() if k != "group_size"} | {"stop_accuracy": 2.0}
        script.main(toy_args(script, out=str(out), **fields))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        lines = [{k: v for k, v in x.items() if not k.startswith("perf/")} for x in lines]
        return lines, load_file(out / "checkpoint" / "model.safetensors")

    return run


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def teacher(made_once) -> Path:
    """A larger toy, with more layers and heads than the student."""

    def write(folder: Path) -> None:
        fields = {"steps": 10, "prompts_per_step": 8, "eval_examples": 4, "eval_above": 1.0}
        fields |= {"toy_size": "large"}
        sft.main(toy_args(sft, out=str(folder / "sft"), **fields))

    return made_once("teacher", write) / "sft" / "checkpoint"


@pytest.fixture(scope="session")
def real(made_once):
    """A checkpoint of each family, and a data file."""
    return made_once("real", write_real)


def write_real(folder: Path) -> None:
    for family in FAMILIES:
        (folder / family).mkdir()
        write_checkpoint(folder / family, family)
    (folder / "tied").mkdir()
    write_checkpoint(folder / "tied", "qwen2_vl", tied=True)
    (folder / "media").mkdir()
    rows = write_rows(folder / "media")
    (folder / "rows.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join([*lines[:7], "{not JSON", *lines[7:]]))


def terms_of(script, model, batch, args, teacher=None) -> dict[str, torch.Tensor]:
    """The terms of the loss of a batch, scored by the model and, for distillation, its teacher."""
    scores = [script.score_policy(model, batch, args)]
    scores += [script.score_teacher(teacher, batch, args)] if teacher else []
    return script.loss_terms(*scores, batch, args)


SECONDS = 60  # more than any end or step takes on a busy machine


def read(pipe: int, word: str | None = None) -> str:
    """What comes out of the pipe up to `word`, or to its end."""
    text = ""
    while word is None or word not in text:
        ready, _, _ = select.select([pipe], [], [], SECONDS)
        assert ready, f"a process is left, silent for {SECONDS} seconds:\n{text[-3000:]}"
        part = os.read(pipe, 2**16)
        if not part:
            break
        text += part.decode()
    return text


@pytest.fixture(scope="session")
def server():
    """A process that has imported everything, and forks for each case: see launch.py."""
    command = [sys.executable, str(Path(__file__).with_name("launch.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield process
        process.kill()  # readers that a test left alive hold its input open


@pytest.fixture(scope="session")
def run(server, tmp_path_factory):
    """Runs a script as its command line does; returns its exit status and its output, or those of
    rank 0 and of both ranks. To get a signal, it must wait for it; a negative one goes to its
    readers as well. See launch.py for `plants` and `folders`."""
    path = tmp_path_factory.mktemp("run") / "pipe"

    def run(
        script: str, argv: list, plants: list = (), signals: tuple = (), ranks: int = 1, folders=()
    ) -> tuple[int, str]:
        os.mkfifo(path)
        case = {"script": script, "argv": argv, "plants": plants, "folders": folders}
        case |= {"output": path, "ranks": ranks}
        print(json.dumps(case, default=str), file=server.stdin, flush=True)
        child, output = int(server.stdout.readline()), ""
        pipe = os.open(path, os.O_RDONLY)
        path.unlink()
        try:
            for number in signals:
                output += read(pipe, "waiting")
                (os.killpg if number < 0 else os.kill)(child, abs(number))
            output += read(pipe)
        except BaseException:
            os.killpg(child, signal.SIGKILL)
            raise
        finally:
            os.close(pipe)
            status = os.waitstatus_to_exitcode(int(server.stdout.readline()))
        return status, output

    return run
