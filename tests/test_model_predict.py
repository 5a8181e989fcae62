import argparse
import gzip

import pytest

from model import predict
from pipeline import mave


def test_every_line_is_read_also_blank_ones_and_the_last_without_an_end(tmp_path):
    path = tmp_path / "catalogue.jsonl.gz"
    path.write_bytes(gzip.compress(b"one\n\ntwo\nthree"))
    with mave.opened(path) as file:
        assert list(predict.raw_lines(file)) == [b"one\n", b"\n", b"two\n", b"three"]
    assert predict.num_lines(path) == 4


def test_only_the_beginning_of_a_line_that_is_too_long_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(mave, "MAX_LINE_BYTES", 10)
    path = tmp_path / "catalogue.jsonl"
    path.write_bytes(b"x" * 35 + b"\nshort\n" + b"y" * 10 + b"\n" + b"z" * 25)
    with mave.opened(path) as file:
        assert list(predict.raw_lines(file)) == [b"x" * 11, b"short\n", b"y" * 10 + b"\n", b"z" * 11]


def command(tmp_path, **changes):
    options = {"model": tmp_path, "input": tmp_path / "in.jsonl", "output": tmp_path / "out.jsonl"}
    more = {"images": None, "hosts": (), "attributes": None, "min_precision": None, "batch_size": 4}
    return argparse.Namespace(**options | more | changes)


def test_a_missing_catalogue_folder_or_model_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"in\.jsonl does not exist"):
        predict.run(command(tmp_path))
    (tmp_path / "in.jsonl").write_text('{"asin": "B000000001", "title": "Red mug"}\n')
    with pytest.raises(ValueError, match="pictures is not a folder"):
        predict.run(command(tmp_path, images=tmp_path / "pictures"))
    with pytest.raises(ValueError, match="is not a trained model"):
        predict.run(command(tmp_path))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "option", [["--min-precision", "0"], ["--min-precision", "1.2"], ["--batch-size", "0"]]
)
def test_options_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        predict.parse(["--model", "m", "--input", "i", "--output", "o", *option])
    assert "must be" in capsys.readouterr().err


def test_help_says_what_goes_in_and_comes_out(capsys):
    with pytest.raises(SystemExit):
        predict.parse(["--help"])
    told = capsys.readouterr().out
    for word in ("--min-precision", "imageURLHighRes", "status", "source", "one line of JSON each"):
        assert word in told
