"""Products by convolution against those of float64."""

import pytest
import torch

import products
from products import ROWS, across, gram, times


@pytest.fixture(autouse=True, params=[(1, False), (2, False), (2, True)])
def machine(request, monkeypatch):
    """With two threads, and not on one of Intel's CPUs, oneDNN's convolution, else PyTorch's own product."""
    before = torch.get_num_threads()
    threads, intel = request.param
    torch.set_num_threads(threads)
    monkeypatch.setattr(products, "_intel", lambda: intel)
    assert products._convolves(torch.zeros(1, 1)) == (
        threads == 2 and not intel and products._onednn(torch.device("cpu"))
    )
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "n, F, M",
    [(0, 3, 2), (1, 1, 1), (1, 7, 3), (500, 300, 20), (50, 1, 2), (200, 130, 17), (ROWS + 3, 5, 1), (3, 257, 20)],
)
def test_products_are_those_of_float64(n, F, M, dtype):
    random = torch.Generator().manual_seed(0)
    U, W, R = (torch.randn(*size, generator=random, dtype=torch.float64).to(dtype) for size in ((n, F), (M, F), (n, M)))
    exact_U, exact_W, exact_R = U.double(), W.double(), R.double()
    n, F = max(n, 1), max(F, 1)
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(times(U, W).double() / F, exact_U @ exact_W.T / F, **close)
    torch.testing.assert_close(across(R, U).double() / n, exact_R.T @ exact_U / n, **close)
    A = gram(U)
    assert A.dtype == torch.float64
    torch.testing.assert_close(A / n, A.T / n, **close)
    torch.testing.assert_close(A / n, exact_U.T @ exact_U / n, **close)


def test_rows_may_be_a_view():
    U = torch.randn(900, 240, generator=torch.Generator().manual_seed(0))
    for part in (U[:, ::2], U[::2], U[3:, 2:5], U.T):
        exact, close = part.double(), {"rtol": 0, "atol": 1e-5 * max(part.shape)}
        torch.testing.assert_close(times(part, part).double(), exact @ exact.T, **close)
        torch.testing.assert_close(across(part, part).double(), exact.T @ exact, **close)
        torch.testing.assert_close(gram(part), exact.T @ exact, **close)


@pytest.mark.parametrize(
    "said, intel", [("vendor_id : GenuineIntel", True), ("vendor_id : AuthenticAMD", False), (None, False)]
)
def test_the_maker_of_the_cpu_is_read_where_it_is_said(said, intel, monkeypatch, tmp_path):
    monkeypatch.undo()  # of `machine`
    if said is not None:
        (tmp_path / "cpuinfo").write_text(said)
    monkeypatch.setattr(products, "Path", lambda path: tmp_path / "cpuinfo")
    monkeypatch.setattr(products.platform, "processor", lambda: "x86_64")
    assert products._intel.__wrapped__() == intel
