"""The method again, written from its formulas in plain loops over neurons. Tests and the benchmark compare with it."""

from math import inf, sqrt

import numpy as np

FORMS = ("prune", "merge", "merge-derived")  # what `scaling_matrix` knows


def scores(W: np.ndarray, criterion: str) -> list[float]:
    """A score for every neuron (row of W)."""
    if criterion == "l1-norm":
        return [float(np.sum(np.abs(w))) for w in W]
    if criterion == "l2-norm":
        return [float(np.sqrt(np.sum(w**2))) for w in W]
    return [sum(float(np.sqrt(np.sum((w - other) ** 2))) for other in W) for w in W]


def select(W: np.ndarray, P: int, criterion: str) -> list[int]:
    """The indices of the P neurons with the largest scores, ascending."""
    of = scores(W, criterion)
    return sorted(sorted(range(len(W)), key=lambda n: -of[n])[:P])


def scaling_matrix(W: np.ndarray, bn: tuple | None, keep: list[int], form: str, t: float, lam: float) -> np.ndarray:
    """Z [P, N]. bn: None, or (γ, β, μ, v, ε). form: prune, merge or merge-derived."""
    N = len(W)
    Z = np.zeros((len(keep), N))
    for n in range(N):
        if n in keep:
            Z[keep.index(n), n] = 1.0
        elif form != "prune":
            partner = most_similar(W, bn, keep, n, form, lam)
            if partner is not None:
                m, scale, cosine = partner
                if t == 0 or cosine >= t:
                    Z[keep.index(m), n] = scale
    return Z


def most_similar(
    W: np.ndarray, bn: tuple | None, keep: list[int], n: int, form: str, lam: float
) -> tuple[int, float, float] | None:
    """(m, scale, cosine) of the kept neuron that stands in for n, or None."""
    candidates = []
    for m in keep:
        norm_n, norm_m = sqrt(W[n] @ W[n]), sqrt(W[m] @ W[m])
        if norm_n == 0 or norm_m == 0:
            continue
        cosine, s = float(W[n] @ W[m]) / (norm_n * norm_m), norm_n / norm_m
        if bn is None:
            candidates.append((m, s, cosine, 0.0))
            continue
        gamma, beta, mu, v, eps = bn
        if gamma[m] == 0 or gamma[n] == 0:
            continue
        if form == "merge":
            if v[m] == 0 or v[n] == 0:  # neither a partner nor replaceable: S or B has no value
                continue
            S = s * (gamma[m] / gamma[n]) * (v[n] / v[m])
            B = abs((gamma[m] / v[m]) * (s * (mu[n] - v[n] * beta[n] / gamma[n]) - mu[m]) + beta[m]) / S
        else:
            sigma_n, sigma_m = sqrt(v[n] + eps), sqrt(v[m] + eps)
            S = s * (gamma[n] / gamma[m]) * (sigma_m / sigma_n)
            if S <= 0:
                continue
            B = abs((gamma[n] / sigma_n) * (s * (mu[m] - sigma_m * beta[m] / gamma[m]) - mu[n]) + beta[n]) / S
        candidates.append((m, S, cosine, B))
    if not candidates:
        return None
    if bn is None:
        return max(candidates, key=lambda c: c[2])[:3]
    low, high = min(c[3] for c in candidates), max(c[3] for c in candidates)
    best, least = None, inf
    for m, S, cosine, B in candidates:
        minmax = (B - low) / (high - low) if high > low else 0.0
        distance = lam * (1 - cosine) + (1 - lam) * minmax
        if distance < least:
            best, least = (m, S, cosine), distance
    return best


def absorb(W_next: np.ndarray, Z: np.ndarray) -> np.ndarray:
    """W_next ×₂ Z for W_next [M, N, …] or, behind a flatten, [M, N·k]."""
    P, N = Z.shape
    M = len(W_next)
    if W_next.ndim == 2:
        k = W_next.shape[1] // N
        out = np.zeros((M, P * k))
        for i in range(M):
            for p in range(P):
                for n in range(N):
                    out[i, p * k : (p + 1) * k] += W_next[i, n * k : (n + 1) * k] * Z[p, n]
        return out
    out = np.zeros((M, P, *W_next.shape[2:]))
    for i in range(M):
        for p in range(P):
            for n in range(N):
                out[i, p] += W_next[i, n] * Z[p, n]
    return out


def absorb_by_neuron(W_next: np.ndarray, Z: np.ndarray) -> np.ndarray:
    """The same, one input neuron at a time, for Z with at most one entry in each column."""
    P, N = Z.shape
    W = W_next.reshape(len(W_next), N, -1)
    out = np.zeros((len(W), P, W.shape[2]))
    for n in range(N):
        for p in np.flatnonzero(Z[:, n]):
            out[:, p] += W[:, n] * Z[p, n]
    return out.reshape(len(W), -1) if W_next.ndim == 2 else out.reshape(len(W), P, *W_next.shape[2:])


def lbyl_column(W: np.ndarray, bn: tuple | None, keep: list[int], p: int, ridge: float) -> tuple[np.ndarray, float]:
    """Column p of the Z [P, N] of baselines.lbyl, and the condition number of its linear system. bn: as in `scaling_matrix`."""
    P = len(keep)
    X = [W[j] for j in keep]
    a, k, g, wanted = np.zeros(P), np.ones(P), 0.0, 0.0
    if bn is not None:
        gamma, beta, mu, v, eps = bn
        sigma = [sqrt(x + eps) for x in v]
        g = gamma[p] / sigma[p]
        wanted = g * mu[p] - beta[p]
        for i, j in enumerate(keep):
            usable = abs(gamma[j]) > 1e-6  # else the neuron is a constant
            X[i] = W[j] if usable else 0 * W[j]
            a[i] = mu[j] - sigma[j] * beta[j] / gamma[j] if usable else 0
            k[i] = (gamma[p] / gamma[j]) * (sigma[j] / sigma[p]) if usable else 0
    least = max(1e-8 * sum(float(W[j] @ W[j]) for j in keep) / P, 1e-30)  # so that the system can be solved
    A, right = np.zeros((P, P)), np.zeros(P)
    for i in range(P):
        right[i] = X[i] @ W[p] + ridge * g * wanted * a[i]
        for j in range(P):
            A[i, j] = X[i] @ X[j] + ridge * g**2 * a[i] * a[j]
        A[i, i] += max(ridge * k[i] ** 2, least)
    return k * np.linalg.solve(A, right), float(np.linalg.cond(A))
