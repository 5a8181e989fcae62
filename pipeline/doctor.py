"""What is wrong with a workspace, and what to do about it.

    python -m pipeline.doctor           one line per problem; exit code 1 where there is one
    python -m pipeline.doctor --clear   also clear what may be cleared: broken locks, remains of killed runs

Nothing that somebody made is ever cleared: data, caches and shards are named, with what mends them.
"""

import argparse
import fcntl
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.disk import RESERVE_BYTES
from pipeline.download import check_is_data
from pipeline.locks import LOCKS

RWLOCK = Path(".dvc", "tmp", "rwlock")
DVC_LOCK = RWLOCK.with_name("lock")
SHARDED = ("images", "ocr", "regions")
PAIR = """
import torch, torchvision
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
"""


@dataclass(frozen=True)
class Problem:
    what: str
    remedy: str
    clear: Callable[[], None] | None = None


def examine() -> Iterator[Problem]:
    for check in (broken_lock, pointers, missing_objects, wheels, remains, incomplete_stages, full_disk):
        yield from check()


def broken_lock() -> Iterator[Problem]:
    """A `dvc` that was killed while it wrote its lock blocks every later one."""
    if not RWLOCK.is_file():
        return
    try:
        if isinstance(json.loads(RWLOCK.read_text() or "x"), dict):
            return
    except ValueError:
        pass
    if _is_held(DVC_LOCK):
        yield Problem(f"{RWLOCK} is not readable", "a dvc command is running: wait for it")
    else:
        yield Problem(f"{RWLOCK} is cut short and blocks every dvc command", "delete it", RWLOCK.unlink)


def pointers() -> Iterator[Problem]:
    """Files that stand in for the data they name: Git LFS pointers, pages of a login."""
    local = []
    for config in sorted(Path("config").glob("*/source.json")):
        try:
            settings = json.loads(config.read_text())
        except ValueError as error:
            yield Problem(f"{config} is not JSON ({error})", "`dvc repro config` writes it anew")
            continue
        local += [Path(entry["path"]) for entry in _files(settings) if entry.get("path")]
    inside = [path for folder in local if folder.is_dir() for path in folder.iterdir()]
    for path in sorted({*Path("data").glob("*/source/**/*"), *local, *inside}):
        if not path.is_file() or path.parent.name == "images":
            continue
        try:
            check_is_data(path)
        except ValueError as error:
            yield Problem(
                f"{path} is {error}",
                "bring the file itself (`git lfs pull` where it came from, or its url in params.yaml)",
            )


def _files(settings: Any) -> Iterator[dict[str, Any]]:
    """Every `{path: ...}` below a corpus's source settings."""
    if isinstance(settings, dict):
        if "path" in settings:
            yield settings
        for value in settings.values():
            yield from _files(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _files(value)


def missing_objects() -> Iterator[Problem]:
    """What dvc.lock promises and DVC's cache lacks. Where there is no cache, nothing was made here yet."""
    if not Path("dvc.lock").is_file() or not Path(".dvc").is_dir():
        return
    from dvc.exceptions import DvcException

    try:
        cache, outs = _promised()
    except DvcException as error:  # which names the file
        yield Problem(
            f"dvc cannot read this workspace: {error}",
            "mend the file: a typo, or a merge conflict, of which one side has to be taken",
        )
        return
    for stage, path, digest in outs:
        lost = _lost(cache, digest)
        if not lost:
            continue
        if path.exists():
            remedy = f"`dvc commit {stage}` puts it there again if {path} is what was made"
        else:
            remedy = f"`dvc fetch {stage}` where there is a remote, else `dvc repro {stage}`"
        yield Problem(f"DVC's cache lacks {lost[0]} of {path}, and {len(lost) - 1} more", remedy)


def _promised() -> tuple[Path, list[tuple[str, Path, str]]]:
    """DVC's cache, and (stage, output, digest) of all that should be in it: nothing where there is none."""
    from dvc.repo import Repo

    with Repo() as repo:
        cache = Path(repo.cache.local.path)
        outs = [(stage.addressing, out) for stage in repo.index.stages for out in stage.outs]
        return cache, [
            (stage, Path(out.fs_path).relative_to(Path.cwd()), out.hash_info.value)
            for stage, out in outs
            if out.use_cache and out.hash_info and out.hash_info.value and cache.is_dir()
        ]


def _lost(cache: Path, digest: str) -> list[str]:
    def place(one: str) -> Path:
        return cache / one[:2] / one[2:]

    if not place(digest).is_file():
        return [digest]
    if not digest.endswith(".dir"):
        return []
    try:
        entries = [entry["md5"] for entry in json.loads(place(digest).read_text())]
    except ValueError:
        return [digest]  # cut short; DVC removes it when it next looks
    return [entry for entry in entries if not place(entry).is_file()]


def wheels() -> Iterator[Problem]:
    """A torch and a torchvision that were not built for each other fail in the first operator."""
    done = subprocess.run([sys.executable, "-c", PAIR], capture_output=True, text=True)
    if done.returncode:
        told = done.stderr.strip().splitlines()[-1:] or ["no message"]
        yield Problem(
            f"torch and torchvision do not fit each other ({told[0]})",
            "install the pair that requirements.lock names, both from one place",
        )


def remains() -> Iterator[Problem]:
    """Temporary files that a killed run left; not while a stage is running."""
    if any(map(_is_held, (*LOCKS.glob("*.lock"), DVC_LOCK))) or _dvc_runs_a_stage():
        return
    for folder in Path("data").glob("*/.source.partial"):
        yield Problem(
            f"{folder} is left of a killed run", "delete it", functools.partial(shutil.rmtree, folder)
        )
    for root in ("data", "metrics", "runs", "reports", "config", ".cache"):
        for path in sorted(Path(root).glob("**/.*.tmp")):
            if path.is_file():
                yield Problem(f"{path} is left of a killed run", "delete it", path.unlink)


def _dvc_runs_a_stage() -> bool:
    """DVC lets go of its own lock while a stage's command runs; its rwlock then names the process."""
    import psutil

    try:
        held = json.loads(RWLOCK.read_text())
        infos = [*held.get("write", {}).values(), *itertools.chain(*held.get("read", {}).values())]
        return any(psutil.pid_exists(info["pid"]) for info in infos)
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError, KeyError, TypeError):
        return True  # not readable, so nobody knows; `broken_lock` says what to do


def incomplete_stages() -> Iterator[Problem]:
    for stage in SHARDED:
        for folder in sorted(Path("data").glob(f"*/{stage}")):
            if not (folder / "manifest.json").is_file() and not _is_held(
                LOCKS / f"{folder.parent.name}.{stage}.lock"
            ):
                yield Problem(
                    f"{folder} is not complete", f"`dvc repro {stage}@{folder.parent.name}` goes on with it"
                )


def full_disk() -> Iterator[Problem]:
    free = shutil.disk_usage(".").free
    if free < RESERVE_BYTES:
        yield Problem(f"the disk has {free / 1e6:.0f} MB free", "make room; `python -m pipeline.shards gc`")


def _is_held(path: Path) -> bool:
    """Whether a living process holds the lock file."""
    if not path.is_file():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def report(*, clear: bool) -> int:
    """Print what is wrong; how many problems are left."""
    left = 0
    for problem in examine():
        if clear and problem.clear is not None:
            problem.clear()
            sys.stdout.write(f"cleared: {problem.what}\n")
        else:
            left += 1
            hint = "; --clear does it" if problem.clear is not None else ""
            sys.stdout.write(f"{problem.what}: {problem.remedy}{hint}\n")
    sys.stdout.write(f"{left} problems are left\n" if left else "nothing is wrong\n")
    return left


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clear", action="store_true", help="clear what may be cleared")
    sys.exit(1 if report(clear=parser.parse_args().clear) else 0)


if __name__ == "__main__":
    main()
