import asyncio
import hashlib
import io
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from misbehaving import serving
from PIL import Image, PngImagePlugin

from pipeline import fetch, images, params, pictures, schema, shards

PACKSHOTS = Path(__file__).parent.parent.parent / "shared/data/packshots"
BACKGROUND = fetch.Background()
LIMITS = {"max_pixels": 1_000_000, "min_px": 16}


def picture(width=80, height=60, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flipped(data, *places):
    changed = bytearray(data)
    for place in places:
        changed[place] ^= 0xFF
    return bytes(changed)


def turned(orientation):
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    return encoded(picture(), "JPEG", exif=exif)


def text_bomb():
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (8 << 20), zip=True)
    return encoded(picture(), "PNG", pnginfo=info)


JPEG, PNG = encoded(picture(), "JPEG"), encoded(picture(), "PNG")
GRADIENT = Image.fromarray((np.arange(4800).reshape(60, 80) * 13).astype(np.uint16))
FRAMES = [picture(seed=seed).convert("P") for seed in range(3)]
TABLE = {
    "jpeg": (JPEG, "ok"),
    "png": (PNG, "ok"),
    "webp": (encoded(picture(), "WEBP"), "ok"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "half a png": (PNG[: len(PNG) // 2], "truncated"),
    "half a webp": (encoded(picture(), "WEBP")[:400], "truncated"),
    "half a gif": (encoded(FRAMES[0], "GIF")[:900], "truncated"),
    "jpeg with flipped bytes in its header": (flipped(JPEG, *range(4, 60)), "corrupt"),
    "jpeg with flipped bytes in its scan": (flipped(JPEG, 700, 701, 900), "ok"),  # a decoder hides them
    "png with a flipped byte": (flipped(PNG, 200), "corrupt"),
    "png with an unfolding text": (text_bomb(), "corrupt"),
    "cmyk": (encoded(picture().convert("CMYK"), "JPEG"), "ok"),
    "16 bits": (encoded(GRADIENT, "PNG"), "ok"),
    "palette with alpha": (encoded(FRAMES[0], "PNG", transparency=3), "ok"),
    "grey with alpha": (encoded(picture().convert("LA"), "PNG"), "ok"),
    "exif turned": (turned(6), "ok"),
    "broken exif": (encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"), "ok"),
    "animated gif": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "ok"),
    "nothing": (b"", "not_image"),
    "text named .jpg": (b"<html>no such picture</html>", "not_image"),
    "bmp": (encoded(picture(), "BMP"), "not_image"),
    "9000 px png": (encoded(Image.new("1", (9000, 9000)), "PNG"), "too_many_pixels"),
    "20000 px png": (encoded(Image.new("1", (20000, 20000)), "PNG"), "too_many_pixels"),
    "one pixel": (encoded(picture(1, 1), "PNG"), "placeholder"),
    "a line": (encoded(picture(300, 4), "PNG"), "placeholder"),
}


@pytest.mark.parametrize("name", TABLE)
def test_every_kind_of_bytes_has_its_verdict_and_what_is_ok_decodes(name):
    data, status = TABLE[name]
    verdict = pictures.inspect(data, **LIMITS)
    assert verdict.status == status
    assert verdict == pictures.inspect(data, **LIMITS)
    assert (verdict.error is None) == (status == "ok")
    if status == "ok":
        decoded = pictures.decode(data)
        assert decoded.mode == "RGB"
        assert decoded.size == (verdict.width, verdict.height)


def test_a_jpeg_smaller_than_its_blocks_is_a_picture_where_so_small_ones_are_wanted():
    data = encoded(picture(5, 3), "JPEG")
    assert pictures.inspect(data, max_pixels=100, min_px=1) == pictures.Verdict("ok", None, 5, 3)


def test_a_jpeg_cut_anywhere_never_raises():
    verdicts = Counter(pictures.inspect(JPEG[:end], **LIMITS).status for end in range(0, len(JPEG), 37))
    assert set(verdicts) == {"not_image", "truncated"}


def test_a_turned_picture_stands_upright():
    upright = np.asarray(picture())
    for orientation, expected in (
        (1, upright),
        (3, upright[::-1, ::-1]),
        (6, np.rot90(upright, -1)),
        (8, np.rot90(upright)),
    ):
        stored = turned(orientation)
        got = np.asarray(pictures.decode(stored)).astype(int)
        plain = np.asarray(pictures.decode(turned(1))).astype(int)
        turn = {1: plain, 3: plain[::-1, ::-1], 6: np.rot90(plain, -1), 8: np.rot90(plain)}[orientation]
        np.testing.assert_array_equal(got, turn)
        assert got.shape == expected.shape


def test_sixteen_bits_are_scaled_and_transparent_parts_are_white():
    grey = np.asarray(pictures.decode(TABLE["16 bits"][0]))[..., 0]
    np.testing.assert_array_equal(grey, np.asarray(GRADIENT) >> 8)
    glass = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert np.asarray(pictures.decode(encoded(glass, "PNG"))).min() == 255


def test_an_animation_is_its_first_frame():
    data = TABLE["animated gif"][0]
    np.testing.assert_array_equal(np.asarray(pictures.decode(data)), np.asarray(FRAMES[0].convert("RGB")))


# Local files


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """`stage(urls, **settings)` runs the stage on asin -> image names and gives its rows by asin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SMARTAVE_STORE", raising=False)
    (tmp_path / "pictures").mkdir()

    def stage(urls, **settings):
        products = [
            {**dict.fromkeys(schema.PRODUCTS.names), "item": asin, "asin": asin, "image_urls": names}
            for asin, names in urls.items()
        ]
        Path("data/toy").mkdir(parents=True, exist_ok=True)
        schema.write_parquet(products, schema.PRODUCTS, Path("data/toy/products.parquet"))
        output = shards.run(images.job("toy", images.Settings(**settings)))
        return {row["asin"]: row for row in shards.ShardFolder(output).rows()}

    return stage


def test_local_files_and_every_way_they_fail_are_rows(corpus, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir()
    (folder / "good.jpg").write_bytes(JPEG)
    (folder / "sub/also.png").write_bytes(PNG)
    (folder / "half.jpg").write_bytes(JPEG[:500])
    (folder / "big.jpg").write_bytes(JPEG + bytes(1 << 20))
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    (folder / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "in.jpg").symlink_to("good.jpg")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    cases = {
        "B000000001": (["good.jpg", "half.jpg"], "ok"),
        "B000000002": (["sub/also.png"], "ok"),
        "B000000003": (["half.jpg"], "truncated"),
        "B000000004": (["big.jpg"], "too_large"),
        "B000000005": (["../secret.jpg"], "outside_base"),
        "B000000006": ([str(tmp_path / "secret.jpg")], "outside_base"),
        "B000000007": (["out.jpg"], "outside_base"),
        "B000000008": (["in.jpg"], "ok"),
        "B000000009": (["absent.jpg"], "missing"),
        "B00000000A": (["sub"], "missing"),
        "B00000000B": (["nul\0.jpg"], "missing"),
        "B00000000C": (["x" * 5000], "missing"),
        "B00000000D": (["circle.jpg"], "missing"),
        "B00000000E": ([], "no_url"),
        "B00000000F": (None, "no_url"),
        "B00000000G": (["https://example.com/a.jpg"], "forbidden_host"),
        "B00000000H": (["file:///etc/hostname"], "bad_url"),
    }
    urls = {asin: names for asin, (names, _) in cases.items()}
    rows = corpus(dict(reversed(urls.items())), base="pictures", max_bytes=1 << 20, shard_size=5)
    expected = {asin: status for asin, (_, status) in cases.items()}
    assert {asin: row["status"] for asin, row in rows.items()} == expected
    assert list(rows) == sorted(cases)
    good = rows["B000000001"]
    assert good["image"] == JPEG
    assert good["sha256"] == hashlib.sha256(JPEG).hexdigest()
    assert (good["width"], good["height"], good["error"], good["url"]) == (80, 60, None, "good.jpg")
    assert all(row["image"] is None and row["error"] != "" for row in rows.values() if row["status"] != "ok")
    counts = json.loads(Path("metrics/toy/images.json").read_text())
    assert counts["rows"] == len(cases)
    assert counts["status"]["outside_base"] == 3


def test_several_items_of_one_product_give_one_row_with_the_first_picture_there_is(tmp_path):
    items = [
        ("s_3", "c_2", ["x.jpg"]),
        ("s_2", "c_1", ["b.jpg"]),
        ("s_1", "c_1", []),
        ("s_4", "c_1", ["z.jpg"]),
    ]
    products = [
        {**dict.fromkeys(schema.PRODUCTS.names), "item": item, "asin": asin, "image_urls": names}
        for item, asin, names in items
    ]
    schema.write_parquet(products, schema.PRODUCTS, tmp_path / "products.parquet")
    assert images.wanted(tmp_path / "products.parquet") == {"c_1": "b.jpg", "c_2": "x.jpg"}


def test_a_picture_that_changed_under_its_name_is_read_again(corpus, tmp_path):
    name = tmp_path / "pictures/a.jpg"
    name.write_bytes(JPEG)
    assert corpus({"B000000001": ["a.jpg"]}, base="pictures")["B000000001"]["image"] == JPEG
    name.write_bytes(PNG)
    assert corpus({"B000000001": ["a.jpg"]}, base="pictures")["B000000001"]["image"] == PNG


def test_the_pin_of_a_folder_is_checked(corpus, tmp_path):
    (tmp_path / "pictures/a.jpg").write_bytes(JPEG)
    urls = {"B000000001": ["a.jpg"]}
    with pytest.raises(ValueError, match=r"in pictures have the sha256 [0-9a-f]{64}.* is 0{64}") as wrong:
        corpus(urls, base="pictures", base_sha256="0" * 64)
    found = str(wrong.value).split("the sha256 ")[1][:64]
    assert corpus(urls, base="pictures", base_sha256=found)["B000000001"]["status"] == "ok"


def test_a_base_that_is_no_folder_and_products_that_are_not_there_are_errors(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"images\.base: nowhere is not a folder"):
        corpus({"B000000001": ["a.jpg"]}, base="nowhere")
    Path("data/toy/products.parquet").unlink()
    with pytest.raises(ValueError, match=r"products\.parquet does not exist: run the products stage first"):
        images.job("toy", images.Settings())


def test_what_changes_no_byte_is_no_part_of_the_fingerprint(corpus):
    corpus({"B000000001": []})
    before = images.job("toy", images.Settings()).made_with()
    assert images.job("toy", images.Settings(concurrency=1, timeout_s=1, attempts=1)).made_with() == before
    assert images.job("toy", images.Settings(max_pixels=1)).made_with() != before
    assert set(images.Settings.model_fields) > images.UNSEEN


def test_a_wrong_setting_is_named_with_its_limit(tmp_path):
    wrong = tmp_path / "images.json"
    wrong.write_text(json.dumps({"shard_size": 0, "speed": 3}))
    with pytest.raises(ValueError, match=r"(?s)shard_size must be .*got 0.*speed is not a setting"):
        params.load(images.Settings, wrong)


@pytest.mark.shared_data
@pytest.mark.skipif(not PACKSHOTS.is_dir(), reason="../shared/data is not there")
def test_real_pack_shots_are_kept_as_they_are(corpus):
    names = sorted(path.name for path in (PACKSHOTS / "images").iterdir())[:12]
    rows = corpus({name[:10]: [name] for name in names}, base=str(PACKSHOTS / "images"), shard_size=5)
    assert len(rows) == 12
    for name in names:
        row = rows[name[:10]]
        size = Image.open(PACKSHOTS / "images" / name).size
        assert (row["status"], row["width"], row["height"]) == ("ok", *size)
        assert row["image"] == (PACKSHOTS / "images" / name).read_bytes()


# The network


class Server:
    """A loopback server in a thread; each path misbehaves in its own way, `hits` counts the requests."""

    def __init__(self):
        self.hits = Counter()
        self.times = {}
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()))
        self.thread.start()
        assert self.ready.wait(10)

    async def serve(self):
        app = web.Application()
        app.router.add_get("/{path:.*}", self.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        self.ready.set()
        await self.over.wait()
        await runner.cleanup()

    def stop(self):
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)

    @property
    def host(self):
        return f"127.0.0.1:{self.port}"

    async def answer(self, request):
        path = request.match_info["path"]
        self.hits[path] += 1
        self.times.setdefault(path, []).append(time.monotonic())
        first = self.hits[path] == 1
        jpeg = web.Response(body=JPEG, content_type="image/jpeg")
        match path:
            case "busy" if first:
                return web.Response(status=429, headers={"Retry-After": "1"})
            case "broken" if first:
                return web.Response(status=500)
            case "good" | "busy" | "broken":
                return jpeg
            case "always-busy":
                return web.Response(status=429, headers={"Retry-After": "3600"})
            case "down":
                return web.Response(status=503)
            case "gone":
                return web.Response(status=410)
            case "private":
                return web.Response(status=403)
            case "html":
                return web.Response(text="<html>sorry</html>", content_type="text/html")
            case "dot":
                return web.Response(body=TABLE["one pixel"][0], content_type="image/png")
            case "cut":
                return await self.raw(request, b"Content-Length: 100000\r\n", JPEG[:500])
            case "cut-unsaid":
                return await self.raw(request, b"", JPEG[:500])
            case "huge":
                return web.Response(body=bytes(300_000))
            case "endless":
                response = web.StreamResponse()
                await response.prepare(request)
                for _ in range(1000):
                    await response.write(bytes(10_000))
                return response
            case "slow":
                await asyncio.sleep(5)
                return jpeg
            case "away":
                return web.Response(status=302, headers={"Location": "http://127.0.0.1:1/x.jpg"})
            case "file":
                return web.Response(status=302, headers={"Location": "file:///etc/hostname"})
            case "there":
                return web.Response(status=301, headers={"Location": "/good"})
            case "round":
                return web.Response(status=302, headers={"Location": "/round"})
            case "zip":
                return web.Response(body=b"\x1f\x8b" + bytes(50), headers={"Content-Encoding": "gzip"})
        return web.Response(status=404)

    async def raw(self, request, header, body):
        request.transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + header + b"\r\n" + body)
        request.transport.close()
        return web.Response()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def closed_server():
    """For what ends with a server that nobody asks any more."""
    server = Server()
    yield server
    server.stop()


def fetched(urls, hosts, **options):
    options = {"concurrency": 8, "max_bytes": 100_000, "timeout_s": 2.0, "attempts": 2, **options}

    async def all_of_them():
        client = fetch.Client(hosts, **options)
        try:
            return await asyncio.gather(*map(client.fetch, urls))
        finally:
            await client.close()

    return asyncio.run(all_of_them())


def test_every_way_a_server_answers_is_a_row_with_its_reason(corpus, server, closed_server):
    expected = {
        "good": "ok",
        "there": "ok",
        "busy": "ok",
        "broken": "ok",
        "nothing": "not_found",
        "gone": "not_found",
        "private": "refused",
        "round": "refused",
        "html": "not_image",
        "zip": "not_image",
        "dot": "placeholder",
        "cut": "truncated",
        "cut-unsaid": "truncated",
        "huge": "too_large",
        "endless": "too_large",
        "away": "forbidden_host",
        "file": "forbidden_host",
        "down": "transient",
        "always-busy": "transient",
    }
    asins = {f"B{number:09d}": path for number, path in enumerate(expected)}
    urls = {asin: [f"http://{server.host}/{path}"] for asin, path in asins.items()}
    urls["B000000018"] = [f"http://{closed_server.host}/always-busy"]
    hosts = [server.host, closed_server.host]
    settings = {"hosts": hosts, "attempts": 2, "max_bytes": 100_000, "shard_size": 7, "timeout_s": 10}
    rows = corpus(urls, max_transient=0.2, **settings)
    assert {asins[asin]: row["status"] for asin, row in rows.items()} == expected
    assert rows["B000000000"]["image"] == JPEG
    assert rows["B000000000"]["url"].endswith("/good")
    assert server.times["busy"][1] - server.times["busy"][0] >= 1, "Retry-After was not honoured"
    assert closed_server.hits["always-busy"] == 1
    assert server.hits["down"] == server.hits["cut"] == 2
    for path in ("nothing", "gone", "private", "html", "dot", "huge"):
        assert server.hits[path] == 1, path
    with pytest.raises(ValueError, match=r"2 of 19 rows failed for now.*images\.max_transient"):
        corpus(urls, **settings)
    assert server.hits["good"] == 2, "a finished shard was fetched again"  # itself and the redirect
    assert server.hits["down"] > 2


def test_a_server_that_is_too_slow_costs_its_deadline_and_no_more(server):
    started = time.monotonic()
    (answer,) = fetched([f"http://{server.host}/slow"], [server.host], timeout_s=0.3, attempts=1)
    assert answer == fetch.Fetched("transient", "no answer within 0.3 s")
    assert time.monotonic() - started < 4  # the server takes 5


def test_a_closed_port_may_work_another_time():
    (answer,) = fetched(["http://127.0.0.1:9/a.jpg"], ["127.0.0.1:9"], attempts=1)
    assert answer.status == "transient"


@pytest.mark.parametrize(
    ("url", "status", "why"),
    [
        ("http://example.com/a.jpg", "forbidden_host", "https only"),
        ("ftp://example.com/a.jpg", "forbidden_host", "https only"),
        ("file:///etc/hostname", "bad_url", "no host"),
        ("a.jpg", "bad_url", "no host"),
        ("https://[::1/a.jpg", "bad_url", ""),
        ("https://other.com/a.jpg", "forbidden_host", "other.com:443 is not in images.hosts"),
        ("https://example.com:8443/a.jpg", "forbidden_host", "example.com:8443 is not in"),
        ("https://example.com.evil.com/a.jpg", "forbidden_host", "is not in images.hosts"),
        ("https://user@example.com/a.jpg", "forbidden_host", "a URL with a user name"),
        ("https://example.com@evil.com/a.jpg", "forbidden_host", "a URL with a user name"),
        ("https://127.0.0.1/a.jpg", "forbidden_host", "127.0.0.1 is not a public address"),
        ("https://169.254.169.254/a.jpg", "forbidden_host", "not in images.hosts"),
        ("https://[::1]/a.jpg", "forbidden_host", "not in images.hosts"),
        ("https://[64:ff9b::7f00:1]/a.jpg", "forbidden_host", "64:ff9b::7f00:1 is not a public address"),
        ("https://localhost/a.jpg", "forbidden_host", "localhost has no public address"),
        ("https://xn--/a.jpg", "forbidden_host", "xn-- is no name"),
        ("https://xn--a-/a.jpg", "forbidden_host", "xn--a- is no name"),
        ("https://user@xn--/a.jpg", "forbidden_host", "a URL with a user name"),
        ("http://xn--:8080/a.jpg", "forbidden_host", "xn-- is no name"),
    ],
)
def test_only_allowed_hosts_at_public_addresses_are_asked(url, status, why):
    hosts = ["example.com", "127.0.0.1", "localhost", "64:ff9b::7f00:1", "xn--", "xn--:8080", "None"]
    (answer,) = fetched([url], hosts)
    assert answer.status == status
    assert why in answer.error


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("64:ff9b::5db8:d70e", True),  # NAT64 of the first: how a network without IPv4 reaches it
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::93.184.215.14", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::e000:1", False),
        ("64:ff9b:1::7f00:1", False),
        ("2001:0:7f00:1::", False),
        ("2002:7f00:1::", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("ff0e::1", False),
    ],
)
def test_an_address_is_public_only_if_no_way_leads_from_it_to_a_private_one(address, public):
    assert fetch._is_public(address) == public


def test_a_name_that_leads_to_a_disguised_private_address_is_not_asked(monkeypatch):
    async def resolve(*_):
        return [
            {
                "hostname": "example.com",
                "host": "2002:7f00:1::",
                "port": 443,
                "family": 10,
                "proto": 6,
                "flags": 0,
            }
        ]

    monkeypatch.setattr("aiohttp.ThreadedResolver.resolve", resolve)
    (answer,) = fetched(["https://example.com/a.jpg"], ["example.com"], attempts=1)
    assert answer == fetch.Fetched("forbidden_host", "example.com has no public address")


def test_a_name_with_its_port_may_be_a_machine_of_ones_own(server):
    named = f"localhost:{server.port}"
    (answer,) = fetched([f"http://{named}/good"], [named])
    assert (answer.status, answer.data) == ("ok", JPEG)


def test_connections_are_kept_and_answers_stand_in_the_order_of_the_questions(server):
    urls = [f"http://{server.host}/{path}" for path in ("broken", "good", "nothing", "dot")]
    answers = fetched(urls, [server.host])
    assert [answer.status for answer in answers] == ["ok", "ok", "not_found", "ok"]
    assert answers[3].data == TABLE["one pixel"][0]


# Faults, orders of arrival, tries

FILES = {f"{number}.jpg": encoded(picture(seed=number), "JPEG") for number in range(24)}
FAULTS = {  # path -> status
    "ok/0.jpg": "ok",
    "404": "not_found",
    "410": "not_found",
    "403": "refused",
    "429/1.jpg?n=1": "ok",
    "429/2.jpg?n=1&retry_after=0": "ok",
    "429/3.jpg?n=1&retry_after=1": "ok",
    "429?retry_after=3600": "transient",
    "429": "transient",
    "500/4.jpg?n=1": "ok",
    "500": "transient",
    "reset": "transient",
    "reset?rst=yes": "transient",
    "cut/5.jpg?at=900": "truncated",
    "cut/5.jpg?at=900&length=no": "truncated",
    "cut/5.jpg?at=900&length=chunked": "transient",
    "cut-reset/5.jpg?at=900": "transient",
    "cut-reset/5.jpg?at=900&length=no": "transient",
    "cut-reset/5.jpg?at=900&length=chunked": "transient",
    "slow-header": "transient",
    "never": "transient",
    "drip/6.jpg": "transient",
    "endless": "too_large",
    "bomb": "not_image",
    "html": "not_image",
    "html?type=image/jpeg": "not_image",
    "to?url=http://10.0.0.1/x.jpg": "forbidden_host",
    "to?url=http://169.254.169.254/x.jpg": "forbidden_host",
    "to?url=file:///etc/hostname": "forbidden_host",
    "to?url=https://xn--a-/x.jpg": "forbidden_host",
    "ok/dot.png": "placeholder",
}
LOOPBACK = {"attempts": 2, "max_bytes": 1 << 20, "timeout_s": 0.6, "max_transient": 1.0}


def test_every_fault_of_a_server_has_its_status_and_holds_its_deadline(corpus):
    with serving({**FILES, "dot.png": TABLE["one pixel"][0]}) as server, serving({}) as closed:
        asins = {f"B{number:09d}": path for number, path in enumerate(FAULTS)}
        urls = {asin: [(closed if "3600" in path else server).url(path)] for asin, path in asins.items()}
        started = time.monotonic()
        rows = corpus(urls, hosts=[server.place, closed.place], shard_size=64, **LOOPBACK)
        assert time.monotonic() - started < 15  # it takes 3; some of the answers never end
        assert {asins[asin]: row["status"] for asin, row in rows.items()} == FAULTS
        assert all((row["image"] is None) == (row["status"] != "ok") for row in rows.values())
        assert server.sent["endless"] < 8 << 20, "the body was read on after the limit"
        assert server.hits["404"] == server.hits["403"] == closed.hits["429?retry_after=3600"] == 1
        assert server.hits["429"] == server.hits["500"] == 2
        assert all(server.hits[path] == 2 for path in FAULTS if path.startswith("cut") and "=no" not in path)
        assert server.hits["cut-reset/5.jpg?at=900&length=no"] == 2


def test_a_body_that_was_lost_once_is_not_truncated_for_good():
    with serving(FILES) as server:
        server.script["0.jpg"] = ["cut-reset/0.jpg?at=900", "cut/0.jpg?at=900", "cut/0.jpg?at=900"]
        (answer,) = fetched([server.url("0.jpg")], [server.place], attempts=3)
        assert (answer.status, server.hits["0.jpg"]) == ("transient", 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=30))
def test_answers_come_in_the_order_of_the_questions_whatever_the_order_of_arrival(delays):
    arrived = []

    async def ask(name):
        number, delay = map(int, name.split())
        await asyncio.sleep(delay / 2000)
        arrived.append(number)
        return number

    urls = [f"{number} {delay}" for number, delay in enumerate(delays)]
    assert list(BACKGROUND.in_order(ask, urls)) == list(range(len(delays)))
    assert sorted(arrived) == list(range(len(delays)))


def shard_bytes(folder="data/toy/images"):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.parquet"))}


def test_orders_of_arrival_and_passing_faults_change_no_byte(corpus, monkeypatch, tmp_path):
    seen = set()
    with serving(FILES) as server:
        urls = {f"B{number:09d}": [server.url(name)] for number, name in enumerate(FILES)}
        urls |= {f"C{number:09d}": [server.url(path)] for number, path in enumerate(("404", "html", "403"))}
        for seed in range(3):
            rng = random.Random(seed)
            server.delays = {name: rng.random() / 10 for name in FILES}
            faults = ("429", "500", "cut/0.jpg?at=50", "reset")
            server.script = {name: [rng.choice(faults)] for name in rng.sample(sorted(FILES), seed * 4)}
            monkeypatch.setenv("SMARTAVE_STORE", str(tmp_path / f"store-{seed}"))
            rows = corpus(urls, hosts=[server.place], shard_size=10, attempts=3)
            assert [row["status"] for row in rows.values()].count("ok") == len(FILES)
            seen.add(tuple(shard_bytes().items()))
    assert len(seen) == 1


CLOSED = "429?retry_after=3600"  # of another server: it is asked once
SAME_STATUS = {  # status -> faults that end in it
    "transient": [
        *("500", "503", "429", CLOSED, "never", "reset", "reset?rst=yes"),
        *("cut-reset/0.jpg?at=900", "cut-reset/0.jpg?at=500&length=no", "cut/0.jpg?at=900&length=chunked"),
    ],
    "truncated": [f"cut/0.jpg?at={at}{length}" for at in (700, 900) for length in ("", "&length=no")],
    "not_found": ["404", "410"],
    "refused": ["401", "403", "to?url=/round"],
    "forbidden_host": ["to?url=http://10.0.0.1/x", "to?url=http://10.0.0.2/x", "to?url=file:///etc/hostname"],
    "bad_url": ["to?url=http://[1/x", "to?url=http://[2/x"],
    "too_large": ["endless", "huge.jpg"],
}


def test_a_row_of_a_failed_picture_tells_its_status_and_not_the_fault(corpus, monkeypatch, tmp_path):
    seen = set()
    with serving({**FILES, "huge.jpg": bytes(1 << 21)}) as server, serving({}) as closed:
        for seed in range(3):
            rng = random.Random(seed)
            urls = {f"B{number:09d}": [server.url(name)] for number, name in enumerate(FILES)}
            expected = dict.fromkeys(urls, "ok")
            for number in range(2 * len(SAME_STATUS)):
                status = sorted(SAME_STATUS)[number // 2]
                urls[f"C{number:09d}"], expected[f"C{number:09d}"] = [server.url(f"f{number}")], status
                chosen = [rng.choice(SAME_STATUS[status]) for _ in range(20)]
                there = f"to?url={closed.url(CLOSED)}"
                server.script[f"f{number}"] = [there if fault == CLOSED else fault for fault in chosen]
            server.script["round"] = ["to?url=/round"] * 20
            server.delays = {name: rng.random() / 10 for name in FILES}
            monkeypatch.setenv("SMARTAVE_STORE", str(tmp_path / f"store-{seed}"))
            hosts = [server.place, closed.place]
            rows = corpus(urls, hosts=hosts, shard_size=8, **{**LOOPBACK, "timeout_s": 1.0})
            assert {asin: row["status"] for asin, row in rows.items()} == expected
            seen.add(tuple(shard_bytes().items()))
    assert len(seen) == 1


def test_a_shard_that_took_several_runs_is_the_undisturbed_one_to_the_byte(corpus, monkeypatch, tmp_path):
    with serving(FILES) as server:
        urls = {f"B{number:09d}": [server.url(name)] for number, name in enumerate(FILES)}
        urls |= {f"C{number:09d}": [server.url(path)] for number, path in enumerate(("404", "html", "403"))}
        settings = {"hosts": [server.place], "shard_size": 10, "attempts": 1, "timeout_s": 5.0}
        monkeypatch.setenv("SMARTAVE_STORE", str(tmp_path / "undisturbed"))
        corpus(urls, **settings)
        undisturbed = shard_bytes()
        monkeypatch.setenv("SMARTAVE_STORE", str(tmp_path / "disturbed"))
        server.script = {
            "0.jpg": ["500", "cut-reset/0.jpg?at=900", "429"],
            "1.jpg": ["reset?rst=yes"],
            "15.jpg": ["cut-reset/15.jpg?at=900&length=no"],
        }
        for _ in range(3):
            with pytest.raises(ValueError, match="rows failed for now"):
                corpus(urls, **settings)
        corpus(urls, **settings)
        assert shard_bytes() == undisturbed


def test_what_failed_for_now_is_told_with_its_reasons(corpus, capfd):
    with serving(FILES) as server:
        urls = {
            f"B{number:09d}": [server.url(path)] for number, path in enumerate(("500", "503", "404", "500?"))
        }
        corpus(urls, hosts=[server.place], attempts=1, max_transient=1.0)
        told = capfd.readouterr().err
    assert "images B000000000 to B000000003: failed for now: 2 HTTP 500, 1 HTTP 503" in told


def test_only_what_failed_for_now_is_asked_for_again(corpus):
    with serving(FILES) as server:
        urls = {f"B{number:09d}": [server.url(name)] for number, name in enumerate(FILES)}
        urls["C000000001"] = [server.url("500/0.jpg?n=1")]
        settings = {"hosts": [server.place], "shard_size": 64, "attempts": 1, "concurrency": 4}
        with pytest.raises(ValueError, match=r"1 of 25 rows failed for now"):
            corpus(urls, **settings)
        rows = corpus(urls, **settings)
        assert {row["status"] for row in rows.values()} == {"ok"}
        assert all(server.hits[name] == 1 for name in FILES), "a picture that was had was fetched again"
        assert server.hits["500/0.jpg?n=1"] == 2
        assert server.connections <= 4 + 1, "connections are not kept alive"
    assert not [path for path in Path(".cache/pictures").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("changed", "status"),
    [({"max_bytes": 1000}, "too_large"), ({"hosts": ["example.com"]}, "forbidden_host")],
)
def test_a_picture_kept_from_before_is_none_where_the_settings_do_not_allow_it_any_more(
    corpus, changed, status
):
    with serving(FILES) as server:
        urls = {"B000000001": [server.url("0.jpg")], "B000000002": [server.url("500/1.jpg?n=1")]}
        settings = {"hosts": [server.place], "attempts": 1}
        with pytest.raises(ValueError, match="1 of 2 rows failed for now"):
            corpus(urls, **settings)
        rows = corpus(urls, **{**settings, **changed})
        assert {row["status"] for row in rows.values()} == {status}


def test_failed_rows_of_a_finished_stage_are_retried_by_command(corpus, monkeypatch, tmp_path):
    with serving(FILES) as server:
        urls = {f"B{number:09d}": [server.url(name)] for number, name in enumerate(FILES)}
        urls["C000000001"] = [server.url("404/0.jpg?n=1")]
        urls["C000000002"] = [server.url("500/1.jpg?n=1")]
        settings = {"hosts": [server.place], "shard_size": 5, "attempts": 1, "max_transient": 0.1}
        before = corpus(urls, **settings)
        assert (before["C000000001"]["status"], before["C000000002"]["status"]) == ("not_found", "transient")
        Path("config/toy").mkdir(parents=True)
        Path("config/toy/images.json").write_text(json.dumps(settings))
        counts = {}
        for statuses in ([], ["not_found"]):
            command = ["images", "toy", "--retry-failed", *statuses]
            monkeypatch.setattr("sys.argv", command)
            images.main()
            rows = {row["asin"]: row for row in shards.ShardFolder(Path("data/toy/images")).rows()}
            counts[tuple(statuses)] = [rows[asin]["status"] for asin in ("C000000001", "C000000002")]
        assert counts == {(): ["not_found", "ok"], ("not_found",): ["ok", "ok"]}
        assert all(server.hits[name] == 1 for name in FILES)


def test_a_redirect_waits_for_its_turn_and_loses_none_of_its_time_by_that(server):
    started = time.monotonic()
    (answer,) = fetched([f"http://{server.host}/there"], [server.host], per_s=0.5, timeout_s=1.8, attempts=1)
    assert answer.status == "ok"
    assert time.monotonic() - started >= 2


def test_requests_keep_their_pace_and_a_busy_server_is_left_alone(server):
    urls = [f"http://{server.host}/good"] * 12
    started = time.monotonic()
    assert {answer.status for answer in fetched(urls, [server.host], per_s=30)} == {"ok"}
    assert time.monotonic() - started >= 11 / 30
    server.times.clear()
    fetched([f"http://{server.host}/busy"], [server.host])
    answers = fetched([f"http://{server.host}/broken", *urls], [server.host], concurrency=1, attempts=3)
    assert {answer.status for answer in answers} == {"ok"}
    assert server.times["busy"][1] - server.times["busy"][0] >= 1


def test_workers_share_what_may_be_asked_of_a_server():
    settings = images.Settings(concurrency=16, requests_per_s=100)
    shared = images.share(settings, 5)
    assert (shared.concurrency, shared.requests_per_s) == (3, 20)
    assert images.share(images.Settings(concurrency=5), 5).concurrency == 1
    assert images.share(images.Settings(), 5).requests_per_s is None


def test_more_workers_than_requests_at_a_time_are_refused_where_pictures_are_fetched(corpus, monkeypatch):
    monkeypatch.setenv("SMARTAVE_WORKERS", "3")
    corpus({"B000000001": []}, concurrency=2)
    with pytest.raises(
        ValueError, match=r"images\.concurrency: 3 workers .* at most 2 requests.*SMARTAVE_WORKERS"
    ):
        images.job("toy", images.Settings(concurrency=2, hosts=("example.com",)))


def test_no_more_requests_than_allowed_are_under_way_however_many_cores_there_are(corpus, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with serving(FILES) as server:
        server.delays = dict.fromkeys(FILES, 0.2)
        urls = {f"B{number:09d}": [server.url(name)] for number, name in enumerate(FILES)}
        corpus(urls, hosts=[server.place], shard_size=2, concurrency=2)
        assert server.most_at_once <= 2


def test_workers_of_another_scheduler_share_the_limits_and_who_is_too_many_gets_nothing(corpus, monkeypatch):
    from distributed import LocalCluster

    monkeypatch.delenv("SMARTAVE_WORKERS", raising=False)
    names = list(FILES)[:12]
    with (
        serving(FILES) as server,
        LocalCluster(
            n_workers=3,
            threads_per_worker=1,
            processes=False,
            protocol="tcp://",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
    ):
        monkeypatch.setenv("SMARTAVE_EXECUTOR", "dask")
        monkeypatch.setenv("SMARTAVE_DASK", cluster.scheduler_address)
        assert [shards.executor(1, 1, at_once)[1] for at_once in (9, 2, None)] == [3, 2, sys.maxsize]
        server.delays = dict.fromkeys(names, 0.1)
        urls = {f"B{number:09d}": [server.url(name)] for number, name in enumerate(names)}
        rows = corpus(urls, hosts=[server.place], shard_size=3, concurrency=2)
        assert {row["status"] for row in rows.values()} == {"ok"}
        assert server.most_at_once <= 2


def test_after_a_retry_after_no_request_of_any_picture_begins_too_early():
    async def begin():
        turns = fetch.Turns(None)
        await turns.take()
        turns.hold(0.2)
        await asyncio.gather(*(turns.take() for _ in range(3)))

    started = time.monotonic()
    asyncio.run(begin())
    assert time.monotonic() - started >= 0.2


def test_a_server_that_asks_for_an_hour_is_asked_once_and_another_one_is_not_kept_waiting():
    with serving(FILES) as server, serving({}) as closed:
        urls = [closed.url(f"429/{number}?retry_after=3600") for number in range(9)]
        urls[4:4] = [server.url("0.jpg"), server.url(f"to?url={closed.url('x')}")]
        answers = fetched(urls, [server.place, closed.place], concurrency=1, attempts=5)
        told = "the server asked for 3600 s"
        assert [answer.error for answer in answers] == ["HTTP 429", *[told] * 3, None, *[told] * 6]
        assert {answer.status for answer in answers if answer.error} == {"transient"}
        assert closed.hits.total() == 1


def test_who_waits_for_a_turn_when_a_server_closes_gets_none():
    async def begin():
        turns = fetch.Turns(per_s=20)
        await turns.take("a:443")
        waiting = asyncio.create_task(turns.take("a:443"))
        await asyncio.sleep(0)
        turns.hold(61, "a:443")
        return [await waiting, await turns.take("a:443"), await turns.take("b:443")]

    assert asyncio.run(begin()) == [61, 61, None]


def test_amazon_scales_where_a_size_is_asked_for(corpus):
    urls = {"B000000001": ["https://m.media-amazon.com/images/I/51abc.jpg"], "B000000002": ["a.jpg"]}
    rows = corpus(urls, cdn_size_px=800, max_transient=1.0)
    assert rows["B000000001"]["url"] == "https://m.media-amazon.com/images/I/51abc._SL800_.jpg"
    assert rows["B000000002"]["url"] == "a.jpg"


def test_a_jpeg_gets_the_same_verdict_as_by_making_every_pixel():
    rng = random.Random(0)
    sources = [
        encoded(picture(seed=5), "JPEG", quality=50),
        encoded(picture(seed=6), "JPEG", progressive=True),
    ]
    seen = Counter()
    for number in range(600):
        data = bytearray(sources[number % 2])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        data = bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
        quick = pictures.inspect(data, **LIMITS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pictures, "_decoded_size", lambda _, data: pictures.decode(data).size)
            assert quick == pictures.inspect(data, **LIMITS)
        seen[quick.status] += 1
    assert min(seen["ok"], seen["truncated"]) > 30, seen
