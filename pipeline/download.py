"""One pinned file over HTTP: resumed where it broke off, checked, and in place only when whole.

Addresses are https on the hosts that the corpus names, at every redirect; plain http only on a loopback
`host:port` that the user names. Partial files lie in .cache/downloads, outside DVC's reach.
"""

import asyncio
import errno
import hashlib
import ipaddress
import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from filelock import FileLock, Timeout

from pipeline import progress
from pipeline.disk import check_room, sha256_of, write_json
from pipeline.retrying import REDIRECTS, TRANSIENT, protocol_of, retry_after_s, was_cut

if TYPE_CHECKING:
    import aiohttp

CACHE = Path(".cache/downloads")
CHUNK_BYTES = 1 << 20
MAX_REDIRECTS = 5
LFS_MAGIC = b"version https://git-lfs.github.com/spec/"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
HEAD_BYTES = 1024  # that tell a pointer or a page from data
ROOM_EVERY_BYTES = 64 << 20


class Refused(ValueError):
    """This address will not give the file, however often it is asked."""


class Transient(Exception):
    """Worth another try, not before `after_s` seconds where the server said so."""

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s


@dataclass(frozen=True, kw_only=True)
class Patience:
    """An address is given up after `attempts` tries in a row that brought less than `progress_bytes`.

    A try ends after `silence_s` without headers or a byte, and when as much time brought fewer than
    `min_bytes_per_s`. A server that asks for more than `max_wait_s` of patience is left for the next run.
    """

    attempts: int = 6
    first_wait_s: float = 1.0
    max_wait_s: float = 120.0
    connect_s: float = 30.0
    silence_s: float = 60.0
    min_bytes_per_s: float = 1024.0
    progress_bytes: int = 64 << 10


@dataclass(kw_only=True)
class Download:
    """`urls` are the address and its mirrors, in order; `sha256` None takes what comes (to pin it)."""

    urls: Sequence[str]
    sha256: str | None
    size: int | None = None
    plain_http: Collection[str] = ()
    cache: Path = CACHE
    patience: Patience = field(default_factory=Patience)

    def fetch(self) -> Path:
        """The finished file, in the cache. Raises `ValueError` with the reason of every address.

        A full disk is a `ValueError` or `OSError` at once: no mirror helps.
        """
        self.cache.mkdir(parents=True, exist_ok=True)
        reasons = []
        for url in self.urls:
            partial = _Partial(self.cache, url, self.sha256)
            with partial.alone():
                if self._is_finished():  # by now
                    return self.cache / str(self.sha256)
                try:
                    return asyncio.run(self._from(url, partial))
                except (Refused, Transient) as error:
                    reasons.append(f"{url}: {error}")
        raise ValueError("cannot be downloaded:\n  " + "\n  ".join(reasons))

    def _is_finished(self) -> bool:
        """Whether the pinned file is in the cache; one that was spoilt there is removed."""
        finished = self.cache / str(self.sha256)
        if self.sha256 is None or not finished.is_file():
            return False
        if sha256_of(finished) == self.sha256:
            return True
        finished.unlink()
        return False

    async def _from(self, url: str, partial: "_Partial") -> Path:
        import aiohttp
        import tenacity

        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self.patience.connect_s, sock_read=self.patience.silence_s
        )
        fruitless = 0

        def told_s(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return (error.after_s if isinstance(error, Transient) else None) or 0.0

        def is_over(state: tenacity.RetryCallState) -> bool:
            return fruitless >= self.patience.attempts or told_s(state) > self.patience.max_wait_s

        def wait_s(state: tenacity.RetryCallState) -> float:
            backoff = tenacity.wait_random_exponential(
                multiplier=self.patience.first_wait_s, max=self.patience.max_wait_s
            )
            return max(told_s(state), backoff(state))

        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False, trust_env=True) as session:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(Transient), stop=is_over, wait=wait_s, reraise=True
            ):
                with attempt:
                    before = partial.offset
                    try:
                        await self._attempt(session, url, partial)
                    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                        if isinstance(error, OSError) and error.errno in FULL:
                            raise
                        reason = f"{type(error).__name__}: {error}".rstrip(": ")
                        raise Transient(reason) from error
                    finally:
                        brought = partial.offset - before
                        fruitless = 0 if brought >= self.patience.progress_bytes else fruitless + 1
        return self._finish(partial)

    async def _attempt(self, session: "aiohttp.ClientSession", url: str, partial: "_Partial") -> None:
        """Bring the rest of the file, or raise."""
        for _ in range(MAX_REDIRECTS + 1):
            self._check_address(url)
            async with asyncio.timeout(self.patience.silence_s):
                response = await session.get(url, headers=partial.request_headers(), allow_redirects=False)
            async with response:
                if response.status in REDIRECTS:
                    url = urljoin(url, response.headers.get("Location", ""))
                    continue
                await self._receive(response, partial)
                return
        raise Refused(f"more than {MAX_REDIRECTS} redirects")

    def _check_address(self, url: str) -> None:
        parts = urlsplit(url)
        hosts = {urlsplit(known).netloc for known in self.urls}
        if parts.username or parts.password:
            raise Refused("the address carries a user name")
        if parts.scheme == "http" and parts.netloc in self.plain_http:
            return
        if parts.scheme != "https":
            raise Refused(f"{parts.scheme}://{parts.netloc} is not https")
        if parts.netloc not in hosts:
            raise Refused(
                f"leads to {parts.netloc}, which is no host of this file; list it as a mirror to allow it"
            )

    async def _receive(self, response: "aiohttp.ClientResponse", partial: "_Partial") -> None:
        status = response.status
        if status in TRANSIENT:
            raise Transient(f"HTTP {status}", retry_after_s(response.headers.get("Retry-After")))
        if status == 416 and response.headers.get("Content-Range") == f"bytes */{partial.offset}":
            return  # all of it was here; the pin decides
        if status == 416:
            partial.restart()
            raise Transient("HTTP 416: the partial file does not fit")
        if status not in (200, 206):
            raise Refused(f"HTTP {status}")
        start, total = _extent(response)
        if start != (partial.offset if status == 206 else 0):
            asked = partial.offset
            partial.restart()
            raise Transient(f"asked for byte {asked} on, got byte {start} on")
        if status == 200:
            partial.restart()
            partial.remember(response.headers)
        if self.size is not None and total is not None and total != self.size:
            raise Refused(f"holds {total} bytes, pinned {self.size}")
        if response.content_type == "text/html":
            raise Refused("an HTML page, not the data")
        check_room(self.cache, max(0, (total or self.size or 0) - partial.offset))
        checked = partial.offset
        pace = _Pace(self.patience)
        protocol = protocol_of(response)
        with (
            partial.path.open("ab", buffering=0) as file,
            progress.of_bytes(urlsplit(str(response.url)).path, total, done=partial.offset) as bar,
        ):
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                _write(file, chunk)
                bar.update(len(chunk))
                pace.count(len(chunk))
                if self.size is not None and file.tell() > self.size:
                    partial.restart()
                    raise Refused(f"holds more than the pinned {self.size} bytes")
                if file.tell() - checked > ROOM_EVERY_BYTES:
                    check_room(self.cache, ROOM_EVERY_BYTES)
                    checked = file.tell()
            os.fsync(file.fileno())
        if was_cut(response, protocol):
            raise Transient("the connection was lost in the body")
        expected = self.size if total is None else total
        if expected is not None and (brought := partial.offset) != expected:
            if brought > expected:
                partial.restart()
            raise Transient(f"{brought} of {expected} bytes")

    def _finish(self, partial: "_Partial") -> Path:
        """Check the whole file and give it its name."""
        try:
            check_is_data(partial.path)
        except Refused:
            partial.restart()
            raise
        found = sha256_of(partial.path)
        if self.sha256 and found != self.sha256:
            size = partial.offset
            partial.restart()
            raise Refused(f"has sha256 {found} ({size} bytes), pinned {self.sha256}")
        finished = self.cache / found
        partial.path.replace(finished)
        partial.restart()
        return finished


class _Partial:
    """The part of a file that is on disk, and the validator of the version it is a part of."""

    def __init__(self, cache: Path, url: str, sha256: str | None) -> None:
        self._url = url
        name = hashlib.sha256(f"{url}\0{sha256}".encode()).hexdigest()[:32]
        self.path = cache / f"{name}.part"
        self._state = cache / f"{name}.json"
        self._lock = cache / f"{name}.lock"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other process at it; wait, and say so, while one is."""
        lock = FileLock(self._lock, fallback_to_soft=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            sys.stderr.write(f"{self._url} is being brought by another process: waiting for it\n")
            lock.acquire()
        try:
            yield
        finally:
            self._lock.unlink(missing_ok=True)  # while it is held: who waits takes no lock without a name
            lock.release()

    @property
    def offset(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def request_headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        validator = self._validator()
        if self.offset and validator is None:
            self.restart()
        if self.offset and validator:
            headers |= {"Range": f"bytes={self.offset}-", "If-Range": validator}
        return headers

    def remember(self, headers: Any) -> None:
        """Keep a strong ETag, else the date; without either the next try starts anew."""
        etag = headers.get("ETag", "")
        validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
        if validator:
            write_json({"validator": validator}, self._state)

    def restart(self) -> None:
        self.path.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)

    def _validator(self) -> str | None:
        try:
            return str(json.loads(self._state.read_text())["validator"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


class _Pace:
    """Raises `Transient` when a span of `silence_s` brought fewer bytes than `min_bytes_per_s` allows."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._since, self._bytes = time.monotonic(), 0

    def count(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        spent_s = time.monotonic() - self._since
        if spent_s >= self._patience.silence_s:
            if self._bytes < self._patience.min_bytes_per_s * spent_s:
                raise Transient(f"too slow: {self._bytes} bytes in {spent_s:.1f} s")
            self._since, self._bytes = time.monotonic(), 0


def _write(file: Any, chunk: bytes) -> None:
    """All of `chunk`: an unbuffered file may take less at a time."""
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


def check_is_data(path: Path) -> None:
    """Raise `ValueError` where a Git LFS pointer or a web page stands in for the data."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(LFS_MAGIC):
        named = [line for line in head.decode("ascii", "replace").splitlines() if line.startswith("oid ")]
        raise Refused(f"a Git LFS pointer, not the data ({named[0] if named else 'without an oid'})")
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise Refused("an HTML page, not the data")


def is_loopback(place: str) -> bool:
    """Whether `host:port` is on this machine."""
    host, _, port = place.rpartition(":")
    if not port.isdigit():
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _extent(response: "aiohttp.ClientResponse") -> tuple[int, int | None]:
    """First byte of the body and size of the whole file, where the server says it."""
    if response.status != 206:
        return 0, response.content_length
    span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    first = span.partition("-")[0]
    return (int(first) if first.isdigit() else -1), (int(total) if total.isdigit() else None)
