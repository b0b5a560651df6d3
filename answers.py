"""What an answer says: the option, the number or the words in it, whatever notation it comes in.

`accuracy` in common.py decides by the problem type which of these measures counts. The measures are
those of Video-R1; that an answer counts in any usual notation is [ours]. Everything here reads text
of unknown origin: it raises nothing, and its time is bounded by MAX_ANSWER.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from string import ascii_uppercase
from typing import Any

MAX_ANSWER = 10_000  # characters; no solution has more

# 1. Text


MARKUP = re.compile(r"\\(?:boxed|text\w*|math\w+)\s*\{([^{}]*)\}|\$([^$]*)\$|\\[()\[\]]|\*\*|`")
CHARACTERS = str.maketrans("−–⁄’。", "--/'.")
# Words that may come before an answer: "So the correct answer is", "I think it's".
LEAD = r"so|thus|the|my|final|correct|right|best|answer|option|choice|letter|result|value|is|it"
LEAD = re.compile(rf"(?:(?:{LEAD}|it's|i|think|choose|would|be|about)\b[\s,:=]*+)*", re.I)


def plain(text: str) -> str:
    """`text` without the markup of LaTeX and Markdown, in Unicode's normal form NFKC; `½` and
    `\\frac{1}{2}` become `1/2`, `x²` becomes `x^2`."""
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞]|\\[dt]?frac)", " ", text)
    text = unicodedata.normalize("NFKC", re.sub("(?=[¹²³⁰-⁹])", "^", text)).translate(CHARACTERS)
    text = re.sub(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text)
    text = re.sub(r"\\([%$])", r"\1", re.sub(r"\^?\{?\\circ\}?", "°", text))
    for _ in range(3):  # `$\boxed{\text{B}}$`
        text = MARKUP.sub(r"\1\2", text)
    return text.strip(" \t\r\n\"'“”‘*$")


def folded(text: str) -> str:
    """`text` for comparison: plain, in one case, with single spaces and no final point."""
    return " ".join(plain(text).casefold().split()).rstrip(" .")


def same_text(answer: str, solution: str) -> float:
    return float(folded(answer) == folded(solution) != "")


# 2. Options


LABEL = re.compile(r"(?:\(([a-z])\)|([a-z])(?:[.):](?![a-z]\.)|$))\s*(.*)", re.I | re.DOTALL)
IS_RIGHT = r"\s+is (?:the )?(?:correct|right|best|answer)(?: answer| option| choice| one)?\b"
LETTER = rf"[(\[]?([a-z])(?:[)\].:,;!]|\s+(?:[-—]|because\b)|\s*\n|{IS_RIGHT}|$)[\s.:]*(.*)"
LETTER = re.compile(LEAD.pattern + LETTER, re.I | re.DOTALL)
# A letter that names an option within a sentence; the article A and the pronoun I do not.
CHOICE = r"(?<![\w'.])([B-HJ-Z]|A(?! \w)|[AIa-z](?=[.):](?:\s|$)))(?![\w'])"


def option_texts(options: Sequence[str]) -> dict[str, str]:
    """The text of each option by its letter: the one that it carries (`A. red`, `(A) red`, `A`), or
    the one of its position where not all carry one.

    >>> option_texts(["A. red", "B. blue"]) == option_texts(["red", "blue"])
    True
    """
    labels = [LABEL.fullmatch(option.strip()) for option in options]
    if all(labels):
        texts = {(label[1] or label[2]).upper(): label[3] for label in labels}
        if "A" in texts:
            return texts
    return dict(zip(ascii_uppercase, options, strict=False))


def option_letter(text: str, options: Sequence[str]) -> str:
    """The letter of the one option that `text` names, "" where it names none or several.

    An option is named by its letter (`b`, `(b)`, `Option B`), by its text, or by both (`B. blue`).
    A reason may follow the letter, but no other letter and no other option's text.

    >>> option_letter("The answer is **B**", ["A. red", "B. blue"])
    'B'
    """
    texts = {letter: folded(option) for letter, option in option_texts(options).items()}
    known, whole_text = set(texts or ascii_uppercase), folded(text)
    found = LETTER.fullmatch(plain(text))
    letter, rest = (found[1].upper(), folded(found[2])) if found else ("", "")
    if letter in known and rest in ("", texts.get(letter)):
        return letter
    named = set()
    for key, option in texts.items():
        for phrase in (option, f"{option} ({key.lower()})", f"{key.lower()} ({option})"):
            before = whole_text.removesuffix(phrase)
            if option and whole_text.endswith(phrase) and LEAD.fullmatch(before):
                named.add(key)
    if not named and letter in known:
        named = {key.upper() for key in re.findall(CHOICE, found[2])} & known
        named |= {letter, *(key for key, option in texts.items() if option == rest)}
        for key in known:  # "B, or blue"
            option = re.escape(texts.get(key) or f"option {key}")
            also = rf"\b(?:or|and|also)\s+(?:{key}(?! \w)|{option})(?!\w)"
            named |= {key} if re.search(also, rest, re.I) else set()
    return named.pop() if len(named) == 1 else ""


def option_accuracy(answer: str, solution: str, options: Sequence[str]) -> float:
    """1 if the answer names the option that the solution names, else 0; texts are compared where
    the solution names none."""
    right = option_letter(solution, options)
    said = option_letter(answer, options)
    return float(said == right) if right else same_text(answer, solution)


# 3. Numbers


DIGITS = r"((?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?)"
# One word of a unit; but 2x, 2π and 2k are not 2, and neither is "2 or more".
UNIT = r"(?:(?!(?-i:[kKMB]|\s*(?:[xy]|is|or|and|not))\b)\s*+-?"
UNIT += r"(?:[^\W\d_π]++(?:[/.·'-][^\W\d_π]++)*+(?:\^-?[23])?|[°'\"$€£¥₹]))"
SCALES = {"%": Fraction(1, 100), "percent": Fraction(1, 100), "dozen": 12, "hundred": 100}
SCALES |= {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMBER = rf"(?:[a-z] ?= ?)?[=≈~\s]*([+-]?)\s?[$€£¥₹]?\s?(?:(\d+) (?=\d+/))?{DIGITS}"
NUMBER += rf"(?:\s?/\s?{DIGITS})?(?:\s*({'|'.join(SCALES)})(?!\w))?{UNIT}{{0,3}}\.?"
NUMBER = re.compile(LEAD.pattern + NUMBER, re.I)


def read_number(text: str) -> Fraction | None:
    """The one number in `text`, with or without its unit; None if there is none or more than one.

    No library reads it: math-verify takes the last number of several and finds 4 in `4_2`, and its
    time limit needs signals.

    >>> read_number("1,234.5 km"), read_number("75%"), read_number("4,2"), read_number("3 or 4")
    (Fraction(2469, 2), Fraction(3, 4), None, None)
    """
    found = NUMBER.fullmatch(plain(text))
    if found is None:
        return None
    sign, units, over, under, scale = found.groups()
    try:
        value = Fraction(over.replace(",", "")) / Fraction((under or "1").replace(",", ""))
        value = (int(units or 0) + value) * SCALES.get((scale or "").lower(), 1)
    except (ValueError, ZeroDivisionError):  # n/0, or more digits than Python converts
        return None
    return -value if sign == "-" else value


def number_accuracy(answer: str, solution: str) -> float:
    """1 if the numbers differ by at most half of the second decimal (of a percentage's own) and a
    twentieth of the solution, else 0; texts are compared where the solution is no number."""
    p, g = read_number(answer), read_number(solution)
    if p is None or g is None:
        return same_text(answer, solution) if g is None else 0.0
    unit = Fraction(1, 100) if re.search("%|percent", solution) else 1
    return float(abs(p - g) <= min(Fraction(1, 200) * unit, abs(g) / 20))


def regression_accuracy(answer: str, solution: str) -> float:
    """1 - min(1, |p - g| / |g|); `number_accuracy` where g is 0 or the solution is no number."""
    p, g = read_number(answer), read_number(solution)
    if p is None or not g:
        return number_accuracy(answer, solution)
    return float(1 - min(1, abs(p - g) / abs(g)))


# 4. Words


def word_accuracy(answer: str, solution: str) -> float:
    """1 - word error rate, not below 0; words are what white space separates."""
    import jiwer

    return 1 - min(1.0, jiwer.wer(*(" ".join(text.split()) for text in (solution, answer))))


@cache
def word_tools() -> tuple[Any, Callable[[str], str]]:
    """What finds the words in a text, and what stems one."""
    import regex
    from nltk.stem.porter import PorterStemmer

    unspaced = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
    pattern = rf"(?V1){unspaced}\p{{M}}*+|[[\p{{L}}\p{{M}}\p{{N}}]--{unspaced}]++"
    return regex.compile(pattern), PorterStemmer().stem


def stems(text: str) -> list[str]:
    """The words of `text`, stemmed: runs of letters and digits. In scripts without spaces between
    words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word."""
    pattern, stem = word_tools()
    words = pattern.findall(unicodedata.normalize("NFKC", text).lower())
    return [stem(word) if len(word) > 3 else word for word in words]


def rouge(answer: str, solution: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 (where the solution has two words or more) and ROUGE-L; texts are
    compared where the solution has no word.

    The library rouge-score drops all but a to z and 0 to 9, and takes minutes on a long answer.
    """
    from rapidfuzz.distance import LCSseq

    p, g = stems(answer), stems(solution)
    if not g:
        return same_text(answer, solution)
    f1 = [2 * LCSseq.similarity(p, g) / (len(p) + len(g))]
    for said, right in ((p, g), (list(pairwise(p)), list(pairwise(g)))):
        if right:
            hits = (Counter(said) & Counter(right)).total()
            f1.append(2 * hits / (len(said) + len(right)))
    return sum(f1) / len(f1)
