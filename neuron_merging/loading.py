"""A network of the user's own: made by a callable that is named, with weights from a file or from torchvision."""

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from neuron_merging.checkpoint import Checkpoint, fit, load_checkpoint, load_weights
from neuron_merging.checks import check_sizes, out_of_inference
from neuron_merging.errors import NeuronMergingError, reported_as


def build_model(spec: str, arguments: str | None = None) -> nn.Module:
    """Call what `spec` names, "package.module:callable" (also of the current folder), with JSON keyword arguments.

    Raises NeuronMergingError where that is not there, fails, or gives no module.
    """
    try:
        keywords = json.loads(arguments or "{}")
    except ValueError:
        keywords = None
    if not isinstance(keywords, dict):
        raise NeuronMergingError(f"--model-args {arguments}: give a JSON object, such as '{{\"num_classes\": 10}}'")
    model = called("--model", spec, "torchvision.models:resnet18", **keywords)
    if not isinstance(model, nn.Module):
        raise NeuronMergingError(f"--model {spec} gives {type(model).__name__}, no torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise NeuronMergingError(f"--model {spec} gives a network without parameters")
    check_sizes(model)
    return out_of_inference(model)


def called(flag: str, spec: str, example: str, **keywords: Any) -> Any:
    """What the callable that a flag names gives. Raises NeuronMergingError where it is not there or fails."""
    module, _, name = spec.partition(":")
    if not _is_spec(spec):
        raise NeuronMergingError(f"{flag} {spec}: give module:callable, such as {_meant(spec) or example}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with reported_as(f"{flag} {spec} cannot be made", typed=True), contextlib.redirect_stdout(sys.stderr):
        return getattr(importlib.import_module(module), name)(**keywords)


def _is_spec(text: str) -> bool:
    module, _, name = text.partition(":")
    return not module.endswith(".py") and all(part.isidentifier() for part in (*module.split("."), name))


def _meant(spec: str) -> str | None:
    """What is likely meant by a file instead of a module (net.py:make), a dot instead of the colon, or a call (net:make())."""
    module, _, name = spec.removesuffix("()").rpartition(":" if ":" in spec else ".")
    meant = f"{module.removesuffix('.py').removeprefix('./').replace('/', '.')}:{name}"
    return meant if _is_spec(meant) else None


def with_weights(model: nn.Module, spec: str, weights: str | None) -> Checkpoint | None:
    """Load `weights` into `model`: a file, also of a network that this program made smaller, or torchvision's name for some.

    None: the model keeps what it was made with. Raises NeuronMergingError where there are none or they do not fit.
    """
    if weights is None:
        return None
    path = Path(weights)
    if not path.exists():
        known = torchvision_weights(spec)
        if weights not in known:
            names = f", nor one of {', '.join(known)}" if known else ""
            raise NeuronMergingError(f"--weights {weights} is no file that is there{names}")
        with (
            reported_as(f"--weights {weights}", typed=True),
            contextlib.redirect_stdout(sys.stderr),
        ):  # says what it downloads
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


def torchvision_weights(spec: str) -> dict[str, Any]:
    """By name the weights that torchvision has for one of its own models."""
    if not spec.startswith("torchvision.models"):
        return {}
    from torchvision.models import get_model_weights

    try:
        return dict(get_model_weights(spec.rpartition(":")[2]).__members__)
    except (ValueError, AttributeError):
        return {}


def _as_torchvision_made(model: nn.Module, spec: str, weights: str | None) -> None:
    """GoogLeNet and Inception with torchvision's weights turn their inputs into those that the weights were trained on."""
    if weights in torchvision_weights(spec) and hasattr(model, "transform_input"):
        model.transform_input = True
