"""The layout that style and readers rely on, and what may stand in no tracked file."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath

import grimp
import pytest
from conftest import ROOT, tracked_files

PACKAGES = ("model", "features", "pipeline")
TRACKED = tracked_files()
MODULES = [name for name in TRACKED if name.endswith(".py") and name.split("/")[0] in PACKAGES]
COMMANDS = (
    "model.config",
    "pipeline.source",
    "pipeline.products",
    "pipeline.images",
    "features.ocr",
    "features.regions",
    "model.train",
    "model.evaluate",
    "model.report",
    "model.grid",
    "model.predict",
    "model.card",
    "pipeline.mave",
    "pipeline.mepave",
    "pipeline.shards",
    "pipeline.flows",
    "pipeline.doctor",
    "features.show",
    "features.zoo",
    "features.convert",
    "model.grid",
    "model.card",
)
UNPICKLERS = {"torch.load", "pickle.load", "pickle.loads", "joblib.load", "numpy.load", "np.load"}
CONVERTER = "features/convert.py"  # the one place that reads other people's checkpoints
# Names are put together here, or this file would be the one that holds them.
MACHINE = re.compile(r"/(?:work|root|home|Users)/[\w.]|/tmp/[\w.]")
REGISTRY = re.compile(r"(?:p[y]pi\.|python[h]osted|/simple\b|--(?:extra-)?index-url|--find-links)")


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), filename=name)


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 30


def test_no_module_is_a_drawer_for_anything() -> None:
    names = {PurePosixPath(name).stem for name in MODULES}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


def test_no_module_is_named_like_a_library() -> None:
    libraries = {"prefect", "dvc", "yaml", "torch", "transformers", "easyocr", "pydantic", "numpy", "dask"}
    assert not {PurePosixPath(name).stem for name in MODULES} & (libraries | sys.stdlib_module_names)


@pytest.mark.parametrize("package", [*PACKAGES, "model/baselines"])
def test_a_package_opens_with_one_docstring_and_nothing_else(package: str) -> None:
    opening = tree(f"{package}/__init__.py")
    assert ast.get_docstring(opening)
    assert len(opening.body) == 1


def test_packages_and_tests_are_flat() -> None:
    nested = [name for name in MODULES if name.count("/") > 1 + name.startswith("model/baselines/")]
    nested += [name for name in TRACKED if name.startswith("tests/") and name.count("/") > 1]
    assert not nested


def test_a_test_is_named_after_what_it_tests() -> None:
    whole = {
        "test_repository.py",
        "test_bad_input.py",
        "test_dvc_graph.py",
        "test_dvc_road.py",
        "test_dvc_faults.py",
    }
    modules = {name.replace("/", "_") for name in MODULES}
    for name in TRACKED:
        file = PurePosixPath(name)
        if file.parts[0] == "tests" and file.name.startswith("test_") and file.name not in whole:
            package = file.stem.split("_")[1]
            assert package in PACKAGES, name
            whole_of_a_package = file.stem in ("test_model_cell", "test_model_baselines")
            assert file.name.removeprefix("test_") in modules or whole_of_a_package, name


def imported(name: str) -> Iterator[str]:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_down_only() -> None:
    for name in MODULES:
        floor = PACKAGES.index(name.split("/")[0])
        above = [one for one in imported(name) if one.split(".")[0] in PACKAGES[:floor]]
        assert not above, f"{name} imports {above}"


def test_flows_know_dvc_and_no_stage() -> None:
    assert not [one for one in imported("pipeline/flows.py") if one.split(".")[0] in ("model", "features")]


def test_the_paper_s_configuration_needs_four_packages() -> None:
    """So that it runs where a GPU is and little else; tokenizers comes with transformers."""
    names = ("benchmarks", *PACKAGES)
    graph = grimp.build_graph(
        *names, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    found = {name.partition(".")[0] for name in graph.find_upstream_modules("benchmarks.train")}
    needed = found - sys.stdlib_module_names - set(names)
    lazily = {"grimp"}  # by pipeline.provenance, where code is digested
    assert needed - lazily == {"torch", "transformers", "tokenizers", "numpy", "pyarrow"}


def test_main_is_short() -> None:
    for name in MODULES:
        for node in tree(name).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 15, f"{name}: main has over 15 lines"


def called(name: str) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(tree(name)) if isinstance(node, ast.Call))


def test_nothing_is_unpickled_outside_the_converter() -> None:
    for name in MODULES:
        if name != CONVERTER:
            found = {ast.unparse(call.func) for call in called(name)} & UNPICKLERS
            assert not found, f"{name} calls {found}"
            assert not {"pickle", "cloudpickle", "dill", "joblib"} & set(imported(name)), name


def test_no_command_runs_through_a_shell() -> None:
    for name in [*MODULES, *(one for one in TRACKED if one.startswith("tests/") and one.endswith(".py"))]:
        for call in called(name):
            assert ast.unparse(call.func) not in ("os.system", "os.popen"), name
            shell = [word for word in call.keywords if word.arg == "shell"]
            assert all(isinstance(w.value, ast.Constant) and w.value.value is False for w in shell), name


def test_no_file_names_a_machine_or_a_package_index() -> None:
    looked_at = 0
    for name in TRACKED:
        if name == "tests/test_repository.py":
            continue
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        looked_at += 1
        for pattern in (MACHINE, REGISTRY):
            found = pattern.search(text)
            assert not found, f"{name} holds {found[0] if found else ''}"
    assert looked_at > 40


def test_the_lock_is_hashed_and_covers_what_is_asked_for() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([a-z0-9][a-z0-9-]*)==(\S+)", lock, flags=re.MULTILINE))
    hashed = re.findall(
        r"^[a-z0-9][a-z0-9-]*==\S+ \\\n +--hash=sha256:[0-9a-f]{64}", lock, flags=re.MULTILINE
    )
    assert len(hashed) == len(pins) > 100
    wanted = re.findall(r"^[A-Za-z0-9][A-Za-z0-9._-]*", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    assert not {re.sub(r"[-_.]+", "-", name).lower() for name in wanted} - pins.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: "), done.stdout


def test_what_the_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text()
    for command in set(re.findall(r"python -m ((?:model|features|pipeline)\.\w+)", text)):
        assert f"{command.replace('.', '/')}.py" in MODULES, f"README.md: {command}"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.MULTILINE)):
        assert target in targets, f"README.md: make {target}"
    for path in set(re.findall(r"\]\((?!\w+:|#)([^)#]+)\)", text)):
        assert (ROOT / path).exists(), f"README.md: {path}"


def test_the_readme_s_tree_names_every_module() -> None:
    tree = (ROOT / "README.md").read_text().partition("## File tree")[2]
    names = {PurePosixPath(name).name for name in MODULES} - {"__init__.py"}
    assert not [name for name in sorted(names) if not re.search(rf"(?<![\w.]){re.escape(name)}", tree)]


def test_the_readme_s_table_is_what_the_sample_s_metrics_say_and_holds_the_aims() -> None:
    """Printed and visible values are read with the picture and not without it; docs/log.md says how."""
    keys = (
        (),
        (),
        (),
        ("five_way",),
        *(("by_origin", name) for name in ("text", "printed", "visible", "several")),
    )
    columns = ("f1", "precision", "recall", *["f1"] * 5)
    scores = {
        name: json.loads((ROOT / f"metrics/sample/{name}/0.json").read_text())
        for name in ("smartave", "smartave-text")
    }
    scores["no-learning floor"] = scores["smartave"]["floor"]
    readme = (ROOT / "README.md").read_text()
    found: dict[str, list[float]] = {}
    for name, content in scores.items():
        [cells] = re.findall(rf"^\| `?{re.escape(name)}`? \|(.*)\|$", readme, re.MULTILINE)
        found[name] = [float(cell) for cell in cells.split("|")]
        said = []
        for key, column in zip(keys, columns, strict=True):
            at = content
            for part in key:
                at = at[part]
            said.append(round(at[column], 3))
        assert found[name] == said
    overall, *_, printed, visible, _ = found["smartave"]
    assert (overall >= 0.85, printed >= 0.75, visible >= 0.6) == (True, True, True)
    assert max(found["smartave-text"][5:7]) < 0.35
