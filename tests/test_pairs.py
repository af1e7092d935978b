"""Partners found by way of float32 are those of float64."""

import pytest
import torch

import pairs
from decompose import COMPENSATIONS, BatchNorm, Neurons, others, select
from pairs import Pairs


@pytest.fixture(params=["as it is", "float32 alone"])
def found(request, monkeypatch):
    """Z of a merge by way of float32 is that of float64; where float64 has no second look, it is not."""

    def both(layer, keep, t, lam=0.85, form="merge"):
        monkeypatch.setattr(pairs, "LARGE", 0)
        if request.param == "float32 alone":
            monkeypatch.setattr(
                Pairs,
                "cos_to_choose",
                lambda of, *_: (of.W[of.keep].float() @ of.W[of.drop].float().T).double() / of.norms,
            )
        quick = COMPENSATIONS[form](layer, keep, t=t, lam=lam).Z
        monkeypatch.undo()
        exact = COMPENSATIONS[form](layer, keep, t=t, lam=lam).Z
        assert torch.equal(quick, exact) == (request.param == "as it is")

    return both


def close_pairs(apart: float) -> tuple[torch.Tensor, torch.Tensor]:
    """W [150, 300] whose kept filters come in pairs that differ by `apart`, and keep."""
    W = torch.randn(50, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = 3 * W.repeat(2, 1)
    kept[50:] += apart * torch.randn(50, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(50, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.cat([kept, W + noise]), torch.arange(100)


@pytest.mark.parametrize("form", ["merge", "merge-derived"])
@pytest.mark.parametrize("bn", [False, True])
def test_partners_that_float32_cannot_tell_apart(found, form, bn):
    W, keep = close_pairs(1e-7)
    ones = torch.ones(len(W), dtype=torch.float64)
    found(Neurons(W, BatchNorm(ones, 0 * ones, 0 * ones, ones, 1e-5) if bn else None, True), keep, t=0.0, form=form)


def test_a_cosine_at_the_threshold(found):
    W, keep = close_pairs(1.0)
    best = Pairs(W, keep, others(W, keep)).cos().amax(0)
    found(Neurons(W, None, True), keep, t=float(best.sort().values[25] * (1 + 1e-12)))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e9, 1e25])
def test_weights_of_any_size(monkeypatch, scale, zeros):
    monkeypatch.setattr(pairs, "LARGE", 0)
    W, _ = close_pairs(1e-3)
    keep = select(W, 60, "l2-norm")
    if zeros:
        W = W.where(torch.rand(len(W), 1, generator=torch.Generator().manual_seed(3)) < 0.9, 0)
    W = W * scale
    of = Pairs(W, keep, others(W, keep))
    assert of.quick == (scale in (1e-12, 1.0, 1e9) and not zeros)
    usable = of.s > 0
    cos = of.cos_to_choose(lambda cos: 1 - cos, usable, t=0.3)
    torch.testing.assert_close(cos, of.cos(), rtol=0, atol=1e-6)
    assert (~usable).any() == zeros and ((cos == 0) | usable).all()


def test_where_less_precise_products_are_allowed_float64_is_taken(monkeypatch):
    monkeypatch.setattr(pairs, "LARGE", 0)
    W, keep = close_pairs(1.0)
    assert Pairs(W, keep, others(W, keep)).quick
    with torch.autocast("cpu", torch.bfloat16):
        assert not Pairs(W, keep, others(W, keep)).quick
    torch.set_float32_matmul_precision("medium")
    try:
        assert not Pairs(W, keep, others(W, keep)).quick
    finally:
        torch.set_float32_matmul_precision("highest")
    if not hasattr(torch.backends, "fp32_precision"):  # an older PyTorch
        return
    torch.backends.fp32_precision = "bf16"
    try:
        assert not Pairs(W, keep, others(W, keep)).quick
    finally:
        torch.backends.fp32_precision = "none"
