"""Makes the user's own network: calls the callable that a name stands for, and loads weights from a file or torchvision."""

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
    """Call what `spec` names ("package.module:callable") with JSON keyword arguments. The module may be in the current folder.

    Raises NeuronMergingError if there is no such callable, it fails, or it returns no module.
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
    """The result of the callable that a flag names. Raises NeuronMergingError if there is none, or it fails."""
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
    """A guess what was meant by a file (net.py:make), a dot instead of the colon (net.make) or a call (net:make())."""
    module, _, name = spec.removesuffix("()").rpartition(":" if ":" in spec else ".")
    meant = f"{module.removesuffix('.py').removeprefix('./').replace('/', '.')}:{name}"
    return meant if _is_spec(meant) else None


def with_weights(model: nn.Module, spec: str, weights: str | None) -> Checkpoint | None:
    """Load `weights` into `model` and return the checkpoint, or None if they came from no file.

    weights: a file, which may hold a smaller network; or torchvision's name of some weights; or None to load nothing.
    Raises NeuronMergingError if there are no such weights or they do not fit.
    """
    if weights is None:
        return None
    path = Path(weights)
    if not path.exists():
        known = torchvision_weights(spec)
        if weights not in known:
            names = f", nor one of {', '.join(known)}" if known else ""
            raise NeuronMergingError(f"--weights {weights} is no file that is there{names}")
        # torchvision prints what it downloads
        with reported_as(f"--weights {weights}", typed=True), contextlib.redirect_stdout(sys.stderr):
            state_dict = known[weights].get_state_dict(progress=sys.stderr.isatty())
        load_weights(model, Checkpoint(path, "", state_dict))
        _as_torchvision_made(model, spec, weights)
        return None
    checkpoint = load_checkpoint(path)
    before = [parameter.shape for parameter in model.parameters()]
    fit(model, checkpoint.state_dict)
    is_ours = {"network", "widths"} & {*checkpoint.about}
    if not is_ours and before != [parameter.shape for parameter in model.parameters()]:
        print(f"warning: {path} has other widths than {spec}: the network was cut to them", file=sys.stderr)
    load_weights(model, checkpoint)
    _as_torchvision_made(model, spec, origin(checkpoint))
    return checkpoint


def origin(checkpoint: Checkpoint) -> str | None:
    """torchvision's name for the weights that a file's network started from; None if the file names none."""
    name = checkpoint.about.get("weights")
    return name if isinstance(name, str) else None


def torchvision_weights(spec: str) -> dict[str, Any]:
    """All weights, by name, that torchvision has for one of its models; empty for other models."""
    if not spec.startswith("torchvision.models"):
        return {}
    from torchvision.models import get_model_weights

    try:
        return dict(get_model_weights(spec.rpartition(":")[2]).__members__)
    except (ValueError, AttributeError):
        return {}


def _as_torchvision_made(model: nn.Module, spec: str, weights: str | None) -> None:
    """Set `transform_input` of GoogLeNet and Inception if they have torchvision's weights, as torchvision itself does.

    They then change their inputs to what those weights were trained on.
    """
    if weights in torchvision_weights(spec) and hasattr(model, "transform_input"):
        model.transform_input = True
