"""What both command lines share: the paper's (main.py) and `neuron-merging` for the user's own network (cli.py)."""

import argparse
import json
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from neuron_merging.benchmark import compare, table
from neuron_merging.config import CHOSEN_WIDTHS
from neuron_merging.errors import NeuronMergingError, exit_code, missing, reported_as
from neuron_merging.export import EXPORTS, ONNX, export
from neuron_merging.files import check_writable, write_text
from neuron_merging.ratios import meant

Row = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """argparse, but its complaints are one line, like all other errors here."""

    def error(self, message: str) -> NoReturn:
        """Raises NeuronMergingError for a wrong command line."""
        raise NeuronMergingError(f"{message}; {self.prog} --help lists the options")


def add_result_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that say what to do with the smaller network."""
    group.add_argument("--evaluate", action="store_true", help="measure the accuracy; train nothing")
    group.add_argument("--save", type=Path, metavar="FILE", help="write the resulting network, to load it again")
    group.add_argument(
        "--summary",
        action="store_true",
        help="only list what can be pruned, how much the method would leave, and why the rest stays",
    )
    group.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the result as .onnx, .pt2 (torch.export) or .pt (TorchScript)",
    )
    group.add_argument(
        "--benchmark", action="store_true", help="measure latency, throughput and memory of original and result"
    )
    group.add_argument("--json", metavar="FILE|-", help="write the result as one JSON object (- is standard output)")


def add_machine_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags that say where to compute."""
    group.add_argument(
        "--test-batch-size",
        type=int,
        metavar="B",
        help="images per batch when measuring [64 for a folder of images and for convolutions on a CPU, else 1000]",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    group.add_argument("--no-cuda", action="store_true", help="the same as --device cpu")


def check_shared(args: argparse.Namespace) -> None:
    """Raises NeuronMergingError for flags of both command lines that make no sense."""
    if isinstance(args.ratio, float) and not 0 <= args.ratio < 1:
        raise NeuronMergingError(f"--pruning-ratio {args.ratio} is outside [0, 1){meant(args.ratio)}")
    if args.test_batch_size is not None and args.test_batch_size < 1:
        raise NeuronMergingError(f"--test-batch-size {args.test_batch_size} has to be at least 1")
    if not 0 <= args.seed < 2**32:
        raise NeuronMergingError(f"--seed {args.seed} has to be in [0, 2**32)")
    if args.multiple > 1 and not isinstance(args.widths, str):
        raise NeuronMergingError(
            "--multiple is for widths that a ratio or a budget gives: a list of --widths is taken as it is"
        )
    if args.compensation == "original":
        flags = ("budget", "calibrate", "drop_blocks", *(() if args.summary else ("ratios", "ignore", "coupled")))
        useless = next((name.replace("_", "-") for name in flags if getattr(args, name, None)), None)
        useless = f"widths {args.widths}" if args.summary and args.widths in CHOSEN_WIDTHS else useless
        if useless:
            raise NeuronMergingError(f"--{useless} says how to make a network smaller: give --model-type too")
    if args.summary:
        flags = ("evaluate", "retrain", "resume", "save", "export", "benchmark", "append")
        useless = next((name for name in flags if getattr(args, name, None)), None)
        if useless:
            raise NeuronMergingError(f"--{useless} is for results, and --summary has none: leave one of them out")
    if args.export and args.export.suffix not in EXPORTS:
        raise NeuronMergingError(f"--export {args.export}: name a file that ends in {', '.join(EXPORTS)}")
    for name in ONNX if args.export and args.export.suffix == ".onnx" else ():
        if find_spec(name) is None:  # an error now, before anything is measured
            raise NeuronMergingError(f"--export {args.export}: {missing(name)}")
    append = getattr(args, "append", None)
    files = [args.save, append, args.export, None if args.json in (None, "-") else Path(args.json)]
    files = [path for path in files if path is not None]
    for path in files:
        check_writable(path)
    if len({path.resolve() for path in files}) < len(files):
        raise NeuronMergingError("--save, --append, --export and --json are to be different files")


def warn_of_nothing(args: argparse.Namespace, no_method: bool) -> None:
    """Warn that nothing is dropped if the command line says how much to drop, but not by which method."""
    if no_method and not args.summary and (args.ratio is not None or args.widths not in ("published", "uniform")):
        print("warning: nothing is dropped: without --model-type a network stays as it is", file=sys.stderr)


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises NeuronMergingError for a device that this machine does not have.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if name not in available:
        raise NeuronMergingError(f"unknown --device {name!r}: choose one of {', '.join(available)}")
    if not available[name]:
        raise NeuronMergingError(f"--device {name}: PyTorch sees no such device on this machine; use --device cpu")
    return torch.device(name)


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on a device that can decompose it: `device`, or the CPU if that is MPS, which has no float64."""
    return model if device.type == "mps" else model.to(device)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result can depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "torchvision", "numpy")}}


def description(row: Row, names: Sequence[str]) -> Row:
    """What a saved file says of itself: the entries `names` of its row, as far as they are known, and the command."""
    prog = Path(sys.argv[0]).name
    command = shlex.join([*(["python", "main.py"] if prog != "neuron-merging" else [prog]), *sys.argv[1:]])
    return {name: row[name] for name in names if row.get(name) is not None} | {"command": command}


def exports_and_speed(args: argparse.Namespace, model: nn.Module, small: nn.Module, shape: tuple[int, ...]) -> Row:
    """Export the smaller network and compare its speed with `model`'s, if the command line asks for it."""
    results: Row = {}
    if args.export:
        results |= {"export": str(args.export), "export_error": export(small, args.export, shape)}
    if args.benchmark:
        with reported_as("--benchmark: the networks do not run on one input and on a batch of them"):
            results["benchmark"] = compare({"original": model, "smaller": small}, shape)
    return results


def exports_for_people(row: Row) -> list[str]:
    """The results of `exports_and_speed`, as lines of text."""
    lines = []
    if row.get("export"):
        lines.append(f"exported {row['export']}, outputs off by at most {row['export_error']:.1e}")
    if row.get("benchmark"):
        lines.append(table(row["benchmark"]))
    return lines


def print_result(args: argparse.Namespace, row: Row, text: str) -> None:
    """Print a row for people, and write it as JSON if the command line asks for it."""
    json_line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        if args.json not in (None, "-"):
            write_text(Path(args.json), json_line)
    finally:  # print the result even if the disk is full
        print(text, file=sys.stderr if args.json == "-" else sys.stdout, flush=True)
    if args.json == "-":
        if sys.stdout is None:
            raise NeuronMergingError("--json -: standard output is closed")
        print(json_line, end="", flush=True)


def run_command(work: Callable[[], int], prog: str) -> int:
    """Run one command line. Returns 0, or 2 after one line on stderr that says what is wrong, or 130 after Ctrl-C."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters is no reason to fail
    return exit_code(work, f"{prog}: ")


def measured(run: Callable[[], tuple[Row, Callable[[], Row]]], report: Callable[[Row], None]) -> int:
    """Run a command and report its row, even if an export or a comparison fails afterwards."""
    row, rest = run()
    try:
        row |= rest()
    finally:
        report(row)
    return 0
