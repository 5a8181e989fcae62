import json
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from damaged_lines import maybe_damaged_lines
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline import labels
from pipeline.tally import Tally

FIELDS = [*labels.Fields.__annotations__, "more"]
LABEL = {"id": "B000000001", "category": "Mugs", "attributes": []}


@given(st.lists(st.binary(max_size=9)), st.randoms(use_true_random=False), st.integers(0, 9))
def test_values_are_copied_in_any_order_as_they_are_got(values: list[bytes], rng: Any, copied: int) -> None:
    with tempfile.TemporaryDirectory() as folder, closing(labels.Spool(Path(folder))) as spool:
        for value in values:
            spool.add(value)
        numbers = rng.choices(range(len(values)), k=len(values)) if values else []
        for order in (range(len(values)), numbers):
            path = Path(folder, "copied")
            with path.open("wb") as to:
                spool.copy(order, to, copied)
            assert path.read_bytes() == b"".join(map(spool.get, order))


def reason(line: bytes) -> str | None:
    """Why a line is no label, for who has the standard library alone."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "malformed line"
    if not isinstance(row, dict):
        return "malformed line"
    if not isinstance(row.get("id"), str) or not isinstance(row.get("attributes"), list):
        return "label without id or attributes"
    return None if isinstance(row.get("category"), str) else "label without category"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # no test is timed
@given(maybe_damaged_lines(FIELDS), st.booleans())
@example(b'{"attributes": ["\xff"]}', True)
@example(b'{"attributes": [NaN, 1e999], "paragraphs": null}', True)
@example(b'{"attributes": {}}', True)
@example(b'{"more": ' + b"1" * 4301 + b"}", True)
@example(b'{"attributes": [' + b"1" * 4301 + b"]}", True)
def test_labels_are_indexed_as_the_standard_library_reads_them(line: bytes, whole: bool) -> None:
    line = line.replace(b"\n", b" ")
    if whole and line.startswith(b'{"'):  # else few lines have all that they need
        line = json.dumps(LABEL).encode()[:-1] + b", " + line[1:]
    with tempfile.TemporaryDirectory() as folder:
        path, tally = Path(folder, "l.jsonl"), Tally()
        path.write_bytes(line)
        with labels.Labels([path], tally, Path(folder)) as index:
            expected = None if not line or line.isspace() else reason(line)
            assert tally.counts == ({expected: 1} if expected else {})
            if len(index):
                row = json.loads(line)
                assert repr(index.label(0)) == repr(row)  # NaN is not itself
                assert index.is_full(0) == (row.get("paragraphs") is not None)
                assert list(index.products) == [row["id"].encode("utf-8", "surrogatepass")]
