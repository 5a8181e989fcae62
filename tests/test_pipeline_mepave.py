import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SHARED_DATA

from pipeline import mepave, products, tables
from pipeline.split import Split
from pipeline.tally import Tally

SAMPLE = SHARED_DATA / "mepave-sample"
here = pytest.mark.skipif(not SAMPLE.is_dir(), reason="../shared/data/mepave-sample is not there")
ROW = "c_1\ts_1\t红色Polo衫\t<颜色>红色</颜色>Polo衫"


def release(folder: Path, train: str = ROW, valid: str = "", test: str = "") -> Path:
    for name, rows in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"jdair.jave.{name}.txt").write_text(rows + "\n", encoding="utf-8")
    return folder


def test_tags_and_texts_are_lower_cased_and_aligned(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(ROW + "\nc_1\ts_2\t无\t无", encoding="utf-8")
    mepave.write_sequences(tmp_path / "file", tmp_path / "out")
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()}
    assert written == {
        "indexs": "c_1\ts_1\nc_1\ts_2\n",
        "input.seq": "红 色 p o l o 衫\n无\n",
        "output.seq": "B-颜色 I-颜色 O O O O O\nO\n",
        "output.label": "颜色\n[PAD]\n",
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("c_1\ts_1\t红色", "row without four fields"),
        ("x_1\ts_1\t红\t红", "id is not a cid or sid"),
        ("c_1\t1\t红\t红", "id is not a cid or sid"),
        ("c_1\ts_1\t红\t红\t红", "row without four fields"),
        ("c_1\ts_1\t红 色\t红 色", "blank in the text"),
        ("c_1\ts_1\t红色\t<颜色>红</形状>色", "broken tags"),
        ("c_1\ts_1\t红色\t<颜色>红色", "broken tags"),
        ("c_1\ts_1\t红<色\t红<色", "broken tags"),
        ("c_1\ts_1\t红色\t<颜色></颜色>红色", "broken tags"),
        ("c_1\ts_1\t红色\t红色<颜色>", "broken tags"),
        ("c_1\ts_1\t红色\t<颜色>蓝</颜色>色", "texts differ"),
    ],
)
def test_a_bad_row_is_counted_by_its_reason(tmp_path: Path, row: str, reason: str) -> None:
    tally = Tally()
    (tmp_path / "file").write_text(f"{ROW}\n{row}\n", encoding="utf-8")
    assert [sentence.sid for sentence in mepave.sentences(tmp_path / "file", tally)] == ["s_1"]
    assert tally.examples == {reason: ["file:2"]}


PIECES = [  # tagged, plain
    *((text, text) for text in ("红", "B", ">", "/", "\u3000", "\xa0", "\x85", "\u2028", "\x0b")),
    *((broken, "") for broken in ("<颜色>", "</颜色>", "<颜色></颜色>", "<", "</形状>")),
    ("<颜色>红</颜色>", "红"),
    ("<颜色>红>C\u3000</颜色>", "红>C\u3000"),
    ("<图案>ab</图案>", "ab"),
    ("<a/b>/x</a/b>", "/x"),
    ("<></></>", "</>"),
    ("<颜色></颜色></颜色>", "</颜色>"),
    (" ", " "),
]


def as_jave(text: str, tagged: str) -> tuple[str, list[str], list[str]] | None:
    """Characters, tags and labels by the rules of JAVE's data_process.py; None where it skips the row."""
    plain, bio, names, rest = "", [], set(), tagged
    while rest:
        if not rest.startswith("<"):
            plain, rest = plain + rest[0], rest[1:]
            bio.append("O")
            continue
        name, _, rest = rest[1:].partition(">")
        end = rest.find("<", 1)
        if end < 0 or not rest[end:].startswith(f"</{name}>"):
            return None
        plain, rest = plain + rest[:end], rest[end + len(f"</{name}>") :]
        bio += [f"B-{name}"] + [f"I-{name}"] * (end - 1)
        names.add(name)
    return None if " " in text + tagged or plain != text else (plain, bio, sorted(names) or ["[PAD]"])


def test_what_is_written_and_what_is_skipped_follows_the_rules_of_jave(tmp_path: Path) -> None:
    rng = random.Random(0)
    lines, expected, num_skipped = (
        [],
        dict.fromkeys(("indexs", "input.seq", "output.seq", "output.label"), ""),
        0,
    )
    for number in range(5000):
        pieces = rng.choices(PIECES, k=rng.randrange(5))
        tagged, text = "".join(piece[0] for piece in pieces), "".join(piece[1] for piece in pieces)
        lines.append(f"c_1\ts_{number}\t{text}\t{tagged}\n")
        if (row := as_jave(text.lower(), tagged.lower())) is None:
            num_skipped += 1
            continue
        for name, column in zip(expected, (f"c_1\ts_{number}", *map(" ".join, row)), strict=True):
            expected[name] += f"{column}\n"
    assert 1000 < num_skipped < 4000
    (tmp_path / "file").write_text("".join([*lines, "end"]), encoding="utf-8")
    tally = mepave.write_sequences(tmp_path / "file", tmp_path / "out")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == expected
    assert sum(tally.counts.values()) == len(lines) + len(["end"])


def test_lines_end_as_jave_reads_them_and_the_blanks_after_the_last_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(f"\ufeff{ROW}\r\n{ROW}\r\r\n{ROW}\u3000 \n\n".encode())
    tally = Tally()
    assert [one.text for one in mepave.sentences(tmp_path / "file", tally)] == ["红色polo衫"] * 3
    assert not tally.counts


def test_a_line_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"c_1\ts_1\t\xff\t\xff\n" + ROW.encode())
    tally = Tally()
    assert len(list(mepave.sentences(tmp_path / "file", tally))) == 1
    assert tally.examples == {"not UTF-8": ["file:1"]}


def test_rows_carry_gold_negatives_and_the_files_own_split(tmp_path: Path) -> None:
    release(tmp_path, valid="c_2\ts_2\t绿裤绿\t<颜色>绿</颜色>裤<颜色>绿</颜色>", test="c_1\ts_3\t无\t无")
    tally = Tally()
    settings = products.Settings(kind="mepave")
    rows = products.build(tmp_path, "mepave", settings, tally)
    train, valid, test = rows
    assert [(row["item"], row["asin"], row["split"]) for row in rows] == [
        ("s_1", "c_1", "train"),
        ("s_2", "c_2", "validation"),
        ("s_3", "c_1", "test"),
    ]
    assert [len(row["attributes"]) for row in rows] == [4, 26, 26]
    assert train["image_urls"] == ["1.jpg"]
    assert train["attributes"][0] == {
        "key": "颜色",
        "values": ["红色"],
        "origins": ["text"],
        "evidences": [{"value": "红色", "paragraph": 0, "begin": 0, "end": 2}],
        "split": "train",
    }
    assert valid["attributes"][0]["values"] == ["绿"]
    assert [span["begin"] for span in valid["attributes"][0]["evidences"]] == [0, 2]
    assert not any(attribute["values"] for attribute in test["attributes"])
    assert tally.examples["cid in several splits"] == ["c_1"]


def test_products_that_splits_share_and_what_table_4_needs_are_counted(tmp_path: Path) -> None:
    release(tmp_path, valid="c_2\ts_2\t绿裤\t<颜色>绿</颜色>裤", test="c_1\ts_3\t无\t无\nc_1\ts_4\t红\t红")
    settings = products.Settings(kind="mepave")
    rows = products.build(tmp_path, "mepave", settings, Tally())
    counted = products.summary(rows, settings, Tally())["tables"]
    total = counted["Total"]
    assert (total["products"], total["instances"], total["attributes"], total["values"]) == (2, 4, 1, 2)
    assert total["paper"] == {"products": 34041, "instances": 87194, "attributes": 26, "values": 2129}
    shared = {"train and validation": 0, "train and test": 1, "validation and test": 0}
    assert counted["products in two splits"] == shared
    assert counted["sentences of a training product"] == {"validation": 0, "test": 2}
    assert counted["vocabulary"] == {"characters": 9, "with special words": 13, "paper": 2772}
    assert "no category" in counted["by category"]


@pytest.mark.parametrize(
    ("split", "by"),
    [
        ({"seed": 1}, "given"),
        ({}, "given"),
        ({"by": "product", "seed": 1}, "product"),
        ({"folds": 5}, "product"),
    ],
)
def test_a_seed_alone_is_no_split_of_ones_own(split: dict[str, Any], by: str) -> None:
    found = products.Settings.model_validate({"kind": "mepave", "split": split}).split
    assert found == Split.model_validate({**split, "by": by})


def test_a_split_of_ones_own_keeps_the_sentences_of_a_product_together(tmp_path: Path) -> None:
    rows = "\n".join(f"c_{i // 3}\ts_{i}\t红\t<颜色>红</颜色>" for i in range(60))
    settings = products.Settings(kind="mepave", split=Split(fractions=(0.5, 0.2, 0.3)))
    built = products.build(release(tmp_path, train=rows), "mepave", settings, Tally())
    assert len({(row["asin"], row["split"]) for row in built}) == 20
    assert {row["split"] for row in built} == {"train", "validation", "test"}


def test_a_repeated_sid_and_an_unknown_attribute_are_counted(tmp_path: Path) -> None:
    tally = Tally()
    release(tmp_path, train=f"{ROW}\n{ROW}\nc_2\ts_2\t大\t<尺码>大</尺码>")
    mepave.rows(tmp_path, "mepave", mepave.Negatives(), 0, tally)
    assert tally.counts["repeated sid"] == 1
    assert tally.examples["attribute not among the 26"] == ["s_2: 尺码"]


@pytest.mark.parametrize("pair", ["\t", "\u3000\t\u3000", "红\u3000\t红<颜色>\u3000</颜色>", "红\t<>红</>"])
def test_what_jave_writes_but_nobody_can_ask_for_is_no_product(tmp_path: Path, pair: str) -> None:
    tally = Tally()
    release(tmp_path, train=f"c_2\ts_2\t{pair}\n{ROW}")
    rows = mepave.rows(tmp_path, "mepave", mepave.Negatives(), 0, tally)
    assert [row["item"] for row in rows] == ["s_1"]
    assert tally.examples == {"blank text, attribute or value": ["jdair.jave.train.txt: s_2"]}


def test_a_missing_file_is_an_error_that_says_where_to_ask(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"none of jdair\.jave\.train\.txt .*form in the README of jd-aig/JAVE"
    ):
        mepave.files(tmp_path)
    release(tmp_path)
    (tmp_path / "jdai.jave.fashion.test.sample").write_text("")
    with pytest.raises(ValueError, match=r"both of jdair\.jave\.test\.txt"):
        mepave.files(tmp_path)


@pytest.mark.shared_data
@here
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_public_sample_comes_out_byte_for_byte(tmp_path: Path, split: str) -> None:
    mepave.write_sequences(SAMPLE / f"jdai.jave.fashion.{split}.sample", tmp_path)
    expected = {path.name: path.read_bytes() for path in (SAMPLE / "expected" / split).iterdir()}
    assert len(expected) == 4
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected


@pytest.mark.shared_data
@here
def test_the_published_vocabulary_and_two_more_words_are_the_papers(tmp_path: Path) -> None:
    """The paper's 2,772 are JAVE's list, padding and unknown included, and the two ends of an output."""
    words = (SAMPLE / "vocab.word").read_text(encoding="utf-8").split("\n")
    words = words[:-1] if not words[-1] else words
    assert words[:2] == ["[PAD]", "[UNK]"]
    assert all(len(word) == 1 and word == word.lower() for word in words[2:])
    assert len(words) - 2 + tables.SPECIAL_WORDS == tables.MEPAVE_VOCABULARY
    rows = products.build(SAMPLE, "mepave", products.Settings(kind="mepave"), Tally())
    assert set("".join(row["title"] for row in rows)) <= set(words)


@pytest.mark.shared_data
@here
def test_a_few_of_them_are_a_sample_like_that_of_any_corpus() -> None:
    settings = products.Settings(kind="mepave", max_products=12)
    rows = products.build(SAMPLE, "mepave", settings, Tally())
    assert len(rows) == 12
    assert all(any(attribute["values"] for attribute in row["attributes"]) for row in rows)


@pytest.mark.shared_data
@here
def test_the_public_sample_becomes_ninety_products() -> None:
    tally = Tally()
    rows = products.build(SAMPLE, "mepave", products.Settings(kind="mepave"), tally)
    asked = [attribute for row in rows for attribute in row["attributes"]]
    assert len(rows) == 90
    assert sum(bool(attribute["values"]) for attribute in asked) == 106
    assert sum(len(attribute["evidences"]) for attribute in asked) == 109
    assert not tally.counts


def test_the_command_writes_the_four_files_and_fails_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(ROW, encoding="utf-8")
    command = [sys.executable, "-m", "pipeline.mepave"]
    done = subprocess.run(
        [*command, tmp_path / "file", "--output", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"rows written": {"count": 1, "examples": []}}
    done = subprocess.run(
        [*command, tmp_path / "absent", "--output", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "absent" in done.stderr
