"""Verdicts on answers and formats, also for text that nobody would write on purpose."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import accuracy, extract_answer, has_format
from grpo_baseline import reward

ANSWERS = [
    ("<answer>red</answer>", "red"),
    ("<answer> red\n</answer>", "red"),
    ("<answer></answer>", ""),
    ("no tags", None),
    ("<answer>red", None),
    ("red</answer>", None),
    ("</answer><answer>red</answer>", "red"),
    ("<answer>red</answer><answer>blue</answer>", "red"),
    ("<answer><answer>red</answer></answer>", "<answer>red"),
    ("<think><answer>blue</answer></think><answer>red</answer>", "blue"),
    ("<answer>\u3000r\u00f6t \u2705</answer>", "r\u00f6t \u2705"),
    ("<Answer>red</Answer>", None),
]

FORMATS = [  # text, with thinking, without
    ("<think>a</think><answer>b</answer>", True, False),
    (" \n<think>a</think>\n\t<answer>b</answer>\u3000", True, False),
    ("<think></think><answer></answer>", True, False),
    ("<answer>b</answer>", False, True),
    ("\n<answer>b</answer> ", False, True),
    ("<think>a</think> so <answer>b</answer>", False, False),
    ("well <think>a</think><answer>b</answer>", False, False),
    ("<think>a</think><answer>b</answer>.", False, False),
    ("<answer>b</answer><think>a</think>", False, False),
    ("<think>a<answer>b</answer></think>", False, False),
    ("<think><answer>b</think></answer>", False, False),
    ("<think>a</think><think>a</think><answer>b</answer>", False, False),
    ("<think>a</think><answer>b</answer><answer>b</answer>", False, False),
    ("<answer><answer>b</answer></answer>", False, False),
    ("<think>a<answer>b</answer>", False, False),
    ("</think>a<think><answer>b</answer>", False, False),
    ("b", False, False),
    ("", False, False),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer
    assert accuracy(text, "red") == float(answer == "red")


@pytest.mark.parametrize(("text", "thinking", "direct"), FORMATS)
def test_format(text, thinking, direct):
    assert has_format(text, think=True) == thinking
    assert has_format(text, think=False) == direct


pieces = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "red", "\u00e9", "<", "answer>"]
)
texts = st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=12).map("".join)


@settings(deadline=None, max_examples=500)
@given(texts)
def test_verdicts_are_those_of_regular_expressions(text):
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    assert extract_answer(text) == (found.group(1).strip() if found else None)
    inner = r"((?!</?think>|</?answer>).)*"
    thinking = re.fullmatch(
        rf"\s*<think>{inner}</think>\s*<answer>{inner}</answer>\s*", text, re.DOTALL
    )
    assert has_format(text, think=True) == bool(thinking)
    direct = re.fullmatch(rf"\s*<answer>{inner}</answer>\s*", text, re.DOTALL)
    assert has_format(text, think=False) == bool(direct)


@pytest.mark.parametrize("noise", ["<answer>", "</answer>", "<think>", "< ", "\u0000", "a"])
def test_100_kB_of_noise(noise):
    text = noise * (100_000 // len(noise))
    assert accuracy(text, "red") == 0.0
    assert not has_format(text, think=True) and not has_format(text, think=False)
    assert accuracy(f"<answer>red</answer>{text}", "red") == 1.0


def test_reward_is_equation_7():
    import torch

    values = reward(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(values, torch.tensor([1.0, 0.9, 0.1, 0.0]))
