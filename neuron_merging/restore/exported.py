"""Restoration of networks as torch.export sees them (ours): transformers, several inputs, all that torch.fx cannot trace.

The original graph (the teacher) and the cut one (the student) run side by side, node by node. Every linear layer or convolution
that reads dropped indices is fitted to what the teacher gives there, by ridge regression on what the *student* sees there:

    W = W₀ + (Rᵀ U / n) (A + Λ)⁻¹,   R = T − U W₀ᵀ,   A = Uᵀ U / n,   Λ = λ diag(A) + λ/10 · mean(diag(A)) I

with U [n, F] the student's centred inputs, T [n, M] the teacher's centred outputs and W₀ the pruned weights. The intercept goes
into the bias. Where the output is added to a stream that has an error by then, T contains that error too, and so repairs it.
λ, or the pruned weights, are what errs least on batches that are held out. BatchNorm has its running statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from neuron_merging.config import RIDGE
from neuron_merging.errors import reported_as
from neuron_merging.graph.axes import Leaf
from neuron_merging.graph.export import Inputs
from neuron_merging.graph.rules import operation
from neuron_merging.graph.spaces import Space, Survey
from neuron_merging.graph.surgery import Smaller, difference, left, run
from neuron_merging.linalg import ENTRIES, POSITIONS
from neuron_merging.restore.batches import EVERY, Batch, Values, attribute, batches, compute, last_uses
from neuron_merging.restore.readers import VIEWS, Reader, find_reader, plain_module
from neuron_merging.restore.regression import Rows, best_fit


@torch.no_grad()
def restore(
    survey: Survey,
    keep: Mapping[Space, Tensor],
    small: Smaller,
    images: Inputs | None = None,
    *,
    ridge: float = RIDGE,
    samples: int | None = None,
    seed: int = 1,
    repair: bool = True,
    refit: bool = True,
) -> tuple[Smaller, dict[str, tuple[float, float]]]:
    """`small`, which `surgery.cut` made by `keep`, with fitted readers; by weight its relative error held out, then and now.

    images: real inputs, as batches.batches takes them; None: made up. The graph and the model of `small` are changed in place.
    repair: a layer that is added to a stream also corrects the error that the stream has there. refit: layers that lost no
    inputs, but see other values than before, are fitted too.
    Raises NeuronMergingError where there are no inputs, or the network does not run on them.
    """
    random = torch.Generator().manual_seed(seed)
    inputs = batches(survey.network, images, random, samples)
    lockstep = _Lockstep(survey, keep, small, inputs, random, ridge, repair, refit)
    with reported_as(f"{type(survey.network.model).__name__} cannot be restored on these inputs"):
        lockstep.run()
    if small.own_class:
        model = copy.deepcopy(small.model).eval()
        why = difference(run(model, survey.network), run(small.graph, survey.network))
        small = replace(small, model=small.graph, why=why) if why else small
    return small, lockstep.errors


class _Lockstep:
    """One pass of both graphs over all batches, which fits the student's readers on the way."""

    def __init__(
        self,
        survey: Survey,
        keep: Mapping[Space, Tensor],
        small: Smaller,
        inputs: list[Batch],
        random: torch.Generator,
        ridge: float,
        repair: bool,
        refit: bool,
    ) -> None:
        self.survey, self.small, self.inputs, self.random = survey, small, inputs, random
        self.ridge, self.repair, self.refit = ridge, repair, refit
        self.masks: dict[Leaf, Tensor] = {}
        for space, kept in keep.items():
            self.masks[space.leaf] = torch.zeros(space.size, dtype=torch.bool)
            self.masks[space.leaf][kept.cpu()] = True
        self.t: Values = {}
        self.s: Values = {}
        self.errors: dict[str, tuple[float, float]] = {}

    def run(self) -> None:
        """Fit every reader; afterwards the student is ready for use."""
        originals = {new: old for old, new in self.small.copies.items()}
        teacher, student = self.survey.network.graph, self.small.graph
        last_t, last_s = last_uses(teacher.graph), last_uses(student.graph)
        for new in list(student.graph.nodes):
            if new.op == "output":
                break
            old = originals.get(new)
            if old is not None:
                self.t[old] = compute(teacher, old, self.t, self.inputs)
                reader = find_reader(self.survey, old)
                if reader is not None:
                    self._fit(reader)
            self.s[new] = compute(student, new, self.s, self.inputs)
            for node in last_t.get(old, ()):
                self.t.pop(node, None)
            for node in last_s.get(new, ()):
                self.s.pop(node, None)
        student.recompile()

    # ------------------------------------------------------------ the fit of one layer

    def _fit(self, reader: Reader) -> None:
        """Fit the student's copy of a layer, where it lost inputs, to what the teacher gives there."""
        node = self.small.copies[reader.node]
        weight = self._tensor(reader.weight_node)
        wide = self.survey.network.tensor(reader.weight)
        if weight.shape[reader.inputs] == wide.shape[reader.inputs] and not (self.refit and self._differs(reader)):
            return
        bias = None if reader.bias_node is None else self._tensor(reader.bias_node)
        W0 = reader.matrix(weight).double()
        b0 = W0.new_zeros(len(W0)) if bias is None else bias.double()
        can = bias is not None or plain_module(self.survey.network.model, reader) is not None
        rows = [self._rows(reader, k, W0.shape) for k in range(len(self.inputs))]
        if any(pair is None or not all(part.isfinite().all() for part in pair) for pair in rows):
            return
        held = [k % EVERY == EVERY - 1 for k in range(len(rows))]
        seen, unseen = (
            tuple(torch.cat(part) for part in zip(*(pair for pair, out in zip(rows, held) if out == which)))
            for which in (False, True)
        )
        fit, self.errors[reader.weight] = best_fit(seen, unseen, (W0, b0), self.ridge, can)
        if fit is not None:
            self._put(reader, node, *fit)

    def _differs(self, reader: Reader) -> bool:
        """Whether a layer sees something else in the student than in the teacher."""
        pairs = zip(self.t[reader.source], self.s[self.small.copies[reader.source]])
        return any(not torch.equal(x_t, x_s) for x_t, x_s in pairs)

    def _rows(self, reader: Reader, k: int, shape: torch.Size) -> Rows | None:
        """What the student's layer with weights of this shape, [M, F], sees and is to give in a batch; None if not known."""
        x = self.s[self.small.copies[reader.source]][k]
        y = self._cut(self.t[reader.node][k], reader.node)
        channel = y.ndim - 1 if reader.conv is None else 1
        if y.ndim < 2 or x.ndim != y.ndim or y.shape[channel] != shape[0]:
            return None
        error = self._stream_error(reader, k) if self.repair else None
        if error is not None and error.numel() == y.numel():
            y = y + error.reshape(y.shape)
        y = y.movedim(channel, -1).flatten(0, -2)
        most = min(POSITIONS * shape[1], ENTRIES // shape[1]) // len(self.inputs) + 1
        chosen = torch.arange(len(y))
        if len(y) > most:
            chosen = torch.randperm(len(y), generator=self.random)[:most].sort().values
        chosen = chosen.to(y.device)
        U = reader.seen(x, chosen)
        return (U, y[chosen]) if U.dtype == torch.float64 else (U.float(), y[chosen].float())

    def _cut(self, value: Tensor, node: fx.Node) -> Tensor:
        """What the teacher gives at a node, without the indices that the student lacks."""
        for d, axis in enumerate(self.survey.analysis.values.get(node) or ()):
            stays = left(axis, self.masks)
            if not stays.all():
                stays = stays.repeat(value.shape[d] // len(stays))  # of more samples than the example has
                value = value.index_select(d, stays.nonzero().flatten().to(value.device))
        return value

    def _stream_error(self, reader: Reader, k: int) -> Tensor | None:
        """Teacher − student where the output of a layer is added to something else, if both have that by now."""
        node, user = reader.node, next(iter(reader.node.users), None)
        while len(node.users) == 1 and operation(user) in VIEWS and user.args[0] is node:
            node, user = user, next(iter(user.users), None)
        if len(node.users) != 1 or operation(user) not in ("add", "add_") or user.kwargs or len(user.args) != 2:
            return None
        other = user.args[1] if user.args[0] is node else user.args[0]
        if not isinstance(other, fx.Node) or other is node or other not in self.t or other.op == "get_attr":
            return None
        whole, part = self.t[other][k], self.s.get(self.small.copies[other])
        if (
            part is None
            or not isinstance(whole, Tensor)
            or list(node.meta["val"].shape) != list(other.meta["val"].shape)
        ):
            return None
        whole = self._cut(whole, other)
        return whole - part[k] if whole.shape == part[k].shape else None

    def _tensor(self, node: fx.Node) -> Tensor:
        """The student's parameter at a get_attr of the teacher's."""
        return attribute(self.small.graph, self.small.copies[node].target)

    def _put(self, reader: Reader, node: fx.Node, W: Tensor, b: Tensor) -> None:
        """Give the layer its weights and its bias, in the student's graph and in the model of the user's own class."""
        weight = self._tensor(reader.weight_node)
        weight.copy_(reader.as_weight(W, weight))
        if self.small.own_class:
            self.small.model.get_parameter(reader.weight).copy_(weight)  # which its other names share
        if reader.bias_node is not None:
            bias = self._tensor(reader.bias_node)
            bias.copy_(b)
            if self.small.own_class:
                self.small.model.get_parameter(reader.bias).copy_(bias)
        elif plain_module(self.survey.network.model, reader) is not None:
            self._add_bias(reader, node, b.to(weight))

    def _add_bias(self, reader: Reader, node: fx.Node, b: Tensor) -> None:
        """Give a layer that had none a bias."""
        trained = self._tensor(reader.weight_node).requires_grad
        if self.small.own_class:
            plain_module(self.small.model, reader).bias = nn.Parameter(b.clone(), requires_grad=trained)
        target = self.small.copies[reader.weight_node].target.rpartition(".")[0] + ".bias"
        path, _, name = target.rpartition(".")
        setattr(self.small.graph.get_submodule(path), name, nn.Parameter(b, requires_grad=trained))
        with self.small.graph.graph.inserting_before(node):
            made = self.small.graph.graph.get_attr(target)
        node.args = (*node.args[:2], made, *node.args[3:])
        self.s[made] = [attribute(self.small.graph, target)] * len(self.inputs)
