"""Parameters and MACs of a network for every choice of kept widths of its spaces."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np
from torch import fx

from neuron_merging.graph.axes import Axis, Leaf, Sum, leaves, resolve
from neuron_merging.graph.behind import norm_behind, sum_behind
from neuron_merging.graph.export import size
from neuron_merging.graph.macs import Dim, Sizes, count_macs, terms, uncounted
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.restore.readers import Reader, find_reader, plain_module

Polynomial = Counter[tuple[int, ...]]  # coefficients by the numbers of the widths that are multiplied, ascending


class Cost:
    """Parameters and MACs as polynomials of the widths: every tensor and operation costs a product of sizes of axes.

    Where the space of a residual branch is left out (width 0), a constant replaces its reader and the BatchNorm behind that.
    biases: whether the compensation may add a bias to layers without BatchNorm; then every such layer that is smaller is
    counted with one. MACs are for one sample where the network takes any number of them.
    full: the original widths. whole: parameters and MACs of the network as it is, without such biases. branches: by space,
    whether it is that of a residual branch. uncounted: operations with weights whose MACs are not known.
    """

    def __init__(self, survey: Survey, spaces: Sequence[Space], biases: bool = False) -> None:
        self.full = np.array([space.size for space in spaces])
        self.uncounted = uncounted(survey.network)
        self.places = {space.leaf: i for i, space in enumerate(spaces)}
        readers = _readers(survey)
        bare = _bare(survey, spaces, readers) if biases else []
        ends = [_end(space, readers) for space in spaces]
        self.branches = [end is not None for end in ends]
        costs = self._parameters(survey, bare), self._macs(survey)
        self.whole = np.array([sum(p.numel() for p in survey.network.model.parameters()), count_macs(survey.network)])
        self.unbiased = [(self._spaces(survey, reader), self._outputs(survey, reader)) for reader in bare]
        self._set_coefficients(costs, [self._left_out(survey, end, bare) if end else Counter() for end in ends])

    # ------------------------------------------------------------ the polynomials

    def _count(self, axis: Axis) -> Polynomial:
        """How many indices of an axis are left."""
        axis = resolve(axis)
        if isinstance(axis, Leaf):
            place = self.places.get(axis)
            return Counter({(): axis.size}) if place is None else Counter({(place,): 1})
        if isinstance(axis, Sum):
            return reduce(operator.add, map(self._count, axis.parts))
        return _multiply(map(self._count, axis.factors))

    def _parameters(self, survey: Survey, bare: Iterable[Reader]) -> Polynomial:
        cost: Polynomial = Counter()
        for name, _ in survey.network.model.named_parameters():
            axes = survey.analysis.parameters.get(survey.network.names[name][0])
            if axes is None:  # nothing reads it
                cost[()] += survey.network.tensor(name).numel()
            else:
                cost.update(_multiply(map(self._count, axes)))
        for reader in bare:
            cost.update(self._outputs(survey, reader))
        return cost

    def _outputs(self, survey: Survey, reader: Reader) -> Polynomial:
        return self._count(survey.analysis.parameters[reader.weight][1 - reader.inputs])

    def _spaces(self, survey: Survey, reader: Reader) -> list[int]:
        """The numbers of the spaces that a layer's weights are along."""
        axes = survey.analysis.parameters[reader.weight]
        return [self.places[leaf] for axis in axes for leaf in leaves(axis) if leaf in self.places]

    def _macs(self, survey: Survey) -> Polynomial:
        sizes, cost = Sizes(survey.network), Counter()

        def left(dim: Dim) -> Polynomial:
            value = survey.analysis.values.get(dim[0])
            if not isinstance(value, list):
                return Counter({(): sizes(dim)})
            whole = size(dim[0].meta["val"].shape[dim[1]])
            count = self._count(value[dim[1]])
            one = sizes(dim)
            return count if one == whole else Counter({k: c * one / whole for k, c in count.items()})

        for node in survey.network.graph.graph.nodes:
            for term in terms(node) or ():
                cost.update(_multiply(map(left, term)))
        return cost

    def _left_out(self, survey: Survey, end: Reader, bare: Iterable[Reader]) -> Polynomial:
        """The parameters that leaving a branch out adds: a constant at its `end`, less the bias and the BatchNorm there."""
        norm = norm_behind(end.node)
        affine = 0 if norm is None else sum(isinstance(arg, fx.Node) for arg in norm.args[1:3])
        biased = end.bias is not None or end in bare
        return Counter({k: c * (1 - biased - affine) for k, c in self._outputs(survey, end).items()})

    def _set_coefficients(self, costs: Sequence[Polynomial], left_out: Sequence[Polynomial]) -> None:
        """As arrays: by term its coefficients [2, T] and factors [T, D], S standing for the factor 1."""
        monomials = sorted(set().union(*costs))
        S, D = len(self.full), max(1, max(map(len, monomials)))
        self.coefficients = np.array([[cost[m] for m in monomials] for cost in costs], dtype=float)
        self.factors = np.array([[*m, *[S] * (D - len(m))] for m in monomials])
        # by occurrence of a width in a term: which term, which width, and how often it is a factor there
        pairs = [(t, i, m.count(i)) for t, m in enumerate(monomials) for i in dict.fromkeys(m)]
        self.term, self.width, self.power = np.array(pairs, dtype=int).reshape(-1, 3).T
        self.left_out = [(i, list(m), c) for i, polynomial in enumerate(left_out) for m, c in polynomial.items()]

    # ------------------------------------------------------------ their values

    def __call__(self, widths: Sequence[int]) -> np.ndarray:
        """(parameters, MACs)."""
        w = np.append(widths, 1)
        more = sum(c * w[m].prod() for i, m, c in self.left_out if w[i] == 0)
        whole = (outputs for spaces, outputs in self.unbiased if (w[spaces] == self.full[spaces]).all())
        more -= sum(c * w[list(m)].prod() for outputs in whole for m, c in outputs.items())
        return self.coefficients @ w[self.factors].prod(1) + (more, 0)

    def along(self, widths: Sequence[int]) -> np.ndarray:
        """The cost as a polynomial of each width, the others being these: coefficients [2, S, D + 1] of its powers."""
        w = np.append(widths, 1).astype(float)
        others = np.where(self.factors[self.term] == self.width[:, None], 1, w[self.factors[self.term]]).prod(1)
        made = np.zeros((2, len(self.full), self.factors.shape[1] + 1))
        np.add.at(made, (slice(None), self.width, self.power), self.coefficients[:, self.term] * others)
        return made

    def marginal(self, widths: Sequence[int]) -> np.ndarray:
        """The cost of one more index of each space, [2, S]."""
        along, here = self.along(widths), np.asarray(widths)
        return sum(along[:, :, p] * ((here + 1.0) ** p - here**p) for p in range(1, along.shape[2]))

    def restored(self, i: int, widths: Sequence[int]) -> float:
        """The parameters that are saved, besides its weights, when space i, which had been left out, comes back."""
        w = np.append(widths, 1)
        return sum(c * w[m].prod() for j, m, c in self.left_out if i == j)


def _multiply(factors: Iterable[Polynomial]) -> Polynomial:
    product: Polynomial = Counter({(): 1})
    for factor in factors:
        previous, product = product, Counter()
        for a, x in previous.items():
            for b, y in factor.items():
                product[tuple(sorted(a + b)) if a and b else a or b] += x * y
    return product


def _readers(survey: Survey) -> dict[str, Reader]:
    """The plain layers of a network by the name of their weight."""
    found = (find_reader(survey, node) for node in survey.network.graph.graph.nodes)
    return {reader.weight: reader for reader in found if reader is not None}


def _end(space: Space, readers: dict[str, Reader]) -> Reader | None:
    """What reads a space, if that is a unit's and its reader adds to something."""
    reader = readers.get(space.readers[0].name) if space.unit and len(space.readers) == 1 else None
    return reader if reader is not None and sum_behind(reader.node) is not None else None


def _bare(survey: Survey, spaces: Sequence[Space], readers: dict[str, Reader]) -> list[Reader]:
    """Layers that restoration may give a bias: smaller ones that have none, and no BatchNorm."""
    smaller = {place.name for space in spaces for place in space.places}
    return [
        reader for name, reader in readers.items()
        if name in smaller and reader.bias is None and reader.norm is None
        and plain_module(survey.network.model, reader) is not None
    ]  # fmt: skip
