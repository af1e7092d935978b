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
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import settings
from errors import NeuronMergingError
from files import check_writable, write_atomically

if TYPE_CHECKING:  # PyTorch is imported where it is needed: --help and a wrong flag do not wait for it
    import torch

    from experiment import Experiment

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
    """published, uniform, auto, quick, or kept widths with commas between."""
    if text in ("published", "uniform", "auto", "quick"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither published, uniform, auto, quick nor numbers with commas between"
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
        "--split",
        default="test",
        help="images to measure on: test, or val, 5,000 training images that training then leaves out [%(default)s]",
    )
    network.add_argument(
        "--pretrained", type=Path, metavar="FILE", help="checkpoint to start from [the published name in pretrained/]"
    )
    method = p.add_argument_group("method")
    method.add_argument(
        "--model-type",
        default="original",
        help="original; prune, merge (the published form), merge-derived; restore (ours); lbyl, fold (others');"
        " prune-bn, merge-bn (BatchNorm measured anew on real images) [%(default)s]",
    )
    method.add_argument(
        "--criterion",
        default="l1-norm",
        help="which neurons stay: l1-norm, l2-norm, l2-GM, or auto (ours: those that explain most) [%(default)s]",
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
        "--probe", default="auto", help="restore: made-up inputs, auto, pink or white noise [%(default)s]"
    )
    method.add_argument(
        "--probe-samples", type=int, metavar="N", help="restore: how many of them [as the network asks]"
    )
    method.add_argument(
        "--ridge", type=float, default=settings.RIDGE, metavar="L", help="restore: ridge λ [%(default)s]"
    )
    method.add_argument(
        "--calibrate",
        metavar="WHAT",
        help="let restore, prune-bn or merge-bn look at real images: DATASET:N of its training images, or a folder",
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
    if not 0 <= args.pruning_ratio < 1:
        raise NeuronMergingError(f"--pruning-ratio {args.pruning_ratio} is outside [0, 1)")
    if args.test_batch_size < 1 or args.log_interval < 0 or not 0 <= args.seed < 2**32:
        raise NeuronMergingError(
            "--test-batch-size has to be at least 1, --log-interval at least 0, --seed in [0, 2**32)"
        )
    if args.split not in ("test", "val"):
        raise NeuronMergingError(f"unknown --split {args.split!r}: choose test or val")
    recipe(args)
    args.data = args.data or settings.data_folder()
    args.dataset = args.dataset or ("FashionMNIST" if args.arch == "LeNet_300_100" else "cifar10")
    for path in (args.save, args.append, None if args.json in (None, "-") else Path(args.json)):
        if path is not None:
            check_writable(path)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the checked command line says; returns the result row."""
    import experiment as xp

    device = xp.choose_device("cpu" if args.no_cuda else args.device)
    depth_wide = args.depth_wide if args.depth_wide is not None else settings.NETWORKS[args.arch].depth_wide
    name = settings.checkpoint_name(args.arch, depth_wide, args.dataset)
    experiment = xp.Experiment(
        args.arch, args.dataset, args.pretrained or HERE / "pretrained" / name, depth_wide, args.model_type,
        args.criterion, args.pruning_ratio, args.widths, args.threshold, args.lamda, args.probe, args.probe_samples,
        args.ridge, args.seed, args.calibrate, args.budget, args.multiple, args.drop_blocks,
    )  # fmt: skip
    return (evaluate if args.evaluate else train)(args, experiment, device)


def evaluate(args: argparse.Namespace, experiment: "Experiment", device: "torch.device") -> dict[str, Any]:
    """Measure what the experiment leaves of the checkpoint, as the file holds it if it is saved."""
    import data
    import experiment as xp
    import train as trainer
    from models import stored

    if trainer.launched():
        raise NeuronMergingError("--evaluate is for one process: run it without torchrun")
    model, checkpoint = xp.load(experiment)
    shrunk = xp.shrink(xp.placed(model, device), experiment, xp.calibration(experiment, args.data))
    images = data.load(args.dataset, args.split, args.data)  # last: no download for a command that cannot work
    if args.save:
        shrunk.model.load_state_dict(stored(shrunk.model))
    row = xp.row(experiment, checkpoint, shrunk, images, device, args.test_batch_size)
    if args.save:
        save(args.save, shrunk.model, row)
    return row


def train(args: argparse.Namespace, experiment: "Experiment", device: "torch.device") -> dict[str, Any]:
    """Train the original network from scratch or from --pretrained, or fine-tune what the experiment leaves of it."""
    import torch

    import data
    import experiment as xp
    import train as trainer
    from models import stored
    from models.checkpoint import sha256

    torch.manual_seed(args.seed)
    name = settings.checkpoint_name(args.arch, experiment.depth_wide, args.dataset)
    if args.model_type == "original" and args.pretrained is None and not args.retrain:
        start, shrunk = None, xp.Shrunk(experiment.network(), None, 0.0)
    else:
        model, start = xp.load(experiment)
        shrunk = xp.shrink(xp.placed(model, device), experiment, xp.calibration(experiment, args.data))
        made = [args.model_type]
        if shrunk.widths is not None:
            ratio = experiment.effective_ratio
            made += [args.criterion, "widths" if ratio is None else str(ratio)]
        name = name.replace("original", "_".join([*made, "retrained"]))
    target = args.save or HERE / "saves" / name
    check_writable(target)
    splits = ("fit", "val") if args.split == "val" else ("train", "test")
    images, test = (data.load(args.dataset, split, args.data) for split in splits)
    state, curve = (target.with_name(target.name + ending) for ending in (".state", ".csv"))
    identity = experiment.settings() | {"start": start and start.sha256, "split": args.split}
    with trainer.process_group(device) as (device, rank):
        last = trainer.train(
            shrunk.model, images, test, recipe(args), device=device, seed=args.seed, resume=args.resume, state=state,
            curve=curve, experiment=identity, compiled=args.compile,
            log_interval=args.log_interval, say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    if rank > 0:
        sys.exit(0)
    shrunk.model.load_state_dict(stored(shrunk.model))  # what is measured is what is saved
    row = xp.row(experiment, start, shrunk, test, device, args.test_batch_size)
    save(target, shrunk.model, row | {"epochs": last["epoch"]})
    print(f"saved {target}", file=sys.stderr)
    state.unlink(missing_ok=True)
    return row | {"checkpoint": target.name, "checkpoint_sha256": sha256(target)}


def save(path: Path, model: "torch.nn.Module", row: dict[str, Any]) -> None:
    """Write the network with what makes it reloadable and what is known of it."""
    from models import save_checkpoint

    names = ("arch", "depth_wide", "dataset", "type", "criterion", "ratio", "widths", "epochs", "versions")
    about = {name: row[name] for name in names if row.get(name) is not None}
    save_checkpoint(path, model, acc=row["accuracy"], command=shlex.join(["python", "main.py", *sys.argv[1:]]), **about)


def summary(row: dict[str, Any]) -> str:
    """A row for people."""
    network = " ".join([row["arch"], "-".join(map(str, row["depth_wide"]))]).strip()
    shrunk = row["type"] != "original"
    title = f"{network} on {row['dataset']}: {row['type'] if shrunk else row['checkpoint']}"
    if shrunk:
        chosen = f"ratio {row['ratio']}" if row["ratio"] is not None else row.get("budget")
        chosen = chosen or f"widths {','.join(map(str, row['widths']))}"
        title += "".join(f", {part}" for part in (row["criterion"], chosen) if part)
        if row["calibrate"]:
            title += f", looking at {row['calibrate']}"
    known = row["accuracy_checkpoint"]
    lines = [title, f"{'':<12}{'original':>16}{row['type'] if shrunk else 'measured':>16}"]
    if row["widths_rule"] in ("auto", "quick"):
        lines.insert(
            1, f"{'widths':<12}{','.join(map(str, row['widths']))}   (chosen in {row['seconds_widths']:.1f} s)"
        )
    before = "" if known is None else f"{known:.2f} %"
    lines.append(f"{'accuracy':<12}{before:>16}{row['accuracy']:>14.2f} %   {row['correct']:,} of {row['total']:,}")
    for label, key in (("parameters", "params"), ("MACs", "macs")):
        original, now = row[f"{key}_original"], row[key]
        lines.append(f"{label:<12}{original:>16,}{now:>16,}   {100 * (now / original - 1):+.1f} %")
    peak = "" if row["peak_mb"] is None else f"   peak memory {row['peak_mb']:,.0f} MB"
    lines.append(f"{'decompose':<12}{'':>16}{row['seconds_decompose']:>14.3f} s{peak}")
    lines.append(f"{'evaluate':<12}{'':>16}{row['seconds_evaluate']:>14.3f} s   on {row['device']}")
    return "\n".join(lines)


def report(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Print the summary and write the row where the command line wants it."""
    text = json.dumps(row, ensure_ascii=False) + "\n"
    print(summary(row), file=sys.stderr if args.json == "-" else sys.stdout, flush=True)
    if args.append:
        from experiments.rows import append

        append(row, args.append)
    if args.json == "-":
        if sys.stdout is None:
            raise NeuronMergingError("--json -: standard output is closed")
        print(text, end="", flush=True)
    elif args.json:
        write_atomically(Path(args.json), lambda file: file.write(text.encode()))


def complain(message: object) -> None:
    """One line on stderr, whatever is in the message."""
    print("main.py:", " ".join(str(message).split("\n")), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run one command line; 0, or 2 after one line on stderr that says what is wrong, or 130 after Ctrl-C."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters is no reason to fail
    try:
        args = parser().parse_args(argv)
        check(args)
        report(args, run(args))
        return 0
    except NeuronMergingError as error:
        complain(error)
        return 2
    except BrokenPipeError:  # who reads our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        complain(f"{error.filename or 'output'}: {error.strerror or error}")
        return 2
    except ModuleNotFoundError as error:
        complain(f"the package {error.name} is missing: run make demo once and use .venv/bin/python")
        return 2
    except KeyboardInterrupt as stop:
        complain(stop if str(stop) else "stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main())
