"""Axes as products and sums of leaves: the algebra in which the analysis writes down what a tensor's indices mean.

An axis is a `Leaf` (a set of indices that nothing has divided yet), a `Product` (outer × inner, as a reshape makes it) or a
`Sum` (parts side by side, as a concatenation makes it). Two axes that an operation ties to each other are made one by
`unify`, which divides leaves where that is needed. A leaf that ends up unfrozen is a space: indices that can be dropped.

    conv output             s:64
    flatten(1) of it        Product(s:64, 49)
    qkv of 12 heads of 64   Product(3, h:12, d:64)
    cat of two convs        Sum(s:32, t:64)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED = "its size is fixed"  # the reason of a leaf that is no set of neurons: positions, batches, kernels


class Leaf:
    """Indices 0 … size − 1. frozen: why none can be dropped. notes: what happens to them on their way, by kind.

    bound: what the leaf has turned out to be, once something has divided it or made it one with another.
    """

    __slots__ = ("bound", "frozen", "notes", "size")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.frozen = frozen
        self.notes: dict[str, str] = {}
        self.bound: Axis | None = None

    def __repr__(self) -> str:
        return f"{'' if self.frozen else 's:'}{self.size}"


@dataclass(frozen=True, eq=False)
class Product:
    """Index = outer index × the size of what is inside + inner index; no factor has size 1. Without factors: size 1."""

    factors: tuple[Axis, ...]
    size: int

    def __repr__(self) -> str:
        return "(" + "·".join(map(repr, self.factors)) + ")" if self.factors else "1"


@dataclass(frozen=True, eq=False)
class Sum:
    """Parts, two at least, side by side."""

    parts: tuple[Axis, ...]
    size: int

    def __repr__(self) -> str:
        return "[" + " + ".join(map(repr, self.parts)) + "]"


Axis = Leaf | Product | Sum
ONE = Product((), 1)


def free(size: int) -> Axis:
    """Indices that can become whatever an operation ties them to: of a parameter, or of an expanded value."""
    return ONE if size == 1 else Leaf(size)


def fixed(size: int, reason: str = FIXED) -> Axis:
    """Indices none of which can be dropped."""
    return ONE if size == 1 else Leaf(size, reason)


def product(factors: Iterable[Axis]) -> Axis:
    """The factors, outermost first, as one axis."""
    flat: list[Axis] = []
    for factor in map(resolve, factors):
        flat += factor.factors if isinstance(factor, Product) else [] if factor.size == 1 else [factor]
    size = 1
    for factor in flat:
        size *= factor.size
    return flat[0] if len(flat) == 1 else Product(tuple(flat), size) if flat else ONE


def side_by_side(parts: Iterable[Axis]) -> Axis:
    """The parts as one axis."""
    flat: list[Axis] = []
    for part in map(resolve, parts):
        flat += part.parts if isinstance(part, Sum) else [] if part.size == 0 else [part]
    flat = [Leaf(1, FIXED) if isinstance(part, Product) and not part.factors else part for part in flat]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat), sum(part.size for part in flat))


def resolve(axis: Axis) -> Axis:
    """The axis as it is known by now: no leaf of it is bound."""
    if isinstance(axis, Leaf):
        if axis.bound is not None:
            axis.bound = resolve(axis.bound)
            return axis.bound
        return axis
    if isinstance(axis, Product):
        new = [resolve(factor) for factor in axis.factors]
        return axis if all(a is b for a, b in zip(new, axis.factors)) else product(new)
    new = [resolve(part) for part in axis.parts]
    return axis if all(a is b for a, b in zip(new, axis.parts)) else side_by_side(new)


def leaves(axis: Axis) -> Iterator[Leaf]:
    """The leaves of an axis, from left to right, some more than once."""
    axis = resolve(axis)
    if isinstance(axis, Leaf):
        yield axis
    else:
        for part in axis.factors if isinstance(axis, Product) else axis.parts:
            yield from leaves(part)


def freeze(axis: Axis, reason: str) -> None:
    """No index of the axis can be dropped."""
    for leaf in leaves(axis):
        leaf.frozen = leaf.frozen or reason


def note(axis: Axis, kind: str, what: str) -> None:
    """Write down that something happens to the indices of an axis which does not stop them from being dropped."""
    for leaf in leaves(axis):
        leaf.notes.setdefault(kind, what)


def is_fixed(axis: Axis) -> bool:
    """Whether no index of the axis can be dropped."""
    return all(leaf.frozen for leaf in leaves(axis))


def _bind(leaf: Leaf, axis: Axis) -> Axis:
    leaf.bound = axis
    for part in leaves(axis):
        part.frozen = part.frozen or leaf.frozen
        part.notes = leaf.notes | part.notes
    return axis


def unify(a: Axis, b: Axis, reason: str = "two axes of unlike structure meet") -> Axis:
    """Make two axes of the same size one. Freezes both, for this reason, where their structures cannot be brought together."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return a
    if isinstance(a, Leaf) or isinstance(b, Leaf):
        return _bind(a, b) if isinstance(a, Leaf) else _bind(b, a)
    if is_fixed(a) and is_fixed(b):
        return a
    aligned = None
    if isinstance(a, Product) and isinstance(b, Product):
        aligned = _unify_products(a, b, reason)
    elif isinstance(a, Sum) and isinstance(b, Sum):
        aligned = _unify_parts(a.parts, b.parts, reason)
    else:
        total, other = (a, b) if isinstance(a, Sum) else (b, a)
        aligned = _unify_parts(total.parts, (other,), reason)
    if not aligned:
        freeze(a, reason)
        freeze(b, reason)
    return resolve(a)


def _unify_products(a: Product, b: Product, reason: str) -> bool:
    x, y = list(a.factors), list(b.factors)
    while x and y:
        f, g = resolve(x.pop(0)), resolve(y.pop(0))
        if isinstance(f, Product) or isinstance(g, Product):  # divided by what was made one just now
            x[:0] = f.factors if isinstance(f, Product) else [f]
            y[:0] = g.factors if isinstance(g, Product) else [g]
            continue
        if f.size != g.size:
            big, small, rest = (f, g, x) if f.size > g.size else (g, f, y)
            halves = split_product(big, small.size) if big.size % small.size == 0 else None
            if halves is None:
                return False
            rest.insert(0, halves[1])
            f, g = halves[0], small
        unify(f, g, reason)
    return not x and not y


def _unify_parts(x: Sequence[Axis], y: Sequence[Axis], reason: str) -> bool:
    left, right = list(x), list(y)
    while left and right:
        f, g = resolve(left.pop(0)), resolve(right.pop(0))
        if isinstance(f, Sum) or isinstance(g, Sum):  # divided by what was made one just now
            left[:0] = f.parts if isinstance(f, Sum) else [f]
            right[:0] = g.parts if isinstance(g, Sum) else [g]
            continue
        if f.size != g.size:
            big, small, rest = (f, g, left) if f.size > g.size else (g, f, right)
            halves = split_sum(big, small.size)
            if halves is None:
                return False
            rest.insert(0, halves[1])
            f, g = halves[0], small
        unify(f, g, reason)
    return not left and not right


def split_sum(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
    """The first `size` indices of an axis, and the others. None where its structure has no boundary there."""
    axis = resolve(axis)
    if size in (0, axis.size):
        nothing = Leaf(0, FIXED)
        return (nothing, axis) if size == 0 else (axis, nothing)
    if isinstance(axis, Leaf):
        first, second = Leaf(size), Leaf(axis.size - size)
        _bind(axis, Sum((first, second), axis.size))
        return first, second
    if is_fixed(axis):
        return fixed(size), fixed(axis.size - size)
    if isinstance(axis, Sum):
        return _split_parts(axis, size)
    inner = product(axis.factors[1:])
    halves = split_sum(axis.factors[0], size // inner.size) if size % inner.size == 0 else None
    if halves is None:
        return None
    return product([halves[0], inner]), product([halves[1], inner])


def _split_parts(axis: Sum, size: int) -> tuple[Axis, Axis] | None:
    before: list[Axis] = []
    after = list(axis.parts)
    while size > 0:
        part = after.pop(0)
        if part.size > size:
            halves = split_sum(part, size)
            if halves is None:
                return None
            part, rest = halves
            after.insert(0, rest)
        before.append(part)
        size -= part.size
    return side_by_side(before), side_by_side(after)


def split_product(axis: Axis, outer: int) -> tuple[Axis, Axis] | None:
    """The axis as `outer` blocks of consecutive indices: (blocks, inside). None where its structure has no such blocks."""
    axis = resolve(axis)
    inner = axis.size // outer
    if outer == 1 or inner == 1:
        return (ONE, axis) if outer == 1 else (axis, ONE)
    if isinstance(axis, Leaf):
        halves = Leaf(outer), Leaf(inner)
        _bind(axis, Product(halves, axis.size))
        return halves
    if is_fixed(axis):
        return fixed(outer), fixed(inner)
    if isinstance(axis, Sum):
        return _split_sum_in_blocks(axis, outer, inner)
    left = list(axis.factors)
    blocks = _take(left, outer)
    return None if blocks is None else (blocks, product(left))


def _take(factors: list[Axis], size: int) -> Axis | None:
    """Remove the first factors, of `size` indices, from a list; returns their product. None where no factor ends there."""
    taken: list[Axis] = []
    while size > 1:
        if not factors:
            return None
        factor = resolve(factors.pop(0))
        if isinstance(factor, Product):  # divided since
            factors[:0] = factor.factors
            continue
        if size % factor.size:
            halves = split_product(factor, size) if factor.size % size == 0 else None
            if halves is None:
                return None
            factor, rest = halves
            factors.insert(0, rest)
        taken.append(factor)
        size //= factor.size
    return product(taken)


def _split_sum_in_blocks(axis: Sum, outer: int, inner: int) -> tuple[Axis, Axis] | None:
    """Each part holds whole blocks: [a·r + b·r] = [a + b]·r. Else the blocks are made one: [a + b + …] = outer·a."""
    if all(part.size % inner == 0 for part in axis.parts):
        halves = [split_product(part, part.size // inner) for part in axis.parts]
        if any(pair is None for pair in halves):
            return None
        inside = halves[0][1]
        for _, other in halves[1:]:
            inside = unify(inside, other)
        return side_by_side(blocks for blocks, _ in halves), inside
    rest, block = axis, None
    for _ in range(outer - 1):
        pieces = split_sum(rest, inner)
        if pieces is None:
            return None
        block = pieces[0] if block is None else unify(block, pieces[0])
        rest = pieces[1]
    return fixed(outer), unify(block, rest)


def regroup(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis] | None:
    """The axes of what a reshape to `shape` makes of `axes`. None where the structures do not fit."""
    whole = product(axes)
    left = _coalesced(whole.factors) if isinstance(whole, Product) else [whole]
    out = []
    for size in shape:
        axis = _take(left, size)
        if axis is None:
            return None
        out.append(axis)
    return out


def _coalesced(factors: Iterable[Axis]) -> list[Axis]:
    """Factors in a row that are fixed as one, which can be divided in any way."""
    out: list[Axis] = []
    for factor in factors:
        if out and is_fixed(factor) and is_fixed(out[-1]):
            out[-1] = fixed(out[-1].size * factor.size, why(out[-1], factor))
        else:
            out.append(factor)
    return out


def why(*axes: Axis) -> str:
    """The first reason that says more than that a size is fixed."""
    reasons = [leaf.frozen for axis in axes for leaf in leaves(axis) if leaf.frozen]
    return next((reason for reason in reasons if reason != FIXED), FIXED)


def count(axis: Axis, kept: Mapping[Leaf, int]) -> int:
    """How many indices of an axis are left. kept: how many are left of a leaf, of others all."""
    axis = resolve(axis)
    if isinstance(axis, Leaf):
        return kept.get(axis, axis.size)
    if isinstance(axis, Sum):
        return sum(count(part, kept) for part in axis.parts)
    size = 1
    for factor in axis.factors:
        size *= count(factor, kept)
    return size


def mask(axis: Axis, keep: Callable[[Leaf], Tensor]) -> Tensor:
    """Which indices of an axis are left: bool [size]. keep: of a leaf, bool [its size]."""
    axis = resolve(axis)
    if isinstance(axis, Leaf):
        return keep(axis)
    if isinstance(axis, Sum):
        return torch.cat([mask(part, keep) for part in axis.parts])
    left = torch.ones(1, dtype=torch.bool, device="cpu")
    for factor in axis.factors:
        left = (left[:, None] & mask(factor, keep)).flatten()
    return left


def positions(axis: Axis, leaf: Leaf) -> Tensor:
    """Where each index of a leaf is on an axis: int64 [size of the leaf, n]."""
    found = occurrences(axis, leaf)
    return torch.cat(found, 1).sort(1).values if found else torch.empty(leaf.size, 0, dtype=torch.int64, device="cpu")


def occurrences(axis: Axis, leaf: Leaf) -> list[Tensor]:
    """For each time that a leaf is on an axis, from left to right, where its indices are: int64 [size of the leaf, n]."""
    return [where for part, where in _occurrences(resolve(axis)) if part is leaf]


def _occurrences(axis: Axis) -> list[tuple[Leaf, Tensor]]:
    """Every occurrence of a leaf, with the positions [its size, n] on the axis."""
    if isinstance(axis, Leaf):
        return [(axis, torch.arange(axis.size, device="cpu")[:, None])]
    if isinstance(axis, Sum):
        found, offset = [], 0
        for part in axis.parts:
            found += [(leaf, where + offset) for leaf, where in _occurrences(part)]
            offset += part.size
        return found
    found, inner = [], axis.size
    outer = 1
    for factor in axis.factors:
        inner //= factor.size
        around = torch.arange(outer, device="cpu")[:, None] * (factor.size * inner)  # [outer, 1]
        inside = torch.arange(inner, device="cpu")[None]  # [1, inner]
        others = (around + inside).flatten()
        found += [(leaf, (where[..., None] * inner + others).flatten(1)) for leaf, where in _occurrences(factor)]
        outer *= factor.size
    return found
