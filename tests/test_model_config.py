import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from model import config

SHIPPED = config.read(ROOT / "params.yaml")


def changed(**edits: Any) -> dict[str, Any]:
    """The shipped params.yaml with `edits`, whose keys are paths joined by two underscores."""
    params = copy.deepcopy(SHIPPED)
    for path, value in edits.items():
        *outer, last = path.split("__")
        place = params
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return params


def complaints(**edits: Any) -> list[str]:
    with pytest.raises(ValueError, match=r"^params\.yaml") as caught:
        config.resolve(changed(**edits))
    return str(caught.value).splitlines()


def test_the_shipped_params_resolve_for_every_corpus_and_model() -> None:
    files = config.resolve(SHIPPED)
    stages = {"source", "products", "images", "ocr", "regions", "evaluate"}
    expected = {f"{corpus}/{stage}.json" for corpus in SHIPPED["corpora"] for stage in stages}
    expected |= {
        f"{corpus}/models/{model}.json" for corpus in SHIPPED["corpora"] for model in SHIPPED["models"]
    }
    assert files.keys() == expected | {"run.json"}


def test_what_is_shipped_under_config_is_what_params_say(tmp_path: Path) -> None:
    config.write(config.resolve(SHIPPED), tmp_path / "config")
    shipped, resolved = contents(ROOT / "config"), contents(tmp_path / "config")
    assert shipped.keys() == resolved.keys()
    stages = [
        name for name in resolved if "/models/" not in str(name)
    ]  # a model's file also has its code's digest
    assert {name: shipped[name] for name in stages} == {name: resolved[name] for name in stages}


@pytest.mark.parametrize(
    ("edits", "where", "key", "value"),
    [
        ({"ocr__canvas_px": 777, "corpora__sample__ocr": {}}, "sample/ocr", "canvas_px", 777),
        ({"ocr__canvas_px": 777, "corpora__sample__ocr": {"canvas_px": 640}}, "sample/ocr", "canvas_px", 640),
        ({"corpora__sample__products": 300}, "sample/source", "products", 300),
        ({"corpora__sample__drop_sources": ["price"]}, "sample/products", "drop_sources", ["price"]),
        ({"products__drop_sources": ["price"]}, "sample/products", "drop_sources", ["price"]),
        ({"run__seeds": [4, 5]}, "run", "seeds", [4, 5]),
    ],
)
def test_the_innermost_place_that_gives_a_setting_wins(edits: dict, where: str, key: str, value: Any) -> None:
    assert config.resolve(changed(**edits))[f"{where}.json"][key] == value


def test_a_model_takes_what_its_base_then_its_own_entry_say() -> None:
    edits = {
        "model__encoder_layers": 2,
        "corpora__sample__model": {"encoder_layers": 3, "beam_width": 2},
        "train__epochs": 2,
        "corpora__sample__train": {"epochs": 3, "batch_size": 4},
        "corpora__sample__models": {},
        "models": {
            "small": {"architecture": "model.smartave", "encoder_layers": 4, "epochs": 4},
            "smaller": {"base": "small", "encoder_layers": 1},
            "plain": {"architecture": "model.smartave"},
        },
        "run__models": ["smaller"],
    }
    files = config.resolve(changed(**edits))
    found = {
        name: {
            **files[f"sample/models/{name}.json"]["settings"],
            **files[f"sample/models/{name}.json"]["train"],
        }
        for name in ("small", "smaller", "plain")
    }
    keys = ("encoder_layers", "beam_width", "epochs", "batch_size")
    assert {name: tuple(one[key] for key in keys) for name, one in found.items()} == {
        "small": (4, 2, 4, 4),
        "smaller": (1, 2, 4, 4),
        "plain": (3, 2, 3, 4),
    }


def test_folds_of_a_corpus_differ_in_their_split_alone() -> None:
    split = {"by": "product", "folds": 5, "fold": 3}
    files = config.resolve(changed(corpora__mave_fold3={"base": "mave", "split": split}))
    fold, whole = (
        {path.partition("/")[2]: files[path] for path in files if path.startswith(f"{corpus}/")}
        for corpus in ("mave_fold3", "mave")
    )
    assert fold.keys() == whole.keys()
    assert {path for path in fold if fold[path] != whole[path]} == {"products.json"}
    assert fold["products.json"]["split"]["fold"] == 3


def test_a_corpus_speaks_of_one_model_and_its_variants_before_their_own_entries() -> None:
    edits = {
        "models": {
            "smartave": {"architecture": "model.smartave"},
            "pam": {"architecture": "model.baselines.pam", "learning_rate": 1e-4, "epochs": 9},
            "pam-512": {"base": "pam", "max_length": 512},
            "pam-slow": {"base": "pam", "learning_rate": 1e-5},
        },
        "corpora__sample__models": {"pam": {"learning_rate": 1e-3}},
        "run__models": ["pam"],
    }
    files = config.resolve(changed(**edits))
    rates = {
        (corpus, name): files[f"{corpus}/models/{name}.json"]["train"]["learning_rate"]
        for corpus in ("sample", "mave")
        for name in ("pam", "pam-512", "pam-slow")
    }
    assert [rates["sample", name] for name in ("pam", "pam-512", "pam-slow")] == [1e-3, 1e-3, 1e-5]
    assert [rates["mave", name] for name in ("pam", "pam-512", "pam-slow")] == [1e-4, 1e-4, 1e-5]
    assert files["sample/models/pam-512.json"]["settings"]["max_length"] == 512


@pytest.mark.parametrize(
    ("edits", "complaint"),
    [
        ({"regions__max_boxes": 0}, "regions.max_boxes must be in 1..100, got 0"),
        (
            {"corpora__sample__regions": {"max_boxes": 101}},
            "corpora.sample.regions.max_boxes must be in 1..100, got 101",
        ),
        ({"ocr__canvas": 3}, "ocr.canvas is not a setting that exists"),
        ({"orc": {}}, "orc is not a section that exists"),
        ({"ocr": 3}, "ocr must be a mapping, got 3"),
        ({"run__corpora": ["nope"]}, "run.corpora.0 must be one of sample, mave, mepave, got 'nope'"),
        ({"run__corpora": []}, "run.corpora list should have at least 1 item"),
        ({"run__models": ["bert"]}, "run.models.0 must be one of smartave, smartave-text"),
        ({"run__seeds": [-1]}, "run.seeds.0 must be >= 0 and < 4294967296, got -1"),
        ({"run__seeds": [0, 0]}, "run.seeds names something twice: [0, 0]"),
        ({"run__gpus": 1}, "run.gpus is not a setting that exists"),
        ({"corpora__Big": {"kind": "sample"}}, "corpora has an entry named 'Big', which must match"),
        ({"corpora__a-b": {"kind": "sample"}}, "corpora has an entry named 'a-b', which must match"),
        (
            {"corpora__mine": {"kind": "shop"}},
            "corpora.mine.kind must be one of sample, mave, mepave, got 'shop'",
        ),
        ({"corpora__mine": None}, "corpora.mine.kind must be one of sample, mave, mepave, got None"),
        ({"corpora__mine": {"kind": "mave"}}, "corpora.mine.labels is missing"),
        (
            {"corpora__mine": {"kind": "mave", "labels": [{"path": "a", "url": "https://b"}]}},
            "corpora.mine.labels.0 a file has either a path or a url",
        ),
        (
            {"corpora__sample__prodcts": 1},
            "corpora.sample.prodcts is not a setting that exists for kind sample",
        ),
        ({"corpora__sample__model": {"depth": 1}}, "corpora.sample.model.depth is not a setting that exists"),
        ({"models__a_b": {"base": "smartave"}}, "models has an entry named 'a_b', which must match"),
        ({"models__a": {"base": "b"}}, "models.a.base must name a model, got 'b'"),
        ({"models__a": {"base": ["smartave"]}}, "models.a.base must name a model, got ['smartave']"),
        ({"models__a": {"base": "a"}}, "models.a.base makes a circle: a -> a"),
        (
            {"models__a": {"base": "b"}, "models__b": {"base": "a"}},
            "models.b.base makes a circle: a -> b -> a",
        ),
        ({"models__a": {}}, "models.a.architecture is missing"),
        ({"models__a": {"architecture": "os.path"}}, "models.a.architecture must be a module of model/"),
        (
            {"models__a": {"architecture": "model.nothing"}},
            "models.a.architecture must be a module of model/",
        ),
        (
            {"models__a": {"architecture": "model.examples"}},
            "models.a.architecture must be a module of model/",
        ),
        (
            {"models__smartave__colour": 1},
            "models.smartave.colour is a setting of neither model.smartave nor",
        ),
        ({"models__aveqa__image": True}, "models.aveqa.image must be False, got True"),
        ({"models__smartave__epochs": 0}, "models.smartave.epochs must be > 0, got 0"),
        (
            {"corpora__mave__attributes_per_root": {"Boks": 9}},
            "corpora.mave.attributes_per_root names 'Boks', which is none of the roots",
        ),
        (
            {"corpora__mepave__max_negatives": 3},
            "corpora.mepave.max_negatives is not a setting that exists for",
        ),
        (
            {"models__a": {"architecture": "model.baselines.none"}},
            "models.a.architecture must be a module of",
        ),
        (
            {"corpora__mine": {"base": "none"}},
            "corpora.mine.base must name a corpus that has no base itself, got 'none'",
        ),
        (
            {"corpora__mine": {"base": ["sample"]}},
            "corpora.mine.base must name a corpus that has no base itself, got ['sample']",
        ),
        ({"corpora__sample__models": {"none": {}}}, "corpora.sample.models names 'none', which is no model"),
        (
            {"corpora__sample__models": {"pam": {"base": "smartave"}}},
            "corpora.sample.models.pam.base is a setting of neither model.baselines.pam nor",
        ),
        (
            {"corpora__sample__models": {"pam": {"epochs": 0}}},
            "corpora.sample.models.pam.epochs must be > 0, got 0",
        ),
    ],
)
def test_a_wrong_params_file_is_told_where_and_why(edits: dict, complaint: str) -> None:
    told = complaints(**edits)
    assert any(line.startswith(f"params.yaml: {complaint}") for line in told), told


def test_every_problem_is_told_once_and_at_once() -> None:
    told = complaints(
        regions__max_boxes=0,
        ocr__canvas=3,
        run__corpora=["nope"],
        models__a={"base": "b"},
        corpora__mine=None,
    )
    assert len(told) == len(set(told)) == 5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("run: &run {corpora: [sample]}", "line 1 has an anchor"),
        ("run: {corpora: [sample]}\nocr: *run", "params.yaml"),
        ("run: 1\nrun: 2", "duplicate key"),
        ("run: [1", "is not YAML"),
    ],
)
def test_anchors_duplicate_keys_and_broken_yaml_are_refused(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        config.read(path)


@pytest.mark.parametrize("document", [None, [], "sample"])
def test_a_document_without_sections_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match="must hold a mapping of sections"):
        config.resolve(document)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_writing_again_touches_nothing_and_stale_files_go(tmp_path: Path) -> None:
    folder = tmp_path / "config"
    config.write({"run.json": {"b": 1, "a": 2}, "old/models/x.json": {}}, folder)
    before = (folder / "run.json").stat().st_mtime_ns
    config.write({"run.json": {"a": 2, "b": 1}, "new/ocr.json": {"language": "Ελ"}}, folder)
    assert (folder / "run.json").stat().st_mtime_ns == before
    assert contents(folder) == {
        "run.json": b'{\n  "a": 2,\n  "b": 1\n}\n',
        "new/ocr.json": '{\n  "language": "Ελ"\n}\n'.encode(),
    }
    assert not (folder / "old").exists()


def test_the_command_fails_without_a_traceback_and_leaves_config_alone(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("run: {corpora: [], models: [x], seeds: [0]}\n")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "run.json").write_text("kept")
    done = subprocess.run(
        [sys.executable, "-m", "model.config"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("params.yaml: run.corpora list should have at least 1 item")
    assert contents(tmp_path / "config") == {"run.json": b"kept"}


def test_new_code_in_an_architecture_changes_its_models_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config.resolve(SHIPPED)
    monkeypatch.setattr(config, "code_digest", lambda module: f"new {module}")
    after = config.resolve(SHIPPED)
    different = {name for name in before if before[name] != after[name]}
    assert different == {name for name in before if "/models/" in name}
    assert json.dumps(after["sample/models/smartave.json"]).count("new model.smartave") == 1
    assert json.dumps(after["sample/models/pam.json"]).count("new model.baselines.pam") == 1
