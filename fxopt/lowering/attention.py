"""Lowering of ``fxopt::attention``: the candidates, and the one to run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxopt.analysis.gradients import may_need_gradient
from fxopt.codegen.attention import kernels, operator, sdpa
from fxopt.codegen.attention.backward import families as backward
from fxopt.codegen.attention.backward.config import RECOMPUTE
from fxopt.codegen.attention.problem import Problem
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.ir.decision import Decision
from fxopt.ir.operators import overload
from fxopt.lowering import linear_attention, weights
from fxopt.lowering.building import build
from fxopt.lowering.candidate import Candidate, triton_objection
from fxopt.lowering.decisions import Times, bucket, error_line, failures, forced, has_hint, keep, recalled, shortfalls
from fxopt.lowering.measure import MEASUREMENT_SECONDS, hint, layout, materialise, median_seconds
from fxopt.lowering.packed import PACKED, as_one
from fxopt.lowering.versions import fingerprint

__all__ = ["MEASUREMENT_SECONDS", "Candidate", "candidates", "choose", "operator"]

#: The attention alone, and the one that gives the log-sum-exp of its logits as well.
_ATTENTIONS: Final = (overload("attention"), overload("attention_with_lse"))


def candidates(site: Node, training: bool) -> tuple[list[Candidate], dict[str, str]]:
    """The ways to run ``site``, best guess first, and why others can't, by family or backend."""
    if site.target is overload("linear_attention"):
        return linear_attention.candidates(site, training)
    if site.target not in _ATTENTIONS:
        return weights.candidates(site)
    q, k, v, _ = _operands(site)
    spec = read_spec(str(site.args[4]))
    refused: dict[str, str] = {}
    wanted = [training and may_need_gradient(node) for node in _capture_nodes(site)]
    with_lse = site.target is overload("attention_with_lse")
    plain = Candidate("aten", "aten", overload("attention_with_lse" if with_lse else "attention"))
    if any(isinstance(size, int) and size == 0 for x in (q, k, v) for size in x.shape):
        return [plain], {"triton": "an operand is empty", "sdpa": "an operand is empty"}
    found = _generated(spec, q, k, v, training, refused, wanted)
    if with_lse:
        both = [replace(c, extra=(c.extra[0], True), first=False) for c in found]
        return [*both, plain], {**refused, "sdpa": "scaled_dot_product_attention returns no log-sum-exp"}
    found = as_one(site, found) if training else found
    for backend, device in sdpa.BACKENDS.items():
        if device != q.device.type:
            continue
        reason = _sdpa_objection(spec, q, k, v, backend, training, any(wanted))
        if reason is None:
            found.append(Candidate(f"sdpa-{backend}", "sdpa", overload("attention_sdpa"), (backend,)))
        else:
            refused[f"sdpa-{backend}"] = reason
    known = weights.from_known_weights(site)
    return [*found, *((known,) if known else ()), plain], refused


def _sdpa_objection(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, backend: str, training: bool, biased: bool
) -> str | None:
    if biased:
        return "a captured tensor may need a gradient"
    if training and sdpa.needs_bias(spec, q, k):
        return "its backward does not treat rows without keys, or filled with a lowest number, as the model does"
    return sdpa.objection(spec, q, k, v, backend)


def _generated(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    training: bool,
    refused: dict[str, str],
    wanted: Sequence[bool] = (),
) -> list[Candidate]:
    reason = triton_objection((q, k, v), (q.shape[3], v.shape[3]))
    if reason is not None:
        refused["triton"] = reason
        return []
    problem = problem_of(spec, q, k, v, training)
    configs, reasons = kernels.candidates(problem)
    for prefix, reason in reasons.items():
        refused[f"triton-{prefix}" if prefix else "triton"] = reason
    configs = _with_backward(problem, configs, refused, wanted) if training else configs
    target = torch.ops.fxopt.attention_forward.default
    seeded = spec.dropout > 0
    return [Candidate(f"triton-{c}", "triton", target, (c, training), first=True, seeded=seeded) for c in configs]


def _with_backward(
    problem: Problem, configs: tuple[str, ...], refused: dict[str, str], wanted: Sequence[bool] = ()
) -> tuple[str, ...]:
    """Every configuration of the forward with the best guess for the backward, and the first one with the second."""
    guesses, reasons = backward.candidates(problem, wanted)
    found = list(guesses)
    refused |= {f"triton-{prefix}-backward" if prefix else "triton-backward": why for prefix, why in reasons.items()}
    if not found:
        # Recomputing weights in plain PyTorch is one thing, a hundred integer operations on each of them another.
        found = [] if problem.spec.dropout else [RECOMPUTE]
    paired = [f"{config}/{best}" for best in found[:1] for config in configs]
    return tuple(paired + [f"{configs[0]}/{other}" for other in found[1:] if configs])


def problem_of(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, training: bool) -> Problem:
    """The attention ``spec`` on operands of these sizes."""
    batch, heads, rows = (hint(size) if has_hint(size) else None for size in q.shape[:3])
    kv_heads, keys = (hint(size) if has_hint(size) else None for size in k.shape[1:3])
    capability = torch.cuda.get_device_capability(q.device)
    sizes = (batch, heads, kv_heads, rows, keys)
    dynamic = not isinstance(k.shape[2], int)
    return Problem(spec, q.shape[3], v.shape[3], q.dtype, capability, *sizes, dynamic_keys=dynamic, with_lse=training)


def choose(site: Node, training: bool, lower: str, strict: bool = False) -> tuple[Candidate, Decision]:
    """The candidate to run ``site``: forced by ``lower``, or the fastest on operands of the site's sizes and strides.

    Measured decisions are kept in the cache by specification, sizes (dynamic ones rounded up to a power of two),
    strides, dtypes, device and versions; where a candidate failed, in this process alone. The decision names what
    failed, with the error, and kernels that serve such problems where the machine has what they need.
    """
    found, refused = candidates(site, training)
    if lower != "auto":
        return forced(site, found, refused, lower, strict)
    if len(found) == 1:
        why = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        return found[0], Decision((site.name,), found[0].name, f"the only one that can serve ({why})")
    others = shortfalls(refused) + _left_out(site, training, found)
    if not has_hints(site):
        return found[0], Decision((site.name,), found[0].name, f"best guess: the sizes are not known{others}")
    times = _times(site, training, found)
    by_name = {candidate.name: candidate for candidate in found}
    # The better guess where times are the same, in whatever order the cache has them.
    best = min((name for name in by_name if name in times.seconds), key=lambda name: times.seconds[name])
    reason = f"{times.source}{failures(times.failed)}{others}"
    return by_name[best], Decision((site.name,), best, reason, times.seconds)


def _times(site: Node, training: bool, found: list[Candidate]) -> Times:
    key = key_of(site, training, found)
    times = recalled(key, found)
    if times is None:
        start, failed = time.perf_counter(), dict[str, str]()
        times = Times(_measure(site, training, found, failed), failed)
        MEASUREMENT_SECONDS["total"] += time.perf_counter() - start
        keep(key, times)
    return times


def _left_out(site: Node, training: bool, found: list[Candidate]) -> str:
    """What the report says of configurations that the cost model kept from being tried, if there are any."""
    if site.target not in _ATTENTIONS or not any(c.family == "triton" for c in found):
        return ""
    q, k, v, _ = _operands(site)
    count = len(kernels.ranking(problem_of(read_spec(str(site.args[4])), q, k, v, training)).left_out)
    return f"; {count} more configurations left out by the cost model" if count else ""


def prepare(sites: Sequence[Node], training: bool, meanwhile: Sequence[Callable[[], None]] = ()) -> None:
    """Compile, all at once, the kernels that `choose` will measure for ``sites``: those of sites alike once, and none
    for a site whose times are known. Meanwhile the other candidates run for the first time: some of PyTorch's
    kernels are built then as well. Calls to make ``meanwhile`` are made after that, if there is anything to compile.
    """
    start = time.perf_counter()
    asked: dict[str, tuple[Node, list[Candidate]]] = {}
    for site in sites:
        found, _ = candidates(site, training)
        if len(found) > 1 and has_hints(site):
            asked.setdefault(key_of(site, training, found), (site, found))
    undecided = [pair for key, pair in asked.items() if recalled(key, pair[1]) is None]
    build_undecided(undecided, training, meanwhile)
    MEASUREMENT_SECONDS["total"] += time.perf_counter() - start


def build_undecided(
    undecided: Sequence[tuple[Node, list[Candidate]]],
    training: bool,
    meanwhile: Sequence[Callable[[], None]] = (),
    beside: bool = False,
) -> None:
    """Compile the kernels of all these sites and candidates at once; meanwhile run the others for the first time, and
    make the calls ``meanwhile``. ``beside`` tells that other threads run Python.
    """
    others = [(site, c) for site, found in undecided for c in found if c.family != "triton"]
    runs = [partial(_first_run, site, candidate, training) for site, candidate in others]
    build(undecided, training, [*runs, *meanwhile], beside)


def _measure(site: Node, training: bool, found: list[Candidate], failed: dict[str, str]) -> dict[str, float]:
    """Median seconds of each candidate (forward, and backward in training); what fails has its error in ``failed``."""
    real = real_operands(site, found)
    device = _flat(site)[0].device
    seconds: dict[str, float] = {}
    for candidate in found:
        best = min(seconds.values(), default=math.inf)
        try:
            run = _timed_call(candidate, site, real, training)
            with torch.set_grad_enabled(training):
                seconds[candidate.name] = median_seconds(run, device, best)
        except Exception as error:
            # The original itself may fail where its weights don't fit the memory.
            if not seconds and candidate is found[-1]:
                raise
            failed[candidate.name] = error_line(error)
    return seconds


def _first_run(site: Node, candidate: Candidate, training: bool) -> None:
    with torch.set_grad_enabled(training):
        _timed_call(candidate, site, real_operands(site, [candidate]), training)()


def real_operands(site: Node, found: Sequence[Candidate]) -> dict[Node, Tensor]:
    """Operands of the sizes, strides and dtypes that the candidates of a site read, of random contents."""
    nodes = [node for candidate in found for node in tensor_nodes(candidate.arguments)] + tensor_nodes(site.args)
    values = {node: node.meta["val"] for node in nodes}
    return {node: materialise(x, *layout(x), seed) for seed, (node, x) in enumerate(values.items())}


def _timed_call(candidate: Candidate, site: Node, real: dict[Node, Tensor], training: bool) -> Callable[[], Any]:
    """A run of the candidate, in training with the gradients of its operands and of captures that may need one."""

    def forward(operands: Mapping[Node, Tensor]) -> tuple[Tensor, ...]:
        found: Any = run_on(operands, candidate, site)
        return tuple(found) if isinstance(found, list | tuple) else (found,)

    return timed_call(forward, real, leaves_of(candidate, site) if training else ())


def run_on(operands: Mapping[Node, Tensor], candidate: Candidate, site: Node) -> Any:
    """What the candidate gives for these operands."""
    return candidate(*map_arg(_given(candidate, site), lambda node: operands[node]))


def _given(candidate: Candidate, site: Node) -> tuple[Any, ...]:
    return site.args if candidate.arguments is None else candidate.arguments


def leaves_of(candidate: Candidate, site: Node) -> list[Node]:
    """What gradients are taken of in training: operands, and captures that may need one."""
    given = _given(candidate, site)
    floating = [node for node in tensor_nodes(given) if node.meta["val"].is_floating_point()]
    return [node for node in floating if node in given or may_need_gradient(node)]


def timed_call(
    forward: Callable[[Mapping[Node, Tensor]], Sequence[Tensor]], real: Mapping[Node, Tensor], leaves: Sequence[Node]
) -> Callable[[], Any]:
    """A run of ``forward`` on ``real`` operands, with the gradients of ``leaves``, if there are any."""
    if not leaves:
        return lambda: forward(real)
    with torch.no_grad():
        cotangents = [torch.randn_like(x) for x in forward(real)]

    def forward_and_backward() -> None:
        fresh = {node: x.detach().requires_grad_(node in leaves) for node, x in real.items()}
        with torch.enable_grad():
            torch.autograd.grad(forward(fresh), [fresh[node] for node in leaves], cotangents, allow_unused=True)

    return forward_and_backward


def _operands(site: Node) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The fake operands of a site."""
    operands = (*site.args[:3], *_capture_nodes(site))
    values = [node.meta["val"] for node in operands if isinstance(node, Node)]
    return values[0], values[1], values[2], values[3:]


def _capture_nodes(site: Node) -> list[Node]:
    captures = site.args[3]
    assert isinstance(captures, list | tuple)
    return [node for node in captures if isinstance(node, Node)]


def has_hints(site: Node) -> bool:
    """Whether all sizes and strides of its operands are known or were seen."""
    return all(has_hint(size) for x in _flat(site) for size in (*x.shape, *x.stride()))


def _flat(site: Node) -> list[Tensor]:
    return [node.meta["val"] for node in tensor_nodes(site.args)]


def tensor_nodes(arguments: Any) -> list[Node]:
    """The nodes among ``arguments``, those in lists too, in order."""
    nodes: list[Node] = []
    map_arg(arguments, nodes.append)
    return nodes


def key_of(site: Node, training: bool, found: Sequence[Candidate]) -> str:
    """What the times of the candidates of a site depend on."""
    operands = [
        f"{x.dtype}{[bucket(n) for n in x.shape]}{[hint(n) if isinstance(n, int) else '*' for n in x.stride()]}"
        for x in _flat(site)
    ]
    mode = ("training, as one" if any(c.target is PACKED for c in found) else "training") if training else "inference"
    names = [candidate.name for candidate in found]
    constants = [str(value) for value in site.args if isinstance(value, str)]
    return "\n".join([str(site.target), *constants, *operands, mode, *names, fingerprint(_flat(site)[0].device)])
