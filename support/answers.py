"""Read an answer in any usual notation: the option, the number or the words in it.

`accuracy` in common.py selects one of these measures by problem type. The measures are those of
Video-R1; accepting any usual notation is [ours]. This module reads untrusted text: no function
raises an error, and MAX_ANSWER bounds the running time.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from itertools import pairwise
from string import ascii_uppercase
from typing import Any

MAX_ANSWER = 10_000  # characters; no solution has more

# 1. Text


MARKUP = re.compile(r"\\(?:boxed|text\w*|math\w+)\s*\{([^{}]*)\}|\$([^$]*)\$|\\[()\[\]]|\*\*|`")
CHARACTERS = str.maketrans("−–⁄’。", "--/'.")
# Words that may precede an answer: "So the correct answer is", "I think it's".
LEAD = r"so|thus|the|my|final|correct|right|best|answer|option|choice|letter|result|value|is|it"
LEAD = re.compile(rf"(?:(?:{LEAD}|it's|i|think|choose|would|be|about)\b[\s,:=]*+)*", re.I)


def extract_answer(text: str) -> str | None:
    """The content of the first `<answer>...</answer>`, stripped, or None.

    >>> extract_answer("<think> no </think> <answer> red </answer>")
    'red'
    """
    start = text.find("<answer>")
    end = text.find("</answer>", start)
    return None if start < 0 or end < 0 else text[start + len("<answer>") : end].strip()


def plain(text: str) -> str:
    """Remove LaTeX and Markdown markup from `text` and normalise it to Unicode's NFKC; `½` and
    `\\frac{1}{2}` become `1/2`, `x²` becomes `x^2`."""
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞]|\\[dt]?frac)", " ", text)
    text = unicodedata.normalize("NFKC", re.sub("(?=[¹²³⁰-⁹])", "^", text)).translate(CHARACTERS)
    text = re.sub(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}", r"\1/\2", text)
    text = re.sub(r"\\([%$])", r"\1", re.sub(r"\^?\{?\\circ\}?", "°", text))
    for _ in range(3):  # `$\boxed{\text{B}}$`
        text = MARKUP.sub(r"\1\2", text)
    return text.strip(" \t\r\n\"'“”‘*$")


def folded(text: str) -> str:
    """Normalise `text` for comparison: plain, case-folded, single-spaced, no final full stop."""
    return " ".join(plain(text).casefold().split()).rstrip(" .")


def same_text(answer: str, solution: str) -> float:
    return float(folded(answer) == folded(solution) != "")


# 2. Options


LABEL = re.compile(r"(?:\(([a-z])\)|([a-z])(?:[.):](?![a-z]\.)|$))\s*(.*)", re.I | re.DOTALL)
IS_RIGHT = r"\s+is (?:the )?(?:correct|right|best|answer)(?: answer| option| choice| one)?\b"
LETTER = rf"[(\[]?([a-z])(?:[)\].:,;!]|\s+(?:[-—]|because\b)|\s*\n|{IS_RIGHT}|$)[\s.:]*(.*)"
LETTER = re.compile(LEAD.pattern + LETTER, re.I | re.DOTALL)
# A letter that names an option within a sentence, but not the article A or the pronoun I.
CHOICE = r"(?<![\w'.])([B-HJ-Z]|A(?! \w)|[AIa-z](?=[.):](?:\s|$)))(?![\w'])"


def option_texts(options: Sequence[str]) -> dict[str, str]:
    """Map each option's letter to its text. If all options carry letters (`A. red`, `(A) red`,
    `A`), those letters are used, otherwise the letters of their positions.

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
    """The letter of the one option that `text` names, or "" if it names none or several.

    Text names an option by its letter (`b`, `(b)`, `Option B`), by its text, or by both (`B.
    blue`). Of two texts that fit, the longer counts: `about 5`, not `5`. A reason may follow the
    letter if it mentions no other letter and no other option's text.

    >>> option_letter("The answer is **B**", ["A. red", "B. blue"])
    'B'
    """
    texts = {letter: folded(option) for letter, option in option_texts(options).items()}
    known, whole_text = set(texts or ascii_uppercase), folded(text)
    found = LETTER.fullmatch(plain(text))
    letter, rest = (found[1].upper(), folded(found[2])) if found else ("", "")
    exact = {key for key, option in texts.items() if option == whole_text != ""}
    if letter in known and rest in ("", texts.get(letter)):
        # `a` may be option A or the text of another; the prompt asks for a capital letter
        return letter if exact <= {letter} or found[1].isupper() else ""
    named, longest = exact, len(whole_text) if exact else 0
    for key, option in texts.items():
        for phrase in (option, f"{option} ({key.lower()})", f"{key.lower()} ({option})"):
            before = whole_text.removesuffix(phrase)
            begins = not before[-1:].isalnum() or not phrase[:1].isalnum()  # not the end of a word
            if option and whole_text.endswith(phrase) and LEAD.fullmatch(before) and begins:
                if len(phrase) > longest:
                    named, longest = set(), len(phrase)
                named |= {key} if len(phrase) == longest else set()
    if not named and letter in known:
        named = {key.upper() for key in re.findall(CHOICE, found[2])} & known
        named |= {letter, *(key for key, option in texts.items() if option == rest)}
        for key in known:  # "B, or blue"
            option = re.escape(texts.get(key) or f"option {key}")
            also = rf"\b(?:or|and|also)\s+(?:{key}(?! \w)|{option})(?!\w)"
            named |= {key} if re.search(also, rest, re.I) else set()
    return named.pop() if len(named) == 1 else ""


def option_accuracy(answer: str, solution: str, options: Sequence[str]) -> float:
    """1 if the answer names the same option as the solution, else 0. If the solution names no
    option, the texts are compared."""
    right = option_letter(solution, options)
    return float(option_letter(answer, options) == right) if right else same_text(answer, solution)


# 3. Numbers


DIGITS = r"((?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?)"
# One word of a unit. But 2x, 2π and 2k do not equal 2, and neither does "2 or more".
UNIT = r"(?:(?!(?-i:[kKMB]|\s*(?:[xy]|is|or|and|not))\b)\s*+-?"
UNIT += r"(?:[^\W\d_π]++(?:[/.·'-][^\W\d_π]++)*+(?:\^-?[23])?|[°'\"$€£¥₹]))"
SCALES = {"%": Fraction(1, 100), "percent": Fraction(1, 100), "dozen": 12, "hundred": 100}
SCALES |= {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMBER = rf"(?:[a-z] ?= ?)?[=≈~\s]*([+-]?)\s?[$€£¥₹]?\s?(?:(\d+) (?=\d+/))?{DIGITS}"
NUMBER += rf"(?:\s?/\s?{DIGITS})?(?:\s*({'|'.join(SCALES)})(?!\w))?{UNIT}{{0,3}}\.?"
NUMBER = re.compile(LEAD.pattern + NUMBER, re.I)


def read_number(text: str) -> Fraction | None:
    """The one number in `text`, with or without its unit; None if there is no number or more than
    one.

    No library fits: math-verify takes the last of several numbers and finds 4 in `4_2`, and its
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
    """1 if the numbers differ by no more than half a unit of the second decimal place and no more
    than a twentieth of the solution, else 0. For a percentage, the decimal place is that of its own
    figure. If the solution is not a number, the texts are compared."""
    p, g = read_number(answer), read_number(solution)
    if p is None or g is None:
        return same_text(answer, solution) if g is None else 0.0
    unit = Fraction(1, 100) if re.search("%|percent", solution) else 1
    return float(abs(p - g) <= min(Fraction(1, 200) * unit, abs(g) / 20))


def regression_accuracy(answer: str, solution: str) -> float:
    """1 - min(1, |p - g| / |g|) for answer p and solution g; `number_accuracy` if g is 0 or the
    solution is not a number."""
    p, g = read_number(answer), read_number(solution)
    if p is None or not g:
        return number_accuracy(answer, solution)
    return float(1 - min(1, abs(p - g) / abs(g)))


def plain_accuracy(answer: str, solution: str) -> float:
    """1 if a reader would call the answers equal, else 0. They are equal if they are the same text
    apart from case, spaces, markup and a final full stop, the same number with the same unit, or
    the same option's letter.

    >>> plain_accuracy("42.0", "42"), plain_accuracy("(b) red", "B"), plain_accuracy("9 am", "9 pm")
    (1.0, 1.0, 0.0)
    """
    if re.fullmatch(r"\W*[a-zA-Z]\W*", solution):
        return option_accuracy(answer, solution, ())
    p, g = read_number(answer), read_number(solution)
    units = {re.sub(r"[\d.,\s*`+−-]", "", text.casefold()) for text in (answer, solution)} - {""}
    same_number = p is not None and p == g and len(units) < 2
    return float(same_number or same_text(answer, solution))


# 4. Words


def word_accuracy(answer: str, solution: str) -> float:
    """1 - word error rate, but at least 0. White space separates words."""
    import jiwer

    return 1 - min(1.0, jiwer.wer(*(" ".join(text.split()) for text in (solution, answer))))


@cache
def word_tools() -> tuple[Any, Callable[[str], str]]:
    """A compiled pattern that finds the words in a text, and a function that stems a word."""
    import regex
    from nltk.stem.porter import PorterStemmer

    unspaced = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
    pattern = rf"(?V1){unspaced}\p{{M}}*+|[[\p{{L}}\p{{M}}\p{{N}}]--{unspaced}]++"
    return regex.compile(pattern), lru_cache(2**12)(PorterStemmer().stem)


def stems(text: str) -> list[str]:
    """The stemmed words of `text`. A word is a run of letters and digits; in scripts without spaces
    between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word."""
    pattern, stem = word_tools()
    words = pattern.findall(unicodedata.normalize("NFKC", text).lower())
    return [stem(word) if len(word) > 3 else word for word in words]


def rouge(answer: str, solution: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 (if the solution has two words or more) and ROUGE-L. If the
    solution has no words, the texts are compared.

    The library rouge-score drops all characters except a to z and 0 to 9, and takes minutes on a
    long answer.
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
