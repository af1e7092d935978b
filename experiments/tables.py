"""Tables from result rows: results/TABLES.md, the README's results section and the figures; `--check` only compares."""

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
BEGIN, END = "<!-- results: made by `make tables` -->", "<!-- end of results -->"
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


COLUMNS = {  # of the README's tables: type, and how the widths were found (beside what the paper has)
    "prune": ("prune", "uniform"),
    "merge": ("merge", "uniform"),
    "restore (ours)": ("restore", "uniform"),
    "restore, chosen widths (ours)": ("restore", "auto"),
}


def short_table(grid: Grid, measured: Sequence[Row]) -> str:
    """The README's table of one network and checkpoint: published beside measured, then what is ours; a line for every ratio.

    A network whose widths the paper fixes has a line for every criterion instead, and then one for every uniform ratio.
    """
    paper = rows.published()
    original = next(row for row in measured if row["type"] == "original")
    criterion = grid.criterion
    if grid.fixed:
        cells = [(name, name, None, "published") for name in CRITERIA]
        cells += [
            (f"{criterion}, {rows.percent(ratio)} of every layer", criterion, ratio, "uniform")
            for ratio in grid.uniform_ratios
        ]
    else:
        cells = [(rows.percent(ratio), criterion, ratio, "published") for ratio in grid.ratios]
    lines: dict[str, dict[str, str]] = {}
    for label, criterion, ratio, given in cells:
        line = lines.setdefault(label, {})
        for column, (kind, rule) in COLUMNS.items():
            found = [
                row for row in measured
                if (row["type"], row["criterion"], row["ratio"]) == (kind, criterion, ratio)
                and row["widths_rule"] == (given if rule == "uniform" else rule)
                and not (row.get("calibrate") or row.get("budget") or row.get("drop_blocks"))
            ]  # fmt: skip
            line[column] = beyond.cell(found)
            if found and rows.published_key(found[0]) in paper:
                line[f"{column}: paper"] = f"{paper[rows.published_key(found[0])]:.2f}"
    lines = {label: line for label, line in lines.items() if any(line.values())}
    header = [c for name in COLUMNS for c in (f"{name}: paper", name) if any(line.get(c) for line in lines.values())]
    header = header or ["measured"]  # nothing else is, yet
    known = paper.get(rows.published_key(original))
    beside = any(name.endswith(": paper") for name in header)
    baseline = "original" if known is None or beside else f"original (paper: {known:.2f})"
    theirs, own = "" if known is None else f"{known:.2f}", f"{original['accuracy']:.2f}"
    first = {name: theirs if name.endswith(": paper") else own for name in header}
    table = {baseline: first} | lines
    title = "criterion" if grid.fixed else "dropped"
    return markdown(
        [title, *header], [[label, *(line.get(name, "") for name in header)] for label, line in table.items()]
    )


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
MACs (*at most*: the largest of all compensations and seeds); *neurons too*: and those kept that explain most
(`--criterion auto`); *blocks may go*: and whole residual blocks may be left out (`--drop-blocks`). Where there is a ±, it is
half the range of three seeds. A cell is empty where nothing was measured: rivals have one criterion a network. Without
BatchNorm (LeNet) `prune-bn`, `merge-bn` and `merge-derived` are the same as `prune` and `merge`. Seconds are medians over
the seeds, on the machine that measured: of restoration with its probe; of the choice of widths, which serves all budgets of a
network, and of that and restoration together. The first row of a run includes what PyTorch needs to start. A row is not
measured again when the code gets faster: how fast it is today, `make bench` says (BENCH.md).
"""


def documents(everything: Sequence[Row]) -> dict[Path, str]:
    """What TABLES.md and README.md have to say."""
    by_grid = {grid: measured for grid in GRIDS.values() if (measured := of_grid(grid, everything))}
    versions = {row["versions"]["torch"] for measured in by_grid.values() for row in measured}
    tables = [INTRODUCTION, *(f"- checkpoint *{name}*: {what}" for name, what in CHECKPOINTS.items())]
    tables += [f"- PyTorch {' and '.join(sorted(versions))}", ""]
    summary = []
    for grid, measured in by_grid.items():
        tables += [f"## {grid.title}", "", full_table(papers(measured)), ""]
        by_checkpoint = {name: [row for row in measured if checkpoint(row) == name] for name in CHECKPOINTS}
        for name, of_checkpoint in by_checkpoint.items():
            if any(row["type"] == "original" for row in of_checkpoint):
                about = "the paper's widths and uniform ones" if grid.fixed else grid.criterion
                title = f"**{grid.title}**, {about}, {name.replace('ours', 'our')} checkpoint (accuracy in %)"
                summary += [title, "", short_table(grid, of_checkpoint), ""]
        figures = drawn(grid, measured)
        for name in [name for name in figures if name.endswith("_beyond")] or list(figures)[:1]:
            summary += [f"![{figures[name]}](results/figures/{name}.png)", ""]
        for name, of_checkpoint in by_checkpoint.items():
            found = {"Beyond the paper": beyond, f"Widths chosen without data, {grid.criterion}": chosen}
            for title, module in found.items():
                header, lines = module.table(grid, of_checkpoint)
                if lines:
                    text = markdown(header, lines, 2 if module is beyond else 1)
                    tables += [f"### {title}: {grid.title}, checkpoint *{name}*", "", text, ""]
        for name, title in figures.items():
            tables += [f"![{title}](figures/{name}.png)", ""]
    return {TABLES: "\n".join(tables), README: replaced(README, BEGIN, END, "\n".join(summary))}


def drawn(grid: Grid, measured: Sequence[Row]) -> dict[str, str]:
    """The figures of a network, by the name of their files: what they show."""
    what = {
        "": ("accuracy against pruning ratio", has_figure(grid, measured)),
        "_beyond": ("restoration and its rivals", has_beyond_figure(grid, measured)),
        "_size": ("accuracy against parameters and MACs", has_chosen_figure(grid, measured)),
        "_widths": ("widths chosen without data", has_chosen_figure(grid, measured)),
        "_features": ("error of the feature maps", any(has_feature_figure(grid, row) for row in features.read())),
    }
    return {grid.figure + end: f"{grid.title}: {title}" for end, (title, there) in what.items() if there}


def draw(grid: Grid, measured: Sequence[Row]) -> None:
    """Draw the figures of a network that its rows are enough for."""
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


def replaced(path: Path, begin: str, end: str, content: str) -> str:
    """The text of a file with what stands between two marker lines replaced. Raises NeuronMergingError without them."""
    text = path.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise NeuronMergingError(f"{path.name} has lost the lines {begin} and {end}")
    return f"{text.split(begin)[0]}{begin}\n{content}{end}{text.split(end)[1]}"


def papers(measured: Sequence[Row]) -> list[Row]:
    """The rows of the paper's methods and widths."""
    return [r for r in measured if r["type"] in ("original", *FORMS) and r["widths_rule"] in (None, "published")]


def ours(measured: Sequence[Row]) -> list[Row]:
    """The rows measured with the shipped checkpoint: those that are drawn."""
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
    """Whether `row` of features.jsonl is this network's, with its shipped checkpoint, and more than two points."""
    of_this = (row["arch"], row["dataset"]) == (grid.arch, grid.dataset) and row["checkpoint_sha256"] in shipped()
    return of_this and len(row["consumers"]) > 2


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild tables and figures from the rows; with --check, fail where a table no longer matches them."""
    parser = Parser(prog="python -m experiments.tables", description=main.__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    everything = rows.load(rows.ROWS)
    rows.keys(everything, rows.ROWS)  # or it is no file of rows
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
