"""Gram matrices and the ridge regression against float64."""

import pytest
import torch

from neuron_merging.linalg import ROWS, gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, F", [(0, 3), (1, 1), (1, 7), (500, 300), (50, 1), (200, 130), (ROWS + 3, 5), (3, 257)])
def test_a_gram_matrix_is_that_of_float64(n, F, dtype):
    U = torch.randn(n, F, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    A, n = gram(U), max(n, 1)
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    assert A.dtype == torch.float64
    torch.testing.assert_close(A / n, A.T / n, **close)
    torch.testing.assert_close(A / n, U.double().T @ U.double() / n, **close)


def test_rows_may_be_a_view():
    U = torch.randn(900, 240, generator=torch.Generator().manual_seed(0))
    for part in (U[:, ::2], U[::2], U[3:, 2:5], U.T):
        exact = part.double()
        torch.testing.assert_close(gram(part), exact.T @ exact, rtol=0, atol=1e-5 * max(part.shape))
