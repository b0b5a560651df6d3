"""Verdicts on answers and formats, also for text that nobody would write on purpose."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import accuracy, extract_answer, has_format
from grpo_baseline import reward
from prompts import Example

RED = Example("what colour?", "red", [], False)
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
    assert accuracy(text, RED) == float(answer == "red")


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
    assert accuracy(text, RED) == 0.0
    assert not has_format(text, think=True) and not has_format(text, think=False)
    assert accuracy(f"<answer>red</answer>{text}", RED) == 1.0


def test_reward_is_equation_7():
    import torch

    values = reward(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(values, torch.tensor([1.0, 0.9, 0.1, 0.0]))


BY_TYPE = [  # type, answer, solution, accuracy
    ("multiple choice", "A", "A", 1),
    ("multiple choice", "A.", "A", 1),
    ("multiple choice", "(A)", "A", 1),
    ("multiple choice", "A. a red car", "A", 1),
    ("multiple choice", "A) a red car", "(A)", 1),
    ("multiple choice", "B", "A", 0),
    ("multiple choice", "A red car", "A", 0),
    ("multiple choice", "a", "A", 0),
    ("multiple choice", "AB", "A", 0),
    ("multiple choice", "", "A", 0),
    ("multiple choice", "yes", "yes", 1),
    ("numerical", "3.14", "3.14", 1),
    ("numerical", "3.141", "3.14", 1),
    ("numerical", "3.15", "3.14", 0),
    ("numerical", "1,234", "1234", 1),
    ("numerical", "3", "3.0", 0),
    ("numerical", "three", "3", 0),
    ("numerical", "nan", "nan", 0),
    ("numerical", "inf", "inf", 0),
    ("regression", "12", "10", 0.8),
    ("regression", "-12", "-10", 0.8),
    ("regression", "100", "10", 0),
    ("regression", "0", "0", 1),
    ("regression", "1e-9", "0", 0),
    ("regression", "x", "10", 0),
    ("OCR", "stop here now", "stop here now", 1),
    ("OCR", "stop there now", "stop here now", 2 / 3),
    ("OCR", "stop\there\nnow", "stop here now", 1),
    ("OCR", "a b c d e f g", "stop", 0),
    ("OCR", "", "stop", 0),
    ("free-form", "a red car", "a red car", 1),
    ("free-form", "the cars are red", "", 0),
    ("", "A.", "A", 0),
    ("", "A", "A", 1),
]


@pytest.mark.parametrize(("kind", "answer", "solution", "value"), BY_TYPE)
def test_accuracy_by_type(kind, answer, solution, value):
    example = Example("", solution, [], False, problem_type=kind)
    text = f"<think>t</think> <answer> {answer} </answer>"
    assert accuracy(text, example) == pytest.approx(value)
    assert accuracy(text, example, "exact") == float(answer == solution)
    assert accuracy(answer, example) == 0  # no tags, no answer


def test_rouge_by_hand():
    """Of 'the cats sat' and 'the cat sat down': after stemming 3 of 3 and 3 of 4 words, 2 of 2 and
    2 of 3 pairs, and a common subsequence of 3."""
    example = Example("", "the cat sat down", [], False, problem_type="free-form")
    f1 = [2 * p * r / (p + r) for p, r in ((1, 3 / 4), (1, 2 / 3), (1, 3 / 4))]
    value = accuracy("<answer>the cats sat</answer>", example)
    assert value == pytest.approx(sum(f1) / 3)


def edit_distance(a: list[str], b: list[str]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i] + [0] * len(b)
        for j, y in enumerate(b, 1):
            row[j] = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y))
    return row[-1]


words = st.lists(st.sampled_from(["stop", "go", "a", "\u00e9t\u00e9"]), min_size=1, max_size=6)


@settings(deadline=None)
@given(words, words)
def test_word_accuracy_is_that_of_a_plain_loop(answer, solution):
    example = Example("", " ".join(solution), [], False, problem_type="OCR")
    value = accuracy(f"<answer>{' '.join(answer)}</answer>", example)
    assert value == pytest.approx(1 - min(1, edit_distance(answer, solution) / len(solution)))


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(["multiple choice", "numerical", "regression", "OCR", "free-form", ""]),
    st.text(max_size=30),
    st.text(min_size=1, max_size=30).filter(str.strip),
)
def test_accuracy_is_a_number_from_0_to_1(kind, answer, solution):
    example = Example("", solution.strip(), [], False, problem_type=kind)
    value = accuracy(f"<answer>{answer}</answer>", example)
    assert isinstance(value, float) and 0 <= value <= 1


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6).filter(lambda g: abs(g) > 1e-3))
def test_regression_is_scale_free(p, g):
    def value(p, g):
        example = Example("", repr(g), [], False, problem_type="regression")
        return accuracy(f"<answer>{p!r}</answer>", example)

    assert value(p, g) == pytest.approx(value(-p, -g)) == pytest.approx(value(8 * p, 8 * g))
    assert value(g, g) == 1
