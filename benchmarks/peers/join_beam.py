"""MAVE's cleaning as Google runs it: an Apache Beam pipeline with every paragraph parsed by Beautiful Soup.

    python join_beam.py METADATA LABELS OUTPUT      in the environment of benchmarks/peers.txt

Prints the seconds of the run, on the clock and of the processor, imports left out. Written from the rules
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
COUNTED = ("paragraphs", "dropped", "changed", "products")
SIGNS = ("<a href", "javascript:", "background-color:", "background-image:", " li:", ".aloha")


class Join(beam.DoFn):
    def process(self, record: dict[str, Any], labels: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        if label := labels.get(record.get("asin", "")):
            yield record, copy.deepcopy(label)


class Paragraphs(beam.DoFn):
    def process(self, pair: tuple[dict[str, Any], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        record, label = pair
        paragraphs = []
        for source in SOURCES:
            given = record.get(source, [])
            texts = [given] if isinstance(given, str) else given if isinstance(given, list) else []
            paragraphs += [{"text": text.strip(), "source": source} for text in texts if text.strip()]
        yield {"paragraphs": paragraphs, **copy.deepcopy(label)}


class Clean(beam.DoFn):
    def __init__(self) -> None:
        self.counted = {name: beam.metrics.Metrics.counter("clean", name) for name in COUNTED}

    def process(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        kept = []
        for paragraph in row["paragraphs"]:
            self.counted["paragraphs"].inc()
            text = self.cleaned(paragraph["text"], paragraph["source"])
            if text is None:
                self.counted["dropped"].inc()
                continue
            if text != paragraph["text"]:
                self.counted["changed"].inc()
            kept.append({"text": text, "source": paragraph["source"]})
        if any(paragraph["source"] == "title" for paragraph in kept):
            self.counted["products"].inc()
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
    start, start_cpu = time.perf_counter(), time.process_time()
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
            | "paragraphs" >> beam.ParDo(Paragraphs())
            | "clean" >> beam.ParDo(Clean())
            | "group" >> beam.GroupBy(lambda row: row["id"])
            | "first" >> beam.Map(lambda group: next(iter(group[1])))
            | "dump" >> beam.Map(json.dumps)
            | "write" >> beam.io.WriteToText(output, shard_name_template="")
        )
    print(time.perf_counter() - start, time.process_time() - start_cpu)


if __name__ == "__main__":
    main()
