"""Products: labels joined with texts, every span checked, leaking sources dropped, split.

    python -m pipeline.products CORPUS

Reads data/CORPUS/source/, writes data/CORPUS/products.parquet (`schema.PRODUCTS`, sorted by item) and
metrics/CORPUS/products.json. Whatever cannot be used is counted there by reason, with a few places.
One file: what happens to a row, from label and metadata to split, in that order.
"""

import argparse
import heapq
import json
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline import mave, mepave, params, schema, tables
from pipeline.amazon import image_urls, root_category
from pipeline.clean import without_surrogates
from pipeline.disk import atomically, write_json
from pipeline.labels import NONE, Labels, Spool
from pipeline.split import Split, assign, rank
from pipeline.tally import Tally

# What cannot be asked of a corpus of kind mepave
MAVE_ONLY = {"drop_sources", "products_per_root", "attributes_per_root", "max_negatives", "multi_value"}

Root = tuple[str, list[str]]  # name of the root category, image URLs


class Settings(params.Settings):
    kind: Literal["sample", "mave", "mepave"]
    split: Split = Split()
    drop_sources: tuple[Literal["title", "description", "feature", "price", "brand"], ...] = ("brand",)
    # The paper's choices that it does not tell, for kind mave; docs/design.md argues the defaults.
    products_per_root: int | None = Field(default=None, ge=1)  # sampled from those with a positive
    max_products: int | None = Field(default=None, ge=1)  # of all roots together, sampled likewise
    require_image: bool = True  # of a sampled product: an address
    # root -> how many of its attributes stay, those with a value for most products; other roots keep all
    attributes_per_root: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    max_negatives: int | None = Field(default=None, ge=0)  # of a product; None keeps all that are labelled
    multi_value: Literal["all", "first"] = "all"  # which values of a question are asked for
    instance: Literal["pairs", "values", "evidences"] = "evidences"  # what the metrics call an instance
    negatives: mepave.Negatives = mepave.Negatives()  # for kind mepave

    @model_validator(mode="before")
    @classmethod
    def _mepave_has_its_own_split(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("kind") != "mepave":
            return given
        split = given.get("split", {})
        if isinstance(split, dict) and split.keys() <= {"seed"}:  # which the negatives are drawn by as well
            return {**given, "split": {**split, "by": "given"}}
        return given


@dataclass
class Attribute:
    """An attribute as labelled; without values and evidences it is a negative."""

    key: str
    values: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    evidences: list[dict[str, Any]] = field(default_factory=list)


def build(source: Path, corpus: str, settings: Settings, tally: Tally) -> list[dict[str, Any]]:
    """Rows of `schema.PRODUCTS`, sorted by item; `ValueError` when none is left."""
    if settings.kind == "mepave":
        found = iter(mepave.rows(source, corpus, settings.negatives, settings.split.seed, tally))
    else:
        found = mave_rows(source, corpus, settings, tally)
    rows = list(_sampled(found, settings, tally))
    if not rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(tally.counts.items()))
        raise ValueError(f"{source}: no product is left ({reasons or 'the files are empty'})")
    rows.sort(key=lambda row: row["item"])
    _split(rows, settings.split)
    return rows


def mave_rows(source: Path, corpus: str, settings: Settings, tally: Tally) -> Iterator[dict[str, Any]]:
    """Rows in no particular order, not yet split, from labels/, metadata/ and roots/ below `source`."""
    files, pattern = _files(source / "labels"), schema.ID_PATTERNS[settings.kind]
    with Labels(files, tally, source.parent, pattern) as labels, _Roots(source, labels, tally) as roots:
        frequent = _frequent(labels, roots, settings.attributes_per_root)
        to_join: dict[bytes, int] = {}
        for asin, product in labels.products.items():
            full = [number for number in labels.numbers(product) if labels.is_full(number)]
            if product not in roots:
                tally.add("in no root", asin.decode())
            elif not full:
                to_join[asin] = product
            else:
                label = _merged(labels, full, tally)
                row = _full_row(label, roots.of(product), corpus, settings, tally)
                if row and _choose(row, frequent, settings, tally):
                    yield row
            if full and len(full) < sum(1 for _ in labels.numbers(product)):
                tally.add("repeated label", asin.decode())
        for record in mave.records(_files(source / "metadata"), to_join, tally) if to_join else ():
            label = _merged(labels, list(labels.numbers(record.product)), tally)
            root = roots.of(record.product) or (root_category(record.metadata), image_urls(record.metadata))
            row = _row(label, record.paragraphs, root, corpus, settings, tally)
            if row and _choose(row, frequent, settings, tally):
                yield row


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def _merged(labels: Labels, numbers: list[int], tally: Tally) -> dict[str, Any]:
    """Positives and negatives of one product stand in two files: unite their attributes."""
    first = labels.label(numbers[0])
    for number in numbers[1:]:
        other = labels.label(number)
        if other["category"] != first["category"]:
            tally.add("two categories of one product", labels.where(number))
        first["attributes"] += other["attributes"]
    return first


def _full_row(
    label: dict[str, Any], root: Root | None, corpus: str, settings: Settings, tally: Tally
) -> dict[str, Any] | None:
    """The row of a label that carries its own paragraphs."""
    paragraphs = _given_paragraphs(label)
    if paragraphs is None:
        tally.add("paragraphs are not a list of text and source", label["id"])
    elif not all(_is_whole(part) for paragraph in paragraphs for part in paragraph):
        tally.add("paragraphs: half of a surrogate pair", label["id"])  # cut out, it would shift the spans
    elif not any(source == "title" and text.strip() for text, source in paragraphs):
        tally.add("no title", label["id"])
    else:
        root = root or (root_category(label), image_urls(label))
        return _row(label, paragraphs, root, corpus, settings, tally)
    return None


def _given_paragraphs(label: dict[str, Any]) -> list[tuple[str, str]] | None:
    given = label["paragraphs"]
    if not isinstance(given, list):
        return None
    paragraphs = []
    for paragraph in given:
        if not isinstance(paragraph, dict):
            return None
        text, source = paragraph.get("text"), paragraph.get("source")
        if not isinstance(text, str) or not isinstance(source, str):
            return None
        paragraphs.append((text, source))
    return paragraphs


def _is_whole(text: str) -> bool:
    return without_surrogates(text) == text


class _Roots:
    """Root and image URLs of labelled products, by membership in the metadata files below roots/.

    An asin in several files belongs to the alphabetically first. Without such files every product is in.
    The URLs lie on disk.
    """

    def __init__(self, source: Path, labels: Labels, tally: Tally) -> None:
        self.names: list[str] = []
        self._root = array("h", [NONE]) * len(labels.products)
        self._place = array("l", [NONE]) * len(labels.products)
        self._urls = Spool(source.parent)
        for path in _files(source / "roots"):
            self._read(path, labels.products, tally)

    def __enter__(self) -> "_Roots":
        return self

    def __exit__(self, *_: object) -> None:
        self._urls.close()

    def __contains__(self, product: int) -> bool:
        return not self.names or self._root[product] != NONE

    def of(self, product: int) -> Root | None:
        """None where there are no such files; else for a product that is in one."""
        if not self.names:
            return None
        return self.names[self._root[product]], json.loads(self._urls.get(self._place[product]))

    def _read(self, path: Path, wanted: Mapping[bytes, int], tally: Tally) -> None:
        self.names.append(path.name.split(".")[0].replace("_", " "))
        here = Tally()
        for record in mave.records([path], wanted, here):
            if self._root[record.product] != NONE:
                tally.add("asin in several roots", f"{path.name}: {record.metadata['asin']}")
                continue
            self._root[record.product] = len(self.names) - 1
            self._place[record.product] = self._urls.add(json.dumps(image_urls(record.metadata)).encode())
        for reason in sorted(here.counts.keys() - {"no metadata", "metadata without label"}):
            where = here.examples.get(reason, [path.name])[0]
            tally.add(f"roots: {reason}", where, here.counts[reason])


def _frequent(labels: Labels, roots: _Roots, limits: Mapping[str, int]) -> dict[str, frozenset[str]]:
    """root -> the attributes that most of its products have a value of, as labelled; ties by name."""
    if not limits:
        return {}
    if unknown := sorted(limits.keys() - set(roots.names)):
        known = ", ".join(roots.names) or "none; it needs the corpus's `roots`"
        raise ValueError(f"products.attributes_per_root names {', '.join(unknown)}; the roots are {known}")
    counts: dict[str, Counter[str]] = {root: Counter() for root in limits}
    for product in filter(roots.__contains__, range(len(labels.products))):
        root = roots.of(product)
        if root is not None and root[0] in counts:
            counts[root[0]].update(_positive_keys(labels, product))
    return {
        root: frozenset(sorted(count, key=lambda key: (-count[key], key))[: limits[root]])
        for root, count in counts.items()
    }


def _positive_keys(labels: Labels, product: int) -> set[str]:
    return {
        entry["key"]
        for number in labels.numbers(product)
        for entry in labels.label(number)["attributes"]
        if isinstance(entry, dict)
        and isinstance(entry.get("key"), str)
        and (entry.get("evidences") or entry.get("values"))
    }


def _choose(
    row: dict[str, Any], frequent: Mapping[str, frozenset[str]], settings: Settings, tally: Tally
) -> bool:
    """Apply the settings that cut attributes, negatives and values; whether any attribute is left."""
    kept = frequent.get(row["root_category"])
    chosen = [one for one in row["attributes"] if kept is None or one["key"] in kept]
    cut = Counter({"attribute not among its root's most frequent": len(row["attributes"]) - len(chosen)})
    if settings.max_negatives is not None:
        negatives = [one["key"] for one in chosen if not one["values"]]
        negatives.sort(key=lambda key: rank(settings.split.seed, f"{row['item']}\0{key}"))
        surplus = set(negatives[settings.max_negatives :])
        chosen = [one for one in chosen if one["key"] not in surplus]
        cut["negative beyond max_negatives"] = len(surplus)
    if settings.multi_value == "first":
        for one in chosen:
            cut["value beyond the first"] += len(one["values"][1:])
            one["values"], one["origins"] = one["values"][:1], one["origins"][:1]
            known = {tables.folded(value) for value in one["values"]}
            one["evidences"] = [span for span in one["evidences"] if tables.folded(span["value"]) in known]
    for reason, count in (+cut).items():
        tally.add(reason, count=count)
    row["attributes"] = chosen
    if not chosen:
        tally.add("no attribute left", row["item"])
    return bool(chosen)


def _row(
    label: dict[str, Any],
    paragraphs: list[tuple[str, str]],
    root: Root,
    corpus: str,
    settings: Settings,
    tally: Tally,
) -> dict[str, Any] | None:
    asin = label["id"]
    found = attributes(label["attributes"], paragraphs, asin, tally)
    kept, found = without_sources(paragraphs, found, settings.drop_sources, asin, tally)
    if not found:
        tally.add("no attribute left", asin)
        return None
    urls = list(filter(_is_whole, root[1]))
    if len(urls) < len(root[1]):
        tally.add("image address: half of a surrogate pair", asin, len(root[1]) - len(urls))
    return {
        "item": asin,
        "asin": asin,
        "corpus": corpus,
        "root_category": " ".join(without_surrogates(root[0]).split()),
        "category": without_surrogates(label["category"]),
        "title": next((text for text, source in kept if source == "title"), ""),
        "paragraphs": [{"text": text, "source": source} for text, source in kept],
        "image_urls": urls,
        "attributes": [
            {
                "key": attribute.key,
                "values": attribute.values,
                "origins": attribute.origins,
                "evidences": attribute.evidences,
                "split": None,
            }
            for attribute in found
        ],
        "split": None,
    }


# Attributes and spans


def attributes(
    labelled: list[Any], paragraphs: list[tuple[str, str]], asin: str, tally: Tally
) -> list[Attribute]:
    """Attributes whose every span holds `text[begin:end] == value`; the others are dropped and counted.

    Entries of one key are united; a positive beats a negative. An attribute that loses all its spans and
    carries no `values` is dropped: it would pass for a negative.
    """
    united: dict[str, Attribute] = {}
    lost: set[str] = set()
    for entry in labelled:
        parsed = _entry(entry, paragraphs, asin, tally)
        if parsed is None:
            continue
        attribute, has_lost = parsed
        if has_lost and not attribute.values and not attribute.evidences:
            lost.add(attribute.key)
            continue
        first = united.setdefault(attribute.key, attribute)
        if first is not attribute:
            if not (first.values or first.evidences) or not (attribute.values or attribute.evidences):
                tally.add(
                    "asked twice, as positive and negative or twice negative", f"{asin}: {attribute.key}"
                )
            for value, origin in zip(attribute.values, attribute.origins, strict=True):
                if value not in first.values:
                    first.values.append(value)
                    first.origins.append(origin)
            first.evidences += [span for span in attribute.evidences if span not in first.evidences]
    for key in sorted(lost):
        tally.add("attribute without a valid span", f"{asin}: {key}")
        if key in united and not united[key].values and not united[key].evidences:
            del united[key]
    return list(united.values())


def _entry(
    entry: Any, paragraphs: list[tuple[str, str]], asin: str, tally: Tally
) -> tuple[Attribute, bool] | None:
    """The attribute with its valid spans, and whether it lost any."""
    key = entry.get("key") if isinstance(entry, dict) else None
    if not isinstance(key, str) or not key.strip():
        tally.add("attribute without key", asin)
        return None
    values, origins = entry.get("values") or [], entry.get("origins")
    if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
        tally.add("values are not a list of texts", f"{asin}: {key}")
        return None
    if not all(map(_is_whole, (key, *values))):
        tally.add("attribute: half of a surrogate pair", f"{asin}: {key}")
        return None
    if origins is None:
        origins = ["unknown"] * len(values)
    elif (
        not isinstance(origins, list)
        or len(origins) != len(values)
        or any(origin not in schema.ORIGINS for origin in origins)
    ):
        tally.add("origins do not fit the values", f"{asin}: {key}")
        return None
    spans = entry.get("evidences") or []
    attribute = Attribute(key, list(values), list(origins))
    for span in spans if isinstance(spans, list) else [spans]:
        if reason := fault(span, [text for text, _ in paragraphs]):
            tally.add(f"span: {reason}", f"{asin}: {key}")
        else:
            evidence = {"value": span["value"], "paragraph": span["pid"]}
            attribute.evidences.append({**evidence, "begin": span["begin"], "end": span["end"]})
    return attribute, len(attribute.evidences) < (len(spans) if isinstance(spans, list) else 1)


def fault(span: Any, texts: list[str]) -> str | None:
    """Why a label's `{value, pid, begin, end}` does not hold in `texts`, or None."""
    if not isinstance(span, dict) or not isinstance(span.get("value"), str):
        return "not a span"
    if any(type(span.get(name)) is not int for name in ("pid", "begin", "end")):
        return "not a span"
    if not 0 <= span["pid"] < len(texts):
        return "pid out of range"
    text = texts[span["pid"]]
    if not 0 <= span["begin"] < span["end"] <= len(text):
        return "out of range"
    if text[span["begin"] : span["end"]] != span["value"]:
        return "text differs"
    return None


def without_sources(
    paragraphs: list[tuple[str, str]],
    found: list[Attribute],
    sources: Iterable[str],
    asin: str,
    tally: Tally,
) -> tuple[list[tuple[str, str]], list[Attribute]]:
    """Drop the paragraphs of leaking sources with the spans inside, and renumber the others.

    An attribute that had nothing but such spans is dropped and counted. Values get their final origins.
    """
    sources = set(sources)
    kept = [pid for pid, (_, source) in enumerate(paragraphs) if source not in sources]
    number = {pid: new for new, pid in enumerate(kept)}
    texts = [paragraphs[pid][0] for pid in kept]
    attributes = []
    for attribute in found:
        spans = [
            {**span, "paragraph": number[span["paragraph"]]}
            for span in attribute.evidences
            if span["paragraph"] in number
        ]
        num_leaks = len(attribute.evidences) - len(spans)
        if num_leaks:
            tally.add("span: in a dropped source", f"{asin}: {attribute.key}", num_leaks)
        if num_leaks and not spans and not attribute.values:
            tally.add("attribute only in a dropped source", f"{asin}: {attribute.key}")
            continue
        attributes.append(_with_origins(attribute, spans, texts))
    return [paragraphs[pid] for pid in kept], attributes


def _with_origins(attribute: Attribute, spans: list[dict[str, Any]], texts: list[str]) -> Attribute:
    """Values are those labelled and those of the spans; an origin not given is text or unknown."""
    values, origins = list(attribute.values), list(attribute.origins)
    known = {tables.folded(value) for value in values}
    for span in spans:
        if tables.folded(span["value"]) not in known:
            known.add(tables.folded(span["value"]))
            values.append(span["value"])
            origins.append("text")
    for i, (value, origin) in enumerate(zip(values, origins, strict=True)):
        if origin in ("unknown", "text"):
            origins[i] = "text" if _stands_in(value, spans, texts) else "unknown"
    return Attribute(attribute.key, values, origins, spans)


def _stands_in(value: str, spans: list[dict[str, Any]], texts: list[str]) -> bool:
    if any(tables.folded(span["value"]) == tables.folded(value) for span in spans):
        return True
    word = re.compile(rf"(?<!\w){re.escape(tables.folded(value))}(?!\w)")
    return any(word.search(tables.folded(text)) for text in texts)


# Sampling and splitting


def _sampled(rows: Iterable[dict[str, Any]], settings: Settings, tally: Tally) -> Iterator[dict[str, Any]]:
    """The eligible rows, at most `products_per_root` of each root and `max_products` in all: those of the
    lowest seeded hash, so that neither the order of the input nor other products matter."""
    if settings.products_per_root is None and settings.max_products is None:
        return iter(rows)
    eligible = _eligible(rows, settings, tally)
    of_root = _lowest(eligible, "products_per_root", settings, tally, lambda row: row["root_category"])
    return _lowest(of_root, "max_products", settings, tally, lambda row: None)


def _eligible(rows: Iterable[dict[str, Any]], settings: Settings, tally: Tally) -> Iterator[dict[str, Any]]:
    for row in rows:
        if settings.require_image and not row["image_urls"]:
            tally.add("not sampled: no image address", row["item"])
        elif not any(attribute["values"] for attribute in row["attributes"]):
            tally.add("not sampled: no value", row["item"])
        else:
            yield row


def _lowest(
    rows: Iterable[dict[str, Any]],
    limit: Literal["products_per_root", "max_products"],
    settings: Settings,
    tally: Tally,
    group: Callable[[dict[str, Any]], str | None],
) -> Iterator[dict[str, Any]]:
    """Holds no more rows than it returns."""
    number = getattr(settings, limit)
    if number is None:
        yield from rows
        return
    chosen: dict[str | None, list[tuple[int, str, dict[str, Any]]]] = {}
    for row in rows:
        heap = chosen.setdefault(group(row), [])
        # A hash of its own: by that of the split, what is sampled from large roots would all be trained on.
        lowest_last = -int.from_bytes(rank(settings.split.seed, f"{limit}\0{row['item']}"), "big")
        heapq.heappush(heap, (lowest_last, row["item"], row))
        if len(heap) > number:
            tally.add(f"not sampled: beyond {limit}", heapq.heappop(heap)[1])
    for heap in chosen.values():
        yield from (row for _, _, row in heap)


def _split(rows: list[dict[str, Any]], settings: Split) -> None:
    """Fill in `split` of rows and attributes in place. Rows of one asin go together, but for `instance`."""
    if settings.by == "given":
        if any(row["split"] is None for row in rows):
            raise ValueError("split.by is given, but the files of this corpus carry no split")
    elif settings.by == "instance":
        splits = assign((_question(row, one) for row in rows for one in row["attributes"]), settings)
    else:
        splits = assign((row["asin"] for row in rows), settings)
    for row in rows:
        if settings.by != "given":
            row["split"] = None if settings.by == "instance" else splits[row["asin"]]
        for attribute in row["attributes"]:
            attribute["split"] = row["split"] or splits[_question(row, attribute)]


def _question(row: dict[str, Any], attribute: dict[str, Any]) -> str:
    return f"{row['item']}\0{attribute['key']}"


def summary(rows: list[dict[str, Any]], settings: Settings, tally: Tally) -> dict[str, Any]:
    """What metrics/CORPUS/products.json says."""
    questions = [(row, attribute) for row in rows for attribute in row["attributes"]]
    splits: dict[str, Any] = {}
    for split in schema.SPLITS:
        asked = [attribute for _, attribute in questions if attribute["split"] == split]
        origins = Counter(origin for attribute in asked for origin in attribute["origins"])
        splits[split] = {
            "products": len({row["item"] for row, attribute in questions if attribute["split"] == split}),
            "questions": len(asked),
            "positives": sum(bool(attribute["values"]) for attribute in asked),
            "values": dict(sorted(origins.items())),
        }
    return {
        "products": len(rows),
        "questions": len(questions),
        "attributes": len({attribute["key"] for _, attribute in questions}),
        "splits": splits,
        "tables": tables.counted(rows, settings.kind, settings.instance),
        "counted": tally.report(),
    }


def run(corpus: str) -> None:
    """Everything from the stage's settings to its outputs, from the root of the repository."""
    settings = params.load(Settings, params.CONFIG / corpus / "products.json")
    tally = Tally()
    rows = build(Path("data") / corpus / "source", corpus, settings, tally)
    with atomically(Path("data") / corpus / "products.parquet") as temporary:
        schema.write_parquet(rows, schema.PRODUCTS, temporary)
    write_json(summary(rows, settings, tally), Path("metrics") / corpus / "products.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.products", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("corpus", metavar="CORPUS")
    arguments = parser.parse_args()
    try:
        run(arguments.corpus)
    except (ValueError, OSError) as error:
        sys.exit(f"pipeline.products: {error}")


if __name__ == "__main__":
    main()
