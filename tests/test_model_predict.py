"""A catalogue on disk: its lines, its shards, and what is left of it by whom."""

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from model import predict
from model.extractor import Seen
from pipeline import mave, shards
from pipeline.reading import store


def test_every_line_is_read_also_blank_ones_and_the_last_without_an_end(tmp_path):
    path = tmp_path / "catalogue.jsonl.gz"
    path.write_bytes(gzip.compress(b"one\n\ntwo\nthree"))
    with mave.opened(path) as file:
        assert list(predict.raw_lines(file)) == [b"one\n", b"\n", b"two\n", b"three"]


def test_only_the_beginning_of_a_line_that_is_too_long_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(mave, "MAX_LINE_BYTES", 10)
    path = tmp_path / "catalogue.jsonl"
    path.write_bytes(b"x" * 35 + b"\nshort\n" + b"y" * 10 + b"\n" + b"z" * 25)
    with mave.opened(path) as file:
        assert list(predict.raw_lines(file)) == [b"x" * 11, b"short\n", b"y" * 10 + b"\n", b"z" * 11]


def command(tmp_path, **changes):
    options = {"model": tmp_path / "model", "input": tmp_path / "in.jsonl", "output": tmp_path / "out.jsonl"}
    more = {"images": None, "hosts": (), "attributes": None, "min_precision": None, "batch_size": 4}
    return argparse.Namespace(**options | more | {"anew": False} | changes)


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


def echo(settings, *, log, seconds=0.0, kills=None, image="ok", fails=None):
    """Answers a line with its own number, and tells `log` of it; some line may kill or fail."""

    def process(rows):
        for row in rows:
            if row["asin"] == kills:
                os.kill(os.getpid(), signal.SIGSEGV)
            if row["asin"] == fails:
                raise ValueError("no more of this")
            with log.open("a") as file:
                file.write(row["asin"] + "\n")
            time.sleep(seconds)
            yield Counter(["ok", f"image: {image}"])
            yield {"asin": row["asin"], "status": image, "answer": json.dumps({"of": row["asin"]})}

    return process


NUM_LINES = 3 * predict.SHARD + 5


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with something like a trained model and a catalogue of four shards."""
    monkeypatch.chdir(tmp_path)
    about = {"architecture": "model.smartave", "attributes": [], "attributes_by_category": {}}
    about |= {"products": {"kind": "mave", "drop_sources": []}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "provenance.json").write_text(json.dumps(about))
    lines = [json.dumps({"asin": f"B{number:09}", "title": "Mug"}) for number in range(1, NUM_LINES + 1)]
    (tmp_path / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(predict, "make_worker", partial(echo, log=tmp_path / "log"))
    return tmp_path


EXPECTED = "".join(f'{{"of": "line {number}"}}\n' for number in range(1, NUM_LINES + 1))


def left(folder):
    """Files that a run leaves besides what it was given and its output."""
    given = {"in.jsonl", "in.jsonl.gz", "log", "out.jsonl"}
    found = {path.name for path in folder.iterdir() if path.is_file()} - given
    return found | {path.name for path in store().rglob("*") if path.is_file()}


def test_answers_come_in_the_order_of_the_lines_and_nothing_else_is_left(workspace):
    tally = predict.run(command(workspace))
    assert (workspace / "out.jsonl").read_text() == EXPECTED
    assert tally.counts == {"ok": NUM_LINES, "image: ok": NUM_LINES}
    assert left(workspace) == set()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_zipped_catalogue_and_other_numbers_of_workers_give_the_same_bytes(workspace, monkeypatch, workers):
    monkeypatch.setenv("SMARTAVE_WORKERS", workers)
    (workspace / "in.jsonl.gz").write_bytes(gzip.compress((workspace / "in.jsonl").read_bytes()))
    (workspace / "in.jsonl").unlink()
    predict.run(command(workspace, input=workspace / "in.jsonl.gz"))
    assert (workspace / "out.jsonl").read_text() == EXPECTED
    assert left(workspace) == set()


SLOW = """
import sys
from functools import partial
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import test_model_predict as here

if __name__ == "__main__":
    here.predict.make_worker = partial(here.echo, log=Path("log"), seconds=0.002)
    here.predict.run(here.command(Path()))
"""


def test_killed_the_same_command_goes_on_where_it_was(workspace, monkeypatch):
    monkeypatch.setenv("SMARTAVE_WORKERS", "1")
    script, tests = workspace / "log.py", Path(__file__).parent
    script.write_text(SLOW.format(tests=str(tests), root=str(tests.parent)))
    process, log = subprocess.Popen([sys.executable, str(script)]), workspace / "log"
    try:
        while not log.is_file() or len(log.read_text().splitlines()) < 2 * predict.SHARD + 9:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    script.unlink()
    assert not (workspace / "out.jsonl").exists()
    log.unlink()
    predict.run(command(Path()))
    assert (workspace / "out.jsonl").read_text() == EXPECTED
    again = log.read_text().splitlines()
    assert 5 <= len(again) <= predict.SHARD + 5  # not the two shards that were done
    assert left(workspace) == set()


def test_a_line_that_kills_its_process_is_a_line_with_a_reason(workspace, monkeypatch):
    monkeypatch.setattr(predict, "make_worker", partial(echo, log=workspace / "log", kills="line 150"))
    monkeypatch.setattr(predict, "SHARD", NUM_LINES - 160)  # each line of its shard is tried alone
    tally = predict.run(command(workspace))
    answers = (workspace / "out.jsonl").read_text().splitlines()
    killed = {"asin": "B000000150", "status": "kills_worker", "image": None, "attributes": []}
    assert json.loads(answers.pop(149)) == killed
    assert answers == [line for line in EXPECTED.splitlines() if '"line 150"' not in line]
    assert tally.counts["kills_worker"] == 1


def broken_off(workspace, monkeypatch, **how):
    """A run that fails at its second shard."""
    monkeypatch.setenv("SMARTAVE_WORKERS", "1")
    log = workspace / "log"
    monkeypatch.setattr(predict, "make_worker", partial(echo, log=log, fails="line 70", **how))
    with pytest.raises(ValueError, match=r"shard 00001 \(line 65 to line 128\): no more of this"):
        predict.run(command(workspace))
    assert len(log.read_text().splitlines()) == 69
    log.unlink()
    monkeypatch.setattr(predict, "make_worker", partial(echo, log=log))


def test_what_an_interrupted_run_answered_is_told_and_may_be_answered_anew(workspace, monkeypatch, capsys):
    for anew in (False, True):
        broken_off(workspace, monkeypatch)
        capsys.readouterr()
        predict.run(command(workspace, anew=anew))
        assert ("1 of 4 shards are of a run that did not end" in capsys.readouterr().err) is not anew
        again = (workspace / "log").read_text().splitlines()
        assert len(again) == (NUM_LINES if anew else NUM_LINES - predict.SHARD)
        assert (workspace / "out.jsonl").read_text() == EXPECTED
        assert left(workspace) == set()
        (workspace / "log").unlink()


def test_pictures_that_failed_for_now_are_asked_for_again_by_the_run_that_goes_on(workspace, monkeypatch):
    broken_off(workspace, monkeypatch, image="transient")
    assert predict.run(command(workspace)).counts == {"ok": NUM_LINES, "image: ok": NUM_LINES}
    assert len((workspace / "log").read_text().splitlines()) == NUM_LINES


def test_where_pictures_fail_to_the_end_the_output_says_so(workspace, monkeypatch):
    monkeypatch.setattr(predict, "make_worker", partial(echo, log=workspace / "log", image="transient"))
    assert predict.run(command(workspace)).counts == {"ok": NUM_LINES, "image: transient": NUM_LINES}
    assert (workspace / "out.jsonl").read_text() == EXPECTED
    assert left(workspace) == set()


@pytest.mark.parametrize("number", [0, 1, predict.SHARD, predict.SHARD + 1])
def test_every_line_is_in_a_shard(tmp_path, number):
    path = tmp_path / "in.jsonl"
    path.write_text("\n" * number)
    found = predict.in_shards(path)
    assert [shard.num_rows for shard in found] == [predict.SHARD] * (number // predict.SHARD) + (
        [number % predict.SHARD] if number % predict.SHARD else []
    )
    assert sum(len(shard.load()) for shard in found) == number


def test_a_shard_of_long_lines_has_fewer(workspace, monkeypatch):
    monkeypatch.setattr(predict, "SHARD_BYTES", 1000)
    found = predict.in_shards(workspace / "in.jsonl")
    size = len((workspace / "in.jsonl").read_text().splitlines()[0]) + 1
    assert {shard.num_rows for shard in found[:-1]} == {-(-1000 // size)}
    assert sum(shard.num_rows for shard in found) == NUM_LINES
    assert [row["asin"] for shard in found for row in shard.load()] == [
        f"line {number}" for number in range(1, NUM_LINES + 1)
    ]


def test_as_many_processes_as_their_threads_leave_cores_for(workspace, monkeypatch):
    about = workspace / "model" / "provenance.json"
    threads = {"ocr": {"threads": 2}, "regions": {"threads": 3}}
    about.write_text(json.dumps(json.loads(about.read_text()) | threads))
    made = mock.Mock(side_effect=shards.make)
    monkeypatch.setattr(shards, "make", made)
    predict.run(command(workspace))
    [(asked, _)] = [call.args for call in made.call_args_list]
    assert (asked.threads, asked.settings.threads) == (3, 3)


def test_a_wrong_environment_or_a_folder_in_the_output_s_place_is_told_at_once(workspace, monkeypatch):
    with pytest.raises(ValueError, match="model is a folder"):
        predict.run(command(workspace, output=workspace / "model"))
    monkeypatch.setenv("SMARTAVE_WORKERS", "0")
    monkeypatch.setattr(predict, "in_shards", None)
    with pytest.raises(ValueError, match="SMARTAVE_WORKERS must be a whole number"):
        predict.run(command(workspace))


def test_a_catalogue_that_changes_while_it_is_read_is_an_error(workspace):
    shard = predict.in_shards(workspace / "in.jsonl")[1]
    assert shard.ends == ("line 65", "line 128")
    assert json.loads(shard.load()[0]["raw"])["asin"] == "B000000065"
    text = (workspace / "in.jsonl").read_text()
    (workspace / "in.jsonl").write_text(text.replace("B000000100", "B000000101"))
    with pytest.raises(ValueError, match=r"in\.jsonl changed while it was read"):
        shard.load()


def test_another_model_or_setting_takes_no_answer_of_an_interrupted_run(workspace, monkeypatch):
    monkeypatch.setattr(predict, "make_worker", partial(echo, log=workspace / "log"))
    chunks = predict.in_shards(workspace / "in.jsonl")

    def fingerprint(**changes):
        given = {"model": str(workspace / "model"), "images": None, "hosts": (), "attributes": None}
        given["output"] = "out.jsonl"
        settings = predict.Settings(**given | {"min_precision": None, "batch_size": 4} | changes)
        return predict.job(settings, Path("out.jsonl"), chunks).made_with()

    before = fingerprint()
    assert fingerprint(model=f"{workspace}/./model") == before  # by content
    assert fingerprint(batch_size=5) != before
    assert fingerprint(processes=2) == before
    assert fingerprint(output="other.jsonl") != before  # which would forget what this one needs
    (workspace / "model" / "model.safetensors").write_bytes(b"0")
    assert fingerprint() != before
    about = workspace / "model" / "provenance.json"
    regions = {"regions": {"weights": str(workspace / "model.safetensors")}}
    about.write_text(json.dumps(json.loads(about.read_text()) | regions))
    before = fingerprint()
    (workspace / "model.safetensors").write_bytes(b"1")  # the detector's, by the name of the model's
    assert fingerprint() != before


def test_processes_share_what_may_be_asked_of_a_host(workspace, monkeypatch):
    about = workspace / "model" / "provenance.json"
    limits = {"images": {"concurrency": 6, "requests_per_s": 10.0}}
    about.write_text(json.dumps(json.loads(about.read_text()) | limits))
    given = {"model": str(workspace / "model"), "images": None, "attributes": None, "min_precision": None}
    given["output"] = "out.jsonl"

    def asked(workers, hosts):
        monkeypatch.setenv("SMARTAVE_WORKERS", workers)
        settings = predict.Settings(**given, hosts=hosts, batch_size=4)
        return predict.job(settings, Path("out.jsonl"), [])

    assert asked("3", ()).settings.processes == 1  # nothing is asked for
    made = asked("3", ("a.example",))
    assert (made.at_once, made.settings.processes) == (3, 3)
    provenance = json.loads(about.read_text()) | {"settings": {"ocr": False, "image": False}}
    each = Seen(provenance, None, ["a.example"], made.settings.processes).settings
    assert (each.concurrency, each.requests_per_s) == (2, pytest.approx(10 / 3))
    with pytest.raises(ValueError, match="7 workers cannot share at most 6 requests"):
        Seen(provenance, None, ["a.example"], asked("7", ("a.example",)).settings.processes)
