"""Lines of JSON, as hypothesis makes them and breaks them."""

import json
from collections.abc import Sequence

from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def maybe_damaged_lines(draw: st.DrawFn, fields: Sequence[str]) -> bytes:
    """An object with some of `fields`, at times with a piece cut out, doubled or overwritten."""
    row = draw(st.dictionaries(st.sampled_from(fields), JSON, max_size=5))
    line = json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    begin, end = sorted(draw(st.tuples(*2 * [st.integers(0, len(line))])))
    piece = draw(
        st.sampled_from([None, b"", line[begin:end] * 2, b"\xff", b"\\q", b"\x01", b'"', b"\\ud800"])
    )
    return line if piece is None else line[:begin] + piece + line[end:]
