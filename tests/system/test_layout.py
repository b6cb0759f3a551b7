"""The shape of the repository: eight short modules at the top, and imports that run one way."""
import ast

import pytest

from conftest import ROOT

TOP = ["vision", "connector", "model", "data", "train", "sample", "eval", "bench"]
FOLDERS = ["plumbing", "paper", "toy"]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for folder in [ROOT, *(ROOT / name for name in FOLDERS)] for path in folder.glob("*.py")}


def imports(name: str) -> set[str]:
    """The modules of the repository that one imports, at its top."""
    names = set()
    for node in ast.parse(FILES[name].read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & FILES.keys()


def reach(name: str) -> set[str]:
    """All modules that one needs, by whatever way."""
    found, new = set(), {name}
    while new:
        found |= new
        new = {other for module in new for other in imports(module)} - found
    return found - {name}


def test_the_eight_modules_at_the_top_are_short():
    assert {name for name in FILES if "." not in name} == set(TOP)
    lines = {name: len(FILES[name].read_text().splitlines()) for name in TOP}
    assert max(lines.values()) <= 600 and sum(lines.values()) < 3000, lines


def test_files_of_tests_are_short_too():
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tests").glob("*.py")}
    assert max(lines.values()) <= 600, lines


def test_lines_are_at_most_120_characters():
    long = [f"{name}:{number}" for name, path in FILES.items()
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert not long


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_run_one_way(name):
    assert not [other for other in reach(name) if name in reach(other)], "a circle of imports"
    later = {"vision": TOP, "connector": TOP, "model": TOP[3:], "data": TOP[4:]}.get(name, [])
    assert not reach(name) & set(later)


def test_what_the_method_needs_of_plumbing_needs_nothing_of_the_method():
    below = {name for part in ("vision", "connector", "model", "data") for name in reach(part) if name not in TOP}
    assert below == {"plumbing.linear", "plumbing.weights", "plumbing.released", "plumbing.tokenizers"}
    assert not {other for name in below for other in reach(name)} & set(TOP)
