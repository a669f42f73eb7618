"""Attentions that are decided on after the base compiler has done its work on the graph around them.

Building candidates is the assembler's work for the most part and the base compiler's is Python's, so the two go on at
once. The graph names each decision by a key (`fxopt.codegen.attention.decided`); what is measured afterwards gives the
key its meaning.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Node

from fxopt.codegen.attention import decided
from fxopt.ir.decision import Decision
from fxopt.ir.nodes import tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.lowering.attention import build_undecided, candidates, choose, key_of, tensor_nodes
from fxopt.lowering.candidate import Candidate
from fxopt.lowering.decisions import recalled
from fxopt.lowering.measure import MEASUREMENT_SECONDS, layout

#: What a site that is put off runs as until it is decided on.
STAND_IN: Final = "decided later"
#: Of the digests of keys, which stand in graphs.
_DIGITS: Final = 16


class Postponed:
    """The attentions of one program in inference that may be decided on later.

    Args:
        program: the program before it is lowered, whose nodes stay what they are.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        sites = program.graph.find_nodes(op="call_function", target=overload("attention"))
        self._sites: Mapping[str, Node] = {site.name: site for site in sites}
        self._open: dict[str, list[Node]] = {}
        self._settled: dict[str, Decision | None] = {}
        self._building: Future[None] | None = None

    def put_off(self, name: str) -> tuple[Candidate, Decision] | None:
        """What stands in place of the site of this ``name``; ``None`` where it has to be decided on at once.

        Where it is known what is fastest, that is decided here. The graph is the same in the end, which is how the
        base compiler finds it in its own caches.
        """
        site = self._sites.get(name)
        if site is None or not _may_wait(site):
            return None
        found, _ = candidates(site, training=False)
        if not any(candidate.family == "triton" and not candidate.seeded for candidate in found):
            return None
        text = key_of(site, False, found)
        key = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
        stand_in = Candidate(STAND_IN, "decided", torch.ops.fxopt.attention_decided.default, (key,))
        if name not in self._settled and recalled(text, found) is None:
            self._open.setdefault(key, []).append(site)
            return stand_in, Decision((name,), STAND_IN, "to be measured")
        decision = self._settled[name] if name in self._settled else _settled(site, key)
        return None if decision is None else (stand_in, decision)

    def start(self) -> None:
        """Begin to build the candidates of what is open, in threads of their own."""
        if not self._open:
            return
        copies = {node.name: node for node in self._program.copy().graph.nodes}
        sites = [copies[alike[0].name] for alike in self._open.values()]
        asked = [(site, candidates(site, training=False)[0]) for site in sites]
        _give_fakes_of_their_own(asked)
        pool = ThreadPoolExecutor(1, "fxopt-building")
        self._building = pool.submit(_build, asked, torch.cuda.current_device())
        pool.shutdown(wait=False)

    def finish(self) -> Mapping[str, Decision | None]:
        """Measure what is open; the decisions by the site's name.

        It is ``None`` where what is fastest can't stand in the site's place: the program has to be lowered again then.
        """
        if self._building is not None:
            start = time.perf_counter()
            self._building.result()
            MEASUREMENT_SECONDS["total"] += time.perf_counter() - start
        while self._open:
            key, sites = self._open.popitem()
            self._settled |= {site.name: _settled(site, key) for site in sites}
        return self._settled


def _may_wait(site: Node) -> bool:
    """Whether all sizes are known: threads of their own must not ask what symbolic ones are."""
    operands = [tensor(node) for node in tensor_nodes(site.args)]
    sizes = [size for x in operands for size in (*x.shape, *x.stride())]
    return all(isinstance(size, int) for size in sizes)


def _settled(site: Node, key: str) -> Decision | None:
    """Decide on ``site`` under ``key``; ``None`` where what is best can't stand in its place."""
    chosen, decision = choose(site, training=False, lower="auto")
    if chosen.family == "aten" or decided.FAMILIES.get(chosen.family) is not chosen.target:
        return None
    decided.decide(key, chosen.family, str(chosen.extra[0]))
    return decision


def _give_fakes_of_their_own(asked: Sequence[tuple[Node, list[Candidate]]]) -> None:
    """Put fake tensors of a mode of their own in the place of those that candidates read.

    While a thread runs a kernel under a mode, all fake tensors of that mode seem to lie on the device ``meta``.
    """
    mode = FakeTensorMode()
    for node in {node for site, found in asked for node in tensor_nodes([site.args, *(c.arguments for c in found)])}:
        value = tensor(node)
        with mode:
            node.meta["val"] = torch.empty_strided(*layout(value), dtype=value.dtype, device=value.device)


def _build(asked: Sequence[tuple[Node, list[Candidate]]], device: int) -> None:
    with torch.cuda.device(device):
        build_undecided(asked, training=False, beside=True)
