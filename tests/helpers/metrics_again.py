"""The benchmarks' metrics once more, written from their definitions without a look at the first.

Two people who read one definition differently both believe that they are right: only a second
reading shows it. test_metrics_again.py compares paper/metrics.py and this file on
benchmark_cases.py. This one is table-driven and reads its rows' fields by name; speed is no aim.

SCORES[benchmark](rows) -> {"score": headline in [0, 1], ...}; a row is a dict with
    prediction  str
    answers     list[str]: the golds. Alternatives, except: WTQ and vwtq, the items of one list
                (also "a|b" in one string); VCR, the blanks' texts in order
    question    str: the key in DeepForm and KLC
    split       str or None
"""
import difflib
import math
import re
import unicodedata
from collections import defaultdict

import numpy as np


def mean(values) -> float:
    return float(np.mean(list(values)))


# -------------------------------------------------------------------------------------------------
# DocVQA, InfoVQA: average normalised Levenshtein similarity (Biten et al. 2019, equation 1;
# VLMEvalKit's vqa_eval.py)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein, a row of the table at a time; b is along the row."""
    column = np.arange(len(b) + 1)                                          # (len(b) + 1,)
    letters = np.array([ord(c) for c in b], dtype=np.int64)                 # (len(b),)
    row = column.copy()
    for i, c in enumerate(a, 1):
        above = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (letters != ord(c)))])
        # an insertion costs 1 a step to the right: min over k <= j of above[k] + (j - k)
        row = np.minimum.accumulate(above - column) + column                # (len(b) + 1,)
    return int(row[-1])


def anls_of(row: dict) -> float:
    def distance(gold: str) -> float:
        # raw, not the collapsed text, and in capitals
        longest = max(len(gold.upper()), len(row["prediction"].upper()))
        texts = (" ".join(text.lower().split()) for text in (gold, row["prediction"]))
        return edit_distance(*texts) / longest if longest else 0.0

    similarity = 1 - min(map(distance, row["answers"]))
    return similarity if similarity >= 0.5 else 0.0


# -------------------------------------------------------------------------------------------------
# ChartQA: relaxed accuracy (Masry et al. 2022, section 5.1; pix2struct's metrics.py, which
# VLMEvalKit took over)


def chart_number(text: str) -> float | None:
    scale = 100.0 if text.endswith("%") else 1.0
    try:
        return float(text.rstrip("%") if scale > 1 else text) / scale
    except ValueError:
        return None


def relaxed_of(row: dict) -> float:
    prediction = row["prediction"].strip()
    p = chart_number(prediction)

    def right(gold: str) -> bool:
        t = chart_number(gold)
        if p is None or not t:      # no number, or 0, of which no part can be taken
            return prediction.lower() == gold.lower()
        # in this order: 26.985 is a rounding error too far from 25.7
        return abs(p - t) / abs(t) <= 0.05

    return float(any(map(right, row["answers"])))


# -------------------------------------------------------------------------------------------------
# TextVQA: VQA accuracy (the official evaluation's normalisation, on golds and predictions alike as
# in VLMEvalKit)

PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
DIGITS = enumerate("zero one two three four five six seven eight nine ten".split())
NUMBERS = {"none": "0", **{word: str(n) for n, word in DIGITS}}
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've""".split()
# A word that lacks one of its apostrophes gets it back. (The official table also turns one the
# other way round.)
APOSTROPHES = {"somebody'd": "somebodyd"}
for contraction in CONTRACTIONS:
    for place, sign in enumerate(contraction):
        if sign == "'":
            APOSTROPHES[contraction[:place] + contraction[place + 1:]] = contraction


def vqa_words(text: str) -> list[str]:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    # A sign that touches a space, or any sign beside a number like 1,000, goes; others leave a
    # space.
    thousands = re.search(r"\d,\d", text)
    becomes = {}
    for sign in PUNCTUATION:
        goes = thousands or f"{sign} " in text or f" {sign}" in text
        becomes[sign] = "" if goes else " "
    text = text.translate(str.maketrans(becomes))
    # the official code passes a flag, 32, where the count belongs
    text = re.sub(r"(?<!\d)\.(?!\d)", "", text, count=32)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return [APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the")]


def vqa_of(row: dict) -> float:
    prediction = vqa_words(row["prediction"])
    hits = np.array([vqa_words(gold) == prediction for gold in row["answers"]])     # (golds,)
    others = hits.sum() - hits              # of each gold: how many others agree
    return float(np.minimum(1, others / 3).mean())


# -------------------------------------------------------------------------------------------------
# WTQ, and the vwtq splits: do two lists denote the same values? (Pasupat and Liang 2015;
# WikiTableQuestions' evaluator.py)

SAME = str.maketrans({**dict.fromkeys("‘’´`", "'"), **dict.fromkeys("“”", '"'),
                      **dict.fromkeys("‐‑‒–—−", "-")})
NOTES = re.compile(r"((?<!^)\[[^\]]*\]|\[\d+\]|[•♦†‡*#+])*")        # citations, at the end
DETAILS = re.compile(r"(?<!^)( \([^)]*\))*")                        # parentheses, at the end


def without_end(pattern: re.Pattern, text: str) -> str:
    """The text without the longest end that is all of the pattern."""
    return next((text[:i] for i in range(len(text)) if pattern.fullmatch(text, i)), text)


def plain(text: str) -> str:
    letters = [c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn"]
    text = "".join(letters).translate(SAME)
    before = None
    while text != before:
        before = text
        text = without_end(NOTES, text.strip())
        text = without_end(DETAILS, text.strip()).strip()
        if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
            text = text[1:-1]
    return " ".join(text.removesuffix(".").lower().split())


def number(text: str) -> int | float | None:
    for kind in int, float:
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return None


def date(text: str) -> tuple[int, int, int] | None:
    """year-month-day, an x for what is unknown; None if it is none."""
    parts = text.lower().split("-")
    unknown = [("xx", "xxxx"), ("xx",), ("xx",)]
    try:
        year, month, day = (-1 if part in x else int(part)
                            for part, x in zip(parts, unknown, strict=True))
    except ValueError:
        return None
    if (year, month, day) == (-1, -1, -1):
        return None
    if month not in (-1, *range(1, 13)) or day not in (-1, *range(1, 32)):
        return None
    return year, month, day


def denoted(text: str) -> tuple:
    """What a text denotes: a hashable that is equal where the evaluator's values are."""
    amount, ymd = number(text), date(text)
    if amount is None and ymd and ymd[1:] == (-1, -1):
        amount = ymd[0]             # a date of a year alone
    if amount is not None:
        # int() cuts towards 0: 4.9999999 becomes 4 in the evaluator, hence here
        return "number", int(amount) if abs(amount - round(amount)) < 1e-6 else amount
    return ("date", ymd) if ymd else ("text", plain(text))


def items(text: str) -> dict[tuple, str]:
    """The distinct values of a list "a|b|c": {what it denotes: its first spelling, normalised}."""
    values = {}
    for item in text.split("|"):
        item = item.replace(r"\n", "\n").replace(r"\p", "|").replace("\\\\", "\\")
        values.setdefault(denoted(item), plain(item))
    return values


def denotation_of(row: dict) -> float:
    predicted, gold = items(row["prediction"]), items("|".join(row["answers"]))

    def same(t: tuple, spelled: str) -> bool:
        if spelled in predicted.values() or t[0] == "date" and t in predicted:
            return True
        if t[0] != "number":
            return False
        return any(kind == "number" and abs(value - t[1]) < 1e-6 for kind, value in predicted)

    if len(predicted) != len(gold):
        return 0.0
    return float(all(same(t, spelled) for t, spelled in gold.items()))


# -------------------------------------------------------------------------------------------------
# TableVQABench's own two (naver-ai/tablevqabench, evaluate_tablevqa_dataset.py)

UNITS = (r"\b(dollar|gallons|square feet|shares|mbtu|mbpd|mbbls|mmbtu|unit|gwh|year|mmcf|mile|mboe)"
         r"s?\b")
POWERS = [(r" ?\bthousand\b", "e3"), (r" ?\bmillion\b", "e6"), (r" ?\bbillion\b", "e9"),
          (r" ?%", "e-2")]


def amounts(text: str) -> tuple[float | str, float | str]:
    """The text as a number, with its power of ten and without; twice a text where it is none."""
    text = re.sub(UNITS, "", re.sub(r"[$(),]", "", plain(text)))
    bare = text
    for pattern, power in POWERS:
        text, bare = re.sub(pattern, power, text), re.sub(pattern, "", bare)
    try:
        return float(text), float(bare)
    except ValueError:
        return text, bare


def financial_of(row: dict) -> float:
    predicted = amounts(row["prediction"])
    return float(any(p == t for gold in row["answers"] for p in predicted for t in amounts(gold)))


def verdict_of(row: dict) -> float:
    """The golds are "1" and "0"; a prediction with both words, or neither, is wrong."""
    words = {"true": "1", "false": "0"}
    said = {gold for word, gold in words.items() if word in row["prediction"].lower()}
    return float(len(said) == 1 and said <= set(row["answers"]))


SPLITS = {"vtabfact": verdict_of, "vwtq": denotation_of, "vwtq_syn": denotation_of,
          "fintabnetqa": financial_of}


def table_vqa_of(row: dict) -> float:
    prediction = row["prediction"].removeprefix("Answer: ")         # VLMEvalKit does
    if row["split"].startswith("vwtq"):
        prediction = prediction.replace("||", "|")                  # its prompt asks for ||
    return SPLITS[row["split"]]({**row, "prediction": prediction})


# -------------------------------------------------------------------------------------------------
# TabFact; DeepForm and KLC (DocOwl 1.5's evaluation: benchmarks_eval.py, due_benchmarks_eval.py,
# fscorer.py)


def one_line(text: str) -> str:
    return text.replace("\n", "").strip()


def exact_of(row: dict) -> float:
    golds = [one_line(gold).removesuffix(".") for gold in row["answers"]]
    return float(one_line(row["prediction"]) in golds)


def micro_f1(rows: list[dict]) -> dict[str, float]:
    """F1 over all (key, value) of all documents.

    A row is one key of one document, so a value counts only against its own row's golds. An answer
    "None", predicted or gold, says that the document has no such key: it is no pair.
    """
    predicted = gold = right = 0
    for row in rows:
        value = one_line(row["prediction"])
        # spellings of one value
        golds = {answer.upper() for answer in row["answers"] if answer != "None"}
        predicted += value != "None"
        gold += bool(golds)
        right += value != "None" and value.upper() in golds
    return {"score": 2 * right / (predicted + gold) if right else 0.0,
            "precision": right / max(predicted, 1), "recall": right / max(gold, 1)}


# -------------------------------------------------------------------------------------------------
# VCR (Zhang et al. 2024, section 4; tianyu-z/VCR's evaluation_metrics.py, the same in VLMEvalKit's
# vcr.py)

# What spaCy's English tokeniser, which VCR uses, makes of ordinary text: words, numbers,
# abbreviations, and what a word is shortened to ('s, n't) are tokens, every other sign is one of
# its own.
TOKEN = re.compile(r"""
    (?<!\w)(?:[A-Za-z]\.)+                      # U.S., and an initial
  | \d+(?:st|nd|rd|th)\b
  | \d+(?:[.,]\d+)*                             # 1,000.5
  | [^\W\d]\w*?(?=n['’]t\b)                     # do, of don't
  | n['’]t\b
  | ['’](?:s|re|ve|ll|d|m)\b
  | [^\W\d]\w*(?:&\w+)*                         # AT&T
  | \.{2,}
  | [^\w\s]""", re.VERBOSE)


def tokens_of(text: str) -> list[str]:
    """A run of white space is a token, less the space that belongs to the token before it."""
    tokens = []
    for mark in re.finditer(r"(^\s+)|(?<=\S) ?(\s*)|(\S+)", text):
        spaces, more, word = mark.groups()
        tokens += TOKEN.findall(word) if word else [spaces or more or ""]
    return [token for token in tokens if token]


def blank_of(gold: str, prediction: str) -> tuple[float, float]:
    """(exact match, Jaccard) of a blank.

    Against the n tokens of the prediction that look most like its own n.
    """
    wanted, tokens = tokens_of(gold), tokens_of(prediction)
    grams = [tokens[i:i + len(wanted)] for i in range(len(tokens) - len(wanted) + 1)]
    grams = [gram for gram in grams if set(gram) & set(wanted)]
    if not grams:
        return 0.0, 0.0
    ratios = [difflib.SequenceMatcher(None, " ".join(gram), gold).ratio() for gram in grams]
    best = grams[ratios.index(max(ratios))]             # the first best
    shared, either = set(best) & set(wanted), set(best) | set(wanted)
    return float(best == wanted), len(shared) / len(either)


def vcr(rows: list[dict]) -> dict[str, float]:
    scores = []             # (exact, Jaccard) of each blank
    for row in rows:
        said = row["prediction"].split("Assistant: ")[-1]
        refused = "sorry" in said.lower() or any(
            words in said for words in ("I can't", "I cannot", "无法", "抱歉"))
        for gold in row["answers"]:
            scores.append((0.0, 0.0) if refused else blank_of(gold, said))
    exact, jaccard = np.mean(scores, axis=0)
    return {"score": float(exact), "jaccard": float(jaccard)}


# -------------------------------------------------------------------------------------------------


def average(of):
    """The metric that is a mean over rows, and each split's beside it."""
    def scores(rows: list[dict]) -> dict[str, float]:
        splits = defaultdict(list)
        for row in rows:
            splits[row["split"]].append(of(row))
        means = {name: mean(of_split) for name, of_split in splits.items() if name}
        return {"score": mean(sum(splits.values(), [])), **means}
    return scores


def table_vqa(rows: list[dict]) -> dict[str, float]:
    scores = average(table_vqa_of)(rows)
    splits = {name: scores[name] for name in SPLITS if name in scores}
    return {"score": mean(splits.values()), **splits}           # of the splits, not of the rows


SCORES = {"DocVQA": average(anls_of), "InfoVQA": average(anls_of), "DeepForm": micro_f1,
          "KLC": micro_f1, "WTQ": average(denotation_of), "TabFact": average(exact_of),
          "ChartQA": average(relaxed_of), "TextVQA": average(vqa_of), "TableVQABench": table_vqa,
          "VCR-easy": vcr, "VCR-hard": vcr}
