"""A network of the user's own on the command line: imported, loaded, made smaller, measured on a folder of images."""

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import settings
from errors import NeuronMergingError, said
from evaluate import CPU_BATCH, count_parameters, dtype, fused
from evaluate import accuracy as on_images
from experiment import description, placed, taken_out, versions
from models import Checkpoint, fit, load_checkpoint, load_weights, save_checkpoint
from shrink import check_choice, check_copies, check_names, check_sizes, network_macs, parse_budget, shrink, summary

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

HERE = Path(__file__).resolve().parent


def build(spec: str, arguments: str | None = None) -> nn.Module:
    """Call what `spec` names, "package.module:callable" (also of the current folder), with JSON keyword arguments.

    Raises NeuronMergingError where that is not there, fails, or gives no module.
    """
    module, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise NeuronMergingError(f"--model {spec}: give module:callable, such as torchvision.models:resnet18")
    try:
        keywords = json.loads(arguments or "{}")
    except ValueError:
        keywords = None
    if not isinstance(keywords, dict):
        raise NeuronMergingError(f"--model-args {arguments}: give a JSON object, such as '{{\"num_classes\": 10}}'")
    top = module.partition(".")[0]
    ours = (HERE / f"{top}.py").is_file() or (HERE / top / "__init__.py").is_file()
    theirs = (Path.cwd() / f"{top}.py").is_file() or (Path.cwd() / top).is_dir()
    if ours and theirs and Path.cwd() != HERE:
        raise NeuronMergingError(f"--model {spec}: this program has a module {top} too; give yours another name")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(1, str(Path.cwd()))  # behind this program's own folder
    with said(f"--model {spec} cannot be made", typed=True), contextlib.redirect_stdout(sys.stderr):
        made = getattr(importlib.import_module(module), name)(**keywords)
    if not isinstance(made, nn.Module):
        raise NeuronMergingError(f"--model {spec} gives {type(made).__name__}, no torch.nn.Module")
    if next(made.parameters(), None) is None:
        raise NeuronMergingError(f"--model {spec} gives a network without parameters")
    check_sizes(made)
    return made


def with_weights(model: nn.Module, spec: str, weights: str | None) -> Checkpoint | None:
    """Load `weights` into `model`: a file, also of a network that this program made smaller, or torchvision's name for some.

    None: the model keeps what it was made with. Raises NeuronMergingError where there are none or they do not fit.
    """
    if weights is None:
        return None
    path = Path(weights)
    if not path.exists():
        known = _torchvision_weights(spec)
        if weights not in known:
            names = f", nor one of {', '.join(known)}" if known else ""
            raise NeuronMergingError(f"--weights {weights} is no file that is there{names}")
        with said(f"--weights {weights}", typed=True), contextlib.redirect_stdout(sys.stderr):  # says what it downloads
            theirs = known[weights].get_state_dict(progress=sys.stderr.isatty())
        load_weights(model, Checkpoint(path, "", theirs))
        _as_torchvision_made(model, spec, weights)
        return None
    checkpoint = load_checkpoint(path)
    before = [parameter.shape for parameter in model.parameters()]
    fit(model, checkpoint.state_dict)
    ours = {"network", "widths"} & {*checkpoint.about}
    if not ours and before != [parameter.shape for parameter in model.parameters()]:
        print(f"warning: {path} has other widths than {spec}: the network was cut to them", file=sys.stderr)
    load_weights(model, checkpoint)
    _as_torchvision_made(model, spec, origin(checkpoint))
    return checkpoint


def origin(checkpoint: Checkpoint) -> str | None:
    """torchvision's name for the weights that a file began with, where it says one."""
    name = checkpoint.about.get("weights")
    return name if isinstance(name, str) else None


def _as_torchvision_made(model: nn.Module, spec: str, weights: str | None) -> None:
    """GoogLeNet and Inception with torchvision's weights turn their inputs into those that the weights were trained on."""
    if weights in _torchvision_weights(spec) and hasattr(model, "transform_input"):
        model.transform_input = True


def _torchvision_weights(spec: str) -> dict[str, Any]:
    """By name the weights that torchvision has for one of its own models."""
    if not spec.startswith("torchvision.models"):
        return {}
    from torchvision.models import get_model_weights

    try:
        return dict(get_model_weights(spec.rpartition(":")[2]).__members__)
    except (ValueError, AttributeError):
        return {}


def transforms(spec: str, weights: str | None, shape: tuple[int, ...]) -> Callable[[Any], Tensor]:
    """How an image becomes an input: as torchvision's `weights` say, or else its default weights of that model.

    Where there are none, or they are for inputs of another size: the shorter side to the input's, the centre, ImageNet's mean
    and standard deviation.
    """
    from torchvision import transforms as T

    if len(shape) != 3:
        raise NeuronMergingError(f"images are channels, height, width: --input-size {','.join(map(str, shape))} is not")
    known = _torchvision_weights(spec)
    entry = known.get(weights) or known.get("DEFAULT")
    theirs = entry and entry.transforms()
    if theirs and [*getattr(theirs, "crop_size", [])] * 2 == [*shape[1:]]:
        return theirs
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    gray = [T.Grayscale()] if shape[0] == 1 else []
    scale = T.Normalize(mean, std) if shape[0] == 3 else T.Normalize((0.5,), (0.5,))
    return T.Compose([T.Resize(min(shape[1:])), T.CenterCrop(tuple(shape[1:])), *gray, T.ToTensor(), scale])


def _image_folder(folder: Path, transform: Callable[[Any], Tensor]) -> "ImageFolder":
    """The images of `folder`, a folder for each class. Raises NeuronMergingError where there are none."""
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise NeuronMergingError(f"--dataset imagefolder:{folder} is no folder")
    with said(f"--dataset imagefolder:{folder}", typed=True):
        return ImageFolder(str(folder), transform)


@torch.inference_mode()
def accuracy(model: nn.Module, images: "ImageFolder", device: torch.device, batch_size: int | None) -> tuple[int, int]:
    """(correct, total) on the images of a folder, whose classes come in the order of the network's outputs."""
    folder = images.root
    what = f"--dataset imagefolder:{folder}"
    with said(what, typed=True):
        model = fused(model.eval())
        correct = 0
        loader = torch.utils.data.DataLoader(images, batch_size or CPU_BATCH, num_workers=min(8, os.cpu_count() or 1))
        batches = data.readable(loader, what, (file for file, _ in images.samples))
        for x, labels in tqdm(batches, "evaluate", len(loader), unit="batch", leave=False, disable=None):
            logits = model(x.to(device, dtype(model)))
            if logits.shape[1] != len(images.classes):
                raise NeuronMergingError(
                    f"--dataset imagefolder:{folder} has {len(images.classes)} folders, the network {logits.shape[1]}"
                    " outputs: it takes a folder for each, in the order of the outputs"
                )
            correct += int((logits.argmax(1).cpu() == labels).sum())
    return correct, len(images)


def run(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """Do what the command line says with the user's network; the result row, and what makes the rest of it (main.run)."""
    model = build(args.model, args.model_args)
    checkpoint = with_weights(model, args.model, args.weights)
    ignore = args.ignore.split(",") if args.ignore else ()
    if args.summary:
        if args.model_type != "original":
            check_names(args.criterion, args.model_type, settings.width_rule(args.widths))
        check_choice(args.widths in settings.CHOSEN_WIDTHS, args.budget, args.multiple, args.drop_blocks)
        ratio = args.ratios or (args.pruning_ratio if isinstance(args.widths, str) else args.widths)
        told = {"coupled": args.coupled, "ignore": ignore, "multiple": args.multiple, "compensation": args.model_type}
        return {"summary": summary(model, ratio if args.thins else None, **told)}, dict
    if args.weights is None:
        print("warning: no --weights: the network is as its code makes it", file=sys.stderr)
    model = placed(model, device).eval()
    shape, small, report = args.input_size, model, None
    check_copies(model)
    macs = network_macs(model, shape)  # or a line that says that it does not run
    began = args.weights if checkpoint is None else origin(checkpoint)
    # Before anything is made: images may not be there.
    measure = _measurement(args, began, device) if args.evaluate else None
    looked_at = (
        data.pictures(args.calibrate, transforms(args.model, began, shape), args.seed) if args.calibrate else None
    )
    told = _told(args)
    row = {
        "model": args.model, "weights": args.weights, "checkpoint_sha256": checkpoint and checkpoint.sha256,
        "type": args.model_type, "input_size": list(shape), "device": str(device), "versions": versions(),
        "params": count_parameters(model), "macs": macs,
    }  # fmt: skip
    if args.model_type != "original":
        given = not isinstance(args.widths, str)
        rule = settings.width_rule(args.widths)
        ratio = args.ratios or args.pruning_ratio
        small, report = shrink(
            model, args.widths if given else ratio, example_input=shape, criterion=args.criterion,
            compensation=args.model_type, widths=rule, budget=args.budget and parse_budget(args.budget),
            multiple=args.multiple, drop_blocks=args.drop_blocks, coupled=args.coupled, ignore=ignore,
            images=looked_at, **told,
        )  # fmt: skip
        row |= {
            "criterion": args.criterion, "ratio": None if given or args.budget else ratio,
            "widths_rule": "given" if given else rule, "budget": args.budget, "multiple": args.multiple,
            "drop_blocks": args.drop_blocks, "coupled": args.coupled, "ignore": list(ignore), "calibrate": args.calibrate,
            **told, "widths": {unit.layer: kept for unit, kept in zip(report.units, report.widths)},
            "left_out": report.left_out, "params_original": report.params[0], "params": report.params[1],
            "macs_original": report.macs[0], "macs": report.macs[1], "seconds": round(report.seconds, 4),
            "seconds_widths": report.seconds_widths and round(report.seconds_widths, 4),
            "peak_mb": report.peak_mb, "report": str(report),
        }  # fmt: skip
    model, small = model.to(device), small.to(device)
    if measure:
        row |= measure({"smaller": small} | ({} if report is None else {"original": model}))
    if args.save:
        names = ("type", "criterion", "ratio", "budget", "widths", "input_size")
        known = description(row, names) | ({"weights": began} if began else {})
        save_checkpoint(args.save, small, math.inf, network=args.model, **known)
    if args.benchmark and report is None:  # the file may hold a smaller network already: this is what it was made from
        model = build(args.model, args.model_args).eval().to(device)
    return row, lambda: taken_out(args, model, small, shape)


def _told(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of methods that the command line may leave to them."""
    told = {"threshold": args.threshold, "lamda": args.lamda, "probe_samples": args.probe_samples}
    told = {name: value for name, value in told.items() if value is not None}
    return told | {"probe": args.probe, "ridge": args.ridge, "seed": args.seed}


def _measurement(
    args: argparse.Namespace, began: str | None, device: torch.device
) -> Callable[[dict[str, nn.Module]], dict[str, Any]]:
    """What measures networks, by name, on what --dataset names, which is opened here.

    began: torchvision's name for the weights that they began with.
    """
    name, _, folder = (args.dataset or "").partition(":")
    if name == "imagefolder":
        transform = transforms(args.model, began, args.input_size)
        images = _image_folder(Path(folder), transform)
        count = partial(accuracy, images=images, device=device, batch_size=args.test_batch_size)
        shown = {"transforms": " ".join(str(transform).split())}
    elif name in data.DATASETS:
        dataset = data.DATASETS[name]
        if args.input_size != dataset.shape:
            raise NeuronMergingError(
                f"--dataset {name} has images of {','.join(map(str, dataset.shape))}: --input-size says something else"
            )
        images = data.load(name, args.split, args.data).to(device)
        count = partial(_on_dataset, images=images, batch_size=args.test_batch_size)
        shown = {"split": args.split}
    else:
        raise NeuronMergingError(
            f"--dataset {args.dataset}: give imagefolder:DIR, or one of {', '.join(data.DATASETS)}"
        )

    def measure(networks: dict[str, nn.Module]) -> dict[str, Any]:
        with said(f"{args.model} does not fit --dataset {args.dataset}", typed=True):
            counts = {n: count(m) for n, m in networks.items()}
        rates = {n: round(100 * correct / max(1, total), 2) for n, (correct, total) in counts.items()}
        return {
            "dataset": args.dataset, "accuracy_original": rates.get("original"), "accuracy": rates["smaller"],
            "correct": counts["smaller"][0], "total": counts["smaller"][1], **shown,
        }  # fmt: skip

    return measure


def _on_dataset(model: nn.Module, images: data.Images, batch_size: int | None) -> tuple[int, int]:
    """(correct, total) on one of our data sets, whose classes the network has to have."""
    with torch.inference_mode():
        x = torch.zeros(1, *images.dataset.shape, dtype=dtype(model), device=images.labels.device)
        outputs = model.eval()(x).shape[1]
    if outputs != images.dataset.classes:
        raise NeuronMergingError(
            f"the data set has {images.dataset.classes} classes, the network {outputs} outputs: give --model-args,"
            " or images of its own (imagefolder:DIR)"
        )
    return on_images(model, images, batch_size)


def text(row: dict[str, Any]) -> str:
    """A row for people."""
    lines = [f"{row['model']}: {row['type']}"]
    if "report" in row:
        lines.append(row["report"])
    if "accuracy" in row:
        before = "" if row["accuracy_original"] is None else f"{row['accuracy_original']:.2f} % -> "
        lines.append(f"accuracy    {before}{row['accuracy']:.2f} % of {row['total']:,}")
    if "transforms" in row:
        lines.append(f"images      {row['transforms']}")
    return "\n".join(lines)
