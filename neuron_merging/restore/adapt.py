"""Adaptation, a part of restoration (ours): changes the weights of a pruned layer so that the error of its consumer shrinks.

Let u be the output of the pruned layer, y(u) the output of its consumer and T the consumer's target. With s the slope of the
BatchNorm behind the consumer, its error is R = s (T − y), centred, and J = s ∂y/∂u. Then

    d = the regression of Jᵀ R on what the pruned layer sees,    η = ⟨R, J d⟩ / ‖J d‖²,

and η d is added to the layer's weights. This is a step of steepest descent for ‖R‖² among what the layer can compute; η is the
best length if the error is linear in u. Autograd computes both products; J itself is never built. A small error is left alone:
the probe is not data, and its details are not worth a change. A layer that sees the probe itself is not moved.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuron_merging.linalg import channel

LITTLE = 0.02  # an error below this share of the variance of the consumer's output is left alone


def adapt(
    layer: nn.Module,
    consumer: nn.Module,
    between: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    slope: Tensor | None,
    regress: Callable[[Tensor], dict[str, Tensor]],
    little: float = LITTLE,
) -> bool:
    """Move the weight and bias of `layer`, which sees x [B, …], by η d. If R or J d is too small, only returns False.

    between: the function from the layer's output to the consumer's input. target: T, in the shape of the consumer's output.
    slope: s [M], or None for 1. regress: gives the weight and bias that bring the layer nearest to an output. little: the
    largest error that is left alone, as a share of the variance of s T.
    """
    neurons = channel(consumer, target)
    others = [dim for dim in range(target.ndim) if dim != neurons]
    s = 1 if slope is None else slope.view([-1 if dim == neurons else 1 for dim in range(target.ndim)])
    u = layer(x).requires_grad_()
    with torch.enable_grad():
        y = consumer(between(u))
    R, whole = (s * (value - value.mean(others, keepdim=True)) for value in (target - y.detach(), target))
    if R.norm() ** 2 <= little * whole.norm() ** 2:
        return False
    v = (s * R).requires_grad_()
    with torch.enable_grad():
        (lacking,) = torch.autograd.grad(y, u, v, create_graph=True)  # Jᵀ R; linear in v, its derivative by v is J
    d = regress(lacking.detach())
    (Jd,) = torch.autograd.grad(lacking, v, functional_call(layer, d, (x,)))
    Jd = s * (Jd - Jd.mean(others, keepdim=True))
    reach = Jd.norm() ** 2
    if not reach > 0:
        return False
    step = (R * Jd).sum() / reach
    layer.weight.data += step * d["weight"]
    layer.bias.data += step * d["bias"]
    return True


def direction(
    layer: Callable[..., Tensor],
    consumer: Callable[[Tensor], Tensor],
    between: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    neurons: int,
    slope: Tensor | None,
    regress: Callable[[Tensor], dict[str, Tensor]],
    little: float = LITTLE,
) -> dict[str, Tensor] | None:
    """η d for the weight and bias of a layer that sees x [B, …]. None if R or J d is too small.

    layer: a function of x, and of a weight and a bias if they are others than its own. consumer: the function of the consumer.
    between: from the layer's output to the consumer's input. target: T, in the shape of the consumer's output, whose neurons
    are along the dimension `neurons`. slope: s [M], or None for 1. regress: gives the weight and bias that bring the layer
    nearest to an output. little: the largest error that is left alone, as a share of the variance of s T.
    """
    others = [dim for dim in range(target.ndim) if dim != neurons]
    s = 1 if slope is None else slope.view([-1 if dim == neurons else 1 for dim in range(target.ndim)])
    u = layer(x).requires_grad_()
    with torch.enable_grad():
        y = consumer(between(u))
    R, whole = (s * (value - value.mean(others, keepdim=True)) for value in (target - y.detach(), target))
    if R.norm() ** 2 <= little * whole.norm() ** 2:
        return None
    v = (s * R).requires_grad_()
    with torch.enable_grad():
        (lacking,) = torch.autograd.grad(y, u, v, create_graph=True)  # Jᵀ R; linear in v, its derivative by v is J
    d = regress(lacking.detach())
    (Jd,) = torch.autograd.grad(lacking, v, layer(x, d))
    Jd = s * (Jd - Jd.mean(others, keepdim=True))
    reach = Jd.norm() ** 2
    if not reach > 0:
        return None
    step = (R * Jd).sum() / reach
    return {name: step * value for name, value in d.items()}
