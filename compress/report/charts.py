"""The report's drawings: SVG text to be set into a page, in the colours and the typeface of that page.

Each function returns "" where there is nothing to draw. The same figures give the same text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from compress.report import wording
from compress.report.wording import Score

# matplotlib wants colours it knows. These stand for the page's CSS variables and are replaced by them in the SVG, so
# one drawing serves a light and a dark page.
COLOURS = {
    "#0a0001": "ink",
    "#0a0002": "muted",
    "#0a0003": "line",
    "#0a0004": "parent",
    "#0a0005": "float",
    "#0a0006": "int8",
    "#0a0007": "page",
    "#0a0008": "bad",
    "#0a0009": "float16",
    "#0a0010": "int8_weights",
}
INK, MUTED, LINE, PARENT, FLOAT, INT8, PAGE, BAD, FLOAT16, INT8_WEIGHTS = COLOURS
OF_KIND = {"parent": PARENT, "float": FLOAT, "float16": FLOAT16, "int8_weights": INT8_WEIGHTS, "int8": INT8}
WIDTHS = 12
"""Of a set of channels that are drawn: more would be no wider than a letter's stroke."""
MARKERS = ("o", "s", "^", "D")

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar in a layer's name is a dollar
    "svg.fonttype": "none",  # text stays text: it takes the page's typeface and can be searched
    "svg.hashsalt": "compress",
    "font.family": "DejaVu Sans",  # comes with matplotlib; only its metrics are used
    "font.size": 14,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
}

WIDTH = 360
"""Of drawings, in points: a phone shows one a little smaller, with letters of 12 pixels, a desk a fifth larger."""


def tradeoff(files: list[dict[str, Any]], score: Score = wording.ACCURACY) -> str:
    """Accuracy against latency, a mark per file and runtime, and a whisker from p50 to p90."""
    shown = [file for file in files if file["timing"] and file["accuracy"] is not None]
    if not shown:
        return ""
    factor = 100 if score.percent else 1
    runtimes = sorted({file["runtime"] for file in shown})
    with _drawing("tradeoff", height=310, label=_tradeoff_in_words(shown, score)) as (figure, out):
        axes = figure.add_subplot()
        for runtime, marker in zip(runtimes, MARKERS * len(runtimes), strict=False):
            own = [file for file in shown if file["runtime"] == runtime]
            own.sort(key=lambda file: -file["timing"]["p50_ms"])
            line = [file for file in own if file["kind"] not in wording.KINDS]
            axes.plot(
                [file["timing"]["p50_ms"] for file in line],
                [factor * file["accuracy"] for file in line],
                color=MUTED,
                linewidth=1,
                alpha=0.5,
                zorder=1,
            )
            for file in own:
                p50, p90 = file["timing"]["p50_ms"], file["timing"]["p90_ms"]
                colour, y = OF_KIND.get(file["kind"], INK), factor * file["accuracy"]
                if p90:
                    axes.plot([p50, p90], [y, y], color=colour, linewidth=2, solid_capstyle="butt", zorder=2)
                # Smaller weights are as fast as float ones: their marks lie on those, so they are smaller.
                on_top = file["kind"] in wording.KINDS
                axes.plot(
                    p50,
                    y,
                    marker=marker,
                    markersize=6 if on_top else 10,
                    color=colour,
                    markeredgecolor=PAGE,
                    markeredgewidth=1 if on_top else 1.5,
                    zorder=4 if on_top else 3,
                )
        slowest = max(file["timing"]["p50_ms"] for file in shown)
        right = max(file["timing"]["p90_ms"] or slowest for file in shown)
        # A whisker may leave the drawing on a noisy machine: the marks must not be squeezed into a corner for it.
        axes.set_xlim(0, min(1.08 * max(right, slowest), 1.5 * slowest))
        _accuracy_limits(axes, [factor * file["accuracy"] for file in shown], perfect=factor)
        axes.grid(True)
        axes.set_xlabel("latency per image, ms (p50)")
        name = "top-1 accuracy" if score == wording.ACCURACY else score.name
        axes.set_title(f"{name}, %" if score.percent else name, fontsize=14, color=MUTED)
        kinds = [kind for kind in OF_KIND if any(file["kind"] == kind for file in shown)]
        handles = [
            Line2D([], [], marker="o", linestyle="", color=OF_KIND[kind], label=wording.kind(kind)) for kind in kinds
        ]
        handles += [
            Line2D(
                [], [], marker=marker, linestyle="", markerfacecolor="none", color=MUTED, label=wording.runtime(runtime)
            )
            for runtime, marker in zip(runtimes, MARKERS * len(runtimes), strict=False)
        ]
        figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=3,
            handletextpad=0.2,
            columnspacing=1.2,
        )
    return out[0]


def _tradeoff_in_words(shown: list[dict[str, Any]], score: Score) -> str:
    points = [
        f"{file['file']} {score.said(file['accuracy'])} at {wording.ms(file['timing']['p50_ms'])}" for file in shown
    ]
    return f"{score.title} against latency: {'; '.join(points)}"


def training_curve(name: str, history: list[dict[str, Any]]) -> str:
    """Mean loss of each epoch, above the learning rate."""
    if not history:
        return ""
    panels = [("loss", "mean loss", INT8, 3.0)]
    panels += [("lr", "learning rate", FLOAT, 1.3)] if any(epoch.get("lr") for epoch in history) else []
    height = 140 + 70 * len(panels)
    label = f"Training of {name}: loss {_ends(history)}"
    margins = {"left": 0.17, "right": 0.98, "bottom": 46 / height, "top": 1 - 26 / height, "hspace": 0.45}
    with _drawing(f"training-{name}", height=height, label=label, margins=margins) as (figure, out):
        rows = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, height_ratios=[share for *_, share in panels]
        )[:, 0]
        epochs = [epoch["epoch"] for epoch in history]
        for axes, (key, title, colour, _) in zip(rows, panels, strict=True):
            known = [(epoch["epoch"], epoch[key]) for epoch in history if epoch.get(key) is not None]
            marker = "o" if len(history) <= 12 else ""
            axes.plot(*zip(*known, strict=True), color=colour, linewidth=2, marker=marker, markersize=4)
            values = [value for _, value in known]
            low, high = min(0.0, *values), max(*values, 0.0)
            axes.set_ylim(low, high + 0.08 * (high - low or 1))
            axes.yaxis.set_major_locator(MaxNLocator(4 if key == "loss" else 2))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
            axes.grid(True, axis="y")
            axes.set_title(title, fontsize=14, color=MUTED)
        rows[-1].set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        if len(epochs) > 8:
            rows[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        else:
            rows[-1].set_xticks(epochs)
        rows[-1].set_xlabel("epoch")
    return out[0]


def _ends(history: list[dict[str, Any]]) -> str:
    return f"{history[0]['loss']:.3g} to {history[-1]['loss']:.3g} in {len(history)} epochs"


def channels(layers: list[dict[str, Any]]) -> str:
    """Output channels of each layer before and after pruning, first layer on top."""
    if not layers:
        return ""
    row = 17.6  # as high as a row of the table beside it
    with _drawing("channels", height=60 + row * len(layers), label="Channels before and after pruning") as (
        figure,
        out,
    ):
        axes = figure.add_subplot()
        places = range(len(layers))
        before = [layer["channels"][0] for layer in layers]
        after = [layer["channels"][1] or 0 for layer in layers]
        axes.barh(places, before, height=0.72, color=LINE)
        axes.barh(places, after, height=0.72, color=FLOAT)
        axes.set_yticks(places, [_shortened(layer["name"]) for layer in layers], fontsize=14)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.tick_params(axis="x", labeltop=True, labelbottom=False)
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(True, axis="x")
        handles = [Line2D([], [], marker="s", linestyle="", color=FLOAT, label="channels kept")]
        handles += [Line2D([], [], marker="s", linestyle="", color=LINE, label="removed")]
        figure.legend(handles=handles, loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.2)
    return out[0]


def controls(found: dict[str, Any], score: Score = wording.ACCURACY) -> str:
    """Score and latency of each control and of the network itself, a row each: at equal latency, points in one plane
    would lie on each other. Small marks are seeds, the bar spans them; lines mark the network's own figures.
    """
    rows = [row for row in found["rows"] if row["mean"] is not None]
    if len(rows) < 2:
        return ""
    factor = 100 if score.percent else 1
    timed = [row for row in rows if row["latency_ms"] is not None]
    colours = {"win": PARENT, "tie": MUTED, "lose": BAD, "trade": FLOAT}
    said = "; ".join(f"{row['name']} {row['accuracy_said']} at {wording.ms(row['latency_ms'])}" for row in rows)
    height = 96 + 24 * len(rows)
    margins = {"left": 0.37, "right": 0.97, "bottom": 56 / height, "top": 1 - 28 / height, "wspace": 0.14}
    with _drawing("controls", height=height, label=f"Controls: {said}", margins=margins) as (figure, out):
        left, right = figure.subplots(1, 2, sharey=True)
        for place, row in enumerate(rows):
            colour = INT8 if row["ours"] else colours.get(row["verdict"], MUTED)
            marker = "D" if row["ours"] else "o"
            values = [factor * value for value in row["accuracies"]]
            left.plot([min(values), max(values)], [place, place], color=colour, linewidth=2, zorder=2)
            if len(values) > 1:
                left.plot(values, [place] * len(values), linestyle="", marker="|", markersize=9, color=colour, zorder=2)
            mark = {"marker": marker, "markersize": 9, "color": colour, "markeredgecolor": PAGE, "zorder": 3}
            left.plot(factor * row["mean"], place, **mark)
            if row["latency_ms"] is not None:
                right.plot(row["latency_ms"], place, **mark)
        own = next((row for row in rows if row["ours"]), None)
        if own:
            left.axvline(factor * own["mean"], color=INT8, linewidth=1, alpha=0.5, zorder=1)
            if own["latency_ms"] is not None:
                right.axvline(own["latency_ms"], color=INT8, linewidth=1, alpha=0.5, zorder=1)
        left.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=14)
        left.set_ylim(len(rows) - 0.5, -0.5)
        ends = [factor * value for row in rows for value in row["accuracies"]]
        room = max(0.12 * (max(ends) - min(ends)), 0.01 * factor)
        left.set_xlim(min(ends) - room, max(ends) + room)
        if timed:
            right.set_xlim(0, 1.15 * max(row["latency_ms"] for row in timed))
        for axes, title in ((left, f"{score.name}, %" if score.percent else score.name), (right, "p50, ms")):
            axes.xaxis.set_major_locator(MaxNLocator(2 if axes is right else 3))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
            axes.grid(True, axis="x")
            axes.spines["left"].set_visible(False)
            axes.set_title(title, fontsize=14, color=MUTED)
        words = {"lose": "better", "trade": "a trade", "tie": "a tie", "win": "beaten"}
        there = [verdict for verdict in words if any(row["verdict"] == verdict for row in rows)]
        handles = [Line2D([], [], marker="D", linestyle="", color=INT8, label="this")]
        handles += [
            Line2D([], [], marker="o", linestyle="", color=colours[verdict], label=words[verdict]) for verdict in there
        ]
        figure.legend(
            handles=handles, loc="lower left", ncols=len(handles), handletextpad=0.1, columnspacing=0.7, borderpad=0
        )
    return out[0]


def sensitivity(found: dict[str, Any]) -> str:
    """A strip for each set of coupled channels, from all of them to few: the stronger the colour, the more its removal
    changes the outputs. A mark stands where the network is now.
    """
    sets = [one for one in found["sets"] if len(one["curve"]) > 1]
    if not sets:
        return ""
    by = found["by"]
    costs = [_costs(one["curve"], by) for one in sets]
    known = [cost for own in costs for cost in own if cost is not None]
    if not known:
        return ""
    # One layer that breaks the network must not make all others look harmless.
    strongest = sorted(known)[int(0.95 * (len(known) - 1))] or max(known) or 1.0
    row = 17.6
    height = 86 + row * len(sets)
    longest = max(len(_shortened(one["name"])) for one in sets)
    margins = {"left": 0.03 + 0.0212 * longest, "right": 0.97, "bottom": 30 / height, "top": 1 - 56 / height}
    with _drawing("sensitivity", height=height, label=_sensitivity_in_words(sets), margins=margins) as (figure, out):
        axes = figure.add_subplot()
        for place, (one, own) in enumerate(zip(sets, costs, strict=True)):
            for (wide, _), (narrow, cost) in _cells(one["curve"], own):
                alpha = 0.0 if cost is None else min(1.0, max(0.0, cost) / strongest) ** 0.5
                axes.barh(
                    place, wide - narrow, left=narrow, height=0.86, color=BAD if cost is not None else LINE,
                    alpha=max(0.05, alpha) if cost is not None else 0.5, linewidth=0,
                )  # fmt: skip
            if one["share"] is not None:
                axes.plot([one["share"]] * 2, [place - 0.43, place + 0.43], color=INK, linewidth=2.4, zorder=3)
        axes.set_yticks(range(len(sets)), [_shortened(one["name"]) for one in sets], fontsize=14)
        axes.set_ylim(len(sets) - 0.4, -0.6)
        axes.set_xlim(1.015, 0)
        axes.set_xticks([1, 0.75, 0.5, 0.25, 0], ["100%", "75", "50", "25", "0"])
        axes.tick_params(axis="x", labeltop=True, labelbottom=False)
        axes.spines[["bottom", "left"]].set_visible(False)
        top = f"{strongest:.2g} nats" if by == "kl" else f"{100 * strongest:.2g} points"
        handles: list[Any] = [Line2D([], [], color=INK, linewidth=2.4, marker="", label="kept")] if any(
            one["share"] is not None for one in sets
        ) else []  # fmt: skip
        marks = [
            (0.05, "0"),
            (0.5, f"{strongest / 4:.2g}" if by == "kl" else f"{25 * strongest:.2g}"),
            (1.0, f"{top} or more"),
        ]
        handles += [
            Line2D([], [], marker="s", linestyle="", color=BAD, alpha=alpha, markersize=10, label=text)
            for alpha, text in marks
        ]
        figure.legend(
            handles=handles,
            loc="upper left",
            ncols=4,
            handletextpad=0.2,
            handlelength=1,
            columnspacing=0.8,
            borderpad=0,
        )
        axes.set_xlabel("channels kept")
    return out[0]


def _costs(curve: list[dict[str, Any]], by: str) -> list[float | None]:
    """What each width costs: the divergence, or the score lost since the widest."""
    values = [point[by] for point in curve]
    if by == "kl":
        return values
    best = next((value for value in values if value is not None), None)
    return [None if value is None or best is None else best - value for value in values]


def _cells(
    curve: list[dict[str, Any]], costs: list[float | None]
) -> list[tuple[tuple[float, float | None], tuple[float, float | None]]]:
    """Neighbouring widths as shares, with their costs; of many widths every few."""
    every = -(-len(curve) // WIDTHS)
    points = [(point["share"], cost) for point, cost in zip(curve, costs, strict=True)]
    shown = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
    if shown[0][0] < 1:
        shown.insert(0, (1.0, 0.0))
    return list(pairwise(shown))


def _sensitivity_in_words(sets: list[dict[str, Any]]) -> str:
    """The sets that mind most, for who cannot see the drawing."""
    half = [(one["kl_at_half"], one["name"]) for one in sets if one["kl_at_half"] is not None]
    worst = ", ".join(f"{name} {value:.2g} nats" for value, name in sorted(half, reverse=True)[:5])
    return f"Sensitivity of {len(sets)} sets of coupled channels" + (
        f"; at half of the channels {worst}" if worst else ""
    )


def lsb_histogram(agreement: dict[str, Any], *, allowed: int | None) -> str:
    """Number of logits by how many steps of the output's grid they differ, log scale; over `allowed` in red."""
    histogram = {int(step): number for step, number in agreement["histogram"].items() if number}
    if not histogram:
        return ""
    last = max(2, min(8, max(histogram)))
    title = f"{agreement['a']} against {agreement['b']}"
    with _drawing(f"lsb-{title}", height=190, label=f"Differences of {title} in LSB") as (figure, out):
        axes = figure.add_subplot()
        counts = [histogram.get(step, 0) for step in range(last)]
        counts.append(sum(number for step, number in histogram.items() if step >= last))
        colours = [INT8 if allowed is None or step <= allowed else BAD for step in range(last + 1)]
        # Half a logit is where the axis begins: on a logarithmic scale a single one would have no height.
        axes.bar(range(last + 1), [max(number, 0.5) for number in counts], width=0.62, color=colours)
        for step, number in enumerate(counts):
            axes.annotate(
                f"{number:,}", (step, max(number, 0.5)), (0, 3), textcoords="offset points", ha="center", fontsize=14
            )
        axes.set_yscale("log")
        axes.set_ylim(0.5, 6 * max(counts))
        axes.set_yticks([])
        axes.minorticks_off()
        axes.spines["left"].set_visible(False)
        axes.set_xticks(range(last + 1), [*map(str, range(last)), f"{last}+" if max(histogram) > last else str(last)])
        axes.set_xlabel("difference, LSB")
    return out[0]


def knowledge(found: dict[str, Any]) -> str:
    """Accuracy on the images as they are, corrupted and attacked: a mark for each network."""
    rows = [row for row in found["measures"] if row["name"] in _drawn(found) and row["student"] is not None]
    if len(rows) < 2:
        return ""
    marks = [("teacher", "teacher", PARENT, "o", 9), ("student", "student", INT8, "s", 8)]
    if found["compared"]:
        marks.append(("without", "without distillation", FLOAT16, "D", 6))
    name = f"knowledge-{found['stage']}"
    with _drawing(name, height=95 + 20 * len(rows), label="Accuracy under changes") as (figure, out):
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            values = [100 * row[who] for who, *_ in marks if row[who] is not None]
            axes.plot([min(values), max(values)], [place, place], color=LINE, linewidth=3, zorder=1)
        for who, _, colour, marker, size in marks:
            points = [(100 * row[who], place) for place, row in enumerate(rows) if row[who] is not None]
            axes.plot(
                *zip(*points, strict=True),
                linestyle="",
                marker=marker,
                markersize=size,
                color=colour,
                markeredgecolor=PAGE,
                zorder=3,
            )
        axes.set_yticks(range(len(rows)), [_change(row["name"]) for row in rows], fontsize=14)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.grid(True, axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("top-1 accuracy, %")
        handles = [
            Line2D([], [], marker=marker, linestyle="", color=colour, label=label)
            for _, label, colour, marker, _ in marks
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.2)
    return out[0]


def sustained(series: dict[str, Any]) -> str:
    """Latency over minutes without a pause, above the clock and the temperature; bars where the CPU was held back."""
    points = series["series"]
    if len(points) < 2:
        return ""
    minutes = [point["t_s"] / 60 for point in points]
    told = {name: [point[name] for point in points] for name in ("mhz", "temperature_c")}
    told = {name: values for name, values in told.items() if any(value is not None for value in values)}
    name = f"sustained-{series['file']}-{series['runtime']}"
    height = 300 if told else 190
    with _drawing(name, height=height, label=f"{series['file']} without a pause") as (figure, out):
        if told:
            upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        else:
            upper, lower = figure.add_subplot(), None
        p50, p90 = [point["p50_ms"] for point in points], [point["p90_ms"] or point["p50_ms"] for point in points]
        held = [bool(point["throttled"]) for point in points]
        for axes in (upper, lower):
            if axes is not None:
                _mark(axes, minutes, held)
        upper.fill_between(minutes, p50, p90, color=INT8, alpha=0.25, linewidth=0)
        upper.plot(minutes, p50, color=INT8, linewidth=2)
        upper.set_ylim(0, 1.15 * max(p90))
        upper.set_xlim(0, max(minutes))
        upper.yaxis.set_major_locator(MaxNLocator(4))
        upper.grid(True, axis="y")
        upper.set_title("latency per image, ms", fontsize=14, color=MUTED)
        handles = [Line2D([], [], color=INT8, linewidth=2, label="p50, shaded to p90")]
        if any(held):
            handles.append(Line2D([], [], color=BAD, alpha=0.25, linewidth=8, label="throttled"))
        if lower is not None:
            handles += _clock(lower, minutes, told)
        lowest = upper if lower is None else lower
        lowest.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        lowest.set_xlabel("minutes")
        figure.legend(handles=handles, loc="outside lower left", ncols=2, handletextpad=0.5, columnspacing=1.2)
    return out[0]


def pareto(groups: list[dict[str, Any]], *, name: str = "pareto", score: wording.Score = wording.ACCURACY) -> str:
    """Accuracy against latency, or against size where nothing was timed; the larger the file, the larger the mark.

    A group has `number`, `best`, `noisy` and, for each of its `figures`, mean, least and most. What no other beats is
    filled and joined by a line; whiskers span the repetitions.
    """
    timed = any("latency_ms" in group["figures"] for group in groups)
    across, unit = ("latency_ms", 1.0) if timed else ("size_bytes", 1e6)
    shown = [group for group in groups if {"accuracy", across} <= group["figures"].keys()]
    if not shown:
        return ""
    factor = 100 if score.percent else 1
    sizes = {group["number"]: group["figures"].get("size_bytes", {}).get("mean", 0.0) for group in shown}
    largest = max(sizes.values()) or 1.0
    label = f"{score.title} against {across.partition('_')[0]}: {len(shown)} runs"
    with _drawing(name, height=330, label=label) as (figure, out):
        axes = figure.add_subplot()
        front = []
        numbers: dict[tuple[float, float], list[str]] = {}
        for group in shown:
            xs = {end: value / unit for end, value in group["figures"][across].items()}
            ys = {end: factor * value for end, value in group["figures"]["accuracy"].items()}
            colour = INT8 if group["best"] else MUTED
            axes.plot([xs["least"], xs["most"]], [ys["mean"]] * 2, color=colour, linewidth=1.5, zorder=2)
            axes.plot([xs["mean"]] * 2, [ys["least"], ys["most"]], color=colour, linewidth=1.5, zorder=2)
            axes.plot(
                xs["mean"],
                ys["mean"],
                marker="D" if group["noisy"] else "o",
                markersize=6 + 8 * (sizes[group["number"]] / largest) ** 0.5,
                color=colour if group["best"] else PAGE,
                markeredgecolor=PAGE if group["best"] else colour,
                markeredgewidth=1.5,
                zorder=3,
            )
            at = (xs["mean"], ys["mean"])
            numbers.setdefault(at, []).append(str(group["number"]))
            front += [at] if group["best"] else []
        for at, own in numbers.items():  # marks on one place share a label
            axes.annotate(", ".join(own), at, (8, 7), textcoords="offset points", fontsize=14, zorder=4)
        axes.plot(*zip(*sorted(front), strict=True), color=INT8, linewidth=1, alpha=0.5, zorder=1)
        axes.set_xlim(0, 1.12 * max(group["figures"][across]["most"] / unit for group in shown))
        ends = [factor * group["figures"]["accuracy"][end] for group in shown for end in ("least", "most")]
        _accuracy_limits(axes, ends)
        axes.grid(True)
        axes.set_xlabel("latency per image, ms (p50)" if timed else "size, MB")
        unit_of_score = "%" if score.percent else "1 is perfect"
        axes.set_title(f"{score.name}, {unit_of_score}", fontsize=14, color=MUTED)
        marks = [("o", INT8, PAGE, "best"), ("o", PAGE, MUTED, "beaten by another")]
        marks += [("D", PAGE, MUTED, "NOISY")] if any(group["noisy"] for group in shown) else []
        handles = [
            Line2D([], [], marker=marker, linestyle="", color=fill, markeredgecolor=edge, markersize=8, label=label)
            for marker, fill, edge, label in marks
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2, handletextpad=0.2, columnspacing=1.2)
    return out[0]


def _mark(axes: Axes, minutes: list[float], held: list[bool]) -> None:
    """Shades the time up to each point at which the CPU was held back."""
    for before, now, throttled in zip([0.0, *minutes], minutes, held, strict=False):
        if throttled:
            axes.axvspan(before, now, color=BAD, alpha=0.14, linewidth=0, zorder=0)


def _clock(axes: Axes, minutes: list[float], told: dict[str, list[float | None]]) -> list[Line2D]:
    """Frequency on the left, temperature on the right, as far as the machine tells them; for the legend."""
    drawn: dict[str, tuple[str, Literal["-", "--"], str]] = {
        "mhz": (PARENT, "-", "MHz"),
        "temperature_c": (INT8_WEIGHTS, "--", "°C"),
    }
    handles = []
    titles = []
    for place, (name, values) in enumerate(told.items()):
        colour, dashes, unit = drawn[name]
        own = axes if place == 0 else axes.twinx()
        known = [(minute, value) for minute, value in zip(minutes, values, strict=True) if value is not None]
        own.plot(*zip(*known, strict=True), color=colour, linewidth=2, linestyle=dashes)
        numbers = [value for _, value in known]
        low, high = (0.0, 1.15 * max(numbers)) if name == "mhz" else (min(*numbers, 30.0), max(*numbers, 90.0))
        own.set_ylim(low, high)
        own.yaxis.set_major_locator(MaxNLocator(3))

        titles.append(unit)
        handles.append(Line2D([], [], color=colour, linestyle=dashes, linewidth=2, label=unit))
    axes.grid(True, axis="y")
    axes.set_title(" (left), ".join(titles) + (" (right)" if len(titles) > 1 else ""), fontsize=14, color=MUTED)
    return handles


def _change(name: str) -> str:
    """What was done to the images of an accuracy."""
    if name == "accuracy":
        return "as they are"
    attack = name.removesuffix("_accuracy")
    return wording.ATTACKS[attack] if attack in wording.ATTACKS else wording.measure(name)


def _drawn(found: dict[str, Any]) -> list[str]:
    """Measures that are accuracies of all three networks."""
    corrupted = [
        row["name"]
        for row in found["measures"]
        if row["group"] == "corruptions" and row["teacher"] is not None and row["name"] != "corrupted_accuracy"
    ]
    return ["accuracy", *corrupted, "fgsm_accuracy", "pgd_accuracy"]


def _accuracy_limits(axes: Axes, accuracies: list[float], perfect: float = 100) -> None:
    """At least four points of accuracy on the axis: a smaller window would make the loss of one image a fall."""
    low, high = min(accuracies), max(accuracies)
    margin = max(0.25 * (high - low), (0.04 * perfect - (high - low)) / 2)
    # Room above 100 so that a mark at the top is not cut in half.
    top = min(high + margin, perfect + 0.08 * (high - low + 2 * margin))
    axes.set_ylim(max(low - margin, -0.005 * perfect) if low >= 0 else low - margin, top)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _shortened(name: str) -> str:
    return name if len(name) <= 21 else f"{name[:9]}…{name[-11:]}"


@contextmanager
def _drawing(
    name: str, *, height: float, label: str, margins: dict[str, float] | None = None
) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on, and a list that holds its SVG once the block is left.

    With `margins`, as parts of width and height, no room is looked for around the texts: twice as fast.
    """
    out: list[str] = []
    with rc_context(STYLE), warnings.catch_warnings():
        # The page's typeface has the characters that matplotlib's own lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout=None if margins else "constrained")
        if margins:
            figure.subplots_adjust(**margins)
        yield figure, out
        text = io.StringIO()
        no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(text, metadata=no_metadata)
    out.append(_for_page(text.getvalue(), name, label))


def _for_page(svg: str, name: str, label: str) -> str:
    """The bare element: no prolog, colours as CSS variables, ids that no other drawing of the page has."""
    svg = svg[svg.index("<svg") :]
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    prefix = re.sub(r"[^A-Za-z0-9-]", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label={quoteattr(label)} ', 1)
