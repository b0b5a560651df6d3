"""Sibling scripts have the same sections, and their diff is the idea."""

import ast
import difflib
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("sft.py", "grpo_baseline.py", "ral_grpo.py", "kd_baseline.py", "attn_distill.py")
PAIRS = [("grpo_baseline.py", "ral_grpo.py"), ("kd_baseline.py", "attn_distill.py")]
HEADINGS = [
    "# 1. Arguments",
    "# 2. Prompt and reward",
    "# 3. Rollout",
    "# 4. Loss",
    "# 5. Update",
    "# 6. Training loop",
]


def code_lines(path: Path) -> list[str]:
    """The lines of code alone: no docstrings, field help, comments or blank lines."""
    source = path.read_text()
    help_lines = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            help_lines |= set(range(node.lineno, node.end_lineno + 1))
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [
        line.rstrip() for n, line in enumerate(lines, 1) if n not in help_lines and line.strip()
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_section_headings(script):
    headings = re.findall(r"^# \d+\. .*$", (ROOT / script).read_text(), re.MULTILINE)
    assert [heading.split(" (")[0] for heading in headings] == HEADINGS


@pytest.mark.parametrize(("baseline", "idea"), PAIRS)
def test_the_diff_is_the_idea(baseline, idea):
    diff = list(difflib.ndiff(code_lines(ROOT / baseline), code_lines(ROOT / idea)))
    added = sum(line.startswith("+ ") for line in diff)
    removed = sum(line.startswith("- ") for line in diff)
    assert added <= 80 and removed <= 10, f"+{added}/-{removed}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_fields_come_first_and_are_the_same(script):
    def fields(path: Path) -> list[str]:
        tree = ast.parse(path.read_text())
        args = next(
            node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"
        )
        return [node.target.id for node in args.body if isinstance(node, ast.AnnAssign)]

    first = fields(ROOT / "grpo_baseline.py")[:14]
    assert fields(ROOT / script)[:14] == first
