"""The rows of experiments.real as text, table and figure: results/real.md, results/figures/real.svg and .png."""

import json
from collections.abc import Sequence

import matplotlib.pyplot as plt

from experiments import rows
from experiments.figures import OTHER, STYLES, write
from experiments.real_networks import NETWORKS, Network
from experiments.rows import RESULTS, Row, percent
from experiments.tables import markdown
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import write_text

PATH, TABLE = RESULTS / "real.jsonl", RESULTS / "real.md"
FIGURES = [RESULTS / "figures" / f"real{ending}" for ending in (".svg", ".png")]
SHOWN = 0.3  # the ratio whose costs are listed
LINES = {"restore+64": ("#009E73", "d", ":"), "auto": ("black", "*", "-")}  # those that STYLES does not have

INTRODUCTION = """# Trained networks of other people

Made by `make real` from `real.jsonl`. The networks were not trained for this project, and ship inside packages of the registry
(experiments/real_networks.py). Settings are to be chosen on another half of the inputs than the one that is scored here. How
hard lines and tones are was chosen by hand, on both halves (experiments/real_inputs.py).

- *Channels*: *uncoupled* are neurons that one layer reads; *coupled* are also the channels that several layers share, and those
  in front of depthwise layers; *expansions* are only the wide channels inside of MobileNetV2's blocks.
- *Dropped*: the share of every unit. *Left*: the share of parameters and of MACs, uniform widths.
- *±*: the standard error over photographs, images, lines or tones. MobileNetV2 is scored on ten photographs only, ten crops of
  each: a few points there say nothing. One seed is measured, and another one can change a score by more than this.
- **Bold**: the best without real inputs, at uniform widths.
- –: it cannot be done; the reasons are below the tables.
- A network has no lines for *coupled* if coupling adds nothing to what is dropped.
"""


def key(row: Row) -> str:
    """The key of a measurement, which two rows share if all settings are the same."""
    return json.dumps([row[name] for name in ("network", "split", "channels", "ratio", "method", "options")])


def line(row: Row) -> str:
    """A row as a line of text."""
    head = f"{row['network']:<13}{row['channels']:<11}{percent(row['ratio']):>5}  {row['method']:<15}"
    if "why_not" in row:
        return f"{head} – {row['why_not']}"
    left = [
        f"{100 * after / before:.0f} % of {name}"
        for name, (before, after) in (("parameters", row["params"]), ("MACs", row["macs"]))
    ]
    score = f"{row['score']:6.1f} ± {row['standard_error']:.1f} of {row['original']:.1f}"
    costs = f"{row['seconds']:.1f} s, {row['peak_mb']:,} MB"
    return f"{head}{score}, agrees {row['agreement']:.1f}; {', '.join(left)}; {costs}"


def make(order: Sequence[str], check: bool = False) -> None:
    """Write table and figure of the rows in PATH. order: the methods, from left to right.

    check: write nothing, but raise NeuronMergingError if the table does not match.
    """
    everything = rows.load(PATH)
    rows.keys(everything, PATH, key)  # raises if the file holds anything but rows
    measured = [row for row in everything if row["split"] == "report" and not row["options"]]
    text = document(measured, order)
    if not check:
        write_text(TABLE, text)
        draw(measured, order)
    elif not TABLE.exists() or TABLE.read_text(encoding="utf-8") != text:
        raise NeuronMergingError(f"{TABLE.name} does not match {PATH.name}: run python -m experiments.real --tables")


def label(method: str) -> str:
    """A method in words."""
    name, *extras = method.split("+")
    return ", ".join([name, *("chosen widths" if extra == "widths" else f"{extra} real inputs" for extra in extras)])


def document(measured: Sequence[Row], order: Sequence[str]) -> str:
    """results/real.md. order: the methods, from left to right."""
    methods = [method for method in order if any(row["method"] == method for row in measured)]
    texts = [INTRODUCTION, *(_scores(name, measured, methods) for name in NETWORKS if _of(measured, name))]
    if any("score" in row for row in measured):
        texts.append(_costs(measured, methods))
    reasons = _reasons(measured)
    if reasons:
        texts.append("\n".join(["## What cannot be done", "", *reasons, ""]))
    return "\n".join(texts)


def _of(measured: Sequence[Row], network: str) -> list[Row]:
    return [row for row in measured if row["network"] == network]


def _groups(measured: Sequence[Row], network: str) -> dict[str, list[Row]]:
    """The rows of a network with a score, by channels; without those where coupling changes nothing."""
    groups: dict[str, list[Row]] = {}
    for row in _of(measured, network):
        if "score" in row:
            groups.setdefault(row["channels"], []).append(row)
    if _results(groups.get("coupled", [])) == _results(groups.get("uncoupled", [])):
        groups.pop("coupled", None)
    return groups


def _results(measured: Sequence[Row]) -> dict[tuple[str, float], tuple[float, int]]:
    """By method and ratio of the rows at uniform widths: score and parameters."""
    uniform = (row for row in measured if not row["method"].endswith("+widths"))
    return {(row["method"], row["ratio"]): (row["score"], row["params"][1]) for row in uniform}


def _scores(name: str, measured: Sequence[Row], methods: Sequence[str]) -> str:
    network, groups, lines = NETWORKS[name], _groups(measured, name), []
    original = next(row["original"] for row in _of(measured, name))
    for channels, ratio in dict.fromkeys((row["channels"], row["ratio"]) for group in groups.values() for row in group):
        here = {row["method"]: row for row in groups[channels] if row["ratio"] == ratio}
        best = max((row["score"] for method, row in here.items() if "+" not in method), default=None)
        cells = []
        for method in methods:
            if method not in here:
                cells.append("–")
                continue
            score, error = here[method]["score"], here[method]["standard_error"]
            bold = "**" if score == best and "+" not in method else ""
            cells.append(f"{bold}{score:.1f}{bold} ± {error:.1f}".replace("-", "−"))
        lines.append([channels, percent(ratio), _left(next(iter(here.values()))), *cells])
    head = f"## {network.title}: {network.metric}, of the original {original:.1f} %"
    if not lines:
        return f"{head}\n\nNothing can be dropped.\n"
    return "\n".join([head, "", markdown(["channels", "dropped", "left", *map(label, methods)], lines), ""])


def _left(row: Row) -> str:
    """The shares of parameters and MACs that are left."""
    return " / ".join(percent(row[size][1] / row[size][0]) for size in ("params", "macs"))


def _costs(measured: Sequence[Row], methods: Sequence[str]) -> str:
    """Seconds and memory of every method on every network, at the ratio SHOWN."""
    lines = []
    for name in NETWORKS:
        for channels, group in _groups(measured, name).items():
            here = {row["method"]: row for row in group if row["ratio"] == SHOWN}
            cells = [
                f"{here[method]['seconds']:.1f} s, {here[method]['peak_mb'] / 1000:.1f} GB" if method in here else "–"
                for method in methods
            ]
            lines.append([NETWORKS[name].title, channels, *cells])
    threads = sorted({row["threads"] for row in measured if "threads" in row})
    head = [f"## Seconds and memory, {percent(SHOWN)} dropped", ""]
    head += [f"Of the whole process, with its inputs; threads: {', '.join(map(str, threads))}.", ""]
    return "\n".join([*head, markdown(["network", "channels", *map(label, methods)], lines, right_from=2), ""])


def _reasons(measured: Sequence[Row]) -> list[str]:
    """By network, channels and reason: the methods that cannot do it."""
    refused: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in measured:
        if "why_not" in row:
            refused.setdefault((row["network"], row["channels"], row["why_not"]), {})[label(row["method"])] = None
    return [
        f"- {NETWORKS[name].title}, {channels} ({'; '.join(methods)}): {why}"
        for (name, channels, why), methods in refused.items()
    ]


def draw(measured: Sequence[Row], order: Sequence[str]) -> None:
    """Draw a panel for every network and its channels: score against ratio, a line for each method."""
    panels = [(NETWORKS[name], *group) for name in NETWORKS for group in _groups(measured, name).items()]
    if not panels:
        return
    columns = min(3, len(panels))
    size = (4 * columns, 3.2 * -(-len(panels) // columns) + 0.6)
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (network, channels, group) in zip(axes.flat, panels):
        _panel(axis, network, channels, group, order)
    handles = {}
    for axis in axes.flat:
        handles |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False)
    write(figure, FIGURES)


def _panel(axis: plt.Axes, network: Network, channels: str, group: Sequence[Row], order: Sequence[str]) -> None:
    original = group[0]["original"]
    for method in order:
        points = sorted((row["ratio"], row["score"]) for row in group if row["method"] == method)
        if not points or method.endswith("+widths"):
            continue
        color, marker, dash = LINES.get(method) or STYLES.get(method, OTHER)
        ratios, scores = zip((0, original), *points)
        axis.plot(
            [100 * ratio for ratio in ratios], scores, color=color, marker=marker, linestyle=dash, markersize=5,
            label=label(method),
        )  # fmt: skip
    axis.axhline(original, color="black", linewidth=0.8, linestyle="--", label="original")
    axis.set_ylim(0, 103)
    axis.set_title(f"{network.title}, {channels}", fontsize=10)
    axis.set_xlabel("dropped (%)")
    axis.set_ylabel(f"{network.metric} (%)")
    axis.grid(alpha=0.3)
