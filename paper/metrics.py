"""How the paper's benchmarks score an answer (section 4, Tables 1 and 2): one function per metric.

METRICS[benchmark](rows) takes rows with "prediction" (what the model wrote), "answers" (the golds,
never empty), "question" and "split". It returns scores by name, the headline first, from 0 to 1
(the reader's character_errors may be more), and nan without rows. They have to compare with
published numbers, so each does what the benchmark's own evaluation does, oddities included:
VLMEvalKit's (ms-vlmeval 0.0.20) for DocVQA, InfoVQA, ChartQA, TextVQA, TableVQABench and VCR,
DocOwl 1.5's for DeepForm, KLC, WTQ and TabFact.

METRICS[benchmark].intervals(rows) says how sure the scores are; paper/compare.py compares two
models.
"""
import functools
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from data import READ
from paper.benchmarks import DUE, READERS
from plumbing.texts import edit_distance
from reader.hard.make import KINDS as HARD_KINDS
from reader.pages import KINDS

RESAMPLES = 1000
Scores = dict[str, float]


@dataclass
class Metric:
    """A benchmark's scores, in two steps so that samples can be drawn again and again.

    counts(row) are a row's k numbers that are added over the rows; scores(sums) makes scores from
    0 to 1 of their sums (..., k), by name, each of shape (...).
    """
    k: int
    counts: Callable[[dict], list[float]]
    scores: Callable[[np.ndarray], dict[str, np.ndarray]]
    by_document: bool = False       # rows of one "document" are drawn together
    # counts (n, k) -> (n,), what each row scores alone, where that is not the first of its scores
    alone: Callable[[np.ndarray], np.ndarray] | None = None

    def __call__(self, rows: list[dict]) -> Scores:
        return self.of_counts(self.counted(rows))

    def counted(self, rows: list[dict]) -> np.ndarray:
        """(rows, k), float64."""
        return np.array([self.counts(row) for row in rows], dtype=np.float64).reshape(-1, self.k)

    def of_counts(self, counts: np.ndarray) -> Scores:
        """counts (rows, k) -> the scores over all rows."""
        return {name: float(score) for name, score in self.of_sums(counts.sum(axis=0)).items()}

    def of_sums(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """sums (..., k) -> scores (...) by name, nan where nothing was counted."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.scores(sums)

    def of_rows(self, counts: np.ndarray) -> np.ndarray:
        """counts (n, k) -> what each row scores alone (n,), from 0 to 1."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.alone(counts) if self.alone else next(iter(self.scores(counts).values()))

    def drawn(self, rows: list[dict], *counts: np.ndarray) -> list[dict[str, np.ndarray]]:
        """The bootstrap: scores (RESAMPLES,) by name of rows drawn with replacement.

        counts (rows, k) of each model; the draws are the same for all of them, and every time.
        """
        of_groups = self.grouped(rows, np.stack(counts, axis=1))    # (n, models, k)
        n = len(of_groups)
        generator = np.random.default_rng(0)
        sums = np.empty((RESAMPLES, len(counts), self.k))
        for draw in range(RESAMPLES):
            times = np.bincount(generator.integers(n, size=n), minlength=n)     # (n,)
            sums[draw] = np.tensordot(times, of_groups, axes=1)
        return [self.of_sums(sums[:, model]) for model in range(len(counts))]

    def grouped(self, rows: list[dict], counts: np.ndarray) -> np.ndarray:
        """counts (rows, ...) -> sums (n, ...) of the n samples that are drawn: rows, or documents.
        """
        if not self.by_document:
            return counts
        groups = documents(rows)                                                # (rows,)
        sums = np.zeros((groups.max() + 1, *counts.shape[1:]))
        np.add.at(sums, groups, counts)
        return sums

    def intervals(self, rows: list[dict]) -> dict[str, list[float]]:
        """The 95 % interval [low, high] of each score: the middle of the bootstrap's.

        A score of 0 or 1 comes out of every draw. There it is the exact interval of n samples all
        wrong or all right (Clopper and Pearson 1934).
        """
        counts = self.counted(rows)
        scores = self.of_counts(counts)
        if not rows:
            return {name: [math.nan, math.nan] for name in scores}
        [drawn] = self.drawn(rows, counts)
        intervals = {name: middle(values) for name, values in drawn.items()}
        samples = self.samples(rows)
        for name, score in scores.items():
            n = samples[name] or len(rows)
            if score == 0:
                intervals[name] = [0.0, 1 - 0.025 ** (1 / n)]
            elif score == 1:
                intervals[name] = [0.025 ** (1 / n), 1.0]
        return intervals

    def samples(self, rows: list[dict]) -> dict[str, int]:
        """Of how many samples each score is: of rows, or documents, where it alone is a number."""
        alone = self.of_sums(self.grouped(rows, self.counted(rows)))            # (n,) by name
        return {name: int(np.count_nonzero(~np.isnan(values))) for name, values in alone.items()}


def documents(rows: list[dict]) -> np.ndarray:
    """(rows,): the number of each row's document, 0 for the first; without one, its own."""
    numbers: dict = {}
    names = [row.get("document") or i for i, row in enumerate(rows)]
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def middle(values: np.ndarray) -> list[float]:
    """Between which two numbers the middle 95 % of the values lie, nan aside."""
    values = values[~np.isnan(values)]
    if not len(values):
        return [math.nan, math.nan]
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def averaged(name: str, score: Callable[[str, list[str]], float]) -> Metric:
    """The metric that is the mean over all rows of score(prediction, answers)."""
    return averaged_rows(name, lambda row: score(row["prediction"], row["answers"]))


def averaged_rows(name: str, score: Callable[[dict], float]) -> Metric:
    """The metric that is the mean over all rows of score(row)."""
    return Metric(2, lambda row: [score(row), 1], lambda sums: {name: ratio(sums, 0)})


def ratio(sums: np.ndarray, i: int) -> np.ndarray:
    """sums (..., k): number i by the next."""
    return sums[..., i] / sums[..., i + 1]


# -------------------------------------------------------------------------------------------------
# The toy, the reader, TabFact


def exact_match(prediction: str, answers: list[str]) -> float:
    """The toy: 1 if the prediction is one of the golds, white space around them aside, else 0."""
    return float(prediction.strip() in [gold.strip() for gold in answers])


PAGE_KINDS = (*KINDS, *HARD_KINDS)


def reader_counts(row: dict) -> list[float]:
    """Right and all answers, wrong and all characters read aloud: first of all kinds of page, then
    of the row's own. White space is one space."""
    gold, prediction = (" ".join(text.split()) for text in (row["answers"][0], row["prediction"]))
    counts = [float(prediction == gold), 1, 0, 0]
    if row["question"] == READ:
        counts = [0, 0, edit_distance(prediction, gold), len(gold)]
    kinds = [counts if kind == row["split"] else [0, 0, 0, 0] for kind in PAGE_KINDS]
    return sum(kinds, counts)


def reader_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The reader: exact matches of answers, and wrong characters by all; of each kind of page
    too."""
    scores = {}
    for i, kind in enumerate(["", *PAGE_KINDS]):
        scores[f"exact_match {kind}".strip()] = ratio(sums, 4 * i)
        scores[f"character_errors {kind}".strip()] = ratio(sums, 4 * i + 2)
    return scores


def reader_alone(counts: np.ndarray) -> np.ndarray:
    """The reader, row by row: whether an answer is right; of a page that is read aloud 1 less the
    share of wrong characters, or 0."""
    errors = ratio(counts, 2)                                               # (n,)
    return np.where(np.isnan(errors), counts[:, 0], np.maximum(0, 1 - errors))


def tabfact(prediction: str, answers: list[str]) -> float:
    """TabFact (DocOwl 1.5): 1 if the prediction is the gold less its last ".", else 0.

    So "true", "True." and an empty answer never score.
    """
    golds = [without_line_ends(gold).removesuffix(".") for gold in answers]
    return float(without_line_ends(prediction) in golds)


def without_line_ends(text: str) -> str:
    return text.replace("\n", "").strip()


# -------------------------------------------------------------------------------------------------
# DocVQA, InfoVQA


def anls(prediction: str, answers: list[str]) -> float:
    """DocVQA, InfoVQA (Biten et al. 2019; VLMEvalKit): likeness with the nearest gold, or 0.

    It is 1 less the normalised Levenshtein distance: from 0.5, itself included, to 1. What is less
    alike is 0, and so is an empty answer, unless a gold is empty too.
    """
    similarity = max(levenshtein_similarity(prediction, gold) for gold in answers)
    return similarity if similarity >= 0.5 else 0.0


def levenshtein_similarity(prediction: str, gold: str) -> float:
    """Case and the amount of white space don't count in the distance.

    The length is the raw text's, in capitals: "ß" counts as two letters.
    """
    distance = edit_distance(" ".join(gold.lower().split()), " ".join(prediction.lower().split()))
    return 1 - distance / max(len(gold.upper()), len(prediction.upper()), 1)


def due_anls(prediction: str, answers: list[str]) -> float:
    """DocVQA, InfoVQA as DUE scores them, which DocOwl calls for DocDownstream's files.

    Here 0.5 itself is 0, and white space counts, but for line ends.
    """
    text = prediction.strip().replace("\n", "").upper()
    similarity = max(plain_similarity(text, gold.upper()) for gold in answers)
    return similarity if similarity > 0.5 else 0.0


def plain_similarity(a: str, b: str) -> float:
    return 1 - edit_distance(a, b) / max(len(a), len(b), 1)


def doc_vqa(row: dict) -> float:
    """A row is scored as its file's own evaluation does: VLMEvalKit's TSV, or DUE."""
    score = due_anls if row.get("evaluation") == DUE else anls
    return score(row["prediction"], row["answers"])


# -------------------------------------------------------------------------------------------------
# ChartQA


def relaxed_accuracy(prediction: str, answers: list[str]) -> float:
    """ChartQA (Masry et al. 2022; pix2struct, VLMEvalKit): 1 if it fits one of the golds, else 0.

    Numbers fit within 5 %: |p - t| <= 0.05 |t|. A gold of 0, or where either is no number, takes
    the same text, whatever its case. An empty answer is wrong.
    """
    return float(any(fits_in_chart(prediction.strip(), gold) for gold in answers))


def fits_in_chart(text: str, gold: str) -> bool:
    p = chart_number(text)
    t = chart_number(gold)
    if p is None or t is None or t == 0:
        return text.lower() == gold.lower()
    return abs(p - t) / abs(t) <= 0.05


def chart_number(text: str) -> float | None:
    """x% is x / 100; "1,000" and "5 kg" are no numbers."""
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100
        return float(text)
    except ValueError:
        return None


CHART_SPLITS = "human", "augmented"


def chart_counts(row: dict) -> list[float]:
    """(score, 1) of all rows and of each split's."""
    score = relaxed_accuracy(row["prediction"], row["answers"])
    counts = [score, 1.0]
    for split in CHART_SPLITS:
        inside = float(row["split"] == split)
        counts += [inside * score, inside]
    return counts


def chart_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """ChartQA's relaxed accuracy over all rows, and over each of its two splits."""
    names = "relaxed_accuracy", *CHART_SPLITS
    return {name: ratio(sums, 2 * i) for i, name in enumerate(names)}


# -------------------------------------------------------------------------------------------------
# TextVQA

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
           "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
    """.split()


def apostrophes(contractions: list[str]) -> dict[str, str]:
    """Each word without one of its apostrophes -> the word."""
    whole = {}
    for word in contractions:
        for i, letter in enumerate(word):
            if letter == "'":
                whole[word[:i] + word[i + 1:]] = word
    return whole


APOSTROPHES = apostrophes(CONTRACTIONS)


def vqa_normalise(text: str) -> str:
    """The VQA evaluation's normal form: lower case, no marks, no articles, number words as digits.

    A mark becomes a space, as in "red/blue", or nothing: if that mark stands beside a space
    anywhere in the text, or if the text has a number like 1,000.
    """
    original = text.replace("\n", " ").replace("\t", " ").strip()
    text = original
    has_thousands = re.search(r"\d,\d", original)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        vanishes = has_thousands or f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if vanishes else " ")
    # Dots go that are beside no digit: the first 32, since re.sub is handed a flag as its count.
    text = re.sub(r"(?<!\d)\.(?!\d)", "", text, count=32)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(APOSTROPHES.get(word, word) for word in words)


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """TextVQA (Antol et al. 2015; VLMEvalKit): right if 3 of the 10 people gave the answer.

    For each gold in turn min(1, how many of the others the prediction equals / 3), and of that the
    mean, from 0 to 1. A single gold leaves no others, so it scores 0. An empty answer equals golds
    of nothing but articles and marks.
    """
    normal = vqa_normalise(prediction)
    equal = [vqa_normalise(gold) == normal for gold in answers]
    matches = [min(1, (sum(equal) - this) / 3) for this in equal]
    return sum(matches) / len(matches)


# -------------------------------------------------------------------------------------------------
# WTQ, and TableVQABench's vwtq


def denotation(prediction: str, answers: list[str]) -> float:
    """WTQ (Pasupat and Liang 2015; as in DUE and TableVQABench): 1 if the answer has all the
    values and no others, else 0.

    The golds together are one list, as is a prediction with "|" or "||"
    between its values; order and repetitions do not count. "1,000" and "5%" are texts: the original
    reads the golds with CoreNLP, the other two do not. An empty answer is one value, wrong unless
    the gold is empty.
    """
    golds = wtq_values("|".join(answers))
    predicted = wtq_values(prediction.replace("||", "|"))
    if len(golds) != len(predicted):
        return 0.0
    return float(all(any(wtq_match(gold, value) for value in predicted) for gold in golds))


def wtq_values(text: str) -> list[tuple[tuple, str]]:
    """The different values of a list "a|b", each with the normal form of its first spelling."""
    found: dict[tuple, str] = {}
    for item in text.split("|"):
        # as the data's TSV escapes them
        item = item.replace(r"\n", "\n").replace(r"\p", "|").replace(r"\\", "\\")
        found.setdefault(wtq_value(item), wtq_normalise(item))
    return list(found.items())


def wtq_match(gold: tuple[tuple, str], predicted: tuple[tuple, str]) -> bool:
    """Whether two values are the same: as texts, as numbers within 1e-6, or as dates."""
    a, a_normal = gold
    b, b_normal = predicted
    if a_normal == b_normal or a == b:
        return True
    return a[0] == b[0] == "number" and near(a[1], b[1])


def near(a: int | float, b: int | float) -> bool:
    try:
        return abs(a - b) < 1e-6
    except OverflowError:       # an int that no float reaches, and a float
        return False


def wtq_value(text: str) -> tuple:
    """What WikiTableQuestions' evaluator takes a text for.

    ("number", x), ("date", year, month, day) or ("text", its normal form). 2004-xx-xx is a number.
    """
    number = wtq_number(text)
    if number is not None:
        return "number", number
    date = wtq_date(text)
    if date is None:
        return "text", wtq_normalise(text)
    year, month, day = date
    if month == day == -1:
        return "number", year
    return "date", year, month, day


def wtq_number(text: str) -> int | float | None:
    """Nearly whole numbers are cut, as in the original: 2.9999999 is 2."""
    try:
        return int(text)            # exactly, however many digits
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return int(number) if abs(number - round(number)) < 1e-6 else number


def wtq_date(text: str) -> tuple[int, int, int] | None:
    """year-month-day with xx, of the year also xxxx, for what is unknown: -1, but not all three."""
    parts = re.sub("^xxxx-", "xx-", text.lower()).split("-")
    try:
        year, month, day = (-1 if part == "xx" else int(part) for part in parts)
    except ValueError:
        return None
    known = max(year, month, day) >= 0
    if known and month in (-1, *range(1, 13)) and day in (-1, *range(1, 32)):
        return year, month, day
    return None


def wtq_normalise(text: str) -> str:
    """WikiTableQuestions' normal form: lower case, without accents and what stands around a name.

    Outer quotes, footnotes, brackets and a "." at the end go.
    """
    decomposed = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
    text = re.sub("[‘’´`]", "'", text)
    text = re.sub("[“”]", '"', text)
    text = re.sub("[‐‑‒–—−]", "-", text)
    before = None
    while text != before:
        before = text
        # footnotes: Paris[2], 1912†
        text = re.sub(r"(?:(?<!^)\[[^]]*\]|^\[\d+\]|[•♦†‡*#+])+$", "", text.strip())
        # brackets: Paris (France)
        text = re.sub(r"(?: \([^)]*\))+$", "", text.strip())
        text = re.sub(r'^"([^"]*)"$', r"\1", text.strip())
    return " ".join(text.removesuffix(".").lower().split())


# -------------------------------------------------------------------------------------------------
# TableVQABench's others


def true_or_false(prediction: str, answers: list[str]) -> float:
    """TableVQABench's vtabfact: 1 if the prediction holds the gold's word and not the other.

    The golds are "1" for true and "0" for false, or the words.
    """
    words = {"1": "true", "0": "false"}
    found = [word for word in ("true", "false") if word in prediction.lower()]
    return float(any(found == [words.get(gold, gold.lower())] for gold in answers))


UNITS = (r"\b(dollar|gallons|square feet|shares|mbtu|mbpd|mbbls|mmbtu|unit|gwh|year|mmcf|mile|mboe)"
         r"s?\b")
POWERS = {r" \bthousand\b": "e3", r" \bmillion\b": "e6", r" \bbillion\b": "e9",
          r"\bthousand\b": "e3", r"\bmillion\b": "e6", r"\bbillion\b": "e9", " ?%": "e-2"}


def financial(prediction: str, answers: list[str]) -> float:
    """TableVQABench's fintabnetqa, its relaxed score: 1 if the numbers are equal, else 0.

    They may be so with their units or without. An empty answer equals only a gold with nothing in
    it but units.
    """
    readings = amounts(prediction)
    return float(any(p == g for p in readings for gold in answers for g in amounts(gold)))


def amounts(text: str) -> list[float] | list[str]:
    """A text as a number with its unit, and without; in WTQ's normal form where it is none.

    "$3,852 million" is 3852e6 and 3852, "34.2%" is 0.342 and 34.2.
    """
    text = re.sub(r"[$(),]", "", wtq_normalise(text))
    text = re.sub(UNITS, "", text, flags=re.IGNORECASE)
    bare = text
    for unit, power in POWERS.items():
        text = re.sub(unit, power, text)
        bare = re.sub(unit, "", bare)
    try:
        return [float(text), float(bare)]
    except ValueError:
        return [text, bare]


TABLE_SPLITS = {"vwtq": denotation, "vwtq_syn": denotation, "vtabfact": true_or_false,
                "fintabnetqa": financial}


def table_counts(row: dict) -> list[float]:
    """(score, 1) of each split's rows. Raises KeyError if the row's split is none of the four."""
    # The prompts end in "Answer:", which models like to repeat; VLMEvalKit takes it away.
    prediction = row["prediction"].removeprefix("Answer: ")
    score = TABLE_SPLITS[row["split"]](prediction, row["answers"])
    counts = []
    for split in TABLE_SPLITS:
        inside = float(row["split"] == split)
        counts += [inside * score, inside]
    return counts


def table_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """TableVQABench (Kim et al. 2024): the accuracy of each split, and first the mean of the four.

    A split without rows is nan, and so is the mean then.
    """
    accuracy = {split: ratio(sums, 2 * i) for i, split in enumerate(TABLE_SPLITS)}
    return {"accuracy": sum(accuracy.values()) / len(accuracy), **accuracy}


def table_alone(counts: np.ndarray) -> np.ndarray:
    """TableVQABench, row by row: the accuracy of the row's own split."""
    return counts[:, ::2].sum(-1)


# -------------------------------------------------------------------------------------------------
# DeepForm, KLC


def pair_counts(row: dict) -> list[float]:
    """A row's (key, value) pairs: right, predicted and expected; and 1 for the row.

    A row asks for one key of one document; its golds are variants of one value. "None", so written,
    says that there is no value: such a gold is not expected, such a prediction not counted. An
    empty prediction is counted, as wrong. Where DUE has several values for a key ("values"), each
    is expected, though one answer gives only one.
    """
    golds = {gold.upper() for gold in row["answers"] if gold.strip() != "None"}
    prediction = row["prediction"].strip().replace("\n", "")
    predicted = prediction != "None"
    right = predicted and prediction.upper() in golds
    expected = row.get("values", 1) if golds else 0
    return [right, predicted, expected, 1]


def pair_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """DeepForm, KLC: F1 over all (key, value) pairs, with precision and recall.

    As DUE's FScorer does it, which DocOwl calls.
    """
    right, predicted, expected, rows = np.moveaxis(sums, -1, 0)
    right = np.where(rows > 0, right, math.nan)
    return {"f1": 2 * right / np.maximum(predicted + expected, 1),
            "precision": right / np.maximum(predicted, 1),
            "recall": right / np.maximum(expected, 1)}


def pair_alone(counts: np.ndarray) -> np.ndarray:
    """DeepForm, KLC, row by row: its F1; 1 where no value is expected and none was predicted."""
    _, predicted, expected, _ = counts.T
    return np.where(predicted + expected == 0, 1.0, pair_scores(counts)["f1"])


# -------------------------------------------------------------------------------------------------
# VCR

# Without spaCy: an initial or U.S., 1st and 1,000.5, do and n't, it and 's, AT&T and other words,
# dots, and every other mark by itself.
VCR_TOKEN = re.compile(r"(?<!\w)(?:[A-Za-z]\.)+|\d+(?:st|nd|rd|th)\b|\d+(?:[.,]\d+)*"
                       r"|[^\W\d]\w*?(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b"
                       r"|[^\W\d]\w*(?:&\w+)*|\.{2,}|[^\w\s]")


@functools.cache
def spacy_tokenizer() -> Callable | None:
    """spaCy's for English, the original's, if it is installed."""
    try:
        import spacy
    except ImportError:
        return None
    return spacy.blank("en").tokenizer


def vcr_tokens(text: str) -> list[str]:
    """spaCy's tokens of an English text, or without spaCy nearly those.

    White space is a token where it is more than the one space after a token.
    """
    tokenizer = spacy_tokenizer()
    if tokenizer:
        return [token.text for token in tokenizer(text)]
    tokens: list[str] = []
    for part in re.findall(r"\s+|\S+", text):
        if not part.isspace():
            tokens += VCR_TOKEN.findall(part)
            continue
        if tokens:
            part = part.removeprefix(" ")
        if part:
            tokens.append(part)
    return tokens


def vcr_counts(row: dict) -> list[float]:
    """Exact matches, Jaccard and number of the row's blanks, which are its golds.

    A refusal scores 0.
    """
    prediction = row["prediction"].split("Assistant: ")[-1]
    refusals = "I can't", "I cannot", "无法", "抱歉"
    refuses = any(words in prediction for words in refusals) or "sorry" in prediction.lower()
    tokens = vcr_tokens("" if refuses else prediction)
    exact = jaccard = 0.0
    for gold in row["answers"]:
        blank = vcr_tokens(gold)
        best = likest_ngram(tokens, blank, gold)
        exact += float(best == blank and blank != [])
        shared, all_tokens = set(best) & set(blank), set(best) | set(blank)
        jaccard += len(shared) / max(len(all_tokens), 1)
    return [exact, len(row["answers"]), jaccard, len(row["answers"])]


def vcr_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """VCR (Zhang et al. 2024): exact match and Jaccard, the means over all blanks of all rows."""
    return {"exact_match": ratio(sums, 0), "jaccard": ratio(sums, 2)}


def likest_ngram(tokens: list[str], blank: list[str], gold: str) -> list[str]:
    """Of the n-grams of the answer, as long as the blank, the one that is most like the gold.

    Likeness is difflib's. An n-gram without a token of the blank does not count: there may be none.
    """
    starts = range(len(tokens) - len(blank) + 1)
    ngrams = [tokens[start:start + len(blank)] for start in starts]
    ngrams = [ngram for ngram in ngrams if set(ngram) & set(blank)]

    def likeness(ngram: list[str]) -> float:
        return SequenceMatcher(None, " ".join(ngram), gold).ratio()
    best = max(ngrams, key=likeness, default=[])
    # Of a gold of 200 letters difflib may see nothing in common.
    return best if best and likeness(best) > 0 else []


# -------------------------------------------------------------------------------------------------

METRICS: dict[str, Metric] = {
    "DocVQA": averaged_rows("anls", doc_vqa),
    "InfoVQA": averaged_rows("anls", doc_vqa),
    "DeepForm": Metric(4, pair_counts, pair_scores, by_document=True, alone=pair_alone),
    "KLC": Metric(4, pair_counts, pair_scores, by_document=True, alone=pair_alone),
    "WTQ": averaged("accuracy", denotation),
    "TabFact": averaged("accuracy", tabfact),
    "ChartQA": Metric(6, chart_counts, chart_scores),
    "TextVQA": averaged("vqa_accuracy", vqa_accuracy),
    "TableVQABench": Metric(8, table_counts, table_scores, alone=table_alone),
    "VCR-easy": Metric(4, vcr_counts, vcr_scores),
    "VCR-hard": Metric(4, vcr_counts, vcr_scores),
    "toy": averaged("exact_match", exact_match),
    **dict.fromkeys(READERS, Metric(4 * (1 + len(PAGE_KINDS)), reader_counts, reader_scores,
                                    alone=reader_alone)),
}
