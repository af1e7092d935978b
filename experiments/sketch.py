"""Draws docs/restore.svg and docs/restore.png: the idea of restoration in one picture."""

import sys
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments import command
from experiments.figures import write
from experiments.rows import RESULTS
from neuron_merging.commandline import Parser

TARGETS = [RESULTS.parent / "docs" / f"restore.{ending}" for ending in ("svg", "png")]
BLUE, GREEN, RED = "#0072B2", "#009E73", "#D55E00"


def box(axis: Axes, x: float, y: float, text: str, color: str, width: float = 1.5) -> None:
    """A box around `text` with its centre at (x, y)."""
    shape = plt.Rectangle((x - width / 2, y - 0.28), width, 0.56, facecolor="white", edgecolor=color, linewidth=1.5)
    axis.add_patch(shape)
    axis.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black", dash: str = "-"
) -> None:
    """An arrow from `start` to `end`."""
    style = {"arrowstyle": "-|>", "color": color, "linestyle": dash, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=end, xytext=start, arrowprops=style)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw it."""
    Parser(prog="python -m experiments.sketch", description=main.__doc__).parse_args(argv)
    figure, axis = plt.subplots(figsize=(9.6, 3.7), layout="constrained")
    for y, name, color, stream in (
        (2.4, "original, the teacher", BLUE, "r_t"),
        (0.6, "smaller network, the student", GREEN, "r_s"),
    ):
        label = f"{name} ({'all' if color == BLUE else 'kept'} neurons)"
        axis.text(2.95, y + 0.4, label, color=color, fontsize=10)
        for x, text in ((2.2, "pruned layer"), (4.6, "BatchNorm, ReLU"), (7.0, "consumer")):
            box(axis, x, y, text, color)
        box(axis, 9.2, y, "+", color, 0.5)
        for start, end in ((1.0, 1.45), (2.95, 3.85), (5.35, 6.25), (7.75, 8.95), (9.45, 10.1)):
            arrow(axis, (start, y), (end, y), color)
        axis.plot([1.15, 1.15, 9.2, 9.2], [y, y - 0.5, y - 0.5, y - 0.28], color=color, linewidth=1)
        axis.text(5.2, y - 0.47, f"residual stream ${stream}$", fontsize=8, color=color, va="bottom")
    axis.text(0.4, 1.5, "made-up\ninputs X", ha="center", va="center", fontsize=10)
    arrow(axis, (0.35, 1.8), (0.95, 2.35))
    arrow(axis, (0.35, 1.2), (0.95, 0.65))
    for x, text in (
        (2.2, "fitted on windows of its input\nto what the kept neurons gave"),
        (7.0, "fitted on windows of the kept\nneurons to T + (r_t − r_s)/s"),
    ):
        arrow(axis, (x + 0.55, 2.12), (x + 0.55, 0.88), RED, "--")
        axis.text(x + 0.65, 1.42, text.replace("r_t − r_s", "$r_t - r_s$"), color=RED, fontsize=8, va="center")
    axis.set_xlim(0, 10.4)
    axis.set_ylim(-0.1, 3.3)
    axis.axis("off")
    write(figure, TARGETS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
