"""Training from a base model, whose chat template cannot ask about an image or a video, and what a
saved checkpoint is to the programs that load it."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from real import BASE_TEMPLATES, TEMPLATE, write_base_model
from shared import load
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

import attn_distill
import common
import eval
import grpo_baseline
import kd_baseline
import ral_grpo
import sft
from support import ranks
from support.prompts import Example, Media, collate, encode_prompt

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SMALL = {"steps": 1, "prompts_per_step": 2, "micro_batch_size": 1, "max_new_tokens": 4}
SMALL |= {"eval_examples": 2, "workers": 0, "learning_rate": 1e-3, "grid": 3}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """A base model with each of the templates, of each family in turn."""
    folder = tmp_path_factory.mktemp("bases")
    for i, name in enumerate(BASE_TEMPLATES):
        (folder / name).mkdir()
        write_base_model(folder / name, ("qwen2_vl", "qwen2_5_vl")[i % 2], name)
    return folder


def messages(kind: str) -> list[dict]:
    content = [{"type": kind}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]


def render(checkpoint: Path, kind: str) -> str:
    """What a client makes of a question, with the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return tokenizer.apply_chat_template(messages(kind), tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", BASE_TEMPLATES)
def test_a_base_model_is_asked_as_its_instruct_sibling(bases, name, capsys):
    ranks.print_once.cache_clear()
    processor = common.load_processor(bases / name)
    common.load_model(bases / name)
    (line,) = capsys.readouterr().out.splitlines()  # read twice, said once
    reasons = ("renders nothing", "concatenate", "does not render the question", "it has none")
    reason = dict(zip(BASE_TEMPLATES, reasons, strict=True))[name]
    assert reason in line and "ChatML" in line and str(bases / name) in line
    for kind, frames in (("image", 1), ("video", 4)):
        example = Example(
            "What is it?", "", [Media([Image.new("RGB", (56, 56))] * frames, frames > 1)]
        )
        prompt = encode_prompt(processor, example)
        # A frame is enlarged to 12 x 12 tokens, the least that the family gives one of a video.
        pads = f"<|{kind}_pad|>" * (frames // 2 * 12**2 if frames > 1 else 2**2)
        assert processor.tokenizer.decode(prompt.ids) == (
            f"{SYSTEM}<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>What is it?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_template_that_works_in_another_file_is_used(bases, tmp_path, name, capsys):
    write_base_model(tmp_path, "qwen2_vl", name)
    other = TEMPLATE.replace("helpful", "terse")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": other}))
    processor = common.load_processor(tmp_path)
    assert processor.tokenizer.chat_template == other
    assert "the one in chat_template.json" in capsys.readouterr().out
    assert processor.files["chat_template.jinja"].decode() == other


def test_a_client_does_not_get_a_broken_template_beside_a_good_one(tmp_path):
    """AutoProcessor prefers chat_template.json, AutoTokenizer does not read it."""
    write_base_model(tmp_path, "qwen2_vl", "empty")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    processor = common.load_processor(tmp_path)
    written = json.loads(processor.files["chat_template.json"])["chat_template"]
    assert processor.tokenizer.chat_template == written == TEMPLATE


def test_a_chat_model_stays_as_it_is(real, capsys):
    ranks.print_once.cache_clear()
    processor = common.load_processor(real / "qwen2_vl")
    assert not capsys.readouterr().out and processor.tokenizer.chat_template == TEMPLATE
    for name, content in processor.files.items():
        assert (real / "qwen2_vl" / name).read_bytes() == content


def test_both_ends_end_a_response(bases, tmp_path):
    """Even where no generation config names the tokenizer's."""
    write_base_model(tmp_path, "qwen2_vl")
    (tmp_path / "generation_config.json").unlink()
    for path in (bases / "empty", tmp_path):
        model, processor = load(path)
        ids = processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        assert model.generation_config.eos_token_id == sorted(ids)
    example = Example("q", "", [Media([Image.new("RGB", (56, 56))])], "yes")
    prompt = encode_prompt(processor, example)
    rollout = sft.demonstrations(model, processor, [prompt])
    assert rollout.response_ids[0, 0, -1] == ids[1]
    assert processor.tokenizer.pad_token_id == ids[0]
    assert collate(model, [prompt], processor.tokenizer.pad_token_id).mask is None


CASES = [
    (sft, "empty", {"data": True}),
    (sft, "absent", {"frames": 8}),
    (grpo_baseline, "fails", {"data": True}),
    (ral_grpo, "empty", {"frames": 8}),
    (ral_grpo, "ignores media", {"data": True, "lora_rank": 4}),
    (kd_baseline, "absent", {"frames": 4}),
    (attn_distill, "ignores media", {}),
]


@pytest.mark.parametrize(("script", "name", "fields"), CASES)
def test_a_base_model_trains_and_its_checkpoint_is_whole(
    bases, real, tmp_path, monkeypatch, capsys, script, name, fields
):
    base, out = bases / name, tmp_path / "run"
    rows = json.loads((real / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows[:4] + rows[15:19]))  # images, videos
    data = {"data": str(tmp_path / "rows.json"), "media_root": (str(real / "media"),)}
    data |= {"image_tokens": 9, "frame_tokens": 4, "prompts_per_step": 4}
    on_data = fields.get("data")
    args = SMALL | fields | {"model": str(base), "out": str(out)} | (data if on_data else {})
    if on_data:
        del args["grid"]
    if script is not sft:
        args["group_size"] = 2
        monkeypatch.setattr(common, "accuracy", lambda text, *_: float(len(text) % 2))
    if script in (kd_baseline, attn_distill):
        args["teacher"] = str(real / "qwen2_5_vl" if script is kd_baseline else base)
    seen = []
    owner = sft if script is sft else common
    encode = owner.encode_prompt
    keep = lambda *args: seen.append(encode(*args)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(owner, "encode_prompt", keep)
    metrics = script.main(script.Args(**args))
    assert metrics["train/grad_norm"] > 0
    capsys.readouterr()

    videos = {prompt.blocks[0].is_video for prompt in seen}
    assert videos == {False, True} if on_data else videos == {"frames" in fields}
    if fields.get("frames") == 8:
        assert {prompt.blocks[0].shape[0] for prompt in seen} == {4}
    checkpoint = out / "checkpoint"
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>" and settings["pad_token"] == "<|endoftext|>"
    templates = {settings["chat_template"], (checkpoint / "chat_template.jinja").read_text()}
    legacy = checkpoint / "chat_template.json"
    assert legacy.exists() == (base / "chat_template.json").exists()
    if legacy.exists():
        templates.add(json.loads(legacy.read_text())["chat_template"])
    assert len(templates) == 1
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ends = set(GenerationConfig.from_pretrained(checkpoint).eos_token_id)
    assert ends == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    for prompt in seen[:: len(seen) // 4 or 1]:
        kind = "video" if prompt.blocks[0].is_video else "image"
        before, after = render(checkpoint, kind).split("What is it?")
        pad = f"<|{kind}_pad|>"
        visual = prompt.blocks[0].tokens
        text = tokenizer.decode(prompt.ids)
        assert text.startswith(before.replace(pad, pad * visual)) and text.endswith(after)

    asked = {"frames": (4,), "frame_tokens": (4,)} if on_data else {}
    asked |= {"data": data["data"], "media_root": data["media_root"]} if on_data else {}
    asked |= {"workers": 0, "examples": 2, "max_new_tokens": 4}
    asked |= {"model": str(checkpoint), "out": str(tmp_path / "eval")}
    assert 0 <= eval.main(eval.Args(**asked))["eval/accuracy"] <= 1
    assert "chat template" not in capsys.readouterr().out  # there is nothing left to repair


def test_the_command_of_the_readme(run, bases, tmp_path):
    """`python ral_grpo.py --model Qwen/Qwen2-VL-7B --frames 32`, in small."""
    words = ["--model", bases / "empty", "--frames", 8]
    for name, value in (SMALL | {"group_size": 2, "out": tmp_path / "run"}).items():
        words += [f"--{name.replace('_', '-')}", value]
    status, output = run("ral_grpo", [str(word) for word in words])
    assert status == 0, output
    assert output.count("its chat template cannot be used") == 1
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()


def test_the_config_keeps_the_layout_of_the_base(bases, tmp_path):
    """transformers 4 does not read that of 5: it has `rope_scaling` where 5 has
    `rope_parameters`."""
    model, processor = load(bases / "empty")
    common.save_model(tmp_path / "checkpoint", model, processor)
    before, after = (
        json.loads((path / "config.json").read_text())
        for path in (bases / "empty", tmp_path / "checkpoint")
    )
    assert after == before | {"torch_dtype": "float32"} and "mrope_section" in after["rope_scaling"]
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    ids = torch.arange(5, 12)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits)


def test_adapters_load_beside_the_merged_checkpoint(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "accuracy", lambda text, *_: float(len(text) % 2))
    base, out = bases / "empty", tmp_path / "run"
    fields = SMALL | {"model": str(base), "out": str(out), "lora_rank": 4, "group_size": 4}
    ral_grpo.main(ral_grpo.Args(**fields | {"steps": 2, "learning_rate": 1e-2}))
    adapter = out / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        str(base)
    )
    ids = torch.arange(5, 40)[None]
    dtype = {"dtype": torch.float32}
    plain = AutoModelForImageTextToText.from_pretrained(base, **dtype)
    before = plain(input_ids=ids).logits
    merged = AutoModelForImageTextToText.from_pretrained(out / "checkpoint")(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(plain, str(adapter))(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=1e-5)
    assert (adapted - before).abs().max() > 1e-2
    assert render(adapter, "image") == render(out / "checkpoint", "image")
    assert not list(out.glob(".checkpoint-*"))
    with pytest.raises(ranks.UsageError, match="config"):  # in one line: it is no model
        common.load_model(adapter)
