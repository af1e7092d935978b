"""The indices of a space as a criterion ranks them, and as a compensation of one layer makes up for those that are dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_merging.decompose import CRITERIA, Decomposition, Neurons, ranked
from neuron_merging.graph.spaces import Place, Space, Survey
from neuron_merging.network import neurons, order, with_constants

Decompose = Callable[[Neurons, Tensor], Decomposition]


def neurons_of(survey: Survey, space: Space) -> Neurons | None:
    """The neurons of a space that is the paper's unit, in float64; else None. Raises as network.neurons."""
    unit = space.unit
    if unit is None:
        return None
    found = neurons(survey.network.model, unit.layer, unit.bn, unit.relu)
    if unit.activation is None:
        return found
    return replace(found, activation=getattr(F, unit.activation, None) or getattr(torch, unit.activation))


def order_of(survey: Survey, space: Space, criterion: str) -> Tensor:
    """The indices [N] of a space in the order in which a criterion keeps them: by scores summed over all that write it.

    Those that are constant come last.
    """
    unit = neurons_of(survey, space)
    if unit is not None:
        return order(unit, criterion)
    written = [_rows(survey, space, place) for place in space.writers or space.places]
    alive = torch.stack([rows.any(1) for rows in written]).any(0)
    return ranked(sum(CRITERIA[criterion](rows) for rows in written).where(alive, -1))


def _rows(survey: Survey, space: Space, place: Place) -> Tensor:
    """What a parameter has for each index of a space: [N, numbers], float64."""
    tensor = survey.network.tensor(place.name).detach().double().movedim(place.axis, 0)
    return tensor[place.positions(space.leaf).to(tensor.device)].flatten(1)


def compensation(survey: Survey, space: Space, decompose: Decompose) -> Callable[[Tensor], Decomposition]:
    """How kept indices [P] stand in for the others; where the compensation has no form for the space, they do not."""
    unit = neurons_of(survey, space)
    if unit is not None and space.obstacle is None:
        return lambda kept: decompose(unit, kept)

    def cut(kept: Tensor) -> Decomposition:
        part = Decomposition(kept, torch.eye(space.size, dtype=torch.float64, device=kept.device)[kept])
        return part if unit is None else with_constants(part, unit)

    return cut
