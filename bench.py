"""How fast: each work beside the same work in transformers, in one run, as a ratio.

    pip install transformers
    python bench.py                     # all of it
    python bench.py pages --json        # one, a JSON line per row

The two sides take turns, and the median over the repeats counts: absolute times on a shared CPU mean little, ratios do.
"""
import argparse
import io
import json
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vision import SIGLIP_PRESETS, read_image, tile, tile_boxes


def alternate(ours: Callable, theirs: Callable, repeats: int) -> tuple[float, float]:
    """The median seconds of either, called in turns; a first call of each is not counted."""
    times = {ours: [], theirs: []}
    for repeat in range(repeats + 1):
        for work in times:
            start = time.perf_counter()
            work()
            times[work].append(time.perf_counter() - start)
    return statistics.median(times[ours][1:]), statistics.median(times[theirs][1:])


def page_file(width: int, height: int, kind: str) -> bytes:
    """A page full of text as a PNG or JPEG file."""
    rng, page = random.Random(0), Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=height // 60)
    for y in range(height // 20, height * 19 // 20, height // 45):
        words = " ".join(str(rng.randrange(10 ** rng.randint(1, 9))) for _ in range(12))
        pen.text((width // 20, y), words, "black", font)
    file = io.BytesIO()
    page.save(file, kind)
    return file.getvalue()


def pages(repeats: int) -> list[dict]:
    """Decoding, tiling and normalising a page on one core, against SiglipImageProcessorPil on the same boxes."""
    from transformers import SiglipImageProcessorPil
    config, processor, rows = SIGLIP_PRESETS["so400m-patch14-384"], SiglipImageProcessorPil(), []
    side = config.image_size

    def theirs(data: bytes) -> torch.Tensor:
        page = Image.open(io.BytesIO(data)).convert("RGB")
        boxes = tile_boxes(*page.size, config)
        pixels = np.zeros((len(boxes), 3, side, side), dtype=np.float32)
        for canvas, (left, top, right, bottom) in zip(pixels, boxes):
            w, h = right - left, bottom - top
            new_w, new_h = (side, max(1, int(h / w * side))) if w >= h else (max(1, int(w / h * side)), side)
            done = processor(page.crop((left, top, right, bottom)), size={"height": new_h, "width": new_w},
                             return_tensors="np")["pixel_values"][0]
            y, x = (side - new_h) // 2, (side - new_w) // 2
            canvas[:, y:y + new_h, x:x + new_w] = done
        return torch.from_numpy(pixels)

    for width, height, kind in [(850, 1100, "PNG"), (1700, 2200, "PNG"), (1700, 2200, "JPEG"), (500, 400, "JPEG")]:
        data = page_file(width, height, kind)
        difference = (tile(read_image(io.BytesIO(data)), config) - theirs(data)).abs().max().item()
        ours_s, theirs_s = alternate(lambda: tile(read_image(io.BytesIO(data)), config), lambda: theirs(data), repeats)
        rows.append({"work": f"pages-{width}x{height}-{kind.lower()}", "ours_s": ours_s, "theirs_s": theirs_s,
                     "ratio": ours_s / theirs_s, "pages_per_s": 1 / ours_s, "difference": difference})
    return rows


WORKS = {"pages": pages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="*", help=f"which of {', '.join(WORKS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=20, help="calls of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON line per row instead of a table")
    args = parser.parse_args()
    if unknown := set(args.work) - set(WORKS):
        parser.error(f"no work called {', '.join(unknown)}: there is {', '.join(WORKS)}")
    if min(args.repeats, args.threads) < 1:
        parser.error("--repeats and --threads are at least 1")
    torch.set_num_threads(args.threads)
    for name in args.work or WORKS:
        try:
            rows = WORKS[name](args.repeats)
        except ImportError as error:
            parser.error(f"{name} needs `pip install transformers` ({error})")
        for i, row in enumerate(rows):
            if args.json:
                print(json.dumps(row))
                continue
            if i == 0:
                print("".join(f"{key:>{26 if key == 'work' else 13}}" for key in row))
            print("".join(f"{value:>26}" if key == "work" else f"{value:13.4g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
