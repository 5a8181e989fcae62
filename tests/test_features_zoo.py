import hashlib
import pickle
import re
import sys

import pytest
import torch
from misbehaving import serving
from test_features_detector import detectron2_state

from features import detector, zoo


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    arrays = {name: value.numpy() for name, value in detectron2_state("c4").items()}
    return pickle.dumps({"model": arrays, "__author__": "Detectron2"}, 2)


def name_of(data: bytes) -> str:
    return f"model_final_{hashlib.md5(data).hexdigest()[:6]}.pkl"


def test_a_checkpoint_of_the_zoo_is_downloaded_checked_and_converted(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pin = hashlib.sha256(checkpoint).hexdigest()
    with serving({name_of(checkpoint): checkpoint}) as server:
        monkeypatch.setitem(zoo.MODELS, "tiny", server.url(name_of(checkpoint)))
        output = tmp_path / "weights" / "c4.safetensors"
        with pytest.raises(ValueError, match=f"nobody publishes its sha256 .*\n.*--sha256 {pin}$"):
            zoo.fetch("tiny", output, plain_http=[server.place])
        assert not output.exists()
        told = zoo.fetch("tiny", output, sha256=pin, plain_http=[server.place])
        assert told.endswith("regions.variant to c4")
        assert server.hits[name_of(checkpoint)] == 1  # the second time it was there
        model = detector.load(output, "c4")
        assert torch.equal(
            model.state_dict()["stem.0.weight"], detectron2_state("c4")["backbone.stem.conv1.weight"]
        )
        with pytest.raises(ValueError, match="cannot be downloaded"):
            zoo.fetch("tiny", output, sha256="0" * 64, plain_http=[server.place])


def test_a_checkpoint_that_is_not_what_its_name_says_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, output = "model_final_000000.pkl", tmp_path / "out.safetensors"
    wrong = pytest.raises(ValueError, match=r"has the MD5 [0-9a-f]{32}, and its name says 000000")
    with serving({name: checkpoint}) as server:
        unpinned = pytest.raises(ValueError, match="must be pinned: pass its --sha256")
        with unpinned:
            zoo.fetch(server.url(name), output, plain_http=[server.place])
        monkeypatch.setitem(zoo.MODELS, "tiny", server.url(name))
        with wrong:
            zoo.fetch("tiny", output, plain_http=[server.place])
    assert not output.exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("faster_rcnn_R_50", "is neither an address nor one of faster_rcnn_R_101_C4_3x"),
        ("https://example.org/visual_genome.pkl", "must be pinned: pass its --sha256"),
    ],
)
def test_what_cannot_be_fetched_says_why(model, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["zoo", model, str(tmp_path / "out.safetensors")])
    with pytest.raises(SystemExit, match=message):
        zoo.main()


def test_a_pinned_checkpoint_of_the_zoo_is_not_taken_with_other_bytes(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving({name_of(checkpoint): checkpoint}) as server:
        url = server.url(name_of(checkpoint))
        monkeypatch.setitem(zoo.MODELS, "tiny", url)
        monkeypatch.setitem(zoo.PINS, url, "0" * 64)
        with pytest.raises(ValueError, match="sha256"):
            zoo.fetch("tiny", tmp_path / "out.safetensors", plain_http=[server.place])
    assert all(re.fullmatch("[0-9a-f]{64}", pin) for pin in zoo.PINS.values())
    assert {zoo.MODELS["faster_rcnn_R_101_FPN_3x"], url} == set(zoo.PINS)


def test_the_zoos_addresses_carry_the_digits_that_are_checked():
    for name, url in zoo.MODELS.items():
        assert name in url
        assert re.fullmatch(zoo.MD5_IN_NAME, url.rsplit("/", 1)[1])
