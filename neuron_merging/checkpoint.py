"""Checkpoint files: dicts that have at least a `state_dict`, like the published ones. Reading one never runs code in it."""

import argparse
import hashlib
import json
import math
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuron_merging.errors import NeuronMergingError, reported_as
from neuron_merging.files import write_atomically
from neuron_merging.graph.silence import leave_out
from neuron_merging.running import CONVS, NORMS

KEYS = (  # names under which a file may hold its state_dict; if it has several of them, the first in this list is read
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "net_state_dict", "weights", "params",
    "module", "ema", "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "params_ema", "ema_model",
)  # fmt: skip
WRAPPERS = {"module", "_orig_mod"}  # parts of names that nn.DataParallel and torch.compile add, at any depth
AVERAGED = "n_averaged"  # a count that torch.optim.swa_utils.AveragedModel saves with the weights
HARMLESS = [  # types of values that many files have beside the weights; making them runs no code of the file
    argparse.Namespace, PosixPath, np.dtype,
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")},
]  # fmt: skip
SAFETENSORS, ABOUT = ".safetensors", "neuron_merging"  # the file's ending; the key of `about` in its metadata
HALF_ABOVE = 16 * 2**20  # bytes of float32 weights above which a file is stored in half precision
REMAINS = 1e-6  # the most that half precision may take from a small neuron, as a share of its layer's norm


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file: its weights and what it says of itself (`acc` in %, `arch`, `widths`, …: all optional)."""

    path: Path
    sha256: str
    state_dict: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> list[int] | None:
        """Kept width of every unit, if the file holds a pruned network and lists them as whole numbers; else None."""
        widths = self.about.get("widths")
        return widths if isinstance(widths, list) and all(type(width) is int for width in widths) else None

    @property
    def made_by(self) -> str | None:
        """The method that made the network smaller, if this program wrote the file and names one; else None."""
        kind = self.about.get("type")
        return kind if isinstance(kind, str) and kind != "original" and "command" in self.about else None

    def history(self, names: Sequence[str]) -> dict[str, Any]:
        """How the network was made smaller: what the file says under these `names`. Empty if it was not made smaller."""
        plain = (str, int, float, list, dict)
        about = self.about if self.made_by else {}
        return {name: about[name] for name in names if isinstance(about.get(name), plain)}

    @property
    def accuracy(self) -> float | None:
        """The accuracy in % that the file states, on its `split` or else the test set; None if it states no finite number."""
        acc = self.about.get("acc")
        acc = float(acc) if isinstance(acc, Real | Tensor) and torch.as_tensor(acc).numel() == 1 else math.nan
        return acc if math.isfinite(acc) else None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read `path` with weights_only=True; half-precision weights are cast up to float32.

    The file is a state_dict itself, or has one under one of `KEYS`; everything else in it becomes `about`.
    Raises NeuronMergingError for a file that is missing, cut short, not a checkpoint, not made of tensors and plain values
    alone, or that has NaN, Inf or variances below 0.
    """
    path = Path(path)
    digest = sha256(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # instead of torch.load's warnings, an error is raised below
        try:
            loaded = (_read_safetensors if path.suffix == SAFETENSORS else _read)(path)
        except Exception as error:  # a damaged file can raise nearly anything out of the unpickler
            raise NeuronMergingError(f"{path} is not a checkpoint that can be read: {_unreadable(error)}") from error
    weights, about = _opened(path, loaded)
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
    with torch.serialization.safe_globals(HARMLESS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unreadable(error: Exception) -> str:
    """Why torch.load refused a file, and what to do."""
    if "TorchScript" in str(error):
        return "it is a TorchScript archive; save the state_dict() of the network that it was made of"
    refused = re.search(r"(?:GLOBAL|class) ([\w.]+\.\w+)", str(error))
    if refused is None:
        return "cut short, damaged, or not made of plain tensors"
    return (
        f"beside tensors it holds {refused[1]}, which only code of others could make again; where you trust that,"
        " read it with torch.load(FILE, weights_only=False) and save the network's state_dict() alone with torch.save"
    )


def _opened(path: Path, loaded: Any, depth: int = 3) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state_dict in a file's content, at most `depth` dicts deep, and everything beside it.

    Raises NeuronMergingError that lists what the file holds, if it has no state_dict.
    """
    if _is_state_dict(loaded):  # as `torch.save(model.state_dict(), …)` writes it
        return loaded, {}
    entries = loaded if isinstance(loaded, dict) else {}
    known = [key for key in KEYS if isinstance(entries.get(key), dict) and entries[key]] if depth else []
    if known:
        if len(known) > 1:
            warnings.warn(f"{path} holds {', '.join(known)}: {known[0]} is read; save another alone", stacklevel=3)
        weights, about = _opened(path, entries[known[0]], depth - 1)
        return weights, {name: value for name, value in entries.items() if name != known[0]} | about
    odd_first = sorted(entries.items(), key=lambda entry: isinstance(entry[1], Tensor))
    listed = ", ".join(f"{str(name)[:40]} ({type(value).__name__})" for name, value in odd_first[:6])
    raise NeuronMergingError(
        f"{path} holds no state_dict of tensors, alone or under a usual key, but {listed or type(loaded).__name__}"
        f"{_and_more(odd_first[5:])}: save the network's state_dict() alone"
    )


def _is_state_dict(value: Any) -> bool:
    """Whether `value` is a dict from names to tensors, with at least one entry."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(w, Tensor) for name, w in value.items())
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
        return {**about, "state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (no mapping)


def sha256(path: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal. Raises NeuronMergingError for a file that cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise NeuronMergingError(f"cannot read the checkpoint {path}: {error.strerror}") from error


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Copy the checkpoint's weights into `model` and return it. All names (as `unwrapped` gives them) and shapes must fit.

    If the file holds a pruned network, `model` is first cut to its shapes (`fit`).
    Raises NeuronMergingError that names the first mismatch of each kind.
    """
    weights = unwrapped(checkpoint.state_dict, model.state_dict())
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
        actual, wanted = list(weights[name].shape), list(expected[name].shape)
        problems.append(f"{name} is {actual} where {wanted} is expected{_and_more(shapes)}")
    if problems:
        raise NeuronMergingError(
            f"{checkpoint.path} does not fit {type(model).__name__}: {'; '.join(problems)};"
            " is it a file of another network (--arch, --depth-wide, --dataset, --model-args)?"
        )
    with reported_as(f"{checkpoint.path} cannot be loaded into {type(model).__name__}"):
        model.load_state_dict(weights, strict=False)
    return model


def unwrapped(weights: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """`weights` without the parts of their names that a wrapper added, if more of them are then `names` of the network.

    Examples are module. (nn.DataParallel), _orig_mod. (torch.compile) and model. or net. (an attribute of a training module).
    Removed are prefixes that all names share, and `WRAPPERS` at any depth.
    """
    candidates = [weights]
    for wrappers in (set(), WRAPPERS):
        paths = {name: [part for part in name.split(".") if part not in wrappers] for name in weights}
        paths.pop(AVERAGED, None)
        while paths and all(paths.values()):
            renamed = {".".join(path): weights[name] for name, path in paths.items()}
            if len(renamed) == len(paths):
                candidates.append(renamed)
            if len({path[0] for path in paths.values()}) > 1:
                break
            paths = {name: path[1:] for name, path in paths.items()}
    return max(candidates, key=lambda renamed: sum(name in names for name in renamed))  # the first of several best ones


def fit(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Cut the layers of `model` to the shapes that they have in `weights`, and return it. Its own weights do not matter.

    So a smaller network can be loaded into the code of the original one, whatever program wrote the file. A bias, or a
    BatchNorm's factor, that only the file has is added. A block that the file has as a constant is left out. `fit` does not
    complain of other differences; `load_weights` does.
    """
    weights = unwrapped(weights, model.state_dict())
    if any(name.endswith(".value") for name in weights):
        leave_out(model, weights)
    for name, module in model.named_modules():
        stored_weight = weights.get(f"{name}.weight", weights.get(f"{name}.running_mean"))
        if stored_weight is None or not isinstance(module, (*CONVS, *NORMS, nn.Linear)):
            continue
        own = module.running_mean if module.weight is None else module.weight
        if own is None:
            continue
        for part in ("weight", "bias"):
            if getattr(module, part) is None and f"{name}.{part}" in weights:
                setattr(module, part, nn.Parameter(own.new_zeros(len(own))))
        if isinstance(module, NORMS):
            module.affine = module.weight is not None
        smaller = stored_weight.ndim == own.ndim and all(n <= m for n, m in zip(stored_weight.shape[:2], own.shape))
        if stored_weight.shape != own.shape and smaller and stored_weight.shape[2:] == own.shape[2:]:
            _resize(module, stored_weight.shape)
    return model


def _resize(module: nn.Module, shape: torch.Size) -> None:
    """Give a layer weights of `shape`, or a BatchNorm that number of channels."""
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

    If the model has more than `half_above` bytes (None: `HALF_ABOVE`), the weights of convolutions and linear layers are
    rounded to half precision. A layer stays in float32 if a neuron would change by more than a thousandth of its norm; for
    the tiny neurons that weight decay leaves, `REMAINS` of the layer's norm is allowed. BatchNorm stays in float32, as
    its variances can be outside of the range of half precision.
    """
    weights = {name: w.detach().cpu() for name, w in model.state_dict().items()}
    if sum(w.nbytes for w in weights.values()) <= (HALF_ABOVE if half_above is None else half_above):
        return weights
    return {name: _halved(w) if w.dtype == torch.float32 and w.ndim > 1 else w for name, w in weights.items()}


def _halved(w: Tensor) -> Tensor:
    half = w.half()
    neurons, lost = (x.flatten(1).norm(dim=1) for x in (w, half.float() - w))
    return half if (lost <= torch.maximum(1e-3 * neurons, REMAINS * neurons.norm())).all() else w


def _and_more(names: Sequence[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def save_checkpoint(path: str | Path, model: nn.Module, half_above: float | None = None, **about: Any) -> None:
    """Write `model` and what is known `about` it (plain numbers, strings, lists). A file is written whole or not at all.

    A file that ends in .safetensors has `about` in its metadata. half_above: see `stored`.
    """
    weights, path = stored(model, half_above), Path(path)
    if path.suffix == SAFETENSORS:
        from safetensors.torch import save

        content = save({name: w.contiguous().clone() for name, w in weights.items()}, {ABOUT: json.dumps(about)})
        write_atomically(path, lambda file: file.write(content))
    else:
        write_atomically(path, lambda file: torch.save({**about, "state_dict": weights}, file))
