"""Random graphs as layered wiring plans: who feeds whom, in which layer a vertex lies, and the statistics of a graph.

Source: Darji, Investigating Sparsity in Recurrent Neural Networks, master's thesis, University of Passau, 2024
(arXiv 2407.20601); random wiring after Xie et al., ICCV 2019.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prunus.errors import InvalidValue, MissingExtra, unknown
from prunus.randomness import key

FAMILIES = ("barabasi-albert", "watts-strogatz")
Edge = tuple[int, int]


@dataclass(frozen=True)
class Wiring:
    """A directed acyclic graph cut into layers.

    Attributes:
        nodes: number of vertices, called 0..nodes-1.
        edges: (source, target) pairs, sorted.
        layers: the vertices of each layer, ascending; an edge always leads to a later layer.
    """

    nodes: int
    edges: tuple[Edge, ...]
    layers: tuple[tuple[int, ...], ...]

    def between(self, source: int, target: int) -> list[Edge]:
        """Return the edges from layer `source` to layer `target` as (position in source, position in target)."""
        first = {v: i for i, v in enumerate(self.layers[source])}
        last = {v: i for i, v in enumerate(self.layers[target])}
        return [(first[a], last[b]) for a, b in self.edges if a in first and b in last]


def wiring(nodes: int, edges: Iterable[Edge]) -> Wiring:
    """Orient undirected edges from the lower to the higher vertex and layer the vertices.

    The layer of a vertex is the length of the longest path from a vertex without incoming edges to it.

    Raises:
        InvalidValue: no vertices, an edge to nowhere, or one from a vertex to itself.
    """
    directed = sorted({(min(a, b), max(a, b)) for a, b in edges})
    if nodes < 1 or any(a < 0 or b >= nodes or a == b for a, b in directed):
        raise InvalidValue(f"edges must join two different vertices out of 0..{nodes - 1}, got {directed[:5]}")
    depth = [0] * nodes
    # Sorted by source, and sources are lower than targets: the depth of a source is final when its edges are read.
    for a, b in directed:
        depth[b] = max(depth[b], depth[a] + 1)
    layers = tuple(tuple(v for v in range(nodes) if depth[v] == d) for d in range(max(depth) + 1))
    return Wiring(nodes, tuple(directed), layers)


def random_wiring(family: str, nodes: int, seed: int = 0) -> Wiring:
    """Draw a graph of a family and layer it.

    "barabasi-albert" joins each new vertex to max(1, nodes // 10) earlier ones; "watts-strogatz" rewires every edge
    of a ring in which each vertex has max(2, nodes // 5) neighbours, until the graph is connected.

    Raises:
        UnknownName: no such family.
        InvalidValue: fewer than 3 vertices, or no connected graph was found.
        MissingExtra: networkx is not installed.
    """
    if family not in FAMILIES:
        raise unknown("graph family", family, FAMILIES)
    if nodes < 3:
        raise InvalidValue(f"nodes={nodes}: a random graph needs at least 3 vertices")
    nx = _networkx()
    draw = key(seed, "graph", family, nodes)
    if family == "barabasi-albert":
        return wiring(nodes, nx.barabasi_albert_graph(nodes, max(1, nodes // 10), seed=draw).edges)
    try:
        graph = nx.connected_watts_strogatz_graph(nodes, max(2, nodes // 5), 1.0, tries=1000, seed=draw)
    except nx.NetworkXError as error:
        raise InvalidValue(
            f"no connected watts-strogatz graph of {nodes} vertices was found; use more vertices"
        ) from error
    return wiring(nodes, graph.edges)


def graph_statistics(plan: Wiring) -> dict[str, float]:
    """Return numbers that describe a graph, as predictors of what a network built from it is worth.

    "layers", "nodes", "edges", "sources" (vertices without incoming edges), "sinks" (without outgoing ones), and of
    the undirected graph "density", "diameter", "average_shortest_path", and mean, variance and standard deviation (of
    the population) of "eccentricity", "degree", "closeness", "node_betweenness" and "edge_betweenness".

    Raises:
        InvalidValue: the graph is not connected, so that distances do not exist.
        MissingExtra: networkx is not installed.
    """
    nx = _networkx()
    graph = nx.Graph()
    graph.add_nodes_from(range(plan.nodes))
    graph.add_edges_from(plan.edges)
    if not nx.is_connected(graph):
        raise InvalidValue("the graph is not connected, so it has no diameter and no average path length")
    targets, origins = {b for _, b in plan.edges}, {a for a, _ in plan.edges}
    found: dict[str, float] = {
        "layers": len(plan.layers),
        "nodes": plan.nodes,
        "edges": len(plan.edges),
        "sources": plan.nodes - len(targets),
        "sinks": plan.nodes - len(origins),
        "density": nx.density(graph),
        "diameter": nx.diameter(graph),
        "average_shortest_path": nx.average_shortest_path_length(graph) if plan.nodes > 1 else 0.0,
    }
    summaries: dict[str, Sequence[float]] = {
        "eccentricity": list(nx.eccentricity(graph).values()),
        "degree": [d for _, d in graph.degree],
        "closeness": list(nx.closeness_centrality(graph).values()),
        "node_betweenness": list(nx.betweenness_centrality(graph).values()),
        "edge_betweenness": list(nx.edge_betweenness_centrality(graph).values()) or [0.0],
    }
    for name, values in summaries.items():
        found[f"{name}_mean"] = statistics.fmean(values)
        found[f"{name}_variance"] = statistics.pvariance(values)
        found[f"{name}_std"] = statistics.pstdev(values)
    return found


def _networkx() -> Any:
    try:
        import networkx
    except ImportError as error:
        raise MissingExtra(
            "random graphs are drawn by networkx, which is not installed: pip install networkx"
        ) from error
    return networkx
