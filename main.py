"""Neuron Merging on the command line: train a network, prune or merge its neurons, measure what is left.

python main.py --arch LeNet_300_100 --pretrained FILE --model-type merge --criterion l1-norm --pruning-ratio 0.5 --evaluate
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    print("main.py: PyTorch is missing: run make demo once and use .venv/bin/python, or pip install .", file=sys.stderr)
    sys.exit(2)
from torch import nn

import data
from experiments import experiment as xp
from experiments import rows, settings, training
from experiments.options import check, experiment_of, from_scratch, parser, recipe
from experiments.report import for_people
from neuron_merging import cli, memory
from neuron_merging.checkpoint import save_checkpoint, sha256, stored
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
from neuron_merging.shrink import prunable, summarize

HERE = Path(__file__).resolve().parent
SAVED = (
    "arch", "depth_wide", "dataset", "type", "criterion", "ratio", "widths", "coupled", "split", "epochs", "versions",
)  # fmt: skip


def run(args: argparse.Namespace) -> tuple[Row, Callable[[], Row]]:
    """Do what the checked command line says; the result row, and what makes the rest of it: exports, comparisons."""
    if training.launched() and (args.summary or args.evaluate):
        raise NeuronMergingError("torchrun is for training: run this without it")
    device = choose_device("cpu" if args.no_cuda else args.device)
    memory.keep_freed()
    experiment = experiment_of(args)
    if args.summary:
        return {"summary": summary(args, experiment)}, dict
    return evaluate(args, experiment, device) if args.evaluate else (train(args, experiment, device), dict)


def summary(args: argparse.Namespace, experiment: xp.Experiment) -> str:
    """What of the network can be pruned, and how much of it the experiment would leave."""
    network = xp.load(experiment)[0] if args.pretrained else experiment.network()
    units, _ = prunable(network, args.coupled)
    given = args.ratio is not None or not isinstance(args.widths, str) or args.compensation != "original"
    kept = xp.kept_widths(network, units, experiment) if given and not experiment.rule_chooses and units else None
    return summarize(network, kept, coupled=args.coupled, multiple=args.multiple, compensation=args.compensation)


def evaluate(
    args: argparse.Namespace, experiment: xp.Experiment, device: torch.device
) -> tuple[Row, Callable[[], Row]]:
    """Measure what the experiment leaves of the checkpoint, as the file holds it if it is saved; returns as `run`."""
    model, checkpoint = xp.load(experiment)
    if args.compensation != "original":
        xp.kept_widths(model, prunable(model, args.coupled)[0], experiment)  # or no download
    looked_at, images = xp.calibration(experiment, args.data), data.load(experiment.dataset, args.split, args.data)
    shrunk = xp.shrink(placed(model, device), experiment, looked_at)
    if args.save:
        shrunk.model.load_state_dict(stored(shrunk.model))
    row = xp.row(experiment, checkpoint, shrunk, images, device, args.test_batch_size)
    if args.save:
        save(args.save, shrunk.model, row)
    if args.benchmark and shrunk.widths is None:  # the file may hold a smaller network already
        model = experiment.network().eval()
    shape = settings.NETWORKS[experiment.arch].shape
    return row, partial(exports_and_speed, args, model.to(device), shrunk.model, shape)


def train(args: argparse.Namespace, experiment: xp.Experiment, device: torch.device) -> Row:
    """Train the original network from scratch or from --pretrained, or fine-tune what the experiment leaves of it."""
    torch.manual_seed(args.seed)
    target = args.save or HERE / "saves" / trained_name(args, experiment)
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
    if from_scratch(args):
        start, shrunk = None, xp.Shrunk(experiment.network(), None, 0.0)
    else:
        model, start = xp.load(experiment)
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
        if rank == 0:  # the others wait: where one of them ends badly, torchrun ends them all
            shrunk.model.load_state_dict(stored(shrunk.model))  # what is measured is what is saved
            row = xp.row(experiment, start, shrunk, test, device, args.test_batch_size)
            before = start.about if start else {}
            earlier = before.get("epochs")
            epochs = last["epoch"] + (earlier if isinstance(earlier, int) else 0)  # a file of others' may say anything
            save(target, shrunk.model, row | {"epochs": epochs}, before.get("command"))
            print(f"saved {target}", file=sys.stderr)
            state.unlink(missing_ok=True)
    if rank > 0:
        sys.exit(0)
    return row | {"checkpoint": target.name, "checkpoint_sha256": sha256(target)}


def trained_name(args: argparse.Namespace, experiment: xp.Experiment) -> str:
    """The name of the file that training writes."""
    name = settings.checkpoint_name(args.arch, experiment.depth_wide, experiment.dataset)
    if from_scratch(args):
        return name
    parts = [args.compensation]
    if args.compensation != "original":
        ratio = experiment.effective_ratio
        parts += [args.criterion, "widths" if ratio is None else str(ratio)]
    return name.replace("original", "_".join([*parts, "retrained"]))


def save(path: Path, model: nn.Module, row: Row, before: str | None = None) -> None:
    """Write the network with what makes it reloadable and what is known of it, and the commands that made it.

    `before`: the command that made the network which this one was trained from.
    """
    known = description(row, SAVED)
    known["command"] = " && ".join(filter(None, (before, known["command"])))
    save_checkpoint(path, model, acc=row["accuracy"], **known)


def report(args: argparse.Namespace, row: Row) -> None:
    """Print the summary and write the row where the command line wants it."""
    try:
        if args.append and not rows.append(row, args.append):
            print(f"{args.append} holds a row of these settings already: it is left as it is", file=sys.stderr)
    finally:
        print_result(args, row, for_people(row))


def labelled(args: argparse.Namespace, device: torch.device) -> Labelled | None:
    """One of our data sets, to measure a network of one's own on; None for another name."""
    if args.dataset not in data.DATASETS:
        return None
    dataset, size = data.DATASETS[args.dataset], args.test_batch_size or 256
    if args.input_size != dataset.shape:
        raise NeuronMergingError(
            f"--dataset {args.dataset} has images of {','.join(map(str, dataset.shape))}: --input-size says something else"
        )
    images = data.load(args.dataset, args.split, args.data or settings.data_folder()).to(device)
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    return Labelled(
        lambda: ((part.normalised(part.pixels), part.labels) for part in parts), math.ceil(len(images) / size),
        dataset.classes, f"{args.dataset} has {dataset.classes} classes", {"split": args.split},
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command line; 0, or 2 after one line on stderr that says what is wrong, or 130 after Ctrl-C."""
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
