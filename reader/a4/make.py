"""Set this folder's pages again: whole A4 pages of 11-point type, by three programs not ours.

    python -m reader.a4.make OUT/       # needs chromium, xelatex, LibreOffice and poppler-utils

Their prose is texts.md, by us. The text of a page is what pdftotext finds in it, line by line.
"""
import argparse
import html
import json
import re
import tempfile
import unicodedata
from pathlib import Path

from PIL import Image

from plumbing.processes import run_main
from plumbing.settings import InputError
from reader.printed.make import run

TEXTS = Path(__file__).with_name("texts.md")
DPI = 150

# program and family of each page: of the families on which nothing is trained
PAGES = [("browser", "Noto Serif"), ("browser", "Inter"), ("TeX", "EB Garamond"),
         ("TeX", "Charis SIL"), ("office", "PT Sans"), ("office", "Cardo")]


def documents() -> list[tuple[str, list[str]]]:
    """Title and paragraphs of each page."""
    pages = []
    for page in TEXTS.read_text().split("# ")[1:]:
        title, *text = [" ".join(block.split()) for block in page.split("\n\n") if block.strip()]
        pages.append((title, text))
    return pages


def as_html(family: str, title: str, text: list[str]) -> str:
    """A document for the browser and for the office program."""
    body = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in text)
    return ("<meta charset='utf-8'><style>@page { size: A4; margin: 2.5cm } "
            f"body {{ font: 11pt/1.35 '{family}' }} h1 {{ font: bold 17pt '{family}' }}</style>"
            f"<body><h1>{html.escape(title)}</h1>{body}</body>")


def as_tex(family: str, title: str, text: list[str]) -> str:
    """A document for XeLaTeX, without hyphenation."""
    def quote(t: str) -> str:
        return re.sub(r"([#$%&_])", r"\\\1", t)

    body = "\n\n".join(map(quote, text))
    return ("\\documentclass[11pt, a4paper]{article}\\usepackage[margin=2.5cm]{geometry}"
            f"\\usepackage{{fontspec}}\\setmainfont{{{family}}}"
            "\\pagestyle{empty}\\setlength{\\parindent}{0pt}\\setlength{\\parskip}{6pt}"
            "\\hyphenpenalty=10000\\sloppy\\begin{document}"
            f"{{\\Large\\bfseries {quote(title)}}}\n\n{body}\\end{{document}}")


def set_page(program: str, family: str, title: str, text: list[str],
             folder: Path) -> tuple[Image.Image, str]:
    """A page as an image with its margins, and its text. Raises InputError."""
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
    if not re.search(r"^Pages:\s+1$", run("pdfinfo", "page.pdf", folder=folder), re.MULTILINE):
        raise InputError(f"{TEXTS}: \"{title}\" takes more than a page: shorten it")
    run("pdftoppm", "-r", str(DPI), "-gray", "-png", "-singlefile", "page.pdf", "page",
        folder=folder)
    lines = unicodedata.normalize("NFKC", run("pdftotext", "page.pdf", "-", folder=folder))
    lines = "\n".join(line for line in lines.splitlines() if line.strip("\f "))
    return Image.open(folder / "page.png").convert("L"), lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reader.a4.make", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the images and questions.jsonl go")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, ((program, family), (title, text)) in enumerate(zip(PAGES, documents())):
        name = f"{program.lower()}-{i + 1}.png"
        with tempfile.TemporaryDirectory() as folder:
            image, lines = set_page(program, family, title, text, Path(folder))
        image.quantize(16).save(args.folder / name, optimize=True)
        rows.append({"image": name, "prompt": "what is the title?", "answer": title,
                     "kind": "article", "text": lines, "program": program, "font": family})
        print(name, flush=True)
    (args.folder / "questions.jsonl").write_text("".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    run_main(main)
