"""Questions about images, in a JSONL file."""
import json
import os
from pathlib import Path

from plumbing.images import read_pages
from plumbing.settings import InputError
from plumbing.tokenizers import TextError, check_surrogates


def read_questions(path: Path) -> list[dict]:
    """The rows of a JSONL file, each with an image, relative to the file, and a prompt.

    Every image is read once, so that a bad one is found before anything is answered.
    Raises InputError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):     # splitlines() would cut inside a string
        if line.strip():
            rows.append(read_question(line, path.parent, f"{path}, line {number}"))
    if not rows:
        raise InputError(f"{path}: not a single question there")
    return rows


def read_question(line: str, folder: Path, where: str) -> dict:
    """A line of --questions as its row. Raises InputError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON, an object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object; each line is one")
    image, prompt = row.get("image"), row.get("prompt")
    if not isinstance(image, str) or not isinstance(prompt, str):
        raise InputError(f'{where}: not an "image" and a "prompt", both texts, among '
                         f"{', '.join(row)[:200] or 'nothing'}")
    try:
        check_surrogates(prompt)
    except TextError as error:
        raise InputError(f"{where}: {error}") from None
    if not os.path.isfile(folder / image):      # Path's own raises for a name that is too long
        raise InputError(f"{where}: no file {str(folder / image)[:200]!r}")
    read_pages(folder / image)
    return row
