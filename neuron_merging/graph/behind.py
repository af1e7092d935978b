"""What stands directly behind a layer in a network's graph: its BatchNorm, and the sum that it is added to."""

from __future__ import annotations

from torch import fx

from neuron_merging.graph.rules import operation
from neuron_merging.graph.walk import is_batch_norm

DROPOUT = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}


def norm_behind(node: fx.Node) -> fx.Node | None:
    """The BatchNorm directly after a convolution, if it is the only reader."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or not operation(node).startswith("conv") or not is_batch_norm(user):
        return None
    return user if user.args[0] is node else None


def sum_behind(node: fx.Node) -> fx.Node | None:
    """Where the output of a layer, behind its BatchNorm, is added to something else."""
    norm = norm_behind(node)
    while len(node.users) == 1:
        (node,) = node.users
        if node is norm or (node.op == "call_function" and operation(node) in DROPOUT):
            continue
        if node.op != "call_function" or operation(node).removesuffix("_") != "add" or node.kwargs:
            return None
        return node if len(node.args) == len(node.all_input_nodes) == 2 else None
    return None
