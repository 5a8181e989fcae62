"""Downloads against a real loopback server that misbehaves on purpose."""

import asyncio
import hashlib
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from aiohttp import web
from conftest import ROOT
from misbehaving import serving

from pipeline import disk
from pipeline.download import Download, Patience, _Partial

DATA = bytes(range(256)) * 4096  # 1 MiB
PIN = hashlib.sha256(DATA).hexdigest()
HURRY = Patience(attempts=3, first_wait_s=0.001, max_wait_s=0.01, silence_s=0.5)
Handler = Callable[[web.Request], "web.StreamResponse | None"]


class Server:
    """Serves DATA with ranges; `faults` are taken one per request before it answers well."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.faults: list[web.StreamResponse | str] = []
        self.data = DATA
        self.etag = '"one"'
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.ready = threading.Event()
        self.port = 0

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str = "data.bin") -> str:
        return f"http://{self.place}/{path}"

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.loop.run_until_complete(self.runner.setup())
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.port = self.runner.addresses[0][1]
        self.ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(self.runner.cleanup())
        self.loop.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, web.StreamResponse):
            return fault
        begin = 0
        if request.headers.get("If-Range") == self.etag and fault != "ignore range":
            begin = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        response = web.StreamResponse(status=206 if begin else 200)
        response.headers["ETag"] = self.etag
        response.content_length = len(self.data) - begin
        if fault == "all in a range":
            response.content_length = len(self.data)
        if begin:
            shift = 7 if fault == "wrong range" else 0
            response.headers["Content-Range"] = f"bytes {begin + shift}-{len(self.data) - 1}/{len(self.data)}"
        await response.prepare(request)
        if fault == "cut":
            await response.write(self.data[begin : begin + 300_000])
            await asyncio.sleep(0.05)
            assert request.transport is not None
            request.transport.abort()
        elif fault == "silence":
            await response.write(self.data[begin : begin + 300_000])
            await asyncio.sleep(2)
        elif fault == "all in a range":
            await response.write(self.data)
        else:
            await response.write(self.data[begin:])
        return response


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.thread.start()
    assert server.ready.wait(10)
    yield server
    server.loop.call_soon_threadsafe(server.loop.stop)
    server.thread.join(10)


def download(
    server: Server, cache: Path, *urls: str, sha256: str | None = PIN, size: int | None = None
) -> Path:
    return Download(
        urls=urls or [server.url()],
        sha256=sha256,
        size=size,
        plain_http=[server.place],
        cache=cache,
        patience=HURRY,
    ).fetch()


def test_a_file_is_brought_once_and_then_taken_from_the_cache(server: Server, tmp_path: Path) -> None:
    finished = download(server, tmp_path, size=len(DATA))
    assert finished.read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == [PIN]
    assert download(server, tmp_path) == finished
    assert len(server.requests) == 1
    finished.write_bytes(b"spoilt")
    assert download(server, tmp_path).read_bytes() == DATA


def test_a_broken_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut", "cut", "cut"]
    assert download(server, tmp_path).read_bytes() == DATA
    ranges = [request.headers.get("Range") for request in server.requests]
    assert ranges == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_body_without_length_that_ends_early_is_completed(tmp_path: Path) -> None:
    """A close-delimited HTTP/1.0 body looks whole wherever it ends; only the pinned size tells."""
    asked: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                request = connection.recv(65536)
                asked.append(request)
                begin = 300_000 if b"Range: bytes=300000-" in request else 0
                span = f"Content-Range: bytes {begin}-{len(DATA) - 1}/{len(DATA)}\r\n" if begin else ""
                head = f'HTTP/1.0 {206 if begin else 200} OK\r\nETag: "one"\r\n{span}\r\n'
                connection.sendall(head.encode() + (DATA[begin:] if begin else DATA[:300_000]))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=serve, args=[listener], daemon=True)
        thread.start()
        download = Download(
            urls=[f"http://{place}/x"],
            sha256=PIN,
            size=len(DATA),
            plain_http=[place],
            cache=tmp_path,
            patience=HURRY,
        )
        assert download.fetch().read_bytes() == DATA
        thread.join(5)
    assert len(asked) == 2


def test_a_silent_server_is_given_up_on_and_asked_again(server: Server, tmp_path: Path) -> None:
    server.faults = ["silence"]
    assert download(server, tmp_path).read_bytes() == DATA
    assert server.requests[1].headers["Range"] == "bytes=300000-"


def test_a_later_run_resumes_an_earlier_one(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut", *(web.Response(status=503) for _ in range(3))]
    with pytest.raises(ValueError, match="HTTP 503"):
        download(server, tmp_path)
    assert download(server, tmp_path).read_bytes() == DATA
    assert server.requests[-1].headers["Range"] == "bytes=300000-"


def test_a_changed_file_is_fetched_anew_not_pieced_together(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut", *(web.Response(status=503) for _ in range(3))]
    with pytest.raises(ValueError, match="HTTP 503"):
        download(server, tmp_path)
    server.data, server.etag = DATA[::-1], '"two"'
    pin = hashlib.sha256(server.data).hexdigest()
    with pytest.raises(ValueError, match=f"has sha256 {pin}"):
        download(server, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["ignore range", "wrong range", "all in a range"])
def test_a_server_that_mistakes_ranges_still_gives_the_right_bytes(
    server: Server, tmp_path: Path, fault: str
) -> None:
    server.faults = ["cut", fault]
    assert download(server, tmp_path).read_bytes() == DATA


def test_a_range_that_does_not_fit_starts_anew(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut", web.Response(status=416)]
    assert download(server, tmp_path).read_bytes() == DATA
    assert "Range" not in server.requests[2].headers


def test_a_file_that_is_whole_but_unnamed_is_not_brought_again(server: Server, tmp_path: Path) -> None:
    server.faults = ["cut", *(web.Response(status=503) for _ in range(3))]
    with pytest.raises(ValueError, match="HTTP 503"):
        download(server, tmp_path)
    next(tmp_path.glob("*.part")).write_bytes(DATA)
    server.faults = [web.Response(status=416, headers={"Content-Range": f"bytes */{len(DATA)}"})]
    asked = len(server.requests)
    assert download(server, tmp_path).read_bytes() == DATA
    assert len(server.requests) == asked + 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_passing_refusal_is_tried_again(server: Server, tmp_path: Path, status: int) -> None:
    server.faults = [web.Response(status=status, headers={"Retry-After": "0"}) for _ in range(2)]
    assert download(server, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_final_refusal_is_not_tried_again(server: Server, tmp_path: Path, status: int) -> None:
    server.faults = [web.Response(status=status)]
    with pytest.raises(ValueError, match=f"{server.url()}: HTTP {status}"):
        download(server, tmp_path)
    assert len(server.requests) == 1


def test_mirrors_are_tried_in_order_and_every_reason_is_told(server: Server, tmp_path: Path) -> None:
    server.faults = [web.Response(status=404), web.Response(body=b"something else")]
    urls = [server.url("a"), server.url("b"), server.url("c")]
    assert download(server, tmp_path, *urls).read_bytes() == DATA
    assert [request.path for request in server.requests] == ["/a", "/b", "/c"]
    server.faults = [web.Response(status=404), web.Response(body=b"something else")]
    with pytest.raises(ValueError, match=r"(?s)/a: HTTP 404.*/b: has sha256 .* \(14 bytes\), pinned 0"):
        download(server, tmp_path, *urls[:2], sha256="0" * 64)


def test_a_git_lfs_pointer_is_named_for_what_it_is(server: Server, tmp_path: Path) -> None:
    server.data = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"
    with pytest.raises(ValueError, match=r"a Git LFS pointer, not the data \(oid sha256:abc\)"):
        download(server, tmp_path)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
def test_another_size_than_the_pinned_one_is_refused(server: Server, tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"holds {len(DATA)} bytes, pinned {size}"):
        download(server, tmp_path, size=size)


def test_a_redirect_is_followed_on_allowed_hosts_only(server: Server, tmp_path: Path) -> None:
    server.faults = [web.Response(status=302, headers={"Location": "/elsewhere"})]
    assert download(server, tmp_path).read_bytes() == DATA
    for number, (target, message) in enumerate(
        (
            ("https://evil.example/x", r"leads to evil\.example, which is no host of this file"),
            ("http://127.0.0.1:1/x", r"http://127\.0\.0\.1:1 is not https"),
            ("file:///etc/hostname", "is not https"),
            (f"http://user:word@{server.place}/x", "carries a user name"),
        )
    ):
        server.faults = [web.Response(status=302, headers={"Location": target})]
        with pytest.raises(ValueError, match=message):
            download(server, tmp_path / str(number))
    server.faults = [web.Response(status=302, headers={"Location": "/again"}) for _ in range(9)]
    with pytest.raises(ValueError, match="more than 5 redirects"):
        download(server, tmp_path / "loop")


def test_plain_http_needs_to_be_allowed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not https"):
        Download(urls=[server.url()], sha256=PIN, cache=tmp_path).fetch()
    assert not server.requests


def test_without_a_pin_the_file_is_taken_as_it_comes(server: Server, tmp_path: Path) -> None:
    assert download(server, tmp_path, sha256=None) == tmp_path / PIN


@pytest.mark.parametrize("sha256", [None, PIN])
def test_what_a_lost_connection_left_is_no_whole_file_where_no_size_is_known(
    tmp_path: Path, sha256: str | None
) -> None:
    with serving({"data": DATA}) as server:
        server.script["data"] = ["cut-reset/data?at=300000&length=no"]
        urls = [server.url("data")]
        wanted = Download(urls=urls, sha256=sha256, plain_http=[server.place], cache=tmp_path, patience=HURRY)
        assert wanted.fetch().read_bytes() == DATA
        assert server.sent["data"] == len(DATA), "finished bytes were asked for again"


@pytest.mark.parametrize(("sha256", "hits"), [(PIN, 1), (None, 2)])
def test_two_who_want_one_file_do_not_write_into_one_another_s_part(
    tmp_path: Path, sha256: str | None, hits: int
) -> None:
    with serving({"data": DATA}) as server, ThreadPoolExecutor() as pool:
        server.pause_s = 0.02
        urls = [server.url("data")]
        wanted = Download(urls=urls, sha256=sha256, plain_http=[server.place], cache=tmp_path, patience=HURRY)
        first = pool.submit(wanted.fetch)
        while not list(tmp_path.glob("*.part")):
            assert not first.done()
        second = pool.submit(wanted.fetch)
        assert first.result() == second.result() == tmp_path / PIN
        assert (tmp_path / PIN).read_bytes() == DATA
        assert server.hits["data"] == hits
    assert list(tmp_path.iterdir()) == [tmp_path / PIN]


def test_who_waits_for_another_s_part_says_so_and_asks_for_nothing_meanwhile(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ""
    with ThreadPoolExecutor() as pool:
        with _Partial(tmp_path, server.url(), PIN).alone():
            waiting = pool.submit(download, server, tmp_path)
            while "is being brought by another process: waiting for it" not in told:
                assert not waiting.done()
                told += capsys.readouterr().err
            assert not server.requests
        assert waiting.result().read_bytes() == DATA


# Every fault, with its name and within its deadline


SLACK_S = 5.0  # for what is not waiting: 0.4 s at most on an idle machine
FAULTS = {  # path -> how the reason reads; None where the file is had in the end
    "404": "HTTP 404",
    "410": "HTTP 410",
    "403": "HTTP 403",
    "429/data?n=2": None,
    "429/data?n=2&retry_after=0": None,
    "429?retry_after=3600": "HTTP 429",
    "429": "HTTP 429",
    "500/data?n=2": None,
    "500": "HTTP 500",
    "reset": "ServerDisconnectedError",
    "cut/data?at=300000": None,
    "cut/data?at=300000&length=no": None,
    "cut-reset/data?at=70000": None,
    "cut/data?at=0": "ClientPayloadError",
    "slow-header": "TimeoutError",
    "never": "TimeoutError",
    "drip/data": "too slow",
    "endless": "holds more than the pinned 1048576 bytes",
    "bomb": "pinned 1048576",
    "html": "an HTML page, not the data",
    "html?type=application/gzip": "an HTML page, not the data",
    "to?url=http://127.0.0.1:1/x": "is not https",
    "to?url=https://10.0.0.1/x": "leads to 10.0.0.1, which is no host of this file",
}


@pytest.mark.parametrize("path", FAULTS)
def test_every_fault_ends_with_its_name_in_time_and_nothing_partial_has_a_final_name(
    tmp_path: Path, path: str
) -> None:
    patience = Patience(attempts=3, first_wait_s=0.001, max_wait_s=0.01, silence_s=0.3)
    with serving({"data": DATA}) as server:
        size = None if "html" in path else len(DATA)
        wanted = Download(
            urls=[server.url(path)],
            sha256=PIN,
            size=size,
            plain_http=[server.place],
            cache=tmp_path,
            patience=patience,
        )
        start = time.monotonic()
        if FAULTS[path] is None:
            assert wanted.fetch().read_bytes() == DATA
            assert server.sent[path] <= len(DATA) + 70_000, "finished bytes were asked for again"
        else:
            with pytest.raises(ValueError, match=FAULTS[path]):
                wanted.fetch()
            final = ("404", "410", "403", "html", "bomb", "endless", "to", "429?retry_after=3600")
            tries = 1 if path.startswith(final) else patience.attempts
            # aiohttp asks once more where a connection closes before it answers
            assert server.hits[path] in ((tries, 2 * tries) if path == "reset" else (tries,))
        assert time.monotonic() - start < patience.attempts * patience.silence_s + SLACK_S
    named = [file.name for file in tmp_path.iterdir() if not file.name.endswith((".part", ".json"))]
    assert named == ([PIN] if FAULTS[path] is None else [])


def test_retry_after_is_honoured(tmp_path: Path) -> None:
    with serving({"data": DATA}) as server:
        urls = [server.url("429/data?n=1&retry_after=1")]
        patience = Patience(first_wait_s=0.001, max_wait_s=5)
        start = time.monotonic()
        Download(urls=urls, sha256=PIN, plain_http=[server.place], cache=tmp_path, patience=patience).fetch()
        assert time.monotonic() - start >= 1


def test_an_endless_body_without_any_pin_stops_before_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "RESERVE_BYTES", shutil.disk_usage(tmp_path).free - (100 << 20))
    with serving({}) as server:
        wanted = Download(
            urls=[server.url("endless")], sha256=None, plain_http=[server.place], cache=tmp_path
        )
        with pytest.raises(ValueError, match=r"GB free, 0\.1 GB more are needed"):
            wanted.fetch()
        assert server.sent["endless"] < 200 << 20


def test_a_file_that_does_not_fit_on_the_disk_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "RESERVE_BYTES", 10**15)
    with serving({"data": DATA}) as server:
        urls = [server.url("data"), server.url("data")]
        with pytest.raises(ValueError, match="more are needed"):
            Download(urls=urls, sha256=PIN, plain_http=[server.place], cache=tmp_path).fetch()
        assert server.hits["data"] == 1, "a mirror does not help"


def test_cut_at_any_byte_and_resumed_by_another_run_no_finished_byte_comes_twice(tmp_path: Path) -> None:
    rng = random.Random(0)
    with serving({"data": DATA}) as server:
        for number in range(40):
            at = rng.choice([0, 1, 2, len(DATA) - 1, rng.randrange(len(DATA))])
            server.script["data"] = [rng.choice([f"cut/data?at={at}", f"cut/data?at={at}&length=no"])]
            wanted = Download(
                urls=[server.url("data")],
                sha256=PIN,
                size=len(DATA),
                plain_http=[server.place],
                cache=tmp_path / str(number),
                patience=Patience(attempts=1, progress_bytes=len(DATA)),
            )
            with pytest.raises(ValueError, match="cannot be downloaded"):
                wanted.fetch()
            assert wanted.fetch().read_bytes() == DATA
            assert server.ranges[-1] == at


def test_killed_at_any_moment_a_download_goes_on_where_it_was(tmp_path: Path) -> None:
    """The process itself dies by SIGKILL, three times; the bytes it had are not sent again."""
    code = (
        "import sys; from pathlib import Path; from pipeline.download import Download\n"
        "url, place, pin, cache = sys.argv[1:]\n"
        "Download(urls=[url], sha256=pin, plain_http=[place], cache=Path(cache)).fetch()"
    )
    with serving({"data": DATA}) as server:
        server.pause_s = 0.02
        arguments = [server.url("data"), server.place, PIN, str(tmp_path)]
        for kill in (1, 2, 3, None):
            process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT)
            while kill and process.poll() is None:
                part = next(tmp_path.glob("*.part"), None)
                if part is not None and part.stat().st_size >= kill * 250_000:
                    process.kill()
                time.sleep(0.005)
            process.wait(30)
        assert (tmp_path / PIN).read_bytes() == DATA
        assert server.ranges == sorted(server.ranges)
        assert len(server.ranges) == 4
        assert server.ranges[1] >= 250_000
