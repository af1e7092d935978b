"""Checkpoints: dicts with at least `state_dict`, as the published ones; read without running anything they contain."""

import hashlib
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuron_merging.blocks import drop
from neuron_merging.errors import NeuronMergingError
from neuron_merging.files import write_atomically
from neuron_merging.graph.tracing import CONVS, NORMS, units

SAFETENSORS, ABOUT = ".safetensors", "neuron_merging"  # the ending, and the key of what else is known
HALF_ABOVE = 16 * 2**20  # bytes of float32 weights above which a file is stored in half precision
REMAINS = 1e-6  # of the norm of a layer's weights: what half precision may take from a small neuron


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file: its weights and what it says of itself (`acc` in %, `arch`, `widths`, …: all optional)."""

    path: Path
    sha256: str
    state_dict: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> list[int] | None:
        """Kept width of every unit if the file holds a pruned network and says so in sensible numbers."""
        widths = self.about.get("widths")
        return widths if isinstance(widths, list) and all(type(width) is int for width in widths) else None

    @property
    def accuracy(self) -> float | None:
        """What the file says of its accuracy in %, on its `split` or else the test set, if it says anything sensible."""
        acc = self.about.get("acc")
        acc = float(acc) if isinstance(acc, int | float | Tensor) and torch.as_tensor(acc).numel() == 1 else math.nan
        return acc if math.isfinite(acc) else None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read `path` with weights_only=True; half-precision weights are cast up to float32.

    Raises NeuronMergingError for a file that is missing, not a checkpoint, cut short, or holds NaN, Inf or variances below 0.
    """
    path = Path(path)
    digest = sha256(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch.load has to say of an odd file is said below
            read = _read_safetensors if path.suffix == SAFETENSORS else _read
            loaded = read(path)
    except Exception as error:  # a damaged file can raise nearly anything out of the unpickler
        raise NeuronMergingError(
            f"{path} is not a checkpoint that can be read: cut short, damaged, or not made of plain tensors"
        ) from error
    about = dict(loaded) if isinstance(loaded, dict) else {}
    weights = about.pop("state_dict", None)
    if weights is None:  # a bare state_dict, as `torch.save(model.state_dict(), …)` writes it
        weights, about = about, {}
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not named or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise NeuronMergingError(f"{path} holds no state_dict of tensors")
    odd = next((name for name, w in weights.items() if w.layout != torch.strided or w.is_quantized), None)
    if odd is not None:
        raise NeuronMergingError(f"{path}: {odd} is a sparse or quantised tensor, which this program does not read")
    weights = {name: w.float() if w.is_floating_point() and w.itemsize == 2 else w for name, w in weights.items()}
    for name, w in weights.items():
        bad = 0 if not w.is_floating_point() else int((~torch.isfinite(w)).sum())
        if bad:
            raise NeuronMergingError(f"{path}: {name} has {bad} values that are NaN or infinite")
        if name.endswith("running_var") and (w < 0).any():
            raise NeuronMergingError(f"{path}: {name} has variances below 0")
    return Checkpoint(path, digest, weights, about)


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
        return {**about, "state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (no mapping)


def sha256(path: Path) -> str:
    """Of the file's content, in hexadecimal. Raises NeuronMergingError for a file that cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise NeuronMergingError(f"cannot read the checkpoint {path}: {error.strerror}") from error


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Copy the checkpoint's weights into `model` and return it; every name and shape has to fit.

    Where the file holds a pruned network, `model` is cut to its shapes (`fit`).
    Raises NeuronMergingError that names the first mismatch of each kind.
    """
    weights = checkpoint.state_dict
    if "widths" in checkpoint.about:
        fit(model, weights)
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unknown = [name for name in weights if name not in expected]
    shapes = [name for name in expected if name in weights and expected[name].shape != weights[name].shape]
    problems = []
    if missing:
        problems.append(f"it lacks {missing[0]}{_and_more(missing)}")
    if unknown:
        problems.append(f"has {unknown[0]}{_and_more(unknown)} that the network does not have")
    if shapes:
        name = shapes[0]
        found, wanted = list(weights[name].shape), list(expected[name].shape)
        problems.append(f"{name} is {found} where {wanted} is expected{_and_more(shapes)}")
    if problems:
        raise NeuronMergingError(
            f"{checkpoint.path} does not fit {type(model).__name__}: {'; '.join(problems)};"
            " is it a file of another network (--arch, --depth-wide, --dataset, --model-args)?"
        )
    model.load_state_dict(weights, strict=False)
    return model


def fit(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Cut the layers of `model` (whose own weights do not matter) to the shapes that they have in `weights`; returns it.

    So a smaller network can be read into the code of the original one, whoever wrote it. A bias, or a BatchNorm's factor,
    that only the file has is made; a block that the file has as a constant is left out. What still does not fit is for
    `load_weights` to say.
    """
    if any(name.endswith(".value") for name in weights):
        for unit in units(model):
            if f"{unit.next}.value" in weights:
                drop(model, unit)
    for name, module in model.named_modules():
        found = weights.get(f"{name}.weight", weights.get(f"{name}.running_mean"))
        if found is None or not isinstance(module, (*CONVS, *NORMS, nn.Linear)):
            continue
        own = module.running_mean if module.weight is None else module.weight
        if own is None:
            continue
        for part in ("weight", "bias"):
            if getattr(module, part) is None and f"{name}.{part}" in weights:
                setattr(module, part, nn.Parameter(own.new_zeros(len(own))))
        if isinstance(module, NORMS):
            module.affine = module.weight is not None
        smaller = found.ndim == own.ndim and all(n <= m for n, m in zip(found.shape[:2], own.shape))
        if found.shape != own.shape and smaller and found.shape[2:] == own.shape[2:]:
            _resize(module, found.shape)
    return model


def _resize(module: nn.Module, shape: torch.Size) -> None:
    """Give a layer the weights' `shape`, or a BatchNorm the number of its channels."""
    for kind, tensors in (("_parameters", module._parameters), ("_buffers", module._buffers)):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.ndim:
                empty = tensor.new_empty(shape if name == "weight" else shape[:1])
                tensors[name] = nn.Parameter(empty) if kind == "_parameters" else empty
    if isinstance(module, NORMS):
        module.num_features = shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    else:
        depthwise = module.groups > 1 and module.groups == module.in_channels
        module.groups = shape[0] if depthwise else module.groups
        module.out_channels, module.in_channels = shape[0], shape[1] * module.groups


def stored(model: nn.Module, half_above: float | None = None) -> dict[str, Tensor]:
    """The weights as a checkpoint file holds them, on the CPU.

    Of a model above `half_above` bytes (`HALF_ABOVE`) tensors of two dimensions and more, as the weights of convolutions and
    linear layers are, are rounded to half precision where every neuron stays what it was to a thousandth, or to `REMAINS` of
    the layer's norm, as weight decay leaves dead ones; BatchNorm, whose variances leave that range easily, stays float32.
    """
    weights = {name: w.detach().cpu() for name, w in model.state_dict().items()}
    if sum(w.nbytes for w in weights.values()) <= (HALF_ABOVE if half_above is None else half_above):
        return weights
    return {name: _halved(w) if w.dtype == torch.float32 and w.ndim > 1 else w for name, w in weights.items()}


def _halved(w: Tensor) -> Tensor:
    half = w.half()
    neurons, lost = (x.flatten(1).norm(dim=1) for x in (w, half.float() - w))
    return half if (lost <= torch.maximum(1e-3 * neurons, REMAINS * neurons.norm())).all() else w


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def save_checkpoint(path: str | Path, model: nn.Module, half_above: float | None = None, **about: Any) -> None:
    """Write `model` and what is known `about` it (plain numbers, strings, lists), whole or not at all.

    As safetensors where that is the file's ending, with what is known in its metadata. Above `half_above` bytes in half
    precision where that holds them: see `stored`.
    """
    weights, path = stored(model, half_above), Path(path)
    if path.suffix == SAFETENSORS:
        from safetensors.torch import save

        content = save({name: w.contiguous().clone() for name, w in weights.items()}, {ABOUT: json.dumps(about)})
        write_atomically(path, lambda file: file.write(content))
    else:
        write_atomically(path, lambda file: torch.save({**about, "state_dict": weights}, file))
