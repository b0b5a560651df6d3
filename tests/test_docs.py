"""The links and pictures of the README and of the pages that it leads to exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def without_code(page: Path) -> str:
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page: in lower case, hyphens for spaces, no marks."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    links = [link for link in LINK.findall(without_code(page)) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT.resolve()) and target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page():
    """A page that nothing links to is never found."""
    linked, todo = set(), [PAGES[0]]
    while todo:
        page = todo.pop()
        if page not in linked and page in PAGES:
            linked.add(page)
            paths = (link.partition("#")[0] for link in LINK.findall(without_code(page)))
            todo += [(page.parent / path).resolve() for path in paths if path]
    assert linked == set(PAGES)


# Flags of pip, torchrun, docker, hf and lmms-eval, and one that every program has.
FOREIGN = {"shutdown-timeout", "nproc_per_node", "shm-size", "repo-type", "local-dir", "help"}
FOREIGN |= {"force_simple", "log_samples", "output_path", "model_args", "gen_kwargs", "tasks"}
FOREIGN |= {"reasoning_tags", "nnodes", "node-rank", "master-addr", "signals-to-handle"}
FOREIGN |= {"index-url"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_flags_exist(page):
    programs = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("benchmarks/*.py")]
    fields = "\n".join(path.read_text() for path in programs)
    text = page.read_text()
    for name in set(re.findall(r"[\w/]+\.py\b", text)) - {"mine.py"}:
        places = (ROOT, ROOT / "support", ROOT / "benchmarks", ROOT / "benchmarks" / "forks")
        assert any((place / name).is_file() for place in places), name
    for flag in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)) - FOREIGN:
        field = flag.replace("-", "_")
        names = f"{field}|{field.removeprefix('no_')}"
        assert re.search(rf"^    (?:{names}): ", fields, re.MULTILINE), flag


def test_the_readme_names_every_module():
    text = (ROOT / "README.md").read_text()
    tree = re.findall(r"^  (\w+\.py) ", text, re.MULTILINE)
    assert sorted(tree) == sorted(x.name for x in ROOT.glob("support/*.py") if x.stem[0] != "_")
    assert "\ncommon.py " in text and "\neval.py " in text
