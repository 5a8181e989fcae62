import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import SHARED_DATA
from hypothesis import given
from hypothesis import strategies as st

from pipeline import clean, products, schema
from pipeline.products import Settings
from pipeline.split import Split, assign
from pipeline.tally import Tally

GIFT_CARDS = SHARED_DATA / "amazon-gift-cards" / "meta_Gift_Cards.json.gz"
REAL = {  # labels, metadata, products and questions
    "packshots": ("packshots/labels.jsonl", "packshots/metadata.jsonl", 83, 225),
    "text_poor": ("packshots/labels_text_poor.jsonl", "packshots/metadata_text_poor.jsonl", 83, 225),
    "implicit_home": ("implicit_home/labels.jsonl", "implicit_home/metadata.jsonl", 457, 457),
    "titles": ("titles/titles.jsonl", None, 6000, 6000),
    "offers": ("titles/offers.jsonl", None, 1066, 16439),
}
TEXT = ("Red mug by Acme", "title")


def span(value: str, pid: int, begin: int) -> dict[str, Any]:
    return {"value": value, "pid": pid, "begin": begin, "end": begin + len(value)}


def attribute(key: str, *spans: Any, **more: Any) -> dict[str, Any]:
    return {"key": key, "evidences": list(spans), **more}


def source(folder: Path, *labels: Any, metadata: Any = (), roots: dict[str, list[Any]] | None = None) -> Path:
    """A source folder; every element of `labels` is a line, or bytes, or a list of lines of one more file."""
    files = {"labels/00.jsonl": [label for label in labels if not isinstance(label, list)]}
    files |= {
        f"labels/0{i}.jsonl": lines for i, lines in enumerate(labels, start=1) if isinstance(lines, list)
    }
    files["metadata/00.jsonl"] = list(metadata)
    files |= {f"roots/{root}.json": rows for root, rows in (roots or {}).items()}
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (folder / name).write_bytes(b"\n".join(lines))
    return folder


def label(
    *attributes: Any, asin: str = "B000000001", paragraphs: Any = (TEXT,), **more: Any
) -> dict[str, Any]:
    given = [{"text": text, "source": name} for text, name in paragraphs] if paragraphs else None
    row = {"id": asin, "category": "Mugs", "attributes": list(attributes), **more}
    return {**row, "paragraphs": given} if given else row


def built(folder: Path, *labels: Any, **settings: Any) -> tuple[list[dict[str, Any]], Tally]:
    tally = Tally()
    return products.build(source(folder, *labels), "mine", Settings(kind="mave", **settings), tally), tally


UNSCALED = "https://images-na.ssl-images-amazon.com/images/I/51a+bc-L.jpg"
THUMBNAIL = UNSCALED.replace("L.jpg", "L._SS40_.jpg")
RED = attribute("Color", span("Red", 0, 0))


def test_a_row_has_everything_the_contract_names(tmp_path: Path) -> None:
    metadata = {
        "asin": "B000000001",
        "title": "Red mug",
        "brand": "Acme",
        "main_cat": "Toys &amp; Games",
        "imageURLHighRes": ["a.jpg", ""],
        "imageURL": ["small.jpg"],
    }
    tally = Tally()
    folder = source(tmp_path, label(RED, attribute("Size"), paragraphs=None), metadata=[metadata])
    rows = products.build(folder, "mine", Settings(kind="mave"), tally)
    assert rows == [
        {
            "item": "B000000001",
            "asin": "B000000001",
            "corpus": "mine",
            "root_category": "Toys and Games",
            "category": "Mugs",
            "title": "Red mug",
            "paragraphs": [{"text": "Red mug", "source": "title"}],
            "image_urls": ["a.jpg"],
            "attributes": [
                {
                    "key": "Color",
                    "values": ["Red"],
                    "origins": ["text"],
                    "evidences": [{"value": "Red", "paragraph": 0, "begin": 0, "end": 3}],
                    "split": rows[0]["split"],
                },
                {"key": "Size", "values": [], "origins": [], "evidences": [], "split": rows[0]["split"]},
            ],
            "split": rows[0]["split"],
        }
    ]
    schema.write_parquet(rows, schema.PRODUCTS, tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet").to_pylist() == rows


# Bad input


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"id": "B0000', "malformed line"),
        ({"category": "Mugs"}, "label without id or attributes"),
        (label(RED, asin="b000000001"), "id is not an asin"),
        (label(RED, asin="B0000000012"), "id is not an asin"),
        (label(RED, asin="B00000000\n"), "id is not an asin"),
        (label(RED, asin="B000000002", paragraphs=None), "no metadata"),
        (label(RED, asin="B000000002", paragraphs=[("x", "feature")]), "no title"),
        (label(RED, asin="B000000002", paragraphs=[("  ", "title")]), "no title"),
        (
            {**label(RED, asin="B000000002"), "paragraphs": ["x"]},
            "paragraphs are not a list of text and source",
        ),
        (
            label(RED, asin="B000000002", paragraphs=[("Red mug \ud83d", "title")]),
            "paragraphs: half of a surrogate pair",
        ),
        (label(asin="B000000002"), "no attribute left"),
        (label(RED), "repeated label"),
    ],
)
def test_a_bad_label_line_is_counted_with_its_place(tmp_path: Path, bad: Any, reason: str) -> None:
    rows, tally = built(tmp_path, label(RED), bad)
    assert [row["item"] for row in rows] == ["B000000001"]
    assert tally.counts[reason] == 1
    assert tally.examples[reason] in (["00.jsonl:2"], ["B000000002"])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (attribute("Brand", span("Acme", 1, 11)), "span: pid out of range"),
        (attribute("Brand", span("Acme", -1, 11)), "span: pid out of range"),
        (attribute("Brand", {"value": "Acme", "pid": 0, "begin": 11, "end": 99}), "span: out of range"),
        (attribute("Brand", {"value": "", "pid": 0, "begin": 3, "end": 3}), "span: out of range"),
        (attribute("Brand", span("Acme", 0, 10)), "span: text differs"),
        (attribute("Brand", {"value": "Acme", "pid": 0, "begin": "11", "end": 15}), "span: not a span"),
        (attribute("Brand", {"value": "Acme", "pid": False, "begin": 11, "end": 15}), "span: not a span"),
        (attribute("Brand", "Acme"), "span: not a span"),
        ({"key": "Brand", "evidences": {"value": "Acme"}}, "span: not a span"),
        ({"evidences": []}, "attribute without key"),
        ("Brand", "attribute without key"),
        (attribute("Brand", values=["Acme", 3]), "values are not a list of texts"),
        (attribute("Brand", values="Acme"), "values are not a list of texts"),
        (attribute("Brand", values=["Acme"], origins=["seen"]), "origins do not fit the values"),
        (attribute("Brand", values=["Acme"], origins=[]), "origins do not fit the values"),
    ],
)
def test_a_bad_attribute_is_dropped_and_counted_and_never_a_negative(
    tmp_path: Path, bad: Any, reason: str
) -> None:
    rows, tally = built(tmp_path, label(RED, bad))
    assert [found["key"] for found in rows[0]["attributes"]] == ["Color"]
    assert tally.counts[reason] == 1
    if reason.startswith("span"):
        assert tally.examples["attribute without a valid span"] == ["B000000001: Brand"]


def test_an_attribute_with_one_good_span_or_with_values_survives_a_bad_one(tmp_path: Path) -> None:
    rows, tally = built(
        tmp_path,
        label(
            attribute("Color", span("Red", 0, 1), span("Red", 0, 0)),
            attribute("Brand", span("Acme", 5, 0), values=["Acme"]),
        ),
    )
    color, brand = rows[0]["attributes"]
    assert [one["begin"] for one in color["evidences"]] == [0]
    assert (brand["values"], brand["origins"], brand["evidences"]) == (["Acme"], ["text"], [])
    assert "attribute without a valid span" not in tally.counts


def test_a_lost_attribute_does_not_spoil_a_good_one_of_the_same_key(tmp_path: Path) -> None:
    lost = attribute("Color", span("Red", 0, 1))
    for number, pair in enumerate(((lost, RED), (RED, lost))):
        rows, tally = built(tmp_path / str(number), label(*pair))
        assert [found["values"] for found in rows[0]["attributes"]] == [["Red"]]
        assert tally.counts == {"span: text differs": 1, "attribute without a valid span": 1}


@given(
    st.text(max_size=12), st.integers(-2, 14), st.integers(-2, 14), st.integers(-1, 2), st.text(max_size=4)
)
def test_a_span_is_faultless_exactly_if_it_is_the_text_between_its_ends(
    text: str, begin: int, end: int, pid: int, other: str
) -> None:
    cut = text[begin:end] if 0 <= begin <= end else ""
    for value in (cut, other):
        found = products.fault({"value": value, "pid": pid, "begin": begin, "end": end}, [text])
        holds = pid == 0 and 0 <= begin < end <= len(text) and text[begin:end] == value
        assert (found is None) == holds


def test_nothing_left_is_an_error_that_tells_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no product is left \(id is not an asin: 1, malformed line: 1\)"):
        built(tmp_path, label(RED, asin="wrong"), b"{")
    with pytest.raises(ValueError, match=r"no product is left \(the files are empty\)"):
        built(tmp_path / "empty")


HALF = "\ud83d"  # of a surrogate pair


@pytest.mark.parametrize(
    ("given", "metadata", "reason"),
    [
        ({}, {"imageURLHighRes": [f"{HALF}.jpg", "a.jpg"]}, "image address: half of a surrogate pair"),
        ({}, {"main_cat": f"Home {HALF}"}, None),
        ({"category": f"Mugs{HALF}"}, {}, None),
        ({"attributes": [RED, attribute(f"Size{HALF}")]}, {}, "attribute: half of a surrogate pair"),
        ({"attributes": [RED, attribute("Size", values=[HALF])]}, {}, "attribute: half of a surrogate pair"),
    ],
)
def test_half_of_a_surrogate_pair_costs_no_more_than_it_stands_in(
    tmp_path: Path, given: dict[str, Any], metadata: dict[str, Any], reason: str | None
) -> None:
    plain = {"asin": "B000000001", "title": "Red mug", "imageURLHighRes": ["a.jpg"], "main_cat": "Home"}
    tally = Tally()
    folder = source(tmp_path, {**label(RED, paragraphs=None), **given}, metadata=[plain | metadata])
    (row,) = products.build(folder, "mine", Settings(kind="mave", max_negatives=1), tally)
    schema.write_parquet([row], schema.PRODUCTS, tmp_path / "p.parquet")
    assert (row["root_category"], row["category"], row["image_urls"]) == ("Home", "Mugs", ["a.jpg"])
    assert [found["key"] for found in row["attributes"]] == ["Color"]
    assert tally.counts == ({reason: 1} if reason else {})


# Merging, leaks, origins


def test_positives_and_negatives_of_a_product_are_united(tmp_path: Path) -> None:
    rows, tally = built(
        tmp_path,
        label(RED, attribute("Brand", span("Acme", 0, 11))),
        [label(attribute("Size"), attribute("Brand"), category="Cups")],
    )
    assert [(found["key"], found["values"]) for found in rows[0]["attributes"]] == [
        ("Color", ["Red"]),
        ("Brand", ["Acme"]),
        ("Size", []),
    ]
    assert tally.examples["two categories of one product"] == ["02.jsonl:1"]
    assert tally.counts["asked twice, as positive and negative or twice negative"] == 1


def test_a_leaking_source_goes_with_its_spans_and_the_others_are_renumbered(tmp_path: Path) -> None:
    paragraphs = [TEXT, ("Acme", "brand"), ("big", "feature"), ("Acme", "brand")]
    rows, tally = built(
        tmp_path,
        label(
            attribute("Brand", span("Acme", 0, 11), span("Acme", 1, 0)),
            attribute("Size", span("big", 2, 0)),
            attribute("Maker", span("Acme", 1, 0)),
            attribute("Logo", span("Acme", 3, 0), values=["star"], origins=["printed"]),
            paragraphs=paragraphs,
        ),
    )
    assert [paragraph["source"] for paragraph in rows[0]["paragraphs"]] == ["title", "feature"]
    brand, size, logo = rows[0]["attributes"]
    assert [(one["paragraph"], one["begin"]) for one in brand["evidences"]] == [(0, 11)]
    assert size["evidences"][0]["paragraph"] == 1
    assert (logo["key"], logo["values"], logo["origins"]) == ("Logo", ["star"], ["printed"])
    assert tally.counts["span: in a dropped source"] == 3
    assert tally.examples["attribute only in a dropped source"] == ["B000000001: Maker"]


def test_no_source_is_dropped_when_none_is_named(tmp_path: Path) -> None:
    found = label(attribute("Brand", span("Acme", 1, 0)), paragraphs=[TEXT, ("Acme", "brand")])
    rows, _ = built(tmp_path, found, drop_sources=[])
    assert rows[0]["attributes"][0]["evidences"][0]["paragraph"] == 1


def test_values_get_their_origin_from_the_label_else_from_the_text(tmp_path: Path) -> None:
    rows, _ = built(
        tmp_path,
        label(
            attribute("A", span("Red", 0, 0), values=["red", "blue"]),
            attribute("B", span("Acme", 0, 11)),
            attribute("C", values=["ACME", "cm"]),
            attribute("D", span("mug", 0, 4), values=["mug", "round"], origins=["several", "visible"]),
            attribute("E", values=["gone"], origins=["text"]),
        ),
    )
    assert {a["key"]: dict(zip(a["values"], a["origins"], strict=True)) for a in rows[0]["attributes"]} == {
        "A": {"red": "text", "blue": "unknown"},
        "B": {"Acme": "text"},
        "C": {"ACME": "text", "cm": "unknown"},
        "D": {"mug": "several", "round": "visible"},
        "E": {"gone": "unknown"},
    }


@pytest.mark.parametrize(
    ("metadata", "urls"),
    [
        ({"imageURLHighRes": ["h"], "imageURL": ["t"], "image": ["o"]}, ["h"]),
        ({"imageURLHighRes": [], "imageURL": ["t"]}, ["t"]),
        ({"image": ["o", "p"]}, ["o", "p"]),
        ({"image": "o"}, ["o"]),
        ({"imageURLHighRes": [None, " ", 3]}, []),
        ({"image": [THUMBNAIL, THUMBNAIL.replace("SS40", "US40")]}, [UNSCALED]),
        ({"imageURLHighRes": [], "imageURL": [THUMBNAIL]}, [UNSCALED]),
        ({"image": [THUMBNAIL.replace("SS40", "AC_SR38,50")]}, [UNSCALED]),
        ({"image": ["a._SS40_.jpg"]}, ["a._SS40_.jpg"]),
        ({"imageURLHighRes": [UNSCALED], "imageURL": [THUMBNAIL]}, [UNSCALED]),
        ({}, []),
    ],
)
def test_image_urls_come_from_the_best_key_there_is(metadata: dict[str, Any], urls: list[str]) -> None:
    assert products.image_urls(metadata) == urls


@pytest.mark.parametrize(
    ("main_cat", "root"),
    [
        ("Toys &amp; Games", "Toys and Games"),
        ('<img src="x" alt="Digital Music"/>', "Digital Music"),
        ("Home & Kitchen", "Home and Kitchen"),
        (None, ""),
    ],
)
def test_the_root_is_the_main_category_in_plain_words(main_cat: Any, root: str) -> None:
    assert products.root_category({"main_cat": main_cat}) == root


# Sampling and splitting


def many(number: int) -> list[dict[str, Any]]:
    return [label(RED, attribute("Size"), asin=f"B{i:09d}", paragraphs=None) for i in range(number)]


def lines(number: int, **more: Any) -> list[dict[str, Any]]:
    return [{"asin": f"B{i:09d}", "title": "Red mug", "imageURL": ["x"], **more} for i in range(number)]


def test_roots_give_root_and_images_and_products_of_none_are_counted(tmp_path: Path) -> None:
    roots = {"Toys_and_Games": lines(3, imageURL=["toy"]), "All_Beauty": lines(2, imageURL=["beauty"])}
    tally = Tally()
    folder = source(tmp_path, *many(4), metadata=lines(4), roots=roots)
    rows = products.build(folder, "mine", Settings(kind="mave"), tally)
    assert [(row["root_category"], row["image_urls"]) for row in rows] == [
        ("All Beauty", ["beauty"]),
        ("All Beauty", ["beauty"]),
        ("Toys and Games", ["toy"]),
    ]
    assert tally.counts["asin in several roots"] == 2
    assert tally.examples["in no root"] == ["B000000003"]


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"products_per_root": 7}, {"A": 7, "B": 3}),
        ({"max_products": 33}, {"A": 30, "B": 3}),
        ({"products_per_root": 7, "max_products": 5}, None),
    ],
)
def test_sampling_takes_the_same_products_in_any_order(
    tmp_path: Path, limits: dict[str, int], left: dict[str, int] | None
) -> None:
    settings = Settings(kind="mave", require_image=False, **limits)
    chosen = []
    for name, order in (("a", 1), ("b", -1)):
        metadata = lines(30, main_cat="A")[::order] + [
            {**row, "asin": f"C{i:09d}", "main_cat": "B"} for i, row in enumerate(lines(3))
        ]
        labels = [*many(30), *({**row, "id": f"C{i:09d}"} for i, row in enumerate(many(3)))]
        folder = source(tmp_path / name, *labels[::order], metadata=metadata)
        chosen.append(products.build(folder, "mine", settings, Tally()))
    assert chosen[0] == chosen[1]
    assert left is None or Counter(row["root_category"] for row in chosen[0]) == left
    assert len(chosen[0]) == min(limits.get("max_products", 10), 33)


@pytest.mark.parametrize("limits", [{"products_per_root": 60}, {"products_per_root": 60, "max_products": 90}])
def test_what_is_sampled_from_a_large_root_is_in_every_split(tmp_path: Path, limits: dict[str, int]) -> None:
    metadata = [{**row, "main_cat": "Large" if i < 540 else "Small"} for i, row in enumerate(lines(600))]
    folder = source(tmp_path, *many(600), metadata=metadata)
    settings = Settings(kind="mave", require_image=False, **limits)
    counts = Counter(
        (row["root_category"], row["split"]) for row in products.build(folder, "mine", settings, Tally())
    )
    for root in ("Large", "Small"):
        of_root = sum(count for (its, _), count in counts.items() if its == root)
        assert of_root >= 30
        assert 0.6 < counts[root, "train"] / of_root < 0.95, counts


def test_attributes_are_cut_to_the_most_frequent_of_each_root(tmp_path: Path) -> None:
    labels = [
        label(RED, attribute("Mug"), asin="B000000000", paragraphs=None),
        label(RED, attribute("Kind", span("mug", 0, 4)), asin="B000000001", paragraphs=None),
        label(attribute("Kind", span("mug", 0, 4)), asin="B000000002", paragraphs=None),
        label(RED, attribute("Size"), asin="B000000003", paragraphs=None),
        label(attribute("Kind", span("mug", 0, 4)), asin="B000000004", paragraphs=None),
    ]
    folder = source(tmp_path, *labels, metadata=lines(5), roots={"Toys": lines(3), "Zoo": lines(4)[3:]})
    tally = Tally()
    rows = products.build(folder, "mine", Settings(kind="mave", attributes_per_root={"Toys": 1}), tally)
    keys = {row["item"][-1]: [one["key"] for one in row["attributes"]] for row in rows}
    assert keys == {"0": ["Color"], "1": ["Color"], "3": ["Color", "Size"]}  # a tie goes by name
    assert tally.counts["attribute not among its root's most frequent"] == 3
    assert tally.examples["no attribute left"] == ["B000000002"]
    assert tally.examples["in no root"] == ["B000000004"]
    with pytest.raises(ValueError, match="names Toys; the roots are none; it needs the corpus's `roots`"):
        built(tmp_path / "bare", label(RED), attributes_per_root={"Toys": 1})
    with pytest.raises(ValueError, match="names Tois; the roots are Toys, Zoo"):
        products.build(folder, "mine", Settings(kind="mave", attributes_per_root={"Tois": 1}), Tally())


def test_negatives_and_further_values_are_cut_where_asked_for(tmp_path: Path) -> None:
    two = attribute("Color", span("mug", 0, 4), span("Red", 0, 0))
    negatives = [attribute(f"N{i}") for i in range(5)]
    rows, tally = built(tmp_path, label(two, *negatives), max_negatives=2, multi_value="first")
    first, *others = rows[0]["attributes"]
    assert (first["values"], [one["begin"] for one in first["evidences"]]) == (["mug"], [4])
    assert len(others) == 2
    assert (tally.counts["negative beyond max_negatives"], tally.counts["value beyond the first"]) == (3, 1)
    rows, tally = built(tmp_path / "all", label(two, *negatives))
    assert rows[0]["attributes"][0]["values"] == ["mug", "Red"]
    assert len(rows[0]["attributes"]) == 6


def test_a_product_without_image_may_be_sampled_where_none_is_required(tmp_path: Path) -> None:
    found = label(RED)
    assert len(built(tmp_path / "a", found, products_per_root=5, require_image=False)[0]) == 1
    with pytest.raises(ValueError, match="no product is left"):
        built(tmp_path / "b", found, products_per_root=5)


def test_instances_are_counted_in_all_three_readings_beside_the_papers(tmp_path: Path) -> None:
    text = ("Red mug, red and blue", "title")
    color = attribute("Color", span("Red", 0, 0), span("red", 0, 9), span("blue", 0, 17))
    labels = [label(color, RED, attribute("Size"), paragraphs=[text], main_cat="Books")]
    labels += [label(RED, asin="B000000002", main_cat="Zoo")]
    for instance, total in (("pairs", 2), ("values", 3), ("evidences", 4)):
        settings = Settings(kind="mave", instance=instance)
        rows = products.build(source(tmp_path / instance, *labels), "mine", settings, Tally())
        counted = products.summary(rows, settings, Tally())["tables"]
        assert counted["Total"]["instances"] == total
        assert counted["Total"]["instances by reading"] == {"pairs": 2, "values": 3, "evidences": 4}
    assert counted["Books"] == {
        "products": 1,
        "instances": 3,
        "instances by reading": {"pairs": 1, "values": 2, "evidences": 3},
        "negatives": 1,
        "attributes": 1,
        "values": 2,
        "paper": {"products": 4000, "instances": 12700, "attributes": 9, "values": 800},
    }
    assert "paper" not in counted["Zoo"]


def test_products_without_image_or_positive_are_not_sampled(tmp_path: Path) -> None:
    labels = [*many(2), label(attribute("Size"), asin="B000000002", paragraphs=None)]
    metadata = [lines(1)[0], {**lines(2)[1], "imageURL": []}, {**lines(3)[2]}]
    folder = source(tmp_path, *labels, metadata=metadata)
    rows = products.build(folder, "mine", Settings(kind="mave", products_per_root=5), Tally())
    assert [row["item"] for row in rows] == ["B000000000"]


def test_a_split_by_product_has_exact_sizes_and_does_not_know_the_order() -> None:
    keys = [f"B{i:09d}" for i in range(240)]
    settings = Split(fractions=(0.6, 0.1, 0.3), seed=3)
    split = assign(keys, settings)
    assert Counter(split.values()) == {"train": 144, "validation": 24, "test": 72}
    assert assign([*reversed(keys), *keys], settings) == split
    assert assign(keys, Split(fractions=(0.6, 0.1, 0.3), seed=4)) != split


def test_a_split_by_instance_leaves_the_products_own_split_empty(tmp_path: Path) -> None:
    folder = source(tmp_path, *many(50), metadata=lines(50))
    rows = products.build(folder, "mine", Settings(kind="mave", split=Split(by="instance")), Tally())
    assert {row["split"] for row in rows} == {None}
    assert Counter(one["split"] for row in rows for one in row["attributes"]) == {
        "train": 80,
        "validation": 10,
        "test": 10,
    }
    assert any(len({one["split"] for one in row["attributes"]}) == 2 for row in rows)


def test_folds_share_out_the_test_split_and_every_product_is_tested_once() -> None:
    keys = [f"B{i:09d}" for i in range(53)]
    tested: list[str] = []
    for fold in range(5):
        split = assign(keys, Split(fractions=(0.8, 0.2, 0.0), folds=5, fold=fold))
        tested += [key for key in keys if split[key] == "test"]
        assert Counter(split.values())["validation"] in (8, 9)
    assert sorted(tested) == keys


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fractions": (0.5, 0.1, 0.1)}, "must add up to 1, got 0.7"),
        ({"folds": 5, "fold": 5}, r"fold must be below folds \(5\), got 5"),
        ({"fractions": (0.0, 0.5, 0.5), "folds": 3}, "share of train must be above 0"),
    ],
)
def test_a_split_that_cannot_be_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Split(**given)


def test_a_given_split_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the files of this corpus carry no split"):
        built(tmp_path, label(RED), split=Split(by="given"))


# The stage, and real data


def test_the_stage_writes_the_same_bytes_again_and_counts_into_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config/mine").mkdir(parents=True)
    (tmp_path / "config/mine/products.json").write_text('{"kind": "mave"}')
    source(tmp_path / "data/mine/source", *many(10), b"{", metadata=lines(10))
    written = []
    for _ in range(2):
        products.run("mine")
        written.append(Path("data/mine/products.parquet").read_bytes())
    assert written[0] == written[1]
    metrics = json.loads(Path("metrics/mine/products.json").read_text())
    assert (metrics["products"], metrics["questions"]) == (10, 20)
    assert metrics["splits"]["train"]["values"] == {"text": 8}
    assert metrics["counted"]["malformed line"] == {"count": 1, "examples": ["00.jsonl:11"]}
    assert sorted(path.name for path in Path("data/mine").iterdir()) == ["products.parquet", "source"]


def test_an_unknown_corpus_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"config/nowhere/products\.json does not exist"):
        products.run("nowhere")


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="../shared/data is not there")
@pytest.mark.parametrize("name", REAL)
def test_real_corpora_come_through_without_losing_a_product(tmp_path: Path, name: str) -> None:
    labels, metadata, num_products, num_questions = REAL[name]
    for kind, file in (("labels", labels), ("metadata", metadata)):
        (tmp_path / kind).mkdir()
        if file is not None:
            (tmp_path / kind / "00.jsonl").symlink_to((SHARED_DATA / file).resolve())
    tally = Tally()
    rows = products.build(tmp_path, name, Settings(kind="mave"), tally)
    assert len(rows) == num_products
    assert sum(len(row["attributes"]) for row in rows) == num_questions
    for row in rows:
        assert all(paragraph["source"] != "brand" for paragraph in row["paragraphs"])
        for found in row["attributes"]:
            assert len(found["values"]) == len(found["origins"])
            for one in found["evidences"]:
                text = row["paragraphs"][one["paragraph"]]["text"]
                assert text[one["begin"] : one["end"]] == one["value"]
    assert set(tally.counts) <= {"span: in a dropped source"}


@pytest.mark.shared_data
@pytest.mark.skipif(not GIFT_CARDS.is_file(), reason="../shared/data/amazon-gift-cards is not there")
def test_a_real_metadata_dump_gives_rows_with_texts_and_image_urls(tmp_path: Path) -> None:
    with gzip.open(GIFT_CARDS) as file:
        records = [json.loads(line) for line in file]
    labels = {}
    for record in records:
        title = next((text for text, source in clean.paragraphs(record) if source == "title"), None)
        if title:
            first = attribute("Type", span(title.split()[0], 0, 0))
            labels.setdefault(record["asin"], label(first, asin=record["asin"], paragraphs=None))
    folder = source(tmp_path, *labels.values())
    (folder / "metadata/00.jsonl").unlink()
    (folder / "metadata/00-meta.json.gz").symlink_to(GIFT_CARDS.resolve())
    tally = Tally()
    rows = products.build(folder, "gifts", Settings(kind="mave"), tally)
    assert len(rows) == len(labels) > 1_500
    assert sum(bool(row["image_urls"]) for row in rows) > 600
    assert {row["root_category"] for row in rows} >= {"Gift Cards", "Grocery"}
    assert not {"no metadata", "span: text differs", "malformed line"} & set(tally.counts)
