"""Linear algebra of restoration and the choice of widths (ours): patches, Gram matrices, ridge regression.

Products of up to `ROWS` rows are summed in the dtype of the rows. Longer sums, and all solutions, are in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_merging.errors import NeuronMergingError
from neuron_merging.running import CONVS

ENTRIES = 2**27  # the most numbers in a matrix of patches: 512 MB
POSITIONS = 128  # output positions that a fit uses, for every feature of a patch


def channel(layer: nn.Module, y: Tensor) -> int:
    """Which dimension of y, the output of `layer`, is that of the neurons."""
    return 1 if isinstance(layer, CONVS) else y.ndim - 1


def rows(layer: nn.Module, x: Tensor, y: Tensor, positions: int = POSITIONS) -> tuple[Tensor, Tensor]:
    """The input patches [n, F] of `layer` (a copy) and its outputs [n, M], both at the positions that a fit uses."""
    chosen = places(layer, y, positions)
    seen = patches(x, layer, chosen) if isinstance(layer, CONVS) else x.flatten(0, -2)[chosen]
    return seen, outputs(layer, y, chosen)


def places(layer: nn.Module, y: Tensor, positions: int = POSITIONS) -> Tensor:
    """The positions [n] of y, the output of `layer`, that a fit uses: all, or a fixed random choice if there are very many."""
    count, features = y.numel() // y.shape[channel(layer, y)], layer.weight[0].numel()
    most = max(min(positions * features, ENTRIES // features), len(y))  # at least one for every sample
    chosen = torch.arange(count, device="cpu")
    if count > most:
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")[:most].sort().values
    return chosen.to(y.device)


def outputs(layer: nn.Module, y: Tensor, chosen: Tensor) -> Tensor:
    """y, the output of `layer`, at the positions `chosen`: [n, M]."""
    return y.movedim(channel(layer, y), -1).flatten(0, -2)[chosen]


def patches(x: Tensor, conv: nn.Module, chosen: Tensor) -> Tensor:
    """The patches of x [B, C, …] that a convolution sees at the output positions `chosen` [n]: [n, K·C], tap by tap."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode).movedim(1, -1).contiguous()
    sides = x.shape[1:-1]
    out = [(s - d * (k - 1) - 1) // st + 1 for s, d, k, st in zip(sides, conv.dilation, conv.kernel_size, conv.stride)]
    origin, taps = torch.arange(len(x), device=x.device), torch.zeros(1, dtype=torch.int64, device=x.device)
    for side, count, size, stride, dilation in zip(sides, out, conv.kernel_size, conv.stride, conv.dilation):
        origin = (origin[:, None] * side + stride * torch.arange(count, device=x.device)).flatten()
        taps = (taps[:, None] * side + dilation * torch.arange(size, device=x.device)).flatten()
    index = origin[chosen, None] + taps  # [n, K]
    return x.view(-1, x.shape[-1]).index_select(0, index.flatten()).view(len(chosen), -1)


def matrix(layer: nn.Module) -> Tensor:
    """The weights of a layer as a matrix [M, F], its columns in the order of `rows`."""
    return layer.weight.flatten(2).transpose(1, 2).flatten(1) if isinstance(layer, CONVS) else layer.weight


def as_weight(W: Tensor, layer: nn.Module) -> Tensor:
    """W [M, F] in the shape of the layer's weight: the inverse of `matrix`."""
    shape = layer.weight.shape
    return W.view(len(W), -1, shape[1]).transpose(1, 2).reshape(-1, *shape[1:]) if isinstance(layer, CONVS) else W


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


class Ridge:
    """Ridge regression on the rows of U [n, F], for any number of targets. All but the products over n is in float64.

    Changes U: subtracts its mean [F]. Otherwise neurons that hardly vary would be lost in the rounding of float32 products.
    """

    def __init__(self, U: Tensor, ridge: float) -> None:
        n, features = U.shape
        self.mean, self.U = centre(U), U
        self.dual = n < features
        if self.dual:  # (A + Λ)⁻¹ Uᵀ = Λ⁻¹ Uᵀ (U Λ⁻¹ Uᵀ / n + I)⁻¹, with n unknowns instead of F
            self.U = U.double()
            self.penalty = penalty(self.U.pow(2).mean(0), ridge)
            scaled = self.U / (n * self.penalty).sqrt()
            kernel = scaled @ scaled.T + torch.eye(n, dtype=torch.float64, device=U.device)
        else:
            kernel = covariance(U)
            kernel.diagonal().add_(penalty(kernel.diagonal(), ridge))
        self.factor = cholesky(kernel)

    def forget(self) -> "Ridge":
        """Free the rows, which take most of the memory; later calls have to pass rows."""
        self.U = None
        return self

    def __call__(self, R: Tensor, U: Tensor | None = None) -> Tensor:
        """The coefficients [M, F] for the centred targets R [n, M].

        If R is what given weights leave over of a target, they are added to those weights. U: other centred rows, to which the
        targets belong; not for the dual form.
        """
        if self.dual:
            return (self.U.T @ torch.cholesky_solve(R.double(), self.factor) / (len(R) * self.penalty[:, None])).T
        return torch.cholesky_solve(((self.U if U is None else U).T @ R).double() / len(R), self.factor).T
