"""A smaller network: parameters and buffers cut along their axes, and the numbers in the forward pass that follow."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from neuron_merging.errors import NeuronMergingError, reason
from neuron_merging.graph.attributes import BOLDEST, follow, follows_itself
from neuron_merging.graph.axes import Leaf, count
from neuron_merging.graph.export import Network, module_path
from neuron_merging.graph.rules import Scaled
from neuron_merging.graph.silence import silence, silence_graph, silent_value
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.units import Unit
from neuron_merging.graph.weights import Absorbed, Cut, cut_tensors, of_rows

TOLERANCE = 1e-4  # of the largest output: by which a class's forward may differ from the graph's


@dataclass(frozen=True)
class Smaller:
    """A smaller network.

    model: of the user's own class, or the graph where its forward does not run with smaller weights, or gives something
    else; why: what it did then. graph: the graph in either case, for batches of any size if the survey's network is dynamic.
    copies: by node of the survey's graph the node of this one, to run both side by side.
    """

    model: nn.Module
    graph: fx.GraphModule
    why: str | None
    copies: dict[fx.Node, fx.Node]

    @property
    def own_class(self) -> bool:
        """Whether the network is of the user's own class."""
        return self.why is None


Keep = Mapping[Space, Tensor | Sequence[int]]


@torch.no_grad()
def cut(survey: Survey, keep: Keep, absorbed: Sequence[Absorbed] = ()) -> Smaller:
    """The network with these indices of its spaces, spaces that are not in `keep` being whole.

    absorbed: what readers take over from dropped indices. A residual branch of which none is kept becomes a constant; the nodes
    of its graph then have no copies. Raises NeuronMergingError where an index is none of the space's, or nothing is kept.
    """
    masks = {space: _mask(space, indices) for space, indices in keep.items()}
    silent = {space: silent_value(survey, space) for space, mask in masks.items() if not mask.any()}
    by_leaf = {space.leaf: mask for space, mask in masks.items() if space not in silent}
    smaller = cut_tensors(survey, by_leaf, absorbed)
    constants = {space: of_rows(survey, space.readers[0].name, rows, by_leaf) for space, rows in silent.items()}
    kept = {leaf: int(mask.sum()) for leaf, mask in by_leaf.items()}
    graph, changes, copies = cut_graph(survey, smaller, kept, constants)
    expected = run(graph, survey.network)
    branches = {space.unit: rows for space, rows in constants.items()}
    model, why = _of_own_class(survey.network, smaller, branches, changes, expected)
    return Smaller(graph if why else _in_modes(model, survey.network), graph, why, copies)


def _of_own_class(
    network: Network, smaller: Cut, branches: Mapping[Unit, Tensor], changes: Changes, expected: Sequence[Tensor]
) -> tuple[nn.Module, str | None]:
    """The user's model with smaller weights, and what is wrong with it, if anything is.

    Where its forward fails, the integers of the innermost module that was running, and of all modules of its class, follow
    the widths more boldly; where it gives other outputs, those of all classes that have changed operations.
    """
    modules = dict(network.model.named_modules())
    levels: dict[type, int] = {}
    first = None
    while True:
        model = _own(network, smaller)
        follow(model, changes, smaller.tensors, network, levels)
        for unit, constant in branches.items():
            silence(model, unit, constant)
        active: list[str] = []
        try:
            why = difference(run(model, network, active), expected)
        except Exception as error:  # the user's forward can do anything with its weights
            why = f"{type(error).__name__}: {reason(error)}"
        first = first or why
        running = [type(modules[name]) for name in reversed(active) if not follows_itself(modules[name])][:1]
        if why and not active:
            touched = [modules[path] for path in (module_path(node) for node, _, _ in changes) if path in modules]
            running = list(dict.fromkeys(type(module) for module in touched if not follows_itself(module)))
        bolder = [kind for kind in running if levels.get(kind, 0) < BOLDEST]
        if why is None or not bolder:
            return model, first if why else None
        for kind in bolder:
            levels[kind] = levels.get(kind, 0) + 1


def _mask(space: Space, indices: Tensor | Sequence[int]) -> Tensor:
    indices = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
    if indices.numel() == 0 and space.unit is not None and space.unit.branch:
        return torch.zeros(space.size, dtype=torch.bool, device="cpu")
    if indices.numel() == 0 or int(indices.min()) < 0 or int(indices.max()) >= space.size:
        raise NeuronMergingError(f"{space.name}: keep at least one index, and those from 0 to {space.size - 1}")
    left = torch.zeros(space.size, dtype=torch.bool, device="cpu")
    left[indices] = True
    return left


Changes = list[tuple[fx.Node, dict[str, Any], dict[str, Any]]]


def cut_graph(
    survey: Survey, smaller: Cut, kept: Mapping[Leaf, int], constants: Mapping[Space, Tensor]
) -> tuple[fx.GraphModule, Changes, dict[fx.Node, fx.Node]]:
    """The graph with smaller parameters, by node what its arguments were and became, and the copies of its nodes.

    constants: by unit without neurons, what its branch gives.
    """
    old = survey.network.graph
    new, copies = fx.Graph(), {}
    new.output(new.graph_copy(old.graph, copies))
    new._codegen = copy.deepcopy(old.graph._codegen)
    changes: Changes = []
    for node, rewrites in survey.analysis.rewrites.items():
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args)) | node.kwargs
        became: dict[str, Any] = {}
        for rewrite in rewrites:
            if any(count(axis, kept) != axis.size for axis in rewrite.axes):
                arguments = rewrite.arguments(lambda axis: count(axis, kept))
                became |= arguments
                _rewrite(copies, node, arguments, rewrite.target)
        if became:
            changes.append((node, given, became))
    graph = fx.GraphModule(old, new)
    for space, constant in constants.items():
        silence_graph(graph, survey, space, copies, constant)
    for node, bias in smaller.biases.items():
        _add_bias(graph, copies[node], bias)
    own: dict[str, nn.Parameter | Tensor] = {}
    for name in {node.target for node in new.nodes if node.op == "get_attr"} & survey.network.names.keys():
        first, like = survey.network.names[name][0], survey.network.tensor(name)
        if first not in own:
            own[first] = _like(smaller.tensors[first] if first in smaller.tensors else like.detach().clone(), like)
        _put(graph, name, own[first])
    if constants or smaller.biases:
        graph.recompile()
    return graph, changes, copies


def _rewrite(copies: dict[fx.Node, fx.Node], node: fx.Node, arguments: dict[str, Any], target: Any) -> None:
    """Give the copy of a node other arguments, and another target, where there is one."""
    new, graph = copies[node], copies[node].graph

    def moved(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return copies[value]
        if isinstance(value, Scaled):
            with graph.inserting_before(new):
                times = graph.call_function(operator.mul, (copies[value.node], value.new))
                return graph.call_function(operator.floordiv, (times, value.old))
        return [moved(part) for part in value] if isinstance(value, list | tuple) else value

    arguments = {name: moved(value) for name, value in arguments.items()}
    if target is not None:
        new.target, new.args, new.kwargs = target, tuple(arguments.values()), {}
        return
    names = [a.name for a in node.target._schema.arguments]
    args, kwargs = list(new.args), dict(new.kwargs)
    for name, value in arguments.items():
        place = names.index(name)
        if place < len(args):
            args[place] = value
        else:
            kwargs[name] = value
    new.args, new.kwargs = tuple(args), kwargs


def _add_bias(graph: fx.GraphModule, layer: fx.Node, bias: Tensor) -> None:
    """Give a layer of the graph, which has none, a bias."""
    path = layer.args[1].target.rpartition(".")[0]
    module = graph.get_submodule(path)
    module.bias = nn.Parameter(bias.clone(), requires_grad=module.weight.requires_grad)
    with graph.graph.inserting_before(layer):
        own = graph.graph.get_attr(f"{path}.bias")
    layer.args = (*layer.args[:2], own, *layer.args[3:])


def _like(tensor: Tensor, original: Tensor) -> Tensor:
    """A parameter where the original is one, else the tensor."""
    if isinstance(original, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=original.requires_grad)
    return tensor


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """A tensor in the place of the parameter or buffer of this name."""
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, tensor)


def _own(network: Network, smaller: Cut) -> nn.Module:
    """A copy of the user's model with smaller tensors; those that share one share it again."""
    made = {name: _like(tensor.clone(), network.tensor(name)) for name, tensor in smaller.tensors.items()}
    instead = {id(network.tensor(name)): tensor for name, tensor in made.items()}
    model = copy.deepcopy(network.model, instead)  # what is replaced is not copied
    for module in model.modules():  # copies of a GraphModule are in training mode
        module.training = False
    for name, tensor in made.items():
        for alias in network.names[name]:
            _put(model, alias, tensor)
    for node, bias in smaller.biases.items():
        module = model.get_submodule(network.names[node.args[1].target][0].rpartition(".")[0])
        module.bias = nn.Parameter(bias.clone(), requires_grad=module.weight.requires_grad)
    return model


def _in_modes(model: nn.Module, network: Network) -> nn.Module:
    """Give a model of the user's class the modes, and the cache of a language model, that the original has."""
    for name, module in model.named_modules():
        module.training = network.modes.get(name, False)
        if network.cached and hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = True
    return model


def run(model: nn.Module, network: Network, active: list[str] | None = None) -> list[Tensor]:
    """The tensors that a model gives for the example inputs. active: is given the names of the modules that are running."""
    args, kwargs = copy.deepcopy((network.args, network.kwargs))  # which a forward pass may overwrite
    if not isinstance(model, fx.GraphModule) or any(map(_overwrites, model.graph.nodes)):
        model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if active is not None:
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: active.append(name))
            module.register_forward_hook(lambda *_: active.__delitem__(-1))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # a network that draws numbers draws the same each time
        return [value for value in tree_leaves(model(*args, **kwargs)) if isinstance(value, Tensor)]


def _overwrites(node: fx.Node) -> bool:
    return getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def difference(given: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TOLERANCE) -> str | None:
    """How two lists of outputs differ, None where they do not."""
    if [value.shape for value in given] != [value.shape for value in expected]:
        return "its outputs have other shapes"
    worst = largest_error(given, expected)
    return None if worst <= tolerance else f"its outputs differ by {worst:.2g} of the largest"


def largest_error(given: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of two lists of outputs, as a share of each one's largest value."""
    worst = 0.0
    for a, b in zip(given, expected):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, 0.0, (a - b).abs())
        if gap.numel():
            scale = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1.0
            worst = max(worst, gap.nan_to_num(float("inf")).max().item() / max(scale, 1e-12))
    return worst
