"""What the READMEs say is there: flags, links, files, and a word on who runs each command."""
import re
from pathlib import Path

import pytest

from conftest import ROOT

READMES = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md")), ROOT / "CONTRIBUTING.md"]
MARKS = {"run", "try", "quick", "test",     # .ci/run runs these as they are written
         "again",                           # commands of such a block once more
         "long", "gpu", "weights"}          # more than minutes, a GPU, or a download
# Where a program's flags stand, unless in its own file.
FLAGS = {"train.py": ["train.py", "paper/recipes.py"], "assets/train.slurm": ["train.py"],
         "paper.plan": ["paper/plan.py", "paper/recipes.py"],
         "reader.encoder": ["reader/training.py"], "reader.llm": ["reader/training.py"]}
# Flags of pip, hf, img2dataset and torchrun that the prose names.
OTHERS = {"--index-url", "--local-dir", "--include", "--exclude", "--output_format", "--image_size",
          "--resize_mode", "--max-restarts", "--nnodes", "--nproc_per_node", "--rdzv-backend",
          "--rdzv-id", "--rdzv-endpoint", "--help"}
PROGRAM = (r"(?:python|torchrun|sbatch)\b[^\n#]*?"
           r"((?:\w+/)*\w+\.py|assets/train\.slurm|(?:paper|toy|reader|kit)\.\w+)([^\n#]*)")


def bash_blocks(readme: Path) -> list[tuple[str, str]]:
    """(the line before it, its commands with continued lines joined) of every bash block."""
    lines, found = readme.read_text().splitlines(), []
    for i, line in enumerate(lines):
        if line == "```bash":
            end = lines.index("```", i)
            commands = "\n".join(lines[i + 1:end]).replace("\\\n", " ")
            found.append((lines[i - 1], commands))
    return found


BLOCKS = [(readme, *block) for readme in READMES for block in bash_blocks(readme)]


def marked(name: str) -> list[tuple[Path, str]]:
    return [(readme, commands) for readme, mark, commands in BLOCKS if mark == f"<!-- {name} -->"]


def test_every_command_block_says_who_runs_it():
    marks = [re.fullmatch(r"<!-- (\w+) -->", before) for _, before, _ in BLOCKS]
    assert len(marks) > 20 and all(marks)
    assert {mark[1] for mark in marks} <= MARKS
    for name in ("run", "quick", "test"):
        assert {readme for readme, _ in marked(name)} == {READMES[0]}


def test_a_block_marked_again_has_commands_that_are_run():
    run = "\n".join(commands for name in ("quick", "test") for _, commands in marked(name))
    for _, commands in marked("again"):
        for line in commands.splitlines():
            assert line.split("  #")[0].strip() in run.splitlines()


def test_every_flag_is_known_to_its_program():
    seen = set()
    for readme, _, commands in BLOCKS:
        for script, rest in re.findall(PROGRAM, commands):
            module = not script.endswith((".py", ".slurm"))
            files = FLAGS.get(script, [script.replace(".", "/") + ".py" if module else script])
            source = "".join((ROOT / file).read_text() for file in files)
            for flag in re.findall(r"(?<=\s)--[a-z][a-z-]*", rest):
                known = f'"{flag}"' in source or flag == "--help"
                assert known, f"{readme.relative_to(ROOT)}: {script} has no {flag}"
                seen.add((script, flag))
    assert len(seen) > 30


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_in_backquotes_is_known(readme):
    """To one of the programs: the prose does not always say which."""
    programs = [path for folder in (".", "paper", "toy", "reader", "kit")
                for path in ROOT.glob(f"{folder}/*.py")]
    source = "".join(path.read_text() for path in programs)
    for quoted in re.findall(r"`([^`\n]*(?:\n[^`\n]+)*)`", readme.read_text()):
        for flag in re.findall(r"(?<!\S)--[a-z][a-z_-]*", quoted):
            assert f'"{flag}"' in source or flag in OTHERS, flag


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_exist(readme):
    text = readme.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert link.startswith("https://") or (readme.parent / link).exists(), link
    for name in re.findall(r"`([\w./-]+(?:\.(?:py|slurm|md|txt|csv)|/stage\d))`", text):
        if not name.startswith("out/"):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_the_code_exist(readme):
    """Those that stand after their file: `vision.py`: `choose_grid`, `tile`."""
    for file, names in re.findall(r"`(\w+\.py)`: ((?:`[\w.]+`(?:, )?)+)", readme.read_text()):
        source = (ROOT / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"(?:class|def) {part}\b", source), f"{file} has no {name}"
