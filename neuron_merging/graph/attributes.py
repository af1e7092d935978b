"""Integers that modules keep beside their weights (out_channels, num_heads, …) made to agree with smaller weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from neuron_merging.graph.export import Network, module_path

BOLDEST = 3
WIDTHS = ("head", "dim", "channels", "chs", "features", "hidden", "embed", "width")  # in names of attributes
_BatchNorm = nn.modules.batchnorm._NormBase
_ConvTranspose = nn.modules.conv._ConvTransposeNd


def follow(
    model: nn.Module, changes: list[tuple[fx.Node, dict[str, Any], dict[str, Any]]], tensors: Mapping[str, Tensor],
    network: Network, levels: Mapping[type, int],
) -> None:  # fmt: skip
    """Make the integers of all modules whose weights were cut, or whose operations got other arguments, agree with them.

    levels: how bold to be, by class of modules that are not PyTorch's own: 0: not at all; 1: with attributes that equal a
    number which always changed in the module's forward in the same way; 2: with those which did so sometimes and have a
    name for a width; 3: whatever name they have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for node, _, became in changes:
        module = modules.get(module_path(node))
        for name in ("groups", "num_groups"):
            if name in became and isinstance(getattr(module, name, None), int):
                setattr(module, name, became[name])
        if "normalized_shape" in became and hasattr(module, "normalized_shape"):
            module.normalized_shape = tuple(became["normalized_shape"])
    owners = {alias.rpartition(".")[0] for name in tensors for alias in network.names[name]}
    for owner in owners:
        for kind, sizes in SIZES.items():
            if isinstance(modules[owner], kind):
                vars(modules[owner]).update(sizes(modules[owner]))
        if type(modules[owner]).__name__ == "Conv1D" and hasattr(modules[owner], "nf"):  # of transformers
            modules[owner].nf = modules[owner].weight.shape[1]
    for level in range(1, BOLDEST + 1) if levels else ():
        for path, numbers in _numbers(changes, tensors, network, strict=level == 1).items():
            if path in modules and levels.get(type(modules[path]), 0) == level:
                for module in (modules[path], *modules[path].children()):  # whose methods it may call
                    if not follows_itself(module):
                        _replace(module, numbers, WIDTHS if level == 2 else ("",))


def follows_itself(module: nn.Module) -> bool:
    """Whether a module is of a class whose integers are known."""
    return isinstance(module, tuple(SIZES))


def _convolution(module: Any) -> dict[str, int]:
    first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
    if isinstance(module, _ConvTranspose):
        return {"in_channels": first, "out_channels": second}
    return {"in_channels": second, "out_channels": first}


def _recurrent(module: Any) -> dict[str, int]:
    return {"input_size": module.weight_ih_l0.shape[1], "hidden_size": module.weight_hh_l0.shape[1]}


def _normalised(module: Any) -> dict[str, Any]:
    return {} if module.weight is None else {"normalized_shape": tuple(module.weight.shape)}


def _features(name: str) -> Callable[[Any], dict[str, int]]:
    def sizes(module: Any) -> dict[str, int]:
        tensor = module.weight if module.weight is not None else getattr(module, "running_mean", None)
        return {} if tensor is None else {name: len(tensor)}

    return sizes


SIZES: dict[type, Callable[[Any], dict[str, Any]]] = {
    nn.modules.conv._ConvNd: _convolution,
    nn.Linear: lambda module: dict(zip(("out_features", "in_features"), module.weight.shape)),
    nn.Embedding: lambda module: {"embedding_dim": module.weight.shape[1]},
    nn.LayerNorm: _normalised,
    nn.RMSNorm: _normalised,
    nn.GroupNorm: _features("num_channels"),
    nn.PReLU: _features("num_parameters"),
    nn.RNNBase: _recurrent,
    _BatchNorm: _features("num_features"),
}


def _numbers(
    changes: list[tuple[fx.Node, dict[str, Any], dict[str, Any]]], tensors: Mapping[str, Tensor], network: Network,
    strict: bool,
) -> dict[str, dict[int, int]]:  # fmt: skip
    """By module what old numbers became, where that is always the same; or, if not strict, the same wherever they changed."""
    found: dict[str, dict[int, set[int]]] = {}

    def add(path: str, old: Any, new: Any) -> None:
        if isinstance(old, int) and isinstance(new, int) and not isinstance(old, bool) and old > 1:
            found.setdefault(path, {}).setdefault(old, set()).add(new)

    for node, given, became in changes:
        for name, new in became.items():
            old = given.get(name, given.get("split_size"))
            old = [old] * len(new) if name == "split_sizes" and isinstance(old, int) else old
            pairs = zip(old, new) if isinstance(old, list | tuple) and isinstance(new, list | tuple) else [(old, new)]
            for a, b in pairs:
                add(module_path(node), a, b)
    for name, tensor in tensors.items():
        for a, b in zip(network.tensor(name).shape, tensor.shape):
            add(name.rpartition(".")[0], a, b)
    changed = {
        path: {old: news if strict else news - {old} for old, news in numbers.items() if news != {old}}
        for path, numbers in found.items()
    }
    return {
        path: {old: next(iter(n)) for old, n in numbers.items() if len(n) == 1} for path, numbers in changed.items()
    }


def _replace(module: nn.Module, numbers: Mapping[int, int], words: tuple[str, ...]) -> None:
    """Attributes with one of the words in their names that are such a number, or a tuple or list of them."""
    for name, value in list(vars(module).items()):
        if not any(word in name for word in words):
            continue
        if type(value) is int and value in numbers:
            setattr(module, name, numbers[value])
        elif type(value) in (tuple, list) and any(type(v) is int and v in numbers for v in value):
            setattr(module, name, type(value)(numbers.get(v, v) if type(v) is int else v for v in value))
