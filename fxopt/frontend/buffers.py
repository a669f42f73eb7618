"""Buffers of a model among the inputs of Dynamo's graph: found by where they come from, and guarded where proofs read
what they hold.

Dynamo checks a guard at each call and compiles anew where it fails, with what the buffer then holds. Instances of one
class share compiled code, so a guard asks what another instance's buffer holds, not whether it is the same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._guards import CompileContext, Guard, TracingContext

from fxopt.errors import CaptureError
from fxopt.ir.held import Held, Unchanged, contents, doubt_of
from fxopt.ir.nodes import has_effect, readable_path
from fxopt.ir.program import Program

_HOLDS: Final = "___fxopt_holds"


def buffers_of(module: fx.GraphModule, traced: fx.Graph, inputs: Sequence[Any]) -> dict[str, Held]:
    """The buffers among the ``inputs`` of Dynamo's ``module`` that a call leaves as they are, by the placeholders of
    ``traced``.

    One that was edited again and again since it was compiled casts doubt on all: each would compile the model anew.
    """
    if TracingContext.try_get() is None:
        return {}
    found = {}
    for before, node, value in zip(*map(_placeholders, (module.graph, traced)), inputs, strict=True):
        source = getattr(before, "_dynamo_source", None)
        if _is_buffer(source) and isinstance(value, Tensor) and not any(map(has_effect, node.users)):
            found[node.name] = Held(readable_path(_name(source)), value, doubt_of(value) or _recompiled())
    return found


def guard_buffers(program: Program, captured: fx.GraphModule) -> None:
    """Have Dynamo check, at each call, that the buffers that ``program`` makes assumptions about hold what they do.

    Raises:
        CaptureError: one was edited by another thread while the program was made.
    """
    context = TracingContext.try_get()
    if program.assumed:
        program.notes.append(_told(program))
    for before, node in zip(*map(_placeholders, (captured.graph, program.graph)), strict=True):
        if node.name not in program.assumed:
            continue
        held = program.held[node.name]
        digest = contents(held.tensor)
        if digest is None or context is None:
            raise CaptureError(f"the buffer {held.name} changed while the graph was made")
        source: Any = getattr(before, "_dynamo_source", None)
        guard = Guard(source, partial(_check, unchanged=Unchanged(digest)))
        context.guards_context.dynamo_guards.add(guard)


def _told(program: Program) -> str:
    names = [held.name for place, held in program.held.items() if place in program.assumed]
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return (
        f"masks were proved of what {len(names)} buffer{'s' * (len(names) > 1)} of the model ({some}) held when it was "
        "compiled; each call checks that, and a change compiles anew"
    )


def _check(builder: Any, guard: Guard, unchanged: Unchanged) -> None:
    """Add the check to the guards that come last: those below a dictionary may be skipped while it is the same one."""
    from torch._dynamo.guards import _get_closure_vars

    told = f"{guard.name} holds what it held when fxopt read it"
    names = {**_get_closure_vars(), _HOLDS: unchanged}
    builder.add_python_lambda_leaf_guard_to_root([f"{_HOLDS}({builder.arg_ref(guard)})"], [told], closure_vars=names)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="placeholder")


def _is_buffer(source: Any) -> bool:
    """Whether Dynamo found a tensor in the ``_buffers`` of a module that it was given."""
    return getattr(getattr(source, "base", None), "member", "") == "_buffers"


def _name(source: Any) -> str:
    return str(source.name() if callable(source.name) else source.name)


def _recompiled() -> str:
    """Why this compilation of a frame assumes nothing of buffers: the others may be needed for what changes else."""
    compiled = CompileContext.current_compile_id()
    times = None if compiled is None else compiled.frame_compile_id
    if times is None:
        return "it is not known how often it was compiled"
    often = times >= torch._dynamo.config.recompile_limit // 2
    return f"it is read at each call, as its code was compiled {times} times before" if often else ""
