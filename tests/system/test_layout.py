"""The shape of the repository: imports run one way, sample.py stands on little, pages can be read.

ORDER is the order of the imports. A file may import what stands before its own place in it, or in
the same place, as long as there is no circle. That holds for every import, wherever it stands.
"""
import ast
import json
import re
import sys

import pytest

from conftest import ROOT, alone
from shipped import ANSWER, ASK

ORDER = [["plumbing"], ["vision"], ["connector"], ["model"], ["data"], ["toy", "reader"], ["paper"],
         ["sample"], ["eval"], ["train", "bench"], ["kit"], ["tests"]]
PLACE = {part: place for place, parts in enumerate(ORDER) for part in parts}
TOP = {"vision", "connector", "model", "data", "sample", "eval", "train", "bench"}
MACHINES = r"\b(mkldnn|onednn|amx|is_cpu|AMD|Zen|Xeon)\b"
SEVEN = {"torch", "numpy", "safetensors", "tiktoken", "PIL", "tqdm", "pytest"}


def repository() -> dict:
    """The path of every Python file by its module's name, "plumbing.weights"."""
    folders = {path.parent for path in ROOT.glob("*/*.py")}
    paths = list(ROOT.glob("*.py"))
    for folder in folders:
        if not folder.name.startswith(".") and folder.name != "out":
            paths += folder.rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


FILES = repository()
SOURCES = {name: path.read_text() for name, path in FILES.items()}


def imported_names(name: str, source: str) -> set[str]:
    """Every dotted name that a file imports: at its top, in functions, under __main__, relative
    ones, and those that importlib.import_module or __import__ get as a string."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")[:-node.level] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)}
        elif isinstance(node, ast.Call) and node.args:
            function = ast.unparse(node.func).split(".")[-1]
            argument = node.args[0]
            if function in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                found.add(argument.value)
    return found


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """For each file the repository's files that it imports.

    Tests find their helpers by their last name alone: `import sets` is tests.helpers.sets.
    """
    short = {name.split(".")[-1]: name for name in sources if name.startswith("tests.")}
    graph = {}
    for name, source in sources.items():
        found = imported_names(name, source)
        if name.startswith("tests."):
            found |= {short[other] for other in found if other in short}
        graph[name] = found & sources.keys() - {name}
    return graph


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    """What a node needs, by whatever way; itself only if there is a circle."""
    found, new = set(), {start}
    while new:
        new = {other for node in new for other in graph.get(node, ())} - found
        found |= new
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The nodes that need themselves."""
    return sorted(node for node in graph if node in reach(graph, node))


def faults(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports of files, given as name -> source: nothing, if all is well."""
    graph = import_graph(sources)
    found, folders = [], {}
    for name, others in sorted(graph.items()):
        part = name.split(".")[0]
        if part not in PLACE:
            found.append(f"{name}: {part} has no place in the order")
            continue
        for other in sorted(others):
            other_part = other.split(".")[0]
            if PLACE.get(other_part, 0) > PLACE[part]:
                found.append(f"{name} imports {other}, which comes later")
            if other_part != part:
                folders.setdefault(part, set()).add(other_part)
    if ring := circles(graph):
        found.append(f"a circle between files: {', '.join(ring)}")
    if ring := circles(folders):
        found.append(f"a circle between folders: {', '.join(ring)}")
    return found


def test_imports_run_one_way():
    assert not faults(SOURCES)


@pytest.mark.parametrize("source", [
    "import train",
    "def f():\n    import train",
    "if __name__ == '__main__':\n    from train import main\n    main()",
    "try:\n    pass\nfinally:\n    from train import main as start",
    "import importlib\nimportlib.import_module('train')",
    "__import__('train')",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import train",
])
def test_a_planted_import_against_the_order_is_seen(source):
    assert faults({"vision": source, "train": "import json"}) == [
        "vision imports train, which comes later"]


def test_planted_circles_are_seen():
    files = {"plumbing.a": "from plumbing import b", "plumbing.b": "def f():\n    from . import a"}
    assert faults(files) == ["a circle between files: plumbing.a, plumbing.b"]
    folders = {"toy.a": "import reader.a", "toy.b": "", "reader.a": "",
               "reader.b": "class A:\n    from toy import b"}
    assert faults(folders) == ["a circle between folders: reader, toy"]
    real = {**SOURCES, "plumbing.examples": "def f():\n    from data import READ"}
    assert any("plumbing.examples imports data" in fault for fault in faults(real))
    assert any(fault.startswith("a circle between folders") for fault in faults(real))
    assert faults({"odd": ""}) == ["odd: odd has no place in the order"]


def test_the_modules_at_the_top_are_the_book():
    assert {name for name in FILES if "." not in name} == TOP


def test_an_answer_stands_on_few_files():
    """What a process has imported after it has answered a question about a page."""
    program = ("import json, sys; import sample; sample.main(); "
               "files = [getattr(m, '__file__', None) for m in sys.modules.values()]; "
               "print(json.dumps(files))")
    process = alone("-c", program, "--device", "cpu", *ASK)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    answer, files = output.splitlines()[-2:]
    assert answer == ANSWER
    loaded = set(json.loads(files))
    ours = {name: len(SOURCES[name].splitlines()) for name, path in FILES.items()
            if str(path) in loaded}
    assert "sample" in ours and len(ours) <= 14 and sum(ours.values()) <= 3600, ours


def test_lines_are_at_most_100_columns():
    assert not [f"{name}:{number}" for name, source in SOURCES.items()
                for number, line in enumerate(source.splitlines(), 1) if len(line) > 100]


def test_functions_are_at_most_60_lines():
    functions = [(name, node) for name, source in SOURCES.items()
                 for node in ast.walk(ast.parse(source))
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [f"{name}: {node.name}" for name, node in functions
                if node.end_lineno - node.lineno >= 60]


@pytest.mark.parametrize("name", ["vision", "connector", "model", "data"])
def test_the_method_names_no_machine(name):
    assert not re.findall(MACHINES, SOURCES[name], flags=re.IGNORECASE)


@pytest.mark.parametrize("name", sorted(n for n in FILES if n.startswith("tests.method.")))
def test_tests_of_the_method_need_the_seven_packages_alone(name):
    """And their helpers at their top: functions that need more are not called."""
    imported = imported_names(name, SOURCES[name])
    for helper in reach(import_graph(SOURCES), name):
        if helper.startswith("tests."):
            top = [node for node in ast.parse(SOURCES[helper]).body
                   if isinstance(node, (ast.Import, ast.ImportFrom))]
            imported |= imported_names(helper, ast.unparse(ast.Module(top, [])))
    packages = {other.split(".")[0] for other in imported}
    ours = {file.split(".")[-1] for file in FILES} | set(PLACE)
    assert not packages - SEVEN - ours - sys.stdlib_module_names
