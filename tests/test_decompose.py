"""Criteria and scaling matrices against the golden ones, the literal loops and what must hold of every decomposition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances

from experiments import literal
from experiments.bench import arrays
from neuron_merging import baselines as rivals
from neuron_merging import decompose
from neuron_merging.decompose import COMPENSATIONS, CRITERIA, BatchNorm, Decomposition, Neurons, select

GOLDEN = [*(f"bn{i}" for i in range(9)), *(f"fc{i}" for i in range(4))]


@pytest.mark.parametrize("case", GOLDEN)
def test_merge_gives_the_golden_scaling_matrices(reference, case):
    golden = {
        key.removeprefix(case + "_"): v
        for key, v in np.load(reference / "golden_scaling.npz").items()
        if key.startswith(case)
    }
    W = torch.from_numpy(golden["weight"]).double().flatten(1)
    bn = None
    if case.startswith("bn"):
        gamma, beta, mu, var = (torch.from_numpy(golden[k]).double() for k in ("gamma", "beta", "mean", "var"))
        bn = BatchNorm(gamma, beta, mu, var, 1e-5)
    else:
        W = torch.cat([W, torch.from_numpy(golden["bias"]).double()[:, None]], 1)
    keep = select(W, len(golden["kept"]), str(golden["criterion"]))
    assert keep.tolist() == golden["kept"].tolist()
    lam = float(golden.get("lamda", 0))
    Z = decompose.merge(Neurons(W, bn, relu=True), keep, t=float(golden["threshold"]), lam=lam).Z.numpy()
    assert np.abs(Z - golden["Z"].T).max() < 1e-5
    assert np.array_equal(Z != 0, golden["Z"].T != 0)


@st.composite
def layers(draw) -> Neurons:
    """A layer of random filters, some of them zero or multiples of each other, with or without BatchNorm."""
    N, D = draw(st.integers(1, 24)), draw(st.integers(1, 30))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    W = random.normal(size=(N, D))
    if draw(st.booleans()):
        W[random.integers(N)] = 0
    if draw(st.booleans()):
        W[random.integers(N)] = 0.3 * W[random.integers(N)]
    bn = None
    if draw(st.booleans()):
        gamma = random.normal(0.8, 0.4 if draw(st.booleans()) else 0.1, size=N)  # the wide one has negative γ
        if draw(st.booleans()):
            gamma[random.integers(N)] = 0
        statistics = gamma, random.normal(size=N), random.normal(size=N), random.uniform(0.05, 2, size=N)
        if draw(st.booleans()):
            statistics[3][random.integers(N)] = 0  # a channel that never moved
        bn = BatchNorm(*map(torch.from_numpy, statistics), 1e-5)
    return Neurons(torch.from_numpy(W), bn, relu=True)


@pytest.mark.parametrize("form", literal.FORMS)
@pytest.mark.parametrize("criterion", ["l1-norm", "l2-norm", "l2-GM"])
@settings(max_examples=60, deadline=None)
@given(layer=layers(), share=st.floats(0, 1), t=st.sampled_from([0, 0.1, 0.45]), lam=st.sampled_from([0, 0.7, 0.85, 1]))
def test_the_vectorised_code_agrees_with_the_literal_loop(form, criterion, layer, share, t, lam):
    W = layer.W.numpy()
    P = max(1, round(share * len(W)))
    keep = select(layer.W, P, criterion)
    scores = np.array(literal.scores(W, criterion))
    assert np.allclose(CRITERIA[criterion](layer.W).numpy(), scores)
    kept = set(keep.tolist())
    dropped = [n for n in range(len(W)) if n not in kept]
    assert not dropped or scores[dropped].max() <= scores[sorted(kept)].min() + 1e-9  # (ties may fall either way)
    part = COMPENSATIONS[form](layer, keep, t=t, lam=lam)
    expected = literal.scaling_matrix(W, arrays(layer.bn), keep.tolist(), form, t, lam)
    assert part.Z.shape == (P, len(W))
    if not np.allclose(part.Z.numpy(), expected):  # equally near partners are told apart by rounding alone
        columns = np.flatnonzero(~np.isclose(part.Z.numpy(), expected).all(0))
        for n in columns:
            assert is_tie(layer, keep.tolist(), form, lam, n, part.Z[:, n].numpy(), expected[:, n])


def is_tie(layer, keep, form, lam, n, ours, expected) -> bool:
    """Two partners of n whose distances differ by rounding only, found by moving λ's terms a hair."""
    W, bn = layer.W.numpy(), arrays(layer.bn)
    chosen = (
        [keep[i] for i in (np.flatnonzero(ours)[0], np.flatnonzero(expected)[0])]
        if ours.any() and expected.any()
        else []
    )
    if len(chosen) < 2:
        return False
    candidates = [literal.most_similar(W, bn, [m], n, form, lam) for m in chosen]
    if bn is None or lam == 1:
        return bool(np.isclose(candidates[0][2], candidates[1][2], atol=1e-12))
    return np.isclose(candidates[0][1:], candidates[1][1:]).all()


@settings(max_examples=60, deadline=None)
@given(layer=layers(), share=st.floats(0, 1))
def test_lbyl_agrees_with_the_literal_loop(layer, share):
    W, bn = layer.W.numpy(), arrays(layer.bn)
    keep = select(layer.W, max(1, round(share * len(W))), "l2-norm")
    Z = rivals.lbyl(layer, keep).Z.numpy()
    for p in set(range(len(W))) - set(keep.tolist()):
        expected, condition = literal.lbyl_column(W, bn, keep.tolist(), p, rivals.LBYL_RIDGE)
        off = 1e-9 + 1e-14 * condition  # what rounding may make of it
        assert np.allclose(Z[:, p], expected, rtol=0, atol=off * (1 + np.abs(expected).max())), (p, condition)


def test_the_criteria_agree_with_other_libraries():
    W = torch.randn(40, 27, dtype=torch.float64)
    assert np.allclose(CRITERIA["l1-norm"](W), np.linalg.norm(W.numpy(), 1, axis=1))
    assert np.allclose(CRITERIA["l2-norm"](W), np.linalg.norm(W.numpy(), 2, axis=1))
    assert np.allclose(CRITERIA["l2-GM"](W), euclidean_distances(W.numpy()).sum(1), atol=1e-5)


def test_the_partner_without_batchnorm_is_the_one_of_largest_cosine():
    W = torch.randn(30, 12, dtype=torch.float64)
    keep = select(W, 10, "l2-norm")
    Z = decompose.merge(Neurons(W, None, True), keep, t=0, lam=0).Z
    dropped = [n for n in range(30) if n not in keep.tolist()]
    cosines = cosine_similarity(W.numpy()[dropped], W.numpy()[keep])
    assert Z[:, dropped].argmax(0).tolist() == cosines.argmax(1).tolist()


@pytest.mark.parametrize("form", COMPENSATIONS)
@settings(max_examples=40, deadline=None)
@given(layer=layers(), share=st.floats(0, 1))
def test_what_holds_of_every_decomposition(form, layer, share):
    N = len(layer.W)
    keep = select(layer.W, max(1, round(share * N)), "l2-norm")
    part = COMPENSATIONS[form](layer, keep, t=0.1, lam=0.85)
    assert torch.isfinite(part.Z).all()
    assert ((part.Z != 0).sum(0) <= 1).all()
    assert torch.equal(part.Z[:, part.keep], torch.eye(len(keep), dtype=torch.float64))
    if form != "merge":  # the published form keeps a negative scale, where γ_n and γ_m differ in sign
        assert (part.Z >= 0).all()


@pytest.mark.parametrize("form", COMPENSATIONS)
def test_keeping_all_is_the_identity(form):
    W = torch.randn(12, 5, dtype=torch.float64)
    part = COMPENSATIONS[form](Neurons(W, None, True), torch.arange(12), t=0.45, lam=0.85)
    assert torch.equal(part.Z, torch.eye(12, dtype=torch.float64))
    assert part.shift is None


def batchnorm(gamma, beta, mu=0.0, var=1.0) -> BatchNorm:
    n = len(gamma)
    full = [torch.as_tensor(x, dtype=torch.float64).expand(n) for x in (gamma, beta, mu, var)]
    return BatchNorm(*full, 1e-5)


def test_a_neuron_with_gamma_zero_is_a_constant_that_nobody_stands_in_for():
    W = torch.tensor([[3.0, 0.0], [2.0, 0.1], [1.0, 0.0]], dtype=torch.float64)
    keep = torch.tensor([0, 1])
    neurons = Neurons(W, batchnorm([1.0, 1.0, 0.0], [0.5, 0.5, 0.7]), relu=True)
    derived = decompose.merge_derived(neurons, keep, t=0, lam=0.85)
    assert torch.equal(derived.Z[:, 2], torch.zeros(2, dtype=torch.float64))
    assert derived.shift.tolist() == [0, 0, 0.7]
    published: Decomposition = decompose.merge(neurons, keep, t=0, lam=0.85)
    assert torch.equal(published.Z[:, 2], torch.zeros(2, dtype=torch.float64))
    for relu, shift in ((True, None), (False, [0, 0, -0.7])):  # ReLU cuts it off
        negative = Neurons(W, batchnorm([1.0, 1.0, 0.0], [0.5, 0.5, -0.7]), relu)
        found = decompose.merge_derived(negative, keep, t=0, lam=0.85).shift
        assert (found if found is None else found.tolist()) == shift


def test_opposite_signs_of_gamma_are_kept_as_published_and_rejected_in_the_derived_form():
    W = torch.tensor([[2.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    neurons = Neurons(W, batchnorm([1.0, -1.0], [0.0, 0.0]), relu=True)
    keep = torch.tensor([0])
    assert decompose.merge(neurons, keep, t=0, lam=0.85).Z[0, 1] < 0
    assert decompose.merge_derived(neurons, keep, t=0, lam=0.85).Z[0, 1] == 0


def test_ties_keep_the_first():
    assert select(torch.ones(6, 3), 2, "l1-norm").tolist() == [0, 1]
