"""MEPAVE: sentences of Chinese product titles with inline attribute tags.

    python -m pipeline.mepave FILE --output FOLDER

writes the four aligned files that JAVE's pre-processing makes: `indexs`, `input.seq`, `output.seq`,
`output.label`. A row is `cid TAB sid TAB text TAB text with <attribute>value</attribute>`.
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline import params, schema
from pipeline.disk import atomically
from pipeline.split import rank
from pipeline.tally import Tally

ATTRIBUTES = tuple(
    [
        "图案",
        "材质",
        "风格",
        "颜色",
        "领型",
        "版型",
        "闭合方式",
        "工艺",
        "袖长",
        "适用季节",
        "鞋帮高度",
        "裤型",
        "腰型",
        "袖型",
        "鞋头款式",
        "裤长",
        "鞋跟高度",
        "厚度",
        "靴筒高度",
        "口袋类型",
        "开口深度",
        "裙长",
        "弹性",
        "形状",
        "下摆类型",
        "开衩类型",
    ]
)
FILES = {  # split -> names, of the full release and of the public sample
    "train": ("jdair.jave.train.txt", "jdai.jave.fashion.train.sample"),
    "validation": ("jdair.jave.valid.txt", "jdai.jave.fashion.valid.sample"),
    "test": ("jdair.jave.test.txt", "jdai.jave.fashion.test.sample"),
}
# As JAVE's script walks: a name ends at the next ">", a value at the next "<" after its first character.
TAGGED = re.compile(r"<([^>]*)>(.[^<]*)</\1>|([^<])", re.DOTALL)
UNDECODED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte
REQUEST = "ask for the data with the form in the README of jd-aig/JAVE"


class Negatives(params.Settings):
    """How many of the 26 attributes that a sentence lacks are asked besides those that it has."""

    train: int = Field(default=3, ge=0, le=26)
    evaluation: int = Field(default=26, ge=0, le=26)


@dataclass(frozen=True, slots=True)
class Sentence:
    cid: str
    sid: str
    text: str
    spans: tuple[tuple[str, int, int], ...]  # attribute, begin and end in characters


def parse(line: str) -> Sentence | str:
    """The sentence of a row, both texts lower-cased as in JAVE, or the reason why there is none."""
    fields = line.split("\t")
    if len(fields) != 4:
        return "row without four fields"
    cid, sid = fields[:2]
    text, tagged = fields[2].lower(), fields[3].lower()
    if any(not schema.ID_PATTERNS["mepave"].fullmatch(number) for number in (cid, sid)):
        return "id is not a cid or sid"
    if " " in text + tagged:
        return "blank in the text"
    spans, plain, end = [], "", 0
    while end < len(tagged):
        match = TAGGED.match(tagged, end)
        if match is None:
            return "broken tags"
        end = match.end()
        name, value, other = match.groups()
        if value:
            spans.append((name, len(plain), len(plain) + len(value)))
        plain += value or other
    if plain != text:
        return "texts differ"
    return Sentence(cid, sid, text, tuple(spans))


def sentences(path: Path, tally: Tally) -> Iterator[Sentence]:
    """All usable rows of a file; the others are counted by reason with their line number."""
    # As JAVE reads them: with any line end, and without the blanks that end the file.
    content = path.read_text(encoding="utf-8-sig", errors="surrogateescape").rstrip()
    for number, line in enumerate(content.split("\n"), start=1):
        where = f"{path.name}:{number}"
        if not line:
            continue
        if UNDECODED.search(line):
            tally.add("not UTF-8", where)
            continue
        sentence = parse(line)
        if isinstance(sentence, str):
            tally.add(sentence, where)
        else:
            yield sentence


def tags(sentence: Sentence) -> list[str]:
    """One BIO tag per character."""
    bio = ["O"] * len(sentence.text)
    for attribute, begin, end in sentence.spans:
        bio[begin:end] = [f"B-{attribute}"] + [f"I-{attribute}"] * (end - begin - 1)
    return bio


def write_sequences(path: Path, folder: Path) -> Tally:
    """The four aligned files of one split, byte for byte as JAVE's own script writes them.

    Two differences: JAVE's takes any cid and sid, and ignores a fifth field; here such a row is counted. So
    is what JAVE's fails at: fewer fields, no UTF-8.
    """
    tally = Tally()
    columns: dict[str, list[str]] = {"indexs": [], "input.seq": [], "output.seq": [], "output.label": []}
    for sentence in sentences(path, tally):
        columns["indexs"].append(f"{sentence.cid}\t{sentence.sid}")
        columns["input.seq"].append(" ".join(sentence.text))
        columns["output.seq"].append(" ".join(tags(sentence)))
        columns["output.label"].append(" ".join(sorted({name for name, _, _ in sentence.spans}) or ["[PAD]"]))
    with contextlib.ExitStack() as stack:  # none gets its name before all are written: they are aligned
        for name, rows in columns.items():
            temporary = stack.enter_context(atomically(folder / name))
            temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    tally.add("rows written", count=len(columns["indexs"]))
    return tally


def files(folder: Path) -> dict[str, Path]:
    """The file of each split, under either of its names; `ValueError` says what is missing."""
    found = {}
    for split, names in FILES.items():
        paths = [folder / name for name in names if (folder / name).is_file()]
        if len(paths) != 1:
            problem = "both of" if paths else "none of"
            raise ValueError(f"{folder} holds {problem} {' and '.join(names)}; {REQUEST} and put it there")
        found[split] = paths[0]
    return found


def rows(folder: Path, corpus: str, negatives: Negatives, seed: int, tally: Tally) -> list[dict[str, Any]]:
    """Rows of `schema.PRODUCTS`, `split` as the files say. A cid in several splits is counted."""
    result: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    products: dict[str, str] = {}
    for split, path in files(folder).items():
        for sentence in sentences(path, tally):
            if sentence.sid in seen:
                tally.add("repeated sid", f"{path.name}: {sentence.sid}")
                continue
            seen[sentence.sid] = split
            values = [sentence.text[begin:end] for _, begin, end in sentence.spans]
            if not all(map(str.strip, (sentence.text, *values, *(name for name, _, _ in sentence.spans)))):
                tally.add("blank text, attribute or value", f"{path.name}: {sentence.sid}")
                continue
            if products.setdefault(sentence.cid, split) != split:
                tally.add("cid in several splits", sentence.cid)
            number = negatives.train if split == "train" else negatives.evaluation
            row = _row(sentence, corpus, number, seed)
            result.append({**row, "split": split})
            for key in {name for name, _, _ in sentence.spans}.difference(ATTRIBUTES):
                tally.add("attribute not among the 26", f"{sentence.sid}: {key}")
    return result


def _row(sentence: Sentence, corpus: str, num_negatives: int, seed: int) -> dict[str, Any]:
    gold: dict[str, list[dict[str, Any]]] = {}
    for name, begin, end in sentence.spans:
        value = sentence.text[begin:end]
        gold.setdefault(name, []).append({"value": value, "paragraph": 0, "begin": begin, "end": end})
    absent = sorted(
        (name for name in ATTRIBUTES if name not in gold), key=lambda name: rank(seed, sentence.sid + name)
    )
    attributes = []
    for key in (*gold, *absent[:num_negatives]):
        values = list(dict.fromkeys(span["value"] for span in gold.get(key, [])))
        origins = ["text"] * len(values)
        attributes.append(
            {"key": key, "values": values, "origins": origins, "evidences": gold.get(key, []), "split": None}
        )
    return {
        "item": sentence.sid,
        "asin": sentence.cid,
        "corpus": corpus,
        "root_category": "",
        "category": "",
        "title": sentence.text,
        "paragraphs": [{"text": sentence.text, "source": "title"}],
        "image_urls": [f"{sentence.cid.removeprefix('c_')}.jpg"],
        "attributes": attributes,
        "split": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.mepave", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        tally = write_sequences(arguments.file, arguments.output)
    except OSError as error:
        sys.exit(f"pipeline.mepave: {error}")
    json.dump(tally.report(), sys.stdout, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    main()
