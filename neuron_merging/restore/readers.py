"""Linear layers and convolutions in the graph of torch.export, as regressions see them (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from neuron_merging.graph.rules import operation, origin
from neuron_merging.graph.spaces import Survey
from neuron_merging.graph.walk import is_batch_norm
from neuron_merging.linalg import Geometry, patches

CONVS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
OPERANDS = {  # the arguments that are what a layer sees, its weights and its bias
    "linear": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", None),
    "matmul": ("self", "other", None),
    **dict.fromkeys(CONVS, ("input", "weight", "bias")),
}
VIEWS = {"dropout", "view", "reshape", "contiguous", "clone", "alias", "_unsafe_view"}  # behind a layer; rows stay rows
CLIPS = {"relu": (0.0, torch.inf), "relu6": (0.0, 6.0)}


@dataclass(frozen=True)
class Reader:
    """A layer whose parameters nothing else reads.

    node: the call. source: what it sees. weight, bias: the first names of its parameters; *_node: where the graph gets them.
    flipped: the weight is [F, M], not [M, F]. conv: of a convolution. groups: of the
    convolution; each of the G groups is a layer of its own. norm: the BatchNorm that is all that reads it. clip: the bounds
    within which an activation directly behind lets values pass.
    """

    node: fx.Node
    source: fx.Node
    weight: str
    weight_node: fx.Node
    bias: str | None
    bias_node: fx.Node | None
    flipped: bool
    conv: Geometry | None
    groups: int
    norm: fx.Node | None
    clip: tuple[float, float] | None

    @property
    def inputs(self) -> int:
        """The axis of the weight along which it reads."""
        return 0 if self.flipped else 1

    def channel(self, y: Tensor) -> int:
        """Which dimension of y, what the layer gives, is that of its neurons."""
        return y.ndim - 1 if self.conv is None else 1

    def matrix(self, weight: Tensor, groups: int) -> Tensor:
        """Weights [G, M / G, F], with features in the order of `seen`."""
        weight = weight.T if self.flipped else weight
        return weight.reshape(*weight.shape[:2], -1).transpose(1, 2).reshape(groups, len(weight) // groups, -1)

    def as_weight(self, W: Tensor, like: Tensor) -> Tensor:
        """[G, M / G, F] as the parameter has it: the inverse of `matrix`."""
        W = W.flatten(0, 1)
        if self.conv is None:
            return W.T if self.flipped else W
        return W.view(len(W), -1, like.shape[1]).transpose(1, 2).reshape(like.shape)

    def seen(self, x: Tensor, chosen: Tensor, groups: int) -> Tensor:
        """What the layer sees at the output positions `chosen` [n], the last dimension being fastest: [G, n, F]."""
        if self.conv is None:
            return x.flatten(0, -2)[chosen][None]
        seen = patches(x, self.conv, chosen)
        if groups == 1:
            return seen[None]
        taps = seen.shape[1] // x.shape[1]
        return seen.view(len(seen), taps, groups, -1).permute(2, 0, 1, 3).flatten(2)

    def given(self, y: Tensor, chosen: Tensor, groups: int) -> Tensor:
        """y, like what the layer gives, at the positions `chosen`: [G, n, M / G]."""
        y = y.movedim(self.channel(y), -1).flatten(0, -2)[chosen]
        return y.view(len(y), groups, -1).transpose(0, 1)


def find_reader(survey: Survey, node: fx.Node) -> Reader | None:
    """The layer that a call is; None for other calls, and parameters that something else reads too."""
    name = operation(node)
    if node.op != "call_function" or name not in OPERANDS or not hasattr(node.target, "_schema"):
        return None
    names = node.target._schema.arguments
    given = {a.name: a.default_value if a.has_default_value() else None for a in names}
    given |= dict(zip((a.name for a in names), node.args)) | node.kwargs
    source, weight, bias = (given.get(operand) for operand in OPERANDS[name])
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        return None
    found = _parameter(survey, weight, node)
    if found is None or not isinstance(source, fx.Node):
        return None
    rank = survey.network.tensor(found.target).ndim
    if rank != (2 if name not in CONVS else int(name[4]) + 2):
        return None
    first = origin(weight, 0)
    if first is None or (name in CONVS and first != 0):
        return None
    flipped = (first == 1) == (name == "linear")
    shift = None if bias is None else _parameter(survey, bias, node)
    if shift is not None and (shift is not bias or survey.network.tensor(shift.target).ndim != 1):
        shift = None
    if bias is not None and shift is None:  # it adds something that is no plain bias
        return None
    flipped = flipped and name not in CONVS
    first_names = [None if n is None else survey.network.names[n.target][0] for n in (found, shift)]
    conv = _geometry(given, survey.network.tensor(found.target)) if name in CONVS else None
    return Reader(
        node,
        source,
        first_names[0],
        found,
        first_names[1],
        shift,
        flipped,
        conv,
        given.get("groups", 1),
        *_behind(node),
    )


def _behind(node: fx.Node) -> tuple[fx.Node | None, tuple[float, float] | None]:
    """The BatchNorm, and the bounds of the activation, that come directly after a layer."""
    norm, users = None, list(node.users)
    if len(users) == 1 and is_batch_norm(users[0]) and users[0].args[0] is node:
        norm, users = users[0], list(users[0].users)
    if len(users) != 1:
        return norm, None
    name = operation(users[0])
    clip = CLIPS.get(name)
    if name == "hardtanh":
        bounds = (*users[0].args[1:], -1.0, 1.0)[:2] if len(users[0].args) != 2 else (users[0].args[1], 1.0)
        clip = tuple(map(float, bounds))
    return norm, clip


def _parameter(survey: Survey, node: Any, user: fx.Node) -> fx.Node | None:
    """Where the graph gets the parameter that `node` is, perhaps transposed, if `user` is all that reads it."""
    while isinstance(node, fx.Node) and node.op == "call_function" and list(node.users) == [user]:
        node, user = node.args[0] if node.args else None, node
    if not isinstance(node, fx.Node) or node.op != "get_attr" or node.target not in survey.network.names:
        return None
    names = survey.network.names[node.target]
    if not isinstance(survey.network.tensor(node.target), nn.Parameter):
        return None
    same = [n for n in survey.network.graph.graph.nodes if n.op == "get_attr" and n.target in names and n.users]
    return node if same == [node] and list(node.users) == [user] else None


def _geometry(given: dict[str, Any], weight: Tensor) -> Geometry:
    """Of a convolution with these arguments and this weight."""
    sides = weight.ndim - 2

    def each(value: Any) -> list[int]:
        value = [value] if isinstance(value, int) else list(value)
        return value * sides if len(value) == 1 else value

    kernel, dilation, padding = list(weight.shape[2:]), each(given["dilation"]), given["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        pairs = [(size // 2, size - size // 2) for size in total]
    else:
        pairs = [(size, size) for size in (each(0) if padding == "valid" else each(padding))]
    around = [size for pair in reversed(pairs) for size in pair]
    return Geometry(kernel, each(given["stride"]), dilation, around)


def plain_module(model: nn.Module, reader: Reader) -> nn.Module | None:
    """The module of a linear layer or convolution without bias that can be given one."""
    path, _, name = reader.weight.rpartition(".")
    name_of_call = operation(reader.node)
    kind = nn.Linear if name_of_call == "linear" else CONVS.get(name_of_call)
    if isinstance(model, fx.GraphModule) or name != "weight" or kind is None:
        return None
    module = model.get_submodule(path)
    return (
        module
        if type(module) is kind and module.bias is None and not torch.nn.utils.parametrize.is_parametrized(module)
        else None
    )
