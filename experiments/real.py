"""Measures every method on trained networks of other people (real_networks.py): results/real.md.

`make real` installs the packages that have the networks, measures what has no row in results/real.jsonl yet, and makes the
table and the figure. In Python: `measure("mobilenet_v2", "restore", 0.3)`, with any option of `shrink`.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments import command, packages, real_tables, rows
from experiments.real_networks import NETWORKS, SPLITS
from experiments.real_tables import PATH, key
from experiments.rows import Row
from neuron_merging.commandline import Parser
from neuron_merging.config import ShrinkConfig, add_flags
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import check_writable
from neuron_merging.methods import METHODS
from neuron_merging.shrink import shrink

VARIANTS = (  # +64: with so many real inputs; +widths: chosen widths
    "prune", "merge", "merge-derived", "lbyl", "fold", "restore", "auto", "restore+64", "prune+widths", "restore+widths",
)  # fmt: skip
RATIOS = (0.1, 0.3, 0.5)
CHANNELS = ("uncoupled", "coupled")  # and the network's parts, which are coupled
OPTIONS = {  # flags of `shrink` that this command has too, with their defaults
    f.name: f.default for f in fields(ShrinkConfig) if f.name not in ("ratio", "compensation", "widths", "coupled")
}


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

    agreement: the score if what the original network answers were true. standard_error: of the score, over the groups of
    inputs. params, macs: before and after.
    """
    network, split = NETWORKS[cell["network"]], cell["split"]
    truth = network.scored(split)[1]
    before = answers(cell["network"], split)
    row = cell | {"original": round(network.points(before, truth), 2)}
    name, number, chosen = parsed(cell["method"])
    options, ratio = dict(cell["options"]), cell["ratio"]
    options |= {"images": network.images(number)} if number else {}
    options |= {"widths": "auto"} if chosen else {}
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
        "standard_error": round(network.standard_error(after, split), 1),
        "params": report.params, "macs": report.macs,
        "seconds": round(report.seconds, 1), "peak_mb": round(report.peak_mb), "threads": torch.get_num_threads(),
    }  # fmt: skip


def parsed(method: str) -> tuple[str, int, bool]:
    """Split METHOD+N+widths into method, number of real inputs (0: none) and whether widths are chosen.

    Raises NeuronMergingError if it is something else.
    """
    name, *extras = method.split("+")
    chosen = "widths" in extras
    numbers = [extra for extra in extras if extra != "widths"]
    if name not in METHODS or len(numbers) > 1 or not all(number.isdigit() for number in numbers):
        raise NeuronMergingError(f"unknown method {method!r}: choose from {', '.join(available())}")
    return name, int(numbers[0]) if numbers else 0, chosen


def available() -> list[str]:
    """Those of VARIANTS whose method there is."""
    return [method for method in VARIANTS if method.partition("+")[0] in METHODS]


@cache
def original(network: str) -> nn.Module:
    """The network as it was trained, loaded once."""
    return NETWORKS[network].load()


@cache
def answers(network: str, split: str) -> np.ndarray:
    """What the original network answers to the inputs of a split."""
    return NETWORKS[network].answered(original(network), split)


def cells(args: argparse.Namespace) -> Iterator[Row]:
    """The cells that a command line asks for."""
    for name in args.networks:
        chosen = [form for form in (*CHANNELS, *NETWORKS[name].parts) if form in args.channels]
        for channels, ratio, method in product(chosen, args.ratios, args.methods):
            yield {
                "network": name, "split": args.split, "channels": channels, "ratio": ratio, "method": method,
                "options": changed(args),
            }  # fmt: skip


def changed(args: argparse.Namespace) -> Row:
    """The options of `shrink` that are not as they are by default."""
    return {name: getattr(args, name) for name, default in OPTIONS.items() if getattr(args, name) != default}


def listed(known: Iterable[str] | None, text: str) -> list[str]:
    """A,B,… → a list, for an `argparse` type. Raises ArgumentTypeError for a name that is not `known`."""
    names = text.split(",")
    wrong = next((name for name in names if known is not None and name not in known), None)
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{wrong!r}: choose from {', '.join(known)}")
    return names


def shares(text: str) -> list[float]:
    """0.1,0.3 → a list, for an `argparse` type."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give shares, such as 0.1,0.3") from None


def parser() -> Parser:
    """The parser of this command."""
    p = Parser(prog="python -m experiments.real", description=main.__doc__)
    forms = [*CHANNELS, *(part for network in NETWORKS.values() for part in network.parts)]
    p.add_argument(
        "--networks",
        type=partial(listed, NETWORKS),
        default=[*NETWORKS],
        metavar="A,B,…",
        help=", ".join(NETWORKS) + " [all]",
    )
    p.add_argument(
        "--methods", type=partial(listed, None), default=available(), metavar="A,B,…",
        help=f"any method, +N with N real inputs, +widths with chosen widths [{','.join(available())}]",
    )  # fmt: skip
    p.add_argument("--ratios", type=shares, default=RATIOS, metavar="R,R,…", help="shares to drop [0.1,0.3,0.5]")
    p.add_argument(
        "--channels", type=partial(listed, forms), default=forms, metavar="A,B,…", help=", ".join(forms) + " [all]"
    )
    p.add_argument(
        "--split", choices=SPLITS, default="report",
        help="half of the inputs: tune to choose settings, report for tables [%(default)s]",
    )  # fmt: skip
    p.add_argument(
        "--rows", type=Path, metavar="FILE",
        help="keep the rows in FILE, and measure what it does not hold [results/real.jsonl for report without other options,"
        " else rows are only printed]",
    )  # fmt: skip
    p.add_argument("--install", action="store_true", help="first let pip install the packages that are missing")
    p.add_argument("--tables", action="store_true", help="measure nothing, make table and figure")
    p.add_argument("--check", action="store_true", help="measure nothing, fail if the table does not match its rows")
    add_flags(p.add_argument_group("of the methods"), ShrinkConfig, list(OPTIONS))
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure methods on trained networks of other people, print each row, make the table and the figure."""
    args = parser().parse_args(argv)
    if args.tables or args.check:
        real_tables.make(VARIANTS, args.check)
        return 0
    for method in args.methods:
        parsed(method)
    needed = list(dict.fromkeys(package for name in args.networks for package in NETWORKS[name].needs))
    if args.install:
        packages.install(needed)
    for package in needed:
        packages.path(package)
    path = args.rows or (PATH if args.split == "report" and not changed(args) else None)
    done = rows.keys(rows.load(path), path, key) if path else set()
    if path:
        check_writable(path)
    for cell in cells(args):
        if key(cell) not in done:
            row = measured(cell)
            print(real_tables.line(row), flush=True)
            if path:
                rows.append(row, path, key)
    if path == PATH:
        real_tables.make(VARIANTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
