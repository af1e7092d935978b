"""Checkpoints: dicts with at least `state_dict`, as the published ones; read without running anything they contain."""

import hashlib
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import NeuronMergingError
from files import write_atomically

HALF_ABOVE = 16 * 2**20  # bytes of float32 weights above which a file is stored in half precision


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file: its weights and what it says of itself (`acc` in %, `arch`, `widths`, …: all optional)."""

    path: Path
    sha256: str
    state_dict: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> list[int] | None:
        """Kept width of every unit if the file holds a pruned network."""
        return self.about.get("widths")

    @property
    def accuracy(self) -> float | None:
        """What the file says of its accuracy on the test set in %, if it says anything sensible."""
        acc = self.about.get("acc")
        acc = float(acc) if isinstance(acc, int | float | Tensor) and torch.as_tensor(acc).numel() == 1 else math.nan
        return acc if math.isfinite(acc) else None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read `path` with weights_only=True; half-precision weights are cast up to float32.

    Raises NeuronMergingError for a file that is missing, not a checkpoint, cut short, or holds NaN or Inf.
    """
    path = Path(path)
    digest = sha256(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch.load has to say of an odd file is said below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything out of the unpickler
        raise NeuronMergingError(
            f"{path} is not a checkpoint that can be read: cut short, damaged, or not made of plain tensors"
        ) from error
    about = dict(loaded) if isinstance(loaded, dict) else {}
    weights = about.pop("state_dict", None)
    if weights is None:  # a bare state_dict, as `torch.save(model.state_dict(), …)` writes it
        weights, about = about, {}
    if not isinstance(weights, dict) or not weights or not all(isinstance(w, Tensor) for w in weights.values()):
        raise NeuronMergingError(f"{path} holds no state_dict of tensors")
    odd = next((name for name, w in weights.items() if w.layout != torch.strided or w.is_quantized), None)
    if odd is not None:
        raise NeuronMergingError(f"{path}: {odd} is a sparse or quantised tensor, which this program does not read")
    weights = {name: w.float() if w.is_floating_point() and w.itemsize == 2 else w for name, w in weights.items()}
    for name, w in weights.items():
        bad = 0 if not w.is_floating_point() else int((~torch.isfinite(w)).sum())
        if bad:
            raise NeuronMergingError(f"{path}: {name} has {bad} values that are NaN or infinite")
    return Checkpoint(path, digest, weights, about)


def sha256(path: Path) -> str:
    """Of the file's content, in hexadecimal. Raises NeuronMergingError for a file that cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise NeuronMergingError(f"cannot read the checkpoint {path}: {error.strerror}") from error


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Copy the checkpoint's weights into `model` and return it; every name and shape has to fit.

    A pruned network may have biases that the full one lacks (they hold absorbed constants): those are created.
    Raises NeuronMergingError that names the first mismatch of each kind.
    """
    weights = checkpoint.state_dict
    if checkpoint.widths is not None:
        _create_biases(model, weights)
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
            " check --arch, --depth-wide and --dataset"
        )
    model.load_state_dict(weights, strict=False)
    return model


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The weights as a checkpoint file holds them, on the CPU.

    Of a model above `HALF_ABOVE` the weights of convolutions and linear layers are rounded to half precision, unless
    one would overflow or vanish; BatchNorm, whose variances leave that range easily, stays float32.
    """
    weights = {name: w.detach().cpu() for name, w in model.state_dict().items()}
    if sum(w.nbytes for w in weights.values()) <= HALF_ABOVE:
        return weights
    return {name: _halved(w) if w.dtype == torch.float32 and w.ndim > 1 else w for name, w in weights.items()}


def _halved(w: Tensor) -> Tensor:
    half = w.half()
    return half if torch.isfinite(half).all() and torch.equal(half == 0, w == 0) else w


def _create_biases(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is None and f"{name}.bias" in weights:
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]))


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def save_checkpoint(path: str | Path, model: nn.Module, **about: Any) -> None:
    """Write `model` and what is known `about` it (plain numbers, strings, lists), whole or not at all.

    Above `HALF_ABOVE` in half precision where that holds them: see `stored`.
    """
    weights = stored(model)
    write_atomically(Path(path), lambda file: torch.save({**about, "state_dict": weights}, file))
