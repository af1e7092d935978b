"""The paper's method on the spaces of a network: which indices are kept, and what their readers absorb for the others.

A space that is the paper's unit is merged as in the paper (decompose.py), channels that several layers share as in alike.py
(ours). Where a positive factor does not pass (`space.obstacle`), a space is only pruned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import nan

import torch
from torch import Tensor, fx

from neuron_merging.alike import scaling_matrices
from neuron_merging.decompose import (
    COMPENSATIONS,
    CRITERIA,
    Decomposition,
    Neurons,
    cosines,
    dropped,
    effective,
    merge,
    merge_derived,
    only_twins,
    ranked,
)
from neuron_merging.errors import NeuronMergingError
from neuron_merging.graph.constants import find_constants
from neuron_merging.graph.neurons import neurons, read, rows
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.units import Place, plain_layer
from neuron_merging.graph.weights import Absorbed, home

FELT = {"statistics", "product", "recurrent"}  # notes of spaces whose constant indices the others feel
ALIKE = 0.999  # the cosine of (nearly) exact multiples
Constants = Mapping[fx.Node, Tensor]  # by layer, those among its inputs; NaN for what varies


def constants(survey: Survey) -> Constants:
    """The constants that layers see, for `Contents`; units need none."""
    return {} if all(space.unit is not None for space in survey.spaces) else find_constants(survey.network)


@dataclass(frozen=True)
class Contents:
    """What a network has for the indices of one space. known: `constants` of the whole network, where any space is no unit."""

    survey: Survey
    space: Space
    known: Constants = field(default_factory=dict)

    @cached_property
    def neurons(self) -> Neurons | None:
        """Of the paper's unit, None where the space is none. Raises NeuronMergingError if a weight is NaN or infinite."""
        return None if self.space.unit is None else read(self.survey.network, self.space)

    @cached_property
    def rows(self) -> list[Tensor]:
        """The weights [N, D], float64, of each writer, or of what else has the space. Raises as `neurons`."""
        if self.neurons is not None:
            return [self.neurons.W]
        network, space = self.survey.network, self.space
        if not space.writers:
            return [rows(network, place, space.leaf) for place in space.places]
        return [neurons(network, place, space.leaf).W for place in space.writers]

    @cached_property
    def shifts(self) -> dict[Place, Tensor]:
        """What readers see of each index, [N, k], NaN where that varies; nothing where no reader could absorb it."""
        space, found = self.space, {}
        if not self.known or space.notes.keys() & FELT:
            return {}
        for place in space.readers:
            node = plain_layer(self.survey.analysis, place.name, grouped=True)
            if node not in self.known or home(self.survey, place.name) is None:
                return {}
            seen = self.known[node].view(-1, self.survey.network.tensor(place.name).shape[place.axis])  # [groups, C]
            seen = seen[0].where((seen == seen[0]).all(0), nan)
            found[place] = seen[place.positions(space.leaf).to(seen.device)]
        return found

    @cached_property
    def dead(self) -> Tensor:
        """Which indices are constants, [N]."""
        if self.neurons is not None:
            return ~self.neurons.constants.isnan()
        dead = torch.full((self.space.size,), bool(self.shifts), device=self.rows[0].device)
        for shift in self.shifts.values():
            dead &= shift.isfinite().all(1)
        return dead

    def order(self, criterion: str) -> Tensor:
        """The indices [N] in the order in which the criterion keeps them, summed over writers; constant ones come last.

        Raises NeuronMergingError for an unknown criterion.
        """
        if criterion not in CRITERIA:
            raise NeuronMergingError(f"unknown criterion {criterion!r}: choose one of {', '.join(CRITERIA)}")
        scores = sum(CRITERIA[criterion](rows) for rows in self.rows)
        return ranked(scores.where(~self.dead, -1))

    def choose(self, P: int, criterion: str) -> Tensor:
        """The indices [P], ascending, that the criterion keeps. Raises as `order`, and for a P that makes no sense."""
        check_width(self.space, P)
        return self.order(criterion)[:P].sort().values

    def absorbed(self, keep: Tensor, compensation: str, *, t: float = 0.0, lam: float = 1.0) -> list[Absorbed]:
        """What the readers take over from the indices that are not kept.

        t: the least cosine similarity for a merge; 0 sets no limit. lam: the paper's λ. Spaces with obstacles are only pruned.
        Raises NeuronMergingError for an unknown compensation.
        """
        if compensation not in COMPENSATIONS:
            raise NeuronMergingError(f"unknown compensation {compensation!r}: choose one of {', '.join(COMPENSATIONS)}")
        if not 0 < len(keep) < self.space.size:  # nobody is left to take over, or nothing to be taken over
            return []
        kind = "prune" if self.space.obstacle else compensation
        if self.neurons is not None:
            return self.of_unit(
                with_constants(COMPENSATIONS[kind](self.neurons, keep, t=t, lam=lam), self.neurons), kind
            )
        return self._of_coupled(keep, None if kind == "prune" else t)

    def start(self, keep: Tensor) -> list[Absorbed]:
        """What restoration starts from: readers absorb (nearly) exact multiples of kept indices, and are to learn the rest.

        Where a positive factor does not pass, only (nearly) exact twins.
        """
        space, unit = self.space, self.neurons
        if not 0 < len(keep) < space.size:
            return []
        if unit is not None:
            if space.obstacle is None:  # the cosine decides; among equal cosines, how well the constant fits
                Z = merge_derived(unit, keep, t=ALIKE, lam=1 - 1e-6).Z
            else:
                Z = only_twins(merge(Neurons(effective(unit), None, False), keep, t=ALIKE, lam=1.0).Z)
            return self.of_unit(Decomposition(keep, Z), "start")
        if space.obstacle is None:
            matrices = scaling_matrices(self.survey.network, space, keep, t=ALIKE)
            return [Absorbed(way.reader, way.channels, keep, Z) for way, Z in zip(space.ways.to_readers, matrices)]
        if space.notes.keys() & FELT:
            return []
        own = torch.cat([rows(self.survey.network, place, space.leaf) for place in space.writers + space.followers], 1)
        Z = only_twins(merge(Neurons(own, None, False), keep, t=ALIKE, lam=1.0).Z)
        return [Absorbed(place, place.positions(space.leaf), keep, Z) for place in space.readers]

    def of_unit(self, part: Decomposition, kind: str = "") -> list[Absorbed]:
        """What the reader of a unit takes over by a decomposition; nothing where a plain cut does the same."""
        (reader,) = self.space.readers
        if kind == "prune" and part.shift is None:
            return []
        channels = reader.positions(self.space.leaf)
        shift = None if part.shift is None else part.shift[:, None].expand(channels.shape)
        return [Absorbed(reader, channels, part.keep, part.Z, shift)]

    def _of_coupled(self, keep: Tensor, t: float | None) -> list[Absorbed]:
        """t: the least cosine for merging a dropped channel into a kept one; None: prune."""
        space = self.space
        if t is None:
            whole = torch.eye(space.size, dtype=torch.float64, device=keep.device)[keep]
            ways = [(place, place.positions(space.leaf), whole) for place in space.readers]
        else:
            matrices = scaling_matrices(self.survey.network, space, keep, t=t)
            ways = [(way.reader, way.channels, Z) for way, Z in zip(space.ways.to_readers, matrices)]
        gone = torch.zeros_like(self.dead)
        gone[dropped(self.rows[0], keep)] = True
        gone &= self.dead
        parts = [Absorbed(*way[:2], keep, way[2], self._shift(*way[:2], gone)) for way in ways]
        for part in parts:
            part.Z[:, gone] = 0
        return [part for part in parts if t is not None or part.shift is not None]

    def _shift(self, reader: Place, channels: Tensor, gone: Tensor) -> Tensor | None:
        """The constants that a reader saw of the indices that are gone, [N, k], at some of its channels."""
        if not gone.any():
            return None
        seen = torch.zeros(
            self.survey.network.tensor(reader.name).shape[reader.axis], dtype=torch.float64, device=gone.device
        )
        seen[reader.positions(self.space.leaf).to(gone.device)] = self.shifts[reader]
        shift = seen[channels.to(gone.device)].where(gone[:, None], 0)
        return shift if shift.any() else None

    def cosine(self, keep: Tensor) -> float:
        """The mean over dropped indices of the cosine with the most similar kept one; NaN if none is dropped."""
        W = self.rows[0] if len(self.rows) == 1 else torch.cat(self.rows, 1)
        drop = dropped(W, keep)
        if not len(keep) or not len(drop):
            return nan
        return float(cosines(W, keep, drop).amax(0).mean())


def with_constants(part: Decomposition, neurons: Neurons) -> Decomposition:
    """The same decomposition, but dropped neurons that are constant become a shift, which the next layer absorbs.

    This is exact except at borders that the next layer pads with zeros: there it read 0, not the constant.
    """
    dead = dropped(neurons.W, part.keep)
    constants = neurons.constants[dead]
    dead, constants = dead[~constants.isnan()], constants[~constants.isnan()]
    if not constants.any():
        return part
    Z = part.Z.clone()
    Z[:, dead] = 0
    shift = torch.zeros_like(Z[0]) if part.shift is None else part.shift.clone()
    shift[dead] = constants
    return Decomposition(part.keep, Z, shift)


def check_width(space: Space, P: int) -> None:
    """Raises NeuronMergingError if P of a space's indices cannot be kept: none only of a residual branch."""
    least = 0 if space.unit is not None and space.unit.branch else 1
    if not least <= P <= space.size:
        raise NeuronMergingError(
            f"{P} of {space.size} neurons cannot be kept in {space.layer}: give {least} to {space.size}"
        )


def refused(spaces: list[Space], compensation: str) -> dict[Space, str]:
    """The spaces that a compensation can only prune, and why.

    Raises NeuronMergingError if that is all of them.
    """
    if compensation == "prune":
        return {}
    found = {space: space.obstacle for space in spaces if space.obstacle}
    if found and len(found) == len(spaces):
        reasons = "; ".join(f"{space.layer}: {why}" for space, why in list(found.items())[:3])
        raise NeuronMergingError(f"{compensation} can merge nothing here, so use prune or restore: {reasons}")
    return found
