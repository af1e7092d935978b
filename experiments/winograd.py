"""3 × 3 convolutions in float32 on a CPU with as little as a quarter of the products: Winograd's minimal filtering.

For the fast recipe (training.py). A tile Y of the output, m × m, depends on a tile X of the input,
(m + 2) × (m + 2), and on the filter W as Y = Aᵀ[(G W Gᵀ) ⊙ (Bᵀ X B)]A (Lavin & Gray, Fast Algorithms for Convolutional
Neural Networks, CVPR 2016, equation 8). With the sum over the input channels, ⊙ is a product of matrices for each of the
(m + 2)² places: (m + 2)² products a tile and pair of channels, where the definition takes 9 m².
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

LEAST = 64  # channels: with fewer, transforming the tiles costs more than it saves
TILES = 256  # computed at once, those of whole images, one at least: most of it fits the cache
POINTS = (0, 1, -1, 2, -2)  # where polynomials are evaluated, and ∞: more, larger ones would cost float32 digits
SIDES = (4, 3, 2)  # m: takes m + 1 of the points


class Winograd(TorchFunctionMode):
    """Within it, 3 × 3 convolutions are computed this way if called as nn.Conv2d calls them: of many channels, on a CPU.

    They have stride and padding 1, and compute in float32. Values and gradients differ from the usual ones by rounding:
    about 1e-5 of the largest, where those have 1e-6 themselves. Until the gradients are computed, the transformed input is
    kept: 2.25 times the input for maps that tiles of 4 × 4 fill. Activation checkpointing computes again outside of the
    mode, and refuses the difference.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and not kwargs and _suits(*args):
            x, weight, bias = args[:3]
            y = conv3x3(x, weight)
            return y if bias is None else y + bias[:, None, None]
        return func(*args, **(kwargs or {}))


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: Any) -> bool:
    return (
        (x.device.type, x.dtype, x.ndim, *weight.shape[1:]) == ("cpu", torch.float32, 4, x.shape[1], 3, 3)
        and geometry == ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups
        and min(weight.shape[:2]) >= LEAST
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x [B, C, H, W] with weight [K, C, 3, 3], stride 1, zero padding 1: [B, K, H, W], channels last."""
    if x.shape[2:] == (1, 1):
        return F.conv2d(x, weight[:, :, 1:2, 1:2])  # all but the middle of the filter sees zeros
    return _Convolution.apply(x, weight)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        m, *_ = _tiling(x.shape)
        _, _, G = TRANSFORMS[m, x.dtype]
        V, kept = itertools.tee(_transformed(x)) if ctx.needs_input_grad[1] else (_transformed(x), ())
        y = _convolved(x.shape, V, _filters(G, weight).mT)
        ctx.save_for_backward(weight, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, *V = ctx.saved_tensors
        m, _, _, at_once = _tiling(g.shape)
        AT, _, G = TRANSFORMS[m, g.dtype]
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _convolved(g.shape, _transformed(g), _filters(G.flip(1), weight))  # of the filters flipped
        if ctx.needs_input_grad[1]:  # ∂Y = ∂[Aᵀ(U ⊙ V)A]: ∂U = (A ∂Y Aᵀ) ⊙ V, summed over the tiles, and ∂W = Gᵀ ∂U G
            dU = g.new_zeros((m + 2) ** 2, *weight.shape[:2])
            for outputs, inputs in zip(g.split(at_once), V):
                dU.baddbmm_((AT.T @ _tiles(outputs, m, m)).permute(1, 2, 0), inputs.transpose(0, 1))
            dweight = (G.T @ dU.transpose(0, 1)).unflatten(1, (3, 3)).permute(0, 3, 1, 2)
        return dx, dweight


def _transformed(x: Tensor) -> Iterator[Tensor]:
    """V = Bᵀ X B of all tiles X, in parts: [tiles, (m + 2)², C]."""
    m, _, _, at_once = _tiling(x.shape)
    _, BT, _ = TRANSFORMS[m, x.dtype]
    for images in x.split(at_once):
        yield BT @ _tiles(images, m + 2, m, border=1)


def _filters(G: Tensor, weight: Tensor) -> Tensor:
    """U = G W Gᵀ [(m + 2)², K, C] of weight [K, C, 3, 3]; with G's columns backwards, of the filters flipped."""
    return (G @ weight.permute(0, 2, 3, 1).flatten(1, 2)).transpose(0, 1)


def _convolved(shape: torch.Size, V: Iterable[Tensor], U: Tensor) -> Tensor:
    """Aᵀ(U ⊙ V)A, put together: an input of `shape` [B, C, H, W], as V, with the filters U [(m + 2)², C, K]."""
    m, rows, columns, at_once = _tiling(shape)
    AT, _, _ = TRANSFORMS[m, U.dtype]
    size = (shape[0], U.shape[2], rows * m, columns * m)
    y = torch.empty(size, dtype=U.dtype, memory_format=torch.channels_last)
    places = y.permute(0, 2, 3, 1).unflatten(2, (columns, m)).unflatten(1, (rows, m)).transpose(2, 3)
    for images, tiles in zip(places.split(at_once), V):  # [B, rows, columns, m, m, K]
        Y = AT @ (tiles.transpose(0, 1) @ U).transpose(0, 1)  # [tiles, m², K]
        images.copy_(Y.view(images.shape))
    whole = size[2:] == shape[2:]
    return y if whole else y[:, :, : shape[2], : shape[3]].clone(memory_format=torch.channels_last)


def _tiling(shape: torch.Size) -> tuple[int, int, int, int]:
    """m, the tiles in a column and in a row of an image [B, C, H, W], and how many images are computed at once."""
    tilings = [(m, *(-(-size // m) for size in shape[2:])) for m in SIDES]
    m, rows, columns = min(tilings, key=lambda tiling: (tiling[0] + 2) ** 2 * tiling[1] * tiling[2])  # fewest products
    return m, rows, columns, max(1, TILES // (rows * columns))


def _tiles(x: Tensor, side: int, step: int, border: int = 0) -> Tensor:
    """Tiles of x [B, C, H, W] with the given side, `step` apart, x with a border of zeros around it: [tiles, side², C]."""
    lacking = [-(size + 2 * border - side) % step for size in x.shape[2:]]  # of the last tiles
    pads = (border, border + lacking[1], border, border + lacking[0])
    x = F.pad(x, pads) if any(pads) else x
    tiles = x.unfold(2, side, step).unfold(3, side, step)  # [B, C, rows, columns, side, side]
    return tiles.permute(0, 2, 3, 4, 5, 1).reshape(-1, side * side, x.shape[1])


def _transforms(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Aᵀ ⊗ Aᵀ [m², (m + 2)²], Bᵀ ⊗ Bᵀ [(m + 2)², (m + 2)²], G ⊗ G [(m + 2)², 9]: both dimensions at once, in float64.

    The product of two polynomials (filter and output) is found from their values at m + 2 points, ∞ among them, which are
    products of numbers: A and G evaluate the two, B⁻¹ evaluates their product. A correlation is that product transposed
    (Toom–Cook).
    """
    points = torch.tensor(POINTS[: m + 1], dtype=torch.float64)

    def evaluation(coefficients: int) -> Tensor:
        at_infinity = torch.eye(coefficients, dtype=torch.float64)[-1:]
        return torch.cat([points[:, None] ** torch.arange(coefficients), at_infinity])

    one = evaluation(m).T, evaluation(m + 2).inverse().T, evaluation(3)
    return tuple(torch.kron(matrix, matrix) for matrix in one)


TRANSFORMS = {
    (m, dtype): tuple(matrix.to(dtype) for matrix in _transforms(m))
    for m in SIDES
    for dtype in (torch.float32, torch.float64)
}
