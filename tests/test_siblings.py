"""Sibling scripts have the same sections, and their diff is the idea."""

import ast
import difflib
import importlib
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parents[1]
SCRIPTS = ("sft.py", "grpo_baseline.py", "ral_grpo.py", "kd_baseline.py", "attn_distill.py")
PAIRS = [("grpo_baseline.py", "ral_grpo.py"), ("kd_baseline.py", "attn_distill.py")]
SIBLINGS = [*PAIRS, ("grpo_baseline.py", "kd_baseline.py")]
# Code lines added and removed, at most. Distillation has a second model and its evaluation;
# attention distillation has the policy and its divergence.
BUDGET = {"ral_grpo.py": (45, 5), "kd_baseline.py": (66, 15), "attn_distill.py": (42, 7)}
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


@pytest.mark.parametrize(("baseline", "idea"), SIBLINGS)
def test_the_diff_is_the_idea(baseline, idea):
    diff = list(difflib.ndiff(code_lines(ROOT / baseline), code_lines(ROOT / idea)))
    added = sum(line.startswith("+ ") for line in diff)
    removed = sum(line.startswith("- ") for line in diff)
    limit = BUDGET[idea]
    assert added <= limit[0] and removed <= limit[1], f"+{added}/-{removed}"


def top_level(script: str) -> dict[str, str]:
    """The source of each function and class of a script, without comments."""
    tree = ast.parse((ROOT / script).read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.unparse(node) for node in tree.body if isinstance(node, kinds)}


@pytest.mark.parametrize("script", ["ral_grpo.py", "kd_baseline.py", "attn_distill.py"])
def test_what_siblings_share_they_share_to_the_letter(script):
    """So the tests of the mathematics in grpo_baseline.py hold for all of them."""
    ours, baseline = top_level(script), top_level("grpo_baseline.py")
    for name in ("reward", "roll_out", "group_advantages", "clipped_loss", "k3"):
        assert ours[name] == baseline[name], name


@pytest.mark.parametrize("name", ["attention_policy", "divergence"])
def test_the_attention_is_compared_alike_in_both_methods(name):
    ral, distillation = (top_level(idea)[name] for _, idea in PAIRS)
    assert ral == distillation


def test_all_scripts_and_the_evaluation_ask_in_the_same_words():
    tables = [importlib.import_module(script[:-3]).PROMPTS for script in (*SCRIPTS, "eval.py")]
    assert all(table == tables[0] for table in tables)


def test_a_script_names_the_papers_equations_by_their_numbers():
    grpo = {"1", "8"}
    known = {"grpo_baseline.py": grpo, "ral_grpo.py": grpo | {"2", "3", "4"}}
    known |= {"kd_baseline.py": grpo | {"6"}, "attn_distill.py": grpo | {"2", "5", "6"}}
    for path in (ROOT / name for name in (*SCRIPTS, "common.py", "eval.py")):
        numbers = re.findall(r"\b[Ee]q(?:s?\.|uations?) ?(\d+)", path.read_text())
        assert set(numbers) == known.get(path.name, set()), path.name
    rows = (ROOT / "README.md").read_text().splitlines()
    for script in SCRIPTS:
        row = next(row for row in rows if row.startswith(f"| `{script}` |")).split("|")
        numbers = known.get(script, set()) - (grpo if script != "grpo_baseline.py" else set())
        assert set(re.findall(r"\d+", row[3])) == numbers, script


def args_fields(script: str) -> dict[str, str]:
    """Type and default of each field of Args, in order."""
    tree = ast.parse((ROOT / script).read_text())
    args = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args")
    return {n.target.id: ast.unparse(n) for n in args.body if isinstance(n, ast.AnnAssign)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_fields_come_first_and_are_the_same(script):
    ours, baseline = args_fields(script), args_fields("grpo_baseline.py")
    common = 5 if script == "sft.py" else len(baseline)  # the method of SFT is another one
    assert list(ours)[:common] == list(baseline)[:common]
    own = {"model", "steps"} if script == "sft.py" else {"num_iterations"}  # other defaults
    for name in set(list(baseline)[:common]) - own:
        assert ours[name] == baseline[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_declares_the_arguments_that_it_reads(script):
    """Or that `prepare` reads for it. Those that every run has are `RunArgs`. A run directory is
    the script's own."""
    source = (ROOT / script).read_text() + inspect.getsource(common.prepare)
    for name in args_fields(script):
        assert name == "out" or re.search(rf"\b(args|self)(\.|, \"){name}\b", source), name


@pytest.mark.parametrize(("baseline", "idea"), PAIRS)
def test_the_idea_is_marked(baseline, idea):
    """A changed or added line of the loss, update and loop says so, or stands in a new function."""
    mark = {"ral_grpo.py": "# RAL", "attn_distill.py": "# Attention"}[idea]
    new = set(top_level(idea)) - set(top_level(baseline))
    tree = ast.parse((ROOT / idea).read_text())
    skip = set()
    for node in tree.body:
        if getattr(node, "name", "") in {*new, "Args"} or isinstance(node, ast.ImportFrom):
            skip |= set(range(node.lineno, node.end_lineno + 1))
    lines = (ROOT / idea).read_text().splitlines()
    marked = {line for n, line in enumerate(lines, 1) if n in skip or mark in line}
    diff = difflib.ndiff(code_lines(ROOT / baseline), code_lines(ROOT / idea))
    added = [line[2:] for line in diff if line.startswith("+ ")]
    bare = [line for line in added if not any(x.startswith(line) for x in marked)]
    assert len(bare) <= 4, "\n".join(bare)  # arguments passed on
