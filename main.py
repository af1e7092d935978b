"""Neuron Merging on the command line: train a network, prune or merge its neurons, measure what is left.

python main.py --arch LeNet_300_100 --pretrained FILE --model-type merge --criterion l1-norm --pruning-ratio 0.5 --evaluate
"""

import argparse
import json
import os
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import settings
from errors import NeuronMergingError, check_writable, write_atomically

HERE = Path(__file__).resolve().parent


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in the one line that every other one has."""

    def error(self, message: str) -> NoReturn:
        """A wrong command line. Raises NeuronMergingError."""
        raise NeuronMergingError(f"{message}; main.py --help lists the options")


def depth_wide(text: str) -> tuple[int, ...]:
    """56, or 40,4, or [40,4] → a tuple of numbers; () for nothing."""
    try:
        return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a depth nor depth,width") from None


def widths(text: str) -> str | tuple[int, ...]:
    """published, uniform, or kept widths with commas between."""
    if text in ("published", "uniform"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither published, uniform nor numbers with commas between"
        ) from None


def parser() -> Parser:
    """All flags: the published ones keep their names and meanings."""
    p = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    network = p.add_argument_group("network and data")
    network.add_argument("--arch", default="LeNet_300_100", help=f"one of {', '.join(settings.NETWORKS)}")
    network.add_argument(
        "--depth-wide", type=depth_wide, metavar="D[,W]", help="56, or 40,4 for a WideResNet [the published one]"
    )
    network.add_argument(
        "--dataset", help="FashionMNIST, cifar10 or cifar100 [FashionMNIST for LeNet, cifar10 elsewhere]"
    )
    network.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the data sets [$NEURON_MERGING_DATA, or data]"
    )
    network.add_argument(
        "--pretrained", type=Path, metavar="FILE", help="checkpoint to start from [the published name in pretrained/]"
    )
    method = p.add_argument_group("method")
    method.add_argument(
        "--model-type", default="original", help="original, prune, merge (the published form) or merge-derived"
    )
    method.add_argument(
        "--criterion", default="l1-norm", help="which neurons stay: l1-norm, l2-norm or l2-GM [%(default)s]"
    )
    method.add_argument(
        "--pruning-ratio",
        type=float,
        default=0.5,
        metavar="R",
        help="share of neurons to drop, in [0, 1) [%(default)s]",
    )
    method.add_argument(
        "--widths",
        type=widths,
        default="published",
        metavar="W",
        help="published (VGG-16: its fixed list, else uniform), uniform (the ratio in every unit), or N,N,… for every unit",
    )
    method.add_argument(
        "--threshold", type=float, metavar="t", help="least cosine similarity to merge [the published one]"
    )
    method.add_argument(
        "--lamda",
        "--lambda",
        type=float,
        metavar="λ",
        help="weight of cosine against bias distance [the published one]",
    )
    method.add_argument("--target", help=argparse.SUPPRESS)  # conv or ip: found by tracing now
    work = p.add_argument_group(
        "what to do (without --evaluate or --retrain: train the original, fine-tune what was pruned)"
    )
    work.add_argument("--evaluate", action="store_true", help="measure on the test set; train nothing")
    work.add_argument("--retrain", action="store_true", help="fine-tune what was pruned or merged")
    work.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="write the resulting network, reloadable by --pretrained [training: saves/]",
    )
    work.add_argument("--json", metavar="FILE|-", help="write the result as one JSON object (- is standard output)")
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
    machine.add_argument("--test-batch-size", type=int, default=1000, metavar="B")
    machine.add_argument("--seed", type=int, default=1)
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    machine.add_argument("--no-cuda", action="store_true", help="the same as --device cpu")
    return p


def recipe(args: argparse.Namespace) -> settings.Recipe:
    """The network's recipe with what the command line says instead. Raises NeuronMergingError for senseless numbers."""
    chosen = settings.recipe(args.arch, args.recipe)
    for name in ("epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule", "gammas"):
        value = getattr(args, name)
        if value is not None:
            chosen = replace(chosen, **{name: tuple(value) if isinstance(value, list) else value})
    if len(chosen.schedule) != len(chosen.gammas):
        raise NeuronMergingError(
            f"--schedule has {len(chosen.schedule)} epochs, --gammas {len(chosen.gammas)}: give one for each"
        )
    if chosen.epochs < 1 or chosen.batch_size < 2 or chosen.lr <= 0:
        raise NeuronMergingError("--epochs has to be at least 1, --batch-size at least 2, --lr above 0")
    return chosen


def check(args: argparse.Namespace) -> None:
    """What can be said of the command line before PyTorch is there. Raises NeuronMergingError."""
    if args.arch not in settings.NETWORKS:
        raise NeuronMergingError(f"unknown network {args.arch!r}: choose one of {', '.join(settings.NETWORKS)}")
    if not 0 <= args.pruning_ratio < 1:
        raise NeuronMergingError(f"--pruning-ratio {args.pruning_ratio} is outside [0, 1)")
    if args.test_batch_size < 1:
        raise NeuronMergingError("--test-batch-size has to be at least 1")
    recipe(args)
    args.data = args.data or settings.data_folder()
    args.dataset = args.dataset or ("FashionMNIST" if args.arch == "LeNet_300_100" else "cifar10")
    for path in (args.save, None if args.json in (None, "-") else Path(args.json)):
        if path is not None:
            check_writable(path)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the checked command line says; returns the result row."""
    import data
    import experiment as xp

    device = xp.choose_device("cpu" if args.no_cuda else args.device)
    depth_wide = args.depth_wide if args.depth_wide is not None else settings.NETWORKS[args.arch].depth_wide
    name = settings.checkpoint_name(args.arch, depth_wide, args.dataset)
    experiment = xp.Experiment(
        args.arch, args.dataset, args.pretrained or HERE / "pretrained" / name, depth_wide, args.model_type,
        args.criterion, args.pruning_ratio, args.widths, args.threshold, args.lamda,
    )  # fmt: skip
    if args.evaluate:
        model, checkpoint = xp.load(experiment)  # before the data: a missing checkpoint is no reason for a download
        images = data.load(args.dataset, "test", args.data)
        shrunk = xp.shrink(xp.placed(model, device), experiment)
        row = xp.row(experiment, checkpoint, shrunk, images, device, args.test_batch_size)
        if args.save:
            save(args.save, shrunk.model, row)
        return row
    return train(args, experiment, device)


def train(args: argparse.Namespace, experiment: Any, device: Any) -> dict[str, Any]:
    """Train the original network from scratch or from --pretrained, or fine-tune what the experiment left of it."""
    import torch

    import data
    import experiment as xp
    import train as trainer
    from models import load_checkpoint

    target = args.save or HERE / "saves" / settings.checkpoint_name(args.arch, experiment.depth_wide, args.dataset)
    check_writable(target)
    torch.manual_seed(args.seed)
    if args.model_type == "original" and args.pretrained is None:
        shrunk = xp.Shrunk(experiment.network(), None, 0.0)
    else:
        shrunk = xp.shrink(xp.placed(xp.load(experiment)[0], device), experiment)
    images, test = (data.load(args.dataset, split, args.data) for split in ("train", "test"))
    with trainer.process_group(device) as device:
        last = trainer.train(
            shrunk.model, images, test, recipe(args), device=device, seed=args.seed, resume=args.resume,
            state=target.with_name(target.name + ".state"), curve=target.with_name(target.name + ".csv"),
            log_interval=args.log_interval, compiled=args.compile, say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        first = os.environ.get("RANK", "0") == "0"
    if not first:
        sys.exit(0)
    about = {
        "arch": args.arch,
        "depth_wide": list(experiment.depth_wide),
        "dataset": args.dataset,
        "type": args.model_type,
    }
    about |= {"accuracy": last["test_accuracy"], "widths": shrunk.widths, "epochs": last["epoch"]}
    save(target, shrunk.model, about | {"versions": xp.versions()})
    print(f"saved {target}", file=sys.stderr)
    target.with_name(target.name + ".state").unlink(missing_ok=True)
    return xp.row(
        replace(experiment, pretrained=target), load_checkpoint(target), shrunk, test, device, args.test_batch_size
    )


def save(path: Path, model: Any, row: dict[str, Any]) -> None:
    """Write the network with what makes it reloadable and what is known of it."""
    from models import save_checkpoint

    about = {
        key: row[key]
        for key in ("arch", "depth_wide", "dataset", "type", "criterion", "ratio", "epochs", "versions")
        if key in row
    }
    if row["widths"] is not None:
        about["widths"] = row["widths"]
    command = shlex.join(["python", "main.py", *sys.argv[1:]])
    save_checkpoint(path, model, acc=row["accuracy"], command=command, **about)


def summary(row: dict[str, Any]) -> str:
    """A row for people."""
    title = (
        f"{' '.join([row['arch'], '-'.join(map(str, row['depth_wide']))]).strip()} on {row['dataset']}: {row['type']}"
    )
    if row["criterion"]:
        chosen = f"ratio {row['ratio']}" if row["ratio"] is not None else f"widths {','.join(map(str, row['widths']))}"
        title += f", {row['criterion']}, {chosen}"
    known = row["accuracy_checkpoint"]
    lines = [title, f"{'':<12}{'original':>16}{row['type'] if row['criterion'] else 'measured':>16}"]
    before = "" if known is None else f"{known:.2f} %"
    lines.append(f"{'accuracy':<12}{before:>16}{row['accuracy']:>14.2f} %   {row['correct']:,} of {row['total']:,}")
    for label, key in (("parameters", "params"), ("MACs", "macs")):
        original, now = row[f"{key}_original"], row[key]
        lines.append(f"{label:<12}{original:>16,}{now:>16,}   {100 * (now / original - 1):+.1f} %")
    lines.append(f"{'decompose':<12}{'':>16}{row['seconds_decompose']:>14.3f} s")
    lines.append(f"{'evaluate':<12}{'':>16}{row['seconds_evaluate']:>14.3f} s   on {row['device']}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command line; 0, or 2 after one line on stderr that says what is wrong, or 130 after Ctrl-C."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        args = parser().parse_args(argv)
        check(args)
        row = run(args)
        text = json.dumps(row, ensure_ascii=False) + "\n"
        print(summary(row), file=sys.stderr if args.json == "-" else sys.stdout)
        if args.json == "-":
            print(text, end="")
        elif args.json:
            write_atomically(Path(args.json), lambda file: file.write(text.encode()))
        return 0
    except NeuronMergingError as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"main.py: {stop or 'stopped'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
