# SPDX-License-Identifier: Apache-2.0
"""The rule graph as SVG: stages from left to right, drawn from the registry, the same for the same registry.

Layers by the longest way to the end; where an edge spans several of them it is led through an empty place in each; places within a
layer by the mean of their neighbours', swept to and fro (Sugiyama's method). Reports that read the same stages share a box. An edge is
left out where others imply it: where a stage reads what one of its inputs has read, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from pipeline import registry
from pipeline.job import Job
from pipeline.webpage.markup import anchor, element

WIDTH, LINE, PAD, GAP_X, GAP_Y = 114, 17, 9, 24, 20
SWEEPS = 12


@dataclass(frozen=True)
class Node:
    """A stage, or several reports with the same inputs."""

    stages: tuple[str, ...]
    jobs: int
    reads: frozenset[str]
    """Stages, but for those that others of them have read."""

    @property
    def key(self) -> str:
        """Its name within the graph."""
        return self.stages[0]

    @property
    def height(self) -> int:
        """In pixels: a line for each stage, one for the number of jobs."""
        return 2 * PAD + LINE * (len(self.stages) + (self.jobs > len(self.stages)))


def nodes(jobs: Sequence[Job]) -> list[Node]:
    """The stages of jobs in topological order, with what they read and no other edge implies."""
    reads: dict[str, set[str]] = {}
    for job in jobs:  # a student that starts as another one reads its own stage: not drawn
        above = {parent.stage for parent in registry.parents(job, jobs)} - {job.stage}
        reads.setdefault(job.stage, set()).update(above)
    far: dict[str, set[str]] = {}
    for stage, above in reads.items():
        far[stage] = above.union(*(far[other] for other in above))
    plain = {stage: [a for a in above if not any(a in far[b] for b in above)] for stage, above in reads.items()}
    groups: dict[tuple[str, frozenset[str]], list[str]] = {}
    for stage, direct in plain.items():
        alone = "" if registry.STAGES[stage].reports else stage
        groups.setdefault((alone, frozenset(direct)), []).append(stage)
    count = Counter(job.stage for job in jobs)
    return [Node(tuple(own), sum(count[stage] for stage in own), read) for (_, read), own in groups.items()]


def edges(drawn: Sequence[Node]) -> list[tuple[str, str]]:
    """From node to node."""
    of_stage = {stage: node.key for node in drawn for stage in node.stages}
    return [(parent, node.key) for node in drawn for parent in sorted({of_stage[stage] for stage in node.reads})]


def layers(drawn: Sequence[Node], links: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Of each node, from 0 on the left: as far right as what reads it allows."""
    below: dict[str, list[str]] = {node.key: [] for node in drawn}
    for parent, child in links:
        below[parent].append(child)
    depth: dict[str, int] = {}

    def to_end(key: str) -> int:
        if key not in depth:
            depth[key] = 1 + max((to_end(child) for child in below[key]), default=-1)
        return depth[key]

    longest = max((to_end(node.key) for node in drawn), default=0)
    return {key: longest - value for key, value in depth.items()}


def rule_graph(jobs: Sequence[Job]) -> Markup:
    """The drawing; each stage leads to its runs on the page."""
    drawn = nodes(jobs)
    links = edges(drawn)
    layer = layers(drawn, links)
    named = {node.key: node for node in drawn}
    columns, chains = _columns(layer, links)
    _order(columns, chains)
    place = _places(columns, {key: node.height for key, node in named.items()}, chains)
    height = max(y + (named[k].height if k in named else 0) / 2 for k, y in place.items()) + 2
    width = len(columns) * (WIDTH + GAP_X) - GAP_X + 2
    parts = [element("title", "Rule graph: which stage reads what which other one makes")]
    for (parent, child), chain in chains.items():
        points = [(layer[parent] + i, place[key]) for i, key in enumerate((parent, *chain, child))]
        parts.append(element("path", d=_curve(points), class_="edge"))
    parts += [_box(node, layer[node.key] * (WIDTH + GAP_X) + 1, place[node.key]) for node in drawn]
    return element(
        "svg", *parts, viewBox=f"0 0 {width} {height:g}", width=str(width), height=f"{height:g}", class_="graph", role="group",
        aria_label="Rule graph; the table below it says the same in words",
    )  # fmt: skip


Chains = dict[tuple[str, str], list[str]]


def _columns(layer: Mapping[str, int], links: Iterable[tuple[str, str]]) -> tuple[list[list[str]], Chains]:
    """What stands in each layer, with an empty place for each edge that passes; the empty places of each edge."""
    columns: list[list[str]] = [[] for _ in range(max(layer.values()) + 1)]
    for key, at in layer.items():
        columns[at].append(key)
    chains: Chains = {}
    for parent, child in links:
        chain = []
        for at in range(layer[parent] + 1, layer[child]):
            columns[at].append(f"{parent}>{child}>{at}")
            chain.append(columns[at][-1])
        chains[parent, child] = chain
    return columns, chains


def _neighbours(chains: Chains) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    before: dict[str, list[str]] = {}
    after: dict[str, list[str]] = {}
    for (parent, child), chain in chains.items():
        steps = [parent, *chain, child]
        for a, b in pairwise(steps):
            after.setdefault(a, []).append(b)
            before.setdefault(b, []).append(a)
    return before, after


def _order(columns: list[list[str]], chains: Chains) -> None:
    """Sort each column by the mean position of its neighbours in the one beside it, to and fro."""
    before, after = _neighbours(chains)
    for sweep in range(SWEEPS):
        forth = sweep % 2 == 0
        for at in range(1, len(columns)) if forth else range(len(columns) - 2, -1, -1):
            beside = {key: i for i, key in enumerate(columns[at - 1 if forth else at + 1])}
            links = before if forth else after
            now = {key: i for i, key in enumerate(columns[at])}

            def mean(key: str, beside: dict[str, int] = beside, links: dict = links, now: dict = now) -> float:
                found = [beside[other] for other in links.get(key, []) if other in beside]
                return sum(found) / len(found) if found else float(now[key])

            columns[at].sort(key=mean)


def _places(columns: list[list[str]], heights: Mapping[str, int], chains: Chains) -> dict[str, float]:
    """The middle of each node and empty place: near its neighbours, in the column's order, without overlap."""
    before, after = _neighbours(chains)
    room = {key: heights.get(key, 4) + GAP_Y for column in columns for key in column}
    place: dict[str, float] = {}
    for column in columns:
        y = 0.0
        for key in column:
            place[key] = y + room[key] / 2
            y += room[key]
    for sweep in range(SWEEPS):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wish: dict[str, float] = {}
            for i, key in enumerate(column):
                near = [place[other] for links in (before, after) for other in links.get(key, [])]
                # What has no neighbours stays beside what stands above it.
                wish[key] = sum(near) / len(near) if near else wish[column[i - 1]] if i else place[key]
            _settle(column, wish, room, place)
    top = min(y - (room[key] - GAP_Y) / 2 for key, y in place.items()) - 1
    return {key: y - top for key, y in place.items()}


def _settle(column: list[str], wish: Mapping[str, float], room: Mapping[str, float], place: dict[str, float]) -> None:
    """Each at its wish where there is room; those that would overlap form blocks, which settle at the mean of their wishes."""
    blocks: list[tuple[list[str], float, float]] = []  # members, top of the block, height
    for key in column:
        block = ([key], wish[key] - room[key] / 2, room[key])
        while blocks and blocks[-1][1] + blocks[-1][2] > block[1]:
            members, _, height = blocks.pop()
            joined = [*members, *block[0]]
            total, offset, sums = height + block[2], 0.0, 0.0
            for member in joined:
                sums += wish[member] - offset - room[member] / 2
                offset += room[member]
            block = (joined, sums / len(joined), total)
        blocks.append(block)
    for members, top, _ in blocks:
        y = top
        for key in members:
            place[key] = y + room[key] / 2
            y += room[key]


def _curve(points: Sequence[tuple[int, float]]) -> str:
    """From the right side of the first box to the left side of the last one, level where it passes a layer."""
    words: list[str] = []
    for (layer, y), (after, below) in pairwise(points):
        start, end = layer * (WIDTH + GAP_X) + WIDTH + 1, after * (WIDTH + GAP_X) + 1
        if not words:
            words.append(f"M{start} {y:.1f}")
        else:
            words.append(f"L{start} {y:.1f}")
        bend = (end - start) / 2
        words.append(f"C{start + bend:g} {y:.1f} {end - bend:g} {below:.1f} {end} {below:.1f}")
    return "".join(words)


def _box(node: Node, x: float, middle: float) -> Markup:
    top = middle - node.height / 2
    kind = "node report" if registry.STAGES[node.key].reports else "node"
    parts = [element("rect", x=x, y=top, width=WIDTH, height=node.height, rx=5)]
    for i, stage in enumerate(node.stages):
        text = element("text", stage, x=x + WIDTH / 2, y=top + PAD + LINE * i + 13, text_anchor="middle")
        parts.append(element("a", text, href=f"#{anchor('stage', stage)}"))
    if node.jobs > len(node.stages):
        y = top + PAD + LINE * len(node.stages) + 12
        parts.append(element("text", f"{node.jobs} jobs", x=x + WIDTH / 2, y=y, text_anchor="middle", class_="count"))
    return element("g", *parts, class_=kind)
