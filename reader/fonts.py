"""The TrueType and OpenType faces in which the reader's pages are set.

    python -m reader.fonts      # looks for the faces on this machine and writes fonts.json again

reader/fonts.json records each face (family, style, file, SHA-256, split): pages depend on a seed,
an index and this list. The fonts themselves come from Debian's packages, named in
reader/README.md, and are not part of the repository.
"""
import argparse
import functools
import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from unicodedata import normalize

from PIL import ImageFont

from plumbing.processes import run_main
from plumbing.settings import InputError

FOLDERS = [Path("/usr/share/fonts"), Path.home() / ".local/share/fonts", Path.home() / ".fonts"]
LIST = Path(__file__).parent / "fonts.json"

# Text families, by the name in the font. Each is followed by how often it is drawn, if not once.
FAMILIES = """
Arimo x3, Tinos x3, Liberation Sans x4, Liberation Serif x4, Liberation Mono x3,
Liberation Sans Narrow, DejaVu Sans x4, DejaVu Serif x2, DejaVu Sans Mono x3, Noto Sans x4,
Noto Mono, Open Sans x3, Roboto x4, Roboto Condensed x2, Lato x3, Carlito x3, Caladea x2,
Nimbus Sans x3, Nimbus Roman x3, Nimbus Mono PS x3, Nimbus Sans Narrow, P052 x2, C059 x2,
URW Bookman x2, URW Gothic, FreeSans, FreeSerif, FreeMono, CMU Serif x2, CMU Sans Serif, CMU Bright,
CMU Concrete, CMU Typewriter Text x2, Linux Libertine O x2, Linux Biolinum O,
Linux Libertine Mono O, STIXGeneral, STIX, Gentium Plus, Gentium Book Plus, Doulos SIL, Andika,
Old Standard TT, GFS Artemisia, GFS Didot, GFS Neohellenic, Accanthis ADF Std, Baskervald ADF Std,
Berenis ADF Pro, Romande ADF Std, Libris ADF Std, Gillius ADF, Switzera ADF, Universalis ADF Std,
Agave, Allerta, Arapey, Averia Sans GWF, Averia Serif GWF, B612, B612 Mono, Comfortaa, Dosis,
ElstobD, Fantasque Sans Mono, Fanwood, Goudy Bookletter 1911, Linden Hill, Go, Go Mono,
Inconsolata x2, Junction, Jura, Monoid, monofur, NanumGothic, NanumBarunGothic, NanumMyeongjo,
NanumGothicCoding, National Park, Norasi, Garuda, Loma, OCR B, OSP-DIN, Oxygen Mono, Oxygen-Sans,
Play, PT Mono, Rasa, Sora, Yrsa, Yanone Kaffeesatz, Routed Gothic, Essays1743, Comic Neue,
OpenDyslexic
"""
# Kept apart for the held-out split: four with serifs, five without, three of fixed width.
HELD_OUT = ["PT Serif", "Roboto Slab", "Quattrocento", "Prociono",
            "Karla", "Cabin", "Clear Sans", "Manrope", "Tuffy",
            "mononoki", "League Mono", "Anonymous Pro"]
# Kept for the pages that other programs set; nothing is trained on them: every family of which the
# name begins so, such as Noto Serif Display.
NEVER = ["Cantarell", "Cardo", "Charis SIL", "Courier Prime", "Cousine", "Crimson Text",
         "EB Garamond", "Fira Code", "Fira Sans", "Gelasio", "Hack", "IBM Plex Sans", "Inter",
         "JetBrains Mono", "Junicode", "Libre Baskerville", "Merriweather", "Noto Serif", "PT Sans",
         "Quicksand", "Source Serif", "Spectral", "Ubuntu", "Vollkorn"]
STYLES = ["regular", "book", "roman", "medium", "bold", "italic", "bold italic", "oblique",
          "bold oblique", "light", "semibold", "condensed", "demi", "demibold", "mono", "din",
          "condensed bold", "bold cond", "cond", "demi italic", "light italic", "demi oblique",
          "book oblique", "sans-book", "sans-bold", "bolditalic", "demibolditalic", "bold-italic"]
PRINTABLE = "".join(map(chr, range(32, 127)))
# What a page may have besides, and what stands for it in a face that lacks it.
BESIDES = {"£": "L", "€": "E", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "•": "*",
           "·": ".", "°": "o", "©": "c", "×": "x", "é": "e", "è": "e", "ê": "e", "à": "a", "ç": "c",
           "ü": "u", "ö": "o", "ä": "a", "ß": "s", "ñ": "n"}


@dataclass(frozen=True)
class Face:
    """One font file, or rather the first face in it."""
    family: str
    style: str
    file: str           # its name, without a folder
    sha256: str
    split: str          # train or held-out
    weight: float       # how often it is drawn, relative to the others of its split
    lacks: str          # those of BESIDES that it cannot draw

    def spell(self, text: str) -> str:
        """A text in characters that a page may have and this face can draw."""
        known = set(PRINTABLE).union(BESIDES).difference(self.lacks)
        return "".join(c if c in known else BESIDES.get(c) or normalize("NFKD", c)[0]
                       for c in text)


def wanted() -> dict[str, int]:
    """Family -> how often it is drawn."""
    families = {}
    for entry in FAMILIES.replace("\n", " ").split(","):
        name, _, times = entry.strip().partition(" x")
        families[name] = int(times or 1)
    return families | {name: 1 for name in HELD_OUT}


def font_files() -> list[Path]:
    """All font files of this machine, in the order of their names."""
    return sorted((path for folder in FOLDERS for path in folder.rglob("*.[ot]tf")),
                  key=lambda path: (path.name, str(path)))


def lacking(path: Path) -> str:
    """Those of PRINTABLE and BESIDES for which a face has no glyph. Raises InputError."""
    try:
        from fontTools.ttLib import TTFont      # for this command alone
    except ImportError:
        raise InputError("reading fonts needs `pip install fonttools`") from None
    glyphs = TTFont(path, lazy=True).getBestCmap()
    return "".join(c for c in PRINTABLE + "".join(BESIDES) if ord(c) not in glyphs)


def find_faces() -> list[Face]:
    """The faces of this machine that pages are set in; of each family and style the first."""
    families, found = wanted(), {}
    for path in font_files():
        family, style = ImageFont.truetype(path, 20).getname()
        style = " ".join((style or "").split())
        if family not in families or any(family.lower().startswith(n.lower()) for n in NEVER):
            continue
        if style.lower() in STYLES and (family, style) not in found:
            lacks = lacking(path)
            if not set(lacks) & set(PRINTABLE):
                found[family, style] = path, lacks
    styles = {name: [s for f, s in found if f == name] for name in families}
    return [Face(family, style, path.name, hashlib.sha256(path.read_bytes()).hexdigest(),
                 "held-out" if family in HELD_OUT else "train",
                 round(families[family] / len(styles[family]), 4), lacks)
            for (family, style), (path, lacks) in sorted(found.items())]


@functools.cache
def faces(split: str) -> list[Face]:
    """The recorded faces of a split."""
    every = [Face(**row) for row in json.loads(LIST.read_text())]
    return [face for face in every if face.split == split]


@functools.cache
def face_paths() -> dict[str, Path]:
    """SHA-256 -> the file on this machine. Raises InputError, one line, where a face is missing."""
    recorded = {face.file: face for split in ("train", "held-out") for face in faces(split)}
    paths = {}
    for path in font_files():
        if path.name in recorded:
            paths.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    missing = [face.file for face in recorded.values() if face.sha256 not in paths]
    if missing:
        raise InputError(f"{len(missing)} of {len(recorded)} fonts are missing or of another "
                         f"version, {missing[0]} first: reader/README.md names their packages")
    return paths


@functools.lru_cache(4096)
def font(face: Face, size: float) -> ImageFont.FreeTypeFont:
    """A face at a size in pixels. The basic layout is the same on every machine."""
    path = face_paths()[face.sha256]
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m reader.fonts", description=__doc__.split("\n\n")[0]).parse_args()
    found = find_faces()
    rows = ",\n".join(json.dumps(asdict(face), ensure_ascii=False) for face in found)
    partial = LIST.with_suffix(".partial")
    partial.write_text(f"[\n{rows}\n]\n")
    partial.replace(LIST)
    for split in ("train", "held-out"):
        of = [face for face in found if face.split == split]
        print(f"{split}: {len(of)} faces of {len({face.family for face in of})} families")
    missing = wanted().keys() - {face.family for face in found}
    print(f"not found: {', '.join(sorted(missing)) or 'none'}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
