"""The command line: its flags, and what can be said of them before PyTorch is there."""

import argparse
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import NoReturn

import settings
from errors import NeuronMergingError
from experiments import rows
from files import check_writable

RATIO = 0.5  # where the command line says none


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in the one line that every other one has."""

    def error(self, message: str) -> NoReturn:
        """A wrong command line. Raises NeuronMergingError."""
        raise NeuronMergingError(f"{message}; {self.prog} --help lists the options")


def depth_wide(text: str) -> tuple[int, ...]:
    """56, or 40,4, or [40,4] → a tuple of numbers; () for nothing."""
    try:
        return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a depth nor depth,width") from None


def widths(text: str) -> str | tuple[int, ...]:
    """published, uniform, auto, quick, or kept widths with commas between."""
    if text in ("published", "uniform", *settings.CHOSEN_WIDTHS):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither published, uniform, auto, quick nor numbers with commas between"
        ) from None


def shape(text: str) -> tuple[int, ...]:
    """3,224,224 → a tuple of numbers above 0."""
    try:
        sides = tuple(int(part) for part in text.split(","))
    except ValueError:
        sides = ()
    if not sides or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, such as 3,224,224")
    return sides


def ratios(text: str) -> dict[str, float]:
    """layer1.*=0.3,layer4.*=0.6 → by layer name or glob the share to drop."""
    try:
        return settings.by_name(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a share for every layer, such as 'layer1.*=0.3'") from None


def parser() -> Parser:
    """All flags: the published ones keep their names and meanings."""
    p = Parser(
        prog="main.py",
        description="Neuron Merging: train a network, make it smaller without data, measure what is left.",
        allow_abbrev=False,
    )
    network = p.add_argument_group("network and data")
    network.add_argument("--arch", default="LeNet_300_100", help=f"one of {', '.join(settings.NETWORKS)}")
    network.add_argument(
        "--depth-wide", type=depth_wide, metavar="D[,W]", help="56, or 40,4 for a WideResNet [the published one]"
    )
    network.add_argument(
        "--dataset",
        help="FashionMNIST, cifar10, cifar100 or, with --model, imagefolder:DIR [FashionMNIST for LeNet, cifar10 elsewhere]",
    )
    network.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the data sets [$NEURON_MERGING_DATA, or data]"
    )
    network.add_argument(
        "--split",
        default="test",
        help="images to measure on: test, or val, 5,000 training images that training then leaves out [%(default)s]",
    )
    network.add_argument(
        "--pretrained", type=Path, metavar="FILE", help="checkpoint to start from [the published name in pretrained/]"
    )
    own = p.add_argument_group("a network of your own, instead of --arch")
    own.add_argument(
        "--model",
        metavar="MODULE:NAME",
        help="a callable that makes it, such as torchvision.models:resnet18; this imports and runs that code",
    )
    own.add_argument("--model-args", metavar="JSON", help="its keyword arguments, such as '{\"num_classes\": 10}'")
    own.add_argument(
        "--weights",
        metavar="FILE",
        help="its state_dict, or a file that --save wrote, or the name of torchvision's weights",
    )
    own.add_argument("--input-size", type=shape, metavar="C,H,W", help="the shape of one input, such as 3,224,224")
    own.add_argument(
        "--ratios",
        type=ratios,
        metavar="NAME=R,…",
        help="by layer name or glob, others stay whole, instead of --pruning-ratio",
    )
    own.add_argument("--ignore", metavar="NAME,…", help="layer names or globs that stay whole")
    method = p.add_argument_group("method")
    method.add_argument(
        "--model-type",
        help="original; prune, merge (the published form), merge-derived; restore (ours); lbyl, fold (others');"
        " prune-bn, merge-bn (BatchNorm measured anew on real images) [original]",
    )
    method.add_argument(
        "--criterion",
        default="l1-norm",
        help="which neurons stay: l1-norm, l2-norm, l2-GM, or auto (ours: those that explain most) [%(default)s]",
    )
    method.add_argument(
        "--pruning-ratio",
        type=float,
        metavar="R",
        help=f"share of neurons to drop, in [0, 1) [{RATIO}]",
    )
    method.add_argument(
        "--widths",
        type=widths,
        default="published",
        metavar="W",
        help="published (VGG-16: its fixed list, else uniform), uniform (the ratio in every unit), N,N,… for every unit, or"
        " auto (ours: chosen for as many parameters and MACs), quick (a cheaper choice) [%(default)s]",
    )
    method.add_argument(
        "--budget",
        metavar="B",
        help="auto, quick: shares to keep, params=0.5 or macs=0.4 or both with a comma between [what the ratio leaves]",
    )
    method.add_argument(
        "--multiple", type=int, default=1, metavar="N", help="make widths multiples of N, such as 8 [%(default)s]"
    )
    method.add_argument(
        "--drop-blocks", action="store_true", help="auto, quick: whole residual blocks may be left out (ours)"
    )
    method.add_argument(
        "--threshold", type=float, metavar="T", help="least cosine similarity to merge [the published one]"
    )
    method.add_argument(
        "--lamda",
        "--lambda",
        type=float,
        metavar="L",
        help="weight of cosine against bias distance [the published one]",
    )
    method.add_argument(
        "--coupled",
        action="store_true",
        help="also drop channels that several layers share, such as residual streams (ours)",
    )
    method.add_argument(
        "--probe",
        default="auto",
        help="made-up inputs for restore and the choice of widths or neurons: leaves (images), pink or white (noise), or auto: "
        "leaves for convolutions with BatchNorm, else white [%(default)s]",
    )
    method.add_argument(
        "--probe-samples",
        type=int,
        metavar="N",
        help="how many of them [256, or 4096 rows where the first layer is linear]",
    )
    method.add_argument(
        "--ridge",
        type=float,
        default=settings.RIDGE,
        metavar="L",
        help="ridge λ of restore and of the choice [%(default)s]",
    )
    method.add_argument(
        "--calibrate",
        metavar="WHAT",
        help="let restore, prune-bn, merge-bn or the choice look at real images: a folder or, with --arch, DATASET:N",
    )
    method.add_argument("--target", help=argparse.SUPPRESS)  # conv or ip: found by tracing now
    work = p.add_argument_group(
        "what to do (without --evaluate or --retrain: train the original, fine-tune what was pruned)"
    )
    work.add_argument("--evaluate", action="store_true", help="measure on the test set; train nothing")
    work.add_argument("--retrain", action="store_true", help="fine-tune the checkpoint, or what the type leaves of it")
    work.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="write the resulting network, reloadable by --pretrained [training: saves/]",
    )
    work.add_argument(
        "--summary",
        action="store_true",
        help="only list what can be pruned, how much the method would leave, and why the rest stays",
    )
    work.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the result as .onnx, .pt2 (torch.export) or .pt (TorchScript)",
    )
    work.add_argument(
        "--benchmark", action="store_true", help="measure latency, throughput and memory of original and result"
    )
    work.add_argument("--json", metavar="FILE|-", help="write the result as one JSON object (- is standard output)")
    work.add_argument(
        "--append", type=Path, metavar="FILE", help="add the result as a line to FILE (results/rows.jsonl)"
    )
    training = p.add_argument_group("training")
    training.add_argument(
        "--recipe",
        default="published",
        help="published (the paper's steps) or fast (one cycle, few epochs) [%(default)s]",
    )
    training.add_argument("--epochs", type=int, help="[the recipe's, as all below]")
    training.add_argument("--batch-size", type=int)
    training.add_argument("--lr", type=float)
    training.add_argument("--momentum", type=float)
    training.add_argument("--weight-decay", type=float)
    training.add_argument("--norm-decay", type=float, metavar="D", help="weight decay of BatchNorm and biases")
    training.add_argument("--cutout", type=int, metavar="PIXELS", help="hide a square of this side in every image [0]")
    training.add_argument(
        "--schedule", type=int, nargs="+", metavar="EPOCH", help="epochs at which the rate is multiplied by --gammas"
    )
    training.add_argument("--gammas", type=float, nargs="+", metavar="G")
    training.add_argument(
        "--resume", action="store_true", help="go on with an interrupted training: same options, same result"
    )
    training.add_argument("--compile", action="store_true", help="train with torch.compile")
    training.add_argument(
        "--log-interval", type=int, default=0, metavar="N", help="also print the loss every N batches"
    )
    machine = p.add_argument_group("machine")
    machine.add_argument(
        "--test-batch-size",
        type=int,
        metavar="B",
        help="[64 for a folder of images and for convolutions on a CPU, else 1000]",
    )
    machine.add_argument("--seed", type=int, default=1, help="of training, made-up inputs and fold [%(default)s]")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    machine.add_argument("--no-cuda", action="store_true", help="the same as --device cpu")
    return p


def thins(args: argparse.Namespace) -> bool:
    """Whether the command line says how many neurons stay: it names a method, a ratio or widths, and leaves no choice."""
    told = args.pruning_ratio is not None or args.ratios or not isinstance(args.widths, str)
    return bool(told or args.model_type != "original") and args.widths not in settings.CHOSEN_WIDTHS


def from_scratch(args: argparse.Namespace) -> bool:
    """Whether training would start from random weights, not from a checkpoint."""
    return args.model_type in (None, "original") and args.pretrained is None and not args.retrain


def recipe(args: argparse.Namespace) -> settings.Recipe:
    """The network's recipe with what the command line says instead. Raises NeuronMergingError for senseless numbers."""
    chosen = settings.recipe(args.arch, args.recipe)
    if not from_scratch(args):
        chosen = replace(chosen, sizes=())  # what is trained already needs no small images first
    for name in vars(chosen):  # of which some are no options
        value = getattr(args, name, None)
        if value is not None:
            chosen = replace(chosen, **{name: tuple(value) if isinstance(value, list) else value})
    if chosen.one_cycle and (args.schedule or args.gammas):
        raise NeuronMergingError("--schedule and --gammas belong to --recipe published: the fast one is a single cycle")
    if len(chosen.schedule) != len(chosen.gammas):
        raise NeuronMergingError(
            f"--schedule has {len(chosen.schedule)} epochs, --gammas {len(chosen.gammas)}: give one for each"
        )
    bounds = {
        "--epochs has to be at least 1": chosen.epochs >= 1,
        "--batch-size has to be at least 2": chosen.batch_size >= 2,
        "--lr has to be above 0": 0 < chosen.lr < inf,
        "--momentum has to be in [0, 1), above 0 in the fast recipe": (chosen.momentum > 0 or not chosen.nesterov)
        and 0 <= chosen.momentum < 1,
        "--weight-decay cannot be negative": 0 <= chosen.weight_decay < inf,
        "--norm-decay cannot be negative": 0 <= (chosen.norm_decay or 0) < inf,
        "--cutout cannot be negative": chosen.cutout >= 0,
        "--schedule is made of epochs, none negative": min(chosen.schedule, default=0) >= 0,
        "--gammas are factors above 0": all(0 < gamma < inf for gamma in chosen.gammas),
    }
    for problem, fine in bounds.items():
        if not fine:
            raise NeuronMergingError(problem)
    return chosen


def check(args: argparse.Namespace) -> None:
    """What can be said of the command line before PyTorch is there. Raises NeuronMergingError."""
    if args.arch not in settings.NETWORKS:
        raise NeuronMergingError(f"unknown network {args.arch!r}: choose one of {', '.join(settings.NETWORKS)}")
    if args.model == "":
        raise NeuronMergingError("--model names nothing: give module:callable, such as torchvision.models:resnet18")
    silent = args.model_type is None
    args.model_type = args.model_type or "original"
    args.thins, told_ratio = thins(args), args.pruning_ratio is not None
    args.pruning_ratio = RATIO if args.pruning_ratio is None else args.pruning_ratio
    if not 0 <= args.pruning_ratio < 1:
        raise NeuronMergingError(f"--pruning-ratio {args.pruning_ratio} is outside [0, 1)")
    if (
        (args.test_batch_size is not None and args.test_batch_size < 1)
        or args.log_interval < 0
        or not 0 <= args.seed < 2**32
    ):
        raise NeuronMergingError(
            "--test-batch-size has to be at least 1, --log-interval at least 0, --seed in [0, 2**32)"
        )
    if args.split not in ("test", "val"):
        raise NeuronMergingError(f"unknown --split {args.split!r}: choose test or val")
    if args.export and args.export.suffix not in settings.EXPORTS:
        raise NeuronMergingError(f"--export {args.export}: name a file that ends in {', '.join(settings.EXPORTS)}")
    missing = [name for name in settings.ONNX if find_spec(name) is None] if args.export else []
    if missing and args.export.suffix == ".onnx":  # said before anything is measured
        raise NeuronMergingError(f"--export {args.export} needs more packages: pip install {' '.join(missing)}")
    recipe(args)
    args.data = args.data or settings.data_folder()
    if not args.model:
        args.dataset = args.dataset or ("FashionMNIST" if args.arch == "LeNet_300_100" else "cifar10")
    if args.model and not (args.summary or args.evaluate or args.save or args.export or args.benchmark or args.json):
        raise NeuronMergingError(
            "say what to do with --model: --summary, --evaluate, --save, --export, --benchmark or --json -"
        )
    if args.model and args.append:
        raise NeuronMergingError("--append is for the rows of --arch: with --model write --json FILE")
    if args.ratios and not isinstance(args.widths, str):
        raise NeuronMergingError("--ratios and a list of --widths both say what is kept: give one of them")
    if args.ratios and (told_ratio or args.budget):
        raise NeuronMergingError("--ratios stands instead of --pruning-ratio and --budget: give one of them")
    if args.multiple > 1 and not isinstance(args.widths, str):
        raise NeuronMergingError(
            "--multiple is for widths that a ratio or a budget leaves: a list of --widths is as it is"
        )
    if not args.model and not args.evaluate and (args.export or args.benchmark):
        raise NeuronMergingError("--export and --benchmark need --evaluate: without it, --arch trains")
    if args.evaluate and (args.retrain or args.resume or args.compile):
        raise NeuronMergingError("--evaluate trains nothing: leave it out, or --retrain, --resume and --compile")
    if args.model_type == "original" and not args.summary:
        told = ("ratios", "ignore", "budget", "calibrate", "drop_blocks", "coupled")
        useless = next((name.replace("_", "-") for name in told if getattr(args, name)), None)
        if useless:
            raise NeuronMergingError(f"--{useless} says how to make a network smaller: give --model-type too")
    if args.model and args.input_size is None and not args.summary:
        raise NeuronMergingError("--model needs --input-size, the shape of one input, such as 3,224,224")
    if not args.model and (args.model_args or args.weights or args.input_size or args.ratios or args.ignore):
        raise NeuronMergingError("--model-args, --weights, --input-size, --ratios and --ignore belong to --model")
    if args.model and (args.retrain or args.pretrained or args.resume):
        raise NeuronMergingError("--pretrained, --retrain and --resume are for --arch: with --model give --weights")
    if args.summary:
        told = ("save", "export", "benchmark", "append")
        useless = next((name for name in told if getattr(args, name)), None)
        if useless:
            raise NeuronMergingError(f"--{useless} is for results, and --summary has none: leave one of them out")
    written = [args.save, args.append, args.export, None if args.json in (None, "-") else Path(args.json)]
    written = [path for path in written if path is not None]
    for path in written:
        check_writable(path)
    if len({path.resolve() for path in written}) < len(written):
        raise NeuronMergingError("--save, --append, --export and --json are to be different files")
    if args.append:
        rows.keys(rows.load(args.append), args.append)  # what it holds has to be rows
        if args.append.exists() and not os.access(args.append, os.W_OK):
            raise NeuronMergingError(f"cannot write {args.append}: check its permission")
    if silent and not args.summary and (args.thins or args.widths in settings.CHOSEN_WIDTHS):
        print("warning: nothing is dropped: without --model-type a network stays as it is", file=sys.stderr)
