"""Kept and dropped neurons in pairs, all at once: row m of [P, Q] is a kept one, column n one that it may stand in for.

Who is most similar is the one large product of merging. In wide layers it is computed in float32, but for the columns in
which float32's rounding could decide: those are computed in float64. So partners are float64's, to within its own rounding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from products import full_precision, times

LARGE = 10**7  # multiplications, from which on the detour by float32 is worth its while …
LONG = 2**13  # … and weights of a neuron, up to which: of longer ones float32 leaves too much open
RANGE = 1e-12, 1e12  # of norms: what float32 can multiply without overflow, and without underflow that is felt


class Pairs:
    """Of the neurons W [N, D] those that are kept, keep [P], and the others, drop [Q].

    stored: W as it may be at hand in another dtype. s: ‖w_n‖ / ‖w_m‖, [P, Q], 0 where either is a filter of zeros.
    """

    def __init__(self, W: Tensor, keep: Tensor, drop: Tensor, stored: Tensor | None = None) -> None:
        self.W, self.keep, self.drop = W, keep, drop
        self.stored = W if stored is None else stored
        self.norm = W.norm(dim=1)
        norm_m, norm_n = self.norm[keep][:, None], self.norm[drop]
        self.s = norm_n / norm_m.where(norm_m > 0, torch.inf)
        both = norm_m * norm_n
        self.norms = both.where(both > 0, 1)  # cosines with zeros are 0

    @property
    def quick(self) -> bool:
        """Whether float32 can find partners here, and is worth its while."""
        least, most = RANGE
        length = self.W.shape[1]
        large = len(self.keep) * len(self.drop) * length >= LARGE and length <= LONG
        return large and full_precision(self.W.device) and bool(((self.norm > least) & (self.norm < most)).all())

    def cos(self) -> Tensor:
        """cos(w_n, w_m), [P, Q] in float64; 0 where either is a filter of zeros."""
        return self.W.index_select(0, self.keep) @ self.W.index_select(0, self.drop).T / self.norms

    def cos_to_choose(self, distance: Callable[[Tensor], Tensor], usable: Tensor, t: float) -> Tensor:
        """cos(w_n, w_m) [P, Q], float64's wherever that could change a choice, elsewhere to within float32's rounding.

        The choice: of every n the usable [P, Q] m with the least distance(cos) [P, Q], and whether its cosine is at least t.
        A distance may change by as much as the cosine does, not by more.
        """
        if not self.quick:
            return self.cos()
        W = self.stored.float()
        cos = times(W.index_select(0, self.keep), W.index_select(0, self.drop)).double() / self.norms
        off = (1.1 * W.shape[1] + 8) / 2**24  # at most: D products and sums, in any order, of rounded numbers
        of_usable = distance(cos).where(usable, torch.inf)
        least, partner = of_usable.min(0)
        near = usable & (of_usable <= least + 2 * off)
        close = near.sum(0) > 1
        close |= (cos.gather(0, partner[None])[0] - t).abs() <= off
        n = close.nonzero().squeeze(1)
        m = near[:, n].any(1).nonzero().squeeze(1)
        cos[m[:, None], n] = self.W[self.keep[m]] @ self.W[self.drop[n]].T / self.norms[m[:, None], n]
        return cos
