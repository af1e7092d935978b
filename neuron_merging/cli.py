"""The command `neuron-merging`: imports a network of the user's, makes it smaller, measures it and saves it.

neuron-merging --model torchvision.models:resnet18 --input-size 3,224,224 --model-type restore --pruning-ratio 0.3 --benchmark
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from neuron_merging import memory
from neuron_merging.accuracy import count_correct
from neuron_merging.checkpoint import Checkpoint, save_checkpoint
from neuron_merging.checks import check_copies, check_weights, network_macs, without_masks
from neuron_merging.commandline import (
    Parser,
    Row,
    add_machine_flags,
    add_result_flags,
    check_shared,
    choose_device,
    description,
    exports_and_speed,
    exports_for_people,
    measured,
    placed,
    print_result,
    run_command,
    versions,
    warn_of_nothing,
)
from neuron_merging.config import ShrinkConfig, add_flags, numbers, numbers_by_name, shares_text
from neuron_merging.counting import count_parameters
from neuron_merging.errors import NeuronMergingError, reported_as
from neuron_merging.images import Labelled, image_folder, loader, pictures, transforms
from neuron_merging.loading import build_model, origin, with_weights
from neuron_merging.running import dtype
from neuron_merging.shrink import shrink, summarize

Datasets = Callable[[argparse.Namespace, torch.device], Labelled | None]
"""Opens the data set that --dataset names; gives None for a name that it does not know."""

SAVED = ("type", "criterion", "ratio", "budget", "widths", "input_size")  # entries of a row that --save writes too


def shape(text: str) -> tuple[int, ...]:
    """3,224,224 → a tuple of numbers above 0."""
    try:
        sides = tuple(int(part) for part in text.split(","))
    except ValueError:
        sides = ()
    if not sides or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, such as 3,224,224")
    return sides


def parser(prog: str = "neuron-merging") -> Parser:
    """The parser with all flags of the command."""
    p = Parser(
        prog=prog, description="Make a trained network smaller, without data and without training.", allow_abbrev=False
    )
    network = p.add_argument_group("network and data")
    network.add_argument(
        "--model",
        required=True,
        metavar="MODULE:NAME",
        help="a callable that makes the network, such as torchvision.models:resnet18; this imports and runs that code",
    )
    network.add_argument(
        "--model-args", metavar="JSON", help="keyword arguments of that callable, such as '{\"num_classes\": 10}'"
    )
    network.add_argument(
        "--weights",
        metavar="FILE",
        help="the network's state_dict, or a file that --save wrote, or the name of torchvision's weights",
    )
    network.add_argument("--input-size", type=shape, metavar="C,H,W", help="the shape of one input, such as 3,224,224")
    network.add_argument("--dataset", metavar="imagefolder:DIR", help="labelled images to measure on, with --evaluate")
    network.add_argument(
        "--data", type=Path, metavar="DIR", help="main.py: folder of its data sets [$NEURON_MERGING_DATA, or data]"
    )
    network.add_argument(
        "--evaluate-with",
        metavar="MODULE:NAME",
        help="instead of --dataset: a callable that gives batches (inputs, labels) to measure on, as your test loader does",
    )
    for name, what in (("mean", "means"), ("std", "standard deviations")):
        network.add_argument(
            f"--{name}",
            type=numbers,
            metavar="X,…",
            help=f"{what} of the channels, for normalising images in [0, 1] [torchvision's, or the data set's]",
        )
    network.add_argument(
        "--split", default="test", help="main.py: the part of its data sets to measure on [%(default)s]"
    )
    method = p.add_argument_group("method")
    add_flags(method, ShrinkConfig)
    method.add_argument(
        "--ratios",
        type=numbers_by_name,
        metavar="NAME=R,…",
        help="instead of --pruning-ratio: a share for each layer name or glob; other layers stay whole",
    )
    method.add_argument(
        "--calibrate",
        metavar="DIR",
        help="real images for restore, prune-bn, merge-bn and the choice of widths: a folder, or DIR:N for N of them",
    )
    p.set_defaults(compensation=None, criterion="l1-norm", ratio=None, widths="uniform")
    add_result_flags(p.add_argument_group("what to do"))
    add_machine_flags(p.add_argument_group("machine"))
    return p


def check(args: argparse.Namespace) -> None:
    """Raises NeuronMergingError for a command line that makes no sense, before any network is made."""
    no_method = args.compensation is None
    args.compensation = args.compensation or "original"
    args.widths = "uniform" if args.widths == "published" else args.widths
    args.evaluate = args.evaluate or bool(args.evaluate_with)
    if not args.model:
        raise NeuronMergingError("--model names nothing: give module:callable, such as torchvision.models:resnet18")
    if not (args.summary or args.evaluate or args.save or args.export or args.benchmark or args.json):
        raise NeuronMergingError(
            "say what to do with --model: --summary, --evaluate, --save, --export, --benchmark or --json -"
        )
    if args.ratios and not isinstance(args.widths, str):
        raise NeuronMergingError("--ratios and a list of --widths both say what is kept: give one of them")
    if args.ratios and (args.ratio is not None or args.budget):
        raise NeuronMergingError("--ratios stands instead of --pruning-ratio and --budget: give one of them")
    if args.input_size is None and not args.summary:
        raise NeuronMergingError("--model needs --input-size, the shape of one input, such as 3,224,224")
    _check_data(args)
    check_shared(args)
    warn_of_nothing(args, no_method)


def _check_data(args: argparse.Namespace) -> None:
    """Raises NeuronMergingError for flags about the data to measure on that make no sense together."""
    if args.dataset and args.evaluate_with:
        raise NeuronMergingError("--dataset and --evaluate-with both say what to measure on: give one of them")
    if args.evaluate and not (args.dataset or args.evaluate_with):
        raise NeuronMergingError(
            "--evaluate needs labelled images: give --dataset imagefolder:DIR, or --evaluate-with MODULE:NAME for a loader"
        )
    if args.dataset and not args.evaluate:
        raise NeuronMergingError("--dataset is to measure on: give --evaluate too")
    if (args.mean is None) != (args.std is None):
        raise NeuronMergingError("--mean and --std go together: give both")
    if args.mean is None:
        return
    if not (args.dataset or args.calibrate):
        raise NeuronMergingError("--mean and --std are for the images of --dataset and --calibrate: give one of these")
    if args.input_size and not len(args.mean) == len(args.std) == args.input_size[0]:
        raise NeuronMergingError(
            f"--mean and --std: give {args.input_size[0]} numbers each, as many as there are channels"
        )
    if not all(math.isfinite(x) for x in args.mean + args.std) or min(args.std) <= 0:
        raise NeuronMergingError("--mean and --std: give finite numbers, those of --std above 0")


def config_of(args: argparse.Namespace) -> ShrinkConfig:
    """The config that the flags describe; a list of --widths becomes its ratio."""
    listed = not isinstance(args.widths, str)
    ratio = args.widths if listed else args.ratios or (0.5 if args.ratio is None else args.ratio)
    return ShrinkConfig.from_flags(args, ratio=ratio, widths="uniform" if listed else args.widths)


def run(args: argparse.Namespace, datasets: Datasets) -> tuple[Row, Callable[[], Row]]:
    """Do what the checked command line says. Returns the result row, and a function that exports and compares speeds.

    That function gives the rest of the row.
    """
    config, device = config_of(args), choose_device("cpu" if args.no_cuda else args.device)
    memory.keep_freed()
    model = build_model(args.model, args.model_args)
    checkpoint = with_weights(model, args.model, args.weights)
    model = without_masks(model)
    if args.summary:
        return {"summary": _summary(args, config, model, checkpoint)}, dict
    if args.weights is None:
        print("warning: no --weights: the network is as its code makes it", file=sys.stderr)
    if args.compensation != "original":
        check_weights(model)
    model = placed(model, device).eval()
    check_copies(model)
    macs = network_macs(model, args.input_size)  # raises if the network does not run
    began = args.weights if checkpoint is None else origin(checkpoint)
    labelled = _labelled(args, began, device, datasets) if args.evaluate else None  # now, since it may be missing
    small, row = model, {
        "model": args.model, "weights": args.weights, "checkpoint_sha256": checkpoint and checkpoint.sha256,
        "type": args.compensation, **(checkpoint.history(SAVED) if checkpoint else {}),
        "input_size": list(args.input_size), "device": str(device), "versions": versions(),
        "params": count_parameters(model), "macs": macs,
    }  # fmt: skip
    if args.compensation != "original":
        small, report = shrink(model, example_input=args.input_size, images=_images(args, began), config=config)
        row |= {"type": args.compensation} | _shrunk_row(args, config) | {
            "widths": {unit.layer: kept for unit, kept in zip(report.units, report.widths)},
            "left_out": report.left_out, "params_original": report.params[0], "params": report.params[1],
            "macs_original": report.macs[0], "macs": report.macs[1], "seconds": round(report.seconds, 4),
            "seconds_widths": report.seconds_widths and round(report.seconds_widths, 4),
            "peak_mb": report.peak_mb, "report": str(report),
        }  # fmt: skip
    model, small = model.to(device), small.to(device)
    if labelled:
        networks = {"smaller": small} | ({} if small is model else {"original": model})
        row |= _measure(args, networks, labelled)
    if args.save:
        known = description(row, SAVED) | ({"weights": began} if began else {})
        save_checkpoint(args.save, small, math.inf, network=args.model, **known)
    if args.benchmark and small is model:  # the file may hold a smaller network already: compare with the original
        model = build_model(args.model, args.model_args).eval().to(device)
    return row, partial(exports_and_speed, args, model, small, args.input_size)


def _images(args: argparse.Namespace, began: str | None) -> Tensor | None:
    """The images that --calibrate names. began: torchvision's name for the weights that the network started from."""
    if not args.calibrate:
        return None
    return pictures(args.calibrate, transforms(args.model, began, args.input_size, _scale(args)), args.seed)


def _scale(args: argparse.Namespace) -> tuple[Sequence[float], Sequence[float]] | None:
    return args.mean and (args.mean, args.std)


def _summary(args: argparse.Namespace, config: ShrinkConfig, model: nn.Module, checkpoint: Checkpoint | None) -> str:
    says_how_much = args.ratio is not None or args.ratios or not isinstance(args.widths, str)
    thins = says_how_much or args.compensation != "original"
    began = args.weights if checkpoint is None else origin(checkpoint)
    return summarize(
        model.eval(), config.ratio if thins else None, compensation=args.compensation, example_input=args.input_size,
        images=_images(args, began) if config.chooses else None, config=config,
    )  # fmt: skip


def _shrunk_row(args: argparse.Namespace, config: ShrinkConfig) -> Row:
    """The options of a run, as entries of its row."""
    listed = not isinstance(args.widths, str)
    names = ("multiple", "drop_blocks", "coupled", "threshold", "lamda", "probe", "probe_samples", "ridge", "seed")
    return {
        "criterion": config.criterion, "ratio": None if listed or config.budget else config.ratio,
        "widths_rule": "given" if listed else config.widths, "budget": shares_text(config.budget),
        "ignore": list(config.ignore), "calibrate": args.calibrate, **{name: getattr(config, name) for name in names},
    }  # fmt: skip


def _labelled(args: argparse.Namespace, began: str | None, device: torch.device, datasets: Datasets) -> Labelled:
    """The labelled inputs that --dataset or --evaluate-with names. began: as in `_images`."""
    if args.evaluate_with:
        return loader(args.evaluate_with, device)
    name, _, folder = args.dataset.partition(":")
    if name == "imagefolder":
        transform = transforms(args.model, began, args.input_size, _scale(args))
        return image_folder(folder, transform, device, args.test_batch_size)
    labelled = datasets(args, device)
    if labelled is None:
        raise NeuronMergingError(
            f"--dataset {args.dataset} is not known: give imagefolder:DIR, or --evaluate-with MODULE:NAME"
        )
    return labelled


def _measure(args: argparse.Namespace, networks: dict[str, nn.Module], labelled: Labelled) -> Row:
    """The accuracies of the networks, as entries of a row. Raises NeuronMergingError if their classes do not fit the labels."""
    counts, where = {}, f"--dataset {args.dataset}" if args.dataset else labelled.named
    with reported_as(f"{args.model} does not fit {where}", typed=True):
        for name, model in networks.items():
            outputs = _outputs(model, args.input_size, labelled)
            batches = _within(outputs, labelled.batches(), where)
            counts[name] = count_correct(model, batches, labelled.number)
    rates = {name: round(100 * correct / max(1, total), 2) for name, (correct, total) in counts.items()}
    return {
        "dataset": args.dataset, "accuracy_original": rates.get("original"), "accuracy": rates["smaller"],
        "correct": counts["smaller"][0], "total": counts["smaller"][1], **labelled.about,
    }  # fmt: skip


@torch.inference_mode()
def _outputs(model: nn.Module, shape: tuple[int, ...], labelled: Labelled) -> int:
    """How many classes a network tells apart. Raises NeuronMergingError if the data set has another number of them."""
    device = next(model.parameters()).device
    outputs = model.eval()(torch.zeros(1, *shape, dtype=dtype(model), device=device)).shape[1]
    if labelled.classes not in (None, outputs):
        raise NeuronMergingError(
            f"--dataset {labelled.named}, the network {outputs} outputs: they have to be as many, in the same order"
        )
    return outputs


def _within(outputs: int, batches: Iterable[tuple[Tensor, Tensor]], named: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches. Raises NeuronMergingError for a label that the network has no output for."""
    for x, labels in batches:
        low, high = map(int, labels.aminmax()) if len(labels) else (0, 0)
        if low < 0 or high >= outputs:
            raise NeuronMergingError(
                f"{named} gives labels from {low} to {high}, the network has outputs 0 to {outputs - 1}"
            )
        yield x, labels


def for_people(row: Row) -> str:
    """A row as text."""
    if "summary" in row:
        return row["summary"]
    before = "" if row["type"] == "original" or "report" in row else f", as {row['weights']} has it"
    lines = [f"{row['model']}: {row['type']}{before}"]
    if "report" in row:
        lines.append(row["report"])
    if "accuracy" in row:
        before = "" if row["accuracy_original"] is None else f"{row['accuracy_original']:.2f} % -> "
        lines.append(f"accuracy    {before}{row['accuracy']:.2f} % of {row['total']:,}")
    if "transforms" in row:
        lines.append(f"images      {row['transforms']}")
    return "\n".join([*lines, *exports_for_people(row)])


def main(
    argv: Sequence[str] | None = None, prog: str = "neuron-merging", datasets: Datasets = lambda args, device: None
) -> int:
    """Run one command line. Returns 0, or 2 after one line on stderr that says what is wrong, or 130 after Ctrl-C.

    datasets: opens data sets by name, other than folders of images.
    """

    def work() -> int:
        args = parser(prog).parse_args(argv)
        check(args)
        return measured(lambda: run(args, datasets), lambda row: print_result(args, row, for_people(row)))

    return run_command(work, prog)
