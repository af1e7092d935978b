"""Adaptation, a part of restoration (ours): changes the weights of a pruned layer so that the error of its consumer shrinks.

Let u be the output of the pruned layer, y(u) the output of its consumer and T the consumer's target. With s the slope of the
BatchNorm behind the consumer, its error is R = s (T − y), centred, and J = s ∂y/∂u. Then

    d = the regression of Jᵀ R on what the pruned layer sees,    η = ⟨R, J d⟩ / ‖J d‖²,

and η d is added to the layer's weights. This is a step of steepest descent for ‖R‖² among what the layer can compute; η is the
best length if the error is linear in u. Autograd computes both products; J itself is never built. A small error is left alone:
the inputs are not data, and their details are not worth a change. A layer that sees the inputs themselves is not moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from neuron_merging.errors import out_of_memory
from neuron_merging.graph.spaces import Space
from neuron_merging.restore.fitting import Fitting
from neuron_merging.restore.order import between, is_learned
from neuron_merging.restore.pair import Pair
from neuron_merging.restore.readers import Reader
from neuron_merging.restore.regression import Normal, Solver

LITTLE = 0.02  # an error below this share of the variance of the consumer's output is left alone


def paths(pair: Pair, smaller: Sequence[Space]) -> dict[fx.Node, list[fx.Node]]:
    """By consumer that lost inputs of a single layer: the call of that layer, then the nodes on the way to the consumer.

    Left out are layers whose outputs something else reads too, and those that see the network's inputs, which are made up.
    """
    layers = {reader.weight: reader.node for reader in pair.readers.values()}
    found: dict[fx.Node, list[fx.Node]] = {}
    for space in smaller:
        writers = [layers.get(place.name) for place in space.writers]
        if len(writers) != 1 or writers[0] is None or pair.readers[writers[0]].groups > 1:
            continue
        for consumer in (layers[place.name] for place in space.readers if place.name in layers):
            path = between(writers[0], consumer)
            inside = {*path, consumer}
            alone = all(user in inside for node in path for user in node.users)
            if consumer not in found and path and alone and is_learned(writers[0]):
                found[consumer] = path
    return found


def adapt(fitting: Fitting, consumer: Reader, path: Sequence[fx.Node], target: list[Tensor]) -> None:
    """Move the pruned layer at the start of `path`, then fit the consumer again on its new inputs.

    That fit starts from the consumer's present weights, and from the plain target. Where something on the way has no
    derivatives, nothing is moved.
    """
    pair, options = fitting.pair, fitting.options
    first, *inner = path
    layer, source = pair.readers[first], pair.copies[consumer.source]
    weight = pair.weight(layer)
    seen = pair.student.values[pair.copies[layer.source]]
    inside = {first, *inner}
    free = all(s in inside or s.op == "get_attr" for node in inner for s in node.all_input_nodes)
    places = pair.apply(layer, seen[0][:1]).numel() // len(weight)  # of a sample
    samples = -(-options.positions * weight[0].numel() // places)  # enough for a fit
    x, T = (_first(parts, samples) if free else parts[0] for parts in (seen, target))

    def through(u: Tensor, k: int) -> Tensor:
        """From the layer's output to the consumer's input. k: the batch, where other values are read on the way."""
        values: dict[fx.Node, Any] = {} if free else {node: parts[k] for node, parts in pair.student.values.items()}
        values[pair.copies[first]] = u
        for node in inner:
            values[pair.copies[node]] = pair.student.apply(pair.copies[node], values)
        return values[source]

    regress = _regression(fitting, layer, x)
    if regress is None:
        return
    for step in range(options.adaptations):
        try:
            with sdpa_kernel(SDPBackend.MATH):  # other kernels of attention have no second derivative
                move = direction(
                    partial(pair.apply, layer), partial(pair.apply, consumer), partial(through, k=0), x, T,
                    consumer.channel(T), pair.slope(consumer), regress, 0.0 if step else LITTLE,
                )  # fmt: skip
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            return  # something on the way has no derivatives
        if move is None:
            return
        pair.put(layer, pair.weight(layer) + move["weight"], pair.bias(layer) + move["bias"])
        pair.student.values[source] = [through(pair.apply(layer, part), k) for k, part in enumerate(seen)]
        fitting.regress(consumer, target, aware=False)


def _regression(fitting: Fitting, layer: Reader, x: Tensor) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """The function that gives the weight and bias which bring a layer that sees x nearest to an output.

    None where there are fewer positions than features: it would learn the inputs by heart.
    """
    weight = fitting.pair.weight(layer)
    places = fitting.places(layer, [fitting.pair.apply(layer, x)], layer.matrix(weight, 1))[0]
    U = layer.seen(x, places, 1)
    solver = fitting.solvers.pop(layer.node, None)
    if solver is None:  # it sees what the teacher sees, or kept its weights, so that it was not fitted
        mean = U.mean(1)
        normal = Normal(U - mean[:, None])
        solver = Solver(mean, normal.factor(fitting.options.ridge), normal.dual)
    if solver.dual:
        return None
    U = U - solver.mean[:, None]

    def regress(aim: Tensor) -> dict[str, Tensor]:
        rows = layer.given(aim, places, 1)
        mean = rows.mean(1)
        W = solver(rows - mean[:, None], U).to(rows)
        bias = mean - (W @ solver.mean.to(W)[..., None]).squeeze(-1)
        return {"weight": layer.as_weight(W, weight), "bias": bias[0]}

    return regress


def direction(
    layer: Callable[..., Tensor],
    consumer: Callable[[Tensor], Tensor],
    way: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    neurons: int,
    slope: Tensor | None,
    regress: Callable[[Tensor], Mapping[str, Tensor]],
    little: float = LITTLE,
) -> dict[str, Tensor] | None:
    """η d for the weight and bias of a layer that sees x [B, …]. None if R or J d is too small.

    layer: a function of x, and of a weight and a bias if they are others than its own. consumer: the function of the consumer.
    way: from the layer's output to the consumer's input. target: T, in the shape of the consumer's output, whose neurons are
    along the dimension `neurons`. slope: s [M], or None for 1. regress: gives the weight and bias that bring the layer nearest
    to an output. little: the largest error that is left alone, as a share of the variance of s T.
    """
    others = [dim for dim in range(target.ndim) if dim != neurons]
    s = 1 if slope is None else slope.view([-1 if dim == neurons else 1 for dim in range(target.ndim)])
    u = layer(x).requires_grad_()
    with torch.enable_grad():
        y = consumer(way(u))
    R, whole = (s * (value - value.mean(others, keepdim=True)) for value in (target - y.detach(), target))
    if R.norm() ** 2 <= little * whole.norm() ** 2:
        return None
    v = (s * R).requires_grad_()
    with torch.enable_grad():
        (lacking,) = torch.autograd.grad(y, u, v, create_graph=True)  # Jᵀ R; linear in v, its derivative by v is J
    d = regress(lacking.detach())
    (Jd,) = torch.autograd.grad(lacking, v, layer(x, **d))
    Jd = s * (Jd - Jd.mean(others, keepdim=True))
    reach = Jd.norm() ** 2
    if not reach > 0:
        return None
    step = (R * Jd).sum() / reach
    return {name: step * value for name, value in d.items()}


def _first(parts: Sequence[Tensor], samples: int) -> Tensor:
    """The first samples of all parts together."""
    taken, missing = [], samples
    for part in parts:
        if missing > 0:
            taken.append(part[:missing])
            missing -= len(taken[-1])
    return torch.cat(taken) if len(taken) > 1 else taken[0]
