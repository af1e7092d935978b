"""Checks of a network before it is made smaller: it must be complete, finite, copyable, and able to run on its input."""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune as masks

from neuron_merging.counting import count_macs
from neuron_merging.errors import NeuronMergingError, reported_as
from neuron_merging.graph.neurons import check_finite
from neuron_merging.running import CONVS, NORMS, dtype, floats, quick_macs

SIDES = (32, 224)  # sides of the images that a network is tried on if no input is given
INSIDE = {  # by class of a wrapper: where the network that can be exported is
    "DataParallel": "its .module", "DistributedDataParallel": "its .module", "AveragedModel": "its .module",
    "OptimizedModule": "its ._orig_mod", "RecursiveScriptModule": "as it was before",
    "TopLevelTracedModule": "as it was before",
}  # fmt: skip
OPAQUE = ("OptimizedModule", "RecursiveScriptModule", "TopLevelTracedModule")  # cannot even be a part of a network


def check_module(model: Any) -> None:
    """Raises NeuronMergingError if `model` is no network, for example a state_dict."""
    if not isinstance(model, nn.Module):
        raise NeuronMergingError(f"model is of type {type(model).__name__}: give the network, a torch.nn.Module")


def check_sizes(model: nn.Module) -> None:
    """Raises NeuronMergingError for a lazy layer, which has no size before its first input."""
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise NeuronMergingError(f"{name} ({type(module).__name__}) has no size yet: run the network once")


def check_weights(model: nn.Module) -> None:
    """Raises NeuronMergingError for weights or wrappers that cannot be worked with:

    - a parameter or running statistic that is NaN or infinite, or a variance below 0,
    - a layer that has no size or no weights yet,
    - a network, or a part of one, inside a wrapper that hides it.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in (OPAQUE if name else INSIDE) and next(module.parameters(), None) is not None:
            what, where = (f"{name} ({kind})", ", in its place") if name else (kind, "")
            raise NeuronMergingError(f"{what} cannot be read: give the network inside, {INSIDE[kind]}{where}")
    check_sizes(model)
    for name, module in model.named_modules():
        values = list(module.parameters(recurse=False))
        if isinstance(module, NORMS) and module.running_mean is not None:
            values += [module.running_mean, module.running_var]
        if any(value.is_meta for value in values):
            raise NeuronMergingError(f"{name} ({type(module).__name__}) has no weights yet: it is on the meta device")
        if values:
            check_finite(name or type(module).__name__, *(value.detach() for value in values))
        if isinstance(module, NORMS) and module.running_var is not None and (module.running_var < 0).any():
            raise NeuronMergingError(f"{name} ({type(module).__name__}) has variances below 0")


def check_copies(model: nn.Module, shape: tuple[int, ...] | None = None) -> None:
    """Raises NeuronMergingError if a network cannot be copied; names the tensor that prevents it, if it is one.

    With a `shape`, also raises it if a copy gives other outputs than the network on an input of that shape.
    """
    try:
        with reported_as(f"{type(model).__name__} cannot be copied", typed=True):
            copied = copy.deepcopy(model).eval()
    except NeuronMergingError as error:
        for name, module in model.named_modules():
            for attribute, value in (vars(module) | module._buffers).items():
                if isinstance(value, Tensor) and not value.is_leaf:
                    raise NeuronMergingError(
                        f"{f'{name}.'.lstrip('.')}{attribute} cannot be copied, as it is not a leaf tensor: detach it, or"
                        " remove the masks of torch.nn.utils.prune and weight_norm"
                    ) from error
        raise
    off = 0.0 if shape is None else _difference(model, copied, shape)
    if off > 0.01:
        raise NeuronMergingError(
            f"a copy of {type(model).__name__} (copy.deepcopy) gives other outputs than the network, off by {off:.1%}:"
            " copy.deepcopy does not copy a hook or another part of it"
        )


@torch.no_grad()
def _difference(model: nn.Module, copied: nn.Module, shape: tuple[int, ...]) -> float:
    """How far the outputs of two networks differ on one input, in evaluation mode; 0 if they cannot be compared."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, *shape, generator=random, dtype=torch.float32, device="cpu")
    with contextlib.suppress(Exception), _as_before(model):  # whether it runs is checked elsewhere
        x = x.to(next(model.parameters()).device, dtype(model))
        first, second, of_copy = (floats(network.eval()(x.clone())) for network in (model, model, copied))
        return _off(of_copy, first) if _off(second, first) <= 0.01 else 0.0  # 0: the network itself is random
    return 0.0


def _off(outputs: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative error of any output; infinite if the number or shapes of outputs differ."""
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in wanted]:
        return float("inf")
    pairs = ((a.double(), b.double()) for a, b in zip(outputs, wanted))
    errors = ((a - b).norm() / b.norm().clamp(min=1e-12) for a, b in pairs)
    return max((float(error) for error in errors), default=0.0)


@contextlib.contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards, restore what a forward pass may change in a network: modes, attributes, buffers."""
    attributes = {module: dict(vars(module)) for module in model.modules()}
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        yield
    finally:
        take_modes(model, modes)
        for module, before in attributes.items():
            vars(module).update(before)
            for name in vars(module).keys() - before:
                del vars(module)[name]
        for buffer, before in buffers:
            buffer.copy_(before)


def take_modes(model: nn.Module, modes: dict[nn.Module, bool]) -> None:
    """Put every module back into its training or evaluation mode, also a module that changes its parts when it is switched."""
    model.train(not modes[model])
    for module, mode in modes.items():  # every module comes before its parts
        if module.training != mode:
            module.train(mode)
        module.training = mode


def out_of_inference(model: nn.Module) -> nn.Module:
    """`model`; or a copy if it was made under torch.inference_mode, whose tensors cannot be changed."""
    if not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        return model
    check_copies(model)
    copied = copy.deepcopy(model)
    take_modes(copied, {module: before.training for module, before in zip(copied.modules(), model.modules())})
    return copied


def without_masks(model: nn.Module) -> nn.Module:
    """`model`; or, if torch.nn.utils.prune masks some of its weights, a copy in which these are 0 for good, without masks."""
    masked = {
        (module, hook._tensor_name): getattr(module, hook._tensor_name)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, masks.BasePruningMethod)
    }
    if not masked:
        return model
    with reported_as(f"{type(model).__name__} cannot be copied", typed=True):
        copied = copy.deepcopy(model, {id(weight): weight.detach().clone() for weight in masked.values()})
    names = {module: name for name, module in model.named_modules()}
    for module, tensor in masked:
        masks.remove(copied.get_submodule(names[module]), tensor)
    return copied


def network_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates for one input of `shape`. Raises NeuronMergingError if the network does not run on it."""
    check_runs(model, shape)
    return count_macs(model, shape)


def check_runs(model: nn.Module, shape: tuple[int, ...], example: Tensor | None = None) -> None:
    """Raises NeuronMergingError if the network does not run on an input of `shape`.

    example: the tensor of inputs that the shape was read from, if there was one.
    """
    what = f"{type(model).__name__} does not run on an input of shape {list(shape)}"
    try:
        with reported_as(what):
            quick_macs(model, shape)
    except NeuronMergingError as error:
        needed = _needed_inputs(model)
        if len(needed) > 1:
            raise NeuronMergingError(
                f"{type(model).__name__} takes {len(needed)} inputs ({', '.join(needed)}), and only one can be made up:"
                " give all of them, example_input=(…, …)"
            ) from error
        if len(shape) > 1 and runs(model, shape[1:]):
            raise NeuronMergingError(f"{what}: give it without the batch: {shape[1:]}") from error
        if example is not None and runs(model, tuple(example.shape)):
            raise NeuronMergingError(f"{what}: example_input is a batch of inputs, give example_input[None]") from error
        raise


def runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a network runs on one input of this shape."""
    with contextlib.suppress(Exception):
        quick_macs(model, shape)
        return True
    return False


@torch.no_grad()
def takes(model: nn.Module, x: Tensor) -> bool:
    """Whether a network runs on the inputs x without a change of their dtype; an embedding needs whole numbers."""
    with contextlib.suppress(Exception):
        copy.deepcopy(model).eval()(x.to(next(model.parameters()).device, copy=True))
        return True
    return False


def as_taken(model: nn.Module, x: Tensor) -> Tensor:
    """Inputs in the network's precision; whole numbers stay whole where it takes them, as an embedding does."""
    return x if not x.is_floating_point() and takes(model, x[:1]) else x.to(dtype(model))


def zeros(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Two inputs of this shape, whole numbers where the network takes no others."""
    whole = torch.zeros(2, *shape, dtype=torch.int64, device="cpu")
    real = whole.to(dtype(model))
    return whole if takes(model, whole[:1]) and not takes(model, real[:1]) else real


def _needed_inputs(model: nn.Module) -> list[str]:
    """The names of the arguments of `forward` that have no default."""
    parameters = inspect.signature(model.forward).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in several]


def _first(model: nn.Module) -> nn.Module | None:
    """The first layer that shows what shape the inputs have."""
    return next((m for m in model.modules() if isinstance(m, (*CONVS, nn.Linear, nn.Embedding))), None)


def likely_shape(model: nn.Module) -> tuple[int, ...] | None:
    """A shape of inputs that a network runs on, guessed from its first layer; None if no guess runs."""
    first = _first(model)
    if isinstance(first, CONVS):
        shapes = [(first.in_channels, *[side] * len(first.kernel_size)) for side in SIDES]
    else:
        shapes = [(getattr(first, "in_features", 16),)] if first else []
    return next((shape for shape in shapes if runs(model, shape)), None)


def input_shape(example_input: Tensor | Sequence[int] | None, images: Tensor | None) -> tuple[int, ...] | None:
    """The shape of one input, without the batch; None if it is unknown.

    Raises NeuronMergingError if `example_input` is neither a tensor nor a shape, or `images` is no tensor.
    """
    if images is not None and not isinstance(images, Tensor):
        raise NeuronMergingError(f"images of type {type(images).__name__}: give a tensor of inputs [B, …]")
    if isinstance(example_input, Tensor):
        return tuple(example_input.shape[1:])
    if example_input is None:
        return None if images is None else tuple(images.shape[1:])
    if not isinstance(example_input, Sequence) or not all(isinstance(side, Integral) for side in example_input):
        plain = isinstance(example_input, int | float | str | tuple | list)
        what = repr(example_input)[:60] if plain else f"of type {type(example_input).__name__}"
        raise NeuronMergingError(
            f"example_input {what}: give a tensor of inputs [B, …] or the shape of one, (3, 32, 32)"
        )
    return tuple(example_input)
