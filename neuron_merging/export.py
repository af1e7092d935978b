"""Writes a network to a file that runs without this program (ONNX, torch.export or TorchScript), and checks that file."""

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neuron_merging.errors import NeuronMergingError, missing, reason
from neuron_merging.files import write_atomically

EXPORTS = {".onnx": "ONNX", ".pt2": "torch.export", ".pt": "TorchScript"}  # by the file's ending
ONNX = ("onnx", "onnxscript", "onnxruntime")  # the packages that an ONNX export needs
TOLERANCE = 1e-4  # largest error, as a share of the largest output
CHECKED = (1, 3)  # sizes of the batches that the file is checked with
Run = Callable[[Tensor], Any]


def export(model: nn.Module, path: str | Path, shape: tuple[int, ...]) -> float:
    """Write `model` to `path`, for any batch size, in the format that its ending says. Returns the file's largest error.

    The file is in float32, whatever the precision of `model`. shape: of one input, without the batch.

    Before anything is written, the content is loaded again and run on batches of `CHECKED` inputs; errors are relative to the
    largest output. Raises NeuronMergingError if a package is missing, the network cannot be exported, or an output is off by
    more than `TOLERANCE`.
    """
    path = Path(path)
    if path.suffix not in EXPORTS:
        raise NeuronMergingError(f"{path}: name a file that ends in {', '.join(EXPORTS)}")
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    here = {"generator": random, "dtype": torch.float32, "device": "cpu"}
    example, *batches = (torch.randn(count, *shape, **here) for count in (2, *CHECKED))
    write = {".onnx": _onnx, ".pt2": _pt2, ".pt": _torchscript}[path.suffix]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # they are for PyTorch's developers
        try:
            content, again = write(model, example)
            errors = [_off(again(x.clone()), model(x.clone())) for x in batches]
            off = torch.stack(errors).max().item()  # NaN, if any error is
        except ModuleNotFoundError as error:
            raise NeuronMergingError(f"{path}: {missing(str(error.name))}") from error
        except Exception as error:  # the exporters run the user's code and raise whatever it does
            raise NeuronMergingError(
                f"{type(model).__name__} cannot be exported to {EXPORTS[path.suffix]}: {reason(error)}"
            ) from error
    if not off <= TOLERANCE:
        raise NeuronMergingError(f"{path} was not written: its outputs would be off by {off:.1e}")
    write_atomically(path, lambda file: file.write(content))
    return off


def _off(outputs: Any, wanted: Any) -> Tensor:
    """The largest error of any output tensor, relative to the largest value in that tensor; NaN if an output is NaN."""
    outputs, wanted = (
        [x.to(torch.complex128) for x in tree_leaves(output) if isinstance(x, Tensor)] for output in (outputs, wanted)
    )
    pairs = zip(outputs, wanted, strict=True)
    return torch.stack([(f - w).abs().max() / w.abs().max().clamp(min=1e-12) for f, w in pairs]).max()


# Each of these returns the file's content, and a function that runs the network loaded from it. They write to memory first,
# because torch.jit.save ends the process if the disk is full.


def _onnx(model: nn.Module, example: Tensor) -> tuple[bytes, Run]:
    import onnxruntime

    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content)
    name = session.get_inputs()[0].name
    return content, lambda x: [torch.from_numpy(output) for output in session.run(None, {name: x.numpy()})]


def _pt2(model: nn.Module, example: Tensor) -> tuple[bytes, Run]:
    batch, file = torch.export.Dim("batch"), io.BytesIO()
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=({0: batch},)), file)
    return file.getvalue(), torch.export.load(io.BytesIO(file.getvalue())).module()


def _torchscript(model: nn.Module, example: Tensor) -> tuple[bytes, Run]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, example, strict=False), file)  # outputs may be a dict
    return file.getvalue(), torch.jit.load(io.BytesIO(file.getvalue()))
