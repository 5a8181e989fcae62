"""The image of every product by asin, as shards of `schema.IMAGES`; a failure is a row with its reason.

    python -m pipeline.images CORPUS
    python -m pipeline.images CORPUS --retry-failed [STATUS...]     ask again for what failed (transient)

An asin's image is the first of its `image_urls`: a URL, or with `base` a file below that folder.
Its bytes are kept as they came. Rows are one per distinct asin, sorted. Statuses: `ok`, `no_url`;
`missing` and `outside_base` (local files); `bad_url`, `forbidden_host`, `not_found`, `refused`
and `transient` (see fetch); `too_large`; `not_image`, `truncated` (also by fetch), `corrupt`,
`placeholder` and `too_many_pixels` (see pictures). An animated picture is its first frame.
"""

import argparse
import atexit
import functools
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from pydantic import Field
from tqdm import tqdm

from pipeline import params, pictures, provenance, schema, shards
from pipeline.amazon import sized
from pipeline.reading import store

if TYPE_CHECKING:
    from pipeline.fetch import Fetched

KEPT = Path(".cache/pictures")
TRANSIENT = frozenset({"transient"})
STATUSES = (  # that another try may change
    *("transient", "truncated", "refused", "not_found", "forbidden_host", "too_large"),
    *("not_image", "corrupt", "placeholder"),
)
FETCHED = {  # status -> the error of its row, whatever the fault was: equal statuses give equal bytes
    "bad_url": "no URL, or redirected to none",
    "forbidden_host": "images.hosts does not allow it, or not where it leads to",
    "not_found": "the server has no such picture",
    "refused": "the server refuses it",
    "transient": "failed for now",
    "truncated": "the body ends early",  # without a Content-Length only its decoding tells that it was cut
}
RETRY = f"of {', '.join(STATUSES)}; then `dvc repro` records what came"
A_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Settings(params.Settings):
    base: str | None = None  # folder of local images, relative to the repository root
    base_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")  # of the images in use; None: any
    hosts: tuple[str, ...] = ()  # see fetch; none means that no URL is fetched
    max_bytes: int = Field(32 << 20, ge=1)
    max_pixels: int = Field(40_000_000, ge=1, le=178_000_000)
    min_px: int = Field(16, ge=1)  # a shorter side is a placeholder
    cdn_size_px: int | None = Field(None, ge=16, le=5000)  # Amazon's server scales the longer side to this
    shard_size: int = Field(64, ge=1, le=4096)
    # these change no byte of a finished shard
    concurrency: int = Field(16, ge=1, le=256)  # requests at a time, of all workers, who are no more
    requests_per_s: float | None = Field(None, gt=0)  # at most, of all workers
    timeout_s: float = Field(30.0, gt=0)  # of one try, redirects included
    attempts: int = Field(5, ge=1, le=20)
    max_transient: float = Field(0.01, ge=0, le=1)  # share of rows that may fail for now


UNSEEN = frozenset({"concurrency", "requests_per_s", "timeout_s", "attempts", "max_transient"})


def wanted(products: Path) -> dict[str, str | None]:
    """asin -> its first image's URL or file name, sorted by asin; of several items, the first with one."""
    if not products.is_file():
        raise ValueError(f"{products} does not exist: run the products stage first")
    table = pq.read_table(products, columns=["item", "asin", "image_urls"]).sort_by("item")
    urls: dict[str, str | None] = {}
    for asin, names in zip(table["asin"].to_pylist(), table["image_urls"].to_pylist(), strict=True):
        urls[asin] = urls.get(asin) or (names[0] if names else None)
    return dict(sorted(urls.items()))


def read_local(settings: Settings, name: str) -> bytes | pictures.Verdict:
    """The bytes of a file below `settings.base`, symbolic links followed but never out of it."""
    assert settings.base is not None
    base = os.path.realpath(settings.base)
    try:
        path = Path(os.path.realpath(os.path.join(base, name)))
        if not path.is_relative_to(base):
            return pictures.Verdict("outside_base", "the name leads out of images.base")
        if not path.is_file():
            return pictures.Verdict("missing", "no such file below images.base")
        if path.stat().st_size > settings.max_bytes:
            return pictures.Verdict("too_large", f"more than {settings.max_bytes} bytes")
        return path.read_bytes()
    except (
        OSError,
        ValueError,
    ) as error:  # too long, a NUL, not ours to read
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return pictures.Verdict("missing", reason)


def inputs(urls: Iterable[tuple[str, str | None]], settings: Settings) -> list[dict[str, Any]]:
    """Rows `asin, url, local` of pairs (asin, url).

    `local` is a local image's content, so that a changed file is another shard.

    Raises `ValueError` when `base` is no folder or its images in use do not match `base_sha256`.
    """
    if settings.base is not None and not Path(settings.base).is_dir():
        raise ValueError(f"images.base: {settings.base} is not a folder")
    rows = []
    for asin, url in urls:
        local = url is not None and settings.base is not None and not A_URL.match(url)
        url = None if url is None else sized(url, settings.cdn_size_px)
        rows.append(
            {"asin": asin, "url": url, "local": _content(read_local(settings, str(url))) if local else None}
        )
    if settings.base_sha256 is not None:
        lines = sorted({f"{row['url']} {row['local']}\n" for row in rows if row["local"]})
        found = hashlib.sha256("".join(lines).encode()).hexdigest()
        if found != settings.base_sha256:
            raise ValueError(
                f"images.base: the images in {settings.base} have the sha256 {found}, "
                f"images.base_sha256 is {settings.base_sha256}"
            )
    return rows


def _content(found: bytes | pictures.Verdict) -> str:
    return found.status if isinstance(found, pictures.Verdict) else hashlib.sha256(found).hexdigest()


def make_worker(settings: Settings) -> Callable[[shards.Rows], Iterator[dict[str, Any]]]:
    network = functools.cache(lambda: _network(settings))
    place = functools.partial(_place, hosts=settings.hosts, max_bytes=settings.max_bytes)

    def process(rows: shards.Rows) -> Iterator[dict[str, Any]]:
        kept = {row["asin"]: _kept(place(row["url"])) for row in rows if row["url"] and row["local"] is None}
        urls = {row["asin"]: row["url"] for row in rows if kept.get(row["asin"], b"") is None}
        fetched = iter(network()(urls.values()) if urls else ())
        made = []
        for_now = Counter[str | None]()
        for row in rows:
            found: bytes | pictures.Verdict
            if not row["url"]:
                found = pictures.Verdict("no_url")
            elif row["local"] is not None:
                found = read_local(settings, row["url"])
                if _content(found) != row["local"]:
                    raise ValueError(f"{row['url']} of {row['asin']} changed while it was read; run again")
            elif (before := kept[row["asin"]]) is not None:
                found = before
            else:
                answer = next(fetched)
                if answer.status in TRANSIENT:
                    for_now[answer.error] += 1
                found = (
                    answer.data if answer.status == "ok" else pictures.Verdict(answer.status, answer.error)
                )
            made.append(_row(row, found, settings))
            yield made[-1]
        if for_now:
            reasons = ", ".join(f"{count} {reason}" for reason, count in for_now.most_common())
            ends = f"{made[0]['asin']} to {made[-1]['asin']}"
            sys.stderr.write(f"images {ends}: failed for now: {reasons}\n")
            for row in made:
                if row["image"] is not None and A_URL.match(row["url"]):
                    _keep(place(row["url"]), row["image"])
        else:
            for row in rows:
                if kept.get(row["asin"]) is not None:
                    place(row["url"]).unlink(missing_ok=True)

    return process


# Pictures of shards that are not finished: the next try asks only for what failed for now


def _place(url: str, *, hosts: Iterable[str], max_bytes: int) -> Path:
    """By all that decides whether the picture may be had, as a shard's fingerprint is."""
    digest = provenance.digest([url, sorted(hosts), max_bytes])
    return KEPT / digest[:2] / digest


def _kept(place: Path) -> bytes | None:
    try:
        return place.read_bytes() or None
    except FileNotFoundError:  # also when a neighbour with the same address has just forgotten it
        return None


def _keep(place: Path, data: bytes) -> None:
    if not place.is_file():
        with shards.atomically(place) as temporary:
            temporary.write_bytes(data)


def _network(settings: Settings) -> "Callable[[Iterable[str]], Iterator[Fetched]]":
    """One client, its event loop and its connections for the worker's life; pictures come in order."""
    from pipeline import fetch

    background = fetch.Background()

    async def connect() -> fetch.Client:
        return fetch.Client(
            settings.hosts,
            concurrency=settings.concurrency,
            max_bytes=settings.max_bytes,
            timeout_s=settings.timeout_s,
            attempts=settings.attempts,
            per_s=settings.requests_per_s,
        )

    client = background.run(connect())
    atexit.register(lambda: background.run(client.close()))
    return lambda urls: background.in_order(client.fetch, urls)


def _row(row: dict[str, Any], found: bytes | pictures.Verdict, settings: Settings) -> dict[str, Any]:
    data = found if isinstance(found, bytes) else None
    verdict = (
        pictures.inspect(found, max_pixels=settings.max_pixels, min_px=settings.min_px)
        if isinstance(found, bytes)
        else found
    )
    if row["url"] and row["local"] is None and verdict.status in FETCHED:
        data, verdict = None, pictures.Verdict(verdict.status, FETCHED[verdict.status])
    ok = verdict.status == "ok"
    return {
        "asin": row["asin"],
        "url": row["url"],
        "status": verdict.status,
        "error": verdict.error,
        "sha256": hashlib.sha256(data).hexdigest() if data is not None else None,
        "width": verdict.width,
        "height": verdict.height,
        "image": data if ok else None,
    }


def share(settings: Settings, num_workers: int) -> Settings:
    """What one of `num_workers` may ask of a server, so that all together hold the limits.

    `ValueError` where there are more workers than requests at a time.
    """
    if num_workers > settings.concurrency:
        raise ValueError(
            f"images.concurrency: {num_workers} workers cannot share at most {settings.concurrency} requests "
            "at a time; raise it or set SMARTAVE_WORKERS lower"
        )
    rate = settings.requests_per_s and settings.requests_per_s / num_workers
    concurrency = settings.concurrency // num_workers
    return settings.model_copy(update={"concurrency": concurrency, "requests_per_s": rate})


def job(corpus: str, settings: Settings) -> shards.Job:
    at_once = None
    if settings.hosts:  # else nothing is asked for
        at_once = shards.executor(threads=1, at_once=settings.concurrency)[1]
        settings = share(settings, at_once)
    urls = wanted(Path("data") / corpus / "products.parquet").items()
    rows = inputs(tqdm(urls, desc="images looked for", disable=None, leave=False), settings)
    return shards.Job(
        stage="images",
        corpus=corpus,
        module="pipeline.images",
        settings=settings,
        unseen=UNSEEN,
        schema=schema.IMAGES,
        chunks=shards.chunks_of_rows(rows, settings.shard_size),
        make_worker=make_worker,
        libraries=("pillow",),
        threads=1,
        at_once=at_once,
        transient=TRANSIENT,
        max_transient=settings.max_transient,
    )


def forget_failed(corpus: str, statuses: Collection[str]) -> None:
    """Take the shards of a finished stage with a row of these statuses out of the store.

    The next run makes them anew; the good pictures in them are kept for it and not asked for again.
    """
    folder = shards.ShardFolder(Path("data") / corpus / "images")
    made = folder.manifest["made_with"]["settings"]
    failed = [shard for shard in folder.shards if set(statuses) & shard["status"].keys()]
    for shard in failed:
        for row in pq.read_table(folder.path / shard["name"], columns=["url", "image"]).to_pylist():
            if row["image"] is not None and A_URL.match(row["url"]):
                place = _place(row["url"], hosts=made["hosts"], max_bytes=made["max_bytes"])
                _keep(place, row["image"])
        for file in store().glob(f"images/??/{shard['fingerprint']}.*"):
            file.unlink()
    count = sum(shard["status"].get(status, 0) for shard in failed for status in statuses)
    sys.stderr.write(f"images of {corpus}: {count} rows in {len(failed)} shards are tried again\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.images", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("corpus", metavar="CORPUS", help="a corpus of params.yaml")
    parser.add_argument("--retry-failed", nargs="*", metavar="STATUS", choices=STATUSES, help=RETRY)
    given = parser.parse_args()
    try:
        settings = params.load(Settings, params.CONFIG / given.corpus / "images.json")
        if given.retry_failed is not None:
            with shards.sole_writer("images", given.corpus):
                forget_failed(given.corpus, given.retry_failed or TRANSIENT)
        shards.run(job(given.corpus, settings))
    except (ValueError, OSError) as error:
        raise SystemExit(f"images: {error}") from error


if __name__ == "__main__":
    main()
