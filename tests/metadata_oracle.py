"""Google's cleaning and join once more, slowly and plainly, and seeded damage to real metadata."""

import json
import random
import re
import warnings
from collections.abc import Iterable
from typing import Any

import bs4

SOURCES = ["title", "description", "feature", "price", "brand"]


def cleaned(raw: str, source: str) -> str | None:
    """The published rules one after the other, the parser always on; None for a dropped paragraph."""
    if source == "title" and re.search("getTime", raw):
        return None
    text = raw.encode("utf-8", errors="ignore").decode("utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            soup = bs4.BeautifulSoup(text, features="html.parser")
        except bs4.ParserRejectedMarkup:  # the original dies of it
            return None
    for name in ("style", "script"):
        for element in soup.find_all(name):
            element.extract()
    text = " ".join(" ".join(soup.stripped_strings).split())
    if not text:
        return None
    for sign in ["<a href", "javascript:", "background-color:", "background-image:", " li:", ".aloha"]:
        if sign in text:
            return None
    looks = [
        re.match(r"[.#]|div", token) is not None or "px" in token or len(token.split("-")) > 2
        for token in text.split()
    ]
    if sum(looks) > 20 and sum(looks) / len(looks) > 0.3:
        return None
    return text.encode("utf-8", errors="ignore").decode("utf-8")


def paragraphs(record: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    for source in SOURCES:
        data = record.get(source, [])
        texts = [data] if isinstance(data, str) else data if isinstance(data, list) else []
        for text in texts:
            if isinstance(text, str) and text.strip():  # of anything else the original dies
                result = cleaned(text.strip(), source)
                if result is not None:
                    found.append({"text": result, "source": source})
    return found


def joined(lines: Iterable[bytes], labels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every label with the first metadata line of its id that keeps a title, sorted by id."""
    texts: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(asin := record.get("asin"), str) and asin not in texts:
            found = paragraphs(record)
            if any(paragraph["source"] == "title" for paragraph in found):
                texts[asin] = found
    return [
        {
            "id": label["id"],
            "category": label["category"],
            "paragraphs": texts[label["id"]],
            "attributes": label["attributes"],
        }
        for label in sorted(labels, key=lambda label: label["id"])
        if label["id"] in texts
    ]


ENTITIES = [
    r"&amp;",
    r"&lt;",
    r"&gt;",
    r"&quot;",
    r"&nbsp;",
    r"&reg;",
    r"&trade;",
    r"&rsquo;",
    r"&mdash;",
    r"&eacute;",
    r"&amp",
    r"&nbsp",
    r"&copy2",
    r"&bogus;",
    r"&;",
    r"&",
    r"&#",
    r"&#39;",
    r"&#039;",
    r"&#160;",
    r"&#8217;",
    r"&#x27;",
    r"&#X2019;",
    r"&#0;",
    r"&#150;",
    r"&#xD800;",
    r"&#55357;",
    r"&#9999999999;",
    r"&#39",
    r"&#x;",
    r"&amp;lt;b&amp;gt;",
    r"&lt;a",
    r"&sup2;",
    r"&frac12;",
    r"&NotEqualTilde;",
    r"&AMP;",
    r"&Nbsp;",
]
OPENED = """<b>|<i>|<p>|<P>|<ul><li>|<div class="x">|<div class='y'>|<span style="color:red">|<font size=2>
<br>|<br/>|<br />|<BR>|<hr>|<img src="a.jpg"/>|<img alt="a > b">|<a\thref="x">|<a href="x">|<h1>|<h1 ID="x">
<table><tr><td>|<template>|<ruby><rt>|<rp>|<textarea>|<title>|<svg>|<p/>|<b/>|<script/>|<style/>|<o:p>|<b
<div class="x|<!--|<!DOCTYPE|<![if|<![CDATA[|<?|</|<|<3|<=|<b<i>|< b>|<a href|<em\xa0id="1">|<i/ id="2">
""".replace("\n", "|").split("|")
CLOSED = """</b>|</i>|</p>|</P>|</li></ul>|</div>|</span>|</font>|</br>|</hr>|</img>|</a>|</h1>|</td></tr>
</table>|</template>|</rt></ruby>|</rp>|</textarea>|</title>|</svg>|</p >|</B\t>|</script>|</style>|-->|>|]]>
</|</b|</>|</3>|</b/>|</div class="x">""".replace("\n", "|").split("|")
HIDDEN = (
    "<style>.a{color:red}</style>",
    "<STYLE type='text/css'> p { x: y } </STYLE >",
    "<script>var t = '<b>' + \"</b>\";</script>",
    '<script type="text/javascript"> if (a < b && c) { } </script>',
    "<script>never closed ",
    "<style>never closed either <b>x</b> ",
    "<script><!-- </script> --> </script>",
    "<style><style></style></style>",
    "<template><b>hidden</b></template>",
    "<!-- a comment <b> -- > -->",
    "<!DOCTYPE html>",
    "<![CDATA[ data ]]>",
    "<?php echo 1 ?>",
)
SIGNS = """getTime|<a href|javascript:|background-color:|background-image:|.aloha|px|#|.|--|div|a-b-c|10px
 li:| li: |x.getTime()""".replace("\n", "|").split("|")
BLANKS = (
    "\t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2009\u2028\u2029\u202f\u205f\u3000\u200b\ufeff\u180e\0\x08"
)
SPACES = (*BLANKS, "\r\n", "\ud83d", "\ude00", "  ")  # a lone half of a pair is dropped
CSS = (".a #b div 3px a-b-c { } color:", ".one .two #three div.four 12px a-b-c-d")
ODD = (None, 7, 1.5, True, {}, {"a": "b"}, [], [None], [7, "kept"], [["nested"]], "", " ", [""], ["", " "])


def mutated(line: bytes, rng: random.Random, asin: str, others: list[str]) -> bytes:
    """A real metadata line as of `asin`, damaged in one to four ways; it may take an asin of `others`."""
    record = {**json.loads(line), "asin": asin}
    for _ in range(rng.randint(1, 4)):
        source = rng.choice(SOURCES)
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                _each_text(record, source, lambda text: _inserted(text, rng))
            case 4:
                _each_text(record, source, lambda text: _wrapped(text, rng))
            case 5:
                _each_text(record, source, lambda text: _with_css(text, rng))
            case 6:
                record[source] = rng.choice(ODD)
            case 7:
                record["asin"] = rng.choice(others)
            case 8:
                record["title"] = rng.choice(["", "x.getTime()", "<b></b>", "Fine", None])
            case 9:
                _each_text(record, source, lambda text: text + rng.choice(HIDDEN) + text)
    return _serialised(record, rng)


def _each_text(record: dict[str, Any], source: str, change: Any) -> None:
    given = record.get(source)
    if isinstance(given, str):
        record[source] = change(given)
    elif isinstance(given, list) and given:
        record[source] = [change(text) if isinstance(text, str) else text for text in given[:6]]


def _inserted(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(text))
        kind = rng.choice((ENTITIES, OPENED, CLOSED, HIDDEN, SIGNS, SPACES, ENTITIES, SPACES))
        text = text[:at] + rng.choice(kind) + text[at:]
    return text


def _with_css(text: str, rng: random.Random) -> str:
    css = " ".join(rng.choices(rng.choice(CSS).split(), k=rng.randint(15, 45)))
    return f"{css} {' '.join(text.split()[: rng.randint(0, 60)])}"


def _wrapped(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 5)):
        text = f"{rng.choice(OPENED)}{text}{rng.choice(CLOSED)}"
    return text


def _serialised(record: dict[str, Any], rng: random.Random) -> bytes:
    separators = rng.choice([(", ", ": "), (",", ":"), (" , ", " : ")])
    line = json.dumps(record, ensure_ascii=rng.random() < 0.7, separators=separators)
    data = line.encode("utf-8", "ignore")
    match rng.randrange(30):
        case 0:
            data = data[: rng.randint(0, len(data))]
        case 1:
            at = rng.randint(0, len(data))
            data = data[:at] + b"\xff" + data[at:]
        case 2:
            data = data[:-1] + b', "rank": NaN}'
        case 3:
            data = data[:-1] + b', "related": {"asin": "B00000000X"}}'
        case 4:
            data = data.replace(b'"asin": "B', b'"asin": "\\u0042')
        case 5:
            data = b'{"related": [{"asin": "B00000000X"}], ' + data[1:]
    return data
