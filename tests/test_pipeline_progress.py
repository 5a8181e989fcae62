"""What a log shows of long work, by a clock of the test's own."""

import hashlib
from pathlib import Path

import pytest
from misbehaving import serving

from pipeline import progress
from pipeline.download import Download, Patience

DATA = bytes(1 << 20)


class Clock:
    """Each look at it takes `step_s`."""

    def __init__(self) -> None:
        self.now_s, self.step_s = 1000.0, 0.0

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def test_long_work_is_told_with_its_rate_and_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.of_bytes(Path("raw/labels.jsonl"), 4030) as bar:
        for _ in range(3):
            clock.now_s += 20
            bar.update(1000)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[-1].startswith("labels.jsonl:  74%|")
    assert told[-1].endswith("| 3.00k/4.03k [01:00<00:20, 50.0B/s]")


def test_what_was_there_before_counts_as_done_but_not_for_the_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.of_bytes("labels.jsonl", 4000, done=3000) as bar:
        clock.now_s += 20
        bar.update(500)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.endswith("| 3.50k/4.00k [00:20<00:20, 25.0B/s]")


def test_short_work_shows_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.of_bytes("labels.jsonl", 4000) as bar:
        clock.now_s += 9
        bar.update(4000)
    assert not capsys.readouterr().err


def test_a_download_that_goes_on_starts_from_the_bytes_that_are_there(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock.step_s = 20
    with serving({"data": DATA}) as server:
        server.script["data"] = ["cut/data?at=700000"]
        wanted = Download(
            urls=[server.url("data")],
            sha256=hashlib.sha256(DATA).hexdigest(),
            plain_http=[server.place],
            cache=tmp_path,
            patience=Patience(attempts=1, progress_bytes=len(DATA)),
        )
        with pytest.raises(ValueError, match="cannot be downloaded"):
            wanted.fetch()
        capsys.readouterr()
        wanted.fetch()
    first = capsys.readouterr().err.splitlines()[0]
    assert int(first.removeprefix("data:").partition("%")[0]) >= 66
