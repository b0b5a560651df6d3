"""Verdicts on answers and formats, also for text that nobody would write on purpose."""

import re
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from common import accuracy, has_format
from grpo_baseline import Args, reward
from support.answers import MAX_ANSWER, extract_answer, option_letter, rouge
from support.prompts import Example

RED = Example("what colour?", "red", [])
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


@settings(deadline=None, max_examples=200)
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


@pytest.mark.parametrize(
    ("text", "truncated", "value"),
    [
        ("<think>t</think><answer>red</answer>", False, 1.0),
        ("<answer>red</answer>", False, 0.9),
        ("<think>t</think><answer>blue</answer>", False, 0.1),
        ("red", False, 0.0),
        ("<think>t</think><answer>red</answer>", True, 0.9),
    ],
)
def test_the_reward_is_the_papers(text, truncated, value):
    prompt = SimpleNamespace(example=RED)
    assert reward(prompt, text, truncated, Args())["reward"] == pytest.approx(value)


MC, NUM, REG, OCR, FREE = "multiple choice", "numerical", "regression", "OCR", "free-form"
OPTIONS = ("A. red", "B. blue", "C. dark blue")
BY_TYPE = [  # type, answer, solution, accuracy; of multiple choice with and without OPTIONS
    (MC, "B", "B", 1),
    (MC, "b", "B", 1),
    (MC, "B.", "B", 1),
    (MC, "(b)", "B", 1),
    (MC, "[B]", "B", 1),
    (MC, "B!", "B", 1),
    (MC, "b) blue", "B", 1),
    (MC, "B. blue", "B", 1),
    (MC, "(B) blue", "(B)", 1),
    (MC, "B\nblue", "B", 1),
    (MC, "B - blue", "B", 1),
    (MC, "Option B", "B", 1),
    (MC, "option b: blue", "B", 1),
    (MC, "**B**", "B", 1),
    (MC, r"\boxed{B}", "B", 1),
    (MC, r"$\boxed{\text{(B)}}$", "B", 1),
    (MC, "Ｂ。", "B", 1),
    (MC, "The answer is B", "B", 1),
    (MC, "So the correct answer is: **B**.", "B", 1),
    (MC, "I think it’s B", "B", 1),
    (MC, "B is the correct answer", "B", 1),
    (MC, "B because it is the colour of A red car", "B", 1),
    (MC, "I", "I", 1),
    (MC, "A", "B", 0),
    (MC, "", "B", 0),
    (MC, "B. blue A. red", "B", 0),
    (MC, "B. blue A. red", "A", 0),
    (MC, "B, also c", "B", 0),
    (MC, "B. blue and a nice car", "B", 1),
    (MC, "B, C", "B", 0),
    (MC, "B or C", "B", 0),
    (MC, "B/C", "B", 0),
    (MC, "BC", "B", 0),
    (MC, "B. No, C.", "B", 0),
    (MC, "B. blue (c)", "B", 0),
    (MC, "not B", "B", 0),
    (MC, "all but B", "B", 0),
    (MC, "Bob", "B", 0),
    (MC, "A red car", "A", 0),
    (MC, "the answer is a red car", "A", 0),
    (MC, "I see a red car", "I", 0),
    (NUM, "42", "42", 1),
    (NUM, "42.", "42", 1),
    (NUM, "42.0", "42", 1),
    (NUM, "42", "42.0", 1),
    (NUM, "42 km", "42", 1),
    (NUM, "42km/h.", "42", 1),
    (NUM, "25 m²", "25", 1),
    (NUM, "9.8 m/s^2", "9.8", 1),
    (NUM, "$42", "42", 1),
    (NUM, "$42$", "42", 1),
    (NUM, "42 €", "42", 1),
    (NUM, "-$42", "-42", 1),
    (NUM, "60^\\circ", "60", 1),
    (NUM, "1,234", "1234", 1),
    (NUM, "1234.5", "1,234.5", 1),
    (NUM, "−3", "-3", 1),
    (NUM, "3", "−3", 0),
    (NUM, "1e3", "1000", 1),
    (NUM, "1e3", "1,000", 1),
    (NUM, "5 million", "5,000,000", 1),
    (NUM, "5 million", "5", 0),
    (NUM, "5M", "5", 0),
    (NUM, "\\boxed{42}", "42", 1),
    (NUM, "The answer is **42**.", "42", 1),
    (NUM, "x = 42", "42", 1),
    (NUM, "４２", "42", 1),
    (NUM, "٤٢", "42", 1),
    (NUM, "3/4", "0.75", 1),
    (NUM, "75%", "3/4", 1),
    (NUM, "0.75", "75%", 1),
    (NUM, "75 percent", "0.75", 1),
    (NUM, "\\frac{3}{4}", "75%", 1),
    (NUM, "\\boxed{-\\frac{3}{4}}", "-0.75", 1),
    (NUM, "½", "0.5", 1),
    (NUM, "1½", "3/2", 1),
    (NUM, "1 1/2", "1.5", 1),
    (NUM, "0.333", "1/3", 1),
    (NUM, "0.33", "1/3", 1),
    (NUM, "0.3", "1/3", 0),
    (NUM, "3.141", "3.14", 1),
    (NUM, "3.15", "3.14", 0),
    (NUM, "0", "0.004", 0),
    (NUM, "0.004", "0", 0),
    (NUM, "75.4%", "75%", 0),
    (NUM, "50%", "50", 0),
    (NUM, "50", "50%", 0),
    (NUM, "4,2", "42", 0),
    (NUM, "4_2", "42", 0),
    (NUM, "4 2", "42", 0),
    (NUM, "4,2", "4.2", 0),
    (NUM, "12,34", "1234", 0),
    (NUM, "42 or 43", "42", 0),
    (NUM, "42 43", "43", 0),
    (NUM, "40-42", "42", 0),
    (NUM, "42 or more", "42", 0),
    (NUM, "2π", "2", 0),
    (NUM, "2x", "2", 0),
    (NUM, "√3", "3", 0),
    (NUM, "10²", "10", 0),
    (NUM, "10^3", "10", 0),
    (NUM, "three", "3", 0),
    (NUM, "3/0", "3", 0),
    (NUM, "1e999999999", "1", 0),
    (NUM, "nan", "3", 0),
    (NUM, "inf", "3", 0),
    (NUM, "", "3", 0),
    (NUM, "**2:30**", "2:30", 1),  # no number: the text
    (NUM, "", "**", 0),
    (REG, "12", "10", 0.8),
    (REG, "-12", "-10", 0.8),
    (REG, "12 seconds", "10 s", 0.8),
    (REG, "100", "10", 0),
    (REG, "50%", "1", 0.5),
    (REG, "0.0", "0", 1),
    (REG, "1e-9", "0", 0),
    (REG, "x", "10", 0),
    (REG, "10 or 11", "10", 0),
    (REG, "9" * 5000, "10", 0),
    (OCR, "stop here now", "stop here now", 1),
    (OCR, "stop there now", "stop here now", 2 / 3),
    (OCR, "stop\there\nnow", "stop here now", 1),
    (OCR, "a b c d e f g", "stop", 0),
    (OCR, "", "stop", 0),
    (OCR, "停车场", "停车场", 1),
    (FREE, "a red car", "a red car", 1),
    (FREE, "red", "red", 1),
    (FREE, "Cats!", "cat", 1),
    (FREE, "the red", "red", 2 / 3),
    (FREE, "red", "the red", 4 / 9),
    (FREE, "停车场", "停车场", 1),
    (FREE, "停车", "停车场", (0.8 + 2 / 3 + 0.8) / 3),
    (FREE, "Москва.", "москва", 1),
    (FREE, "ที่จอดรถ", "ที่จอดรถ", 1),
    (FREE, "cafe", "café", 0),
    (FREE, "cafe\u0301", "caf\u00e9", 1),
    (FREE, "**!!!**", "!!!", 1),  # no word: the text
    (FREE, "a", "!!!", 0),
    (FREE, "", "!!!", 0),
    (FREE, "the cars are red", "", 0),
    ("", "A.", "A", 1),  # without a type, as a reader would compare them
    ("", "(b) blue", "B", 1),
    ("", "(b) blue", "(A)", 0),
    ("", " yes", "Yes", 1),
    ("", "Yes.", "yes", 1),
    ("", "no", "yes", 0),
    ("", "42.0", "42", 1),
    ("", "42.5", "42", 0),
    ("", "1,234 km", "1234", 1),
    ("", "5 cm", "5 km", 0),
    ("", "9 am", "9 pm", 0),
    ("", "$42", "€42", 0),
    ("", "**−42.0**", "-42", 1),
    ("", "", "yes", 0),
]


@pytest.mark.parametrize(("kind", "answer", "solution", "value"), BY_TYPE)
def test_accuracy_by_type(kind, answer, solution, value):
    text = f"<think>t</think> <answer> {answer} </answer>"
    for options in ((), OPTIONS) if kind == MC and solution != "I" else ((),):
        example = Example("", solution, [], problem_type=kind, options=options)
        assert accuracy(text, example) == pytest.approx(value)
        assert accuracy(text, example, "exact") == float(answer == solution)
        assert accuracy(answer, example) == 0  # no tags, no answer


def test_any_solution_of_several_is_right():
    example = Example("", "red", [], also_right=("crimson", "42"))
    for answer, value in (("Red", 1), ("crimson.", 1), ("42.0", 1), ("blue", 0)):
        assert accuracy(f"<answer>{answer}</answer>", example) == value
    assert accuracy("<answer>Crimson</answer>", example, "exact") == 0
    assert accuracy("<answer>crimson</answer>", example, "exact") == 1


CHOSEN = [  # options, answer, the letter it names
    (OPTIONS, "blue", "B"),
    (OPTIONS, "The answer is blue.", "B"),
    (OPTIONS, "Dark  BLUE", "C"),
    (OPTIONS, "blue (B)", "B"),
    (OPTIONS, "B (blue)", "B"),
    (OPTIONS, "blue (C)", ""),
    (OPTIONS, "B. the blue one", "B"),
    (OPTIONS, "B. red", ""),
    (OPTIONS, "B. blue or red", ""),
    (OPTIONS, "red blue", ""),
    (OPTIONS, "D", ""),
    (("A. a red car", "B. a car"), "A red car", "A"),
    (("A. a red car", "B. a car"), "a car", "B"),
    (("A. a bus", "B. A red car"), "A red car", "B"),
    (("A. a red car", "B. A red bus"), "B. A red bus", "B"),
    (("A. left", "B. right"), "The right answer is right", "B"),
    (("A. B", "B. A"), "A", "A"),
    (("A. red", "B. red"), "red", ""),
    (("A. red", "B. red"), "B. red", "B"),
    (("A. -3", "B. 3"), "3", "B"),
    (("red", "blue"), "blue", "B"),
    (("red", "blue"), "b", "B"),
    (("A", "B"), "(b)", "B"),
    (("a) red", "b) blue"), "B", "B"),
    (("(A) red", "(B)blue"), "blue", "B"),
    (("U.S.", "U.K."), "U.K.", "B"),
    (("B. red", "A. blue"), "blue", "A"),
    (("A. J. Bach", "B. A. Berg"), "A. Berg", "B"),
    (("A. b", "B. a", "C. a+b", "D. 2a"), "B", "B"),
    (("A. b", "B. a", "C. a+b", "D. 2a"), "2a", "D"),
    (("A. b", "B. a", "C. a+b", "D. 2a"), "a", ""),
    (("A. b", "B. a", "C. a+b", "D. 2a"), "A", "A"),
    (("A. b", "B. a", "C. a+b", "D. 2a"), "b", ""),
    (("I only", "II only", "both"), "II only", "B"),
    (("I only", "II only", "both"), "The answer is II only.", "B"),
    (("I only", "II only", "both"), "I only", "A"),
    (("the worst", "the best", "best"), "the best", "B"),
    (("the worst", "the best", "best"), "best", "C"),
    (("5", "about 5"), "about 5", "B"),
    (("5", "about 5"), "The answer is about 5.", "B"),
    (("5", "about 5"), "5", "A"),
    (("it is", "is it", "it"), "is it", "B"),
    (("it is", "is it", "it"), "it", "C"),
]


@pytest.mark.parametrize(("options", "answer", "letter"), CHOSEN)
def test_option_letter(options, answer, letter):
    assert option_letter(answer, options) == letter


def test_rouge_by_hand():
    """Of 'the cats sat' and 'the cat sat down': after stemming 3 of 3 and 3 of 4 words, 2 of 2 and
    2 of 3 pairs, and a common subsequence of 3."""
    example = Example("", "the cat sat down", [], problem_type="free-form")
    f1 = [2 * p * r / (p + r) for p, r in ((1, 3 / 4), (1, 2 / 3), (1, 3 / 4))]
    value = accuracy("<answer>the cats sat</answer>", example)
    assert value == pytest.approx(sum(f1) / 3)


plain_words = st.lists(st.sampled_from(["cats", "cat", "running", "3.5", "a", "on", "don't"]))


@settings(deadline=None)
@given(plain_words, plain_words.filter(lambda words: len(words) > 1))
def test_rouge_in_English_is_that_of_the_library(answer, solution):
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = scorer.score(" ".join(solution), " ".join(answer)).values()
    expected = sum(score.fmeasure for score in scores) / 3
    assert rouge(" ".join(answer), " ".join(solution)) == pytest.approx(expected)


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
    example = Example("", " ".join(solution), [], problem_type="OCR")
    value = accuracy(f"<answer>{' '.join(answer)}</answer>", example)
    assert value == pytest.approx(1 - min(1, edit_distance(answer, solution) / len(solution)))


KINDS = (MC, NUM, REG, OCR, FREE, "")
notations = [
    "**",
    "$",
    "A",
    "B. ",
    "(b)",
    "answer is ",
    "\\frac{3}{4}",
    "½",
    "²",
    "%",
    "1,234",
    "-",
    "3",
]
anything = st.lists(
    st.one_of(st.sampled_from([*notations, " ", "停", "\ud800"]), st.text(max_size=9))
)
anything = anything.map("".join)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(KINDS), anything, anything, st.lists(anything, max_size=3))
def test_accuracy_is_a_number_from_0_to_1_and_of_the_solution_1(kind, answer, solution, options):
    example = Example("", solution, [], problem_type=kind, options=tuple(options))
    value = accuracy(f"<answer>{answer}</answer>", example)
    assert isinstance(value, float) and 0 <= value <= 1
    if "answer>" not in solution:
        assert accuracy(f"<answer>{solution}</answer>", example) == 1


numbers = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "-", "−", "$", "about ", "x = "]),
    st.one_of(st.integers(0, 10**9).map("{:,}".format), st.floats(0, 1e9), st.just("2/3")),
    st.sampled_from(["", "%", " km", " °C", " million"]),
    st.sampled_from(["", ".", " "]),
)


@settings(deadline=None)
@given(st.sampled_from([NUM, REG]), numbers)
def test_a_number_in_other_markup_is_the_same(kind, solution):
    example = Example("", solution, [], problem_type=kind)
    for form in ("**{}**", "The answer is {}", "\\boxed{{{}}}", "`{}`"):
        assert accuracy(f"<answer>{form.format(solution.strip())}</answer>", example) == 1


LONG = [
    "a ",
    "a",
    "9",
    "9,",
    ",999",
    "1/2 ",
    "is ",
    "is",
    "B. ",
    "$",
    "\\boxed{",
    "停",
    "\ufdfa",
    "\n",
]
LONG += [
    "yational",
    "\\frac{1}{",
    "the answer is ",
    "a b ",
    "-",
    "½",
    "²",
    "1e9",
    " ",
    "km ",
    "(a) ",
]


@pytest.mark.parametrize("kind", KINDS)
def test_long_answers_take_no_time(kind):
    """The slowest of the longest answers took 1.1 s, against a solution as long (a ligature that
    stands for 18 letters; others take 0.1 s). Answers that are longer still earn 0."""
    for piece in LONG:
        solution = (piece * MAX_ANSWER)[: MAX_ANSWER - 2] + "?"
        example = Example("", solution, [], problem_type=kind, options=OPTIONS)
        around = [("", "!"), ("x", ""), ("B. ", ""), ("42 ", "!")]
        for start, end in around[:1] if piece == "\ufdfa" else around:  # the ligature
            began = time.process_time()
            long = (start + piece * MAX_ANSWER)[: MAX_ANSWER - 1] + end
            assert 0 <= accuracy(f"<answer>{long}</answer>", example) <= 1
            assert time.process_time() - began < 5
            assert accuracy(f"<answer>{long}{piece * 100_000}</answer>", example) == 0


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6).filter(lambda g: abs(g) > 1e-3))
def test_regression_is_scale_free(p, g):
    def value(p, g):
        example = Example("", repr(g), [], problem_type="regression")
        return accuracy(f"<answer>{p!r}</answer>", example)

    assert value(p, g) == pytest.approx(value(-p, -g)) == pytest.approx(value(8 * p, 8 * g))
    assert value(g, g) == 1
