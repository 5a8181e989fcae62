"""Running the graph under Prefect: one task per DVC stage, in turn.

    python -m pipeline.flows     # starts a server where none answers, and serves the deployments

DVC owns the graph and decides what has to run; a task whose stage is up to date ends at once.
Nothing here knows a stage by more than its name.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("DO_NOT_TRACK", "1")

from prefect import flow, get_run_logger, serve, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.settings import PREFECT_API_URL

DEPLOYMENTS: dict[str, list[str]] = {
    "full": [],
    "data": ["source", "products", "images"],
    "features": ["ocr", "regions"],
    "train": ["train"],
    "evaluate": ["evaluate", "report"],
}
SERVER_START_S = 180  # the first start in a fresh home makes the server's database
STOP_S = 10  # between asking a process to end and making it
PROGRESS_S = "10"  # between two lines of a progress bar in the log


class StageFailed(RuntimeError):
    """A stage's command, or DVC itself, ended with an error."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of dvc.yaml: its name with the cell (`train@sample-smartave-0`), and its metrics' files."""

    name: str
    metrics: tuple[str, ...]

    @property
    def group(self) -> str:
        return self.name.split("@")[0]


def stages_to_run(targets: Sequence[str]) -> list[Stage]:
    """The stages that `targets` name and all that they stand on, each after what it needs.

    A target is a stage (`regions@sample`) or a group (`regions`); none at all means everything.
    Raises `ValueError` on a target that dvc.yaml does not have.
    """
    import networkx
    from dvc.repo import Repo

    with Repo() as repo:
        graph = repo.index.graph  # an edge goes from a stage to one that it needs
        stages = {
            stage: Stage(stage.addressing, tuple(str(out) for out in stage.outs if out.metric))
            for stage in networkx.dfs_postorder_nodes(graph)
        }
        known = {name for stage in stages.values() for name in (stage.name, stage.group)}
        if unknown := [target for target in targets if target not in known]:
            raise ValueError(f"dvc.yaml has no stage {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        wanted = set()
        for node, stage in stages.items():
            if not targets or stage.name in targets or stage.group in targets:
                wanted |= {node} | networkx.descendants(graph, node)
        return [stage for node, stage in stages.items() if node in wanted]


@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def bring_up_to_date(name: str, metrics: tuple[str, ...]) -> None:
    """Have DVC run the stage `name` if anything that it depends on has changed.

    Raises `StageFailed`.
    """
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", name]
    if status := _run(command, get_run_logger().info):
        raise StageFailed(f"stage {name} failed: `dvc repro` ended with {status}; its output is in the log")
    for path in metrics:
        create_markdown_artifact(
            key=_slug(f"metrics-{name}"), markdown=metrics_table(Path(path)), description=path
        )


@flow(name="smartave", persist_result=False)
def smartave(stages: list[str] | None = None) -> None:
    """Bring `stages` (names or groups of dvc.yaml; none: all) and what they stand on up to date."""
    for stage in stages_to_run(stages or []):
        bring_up_to_date(stage.name, stage.metrics)


def metrics_table(path: Path) -> str:
    """The numbers of a metrics file as a Markdown table, nested names joined by dots."""
    found = _numbers(json.loads(path.read_text()), "")
    rows = [f"| {name} | {value:{'d' if isinstance(value, int) else 'g'}} |" for name, value in found]
    return "\n".join([f"**{path}**", "", "| metric | value |", "|---|---:|", *rows])


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, int | float):
        yield name, value


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def _run(command: list[str], say: Callable[[str], None]) -> int:
    """The exit status of `command`; `say` gets each line of its output. Nothing of it outlives the call."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "TQDM_MININTERVAL": PROGRESS_S,
    }
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip():
                    say(line.rstrip())
            return process.wait()
        except BaseException:  # a cancelled run arrives as one
            _end_group(process)
            raise


def _end_group(process: subprocess.Popen[Any]) -> None:
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_S)
            return


@contextlib.contextmanager
def server(url: str) -> Iterator[None]:
    """A Prefect server behind `url` while the block runs: the one that answers there, or one of our own.

    Raises `ValueError` when none answers and `url` is not on this machine, and when ours does not start.
    """
    if _answers(url):
        yield
        return
    place = urlsplit(url)
    if place.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"no Prefect server answers at {url}, and one can be started on this machine only")
    start = [sys.executable, "-m", "prefect", "server", "start"]
    command = [*start, "--host", place.hostname, "--port", str(place.port or 80)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            patience = time.monotonic() + SERVER_START_S
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > patience:
                    raise ValueError(f"the Prefect server for {url} did not start")
                time.sleep(0.3)
            yield
        finally:
            _end_group(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def main() -> None:
    summary = "Serve the deployments smartave/" + ", smartave/".join(DEPLOYMENTS)
    argparse.ArgumentParser(prog="python -m pipeline.flows", description=summary).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    module = EntrypointType.MODULE_PATH
    deployments = [
        RunnerDeployment.from_flow(smartave, name, parameters={"stages": stages}, entrypoint_type=module)
        for name, stages in DEPLOYMENTS.items()
    ]
    try:
        with server(PREFECT_API_URL.value() or ""):
            serve(*deployments, limit=1)  # two runs at once would wait for each other's DVC locks
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    from pipeline import flows  # under its own name, by which the runner finds the flow

    flows.main()
