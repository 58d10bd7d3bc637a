"""The lineage graph as boxes and lines: which step was made from which, from left to right.

Columns, order and heights are found as Sugiyama, Tagawa and Toda describe (Methods for Visual Understanding of
Hierarchical System Structures, 1981): layers, stand-ins where a line passes a column, few crossings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import networkx as nx

BOX_W, BOX_H = 196, 46  # pixels
GAP_X, GAP_Y = 56, 14
MARGIN = 8
SWEEPS = 4

Name = str | tuple[str, str, int]  # a step, or the stand-in of a line (from, to, column)


@dataclass(frozen=True)
class Layout:
    """Pixels: the drawing's size, every step's upper left corner, and the lines as SVG paths."""

    width: int
    height: int
    boxes: dict[str, tuple[int, int]]
    lines: list[str]


def made_from(inputs: Mapping[str, Iterable[str]]) -> nx.DiGraph:
    """Edges from input to output; `inputs` has each step's inputs. Steps that were only named are nodes too."""
    graph = nx.DiGraph()
    graph.add_nodes_from(sorted(inputs))
    graph.add_edges_from((needed, step) for step, all_ in sorted(inputs.items()) for needed in sorted(all_))
    with suppress(
        nx.NetworkXNoCycle
    ):  # none is made by a run; records that were edited must not hide the rest
        while True:
            graph.remove_edge(*nx.find_cycle(graph)[-1][:2])
    return graph


def around(graph: nx.DiGraph, step: str, most: int) -> set[str]:
    """The step, all it was made from, and what was made from it: at most `most` of these, the nearest first."""
    near = {step} | nx.ancestors(graph, step)
    after = [node for _, nodes in nx.bfs_successors(graph, step) for node in nodes]
    return near | set(after[: max(most - len(near), 0)])


def draw(graph: nx.DiGraph) -> Layout:
    """Lay the graph out. Lines that a longer way also shows are left out."""
    if not graph:
        return Layout(0, 0, {}, [])
    graph = nx.transitive_reduction(graph)
    column = _columns(graph)
    full = _with_stand_ins(graph, column)
    layers: list[list[Name]] = [[] for _ in range(max(column.values()) + 1)]
    for node in sorted(full, key=str):
        layers[full.nodes[node]["column"]].append(node)
    y = _heights(full, layers)
    corner = {node: (MARGIN + full.nodes[node]["column"] * (BOX_W + GAP_X), round(y[node])) for node in full}
    lines = []
    for start, end in full.edges:
        # A line runs through the whole width of a column that it only passes.
        x1, y1 = corner[start][0] + BOX_W, corner[start][1] + BOX_H // 2
        x2, y2 = corner[end][0], corner[end][1] + BOX_H // 2
        middle = (x1 + x2) // 2
        lines.append(f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}")
        if not isinstance(end, str):
            lines.append(f"M{x2} {y2}h{BOX_W}")
    width = 2 * MARGIN + len(layers) * (BOX_W + GAP_X) - GAP_X
    height = max(corner[node][1] for node in full) + BOX_H + MARGIN
    return Layout(width, height, {node: corner[node] for node in full if isinstance(node, str)}, lines)


def _columns(graph: nx.DiGraph) -> dict[str, int]:
    """Each step right of its inputs, and beside others of its kind where that is possible."""
    order = list(nx.topological_sort(graph))
    last = nx.dag_longest_path_length(graph)
    latest: dict[str, int] = {}  # as far right as what is made from it allows
    for node in reversed(order):
        latest[node] = min((latest[after] for after in graph.successors(node)), default=last + 1) - 1
    beside: dict[str, int] = {}
    for node in order:
        kind = node.split("/")[0]
        beside[kind] = min(latest[node], beside.get(kind, last))
    column: dict[str, int] = {}
    for node in order:
        inputs = [column[before] + 1 for before in graph.predecessors(node)]
        column[node] = max([beside[node.split("/")[0]], *inputs])
    return column


def _with_stand_ins(graph: nx.DiGraph, column: dict[str, int]) -> nx.DiGraph:
    full = nx.DiGraph()
    for node in graph:
        full.add_node(node, column=column[node])
    for start, end in graph.edges:
        before: Name = start
        for between in range(column[start] + 1, column[end]):
            stand_in = (start, end, between)
            full.add_node(stand_in, column=between)
            full.add_edge(before, stand_in)
            before = stand_in
        full.add_edge(before, end)
    return full


def _heights(full: nx.DiGraph, layers: list[list[Name]]) -> dict[Name, float]:
    """Upper edge of every node: near the mean of its neighbours' in the next column, and none over another."""
    y: dict[Name, float] = {}
    for layer in layers:
        y |= {node: index * (BOX_H + GAP_Y) for index, node in enumerate(layer)}
    for sweep in range(2 * SWEEPS):
        backwards = sweep % 2 == 0
        neighbours = full.successors if backwards else full.predecessors
        for layer in reversed(layers) if backwards else layers:
            wanted = {}
            joined = [node for node in layer if full.degree(node)]
            for node in joined:
                near = [y[other] for other in neighbours(node)]
                wanted[node] = sum(near) / len(near) if near else y[node]
            _place(sorted(joined, key=lambda n: (wanted[n], str(n))), wanted, y)
    for layer in layers:  # what stands alone goes below
        foot = max((y[node] for node in layer if full.degree(node)), default=-BOX_H - GAP_Y)
        for index, node in enumerate(node for node in layer if not full.degree(node)):
            y[node] = foot + (index + 1) * (BOX_H + GAP_Y)
    top = min(y.values())
    return {node: value - top + MARGIN for node, value in y.items()}


def _place(order: list[Name], wanted: dict[Name, float], y: dict[Name, float]) -> None:
    """Set the heights of one column in this order, without overlap, as near to the wanted ones as that allows."""
    # Neighbours that want to overlap become one block around the mean of what its members want.
    blocks: list[tuple[float, list[Name]]] = []  # (top, members)
    pitch = BOX_H + GAP_Y
    for node in order:
        top, members = wanted[node], [node]
        while blocks and blocks[-1][0] + len(blocks[-1][1]) * pitch > top:
            members = blocks.pop()[1] + members
            top = sum(wanted[m] - index * pitch for index, m in enumerate(members)) / len(members)
        blocks.append((top, members))
    for top, members in blocks:
        y |= {member: top + index * pitch for index, member in enumerate(members)}
