"""The rules of the house (CONTRIBUTING.md) that a program can check: sizes and names of files, links that resolve."""

import re
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "opendet_jax"
CODE = ("opendet_jax", "configs", "tests", "benchmarks", "experiments")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("experiments/**/*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SECTION = re.compile(r"docs/[\w/]+\.md(?:#[\w-]+)?")


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def length(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_files_are_few_and_full():
    lengths = {path: length(path) for path in modules()}
    assert len(lengths) <= 115
    assert median(lengths.values()) >= 110
    assert {path: lines for path, lines in lengths.items() if lines > 350} == {}


def test_no_name_occurs_twice():
    names = [path.name for path in modules() if path.name != "__main__.py"]
    assert sorted(names) == sorted(set(names))


def anchors(page: Path) -> set[str]:
    """Of the headings, as the forge and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def problem(page: Path, anchor: str) -> str:
    if not page.exists():
        return f"{page} is not there"
    return f"{page} has no heading #{anchor}" if anchor and anchor not in anchors(page) else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_pages_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    problems = []
    for target in LINK.findall(text):
        if re.match(r"\w+:", target):  # https, mailto
            continue
        name, _, anchor = target.partition("#")
        problems.append(problem(page.parent / name if name else page, anchor))
    assert [text for text in problems if text] == []


def test_sections_that_code_cites_are_there():
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    cited = {link for path in files for link in SECTION.findall(path.read_text())}
    assert any(link.startswith("docs/method.md#") for link in cited)
    problems = [problem(ROOT / link.partition("#")[0], link.partition("#")[2]) for link in sorted(cited)]
    assert [text for text in problems if text] == []
