"""The paper's tables and figures in their own form, from docs/results/ (`model.results`).

Our numbers are F1 in per cent, mean ± standard deviation over seeds. The paper's stand beside them, grey,
where the corpus is one of its two; on any other corpus there is nothing to set beside ours. A cell that was
not run says so. The paper does not say how it counts multi-valued and empty answers; ours are the set-based
micro score over (product, attribute, value) where a column does not say otherwise.
One file: each table is the paper's numbers, and the function that sets ours beside them.
"""

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from model import charts
from model.metrics import Answer, answer, micro, paired_bootstrap
from model.results import ATTRIBUTES
from pipeline import schema

Results = Mapping[tuple[str, str], Sequence[dict[str, Any]]]  # (corpus, model) -> its seeds' results
Said = dict[tuple[str, int], list[Answer]]  # by corpus and seed
Cell = tuple[int, int]
NOT_RUN = "not run"
FLOOR = "no-learning floor"
OURS = "smartave"
PICTURE = frozenset({"printed", "visible", "unknown"})  # origins of values that stand in no text
FOLD = re.compile(r"_fold[0-9]+$")
MAIN = (
    ("SUOpenTag", "suopentag"),
    ("AVEQA", "aveqa"),
    ("AdaTag", "adatag"),
    ("MAVEQA", "maveqa"),
    ("MJAVE", "mjave"),
    ("PAM", "pam"),
    ("BERT tagger", "bert-tagger"),
    ("SMARTAVE-text", "smartave-text"),
    ("SMARTAVE", "smartave"),
)
TABLE_1 = {
    "suopentag": {"mepave": "77.12 ± 0.62", "mave": "81.74 ± 0.54"},
    "aveqa": {"mepave": "89.15 ± 0.47", "mave": "89.20 ± 0.32"},
    "adatag": {"mepave": "81.36 ± 0.54", "mave": "86.19 ± 0.46"},
    "maveqa": {"mepave": "88.71 ± 0.38", "mave": "90.06 ± 0.29"},
    "mjave": {"mepave": "87.17 ± 0.43", "mave": "88.84 ± 0.55"},
    "pam": {"mepave": "89.68 ± 0.51", "mave": "91.51 ± 0.37"},
    "smartave-text": {"mepave": "89.21 ± 0.42", "mave": "91.16 ± 0.41"},
    "smartave": {"mepave": "91.52 ± 0.45", "mave": "93.69 ± 0.34"},
}
TABLE_2 = {
    "suopentag": "91.25 91.33 91.29 84.36 78.86 81.52 80.84 72.53 76.46 74.08 68.25 71.04",
    "aveqa": "96.71 97.13 96.92 93.62 87.78 90.61 89.66 90.17 89.91 85.31 83.25 84.27",
    "adatag": "95.26 94.21 94.73 91.68 90.60 91.14 88.23 85.09 86.63 84.37 82.88 83.62",
    "maveqa": "96.48 97.76 97.11 93.70 88.35 90.95 89.81 91.15 90.47 85.27 84.12 84.69",
    "mjave": "95.52 94.72 95.12 91.94 89.48 90.69 90.02 90.75 90.38 84.17 82.69 83.42",
    "pam": "96.39 96.85 96.62 93.63 89.91 91.73 92.41 92.33 92.37 85.01 83.15 84.07",
    "smartave": "96.87 97.84 97.35 94.55 91.38 92.94 93.39 92.80 93.09 84.82 84.70 84.76",
}
TABLE_3 = (  # label, model, the paper's parameters and F1
    ("Encoder-2L", "smartave-encoder-2", "51M", {"mepave": "89.13", "mave": "91.45"}),
    ("Encoder-6L", "smartave-encoder-6", "95M", {"mepave": "90.68", "mave": "92.57"}),
    ("Encoder-12L-share", "smartave-encoder-12-share", "113M", {"mepave": "90.44", "mave": "92.62"}),
    ("Encoder-12L", "smartave-encoder-12", "161M", {"mepave": "91.52", "mave": "93.69"}),
    ("Encoder-24L", "smartave-encoder-24", "282M", {"mepave": "91.71", "mave": "93.77"}),
    ("Decoder-2L", "smartave-decoder-2", "143M", {"mepave": "91.38", "mave": "93.54"}),
    ("Decoder-4L", "smartave-decoder-4", "161M", {"mepave": "91.52", "mave": "93.69"}),
    ("Decoder-12L", "smartave-decoder-12", "241M", {"mepave": "91.61", "mave": "93.73"}),
)
TABLE_7 = (
    ("batch 16", "smartave-batch-16", {"mepave": "91.46", "mave": "93.62"}),
    ("batch 32", "smartave-batch-32", {"mepave": "91.42", "mave": "93.69"}),
    ("batch 64", "smartave-batch-64", {"mepave": "91.48", "mave": "93.21"}),
    ("batch 128", "smartave-batch-128", {"mepave": "91.52"}),
    ("batch 512", "smartave-batch-512", {"mepave": "90.85"}),
    ("rate 1e-5", "smartave-rate-1e5", {"mepave": "91.62", "mave": "92.95"}),
    ("rate 2e-5", "smartave-rate-2e5", {"mepave": "91.52", "mave": "93.69"}),
    ("rate 4e-5", "smartave-rate-4e5", {"mepave": "91.17", "mave": "93.24"}),
    ("rate 8e-5", "smartave-rate-8e5", {"mepave": "91.03", "mave": "92.86"}),
    ("rate 2e-4", "smartave-rate-2e4", {"mepave": "90.80", "mave": "92.51"}),
)
FIGURE_3 = (
    ("w/o title", "smartave-no-title"),
    ("w/o description", "smartave-no-description"),
    ("w/o specification", "smartave-no-specification"),
    ("w/o OCR", "smartave-no-ocr"),
    ("w/o image", "smartave-no-image"),
    ("all", "smartave"),
)
FIGURE_4 = (
    ("w/o local-to-local", "smartave-no-l2l"),
    ("w/o hyper-to-local", "smartave-no-h2l"),
    ("w/o local-to-hyper", "smartave-no-l2h"),
    ("w/o hyper-to-hyper", "smartave-no-h2h"),
    ("all", "smartave"),
)
FIGURE_5 = tuple((length, f"smartave-length-{length}") for length in (64, 128, 256, 512, 1024, 2048))
FIGURE_6 = tuple((a, f"smartave-alpha-{str(a).replace('.', '')}") for a in (0, 0.1, 0.6, 1, 10))
MODELS = tuple(
    dict.fromkeys(
        [name for _, name in MAIN]
        + [row[1] for row in (*FIGURE_3, *FIGURE_4)]
        + [name for _, name, *_ in (*TABLE_3, *TABLE_7)]
        + [name for _, name in (*FIGURE_5, *FIGURE_6)]
    )
)
SCORES = (
    ("F1 (set, micro)", "micro", 2),
    ("P", "micro", 0),
    ("R", "micro", 1),
    ("five-way F1", "five_way", 2),
    ("positives-only F1", "positives_only", 2),
    ("chunk F1", "chunk", 2),
)


SCORE = (
    "F1 in per cent, set-based micro over (product, attribute, value), mean ± standard deviation over seeds."
)
EVERY_SCORE = (
    "All on the same questions. Five-way: MAVE's score of the first value. Positives-only: questions that "
    "have a value. Chunk: JAVE's, where a value is right only at a labelled place in the text; values said "
    "without a place are wrong there, so it is a score for taggers. The last column is a paired bootstrap "
    "over products, 1,000 samples, where the predictions are on this machine."
)
NO_TEXT = (
    "Questions whose values all stand on the picture alone: printed, visible, or of unknown origin and in no "
    "text. F1 in per cent, micro, mean ± standard deviation over seeds, where the predictions are on this "
    "machine. The last column as above."
)


@dataclass(frozen=True)
class Table:
    """Text cells; `best` marks the highest number of a column among models, `grey` the paper's number."""

    head: list[str]
    rows: list[list[str]]
    best: frozenset[Cell] = frozenset()
    grey: dict[Cell, str] = field(default_factory=dict)
    rules: int = 0  # first rows that are no models


def gather(found: Sequence[dict[str, Any]], same: Mapping[str, Mapping[str, str]]) -> Results:
    """Results by corpus and model; a model that is the same as another on a corpus has that one's.

    Corpora NAME_fold0, NAME_fold1 ... are the folds of one: their results stand together under NAME (or "NAME
    (folds)", where NAME has results of its own), so that means and deviations are over seeds and folds.
    """
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in found:
        by.setdefault((one["corpus"], one["model"]), []).append(one)
    for corpus, names in same.items():
        alike = [(first, name) for name, first in names.items()] + list(names.items())
        for name, other in alike:  # whichever of them ran
            if (corpus, other) in by:
                by.setdefault((corpus, name), by[corpus, other])
    whole = {corpus for corpus, _ in by}
    pooled: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for (corpus, model), of_it in sorted(by.items()):
        name = FOLD.sub("", corpus)
        name = f"{name} (folds)" if name != corpus and name in whole else name
        pooled.setdefault((name, model), []).extend(of_it)
    return pooled


def percent(values: Sequence[float]) -> str:
    """`87.30 ± 0.41`, `87.30` of one seed, `not run` of none."""
    if not values:
        return NOT_RUN
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def numbers(results: Results, corpus: str, model: str, *keys: Any) -> list[float]:
    """The number at `keys` of every seed that has one."""
    return [number for one in results.get((corpus, model), ()) for number in number_of(one, *keys)]


def number_of(one: dict[str, Any], *keys: Any) -> list[float]:
    """The number at `keys` of one result; empty where it has none."""
    value: Any = one
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else value and value[key]
    return [] if value is None else [float(value)]


def highest(rows: Sequence[Sequence[str]], first: int, skip: int = 0) -> frozenset[Cell]:
    """The best cell of each column from `first` on, of the rows after `skip`."""
    best: set[Cell] = set()
    for column in range(first, max((len(row) for row in rows), default=0)):
        values = {}
        for number, row in enumerate(rows[skip:], skip):
            try:
                values[number] = float(row[column].split()[0])
            except (ValueError, IndexError):
                continue
        if len(values) > 1:
            top = max(values.values())
            best |= {(number, column) for number, value in values.items() if value == top}
    return frozenset(best)


# Significance


def answers_here(one: dict[str, Any], model: str) -> list[Answer] | None:
    """What the model of a kept result (or the floor beside it) said on its test split; None where its
    predictions are not on this machine, or are not those that the result was made of."""
    path = Path("runs", one["corpus"], one["model"], str(one["seed"]), "predictions.parquet")
    if not path.is_file():
        return None
    said = []
    for row in pq.read_table(path, schema=schema.PREDICTIONS).to_pylist():
        values = row["floor"] if model == FLOOR else [found["value"] for found in row["values"]]
        if values is None:  # of an older evaluation, which did not keep it
            return None
        said.append(answer(row["item"], row["attribute"], values, row["gold"], row["origins"], row["in_ocr"]))
    kept = (one["floor"] if model == FLOOR else one)["micro"][2]
    return said if abs(micro(said)["f1"] - kept) < 1e-4 else None


def answers_of(results: Results, corpus: str) -> dict[str, Said]:
    """Per model of a corpus, and for the floor, what `answers_here` finds."""
    found: dict[str, Said] = {FLOOR: {}}
    for _, model in names_of(results, corpus):
        for one in results.get((corpus, model), ()):
            cell = (one["corpus"], one["seed"])
            for name in (model, FLOOR):
                said = found.setdefault(name, {})
                if cell not in said and (answers := answers_here(one, name)) is not None:
                    said[cell] = answers
    return found


def in_no_text(answers: Iterable[Answer]) -> list[Answer]:
    """The questions whose values all stand on the picture alone."""
    return [one for one in answers if one.gold and PICTURE.issuperset(one.origins)]


def significance(first: Said, ours: Said, chosen: Callable[[list[Answer]], list[Answer]] = list) -> str:
    """`-3.1, p < 0.002`: the difference to SMARTAVE in points of F1 on the `chosen` questions, and how likely
    without any. All seeds and folds that both have count together."""
    cells = sorted(first.keys() & ours.keys())
    both = [chosen([one for cell in cells for one in said[cell]]) for said in (first, ours)]
    if first is ours or not both[0] or not both[1]:
        return "–"
    questions = [[(one.item, one.attribute, one.gold) for one in said] for said in both]
    if questions[0] != questions[1]:
        return "not the same questions"
    found = paired_bootstrap(*both)
    p = "p < 0.002" if found["p"] < 0.002 else f"p = {found['p']:.3f}"
    return f"{100 * found['difference']:+.1f}, {p}"


# Tables


def main_table(results: Results, corpora: Sequence[str]) -> Table:
    """Table 1: methods by corpora, the no-learning floor first."""
    rows, grey = [[FLOOR, *(floor_of(results, corpus, "micro", 2) for corpus in corpora)]], {}
    for number, (label, model) in enumerate(MAIN, 1):
        row = [label]
        for column, corpus in enumerate(corpora, 1):
            row.append(percent(numbers(results, corpus, model, "micro", 2)))
            if corpus in TABLE_1.get(model, {}):
                grey[number, column] = TABLE_1[model][corpus]
        rows.append(row)
    return Table(["method", *corpora], rows, highest(rows, 1, 1), grey, 1)


def floor_of(results: Results, corpus: str, *keys: Any) -> str:
    """The same for every model of a corpus but for machines whose OCR differs a little: the mean over seeds
    and folds of each one's mean."""
    ran = [one for (its, _), all_of in results.items() if its == corpus for one in all_of]
    if not ran:
        return NOT_RUN
    found: dict[tuple[str, int], list[float]] = {}
    for one in ran:
        found.setdefault((one["corpus"], one["seed"]), []).extend(number_of(one, "floor", *keys))
    means = [statistics.fmean(floors) for floors in found.values() if floors]
    return f"{100 * statistics.fmean(means):.2f}" if means else "–"


def names_of(results: Results, corpus: str) -> list[tuple[str, str]]:
    """(label, model): the paper's methods in their order, then the other models that ran there themselves."""
    listed = [name for _, name in MAIN]
    others = sorted(
        model
        for (its, model), ran in results.items()
        if its == corpus and model not in listed and ran[0]["model"] == model
    )
    return [*MAIN, *((name, name) for name in others)]


def score_table(results: Results, corpus: str, answers: Mapping[str, Said]) -> Table:
    """All models of one corpus on the same questions, every kind of score."""
    ours = answers.get(OURS, {})
    floors = (floor_of(results, corpus, key, at) for _, key, at in SCORES)
    rows = [[FLOOR, "", *floors, significance(answers.get(FLOOR, {}), ours)]]
    for label, model in names_of(results, corpus):
        seeds = len(results.get((corpus, model), ()))
        row = [percent(numbers(results, corpus, model, key, at)) for _, key, at in SCORES]
        rows.append([label, str(seeds or NOT_RUN), *row, significance(answers.get(model, {}), ours)])
    head = ["method", "seeds", *(title for title, _, _ in SCORES), "F1 less SMARTAVE's, paired bootstrap"]
    return Table(head, rows, highest([row[:-1] for row in rows], 2, 1), rules=1)


def picture_table(results: Results, corpus: str, answers: Mapping[str, Said]) -> Table:
    """All models of one corpus on the values that no text tells."""
    ours = answers.get(OURS, {})
    rows = []
    for label, model in [(FLOOR, FLOOR), *names_of(results, corpus)]:
        said = answers.get(model, {})
        of_cell = [asked for one in said.values() if (asked := in_no_text(one))]
        questions = {(one.item, one.attribute) for asked in of_cell for one in asked}
        f1 = percent([micro(asked)["f1"] for asked in of_cell]) if of_cell else "–"
        row = [label, str(len(of_cell) or "–"), str(len(questions) or "–"), f1]
        rows.append([*row, significance(said, ours, in_no_text)])
    head = ["method", "cells here", "questions", "F1", "F1 less SMARTAVE's, paired bootstrap"]
    return Table(head, rows, highest([row[:-1] for row in rows], 3, 1), rules=1)


def breakdown(results: Results, corpus: str) -> Table:
    """F1 by where the value stands and by whether our OCR read it."""
    found = [one for (its, _), all_of in results.items() if its == corpus for one in all_of]
    groups = [
        (group, name)
        for group in ("by_origin", "in_ocr")
        for name in sorted({name for one in found for name in one[group]})
    ]
    titles = {"read": "read by our OCR", "not_read": "not read by our OCR"}
    head = [
        "method",
        *(f"{titles.get(name, name)} ({counted(found, group, name)})" for group, name in groups),
    ]
    rows = [[FLOOR, *(floor_of(results, corpus, group, name, 2) for group, name in groups)]]
    for label, model in names_of(results, corpus):
        rows.append([label, *(percent(numbers(results, corpus, model, g, name, 2)) for g, name in groups)])
    return Table(head, rows, highest(rows, 1, 1), rules=1)


def counted(found: Sequence[dict[str, Any]], group: str, name: str) -> str:
    """`38`, the values of all folds; `36–38` where results differ, as those of machines with other OCR do."""
    by_fold: dict[str, list[float]] = {}
    for one in found:
        if name in one[group]:
            by_fold.setdefault(one["corpus"], []).append(one[group][name][3])
    least, most = (sum(pick(counts) for counts in by_fold.values()) for pick in (min, max))
    return f"{least:.0f}" if least == most else f"{least:.0f}–{most:.0f}"


def attribute_table(results: Results, corpus: str) -> Table:
    """Table 2: precision, recall, F1 of four attributes: the paper's where the corpus has them, else those
    with most values."""
    found = [one for (its, _), all_of in results.items() if its == corpus for one in all_of]
    by_fold = {
        (name, one["corpus"]): score[3] for one in found for name, score in one["by_attribute"].items()
    }
    counts: Counter[str] = Counter()
    for (name, _), count in by_fold.items():
        counts[name] += count
    often = sorted(counts, key=lambda name: (-counts[name], name))
    chosen = [name for name in ATTRIBUTES if name in counts] if corpus == "mave" else []
    chosen = (chosen + [name for name in often if name not in chosen])[:4]
    head = ["method", *(f"{name} {part}" for name in chosen for part in ("P", "R", "F1"))]
    cells = [("by_attribute", name, at) for name in chosen for at in range(3)]
    rows = [[FLOOR, *(floor_of(results, corpus, *cell) for cell in cells)]]
    grey: dict[Cell, str] = {}
    for number, (label, model) in enumerate(MAIN, 1):
        rows.append([label, *(percent(numbers(results, corpus, model, *cell)) for cell in cells)])
        if corpus == "mave" and chosen == list(ATTRIBUTES) and model in TABLE_2:
            grey |= {(number, column): text for column, text in enumerate(TABLE_2[model].split(), 1)}
    return Table(head, rows, highest(rows, 1, 1), grey, 1)


def layers_table(results: Results, corpora: Sequence[str]) -> Table:
    """Table 3: layers, parameters (all; without the tables of embeddings), F1, training time."""
    floors = [text for corpus in corpora for text in (floor_of(results, corpus, "micro", 2), "–")]
    rows = [[FLOOR, "–", *floors]]
    grey: dict[Cell, str] = {}
    for number, (label, model, size, paper) in enumerate(TABLE_3, 1):
        row = [label, sizes_of(results, corpora, model)]
        if set(corpora) & {"mave", "mepave"}:
            grey[number, 1] = size
        for corpus in corpora:
            if corpus in paper:
                grey[number, len(row)] = paper[corpus]
            row.append(percent(numbers(results, corpus, model, "micro", 2)))
            row.append(duration(numbers(results, corpus, model, "cost", "training_s")))
        rows.append(row)
    head = ["SMARTAVE", "parameters (without embeddings)"]
    head += [text for corpus in corpora for text in (f"{corpus} F1", "training")]
    return Table(head, rows, grey=grey, rules=1)


def sizes_of(results: Results, corpora: Sequence[str], model: str) -> str:
    """`33.5M (10.1M)`; of each corpus where vocabularies differ."""
    found: dict[str, dict[str, None]] = {}
    for corpus in corpora:
        for one in results.get((corpus, model), ()):
            total, layers = one["cost"]["parameters"], one["cost"]["without_embeddings"]
            found.setdefault(f"{millions(total)} ({millions(layers)})", {})[corpus] = None
    if len(found) > 1:
        return "; ".join(f"{size} on {', '.join(names)}" for size, names in found.items())
    return next(iter(found), "–")


def millions(count: float) -> str:
    return f"{count / 1e6:.1f}M"


def duration(seconds: Sequence[float]) -> str:
    """`1 h 14 min`, `53 min`, `88 s`; a dash where nobody looked at the clock."""
    if not seconds:
        return "–"
    mean = statistics.fmean(seconds)
    hours, minutes = divmod(round(mean / 60), 60)
    if mean < 600:
        return f"{mean:.0f} s"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def search_table(results: Results, corpora: Sequence[str]) -> Table:
    """Table 7: batch sizes and learning rates."""
    rows = [[FLOOR, *(floor_of(results, corpus, "micro", 2) for corpus in corpora)]]
    grey: dict[Cell, str] = {}
    for number, (label, model, paper) in enumerate(TABLE_7, 1):
        row = [label]
        for column, corpus in enumerate(corpora, 1):
            row.append(percent(numbers(results, corpus, model, "micro", 2)))
            if corpus in paper:
                grey[number, column] = paper[corpus]
        rows.append(row)
    return Table(["SMARTAVE with", *corpora], rows, highest(rows, 1, 1), grey, 1)


def statistics_table(corpus: str) -> Table:
    """Tables 4 and 5, as `pipeline.tables` counted them; the paper's numbers beside the paper's corpora."""
    metrics = json.loads(Path("metrics", corpus, "products.json").read_text(encoding="utf-8"))
    groups = {name: one for name, one in metrics["tables"].items() if "instances" in one}
    columns = ("products", "instances", "attributes", "values")
    rows = [[name, *(f"{one[column]:,}" for column in columns)] for name, one in groups.items()]
    grey = {
        (row, at): f"{one['paper'][column]:,}"
        for row, one in enumerate(groups.values())
        if "paper" in one and corpus in ("mave", "mepave")
        for at, column in enumerate(columns, 1)
    }
    return Table(["category", *(f"# {column.removesuffix('s')}" for column in columns)], rows, grey=grey)


# Figures


def bar_figure(
    results: Results, corpora: Sequence[str], models: Sequence[tuple[str, str]], title: str
) -> str:
    """Figures 3 and 4: one bar per variant, for the corpora where a variant ran; "" where none did."""
    varied = [
        corpus
        for corpus in corpora
        if any(of(results, corpus, model) for _, model in models if model != OURS)
    ]
    found = {
        label: {corpus: mean_and_sd(f1) for corpus in varied if (f1 := of(results, corpus, model))}
        for label, model in models
    }
    found = {label: one for label, one in found.items() if one}
    means, spread = (
        {label: {corpus: pair[part] for corpus, pair in one.items()} for label, one in found.items()}
        for part in (0, 1)
    )
    return charts.bars(means, {}, title=title, percent=True, spread=spread) if found else ""


def mean_and_sd(f1: Sequence[float]) -> tuple[float, float]:
    """In per cent; of one alone the deviation is 0."""
    return 100 * statistics.fmean(f1), 100 * statistics.stdev(f1) if len(f1) > 1 else 0.0


def line_figure(
    results: Results, corpora: Sequence[str], points: Sequence[tuple[float, str]], title: str, axis: str
) -> str:
    """Figures 5 and 6: F1 over a setting, a line for each corpus where several values ran; "" without."""
    lines = {
        corpus: [(x, *mean_and_sd(f1)) for x, model in points if (f1 := of(results, corpus, model))]
        for corpus in corpora
    }
    lines = {corpus: found for corpus, found in lines.items() if len(found) > 1}
    return charts.lines(lines, title=title, axis=axis) if lines else ""


def of(results: Results, corpus: str, model: str) -> list[float]:
    return numbers(results, corpus, model, "micro", 2)


def missing(results: Results, corpora: Sequence[str], models: Sequence[tuple[Any, str]]) -> str:
    """What of a figure was not run."""
    gone = [
        f"{label} ({corpus})" for corpus in corpora for label, name in models if not of(results, corpus, name)
    ]
    if not corpora:
        return "Not run."
    return f"Not run: {', '.join(gone)}." if gone else ""


def everything(results: Results) -> tuple[list[tuple[str, str, Table]], list[tuple[str, str, str]]]:
    """Tables as (title, note, table), figures as (title, note, SVG)."""
    corpora = list(dict.fromkeys(corpus for corpus, _ in results))
    theirs = [corpus for corpus in corpora if corpus in ("mave", "mepave")]
    beside = (
        f"Grey: the paper's numbers, on {' and '.join(theirs)}."
        if theirs
        else "None of these corpora is the paper's, so its numbers do not stand beside ours."
    )
    tables = [("Table 1: overall", f"{SCORE} {beside}", main_table(results, corpora))]
    for corpus in corpora:
        answers = answers_of(results, corpus)
        tables += [
            (f"Table 1, {corpus}: every score", EVERY_SCORE, score_table(results, corpus, answers)),
            (f"By origin of the value, {corpus}", "F1; in brackets, values.", breakdown(results, corpus)),
            (f"Table 2: attributes, {corpus}", beside, attribute_table(results, corpus)),
        ]
        ran = [one for (its, _), all_of in results.items() if its == corpus for one in all_of]
        if any(PICTURE & one["by_origin"].keys() for one in ran):
            title = f"Values that stand in no text, {corpus}"
            tables.append((title, NO_TEXT, picture_table(results, corpus, answers)))
    tables.append(("Table 3: layers", f"{SCORE} {beside}", layers_table(results, corpora)))
    for corpus in corpora:
        declared = next(all_of[0]["corpus"] for (its, _), all_of in results.items() if its == corpus)
        if Path("metrics", declared, "products.json").is_file():
            name = {"mepave": "Table 4", "mave": "Table 5"}.get(corpus, "Tables 4 and 5 for")
            tables.append((f"{name} {corpus}: statistics", "", statistics_table(declared)))
    tables.append(
        ("Table 7: batch size and learning rate", f"{SCORE} {beside}", search_table(results, corpora))
    )
    figures = []
    for number, title, bars in ((3, "without one modality", FIGURE_3), (4, "without one pattern", FIGURE_4)):
        drawn = bar_figure(results, corpora, bars, f"Figure {number}: {title}")
        figures.append((f"Figure {number}: {title}", missing(results, corpora, bars), drawn))
    for number, title, points in ((5, "maximal length", FIGURE_5), (6, "alpha", FIGURE_6)):
        drawn = line_figure(results, corpora, points, f"Figure {number}: {title}", title)
        figures.append((f"Figure {number}: {title}", missing(results, corpora, points), drawn))
    return tables, figures
