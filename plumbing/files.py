"""Files that are there whole or not at all."""
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8: beside its place first, then renamed. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
