"""3 × 3 convolutions in float32 on a CPU by Winograd's minimal filtering: takes down to a quarter of the multiplications.

The fast recipe uses it (training.py). An m × m tile Y of the output depends on an (m + 2) × (m + 2) tile X of the input and on
the filter W: Y = Aᵀ[(G W Gᵀ) ⊙ (Bᵀ X B)]A (Lavin & Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016,
equation 8). Summed over the input channels, ⊙ becomes a matrix product for each of the (m + 2)² places. So each tile and pair
of channels takes (m + 2)² multiplications, where the definition takes 9 m².
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
TILES = 256  # about how many tiles are computed at once, so that they fit the cache; at least those of one image
POINTS = (0, 1, -1, 2, -2)  # points at which polynomials are evaluated, beside ∞; larger ones would cost precision
SIDES = (4, 3, 2)  # the sides m of output tiles; each takes the first m + 1 points


class Winograd(TorchFunctionMode):
    """A mode in which 3 × 3 convolutions are computed this way if nn.Conv2d calls them, in float32 on a CPU.

    They need stride 1, padding 1 and at least `LEAST` channels. Values and gradients differ from the usual ones by rounding: by
    about 1e-5 of the largest, while the usual ones have errors of 1e-6. The transformed input is kept until the gradients are
    computed. It has 2.25 times the size of the input if tiles of 4 × 4 fill the map. Activation checkpointing fails, since it
    computes the values again outside of this mode and finds them different.
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
        return F.conv2d(x, weight[:, :, 1:2, 1:2])  # only the middle of the filter sees something other than zeros
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
            dx = _convolved(g.shape, _transformed(g), _filters(G.flip(1), weight))  # with the flipped filters
        if ctx.needs_input_grad[1]:  # ∂Y = ∂[Aᵀ(U ⊙ V)A]: ∂U = (A ∂Y Aᵀ) ⊙ V, summed over the tiles, and ∂W = Gᵀ ∂U G
            dU = g.new_zeros((m + 2) ** 2, *weight.shape[:2])
            for outputs, inputs in zip(g.split(at_once), V):
                dU.baddbmm_((AT.T @ _tiles(outputs, m, m)).permute(1, 2, 0), inputs.transpose(0, 1))
            dweight = (G.T @ dU.transpose(0, 1)).unflatten(1, (3, 3)).permute(0, 3, 1, 2)
        return dx, dweight


def _transformed(x: Tensor) -> Iterator[Tensor]:
    """V = Bᵀ X B of all tiles X, some images at a time: [tiles, (m + 2)², C]."""
    m, _, _, at_once = _tiling(x.shape)
    _, BT, _ = TRANSFORMS[m, x.dtype]
    for images in x.split(at_once):
        yield BT @ _tiles(images, m + 2, m, border=1)


def _filters(G: Tensor, weight: Tensor) -> Tensor:
    """U = G W Gᵀ [(m + 2)², K, C] for the weight [K, C, 3, 3]. If G has its columns reversed, U is of the flipped filters."""
    return (G @ weight.permute(0, 2, 3, 1).flatten(1, 2)).transpose(0, 1)


def _convolved(shape: torch.Size, V: Iterable[Tensor], U: Tensor) -> Tensor:
    """The output, put together from the tiles Aᵀ(U ⊙ V)A. V: from an input of `shape` [B, C, H, W]. U: [(m + 2)², C, K]."""
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
    """m, the numbers of tiles in a column and in a row of an image, and the number of images that are computed at once."""
    tilings = [(m, *(-(-size // m) for size in shape[2:])) for m in SIDES]
    m, rows, columns = min(tilings, key=lambda tiling: (tiling[0] + 2) ** 2 * tiling[1] * tiling[2])  # fewest products
    return m, rows, columns, max(1, TILES // (rows * columns))


def _tiles(x: Tensor, side: int, step: int, border: int = 0) -> Tensor:
    """The tiles [tiles, side², C] of x [B, C, H, W], `step` apart, after a border of zeros was put around x."""
    lacking = [-(size + 2 * border - side) % step for size in x.shape[2:]]  # of the last tiles
    pads = (border, border + lacking[1], border, border + lacking[0])
    x = F.pad(x, pads) if any(pads) else x
    tiles = x.unfold(2, side, step).unfold(3, side, step)  # [B, C, rows, columns, side, side]
    return tiles.permute(0, 2, 3, 4, 5, 1).reshape(-1, side * side, x.shape[1])


def _transforms(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """The transforms of both dimensions at once: Aᵀ ⊗ Aᵀ [m², (m + 2)²], Bᵀ ⊗ Bᵀ [(m + 2)², (m + 2)²], G ⊗ G [(m + 2)², 9].

    In float64. The product of two polynomials (filter and output) follows from its values at m + 2 points, one of them ∞. Each
    value is a product of two numbers. A and G evaluate the two polynomials, B⁻¹ evaluates their product. A correlation is that
    product transposed (Toom–Cook).
    """
    points = torch.tensor(POINTS[: m + 1], dtype=torch.float64)

    def evaluation(coefficients: int) -> Tensor:
        at_infinity = torch.eye(coefficients, dtype=torch.float64)[-1:]
        return torch.cat([points[:, None] ** torch.arange(coefficients), at_infinity])

    one_dimension = evaluation(m).T, evaluation(m + 2).inverse().T, evaluation(3)
    return tuple(torch.kron(matrix, matrix) for matrix in one_dimension)


TRANSFORMS = {
    (m, dtype): tuple(matrix.to(dtype) for matrix in _transforms(m))
    for m in SIDES
    for dtype in (torch.float32, torch.float64)
}
