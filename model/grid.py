"""Run what is missing of the paper's grid on one corpus: `make paper CORPUS=sample`.

    python -m model.grid CORPUS [--models NAME...] [--seeds N...] [--estimate]

A cell is there when docs/results/ holds it with today's settings in params.yaml; a variant that resolves
to what another model does is that model. What is missing is written as `run:` into params.yaml, as one does
by hand (comments stay), and DVC brings it up to date: each cell a stage of its own, cached, so that a run
that was stopped goes on where it stopped. How long it will take is told first, from earlier trainings.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import config, paper, results
from pipeline import params
from pipeline.editing import edited


@dataclass(frozen=True)
class Cell:
    model: str
    seed: int


def missing(corpus: str, models: Sequence[str], seeds: Sequence[int]) -> tuple[list[Cell], dict[str, str]]:
    """The cells to run, and the models that need none because they are as another before them."""
    same = results.same(corpus, models)
    there = {(one["settings"], one["seed"]) for one in results.cells([corpus])}
    digests = {model: results.settings_digest(corpus, model) for model in models}
    wanted = [Cell(model, seed) for model in models if model not in same for seed in seeds]
    return [cell for cell in wanted if (digests[cell.model], cell.seed) not in there], same


def architecture(files: Mapping[str, Any], corpus: str, model: str) -> str | None:
    found = files.get(f"{corpus}/models/{model}.json")
    return found["architecture"] if found else None


def seconds(
    cell: Cell,
    corpus: str,
    files: Mapping[str, Any],
    known: Sequence[Mapping[str, Any]],
    questions: int | None,
) -> float | None:
    """What a training will take: as this model took here with today's settings, else by examples as it or its
    architecture took anywhere; None when nothing like it was ever timed."""
    timed = [one for one in known if "training_s" in one["cost"]]
    here = [one for one in timed if (one["corpus"], one["model"]) == (corpus, cell.model)]
    if today := [float(one["cost"]["training_s"]) for one in here if results.is_current(one)]:
        return statistics.fmean(today)
    of = architecture(files, corpus, cell.model)
    alike = [one for one in timed if one["model"] == cell.model]
    alike = alike or [one for one in timed if architecture(files, one["corpus"], one["model"]) == of]
    if not alike or questions is None:
        return None
    rate = max(float(one["cost"]["training_s"]) / one["cost"]["examples"] for one in alike)
    return rate * questions * files[f"{corpus}/models/{cell.model}.json"]["train"]["epochs"]


def training_questions(corpus: str) -> int | None:
    path = Path("metrics", corpus, "products.json")
    return json.loads(path.read_text())["splits"]["train"]["questions"] if path.is_file() else None


def estimate(
    cells: Sequence[Cell], corpus: str, files: Mapping[str, Any], known: Sequence[Mapping[str, Any]]
) -> str:
    """In one sentence. Training alone; data, features and evaluation come on top."""
    questions = training_questions(corpus)
    times = [seconds(cell, corpus, files, known, questions) for cell in cells]
    told = [one for one in times if one is not None]
    open_ones = len(times) - len(told)
    text = f"{len(cells)} cells to train on {corpus}: about {paper.duration([sum(told)])}" if told else ""
    if not told:
        return f"{len(cells)} cells to train on {corpus}; nothing like them was timed yet, so no estimate."
    rest = f", and {open_ones} of a kind that was never timed" if open_ones else ""
    return f"{text} of training{rest}, evaluation not counted."


def name_in_params(corpus: str, cells: Sequence[Cell], path: Path = config.PARAMS) -> None:
    """Write `run:` so that it names these cells (and, being a product of three lists, maybe more)."""
    lists = {
        "corpora": [corpus],
        "models": list(dict.fromkeys(cell.model for cell in cells)),
        "seeds": sorted({cell.seed for cell in cells}),
    }
    with edited(path) as content:
        for name, values in lists.items():
            content["run"][name].clear()
            content["run"][name].extend(values)


def run(corpus: str, models: Sequence[str], seeds: Sequence[int], only_estimate: bool) -> None:
    """Raises `ValueError` for a corpus or model that params.yaml does not declare, for a number that is no
    seed, or when DVC fails."""
    models, seeds = list(dict.fromkeys(models)), list(dict.fromkeys(seeds))
    declared = config.read(config.PARAMS)
    files = config.resolve(declared)
    if corpus not in declared["corpora"]:
        raise ValueError(f"corpus must be one of {', '.join(declared['corpora'])}, got {corpus!r}")
    for model in models:
        if model not in declared["models"]:
            raise ValueError(f"model must be one of {', '.join(declared['models'])}, got {model!r}")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in 0..{2**32 - 1}, got {seed}")
    config.write(files, params.CONFIG)
    cells, same = missing(corpus, models, seeds)
    for model, other in same.items():
        sys.stdout.write(f"{model} is {other} on {corpus}\n")
    if not cells:
        sys.stdout.write(f"every cell on {corpus} is there\n")
    else:
        sys.stdout.write(estimate(cells, corpus, files, results.cells()) + "\n")
    if only_estimate:
        return
    if cells:
        name_in_params(corpus, cells)
        stages = [f"evaluate@{corpus}-{cell.model}-{cell.seed}" for cell in cells]
        for wanted in (["config"], ["--keep-going", *stages]):
            if subprocess.run([sys.executable, "-m", "dvc", "repro", *wanted]).returncode:
                raise ValueError("dvc repro failed; what is done is kept, run again to go on")
    subprocess.run([sys.executable, "-m", "model.report"], check=True)


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.grid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", metavar="CORPUS")
    parser.add_argument(
        "--models", nargs="+", default=paper.MODELS, metavar="NAME", help="default: the paper's"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--estimate", action="store_true", help="tell what is missing, and run nothing")
    return parser.parse_args(command_line)


def main() -> None:
    arguments = parse()
    try:
        run(arguments.corpus, arguments.models, arguments.seeds, arguments.estimate)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
