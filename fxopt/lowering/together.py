"""Attentions lowered together with those that read their weights, where that is faster than each for itself.

What is wanted of the weights can be written by a kernel that holds all keys of a row, or be had from the attention's
own log-sum-exp, by one walk over the scores instead of two (`fxopt.codegen.attention.weights.together`). Both compete
with what was decided for each site alone.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

import fxopt.codegen.attention.weights.together  # noqa: F401 - defines the operator that candidates call
from fxopt.codegen.attention.backward.config import split_config
from fxopt.codegen.attention.short import kernel as short
from fxopt.codegen.attention.weights import kernel
from fxopt.codegen.attention.weights.wants import Want, of_want, printed
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.ir.decision import Decision
from fxopt.ir.nodes import arguments, is_call, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.lowering.attention import has_hints, key_of, leaves_of, problem_of, real_operands, run_on, timed_call
from fxopt.lowering.building import build
from fxopt.lowering.candidate import Candidate, triton_objection
from fxopt.lowering.decisions import Times, error_line, failures, keep, recalled
from fxopt.lowering.measure import MEASUREMENT_SECONDS, median_seconds
from fxopt.rewriter.builder import Builder

Choice = tuple[Candidate, Decision]
Forward = Callable[[Mapping[Node, Tensor]], Sequence[Tensor]]
#: The name under which the time of what was decided for each site alone is known.
APART: Final = "apart"


@dataclass(frozen=True)
class Group:
    """An attention, the nodes that read its weights, and what each of them wants."""

    site: Node
    readers: tuple[Node, ...]
    wants: tuple[Want, ...]

    @property
    def members(self) -> tuple[Node, ...]:
        """All nodes."""
        return (self.site, *self.readers)

    @property
    def first(self) -> Node:
        """The one that stands first in the graph."""
        return min(self.members)


def groups(program: Program) -> list[Group]:
    """The attentions that kernels can serve together with what reads their weights."""
    found: list[Group] = []
    for site in program.graph.find_nodes(op="call_function", target=overload("attention")):
        # Of attentions with the same weights the first one gives them.
        group = _group(site, {reader for other in found for reader in other.readers})
        if group.readers and _objection(group) is None:
            found.append(group)
    return found


def _group(site: Node, taken: set[Node]) -> Group:
    keys = site.args[1]
    assert isinstance(keys, Node)
    free = (node for node in keys.users if node not in taken)
    wants = {node: want for node in free if (want := _want(site, node)) is not None}
    return Group(site, tuple(wants), tuple(wants.values()))


def _want(site: Node, node: Node) -> Want | None:
    """What ``node`` computes of the weights of ``site``, or ``None`` when it is something else."""
    if not is_call(node, overload("attention_weights"), overload("attention_statistics")):
        return None
    queries, keys, captures, text = node.args[:4]
    spec, kept = read_spec(str(site.args[4])), read_spec(str(text))
    rows = None if queries is site.args[0] else _rows(queries, site.args[0])
    if keys is not site.args[1] or (rows is None and queries is not site.args[0]):
        return None
    count = tensor(site.args[0]).shape[2]
    want = Want(str(node.args[4]) if len(node.args) > 4 else "weights", kept.out_dtype, rows)
    assert isinstance(captures, Sequence) and isinstance(site.args[3], Sequence)
    if not _are_read_alike(site.args[3], captures, spec, rows):
        return None
    return want if kept == of_want(spec, want, count if isinstance(count, int) else 0) else None


def _rows(taken: object, whole: object) -> tuple[int, int, int] | None:
    """The rows that a slice takes, counted from the first."""
    if not isinstance(taken, Node) or not is_call(taken, torch.ops.aten.slice.Tensor) or taken.args[0] is not whole:
        return None
    given, count = arguments(taken), tensor(whole).shape[2]
    if given["dim"] != 2 or not isinstance(count, int):
        return None
    rows = range(count)[given["start"] : given["end"] : given["step"]]
    return (rows.start, rows.stop, rows.step) if rows else None


def _are_read_alike(
    whole: Sequence[Any], taken: Sequence[Any], spec: AttentionSpec, rows: tuple[int, int, int] | None
) -> bool:
    """Whether captured tensors ``taken`` are those of the attention, cut to the rows where they have rows."""
    if len(whole) != len(taken):
        return False
    for a, b, how in zip(whole, taken, spec.captures, strict=True):
        if not (_rows(b, a) == rows if rows is not None and how.dims[2] == "i" else b is a):
            return False
    return True


def _objection(group: Group) -> str | None:
    """Why no kernels serve a group together, or ``None`` when some do."""
    q, k, v = _tensors(group)
    spec = read_spec(str(group.site.args[4]))
    if spec.dropout:
        return "dropped weights are not those that are read"
    if any(isinstance(size, int) and size == 0 for x in (q, k, v) for size in x.shape):
        return "an operand is empty"
    if not all(node < group.first for node in group.site.all_input_nodes):
        return "an operand is computed after the weights are read"
    general = triton_objection((q, k, v), (q.shape[3], v.shape[3])) or kernel.objection(spec, q.shape[3], q.dtype)
    if general is not None or short.candidates_with_weights(problem_of(spec, q, k, v, training=False)):
        return general
    return kernel.sharing_objection(spec, q.dtype)


def _tensors(group: Group) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (tensor(node) for node in group.site.args[:3])
    return q, k, v


def candidates(group: Group, chosen: Mapping[Node, Candidate], training: bool) -> list[Candidate]:
    """The ways to run a group at once, best guess first, given what was ``chosen`` for each member alone."""
    wants = printed(group.wants)
    configs = [*_in_one_pass(group, chosen[group.site], training), *_by_walks(group, chosen)]
    return [Candidate(f"triton-{config}", "triton", _TARGET, (wants, config, training)) for config in configs]


_TARGET: Final = torch.ops.fxopt.attention_and_weights_forward.default


def _in_one_pass(group: Group, attention: Candidate, training: bool) -> list[str]:
    """The configurations of kernels that hold all keys of a row."""
    q, k, v = _tensors(group)
    backward = split_config(str(attention.extra[0]))[1] if attention.family == "triton" else ""
    # Values narrower than keys would have to be padded; in training the backward is that of the attention alone.
    if v.shape[3] < q.shape[3] or (training and not backward):
        return []
    problem = problem_of(read_spec(str(group.site.args[4])), q, k, v, training)
    return [f"{c}/{backward}" if backward else c for c in short.candidates_with_weights(problem)]


def _by_walks(group: Group, chosen: Mapping[Node, Candidate]) -> list[str]:
    """That of the attention as it was chosen, followed by a walk for each reader."""
    q = _tensors(group)[0]
    spec = read_spec(str(group.site.args[4]))
    attention = chosen[group.site]
    walks = [_walk(group, reader, chosen[reader]) for reader in group.readers]
    shares = attention.family == "triton" and kernel.sharing_objection(spec, q.dtype) is None
    return [f"{attention.extra[0]}|{','.join(walks)}"] if shares and all(walks) else []


def _walk(group: Group, reader: Node, chosen: Candidate) -> str:
    """The configuration of a reader's kernel: what was chosen, or the best guess; nothing where there is none."""
    if chosen.family == "triton":
        return str(chosen.extra[-1])
    q = tensor(reader.args[0])
    rows = q.shape[2] if isinstance(q.shape[2], int) else None
    found = kernel.candidates(read_spec(str(reader.args[3])), q.shape[3], q.dtype, rows)
    return str(found[0]) if found else ""


def choose(group: Group, choices: Mapping[Node, Choice], training: bool, lower: str) -> Choice | None:
    """What runs the whole group, and the decision; ``None`` where its members run as they were decided on."""
    chosen = {node: choices[node][0] for node in group.members}
    found = candidates(group, chosen, training) if lower in ("auto", "triton") else []
    names = tuple(node.name for node in group.members)
    if not found or not has_hints(group.site):
        return None
    if lower == "triton":
        return found[0], Decision(names, found[0].name, "forced by lower='triton', with what reads the weights")
    times = _times(group, chosen, found, training)
    if not times.seconds:
        return None
    best = min(times.seconds, key=lambda name: times.seconds[name])
    reason = f"{times.source}, with what reads the weights{failures(times.failed)}"
    by_name = {candidate.name: candidate for candidate in found}
    return (by_name[best], Decision(names, best, reason, times.seconds)) if best in by_name else None


def _times(group: Group, chosen: Mapping[Node, Candidate], found: list[Candidate], training: bool) -> Times:
    apart = Candidate(APART, APART, group.site.target)  # type: ignore[arg-type]  # an operator, as of every site
    names = [f"{node.target} {chosen[node].name}" for node in group.members]
    key = "\n".join([key_of(group.site, training, [*found, apart]), printed(group.wants), *names])
    times = recalled(key, [*found, apart])
    if times is not None:
        return times
    start, failed = time.perf_counter(), dict[str, str]()
    build([(group.site, found)], training)
    times = Times(_measured(group, chosen, found, training, failed), failed)
    MEASUREMENT_SECONDS["total"] += time.perf_counter() - start
    keep(key, times)
    return times


def _measured(
    group: Group, chosen: Mapping[Node, Candidate], found: list[Candidate], training: bool, failed: dict[str, str]
) -> dict[str, float]:
    """Median seconds of the group's members one after the other, and of each candidate."""
    real: dict[Node, Tensor] = {}
    for node in group.members:
        real |= real_operands(node, [chosen[node]])
    device = tensor(group.site).device

    def apart(operands: Mapping[Node, Tensor]) -> list[Tensor]:
        return [run_on(operands, chosen[node], node) for node in group.members]

    every = dict.fromkeys(leaf for node in group.members for leaf in leaves_of(chosen[node], node))
    ways: dict[str, tuple[Forward, Sequence[Node]]] = {APART: (apart, tuple(every))}
    ways |= {c.name: (partial(_at_once, c, group.site), leaves_of(c, group.site)) for c in found}
    seconds: dict[str, float] = {}
    for name, (forward, leaves) in ways.items():
        try:
            run = timed_call(forward, real, leaves if training else ())
            with torch.set_grad_enabled(training):
                seconds[name] = median_seconds(run, device, min(seconds.values(), default=math.inf))
        except Exception as error:  # noqa: BLE001 - what can't be measured is not chosen
            failed[name] = error_line(error)
    return seconds


def _at_once(candidate: Candidate, site: Node, operands: Mapping[Node, Tensor]) -> list[Tensor]:
    out, _, *wanted = run_on(operands, candidate, site)
    return [out, *wanted]


def write(program: Program, group: Group, choice: Choice) -> None:
    """Have one call stand in the place of all members of a group."""
    candidate = choice[0]
    builder = Builder(program, group.first, f"lower-{candidate.family}")
    assert isinstance(candidate.target, torch._ops.OpOverload)
    call = builder.call(candidate.target, *group.site.args, *candidate.extra)
    places = (0, *range(2, 2 + len(group.readers)))
    results = [builder.call(operator.getitem, call, place) for place in places]
    for old, new in zip(group.members, results, strict=True):
        old.replace_all_uses_with(new)
        program.graph.erase_node(old)
