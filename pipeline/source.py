"""Source: the raw files of a corpus, downloaded, copied or generated into data/CORPUS/source/.

    python -m pipeline.source CORPUS          bring them, every file checked against its pin
    python -m pipeline.source CORPUS --pin    write the pins of the corpus's files into params.yaml

A file that changes is noticed by its pin alone, so a file without a pin is an error. Local files are copied,
not linked: DVC's cache must not share an inode with a file that somebody may edit.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field, ValidationError, model_validator

from pipeline import mepave, params, progress, sample
from pipeline.disk import check_room, sha256_of, sync_folder
from pipeline.download import CHUNK_BYTES, Download, check_is_data, is_loopback
from pipeline.editing import edited, read
from pipeline.locks import sole_writer

PARAMS = Path("params.yaml")
FORM = (
    "ask for Amazon's metadata with the form that https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/ links"
)
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RootName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_ -]+$")]


class File(params.Settings):
    """A local `path`, from the repository's root, or a `url` with `mirrors` that are tried in order."""

    path: str | None = None
    url: str | None = None
    mirrors: tuple[str, ...] = ()
    sha256: Digest | None = None
    size: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_place(self) -> "File":
        if (self.path is None) == (self.url is None):
            raise ValueError("a file has either a path or a url")
        if self.path is not None and self.mirrors:
            raise ValueError("mirrors belong to a url")
        return self

    @property
    def place(self) -> str:
        return self.path or self.url or ""

    @property
    def name(self) -> str:
        """The last part of path or URL: it only needs to be told from others by its number."""
        last = unquote(urlsplit(self.url).path) if self.url else self.place
        return re.sub(r"[^A-Za-z0-9._-]", "_", Path(last).name).lstrip(".") or "file"


class Mave(params.Settings):
    """`roots` are metadata files per root category: who is in one has that root, and its image URLs."""

    kind: Literal["mave"]
    labels: tuple[File, ...] = Field(min_length=1)
    metadata: tuple[File, ...] = ()
    roots: dict[RootName, File] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _addresses(self) -> "Mave":
        for file in (*self.labels, *self.metadata, *self.roots.values()):
            for url in (file.url, *file.mirrors):
                if url is None or url.startswith("https://"):
                    continue
                parts = urlsplit(url)
                if parts.scheme != "http" or not is_loopback(parts.netloc):
                    raise ValueError(
                        f"an address must be https, got {url!r} (http on a loopback host:port only)"
                    )
        return self


class Mepave(params.Settings):
    """`path` holds the three files of the release, under either of their names; `sha256` pins them."""

    kind: Literal["mepave"]
    path: str
    sha256: dict[Literal["train", "validation", "test"], Digest] = Field(default_factory=dict)


Settings = Annotated[sample.Settings | Mave | Mepave, Field(discriminator="kind")]
KINDS: dict[str, type[params.Settings]] = {"sample": sample.Settings, "mave": Mave, "mepave": Mepave}


@dataclass(frozen=True)
class Wanted:
    """One file of a corpus: where it goes below source/, and where its pin stands in the corpus's entry."""

    target: str
    file: File
    key: tuple[str | int, ...]


def wanted(settings: params.Settings) -> Iterator[Wanted]:
    """The files that a corpus is made from, in order."""
    if isinstance(settings, Mave):
        for kind, files in (("labels", settings.labels), ("metadata", settings.metadata)):
            width = max(2, len(str(len(files) - 1)))  # so that names sort as the files are named
            for number, file in enumerate(files):
                yield Wanted(f"{kind}/{number:0{width}d}-{file.name}", file, (kind, number))
        for root, file in settings.roots.items():
            yield Wanted(f"roots/{root}{''.join(Path(file.name).suffixes[-2:])}", file, ("roots", root))
    elif isinstance(settings, Mepave):
        for split, path in mepave.files(Path(settings.path)).items():
            pin = settings.sha256.get(split)  # type: ignore[call-overload]
            yield Wanted(path.name, File(path=str(path), sha256=pin), ("sha256", split))


def load(corpus: str) -> params.Settings:
    """The resolved settings, of the class that the corpus's kind says."""
    path = params.CONFIG / corpus / "source.json"
    kind = json.loads(path.read_text(encoding="utf-8")).get("kind") if path.is_file() else "sample"
    if kind not in KINDS:
        raise ValueError(f"{path}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return params.load(KINDS[kind], path)


def bring(settings: params.Settings, corpus: str, folder: Path) -> None:
    """Make `folder` hold the corpus's files and nothing else; it is there only when all of them are.

    Raises `ValueError` also where another process is at it.
    """
    with sole_writer("source", corpus):
        _bring(settings, corpus, folder)


def _bring(settings: params.Settings, corpus: str, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if isinstance(settings, sample.Settings):
        sample.generate(settings, partial)
    for one in wanted(settings):
        target = partial / one.target
        target.parent.mkdir(exist_ok=True)
        if one.file.sha256 is None:
            raise ValueError(
                f"{one.file.place} has no sha256 pin; `python -m pipeline.source {corpus} --pin` writes it"
            )
        if one.file.path is not None:
            copy(Path(one.file.path), target, sha256=one.file.sha256, size=one.file.size)
        else:
            link_or_copy(download(one, corpus), target, one.file.sha256)
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)
    sync_folder(folder.parent)


def download(one: Wanted, corpus: str) -> Path:
    """The downloaded file in the cache. Raises `ValueError` that names the address and what is wrong."""
    file = one.file
    urls = [url for url in (file.url, *file.mirrors) if url]
    plain_http = [place for place in (urlsplit(url).netloc for url in urls) if is_loopback(place)]
    try:
        return Download(urls=urls, sha256=file.sha256, size=file.size, plain_http=plain_http).fetch()
    except ValueError as error:
        where = ".".join(map(str, one.key))
        form = f"{FORM}; or " if one.key[0] in ("metadata", "roots") else ""
        raise ValueError(
            f"{file.place} {error}\n{form}put the file at raw/{corpus}/{file.name} by hand and name it in "
            f"params.yaml: corpora.{corpus}.{where}: {{path: raw/{corpus}/{file.name}}}"
        ) from error


def copy(path: Path, target: Path, *, sha256: str, size: int | None = None) -> None:
    """Copy and check in one pass. Raises `ValueError` naming file and pin."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: put it there, or correct the path in params.yaml")
    check_local(path)
    hashed = hashlib.sha256()
    total = path.stat().st_size
    check_room(target.parent, total)
    with path.open("rb") as source, target.open("wb") as file, progress.of_bytes(path, total) as bar:
        while chunk := source.read(CHUNK_BYTES):
            hashed.update(chunk)
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if hashed.hexdigest() != sha256 or (size is not None and target.stat().st_size != size):
        pinned = sha256 if size is None else f"{sha256} ({size} bytes)"
        raise ValueError(
            f"{path} has sha256 {hashed.hexdigest()} ({target.stat().st_size} bytes), pinned {pinned}: "
            "bring back the pinned file, or pin this one with --pin"
        )


def check_local(path: Path) -> None:
    try:
        check_is_data(path)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error


def link_or_copy(finished: Path, target: Path, sha256: str) -> None:
    """The download cache is written by rename only, so its files may be linked."""
    try:
        target.hardlink_to(finished)
    except OSError:
        copy(finished, target, sha256=sha256)


# Pins


def pin(corpus: str, path: Path = PARAMS) -> list[str]:
    """Write sha256 (and size) of every file of a corpus into `path`, comments kept; says what it wrote.

    A local file's pin is made anew. A URL that has a pin keeps it; one without is downloaded and pinned as
    it came, on trust. Files that a corpus has from its `base` are pinned there. A pin is written as soon as
    its file is there: what came before a failure is not brought again.
    """
    entries = (read(path) or {}).get("corpora") or {}
    if corpus not in entries:
        raise ValueError(f"{path}: corpora has no {corpus!r}, only {', '.join(entries) or 'nothing'}")
    own, where = entries[corpus], f"{path}: corpora.{corpus}"
    base = own.get("base") if isinstance(own, dict) else None
    outer = entries.get(base) if isinstance(base, str) else None
    if base is not None and not isinstance(outer, dict):
        raise ValueError(f"{where}.base must name a corpus, got {base!r}")
    whole = own if outer is None else {**outer, **own}
    written = []
    for one in wanted(_settings(whole, where)):
        if one.file.url is not None and one.file.sha256 is not None:
            continue
        local = Path(one.file.path) if one.file.path is not None else download(one, corpus)
        if not local.is_file():
            raise ValueError(f"{local} is not a file: put it there, or correct the path in {path}")
        check_local(local)
        found, size = sha256_of(local), local.stat().st_size
        is_own = outer is None or ("path" if one.key[0] == "sha256" else one.key[0]) in own
        with edited(path) as content:
            _set_pin(content["corpora"][corpus if is_own else base], one, found, size)
        written.append(f"{one.file.place}: {found} ({size} bytes)")
    return written


def _settings(entry: Any, where: str) -> params.Settings:
    """The source settings of a corpus entry, whose other keys belong to other stages."""
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{where}.kind must be one of {', '.join(KINDS)}, got {kind!r}")
    given = {key: value for key, value in entry.items() if key in KINDS[kind].model_fields}
    try:
        return KINDS[kind].model_validate(given)
    except ValidationError as error:
        found = params.problems(error, KINDS[kind], given)
        raise ValueError("\n".join(params.sentence(where, *problem) for problem in found)) from error


def _set_pin(entry: Any, one: Wanted, sha256: str, size: int) -> None:
    if one.key[0] == "sha256":
        entry.setdefault("sha256", {})[one.key[1]] = sha256
        return
    file = entry[one.key[0]][one.key[1]]
    file["sha256"], file["size"] = sha256, size


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.source", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("corpus", metavar="CORPUS")
    parser.add_argument("--pin", action="store_true", help="write pins into params.yaml instead")
    arguments = parser.parse_args()
    try:
        if arguments.pin:
            sys.stdout.writelines(f"{line}\n" for line in pin(arguments.corpus))
        else:
            bring(load(arguments.corpus), arguments.corpus, Path("data") / arguments.corpus / "source")
    except (ValueError, OSError) as error:
        sys.exit(f"pipeline.source: {error}")


if __name__ == "__main__":
    main()
