"""Parameters and MACs of a network for every choice of kept widths."""

from collections.abc import Sequence

import numpy as np
from torch import nn

from neuron_merging.counting import count_macs, count_parameters
from neuron_merging.graph.interpreter import count_positions
from neuron_merging.graph.tracing import Unit


class Cost:
    """Parameters and MACs as wᵀ Q w, where w is the widths and a 1: every layer costs in-width × out-width.

    If a block is left out (width 0), a constant replaces its consumer and the BatchNorm behind it.
    biases: whether the compensation may add a bias to layers without BatchNorm; then every such layer is counted with one.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], shape: tuple[int, ...], biases: bool = False) -> None:
        self.full = np.array([len(model.get_submodule(unit.layer).weight) for unit in units])
        producer, consumer = ({getattr(u, side): i for i, u in enumerate(units)} for side in ("layer", "next"))
        norm = {u.next: u.next_bn for u in units} | {u.layer: u.bn for u in units}
        self.Q, added = np.zeros((2, len(units) + 1, len(units) + 1)), 0
        for name, positions in count_positions(model, shape).items():
            layer = model.get_submodule(name)
            i, j = producer.get(name, -1), consumer.get(name, -1)
            weights = layer.weight.numel() / (1 if i < 0 else self.full[i]) / (1 if j < 0 else self.full[j])
            self.Q[:, i, j] += weights, weights * positions
            missing = biases and layer.bias is None and name in norm and norm[name] is None
            self.Q[0, i, -1] += (layer.bias is not None or missing) * (len(layer.weight) if i < 0 else 1)
            if i >= 0 and units[i].bn:
                self.Q[0, i, -1] += len(list(model.get_submodule(units[i].bn).parameters()))
            added += missing * len(layer.weight)
        self.block = np.zeros(len(units))  # parameters that leaving the block out adds: a constant, less the BatchNorm
        for i, unit in enumerate(units):
            layer, bn = model.get_submodule(unit.next), unit.next_bn and model.get_submodule(unit.next_bn)
            biased = layer.bias is not None or (biases and not bn)
            self.block[i] = (1 - biased) * len(layer.weight) - (count_parameters(bn) if bn else 0)
        self.Q[:, -1, -1] += (count_parameters(model) + added, count_macs(model, shape)) - self(self.full)

    def __call__(self, widths: Sequence[int]) -> np.ndarray:
        """(parameters, MACs)."""
        w = np.append(widths, 1)
        return self.Q @ w @ w + (self.block @ (w[:-1] == 0), 0)

    def marginal(self, widths: Sequence[int]) -> np.ndarray:
        """The cost of one more neuron in each unit, [2, units]."""
        return ((self.Q + self.Q.transpose(0, 2, 1)) @ np.append(widths, 1))[:, :-1]

    def wider(self, i: int, k: int, above: np.ndarray, marginal: np.ndarray) -> np.ndarray:
        """The extra cost [2, n] of making unit i, which has the width k, as wide as each of `above` [n].

        marginal: `self.marginal` of all widths. A block that was left out (k = 0) also gets its BatchNorm back.
        """
        more = np.outer(marginal[:, i], above - k)
        more[0] -= self.block[i] * (k == 0)
        return more
