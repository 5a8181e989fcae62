import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import metadata_oracle as oracle
import psutil
import pytest
from conftest import ROOT, SHARED_DATA
from damaged_lines import maybe_damaged_lines
from hypothesis import HealthCheck, example, given, settings

from pipeline import amazon, clean, lines, mave, unzip
from pipeline.tally import Tally

GIFT_CARDS = SHARED_DATA / "amazon-gift-cards" / "meta_Gift_Cards.json.gz"


def write(path: Path, *rows: Any, tail: bytes = b"") -> Path:
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + tail)
    return path


def label(asin: str, *keys: str) -> dict[str, Any]:
    return {"id": asin, "category": "Mugs", "attributes": [{"key": key, "evidences": []} for key in keys]}


def product(asin: str, title: Any, **more: Any) -> dict[str, Any]:
    return {"asin": asin, "title": title, **more}


def joined(folder: Path, metadata: list[Path], labels: list[Path]) -> tuple[list[dict[str, Any]], Tally]:
    tally = mave.join(metadata, labels, folder / "out.jsonl")
    return [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()], tally


@pytest.fixture(params=["in this process", "beside it"])
def unzipping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Files of any size are unzipped here, or by a process of their own."""
    monkeypatch.setattr(lines, "LARGE_BYTES", 0 if request.param == "beside it" else 1 << 40)
    return request.param


def test_one_full_line_is_written_per_label_line_sorted_by_id(tmp_path: Path) -> None:
    metadata = write(
        tmp_path / "m.jsonl",
        product("B000000002", "Two", feature=["<p>soft</p>", ""], brand="Acme"),
        product("B000000009", "Nobody asks"),
        product("B000000001", "One"),
    )
    positives = write(tmp_path / "p.jsonl", label("B000000002", "Type"), label("B000000001", "Type"))
    negatives = write(tmp_path / "n.jsonl", label("B000000001", "Size"))
    rows, tally = joined(tmp_path, [metadata], [positives, negatives])
    assert [list(row) for row in rows] == [["id", "category", "paragraphs", "attributes"]] * 3
    assert [(row["id"], row["attributes"][0]["key"]) for row in rows] == [
        ("B000000001", "Type"),
        ("B000000001", "Size"),
        ("B000000002", "Type"),
    ]
    assert rows[2]["paragraphs"] == [
        {"text": "Two", "source": "title"},
        {"text": "soft", "source": "feature"},
        {"text": "Acme", "source": "brand"},
    ]
    assert tally.counts["lines written"] == 3
    assert tally.counts["metadata without label"] == 1


def test_the_first_metadata_line_that_survives_cleaning_wins(tmp_path: Path) -> None:
    first = write(
        tmp_path / "1.jsonl", product("B000000001", "x.getTime()"), product("B000000001", "", brand="x")
    )
    second = write(
        tmp_path / "2.jsonl", product("B000000001", "Good"), product("B000000001", "Late and better")
    )
    rows, tally = joined(
        tmp_path, [first, second], [write(tmp_path / "l.jsonl", label("B000000001", "Type"))]
    )
    assert [row["paragraphs"][0]["text"] for row in rows] == ["Good"]
    assert tally.counts["no title"] == 2
    assert tally.counts["repeated metadata"] == 1
    assert tally.examples["repeated metadata"] == ["2.jsonl:2"]
    assert "no metadata" not in tally.counts


def test_a_product_without_title_is_not_also_counted_as_without_metadata(tmp_path: Path) -> None:
    metadata = write(tmp_path / "m.jsonl", product("B000000001", ""))
    rows, tally = joined(tmp_path, [metadata], [write(tmp_path / "l.jsonl", label("B000000001", "Type"))])
    assert not rows
    assert tally.counts == {"no title": 1, "lines written": 0}


def test_spans_are_passed_on_unchecked(tmp_path: Path) -> None:
    wrong = {"key": "Type", "evidences": [{"value": "x", "pid": 9, "begin": 5, "end": 2}]}
    labels = write(tmp_path / "l.jsonl", {"id": "B000000001", "category": "Mugs", "attributes": [wrong]})
    rows, _ = joined(tmp_path, [write(tmp_path / "m.jsonl", product("B000000001", "One"))], [labels])
    assert rows[0]["attributes"] == [wrong]


def test_a_line_with_paragraphs_needs_no_metadata(tmp_path: Path) -> None:
    full = {**label("B000000001", "Type"), "paragraphs": [{"text": "One", "source": "title"}], "more": 1}
    rows, _ = joined(tmp_path, [], [write(tmp_path / "l.jsonl", full)])
    assert rows == [{name: full[name] for name in ("id", "category", "paragraphs", "attributes")}]


@pytest.mark.parametrize("blank", ["", " " * 5000], ids=["as fields", "as a whole"])
def test_a_line_whose_paragraphs_are_null_needs_metadata(tmp_path: Path, blank: str) -> None:
    row = {**label("B000000001"), "paragraphs": None, "note": blank}
    (row_out,), tally = joined(
        tmp_path,
        [write(tmp_path / "m.jsonl", product("B000000001", "One"))],
        [write(tmp_path / "l.jsonl", row)],
    )
    assert row_out["paragraphs"] == [{"text": "One", "source": "title"}]
    assert tally.counts == {"lines written": 1}


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_plain_gzipped_and_twice_gzipped_files_are_read_alike(
    tmp_path: Path, layers: int, unzipping: str
) -> None:
    data = json.dumps(product("B000000001", "One")).encode() + b"\n"
    for _ in range(layers):
        data = gzip.compress(data)
    (tmp_path / "All.json.gz").write_bytes(data)
    rows, _ = joined(tmp_path, [tmp_path / "All.json.gz"], [write(tmp_path / "l.jsonl", label("B000000001"))])
    assert rows[0]["paragraphs"] == [{"text": "One", "source": "title"}]


def test_lines_that_cannot_be_used_are_counted_with_their_place(tmp_path: Path) -> None:
    metadata = tmp_path / "m.jsonl"
    metadata.write_bytes(
        b'\xef\xbb\xbf{"asin": "B000000001", "title": "One"}\r\n'
        b"\n"
        b'{"asin": "B000000002", "title": "cut o\n'
        b'[1, "asin"]\n'
        b'{"title": "no asin"}\n'
        b'{"asin": 7, "title": "number"}\n'
        b'{"asin": "B000000003", "title": "bad utf8 \xff"}\n'
        b'{"asin": "B000000004", "title": "NaN is read", "price": NaN}\n'
        b'{"asin": "B000000005", "title": "half a \\ud83d pair"}\n'
        b'{"asin": "B00000000\\u0036", "title": "escaped"}'
    )
    labels = write(tmp_path / "l.jsonl", *(label(f"B00000000{i}", "Type") for i in range(1, 7)))
    rows, tally = joined(tmp_path, [metadata], [labels])
    assert [row["id"][-1] for row in rows] == ["1", "4", "5", "6"]
    assert rows[2]["paragraphs"][0]["text"] == "half a pair"
    assert tally.examples["malformed line"] == ["m.jsonl:3", "m.jsonl:4", "m.jsonl:7"]
    assert tally.examples["metadata without asin"] == ["m.jsonl:5", "m.jsonl:6"]
    assert tally.examples["no metadata"] == ["B000000002", "B000000003"]


def test_label_lines_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    labels = write(
        tmp_path / "l.jsonl",
        label("B000000001", "Type"),
        label("B000000001", "Size"),
        {"id": "B000000002", "category": "Mugs"},
        {"category": "Mugs", "attributes": []},
        {"id": "B000000003", "attributes": []},
        tail=b'{"id": "B0000',
    )
    rows, tally = joined(tmp_path, [write(tmp_path / "m.jsonl", product("B000000001", "One"))], [labels])
    assert len(rows) == 1
    assert tally.examples["repeated label"] == ["l.jsonl:2"]
    assert tally.examples["label without id or attributes"] == ["l.jsonl:3", "l.jsonl:4"]
    assert tally.examples["label without category"] == ["l.jsonl:5"]
    assert tally.examples["malformed line"] == ["l.jsonl:6"]


def test_labels_too_deep_to_be_written_are_counted(tmp_path: Path) -> None:
    deep = json.dumps(label("B000000001")).replace("[]", 990 * "[" + 990 * "]")
    labels = write(tmp_path / "l.jsonl", label("B000000002", "Type"), tail=deep.encode() + b"\n")
    metadata = write(tmp_path / "m.jsonl", *(product(f"B00000000{i}", "A mug") for i in (1, 2)))
    rows, tally = joined(tmp_path, [metadata], [labels])
    assert [row["id"] for row in rows] == ["B000000002"]
    assert tally.examples["malformed line"] == ["l.jsonl:2"]


def test_a_giant_line_is_counted_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'"' + b"x" * 350 + b'"\n' + b"{}\n")
    tally = Tally()
    assert list(lines.numbered(path, tally)) == [(2, b"{}")]
    assert tally.examples == {"line too long": ["m.jsonl:1"]}


@pytest.mark.parametrize("block_bytes", [2, 3, 7, 64, 1000])
def test_lines_that_nobody_wants_are_passed_over_wherever_blocks_end(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 30)
    path, asked, tally = tmp_path / "m.jsonl", [], Tally()
    giant = b"+" * 1100
    path.write_bytes(b"\n".join([b"+one", b"-two", b"", giant, b"-", b"+" * 9, b"  ", b"-no", b"+last"]))

    def is_wanted(block: bytes, begin: int, end: int) -> bool:
        asked.append(block[begin:end])
        return not block.startswith(b"-", begin, end)

    assert list(lines.numbered(path, tally, is_wanted)) == [(1, b"+one"), (6, b"+" * 9), (9, b"+last")]
    assert set(asked) - {b"", b"  "} == {b"+one", b"-two", b"-", b"+" * 9, b"-no", b"+last"}
    assert tally.examples == {"line too long": ["m.jsonl:4"]}


FIELDS = [*mave.Metadata.__annotations__, "also_buy", "similar_item", "tech1"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # no test is timed
@given(maybe_damaged_lines(FIELDS))
@example(b'{"asin": "B000000001", "tech1": "\xff"}')
def test_fields_that_are_asked_for_are_read_as_the_standard_library_reads_them(line: bytes) -> None:
    tally = Tally()
    found = lines.parse_fields(line, "here", tally, mave.READ)
    try:
        expected = json.loads(line)
    except (ValueError, RecursionError):
        expected = None
    if not isinstance(expected, dict):
        assert found is None
        assert tally.counts == {"malformed line": 1}
        return
    asked = mave.Metadata.__annotations__
    assert found is not None
    assert repr({name: found[name] for name in found if name in asked}) == repr(  # NaN is not itself
        {name: expected[name] for name in expected if name in asked}
    )


def test_nobody_asks_for_a_field_that_is_not_read() -> None:
    asked = set()

    class Asked(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return default

    clean.paragraphs(Asked())
    amazon.image_urls(Asked())
    amazon.root_category(Asked())
    assert asked == set(mave.Metadata.__annotations__)


IN_ADVANCE_BYTES = unzip.NUM_SLOTS * unzip.SLOT_BYTES
MANY_LINES = b"".join(b"%099d\n" % number for number in range(2 * IN_ADVANCE_BYTES // 100))


def test_a_large_gzip_is_read_whole_whoever_unzips_it(tmp_path: Path, unzipping: str) -> None:
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(MANY_LINES, 1))
    assert b"".join(line + b"\n" for _, line in lines.numbered(path, Tally())) == MANY_LINES


def test_who_stops_reading_a_gzip_early_leaves_no_process_that_unzips_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(MANY_LINES))
    before = psutil.Process().children()
    reading = lines.numbered(path, Tally())
    assert next(reading) == (1, b"%099d" % 0)
    assert len(psutil.Process().children()) == len(before) + 1
    reading.close()
    assert psutil.Process().children() == before


def test_the_first_of_some_gzips_is_begun_before_a_line_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    paths = [tmp_path / name for name in ("a.json.gz", "b.json.gz")]
    for path in paths:
        path.write_bytes(gzip.compress(MANY_LINES, 1))
    before = psutil.Process().children()
    with lines.begun(paths) as sources:
        assert len(psutil.Process().children()) == len(before) + 1
        paths[0].unlink()
        read = [line + b"\n" for source in sources for _, line in lines.numbered(source, Tally())]
        assert b"".join(read) == 2 * MANY_LINES
    with lines.begun(paths[1:]):
        assert len(psutil.Process().children()) == len(before) + 1
    assert psutil.Process().children() == before


def test_a_truncated_gzip_is_an_error_that_names_the_file(tmp_path: Path, unzipping: str) -> None:
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(json.dumps(product("B000000001", "One" * 500)).encode())[:-12])
    with pytest.raises(ValueError, match=r"m\.json\.gz is damaged or cut short: \w+"):
        list(lines.numbered(path, Tally()))


LONG_LINES = b"".join(  # looked at faster than unzipped
    b"%019999d\n" % number for number in range(2 * IN_ADVANCE_BYTES // 20_000)
)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_a_large_gzip_cut_anywhere_is_an_error_that_names_the_file(
    share: float, tmp_path: Path, unzipping: str
) -> None:
    path, whole = tmp_path / "m.json.gz", gzip.compress(LONG_LINES, 1)
    path.write_bytes(whole[: 20 + round(share * (len(whole) - 30))])
    with pytest.raises(ValueError, match=r"m\.json\.gz is damaged or cut short: \w+"):
        list(lines.numbered(path, Tally()))


def test_text_that_begins_like_a_gzip_is_damaged(tmp_path: Path, unzipping: str) -> None:
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(b"\x1f\x8b\x08hello\nworld\n" * 100_000))
    with pytest.raises(ValueError, match=r"m\.json\.gz is damaged or cut short: \w+"):
        list(lines.numbered(path, Tally()))


def test_an_unzipping_that_is_killed_while_slots_are_free_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(LONG_LINES, 1))
    reading = lines.numbered(path, Tally())
    next(reading)
    child = psutil.Process().children()[-1]
    while child.status() != psutil.STATUS_SLEEPING:  # all slots are full then
        time.sleep(0.01)
    child.suspend()
    for _ in range(2 * unzip.SLOT_BYTES // 20_000 + 20):
        next(reading)
    child.kill()
    with pytest.raises(OSError, match=r"m\.json\.gz could not be unzipped: that ended with -9"):
        list(reading)


def test_a_cut_gzip_is_an_error_where_the_exit_status_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(LONG_LINES, 1)[:-1000])
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as whoever starts the program may have it
    try:
        with pytest.raises(OSError, match=r"m\.json\.gz could not be unzipped: that ended with 0 \w+"):
            list(lines.numbered(path, Tally()))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_killed_unzipping_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LARGE_BYTES", 0)
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(MANY_LINES))
    reading = lines.numbered(path, Tally())
    next(reading)
    psutil.Process().children()[-1].kill()
    with pytest.raises(OSError, match=r"m\.json\.gz could not be unzipped: that ended with -9"):
        list(reading)


def test_a_git_lfs_pointer_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
    with pytest.raises(ValueError, match=r"labels\.jsonl is a Git LFS pointer"):
        list(lines.numbered(path, Tally()))


def test_no_output_is_left_when_the_join_fails(tmp_path: Path) -> None:
    broken = tmp_path / "m.json.gz"
    broken.write_bytes(gzip.compress(b'{"asin": "B000000001"}')[:20])
    with pytest.raises(ValueError, match="damaged"):
        mave.join([broken], [write(tmp_path / "l.jsonl", label("B000000001"))], tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["l.jsonl", "m.json.gz"]


def test_the_command_writes_the_file_and_tells_the_counts(tmp_path: Path) -> None:
    metadata = write(tmp_path / "m.jsonl", product("B000000001", "One"))
    labels = write(tmp_path / "l.jsonl", label("B000000001", "Type"), label("B000000002", "Type"))
    command = [sys.executable, "-m", "pipeline.mave", "--metadata", metadata, "--labels", labels, "--output"]
    done = subprocess.run(
        [*command, tmp_path / "out.jsonl"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["no metadata"] == {"count": 1, "examples": ["B000000002"]}
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 1
    metadata.unlink()
    done = subprocess.run([*command, tmp_path / "out.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pipeline.mave:" in done.stderr


@pytest.mark.shared_data
@pytest.mark.skipif(not GIFT_CARDS.is_file(), reason="../shared/data/amazon-gift-cards is not there")
@pytest.mark.parametrize(
    ("seed", "number"),
    [(0, 600), pytest.param(1, 20_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])],
)
def test_damaged_real_metadata_is_joined_as_google_does_it(tmp_path: Path, seed: int, number: int) -> None:
    with gzip.open(GIFT_CARDS) as file:
        real = file.read().splitlines()
    rng = random.Random(seed)
    asins = [f"B{i:09d}" for i in range(number)]
    others = rng.sample(asins, number // 10)
    damaged = [oracle.mutated(rng.choice(real), rng, asin, others) for asin in asins]
    (tmp_path / "m.json.gz").write_bytes(gzip.compress(gzip.compress(b"\n".join(damaged), 1), 1))
    labels = [label(asin, "Type") for asin in asins if rng.random() < 0.9]
    rows, tally = joined(tmp_path, [tmp_path / "m.json.gz"], [write(tmp_path / "l.jsonl", *labels)])
    expected = oracle.joined(damaged, labels)
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == other
    counted = ("repeated metadata", "no title", "malformed line", "metadata without label")
    assert all(tally.counts[reason] for reason in counted), "the damage is too mild to tell anything"
    assert {"paragraph: html", "paragraph: css"} <= tally.counts.keys()


@pytest.mark.shared_data
@pytest.mark.skipif(not GIFT_CARDS.is_file(), reason="../shared/data/amazon-gift-cards is not there")
def test_real_metadata_is_joined_as_a_plain_dictionary_join_does(tmp_path: Path) -> None:
    with gzip.open(GIFT_CARDS) as file:
        records = [json.loads(line) for line in file]
    asked = sorted({record["asin"] for record in records[::3]})
    labels = write(tmp_path / "l.jsonl", *(label(asin, "Type") for asin in reversed(asked)))
    rows, tally = joined(tmp_path, [GIFT_CARDS], [labels])
    expected: dict[str, Any] = {}
    for record in records:
        texts = clean.paragraphs(record)
        if record["asin"] in asked and clean.has_title(texts) and record["asin"] not in expected:
            paragraphs = [{"text": text, "source": source} for text, source in texts]
            expected[record["asin"]] = {
                "id": record["asin"],
                "category": "Mugs",
                "paragraphs": paragraphs,
                "attributes": [{"key": "Type", "evidences": []}],
            }
    assert rows == [expected[asin] for asin in sorted(expected)]
    assert tally.counts["lines written"] > 450
