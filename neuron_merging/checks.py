"""What a network has to be before anything is made of it: complete, finite, copyable, and able to run on its input."""

import copy
from collections.abc import Sequence
from functools import partial
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from neuron_merging.counting import count_macs
from neuron_merging.errors import NeuronMergingError, said
from neuron_merging.graph.streams import Stream
from neuron_merging.graph.tracing import NORMS, Unit, check_wrapper
from neuron_merging.network import check_finite


def check_sizes(model: nn.Module) -> None:
    """Raises NeuronMergingError where a layer has no size yet, since it has not seen an input."""
    for name, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise NeuronMergingError(f"{name} ({type(module).__name__}) has no size yet: run the network once")


def check_weights(model: nn.Module) -> None:
    """Raises NeuronMergingError where a parameter or a running statistic is NaN or infinite (or a variance below 0), or
    there is none yet, or the network is wrapped in something else.
    """
    check_wrapper(model)
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


def check_copies(model: nn.Module) -> None:
    """Raises NeuronMergingError where a network cannot be copied, and names the tensor that stands in the way, if it is one."""
    try:
        with said(f"{type(model).__name__} cannot be copied", typed=True):
            copy.deepcopy(model)
    except NeuronMergingError as error:
        for name, module in model.named_modules():
            for attribute, value in (vars(module) | module._buffers).items():
                if isinstance(value, Tensor) and not value.is_leaf:
                    raise NeuronMergingError(
                        f"{f'{name}.'.lstrip('.')}{attribute} cannot be copied, being computed from what is learned: detach"
                        " it, or remove what torch.nn.utils.prune or weight_norm left"
                    ) from error
        raise


def network_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates for one input. Raises NeuronMergingError where the network does not run on such a one."""
    with said(f"{type(model).__name__} does not run on an input of shape {list(shape)}"):
        return count_macs(model, shape)


@torch.no_grad()
def check_vectors(model: nn.Module, units: Sequence[Unit | Stream], shape: tuple[int, ...]) -> None:
    """Raises NeuronMergingError where a BatchNorm1d behind a linear layer has inputs [B, L, C]: it normalises L, not C."""

    def check(layer: str, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].ndim > 2:
            raise NeuronMergingError(f"{name} normalises places, not what {layer} gives at each: ignore {layer}")

    hooks = []
    for unit in units:
        if isinstance(unit, Stream) and isinstance(model.get_submodule(unit.layer), nn.Linear):
            for name in {place.module for place in unit.followers}:
                hook = partial(check, unit.layer, name)
                hooks.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        if hooks:
            count_macs(model, shape)
    finally:
        for hook in hooks:
            hook.remove()


def input_shape(example_input: Tensor | Sequence[int] | None, images: Tensor | None) -> tuple[int, ...] | None:
    """Of one input, without the batch."""
    if isinstance(example_input, Tensor):
        if example_input.dtype in (torch.int32, torch.int64):  # the words of an embedding; images have others
            raise NeuronMergingError(
                "example_input is of whole numbers, which cannot be made up: leave it out (prune, merge), or give a shape"
            )
        return tuple(example_input.shape[1:])
    if example_input is not None:
        if not isinstance(example_input, Sequence) or not all(isinstance(side, Integral) for side in example_input):
            raise NeuronMergingError(
                f"example_input {example_input!r}: give a tensor of inputs [B, …] or the shape of one, (3, 32, 32)"
            )
        return tuple(example_input)
    return None if images is None else tuple(images.shape[1:])
