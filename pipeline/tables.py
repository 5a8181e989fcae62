"""What a corpus holds, counted as the paper's Tables 4 and 5 count it, with their numbers beside ours.

What the paper calls an instance is open (docs/design.md). Three readings are always counted: `pairs` of
product and attribute with a value, `values` (distinct ones of each pair), `evidences` (places in the text).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import combinations
from typing import Any

from pipeline import schema

# products, instances, attributes, values
TABLE_5 = {
    "Amazon Fashion": (4000, 16600, 18, 1100),
    "All Beauty": (4000, 17300, 23, 1300),
    "Appliances": (4000, 12500, 16, 800),
    "Books": (4000, 12700, 9, 800),
    "Grocery and Gourmet Food": (4000, 9800, 12, 700),
    "Home and Kitchen": (4000, 11200, 15, 800),
    "Sports and Outdoors": (4000, 12700, 16, 900),
    "Toys and Games": (4000, 12200, 15, 1000),
    "Total": (32000, 105000, 65, 3600),
}
TABLE_4 = (34041, 87194, 26, 2129)
MEPAVE_VOCABULARY = 2772
SPECIAL_WORDS = 4  # padding and unknown as in JAVE's own list, and the two that begin and end an output
COLUMNS = ("products", "instances", "attributes", "values")
Rows = list[dict[str, Any]]


def counted(rows: Rows, kind: str, instance: str) -> dict[str, Any]:
    return table_4(rows) if kind == "mepave" else table_5(rows, instance)


def table_5(rows: Rows, instance: str) -> dict[str, Any]:
    """Per root and in total; `instances` are those that the setting `instance` names."""
    by_root: dict[str, Rows] = defaultdict(list)
    for row in rows:
        by_root[row["root_category"]].append(row)
    groups = {**dict(sorted(by_root.items())), "Total": rows}
    return {
        name: {**_counted(group, instance), **({"paper": _named(TABLE_5[name])} if name in TABLE_5 else {})}
        for name, group in groups.items()
    }


def table_4(rows: Rows) -> dict[str, Any]:
    """In total only: the released rows do not say the category. With the products that splits share."""
    cids = {split: {row["asin"] for row in rows if row["split"] == split} for split in schema.SPLITS}
    known = set().union(*(row["title"] for row in rows))
    sentences = Counter(row["split"] for row in rows if row["asin"] in cids["train"])
    total = {**_counted(rows, "pairs"), "instances": len(rows), "paper": _named(TABLE_4)}
    return {
        "Total": total,
        "by category": "cannot be counted: the released rows name no category",
        "products in two splits": {
            f"{one} and {other}": len(cids[one] & cids[other])
            for one, other in combinations(schema.SPLITS, 2)
        },
        "sentences of a training product": {
            split: sentences[split] for split in schema.SPLITS if split != "train"
        },
        "vocabulary": {
            "characters": len(known),
            "with special words": len(known) + SPECIAL_WORDS,
            "paper": MEPAVE_VOCABULARY,
        },
    }


def _named(numbers: Iterable[int]) -> dict[str, int]:
    return dict(zip(COLUMNS, numbers, strict=True))


def _counted(rows: Rows, instance: str) -> dict[str, Any]:
    asked = [attribute for row in rows for attribute in row["attributes"]]
    positive = [attribute for attribute in asked if attribute["values"]]
    instances = {
        "pairs": len(positive),
        "values": sum(len({folded(value) for value in attribute["values"]}) for attribute in positive),
        "evidences": sum(len(attribute["evidences"]) for attribute in positive),
    }
    return {
        "products": len({row["asin"] for row in rows}),
        "instances": instances[instance],
        "instances by reading": instances,
        "negatives": len(asked) - len(positive),
        "attributes": len({attribute["key"] for attribute in positive}),
        "values": len({folded(value) for attribute in positive for value in attribute["values"]}),
    }


def folded(value: str) -> str:
    """Values that differ in case and blanks alone are one."""
    return " ".join(value.casefold().split())
