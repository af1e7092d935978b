"""What operations do to axes: a registry of one small function for each kind, by the name of the ATen operation.

A rule takes a `Call` and returns the axes of what it gives: a list with one axis for each dimension, or a tuple of such lists
where the operation gives several tensors. It makes axes one (`call.unify`), freezes those of which nothing can be dropped
(`call.freeze`), writes down which parameter is written or read along an axis (`call.role`), and how the numbers among its
arguments follow the widths (`call.rewrite`). To teach the analysis an operation, write a function and decorate it with `rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from neuron_merging.graph.axes import (
    FIXED,
    ONE,
    Axis,
    fixed,
    free,
    freeze,
    is_fixed,
    leaves,
    note,
    resolve,
    split_product,
    unify,
)
from neuron_merging.graph.export import module_path, shape

Axes = list[Axis]
Value = Axes | tuple[Axes, ...] | None
Count = Callable[[Axis], int]


@dataclass(frozen=True)
class Scaled:
    """A symbolic size of the graph times a kept width over the full one."""

    node: fx.Node
    new: int
    old: int


@dataclass(frozen=True)
class Rewrite:
    """How the arguments of a node follow the widths of `axes`. arguments: what they become, by name, given the widths left."""

    axes: tuple[Axis, ...]
    arguments: Callable[[Count], dict[str, Any]]
    target: Any = None


@dataclass(frozen=True)
class Role:
    """Parameters that are a "writer", "reader" or "follower" along an axis.

    dim: which of the parameter's axes it is, where that is known.
    """

    names: frozenset[str]
    dim: int | None
    axis: Axis
    role: str


def origin(node: fx.Node, dim: int) -> int | None:
    """Which axis of a parameter a dimension of a value is, where the value is the parameter, possibly transposed."""
    while node.op == "call_function":
        name, rank = operation(node), len(node.meta["val"].shape)
        if name in ("transpose", "swapaxes"):
            a, b = (d % rank for d in node.args[1:3])
            dim = {a: b, b: a}.get(dim, dim)
        elif name == "permute":
            dim = node.args[1][dim] % rank
        elif name in ("t", "numpy_T"):
            dim = rank - 1 - dim
        elif name not in ("to", "contiguous", "clone", "detach", "alias"):
            return None
        node = node.args[0]
    return dim


class Call:
    """An operation in the graph, with the axes of the values that it takes."""

    def __init__(self, node: fx.Node, values: dict[fx.Node, Value], sources: dict[fx.Node, frozenset[str]]) -> None:
        self.node = node
        self.values = values
        self.sources = sources
        self.roles: list[Role] = []
        self.rewrites: list[Rewrite] = []

    @cached_property
    def given(self) -> dict[str, Any]:
        """The arguments by name, defaults among them."""
        names = self.node.target._schema.arguments
        given = {a.name: a.default_value if a.has_default_value() else None for a in names}
        given.update(zip((a.name for a in names), self.node.args))
        return given | self.node.kwargs

    @cached_property
    def where(self) -> str:
        """The operation and the module in which it is called, for reasons."""
        path = module_path(self.node)
        return operation(self.node) + (f" in {path}" if path else "")

    @cached_property
    def shape(self) -> list[int]:
        """Of what the operation gives."""
        return shape(self.node.meta["val"])

    def axes(self, name: str) -> Axes | None:
        """Of the tensor that an argument is, None where it is none."""
        node = self.given.get(name)
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return list(map(resolve, value)) if isinstance(value, list) else None

    def tensors(self) -> list[Axes]:
        """The axes of all tensors that the operation takes."""
        values = (self.values.get(node) for node in self.node.all_input_nodes)
        tensors = [axes for value in values if value for axes in ([value] if isinstance(value, list) else value)]
        return [list(map(resolve, axes)) for axes in tensors]

    def dim(self, name: str, rank: int) -> int:
        """An argument that is a dimension, counted from the front."""
        return self.given[name] % max(rank, 1)

    def dims(self, name: str, rank: int) -> list[int]:
        """An argument that is dimensions, None or none being all of them."""
        given = self.given.get(name)
        given = [given] if isinstance(given, int) else given
        return [d % max(rank, 1) for d in given] if given else list(range(rank))

    def freeze(self, axes: Axis | Sequence[Axis], why: str | None = None) -> None:
        """Nothing can be dropped along these axes. why: where "it goes through the operation" does not say it."""
        for axis in [axes] if not isinstance(axes, Sequence) else axes:
            freeze(axis, f"{self.where} {why}" if why else f"it goes through {self.where}")

    def unify(self, a: Axis | None, b: Axis | None) -> Axis:
        """Make two axes one."""
        if a is None or b is None:
            return a if b is None else b
        for one, other in ((a, b), (b, a)):
            if is_fixed(one) and not is_fixed(other):
                why = next((leaf.frozen for leaf in leaves(one) if leaf.frozen), FIXED)
                freeze(other, why if why != FIXED else f"{self.where} ties it to something whose size is fixed")
                return one  # each keeps its own reason
        return unify(a, b, f"{self.where} ties axes of unlike structure to each other")

    def split(self, axis: Axis, blocks: int) -> tuple[Axis, Axis]:
        """An axis as blocks of consecutive indices; frozen where its structure has no such blocks."""
        halves = split_product(axis, blocks)
        if halves is None:
            self.freeze(axis, f"divides it into {blocks} blocks, against its structure")
            return fixed(blocks), fixed(axis.size // blocks)
        return halves

    def follow(self, axis: Axis, *names: str) -> None:
        """One-dimensional parameters that go with an axis."""
        for name in names:
            axes = self.axes(name)
            if axes:
                self.unify(axis, axes[0])

    def role(self, argument: str | fx.Node, axis: Axis, role: str, dim: int) -> None:
        """What an argument comes from, if from parameters only, is a "writer", "reader" or "follower" along dimension dim."""
        node = self.given[argument] if isinstance(argument, str) else argument
        names = self.sources.get(node) or frozenset()
        self.roles.append(Role(names, origin(node, dim % len(self.values[node])), axis, role))

    def is_weight(self, argument: str | fx.Node) -> bool:
        """Whether an argument comes from parameters only, not from the network's input."""
        return bool(self.sources.get(self.given[argument] if isinstance(argument, str) else argument))

    def rewrite(self, axes: Sequence[Axis], arguments: Callable[[Count], dict[str, Any]], target: Any = None) -> None:
        """How the numbers among the arguments follow the widths of these axes."""
        self.rewrites.append(Rewrite(tuple(axes), arguments, target))

    def sizes(self, name: str, axes: Sequence[Axis]) -> None:
        """An argument that is a list of sizes, of these axes."""
        given = self.given[name]
        self.rewrite(axes, lambda count: {name: [resized(n, axis, count) for n, axis in zip(given, axes)]})


def resized(given: Any, axis: Axis, count: Count) -> Any:
    """A size among the arguments as it is with the widths left. −1 stays."""
    new = count(axis)
    if (isinstance(given, int) and given == -1) or new == axis.size:
        return given
    return new if isinstance(given, int) else Scaled(given, new, axis.size)


RULES: dict[str, Callable[[Call], Value]] = {}


def rule(*names: str) -> Callable[[Callable[[Call], Value]], Callable[[Call], Value]]:
    """Register a function for ATen operations of these names, their variants that work in place included."""

    def register(function: Callable[[Call], Value]) -> Callable[[Call], Value]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def operation(node: fx.Node) -> str:
    """The name of what a node does, without namespace and overload."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema else getattr(node.target, "__name__", str(node.target))


def find_rule(node: fx.Node) -> Callable[[Call], Value]:
    """The rule for an operation; `unknown` where there is none."""
    name = operation(node)
    known = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if known is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        known = elementwise
    return known or unknown


UNKNOWN = "is no operation that the analysis knows"


def unknown(call: Call) -> Value:
    """Of an operation that nothing is known of: freezes all that it touches."""
    for axes in call.tensors():
        call.freeze(axes, UNKNOWN)
    return fresh(call.node.meta.get("val"), f"{call.where} {UNKNOWN}")


def fresh(value: Any, why: str = FIXED) -> Value:
    """Fixed axes for a value of the graph."""
    if isinstance(value, Tensor):
        return [fixed(size, why) for size in shape(value)]
    return tuple(fresh(part, why) for part in value) if isinstance(value, list | tuple) else None


@rule("add", "copy", "where", "masked_fill", "lerp", "addcmul", "addcdiv", "__and__", "__or__", "clamp", "pow", "rsub",
      "hardswish", "hardsigmoid", "hardtanh", "relu6", "mish", "softplus", "log_sigmoid", "softsign", "rrelu",
      "clip", "square", "__or__", "__xor__", "logical_and", "logical_or", "logical_not")  # fmt: skip
def elementwise(call: Call) -> Value:
    """Operations on every element by itself, with broadcasting: axes that meet are one."""
    out: Axes = [ONE] * len(call.shape)
    for axes in call.tensors():
        for i, axis in enumerate(axes, len(out) - len(axes)):
            if axis.size > 1 and i >= 0:
                out[i] = axis if out[i].size == 1 else call.unify(out[i], axis)
    return list(map(resolve, out))


@rule("clone", "contiguous", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh_copy", "lift_fresh", "dropout",
      "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "zeros_like", "ones_like", "full_like", "empty_like",
      "rand_like", "randn_like", "float", "zero", "fill", "native_dropout", "nan_to_num", "requires_grad")  # fmt: skip
def same(call: Call) -> Value:
    """Operations that give a tensor of the axes of their first."""
    return list(call.tensors()[0])


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn")
def constant(call: Call) -> Value:
    """Tensors with one number everywhere, of any size that is asked for."""
    axes = [free(size) for size in call.shape]
    if axes:
        call.sizes("size", axes)
    return axes


@rule("arange", "linspace", "eye", "tril_indices", "scalar_tensor", "randint", "randperm")
def numbered(call: Call) -> Value:
    """Tensors whose elements depend on their place."""
    return fresh(call.node.meta["val"])


@rule("softmax", "_softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "glu", "sort", "flip", "roll")
def along(call: Call) -> Value:
    """Operations in which the indices of the dimension `dim` see each other."""
    name = "dims" if "dims" in call.given else "dim"
    (axes, *_) = call.tensors()
    for d in call.dims(name, len(axes)):
        call.freeze(axes[d])
    if isinstance(call.node.meta["val"], list | tuple):
        return list(axes), list(axes)
    return list(axes)


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "any", "all", "prod",
      "max", "min", "argmax", "argmin", "var_mean", "std_mean", "topk", "median", "count_nonzero")  # fmt: skip
def reduction(call: Call) -> Value:
    """Reductions: they are over what is left, where they give no index and do not choose among indices."""
    (axes, *others) = call.tensors()
    if others:  # max(x, y)
        return elementwise(call)
    dims = call.dims("dim", len(axes))
    chosen = operation(call.node) in ("topk", "argmax", "argmin", "max", "min", "median", "prod")
    for d in dims:
        call.freeze(axes[d]) if chosen else note(axes[d], "statistics", call.where)

    def left(value: Tensor) -> Axes:
        if value.ndim == len(axes):
            sizes = shape(value)
            return [fixed(sizes[d]) if d in dims else axis for d, axis in enumerate(axes)]
        return [axis for d, axis in enumerate(axes) if d not in dims]

    value = call.node.meta["val"]
    return left(value) if isinstance(value, Tensor) else tuple(map(left, value))
