"""The real job in small: every script's own `main` on a checkpoint directory of the real form, with
a data file of images and videos, and what a full-size model would get."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from launch import DRAW
from PIL import Image
from real import SPECIAL, write_tokenizer
from safetensors.torch import load_file
from shared import same
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import attn_distill
import common
import eval
import grpo_baseline
import kd_baseline
import ral_grpo
import sft
from support import memory, pictures, ranks
from support.prompts import Example, Media, Processor, PromptConfig, encode_prompt

BUDGET = {"frames": 4, "image_tokens": 9, "frame_tokens": 4, "max_skipped": 0.2}


@pytest.fixture(autouse=True)
def reward_noise(monkeypatch):
    """Random weights answer nothing, so what they say is rewarded by its length."""
    monkeypatch.setattr(common, "accuracy", lambda text, *_: float(len(text) % 2))


def run(script, real, out, family="qwen2_5_vl", **fields):
    """Two steps of a script, its metrics by step, and its checkpoint."""
    defaults = {
        "model": str(real / family),
        "data": str(real / "rows.json"),
        "media_root": (str(real / "media"),),
        "out": str(out),
        "steps": 2,
        "prompts_per_step": 3,
        "micro_batch_size": 2,
        "max_new_tokens": 6,
        "learning_rate": 1e-3,
        "workers": 0,
        "eval_every": 2,
    }
    if script is not sft:
        defaults |= {"group_size": 2}
    if script in (kd_baseline, attn_distill):
        defaults |= {"teacher": str(real / family)}
    args = script.Args(**defaults | BUDGET | fields)
    if args.check_data:
        with pytest.raises(ranks.Ended, match="--check-data: no run was started"):
            script.main(args)
        return None, None
    script.main(args)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in x.items() if not k.startswith("perf/")} for x in lines]
    return lines, out / "checkpoint"


CASES = [(script, "qwen2_5_vl") for script in (sft, grpo_baseline, kd_baseline)]
CASES += [(ral_grpo, family) for family in ("qwen2_vl", "qwen3_vl")]  # 2.5: in the tests below
CASES += [(sft, "qwen3_vl"), (attn_distill, "qwen3_vl")]


@pytest.mark.parametrize(("script", "family"), CASES)
def test_train_save_and_evaluate(real, tmp_path, monkeypatch, script, family):
    fields = {"data": str(real / "rows.jsonl")} if script is ral_grpo else {}
    fields |= {"think": False} if script is grpo_baseline else {}
    fields |= {"steps": 3, "prompts_per_step": 7}
    drawn, draw = [], pictures.draw_gaze

    def keep(axis, gaze, row):
        drawn.append((gaze.prompt.example.problem, len(row)))
        draw(axis, gaze, row)

    monkeypatch.setattr(pictures, "draw_gaze", keep)
    monkeypatch.setattr(pictures, "draw_attention", DRAW["draw_attention"])
    lines, checkpoint = run(script, real, tmp_path / "run", family, **fields)
    assert len(lines) == 4 and 0 < lines[-1]["data/skipped"] <= 3
    half = len(drawn) // 2  # the same examples before and after
    assert half > 0 and drawn[:half] == drawn[half:] and all(tokens > 0 for _, tokens in drawn)
    wide, high = Image.open(tmp_path / "run" / "attention.png").size
    assert (wide, high) == (int(184 * half), 496)
    page = (tmp_path / "run" / "gaze.html").read_text()
    assert page.count('"question":') == half and '"labels":["before","after"]' in page
    bad = [json.loads(x) for x in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert len(bad) == lines[-1]["data/skipped"]
    assert all(" row " in row["row"] and row["reason"] for row in bad)
    before = load_file(real / family / "model.safetensors")
    after = load_file(checkpoint / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("visual" in name for name in changed)  # frozen, and the rest learns
    for file in (real / family).iterdir():  # every file of the original but weights and configs
        if file.name not in ("config.json", "generation_config.json", "model.safetensors"):
            assert (checkpoint / file.name).read_bytes() == file.read_bytes(), file.name
    AutoModelForImageTextToText.from_pretrained(checkpoint)
    evaluated = []
    monkeypatch.setattr(eval, "has_format", lambda _, think: evaluated.append(think) or True)
    args = {"model": str(checkpoint), "data": str(real / "rows.json"), "max_new_tokens": 6}
    args |= {"media_root": (str(real / "media"),), "out": str(tmp_path / "eval"), "workers": 0}
    args |= {"frames": (4,), "frame_tokens": (4,), "max_skipped": 0.2}
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(checkpoint)])
    metrics = eval.main(eval.Args(**eval.defaults() | args))
    predictions = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 18 and 0 <= metrics["eval/accuracy"] <= 1
    assert set(evaluated) == {script is not grpo_baseline}  # asked as it was trained


@pytest.mark.parametrize("script", [sft, ral_grpo])
def test_worker_processes_change_nothing(real, tmp_path, script):
    lines, weights = run(script, real, tmp_path / "a")
    others, same_weights = run(script, real, tmp_path / "b", workers=2)
    assert lines == others
    files = [load_file(folder / "model.safetensors") for folder in (weights, same_weights)]
    assert same(*files)


def test_the_vision_encoder_is_trained_where_asked(real, tmp_path):
    """And the reference and old passes then use the features of their own model: at the first
    iteration of the first step nothing has moved, so both divergences are 0."""
    fields = {"train_vision": True, "num_iterations": 1, "steps": 1}
    lines, checkpoint = run(ral_grpo, real, tmp_path / "run", **fields)
    before = load_file(real / "qwen2_5_vl" / "model.safetensors")
    after = load_file(checkpoint / "model.safetensors")
    visual = [name for name in before if "visual" in name]
    assert any(not torch.equal(before[name], after[name]) for name in visual)
    assert lines[1]["train/kl"] == pytest.approx(0, abs=1e-9)
    assert lines[1]["train/attn_jsd"] == 0


def test_sft_counts_epochs_and_follows_its_schedule(real, tmp_path):
    lines, _ = run(sft, real, tmp_path / "run", steps=None, epochs=0.5, warmup_steps=1)
    assert len(lines) - 1 == 3  # half of 18 rows, three a step
    assert all(0 <= line["train/padding_frac"] < 0.5 for line in lines[1:])
    args = sft.Args(steps=10, warmup_steps=2, learning_rate=1.0, schedule="cosine")
    rates = [sft.learning_rate(step, args) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0] and rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[6] == pytest.approx((1 + math.cos(math.pi * 5 / 9)) / 2) and 0 < rates[-1] < 0.04
    constant = replace(args, schedule="constant")
    assert sft.learning_rate(9, constant) == 1.0


def test_a_demonstration_is_thought_and_answer(real):
    processor = common.load_processor(real / "qwen2_vl")
    media = [Media([Image.new("RGB", (56, 56))])]
    example = Example("q", "A", media, "I see.", problem_type="OCR")
    for think, text in (
        (True, "<think>I see.</think>\n<answer>A</answer>"),
        (False, "<answer>A</answer>"),
    ):
        example.response = "I see."
        processor.prompt_config = PromptConfig(sft.PROMPTS, think)
        prompt = sft.encode_demonstration(processor, example)
        assert prompt.example.response == text
    example.response, processor.prompt_config = None, PromptConfig(sft.PROMPTS)
    with pytest.raises(sft.BadRow, match="'process'"):
        sft.encode_demonstration(processor, example)


def test_check_data_reports_and_stops(real, tmp_path, capsys):
    with pytest.raises(ranks.UsageError, match="--max-skipped"):
        run(ral_grpo, real, tmp_path / "x", check_data=True, max_skipped=0.01)
    report = capsys.readouterr().out
    assert "20 rows, 2 bad" in report and "rows.json row 15: " in report
    args = ral_grpo.Args(
        model=str(real / "qwen2_vl"),
        data=str(real / "rows.jsonl"),
        media_root=(str(real / "media"),),
        check_data=True,
        out=str(tmp_path / "run"),
        **BUDGET,
    )
    with pytest.raises(ranks.Ended):
        ral_grpo.main(args)
    report = capsys.readouterr().out
    assert not (tmp_path / "run").exists() and "row 8 (line 8)" in report
    assert "21 rows, 3 bad" in report


def test_a_run_that_asks_for_other_responses_says_so(real, tmp_path, capsys):
    """Than its checkpoint was trained to give, as after a forgotten `--no-think`."""
    model = shutil.copytree(real / "qwen2_vl", tmp_path / "model")
    asked = PromptConfig(ral_grpo.PROMPTS, think=False)
    (model / "prompt.json").write_bytes(asked.content())
    for think in (True, False):
        fields = {"model": str(model), "think": think, "check_data": True}
        run(ral_grpo, real, tmp_path / "run", **fields)
        note = f"note: {model} was trained with --no-think; this run has --think\n"
        assert (note in capsys.readouterr().out) == think


def test_a_prompt_that_is_too_long_is_skipped(real, tmp_path, capsys):
    run(sft, real, tmp_path / "run", check_data=True)
    median = int(re.search(r"prompt tokens: median (\d+)", capsys.readouterr().out)[1])
    fields = {"max_prompt_tokens": median, "max_skipped": 1.0, "steps": 6}
    lines, _ = run(sft, real, tmp_path / "run", **fields)
    skipped = (tmp_path / "run" / "skipped.jsonl").read_text()
    assert f"above --max-prompt-tokens {median}" in skipped and lines[-1]["data/skipped"] > 2


def test_the_prompt_reads_as_the_family_writes_it(real):
    processor = common.load_processor(real / "qwen2_vl")
    assert AutoTokenizer.from_pretrained(real / "qwen2_vl").get_vocab() == (
        processor.tokenizer.get_vocab()
    )
    example = Example(
        "What <|image_pad|> is it?",
        "A",
        [Media([Image.new("RGB", (112, 84))])],
        problem_type="multiple choice",
        options=("A. a red car", "B. a blue car"),
    )
    processor.prompt_config = PromptConfig(grpo_baseline.PROMPTS)
    prompt = encode_prompt(processor, example)
    text = processor.tokenizer.decode(prompt.ids)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{'<|image_pad|>' * 12}<|vision_end|>What <|image_pad|> is it?\nOptions:\n"
        "A. a red car\nB. a blue car\nThink first, inside <think> </think> tags. Give the answer"
        " alone inside <answer> </answer> tags. The answer is the letter of one option.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    placeholders = prompt.ids == processor.config.image_token_id
    assert int(placeholders.sum()) == 12  # the one in the question is text


TEXT_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
VISION_2 = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16}
VISION_25 = {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420}
VISION_25 |= {"tokens_per_second": 2}


@pytest.mark.parametrize(
    ("config", "model", "parameters", "vision", "interval"),
    [
        (
            Qwen2VLConfig(text_config=TEXT_7B, vision_config=VISION_2),
            Qwen2VLForConditionalGeneration,
            8_291_375_616,
            675_759_104,
            1,
        ),
        (
            Qwen2_5_VLConfig(text_config=TEXT_7B, vision_config=VISION_25),
            Qwen2_5_VLForConditionalGeneration,
            8_292_166_656,
            676_550_144,
            2,  # 2 tokens a second, a patch of 2 frames of 1 second in all
        ),
    ],
    ids=["qwen2_vl", "qwen2_5_vl"],
)
def test_a_7b_model_at_32_frames(tmp_path, config, model, parameters, vision, interval):
    """What the published configurations get at the default budgets, without their weights."""
    with torch.device("meta"):
        built = model(config)
    built.model.visual.requires_grad_(False)
    count = sum(p.numel() for p in built.parameters())
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert (count, count - trained) == (parameters, vision)
    tokenizer = write_tokenizer(tmp_path)
    config.video_token_id = tokenizer.convert_tokens_to_ids(SPECIAL[-1])
    image_processor, asked = Qwen2VLImageProcessorPil(), PromptConfig(ral_grpo.PROMPTS)
    processor = Processor(config, tokenizer, image_processor, asked)
    processor.frame_tokens = ral_grpo.Args.frame_tokens
    frames = [Image.new("RGB", (640, 480))] * 32
    prompt = encode_prompt(processor, Example("What is it?", "", [Media(frames, True)]))
    (block,) = prompt.blocks
    assert block.shape == (16, 9, 13)  # 252 x 364 pixels, below 128 x 28 x 28
    assert block.pixels.shape == (16 * 18 * 26, 3 * 2 * 14 * 14)
    video = prompt.ids == config.video_token_id
    assert int(video.sum()) == 16 * 9 * 13 == 1872
    start = int(video.nonzero()[0])
    block = prompt.positions[:, video] - start
    times = [interval * i for i in range(16)]
    assert block[0].tolist() == [t for t in times for _ in range(9 * 13)]
    assert block[1].tolist() == [r for _ in times for r in range(9) for _ in range(13)]
    assert block[2].tolist() == [c for _ in times for _ in range(9) for c in range(13)]
    after = prompt.positions[:, start + 1872]
    assert after.tolist() == [start + max(*times, 12) + 1] * 3


def test_adapters_and_a_trained_vision_encoder_do_not_go_together(real, tmp_path):
    with pytest.raises(ranks.UsageError, match="--train-vision, --lora-rank 4"):
        run(ral_grpo, real, tmp_path / "run", train_vision=True, lora_rank=4)


@pytest.mark.parametrize(("lora_rank", "rate"), [(0, 1e-5), (4, 2e-5)])
def test_adapters_learn_at_a_rate_of_their_own(real, tmp_path, lora_rank, rate):
    """And the teacher is evaluated where asked."""
    out, fields = tmp_path / "run", {"lora_rank": lora_rank, "learning_rate": None, "steps": 1}
    asked = {"evaluate_teacher": True} if lora_rank else {}  # the default is not to
    run(kd_baseline, real, out, **fields | asked)
    assert json.loads((out / "args.json").read_text())["learning_rate"] == rate
    assert ("teacher/accuracy" in (out / "metrics.jsonl").read_text()) == (lora_rank > 0)


@pytest.mark.parametrize(
    ("gb", "lora_rank", "beta", "outcome"),
    [
        (1000, None, 0.04, 0),
        (80, None, 0.04, 64),  # the plain command on one card
        (80, 0, 0.0, "about 126 GB per process for .*; 80 .*, pass --lora-rank 64, or "),
        (8, None, 0.04, "; 8 GB are available, .*; .* --prompts-per-step, or give a smaller model"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_loaded(monkeypatch, gb, lora_rank, beta, outcome):
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16},
    )
    monkeypatch.setattr(memory, "available_gb", lambda: gb)
    monkeypatch.setattr(memory, "compute_dtype", lambda: torch.bfloat16)
    fields = {"frames": 32, "gradient_checkpointing": True}
    args = ral_grpo.Args(model="m", beta=beta, lora_rank=lora_rank, **fields)
    if isinstance(outcome, int):
        assert memory.fit_memory(args, config, beta > 0).lora_rank == outcome
    else:
        with pytest.raises(ranks.UsageError, match=outcome):
            memory.fit_memory(args, config, beta > 0)
