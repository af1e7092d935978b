"""How kept indices of a space stand in for dropped ones by the compensation of one layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuron_merging.compensation import Contents, with_constants
from neuron_merging.decompose import Decomposition, Neurons

Decompose = Callable[[Neurons, Tensor], Decomposition]


def compensation(contents: Contents, decompose: Decompose) -> Callable[[Tensor], Decomposition]:
    """How kept indices [P] stand in for the others; where the compensation has no form for the space, they do not."""
    unit, N = contents.neurons, contents.space.size
    if unit is not None and contents.space.obstacle is None:
        return lambda kept: decompose(unit, kept)

    def cut(kept: Tensor) -> Decomposition:
        part = Decomposition(kept, torch.eye(N, dtype=torch.float64, device=kept.device)[kept])
        return part if unit is None else with_constants(part, unit)

    return cut
