"""In which order a graph is gone through, so that layers can repair what they are added to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

Summands = dict[fx.Node, fx.Node | None]  # by layer, what its output is added to


def ordered(nodes: Sequence[fx.Node], summands: Summands) -> list[fx.Node]:
    """The nodes, ordered so that a layer comes after the summand whose error it repairs.

    Where the summand itself depends on the layer, its entry in `summands` is set to None: then nothing is repaired.
    """
    known = set(nodes)
    order: dict[fx.Node, None] = {}
    stack = list(reversed(nodes))
    while stack:
        node = stack[-1]
        if node in order:
            stack.pop()
            continue
        summand = summands.get(node)
        if summand is not None and summand not in order and node in ancestors(summand, summands):
            summands[node] = summand = None
        sources = [*node.all_input_nodes, *([] if summand is None else [summand])]
        waiting = [source for source in sources if source not in order and source in known]
        if waiting:
            stack += waiting
        else:
            order[stack.pop()] = None
    return list(order)


def ancestors(node: fx.Node, summands: Mapping[fx.Node, fx.Node | None] | None = None) -> set[fx.Node]:
    """The nodes that a node needs, by what it reads, and by the `summands` that layers repair."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        summand = (summands or {}).get(node)
        for source in (*node.all_input_nodes, *([] if summand is None else [summand])):
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """A node, then, in their order, the nodes that its value passes on the way to `last`."""
    before = ancestors(last)
    path: dict[fx.Node, None] = {}
    for node in first.graph.nodes:
        if node in before and (node is first or any(source in path for source in node.all_input_nodes)):
            path[node] = None
    return list(path)


def outside(path: Sequence[fx.Node]) -> list[fx.Node]:
    """What the nodes on a path read that is not on it."""
    return [source for source in dict.fromkeys(s for node in path for s in node.all_input_nodes) if source not in path]


def is_learned(layer: fx.Node) -> bool:
    """Whether any parameter comes before a layer, beside its own: else it sees the network's inputs themselves."""
    return any(source.op == "get_attr" for source in ancestors(layer) - {*layer.all_input_nodes})


def last_uses(
    order: Sequence[fx.Node], sources: Mapping[fx.Node, Sequence[fx.Node]], keep: Sequence[fx.Node]
) -> dict[fx.Node, list[fx.Node]]:
    """By node, what no later one needs. sources: what a node needs beside what it reads. keep: what stays to the end."""
    seen: set[fx.Node] = set(keep)
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(order):
        needed = dict.fromkeys((node, *node.all_input_nodes, *sources.get(node, ())))
        uses[node] = [source for source in needed if source not in seen]
        seen.update(uses[node])
    return uses
