"""`make demo`: the paper's LeNet table measured here and now, beside the published one, and as a figure."""

import sys
from collections.abc import Sequence

from experiments import command, rows
from experiments.figures import accuracy_against_ratio
from experiments.grid import GRIDS, run
from neuron_merging.commandline import Parser, choose_device

FOLDER = rows.RESULTS / "demo"


def table(measured: list[rows.Row], criterion: str = "l1-norm") -> str:
    """Published beside measured for terminals."""
    paper = rows.published()
    lines = [f"{'':<10}{'prune':>22}{'merge':>22}", f"{'ratio':<10}" + 2 * f"{'published':>12}{'measured':>10}"]
    (original,) = (row for row in measured if row["type"] == "original")
    lines.append(f"{'original':<10}" + 2 * f"{paper[rows.published_key(original)]:>12.2f}{original['accuracy']:>10.2f}")
    for ratio in GRIDS["lenet"].ratios:
        line = f"{100 * ratio:<3.0f}%{'':<6}"
        for kind in ("prune", "merge"):
            (row,) = (r for r in measured if (r["type"], r["criterion"], r["ratio"]) == (kind, criterion, ratio))
            line += f"{paper[rows.published_key(row)]:>12.2f}{row['accuracy']:>10.2f}"
        lines.append(line)
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure prune and both forms of merge for every criterion and ratio, print l1-norm, draw all three."""
    Parser(prog="python -m experiments.demo", description=main.__doc__).parse_args(argv)
    grid = GRIDS["lenet"]
    path = FOLDER / "rows.jsonl"
    path.unlink(missing_ok=True)  # the demo measures, it does not remember
    measured = run(grid, choose_device("auto"), path)
    figure = FOLDER / f"{grid.figure}.png"
    accuracy_against_ratio(grid, measured, [figure])
    seconds = sum(row["seconds_decompose"] + row["seconds_evaluate"] for row in measured)
    print(f"{grid.title}, l1-norm, no fine-tuning: accuracy in %\n")
    print(table(measured))
    print(f"""
published: Kim et al. 2020, with the authors' checkpoint, with which this code gives the same numbers (results/TABLES.md).
measured:  here and now, with pretrained/{grid.checkpoint.name}, another training of the same network.
{len(measured)} networks made and measured on 10,000 images in {seconds:.1f} s; all three criteria: {figure}""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
