"""Multiply-accumulates of every operation in a network's graph: products of sizes of what it takes and gives.

A rule takes a `Call` and returns terms; a term is a list of dimensions, (node, dimension), whose sizes are multiplied. So one
table counts a network as it is (`count_macs`) and for every choice of widths (widths/cost.py). Elementwise operations,
normalisation and pooling count nothing, as is usual. To teach it an operation, write a function and decorate it with `counts`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from neuron_merging.graph.export import Network, module_path, size
from neuron_merging.graph.rules import find_rule, operation, unknown

Dim = tuple[fx.Node, int]
Term = list[Dim]


class Call:
    """An operation in the graph."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @cached_property
    def given(self) -> dict[str, Any]:
        """The arguments by name, defaults among them."""
        names = self.node.target._schema.arguments
        given = {a.name: a.default_value if a.has_default_value() else None for a in names}
        return given | dict(zip((a.name for a in names), self.node.args)) | self.node.kwargs

    @property
    def out(self) -> Term:
        """All dimensions of what it gives."""
        return dims(self.node)


def dims(node: fx.Node) -> Term:
    """All dimensions of a tensor."""
    return [(node, d) for d in range(node.meta["val"].ndim)]


RULES: dict[str, Callable[[Call], list[Term]]] = {}


def counts(*names: str) -> Callable[[Callable[[Call], list[Term]]], Callable[[Call], list[Term]]]:
    """Register a function for ATen operations of these names."""

    def register(function: Callable[[Call], list[Term]]) -> Callable[[Call], list[Term]]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@counts("linear")
def linear(call: Call) -> list[Term]:
    """Every output is a sum over the inputs."""
    return [[*call.out, (call.given["input"], -1)]]


@counts("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d", "conv_transpose2d",
        "conv_transpose3d")  # fmt: skip
def convolution(call: Call) -> list[Term]:
    """Every output (transposed: every input) meets one group's channels on the other side, at every place of the kernel."""
    transposed = "transpose" in operation(call.node) or bool(call.given.get("transposed"))
    weight = call.given["weight"]
    return [[*(dims(call.given["input"]) if transposed else call.out), *dims(weight)[1:]]]


@counts("matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv")
def matmul(call: Call) -> list[Term]:
    """Every output is a sum over the last dimension of the first factor."""
    first = next(name for name in ("mat1", "batch1", "mat", "self") if name in call.given)
    summed = [(call.given["batch1"], 0)] if operation(call.node) == "addbmm" else []
    return [[*call.out, *summed, (call.given[first], -1)]]


@counts("einsum")
def einsum(call: Call) -> list[Term]:
    """Two factors at a time, from the left: all letters of both, those then kept that the result or a later factor has."""
    equation, nodes = call.given["equation"].replace(" ", ""), call.given["tensors"]
    inputs, arrow, result = equation.partition("->")
    if "." in equation or not arrow:
        raise NotImplementedError(equation)
    parts = inputs.split(",")
    sizes = {letter: (node, d) for part, node in zip(parts, nodes) for d, letter in enumerate(part)}
    kept, terms = parts[0], []
    for i, part in enumerate(parts[1:], start=2):
        letters = dict.fromkeys(kept + part)
        terms.append([sizes[letter] for letter in letters])
        kept = "".join(letter for letter in letters if letter in "".join([result, *parts[i:]]))
    return terms


@counts("scaled_dot_product_attention")
def attention(call: Call) -> list[Term]:
    """Queries times keys, and what comes of it times values; all of them, whatever the mask."""
    q, k, v = (call.given[name] for name in ("query", "key", "value"))
    pairs = [*dims(q)[:-1], (k, -2)]
    return [[*pairs, (q, -1)], [*pairs, (v, -1)]]


@counts("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> list[Term]:
    """At every place all weights once."""
    data, weights = call.given.get("input", call.given.get("data")), call.given["params"]
    places = dims(data)[:-1]
    return [[*places, *dims(weight)] for weight in weights if weight.meta["val"].ndim == 2]


def terms(node: fx.Node) -> list[Term] | None:
    """What a node's multiply-accumulates are the sum of; none for what counts nothing, None where it is not known."""
    if node.op != "call_function" or node.target is operator.getitem:
        return []
    rule = RULES.get(operation(node))
    try:
        return rule(Call(node)) if rule else None if find_rule(node) is unknown else []
    except (NotImplementedError, KeyError, AttributeError):  # a form of the operation that its rule does not know
        return None


def uncounted(network: Network) -> list[str]:
    """Operations that multiply what comes in by weights in a way that no rule counts, each with the module it is in."""
    learned: dict[fx.Node, bool] = {}  # by node that weights are in: whether the network's input is in it too
    found = []
    for node in network.graph.graph.nodes:
        if node.op == "placeholder":
            learned[node] = True
        elif node.op == "get_attr" and isinstance(_attribute(network, node.target), nn.Parameter):
            learned[node] = False
        elif node.op == "call_function":
            sources = [learned[source] for source in node.all_input_nodes if source in learned]
            if sources:
                learned[node] = any(sources)
            if True in sources and False in sources and terms(node) is None:
                path = module_path(node)
                found.append(operation(node) + (f" in {path}" if path else ""))
    return list(dict.fromkeys(found))


def _attribute(network: Network, name: str) -> Any:
    return network.tensor(name) if name in network.names else None


class Sizes:
    """Sizes in a graph: for one sample where it takes batches of any size, else as the example has them."""

    def __init__(self, network: Network) -> None:
        inputs = (node.meta.get("val") for node in network.graph.graph.nodes if node.op == "placeholder")
        symbolic = (
            value.shape[0] for value in inputs
            if isinstance(value, Tensor) and value.ndim and not isinstance(value.shape[0], int)
        )  # fmt: skip
        batch = next(symbolic, None)
        self.batch = None if batch is None else batch.node.expr
        self.known: dict[Any, int] = {}

    def __call__(self, dim: Dim) -> int:
        """The size of a dimension."""
        node, d = dim
        number = node.meta["val"].shape[d]
        if isinstance(number, int):
            return number
        expression = number.node.expr
        if expression not in self.known:
            others = expression.free_symbols - {self.batch}
            hints = {symbol: number.node.shape_env.size_hint(symbol) for symbol in others}
            one = expression.subs(hints | {self.batch: 1})
            self.known[expression] = int(one) if one.is_number else size(number)
        return self.known[expression]


def count_macs(network: Network) -> int:
    """Multiply-accumulates of convolutions, matrix products, attention and recurrent layers, for one sample.

    Operations that are not known (`uncounted`) count nothing.
    """
    sizes = Sizes(network)
    nodes = network.graph.graph.nodes
    return sum(math.prod(map(sizes, term)) for node in nodes for term in terms(node) or ())
