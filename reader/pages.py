"""The reader's pages: what people have, set in ordinary type, with questions as people ask them.

    python -m reader.pages --draw 20 pages/         # 20 held-out pages and questions.jsonl

Page `index` of a seed and a split is always the same, given the fonts of reader/fonts.json.
Held-out pages are set in other families. The text of a page is what one reads aloud, line by line.
"""
import argparse
import io
import json
import random
from collections import Counter
from pathlib import Path

from data import READ
from plumbing.files import OwnFiles
from plumbing.processes import run_main
from plumbing.settings import a_path
from reader import words
from reader.drawing import Page, Run
from reader.sheet import Sheet, asked, fit_one_tile, value_and_question, value_for
from reader.words import FIELDS, GOODS, amount, code, company, date, email, money, person, phone
from vision import SigLIPConfig, choose_grid

SIDE = 448              # of a tile of the reader from stage 2 on, in pixels
GRIDS = [(r, c) for r in range(1, 10) for c in range(1, 10) if r * c <= 9 and r <= 3 * c <= 9 * r]


def heading(sheet: Sheet, text: str, align: float | None = None) -> Run:
    """A line in large or bold type."""
    rng = sheet.rng
    size = sheet.size * rng.choice([1.0, rng.uniform(1.1, 2.0)])
    align = rng.choice([0, 0.5]) if align is None else align
    return sheet.write(text, align, sheet.bold, size)


def receipt(sheet: Sheet) -> None:
    rng = sheet.rng
    shop = heading(sheet, words.upper(company(rng)) if rng.random() < 0.4 else company(rng), 0.5)
    sheet.ask(rng.choice(["which shop is it?", "what is the name of the shop?",
                          "where was it bought?"]), shop)
    for what in rng.sample([words.street, words.town, phone, date], rng.randint(0, 3)):
        sheet.write(what(rng), rng.choice([0.5, 0.5, 0]))
    if rng.random() < 0.5:
        bought = date(rng)
        sheet.ask(rng.choice(["what is the date?", "when was it bought?"]),
                  sheet.pair("Date:" if rng.random() < 0.7 else "Date", bought))
    if rng.random() < 0.4:
        sheet.ask(asked(rng, "Cashier"), sheet.pair("Cashier:", person(rng)))
    if rng.random() < 0.5:
        sheet.rule()
    sign, prices = rng.choice(["", "", "$", "£", "€"]), []
    for good in rng.sample(GOODS, rng.randint(2, 8 * sheet.plenty)):
        if not sheet.has_room(4.2):
            break
        prices.append(amount(rng, 100))
        name = good.title() if rng.random() < 0.6 else words.upper(good)
        count = rng.randint(2, 9)
        label = f"{count} x {name}" if rng.random() < 0.3 else name
        price = sheet.pair(label, money(rng, prices[-1], sign), sheet.right, 1)
        sheet.ask(rng.choice([f"how much is the {good}?", f"what does the {good} cost?",
                              f"what is the price of {good}?"]), price)
        if label[0].isdigit():
            sheet.ask(f"how many {good}?", str(count))
    if rng.random() < 0.5:
        sheet.rule()
    sums(sheet, sum(prices) or amount(rng), sign,
         rng.choice([["Subtotal", "Tax"], ["Subtotal", "VAT"], [], []]))
    if rng.random() < 0.4 and not sheet.full:
        sheet.write(rng.choice(["Thank you!", "THANK YOU", "Please come again", "Have a nice day",
                                "Thank you for your visit"]), 0.5)


def sums(sheet: Sheet, total: float, sign: str, before: list[str]) -> None:
    """The last lines of a bill."""
    rng = sheet.rng
    tax = round(total * rng.uniform(0.03, 0.25), 2)
    rows = dict(zip(before, (total, tax)))
    rows[rng.choice(["Total", "TOTAL", "Total due", "Amount due"])] = total + sum(
        [tax] if before else [])
    if rng.random() < 0.3:
        paid = total + amount(rng, 50)
        rows |= {"Cash": paid, "Change": amount(rng, 50)}
    align = rng.random() < 0.8
    for label, value in rows.items():
        if sheet.full:
            return
        key = label.capitalize() if label.isupper() and label != "VAT" else label
        bold = sheet.bold if key.startswith(("Total", "Amount")) and rng.random() < 0.5 else None
        run = sheet.pair(label + rng.choice(["", ":"]), money(rng, value, sign),
                         sheet.right if align else None, 1.0 if align else 0.0, bold)
        sheet.ask(asked(rng, key), run)
        if key in ("Total due", "Amount due"):
            sheet.ask(asked(rng, "Total"), run)


def invoice(sheet: Sheet) -> None:
    rng = sheet.rng
    sender = company(rng)
    if rng.random() < 0.6:
        heading(sheet, sender)
        sheet.ask(rng.choice(["who sent the invoice?", "which company is it from?"]),
                  sheet.page.runs[-1])
        for what in rng.sample([words.street, words.town, phone, email], rng.randint(0, 2)):
            sheet.write(what(rng))
        sheet.down(0.4)
    heading(sheet, rng.choice(["INVOICE", "Invoice", "Tax invoice", "Statement", "Bill"]))
    fields = {"Invoice No.": code, "Invoice date": date, "Due date": date, "Bill to": person,
              "Order No.": code, "Customer": company, "Account": code, "Email": email, "Due": date}
    chosen = rng.sample(sorted(fields), rng.randint(2, 5))
    if {"Due", "Due date"} <= set(chosen):
        chosen.remove("Due")
    column = None if rng.random() < 0.5 else sheet.left + max(
        sheet.width_of(label + ":") for label in chosen) + sheet.size
    for label in chosen:
        if sheet.full:
            return
        sheet.ask(asked(rng, label), sheet.pair(label + ":", fields[label](rng), column))
    sheet.down(0.4)
    items(sheet)


def items(sheet: Sheet) -> None:
    """The table of a bill: what, how many, at what price; then its sum."""
    rng, sign = sheet.rng, sheet.rng.choice(["", "", "$", "£", "€"])
    wide = sheet.right - sheet.left > 14 * sheet.size
    at = sheet.left + 0.62 * (sheet.right - sheet.left)
    if wide and not sheet.full:
        top = sheet.y - sheet.size
        sheet.page.line(sheet.put(rng.choice(["Description", "Item", "Product"]), face=sheet.bold,
                                  room=at - sheet.left - 2 * sheet.size),
                        sheet.put("Qty", at, 1, sheet.bold, room=4 * sheet.size),
                        sheet.put(rng.choice(["Price", "Amount", "Total"]), sheet.right, 1,
                                  sheet.bold))
        if rng.random() < 0.4:
            sheet.box(sheet.left, top, sheet.right, sheet.y + 0.35 * sheet.size, rng.random() < .6)
        sheet.down()
    prices = []
    for good in rng.sample(GOODS, rng.randint(1, 5 * sheet.plenty)):
        if not sheet.has_room(3.2):
            break
        prices.append(amount(rng, 900))
        name = f"{good.title()} {words.word(rng)}" if rng.random() < 0.6 else good.title()
        name = f"{name} {code(rng, 3, 6)}" if rng.random() < 0.25 else name
        if not wide:
            run = sheet.pair(name, money(rng, prices[-1], sign), sheet.right, 1)
        else:
            first = sheet.put(name, room=at - sheet.left - 3 * sheet.size)
            count = sheet.put(str(rng.randint(1, 40)), at, 1, room=3 * sheet.size)
            run = sheet.put(money(rng, prices[-1], sign), sheet.right, 1)
            sheet.page.line(first, count, run)
            sheet.down()
            sheet.ask(rng.choice([f"how many {good} were ordered?", f"how many {good}?",
                                  f"what is the quantity of {good}?"]), count)
        sheet.ask(rng.choice([f"how much is the {good}?", f"what is the price of {good}?"]), run)
    sums(sheet, sum(prices) or amount(rng), sign,
         rng.choice([["Subtotal", "Tax"], ["Subtotal", "VAT"], []]))


def letter(sheet: Sheet) -> None:
    rng = sheet.rng
    if rng.random() < 0.6:
        sheet.ask(rng.choice(["who sent it?", "who is the sender?"]),
                  sheet.write(person(rng) if rng.random() < 0.5 else company(rng)))
        for what in rng.sample([words.street, words.town, phone], rng.randint(0, 2)):
            sheet.write(what(rng))
        sheet.down(0.5)
    sheet.ask(asked(rng, "Date"), sheet.write(date(rng), rng.choice([0, 1, 1])))
    sheet.down(0.3)
    if rng.random() < 0.4:
        subject = words.title(rng, 2, 4)
        sheet.ask(rng.choice(["what is it about?", "what is the subject?"]),
                  sheet.pair(rng.choice(["Subject:", "Re:"]), subject, face=sheet.bold))
    to = person(rng)
    greeting = sheet.write(f"Dear {to},")
    if greeting.text.endswith(","):
        sheet.ask(rng.choice(["who is it addressed to?", "to whom is it written?",
                              "who is the letter to?"]), greeting.text[5:-1])
    for _ in range(rng.randint(1, 3 * sheet.plenty)):
        if not sheet.has_room(4.2):
            break
        bottom, sheet.page.height = sheet.page.height, sheet.page.height - round(
            3 * sheet.leading * sheet.size)                     # room for the signature
        sheet.prose(" ".join(words.sentence(rng) for _ in range(rng.randint(1, 3))))
        sheet.page.height = bottom
        sheet.down(rng.choice([0, 0.5]))
    sheet.write(rng.choice(["Yours sincerely,", "Kind regards,", "Best wishes,", "Sincerely,",
                            "Yours faithfully,", "Regards,"]))
    if not sheet.full:
        sheet.ask(rng.choice(["who signed?", "who signed it?", "who wrote the letter?"]),
                  sheet.write(person(rng)))


def form(sheet: Sheet) -> None:
    rng = sheet.rng
    title = heading(sheet, rng.choice([words.title(rng, 2, 4), "Application Form", "Registration",
                                       "Order form", "Membership", "Claim form"]))
    sheet.ask(rng.choice(["what is the title?", "what is the title of the form?",
                          "what form is it?"]), title)
    labels = rng.sample(FIELDS, rng.randint(3, 10 * sheet.plenty))
    boxed, colon = rng.random() < 0.3, rng.choice(["", ":"])
    column = None if rng.random() < 0.4 and colon else sheet.left + max(
        sheet.width_of(label + ":") for label in labels) + rng.uniform(0.6, 3) * sheet.size
    if column and column > sheet.left + 0.6 * (sheet.right - sheet.left):
        column = None
    for label in labels:
        if sheet.full:
            break
        value = value_for(rng, label)
        y = sheet.y
        run = sheet.pair(label + (colon if column else ":"), value, column)
        if boxed:
            sheet.box(run.x - 0.3 * sheet.size, y - sheet.size, max(
                run.right + 0.3 * sheet.size, sheet.right), y + 0.35 * sheet.size)
        prompt = asked(rng, label)
        if label != "Title":            # the heading's question
            sheet.ask(prompt, run)
        if boxed:
            sheet.down(0.3)
    for choice in rng.sample(words.COMMON, rng.choice([0, 0, 0, 2, 3])):
        if not sheet.full:
            marked = rng.random() < 0.5
            sheet.write(f"[{'x' if marked else ' '}] {choice.title()}")
    if rng.random() < 0.5 and not sheet.full:
        sheet.ask(asked(rng, "Signed by"), sheet.pair("Signed by:", person(rng)))


def table(sheet: Sheet) -> None:
    rng = sheet.rng
    if rng.random() < 0.5:
        sheet.ask("what is the title?", heading(sheet, words.title(rng, 1, 3)))
    width = sheet.right - sheet.left
    n = max(2, min(5, int(width / (5 * sheet.size))))
    n = rng.randint(2, n)
    names = [words.invented(rng).title() if rng.random() < 0.4 else name for name in
             rng.sample([f for f in FIELDS if len(f) < 7], n)]
    stops = [sheet.left + width * (i + 0.15 * (i > 0)) / n for i in range(n)]
    right, room = rng.random() < 0.4, width / n - 0.7 * sheet.size
    ruled, first = rng.random(), sheet.y - sheet.size
    kinds = [rng.choice([money, date, code, words.invented, lambda r: str(r.randint(0, 9999)),
                         lambda r: f"{r.randint(0, 100)}%"]) for _ in range(n)]
    kinds[0] = rng.choice([code, person, words.invented, lambda r: r.choice(GOODS).title(),
                           lambda r: r.choice(words.MONTHS), lambda r: r.choice(words.PLACES)])
    header = sheet.row(names, stops, room, right, sheet.bold)
    if ruled < 0.4:
        sheet.rule()
    named, asks = Counter(), []
    for _ in range(rng.randint(2, 12 * sheet.plenty)):
        if sheet.full:
            break
        cells = sheet.row([kind(rng) for kind in kinds], stops, room, right)
        name = cells[0].text
        named[name] += 1
        if named[name] == 1:
            at = rng.randrange(1, n)
            asks.append((name, rng.choice([f"what is the {header[at].text} of {name}?",
                                           f"what is {header[at].text} for {name}?"]), cells[at]))
    for name, prompt, cell in asks:
        if named[name] == 1:            # a name that stands twice tells neither row
            sheet.ask(prompt, cell)
    if ruled > 0.6:
        end = sheet.y - sheet.size
        sheet.box(sheet.left - 3, first, sheet.right + 3, end)
        for x in stops[1:]:
            sheet.box(x - 0.35 * sheet.size, first, x - 0.35 * sheet.size, end)


def article(sheet: Sheet) -> None:
    rng = sheet.rng
    top = heading(sheet, words.title(rng, 2, 5))
    sheet.ask(rng.choice(["what is the title?", "what is the headline?", "what is the heading?"]),
              top)
    if rng.random() < 0.4:
        author = person(rng)
        sheet.write(f"{rng.choice(['By', 'by'])} {author}")
        sheet.ask(rng.choice(["who wrote it?", "who is the author?"]),
                  sheet.page.runs[-1].text[3:])
    for _ in range(rng.randint(1, 3 * sheet.plenty)):
        if sheet.full:
            return
        if rng.random() < 0.25:
            heading(sheet, words.title(rng, 1, 3), 0)
        mark = rng.random()
        for _ in range(rng.randint(1, 3) if mark < 0.3 else 1):
            lead = rng.choice(["• ", "- ", "* ", "1. "]) if mark < 0.3 else ""
            text = " ".join(words.sentence(rng) for _ in range(rng.randint(1, 4)))
            sheet.prose(lead + text)
        sheet.down(rng.choice([0, 0.5, 0.5]))


def columns(sheet: Sheet) -> None:
    """Two columns: the left one is read first."""
    rng = sheet.rng
    if rng.random() < 0.7:
        sheet.ask("what is the title?", heading(sheet, words.title(rng, 2, 4)))
        sheet.down(0.3)
    gap, top = rng.uniform(0.8, 2.0) * sheet.size, sheet.y
    middle, bottoms = (sheet.left + sheet.right) / 2, []
    for left, right in [(sheet.left, middle - gap / 2), (middle + gap / 2, sheet.right)]:
        sheet.y = top
        text = " ".join(words.sentence(rng, 3, 9) for _ in range(rng.randint(2, 5 * sheet.plenty)))
        sheet.prose(text, left, right)
        bottoms.append(sheet.y)
    sheet.y = max(bottoms)
    if rng.random() < 0.2:
        sheet.box(middle, top - sheet.size, middle, sheet.y - sheet.size)


def screenshot(sheet: Sheet) -> None:
    """A window: a bar with its title, then settings, a list, or a message with two buttons."""
    rng, page = sheet.rng, sheet.page
    title = heading(sheet, words.title(rng, 1, 3), rng.choice([0, 0.5]))
    sheet.box(0, 0, page.width, title.y + 0.5 * sheet.size, True)
    sheet.ask(rng.choice(["what is the title?", "what is the title of the window?"]), title)
    kind = rng.random()
    if kind < 0.4:
        for label in rng.sample(words.COMMON, rng.randint(2, 9)):
            if sheet.full:
                break
            name = f"{label.title()} {rng.choice(words.COMMON)}"
            value = rng.choice(["On", "Off", f"{rng.randint(0, 100)}%", words.clock(rng),
                                words.word(rng).title(), str(rng.randint(1, 4000))])
            run = sheet.pair(name, value, sheet.right, 1)
            sheet.ask(rng.choice([f"what is {name.lower()} set to?", f"what is {name.lower()}?"]),
                      run)
    elif kind < 0.7:
        messages = []
        for _ in range(rng.randint(2, 8)):
            if sheet.full:
                break
            sender, time = person(rng).split()[0], words.clock(rng)
            run = sheet.pair(f"{sender}: {words.sentence(rng, 2, 5)}", time, sheet.right, 1)
            messages.append((sender, run))
        senders = Counter(sender for sender, _ in messages)
        for sender, run in messages:
            if senders[sender] == 1:
                sheet.ask(f"when did {sender} write?", run)
    else:
        sheet.prose(" ".join(words.sentence(rng, 3, 9) for _ in range(rng.randint(1, 3))))
        if not sheet.full:
            sheet.down(0.4)
            names = rng.sample(["OK", "Cancel", "Yes", "No", "Save", "Close", "Retry", "Apply"], 2)
            x = sheet.left + sheet.size
            runs = []
            for name in names:
                runs.append(sheet.put(name, x))
                sheet.box(x - 0.6 * sheet.size, sheet.y - 1.1 * sheet.size,
                          runs[-1].right + 0.6 * sheet.size, sheet.y + 0.5 * sheet.size)
                x = runs[-1].right + 2 * sheet.size
            page.line(*runs)
            sheet.down()


def notes(sheet: Sheet) -> None:
    """Lines of anything, which nobody can guess."""
    rng = sheet.rng
    for _ in range(rng.randint(2, 12 * sheet.plenty)):
        if sheet.full:
            break
        sheet.write(words.anything(rng), rng.choice([0, 0, 0, 0.5, 1]))
        if rng.random() < 0.1 and not sheet.full:
            sheet.down(rng.uniform(0.2, 1))


def snippets(sheet: Sheet) -> None:
    """Short lines at any place. The hardest step is from the end of a line to the next one's start,
    and other pages have few."""
    rng = sheet.rng
    while not sheet.full:
        short = words.anything(rng)[:rng.randint(1, 7)].strip() or "-"
        if rng.random() < 0.3:
            sheet.pair(short, words.some_value(rng)[:rng.randint(1, 7)].strip(), sheet.right, 1)
        else:
            sheet.write(short, rng.choice([0, 0, 0, rng.random()]))
        if rng.random() < 0.2:
            sheet.down(rng.uniform(0.2, 3))


KINDS = {"receipt": receipt, "invoice": invoice, "letter": letter, "form": form, "table": table,
         "article": article, "columns": columns, "screenshot": screenshot, "notes": notes}


def echoes(sheet: Sheet) -> None:
    """A few words again and again: only their places tell which of them comes next."""
    rng = sheet.rng
    few = [words.anything(rng)[:rng.randint(2, 12)].strip() or "-"
           for _ in range(rng.randint(2, 6))]
    while not sheet.full:
        sheet.write(" ".join(rng.choices(few, k=rng.randint(1, 5))), rng.choice([0, 0, 0, 0.5]))


def facts(sheet: Sheet) -> None:
    """Values under labels that nobody can know: whoever is asked for one has to look for it."""
    rng = sheet.rng
    if rng.random() < 0.3:
        heading(sheet, words.title(rng, 1, 3))
    rng.choice([facts_in_lines, facts_in_cells, facts_in_prose, facts_in_table])(sheet)


def labels_alike(rng: random.Random, n: int) -> list[str]:
    """n labels of one or two words. Some share a word: a part of one does not always tell it."""
    heads = [words.word(rng) for _ in range(rng.randint(1, 4))]
    tails = [words.word(rng) for _ in range(rng.randint(2, 4))]
    labels: list[str] = []
    while len(labels) < n:
        label = rng.choice([rng.choice(FIELDS), words.word(rng),
                            f"{words.word(rng)} {rng.choice(tails)}",
                            f"{rng.choice(heads)} {rng.choice(tails)}",
                            f"{rng.choice(tails)} {rng.choice('ABCDE123456789')}"])
        label = rng.choice([label.lower(), label[:1].upper() + label[1:], label.title()])
        if label.isascii() and label.lower() not in [other.lower() for other in labels]:
            labels.append(label)
    return labels


def facts_in_lines(sheet: Sheet) -> None:
    """A label and its value in each line."""
    rng = sheet.rng
    labels = labels_alike(rng, rng.randint(2, 12))
    colon = rng.choice([":", ":", "", " -", " ="])
    x, align = rng.choice([(None, 0.0), (sheet.right, 1.0), (sheet.left + 1.5 * sheet.size + max(
        sheet.width_of(label + colon) for label in labels), 0.0)])
    if x and not align and x > sheet.left + 0.6 * (sheet.right - sheet.left):
        x = None
    for label in labels:
        if sheet.full:
            return
        value, ask = value_and_question(rng, label)
        run = sheet.pair(label + (colon or ":" if x is None else colon), value, x, align)
        sheet.ask(ask, run)


def facts_in_cells(sheet: Sheet) -> None:
    """Labels above their values, in one to three columns, as forms have them. What is under a
    label that was cut is not asked for."""
    rng = sheet.rng
    n = rng.randint(1, 3)
    room = (sheet.right - sheet.left) / n - 0.7 * sheet.size
    labels = labels_alike(rng, rng.randint(1, 5) * n)
    for i in range(0, len(labels), n):
        if not sheet.has_room(2):
            return
        cells = [value_and_question(rng, label) for label in labels[i:i + n]]
        stops = [sheet.left + j * (sheet.right - sheet.left) / n for j in range(n)]
        above = [sheet.put(label, x, face=sheet.bold, room=room)
                 for label, x in zip(labels[i:i + n], stops)]
        sheet.page.line(*above)
        sheet.down()
        below = [sheet.put(value, x, room=room) for (value, _), x in zip(cells, stops)]
        sheet.page.line(*below)
        sheet.down(rng.choice([1, 1.5]))
        for label, shown, (_, ask), run in zip(labels[i:i + n], above, cells, below):
            if shown.text == label:
                sheet.ask(ask, run)


def facts_in_prose(sheet: Sheet) -> None:
    """Sentences, each of which says a thing. What was cut is not asked for."""
    rng = sheet.rng
    said = []
    for label in labels_alike(rng, rng.randint(2, 8)):
        value, ask = value_and_question(rng, label)
        form = rng.choice(["The {} is {}.", "The {} was {}.", "{} has {}.", "As {}, {}.",
                           "{}: {}."])
        said.append((ask, value, form.format(label.lower(), value)))
    sheet.prose(" ".join(sentence for _, _, sentence in said))
    text = " ".join(run.text for run in sheet.page.runs)
    for ask, value, sentence in said:
        if sentence in text:
            sheet.ask(ask, value)


ABOUT_CELLS = ["what is the {column} of {row}?", "what is {column} for {row}?",
               "what is the {column} in {row}?", "what {column} does {row} have?",
               "which {column} has {row}?", "how much is the {column} of {row}?",
               "what stands under {column} for {row}?", "what is the {column} where {row} stands?"]


def facts_in_table(sheet: Sheet) -> None:
    """Rows and columns with names: a cell is found by both of them."""
    rng = sheet.rng
    n = rng.randint(2, max(2, min(5, int((sheet.right - sheet.left) / (4.5 * sheet.size)))))
    names = labels_alike(rng, n)
    stops = [sheet.left + (sheet.right - sheet.left) * j / n for j in range(n)]
    right, room = rng.random() < 0.4, (sheet.right - sheet.left) / n - 0.7 * sheet.size
    header = [run.text for run in sheet.row(names, stops, room, right, sheet.bold)]
    if rng.random() < 0.4:
        sheet.rule()
    makers = [rng.choice([money, date, code, words.clock, words.word, person, words.some_value,
                          lambda r: str(r.randint(0, 9999)), lambda r: f"{r.randint(0, 99)} kg"])
              for _ in range(n - 1)]
    named, shown = rng.random() < 0.3, []               # the rows as they were cut
    for first in labels_alike(rng, rng.randint(2, 10)):
        if sheet.full:
            break
        first = rng.choice(words.FIRST) if named else first
        texts = [first, *[make(rng) for make in makers]]
        shown.append([run.text for run in sheet.row(texts, stops, room, right)])
    by = rng.randrange(n) if rng.random() < 0.4 else 0      # the column that tells the rows apart
    columns = Counter(name.lower() for name in header)
    found = Counter(cell.lower() for cells in shown for cell in cells)
    for cells in shown:
        name = cells[by]
        if found[name.lower()] > 1 or not name:         # a name twice is none
            continue
        if rng.random() < 0.15:
            name = f"{header[by].lower()} {name}"
        for at in range(n):
            if at != by and columns[header[at].lower()] == 1:
                column = rng.choice([header[at], header[at].lower()])
                sheet.ask(rng.choice(ABOUT_CELLS).format(column=column, row=name), cells[at])


# Pages to learn from, which nobody has.
PRACTICE = {"snippets": snippets, "echoes": echoes, "facts": facts}


def legible(page: Page, config: SigLIPConfig) -> bool:
    """Whether its smallest type has 10 pixels in the tiles."""
    rows, columns = choose_grid(page.width, page.height, config.image_size)
    scale = config.image_size / max(page.width / columns, page.height / rows)
    return min(run.size for run in page.runs) * scale >= 10


def write_page(rng: random.Random, kind: str, split: str, config: SigLIPConfig,
               grids: list[tuple[int, int]] = GRIDS, characters: int = 1500,
               lines: int = 10 ** 6, type_size: tuple[float, float] = (11, 20)) -> Page:
    """A page of a kind that fills about one of the grids of tiles, in type that tiles can show.

    characters: the most that is read aloud; a page that has more is written again. lines: after
    which no more are begun; bills, letters and facts may exceed it.
    type_size: of a page of one tile, in its pixels, the least and the most.
    """
    while True:
        rows, columns = rng.choice(grids)
        if kind == "columns" and columns == 1 and (1, 2) in grids:
            columns = 2
        single = rows * columns == 1
        width, height = (config.image_size * columns * (1 if single else rng.uniform(0.8, 1)),
                         config.image_size * rows * (1 if single else rng.uniform(0.8, 1)))
        sheet = Sheet(rng, kind, split, width, height, type_size if single else (12, 24))
        if single:
            fit_one_tile(sheet, config.image_size)
        sheet.most_lines = lines
        (KINDS | PRACTICE)[kind](sheet)
        page = sheet.finish()
        if page.runs and len(page.text) <= characters and legible(page, config):
            return page


def held_out(n: int, seed: int, config: SigLIPConfig) -> list[tuple[Page, str, str]]:
    """n held-out pages of all kinds, half of them of one tile: (page, prompt, answer)."""
    documents = []
    for i in range(n):
        rng = random.Random(f"{seed}/documents/{i}")
        kind = sorted(KINDS)[i % len(KINDS)]
        page = write_page(rng, kind, "held-out", config,
                          [(1, 1)] if i // len(KINDS) % 2 else [g for g in GRIDS if g != (1, 1)])
        ask = page.questions and rng.random() < 0.6
        documents.append((page, *(rng.choice(page.questions) if ask else (READ, page.text))))
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reader.pages", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--draw", type=int, default=20, metavar="N", help="pages (default: %(default)s)")
    add("--seed", type=int, default=0, help="which pages (default: %(default)s)")
    add("folder", type=a_path, help="where the images and questions.jsonl go; made if missing")
    args = parser.parse_args()
    if args.draw < 1:
        parser.error("--draw is at least 1")
    documents = held_out(args.draw, args.seed, SigLIPConfig(image_size=SIDE))
    names = [f"{i:04}-{page.kind}.webp" for i, (page, _, _) in enumerate(documents)]
    files = OwnFiles(args.folder, [*names, "questions.jsonl"])
    files.drop_others()
    rows = []
    for name, (page, prompt, answer) in zip(names, documents):
        image = io.BytesIO()
        page.draw().save(image, "WEBP", quality=90)     # a third of a PNG's size
        files.write(name, image.getvalue())
        rows.append({"image": name, "prompt": prompt, "answer": answer, "kind": page.kind,
                     "text": page.text})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    files.write("questions.jsonl", lines.encode())
    print(f"{len(rows)} pages and questions.jsonl in {args.folder}")


if __name__ == "__main__":
    run_main(main)
