"""Tables from result rows: results/TABLES.md, the README's results section and the figures; `--check` only compares."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from decompose import COMPENSATIONS, CRITERIA
from errors import NeuronMergingError
from experiments import beyond, chosen, command, features, rows
from experiments.grid import GRIDS, Grid
from experiments.manifest import shipped
from experiments.rows import Row
from files import write_atomically

TABLES = rows.RESULTS / "TABLES.md"
FIGURES = rows.RESULTS / "figures"
README = rows.RESULTS.parent / "README.md"
BEGIN, END = "<!-- results: made by `make tables` -->", "<!-- end of results -->"
CHOSEN_FIGURES = ("size", "widths")
CHECKPOINTS = {"authors'": "the one that the paper's authors published", "ours": "the one in `pretrained/`"}


def checkpoint(row: Row) -> str | None:
    """Whose checkpoint a row was measured with: the authors', ours (as shipped now), or None for another."""
    if row["checkpoint_sha256"] in rows.published_checkpoints():
        return "authors'"
    return "ours" if row["checkpoint_sha256"] in shipped() else None


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]], right_from: int = 1) -> str:
    """A Markdown table; columns from `right_from` on are aligned to the right."""
    rule = ["---" if i < right_from else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def full_table(measured: Sequence[Row]) -> str:
    """Every row of a network: settings, published accuracy, measured one, size, seconds, checkpoint."""
    paper = rows.published()
    order = {name: i for i, name in enumerate([None, *CRITERIA])}
    lines = []
    for row in sorted(measured, key=lambda r: (checkpoint(r), order[r["criterion"]], r["ratio"] or 0)):
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


def short_table(measured: Sequence[Row], criterion: str) -> str:
    """Prune and merge side by side for one criterion: published, measured with the published checkpoint (if so), with ours."""
    paper = rows.published()
    whose = [name for name in CHECKPOINTS if any(checkpoint(row) == name for row in measured)]
    columns = [("paper", None), *((f"measured, {name.replace('ours', 'our')} checkpoint", name) for name in whose)]
    header = ["ratio", *(f"{kind}: {title}" for kind in ("prune", "merge") for title, _ in columns)]
    cells: dict[str, dict[tuple, str]] = {}
    for row in measured:
        if row["type"] == "original" or (row["criterion"] == criterion and row["type"] in ("prune", "merge")):
            for kind in ("prune", "merge") if row["type"] == "original" else (row["type"],):
                line = cells.setdefault("0 % (original)" if row["type"] == "original" else rows.ratio(row), {})
                line[kind, checkpoint(row)] = f"{row['accuracy']:.2f}"
                line[kind, None] = f"{paper[rows.published_key(row)]:.2f}" if rows.published_key(row) in paper else ""
    lines = [
        [label, *(line.get((kind, name), "") for kind in ("prune", "merge") for _, name in columns)]
        for label, line in cells.items()
    ]
    return markdown(header, lines)


def of_grid(grid: Grid, everything: Sequence[Row]) -> list[Row]:
    """The rows of a network's own experiments that were measured with a checkpoint we can name.

    A row that somebody added with other settings (`main.py --append`) is in the file, but in no table.
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

Accuracy on the test set in %, without fine-tuning. `merge` is the published form of the method, `merge-derived` the form
that follows from the formulas (ours). The tables *beyond the paper* have `restore` (ours), `lbyl` and `fold` (other
people's; fold's clusters have no criterion) at the same kept widths; whatever looked at real images says so. The tables
*widths chosen without data* (ours) compare widths from `--widths auto` with uniform ones of at least as many parameters and
MACs; *neurons too*: and those kept that explain most (`--criterion auto`); *blocks may go*: and whole residual blocks may be
left out (`--drop-blocks`). Where there is a ±, it is half the range of three seeds.
"""


def documents(everything: Sequence[Row]) -> dict[Path, str]:
    """What TABLES.md and README.md have to say."""
    tables = [INTRODUCTION, *(f"- checkpoint *{name}*: {what}" for name, what in CHECKPOINTS.items()), ""]
    summary = []
    for grid in GRIDS.values():
        measured = of_grid(grid, everything)
        if not measured:
            continue
        tables += [f"## {grid.title}", "", full_table(papers(measured)), ""]
        summary += [f"**{grid.title}, l1-norm** (accuracy in %)", "", short_table(papers(measured), "l1-norm"), ""]
        if has_figure(grid, measured):
            tables += [f"![{grid.title}: accuracy against pruning ratio](figures/{grid.figure}.png)", ""]
            summary += [f"![{grid.title}: accuracy against pruning ratio](results/figures/{grid.figure}.png)", ""]
        if any(has_feature_figure(grid, row) for row in features.read()):
            tables += [f"![{grid.title}: error of the feature maps](figures/{grid.figure}_features.png)", ""]
        for name in CHECKPOINTS:
            of_checkpoint = [row for row in measured if checkpoint(row) == name]
            header, lines = beyond.table(grid, of_checkpoint)
            if lines:
                data_free = slice(1, 2 + len(beyond.DATA_FREE))
                brief = [line[data_free] for line in lines if line[0] == grid.criterion]
                title = f"**Beyond the paper: {grid.title}, {grid.criterion}**"
                summary += [
                    f"{title}, checkpoint *{name}*, no data used (accuracy in %)",
                    "",
                    markdown(header[data_free], brief),
                    "",
                ]
                tables += [
                    f"### Beyond the paper: {grid.title}, checkpoint *{name}*",
                    "",
                    markdown(header, lines, 2),
                    "",
                ]
            header, lines = chosen.table(grid, of_checkpoint)
            if lines:
                title = f"Widths chosen without data: {grid.title}, {grid.criterion}"
                summary += [f"**{title}**, checkpoint *{name}* (accuracy in %)", "", markdown(header, lines), ""]
                tables += [f"### {title}, checkpoint *{name}*", "", markdown(header, lines), ""]
        if has_chosen_figure(grid, measured):
            for what in CHOSEN_FIGURES:
                tables += [f"![{grid.title}: widths chosen without data](figures/{grid.figure}_{what}.png)", ""]
        if has_beyond_figure(grid, measured):
            tables += [f"![{grid.title}: restoration and its rivals](figures/{grid.figure}_beyond.png)", ""]
    return {TABLES: "\n".join(tables), README: replaced(README, BEGIN, END, "\n".join(summary))}


def replaced(path: Path, begin: str, end: str, content: str) -> str:
    """The text of a file with what stands between two marker lines replaced. Raises NeuronMergingError without them."""
    text = path.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise NeuronMergingError(f"{path.name} has lost the lines {begin} and {end}")
    return f"{text.split(begin)[0]}{begin}\n{content}{end}{text.split(end)[1]}"


def papers(measured: Sequence[Row]) -> list[Row]:
    """The rows of the paper's methods and widths."""
    return [
        r for r in measured if r["type"] in ("original", *COMPENSATIONS) and r["widths_rule"] in (None, "published")
    ]


def ours(measured: Sequence[Row]) -> list[Row]:
    """The rows measured with the shipped checkpoint: those that are drawn."""
    return [row for row in measured if checkpoint(row) == "ours"]


def has_figure(grid: Grid, measured: Sequence[Row]) -> bool:
    """Whether there is a curve to draw."""
    return len(grid.ratios) > 1 and bool(ours(measured))


def has_beyond_figure(grid: Grid, measured: Sequence[Row]) -> bool:
    """Whether restoration was measured at more than one ratio with the shipped checkpoint."""
    return has_figure(grid, measured) and any(row["type"] == "restore" for row in ours(measured))


def has_chosen_figure(grid: Grid, measured: Sequence[Row]) -> bool:
    """Whether restoration was measured with chosen widths and the shipped checkpoint."""
    return any((row["type"], chosen.rule(grid, row)) == ("restore", "auto") for row in ours(measured))


def has_feature_figure(grid: Grid, row: dict) -> bool:
    """Whether `row` of features.jsonl is this network's, with its shipped checkpoint, and more than two points."""
    of_this = (row["arch"], row["dataset"]) == (grid.arch, grid.dataset) and row["checkpoint_sha256"] in shipped()
    return of_this and len(row["consumers"]) > 2


def _both(name: str) -> list[Path]:
    return [FIGURES / f"{name}.{ending}" for ending in ("png", "svg")]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild tables and figures from the rows; with --check, fail where a table no longer matches them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    everything = rows.load()
    for path, text in documents(everything).items():
        if not args.check:
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            raise NeuronMergingError(f"{path.name} does not match results/rows.jsonl: run make tables")
    if not args.check:
        from experiments import figures

        for grid in GRIDS.values():
            measured = of_grid(grid, everything)
            if has_figure(grid, measured):
                figures.accuracy_against_ratio(grid, papers(ours(measured)), _both(grid.figure))
            if has_beyond_figure(grid, measured):
                paths = _both(f"{grid.figure}_beyond")
                figures.accuracy_against_ratio(grid, ours(measured), paths, figures.BEYOND)
            if has_chosen_figure(grid, measured):
                against_size, by_layer = (_both(f"{grid.figure}_{what}") for what in CHOSEN_FIGURES)
                figures.accuracy_against_size(grid, ours(measured), against_size)
                figures.chosen_widths(grid, ours(measured), by_layer)
            for row in features.read():
                if has_feature_figure(grid, row):
                    figures.feature_errors(grid.title, row, _both(f"{grid.figure}_features"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
