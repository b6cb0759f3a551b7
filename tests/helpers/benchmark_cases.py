"""200 predictions per benchmark that metrics disagree over.

They are right, wrong, and as nearly either as can be. cases(benchmark) is the same list every time.
First come cases written by hand, each for one clause of a definition; the rest are drawn: a gold,
and what a model might have made of it.
"""
import random
import string

N = 200                 # predictions of a benchmark

TEXTS = ["1/8/93", "January 8, 1993", "The Coca-Cola Company", "R. J. Reynolds Tobacco",
         "Dr. Müller", "café au lait", "$1,234.56", "12,500", "0.36", "45%", "P.O. Box 2955",
         "ITC Limited", "yes", "no", "No. 7", "3-5 years", "São Paulo",
         "University of California, San Diego", "11:14 to 11:39 a.m.", "T.F. Riehl", "paul", "Q3",
         "4", "WHO’s “guideline” – draft", "(555) 010-7788", "Naïve Bayes", "cigarettes",
         "Nestlé S.A.", "A", "up to 80", "http://www.example.com/a?b=c", "Cholesterol (mg/100 ml)",
         "east   wing", "Łódź", "2013-14"]


def edited(rng: random.Random, text: str, n: int) -> str:
    """n letters of the text replaced, dropped, doubled, or swapped with the next."""
    for _ in range(n):
        i = rng.randrange(len(text)) if text else 0
        kind = rng.choice("replace replace drop double swap".split())
        new = {"replace": rng.choice(string.ascii_letters), "drop": "", "double": text[i:i + 1] * 2,
               "swap": text[i:i + 2][::-1]}[kind]
        text = text[:i] + new + text[i + (2 if kind == "swap" else 1):]
    return text


def respelled(rng: random.Random, text: str) -> str:
    """The same text with other letters' case, spaces, or ends."""
    return rng.choice([text, text, text.upper(), text.lower(), text.title(), f" {text} ",
                       text.replace(" ", "  "), text + ".", f"{text}\n", f'"{text}"',
                       text.replace(" ", "")])


def row(prediction: str, *answers: str, question: str = "What does it say?",
        split: str | None = None) -> dict:
    return {"prediction": prediction, "answers": list(answers), "question": question,
            "split": split}


def filled(rng: random.Random, n: int, rows: list[dict], draw) -> list[dict]:
    rows = rows + [draw() for _ in range(n - len(rows))]
    rng.shuffle(rows)
    return rows


# -------------------------------------------------------------------------------------------------
# DocVQA, InfoVQA


def anls_cases(rng: random.Random, n: int) -> list[dict]:
    rows = [
        # similarity 0.5, 0.4, 0.5
        row("abcd", "abxy"), row("abxyz", "abcde"), row("abcx", "abyz"),
        row("ABCD", "abXY"), row("ab", "abcd"),                                 # 0.5, 0.5
        # spaces collapse, but lengths are raw:
        row("abc", "ab    d"), row("a   c", "a b"), row("  abcd  ", "abxy"),
        # 2 edits of 7 letters, 1 of 5, 2 of 8
        row("abcd ", "abxyz"), row("a   b", "a b"), row("\tnew\nline ", "new line"), row("", "yes"),
        row("", ""), row("None", "none"), row("none", "no"), row("yes", "no"), row("Yes.", "yes"),
        row("no", "No", "none"), row("A", "a"), row("B", "a"), row(" ", "a"),
        row("The answer is 42", "42"), row("42", "forty-two", "42"),
        row("wrong", "write", "writing", "right", "wring"),
        # an accent makes another letter
        row("cafe", "café"), row("cafe\u0301", "caf\u00e9"), row("2013–14", "2013-14"),
        row("“draft”", '"draft"'), row("12 500", "12,500"), row("12500", "12,500"),
        row("ÉCOLE", "école"), row("ΣΊΣΥΦΟΣ", "σίσυφος"), row("abcdefghij", "abcdeXXXXX"),
        row("abcdefghij", "abcdXXXXXX"),
    ]

    def draw() -> dict:
        golds = rng.sample(TEXTS, rng.choice([1, 1, 1, 2, 3]))
        if rng.random() < 0.3:
            golds.append(golds[0].lower())
        gold = rng.choice(golds)
        prediction = rng.choice([
            lambda: gold, lambda: gold.swapcase(), lambda: respelled(rng, gold),
            lambda: respelled(rng, gold), lambda: edited(rng, gold, rng.choice([1, 2])),
            # about 0.5
            lambda: edited(rng, gold, max(1, len(gold) // 2 + rng.choice([-1, 0, 1]))),
            lambda: gold[:max(1, len(gold) // 2)], lambda: f"{gold} {rng.choice(TEXTS)}",
            lambda: rng.choice(["", "None", "unanswerable", "yes", "no", rng.choice(TEXTS)])])()
        return row(prediction, *golds)

    return filled(rng, n, rows, draw)


# -------------------------------------------------------------------------------------------------
# DeepForm, KLC: the same keys and values in many documents, of which another's must not count.

FORMS = {
    "DeepForm": {"advertiser": ["OBAMA FOR AMERICA", "Friends of José Peña", "Smith/D/Governor",
                                "AFSCME — PEOPLE"],
                 "contract_num": ["1234567", "0012345", "WOC12-345", "None"],
                 "flight_from": ["10/16/12", "2012-10-16", "9/24/20", "None"],
                 "flight_to": ["10/22/12", "2012-10-22", "9/28/20", "None"],
                 "gross_amount": ["$12,500.00", "12500.00", "1,000.00", "250.00"]},
    "KLC": {"address__post_town": ["LONDON", "Stoke-on-Trent", "Bishop’s Stortford", "None"],
            "address__postcode": ["SW1A 1AA", "ST1 5DY", "CM23 2ND", "None"],
            "address__street_line": ["10 Straße Lane", "UNIT 4, 7 MILL ROAD", "St. Mary's Close",
                                     "None"],
            "charity_name": ["The Sick Children's Trust", "Cœur de Lion", "Age UK",
                             "Wells Cathedral School"],
            "charity_number": ["284416", "1078652", "0284416", "None"],
            "income_annually_in_british_pounds": ["10348000.00", "10348000", "0.00", "None"],
            "report_date": ["2016-02-29", "29 February 2016", "2015-12-31", "None"],
            "spending_annually_in_british_pounds": ["9415000.00", "9,415,000.00", "415.00",
                                                    "None"]}}


def form_cases(rng: random.Random, n: int, forms: dict[str, list[str]]) -> list[dict]:
    keys = list(forms)

    def asked(key: str) -> str:
        return f"What is the value for the {key}?"

    first, second = asked(keys[0]), asked(keys[1])
    rows = [
        row("None", "None", question=first), row("None", "Smith", question=first),
        row("Smith", "None", question=first), row("none", "None", question=first),
        row("NONE", "None", question=first), row("none", "Smith", question=second),
        row(" None ", "Smith", question=first), row("None\n", "None", question=second),
        row("None.", "None", question=first), row("", "Smith", question=first),
        row("", "None", question=second), row("smith", "SMITH", question=first),
        # ß in capitals is SS
        row("SMITH", "smith", question=second), row("STRASSE", "Straße", question=first),
        row("straße", "STRASSE", question=second), row("josé", "JOSÉ", question=first),
        row("jose", "JOSÉ", question=first), row(" Smith ", "Smith", question=second),
        row("Smith\n", "Smith", question=first), row("Smith.", "Smith", question=first),
        # right in the other document
        row("left", "right", question=first), row("right", "left", question=first),
        row("left", "right", question=second), row("right", "left", question=second),
        row("Oct 16", "10/16/12", "Oct 16", "16.10.12", question=first),
        row("16.10.12", "10/16/12", "Oct 16", question=first),
        row("12500.00", "$12,500.00", "12,500.00", question=second),
        row("12,500.00", "$12,500.00", "12,500.00", question=second),
        # two documents, not one pair
        row("Smith", "Smith", question=first), row("Smith", "Smith", question=first),
    ]

    def draw() -> dict:
        key = rng.choice(keys)
        gold = rng.choice(forms[key])
        prediction = rng.choice([gold, gold, gold.lower(), gold.upper(), f"{gold} ",
                                 edited(rng, gold, 1), "None", "", rng.choice(forms[key]),
                                 gold.replace(",", ""), gold.replace("-", "–")])
        variants = [gold.replace(" ", "_"),
                    gold.replace(".00", "")] if gold != "None" and rng.random() < 0.3 else []
        return row(prediction, gold, *variants, question=asked(key))

    return filled(rng, n, rows, draw)


# -------------------------------------------------------------------------------------------------
# WTQ, and TableVQABench's vwtq

CELLS = ["2004", "Freeman", "1,234", "Côte d'Ivoire", "12", "0.5", "3:42", "United States (USA)",
         "2001-05-03", "May 3, 2001", "St. Louis", "-7", "1st", "A–B", "100 m", "“Help!”", "Zürich",
         "1998–99", "$5", "7.0"]
LISTS = ["Italy|France", "Italy|France|Spain", "1990|1991", "Ava|Côte|Bo", "3|4|5", "Yes|No"]

DENOTATIONS = [
    row("5", "5.0"), row("5.0000001", "5"), row("5.00001", "5"), row("5e0", "5"), row(" 5 ", "5"),
    row("+5", "5"), row("-5", "5"), row("−5", "-5"), row("0.1", ".10"),
    row("0.3333333", "0.3333338"), row("0.333333", "0.333335"), row("4.9999999", "5"),
    row("5", "4.9999999"), row("-0", "0"), row("1,000", "1000"), row("1000", "1,000"),
    row("1,000", "1,000"), row("5%", "5"), row("$5", "5"), row("5 m", "5"), row("five", "5"),
    row("5.", "5"), row("5", "5."), row("05", "5"), row("nan", "NaN"), row("inf", "Infinity"),
    row("2001-05-03", "2001-5-3"), row("2001-05-03", "May 3, 2001"),
    row("2001–05–03", "2001-05-03"), row("2001–05–03", "2001-5-3"), row("xxxx-05-03", "xx-5-3"),
    row("xx-xx-03", "XX-XX-3"), row("2001-xx-xx", "2001"), row("2001", "2001-XX-XX"),
    row("2001-05-xx", "2001-5-xx"), row("2001-05-xx", "2001-05-03"), row("2001-13-03", "2001-13-3"),
    row("2001-12-32", "2001-12-32"), row("xx-xx-xx", "xx-xx-xx"), row("2001/05/03", "2001-05-03"),
    row("1-2-3", "01-02-03"), row("Cote d'Ivoire", "Côte d’Ivoire"), row("zurich", "ZÜRICH"),
    row("Zu\u0308rich", "Z\u00fcrich"), row("lodz", "Łódź"), row("A-B", "A—B"), row("A - B", "A-B"),
    row('"Help!"', "Help!"), row("Help!", "“Help!”"), row('""Help!""', "Help!"),
    row("'Help!'", "Help!"), row('He said "no"', 'He said "no"'),
    row("United States", "United States (USA)"),
    row("United States (USA) (a) [1]", "united states"), row("(USA)", "USA"), row("(USA)", "(usa)"),
    row("USA(a)", "USA"), row("Paris[2]", "Paris"), row("Paris [note 3]", "Paris"), row("[2]", ""),
    row("[note]", "note"), row("Paris*†", "Paris"), row("C#", "C"), row("Paris [a [b]", "Paris"),
    row("a.", "a"), row("a..", "a."), row("a .", "a"), row("U.S.", "U.S"),
    row("new\n york", "New  York"), row("½", "1⁄2"), row("ﬁfth", "fifth"), row("m²", "m2"),
    row("", "x"), row("", ""), row("None", "none"), row("yes", "Yes"), row("no", "yes"),
    row("True", "true"), row("b|a", "a|b"), row("a|b", "a", "b"), row("b|a", "a", "b"),
    row("a", "a|b"), row("a|b|c", "a|b"), row("a|a", "a"), row("a", "a|A"), row("a|a|b", "a|b"),
    row("a|b", "a|a|b"), row("a, b", "a|b"), row("a,b", "a,b"), row("a | b", "a|b"),
    row("5|5.0", "5"), row("1|2", "2.0|1.0"), row("1|b", "B|1.0"), row("a|", "a"),
    row("a|c", "a|b"), row("a|b", "a|c"), row(r"a\pb", "a|b"), row(r"a\pb", r"a\pb"),
    row(r"new\nyork", "New York"),
]


def denotation_draw(rng: random.Random) -> dict:
    gold = rng.choice(CELLS + CELLS + LISTS)
    parts = gold.split("|")
    prediction = rng.choice([
        lambda: respelled(rng, gold), lambda: gold, lambda: "|".join(rng.sample(parts, len(parts))),
        lambda: "|".join(rng.sample(parts, len(parts))).lower(), lambda: f"{gold} [1]",
        lambda: f"{gold}|{rng.choice(CELLS)}", lambda: edited(rng, gold, 1),
        lambda: edited(rng, gold, 2), lambda: rng.choice(CELLS), lambda: parts[0],
        lambda: ", ".join(parts)])()
    return row(prediction, *(parts if rng.random() < 0.5 else [gold]))


def wtq_cases(rng: random.Random, n: int) -> list[dict]:
    return filled(rng, n, list(DENOTATIONS), lambda: denotation_draw(rng))


# -------------------------------------------------------------------------------------------------
# TabFact


def fact_cases(rng: random.Random, n: int) -> list[dict]:
    rows = [
        row("True", "True"), row("True", "True."), row("True.", "True."), row("True.", "True"),
        row("true", "True"), row("TRUE", "True."), row("False", "False."), row("false", "False."),
        row(" False ", "False."), row("False\n", "False"), row("Yes", "True."), row("No", "False."),
        row("1", "True"), row("0", "False"), row("", "True"), row("None", "False."),
        row("True", "True.."), row("True.", "True.."), row("True False", "True"),
        row("Entailed", "True"), row("Fals", "False"), row("True", " True."), row("True", "True. "),
        row("T rue", "True"), row("“True”", "True"), row("True", "True.\n"),
    ]

    def draw() -> dict:
        gold = rng.choice(["True", "False"])
        prediction = rng.choice([gold, gold, gold, gold, "True", "False", gold.lower(), gold + ".",
                                 f" {gold}", f"{gold}\n"])
        return row(prediction, gold + rng.choice(["", "."]))

    return filled(rng, n, rows, draw)


# -------------------------------------------------------------------------------------------------
# ChartQA


def chart_cases(rng: random.Random, n: int) -> list[dict]:
    pairs = [
        ("105", "100"), ("95", "100"), ("105.0001", "100"), ("94.9999", "100"), ("21", "20"),
        ("19", "20"), ("1.05", "1"), ("0.95", "1"), ("1.06", "1"), ("26.985", "25.7"),
        ("1.6065", "1.53"), ("10.5", "10"), ("9.5", "10"), ("0.105", "0.1"), ("100", "105"),
        ("100", "95"),
        # within 5 % of the larger, not of the smaller
        ("95.5", "100.5"), ("100.5", "95.5"), ("-100", "-104"), ("-100", "100"), ("-105", "-100"),
        ("-106", "-100"), ("5%", "0.05"), ("5", "5%"), ("0.05", "5%"), ("5.2%", "5%"),
        ("5.3%", "5%"), ("5 %", "5%"), ("5%%", "5%"), ("%", "%"), ("500%", "5"),
        ("five percent", "5%"), ("0", "0"), ("0.0", "0"), ("0%", "0"), ("-0", "0"), ("0.01", "0"),
        ("0", "0.01"), ("0", "5"), ("0%", "0%"), ("1,234", "1234"), ("1,234", "1,234"),
        ("1234", "1,234"), ("$5", "5"), ("5 million", "5"), ("5.", "5"), ("+5", "5"), ("5e0", "5"),
        (".5", "0.5"), ("1e2", "100"), (" 42 ", "42"), ("42\n", "42"), ("42", "42 "), ("inf", "5"),
        ("nan", "5"),
        ("2019", "2020"), ("1925", "2020"), ("1918", "2020"),       # years are numbers too
        ("YES", "Yes"), ("No", "Yes"), ("no", "No"), ("Yes.", "Yes"), ("true", "Yes"), ("", "5"),
        ("", "Yes"), ("None", "none"), ("light blue", "Light Blue"), ("light  blue", "light blue"),
        ("cote d'ivoire", "Côte d'Ivoire"), ("ÖSTERREICH", "Österreich"),
        ("[Blue, Red]", "[Blue, Red]"), ("[Red, Blue]", "[Blue, Red]"),
        ("Blue, Red", "[Blue, Red]"), ("2011-12", "2011-12"), ("2011–12", "2011-12"),
        ("3/4", "0.75"), ("three", "3"), ("the US", "US"),
    ]
    rows = [row(p, t, split=rng.choice(["human", "augmented", "augmented"])) for p, t in pairs]
    rows += [row("7", "8", "7.1", split="human"), row("blue", "red", "Blue", split="human"),
             row("0", "1", "0", split="augmented")]

    def draw() -> dict:
        split = rng.choice(["human", "augmented", "augmented"])
        if rng.random() < 0.3:
            gold = rng.choice(["Germany", "Very satisfied", "Yes", "No", "2009", "Côte d'Ivoire",
                               "65+", "Aug '18", "Don't know"])
            prediction = rng.choice([gold, gold.upper(), f"{gold} ", edited(rng, gold, 1), "Yes",
                                     gold + "."])
            return row(prediction, gold, split=split)
        value = rng.choice([3, 14, 23.5, 0.08, 1250, 57.31, 99.9, 0.5, 20])
        factor = rng.choice([1, 1, 1.01, 0.97, 1.0499, 1.0501, 0.9501, 0.9499, 1.05, 0.95, 1.2, -1,
                             100, 0.01])
        p, t = str(round(value * factor, 7)), str(value)
        percent = rng.choice([(p, t), (p, t), (f"{p}%", f"{t}%"), (p, f"{t}%"), (f"{p}%", t),
                              (f"${p}", t)])
        return row(*percent, split=split)

    return filled(rng, n, rows, draw)


# -------------------------------------------------------------------------------------------------
# TextVQA


# The prediction, and the golds with how many of the ten gave each.
VQA = [
    ("coca cola", {"coca-cola": 4, "coke": 6}), ("coca-cola", {"coca cola": 3, "pepsi": 7}),
    ("cocacola", {"coca-cola": 10}), ("coca - cola", {"cocacola": 2, "coca  cola": 8}),
    ("7-up", {"7 up": 1, "7up": 9}), ("7up", {"7 up": 10}), ("1,000", {"1000": 5, "1,000": 5}),
    ("1,000-a", {"1000a": 10}), ("1, 000", {"1000": 10}), ("1, 000", {"1 000": 10}),
    ("a,b", {"a b": 10}), ("b,c", {"b c": 10}), ("b, c", {"b c": 10}), ("b ,c", {"bc": 10}),
    ("the stop", {"stop": 2, "go": 8}), ("A stop sign", {"an stop sign": 3, "x": 7}),
    ("the", {"": 10}), ("a", {"an": 10}), ("two", {"2": 3, "two": 1, "3": 6}),
    ("None", {"0": 1, "zero": 2, "none": 2, "no": 5}), ("ten", {"10": 10}),
    ("eleven", {"11": 10}), ("twenty one", {"twenty 1": 10}), ("2.0", {"2": 10}),
    ("$5.00", {"5.00": 10}), ("$5.00", {"$5.00": 10}), ("3.5", {"3.5": 10}),
    ("3.5.", {"3.5": 10}), (".5", {"5": 10}), ("5.", {"5": 10}), ("u.s.a.", {"usa": 10}),
    ("p.m. 5", {"pm 5": 10}), ("dont walk", {"don't walk": 10}),
    ("don't walk", {"dont walk": 10}), ("don’t walk", {"don't walk": 10}),
    ("couldntve", {"couldn't've": 10}), ("couldnt've", {"couldn't've": 10}),
    ("couldn'tve", {"couldn't've": 10}), ("Im here", {"I'm here": 10}), ("Ive", {"I've": 10}),
    ("Id've", {"I'd've": 10}), ("shes", {"she's": 10}), ("hes", {"he's": 10}),
    ("lets go", {"let's go": 10}), ("oclock", {"o'clock": 10}),
    ("5 oclock", {"five o'clock": 10}), ("yall", {"y'all": 10}),
    ("somebody'd", {"somebodyd": 10}), ("ows'at", {"'ow's'at": 10}),
    ("ow's'at", {"'ow's'at": 10}), ("twas", {"'twas": 10}), ("itll", {"it'll": 10}),
    ("wed", {"we'd": 10}), ("wed've", {"we'd've": 10}), ("youll", {"you'll": 10}),
    ("whats", {"what's": 10}), ("yes", {"yes": 1, "no": 9}), ("yes", {"yes": 2, "no": 8}),
    ("yes", {"yes": 3, "no": 7}), ("yes", {"yes": 4, "no": 6}), ("Yes!", {"yes": 10}),
    ("yes?no", {"yes no": 10}), ("", {"": 1, "x": 9}), ("", {"x": 10}), ("!", {"?": 10}),
    ("new\nyork", {"new york": 10}), ("new\tyork", {"New York": 10}),
    ("  new   york ", {"new york": 10}), ("café", {"cafe": 10}), ("CAFÉ", {"café": 10}),
    ("a.b@c.d", {"ab c d": 10}), ("a.b@c.d", {"ab cd": 10}), ('"exit"', {"exit": 10}),
    ("and/or", {"and or": 10}), ("(exit)", {"exit": 10}), ("one way", {"1 way": 10}),
    ("one-way", {"1 way": 10}), ("one-way", {"one way": 3, "x": 7}), ("no-one", {"no 1": 10}),
    ("50%", {"50": 10}), ("50%", {"50%": 10}), ("#1", {"1": 10}), ("10:30", {"10:30": 10}),
    ("c++", {"c": 10}), ("stop", {"stop": 1}), ("stop", {"stop": 2, "go": 1}),
    ("stop", {"stop": 3}), ("stop", {"stop": 5}),
]


def vqa_cases(rng: random.Random, n: int) -> list[dict]:
    rows = []
    for prediction, counts in VQA:
        golds = [gold for gold, n in counts.items() for _ in range(n)]
        rows.append(row(prediction, *rng.sample(golds, len(golds))))
    signs = ["stop", "nokia", "coca-cola", "the new york times", "1,000", "7:45", "don't walk",
             "dakota digital", "two", "ice cream", "st. james", "no", "yes", "50%",
             "simon & schuster", "l'oréal", "exit 5", "one way"]

    def draw() -> dict:
        gold, other = rng.sample(signs, 2)
        n = rng.choice([1, 2, 3, 4, 5, 8, 10])
        spellings = [gold, gold, gold.upper(), gold + ".", gold.replace("-", " ")]
        golds = [rng.choice(spellings) for _ in range(n)]
        golds += [rng.choice([other, other.title(), "unanswerable"]) for _ in range(10 - n)]
        prediction = rng.choice([gold, gold, respelled(rng, gold), respelled(rng, gold),
                                 gold.replace("'", ""), f"the {gold}", other, edited(rng, gold, 1),
                                 "unanswerable"])
        return row(prediction, *rng.sample(golds, 10))

    return filled(rng, n, rows, draw)


# -------------------------------------------------------------------------------------------------
# TableVQABench: unequal splits, so that the mean of the splits is not the mean of the rows


def table_cases(rng: random.Random, n: int) -> list[dict]:
    verdicts = [
        ("True", "1"), ("true", "0"), ("False", "0"), ("FALSE.", "0"), ("False", "1"),
        ("True", "0"), ("The statement is true.", "1"), ("True or False", "1"),
        ("True, not false", "0"), ("yes", "1"), ("no", "0"), ("1", "1"), ("0", "0"), ("", "0"),
        ("None", "0"), ("Answer: True", "1"), ("untrue", "1"), ("not true", "0"),
        ("falsehood", "0"), ("Tru e", "1"), ("T", "1")
    ]
    money = [
        ("$3,852 million", "$3,852 million"), ("3852 million", "$3,852 million"),
        ("3,852", "$3,852 million"), ("3852000000", "$3,852 million"),
        ("$3.852 billion", "$3,852 million"), ("$3,852 thousand", "$3,852 million"),
        ("3,853", "$3,852 million"), ("$ 3,852", "$3,852"), ("34.2%", "34.2%"), ("34.2", "34.2%"),
        ("0.342", "34.2%"), ("34.2 %", "34.2%"), ("34.2 percent", "34.2%"), ("34", "34.2%"),
        ("(123)", "123"), ("$(123)", "(123)"), ("-123", "(123)"), ("−123", "-123"),
        ("net (123)", "net"), ("123 (456)", "123"), ("5 years", "5"), ("5 year", "5 years"),
        ("5 gallons", "5"), ("5 gallon", "5"), ("1,000 square feet", "1000"), ("10 miles", "10"),
        ("12 shares", "12"), ("5 million dollars", "$5 million"), ("5 dollars", "$5"),
        ("5 units", "5 unit"), ("7 MMBtu", "7"), ("7 Mboe", "7"), ("October 31", "october 31."),
        ("October 31st", "October 31"), ("October 31, 2004", "October 31 2004"), ("2004", "2,004"),
        ("2004.0", "2004"), ("", "0"), ("None", "none"), ("5million", "5000000"),
        ("million", "million"), ("five million", "five"), ("€5", "5"), ("5[1]", "5"),
        ("Société Générale", "societe generale"), ("“Level 3”", "level 3"), ("1.50", "$1.5"),
        ("1.5 thousand", "1,500"), ("0%", "0"), ("10%", "0.1"), ("1e3", "1 thousand"),
        ("nan", "nan"), ("A–B", "a-b")
    ]
    rows = [row(p, t, split="vtabfact") for p,
            t in verdicts] + [row(p, t, split="fintabnetqa") for p, t in money]
    vwtq = [
        ("a||b", "a|b"), ("b||a", "a|b"), ("a||b||c", "a|b"), ("a|b", "a|b"), ("a || b", "a|b"),
        ("a, b", "a|b"), ("Answer: 2004", "2004"), ("Answer: a||b", "b|a"),
        ("answer: 2004", "2004"), ("2004.", "2004"), ("2004.0", "2004"), ("freeman", "Freeman"),
        ("", "x"), ("5 wins", "5")
    ]
    rows += [row(p, t, split=rng.choice(["vwtq", "vwtq_syn"])) for p, t in vwtq]

    def draw() -> dict:
        if rng.random() < 0.2:
            gold = rng.choice("01")
            said = rng.choice(["True", "False", "true.", "It is false.",
                               ["False", "True"][int(gold)]])
            return row(said, gold, split="vtabfact")
        drawn = denotation_draw(rng)
        # as VLMEvalKit's table holds them
        answers = ["|".join(drawn["answers"])]
        return {**drawn, "prediction": drawn["prediction"].replace("|", "||"), "answers": answers,
                "split": rng.choice(["vwtq", "vwtq", "vwtq_syn"])}

    return filled(rng, n, rows, draw)


# -------------------------------------------------------------------------------------------------
# VCR: blanks are runs of five words, in the easy split's and the hard split's texts alike

BLANKS = ["the old town hall was", "river that flows through the", "is a species of beetle",
          "served as the first mayor", "built in the late medieval", "a small village in northern",
          "and the church of Saint", "who won the silver medal", "known for its café culture",
          "was designed by an architect", "of the U.S. state of", "in the southern part of",
          "the largest city of the", "the the of of the", "members of the same family"]


def blank_cases(rng: random.Random, n: int) -> list[dict]:
    gold, other = "the old town hall was", "is a species of beetle"
    rows = [row(p, gold) for p in [
        "the old town hall was", "The old town hall was", "the old town hall",
        "the old town hall was built", "old town hall was the", "the old town hall, was",
        "the old town hall was.", "“the old town hall was”", "(the old town hall was)",
        "the old-town hall was", "the old town hall were", "the olde town hall was",
        "was hall town old the", "the the old town hall was was", "theold town hall was",
        "the new town hall was or the old town hall was",
        "the old town hall is, the old town hall was", "hall", "the", "", "None",
        "nothing of it is right here", "the old town hall isn't", "the old town's hall was",
        "the covered text is: the old town hall was", "I can't read it",
        "Sorry, it says the old town hall was", "I cannot be sure: the old town hall was", "sorry",
        "Assistant: the old town hall was", "the old town hall was Assistant: a species",
        "the old town hall w", "1. the old town hall was", "THE OLD TOWN HALL WAS",
        "the old town hall was, is a species of beetle", "the old town hall/was",
        "the old town hallwas"]]
    rows += [row(p, gold, other) for p in [
        f"{gold}, {other}", f"{other}, {gold}", f"{gold}\n{other}", f"1. {gold}\n2. {other}", gold,
        other, f"{gold} {other}", f"{gold}; is a specie of beetle", f"{gold}, {other[:-4]}",
        f'"{gold}" and "{other}"', "the old is a species of beetle town hall was"]]
    rows += [row(gold, gold, gold), row("the of the of the", "the the of of the")]

    def broken(text: str) -> str:
        words = text.split()
        i = rng.randrange(len(words))
        changed = [words[:i] + words[i + 1:], words[:i] + ["very"] + words[i:],
                   words[:i + 1] + words[i:],
                   words[:i] + [edited(rng, words[i], 1)] + words[i + 1:],
                   rng.sample(words, len(words))]
        return rng.choice([*map(" ".join, changed), text[:rng.randrange(len(text))],
                           text.replace("é", "e"), text.upper(), rng.choice(BLANKS)])

    def draw() -> dict:
        golds = rng.sample(BLANKS, rng.choice([1, 2, 2, 3, 4]))
        said = [text if rng.random() < 0.6 else broken(text) for text in golds]
        if rng.random() < 0.2:
            said = rng.sample(said, len(said))
        else:
            said = said[:rng.choice([len(said)] * 3 + [1])]
        between = rng.choice([", ", ", ", "\n", "; ", " ", " and "])
        return row(between.join(said) + rng.choice(["", "."]), *golds)

    return filled(rng, n, rows, draw)


# -------------------------------------------------------------------------------------------------


DRAWN = {"DocVQA": anls_cases, "InfoVQA": anls_cases, "WTQ": wtq_cases, "TabFact": fact_cases,
         "ChartQA": chart_cases, "TextVQA": vqa_cases, "TableVQABench": table_cases,
         "VCR-easy": blank_cases, "VCR-hard": blank_cases}


ODD_ENDS = [". . .", "..", "\n", "\t", " \u00a0", "\u200b", "%", " %", "[1]", " (x)", "'s", "n't",
            "e3", " million", "ß", "İ", "①", "\u0301", "\\p", "\\n", "\\\\", "||", "|", "-xx-xx",
            "!?", " ,", ",5", ".5", "1st", "AT&T", " a.", "🙂", "_1", "٣", "I cannot", "抱歉",
            "\x1c", "."]
ODD_TEXTS = ["a.b." * 20, "x. " * 40, "9" * 30, "1" * 400, "1_000", "0x10", "1e400", "1e-7", " ",
             "\n", "ß" * 9, "['a', 'b']", "[]", "Infinity", "-0.0", "２０", "½", "a, the",
             "2004-xx-xx", "99999999999999999999-xx-xx", "None", "Answer: ", "Answer: Answer: 1",
             "%", "%%", "||", "'"]


def odd(rng: random.Random, text: str) -> str:
    """The text with something at an end or within, or one that programs trip over."""
    end = rng.choice(ODD_ENDS)
    i = rng.randrange(len(text) + 1)
    return rng.choice([text + end, end + text, text[:i] + end + text[i:], text.replace(" ", "  "),
                       text.replace(" ", "\n"), rng.choice(ODD_TEXTS)])


def cases(name: str, n: int = N) -> list[dict]:
    """The benchmark's n rows: dicts of prediction, answers, question and split.

    That is what metrics_again.SCORES takes. Of more than N rows a third is made odd.
    """
    rng = random.Random(name)
    rows = form_cases(rng, n, FORMS[name]) if name in FORMS else DRAWN[name](rng, n)
    rows = [dict(row) for row in rows]
    for row in rows if n > N else []:
        if rng.random() < 0.3:
            row["prediction"] = odd(rng, row["prediction"])
        if rng.random() < 0.1 and row["split"] != "vtabfact":
            i = rng.randrange(len(row["answers"]))
            changed = odd(rng, row["answers"][i])
            row["answers"] = [*row["answers"][:i], changed, *row["answers"][i + 1:]]
    return rows
