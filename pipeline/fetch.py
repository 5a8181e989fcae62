"""Images over HTTP: allowed hosts only, capped, with deadlines and retries; a failure is a value.

`hosts` names what may be reached. `example.com` means https on the standard port, at public addresses
only. `example.com:8080` means http or https on that port at any address, loopback and private ones
too: a mirror of one's own. The rule holds on every redirect and for the address that is connected to.
"""

import asyncio
import ipaddress
import queue
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import aiohttp.abc
import tenacity
import yarl
from aiohttp.http_exceptions import ContentLengthError

from pipeline.retrying import REDIRECTS, TRANSIENT, protocol_of, retry_after_s, was_cut, was_lost

Result = TypeVar("Result")
MAX_HOPS = 5
MAX_WAIT_S = 60.0  # a server that asks for more is left for the next run
HEADERS = {"User-Agent": "smartave/0.1", "Accept": "image/*", "Accept-Encoding": "identity"}
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # how a network without IPv4 reaches the addresses of IPv4
DISGUISED = tuple(  # IPv4 in IPv6: compatible, mapped, local NAT64, Teredo, 6to4; and the old local addresses
    ipaddress.ip_network(network)
    for network in ("::/96", "::ffff:0:0/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "fec0::/10")
)


@dataclass(frozen=True, slots=True)
class Fetched:
    """`data` when `status` is `ok`, else `error` tells what happened.

    `bad_url`, `forbidden_host`, `not_found`, `refused`, `too_large` and `truncated` (closed in good order
    short of the Content-Length, at every try) are final, `transient` may work another time.
    """

    status: str
    error: str | None = None
    data: bytes = b""


class _Forbidden(OSError):
    """A name that leads to an address that may not be reached."""


class _Again(Exception):
    def __init__(self, failed: Fetched, after_s: float | None = None) -> None:
        super().__init__(failed.error)
        self.failed = failed
        self.after_s = after_s


class _PublicResolver(aiohttp.abc.AbstractResolver):
    """What it returns is what is connected to, so that no second look-up can answer differently."""

    def __init__(self, hosts: frozenset[str]) -> None:
        self.hosts = hosts
        self.inner = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        found = await self.inner.resolve(host, port, family)
        if f"{host}:{port}" in self.hosts:
            return found
        public = [address for address in found if _is_public(address["host"])]
        if not public:
            raise _Forbidden(f"{host} has no public address")
        return public

    async def close(self) -> None:
        await self.inner.close()


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    if found in NAT64:
        found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
    return found.is_global and not found.is_multicast and not any(found in network for network in DISGUISED)


def why_forbidden(url: yarl.URL, hosts: frozenset[str]) -> str | None:
    """None where the rule of this module lets `url` be asked for."""
    if url.user is not None or url.password is not None:
        return "a URL with a user name"
    try:
        host = url.host
    except ValueError as error:  # a name is decoded only now, and what begins with xn-- may be none
        return f"{url.raw_host} is no name: {error}"
    if url.scheme in ("http", "https") and f"{host}:{url.port}" in hosts:
        return None
    if url.scheme != "https":
        return f"{url.scheme or 'no'} scheme, https only"
    if host not in hosts or url.port != 443:
        return f"{host}:{url.port} is not in images.hosts"
    try:
        public = _is_public(host)
    except ValueError:
        return None  # a name, whose addresses the resolver checks
    return None if public else f"{host} is not a public address"


def _server(url: yarl.URL) -> str:
    return f"{url.raw_host}:{url.port}"


class Turns:
    """When the next request may begin: at most `per_s` in a second, none before a busy server's time.

    A server (`host:port`) that wants more than MAX_WAIT_S is closed: it is not waited for, and not asked.
    """

    def __init__(self, per_s: float | None) -> None:
        self._apart_s = 1 / per_s if per_s else 0.0
        self._next = 0.0
        self._closed: dict[str, tuple[float, float]] = {}  # server -> until when, and the seconds it wanted

    async def take(self, server: str = "") -> float | None:
        """Wait for a turn; where `server` is closed, none comes: the seconds that it wanted."""
        clock = asyncio.get_running_loop().time
        while True:  # when a wait is over, another may have come first, or the server may be closed
            until, wanted_s = self._closed.get(server, (0.0, 0.0))
            if until > clock():
                return wanted_s
            if (wait_s := self._next - clock()) <= 0:
                break
            await asyncio.sleep(wait_s)
        self._next = clock() + self._apart_s
        return None

    def hold(self, seconds: float, server: str = "") -> None:
        until = asyncio.get_running_loop().time() + seconds
        if seconds > MAX_WAIT_S:
            self._closed[server] = until, seconds
        else:
            self._next = max(self._next, until)


class Client:
    """One session with kept-alive connections; use it within one event loop."""

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        concurrency: int,
        max_bytes: int,
        timeout_s: float,
        attempts: int,
        per_s: float | None = None,
    ) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.free = asyncio.Semaphore(concurrency)
        self.turns = Turns(per_s)
        self.attempts = attempts
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=concurrency, resolver=_PublicResolver(self.hosts)),
            headers=HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # what is kept is what was sent, and no bomb can unfold
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        await self.session.close()

    async def fetch(self, url: str) -> Fetched:
        try:
            first = yarl.URL(url)
        except ValueError as error:
            return Fetched("bad_url", str(error))
        if not first.raw_host:
            return Fetched("bad_url", "no host")
        try:
            return await self._once(first)
        except _Again as error:
            # Setting up retries takes a quarter of a request's time: only where one failed.
            return await self._retried(first, error)

    async def _retried(self, url: yarl.URL, failed: _Again) -> Fetched:
        """The tries of `url` after the first one, which ended in `failed` and counts as one of `attempts`."""
        lost: list[Fetched] = []
        first = [failed]

        def remember(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, _Again) and error.failed.status == "transient":
                lost.append(error.failed)

        async def next_try() -> Fetched:
            if first:
                raise first.pop()
            return await self._once(url)

        again = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Again),
            stop=_Stop(self.attempts),
            wait=_wait,
            after=remember,
            reraise=True,
        )
        try:
            return await again(next_try)
        except _Again as error:
            return lost[-1] if lost else error.failed

    async def _once(self, url: yarl.URL) -> Fetched:
        """One try through all redirects, each in its turn; within `timeout_s`, waiting for turns left out."""
        clock = asyncio.get_running_loop().time
        left_s = self.timeout_s
        async with self.free:
            for _ in range(MAX_HOPS):
                if why := why_forbidden(url, self.hosts):
                    return Fetched("forbidden_host", why)
                if closed_s := await self.turns.take(_server(url)):
                    return Fetched("transient", f"the server asked for {closed_s:.0f} s")
                began = clock()
                try:
                    async with asyncio.timeout(left_s):
                        answer = await self._ask(url)
                except TimeoutError:
                    raise _Again(Fetched("transient", f"no answer within {self.timeout_s} s")) from None
                except aiohttp.ClientConnectorCertificateError:
                    return Fetched("refused", "the certificate is not valid")
                except (aiohttp.ClientError, OSError) as error:
                    if isinstance(error.__cause__, _Forbidden):
                        return Fetched("forbidden_host", str(error.__cause__))
                    raise _Again(Fetched("transient", f"{type(error).__name__}: {error}")) from None
                if isinstance(answer, Fetched):
                    return answer
                url = answer
                left_s -= clock() - began
        return Fetched("refused", f"more than {MAX_HOPS} redirects")

    async def _ask(self, url: yarl.URL) -> Fetched | yarl.URL:
        """What one request gives: an answer, or where it is redirected to."""
        async with self.session.get(url, allow_redirects=False) as response:
            if response.status not in REDIRECTS or "Location" not in response.headers:
                return await self._read(response)
            try:
                return url.join(yarl.URL(response.headers["Location"]))
            except ValueError as error:
                return Fetched("bad_url", f"redirected to a bad URL: {error}")

    async def _read(self, response: aiohttp.ClientResponse) -> Fetched:
        code = response.status
        if code in TRANSIENT:
            after_s = retry_after_s(response.headers.get("Retry-After"))
            if after_s is not None:
                self.turns.hold(after_s, _server(response.url))  # it is busy, not this one picture
            raise _Again(Fetched("transient", f"HTTP {code}"), after_s)
        if code in (404, 410):
            return Fetched("not_found", f"HTTP {code}")
        if code != 200:
            return Fetched("refused", f"HTTP {code}")
        too_large = Fetched("too_large", f"more than {self.max_bytes} bytes")
        if (response.content_length or 0) > self.max_bytes:
            return too_large
        protocol = protocol_of(response)
        data = bytearray()
        try:
            async for part in response.content.iter_any():
                data += part
                if len(data) > self.max_bytes:
                    return too_large
        except aiohttp.ClientPayloadError as error:
            short = isinstance(error.__cause__, ContentLengthError) and not was_lost(protocol)
            raise _Again(Fetched("truncated" if short else "transient", "the body ended early")) from None
        if was_cut(response, protocol):
            raise _Again(Fetched("transient", "the connection was lost in the body"))
        return Fetched("ok", None, bytes(data))


def _asked_s(state: tenacity.RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome else None
    return error.after_s if isinstance(error, _Again) else None


class _Stop(tenacity.stop.stop_base):
    def __init__(self, attempts: int) -> None:
        self.attempts = attempts

    def __call__(self, state: tenacity.RetryCallState) -> bool:
        return state.attempt_number >= self.attempts or (_asked_s(state) or 0) > MAX_WAIT_S


def _wait(state: tenacity.RetryCallState) -> float:
    back_off = tenacity.wait_random_exponential(multiplier=0.5, max=MAX_WAIT_S)
    return max(_asked_s(state) or 0.0, back_off(state))


class Background:
    """An event loop in a thread: pictures arrive there while earlier ones are decoded here."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def in_order(
        self, ask: Callable[[str], Coroutine[Any, Any, Result]], urls: Iterable[str]
    ) -> Iterator[Result]:
        """What `ask` gives for each URL, all of them asked at once, in the order of `urls`."""
        urls = list(urls)
        done: queue.SimpleQueue[asyncio.Task[Result]] = queue.SimpleQueue()

        async def ask_all() -> None:
            for task in [self.loop.create_task(ask(url)) for url in urls]:
                await asyncio.wait([task])
                done.put(task)

        asyncio.run_coroutine_threadsafe(ask_all(), self.loop)
        return (done.get().result() for _ in urls)
