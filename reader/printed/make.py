"""Set the pages of this folder again, by three programs that are not ours.

    python -m reader.printed.make OUT/      # needs chromium, xetex, LibreOffice and pdftoppm

The documents below are ours, written for this purpose. A browser, TeX and an office program set
them, in families on which nothing is trained. A block of a document is a tuple: ("h", heading),
("p", line, ...), ("c", centred line, ...), ("kv", (label, value), ...), ("t", header, row, ...) or
("r",), a rule. The text of a page is what stands in it, line by line.
"""
import argparse
import html
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from plumbing.processes import run_main
from plumbing.settings import InputError

DPI = 120

# kind, family, type in pixels, width, (prompt, answer), blocks, dark
BROWSER = [
    ("receipt", "Cousine", 16, 330, ("what is the total?", "18.25"), [
        ("c", "Harbour Bakery", "12 Quay Lane", "Tel. 555-0142"), ("r",),
        ("kv", ("Rye loaf", "6.50"), ("2 x Bun", "3.00"), ("Apple tart", "7.25")), ("r",),
        ("kv", ("Subtotal", "16.75"), ("Tax", "1.50"), ("TOTAL", "18.25")),
        ("c", "Thank you!")], False),
    ("screenshot", "Inter", 15, 420, ("what is brightness set to?", "70%"), [
        ("h", "Display settings"),
        ("kv", ("Brightness", "70%"), ("Night light", "On"), ("Scale", "125%"),
         ("Resolution", "1920 x 1080"), ("Refresh rate", "60 Hz"))], True),
    ("invoice", "Noto Serif", 16, 520, ("when is it due?", "30 June 2025"), [
        ("h", "Invoice"),
        ("kv", ("Invoice No.", "2025-0417"), ("Invoice date", "31 May 2025"),
         ("Due date", "30 June 2025"), ("Bill to", "Marta Lindqvist")),
        ("t", ("Item", "Qty", "Price"), ("Oak shelf", "2", "£84.00"), ("Brackets", "8", "£12.40"),
         ("Delivery", "1", "£9.95")), ("kv", ("Total", "£106.35"),)], False),
    ("table", "Fira Code", 15, 460, ("what is the port of mail?", "587"), [
        ("t", ("Service", "Port", "State"), ("web", "443", "running"), ("mail", "587", "stopped"),
         ("cache", "6379", "running"), ("queue", "5672", "failed"), ("search", "9200", "running"))],
     True),
    ("letter", "Vollkorn", 17, 520, ("who signed?", "Ruth Adeyemi"), [
        ("p", "14 March 2024"), ("p", "Dear Mr Okonkwo,"),
        ("p", "your bicycle is ready. We replaced the chain", "and both brake cables, and found a"
         " crack in", "the left pedal, which we did not touch."),
        ("p", "The repair costs $64.80. You can collect it", "any day before six o'clock."),
        ("p", "Yours sincerely,", "Ruth Adeyemi")], False),
    ("form", "Quicksand", 16, 440, ("what is the date of birth?", "02/11/1987"), [
        ("h", "Library card"),
        ("kv", ("Name:", "Johan Vermeer-Smit"), ("Date of birth:", "02/11/1987"),
         ("Street:", "48 Tulip Road"), ("City:", "Haarlem"), ("Email:", "j.vs@post.example"),
         ("Card:", "Yearly, adult"))], False),
    ("article", "EB Garamond", 19, 540, ("what is the title?", "The last lighthouse keeper"), [
        ("h", "The last lighthouse keeper"), ("p", "By Nora Whitfield"),
        ("p", "For thirty-one years the lamp on Gull Rock", "was lit by hand. On Friday, at 9:40"
         " pm, a", "small computer did it for the first time.", "“It was on time,” said the keeper;"
         " “I was", "always early.”")], False),
    ("screenshot", "Cantarell", 15, 400, ("what is the title of the window?",
                                                 "Save changes?"), [
        ("h", "Save changes?"), ("p", "The file notes-7b.txt was changed 12 minutes", "ago. If you"
                                 " do not save it, the changes", "will be lost."),
        ("p", "Discard Cancel Save")], False),
    ("table", "PT Sans", 16, 480, ("what is the price of tomato soup?", "4.20"), [
        ("h", "Lunch menu"),
        ("t", ("Dish", "Price"), ("Tomato soup", "4.20"), ("Mushroom risotto", "9.80"),
         ("Grilled trout", "13.50"), ("Lemon cake", "3.90"), ("Espresso", "2.10"))], False),
]
TEX = [
    ("letter", "EB Garamond", 12, 330, ("who is it addressed to?", "Professor Hale"), [
        ("p", "8 October 2023"), ("p", "Dear Professor Hale,"),
        ("p", "thank you for the drawings of the bridge. The", "third sheet shows a span of 47 m,"
         " but the table", "on sheet five says 45 m. Which one is right?"),
        ("p", "With kind regards,", "Ilse Brandt")]),
    ("article", "Cardo", 11, 340, ("what is the heading?", "On salt"), [
        ("h", "On salt"), ("p", "Sea water holds about 35 grams of salt in each",
                           "litre. To gather one kilogram, a worker must dry",
                           "some 29 litres; a good summer day is enough for", "that, and a wet one"
                           " undoes it (see page 112).")]),
    ("invoice", "Charis SIL", 10, 330, ("what is the invoice number?", "KX-7731"), [
        ("h", "INVOICE"), ("kv", ("Invoice No.", "KX-7731"), ("Date", "2022-09-05"),
                           ("Customer", "Brandt & Sons"), ("Terms", "14 days")),
        ("t", ("Description", "Qty", "Amount"), ("Copper wire", "40", "212.00"),
         ("Solder", "6", "38.10"), ("Flux", "2", "11.98")), ("kv", ("Total due", "EUR 262.08"),)]),
    ("table", "Cousine", 11, 320, ("what is the time for Lyon?", "11:52"), [
        ("h", "DEPARTURES"), ("t", ("Time", "Gate", "City"), ("10:15", "A4", "Oslo"),
                              ("11:52", "B17", "Lyon"), ("12:05", "A9", "Porto"),
                              ("13:40", "C2", "Riga"))]),
    ("form", "PT Sans", 11, 320, ("what is the policy number?", "AB 503 996"), [
        ("h", "Claim form"), ("kv", ("Policy number", "AB 503 996"), ("Holder", "Tom Barrow"),
                              ("Damage", "broken window"), ("Amount", "£310.00"),
                              ("Date", "17/01/2021"), ("Signed by", "T. Barrow"))]),
    ("receipt", "JetBrains Mono", 9, 230, ("how much is the change?", "2.35"), [
        ("c", "CORNER STORE", "Store #0419"), ("r",),
        ("kv", ("Milk 1 l", "1.19"), ("Eggs (12)", "3.48"), ("Soap", "2.98")), ("r",),
        ("kv", ("TOTAL", "7.65"), ("CASH", "10.00"), ("CHANGE", "2.35"))]),
    ("letter", "Junicode Two Beta", 12, 330, ("when was it written?", "Monday, 6 May"), [
        ("p", "Monday, 6 May"), ("p", "Dear neighbours,"),
        ("p", "we celebrate Ada's birthday on Saturday from 7 pm", "on. It may get loud. If it"
         " does, call 0170 445 9921", "or simply come and have a piece of cake."),
        ("p", "Ada & Piet, second floor")]),
    ("article", "Vollkorn", 11, 330, ("who wrote it?", "Sam Okoro"), [
        ("h", "Review: Night Trains"), ("p", "by Sam Okoro"),
        ("p", "Forty short chapters, one for each night that the", "author spent on rails between"
         " 1998 and 2016. The", "best is the shortest: a stop of eleven minutes in", "Brig,"
         " where nobody got on or off.")]),
]
OFFICE = [
    ("letter", "Noto Serif", 11, 340, ("who signed it?", "Carla Nunez"), [
        ("p", "21 August 2020"), ("p", "Dear Ms Patel,"),
        ("p", "we are glad to offer you the post of archivist", "from 1 October. Your salary will"
         " be $52,400 a", "year; please return one signed copy by Friday."),
        ("p", "Kind regards,", "Carla Nunez")]),
    ("invoice", "Cantarell", 11, 340, ("how much is the total?", "$1,148.00"), [
        ("h", "Blue Fern Studio"), ("kv", ("Invoice #", "0093"), ("Date", "Feb 3, 2023"),
                                    ("Bill to", "Moss Hotel")),
        ("t", ("Item", "Hours", "Amount"), ("Logo design", "9", "$765.00"),
         ("Menu layout", "4", "$308.00"), ("Printing", "1", "$75.00")),
        ("kv", ("Total", "$1,148.00"),)]),
    ("table", "Fira Code", 10, 330, ("what is the score of Lena?", "88"), [
        ("h", "Results, group C"), ("t", ("Name", "Score", "Rank"), ("Amir", "91", "1"),
                                    ("Lena", "88", "2"), ("Oskar", "73", "3"),
                                    ("Yun", "70", "4"), ("Bea", "55", "5"))]),
    ("form", "Hack", 10, 330, ("what is the room?", "2.14"), [
        ("h", "Visitor pass"), ("kv", ("Name:", "Dr. Li Wenhao"), ("Company:", "Tessel BV"),
                                ("Host:", "R. Aldous"), ("Room:", "2.14"),
                                ("Valid:", "09:00-17:30"), ("Pass:", "V-00381"))]),
    ("receipt", "Courier Prime", 11, 280, ("how much was paid in cash?", "40.00"), [
        ("c", "Green Door Cafe", "5 Mill Street, Leeds"), ("r",),
        ("kv", ("Breakfast", "11.90"), ("2 Latte", "7.60"), ("Orange juice", "4.25")), ("r",),
        ("kv", ("Total", "23.75"), ("Cash", "40.00"), ("Change", "16.25"))]),
    ("article", "Charis SIL", 11, 340, ("what is the title?", "Minutes of the meeting"), [
        ("h", "Minutes of the meeting"), ("p", "Present: Owen, Priya, Tilda. Absent: Marc."),
        ("p", "1. The budget of 3,500 was approved.", "2. Tilda orders the new printer (model"
         " HX-20).", "3. Next meeting: 12 April, 4:30 pm, room B.")]),
    ("table", "PT Sans", 11, 330, ("what is the weight of parcel 3?", "0.8 kg"), [
        ("t", ("Parcel", "Weight", "To"), ("1", "2.5 kg", "Turin"), ("2", "11 kg", "Ghent"),
         ("3", "0.8 kg", "Bath"), ("4", "4.4 kg", "Aarhus"))]),
    ("letter", "Cardo", 12, 340, ("what is the subject?", "Water meter reading"), [
        ("p", "Northern Water Board", "P.O. Box 118"), ("p", "Subject: Water meter reading"),
        ("p", "Dear customer,"), ("p", "on 19 July our engineer could not read the meter",
                                  "at your address. Please send us the five digits", "by email"
                                  " or on the card below."), ("p", "H. Fenwick")]),
]


def text_of(blocks: list[tuple]) -> str:
    """The lines of a document."""
    lines = []
    for kind, *parts in blocks:
        for part in parts:
            lines.append(part if isinstance(part, str) else " ".join(part))
    return "\n".join(lines)


def as_html(document: tuple) -> str:
    """A document for the browser and for the office program."""
    _, family, size, width, _, blocks, *dark = document
    ink, paper = ("#e8e8e8", "#1e1f24") if dark and dark[0] else ("#111", "#fff")
    out = []
    for kind, *parts in blocks:
        if kind == "r":
            out.append("<hr>")
        elif kind == "h":
            out.append(f"<h2>{html.escape(parts[0])}</h2>")
        elif kind in "pc":
            style = " style='text-align: center'" if kind == "c" else ""
            out.append(f"<p{style}>{'<br>'.join(map(html.escape, parts))}</p>")
        else:
            cell, align = ("td", "right") if kind == "kv" else ("td", "left")
            rows = [f"<{cell}>{html.escape(row[0])}</{cell}>" + "".join(
                f"<{cell} align='{align}'>{html.escape(c)}</{cell}>" for c in row[1:])
                for row in parts]
            if kind == "t":
                rows[0] = rows[0].replace("<td", "<td style='font-weight: bold'")
            out.append("<table width='100%'>" + "".join(f"<tr>{row}</tr>" for row in rows)
                       + "</table>")
    unit = "px" if dark else "pt"
    return (f"<meta charset='utf-8'><style>@page {{ size: {width}pt 420pt; margin: 12pt }} "
            f"body, td {{ font: {size}{unit}/1.4 {family}; color: {ink}; background: {paper} }} "
            f"h2 {{ font: bold {1.4 * size:.0f}{unit} {family}; margin: 0.3em 0 }} "
            "p { margin: 0.4em 0 }"
            f"</style><body>{''.join(out)}</body>")


def as_tex(document: tuple) -> str:
    """A document in plain TeX."""
    _, family, size, width, _, blocks = document
    quote = lambda t: "".join("\\" + c if c in "#$%&_" else c for c in t)
    out = [f"\\font\\body=\"{family}\" at {size}pt \\font\\head=\"{family}\" at {1.4 * size:.1f}pt "
           f"\\hsize={width - 24}pt \\pdfpagewidth={width}pt \\pdfpageheight=420pt "
           "\\hoffset=-1in \\voffset=-1in \\advance\\hoffset by 12pt \\advance\\voffset by 12pt "
           f"\\parindent=0pt \\parskip=4pt \\nopagenumbers \\body \\baselineskip={1.35 * size}pt "
           "\\topskip=12pt \\raggedright"]
    for kind, *parts in blocks:
        if kind == "r":
            out.append("\\medskip\\hrule\\medskip")
        elif kind == "h":
            out.append(f"{{\\head {quote(parts[0])}\\par}}\\medskip")
        elif kind == "p":
            out.append("\\hfil\\break ".join(map(quote, parts)) + "\\par")
        elif kind == "c":
            out += [f"\\centerline{{{quote(part)}}}" for part in parts]
        else:
            for row in parts:
                share = (width - 24) / len(row)
                boxes = [f"\\hbox to {share}pt{{" + ("\\hfil " if kind == "kv" and i else "")
                         + quote(c) + ("" if kind == "kv" and i else "\\hfil") + "}"
                         for i, c in enumerate(row)]
                out.append("\\line{" + "".join(boxes) + "}\\par")
    return "\n".join(out) + "\n\\bye\n"


def run(*command: str | Path, folder: Path) -> str:
    """Run a program and return what it prints. Raises InputError."""
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True,
                              timeout=180).stdout
    except FileNotFoundError:
        raise InputError(f"{command[0]} is not installed") from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{command[0]} fails: {error.stderr or error}") from None


def set_page(program: str, document: tuple, folder: Path) -> Path:
    """A document as a PNG, with blank paper below its last line cut off."""
    from PIL import Image, ImageChops
    if program == "browser":
        (folder / "page.html").write_text(as_html(document))
        run("chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu",
            f"--window-size={document[3]},700", "--screenshot=page.png", "page.html",
            folder=folder)
    else:
        if program == "TeX":
            (folder / "page.tex").write_text(as_tex(document))
            run("xetex", "-interaction=batchmode", "page.tex", folder=folder)
        else:
            (folder / "page.html").write_text(as_html(document))
            run("soffice", "--headless", f"-env:UserInstallation=file://{folder}/office",
                "--convert-to", "pdf", "--writer", "page.html", folder=folder)
        run("pdftoppm", "-r", str(DPI), "-f", "1", "-l", "1", "-png", "-singlefile", "page.pdf",
            "page", folder=folder)
    image = Image.open(folder / "page.png").convert("RGB")
    paper = Image.new("RGB", image.size, image.getpixel((image.width - 1, image.height - 1)))
    left, top, right, bottom = ImageChops.difference(image, paper).getbbox()
    image = image.crop((max(0, left - 14), max(0, top - 12), min(image.width, right + 14),
                        min(image.height, bottom + 14)))
    image.quantize(64).save(folder / "page.png", optimize=True)
    return folder / "page.png"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reader.printed.make", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for program, documents in [("browser", BROWSER), ("TeX", TEX), ("office", OFFICE)]:
        for i, document in enumerate(documents):
            name = f"{program.lower()}-{i + 1}-{document[0]}.png"
            with tempfile.TemporaryDirectory() as folder:
                shutil.copy(set_page(program, document, Path(folder)), args.folder / name)
            kind, family, _, _, (prompt, answer), blocks = document[:6]
            rows.append({"image": name, "prompt": prompt, "answer": answer, "kind": kind,
                         "text": text_of(blocks), "program": program, "font": family})
            print(name, flush=True)
    (args.folder / "questions.jsonl").write_text("".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    run_main(main)
