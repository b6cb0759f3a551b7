"""How the paper's benchmarks score an answer (section 4, Tables 1 and 2): one function per metric.

METRICS[benchmark](rows) takes rows with "prediction" (what the model wrote), "answers" (the golds, never empty),
"question" and "split", and returns scores from 0 to 1 by name, the headline first: nan without rows. They have to
compare with published numbers, so each does what the benchmark's own evaluation does, oddities included.
"""
import contextlib
import math
import re
import unicodedata
from collections.abc import Callable
from difflib import SequenceMatcher

from paper.benchmarks import TOYS


def mean(scores: list[float]) -> float:
    return sum(scores) / len(scores) if scores else math.nan


def averaged(name: str, score: Callable[[str, list[str]], float]) -> Callable[[list[dict]], dict[str, float]]:
    """The metric that is the mean over all rows of score(prediction, answers)."""
    return lambda rows: {name: mean([score(row["prediction"], row["answers"]) for row in rows])}


def exact_match(prediction: str, answers: list[str]) -> float:
    """The toy: 1 if the prediction is one of the golds, white space around them aside, else 0."""
    return float(prediction.strip() in [gold.strip() for gold in answers])


def tabfact(prediction: str, answers: list[str]) -> float:
    """TabFact (DocOwl 1.5): 1 if the prediction is the gold less its last ".": never for "true", "True." or ""."""
    golds = [gold.replace("\n", "").strip().removesuffix(".") for gold in answers]
    return float(prediction.replace("\n", "").strip() in golds)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of characters from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(prediction: str, answers: list[str]) -> float:
    """DocVQA, InfoVQA (Biten et al. 2019; VLMEvalKit): normalised Levenshtein similarity with the nearest gold, or 0.

    Case and the amount of white space do not count in the distance, but the length that divides it is the raw one.
    From 0.5, itself included, to 1; what is less alike is 0, and so is an empty answer, unless a gold is empty too.
    """
    pairs = [(" ".join(gold.lower().split()), " ".join(prediction.lower().split()), gold) for gold in answers]
    similarity = 1 - min(edit_distance(a, b) / max(len(gold), len(prediction), 1) for a, b, gold in pairs)
    return similarity if similarity >= 0.5 else 0.0


def relaxed_accuracy(prediction: str, answers: list[str]) -> float:
    """ChartQA (Masry et al. 2022; pix2struct, VLMEvalKit): 1 if within 5 % of a gold number, or the same text, else 0.

    |p - t| <= 0.05 |t|, where x% is x / 100; "1,000" and "5 kg" are no numbers. A gold of 0, or where either is no
    number, takes the same text, whatever its case. An empty answer is wrong.
    """
    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    def correct(text: str, gold: str) -> bool:
        p, t = number(text), number(gold)
        return abs(p - t) / abs(t) <= 0.05 if p is not None and t else text.lower() == gold.lower()

    return float(any(correct(prediction.strip(), gold) for gold in answers))


def chartqa(rows: list[dict]) -> dict[str, float]:
    """ChartQA's relaxed accuracy over all rows, and over each of its two splits."""
    metric = averaged("relaxed_accuracy", relaxed_accuracy)
    splits = {split: [row for row in rows if row["split"] == split] for split in ("human", "augmented")}
    return metric(rows) | {split: metric(some)["relaxed_accuracy"] for split, some in splits.items()}


NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
CONTRACTIONS = {form[:i] + form[i + 1:]: form for form in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
    """.split() for i, letter in enumerate(form) if letter == "'"}       # the word without one of its apostrophes -> it


def vqa_normalise(text: str) -> str:
    """The VQA evaluation's normal form: lower case, no punctuation, no articles, number words as digits.

    A mark becomes a space, as in "red/blue", or nothing if the text has it beside a space, or a comma within a number.
    """
    original = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        vanishes = f"{mark} " in original or f" {mark}" in original or re.search(r"\d,\d", original)
        text = text.replace(mark, "" if vanishes else " ")
    words = re.sub(r"\.(?!\d)", "", text).lower().split()
    words = [NUMBERS.get(word, "0" if word == "none" else word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """TextVQA (Antol et al. 2015; VLMEvalKit), from 0 to 1: the answer is right if 3 of the 10 people gave it.

    For each gold in turn min(1, how many of the others the prediction equals / 3), and of that the mean. A single gold
    leaves no others, so it scores 0. An empty answer equals golds of nothing but articles and marks.
    """
    same = [vqa_normalise(gold) == vqa_normalise(prediction) for gold in answers]
    return mean([min(1, (sum(same) - this) / 3) for this in same])


def wtq_normalise(text: str) -> str:
    """WikiTableQuestions' normal form: lower case; no accents, outer quotes, footnotes, brackets or "." at the end."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
    text = re.sub("[‐‑‒–—−]", "-", re.sub("[“”]", '"', re.sub("[‘’´`]", "'", text)))
    before = None
    while text != before:
        before = text
        text = re.sub(r"(?:(?<!^)\[[^]]*\]|^\[\d+\]|[•♦†‡*#+])+$", "", text.strip())    # footnotes: Paris[2], 1912†
        text = re.sub(r"(?: \([^)]*\))+$", "", text.strip())                            # Paris (France)
        text = re.sub(r'^"([^"]*)"$', r"\1", text.strip())
    return " ".join(text.removesuffix(".").lower().split())


def wtq_value(text: str) -> tuple:
    """What WikiTableQuestions' evaluator takes a text for: ("number", x), ("date", year, month, day) or ("text", s)."""
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):        # nearly whole ones are cut, as there: 2.9999999 is 2
            return "number", int(number) if abs(number - round(number)) < 1e-6 else number
    with contextlib.suppress(ValueError):
        year, month, day = (-1 if part == "xx" else int(part)
                            for part in re.sub("^xxxx-", "xx-", text.lower()).split("-"))
        if month == day == -1 != year and year < 10 ** 18:     # more is compared with no float
            return "number", year
        if max(year, month, day) >= 0 and month in (-1, *range(1, 13)) and day in (-1, *range(1, 32)):
            return "date", year, month, day
    return "text", wtq_normalise(text)


def denotation(prediction: str, answers: list[str]) -> float:
    """WTQ (Pasupat and Liang 2015; as in DUE and TableVQABench): 1 if the answer has all values and no more, else 0.

    The golds together are one list, as is a prediction with "|" or "||" between its values; order and repetitions do
    not count. Two values match as normalised texts, as numbers within 1e-6, or as dates (2004-xx-xx is a number).
    "1,000" and "5%" are texts: the original reads the golds with CoreNLP, the other two do not. An empty answer is one
    value, wrong unless the gold is empty.
    """
    def values(texts: list[str]) -> list[tuple]:
        found: dict[tuple, str] = {}
        for text in "|".join(texts).split("|"):
            text = text.replace(r"\n", "\n").replace(r"\\", "\\")      # as the data's TSV escapes them
            found.setdefault(wtq_value(text), wtq_normalise(text))
        return list(found.items())

    def match(a: tuple, a_normal: str, b: tuple, b_normal: str) -> bool:
        return a_normal == b_normal or a == b or a[0] == b[0] == "number" and abs(a[1] - b[1]) < 1e-6

    golds, predicted = values(answers), values([prediction.replace("||", "|")])
    return float(len(golds) == len(predicted) and all(any(match(*g, *p) for p in predicted) for g in golds))


def true_or_false(prediction: str, answers: list[str]) -> float:
    """TableVQABench's vtabfact: 1 if the prediction holds the gold's word ("1": true, "0": false) and not the other."""
    found = [word for word in ("true", "false") if word in prediction.lower()]
    return float(any(found == [{"1": "true", "0": "false"}.get(gold, gold.lower())] for gold in answers))


def financial(prediction: str, answers: list[str]) -> float:
    """TableVQABench's fintabnetqa, its relaxed score: 1 if the numbers are equal, with their units or without, else 0.

    "$3,852 million" is 3852e6 with its unit and 3852 without, "34.2%" is 0.342 and 34.2; other texts are compared in
    WTQ's normal form. An empty answer equals only a gold with nothing in it but units.
    """
    def readings(text: str) -> list:
        text = re.sub(r"[$(),]", "", wtq_normalise(text))
        text = bare = re.sub(r"\b(dollar|gallons|square feet|shares|mbtu|mbpd|mbbls|mmbtu|unit|gwh|year|mmcf|mile|mboe)"
                             r"s?\b", "", text)
        units = [(r"\bthousand\b", "e3"), (r"\bmillion\b", "e6"), (r"\bbillion\b", "e9")]
        for unit, power in [(" " + unit, power) for unit, power in units] + units + [(" ?%", "e-2")]:
            text, bare = re.sub(unit, power, text), re.sub(unit, "", bare)
        try:
            return [float(text), float(bare)]
        except ValueError:
            return [text, bare]

    return float(any(p == g for p in readings(prediction) for gold in answers for g in readings(gold)))


def table_vqa(rows: list[dict]) -> dict[str, float]:
    """TableVQABench (Kim et al. 2024): the accuracy of each split, and first the mean of the four.

    A split without rows is nan, and so is the mean then. Raises KeyError if a row's split is none of the four.
    """
    score = {"vwtq": denotation, "vwtq_syn": denotation, "vtabfact": true_or_false, "fintabnetqa": financial}
    scores: dict[str, list[float]] = {split: [] for split in score}
    for row in rows:        # the prompts end in "Answer:", which models like to repeat; VLMEvalKit takes it away
        prediction = row["prediction"].removeprefix("Answer: ")
        scores[row["split"]].append(score[row["split"]](prediction, row["answers"]))
    accuracy = {split: mean(some) for split, some in scores.items()}
    return {"accuracy": mean(list(accuracy.values())), **accuracy}


def key_value_f1(rows: list[dict]) -> dict[str, float]:
    """DeepForm, KLC: F1 over all (key, value) pairs (DUE's FScorer, as DocOwl calls it), with precision and recall.

    A row asks for one key of one document; its golds are variants of one value. "None", so written, says that there is
    no value: such a gold is not expected, such a prediction not counted. An empty prediction is counted, as wrong.
    """
    golds = [{gold.strip().upper() for gold in row["answers"] if gold.strip() != "None"} for row in rows]
    predictions = [row["prediction"].strip().replace("\n", "") for row in rows]
    right = sum(p != "None" and p.upper() in g for p, g in zip(predictions, golds))
    predicted, expected = sum(p != "None" for p in predictions), sum(map(bool, golds))
    scores = {"f1": 2 * right / max(predicted + expected, 1), "precision": right / max(predicted, 1),
              "recall": right / max(expected, 1)}
    return scores if rows else dict.fromkeys(scores, math.nan)


# U.S., 1,000.5, do and n't, it and 's, words, dots, and every other mark by itself.
VCR_TOKEN = re.compile(r"(?:[A-Za-z]\.){2,}|\d+(?:[.,]\d+)*|[^\W\d]\w*?(?=n['’]t\b)|n['’]t\b"
                       r"|['’](?:s|re|ve|ll|d|m)\b|[^\W\d]\w*|\.{2,}|[^\w\s]")


def vcr(rows: list[dict]) -> dict[str, float]:
    """VCR (Zhang et al. 2024): each blank against the answer's n-gram most like it: exact match and Jaccard; the means.

    The answers of a row are its blanks. The n-gram is as long as the gold, its likeness difflib's; an answer without a
    word of the gold, an empty one and a refusal score 0. Tokens are nearly those of spaCy, the original's.
    """
    exact, jaccard = [], []
    for row in rows:
        prediction = row["prediction"].split("Assistant: ")[-1]
        refusal = "I can't" in prediction or "I cannot" in prediction or "sorry" in prediction.lower()
        words, *blanks = (VCR_TOKEN.findall(text) for text in ("" if refusal else prediction, *row["answers"]))
        for blank, gold in zip(blanks, row["answers"]):
            ngrams = [words[i:i + len(blank)] for i in range(len(words) - len(blank) + 1)]
            ngrams = [ngram for ngram in ngrams if set(ngram) & set(blank)]
            best = max(ngrams, key=lambda ngram: SequenceMatcher(None, " ".join(ngram), gold).ratio(), default=[])
            exact.append(float(best == blank != []))
            jaccard.append(len(set(best) & set(blank)) / max(len(set(best) | set(blank)), 1))
    return {"exact_match": mean(exact), "jaccard": mean(jaccard)}


METRICS: dict[str, Callable[[list[dict]], dict[str, float]]] = {
    "DocVQA": averaged("anls", anls), "InfoVQA": averaged("anls", anls), "DeepForm": key_value_f1, "KLC": key_value_f1,
    "WTQ": averaged("accuracy", denotation), "TabFact": averaged("accuracy", tabfact), "ChartQA": chartqa,
    "TextVQA": averaged("vqa_accuracy", vqa_accuracy), "TableVQABench": table_vqa, "VCR-easy": vcr, "VCR-hard": vcr,
    **dict.fromkeys(TOYS, averaged("exact_match", exact_match)),
}
