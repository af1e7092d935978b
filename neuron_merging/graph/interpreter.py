"""A traced network run node by node over a probe: what restoration and the choice of widths have in common (ours).

On a probe, every BatchNorm normalises with statistics measured there: so its output has the mean β and the variance γ²
that it was trained to have, however little the probe looks like data.
"""

import contextlib
import copy
import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.tracing import CONVS, DROPOUT, NORMS, Tracer, addition, computes_as

ROUNDING = 1e-12  # of a channel's squared mean: a variance below it is that of a constant
EXACT = 2 * 10**8  # multiply-accumulates that float64 does in no time


def dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a network's inputs, as in counting.py."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def quick_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """About `counting.count_macs`, without a graph: enough to choose a precision, and to see whether a network runs.

    The network is run in float32. If it fails, it is run in its own precision, then on whole numbers, as an embedding takes.
    """

    def count(copied: nn.Module, kind: torch.dtype | None = None) -> int:
        copied.eval().requires_grad_(False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copied(torch.zeros(1, *shape, dtype=kind or dtype(copied), device="cpu"))
        return counter.get_total_flops() // 2

    try:
        return count(copy.deepcopy(model).cpu().float())
    except RuntimeError:
        own = dtype(model)
        for kind in (torch.int64,) if own == torch.float32 else (own, torch.int64):
            with contextlib.suppress(Exception):
                return count(copy.deepcopy(model).cpu(), kind)
        raise


def precision(model: nn.Module, inputs: Tensor) -> torch.dtype:
    """In what a walk over `inputs` [B, …] computes: the network's dtype, float32 at least; float64 if there is little to do.

    In float64 the order of sums, and so the number of threads, is not felt. A network that says .float() has none.
    """
    if len(inputs) * quick_macs(model, tuple(inputs.shape[1:])) <= EXACT:
        with contextlib.suppress(RuntimeError), torch.no_grad():
            copy.deepcopy(model).double().eval()(inputs[:1].to(torch.float64, copy=True))
            return torch.float64
    return torch.promote_types(dtype(model), torch.float32)


def computing_in(model: nn.Module, precision: torch.dtype) -> nn.Module:
    """A copy of `model` for walks, whose real numbers are float32 or float64; complex and whole ones stay what they are."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    return copied.double() if precision == torch.float64 else copied.float()


class Walk:
    """The graph of `model`, with operations that overwrite their input made to write elsewhere, and its modules by name.

    statistics: mean and variance [N] with which a BatchNorm normalises the probe: those of the first values that it sees,
    or (probe_statistics=False) its running ones.
    """

    def __init__(self, model: nn.Module, probe_statistics: bool = True) -> None:
        self.graph = Tracer().trace(model)
        self.modules = dict(model.named_modules())
        self.probe_statistics = probe_statistics
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}
        self.kept: dict[str, Tensor] = {}
        out_of_place(self.graph, self.modules)

    def beside(self, smaller: nn.Module, kept: dict[str, Tensor]) -> "Walk":
        """The same walk through a network of the same graph, whose BatchNorms have the neurons `kept` (by name) only."""
        other = copy.copy(self)  # graph and statistics are one and the same
        other.modules, other.kept = dict(smaller.named_modules()), kept
        for name, module in self.modules.items():
            if getattr(other.modules[name], "inplace", False) is True:
                other.modules[name].inplace = module.inplace
        return other

    def input(self, node: fx.Node, probe: Tensor) -> Any:
        """The probe for the network's first input, their defaults for others."""
        several = node.target.startswith("*")  # *args or **kwargs
        if node is next(iter(self.graph.nodes)):
            if several:
                return (probe,)
            return probe.contiguous(memory_format=torch.channels_last) if probe.ndim == 4 else probe
        if several:
            return {} if node.target.startswith("**") else ()
        if node.args:
            return node.args[0]
        raise NeuronMergingError(f"the network takes a second input, {node.target}: only one can be made up")

    def run(self, node: fx.Node, values: dict[fx.Node, Any], probe: Tensor | None = None) -> Any:
        """The value of a node, given those of the nodes that it reads."""
        if node.op == "placeholder":
            return self.input(node, probe)
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            parent, _, name = node.target.rpartition(".")
            return getattr(self.modules[parent], name)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            sizes = node.target == "view" and not any(isinstance(arg, torch.dtype) for arg in args)
            method = "reshape" if sizes else node.target  # activations in channels_last have no view of other sizes
            x = args[0].clone() if _in_place(method) else args[0]
            return getattr(x, method)(*args[1:], **kwargs)
        module = self.modules[node.target]
        if self.kind(node) in NORMS and module.running_mean is not None:
            if node.target not in self.statistics:
                self.measure(node.target, args[0])
            return self.normalise(node.target, args[0])
        return module(*args, **kwargs)

    def measure(self, name: str, y: Tensor) -> None:
        """Let the BatchNorm `name` normalise the probe with the statistics of y [B, N, …]."""
        bn = self.modules[name]
        if not self.probe_statistics:
            self.statistics[name] = bn.running_mean, bn.running_var
            return
        mean, var = y.new_zeros(y.shape[1]), y.new_ones(y.shape[1])
        F.batch_norm(y, mean, var, training=True, momentum=1.0)  # on CPUs many times faster than torch.var_mean
        var *= 1 - y.shape[1] / y.numel()  # of the values themselves, not an estimate from them
        # Constant channels stay what they are. ε scales with the variance, so that exact multiples stay exact multiples.
        dead = (bn.running_var < 1e-8) | (var <= ROUNDING * mean.pow(2)) | (var == 0)
        scaled = var * (1 + bn.eps / bn.running_var) - bn.eps
        self.statistics[name] = bn.running_mean.where(dead, mean), bn.running_var.where(dead, scaled)

    def normalise(self, name: str, y: Tensor) -> Tensor:
        """What the BatchNorm `name` makes of y on the probe."""
        module, (mean, var) = self.modules[name], self.statistics[name]
        if name in self.kept:
            mean, var = mean[self.kept[name]], var[self.kept[name]]
        return F.batch_norm(y, mean, var, module.weight, module.bias, False, 0.0, module.eps)

    def slope(self, name: str) -> Tensor:
        """γ / √(v + ε) of the BatchNorm `name` on the probe, [N]."""
        bn = self.modules[name]
        slope = (self.statistics[name][1] + bn.eps).rsqrt()
        return slope if bn.weight is None else slope * bn.weight

    def kind(self, node: fx.Node) -> Any:
        """What a node does: the class of its module, the function, or the name of the method."""
        return computes_as(type(self.modules[node.target])) if node.op == "call_module" else node.target

    def addition(self, node: fx.Node, bn: str | None) -> tuple[fx.Node, fx.Node] | None:
        """`tracing.addition` in this graph."""
        return addition(node, bn, self.kind)


def walk_through(model: nn.Module, inputs: Tensor, probe_statistics: bool = True) -> Walk:
    """A walk through `model` that, with BatchNorm's running statistics, gives what the network gives for two of `inputs`.

    Raises NeuronMergingError where it does not: the graph says nothing of a BatchNorm's hooks, nor that who overwrites a view
    overwrites more. Outputs that differ from one call to the next are not compared, nor those that are no floating-point
    tensors, nor what a hook of the whole network makes of them.
    """
    x, seen = inputs[:2].clone(), copy.deepcopy(model).eval()
    walk = Walk(model, probe_statistics)  # before the first call, which may leave something in the network
    call = seen if seen._forward_pre_hooks else seen.forward
    wanted, again = (floats(call(x.clone())) for _ in range(2))
    as_it_is = copy.copy(walk)
    as_it_is.probe_statistics, as_it_is.statistics = False, {}
    values: dict[fx.Node, Any] = {}
    for node in steps(list(walk.graph.nodes), values):
        values[node] = as_it_is.run(node, values, x)
    if wanted and _alike(wanted, again) and not _alike(wanted, floats(values[node])):
        raise NeuronMergingError(
            f"what {type(model).__name__} gives is not what torch.fx sees of it: a hook changes it, or a view is overwritten"
        )
    return walk


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two outputs are the same but for rounding."""
    if [tensor.shape for tensor in some] != [tensor.shape for tensor in others]:
        return False
    return all(
        (a - b).norm() <= 0.01 * a.norm() + 1e-6 * a.numel() ** 0.5 or a.isnan().any() for a, b in zip(some, others)
    )


def count_positions(model: nn.Module, shape: tuple[int, ...]) -> dict[str, float]:
    """At how many output positions every convolution and linear layer that is called works, for one input of this shape."""
    positions: dict[str, float] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        positions[name] = positions.get(name, 0) + output.numel() / len(module.weight)

    work = copy.deepcopy(model).eval()
    for name, module in work.named_modules():
        if isinstance(module, (*CONVS, nn.Linear)):
            module.register_forward_hook(partial(note, name))
    with torch.no_grad():
        work(torch.zeros(1, *shape, dtype=dtype(work), device=next(work.parameters()).device))
    return positions


def measure_statistics(bn: nn.Module, momentum: float | None) -> None:
    """Let a BatchNorm normalise with the statistics of what it sees; of this process, if others have a part of it."""
    bn.train()
    bn.momentum = momentum
    if isinstance(bn, nn.SyncBatchNorm):  # which would wait for the others
        bn.forward = partial(_BatchNorm.forward, bn)


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors that a network gives, in whatever containers."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def by_sample(output: Any, samples: int) -> Tensor:
    """What a network gives for each of some samples: [samples, numbers]; without such a tensor all numbers as one row.

    The samples are along the first axis, or, with places beside them, a part of it, or along another axis (time first, the
    state of an RNN). Losses and constants, which have none, are left out. Raises NeuronMergingError where there are no numbers.
    """
    leaves = floats(output)
    if not leaves:
        raise NeuronMergingError("the network gives no floating-point numbers")
    rows = [row for leaf in leaves if (row := _rows(leaf, samples)) is not None]
    return torch.cat(rows, 1) if rows else torch.cat([leaf.reshape(1, -1) for leaf in leaves], 1)


def _rows(tensor: Tensor, samples: int) -> Tensor | None:
    """[samples, numbers], or None where no axis of the tensor is that of the samples."""
    if samples in tensor.shape:
        return tensor.movedim(tensor.shape.index(samples), 0).reshape(samples, -1)
    return tensor.reshape(samples, -1) if tensor.ndim and tensor.shape[0] % samples == 0 and len(tensor) else None


def steps(
    order: Sequence[fx.Node], *stores: dict[fx.Node, Any], sources: Callable[[fx.Node], list[fx.Node]] | None = None
) -> Iterator[fx.Node]:
    """The nodes in this order; after each, the values that none of the later ones reads leave the stores.

    sources: which nodes a node reads, where it is not what the graph says.
    """
    read = sources or (lambda node: node.all_input_nodes)
    last = {source: node for node in order for source in read(node)}
    expiring: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        expiring.setdefault(node, []).append(source)
    for node in order:
        yield node
        for source in expiring.get(node, ()):
            for store in stores:
                del store[source]


IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
}


def out_of_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Rewrite operations that overwrite their input, and let what reads that input later read their output instead.

    Modules that hand their input on as it is (nn.Identity, dropout) leave the graph: another name of the same tensor.
    """
    for node in graph.nodes:
        module = modules[node.target] if node.op == "call_module" else None
        hooked = module is not None and (module._forward_hooks or module._forward_pre_hooks)
        if type(module) in DROPOUT and not hooked and [*node.args] == node.all_input_nodes:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and node.target in DROPOUT and len(node.all_input_nodes) == 1:
            node.replace_all_uses_with(*node.all_input_nodes)  # nor does the function draw anything: its default would
            graph.erase_node(node)
    place = {node: i for i, node in enumerate(graph.nodes)}
    inplace = {name for name, module in modules.items() if getattr(module, "inplace", False) is True}
    for name in inplace:
        modules[name].inplace = False
    for node in graph.nodes:
        if not _overwrites(node, inplace):
            continue
        (source, *_) = node.all_input_nodes
        for user in list(source.users):
            if place[user] > place[node]:
                user.replace_input_with(source, node)


def _in_place(method: str) -> bool:
    """Whether the method of this name overwrites its tensor."""
    return method.endswith("_") and not method.startswith("__")


def _overwrites(node: fx.Node, inplace: Collection[str]) -> bool:
    """Whether a node overwrites its input; it no longer does afterwards. inplace: names of modules that do."""
    if node.op == "call_module":
        return node.target in inplace
    if node.op == "call_method" and _in_place(node.target):
        elsewhere = node.target.removesuffix("_")
        if callable(getattr(Tensor, elsewhere, None)):
            node.target = elsewhere
        return True  # the others, as zero_, overwrite a copy: Walk.run
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")  # of F.leaky_relu_ and its like
    elsewhere = getattr(F, name[:-1], None) or getattr(torch, name[:-1], None) if name.endswith("_") else None
    if node.target in IN_PLACE or elsewhere:
        node.target = IN_PLACE.get(node.target, elsewhere)
        return True
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (ValueError, TypeError):  # a builtin without a signature
        return False
    if bound.arguments.get("inplace") is True:
        bound.arguments["inplace"] = False
        node.args, node.kwargs = bound.args, bound.kwargs
        return True
    return False
