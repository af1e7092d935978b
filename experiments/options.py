"""The flags of the published command line (main.py), and checks of them."""

import argparse
import os
from dataclasses import fields, replace
from math import inf
from pathlib import Path
from typing import Any

from experiments import rows, settings
from experiments.experiment import Experiment
from experiments.settings import Recipe
from neuron_merging.commandline import Parser, add_machine_flags, add_result_flags, check_shared, warn_of_nothing
from neuron_merging.config import add_flags
from neuron_merging.errors import NeuronMergingError

NETWORK = ("arch", "depth_wide", "dataset", "pretrained")
PUBLISHED_FOLDER = "saved_models"  # the folder in which the authors' scripts look for checkpoints


def parser() -> Parser:
    """The parser with all flags. The published ones keep their names and meanings."""
    p = Parser(
        prog="main.py",
        description="Neuron Merging: train a network, make it smaller without data, measure what is left."
        " With --model MODULE:NAME instead of --arch: a network of your own (main.py --model NAME --help lists its flags).",
        allow_abbrev=False,
    )
    network = p.add_argument_group("network and data")
    add_flags(network, Experiment, NETWORK)
    network.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the data sets [$NEURON_MERGING_DATA, or data]"
    )
    network.add_argument(
        "--split",
        default="test",
        choices=("test", "val"),
        help="images to measure on: test, or val, 5,000 training images that training then leaves out [%(default)s]",
    )
    method = p.add_argument_group("method")
    add_flags(method, Experiment, [f.name for f in fields(Experiment) if f.init and f.name not in NETWORK])
    method.add_argument("--target", choices=("conv", "ip"), help=argparse.SUPPRESS)  # the units are found by tracing
    work = p.add_argument_group(
        "what to do (without --evaluate: train the original, or fine-tune what was pruned; --save: default saves/)"
    )
    add_result_flags(work)
    work.add_argument("--retrain", action="store_true", help="fine-tune the checkpoint, or the smaller network")
    work.add_argument(
        "--append", type=Path, metavar="FILE", help="add the result as a line to FILE (results/rows.jsonl)"
    )
    training = p.add_argument_group("training (without a value: the recipe's)")
    training.add_argument(
        "--recipe",
        default="published",
        choices=settings.RECIPES,
        help="published (the paper's steps) or fast (one cycle, few epochs) [%(default)s]",
    )
    add_flags(training, Recipe, default=None)
    training.add_argument(
        "--resume", action="store_true", help="go on with an interrupted training: same options, same result"
    )
    training.add_argument("--compile", action="store_true", help="train with torch.compile")
    training.add_argument(
        "--log-interval", type=int, default=0, metavar="N", help="also print the loss every N batches"
    )
    add_machine_flags(p.add_argument_group("machine"))
    p.set_defaults(compensation=None, ratio=None)
    return p


def from_scratch(args: argparse.Namespace) -> bool:
    """Whether training would start from random weights, not from a checkpoint."""
    return args.compensation in (None, "original") and args.pretrained is None and not args.retrain


def recipe(args: argparse.Namespace) -> Recipe:
    """The network's recipe, changed as the command line says. Raises NeuronMergingError for numbers that make no sense."""
    chosen = settings.recipe(args.arch, args.recipe)
    if not from_scratch(args):
        chosen = replace(chosen, sizes=())  # only training from scratch begins with small images
    for name in vars(chosen):  # some of these have no flag
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
    """Raises NeuronMergingError for a command line that makes no sense, before anything is loaded."""
    if args.arch not in settings.NETWORKS:
        raise NeuronMergingError(f"unknown network {args.arch!r}: choose one of {', '.join(settings.NETWORKS)}")
    no_method = args.compensation is None
    args.compensation = args.compensation or "original"
    if args.log_interval < 0:
        raise NeuronMergingError("--log-interval has to be at least 0")
    recipe(args)
    args.data = args.data or settings.data_folder()
    args.pretrained = _shipped(args.pretrained)
    if not args.evaluate and (args.export or args.benchmark) and not args.summary:
        raise NeuronMergingError("--export and --benchmark need --evaluate: without it, --arch trains")
    if args.evaluate and (args.resume or args.compile):
        raise NeuronMergingError("--evaluate trains nothing: leave it out, or --resume and --compile")
    check_shared(args)
    if args.append:
        rows.keys(rows.load(args.append), args.append)  # raises if the file holds anything but rows
        if args.append.exists() and not os.access(args.append, os.W_OK):
            raise NeuronMergingError(f"cannot write {args.append}: check its permission")
    warn_of_nothing(args, no_method)


def experiment_of(args: argparse.Namespace, **others: Any) -> Experiment:
    """The experiment that the flags describe."""
    ratio = 0.5 if args.ratio is None else args.ratio
    return Experiment.from_flags(args, **{"ratio": ratio} | others)


def _shipped(path: Path | None) -> Path | None:
    """`path`; or, if it is in the authors' folder and does not exist, the file of the same name in pretrained/, if any."""
    shipped = path and settings.PRETRAINED / path.name
    missing = path and path.parent.name == PUBLISHED_FOLDER and not path.exists()
    return shipped if missing and shipped.exists() else path
