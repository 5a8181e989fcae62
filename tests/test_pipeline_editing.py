from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.editing import edited

TEXT = """\
# what runs
run:
  corpora: [sample] # only this
  models: ["a", 'b']
"""


def test_an_edit_changes_its_value_and_keeps_comments_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    with edited(path) as content:
        content["run"]["corpora"].append("mave")
    assert path.read_text() == TEXT.replace("[sample]", "[sample, mave]")
    assert [one.name for one in tmp_path.iterdir()] == ["params.yaml"]


def test_an_edit_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)

    def spoil() -> None:
        with edited(path) as content:
            content["run"]["corpora"].append("mave")
            raise KeyError("nowhere")

    with pytest.raises(KeyError, match="nowhere"):
        spoil()
    assert path.read_text() == TEXT
    assert [one.name for one in tmp_path.iterdir()] == ["params.yaml"]


def test_of_edits_at_the_same_time_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)

    def add(number: int) -> None:
        with edited(path) as content:
            content["run"]["corpora"].append(f"mine{number}")

    with ThreadPoolExecutor(8) as several:
        list(several.map(add, range(16)))
    with edited(path) as content:
        assert sorted(content["run"]["corpora"]) == sorted(["sample", *(f"mine{n}" for n in range(16))])


def test_a_tag_makes_no_object_of_the_file_s_choosing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text("run: !!python/object/apply:os.mkdir [made]\n")
    with edited(path) as content:
        assert list(content["run"]) == ["made"]
    assert not (tmp_path / "made").exists()
