import io
import random
import resource
import sys

import numpy as np
import pytest
from corrupt_images import MAX_PIXELS, TABLE
from PIL import Image

from pipeline import pictures


@pytest.mark.parametrize("name", TABLE)
def test_every_kind_of_broken_image_has_its_status(name):
    data, status, size = TABLE[name]
    verdict = pictures.inspect(data, max_pixels=MAX_PIXELS, min_px=16)
    assert (verdict.status, verdict) == (status, pictures.inspect(data, max_pixels=MAX_PIXELS, min_px=16))
    if status == "ok":
        assert (verdict.width, verdict.height) == size == pictures.decode(data).size
        assert pictures.decode_grey(data).shape == size[::-1]


def test_a_bomb_is_refused_before_it_takes_memory():
    data = TABLE["bomb"][0]
    assert len(data) < 300_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert pictures.inspect(data, max_pixels=MAX_PIXELS, min_px=16).status == "too_many_pixels"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 40_000 * (1024 if sys.platform == "darwin" else 1)  # decoded it would be 81 MB, as RGB 243


def test_the_first_frame_of_an_animation_and_transparency_over_white_are_what_is_seen():
    assert np.asarray(pictures.decode(TABLE["animated"][0]))[20, 30].tolist() == [200, 0, 0]
    sixteen = np.asarray(pictures.decode(TABLE["16 bits"][0]))
    assert sixteen[0, 0].tolist() == [0, 0, 0]
    assert sixteen[-1, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("form", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}])
def test_a_damaged_jpeg_passes_exactly_when_all_of_its_pixels_can_be_made(form):
    rng = random.Random(0)
    file = io.BytesIO()
    Image.frombytes("RGB", (96, 64), rng.randbytes(96 * 64 * 3)).save(file, "JPEG", **form)
    passed = []
    for _ in range(150):
        data = bytearray(file.getvalue())
        begin = rng.randrange(len(data))
        data[begin : begin + rng.randrange(300)] = rng.randbytes(rng.randrange(3))
        data = bytes(data)
        passed.append(pictures.inspect(data, max_pixels=MAX_PIXELS, min_px=1).status == "ok")
        try:
            size = pictures.decode(data).size
        except Exception:  # noqa: BLE001 - a decoder may raise anything on hostile bytes
            size = None
        if size is None or size[0] * size[1] <= MAX_PIXELS:
            assert passed[-1] == (size is not None)
    assert 10 < sum(passed) < 140
