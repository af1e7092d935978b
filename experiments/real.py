"""Measures every method on trained networks of other people (real_networks.py): results/real.md.

`make real` installs the packages that have the networks, measures what has no row in results/real.jsonl yet, and makes the
table and the figure. In Python: `measure("mobilenet_v2", "restore", 0.3)`, with any option of `shrink`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments import command, packages, rows
from experiments.real_networks import NETWORKS, SPLITS
from experiments.rows import Row
from neuron_merging.commandline import Parser
from neuron_merging.config import ShrinkConfig, add_flags
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import check_writable
from neuron_merging.methods import METHODS
from neuron_merging.shrink import shrink

PATH = rows.RESULTS / "real.jsonl"
VARIANTS = (  # +64: with so many real inputs; +widths: chosen widths
    "prune", "merge", "merge-derived", "lbyl", "fold", "restore", "auto", "restore+64", "prune+widths", "restore+widths",
)  # fmt: skip
RATIOS = (0.1, 0.3, 0.5)
CHANNELS = ("uncoupled", "coupled")  # and the network's parts, which are coupled
OPTIONS = [f.name for f in fields(ShrinkConfig) if f.name not in ("ratio", "compensation", "widths", "coupled")]


def measure(
    network: str,
    method: str = "restore",
    ratio: float = 0.3,
    coupled: bool = False,
    split: str = "tune",
    *,
    part: str | None = None,
    **options: Any,
) -> Row:
    """Measure a cell: make a network smaller and score what is left. Returns its row.

    network: a key of NETWORKS. method: a name of a method, then, if wanted, +N for N real inputs and +widths for chosen widths.
    split: "tune", "report" or "all". part: a key of the network's `parts`; then only those layers lose neurons.
    options: of `shrink`.
    """
    channels = part or CHANNELS[coupled]
    return measured(
        {"network": network, "split": split, "channels": channels, "ratio": ratio, "method": method, "options": options}
    )


def measured(cell: Row) -> Row:
    """The row of a cell: its settings and results; if the method cannot do it, `why_not` instead of a score.

    agreement: the score if what the original network answers were true. params, macs: before and after.
    """
    network, split = NETWORKS[cell["network"]], cell["split"]
    truth = network.scored(split)[1]
    before = answers(cell["network"], split)
    row = cell | {"original": round(network.points(before, truth), 2)}
    name, *extras = cell["method"].split("+")
    options, ratio = dict(cell["options"]), cell["ratio"]
    for extra in extras:
        options |= {"widths": "auto"} if extra == "widths" else {"images": network.images(int(extra))}
    part = network.parts.get(cell["channels"])
    try:
        small, report = shrink(
            original(cell["network"]), {part: ratio} if part else ratio, example_input=network.shape,
            compensation=name, coupled=cell["channels"] != "uncoupled", **options,
        )  # fmt: skip
    except NeuronMergingError as error:
        return row | {"why_not": str(error)}
    after = network.answered(small, split)
    return row | {
        "score": round(network.points(after, truth), 2), "agreement": round(network.points(after, before), 2),
        "params": report.params, "macs": report.macs,
        "seconds": round(report.seconds, 1), "peak_mb": round(report.peak_mb), "threads": torch.get_num_threads(),
    }  # fmt: skip


@cache
def original(network: str) -> nn.Module:
    """The network as it was trained, loaded once."""
    return NETWORKS[network].load()


@cache
def answers(network: str, split: str) -> np.ndarray:
    """What the original network answers to the inputs of a split."""
    return NETWORKS[network].answered(original(network), split)


def key(row: Row) -> str:
    """The key of a measurement, which two rows share if all settings are the same."""
    return json.dumps([row[name] for name in ("network", "split", "channels", "ratio", "method", "options")])


def line(row: Row) -> str:
    """A row as a line of text."""
    head = f"{row['network']:<13}{row['channels']:<11}{rows.percent(row['ratio']):>5}  {row['method']:<15}"
    if "why_not" in row:
        return f"{head} – {row['why_not']}"
    left = [
        f"{100 * after / before:.0f} % of {name}"
        for name, (before, after) in (("parameters", row["params"]), ("MACs", row["macs"]))
    ]
    return (
        f"{head}{row['score']:6.1f} of {row['original']:.1f}, agrees {row['agreement']:.1f}; {', '.join(left)};"
        f" {row['seconds']:.1f} s, {row['peak_mb']:,} MB"
    )


def cells(args: argparse.Namespace) -> Iterator[Row]:
    """The cells that a command line asks for."""
    options = {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)}
    for name in args.networks:
        every = (*CHANNELS, *NETWORKS[name].parts)
        chosen = [channels for channels in every if args.channels is None or channels in args.channels]
        for channels, ratio, method in product(chosen, args.ratios, args.methods):
            yield {
                "network": name, "split": args.split, "channels": channels, "ratio": ratio, "method": method,
                "options": options,
            }  # fmt: skip


def listed(kind: Callable[[str], Any], known: Iterable[Any] | None, text: str) -> list[Any]:
    """A,B,… → a list, for an `argparse` type. Raises ArgumentTypeError for what is not `known`."""
    values = [kind(part) for part in text.split(",")]
    wrong = next((value for value in values if known is not None and value not in known), None)
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{wrong!r}: choose from {', '.join(map(str, known))}")
    return values


def parser() -> Parser:
    """The parser of this command."""
    p = Parser(prog="python -m experiments.real", description=main.__doc__)
    parts = [part for network in NETWORKS.values() for part in network.parts]
    p.add_argument("--networks", type=partial(listed, str, NETWORKS), default=list(NETWORKS), help="names [all]")
    p.add_argument(
        "--methods", type=partial(listed, str, None),
        default=[name for name in VARIANTS if name.partition("+")[0] in METHODS],
        help="names; +64 with 64 real inputs, +widths with chosen widths [%(default)s]",
    )  # fmt: skip
    p.add_argument("--ratios", type=partial(listed, float, None), default=RATIOS, help="shares to drop [%(default)s]")
    p.add_argument(
        "--channels",
        type=partial(listed, str, (*CHANNELS, *parts)),
        help=f"{', '.join(CHANNELS)}, {', '.join(parts)} [all]",
    )
    p.add_argument(
        "--split", choices=SPLITS, default="report", help="tune to choose settings, report for tables [%(default)s]"
    )
    p.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help=f"keep rows there, measure what is not there [{PATH.name} for report, else none]",
    )
    p.add_argument("--install", action="store_true", help="first let pip install the packages that are missing")
    add_flags(p.add_argument_group("of the methods"), ShrinkConfig, OPTIONS, default=argparse.SUPPRESS)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure methods on trained networks of other people, and print each row."""
    args = parser().parse_args(argv)
    for method in args.methods:
        if method.partition("+")[0] not in METHODS:
            raise NeuronMergingError(f"unknown method {method!r}: choose from {', '.join(VARIANTS)}")
    needed = [package for name in args.networks for package in NETWORKS[name].needs]
    if args.install:
        packages.install(needed)
    for package in needed:
        packages.path(package, "")
    wanted = list(cells(args))
    path = args.rows
    if path is None and args.split == "report" and not wanted[0]["options"]:
        path = PATH
    done = set()
    if path is not None:
        check_writable(path)
        done = rows.keys(rows.load(path), path, key)
    for cell in wanted:
        if key(cell) not in done:
            row = measured(cell)
            print(line(row), flush=True)
            if path is not None:
                rows.append(row, path, key)
    return 0


if __name__ == "__main__":
    sys.exit(main())
