"""Experiments with chosen widths (ours), and their table. They have at most the size of uniform ones (VGG-16: the paper's)."""

from collections.abc import Iterator, Sequence
from math import inf

from experiments.beyond import SEEDS, cell, seconds
from experiments.experiment import Experiment
from experiments.grid import Grid
from experiments.rows import Row, ratio

KINDS = ("prune", "merge", "restore")
SMALLEST = {"params": 0.2, "macs": 0.65}  # for VGG-16: a fifth of the parameters, the MACs of the paper's widths
BLOCKS = "auto, blocks may go"
RULES = {  # by column: the options that it changes; without a change, the criterion orders the neurons and all blocks stay
    "auto": {},
    "auto, neurons too": {"criterion": "auto"},
    BLOCKS: {"drop_blocks": True},
}


def experiments(grid: Grid) -> Iterator[Experiment]:
    """For each ratio, all KINDS with chosen widths; restoration also with chosen neurons, and with blocks left out."""
    budgets = [{"ratio": ratio} for ratio in grid.beyond]
    if grid.fixed:
        budgets.append({"budget": SMALLEST})
    for budget in budgets:
        for kind in KINDS:
            for seed in SEEDS:
                yield _experiment(grid, kind, seed, budget, RULES["auto"])
        for rule in list(RULES)[1:]:
            if rule != BLOCKS or (grid.blocks and budget.get("ratio", 0) >= 0.5):
                yield from (_experiment(grid, "restore", seed, budget, RULES[rule]) for seed in SEEDS)


def _experiment(grid: Grid, kind: str, seed: int, budget: dict, rule: dict) -> Experiment:
    about = {"criterion": grid.criterion, "widths": "auto", "seed": seed} | budget | rule
    return grid.experiment(kind, **about)


def rule(grid: Grid, row: Row) -> str | None:
    """The column that a row belongs to: "uniform" (also for published widths), one of RULES, or None."""
    if row["criterion"] not in (grid.criterion, "auto") or row.get("calibrate") or row["type"] not in KINDS:
        return None
    if row["widths_rule"] == "published":
        return "uniform" if row["criterion"] == grid.criterion else None
    changed = {"criterion": "auto"} if row["criterion"] == "auto" else {}
    changed |= {"drop_blocks": True} if row.get("drop_blocks") else {}
    return next((name for name, change in RULES.items() if row["widths_rule"] == "auto" and change == changed), None)


def table(grid: Grid, measured: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table: a line for every ratio, a column for every compensation and rule."""
    by_rule = "published" if grid.fixed else "uniform"
    columns = [(kind, name) for kind in KINDS for name in ("uniform", "auto")]
    columns += [("restore", name) for name in list(RULES)[1:] if name != BLOCKS or grid.blocks]
    lines = []
    budgets = {(row["ratio"] or inf, ratio(row)) for row in measured if rule(grid, row) == "auto"}
    for _, label in sorted(budgets):
        here = [row for row in measured if ratio(row) == label and rule(grid, row)]
        sizes = [f"{max(row[size] for row in here if rule(grid, row) in RULES):,}" for size in ("params", "macs")]
        cells = (cell([row for row in here if (row["type"], rule(grid, row)) == column]) for column in columns)
        restored = [row for row in here if (row["type"], rule(grid, row)) == ("restore", "auto")]
        taken = (seconds(restored, key) for key in ("seconds_widths", "seconds_decompose"))
        lines.append([label, *sizes, *cells, *taken])
    header = [f"{kind}, {name.replace('uniform', by_rule)}" for kind, name in columns]
    return ["ratio", "parameters, at most", "MACs, at most", *header, "choice: s", "with restore: s"], lines
