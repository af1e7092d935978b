"""Which neurons of a network can be pruned: found by tracing it with torch.fx, never by a table of architectures.

A unit is a convolution or linear layer whose output reaches exactly one consumer, another such layer, through
operations that act on every neuron by itself: BatchNorm right behind the layer (whose form the paper gives for
convolutions), ReLU, max and average pooling, dropout, flatten, which let a positive scale pass, and activations that do
not, such as GELU: those cannot be merged through. Whatever else happens to the output (a residual sum, a second
consumer, an operation that is not in this file) leaves the layer out, with a reason.
Inputs are batches: dimension 0 is the batch, dimension 1 of a convolution's output its filters.
"""

import copy
import inspect
import operator
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from neuron_merging.errors import NeuronMergingError, reason


@dataclass(frozen=True)
class Unit:
    """Neurons that can be pruned, by module name: `layer` → `bn` → … → `next` → `next_bn`.

    `relu`: the neurons are rectified on their way. `next_bn`: the BatchNorm directly after `next`, if it is the only reader.
    `activation`: one on the way that a positive scale does not pass, by name; None where there is none.
    `branch`: what `next` gives is added to something: without neurons it would be a constant.
    `functions`: the activations on the way, ReLU too, as they are applied.
    """

    layer: str
    bn: str | None
    relu: bool
    next: str
    next_bn: str | None
    activation: str | None = None
    branch: bool = False
    functions: tuple[Callable[[Tensor], Tensor], ...] = field(default=(), compare=False, repr=False)

    def activate(self, z: Tensor) -> Tensor:
        """What becomes of the neurons' values z [N], behind the BatchNorm, on their way to `next`."""
        for function in self.functions:
            z = function(z.clone())
        return z


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # the last of any dimension
SIZES = {"in": ("in_features", "in_channels"), "out": ("out_features", "out_channels", "num_features")}
RELU = {nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"}
ACTIVATIONS = {  # elementwise, and not positively homogeneous or not known to the paper
    nn.LeakyReLU, F.leaky_relu, F.leaky_relu_, nn.ReLU6, F.relu6, nn.GELU, F.gelu, nn.SiLU, F.silu, nn.Mish, F.mish,
    nn.Hardswish, F.hardswish, nn.ELU, F.elu, F.elu_, nn.SELU, F.selu, F.selu_, nn.CELU, F.celu, F.celu_,
    nn.Softplus, F.softplus, nn.Softsign, F.softsign, nn.Hardtanh, F.hardtanh, F.hardtanh_, nn.Hardsigmoid,
    F.hardsigmoid, nn.LogSigmoid, F.logsigmoid, nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", nn.Tanh, F.tanh,
    torch.tanh, "tanh",
}  # fmt: skip
DROPOUT = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity}
DROPOUT |= {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
FLATTEN = {nn.Flatten, torch.flatten, "flatten"}
VIEW = {"view", "reshape", torch.reshape}
POOLS = {  # by the dimension of the convolution: another one would pool over the neurons
    1: {torch.max_pool1d, torch.avg_pool1d, torch.adaptive_avg_pool1d},
    2: {torch.max_pool2d},
    3: {torch.max_pool3d},
}
for _d, _operations in POOLS.items():
    for _kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool"):
        _class = "".join(part.title() for part in _kind.split("_"))
        _operations |= {getattr(F, f"{_kind}{_d}d"), getattr(nn, f"{_class}{_d}d")}


def units(model: nn.Module) -> list[Unit]:
    """The prunable units in the order of the forward pass. Raises NeuronMergingError where torch.fx cannot trace `model`."""
    return survey(model)[0]


def survey(model: nn.Module, training: bool = False) -> tuple[list[Unit], dict[str, str]]:
    """The units, and for every other convolution and linear layer that the forward pass calls the reason why it is none.

    training: of the forward pass in training mode, which may call more layers. Raises NeuronMergingError where torch.fx cannot
    trace `model`.
    """
    network = Graph(model, training)
    units, left_out = [], {}
    for node in network.nodes:
        if isinstance(network.module(node), (*CONVS, nn.Linear)):
            try:
                units.append(_unit(network, node))
            except NotAUnit as why:
                left_out[node.target] = str(why)
    return units, left_out


def _line(error: Exception) -> str:
    """Where in the user's code tracing failed: the last line that is neither PyTorch's nor ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frames = [f for f in frames if f.filename != __file__]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def put_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module `name`, under every other name that it has in `model` too."""
    old = model.get_submodule(name)
    for known_as, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(known_as, new)


WRAPPERS = {  # by class what torch.fx cannot trace, and where there is what it can
    "DataParallel": "its .module", "DistributedDataParallel": "its .module", "OptimizedModule": "its ._orig_mod",
    "RecursiveScriptModule": "as it was before", "TopLevelTracedModule": "as it was before",
}  # fmt: skip


def check_wrapper(model: nn.Module) -> None:
    """Raises NeuronMergingError where a network is wrapped in something, or compiled to something, that cannot be traced."""
    inside = WRAPPERS.get(type(model).__name__)
    if inside is not None:
        raise NeuronMergingError(
            f"{type(model).__name__} cannot be traced by torch.fx: give the network inside, {inside}"
        )


class CannotBeTraced(NeuronMergingError):
    """A network whose forward pass torch.fx cannot trace."""


class NotAUnit(Exception):
    """Why a layer is left out."""


def computes_as(kind: type) -> type:
    """The layer or BatchNorm of torch.nn whose computation a class, which may be one's own, inherits; else the class itself."""
    parts = ("forward", "_conv_forward", "__call__", "weight", "bias")
    bases = (base for base in (*CONVS, *NORMS, nn.Linear) if issubclass(kind, base))
    same = (base for base in bases if all(getattr(kind, p, None) is getattr(base, p, None) for p in parts))
    return next(same, kind)


class Tracer(fx.Tracer):
    """Does not look into convolutions, linear layers and BatchNorms, whoever wrote their class."""

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a network that is called with its first argument only."""
        others = list(inspect.signature(root.forward).parameters.values())[1:]
        plain = (bool, int, float, str, NoneType)
        defaults = {p.name: p.default for p in others if type(p.default) in plain and p.default == p.default}
        return super().trace(root, defaults | (concrete_args or {}) or None)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Whether a call of `module` is a node."""
        return isinstance(module, (*CONVS, *NORMS, nn.Linear)) or super().is_leaf_module(module, qualified_name)


def _traced(model: nn.Module, training: bool = False) -> list[fx.Node]:
    """The nodes of the graph in evaluation or training mode.

    Raises NeuronMergingError, which names the line, where torch.fx cannot trace `model`.
    """
    check_wrapper(model)
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_inference()]
    before = {module: dict(vars(module)) for module in model.modules()}
    values = [value for attributes in before.values() for value in attributes.values()]
    contents = [(value, copy.copy(value)) for value in values if type(value) in (list, dict, set)]
    try:
        return list(Tracer().trace(model.train(training)).nodes)
    except Exception as error:  # tracing runs the user's forward(), which can raise anything
        raise CannotBeTraced(
            f"{type(model).__name__} cannot be traced by torch.fx{_line(error)}: {reason(error)}"
        ) from error
    finally:
        for module, attributes in before.items():  # of which tracing, and forward() itself, make new ones
            vars(module).update(attributes)
            for name in vars(module).keys() - attributes:
                del vars(module)[name]
        for value, content in contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
        with torch.no_grad():
            for buffer, version, content in buffers:
                if buffer._version != version:
                    buffer.copy_(content)


class Graph:
    """The traced graph with what has to be known of its modules."""

    def __init__(self, model: nn.Module, training: bool = False) -> None:
        """Raises NeuronMergingError, which names the line, where torch.fx cannot trace `model` in that mode."""
        self.training = training
        self.nodes = _traced(model, training)
        self.modules = dict(model.named_modules())
        self.calls = Counter(self.modules[n.target] for n in self.nodes if n.op == "call_module")
        owners: dict[nn.Parameter, set[nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(parameter, set()).add(module)
        self.tied = {module for modules in owners.values() if len(modules) > 1 for module in modules}
        for node in self.nodes:  # parameters that the forward pass reads by name as well
            if node.op == "get_attr" and "." in node.target:
                self.tied.add(self.modules.get(node.target.rpartition(".")[0]))

    def module(self, node: fx.Node) -> nn.Module | None:
        """That a node calls, if it calls one."""
        return self.modules[node.target] if node.op == "call_module" else None

    def kind(self, node: fx.Node) -> Any:
        """What a node does: the class of its module, the function, or the name of the method."""
        return computes_as(type(self.module(node))) if node.op == "call_module" else node.target

    @cached_property
    def sizes_read(self) -> list[tuple[nn.Module, str]]:
        """(layer, side) pairs whose width the forward pass uses as a number, e.g. `x / conv.out_channels`; side: "in" or "out".

        Found by tracing again while layers claim other widths. Not found: widths that are only compared with each other or
        become a tensor, and a forward pass that is different at every call.
        """
        layers = [m for m in self.modules.values() if isinstance(m, (*CONVS, *NORMS, nn.Linear))]
        changes = [(layer, side) for layer in layers for side in SIZES]
        if not self._depends_on(changes) or self._depends_on([]):
            return []
        return self._bisected(changes)

    def _bisected(self, changes: list[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str]]:
        """Bisect `changes` to those that alter the traced graph."""
        if len(changes) == 1:
            return changes
        first, second = changes[: len(changes) // 2], changes[len(changes) // 2 :]
        effective = self._bisected(first) if self._depends_on(first) else []
        return effective + (self._bisected(second) if not effective or self._depends_on(second) else [])

    def _depends_on(self, changes: list[tuple[nn.Module, str]]) -> bool:
        """Whether tracing gives another graph if these layers claim other widths on these sides."""
        sizes = [(vars(layer), name) for layer, side in changes for name in SIZES[side]]
        sizes = [(values, name, values[name]) for values, name in sizes if type(values.get(name)) is int]
        try:
            for values, name, size in sizes:
                values[name] = 2 * size + 1
            return _literally(_traced(self.modules[""], self.training)) != _literally(self.nodes)
        except NeuronMergingError:
            return True
        finally:
            for values, name, size in sizes:
                values[name] = size

    def own(self, node: fx.Node, *sides: str) -> nn.Module:
        """The module of a node whose weights may be rewritten, and its width on these sides ("in", "out") changed.

        Raises NotAUnit where something else depends on them.
        """
        module = self.module(node)
        self.check_hooks(node)
        if self.kind(node) not in (*CONVS, *NORMS, nn.Linear):
            raise NotAUnit(f"{node.target} ({type(module).__name__}) has a forward of its own")
        if self.calls[module] > 1:
            raise NotAUnit(f"{node.target} is used {self.calls[module]} times")
        if module in self.tied:
            raise NotAUnit(f"{node.target} shares its weights")
        if any(parameter.numel() == 0 for parameter in module.parameters(recurse=False)):
            raise NotAUnit(f"{node.target} has no weights")
        self.check_sizes(node, *sides)
        return module

    def check_sizes(self, node: fx.Node, *sides: str) -> None:
        """Raises NotAUnit where the forward pass computes with the width of a layer on one of the sides."""
        if sides and any(layer is self.module(node) and side in sides for layer, side in self.sizes_read):
            raise NotAUnit(f"the forward pass computes with the width of {node.target}")

    def check_hooks(self, node: fx.Node) -> None:
        """Raises NotAUnit where the module of a node does more than its class says: tracing does not see that."""
        module = self.module(node)
        if module is not None and (
            parametrize.is_parametrized(module) or module._forward_pre_hooks or module._forward_hooks
        ):
            raise NotAUnit(f"{node.target} has parametrized weights or hooks")
        if module is not None and "forward" in vars(module):
            raise NotAUnit(f"{node.target} has a forward of its own")

    def reader(self, node: fx.Node) -> fx.Node:
        """The one node that reads the values of `node`. Raises NotAUnit where there are several."""
        readers = [user for user in node.users if not asks_no_width(user)]
        if len(readers) != 1:
            raise NotAUnit(f"its output is read {len(readers)} times")
        self.check_hooks(readers[0])
        return readers[0]


def _literally(nodes: Sequence[fx.Node]) -> list[tuple[Any, ...]]:
    """What the nodes do, with their numbers, in a form that can be compared with that of another tracing."""
    place = {node: f"%{i}" for i, node in enumerate(nodes)}
    return [(node.op, node.target, fx.map_arg((node.args, node.kwargs), place.__getitem__)) for node in nodes]


def dimension(layer: nn.Module) -> int:
    """Of a convolution; 0 for a linear layer."""
    return next((sides for sides, kind in enumerate(CONVS, 1) if isinstance(layer, kind)), 0)


def _unit(network: Graph, node: fx.Node) -> Unit:
    """Follow the output of the layer at `node` to its consumer. Raises NotAUnit on the way."""
    layer = network.own(node, "out")
    sides = dimension(layer)
    if sides and layer.groups > 1:
        raise NotAUnit("it is a grouped convolution")
    neurons = layer.weight.shape[0]
    name, bn, relu, activation, flat = node.target, None, False, None, False
    functions: list[Callable[[Tensor], Tensor]] = []
    while True:
        before, node = node, network.reader(node)
        kind = network.kind(node)
        if sides and kind in norms(sides) and before.target == name:
            norm = network.own(node, "out")
            if norm.running_mean is None:
                raise NotAUnit(f"{node.target} keeps no running statistics")
            bn = node.target
        elif kind in RELU or kind in ACTIVATIONS:
            relu = relu or kind in RELU
            activation = activation or (name_of(kind) if kind in ACTIVATIONS else None)
            functions.append(_as_function(network, node))
        elif kind in DROPOUT or (sides and not flat and pools(network, node, sides)):
            pass
        elif sides and not flat and flattens(network, node, of_one_batch(before, partial(_keeps_batch, network))):
            flat = True
        elif isinstance(network.module(node), (*CONVS, nn.Linear)) and node.args[:1] == (before,):
            consumer = network.own(node, "in")
            break
        else:
            raise NotAUnit(obstacle(network, node))
    if isinstance(consumer, CONVS):
        if flat or dimension(consumer) != sides or consumer.groups > 1 or consumer.in_channels != neurons:
            raise NotAUnit(f"{node.target} does not read its neurons as channels of a plain convolution")
    elif sides and not flat:
        raise NotAUnit(f"{node.target} reads it without a flatten")
    elif consumer.in_features % neurons or (not sides and consumer.in_features != neurons):
        raise NotAUnit(f"{node.target} has {consumer.in_features} inputs for {neurons} neurons")
    next_bn = next_norm(network, node)
    branch = addition(node, next_bn, network.kind) is not None
    return Unit(name, bn, relu, node.target, next_bn, activation, branch, tuple(functions))


def _as_function(network: Graph, node: fx.Node) -> Callable[[Tensor], Tensor]:
    """What an elementwise node of one input does."""
    module, rest = network.module(node), node.args[1:]
    if module is not None:
        return module
    if node.op == "call_method":
        return lambda x: getattr(x, node.target)(*rest, **node.kwargs)
    return lambda x: node.target(x, *rest, **node.kwargs)


def norms(sides: int) -> tuple[type, ...]:
    """The BatchNorms of what a layer of this dimension gives."""
    return NORMS[max(sides - 1, 0)], nn.SyncBatchNorm


def addition(node: fx.Node, bn: str | None, kind: Callable[[fx.Node], Any]) -> tuple[fx.Node, fx.Node] | None:
    """Where the output of the layer at `node` (behind its `bn`) is added to something: that, and the sum.

    kind: what a node does: the class of its module, the function, or the name of the method.
    """
    while len(node.users) == 1:
        before, (node,) = node, node.users
        if node.target == bn or kind(node) in DROPOUT:
            continue
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if node.target in ADDITIONS and len(node.args) == len(operands) == 2 and not node.kwargs:
            return operands[0] if operands[1] is before else operands[1], node
        break
    return None


def next_norm(network: Graph, node: fx.Node) -> str | None:
    """The BatchNorm directly after the consumer at `node`, if it is the only reader and may be rewritten."""
    try:
        reader = network.reader(node)
        if network.kind(reader) in NORMS and network.own(reader).running_mean is not None:
            normalises_channels = isinstance(network.module(node), CONVS)
            return reader.target if normalises_channels else None
    except NotAUnit:
        pass
    return None


def pools(network: Graph, node: fx.Node, sides: int) -> bool:
    """Pooling of every neuron by itself: not with indices, nor with a divisor that makes a mean something else."""
    if network.kind(node) not in POOLS[sides]:
        return False
    module = network.module(node)
    options = vars(module) if module is not None else node.kwargs
    divisor_given_by_place = node.op == "call_function" and len(node.args) > 6
    return not (options.get("return_indices") or options.get("divisor_override") or divisor_given_by_place)


def ancestors(
    node: fx.Node, sources: Callable[[fx.Node], Sequence[fx.Node]] = lambda node: node.all_input_nodes
) -> set[fx.Node]:
    """All nodes that have to be computed before `node`. sources: what a node reads, where it is not what the graph says."""
    seen, stack = set(), [node]
    while stack:
        new = [source for source in sources(stack.pop()) if source not in seen]
        seen.update(new)
        stack += new
    return seen


def of_one_batch(node: fx.Node, understood: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Nodes that have the batch size of `node`: those that it comes from, through what is understood."""
    return {node} | ancestors(node, lambda node: node.all_input_nodes if understood(node) else ())


def _keeps_batch(network: Graph, node: fx.Node) -> bool:
    """Whether what a node gives has the batch size of what it reads."""
    kind = network.kind(node)
    return isinstance(network.module(node), (*CONVS, *NORMS, nn.Linear)) or any(
        kind in known for known in (RELU, ACTIVATIONS, DROPOUT, ADDITIONS, *POOLS.values())
    )


def flattens(network: Graph, node: fx.Node, batch: Collection[fx.Node]) -> bool:
    """[B, N, …] → [B, N·k]: flatten from dimension 1 on, or a view whose first size is the batch's and whose second is −1.

    batch: nodes of the same batch size.
    """
    kind = network.kind(node)
    if kind is nn.Flatten:
        module = network.module(node)
        return (module.start_dim, module.end_dim) == (1, -1)
    if kind in FLATTEN:
        dims = dict(zip(("start_dim", "end_dim"), node.args[1:])) | node.kwargs
        return dims.get("start_dim", 0) == 1 and dims.get("end_dim", -1) == -1
    if kind in VIEW:
        sizes = node.args[1:]
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
        return len(sizes) == 2 and sizes[1] == -1 and isinstance(sizes[0], fx.Node) and _batch_of(sizes[0]) in batch
    return False


def _batch_of(node: fx.Node) -> fx.Node | None:
    """x where `node` is x.size(0), x.size()[0] or x.shape[0]."""
    if node.op == "call_method" and node.target == "size":
        return node.args[0] if node.args[1:] == (0,) else None
    if _is_item(node) and node.args[1] == 0 and _is_shape(node.args[0]):
        return node.args[0].args[0]
    return None


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def _is_shape(node: fx.Node) -> bool:
    """x.shape or x.size()"""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.op == "call_function" and node.target is getattr and node.args[1] == "shape"


def asks_no_width(node: fx.Node) -> bool:
    """A question about a tensor whose answer does not change with the number of neurons: its batch size, dtype, rank."""
    if _is_shape(node):
        return all(_batch_of(user) is not None for user in node.users if user.users or not _is_item(user))
    if node.op == "call_method":
        return node.target == "dim" or _batch_of(node) is not None
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("ndim", "device", "dtype")


def obstacle(network: Graph, node: fx.Node) -> str:
    """Why what goes into `node` cannot be pruned."""
    if node.op == "output":
        return "its output is an output of the network"
    what = name_of(network.kind(node))
    return f"its output goes through {what}" + (f" ({node.target})" if node.op == "call_module" else "")


def name_of(kind: Any) -> str:
    """Of what `Graph.kind` gives."""
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
