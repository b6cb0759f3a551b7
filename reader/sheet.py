"""A page being written, and how people ask for what stands on it."""
import bisect
import random
from collections.abc import Callable

from reader import words
from reader.drawing import SMALL_SIDE, Page, Run, choose_face, colours, wear
from reader.fonts import Face, faces
from reader.words import date, email, money, person, phone


class Sheet:
    """A page being written, from top to bottom. `unit`: pixels of the page for one of a tile."""

    def __init__(self, rng: random.Random, kind: str, split: str, width: float, height: float,
                 type_size: tuple[float, float]):
        self.rng = rng
        self.unit = rng.choice([1.0, 1.0, rng.uniform(0.7, 1.0), *[rng.uniform(1.0, 2.4)] * 3])
        paper, self.ink = colours(rng)
        self.page = Page(kind, round(width * self.unit), round(height * self.unit), paper)
        self.page.oversample = 2 if self.unit < 1.4 and rng.random() < 0.5 else 1
        self.face = choose_face(rng, split)
        self.bold = bold_of(self.face) if rng.random() < 0.7 else choose_face(rng, split)
        room = (width * height) ** 0.5 / SMALL_SIDE
        low, high = type_size
        self.size = rng.triangular(low, high, low + (high - low) * 0.3) * self.unit
        self.margin = rng.uniform(0.3, 2.0 if room > 1 else 0.8) * self.size
        self.left, self.right = self.margin, self.page.width - self.margin
        self.leading = rng.uniform(1.15, 1.7)
        self.most_lines = 10 ** 6
        # How many times as much as on a small page may stand on it.
        self.plenty = min(4, max(1, round(room * rng.choice([0.4, 0.7, 1.0]))))
        self.y = self.margin + self.size

    @property
    def full(self) -> bool:
        """Whether no other line fits."""
        bottom = self.page.height - self.margin - 0.3 * self.size
        return len(self.page.lines) >= self.most_lines or self.y > bottom

    def has_room(self, lines: float) -> bool:
        """Whether so many lines fit below this one."""
        return self.y < self.page.height - self.margin - (lines + 0.3) * self.leading * self.size

    def down(self, lines: float = 1.0) -> None:
        self.y += lines * self.leading * self.size

    def width_of(self, text: str, face: Face | None = None, size: float | None = None) -> float:
        return self.page.set(text, face or self.face, size or self.size)[1][-1]

    def fit(self, text: str, room: float, face: Face | None = None,
            size: float | None = None) -> str:
        """As much of a text as has room: whole words, or of one word its start."""
        ends = [i for i, c in enumerate(text) if c == " "] + [len(text)]        # of its words
        n = bisect.bisect_right(ends, room, key=lambda end: self.width_of(text[:end], face, size))
        text = text[:ends[max(n, 1) - 1]]
        while len(text) > 1 and self.width_of(text, face, size) > room:
            text = text[:-1]
        return text

    def put(self, text: str, x: float | None = None, align: float = 0.0, face: Face | None = None,
            size: float | None = None, room: float | None = None) -> Run:
        """A text in the current line; what finds no room up to the margin is cut."""
        x = self.left if x is None else x
        if room is None:
            before, behind = x - self.left, self.right - x
            room = {0: behind, 1: before}.get(align, 2 * min(before, behind))
        text = self.fit(text, room, face, size)
        return self.page.put(text, x, self.y, face or self.face, size or self.size, self.ink, align)

    def write(self, text: str, align: float = 0.0, face: Face | None = None,
              size: float | None = None) -> Run:
        """A line by itself."""
        x = self.left + align * (self.right - self.left)
        if size and size > self.size:
            self.y += 0.8 * (size - self.size)
        run = self.put(text, x, align, face, size)
        self.page.line(run)
        self.down(max(1.0, 0.85 * (size or 0) / self.size))
        return run

    def pair(self, label: str, value: str, x: float | None = None, align: float = 0.0,
             face: Face | None = None) -> Run:
        """A label at the left and its value at x, in one line of the text."""
        room = None if x is None else max(self.size, x - self.left - 0.5 * self.size)
        if align == 1:
            room = max(2 * self.size, x - self.left - self.width_of(value, face) - self.size)
        first = self.put(label, face=face, room=room)
        second = self.put(value, first.right + 0.35 * self.size if x is None else x, align, face)
        self.page.line(first, second)
        self.down()
        return second

    def row(self, texts: list[str], stops: list[float], room: float, right: bool,
            face: Face | None = None) -> list[Run]:
        """A table's row: a text at each stop, `room` wide at most. right: all but the first end
        where their column does."""
        runs = [self.put(text, x + (room if right and i else 0), float(right and i > 0), face,
                         room=room) for i, (text, x) in enumerate(zip(texts, stops))]
        self.page.line(*runs)
        self.down()
        return runs

    def prose(self, text: str, left: float | None = None, right: float | None = None) -> None:
        """A paragraph, broken into lines, as far as there is room."""
        left, right = left or self.left, right or self.right
        rest = text.split()
        while rest and not self.full:
            line = self.fit(" ".join(rest), right - left)
            n = line.count(" ") + 1
            if line.split()[-1] != rest[n - 1]:             # a word longer than the column
                rest[n - 1] = line.split()[-1]
            rest = rest[n:]
            run = self.put(line, left, room=right - left)
            self.page.line(run)
            self.down()

    def rule(self) -> None:
        """A line across the page, where the next line of print would have its middle."""
        y, thin = self.y - 0.3 * self.size, self.rng.choice([1, 1, 2]) * max(1, self.unit)
        self.page.shapes.append(((self.left, y, self.right, y + thin - 1), self.ink, None, 0))
        self.down(0.7)

    def box(self, left: float, top: float, right: float, bottom: float,
            filled: bool = False) -> None:
        """A frame, or a band of a colour near the paper's."""
        near = tuple((8 * p + i) // 9 for p, i in zip(self.page.paper, self.ink))
        fill, outline = (near, None) if filled else (None, self.ink)
        self.page.shapes.append(((left, top, right, bottom), fill, outline, max(1, self.unit)))

    def ask(self, prompt: str, run: Run | str) -> None:
        """A question with its answer, unless it has been asked."""
        answer = run if isinstance(run, str) else run.text
        if answer and prompt not in dict(self.page.questions):
            self.page.questions.append((prompt, answer))

    def finish(self) -> Page:
        """The page, mostly cut below its last line, as screenshots and receipts are."""
        page, end = self.page, round(self.y - self.size + self.margin)
        if end < page.height and self.rng.random() < 0.8:
            page.height = max(end, page.height // 5)
        page.degrees = self.rng.uniform(-1.5, 1.5) if self.rng.random() < 0.12 else 0.0
        page.wear = wear(self.rng, 0.35, self.unit)
        return page


def fit_one_tile(sheet: Sheet, side: int) -> None:
    """Make the page about as large as a tile: a larger one is cut into several, and a smaller one
    is scaled up to it, as people's screenshots are."""
    page, rng = sheet.page, sheet.rng
    unit = rng.choice([1.0, 1.0, rng.uniform(0.6, 1.0), rng.uniform(1.0, 1.05)])
    unit = max(unit, min(1.0, 9 * sheet.unit / sheet.size))         # no type of less than 9 pixels
    for name in ("size", "margin", "left", "y"):
        setattr(sheet, name, getattr(sheet, name) / sheet.unit * unit)
    page.width = page.height = round(side * unit)
    sheet.right, sheet.unit = page.width - sheet.margin, unit
    page.oversample = rng.choice([1, 2, 3])


def bold_of(face: Face) -> Face:
    """The bold face of the same family, or the face itself."""
    for other in faces(face.split):
        if other.family == face.family and other.style.lower() in ("bold", "demi", "semibold"):
            return other
    return face


# How people ask for what stands behind a label.
ASKED = {
    "Total": ["what is the total?", "how much is the total?", "what is the total amount?",
              "how much is it in total?"],
    "Amount due": ["how much is due?", "what is the amount due?"],
    "Due": ["when is it due?", "what is the due date?"],
    "Due date": ["when is it due?", "what is the due date?"],
    "Date": ["what is the date?", "when was it written?", "what date is on it?"],
    "Invoice date": ["when was it issued?", "what is the invoice date?"],
    "Signed by": ["who signed?", "who signed it?"],
    "Invoice No.": ["what is the invoice number?", "which invoice is it?"],
    "Order No.": ["what is the order number?"],
    "Phone": ["what is the phone number?", "what is the phone?"],
    "Email": ["what is the email address?", "what is the email?"],
    "Name": ["what is the name?", "whose name is on it?"],
    "Customer": ["who is the customer?"],
    "Bill to": ["who is billed?", "who is it billed to?", "who gets the bill?"],
    "Cashier": ["who was the cashier?"],
    "Born": ["when was the person born?", "what is the date of birth?"],
    "Address": ["what is the address?"],
    "City": ["which city is it?", "what is the city?"],
    "Subtotal": ["what is the subtotal?"],
    "Tax": ["how much is the tax?", "what is the tax?"],
    "VAT": ["how much is the VAT?", "what is the VAT?"],
    "Cash": ["how much was paid in cash?"],
    "Change": ["how much is the change?", "what is the change?"],
    "Shipping": ["how much is shipping?"],
    "Discount": ["how much is the discount?"],
}


def asked(rng: random.Random, label: str) -> str:
    """A question for what stands behind a label."""
    if label in ASKED:
        return rng.choice(ASKED[label])
    label = label.strip(" .#")
    return f"what is the {label.lower()}?" if rng.random() < 0.7 else f"what is {label}?"


def value_for(rng: random.Random, label: str) -> str:
    """What a form has behind a label."""
    kinds: dict[str, Callable] = {
        "Name": person, "Customer": person, "Signed": person, "Address": words.street, "City":
        lambda r: r.choice(words.PLACES), "Phone": phone, "Email": email, "Total": money,
        "Subtotal": money, "Tax": money, "VAT": money, "Due": date, "Balance": money,
        "Amount": money, "Price": money, "Discount": money, "Shipping": money, "Date": date,
        "Born": date, "Issued": date, "Expires": date, "Paid": date}
    if label in kinds and rng.random() < 0.85:
        return kinds[label](rng)
    return words.some_value(rng)


def value_and_question(rng: random.Random, label: str) -> tuple[str, str]:
    """A value of any kind for a label, and a question that asks for it."""
    label = label if rng.random() < 0.3 else label.lower()
    make, asks = rng.choice([
        (date, ["when is the {}?", "when was the {}?", "what is the date of the {}?"]),
        (money, ["how much is the {}?", "how much is {}?", "how much was paid for {}?"]),
        (person, ["who is the {}?", "whose is the {}?"]),
        (lambda r: r.choice(words.PLACES), ["where is the {}?", "which {} is it?"]),
        (lambda r: str(r.randint(0, 200)), ["how many {}?", "how many {} are there?"]),
        *[(words.some_value, ["which {} is it?"])] * 3])
    return make(rng), rng.choice([*asks, "what is the {}?", "what is {}?", "what is given as {}?",
                                  "what does it say for {}?"]).format(label)
