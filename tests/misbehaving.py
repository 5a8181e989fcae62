"""A loopback HTTP server that misbehaves as its URLs say: `/cut?at=1000`, `/429?n=2&retry_after=1`.

Raw sockets, one thread: nothing between the script and the wire. It counts requests and body bytes by path,
keeps connections alive where the answer allows it, and ends with its `with`.
"""

import asyncio
import contextlib
import gzip
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

BOMB = gzip.compress(bytes(64 << 20))
DRIP_S = 0.02
ENDLESS_PAUSE_S = 0.005
PIECE_BYTES = 64 << 10
NO_LINGER = struct.pack("ii", 1, 0)  # a socket that is closed so sends RST instead of FIN


@dataclass
class Server:
    """`files` are served well, with ranges; every other path is one of the faults below."""

    files: dict[str, bytes] = field(default_factory=dict)
    port: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)  # body bytes
    ranges: list[int] = field(default_factory=list)  # where each answer began
    connections: int = 0
    at_once: int = 0  # requests that wait for their answer now
    most_at_once: int = 0
    delays: dict[str, float] = field(default_factory=dict)  # before an answer, by path
    script: dict[str, list[str]] = field(default_factory=dict)  # path -> what its next requests get instead
    pause_s: float = 0.0  # between two pieces of a body

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.place}/{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {
                    name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])
                }
                if not await self.answer(head[0].split()[1], headers, writer):
                    break
        with contextlib.suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    async def answer(self, target: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> bool:
        """Whether the connection lives on."""
        told = self.script.get(target.strip("/"))
        parts = urlsplit(told.pop(0) if told else target)
        name = parts.path.strip("/")
        options = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.hits[target.strip("/")] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.delays.get(name, 0))
        self.at_once -= 1
        fault, _, rest = name.partition("/")
        if name in self.files:
            fault, rest = "ok", name
        elif fault.isdigit() and self.hits[target.strip("/")] > int(options.get("n", 10**9)):
            fault = "ok"
        data = self.files.get(rest, b"")
        begin = 0
        if headers.get("if-range") == '"one"' and "range" in headers:
            begin = int(headers["range"].removeprefix("bytes=").removesuffix("-"))
        self.ranges.append(begin)
        length, status = len(data) - begin, "206 Partial" if begin else "200 OK"
        whole = {"ETag": '"one"', "Content-Length": str(length)}
        if begin:
            whole["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        match fault:
            case "ok":
                return await self.send(target, writer, status, whole, data[begin:])
            case "reset":
                if options.get("rst") == "yes":
                    reset(writer)
                writer.transport.abort()
                return False
            case "cut" | "cut-reset":
                part = data[begin : begin + int(options["at"])]
                if options.get("length") in ("no", "chunked"):
                    del whole["Content-Length"]
                if options.get("length") == "chunked":
                    whole["Transfer-Encoding"] = "chunked"
                    part = b"%x\r\n" % length + part
                await self.send(target, writer, status, whole, part)
                if len(part) < length and fault == "cut-reset":
                    await asyncio.sleep(0.02)
                    reset(writer)
                return False
            case "slow-header":
                for letter in "HTTP/1.1 200 OK\r\nX-Slow: " + "x" * 1000:
                    writer.write(letter.encode())
                    await asyncio.sleep(DRIP_S)
                return False
            case "never":
                await asyncio.sleep(30)
                return False
            case "drip":
                await self.send(target, writer, status, whole, b"")
                for at in range(begin, len(data)):
                    await self.body(target, writer, data[at : at + 1])
                    await asyncio.sleep(DRIP_S)
                return False
            case "endless":
                await self.send(target, writer, "200 OK", {}, b"")
                for _ in range(10_000):
                    await self.body(target, writer, bytes(65536))
                    await asyncio.sleep(ENDLESS_PAUSE_S)  # or kernels would buffer megabytes
                return False
            case "bomb":
                found = {"Content-Encoding": "gzip", "Content-Length": str(len(BOMB))}
                return await self.send(target, writer, "200 OK", found, BOMB)
            case "html":
                page = b"<!DOCTYPE html><html>please log in</html>"
                found = {"Content-Type": options.get("type", "text/html"), "Content-Length": str(len(page))}
                return await self.send(target, writer, "200 OK", found, page)
            case "to":
                found = {"Location": options["url"], "Content-Length": "0"}
                return await self.send(target, writer, "302 Found", found, b"")
        found = {"Content-Length": "0"}
        if "retry_after" in options:
            found["Retry-After"] = options["retry_after"]
        return await self.send(target, writer, f"{fault if fault.isdigit() else 404} Fault", found, b"")

    async def send(
        self, target: str, writer: asyncio.StreamWriter, status: str, headers: dict[str, str], body: bytes
    ) -> bool:
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items())]
        if "Content-Length" not in headers:
            lines.append("Connection: close")
        writer.write("\r\n".join([*lines, "", ""]).encode())
        await self.body(target, writer, body)
        return "Content-Length" in headers

    async def body(self, target: str, writer: asyncio.StreamWriter, data: bytes) -> None:
        for at in range(0, len(data), PIECE_BYTES):
            writer.write(data[at : at + PIECE_BYTES])
            self.sent[target.strip("/")] += len(data[at : at + PIECE_BYTES])
            await writer.drain()
            await asyncio.sleep(self.pause_s)


def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    writer.transport.abort()


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    server, loop, ready = Server(files), asyncio.new_event_loop(), threading.Event()

    async def start() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        ready.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
