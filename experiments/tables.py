"""Builds results/TABLES.md, two tables of the README and the figures from the result rows; `--check` only compares."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import beyond, chosen, command, features, rows
from experiments.grid import CRITERIA, FORMS, GRIDS, Grid
from experiments.manifest import shipped
from experiments.rows import Row
from neuron_merging.commandline import Parser
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import write_text

TABLES = rows.RESULTS / "TABLES.md"
FIGURES = rows.RESULTS / "figures"
README = rows.RESULTS.parent / "README.md"
BENCH = rows.RESULTS / "bench.json"
BEGIN, END = "<!-- results: made by `make tables` -->", "<!-- end of results -->"
BEGIN_COSTS, END_COSTS = "<!-- costs: made by `make tables` -->", "<!-- end of costs -->"
CHECKPOINTS = {"authors'": "the file that the paper's authors published", "ours": "the file in `pretrained/`"}
IN_README = {  # the ratios that the README shows for each network; None: the paper's widths, which have no ratio
    "LeNet_300_100": (0.5, 0.8),
    "VGG": (None, 0.3),
    "ResNet": (0.3, 0.5),
    "WideResNet": (0.3, 0.5),
}


def checkpoint(row: Row) -> str | None:
    """Whose checkpoint a row was measured with: "authors'", "ours" (the one that is shipped now), or None for another."""
    if row["checkpoint_sha256"] in rows.published_checkpoints():
        return "authors'"
    return "ours" if row["checkpoint_sha256"] in shipped() else None


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], right_from: int = 1) -> str:
    """A Markdown table; columns from `right_from` on are aligned to the right."""
    rule = ["---" if i < right_from else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def full_table(measured: Sequence[Row]) -> str:
    """A table of all rows of a network: settings, published and measured accuracy, size, seconds, checkpoint."""
    paper = rows.published()
    order = {name: i for i, name in enumerate([None, *CRITERIA])}
    lines = []
    kinds = ["original", *FORMS]

    def place(row: Row) -> tuple:
        return checkpoint(row), order[row["criterion"]], row["ratio"] or 0, kinds.index(row["type"])

    for row in sorted(measured, key=place):
        known = paper.get(rows.published_key(row))
        lines.append(
            [
                row["criterion"] or "–", rows.ratio(row), row["type"], "" if known is None else f"{known:.2f}",
                f"{row['accuracy']:.2f}", f"{row['params']:,}", f"{row['macs']:,}",
                f"{row['seconds_decompose']:.2f}", f"{checkpoint(row)} `{row['checkpoint_sha256'][:8]}`",
            ]
        )  # fmt: skip
    header = [
        "criterion",
        "ratio",
        "type",
        "published %",
        "measured %",
        "parameters",
        "MACs",
        "decompose s",
        "checkpoint",
    ]
    return markdown(header, lines, right_from=3)


COLUMNS = {  # of the short tables: the type, and the rule for the widths
    "prune": ("prune", "uniform"),
    "merge": ("merge", "uniform"),
    "restore (ours)": ("restore", "uniform"),
    "restore, chosen widths (ours)": ("restore", "auto"),
}
Line = tuple[str, str, float | None, str]
"""A line of a short table: its label, and the criterion, ratio and rule for widths (uniform or published) of its rows."""


def lines_of(grid: Grid) -> list[Line]:
    """The lines of a network's short table: one for every ratio.

    If the paper fixes the widths of the network: one for every criterion, then one for every uniform ratio.
    """
    if not grid.fixed:
        return [(rows.percent(ratio), grid.criterion, ratio, "published") for ratio in grid.ratios]
    lines: list[Line] = [(name, name, None, "published") for name in CRITERIA]
    for ratio in grid.uniform_ratios:
        lines.append((f"{grid.criterion}, {rows.percent(ratio)} of every layer", grid.criterion, ratio, "uniform"))
    return lines


def rows_of(measured: Sequence[Row], column: str, line: Line) -> list[Row]:
    """The rows (one for every seed) behind a cell of a short table."""
    kind, rule = COLUMNS[column]
    _, criterion, ratio, uniform = line
    return [
        row for row in measured
        if (row["type"], row["criterion"], row["ratio"]) == (kind, criterion, ratio)
        and row["widths_rule"] == (uniform if rule == "uniform" else rule)
        and not (row.get("calibrate") or row.get("budget") or row.get("drop_blocks"))
    ]  # fmt: skip


def papers_number(cell_rows: Sequence[Row]) -> str:
    """The paper's number for the rows of a cell, as text; empty if it has none."""
    number = rows.published().get(rows.published_key(cell_rows[0])) if cell_rows else None
    return "" if number is None else f"{number:.2f}"


def short_table(grid: Grid, measured: Sequence[Row]) -> str:
    """The table for one network and checkpoint: published accuracies beside measured ones, then ours. Lines: `lines_of`."""
    original = next(row for row in measured if row["type"] == "original")
    lines: dict[str, dict[str, str]] = {}
    for line in lines_of(grid):
        cells = {}
        for column in COLUMNS:
            cell_rows = rows_of(measured, column, line)
            cells |= {f"{column}: paper": papers_number(cell_rows), column: beyond.cell(cell_rows)}
        if any(cells.values()):
            lines[line[0]] = cells
    header = [c for name in COLUMNS for c in (f"{name}: paper", name) if any(line.get(c) for line in lines.values())]
    header = header or ["measured"]  # if only the original is measured yet
    known = papers_number([original])
    beside = any(name.endswith(": paper") for name in header)
    baseline = f"original (paper: {known})" if known and not beside else "original"
    own = f"{original['accuracy']:.2f}"
    first = {name: known if name.endswith(": paper") else own for name in header}
    title = "criterion" if grid.fixed else "dropped"
    table = {baseline: first} | lines
    return markdown(
        [title, *header], [[label, *(line.get(name, "") for name in header)] for label, line in table.items()]
    )


def readme_lines(grid: Grid, measured: Sequence[Row], whose: str) -> list[list[str]]:
    """The README's lines for one network and checkpoint; each ends with the paper's numbers."""
    original = next(row for row in measured if row["type"] == "original")
    name = f"{grid.title.split()[0]}, {whose}"
    table = []
    for line in lines_of(grid):
        if line[1] != grid.criterion or line[2] not in IN_README[grid.arch]:
            continue
        by_column = {column: rows_of(measured, column, line) for column in COLUMNS}
        numbers = [papers_number(of) or "–" for of in ([original], by_column["prune"], by_column["merge"])]
        paper = "" if set(numbers) == {"–"} else " / ".join(numbers)
        dropped = "the paper's widths" if line[2] is None else rows.percent(line[2])
        cells = [beyond.cell(of) for of in by_column.values()]
        if any(cells):
            table.append([name, dropped, f"{original['accuracy']:.2f}", *cells, paper])
    return table


def costs(by_grid: dict[Grid, list[Row]]) -> str:
    """The README's table of seconds and memory. They come from the benchmark; those of the choice of widths from the rows."""
    report = json.loads(BENCH.read_text(encoding="utf-8"))
    lines = []
    for grid, measured in by_grid.items():
        network = grid.title.split()[0]
        merged, restored, bought = (
            next((m for m in report[part] if m["network"] == network and m.get("kind", "merge") == "merge"), None)
            for part in ("merging", "restoration", "bought")
        )
        if not (merged and restored and bought):
            continue
        chosen_rows = [row for row in ours(measured) if (row["type"], chosen.rule(grid, row)) == ("restore", "auto")]
        rates = [bought[name]["images_per_second"] for name in ("smaller", "original")]
        taken = restored["probe"] + restored["restore"]
        lines.append(
            [network, f"{1000 * merged['ours']:.0f} ms", f"{taken:.1f} s",
             "" if restored["peak_mb"] is None else f"{restored['peak_mb'] / 1000:.1f} GB",
             f"{beyond.seconds(chosen_rows, 'seconds_widths')} s", f"{rates[0] / rates[1]:.2f} ×"]
        )  # fmt: skip
    header = ["network", "`merge`", "`restore`", "memory of `restore`", "choosing widths", "speed of the result"]
    return markdown(header, lines) + "\n"


def of_grid(grid: Grid, everything: Sequence[Row]) -> list[Row]:
    """The rows of a network's listed experiments, if measured with the authors' or the shipped checkpoint.

    A row with other settings, which `main.py --append` may have added to the file, is in no table.
    """
    network = (grid.arch, list(grid.depth_wide), grid.dataset)
    listed = (*grid.experiments(), *beyond.experiments(grid), *chosen.experiments(grid))
    experiments = [experiment.settings() for experiment in listed]
    named = {row["checkpoint_sha256"] for row in everything if checkpoint(row) is not None}
    wanted = {rows.key(about | {"checkpoint_sha256": sha}) for about in experiments for sha in named}
    return [
        row
        for row in everything
        if (row["arch"], row["depth_wide"], row["dataset"]) == network and rows.key(row) in wanted
    ]


INTRODUCTION = """# Results

Made by `make tables` from `rows.jsonl` and `published.csv`; never edited by hand.

Every accuracy is in %, on the test set, without fine-tuning. For every network there are up to four kinds of tables:

- **In short**: the paper's number beside the measured one, and beside both what is ours.
- **The paper's methods**: every criterion and ratio. `merge` is the published form of the method. `merge-derived` (ours) is the
  form that follows from its formulas.
- **Beyond the paper**: `restore` (ours), and `lbyl` and `fold` from other papers, with the same number of neurons in every
  layer. `fold` averages clusters of neurons, so no criterion selects its neurons. Columns with *512 images* looked at real,
  unlabelled training images.
- **Widths chosen without data** (ours): `--widths auto` against uniform widths, which have at least as many parameters and
  MACs. *At most* is the largest size in that line. *Neurons too* also chooses which neurons stay (`--criterion auto`). *Blocks
  may go* also lets the choice leave out residual blocks (`--drop-blocks`).

How to read them:

- *a ± b* is the mean of three seeds and half of their range.
- An empty cell was not measured. `lbyl`, `fold` and the columns with images are measured for one criterion of each network.
- LeNet has no BatchNorm: there `prune-bn`, `merge-bn` and `merge-derived` are the same as `prune` and `merge`.
- Seconds are medians over the seeds, on the machine that measured. Those of `restore` include making its inputs up; one choice
  of widths serves all budgets of a network. The first row of a run includes the time that PyTorch needs to start. A row is not
  measured again when the code gets faster: today's speed is in [BENCH.md](BENCH.md).
"""


def documents(everything: Sequence[Row]) -> dict[Path, str]:
    """The text of TABLES.md and of README.md."""
    by_grid = {grid: measured for grid in GRIDS.values() if (measured := of_grid(grid, everything))}
    versions = {row["versions"]["torch"] for measured in by_grid.values() for row in measured}
    tables = [INTRODUCTION, *(f"- Checkpoint *{name}*: {what}." for name, what in CHECKPOINTS.items())]
    tables += [f"- Measured with PyTorch {' and '.join(sorted(versions))}.", ""]
    summary: list[list[str]] = []
    for grid, measured in by_grid.items():
        tables += [f"## {grid.title}", ""]
        by_checkpoint = {name: [row for row in measured if checkpoint(row) == name] for name in CHECKPOINTS}
        for name, of_checkpoint in by_checkpoint.items():
            if any(row["type"] == "original" for row in of_checkpoint):
                about = "the paper's widths and uniform ones" if grid.fixed else grid.criterion
                tables += [f"### In short: {grid.title}, {about}, checkpoint *{name}*", ""]
                tables += [short_table(grid, of_checkpoint), ""]
                summary += readme_lines(grid, of_checkpoint, name)
        tables += [f"### The paper's methods: {grid.title}", "", full_table(papers(measured)), ""]
        for name, of_checkpoint in by_checkpoint.items():
            modules = {"Beyond the paper": beyond, f"Widths chosen without data, {grid.criterion}": chosen}
            for title, module in modules.items():
                header, lines = module.table(grid, of_checkpoint)
                if lines:
                    text = markdown(header, lines, 2 if module is beyond else 1)
                    tables += [f"### {title}: {grid.title}, checkpoint *{name}*", "", text, ""]
        for name, title in drawn(grid, measured).items():
            tables += [f"![{title}](figures/{name}.png)", ""]
    header = ["network, checkpoint", "dropped", "original", *COLUMNS, "paper: original / prune / merge"]
    readme = README.read_text(encoding="utf-8")
    readme = replaced(readme, README, BEGIN, END, markdown(header, summary, 2) + "\n")
    readme = replaced(readme, README, BEGIN_COSTS, END_COSTS, costs(by_grid))
    return {TABLES: "\n".join(tables), README: readme}


def drawn(grid: Grid, measured: Sequence[Row]) -> dict[str, str]:
    """The figures of a network that can be drawn: file name, without ending → title."""
    what = {
        "": ("accuracy against pruning ratio", has_figure(grid, measured)),
        "_beyond": ("restoration and its rivals", has_beyond_figure(grid, measured)),
        "_size": ("accuracy against parameters and MACs", has_chosen_figure(grid, measured)),
        "_widths": ("widths chosen without data", has_chosen_figure(grid, measured)),
        "_features": ("error of the feature maps", any(has_feature_figure(grid, row) for row in features.read())),
    }
    return {grid.figure + end: f"{grid.title}: {title}" for end, (title, there) in what.items() if there}


def draw(grid: Grid, measured: Sequence[Row]) -> None:
    """Draw all figures of a network that its rows suffice for."""
    from experiments import figures

    own = ours(measured)
    work = {
        "": lambda paths: figures.accuracy_against_ratio(grid, papers(own), paths),
        "_beyond": lambda paths: figures.accuracy_against_ratio(grid, own, paths, figures.BEYOND),
        "_size": lambda paths: figures.accuracy_against_size(grid, own, paths),
        "_widths": lambda paths: figures.chosen_widths(grid, own, paths),
        "_features": lambda paths: figures.feature_errors(
            grid.title, next(row for row in features.read() if has_feature_figure(grid, row)), paths
        ),
    }
    for name in drawn(grid, measured):
        work[name.removeprefix(grid.figure)]([FIGURES / f"{name}.{ending}" for ending in ("png", "svg")])


def replaced(text: str, path: Path, begin: str, end: str, content: str) -> str:
    """`text` with `content` in place of what is between two marker lines. Raises NeuronMergingError if `path` lacks them."""
    if begin not in text or end not in text:
        raise NeuronMergingError(f"{path.name} has lost the lines {begin} and {end}")
    return f"{text.split(begin)[0]}{begin}\n{content}{end}{text.split(end)[1]}"


def papers(measured: Sequence[Row]) -> list[Row]:
    """The rows of the paper's methods and widths."""
    return [r for r in measured if r["type"] in ("original", *FORMS) and r["widths_rule"] in (None, "published")]


def ours(measured: Sequence[Row]) -> list[Row]:
    """The rows measured with the shipped checkpoint, which are the ones that figures show."""
    return [row for row in measured if checkpoint(row) == "ours"]


def has_figure(grid: Grid, measured: Sequence[Row]) -> bool:
    """Whether there is a curve to draw."""
    return len(grid.ratios) > 1 and bool(ours(measured))


def has_beyond_figure(grid: Grid, measured: Sequence[Row]) -> bool:
    """Whether there are curves of restoration to draw."""
    several = len(grid.uniform_ratios or grid.ratios) > 1
    return several and any(row["type"] == "restore" and row["ratio"] for row in ours(measured))


def has_chosen_figure(grid: Grid, measured: Sequence[Row]) -> bool:
    """Whether restoration was measured with chosen widths and the shipped checkpoint."""
    return any((row["type"], chosen.rule(grid, row)) == ("restore", "auto") for row in ours(measured))


def has_feature_figure(grid: Grid, row: dict) -> bool:
    """Whether `row` of features.jsonl is of this network and its shipped checkpoint, and has more than two points."""
    of_this = (row["arch"], row["dataset"]) == (grid.arch, grid.dataset) and row["checkpoint_sha256"] in shipped()
    return of_this and len(row["consumers"]) > 2


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild tables and figures from the rows; with --check, fail if a table does not match them."""
    parser = Parser(prog="python -m experiments.tables", description=main.__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    everything = rows.load(rows.ROWS)
    rows.keys(everything, rows.ROWS)  # raises if the file holds anything but rows
    for path, text in documents(everything).items():
        if not args.check:
            write_text(path, text)
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            raise NeuronMergingError(f"{path.name} does not match results/rows.jsonl: run make tables")
    if not args.check:
        for grid in GRIDS.values():
            draw(grid, of_grid(grid, everything))
    return 0


if __name__ == "__main__":
    sys.exit(main())
