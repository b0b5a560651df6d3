"""A checkpoint that is hostile, damaged or at odds with itself is refused in one line, before its
weights are read; one that is only unusual trains and is saved whole."""

import json
import os
import pty
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from real import TEMPLATE
from safetensors.torch import load_file, save_file
from shared import load
from transformers import AutoModelForImageTextToText

import common
import eval
from support import ranks, templates, toy
from support.prompts import Example, Media, collate, encode_prompt


@pytest.fixture
def copy(real, tmp_path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(real / "qwen2_5_vl", tmp_path / "copy"))


def edit(name: str, path: str = "", **values):
    """A function that sets values in the object `path` of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (content[path] if path else content).update(values)
        (folder / name).write_text(json.dumps(content))

    return change


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def template(text: str):
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))

    return change


def remove(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def link(name: str):
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/etc/hostname")

    return change


def index(name: str):
    """The weights behind an index that names another file."""

    def change(folder: Path) -> None:
        names = load_file(folder / "model.safetensors").keys()
        (folder / "model.safetensors").unlink()
        torch.save({key: torch.ones(1) for key in names}, folder / "evil.bin")
        content = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


def only_bin(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


LARGE = "a" * 5_000_000
SOONER = templates.TRIAL.replace("RLIMIT_CPU: 3", "RLIMIT_CPU: 1")
assert SOONER != templates.TRIAL
FOREVER = "{% for a in range(99999) %}{% for a in range(99999) %}{% endfor %}{% endfor %}"
TEXT, VISION = {"path": "text_config"}, {"path": "vision_config"}
CONFIG, IMAGES, WORDS = "config.json", "preprocessor_config.json", "tokenizer_config.json"
REFUSED = {
    "adapter": (edit("adapter_config.json", r=8), "holds an adapter .* merge it"),
    "link": (link("merges.txt"), "merges.txt is a link to a file elsewhere"),
    "index .bin": (index("evil.bin"), "names 'evil.bin', not a"),
    "index up": (index("../../x.safetensors"), "names '../../x.safetensors', not a"),
    "index absolute": (index("/x.safetensors"), "names '/x.safetensors', not a"),
    "index number": (index(3), "names '3', not a"),
    "index dangling": (index("x.safetensors"), "has no x.safetensors"),
    "only .bin": (only_bin, r"convert its \.bin files to safetensors"),
    "AWQ": (edit(CONFIG, quantization_config={"quant_method": "awq"}), "quantised"),
    "unknown": (edit(CONFIG, quantization_config={"quant_method": "x"}), "quantised"),
    "old form": (edit(CONFIG, compression_config={"format": "x"}), "quantised"),
    "FP8": (edit(CONFIG, **TEXT, quantization_config={"quant_method": "fp8"}), "quantised"),
    "config list": (write(CONFIG, "[]"), "its config.json: is not a JSON object"),
    "config deep": (write(CONFIG, "[" * 100_000), "its config.json: RecursionError"),
    "config type": (edit(CONFIG, **TEXT, hidden_size="x"), "'hidden_size' expected int"),
    "layer types": (edit(CONFIG, **TEXT, layer_types=["x"]), "layer_types"),
    "layers": (edit(CONFIG, **TEXT, num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "blocks": (edit(CONFIG, **VISION, depth=10**9), "depth 1000000000"),
    "vocabulary": (edit(CONFIG, **TEXT, vocab_size=10**12), "vocab_size"),
    "dtype": (edit(CONFIG, dtype="x"), "'torch' has no attribute 'x'"),
    "embedding": (edit(CONFIG, **TEXT, vocab_size=300), "has the id 303, its config 300 tokens"),
    "image token": (edit(CONFIG, image_token_id=3), r"its config as \[300, 3, 301\]"),
    "video token": (edit(CONFIG, video_token_id=3), r"its config as \[300, 3, 301\]"),
    "vision start": (edit(CONFIG, vision_start_token_id=3), r"its config as \[3, 302, 301\]"),
    "generation": (write("generation_config.json", "["), "its generation_config.json: "),
    "EOS": (edit("generation_config.json", eos_token_id=["x", 10**30]), "eos_token_id has"),
    "no tokenizer": (remove("tokenizer.json", WORDS, "merges.txt"), "has no tokenizer.json"),
    "no vocabulary": (remove("tokenizer.json"), "has no tokenizer.json or vocab.json;"),
    "no processor": (remove(IMAGES), "has no preprocessor_config.json or processor_config.json"),
    "size": (edit(IMAGES, size={"min_pixels": 9, "max_pixels": 99}), "needs shortest_edge"),
    "size large": (edit(IMAGES, size={"shortest_edge": 1e13, "longest_edge": 1e14}), "needs"),
    "patch": (edit(IMAGES, patch_size=7), "patch_size 7, its config 14"),
    "merge": (edit(IMAGES, merge_size=3), "merge_size 3, its config 2"),
    "std": (edit(IMAGES, image_std=[0, 0, 0]), "not finite"),
    "mean": (edit(IMAGES, image_mean="x"), "mean must have 3"),
    "kind": (edit(IMAGES, image_processor_type="X"), "[Ii]mage processor"),
    "template large": (template(LARGE), "chat_template.* larger than 4 MB"),
    "template for ever": (template(FOREVER + TEMPLATE), "more than 3 seconds or 1 GB"),
    "template memory": (template("{{ 'a' * 10**10 }}" + TEMPLATE), "more than 3 seconds or 1 GB"),
    "prompt large": (write("prompt.json", LARGE), "prompt.json is larger than 4 MB"),
    "prompt marker": (edit("prompt.json", prompts={"think": "<image>"}), "marker of a medium"),
    "task large": (write("toy_task.json", LARGE), "toy_task.json is larger than 4 MB"),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_one_line(copy, monkeypatch, name):
    change, reason = REFUSED[name]
    change(copy)
    monkeypatch.setattr(common, "read_model", None)  # no weight is read
    if name == "template for ever":
        monkeypatch.setattr(templates, "TRIAL", SOONER)
    with pytest.raises(ranks.UsageError, match=rf"^--model \S*copy: .*{reason}.*$") as error:
        common.load_model(copy)
    assert len(str(error.value).splitlines()) == 1


def extra(weights: dict) -> None:
    weights["model.language_model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 2)


WEIGHTS = {
    "unexpected": extra,
    "missing": lambda weights: weights.pop("lm_head.weight"),
    "mismatched": lambda weights: weights.update({"lm_head.weight": torch.ones(2, 2)}),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_the_models_are_one_line(copy, kind):
    weights = load_file(copy / "model.safetensors")
    WEIGHTS[kind](weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ranks.UsageError, match=rf"^--model .* 1 {kind} weights, as .*; [^\n]*$"):
        common.load_model(copy)


LEFT_OVER = {"do_sample": False, "temperature": 0.01, "top_k": 1, "top_p": 0.001}
ACCEPTED = {
    "generation": edit("generation_config.json", **LEFT_OVER),
    "attention": edit(CONFIG, _attn_implementation="flash_attention_2", attn_implementation="x"),
    "attention of a part": edit(CONFIG, **TEXT, _attn_implementation="owner/kernel"),
    "other weights": edit(CONFIG, transformers_weights="adapter_model.bin"),
    "long context": edit(CONFIG, **TEXT, rope_theta=10**8),
    "no pad": edit(WORDS, pad_token=None),
    "pad is an image": edit(WORDS, pad_token="<|image_pad|>"),
    "pad below": edit(CONFIG, **TEXT, pad_token_id=-1),
    "pad beyond": edit(CONFIG, **TEXT, pad_token_id=10**6),
    "linked notes": link("notes.txt"),
    "a pipe": lambda folder: remove("merges.txt")(folder) or os.mkfifo(folder / "merges.txt"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_only_unusual_trains_and_is_saved(real, copy, tmp_path, name):
    ACCEPTED[name](copy)
    model, processor = load(copy)
    pad = processor.tokenizer.pad_token_id
    assert pad in range(304) and pad not in common.vision_token_ids(model.config)
    media = [Media([toy.Image.new("RGB", (56, 56))])]
    prompts = [encode_prompt(processor, Example(text, "", media)) for text in ("a", "is it so?")]
    batch = collate(model, prompts, pad)
    rollout = common.generate_group(model, batch, 2, 4)
    common.score(model, rollout).logps.sum().backward()
    plain, others = load(real / "qwen2_5_vl")
    same = common.generate_group(plain, collate(plain, prompts, 0), 2, 4)
    assert torch.equal(rollout.response_ids, same.response_ids)
    out = tmp_path / "out"
    out.mkdir()
    common.save_model(out, model, processor)
    assert (
        load_file(out / "model.safetensors").keys() == load_file(copy / "model.safetensors").keys()
    )
    assert not (out / "notes.txt").exists()
    before, after = (
        json.loads((path / "generation_config.json").read_text()) for path in (copy, out)
    )
    assert after == before | {"eos_token_id": sorted(others.end_ids)}
    common.load_model(out)


def test_a_save_that_would_fail_fails_before_training(real, monkeypatch):
    def fail(*_, **__):
        raise ValueError("planted")

    monkeypatch.setattr(
        AutoModelForImageTextToText._model_mapping[
            type(common.load_processor(real / "qwen2_5_vl").config)
        ],
        "save_pretrained",
        fail,
    )
    with pytest.raises(ranks.UsageError, match="planted"):
        common.load_model(real / "qwen2_5_vl")
    common.load_model(real / "qwen2_5_vl", frozen=True)


def test_weights_that_were_not_written_are_noticed(real, tmp_path):
    model, processor = load(real / "qwen2_5_vl")
    save = type(model).save_pretrained
    model.save_pretrained = lambda path, state_dict: save(model, path, state_dict={})
    with pytest.raises(ranks.UsageError, match="0 weights were written, the model has"):
        common.save_model(tmp_path, model, processor)


EVIL = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
EVIL |= {"AutoImageProcessor": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}
CODE = [(CONFIG, "model_type"), (IMAGES, "image_processor_type"), (WORDS, "tokenizer_class")]


@pytest.mark.parametrize(("name", "kind"), CODE)
def test_no_code_of_a_checkpoint_runs(copy, tmp_path, name, kind):
    """Even where a person at a terminal answers "y"."""
    ran = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    edit(name, auto_map=EVIL, **{kind: "evil"})(copy)
    child, terminal = pty.fork()
    if child == 0:
        try:
            sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")  # not those of pytest
            common.load_model(copy)
        finally:
            os._exit(0)
    os.write(terminal, b"y\n" * 9)
    said = b""
    while True:
        try:
            said += os.read(terminal, 1000)
        except OSError:  # the child has ended
            break
    os.waitpid(child, 0)
    assert b"run the custom code" not in said and not ran.exists()


def test_a_template_that_opens_no_response_is_replaced(copy, capsys):
    text = TEMPLATE[: TEMPLATE.index("{% if add_generation_prompt")]
    template(text)(copy)
    processor = common.load_processor(copy)
    assert "ignores add_generation_prompt" in capsys.readouterr().out
    ids = encode_prompt(processor, Example("a", "", [])).ids
    assert processor.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    template(text + "<|im_start|>assistant\n")(copy)  # always opens one
    assert common.load_processor(copy).tokenizer.chat_template.endswith("assistant\n")
    assert not capsys.readouterr().out


def test_a_template_that_ends_is_not_refused(copy, monkeypatch):
    """With the tag that marks what is trained on, and beside one that does not end."""
    tokenizer = common.load_processor(copy).tokenizer
    marked = TEMPLATE + "{% generation %}x{% endgeneration %}"
    templates.require_bounded(tokenizer, [TEMPLATE, marked])
    monkeypatch.setattr(templates, "TRIAL", SOONER)
    with pytest.raises(ValueError, match="more than 3 seconds"):
        templates.require_bounded(tokenizer, [marked, FOREVER + marked])


@pytest.fixture
def two_matrices(real, tmp_path) -> Path:
    """A config that says tied, over files that hold two matrices."""
    folder = Path(shutil.copytree(real / "tied", tmp_path / "two"))
    weights = load_file(folder / "model.safetensors")
    (embedding,) = (weights[name] for name in weights if "embed_tokens" in name)
    weights["lm_head.weight"] = embedding.flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_files_say_whether_embeddings_are_tied(two_matrices, tmp_path):
    """In one process, sharded as on a GPU, and in a saved checkpoint."""
    edit("config.json", "text_config", tie_word_embeddings=True)(two_matrices)
    ids = torch.arange(5, 30)[None]
    plain = AutoModelForImageTextToText.from_pretrained(two_matrices)(input_ids=ids).logits
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    policy, processor = load(two_matrices)
    reference = common.load_model(two_matrices, frozen=True)
    out = tmp_path / "out"
    out.mkdir()
    with torch.no_grad():
        for model in (policy, reference):
            torch.testing.assert_close(model(input_ids=ids).logits, plain)
    common.save_model(out, policy, processor)
    torch.distributed.destroy_process_group()
    config = json.loads((out / "config.json").read_text())
    for part in (config, config["text_config"]):
        assert part["tie_word_embeddings"] is False
    saved = AutoModelForImageTextToText.from_pretrained(out)
    torch.testing.assert_close(saved(input_ids=ids).logits, plain)


def test_weights_of_nan_answer_nothing(tmp_path):
    folder = tmp_path / "copy"
    toy.write_base(folder, seed=0)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fields = {"model": str(folder), "out": str(tmp_path / "out"), "workers": 0, "examples": 4}
    fields |= {"max_new_tokens": 4}
    with pytest.raises(ranks.UsageError, match="logits are not finite"):
        eval.main(eval.Args(**fields))


@pytest.mark.parametrize(
    "content",
    ['{"grid": 100000}', '{"frames": 1000000000}', '{"order": "x"}', '{"think": 3}', " " * 9999],
)
def test_a_toys_task_is_bounded(tmp_path, content):
    (tmp_path / "toy_task.json").write_text(content)
    with pytest.raises(ranks.UsageError, match=r"toy_task\.json: not a toy's task: [^\n]*$"):
        toy.Task.load(tmp_path)


def test_a_hub_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    """It accepts connections, and that is all."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.02)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits and tries again
    with socket.create_server(("localhost", 0)) as hub:
        address = f"http://localhost:{hub.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        line = "^--model: cannot download owner/name: no connection, and not in the cache[^\n]*$"
        with pytest.raises(ranks.UsageError, match=line):
            eval.main(eval.Args(model="owner/name", out=str(tmp_path / "out")))
        hub.setblocking(False)
        hub.accept()  # it was asked
