"""The settings of every stage and model: params.yaml checked as a whole, resolved, written to config/.

    python -m model.config

Every corpus and model that params.yaml declares is checked, whether it runs or not, and all
problems are reported at once. A value comes from the innermost place that gives it:

    stage   class default < section `ocr:` < the corpus entry's `ocr:`
    model   class default < sections `model:`, `train:` < the corpus entry's `model:`, `train:`
            < the model's entry < the corpus entry's `models:` for this model, its base first

`source` and `products` have no key of their own in a corpus entry: their settings stand in it directly. A
corpus with a `base` has, key by key, what that corpus says and it does not:
`shop_fold1: {base: shop, split: {folds: 5, fold: 1}}`.
A `model:` section speaks to every architecture that has the setting.
"""

import argparse
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, NodeEvent

import features.ocr
import features.regions
import model.cell
import model.checkpoint
import model.evaluate
import pipeline.images
import pipeline.products
import pipeline.source
from pipeline.params import CONFIG, Key, Settings, problems, sentence
from pipeline.provenance import code_digest

PARAMS = Path("params.yaml")
CORPUS_NAME = re.compile(r"[a-z][a-z0-9_]*")
MODEL_NAME = re.compile(r"[a-z][a-z0-9-]*")
STAGES: dict[str, type[Settings]] = {
    "products": pipeline.products.Settings,
    "images": pipeline.images.Settings,
    "ocr": features.ocr.Settings,
    "regions": features.regions.Settings,
    "evaluate": model.evaluate.Settings,
}
OVERRIDES = ("images", "ocr", "regions", "evaluate", "train", "model")  # what a corpus entry may override
SECTIONS = ("run", "corpora", "models", "products", *OVERRIDES)
MODELS = "models"  # a corpus entry's settings of single models


class Run(Settings):
    """The cells that run: every corpus with every model and every seed."""

    corpora: list[str] = Field(min_length=1)
    models: list[str] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(min_length=1)

    @field_validator("corpora", "models", "seeds")
    @classmethod
    def _distinct(cls, names: list[Any]) -> list[Any]:
        if len(set(names)) < len(names):
            raise ValueError(f"names something twice: {names}")
        return names


Layer = tuple[Key, Mapping[str, Any]]  # where in params.yaml, and what stands there


@dataclass
class Checker:
    """Resolves params.yaml into `files`, and collects every problem instead of stopping at one."""

    params: dict[str, Any]
    files: dict[str, Any] = field(default_factory=dict)  # path below config/ -> content
    problems: dict[str, None] = field(default_factory=dict)  # a set that keeps its order
    digests: dict[str, str] = field(default_factory=dict)  # of the code of each architecture

    def check(self) -> None:
        for section in sorted(self.params.keys() - set(SECTIONS), key=str):
            self.complain((section,), f"is not a section that exists ({', '.join(SECTIONS)})")
        corpora = self.inherited(self.entries("corpora", CORPUS_NAME))
        models = self.entries("models", MODEL_NAME)
        chains = {name: chain for name in models if (chain := self.chain(models, name))}
        architectures = {name: found for name in chains if (found := self.architecture(chains[name]))}
        self.digests = {name: code_digest(name) for name in set(architectures.values())}
        for stage, settings in STAGES.items():
            self.resolve(settings, [self.section(stage)], complete=False)
        self.resolve(model.cell.Training, [self.section("train")], complete=False)
        self.known_to_some(self.section("model"), set(architectures.values()))
        for corpus, entry in corpora.items():
            self.corpus(corpus, entry)
            self.known_to_some(self.section("corpora", corpus, "model"), set(architectures.values()))
            for name in sorted(self.section("corpora", corpus, MODELS)[1].keys() - models.keys(), key=str):
                self.complain(("corpora", corpus, MODELS), f"names {name!r}, which is no model")
            for name, architecture in architectures.items():
                self.model(corpus, name, self.on(corpus, chains[name]), architecture)
        self.run(corpora, models)

    def complain(self, key: Key, rest: str) -> None:
        self.problems[sentence(PARAMS.name, key, rest)] = None

    def section(self, *key: str) -> Layer:
        """The mapping that stands at `key`, empty where there is none."""
        found: Any = self.params
        for part in key:
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None and not isinstance(found, dict):
            self.complain(key, f"must be a mapping, got {found!r}")
        return key, found if isinstance(found, dict) else {}

    def entries(self, section: str, pattern: re.Pattern[str]) -> dict[str, dict[str, Any]]:
        """The well-named entries of `corpora:` or `models:`."""
        named = {}
        for name in self.section(section)[1]:
            if not isinstance(name, str) or not pattern.fullmatch(name):
                self.complain((section,), f"has an entry named {name!r}, which must match {pattern.pattern}")
            else:
                named[name] = dict(self.section(section, name)[1])
        return named

    def inherited(self, corpora: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Corpora with what their `base` says and they do not; folds of one differ in `split` alone."""
        whole = {}
        for name, entry in corpora.items():
            base = entry.get("base")
            known = isinstance(base, str) and base in corpora
            if base is not None and (not known or base == name or "base" in corpora[base]):
                self.complain(
                    ("corpora", name, "base"), f"must name a corpus that has no base itself, got {base!r}"
                )
                continue
            outer = corpora[base] if base is not None else {}
            whole[name] = {**outer, **{key: value for key, value in entry.items() if key != "base"}}
        self.params = {**self.params, "corpora": {**self.section("corpora")[1], **whole}}
        return whole

    def resolve(
        self, settings: type[Settings], layers: list[Layer], *, complete: bool = True
    ) -> Settings | None:
        """`settings` from `layers`, the innermost last; a problem is told at the layer it stands in.

        With `complete=False` the layers need not give everything that has no default.
        """
        merged = {name: value for _, layer in layers for name, value in layer.items()}
        try:
            return settings.model_validate(merged)
        except ValidationError as error:
            for key, rest in problems(error, settings, merged):
                at = next(
                    (where for where, layer in reversed(layers) if key and key[0] in layer), layers[-1][0]
                )
                if complete or rest != "is missing":
                    self.complain((*at, *key), rest)
            return None

    def corpus(self, name: str, entry: dict[str, Any]) -> None:
        """The files of one corpus; keys go to the source, to products or to a stage's override."""
        where = ("corpora", name)
        kind = entry.get("kind")
        source = pipeline.source.KINDS.get(kind) if isinstance(kind, str) else None
        if source is None:
            self.complain(
                (*where, "kind"), f"must be one of {', '.join(pipeline.source.KINDS)}, got {kind!r}"
            )
            return
        products = STAGES["products"]
        direct = {key: value for key, value in entry.items() if key not in (*OVERRIDES, MODELS)}
        known = source.model_fields.keys() | products.model_fields.keys()
        if kind == "mepave":
            known -= pipeline.products.MAVE_ONLY
        for key in sorted(direct.keys() - known, key=str):
            self.complain((*where, key), f"is not a setting that exists for kind {kind}")
        self.write(f"{name}/source.json", self.resolve(source, [(where, _only(direct, source))]))
        for stage, settings in STAGES.items():
            inner = (where, _only(direct, settings)) if stage == "products" else self.section(*where, stage)
            self.write(f"{name}/{stage}.json", self.resolve(settings, [self.section(stage), inner]))
        roots, cut = entry.get("roots"), entry.get("attributes_per_root")
        if isinstance(roots, dict) and isinstance(cut, dict):
            for root in sorted(cut.keys() - roots.keys(), key=str):
                self.complain((*where, "attributes_per_root"), f"names {root!r}, which is none of the roots")

    def chain(self, models: dict[str, dict[str, Any]], name: str) -> list[Layer]:
        """The entries from the outermost base down to `name`; empty when a base is unknown or a circle."""
        names = [name]
        while "base" in models[names[-1]]:
            key, base = ("models", names[-1], "base"), models[names[-1]]["base"]
            if not isinstance(base, str) or base not in models:
                self.complain(key, f"must name a model, got {base!r}")
                return []
            if base in names:
                self.complain(key, f"makes a circle: {' -> '.join([*names, base])}")
                return []
            names.append(base)
        return [(("models", name), models[name]) for name in reversed(names)]

    def on(self, corpus: str, chain: list[Layer]) -> list[Layer]:
        """`chain` with what the corpus says of each model in it, right behind the model's own entry."""
        return [
            layer
            for one in chain
            for layer in (one, self.section("corpora", corpus, MODELS, str(one[0][-1])))
        ]

    def architecture(self, chain: list[Layer]) -> str | None:
        """The name of the module that a model is built by."""
        where, name = next(
            ((where, layer["architecture"]) for where, layer in reversed(chain) if "architecture" in layer),
            (chain[-1][0], None),
        )
        if name is None:
            self.complain((*where, "architecture"), "is missing (or `base`, the model that it varies)")
            return None
        known = (
            isinstance(name, str)
            and model.checkpoint.ARCHITECTURE.fullmatch(name)
            and importlib.util.find_spec(name)
        )
        if not known or not hasattr(importlib.import_module(name), "Settings"):
            self.complain((*where, "architecture"), f"must be a module of model/ with Settings, got {name!r}")
            return None
        return name

    def known_to_some(self, section: Layer, architectures: set[str]) -> None:
        """Complain of the keys of a `model:` section that no architecture has."""
        known = {key for name in architectures for key in _architecture_settings(name).model_fields}
        for key in sorted(section[1].keys() - known, key=str):
            self.complain((*section[0], key), "is not a setting that exists in any declared architecture")

    def model(self, corpus: str, name: str, chain: list[Layer], architecture: str) -> None:
        """The file of one model for one corpus; a key of its entry is the trainer's or the architecture's."""
        trainer, built = model.cell.Training, _architecture_settings(architecture)
        both = trainer.model_fields.keys() & built.model_fields.keys()
        if both:
            raise ValueError(f"{architecture}.Settings and model.cell.Training both have {sorted(both)}")
        for where, layer in chain:
            outermost = {"base", "architecture"} if where[0] == "models" else set()
            known = outermost | trainer.model_fields.keys() | built.model_fields.keys()
            for key in sorted(layer.keys() - known, key=str):
                self.complain((*where, key), f"is a setting of neither {architecture} nor section train")
        parts: dict[str, Settings | None] = {}
        for part, settings in (("train", trainer), ("model", built)):
            outer = [self.section(part), self.section("corpora", corpus, part)]
            if part == "model":
                outer = [(where, _only(layer, settings)) for where, layer in outer]
            inner = [(where, _only(layer, settings)) for where, layer in chain]
            parts[part] = self.resolve(settings, [*outer, *inner])
        resolved = {part: settings.model_dump(mode="json") for part, settings in parts.items() if settings}
        if len(resolved) == len(parts):
            self.files[f"{corpus}/models/{name}.json"] = {
                "architecture": architecture,
                "code": self.digests[architecture],  # new code in one architecture reruns its own cells only
                "settings": resolved["model"],
                "train": resolved["train"],
            }

    def run(self, corpora: dict[str, Any], models: dict[str, Any]) -> None:
        run = self.resolve(Run, [self.section("run")])
        if not isinstance(run, Run):
            return
        for section, names, declared in (("corpora", run.corpora, corpora), ("models", run.models, models)):
            for position, name in enumerate(names):
                if name not in declared:
                    self.complain(
                        ("run", section, position), f"must be one of {', '.join(declared)}, got {name!r}"
                    )
        self.files["run.json"] = run.model_dump(mode="json")

    def write(self, path: str, settings: BaseModel | None) -> None:
        if settings is not None:
            self.files[path] = settings.model_dump(mode="json")


def _only(layer: Mapping[str, Any], settings: type[Settings]) -> dict[str, Any]:
    return {key: value for key, value in layer.items() if key in settings.model_fields}


def _architecture_settings(name: str) -> type[Settings]:
    return importlib.import_module(name).Settings


def resolve(params: Any) -> dict[str, Any]:
    """The content of each file below config/ by its path.

    Raises `ValueError` with one line per problem.
    """
    if not isinstance(params, dict):
        raise ValueError(f"{PARAMS} must hold a mapping of sections")
    checker = Checker(params)
    checker.check()
    if checker.problems:
        raise ValueError("\n".join(checker.problems))
    return checker.files


def read(path: Path) -> Any:
    """The YAML of `path`, by the rules that DVC reads it by.

    Raises `ValueError` on anchors (a model's `base` does the same and is checked), duplicate keys, bad YAML.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        text = path.read_text(encoding="utf-8")
        for line in _anchors(yaml, text):
            raise ValueError(
                f"{path}: line {line} has an anchor or alias; say `base: MODEL`, or say it twice"
            )
        return yaml.load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


def _anchors(yaml: YAML, text: str) -> Iterator[int]:
    for event in yaml.parse(text):
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
            yield event.start_mark.line + 1


def write(files: dict[str, Any], folder: Path) -> None:
    """Make `folder` hold exactly `files`, as sorted JSON; what is already right is not touched."""
    folder.mkdir(exist_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder comes after what is in it
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
    for name, content in files.items():
        path, text = folder / name, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        write(resolve(read(PARAMS)), CONFIG)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
