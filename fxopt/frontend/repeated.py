"""Tracing a graph whose calls repeat: of many layers alike, one is traced and the others are written down.

What a call becomes in the dialect depends on its function, its constants and the metadata of its operands, never on
what they hold. So each distinct call is run once on fake tensors, and what that left in the graph is written again, on
other operands, wherever the same call stands. Calls with symbolic sizes are run every time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.fx.node import map_aggregate

from fxopt.frontend.switches import Switching
from fxopt.ir.alike import Unlike, likeness, metadata

#: What a node tells of the user's program; it goes to every node that its call becomes.
_CARRIED_META: Final = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom", "recompute", "ac_graph_id")


@dataclass(eq=False)
class _Made:
    """A tensor of the program: the node that computes it, a fake tensor of its metadata, and that as a number.

    ``own`` tells that the fake tensor stands for this value alone. ``kind`` is ``None`` for metadata of unknown sizes.
    """

    node: fx.Node
    example: FakeTensor
    kind: int | None
    own: bool = True


@dataclass(frozen=True)
class _Place:
    """A node that a call reads or gives: its operand number ``index``, or the node number ``index`` that it wrote."""

    index: int
    written: bool = False


@dataclass(frozen=True)
class _Written:
    """A node that a call wrote, with a `_Place` for each node that it reads."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str
    value: Any


@dataclass(frozen=True)
class _Result:
    """A tensor that a call gave: where its node is, its metadata, and which operand it is, if it is one of them."""

    place: _Place
    example: FakeTensor
    kind: int
    given: int | None


@dataclass(frozen=True)
class _Call:
    """What a call became: nodes, and its result with a `_Result` for each tensor."""

    nodes: tuple[_Written, ...]
    result: Any


class RepeatedCalls(Switching):
    """Interprets a graph while `make_fx` traces it; of calls alike only the first is run."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        mode = get_proxy_mode()
        assert mode is not None, "interpreted outside of a trace"
        self._tracer: Any = mode.tracer
        self._calls: dict[Any, _Call] = {}
        self._kinds: dict[Any, int] = {}
        self._made_of: dict[int, _Made] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Write what ``n`` becomes into the traced graph. The result holds a `_Made` for each tensor."""
        if n.op not in ("call_function", "call_method"):
            result = super().run_node(n)
            return result if n.op == "output" else self._made(result)
        operands: dict[fx.Node, _Made] = {}
        key = self._key(n, operands)
        call = self._calls.get(key)
        if call is not None:
            return self._repeat(call, n, list(operands.values()))
        last = next(iter(reversed(self._tracer.graph.nodes)), None)
        read = list(operands)
        result = self._made(super().run_node(n))
        written = _after(self._tracer.graph, last)
        if not _is_computation(written, result):
            # What calls become may have changed: gradients recorded or not, autocast, levels of vmap.
            self._calls.clear()
        elif key is not None:
            self._remember(key, written, read, list(operands.values()), result)
        return result

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """The operands of a call that is run: fake tensors that the tracer knows as the values of their nodes."""
        return fx.map_arg(args, lambda node: _map(_Made, self._tracked, self.env[node]))

    def _key(self, n: fx.Node, operands: dict[fx.Node, _Made]) -> Any:
        """All that decides what the call ``n`` becomes, or ``None``; the tensors that it reads go to ``operands``."""
        try:
            return n.op, n.target, self._likeness(n.args, operands), self._likeness(n.kwargs, operands)
        except Unlike:
            return None

    def _likeness(self, value: Any, operands: dict[fx.Node, _Made]) -> Any:
        def of_tensor(made: Any) -> Any:
            if not isinstance(made, _Made) or made.kind is None:
                raise Unlike
            operands.setdefault(made.node, made)
            return _Made, made.kind, list(operands).index(made.node)

        def of_argument(argument: Any) -> Any:
            return likeness(self.env[argument] if isinstance(argument, fx.Node) else argument, of_tensor)

        return likeness(value, of_argument)

    def _remember(
        self, key: Any, written: list[fx.Node], read: list[fx.Node], operands: list[_Made], result: Any
    ) -> None:
        places = {node: _Place(index) for index, node in enumerate(read)}
        places |= {node: _Place(index, written=True) for index, node in enumerate(written)}
        made: list[_Made] = []
        _map(_Made, made.append, result)
        sources = {source for node in written for source in node.all_input_nodes} | {m.node for m in made}
        if not sources <= set(places) or any(m.kind is None for m in made):
            return

        def read_result(m: _Made) -> _Result:
            assert m.kind is not None
            return _Result(places[m.node], m.example, m.kind, operands.index(m) if m in operands else None)

        nodes = tuple(_read_node(node, places) for node in written)
        self._calls[key] = _Call(nodes, _map(_Made, read_result, result))

    def _repeat(self, call: _Call, n: fx.Node, operands: list[_Made]) -> Any:
        """Write what ``call`` wrote once more, for ``n``, on other operands."""
        read = [operand.node for operand in operands]
        written: list[fx.Node] = []
        meta = {key: n.meta[key] for key in _CARRIED_META if key in n.meta}

        def at(place: Any) -> Any:
            return (written if place.written else read)[place.index] if isinstance(place, _Place) else place

        for like in call.nodes:
            args, kwargs = map_aggregate(like.args, at), map_aggregate(dict(like.kwargs), at)
            node = self._tracer.graph.create_node("call_function", like.target, args, kwargs, like.name)
            node.meta.update(meta, val=like.value)
            written.append(node)

        def give(result: _Result) -> _Made:
            if result.given is None:
                return _Made(at(result.place), result.example, result.kind, own=False)
            operands[result.given].node = at(result.place)
            return operands[result.given]

        return _map(_Result, give, call.result)

    def _made(self, value: Any) -> Any:
        """``value``, of a call that was run, with a `_Made` for each tensor of which the tracer knows the node."""
        return _map(FakeTensor, self._made_by_tracer, value)

    def _made_by_tracer(self, value: FakeTensor) -> Any:
        slot = get_proxy_slot(value, self._tracer, None)
        if type(value) is not FakeTensor or slot is None:
            return value
        if id(value) in self._made_of:
            self._made_of[id(value)].node = slot.proxy.node
            return self._made_of[id(value)]
        kind = None if slot.constant is not None else self._kind(value)
        return self._made_of.setdefault(id(value), _Made(slot.proxy.node, value, kind))

    def _kind(self, value: FakeTensor) -> int | None:
        try:
            with torch._C.DisableTorchFunction():
                return self._kinds.setdefault(metadata(value), len(self._kinds))
        except Unlike:
            return None

    def _tracked(self, made: _Made) -> FakeTensor:
        if not made.own:
            # Neither the alias nor the switch belongs to the program; a gradient is recorded as it is for the example.
            with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing(), torch.enable_grad():
                made.example, made.own = torch.ops.aten.alias.default(made.example), True
            self._made_of[id(made.example)] = made
        slot = get_proxy_slot(made.example, self._tracer, None)
        if slot is None or slot.proxy.node is not made.node:
            proxy = self._tracer.proxy(made.node)
            with torch._C.DisableTorchFunction():
                track_tensor_tree(made.example, proxy, constant=None, tracer=self._tracer)
        return made.example


def _read_node(node: fx.Node, places: Mapping[fx.Node, Any]) -> _Written:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), places.__getitem__)
    assert callable(node.target)
    name = getattr(node.target, "overloadpacket", node.target).__name__
    return _Written(node.target, args, kwargs, node.graph._target_to_str(name), node.meta.get("val"))


def _after(graph: fx.Graph, last: fx.Node | None) -> list[fx.Node]:
    """The nodes of ``graph`` behind ``last``."""

    def backwards() -> Iterator[fx.Node]:
        for node in reversed(graph.nodes):
            if node is last:
                return
            yield node

    return list(backwards())[::-1]


def _is_computation(written: Sequence[fx.Node], result: Any) -> bool:
    """Whether a call did nothing but compute tensors from its operands, by operators."""
    leaves: list[Any] = []
    map_aggregate(result, leaves.append)
    tensors = [leaf for leaf in leaves if leaf is not None]
    made = bool(tensors) and all(isinstance(leaf, _Made) for leaf in tensors)
    return made and all(_is_functional(node) for node in written)


def _is_functional(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return not node.target._schema.is_mutable and not node.is_impure(False)


def _map(kind: type[Any], function: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to whatever in it, in tuples and lists too, is of ``kind``."""
    if isinstance(value, kind):
        return function(value)
    if not isinstance(value, tuple | list) or isinstance(value, torch.Size):
        return value
    parts = [_map(kind, function, part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
