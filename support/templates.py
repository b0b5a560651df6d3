"""Chat templates: what they render around a question, and what a base model gets in place of a
template that cannot ask about images and videos.

A chat template is a program that comes with a checkpoint, so it may fail in any way, or never end.
It is first tried in a process of its own.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from support.ranks import first_line

END_OF_TURN = "<|im_end|>"
# What a template renders for each kind of part. The text is a stand-in for the user's.
SLOTS = {kind: f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")}
SLOTS["text"] = "\N{OBJECT REPLACEMENT CHARACTER}"
# Qwen2-VL's and Qwen2.5-VL's own chat template, for checkpoints without a usable one.
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    f"{SYSTEM}{{% endif %}}"
    "<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_TURN = 100_000  # characters


def conversation(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """A user's turn of parts, each an "image", a "video" or a "text", as chat templates take it."""
    parts = [{"type": kind} | ({"text": SLOTS[kind]} if kind == "text" else {}) for kind in kinds]
    return [{"role": "user", "content": parts}]


def render_turn(
    tokenizer: Any, kinds: Sequence[str], template: str | None = None, open_response: bool = True
) -> list[str]:
    """Render a user's turn of parts, each an "image", a "video" or a "text", and the opening of the
    response; returns the template's own text before, between and after them.

    Raises:
        ValueError: the chat template does not render every part once, in order.
    """
    options = {"chat_template": template, "add_generation_prompt": open_response}
    turn = tokenizer.apply_chat_template(conversation(kinds), tokenize=False, **options)
    if len(turn) > MAX_TURN:
        raise ValueError(f"renders {len(turn):,} characters for {len(kinds)} parts")
    asked = f"the question's {' and '.join(dict.fromkeys(kinds))}"
    if not turn.strip():
        raise ValueError(f"renders nothing for {asked}")
    pieces = re.split("({})".format("|".join(map(re.escape, SLOTS.values()))), turn)
    if pieces[1::2] != [SLOTS[kind] for kind in kinds] or "_pad|>" in "".join(pieces[::2]):
        raise ValueError(f"does not render {asked} once each, in order")
    return pieces[::2]


# What a chat template must be able to render.
TURNS = (["image", "text"], ["video", "text"], ["text"], ["text", "video"] * 2 + ["image"])


def template_fault(tokenizer: Any, template: str) -> str:
    """The fault of a chat template in words, or "" if it works."""
    try:
        for kinds in TURNS:
            pieces = render_turn(tokenizer, kinds, template)
        opens = pieces != render_turn(tokenizer, kinds, template, open_response=False)
        return "" if opens or "assistant" in pieces[-1] else "ignores add_generation_prompt"
    except Exception as error:  # it may raise any: a text-only one adds a list to a string
        return first_line(error)


# Renders chat templates as transformers does, in 3 seconds and 1 GB; ends with 3 if it needs more.
TRIAL = r"""
import json, re, resource, sys
from contextlib import suppress
from jinja2.sandbox import ImmutableSandboxedEnvironment

def refuse(message):
    raise ValueError(message)

given = json.load(sys.stdin)
limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: 3, resource.RLIMIT_AS: 2**30}
for limit, value in limits.items():
    with suppress(ValueError, OSError):  # it is lower already, or unknown here
        resource.setrlimit(limit, (value, value))
options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
environment = ImmutableSandboxedEnvironment(**options)
environment.globals.update(raise_exception=refuse, strftime_now=str)
for template in given["templates"]:
    template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
    for messages in given["conversations"]:
        for opens in (True, False):
            values = {"messages": messages, "add_generation_prompt": opens}
            try:
                environment.from_string(template).render(given["tokens"] | values)
            except MemoryError:
                sys.exit(3)
            except Exception:
                pass
"""


@cache
def trial_ends(given: str) -> bool:
    """Whether `TRIAL` ends within its limits. A fork would be faster, but may wait for a lock that
    another thread of this process holds."""
    command = [sys.executable, "-P", "-c", TRIAL]
    with suppress(subprocess.TimeoutExpired):
        status = subprocess.run(command, input=given.encode(), capture_output=True, timeout=120)
        return 0 <= status.returncode != 3
    return False


def require_bounded(tokenizer: Any, templates: Sequence[str]) -> None:
    """Try chat templates in a process of their own: a template is a program, and may never end.

    Raises:
        ValueError: a template needs more than 3 seconds or 1 GB.
    """
    turns = [conversation(kinds) for kinds in (*TURNS, ["text", "image"] * 16)]
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    given = {"templates": templates, "conversations": turns, "tokens": tokens}
    if not trial_ends(json.dumps(given)):
        raise ValueError("its chat template takes more than 3 seconds or 1 GB to render")


def repair_turns(processor: Any) -> str:
    """Replace a chat template that cannot ask about images and videos, and make the token that ends
    its turns end a response. Returns the changes in words, or "".

    A base model has a text-only template, one that renders nothing, or none. It gets the template
    of its `chat_template.json` if that one works, otherwise `CHATML`. Each change is also made in
    `files`, wherever a program that loads the checkpoint may look for it.
    """
    tokenizer, files, changes = processor.tokenizer, processor.files, []
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    legacy = None
    if "chat_template.json" in files:  # AutoProcessor prefers this one
        legacy = json.loads(files["chat_template.json"]).get("chat_template")
        if not isinstance(legacy, str):
            raise ValueError("its chat_template.json has no chat_template; fix or delete that file")
    templates = [x for x in (own, legacy) if isinstance(x, str) and x]
    require_bounded(tokenizer, templates)
    faults = {template: template_fault(tokenizer, template) for template in templates}
    if not own or any(faults.values()):
        good = [template for template, fault in faults.items() if not fault]
        if not good and END_OF_TURN not in tokenizer.get_vocab():
            raise ValueError(f"it has no chat template that works, and no {END_OF_TURN} for one")
        tokenizer.chat_template = template = good[0] if good else CHATML
        files["chat_template.jinja"] = template.encode()
        processor.set_in_file("tokenizer_config.json", chat_template=template)
        processor.set_in_file("chat_template.json", chat_template=template)
        fault = next(filter(None, faults.values()), "it has none")
        instead = "the one in chat_template.json" if good else "Qwen-VL's ChatML"
        changes.append(f"its chat template cannot be used ({fault}); {instead} takes its place")
    ends, after = {tokenizer.eos_token_id}, render_turn(tokenizer, ["text"])[-1]
    if tokenizer.eos_token != END_OF_TURN and END_OF_TURN in after:
        changes.append(f"{END_OF_TURN} ends a response, as {tokenizer.eos_token} does")
        tokenizer.eos_token = END_OF_TURN
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            processor.set_in_file(name, eos_token=END_OF_TURN)
    generated = getattr(processor.config.get_text_config(), "eos_token_id", None)
    if "generation_config.json" in files:
        generated = json.loads(files["generation_config.json"]).get("eos_token_id")
    # SFT teaches the tokenizer's end-of-turn token, but some base models generate another one.
    ends |= {tokenizer.eos_token_id, *(generated if isinstance(generated, list) else [generated])}
    processor.end_ids = ends - {None}
    processor.response_prefix = "".join(re.findall(r"<think>\s*$", after))
    return "; ".join(changes)
