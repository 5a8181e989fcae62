"""params.yaml as commands edit it: comments stay, and the file is the old one or the new one, never half."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.disk import atomically
from pipeline.locks import LOCKS


def _round_trip() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()  # the round-trip loader: plain containers, no object of the file's choosing
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def read(path: Path) -> Any:
    """The content of the YAML file `path`. Raises `ValueError` where it is not YAML."""
    from ruamel.yaml.error import YAMLError

    try:
        return _round_trip().load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


@contextmanager
def edited(path: Path) -> Iterator[Any]:
    """`read(path)` to change in place; written after the block, not if it raises. Keep the block short:
    other commands that edit wait for it, and what a text editor saves meanwhile is lost."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    with FileLock(LOCKS / f"{path.name}.lock", fallback_to_soft=False):
        content = read(path)
        yield content
        with atomically(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            _round_trip().dump(content, file)
