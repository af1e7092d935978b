"""3 × 3 convolutions in float32 on a CPU with as little as a quarter of the products: Winograd's minimal filtering.

For training where the hardware has no bfloat16 (train.py). A tile Y of the output, m × m, depends on a tile X of the input,
(m + 2) × (m + 2), and on the filter W as Y = Aᵀ[(G W Gᵀ) ⊙ (Bᵀ X B)]A (Lavin & Gray, Fast Algorithms for Convolutional
Neural Networks, CVPR 2016, equation 8). With the sum over the input channels, ⊙ is a product of matrices for each of the
(m + 2)² places: (m + 2)² products a tile and pair of channels, where the definition takes 9 m².
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LEAST = 64  # channels: with fewer, transforming the tiles costs more than it saves
SIDES = (4, 3, 2, 1)  # of a tile of the output: beyond 4, float32 loses digits
TILES = 256  # at once, or a whole image's: so that they stay in the cache


class Winograd(TorchFunctionMode):
    """Within it, `conv2d` computes 3 × 3 convolutions this way: float32, stride and padding 1, of many channels, on a CPU.

    The results, and the gradients, differ from the usual ones by rounding: about 1e-5 of the largest.
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
        (x.device.type, x.dtype, x.ndim, *weight.shape[2:]) == ("cpu", torch.float32, 4, 3, 3)
        and geometry == ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups
        and min(weight.shape[:2]) >= LEAST
    )


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of x [B, C, H, W] with weight [K, C, 3, 3], stride 1, zero padding 1: [B, K, H, W], channels last."""
    return _Convolution.apply(x, weight)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        V = list(_transformed(x))
        ctx.save_for_backward(weight, *V)
        _, _, G = _transforms(_tiling(x.shape)[0], x.dtype)
        return _convolved(x.shape, V, _filters(G, weight).mT)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, *V = ctx.saved_tensors
        m, _, _, images = _tiling(g.shape)
        A, _, G = _transforms(m, g.dtype)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = _convolved(g.shape, _transformed(g), _filters(G.flip(1), weight))
        if ctx.needs_input_grad[1]:
            dU = g.new_zeros((m + 2) ** 2, *weight.shape[:2])
            for part, inputs in zip(g.split(images), V):
                dU.baddbmm_((A @ _tiles(part, m, m)).permute(1, 2, 0), inputs.transpose(0, 1))
            dweight = (G.T @ dU.transpose(0, 1)).unflatten(1, (3, 3)).permute(0, 3, 1, 2)
        return dx, dweight


def _transformed(x: Tensor) -> Iterator[Tensor]:
    """V = Bᵀ X B of all tiles X, in parts: [tiles, (m + 2)², C]."""
    m, _, _, images = _tiling(x.shape)
    _, B, _ = _transforms(m, x.dtype)
    for part in x.split(images):
        yield B @ _tiles(part, m + 2, m, border=1)


def _convolved(shape: torch.Size, V: Iterable[Tensor], U: Tensor) -> Tensor:
    """Aᵀ[U ⊙ V]A, put together: an input of `shape` [B, C, H, W], as V, with the filters U [(m + 2)², C, K]."""
    m, rows, columns, images = _tiling(shape)
    A, _, _ = _transforms(m, U.dtype)
    y = U.new_empty(shape[0], rows, m, columns, m, U.shape[2])
    for outputs, inputs in zip(y.split(images), V):
        Y = A.T @ (inputs.transpose(0, 1) @ U).transpose(0, 1)  # [tiles, m², K]
        outputs.copy_(Y.view(-1, rows, columns, m, m, U.shape[2]).transpose(2, 3))
    return y.view(shape[0], rows * m, columns * m, -1)[:, : shape[2], : shape[3]].permute(0, 3, 1, 2)


def _filters(G: Tensor, weight: Tensor) -> Tensor:
    """U = G W Gᵀ [(m + 2)², K, C]; with G's columns backwards, of the filters flipped, which the input's gradient needs."""
    return (G @ weight.permute(0, 2, 3, 1).flatten(1, 2)).transpose(0, 1)


def _tiling(shape: torch.Size) -> tuple[int, int, int, int]:
    """m, the tiles in a column and in a row of an image [B, C, H, W], and how many images are computed at once."""
    tilings = [(m, *(-(-size // m) for size in shape[2:])) for m in SIDES]
    m, rows, columns = min(tilings, key=lambda t: (t[0] + 2) ** 2 * t[1] * t[2])  # the fewest products
    return m, rows, columns, max(1, TILES // (rows * columns))


def _tiles(x: Tensor, side: int, step: int, border: int = 0) -> Tensor:
    """Tiles of x [B, C, H, W] with the given side, `step` apart, x with a border of zeros around it: [tiles, side², C]."""
    lacking = [-(size + 2 * border - side) % step for size in x.shape[2:]]  # of the last tiles
    pads = (border, border + lacking[1], border, border + lacking[0])
    x = F.pad(x, pads) if any(pads) else x
    tiles = x.unfold(2, side, step).unfold(3, side, step)  # [B, C, rows, columns, side, side]
    return tiles.permute(0, 2, 3, 4, 5, 1).reshape(-1, side * side, x.shape[1])


@functools.cache
def _transforms(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A ⊗ A [(m + 2)², m²], Bᵀ ⊗ Bᵀ [(m + 2)², (m + 2)²] and G ⊗ G [(m + 2)², 9]: the transforms of both dimensions at once.

    The product of two polynomials (filter and output) is found at m + 2 points, 0, ±1, … and ∞, where it is a product of
    numbers: A and G evaluate them, B⁻¹ evaluates their product; a correlation is that product transposed (Toom–Cook).
    """
    points = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0][: m + 1], dtype=torch.float64)

    def evaluation(coefficients: int) -> Tensor:
        at_infinity = torch.eye(coefficients, dtype=torch.float64)[-1:]
        return torch.cat([points[:, None] ** torch.arange(coefficients), at_infinity])

    one = evaluation(m), evaluation(m + 2).inverse().T, evaluation(3)
    return tuple(torch.kron(matrix, matrix).to(dtype) for matrix in one)
