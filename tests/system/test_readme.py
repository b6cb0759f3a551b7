"""What the README says is there: its commands' flags, its links, and a word about who runs each of its commands."""
import re

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
MARKS = {"run", "test", "try",              # .ci/run runs these as they are written
         "long", "gpu", "weights"}          # more than minutes, a GPU, or a download
WHERE = {"assets/train.slurm": "train.py", "data.py": "toy/pages.py", "paper.connectors": "paper/connectors.py"}
PROGRAM = r"(?:python|torchrun|sbatch)\b[^\n#]*?\b(\w+\.py|paper\.\w+|assets/train\.slurm)([^\n#]*)"


def bash_blocks() -> list[tuple[str, str]]:
    """(the line before it, its commands with continued lines joined) of every bash block."""
    lines, found = README.splitlines(), []
    for i, line in enumerate(lines):
        if line == "```bash":
            end = lines.index("```", i)
            found.append((lines[i - 1], "\n".join(lines[i + 1:end]).replace("\\\n", " ")))
    return found


def test_every_command_block_says_who_runs_it():
    marks = [re.fullmatch(r"<!-- (\w+) -->", before) for before, _ in bash_blocks()]
    assert len(marks) > 8 and all(marks)
    assert {mark[1] for mark in marks} <= MARKS
    assert sum(mark[1] == "run" for mark in marks) == sum(mark[1] == "test" for mark in marks) == 1


def test_every_flag_is_known_to_its_program():
    seen = set()
    for _, commands in bash_blocks():
        for script, rest in re.findall(PROGRAM, commands):
            source = (ROOT / WHERE.get(script, script)).read_text()
            for flag in re.findall(r"(?<=\s)--[a-z][a-z-]*", rest):
                assert f'"{flag}"' in source or flag == "--help", f"{script} has no {flag}"
                seen.add((script, flag))
    assert len(seen) > 20


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#\s]+)\)", README))))
def test_every_link_to_a_file_resolves(link):
    assert link.startswith("https://") or (ROOT / link).exists()


def test_every_file_in_backquotes_exists():
    names = {name for name in re.findall(r"`([\w./-]+\.(?:py|slurm|md|txt))`", README)}
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), name
