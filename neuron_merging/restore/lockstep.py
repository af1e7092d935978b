"""Restoration (ours, not the paper's): all kept neurons together rebuild what the dropped ones gave, without data.

The original graph (the teacher) and the cut one (the student) run side by side, node by node, over inputs that are made up from
the network (synthetic.py), or real. Every layer that lost inputs or neurons is fitted to what the teacher gives there, by ridge
regression on what the *student* sees there:

    W = W₀ + (Rᵀ U / n) (A + Λ)⁻¹,   R = T − U W₀ᵀ,   A = Uᵀ U / n,   Λ = λ diag(A) + λ/10 · mean(diag(A)) I

with U [n, F] the student's centred input patches, T [n, M] the teacher's centred outputs and W₀ the weights after pruning. The
intercept goes into the next BatchNorm or the bias. λ is what errs least on inputs that are held out; where W₀ does, it stays.
Where the output is added to a stream that has an error by then, T contains that error too, and so repairs it (fitting.py).
After a consumer is fitted, the pruned layer in front of it is moved so that the consumer's error shrinks (adapt.py). Spaces
that are linear all the way get another basis first (mixing.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from neuron_merging.compensation import Contents
from neuron_merging.errors import reported_as
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.surgery import Smaller, cut, difference, run
from neuron_merging.graph.walk import Batch
from neuron_merging.restore.adapt import adapt, paths
from neuron_merging.restore.fitting import Fitting, Options
from neuron_merging.restore.mixing import mixed
from neuron_merging.restore.order import last_uses, ordered, outside
from neuron_merging.restore.pair import Pair
from neuron_merging.restore.regression import Fit

DEFAULT = Options()


@dataclass(frozen=True)
class Restored:
    """A restored network; and by weight, what came of its fit."""

    small: Smaller
    fits: dict[str, Fit]


@torch.no_grad()
def restore(
    survey: Survey,
    keep: Mapping[Space, Tensor],
    batches: Sequence[Batch],
    options: Options = DEFAULT,
    macs: int | None = None,
) -> Restored:
    """The network with these indices [P] of its spaces, whose layers are fitted over the batches.

    macs: of the network for all batches, if known; if they are few, it computes in float64.
    Raises NeuronMergingError where the network does not run on the batches.
    """
    with reported_as(f"{type(survey.network.model).__name__} cannot be restored on these inputs"):
        tensors: Mapping[str, Tensor] = {}
        if options.mixing:
            survey, keep, tensors = mixed(survey, keep, batches)
        small = cut(survey, keep, [taken for space in keep for taken in Contents(survey, space, {}).start(keep[space])])
        pair = Pair(survey, keep, small, batches, measures=options.probe_statistics, macs=macs, tensors=tensors)
        fitting = Fitting(pair, options)
        _run(pair, fitting, [space for space, kept in keep.items() if len(kept) < space.size])
        pair.write()
    if small.own_class:
        model = copy.deepcopy(small.model).eval()
        why = difference(run(model, survey.network), run(small.graph, survey.network))
        small = replace(small, model=small.graph, why=why) if why else small
    return Restored(small, fitting.fits)


def _run(pair: Pair, fitting: Fitting, smaller: Sequence[Space]) -> None:
    """Go through both graphs, and fit the layers on the way."""
    options, teacher = fitting.options, pair.teacher
    ways = paths(pair, smaller) if options.adaptations and options.refit else {}
    order = ordered(teacher.nodes, fitting.summands)
    needed = {
        node: [*filter(None, [fitting.summands.get(node)]), *outside(ways.get(node, ()))] for node in pair.readers
    }
    last = last_uses(order, needed, teacher.results)
    layers = sum(node in pair.readers for node in order)
    with tqdm(total=layers, desc="restore", unit="layer", leave=False, disable=None) as bar:
        for node in order:
            teacher.values[node] = teacher.compute(node)
            reader = pair.readers.get(node)
            if reader is not None:
                bar.update()
                if reader.norm is not None and teacher.measures and reader.norm not in teacher.statistics:
                    teacher.measure(reader.norm, teacher.values[node])
                if reader.weight in pair.silent:
                    fitting.give_constant(reader)
                target = fitting.target(reader) if fitting.is_due(reader) else None
                if target is not None and fitting.regress(reader, target) and node in ways:
                    adapt(fitting, reader, ways[node], target)
            pair.step(node)
            pair.forget(last[node])
