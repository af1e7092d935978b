"""Other people's methods, to compare with. They keep as many neurons as merging and restoration do.

lbyl: replaces every dropped filter by a ridge combination of all kept ones ("Look before you leap", arXiv 2502.08474).
fold: clusters the filters, makes each cluster one filter and repairs its variance without data (arXiv 2502.10216).
re-estimation: measures the BatchNorm statistics again on real images; not data-free.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_merging.compensation import Contents
from neuron_merging.decompose import Decomposition, Neurons, dropped, effective
from neuron_merging.errors import NeuronMergingError, missing, reported_as
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.surgery import Smaller, cut
from neuron_merging.graph.units import Unit
from neuron_merging.running import NORMS, measure_statistics

LBYL_RIDGE = 1e-2  # λ₁ and λ₂
ENTRIES = 2**24  # the most numbers in the matrices that are solved at once: 128 MB


def lbyl(neurons: Neurons, keep: Tensor) -> Decomposition:
    """Z [P, N]: every dropped filter as a least-squares combination of the kept ones, with terms for the BatchNorm.

    For filter p with X = W[keep]ᵀ, y = w_p and g = γ_p/σ_p:
        α = (XᵀX + λ₁ g² a aᵀ + λ₂ diag(k²))⁻¹ (Xᵀy + λ₁ g (g μ_p − β_p) a)
    with a_j = μ_j − σ_j β_j / γ_j and k_j = (γ_p/γ_j)(σ_j/σ_p), and Z[:, p] = k ∘ α. Without BatchNorm a = 0, k = 1.
    Kept filters with γ_j = 0 are left out of the combination. λ₂ k² is never quite 0, so that the matrix can be inverted.
    """
    W, N = neurons.W, len(neurons.W)
    drop = dropped(W, keep)
    X, Y = W[keep], W[drop]  # [P, D], [Q, D]
    size = X.pow(2).sum(1).mean()  # the ridge is relative to the filters' own scale
    a, k = W.new_zeros(len(keep)), W.new_ones(len(drop), len(keep))
    g, b = W.new_zeros(len(drop)), W.new_zeros(len(drop))
    if neurons.bn is not None:
        gamma, beta, mu, _, sigma = neurons.bn.of(keep)
        usable = gamma.abs() > 1e-6
        X = X * usable[:, None]
        a = torch.where(usable, mu - sigma * beta / gamma, 0)
        gamma_p, beta_p, mu_p, _, sigma_p = neurons.bn.of(drop)
        g, b = gamma_p / sigma_p, gamma_p * mu_p / sigma_p - beta_p  # [Q]
        k = torch.where(usable, g[:, None] * sigma / gamma, 0)
    penalty = (LBYL_RIDGE * k**2).clamp(min=max(1e-8 * float(size), 1e-30))
    right = Y @ X.T + LBYL_RIDGE * (g * b)[:, None] * a  # [Q, P]
    if neurons.bn is None:  # one matrix for all
        alpha = torch.linalg.solve(X @ X.T + penalty[:1].diag_embed()[0], right.T).T if len(drop) else right
    else:
        G, aa, several = X @ X.T, LBYL_RIDGE * torch.outer(a, a), max(1, ENTRIES // len(keep) ** 2)
        parts = zip(*(x.split(several) for x in (g**2, penalty, right)))
        alpha = torch.cat([torch.linalg.solve(G + s[:, None, None] * aa + p.diag_embed(), r) for s, p, r in parts])
    Z = W.new_zeros(len(keep), N)
    Z[torch.arange(len(keep), device=keep.device), keep] = 1
    Z[:, drop] = (k * alpha).T
    return Decomposition(keep, Z)


def fold(survey: Survey, widths: Mapping[Space, int], seed: int = 0) -> Smaller:
    """A smaller network: the neurons of each unit form so many clusters, and a centroid replaces each cluster.

    First all members of a cluster are set to its centroid. Then one member stands in for the others, which is exact.
    With BatchNorm, filters are scaled by it before they are compared and averaged. Averaging makes the variance smaller, so
    the centroid is multiplied by N_c / √(N_c + (N_c² − N_c) c̄), with c̄ the mean cosine of its N_c members.
    """
    clustered = copy.deepcopy(survey.network.model)
    parts: dict[Space, Decomposition] = {}
    for space, P in widths.items():
        neurons = Contents(survey, space, {}).neurons
        if P == 0:  # a block that is left out
            parts[space] = Decomposition(torch.arange(0, device=neurons.W.device), neurons.W.new_zeros(0, space.size))
            continue
        Z = _clusters(neurons, P, seed)
        keep, order = Z.argmax(1).sort()  # the first member of every cluster
        parts[space] = Decomposition(keep, Z[order])
        _centre(clustered, space.unit, neurons, Z)
    survey = replace(survey, network=replace(survey.network, model=clustered))
    absorbed = [
        taken for space, part in parts.items() if len(part.keep) for taken in Contents(survey, space, {}).of_unit(part)
    ]
    return cut(survey, {space: part.keep for space, part in parts.items()}, absorbed)


def _centre(model: nn.Module, unit: Unit, neurons: Neurons, Z: Tensor) -> None:
    """Set the neurons of a unit to the centroids of their clusters Z [P, N]. Changes `model`."""
    bn, average = neurons.bn, averages(Z)
    W, shift = _scaled(neurons)
    layer = model.get_submodule(unit.layer)
    mean = average @ W
    if bn is None and layer.bias is not None:
        mean, bias = mean[:, :-1], mean[:, -1]
    else:
        bias = W.new_zeros(len(W))  # it is part of the BatchNorm's mean
    _fill(layer.weight, mean)
    if layer.bias is not None:
        _fill(layer.bias, bias)
    if bn is not None:
        direction = W / W.norm(dim=1, keepdim=True).clamp(min=1e-12)
        length = (Z @ direction).norm(dim=1)  # its square is the sum of all cosines in a cluster
        gamma = torch.where(length > 1e-9, Z.sum(1) / length, 1)  # 1 for a cluster of zeros
        _replace_norm(model.get_submodule(unit.bn), Z.T @ gamma, average @ bn.beta, average @ shift)


def _scaled(neurons: Neurons) -> tuple[Tensor, Tensor]:
    """The filters scaled by their BatchNorm, [N, D], and the means that it then subtracts, [N]."""
    W, bn = neurons.W, neurons.bn
    if bn is None:
        return W, W.new_zeros(len(W))
    return W * bn.gain[:, None], bn.gain * bn.mu


def _clusters(neurons: Neurons, P: int, seed: int) -> Tensor:
    """Which of the P clusters each neuron belongs to: [P, N] of zeros and ones."""
    try:
        from sklearn.cluster import KMeans  # imported here: it takes long, and nothing else needs it
    except ModuleNotFoundError as error:
        raise NeuronMergingError(f"fold: {missing(str(error.name))}") from error

    points = effective(neurons)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k-means warns of equal neurons
        label = torch.from_numpy(KMeans(P, n_init=3, random_state=seed).fit(points.cpu().numpy()).labels_).long()
    # If neurons are equal, k-means may return fewer clusters than it was asked for.
    for empty in set(range(P)) - set(label.tolist()):
        largest = label.bincount(minlength=P).argmax()
        label[(label == largest).nonzero()[-1]] = empty
    return F.one_hot(label.to(points.device), P).T.double()


def averages(Z: Tensor) -> Tensor:
    """The matrix [N, N] that replaces every neuron by the mean of its cluster, for clusters Z [P, N]."""
    return Z.T @ (Z / Z.sum(1, keepdim=True))


def folded(neurons: Neurons, keep: Tensor, seed: int = 0) -> Decomposition:
    """Folding of one layer, to first order: every neuron's activation becomes the mean over its cluster.

    Used for the choice of widths; `fold` itself averages filters. Of `keep` only the length matters.
    """
    N = len(neurons.W)
    return Decomposition(torch.arange(N, device=keep.device), averages(_clusters(neurons, len(keep), seed)))


def _fill(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value.view_as(parameter))


def _replace_norm(bn: nn.Module, gamma: Tensor, beta: Tensor, mean: Tensor) -> None:
    """Make a BatchNorm compute γ (u − mean) + β, with γ > 0."""
    if bn.weight is None:  # the statistics say it all
        bn.running_mean.copy_(mean - beta / gamma)
        bn.running_var.copy_(gamma**-2 - bn.eps)
        return
    bn.running_mean.copy_(mean)
    bn.running_var.fill_(1 - bn.eps)
    _fill(bn.weight, gamma)
    _fill(bn.bias, beta)


def reestimate(model: nn.Module, images: Tensor, batch_size: int = 128) -> nn.Module:
    """Measure the statistics of every BatchNorm again on `images` [B, …]. Changes `model` and returns it.

    A BatchNorm that evaluation never calls keeps its statistics. Raises NeuronMergingError if the network does not run on
    the images.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.running_mean is not None]
    before = [{name: value.clone() for name, value in bn._buffers.items()} for bn in norms]
    momenta, training = [bn.momentum for bn in norms], {module: module.training for module in model.modules()}
    model.eval()
    for bn in norms:
        bn.reset_running_stats()
        measure_statistics(bn, momentum=None)  # the plain average over batches
    what = f"{type(model).__name__} does not run in batches on images of shape {list(images.shape)}"
    with torch.no_grad(), reported_as(what, typed=True):
        for part in images.tensor_split(math.ceil(len(images) / batch_size)):  # no batch of one
            model(part.clone())  # the network may overwrite its input
    for bn, momentum, buffers in zip(norms, momenta, before):
        bn.momentum = momentum
        if isinstance(bn, nn.SyncBatchNorm):
            del bn.forward
        if not bn.num_batches_tracked:  # only training uses it
            bn._buffers.update(buffers)
    for module, mode in training.items():
        module.training = mode
    return model
