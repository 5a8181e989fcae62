"""Google's cleaning of Amazon metadata, rule by rule, as the MAVE labels' offsets were made on its output.

The rules are those of MAVE's published cleaning step; paragraphs are numbered after them (`pid`).
Offsets hold for the pinned bs4 and Python only: both decide what a stray `<` means.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import stringzilla as sz

from pipeline.schema import TEXT_SOURCES
from pipeline.tally import Tally

HTML_SIGNS = ("<a href", "javascript:", "background-color:", "background-image:", " li:", ".aloha")
CONTROLS = "".join(map(chr, range(ord(" "))))
BLANK = "nothing but markup or blanks"
NOTHING: list[str] = []
CSS_SHARE = 0.3
CSS_TOKENS = 20
# Elements that hide no text and have no rules of their own in the parser (an end tag of br, hr, img has one).
BOXES = "[abisu]|p|li|ul|ol|em|strong|span|div|font|table|tbody|tr|td|th|h[1-6]|center|small|big|dl|dt|dd"
PLAIN_TAG = re.compile(
    rf"""<(?:/(?:{BOXES})|(?:{BOXES}|br|hr|img)(?:\s+[a-z-]+="[^"<>&]*")*\s*/?)>""", re.IGNORECASE | re.ASCII
)
PLAIN_ENTITIES = {
    **{"amp": "&", "lt": "<", "gt": ">", "quot": '"', "nbsp": "\xa0", "reg": "®", "trade": "™", "copy": "©"},
    **{"bull": "•", "ndash": "–", "mdash": "—", "rsquo": "’", "lsquo": "‘", "rdquo": "”", "ldquo": "“"},
    **{f"#{code}": chr(code) for code in range(32, 127)},
}


def paragraphs(record: Mapping[str, Any], tally: Tally | None = None) -> list[tuple[str, str]]:
    """The cleaned `(text, source)` list of one metadata record, in the fixed order of sources.

    A record without a `title` among them is no product (see `has_title`). Dropped paragraphs are
    counted in `tally` as `paragraph: reason`.
    """
    tally, where = tally or Tally(), str(record.get("asin"))
    unmarked, texts = [], [""]
    for source in TEXT_SOURCES:
        is_title = source == "title"
        for text in _texts(record.get(source, NOTHING), source, tally):
            if "<" in text or "&" in text or is_title:
                text, reason = _unmarked(text, source)
                if reason:
                    tally.add(f"paragraph: {reason}", where)
                    continue
            unmarked.append((text, source))
            texts.append(text)
    if not unmarked:
        return []
    # All together first: looked at as one text, nearly every record needs nothing more. Blanks before the
    # others: a text with half of a surrogate pair is no good there, and stringzilla would not survive it.
    whole = "| ".join(texts)
    if _has_single_blanks(whole) and not is_html(whole) and _max_css(whole) <= CSS_TOKENS:
        return unmarked
    kept = []
    for text, source in unmarked:
        text, reason = _finished(text)
        if reason:
            tally.add(f"paragraph: {reason}", where)
        else:
            kept.append((text, source))
    return kept


def has_title(cleaned: list[tuple[str, str]]) -> bool:
    return any(source == "title" for _, source in cleaned)


def clean(raw: str, source: str) -> tuple[str, str | None]:
    """`(text, None)`, or `("", reason)` for a paragraph that is dropped."""
    text, reason = _unmarked(raw, source)
    return ("", reason) if reason else _finished(text)


def _unmarked(raw: str, source: str) -> tuple[str, str | None]:
    """The text without markup; blanks are as they were where there was none."""
    if source == "title" and "getTime" in raw:
        return "", "title is a script dump"
    # The parser passes text through as it is where neither of its two special characters occurs.
    if "<" not in raw and "&" not in raw:
        return raw, None
    text = without_surrogates(raw)
    try:
        text = " ".join((_without_plain_markup(text) or without_markup(text)).split())
    except ValueError:
        return "", "markup that cannot be parsed"
    return (text, None) if text else ("", BLANK)


def _finished(text: str) -> tuple[str, str | None]:
    text = " ".join(without_surrogates(text).split())
    if not text:
        return "", BLANK
    if is_html(text):
        return "", "html"
    if is_css(text):
        return "", "css"
    return text, None


def without_surrogates(text: str) -> str:
    """Without lone halves of surrogate pairs: JSON can hold them, UTF-8 and Arrow cannot."""
    return text if text.isascii() else text.encode("utf-8", "ignore").decode("utf-8")


def _without_plain_markup(html: str) -> str | None:
    """What `without_markup` gives, up to blanks, where every tag and entity is a plain one; else None.

    The parser ends a piece of text at each tag, so a tag is a blank; its tree does not matter as long as
    no element in it hides its text. Nine tenths of the markup in Amazon's texts is of this kind.
    """
    text = PLAIN_TAG.sub(" ", html)
    if "<" in text:
        return None
    first, *others = text.split("&")
    pieces = [first]
    for other in others:
        name, semicolon, rest = other.partition(";")
        character = PLAIN_ENTITIES.get(name)
        if not semicolon or character is None:
            return None
        pieces += character, rest
    return "".join(pieces)


def without_markup(html: str) -> str:
    """The text outside style and script elements, entities decoded, pieces joined by one space.

    Raises `ValueError` for the rare markup that html.parser rejects.
    """
    import bs4

    with warnings.catch_warnings():
        # bs4 warns of texts that look like a URL, a file name or XML; here these are just texts
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
        warnings.simplefilter("ignore", bs4.XMLParsedAsHTMLWarning)
        try:
            soup = bs4.BeautifulSoup(html, "html.parser")
        except bs4.ParserRejectedMarkup as error:
            raise ValueError(f"html.parser rejects the markup: {error}") from error
    for element in soup(["style", "script"]):
        element.decompose()
    return " ".join(soup.stripped_strings)


def is_html(text: str) -> bool:
    """Whether one of the six signs of markup or script is left in `text`, which has no lone surrogates."""
    return any(sz.contains(text, sign) for sign in HTML_SIGNS)


def is_css(text: str) -> bool:
    """Whether more than 20 tokens, and more than 30 % of them, look like CSS.

    `text` has single blanks and no lone surrogates.
    """
    if _max_css(text) <= CSS_TOKENS:
        return False
    tokens = text.split()
    num_css = sum(
        token.startswith((".", "#", "div")) or "px" in token or token.count("-") > 1 for token in tokens
    )
    return num_css > CSS_TOKENS and num_css / len(tokens) > CSS_SHARE


def _max_css(text: str) -> int:
    """How many tokens of `text`, with single blanks, may look like CSS at most; it is not taken apart."""
    count = sz.count
    starts = 1 + count(text, " .") + count(text, " #") + count(text, " div")
    return starts + count(text, "px") + count(text, "-") // 2


def _has_single_blanks(text: str) -> bool:
    """Whether `split` and `join` would change nothing; False also for what is neither ASCII nor printed."""
    if not text.isascii():
        return text.isprintable() and "  " not in text
    return sz.find_first_of(text, CONTROLS) < 0 and not sz.contains(text, "  ")


def _texts(data: Any, source: str, tally: Tally) -> list[str]:
    """The texts of one field, stripped, without blank ones."""
    if isinstance(data, str):
        data = [data]
    elif not isinstance(data, list):
        tally.add(f"paragraph: {source} is neither text nor list")
        return []
    try:
        return [stripped for text in data if (stripped := text.strip())]
    except AttributeError:  # something that is no text among them
        pass
    tally.add(
        f"paragraph: {source} holds something that is no text",
        count=sum(not isinstance(text, str) for text in data),
    )
    return [stripped for text in data if isinstance(text, str) and (stripped := text.strip())]
