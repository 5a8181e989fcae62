import resource
import sys

import numpy as np
import pytest
from corrupt_images import MAX_PIXELS, TABLE

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
