"""Fixtures of the whole suite: throw-away copies of the project, and what they run with."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Tests run side by side, a process per core: more threads than one in each would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def tracked_files() -> list[str]:
    """What Git tracks or would: the project as somebody else gets it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


@dataclass(frozen=True)
class Workspace:
    """A folder with a project, its own Git repository and DVC cache, and this environment's commands."""

    folder: Path
    environment: dict[str, str]

    def run(
        self, *command: str, check: bool = True, timeout: float = 250
    ) -> subprocess.CompletedProcess[str]:
        """`command` in the workspace; its output, both streams as one, is in the failure's message."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
        return done

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace `old`, which must stand in the file once."""
        path = self.folder / name
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
        path.write_text(text.replace(old, new))

    def commit(self, message: str = "State") -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", message)


def new_workspace(folder: Path) -> Workspace:
    """An empty Git repository with this environment's commands, sharing no state with the user."""
    home = folder.with_name(f"{folder.name}-home")
    for path in (folder, home):
        path.mkdir(parents=True)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "DVC_", "GIT_", "SMARTAVE_", "PYTEST_"))
    }
    workspace = Workspace(
        folder,
        {
            **kept,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": str(home),
            "DO_NOT_TRACK": "1",
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(home / "dvc"),
            "GIT_AUTHOR_NAME": "Test",
            "GIT_AUTHOR_EMAIL": "test@example.org",
            "GIT_COMMITTER_NAME": "Test",
            "GIT_COMMITTER_EMAIL": "test@example.org",
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(home / "prefect"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )
    workspace.run("git", "init", "--quiet", "--initial-branch", "main")
    return workspace


def copy_project(folder: Path) -> None:
    """The project's files without results: every stage of the copy's graph is still to run."""
    for name in tracked_files():
        if name == "dvc.lock" or name.startswith(("config/", "metrics/", "docs/results/")):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A committed copy of the project in which no stage has run."""
    made = new_workspace(tmp_path / "project")
    copy_project(made.folder)
    made.commit("The project")
    return made


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start commands that the test's end stops."""
    started: list[subprocess.Popen[str]] = []

    def start(workspace: Workspace, *command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, cwd=workspace.folder, env=workspace.environment, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=30)
