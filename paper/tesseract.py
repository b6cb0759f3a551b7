"""Tesseract 5 reads what a model reads aloud, for comparison.

    apt-get install tesseract-ocr
    python -m paper.tesseract reader-pages reader-a4 reader-scans reader-drawn

Its readings are predictions like a model's, and go to files like theirs. It answers no questions:
of a benchmark's rows it gets those that ask for the page's text.
"""
import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data import READ
from paper.benchmarks import READERS, open_benchmark
from paper.metrics import METRICS
from plumbing.files import OwnFiles
from plumbing.processes import run_main
from plumbing.settings import InputError, a_path


def read_aloud(image: Image.Image) -> str:
    """Tesseract's reading of a page, taken as one block of text. Raises InputError."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        image.save(file.name)
        command = ["tesseract", file.name, "-", "--psm", "6"]
        try:
            return subprocess.run(command, check=True, capture_output=True,
                                  encoding="utf-8").stdout
        except FileNotFoundError:
            raise InputError("tesseract is not installed: apt-get install tesseract-ocr") from None
        except subprocess.CalledProcessError as error:
            raise InputError(f"tesseract: {' '.join(error.stderr.split())}") from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m paper.tesseract", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("benchmarks", nargs="+", choices=READERS, help="which pages")
    add("--out", type=a_path, default=Path("out/tesseract/eval"),
        help="where the predictions go (default: %(default)s)")
    args = parser.parse_args()
    files = OwnFiles(args.out, [f"{name}.jsonl" for name in args.benchmarks])
    for name in args.benchmarks:
        benchmark, lines = open_benchmark(name), []
        for i, row in enumerate(tqdm(benchmark.rows, desc=name)):
            if row["question"] == READ:
                [image] = benchmark.images(i)
                lines.append({**row, "prediction": read_aloud(image)})
        files.write(f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        scores = METRICS[name](lines)
        intervals = METRICS[name].intervals(lines)
        low, high = intervals["character_errors"]
        print(f"{name}: {scores['character_errors']:.1%} of characters wrong ({low:.1%} to "
              f"{high:.1%})")


if __name__ == "__main__":
    run_main(main)
