"""Set the pages of this folder again: whole A4 pages of 11-point type, by programs that are not ours.

    python reader/a4/make.py OUT/       # needs chromium, xelatex, LibreOffice and pdftoppm

Their text is prose of this repository's own READMEs, as it is when this is run.
"""
import argparse
import html
import json
import re
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DPI = 150
CHARACTERS = 2300       # a page has about so many

# program, family (of those on which nothing is trained), title, file of the text
PAGES = [
    ("browser", "Noto Serif", "Files, processes, devices", "plumbing/README.md"),
    ("browser", "Inter", "How the method works", "README.md"),
    ("TeX", "EB Garamond", "The toy, and what it learns", "toy/README.md"),
    ("TeX", "Charis SIL", "Benchmarks and experiments", "paper/README.md"),
    ("office", "PT Sans", "A model that reads print", "reader/README.md"),
    ("office", "Cardo", "What the tests check", "tests/README.md"),
]


def paragraphs(path: Path) -> list[str]:
    """The prose of a README, about a page of it, without its Markdown."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"\[\^\w+\]", "", text))
    chosen = []
    for block in re.split(r"\n\n|\n(?=- )", text):
        block = " ".join(re.sub(r"[`*]", "", block.removeprefix("- ")).split())
        if len(block) > 60 and block[0].isalpha() and "|" not in block:
            chosen.append(block)
            if sum(map(len, chosen)) > CHARACTERS:
                break
    return chosen


def as_html(family: str, title: str, text: list[str]) -> str:
    body = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in text)
    return ("<meta charset='utf-8'><style>@page { size: A4; margin: 2.5cm } "
            f"body {{ font: 11pt/1.35 '{family}' }} h1 {{ font: bold 17pt '{family}' }}</style>"
            f"<body><h1>{html.escape(title)}</h1>{body}</body>")


def as_tex(family: str, title: str, text: list[str]) -> str:
    def quote(t: str) -> str:
        return re.sub(r"([#$%&_{}])", r"\\\1", t).replace("--", "-{}-")

    body = "\n\n".join(map(quote, text))
    return ("\\documentclass[11pt, a4paper]{article}\\usepackage[margin=2.5cm]{geometry}"
            f"\\usepackage{{fontspec}}\\setmainfont[Ligatures=NoCommon]{{{family}}}"
            "\\pagestyle{empty}\\setlength{\\parindent}{0pt}\\setlength{\\parskip}{6pt}"
            "\\hyphenpenalty=10000\\sloppy\\begin{document}"
            f"{{\\Large\\bfseries {quote(title)}}}\n\n{body}\\end{{document}}")


def run(*command: str | Path, folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, timeout=180)


def set_page(program: str, family: str, title: str, text: list[str], folder: Path) -> Image.Image:
    """The first page as an image, with its margins."""
    if program == "TeX":
        (folder / "page.tex").write_text(as_tex(family, title, text))
        run("xelatex", "-interaction=batchmode", "page.tex", folder=folder)
    else:
        (folder / "page.html").write_text(as_html(family, title, text))
        if program == "browser":
            run("chromium", "--headless", "--no-sandbox", "--disable-gpu",
                "--no-pdf-header-footer", "--print-to-pdf=page.pdf", "page.html", folder=folder)
        else:
            run("soffice", "--headless", f"-env:UserInstallation=file://{folder}/office",
                "--convert-to", "pdf", "--writer", "page.html", folder=folder)
    pages = subprocess.run(["pdfinfo", folder / "page.pdf"], capture_output=True, text=True)
    if not re.search(r"^Pages:\s+1$", pages.stdout, re.MULTILINE):
        raise SystemExit(f"{title}: more than a page; lower CHARACTERS")
    run("pdftoppm", "-r", str(DPI), "-gray", "-png", "-singlefile", "page.pdf", "page",
        folder=folder)
    return Image.open(folder / "page.png").convert("L")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (program, family, title, path) in enumerate(PAGES):
        text = paragraphs(ROOT / path)
        name = f"{program.lower()}-{i + 1}.png"
        with tempfile.TemporaryDirectory() as folder:
            image = set_page(program, family, title, text, Path(folder))
            image.quantize(16).save(args.folder / name, optimize=True)
        rows.append({"image": name, "prompt": "what is the title?", "answer": title,
                     "kind": "article", "text": "\n".join([title, *text]), "program": program,
                     "font": family})
        print(name, flush=True)
    (args.folder / "questions.jsonl").write_text("".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
