import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Workspace, new_workspace

from pipeline import flows

GRAPH = """\
stages:
  a:
    cmd: python stage.py a < nonce
    deps: [nonce, stage.py]
    outs: [a.txt]
  b:
    foreach: [x, y]
    do:
      cmd: python stage.py b-${item} < a.txt
      deps: [a.txt, stage.py]
      metrics: ['b-${item}.txt']
  c:
    cmd: python stage.py c < verdict
    deps: [b-x.txt, verdict, stage.py]
    outs: [c.txt]
"""
STAGE = """\
import json, pathlib, sys
name, given = sys.argv[1], sys.stdin.read()
print(f"{name} was given {given!r}")
if given == "fail":
    sys.exit("c was told to fail")
pathlib.Path(f"{name}.txt").write_text(json.dumps({"f1": 0.5, "by_origin": {"text": 1, "note": given}}))
"""


def graph(folder: Path) -> Workspace:
    """Real but tiny stages: a, then b@x and b@y, then c, which fails when the file `verdict` says so."""
    made = new_workspace(folder)
    (made.folder / "pipeline").mkdir()
    for name in ("pipeline/__init__.py", "pipeline/flows.py", "prefect.toml"):
        shutil.copy2(ROOT / name, made.folder / name)
    files = {"dvc.yaml": GRAPH, "stage.py": STAGE, "nonce": "0", "verdict": "pass"}
    for name, text in files.items():
        (made.folder / name).write_text(text)
    made.run("dvc", "init", "--quiet")
    return made


def test_metrics_stand_in_their_table_with_all_digits_of_counts(tmp_path):
    (tmp_path / "m.json").write_text('{"size": {"bytes": 2226509}, "f1": 0.873214, "ok": true, "note": "-"}')
    rows = flows.metrics_table(tmp_path / "m.json").splitlines()[4:]
    assert rows == ["| size.bytes | 2226509 |", "| f1 | 0.873214 |", "| ok | 1 |"]


@dataclass
class Served:
    """A workspace whose deployments a real Prefect server of its own serves."""

    workspace: Workspace
    url: str

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ("prefect", "deployment", "run", *arguments, "--watch", "--watch-timeout", "150")
        (self.workspace.folder / "nonce").write_text(str(time.monotonic_ns()))
        return self.workspace.run(*command, check=False)

    def ask(self, route: str, **filters: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}/{route}/filter",
            data=json.dumps(filters).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def tasks(self) -> dict[str, str]:
        """State by name of the tasks of the newest flow run, in the order in which they started."""
        [run] = self.ask("flow_runs", sort="START_TIME_DESC", limit=1)
        wanted = {"flow_runs": {"id": {"any_": [run["id"]]}}}
        found = self.ask("task_runs", **wanted)
        return {task["name"]: task["state_name"] for task in sorted(found, key=lambda one: one["start_time"])}

    def log(self) -> str:
        [run] = self.ask("flow_runs", sort="START_TIME_DESC", limit=1)
        found = self.ask("logs", logs={"flow_run_id": {"any_": [run["id"]]}}, sort="TIMESTAMP_ASC")
        return "\n".join(entry["message"] for entry in found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    workspace = graph(tmp_path_factory.mktemp("flows") / "project")
    url = f"http://127.0.0.1:{free_port()}/api"
    workspace.environment["PREFECT_API_URL"] = url
    log = workspace.folder.parent / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.flows"],
            cwd=workspace.folder,
            env=workspace.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        patience = time.monotonic() + 150
        while "smartave/evaluate" not in log.read_text():
            if process.poll() is not None or time.monotonic() > patience:
                pytest.fail(f"nothing is served:\n{log.read_text()}")
            time.sleep(0.3)
        yield Served(workspace, url)
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert not flows._answers(url), "the server outlived `python -m pipeline.flows`"


@pytest.mark.timeout(400)
def test_a_watched_deployment_ends_with_0_after_one_task_per_stage(served: Served) -> None:
    done = served.run("smartave/full")
    assert done.returncode == 0, done.stdout
    assert served.tasks() == {"a": "Completed", "b@x": "Completed", "b@y": "Completed", "c": "Completed"}
    nonce = (served.workspace.folder / "nonce").read_text()
    assert f"a was given '{nonce}'" in served.log()
    artifacts = {artifact["key"]: artifact["data"] for artifact in served.ask("artifacts")}
    assert "| by_origin.text | 1 |" in artifacts["metrics-b-x"]
    status = served.workspace.run("dvc", "status")
    assert "up to date" in status.stdout


@pytest.mark.timeout(400)
def test_a_failing_stage_fails_the_run_in_a_task_of_its_name(served: Served) -> None:
    verdict = served.workspace.folder / "verdict"
    verdict.write_text("fail")
    try:
        done = served.run("smartave/full")
    finally:
        verdict.write_text("pass")
    assert done.returncode == 1, done.stdout
    assert served.tasks() == {"a": "Completed", "b@x": "Completed", "b@y": "Completed", "c": "Failed"}
    assert "c was told to fail" in served.log()


@pytest.mark.timeout(400)
def test_the_parameter_stages_runs_these_and_what_they_stand_on(served: Served) -> None:
    done = served.run("smartave/full", "--param", 'stages=["b"]')
    assert done.returncode == 0, done.stdout
    assert served.tasks() == {"a": "Completed", "b@x": "Completed", "b@y": "Completed"}


@pytest.fixture(scope="module")
def small_graph(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return graph(tmp_path_factory.mktemp("graph") / "project")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([], ["a", "b@x", "b@y", "c"]),
        (["c"], ["a", "b@x", "c"]),
        (["b@y"], ["a", "b@y"]),
        (["b"], ["a", "b@x", "b@y"]),
    ],
)
def test_stages_come_after_what_they_need(
    small_graph: Workspace, monkeypatch: pytest.MonkeyPatch, targets: list[str], expected: list[str]
) -> None:
    monkeypatch.chdir(small_graph.folder)
    assert [stage.name for stage in flows.stages_to_run(targets)] == expected


def test_an_unknown_stage_is_named_beside_those_that_exist(
    small_graph: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_graph.folder)
    with pytest.raises(ValueError, match=r"dvc.yaml has no stage d; it has a, b, b@x, b@y, c"):
        flows.stages_to_run(["a", "d"])


@pytest.mark.parametrize(
    ("deployment", "its_own", "later"),
    [
        ("full", {"train", "evaluate", "report"}, set()),
        ("data", {"source", "products", "images"}, {"ocr", "regions", "train"}),
        ("features", {"ocr", "regions"}, {"train", "evaluate", "report"}),
        ("train", {"train"}, {"evaluate", "report"}),
        ("evaluate", {"evaluate", "report"}, set()),
    ],
)
def test_a_deployment_brings_its_own_stages_and_none_after_them(
    deployment: str, its_own: set[str], later: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    brought = {stage.group for stage in flows.stages_to_run(flows.DEPLOYMENTS[deployment])}
    assert its_own <= brought
    assert not later & brought


def test_a_cancelled_run_leaves_no_process_behind() -> None:
    child = "import time; print('up', flush=True); time.sleep(60)"
    parent = (
        f"import os, subprocess, sys; print(os.getpid()); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    heard: list[str] = []

    def say(line: str) -> None:
        heard.append(line)
        if line == "up":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flows._run([sys.executable, "-u", "-c", parent], say)
    patience = time.monotonic() + 10
    while group_lives(int(heard[0])) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not group_lives(int(heard[0]))


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True


def test_a_server_that_is_not_ours_to_start_and_does_not_answer_is_an_error() -> None:
    with (
        pytest.raises(ValueError, match=r"no Prefect server answers at http://prefect\.invalid/api"),
        flows.server("http://prefect.invalid/api"),
    ):
        pass
