"""What VLMEvalKit itself (ms-vlmeval 0.0.20) scores on the rows of benchmark_cases.py.

Run by hand, in an environment of its own, since the package brings much that nothing here needs:

    pip download --no-deps ms-vlmeval==0.0.20 && unzip ms_vlmeval-*.whl -d vlmeval
    python -m venv scratch && scratch/bin/pip install pandas huggingface_hub sty tqdm nltk spacy
    scratch/bin/python tests/helpers/official_scores.py vlmeval 2000 scores.json
    PYTHONPATH=. python tests/helpers/official_scores.py --compare scores.json

The second argument is how many rows a benchmark has. scores.json has a list of numbers for each
benchmark: the score of each row alone, null where the package raises an exception. 200 rows' are
kept in official_scores.json beside this file, for test_official_scores.py. The package's own code
runs unchanged; what it imports but does not call here (model interfaces, downloads, ROUGE) is left
empty.
"""
import importlib
import json
import queue
import re
import sys
import types
from pathlib import Path

from benchmark_cases import cases

# WTQ, which VLMEvalKit does not have, by WikiTableQuestions' evaluator, which it has for vwtq.
NAMES = ["DocVQA", "InfoVQA", "WTQ", "ChartQA", "TextVQA", "TableVQABench", "VCR-easy", "VCR-hard"]
# VLMEvalKit's names of the ways to score.
METHODS = {"DocVQA": "anls", "InfoVQA": "anls", "ChartQA": "relaxed_accuracy",
           "TextVQA": "vqa_score"}


class Nothing:
    """Whatever one asks of it."""

    def __getattr__(self, name):
        return Nothing()

    def __call__(self, *args, **kwargs):
        return Nothing()

    def compute(self, **kwargs):
        return {"rouge1": 0.0}


def empty_package(name: str, folder: Path, **content) -> types.ModuleType:
    """A package of this name whose modules are the folder's files; its __init__ is not run."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    vars(package).update(content)
    sys.modules[name] = package
    return package


def official_modules(root: Path) -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """vqa_eval, tablevqabench and vcr of the unpacked package."""
    empty_package("vlmeval", root)
    smp = empty_package("vlmeval.smp", root / "smp", dump=Nothing(), load=Nothing())
    misc = importlib.import_module("vlmeval.smp.misc")
    vars(smp).update({key: value for key, value in vars(misc).items() if not key.startswith("_")})
    empty_package("vlmeval.smp.file", root, get_intermediate_file_path=Nothing())
    empty_package("vlmeval.smp.log", root, get_logger=lambda name: Nothing())
    empty_package("vlmeval.dataset", root / "dataset")
    empty_package("vlmeval.dataset.utils", root / "dataset" / "utils")
    empty_package("vlmeval.dataset.image_base", root, ImageBaseDataset=object)
    names = "utils.vqa_eval", "utils.tablevqabench", "vcr"
    vqa, table, vcr = (importlib.import_module(f"vlmeval.dataset.{name}") for name in names)
    import spacy
    # The tokens of en_core_web_sm are those of the blank model.
    vcr.nlp = {"en": spacy.blank("en")}
    vcr.rouge = Nothing()
    return vqa, table, vcr


def official_score(row: dict, name: str, vqa, table, vcr) -> float:
    """The headline score of a row alone. May raise what the package raises."""
    if name in METHODS:
        line = {"prediction": row["prediction"], "answer": repr(row["answers"])}
        return float(vqa.hit_calculate([vqa.process_line(line, METHODS[name])], name)[0])
    if name == "WTQ":
        instance = {"prediction": row["prediction"], "answer": "|".join(row["answers"])}
        table.evaluate_wtq([instance], ["accuracy"])
        return float(instance["scores"]["accuracy"])
    if name == "TableVQABench":
        # TableVQABench.evaluate does the first itself, and then calls the three.
        prediction = re.sub("^Answer: ", "", row["prediction"])
        instance = {"prediction": prediction, "answer": row["answers"][0]}
        evaluate = {"vtabfact": table.evaluate_tabfact, "fintabnetqa": table.evaluate_fintabnet}
        evaluate.get(row["split"], table.evaluate_wtq)([instance], ["accuracy"])
        return float(instance["scores"]["accuracy"] or 0)
    _, by_row = vcr.process_match_single_new("0", row["prediction"], list(row["answers"]), "en",
                                             queue.Queue())
    blanks = by_row["0"].values()
    return sum(blank["exact_match"] for blank in blanks) / len(blanks)


def score_or_none(row: dict, name: str, modules) -> float | None:
    try:
        return round(official_score(row, name, *modules), 6)
    except Exception:      # the official package raises whatever its code runs into
        return None


def our_score(row: dict, name: str) -> float:
    """The headline score of a row alone, by paper/metrics.py."""
    from paper.metrics import METRICS
    scores = METRICS[name]([row])
    return scores[row["split"]] if name == "TableVQABench" else next(iter(scores.values()))


def differences(name: str, official: list[float | None]) -> list[str]:
    """A line for each row that both score, and not the same."""
    lines = []
    for row, theirs in zip(cases(name, len(official)), official):
        ours = our_score(row, name)
        if theirs is not None and abs(ours - theirs) > 1e-5:
            lines.append(f"{row['prediction']!r} for {row['answers']!r} ({row['split']}): ours "
                         f"{ours:.4f}, VLMEvalKit {theirs:.4f}")
    return lines


def compare(path: Path) -> None:
    for name, official in json.loads(path.read_text()).items():
        scored = [score for score in official if score is not None]
        ours = [our_score(row, name) for row, theirs in zip(cases(name, len(official)), official)
                if theirs is not None]
        lines = differences(name, official)
        print(f"{name}: {len(official):,} rows, VLMEvalKit {sum(scored) / len(scored):.4f}, ours "
              f"{sum(ours) / len(ours):.4f}, {len(lines)} differ, "
              f"{len(official) - len(scored)} raise an exception in VLMEvalKit")
        for line in lines[:10]:
            print(f"    {line}")


def main() -> None:
    if sys.argv[1] == "--compare":
        compare(Path(sys.argv[2]))
        return
    root, n, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    modules = official_modules(root / "vlmeval")
    scores = {name: [score_or_none(row, name, modules) for row in cases(name, n)]
              for name in NAMES}
    lines = [f'"{name}": {json.dumps(of_name)}' for name, of_name in scores.items()]
    out.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
