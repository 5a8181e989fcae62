"""Which cells are missing, how long they will take, and what is written to params.yaml."""

import json

import pytest

from model import config, grid, results
from model.grid import Cell

PARAMS = """# what runs
run:
  corpora: [sample]
  models: [smartave]
  seeds: [0]
corpora:
  sample: {kind: sample, products: 90}
  other: {kind: sample, products: 80}
models:
  smartave: {architecture: model.smartave}  # ours
  smartave-alpha-06: {base: smartave, alpha: 0.6}
  aveqa: {architecture: model.baselines.aveqa, epochs: 10}
  pam: {architecture: model.baselines.pam}
"""
MODELS = ("smartave", "smartave-alpha-06", "aveqa", "pam")


def result(corpus, model, seed, **cost):
    path = results.RESULTS / corpus / model / f"{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = results.settings_digest(corpus, model)
    content = {"corpus": corpus, "model": model, "seed": seed, "settings": digest, "cost": cost}
    path.write_text(json.dumps(content))


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS)
    resolved = config.resolve(config.read(config.PARAMS))
    config.write(resolved, tmp_path / "config")
    return resolved


def test_what_is_there_with_today_s_settings_is_not_run_again(files, tmp_path):
    result("sample", "smartave", 0)
    result("sample", "aveqa", 1)
    cells, same = grid.missing("sample", MODELS, [0, 1])
    assert cells == [Cell("smartave", 1), Cell("aveqa", 0), Cell("pam", 0), Cell("pam", 1)]
    assert same == {"smartave-alpha-06": "smartave"}
    assert grid.missing("sample", ["smartave-alpha-06"], [0, 1]) == ([Cell("smartave-alpha-06", 1)], {})
    (tmp_path / "params.yaml").write_text(PARAMS.replace("alpha: 0.6", "alpha: 0.7").replace("10}", "11}"))
    changed = config.resolve(config.read(config.PARAMS))
    config.write(changed, tmp_path / "config")
    cells, same = grid.missing("sample", MODELS[:3], [0, 1])
    assert cells == [Cell("smartave", 1)] + [Cell("smartave-alpha-06", s) for s in (0, 1)] + [
        Cell("aveqa", 0),
        Cell("aveqa", 1),
    ]
    assert same == {}


def test_time_is_estimated_from_trainings_of_the_same_kind(files, tmp_path):
    assert "no estimate" in grid.estimate([Cell("aveqa", 0)], "sample", files, [])
    result("sample", "smartave", 0, training_s=90.0, examples=1000)
    result("other", "aveqa", 0, training_s=50.0, examples=100)
    known = results.cells()
    at = ("sample", files, known, 30)
    assert grid.seconds(Cell("smartave", 1), *at) == 90
    assert grid.seconds(Cell("aveqa", 0), *at) == 0.5 * 30 * 10
    assert grid.seconds(Cell("pam", 0), *at) is None
    metrics = tmp_path / "metrics" / "sample"
    metrics.mkdir(parents=True)
    (metrics / "products.json").write_text('{"splits": {"train": {"questions": 30}}}')
    cells = [Cell("smartave", 1), Cell("aveqa", 0), Cell("pam", 0)]
    assert grid.estimate(cells, "sample", files, known) == (
        "3 cells to train on sample: about 240 s of training, and 1 of a kind that was never timed, "
        "evaluation not counted."
    )


def test_a_training_with_other_settings_counts_by_its_examples(files, tmp_path):
    result("sample", "aveqa", 0, training_s=50.0, examples=100)
    result("sample", "aveqa", 1, training_s=70.0, examples=100)
    at = ("sample", files, results.cells(), 30)
    assert grid.seconds(Cell("aveqa", 2), *at) == 60
    (tmp_path / "params.yaml").write_text(PARAMS.replace("epochs: 10}", "epochs: 1}"))
    changed = config.resolve(config.read(config.PARAMS))
    config.write(changed, tmp_path / "config")
    assert grid.seconds(Cell("aveqa", 2), "sample", changed, results.cells(), 30) == pytest.approx(21)


def test_what_is_named_twice_runs_once(files, capsys):
    grid.run("sample", ["pam", "pam", "aveqa"], [0, 1, 0], True)
    assert "4 cells to train on sample" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_number_that_is_no_seed_is_an_error_before_anything_is_written(files, tmp_path, seed):
    with pytest.raises(ValueError, match=rf"seed must be in 0\.\.4294967295, got {seed}"):
        grid.run("sample", ["pam"], [0, seed], False)
    assert (tmp_path / "params.yaml").read_text() == PARAMS


def test_the_cells_are_named_in_params_and_comments_stay(files, tmp_path):
    grid.name_in_params("other", [Cell("pam", 1), Cell("aveqa", 0), Cell("pam", 0)])
    text = (tmp_path / "params.yaml").read_text()
    assert "# what runs" in text
    assert "# ours" in text
    run = config.read(config.PARAMS)["run"]
    assert run == {"corpora": ["other"], "models": ["pam", "aveqa"], "seeds": [0, 1]}


def test_an_estimate_runs_nothing_and_changes_no_params(files, tmp_path, capsys):
    grid.run("sample", MODELS, [0], True)
    assert (tmp_path / "params.yaml").read_text() == PARAMS
    told = capsys.readouterr().out
    assert "smartave-alpha-06 is smartave on sample" in told
    assert "3 cells to train on sample; nothing like them was timed yet" in told


@pytest.mark.parametrize(
    ("corpus", "models", "message"),
    [
        ("nope", ["pam"], "corpus must be one of sample, other, got 'nope'"),
        ("sample", ["nope"], "model must be one of smartave, .*, got 'nope'"),
    ],
)
def test_an_unknown_name_is_an_error(files, corpus, models, message):
    with pytest.raises(ValueError, match=message):
        grid.run(corpus, models, [0], True)
