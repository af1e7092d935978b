"""Matrix products of many rows, in which restoration and the choice of widths spend their time (ours).

PyTorch hands products to MKL, which runs at half speed on CPUs that are not Intel's, and convolutions to oneDNN, which does
not. So in float32 on such a CPU, with two threads or more, a product here is a convolution with a kernel of 1 × 1 (`make bench`
measures both; on Intel's PyTorch's own is the quicker one).
"""

import contextlib
import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

ROWS = 2**14  # whose products are summed in the dtype of the rows; more of them, in float64
BLOCKS = 6  # of columns in a Gram matrix: of the blocks below the diagonal none is computed
COLUMNS = 64  # a block has a multiple of as many, and twice as many at least


def times(U: Tensor, W: Tensor) -> Tensor:
    """U Wᵀ, [n, M], of U [n, F] and W [M, F]."""
    if not _convolves(U):
        return U @ W.T
    return F.conv2d(_places(U), W[:, :, None, None]).movedim(1, -1).reshape(len(U), len(W))


def across(R: Tensor, U: Tensor) -> Tensor:
    """Rᵀ U, [M, F], of R [n, M] and U [n, F]."""
    if not _convolves(U):
        return R.T @ U
    size = (R.shape[1], U.shape[1])
    return conv2d_weight(_places(U), (*size, 1, 1), _places(R)).view(size)


def gram(U: Tensor) -> Tensor:
    """Uᵀ U of U [n, F]: [F, F] in float64, by blocks of columns on and above the diagonal."""
    features = U.shape[1]
    A = U.new_zeros(features, features, dtype=torch.float64)
    size = max(2 * COLUMNS, -(-features // (BLOCKS * COLUMNS)) * COLUMNS)
    starts = range(0, features, size)
    for part in U.split(ROWS):
        for start in starts:
            A[start : start + size, start:] += across(part[:, start : start + size], part[:, start:])
    for start in starts:
        A[start + size :, start : start + size] = A[start : start + size, start + size :].T
    return A


def full_precision(device: torch.device) -> bool:
    """Whether float32 products on this device are quick and computed in full float32: a program may have allowed less."""
    if not _onednn(device) or torch.is_autocast_enabled("cpu"):
        return False
    conv, matmul = (getattr(torch.backends.mkldnn, name, None) for name in ("conv", "matmul"))
    if conv is None or not hasattr(conv, "fp32_precision"):  # an older PyTorch
        return torch.get_float32_matmul_precision() == "highest"
    return {conv.fp32_precision, matmul.fp32_precision} <= {"none", "ieee"}


def _onednn(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.mkldnn.is_available()


def _convolves(U: Tensor) -> bool:
    several = torch.get_num_threads() > 1  # with one, PyTorch does not hand such convolutions to oneDNN
    return _onednn(U.device) and U.dtype == torch.float32 and U.numel() > 0 and several and not _intel()


def cpu(about: str) -> str:
    """What Linux says of the processor, its "vendor_id" or "model name"; elsewhere what Python calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == about:
                return value.strip()
    return platform.processor() or platform.machine()


@functools.cache
def _intel() -> bool:
    """Whether this machine's CPU says that it is one of Intel's."""
    return "GenuineIntel" in cpu("vendor_id")


def _places(U: Tensor) -> Tensor:
    """Rows [n, F] as the places of an image of F channels, in channels_last: [1, F, 1, n]."""
    return U.contiguous()[None, None].permute(0, 3, 1, 2)
