"""What comes first when the base compiler works on a graph, and tells its caches apart, which outlive a process."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxopt.lowering.versions import source_digest


class FirstPass(CustomGraphPass):
    """A pass that changes nothing in the joint graph itself; its identifier is fxopt's source.

    What Inductor makes of a graph depends on more than the graph here: attention patterns are off, some decompositions
    are fxopt's, and so is what fake implementations tell of an operator's result. What an operator computes is not in
    compiled code, which calls it by its name with the specification and configuration that stand in the graph.

    Args:
        start: what to call first.
        given: passes of the user's in the same place, as Inductor's setting has them; they run then. Where one has no
            identifier, nothing is cached.
    """

    def __init__(
        self,
        start: Callable[[], None],
        given: Callable[[fx.Graph], object] | Sequence[Callable[[fx.Graph], object]] | None,
    ) -> None:
        self._start = start
        self._given = tuple(given) if isinstance(given, Sequence) else () if given is None else (given,)

    def __call__(self, graph: fx.Graph) -> None:
        """Run the user's passes."""
        self._start()
        for one in self._given:
            one(graph)

    def uuid(self) -> Hashable | None:
        """What stands in the keys of Inductor's caches; ``None`` keeps it from using them."""
        names: list[Any] = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self._given]
        return None if None in names else ("fxopt", source_digest(), *names)
