"""What a result was made with: the digest of a stage's own code and of any plain value."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from pipeline.disk import sha256_of

PACKAGES = ("model", "features", "pipeline")


def code_files(module: str) -> list[str]:
    """The files of `module` and of all project modules that it imports, also inside functions, sorted.

    Paths are relative to the folder that holds the packages: the form of dvc.yaml's `deps`.
    """
    import grimp

    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    if module not in graph.modules:
        raise ValueError(f"{module} is not a module of {', '.join(PACKAGES)}")
    names = {module, *graph.find_upstream_modules(module)}
    return sorted(f"{name.replace('.', '/')}.py" for name in names if "." in name)


def code_digest(module: str) -> str:
    found = importlib.util.find_spec(PACKAGES[-1])
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent.parent
    return digest({name: sha256_of(root / name) for name in code_files(module)})


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
