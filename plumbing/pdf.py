"""PDF: its pages as images, and which pages of a file are meant.

    python sample.py --image doc.pdf --pages 2-3

plumbing/images.py imports this where a file is a PDF, or pages were chosen. PDFium draws the pages
(`pip install pypdfium2`), in a process of its own that runs this file. A hostile PDF makes it
crash, fill the memory or draw for hours: then that process ends, and one line says so. PDFium is
not safe with threads and forks: the processes that load data never hold it.
"""
import math
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from plumbing.settings import ImageError, InputError

# Documents are mostly scanned at 200 dots an inch: a letter page has 1700 x 2200 pixels. By default
# no more than 9 tiles of 512 pixels lie beside each other, so no side needs more.
DPI = 200
MAX_SIDE = 9 * 512              # pixels
MAX_PAGES = 1000
SECONDS = 30                    # of a core's time, for a page
MAX_MEMORY = 2 * 2 ** 30        # bytes, beside the file
MISSING = 3                     # exit status: no pypdfium2

ROOT = Path(__file__).parents[1]


def page_numbers(chosen: str | None, n: int) -> list[int]:
    """The pages that "2", "2-3" or "2,5-7" means, or all, of a file of n, in the file's order.

    They count from 1. Raises ImageError, without the file's name.
    """
    if chosen is None:
        return list(range(1, n + 1))
    numbers = set()
    for part in chosen.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        if not found:
            raise ImageError(f"--pages {chosen[:50]!r}: say 2, 2-3 or 2,5-7")
        first = int(found[1])
        last = int(found[2] or first)
        if not 1 <= first <= last:
            raise ImageError(f"--pages {chosen[:50]}: pages count from 1, the smaller number first")
        if last > n:
            has = "one page" if n == 1 else f"{n:,} pages"
            raise ImageError(f"--pages {chosen[:50]}: it has {has}")
        numbers |= {*range(first, last + 1)}
    return sorted(numbers)


def chosen_pictures(all_pictures: Callable[[], Iterator[tuple]], name: str,
                    chosen: str) -> Iterator[tuple]:
    """Those of a file's pictures (plumbing/images.py) that --pages says. Each call of all_pictures
    makes them anew: none is kept. Raises ImageError."""
    n = sum(1 for _ in all_pictures())
    try:
        numbers = page_numbers(chosen, n)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    yield from (picture for number, picture in enumerate(all_pictures(), 1) if number in numbers)


def pdf_pictures(data: bytes, name: str, chosen: str | None,
                 max_pixels: int) -> Iterator[tuple[bytes, int]]:
    """A PDF's pages on white, with their forms and annotations: each as a PPM file, and 1, the
    orientation of what is upright.

    chosen: --pages. max_pixels: of these pages together. Raises ImageError, and InputError where
    pypdfium2 is missing.
    """
    arguments = [str(max_pixels), str(SECONDS), str(MAX_MEMORY + len(data)), chosen or ""]
    with tempfile.TemporaryFile() as pdf, tempfile.TemporaryFile() as errors:
        pdf.write(data)
        pdf.seek(0)
        with subprocess.Popen([sys.executable, "-m", "plumbing.pdf", *arguments], cwd=ROOT,
                              stdin=pdf, stdout=subprocess.PIPE, stderr=errors) as process:
            try:
                while header := process.stdout.readline():
                    width, height = map(int, header.split()[1:3])
                    pixels = process.stdout.read(3 * width * height)
                    if len(pixels) == 3 * width * height:
                        yield header + pixels, 1
                status = process.wait()
            finally:
                process.kill()              # whoever reads may have enough
        if status == MISSING:
            raise InputError(f"{name}: reading PDF needs `pip install pypdfium2`")
        if status != 0:
            errors.seek(0)
            raise ImageError(f"{name}: {reason_of(status, errors.read())}")


def reason_of(status: int, errors: bytes) -> str:
    """Why a process ended so, by its last line, or by the signal that ended it."""
    if status == -signal.SIGXCPU:
        return f"a page takes more than {SECONDS} s to draw"
    lines = errors.decode(errors="replace").strip().splitlines()
    if status < 0 or not lines or lines[-1].startswith("MemoryError"):
        return "PDFium breaks down on it, or needs too much memory"
    return lines[-1]


# --------------------------------------------------------------------------------------------------
# The process that draws


def draw(data: bytes, chosen: str | None, max_pixels: int, seconds: int) -> None:
    """Write the pages to the standard output, one PPM file behind the other. Raises ImageError."""
    import pypdfium2
    where = ""
    try:
        limit_time(seconds)
        document = pypdfium2.PdfDocument(data)
        document.init_forms()
        numbers = page_numbers(chosen, len(document))
        sizes = [document.get_page_size(number - 1) for number in numbers]      # inches / 72
        scales = page_scales(sizes, max_pixels)
        for number, scale in zip(numbers, scales):
            where = f"page {number}: "
            limit_time(seconds)
            page = document[number - 1]
            image = page.render(scale=scale).to_pil().convert("RGB")
            page.close()
            sys.stdout.buffer.write(b"P6 %d %d 255\n" % image.size + image.tobytes())
    except pypdfium2.PdfiumError as error:
        raise ImageError(where + refusal(str(error))) from None


def page_scales(sizes: list[tuple[float, float]], max_pixels: int) -> list[float]:
    """How many pixels a unit of each page has. Raises ImageError where they are too many
    together."""
    scales = []
    n_pixels = 0
    for width, height in sizes:
        if not (width > 0 and height > 0):
            raise ImageError("a page without an area")
        scale = min(DPI / 72, MAX_SIDE / max(width, height))
        scale *= 1 - 1e-5       # sizes are rounded up: 850 pixels at 200 dpi must not become 851
        n_pixels += math.ceil(width * scale) * math.ceil(height * scale)
        scales.append(scale)
    if n_pixels > max_pixels or len(sizes) > MAX_PAGES:
        raise ImageError(f"{len(sizes):,} pages of {n_pixels:,} pixels together: at most "
                         f"{MAX_PAGES:,} of {max_pixels:,} are read; choose some with --pages")
    return scales


def refusal(error: str) -> str:
    """PDFium's complaint in our words."""
    if "assword" in error or "ecurity" in error:
        return "encrypted: save a copy that opens without a password"
    if "Success" in error:
        return "a PDF without pages"
    found = re.search(r"PDFium: (.*?)\)", error)
    return f"not a readable PDF ({found[1] if found else error.rstrip('.')})"


def limit_time(seconds: int) -> None:
    """The kernel ends this process if it computes for that long from now on."""
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, hard))


def limit_memory(n_bytes: int) -> None:
    """PDFium gives up where it asks for more than that."""
    import resource
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))        # no image of the memory on the disk


def main(max_pixels: str, seconds: str, max_memory: str, chosen: str) -> None:
    try:
        import pypdfium2    # noqa: F401
    except ImportError:
        sys.exit(MISSING)
    data = sys.stdin.buffer.read()
    limit_memory(int(max_memory))
    try:
        draw(data, chosen or None, int(max_pixels), int(seconds))
    except ImageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
