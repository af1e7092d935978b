"""Linear algebra of restoration and the choice of widths (ours): patches, Gram matrices, the penalty of a ridge regression.

Products of up to `ROWS` rows are summed in the dtype of the rows. Longer sums, and all solutions, are in float64.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_merging.errors import NeuronMergingError

ENTRIES = 2**27  # the most numbers in a matrix of patches: 512 MB
POSITIONS = 128  # output positions that a fit uses, for every feature of a patch


@dataclass(frozen=True)
class Geometry:
    """Of a convolution, in order of its dimensions. padding: of zeros, as `torch.nn.functional.pad` takes it."""

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    padding: list[int]


def patches(x: Tensor, conv: Geometry, chosen: Tensor) -> Tensor:
    """The patches of x [B, C, …] that a convolution sees at the output positions `chosen` [n]: [n, K·C], tap by tap."""
    x = F.pad(x, conv.padding).movedim(1, -1).contiguous()
    sides = x.shape[1:-1]
    out = [(s - d * (k - 1) - 1) // st + 1 for s, d, k, st in zip(sides, conv.dilation, conv.kernel, conv.stride)]
    origin, taps = torch.arange(len(x), device=x.device), torch.zeros(1, dtype=torch.int64, device=x.device)
    for side, count, size, stride, dilation in zip(sides, out, conv.kernel, conv.stride, conv.dilation):
        origin = (origin[:, None] * side + stride * torch.arange(count, device=x.device)).flatten()
        taps = (taps[:, None] * side + dilation * torch.arange(size, device=x.device)).flatten()
    index = origin[chosen, None] + taps  # [n, K]
    return x.view(-1, x.shape[-1]).index_select(0, index.flatten()).view(len(chosen), -1)


def centre(U: Tensor) -> Tensor:
    """Subtract the mean [F] from the columns of U [n, F], in place, and return it."""
    mean = U.mean(0)
    U -= mean
    return mean


def covariance(U: Tensor) -> Tensor:
    """The covariance [F, F] of centred columns U [n, F], summed as in `gram`."""
    return gram(U) / len(U)


def cholesky(A: Tensor) -> Tensor:
    """The Cholesky factor of A. Raises NeuronMergingError if A is not positive definite after rounding."""
    try:
        return torch.linalg.cholesky(A)
    except torch.linalg.LinAlgError as error:
        raise NeuronMergingError("the regression is singular: choose a larger --ridge (ridge=…)") from error


def penalty(energy: Tensor, ridge: float) -> Tensor:
    """The diagonal of Λ for the features' variances `energy` […, F]: λ of each, and λ/10 of their mean."""
    return ridge * energy + 0.1 * ridge * energy.mean(-1, keepdim=True) + 1e-10


ROWS = 2**14  # rows that are summed in their own dtype; such sums are added up in float64
BLOCKS = 6  # blocks of columns in a Gram matrix; blocks below the diagonal are not computed
COLUMNS = 64  # the width of a block is a multiple of this, and at least twice this


def gram(U: Tensor) -> Tensor:
    """Uᵀ U [F, F] of U [n, F], in float64. Only blocks on and above the diagonal are computed; the others are copies."""
    features = U.shape[1]
    A = U.new_zeros(features, features, dtype=torch.float64)
    size = max(2 * COLUMNS, -(-features // (BLOCKS * COLUMNS)) * COLUMNS)
    starts = range(0, features, size)
    for part in U.split(ROWS):
        for start in starts:
            A[start : start + size, start:] += part[:, start : start + size].T @ part[:, start:]
    for start in starts:
        A[start + size :, start : start + size] = A[start : start + size, start + size :].T
    return A
