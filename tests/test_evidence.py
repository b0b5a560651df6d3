"""The programs in benchmarks/ print the numbers on the pages from the numbers in results/."""

import importlib
import json
import re

import pytest
from test_siblings import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"


@pytest.fixture
def program(monkeypatch):
    """Imports a program of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_reproduce_prints_the_tables_of_the_results_file(program):
    reproduce = program("reproduce")
    done = reproduce.read_results(RESULTS / "reproduce.jsonl")
    text = reproduce.tables(done, reproduce.SEEDS)
    assert text == (RESULTS / "reproduce.md").read_text()
    dirty = sum(line["commit"].endswith("-dirty") for line in done.values())
    assert f"({dirty} of {len(done):,} were made with uncommitted changes" in PAGE.read_text()
    claimed = {(task, cell) for x in reproduce.CLAIMS.values() for task in x for cell in x[task]}
    assert {key[:2] for key in done if key[1] not in ("cold start", "teacher")} <= claimed


@pytest.mark.parametrize("name", ["directions", "rounding"])
def test_the_page_has_the_numbers_of(name, program):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    module, page = program(name), PAGE.read_text()
    if name == "rounding":
        text = module.table(results["rates"])
    else:
        text = module.tables([*results["rows"].values()])
        text = text[: text.index("| policy")]  # of the others, the page has some
    numbers = re.findall(r"\d\.\d+e-\d+|-?\d\.\d+ ± \d\.\d+", text)
    missing = [number for number in numbers if number not in page]
    assert len(numbers) > 12 and missing == []


def test_step_cost_prints_the_readmes_numbers(program):
    step_cost = program("step_cost")
    results = json.loads((RESULTS / "step_cost.json").read_text())
    assert {entry.split()[0] for entry in results} == {*step_cost.VARIANTS}
    page, _, _ = (ROOT / "benchmarks" / "README.md").read_text().partition("### How")
    numbers, printed = (
        re.findall(r"\d\.\d{3}|\d+\.\d\d to \d+\.\d\d|\d+\.\d\d s|\d\.\d\d GB", text)
        for text in (page, step_cost.tables(results))
    )
    assert len(numbers) > 100 and {*numbers} - {*printed} == set()
