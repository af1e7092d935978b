"""Experiments beyond the paper, and their table: restoration (ours) and its rivals, at the paper's criteria and ratios."""

from collections.abc import Iterator, Sequence
from statistics import mean, median

from experiments.experiment import Experiment
from experiments.grid import CRITERIA, Grid
from experiments.rows import Row
from experiments.rows import ratio as ratio_label
from neuron_merging.methods import NEED_IMAGES

SEEDS = (1, 2, 3)
IMAGES = 512  # number of real images for the methods that use data
DATA_FREE, LOOKS = ("prune", "merge", "lbyl", "fold", "restore"), (*NEED_IMAGES, "restore")


def experiments(grid: Grid) -> Iterator[Experiment]:
    """Restoration for every criterion and ratio. For the main criterion also rivals, and methods that use real images.

    VGG-16, whose widths the paper fixes, is also measured with uniform widths.
    """
    cells = [(criterion, ratio, "published") for criterion in CRITERIA for ratio in grid.beyond]
    cells += [(grid.criterion, ratio, "uniform") for ratio in grid.uniform_ratios]
    for criterion, ratio, widths in cells:
        about = {"criterion": criterion, "ratio": ratio, "widths": widths}
        if widths == "uniform":
            yield from (grid.experiment(kind, **about) for kind in ("prune", "merge"))
        yield from (grid.experiment("restore", seed=seed, **about) for seed in SEEDS)
        if criterion == grid.criterion:
            yield grid.experiment("lbyl", **about)
            yield from (grid.experiment("fold", seed=seed, **about) for seed in SEEDS)
            yield from (grid.experiment(kind, calibrate=f"{grid.dataset}:{IMAGES}", **about) for kind in LOOKS)


def criterion_of(grid: Grid, row: Row) -> str:
    """A row's criterion. `fold` has none, as it clusters: it is listed under the criterion of its rivals."""
    return row["criterion"] or grid.criterion


def kind(row: Row) -> tuple[str, bool]:
    """The type of a row, and whether it looked at real images."""
    return row["type"], row.get("calibrate") is not None


def complete(measured: Sequence[Row], seeds: int = len(SEEDS)) -> bool:
    """Whether a cell is complete: all seeds are measured, or, for a method without seeds, the one number."""
    seeded = measured and measured[0].get("seed") is not None and not measured[0].get("calibrate")
    return len(measured) >= (seeds if seeded else 1)


def cell(measured: Sequence[Row], seeds: int = len(SEEDS)) -> str:
    """The text of a cell: an accuracy, or the mean over seeds ± half the range. Empty if seeds are missing."""
    values = [row["accuracy"] for row in measured]
    if not complete(measured, seeds):
        return ""
    return f"{mean(values):.2f} ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def seconds(measured: Sequence[Row], key: str) -> str:
    """The median of `key` over the rows, as text; empty if no row has it."""
    values = [row[key] for row in measured if row.get(key) is not None]
    return f"{median(values):.1f}" if values else ""


def table(grid: Grid, measured: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table: a line for each criterion and ratio; data-free methods first, then those with images."""
    columns = [*((name, False) for name in DATA_FREE), *((name, True) for name in LOOKS)]
    shrunk = [row for row in measured if row["widths_rule"] not in (None, "auto")]
    lines = []
    for criterion in CRITERIA:
        of = [row for row in shrunk if criterion_of(grid, row) == criterion]
        for rule, ratio in sorted({(r["widths_rule"], r["ratio"]) for r in of}, key=lambda c: (c[0], c[1] or 0)):
            here = [r for r in of if (r["widths_rule"], r["ratio"]) == (rule, ratio)]
            if any(kind(row) == ("restore", False) for row in here):
                cells = (cell([row for row in here if kind(row) == column]) for column in columns)
                taken = seconds([row for row in here if kind(row) == ("restore", False)], "seconds_decompose")
                lines.append([criterion, ratio_label(here[0]), *cells, taken])
    header = ["criterion", "ratio", *DATA_FREE[:-1], "**restore (ours)**"]
    return [*header, *(f"{name} ({IMAGES} images)" for name in LOOKS), "restore: s"], lines
