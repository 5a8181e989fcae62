"""What is particular to Amazon's metadata: categories in odd spellings, picture addresses in two shapes.

The 2018 release as one file has thumbnails under `image`; the files by category have `imageURL` (thumbnails)
and `imageURLHighRes`. A size in a picture's address, `51abc._SS40_.jpg`, makes the server scale it.
"""

import html
import re
from collections.abc import Mapping
from typing import Any

THUMBNAILS = ("imageURL", "image")
SIZE = re.compile(r"\._[A-Za-z0-9,+%-]+(?:_[A-Za-z0-9,+%-]+)*_(?=\.[A-Za-z]+$)")
A_PICTURE = re.compile(r"https?://[^/?#]+/images/[A-Z]/[^/?#]+\.[A-Za-z]+$")


def image_urls(metadata: Mapping[str, Any]) -> list[str]:
    """Picture addresses, best first: high resolution as published, else those of the thumbnails, unscaled."""
    if published := _texts(metadata.get("imageURLHighRes")):
        return published
    for key in THUMBNAILS:
        if found := _texts(metadata.get(key)):
            return list(dict.fromkeys(map(high_resolution, found)))
    return []


def high_resolution(url: str) -> str:
    """The address of the unscaled picture; addresses that are none of Amazon's stay as they are."""
    return SIZE.sub("", url) if A_PICTURE.match(url) else url


def sized(url: str, longer_side_px: int | None) -> str:
    """The address at which the server scales the picture; None: as it is."""
    if longer_side_px is None or not A_PICTURE.match(url):
        return url
    name, _, extension = high_resolution(url).rpartition(".")
    return f"{name}._SL{longer_side_px}_.{extension}"


def root_category(metadata: Mapping[str, Any]) -> str:
    """`main_cat`, which may be an image tag with the name as its alt text, written with "and"; or ""."""
    name = metadata.get("main_cat")
    if not isinstance(name, str):
        return ""
    if alt := re.search(r'alt="([^"]*)"', name):
        name = alt[1]
    return " ".join(html.unescape(name).replace("&", " and ").split())


def _texts(given: Any) -> list[str]:
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list):
        return []
    return [text.strip() for text in given if isinstance(text, str) and text.strip()]
