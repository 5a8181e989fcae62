"""The report on the cells that run: tables, figures, and products to look at.

    python -m model.report

Reads config/, what the cells left under metrics/, runs/ and data/, and, for the paper's tables and
figures, every result that is kept in docs/results/; writes reports/index.html with its pictures,
reports/index.md with the tables, and the figures as files under reports/figures/.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from model import charts, paper, results, showcase
from model.metrics import normalise
from model.paper import Table
from pipeline import params, schema

REPORTS = Path("reports")
PRODUCTS_SHOWN = 12
OUTDATED = "Not shown, as they were evaluated with other settings or products (`dvc repro` does it anew): {}."
Keys = tuple[str, ...]  # keys into a metrics file


def at(scores: dict[str, Any] | None, path: Keys) -> float | None:
    """The number at `path`, None where the file has none."""
    found: Any = scores
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def columns(files: Sequence[dict[str, Any]]) -> list[tuple[str, Keys]]:
    """The columns of the score table: fixed ones, then what occurs as origin and in OCR."""
    fixed: list[tuple[str, Keys]] = [
        ("F1", ("f1",)),
        ("P", ("precision",)),
        ("R", ("recall",)),
        ("five-way F1", ("five_way", "f1")),
        ("positives F1", ("positives_only", "f1")),
    ]
    origins = [name for name in schema.ORIGINS if any(name in one["by_origin"] for one in files)]
    return [
        *fixed,
        *((f"{name} F1", ("by_origin", name, "f1")) for name in origins),
        *(
            (f"{text} F1", ("in_ocr", key, "f1"))
            for key, text in (("read", "in OCR"), ("not_read", "not in OCR"))
        ),
    ]


def mean_and_sd(values: Sequence[float | None]) -> str:
    """`0.873 ± 0.004` (sample standard deviation), `0.873` of one seed, a dash of none."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    mean = f"{statistics.fmean(numbers):.3f}"
    return f"{mean} ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else mean


def score_table(cells: dict[str, dict[int, dict[str, Any] | None]]) -> Table:
    """The floor, one row per model, the probe; `cells[model][seed]` is a metrics file or None."""
    done = [scores for seeds in cells.values() for scores in seeds.values() if scores]
    if not done:
        return Table(["model", "seeds"], [[name, "not run"] for name in cells])
    shown = columns(done)
    floor, probe = done[0]["floor"], done[0]["probe"]
    rows = [["floor (no learning)", "", *(mean_and_sd([at(floor, path)]) for _, path in shown)]]
    for name, seeds in cells.items():
        files = [scores for scores in seeds.values() if scores]
        missing = [str(seed) for seed, scores in seeds.items() if not scores]
        said = (
            f"{len(files)}" + (f" (not run: {', '.join(missing)})" if missing else "") if files else "not run"
        )
        rows.append([name, said, *(mean_and_sd([at(one, path) for one in files]) for _, path in shown)])
    best = paper.highest(rows, 2, 1)
    linear: dict[Keys, float | None] = {}
    if probe["visible"]["count"]:
        linear["by_origin", "visible", "f1"] = probe["visible"]["f1"]
    rows.append(
        ["linear probe on region features", "", *(mean_and_sd([linear.get(path)]) for _, path in shown)]
    )
    return Table(["model", "seeds", *(title for title, _ in shown)], rows, best, rules=1)


def cautions(files: Sequence[dict[str, Any]]) -> list[str]:
    """What has to be said beside the numbers, from their `made_with`."""
    said = []
    weights = [one["made_with"]["weights"] for one in files]
    if any(one["regions"] == "random" for one in weights):
        said.append(
            "The region features come from a detector with random weights: it was never trained. "
            "Scores on visible values show the road, not what a trained detector reaches."
        )
    if any(one["words"] in ("random", None) for one in weights):
        said.append("The word embeddings of at least one model start from random weights.")
    return said


# Data


def data_tables(corpus: str) -> list[tuple[str, Table]]:
    """Statistics of a corpus: splits, values per origin, attributes, and the stages' counts of statuses."""
    splits: dict[str, Counter[str]] = {split: Counter() for split in schema.SPLITS}
    origins: dict[str, Counter[str]] = {split: Counter() for split in schema.SPLITS}
    attributes: dict[str, Counter[str]] = {}
    known: dict[str, set[str]] = {}
    for batch in pq.ParquetFile(Path("data", corpus, "products.parquet")).iter_batches():
        for product in batch.to_pylist():
            for split in {attribute["split"] for attribute in product["attributes"]}:
                splits[split]["products"] += 1
            for attribute in product["attributes"]:
                values = attribute["values"]
                splits[attribute["split"]].update(
                    {"questions": 1, "without a value": not values, "values": len(values)}
                )
                origins[attribute["split"]].update(attribute["origins"])
                attributes.setdefault(attribute["key"], Counter()).update(
                    {"questions": 1, "without a value": not values, "several values": len(values) > 1}
                )
                known.setdefault(attribute["key"], set()).update(map(normalise, values))
    head = ["products", "questions", "without a value", "values"]
    names = [name for name in schema.ORIGINS if any(counts[name] for counts in origins.values())]
    counted = ["questions", "without a value", "several values"]
    tables = [
        (
            "Splits, and values by origin",
            Table(
                ["split", *head, *names],
                [
                    [split, *(f"{splits[split][key]:,}" for key in head)]
                    + [f"{origins[split][name]:,}" for name in names]
                    for split in schema.SPLITS
                ],
            ),
        ),
        (
            "Attributes",
            Table(
                ["attribute", *counted, "distinct values"],
                [
                    [name, *(f"{counts[key]:,}" for key in counted), f"{len(known[name]):,}"]
                    for name, counts in sorted(attributes.items())
                ],
            ),
        ),
    ]
    stages = []
    for stage in ("images", "ocr", "regions"):
        path = Path("metrics", corpus, f"{stage}.json")
        if path.is_file():
            counts = json.loads(path.read_text(encoding="utf-8"))["status"]
            stages.append([stage, ", ".join(f"{count:,} {status}" for status, count in counts.items())])
    return [*tables, ("Rows of the slow stages by status", Table(["stage", "status"], stages))]


# The report


def figures(corpus: str, cells: dict[str, dict[int, dict[str, Any] | None]]) -> list[str]:
    """SVG texts: F1 per origin, learning curves, F1 per attribute (means over seeds)."""
    done = {name: [one for one in seeds.values() if one] for name, seeds in cells.items()}
    done = {name: files for name, files in done.items() if files}
    drawn = []
    for group, title in (("by_origin", "F1 by origin of the value"), ("by_attribute", "F1 by attribute")):
        systems = {
            name: {
                key: statistics.fmean(one[group][key]["f1"] for one in files if key in one[group])
                for key in sorted({key for one in files for key in one[group]})
            }
            for name, files in done.items()
        }
        floors = {
            key: score["f1"] for files in done.values() for key, score in files[0]["floor"][group].items()
        }
        if systems:
            drawn.append(charts.bars(systems, floors, title=title))
    histories: dict[str, list[Any]] = {}
    for name, seeds in cells.items():
        paths = [Path("runs", corpus, name, str(seed), "history.json") for seed in seeds]
        logs = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        if logs:
            histories[name] = logs
    curves = charts.curves(histories, title="Learning curves") if histories else None
    return [*drawn[:1], curves, *drawn[1:]] if curves else drawn


def read(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def is_of_today(corpus: str, model: str, seed: int, scores: dict[str, Any]) -> bool:
    """Whether a cell was evaluated with today's settings on the products that are there, by their numbers."""
    kept = read(results.RESULTS / corpus / model / f"{seed}.json")
    if kept and not results.is_current(kept):
        return False
    sizes, products = scores["made_with"].get("sizes", {}), read(Path("metrics", corpus, "products.json"))
    there = products["splits"] if products else sizes
    return all(sizes[split].items() <= there.get(split, {}).items() for split in sizes)


def section(corpus: str, models: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """All that the report says about one corpus."""
    cells: dict[str, dict[int, dict[str, Any] | None]] = {}
    outdated = []
    for model in models:
        cells[model] = {seed: read(Path("metrics", corpus, model, f"{seed}.json")) for seed in seeds}
        for seed, scores in cells[model].items():
            if scores and not is_of_today(corpus, model, seed, scores):
                cells[model][seed] = None
                outdated.append(f"{model} {seed}")
    done = [(model, seed) for model, ran in cells.items() for seed, scores in ran.items() if scores]
    files = [scores for ran in cells.values() for scores in ran.values() if scores]
    return {
        "corpus": corpus,
        "scores": score_table(cells),
        "cautions": cautions(files) + [OUTDATED.format(", ".join(outdated))] * bool(outdated),
        "engines": files[0]["made_with"]["engines"] | files[0]["made_with"]["weights"] if files else {},
        "figures": figures(corpus, cells),
        "data": data_tables(corpus) if Path("data", corpus, "products.parquet").is_file() else [],
        "sheet": showcase.contact_sheet(corpus, REPORTS),
        "shown_by": "{}, seed {}".format(*done[0]) if done else None,
        "products": showcase.shown(corpus, *done[0], number=PRODUCTS_SHOWN, reports=REPORTS) if done else [],
    }


def markdown(table: Table) -> str:
    rows = [
        [
            f"{cell} (paper: {table.grey[row, column]})" if (row, column) in table.grey else cell
            for column, cell in enumerate(cells)
        ]
        for row, cells in enumerate(table.rows)
    ]
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def reproduction() -> dict[str, Any]:
    """The paper's tables and figures from the kept results; figures go to reports/figures/.

    A result of other settings than today's is left out, and counted; one of a corpus that params.yaml does
    not declare, as on the machine of somebody without its data, has none to differ from.
    """
    kept = results.cells()
    elsewhere = [one for one in kept if not results.is_declared(one["corpus"])]
    found = [one for one in kept if one in elsewhere or results.is_current(one)]
    same = {corpus: results.same(corpus, paper.MODELS) for corpus in {one["corpus"] for one in found}}
    tables, figures = paper.everything(paper.gather(found, same))
    folder = REPORTS / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for title, note, svg in figures:
        path = folder / f"{title.split(':')[0].lower().replace(' ', '-')}.svg"
        if svg:
            path.write_text(svg, encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
        file = path.relative_to(REPORTS).as_posix() if svg else None
        drawn.append({"title": title, "note": note, "svg": svg, "file": file})
    note = f"From {len(found)} finished cells in docs/results/"
    if len(found) < len(kept):
        note += f"; left out are {len(kept) - len(found)} made with other settings than today's"
    if elsewhere:
        names = ", ".join(sorted({one["corpus"] for one in elsewhere}))
        note += f"; params.yaml does not declare {names}: theirs are shown as they were kept"
    return {"note": f"{note}.", "tables": tables, "figures": drawn}


def write(sections: Sequence[dict[str, Any]], whole: dict[str, Any]) -> None:
    """reports/index.html and reports/index.md."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    REPORTS.mkdir(exist_ok=True)
    html = environment.get_template("report.html.j2").render(sections=sections, whole=whole)
    (REPORTS / "index.html").write_text(html, encoding="utf-8")
    parts = ["# Report"]
    for one in sections:
        parts += [f"## {one['corpus']}", *(f"> {caution}" for caution in one["cautions"])]
        parts += ["### Scores on the test split", markdown(one["scores"])]
        for title, table in one["data"]:
            parts += [f"### {title}", markdown(table)]
    parts += ["## The paper's tables and figures", whole["note"]]
    for title, note, table in whole["tables"]:
        parts += [f"### {title}", *([note] if note else []), markdown(table)]
    for figure in whole["figures"]:
        parts.append(f"### {figure['title']}")
        parts += [f"![{figure['title']}]({figure['file']})"] if figure["file"] else []
        parts += [figure["note"]] if figure["note"] else []
    (REPORTS / "index.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def tell(sections: Sequence[dict[str, Any]]) -> None:
    """The score tables on the terminal, one column per system so that they fit, and where to look."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for one in sections:
        scores = one["scores"]
        table = RichTable(title=f"{one['corpus']}: test split", title_justify="left")
        table.add_column("")
        for row in scores.rows:
            table.add_column(row[0], justify="right")
        for number, title in enumerate(scores.head[1:], 1):
            table.add_row(title, *(row[number] for row in scores.rows))
        console.print(table)
        for caution in one["cautions"]:
            console.print(f"[yellow]{caution}[/yellow]")
    console.print(f"Look at {REPORTS / 'index.html'} in a browser.")


def run() -> None:
    """Write the report on the corpora, models and seeds of config/run.json."""
    path = params.CONFIG / "run.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist (`dvc repro config` writes it)")
    cells = json.loads(path.read_text(encoding="utf-8"))
    sections = [section(corpus, cells["models"], cells["seeds"]) for corpus in cells["corpora"]]
    write(sections, reproduction())
    tell(sections)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m model.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        run()
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
