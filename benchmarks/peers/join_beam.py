"""MAVE's cleaning as Google runs it: an Apache Beam pipeline with every paragraph parsed by Beautiful Soup.

    python join_beam.py METADATA LABELS OUTPUT      in the environment of benchmarks/peers.txt

Prints the seconds from the first element to the last, imports left out. Written from the rules
(docs/design.md), with the steps of the original: labels as a side input, join, paragraphs, cleaning,
grouping by id, first of each group.
"""

import copy
import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import bs4

SOURCES = ("title", "description", "feature", "price", "brand")
SIGNS = ("<a href", "javascript:", "background-color:", "background-image:", " li:", ".aloha")


class Join(beam.DoFn):
    def process(self, record: dict[str, Any], labels: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        if label := labels.get(record.get("asin", "")):
            yield record, copy.deepcopy(label)


def with_paragraphs(pair: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    record, label = pair
    paragraphs = []
    for source in SOURCES:
        given = record.get(source, [])
        texts = [given] if isinstance(given, str) else given if isinstance(given, list) else []
        paragraphs += [{"text": text.strip(), "source": source} for text in texts if text.strip()]
    return {"paragraphs": paragraphs, **copy.deepcopy(label)}


class Clean(beam.DoFn):
    def process(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        kept = []
        for paragraph in row["paragraphs"]:
            text = self.cleaned(paragraph["text"], paragraph["source"])
            if text is not None:
                kept.append({"text": text, "source": paragraph["source"]})
        if any(paragraph["source"] == "title" for paragraph in kept):
            yield {
                "id": row["id"],
                "category": row["category"],
                "paragraphs": kept,
                "attributes": row["attributes"],
            }

    def cleaned(self, text: str, source: str) -> str | None:
        if source == "title" and "getTime" in text:
            return None
        soup = bs4.BeautifulSoup(text.encode("utf-8", "ignore").decode("utf-8"), "html.parser")
        for element in soup(["style", "script"]):
            element.decompose()
        text = " ".join(" ".join(soup.stripped_strings).split())
        if not text or any(sign in text for sign in SIGNS):
            return None
        tokens = text.split()
        css = sum(
            token.startswith((".", "#", "div")) or "px" in token or token.count("-") > 1 for token in tokens
        )
        if css / len(tokens) > 0.3 and css > 20:
            return None
        return text.encode("utf-8", "ignore").decode("utf-8")


def main() -> None:
    metadata, labels, output = sys.argv[1:]
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    with beam.Pipeline() as root:
        by_id = (
            root
            | "read labels" >> beam.io.ReadFromText(labels)
            | "parse labels" >> beam.Map(json.loads)
            | "key labels" >> beam.Map(lambda label: (label["id"], label))
        )
        _ = (
            root
            | "read metadata" >> beam.io.ReadFromText(metadata)
            | "parse metadata" >> beam.Map(json.loads)
            | "join" >> beam.ParDo(Join(), beam.pvalue.AsDict(by_id))
            | "paragraphs" >> beam.Map(with_paragraphs)
            | "clean" >> beam.ParDo(Clean())
            | "group" >> beam.GroupBy(lambda row: row["id"])
            | "first" >> beam.Map(lambda group: next(iter(group[1])))
            | "dump" >> beam.Map(json.dumps)
            | "write" >> beam.io.WriteToText(output, shard_name_template="")
        )
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
