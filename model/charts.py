"""The report's figures as SVG text: equal numbers give equal bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

COLORS = ("#3b6fd4", "#e0803a", "#3f9d75", "#b0518e", "#8a7a2c", "#5c6b7a")
FLOOR = "#c3c9d2"
SPREAD = {"ecolor": "#4b5563", "elinewidth": 0.8}
STYLE: Any = {
    "svg.hashsalt": "smartave",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3af",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
}


def bars(
    groups: Mapping[str, Mapping[str, float]],
    floor: Mapping[str, float],
    *,
    title: str,
    percent: bool = False,
    spread: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """F1 per name (attribute, origin, corpus) as one bar per system; `groups[system][name]`, floor in grey.

    Without a floor none is drawn. `spread` has standard deviations where `groups` has means.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = sorted({name for scores in groups.values() for name in scores}, reverse=True)
    systems = {**groups, "floor": floor} if floor else dict(groups)
    height = 0.8 / max(1, len(systems))
    scale, form = (100, "%.1f") if percent else (1, "%.2f")
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.8 + len(names) * (0.12 + 0.14 * len(systems))), layout="constrained")
        axes = figure.add_subplot()
        furthest: float = scale
        for number, (system, scores) in enumerate(systems.items()):
            color = FLOOR if system == "floor" else COLORS[number % len(COLORS)]
            there = [row for row, name in enumerate(names) if name in scores]  # no bar is no score
            places = [row + 0.4 - (number + 0.5) * height for row in there]
            lengths = [scores[names[row]] for row in there]
            sd = [spread[system][names[row]] if spread else 0.0 for row in there]
            drawn = axes.barh(
                places,
                lengths,
                height * 0.92,
                xerr=sd if spread else None,
                label=system,
                color=color,
                error_kw=SPREAD,
            )
            axes.bar_label(drawn, fmt=form, padding=2, fontsize=7, color="#4b5563")
            furthest = max([furthest, *(length + more for length, more in zip(lengths, sd, strict=True))])
        axes.set(
            xlim=(0, 1.06 * furthest), yticks=range(len(names)), yticklabels=names, title=title, xlabel="F1"
        )
        axes.tick_params(left=False)
        figure.legend(loc="outside lower center", ncols=max(1, min(4, len(systems))), fontsize=8)
        return _svg(figure)


def lines(series: Mapping[str, Sequence[tuple[float, float, float]]], *, title: str, axis: str) -> str:
    """F1 over a setting: (x, mean, standard deviation) per system; the values of x stand evenly."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        ticks = sorted({x for points in series.values() for x, _, _ in points})
        for number, (name, points) in enumerate(series.items()):
            x, mean, sd = zip(*points, strict=True)
            places, color = [ticks.index(one) for one in x], COLORS[number % len(COLORS)]
            axes.errorbar(
                places, mean, yerr=sd, label=name, color=color, marker="o", markersize=3, linewidth=1.4
            )
        axes.set_xticks(range(len(ticks)), [f"{x:g}" for x in ticks])
        axes.set(xlabel=axis, ylabel="F1", title=title)
        if series:
            axes.legend(fontsize=8)
        return _svg(figure)


def curves(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], *, title: str) -> str | None:
    """Everything that training logged as a loss or an F1, over steps; None: nothing was logged.

    `histories[system]` has one history per seed; they share their system's color and its legend entry.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    logged = {key for seeds in histories.values() for rows in seeds for row in rows for key in row}
    panels = {part: sorted(key for key in logged if part in key) for part in ("loss", "f1")}
    panels = {part: keys for part, keys in panels.items() if keys}
    if not panels:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(panels) + 0.4, 3.0), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        for position, (part, keys) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(1, len(panels), position)
            lines = [
                (system, key, seed, rows)
                for system, seeds in histories.items()
                for key in keys
                for seed, rows in enumerate(seeds)
            ]
            for system, key, seed, rows in lines:
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        ("-", "--", ":", "-.")[keys.index(key) % 4],
                        color=COLORS[list(histories).index(system) % len(COLORS)],
                        label=f"{system} {key.replace('_', ' ')}" if seed == 0 else None,
                        linewidth=1.4,
                    )
            axes.set(xlabel="step", title=part.replace("f1", "F1"))
            axes.set_ylim(bottom=0, top=1.02 if part == "f1" else None)
            axes.legend(fontsize=7)
        return _svg(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
