"""Draws figures from measured rows: accuracy against ratio and size, chosen widths, errors of feature maps, growth of time."""

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt

from experiments import chosen
from experiments.beyond import IMAGES, SEEDS, complete, criterion_of
from experiments.experiment import spaces_of
from experiments.grid import CRITERIA, FORMS, Grid
from experiments.rows import Row, percent, published, published_key, ratio
from neuron_merging.files import write_atomically

plt.switch_backend("Agg")  # files only: no display is needed
plt.rcParams["svg.hashsalt"] = "neuron-merging"  # the same rows make the same file

# Okabe & Ito's colours, which colour-blind readers can tell apart. Each line also has a marker of its own.
OTHER = ("#009E73", "d", "-")  # for a compensation that has no style of its own yet
STYLES = {
    "prune": ("#999999", "s", "-"),
    "merge": ("#0072B2", "o", "-"),
    "merge-derived": ("#D55E00", "^", ":"),
    "lbyl": ("#E69F00", "v", "-"),
    "fold": ("#CC79A7", "P", "-"),
    "restore": ("#009E73", "d", "-"),
    f"restore, {IMAGES} real images": ("#009E73", "d", ":"),
}
BEYOND = tuple(name for name in STYLES if name != "merge-derived")


def accuracy_against_ratio(
    grid: Grid, measured: Sequence[Row], paths: Sequence[Path], kinds: Sequence[str] = FORMS
) -> None:
    """Draw the rows of one grid and checkpoint into each of `paths`. If a method has several seeds, their mean is drawn.

    `kinds`: the lines, by the names in STYLES. Published accuracies are hollow markers. A network whose widths the paper fixes
    is drawn with uniform widths.
    """
    criteria, all_ratios = ((grid.criterion,), grid.uniform_ratios) if grid.fixed else (CRITERIA, grid.ratios)
    paper = published()
    baseline = next((row["accuracy"] for row in measured if row["type"] == "original"), None)
    shape, columns = ((10, 3.4), 6) if len(criteria) > 1 else ((6.5, 4), 4)
    figure, axes = plt.subplots(1, len(criteria), figsize=shape, sharey=True, layout="constrained", squeeze=False)
    for axis, criterion in zip(axes[0], criteria):
        for kind in kinds:
            line = _line(measured, kind, criterion, grid)
            if not line:
                continue
            color, marker, dash = STYLES.get(kind, OTHER)
            ratios = [100 * ratio for ratio in line]
            size = 6 if dash == "-" else 3
            axis.plot(ratios, line.values(), color=color, marker=marker, linestyle=dash, markersize=size, label=kind)
            keys = [published_key(r) for r in measured if (r["type"], r["criterion"]) == (kind, criterion)]
            known = {(100 * key[-1], paper[key]) for key in keys if key in paper and key[-1]}
            if known:
                axis.scatter(
                    *zip(*sorted(known)),
                    marker=marker,
                    s=90,
                    facecolors="none",
                    edgecolors=color,
                    label=f"{kind} (published)",
                )
        if baseline is not None:
            axis.axhline(baseline, color="black", linewidth=0.8, linestyle="--", label="original")
        axis.set_title(f"{criterion}, uniform widths" if grid.fixed else criterion)
        axis.set_xlabel("pruning ratio (%)")
        axis.set_xticks([100 * ratio for ratio in all_ratios])
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("test accuracy (%)")
    handles = {}
    for axis in axes[0]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=min(len(handles), columns),
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(f"{grid.title}: accuracy without fine-tuning")
    write(figure, paths)


def _line(measured: Sequence[Row], kind: str, criterion: str, grid: Grid) -> dict[float, float]:
    """Ratio → accuracy (mean over seeds), in the order of ratios; without ratios of which seeds are missing."""
    by_ratio: dict[float, list[Row]] = {}
    for row in measured:
        if (
            label(row) == kind
            and criterion_of(grid, row) == criterion
            and row["ratio"]
            and row["widths_rule"] != "auto"
        ):
            by_ratio.setdefault(row["ratio"], []).append(row)
    return {r: mean(row["accuracy"] for row in by_ratio[r]) for r in sorted(by_ratio) if complete(by_ratio[r])}


def label(row: Row) -> str:
    """The line that a row belongs to: its type, and whether it used real images."""
    return row["type"] + (f", {IMAGES} real images" if row.get("calibrate") else "")


def accuracy_against_size(grid: Grid, measured: Sequence[Row], paths: Sequence[Path]) -> None:
    """Draw the mean accuracy of uniform and of chosen widths, against parameters on the left and MACs on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    original = next(row for row in measured if row["type"] == "original")
    fixed = "the paper's widths" if grid.fixed else "uniform widths"
    for axis, size, name in zip(axes, ("params", "macs"), ("parameters", "MACs")):
        for kind in chosen.KINDS:
            color, marker, _ = STYLES[kind]
            for rule, label, dash, filled in (("uniform", fixed, ":", "white"), ("auto", "chosen widths", "-", color)):
                points: dict[str, list[Row]] = {}
                for row in measured:
                    if (row["type"], chosen.rule(grid, row)) == (kind, rule):
                        points.setdefault(ratio(row), []).append(row)
                drawn = [
                    (mean(r[size] for r in p) / 1e6, mean(r["accuracy"] for r in p))
                    for p in points.values()
                    if complete(p)
                ]
                if drawn:
                    axis.plot(*zip(*sorted(drawn)), color=color, marker=marker, markerfacecolor=filled, linestyle=dash,
                              label=f"{kind}, {label}")  # fmt: skip
        axis.plot(original[size] / 1e6, original["accuracy"], "k*", markersize=10, label="original")
        axis.set_xlabel(f"{name} (millions)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{grid.title}, {grid.criterion}: {fixed} and widths chosen without data")
    write(figure, paths)


def chosen_widths(grid: Grid, measured: Sequence[Row], paths: Sequence[Path]) -> None:
    """Draw the share of neurons that each unit keeps with widths chosen for restoration: a line for each ratio (first seed)."""
    drawn = {}
    for row in sorted(measured, key=lambda r: r["ratio"] or 0):
        if (row["type"], chosen.rule(grid, row), row.get("seed")) == ("restore", "auto", SEEDS[0]):
            drawn[ratio(row)] = row["widths"]
    experiment = grid.experiment("restore")
    spaces = spaces_of(experiment.network(), experiment)
    names, full = [space.layer for space in spaces], [space.size for space in spaces]
    figure, axis = plt.subplots(figsize=(10, 4), layout="constrained")
    colors = plt.get_cmap("viridis")
    for i, (name, widths) in enumerate(drawn.items()):
        shares, color = [100 * width / n for width, n in zip(widths, full)], colors(i / len(drawn))
        if len(full) > 4:
            axis.plot(range(len(full)), shares, "o-", color=color, markersize=4, label=name)
        else:
            places = [place + (i + 0.5) / len(drawn) * 0.8 - 0.4 for place in range(len(full))]
            axis.bar(places, shares, 0.7 / len(drawn), color=color, label=name)
    axis.set_xticks(range(len(full)), names, rotation=90, fontsize=7)
    axis.set_ylabel("neurons kept (%)")
    axis.set_ylim(0, 105)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, title="dropped, or budget", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_title(f"{grid.title}: widths chosen for restoration")
    write(figure, paths)


def feature_errors(title: str, measured: dict[str, Any], paths: Sequence[Path]) -> None:
    """Draw ‖a − â‖ / ‖a‖ at every unit's consumer (a row of experiments.features) for every type of compensation."""
    figure, axis = plt.subplots(figsize=(10, 3.6), layout="constrained")
    places = range(1, len(measured["consumers"]) + 1)
    for kind, errors in measured["errors"].items():
        color, marker, dash = STYLES.get(kind, OTHER)
        axis.plot(places, errors, color=color, marker=marker, linestyle=dash, markersize=4, label=kind)
    axis.set_xticks(places, measured["consumers"], rotation=90, fontsize=7)
    axis.set_xlabel("consumer of the pruned layer")
    axis.set_ylabel("relative error ‖a − â‖ / ‖a‖")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    dropped = (
        "the paper's widths" if measured["ratio"] is None else f"{percent(measured['ratio'])} of the neurons dropped"
    )
    axis.set_title(f"{title}, {measured['criterion']}, {dropped}: feature maps of {measured['images']} test images")
    write(figure, paths)


def growth(measured: Sequence[dict[str, Any]], paths: Sequence[Path]) -> None:
    """Draw the seconds of merging one layer against its width (rows of bench.growth): ours, of the loop, of the product."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    lines = {"loop": ("literal loop", "prune"), "ours": ("decompose + rebuild", "merge")}
    lines["product"] = ("the float64 matrix product alone", "merge-derived")
    for key, (name, style) in lines.items():
        color, marker, dash = STYLES[style]
        axis.loglog(
            [m["width"] for m in measured],
            [m[key] for m in measured],
            color=color,
            marker=marker,
            linestyle=dash,
            label=name,
        )
    axis.set_xticks([m["width"] for m in measured], [str(m["width"]) for m in measured])
    axis.minorticks_off()
    axis.set_xlabel("neurons of the layer, and its inputs")
    axis.set_ylabel("seconds")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    axis.set_title("Merging one layer")
    write(figure, paths)


def write(figure: plt.Figure, paths: Sequence[Path]) -> None:
    """Save `figure` into each of `paths`, in the format of its ending. The same content gives the same bytes."""
    for path in paths:
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format=path.suffix[1:], dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None
        )
        write_atomically(path, lambda file, buffer=buffer: file.write(buffer.getvalue()))
    plt.close(figure)
