"""Neuron Merging on the command line: train a network, prune or merge its neurons, measure the result.

python main.py --arch LeNet_300_100 --pretrained FILE --model-type merge --criterion l1-norm --pruning-ratio 0.5 --evaluate
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

try:
    import torch
    from torch import nn
except ModuleNotFoundError as error:  # checked first: all other imports need it
    print(f"main.py: the package {error.name} is missing: run make demo once and use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import data
from experiments import experiment as xp
from experiments import rows, settings, training
from experiments.options import check, experiment_of, from_scratch, parser, recipe
from experiments.report import for_people
from neuron_merging import cli, memory
from neuron_merging.checkpoint import Checkpoint, save_checkpoint, sha256, stored
from neuron_merging.commandline import (
    Row,
    choose_device,
    description,
    exports_and_speed,
    measured,
    placed,
    print_result,
    run_command,
)
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import check_writable, remove_partials
from neuron_merging.images import Labelled
from neuron_merging.shrink import summarize

HERE = Path(__file__).resolve().parent
SAVED = (
    "arch", "depth_wide", "dataset", "type", "criterion", "ratio", "widths", "coupled", "split", "epochs", "versions",
)  # fmt: skip


def run(args: argparse.Namespace) -> tuple[Row, Callable[[], Row]]:
    """Do what the checked command line says. Returns the result row, and a function that exports and compares speeds.

    That function gives the rest of the row.
    """
    if training.launched() and (args.summary or args.evaluate):
        raise NeuronMergingError("torchrun is for training: run this without it")
    device = choose_device("cpu" if args.no_cuda else args.device)
    memory.keep_freed()
    experiment = experiment_of(args)
    if args.summary:
        return {"summary": summary(args, experiment)}, dict
    return evaluate(args, experiment, device) if args.evaluate else (train(args, experiment, device), dict)


def summary(args: argparse.Namespace, experiment: xp.Experiment) -> str:
    """A text that says what can be pruned in the network, and how much the experiment would leave of it."""
    network = (xp.load(experiment)[0] if args.pretrained else experiment.network()).eval()
    units = xp.spaces_of(network, experiment)
    thins = args.ratio is not None or not isinstance(args.widths, str) or args.compensation != "original"
    kept = xp.kept_widths(units, experiment) if thins and units else None
    return summarize(
        network, kept, compensation=args.compensation, example_input=settings.NETWORKS[experiment.arch].shape,
        images=xp.calibration(experiment, args.data) if experiment.chooses else None, config=experiment.plain(),
    )  # fmt: skip


def evaluate(
    args: argparse.Namespace, experiment: xp.Experiment, device: torch.device
) -> tuple[Row, Callable[[], Row]]:
    """Make the checkpoint's network smaller and measure it; returns as `run`. With --save, measures what the file holds."""
    model, checkpoint = xp.load(experiment)
    if args.compensation != "original":
        xp.kept_widths(xp.spaces_of(model, experiment), experiment)  # raises before any data set is downloaded
    calibration, images = xp.calibration(experiment, args.data), data.load(experiment.dataset, args.split, args.data)
    shrunk = xp.shrink(placed(model, device), experiment, calibration)
    if args.save:
        shrunk.model.load_state_dict(stored(shrunk.model))
    row = xp.row(experiment, checkpoint, shrunk, images, device, args.test_batch_size)
    row |= _made_before(row, checkpoint)
    if args.save:
        save(args.save, shrunk.model, row, checkpoint if args.compensation == "original" else None)
    if args.benchmark and shrunk.widths is None:  # the file may hold a smaller network already
        model = experiment.network().eval()
    shape = settings.NETWORKS[experiment.arch].shape
    return row, partial(exports_and_speed, args, model.to(device), shrunk.model, shape)


def train(args: argparse.Namespace, experiment: xp.Experiment, device: torch.device) -> Row:
    """Train the original network, from scratch or from --pretrained; or make it smaller and fine-tune it."""
    torch.manual_seed(args.seed)
    model, start = (None, None) if from_scratch(args) else xp.load(experiment)
    target = args.save or HERE / "saves" / trained_name(args, experiment, start)
    check_writable(target)
    state, curve = (target.with_name(target.name + ending) for ending in (".state", ".csv"))
    if not args.resume:
        if state.exists():
            raise NeuronMergingError(
                f"{state} is a training that was stopped: go on with --resume, or delete it to begin anew"
            )
        if args.save is None and target.exists():
            raise NeuronMergingError(f"{target} is there already: give --save FILE, or delete it first")
    remove_partials(target)
    if start is None:
        shrunk = xp.Shrunk(experiment.network(), None, 0.0)
    else:
        shrunk = xp.shrink(placed(model, device), experiment, xp.calibration(experiment, args.data))
    splits = ("fit", "val") if args.split == "val" else ("train", "test")
    images, test = (data.load(experiment.dataset, split, args.data) for split in splits)
    identity = experiment.settings() | {"start": start and start.sha256, "split": args.split}
    with training.process_group(device) as (device, rank):
        last = training.train(
            shrunk.model, images, test, recipe(args), device=device, seed=args.seed, resume=args.resume, state=state,
            curve=curve, experiment=identity, compiled=args.compile,
            log_interval=args.log_interval, say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        if rank == 0:  # the other processes wait; if one fails, torchrun ends all
            shrunk.model.load_state_dict(stored(shrunk.model))  # what is measured is what is saved
            row = xp.row(experiment, start, shrunk, test, device, args.test_batch_size)
            row |= _made_before(row, start)
            earlier = start and start.about.get("epochs")
            epochs = last["epoch"] + (earlier if isinstance(earlier, int) else 0)  # other files may have anything there
            save(target, shrunk.model, row | {"epochs": epochs}, start)
            print(f"saved {target}", file=sys.stderr)
            print(_two_accuracies(last, row, device), end="", file=sys.stderr)
            state.unlink(missing_ok=True)
    if rank > 0:
        sys.exit(0)
    return row | {"checkpoint": target.name, "checkpoint_sha256": sha256(target)}


def _made_before(row: Row, start: Checkpoint | None) -> Row:
    """An entry for the row of a network that this run does not make smaller: the method that did so earlier, if any."""
    known = start is not None and row["type"] == "original" and start.made_by
    return {"checkpoint_type": known} if known else {}


def _two_accuracies(last: Row, row: Row, device: torch.device) -> str:
    """A line that explains why the last epoch and the saved network have other accuracies; empty if they are the same."""
    if last["test_accuracy"] == row["accuracy"]:
        return ""
    computed = str(training.autocast_dtype(device) or torch.float32).removeprefix("torch.")
    size = "" if last["image_share"] == 1 else f", on images of {last['image_share']:.0%} of their size"
    return (
        f"the epoch's test accuracy, {last['test_accuracy']:.2f} %, was computed as in training ({computed}{size});"
        f" the table's, {row['accuracy']:.2f} %, is that of the file in float32 on whole images\n"
    )


def trained_name(args: argparse.Namespace, experiment: xp.Experiment, start: Checkpoint | None) -> str:
    """The name of the file that training writes. start: the checkpoint it starts from, which may be smaller already."""
    name = settings.checkpoint_name(args.arch, experiment.depth_wide, experiment.dataset)
    if start is None:
        return name
    origin = {"type": args.compensation, "criterion": args.criterion, "ratio": experiment.effective_ratio}
    if args.compensation == "original":
        origin = {"type": "original"} | start.history(origin)
    ratio = origin.get("ratio")
    parts = [origin["type"]]
    if origin["type"] != "original":
        parts += [origin.get("criterion"), "widths" if ratio is None else str(ratio)]
    return name.replace("original", "_".join([*filter(None, parts), "retrained"]))


def save(path: Path, model: nn.Module, row: Row, start: Checkpoint | None = None) -> None:
    """Write the network with the facts that are needed to load it, what else is known of it, and the commands that made it.

    start: the checkpoint that this run started from; an earlier command may have made its network smaller.
    """
    known, before = description(row, SAVED), None
    if start is not None:
        before = start.about.get("command")
        if row["type"] == "original":
            known |= start.history(("type", "criterion", "ratio", "coupled"))
    known["command"] = " && ".join(filter(None, (isinstance(before, str) and before, known["command"])))
    save_checkpoint(path, model, acc=row["accuracy"], **known)


def report(args: argparse.Namespace, row: Row) -> None:
    """Print the result, and append the row or write it as JSON if the command line asks for it."""
    try:
        if args.append and not rows.append(row, args.append):
            print(f"{args.append} holds a row of these settings already: it is left as it is", file=sys.stderr)
    finally:
        print_result(args, row, for_people(row))


def labelled(args: argparse.Namespace, device: torch.device) -> Labelled | None:
    """One of this repository's data sets, to measure the user's own network on; None for other names."""
    if args.dataset not in data.DATASETS:
        return None
    dataset, size = data.DATASETS[args.dataset], args.test_batch_size or 256
    mean, std = args.mean or dataset.mean, args.std or dataset.std
    if args.input_size != dataset.shape:
        raise NeuronMergingError(
            f"--dataset {args.dataset} has images of {','.join(map(str, dataset.shape))}: --input-size says something else"
        )
    images = data.load(args.dataset, args.split, args.data or settings.data_folder()).to(device)
    images = replace(images, dataset=replace(dataset, mean=mean, std=std))
    scale = f"pixels in [0, 1], normalised with mean {_numbers(mean)} and standard deviation {_numbers(std)}"
    hint = "" if args.mean else ": other ones are given by --mean and --std"
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    return Labelled(
        lambda: ((part.normalised(part.pixels), part.labels) for part in parts), math.ceil(len(images) / size),
        dataset.classes, f"{args.dataset} has {dataset.classes} classes", {"split": args.split, "transforms": scale + hint},
    )  # fmt: skip


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns 0, or 2 after one line on stderr that says what is wrong, or 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser().print_usage()
        return 0
    if any(argument.partition("=")[0] == "--model" for argument in argv):
        return cli.main(argv, "main.py", labelled)

    def work() -> int:
        args = parser().parse_args(argv)
        check(args)
        return measured(lambda: run(args), lambda row: report(args, row))

    return run_command(work, "main.py")


if __name__ == "__main__":
    sys.exit(main())
