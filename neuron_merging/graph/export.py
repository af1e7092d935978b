"""The graph of a network, as torch.export sees it: every operation with its shapes, parameters by their names in the model."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from neuron_merging.errors import NeuronMergingError, reason

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Network:
    """A network and its graph.

    model: a copy in evaluation mode, which was never run; modes: whether each of the modules was in training before.
    args, kwargs: the inputs it was called with.
    cached: whether its configuration asked for a cache of a language model, which the graph leaves out.
    names: of every parameter and buffer all the names that it has in the model, by the first of them, and by any other.
    """

    model: nn.Module
    graph: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: dict[str, tuple[str, ...]]
    modes: dict[str, bool]
    cached: bool = False

    @cached_property
    def dynamic(self) -> bool:
        """Whether the graph takes batches of other sizes: tried with one of twice the size."""
        places = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        leaves, structure = tree_flatten((self.args, self.kwargs))
        for i, (value, node) in enumerate(zip(leaves, places)):
            seen = node.meta.get("val")
            if isinstance(seen, Tensor) and seen.ndim and not isinstance(seen.shape[0], int):
                leaves[i] = torch.cat([value, value])
        if all(a is b for a, b in zip(leaves, tree_leaves((self.args, self.kwargs)))):
            return False
        args, kwargs = tree_unflatten(leaves, structure)
        try:
            with torch.no_grad():
                copy.deepcopy(self.graph)(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except Exception:  # a size of the batch became a number
            return False
        return True

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of this name."""
        module, _, attribute = name.rpartition(".")
        return getattr(self.model.get_submodule(module), attribute)

    def users(self, name: str) -> list[fx.Node]:
        """The operations of the graph that take this parameter or buffer, as it is."""
        graph = self.graph.graph
        own = [node for alias in self.names[name] for node in graph.find_nodes(op="get_attr", target=alias)]
        return [user for node in own for user in node.users]


def capture(model: nn.Module, example_inputs: Inputs, training: bool = False) -> Network:
    """Export a network for these inputs: a tensor, a sequence of arguments, or a mapping of keyword arguments.

    training: its forward pass in training mode.

    Raises NeuronMergingError where the network cannot be copied, run or exported.
    """
    args, kwargs = arguments(example_inputs)
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        model = copied(model, training)
    except Exception as error:  # __deepcopy__ can be anybody's
        raise NeuronMergingError(f"{type(model).__name__} cannot be copied: {reason(error)}") from error
    attempts = [(_twice(args, kwargs), True), ((args, kwargs), True), ((args, kwargs), False)]
    failure: Exception | None = None
    cached = False
    for (some_args, some_kwargs), dynamic in attempts:
        for _ in range(2):
            try:
                traced = copied(model, training)  # forward() may keep what it computes
                graph = _exported(traced, some_args, some_kwargs, dynamic)
            except Exception as error:  # tracing runs the user's forward(), which can raise anything
                failure = error
                if not _without_cache(model):
                    break
                cached = True
            else:
                return Network(model, graph, some_args, some_kwargs, _names(model), modes, cached)
    what = f"{type(model).__name__} cannot be exported{_line(failure)}"
    raise NeuronMergingError(f"{what}: {reason(failure)}") from failure


def _line(error: Exception) -> str:
    """Where in the user's code an attempt failed: the last line that is neither Python's, PyTorch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    python = sysconfig.get_path("stdlib")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.line and not f.filename.startswith(ours)]
    frames = [f for f in frames if not f.filename.startswith(python) or "site-packages" in f.filename]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def copied(model: nn.Module, training: bool = False, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a network in this mode; it is switched to and fro, as copies can be in another mode than they say."""
    return copy.deepcopy(model, memo).train(not training).train(training)


def arguments(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> fx.GraphModule:
    def dims(value: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(value, Tensor) and value.ndim else None

    shapes = tree_map(dims, (args, kwargs)) if dynamic else None
    if dynamic:  # torch.export wants one structure for both kinds of arguments
        shapes = (*shapes[0], *shapes[1].values()) if not kwargs or not args else None
        shapes = dict(zip(kwargs, shapes)) if kwargs and shapes else shapes
    with torch.no_grad(), _quiet():
        graph = export(model, args, kwargs, dynamic_shapes=shapes, strict=False).module(check_guards=False)
    for node in list(graph.graph.nodes):
        _inline(graph, node)
    _write_elsewhere(graph.graph)
    graph.recompile()
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what PyTorch logs and prints of an attempt that fails: its exception says it, and others follow."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


VIEWS = {
    "reshape",
    "flatten",
    "contiguous",
    "to",
    "unflatten",
    "expand_as",
    "view_as",
    "reshape_as",
    "chunk",
    "split",
    "split_with_sizes",
    "unbind",
    "getitem",
    "dropout",
    "ravel",
}  # may give another name of their input, unannotated


def _write_elsewhere(graph: fx.Graph) -> None:
    """Let operations that overwrite their input give a new value, where no other name of that input is read afterwards."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    names: dict[fx.Node, fx.Node] = {}  # by node, the one whose memory it may share
    shared: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        name = getattr(node.target, "__name__", "").split(".")[0]
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        writes = schema is not None and schema.is_mutable
        viewed = name in VIEWS or (schema is not None and any(r.alias_info for r in schema.returns))
        names[node] = names[source] if source is not None and (writes or viewed) else node
        shared.setdefault(names[node], []).append(node)
    for node in graph.nodes:
        target = _elsewhere(node.target)
        if target is None or not isinstance(node.args[0], fx.Node) or node.args[0].op != "call_function":
            continue
        source = node.args[0]
        others = [other for other in shared[names[node]] if other not in (source, node) and place[other] < place[node]]
        if any(place[user] > place[node] for other in others for user in other.users):
            continue
        node.target = target
        for user in list(source.users):
            if place[user] > place[node]:
                user.replace_input_with(source, node)


def _elsewhere(target: Any) -> Any:
    """The operation that gives as a new value what this one writes over its first input; None if there is none."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable or not schema.name.endswith("_"):
        return None
    packet = getattr(torch.ops.aten, schema.name.split("::")[-1][:-1], None)
    return getattr(packet, schema.overload_name or "default", None)


def _inline(graph: fx.GraphModule, node: fx.Node) -> None:
    """Put what runs without autocast or gradients, a graph of its own, in the place of its call; erase checks of dtypes."""
    name = getattr(node.target, "__name__", str(node.target))
    if name.startswith("_assert_tensor_metadata"):
        graph.graph.erase_node(node)
    before = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}.get(name)
    if before is None or (before == 4 and node.args[2]):
        return
    inside = getattr(graph, node.args[before].target).graph
    places = [n for n in inside.nodes if n.op == "placeholder"]
    with graph.graph.inserting_before(node):
        results = graph.graph.graph_copy(inside, dict(zip(places, node.args[before + 1 :])))
    for item in list(node.users):
        item.replace_all_uses_with(results[item.args[1]])
        graph.graph.erase_node(item)
    graph.graph.erase_node(node)


def _twice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs, a batch of one as a batch of two: torch.export takes a one for a constant."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if any(value.ndim == 0 or len(value) != 1 for value in tensors):
        return args, kwargs
    return tree_map(lambda value: torch.cat([value, value]) if isinstance(value, Tensor) else value, (args, kwargs))


def _without_cache(model: nn.Module) -> bool:
    """Let a language model return no cache, which torch.export does not know. Returns whether that was something new."""
    configs = [
        module.config for module in model.modules() if getattr(getattr(module, "config", None), "use_cache", False)
    ]
    for config in configs:
        config.use_cache = False
    return bool(configs)


def _names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    by_tensor: dict[int, list[str]] = {}
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in everything:
        by_tensor.setdefault(id(tensor), []).append(name)
    return {name: tuple(same) for same in by_tensor.values() for name in same}


def size(number: Any) -> int:
    """A size in the graph, symbolic or not, as the example has it."""
    return number if isinstance(number, int) else int(number.node.hint)


def shape(value: Tensor) -> list[int]:
    """The shape of a value in the graph, as the example has it."""
    return [size(number) for number in value.shape]


def module_path(node: fx.Node) -> str:
    """The name of the module in whose forward a node is."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""
