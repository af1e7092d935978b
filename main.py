"""Neuron Merging on the command line: train a network, prune or merge its neurons, measure what is left.

python main.py --arch LeNet_300_100 --pretrained FILE --model-type merge --criterion l1-norm --pruning-ratio 0.5 --evaluate
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import settings
from errors import NeuronMergingError, ending
from files import check_writable, remove_partials, write_text
from options import check, from_scratch, parser, recipe

if TYPE_CHECKING:  # PyTorch is imported where it is needed: --help and a wrong flag do not wait for it
    import torch

    from experiment import Experiment

HERE = Path(__file__).resolve().parent


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """Do what the checked command line says; returns the result row, and what makes the rest of it: exports, comparisons."""
    import experiment as xp
    import memory
    import train as trainer

    if trainer.launched() and (args.model or args.summary or args.evaluate):
        raise NeuronMergingError("torchrun is for training: run this without it")
    device = xp.choose_device("cpu" if args.no_cuda else args.device)
    memory.keep_freed()
    if args.model:
        import own

        return own.run(args, device)
    depth_wide = args.depth_wide if args.depth_wide is not None else settings.NETWORKS[args.arch].depth_wide
    name = settings.checkpoint_name(args.arch, depth_wide, args.dataset)
    experiment = xp.Experiment(
        args.arch, args.dataset, args.pretrained or HERE / "pretrained" / name, depth_wide, args.model_type,
        args.criterion, args.pruning_ratio, args.widths, args.threshold, args.lamda, args.probe, args.probe_samples,
        args.ridge, args.seed, args.calibrate, args.budget, args.multiple, args.drop_blocks, args.coupled,
    )  # fmt: skip
    if args.summary:
        from shrink import prunable, summary

        network = xp.load(experiment)[0] if args.pretrained else experiment.network()
        found, _ = prunable(network, args.coupled)
        kept = xp.kept_widths(network, found, experiment) if args.thins and found else None
        told = {"coupled": args.coupled, "multiple": args.multiple, "compensation": args.model_type}
        return {"summary": summary(network, kept, **told)}, dict
    return evaluate(args, experiment, device) if args.evaluate else (train(args, experiment, device), dict)


def evaluate(
    args: argparse.Namespace, experiment: "Experiment", device: "torch.device"
) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """Measure what the experiment leaves of the checkpoint, as the file holds it if it is saved; returns as `run`."""
    import data
    import experiment as xp
    from models import stored
    from shrink import prunable

    model, checkpoint = xp.load(experiment)
    if args.model_type != "original":
        xp.kept_widths(model, prunable(model, args.coupled)[0], experiment)  # or no download
    looked_at, images = xp.calibration(experiment, args.data), data.load(args.dataset, args.split, args.data)
    shrunk = xp.shrink(xp.placed(model, device), experiment, looked_at)
    if args.save:
        shrunk.model.load_state_dict(stored(shrunk.model))
    row = xp.row(experiment, checkpoint, shrunk, images, device, args.test_batch_size)
    if args.save:
        save(args.save, shrunk.model, row)
    if args.benchmark and shrunk.widths is None:  # the file may hold a smaller network already
        model = experiment.network().eval()
    shape = settings.NETWORKS[experiment.arch].shape
    return row, lambda: xp.taken_out(args, model.to(device), shrunk.model, shape)


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
    if not from_scratch(args):
        made = [args.model_type]
        if args.model_type != "original":
            ratio = experiment.effective_ratio
            made += [args.criterion, "widths" if ratio is None else str(ratio)]
        name = name.replace("original", "_".join([*made, "retrained"]))
    target = args.save or HERE / "saves" / name
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
        shrunk = xp.shrink(xp.placed(model, device), experiment, xp.calibration(experiment, args.data))
    splits = ("fit", "val") if args.split == "val" else ("train", "test")
    images, test = (data.load(args.dataset, split, args.data) for split in splits)
    identity = experiment.settings() | {"start": start and start.sha256, "split": args.split}
    with trainer.process_group(device) as (device, rank):
        last = trainer.train(
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


def save(path: Path, model: "torch.nn.Module", row: dict[str, Any], before: str | None = None) -> None:
    """Write the network with what makes it reloadable and what is known of it, and the commands that made it.

    `before`: the command that made the network which this one was trained from.
    """
    from experiment import description
    from models import save_checkpoint

    names = (
        "arch", "depth_wide", "dataset", "type", "criterion", "ratio", "widths", "coupled", "split", "epochs", "versions",
    )  # fmt: skip
    known = description(row, names)
    known["command"] = " && ".join(filter(None, (before, known["command"])))
    save_checkpoint(path, model, acc=row["accuracy"], **known)


def summary(row: dict[str, Any]) -> str:
    """A row for people."""
    if "summary" in row:
        return row["summary"]
    if "model" in row:
        from own import text

        return "\n".join([text(row), *extras(row)])
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
    if row["widths_rule"] in settings.CHOSEN_WIDTHS:
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
    return "\n".join([*lines, *extras(row)])


def extras(row: dict[str, Any]) -> list[str]:
    """What a row says of exports and speed, for people."""
    lines = []
    if row.get("export"):
        lines.append(f"exported {row['export']}, outputs off by at most {row['export_error']:.1e}")
    if row.get("benchmark"):
        from latency import table

        lines.append(table(row["benchmark"]))
    return lines


def report(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Print the summary and write the row where the command line wants it."""
    text = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        if args.append:
            from experiments.rows import append

            if not append(row, args.append):
                print(f"{args.append} holds a row of these settings already: it is left as it is", file=sys.stderr)
        if args.json not in (None, "-"):
            write_text(Path(args.json), text)
    finally:  # a full disk does not hide what was measured, a closed pipe does not lose it
        print(summary(row), file=sys.stderr if args.json == "-" else sys.stdout, flush=True)
    if args.json == "-":
        if sys.stdout is None:
            raise NeuronMergingError("--json -: standard output is closed")
        print(text, end="", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run one command line; 0, or 2 after one line on stderr that says what is wrong, or 130 after Ctrl-C."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters is no reason to fail

    def work() -> int:
        args = parser().parse_args(argv)
        check(args)
        row, rest = run(args)
        try:
            row |= rest()
        finally:  # what is measured is not lost where an export fails
            report(args, row)
        return 0

    return ending(work, "main.py: ")


if __name__ == "__main__":
    sys.exit(main())
