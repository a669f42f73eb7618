"""What of a softmax attention a linear one can keep: nothing between its scores and its softmax but masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch.fx import Node

from fxopt.errors import OptionError
from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.ir.expression import Expr, S, conjuncts
from fxopt.ir.nodes import same_size, shape
from fxopt.ir.operators import overload

#: What the user may give up: terms added to the scores that are the same for all sequences, and whatever depends on
#: the sequence or hides keys.
DROPPABLE: Final = ("bias", "mask")
_CAUSAL: Final = frozenset({"(j <= i)", "(i >= j)", "(j <= (i + (Sk - Sq)))", "(j <= ((Sk - Sq) + i))"})


@dataclass(frozen=True)
class Kept:
    """What of an attention stays.

    Attributes:
        causal: whether a query reads earlier keys only.
        keep: the captured tensor ``[B, 1, 1 or S, T]`` whose last row says which keys count: boolean, or a number that
            is far below 0 for those that don't.
        hides: whether ``keep`` is true for the keys that do not count instead.
        dropped: what does not stay, for reports.
        assumed: what its mask is taken as, where only the example arguments tell.
    """

    causal: bool = False
    keep: Node | None = None
    hides: bool = False
    dropped: tuple[str, ...] = ()
    assumed: str = ""


def read_drop(drop: str | tuple[str, ...]) -> tuple[str, ...]:
    """The option ``drop`` as a tuple.

    Raises:
        OptionError: it names something else.
    """
    names = (drop,) if isinstance(drop, str) else tuple(drop)
    for name in names:
        if name not in DROPPABLE:
            raise OptionError(f"drop={name!r} is not possible; what can be given up: {', '.join(DROPPABLE)}")
    return names


def read_attention(site: Node, drop: tuple[str, ...], proved: Kept | None = None) -> Kept | str:
    """What of the canonical attention ``site`` a linear one keeps, or why it can't stand in its place.

    Args:
        site: of the program of one module, where a mask that the model made elsewhere is a tensor of any contents.
        drop: what may be given up.
        proved: what the program of the whole model says of the same attention: its mask is causal, one of keys, both
            or none.
    """
    spec, captures = read_spec(str(site.args[4])), site.args[3]
    assert isinstance(captures, list | tuple)
    given = [name for name in ("mask",) if proved is not None]
    objection = _readers_objection(site) or _score_objection(spec, (*drop, *given))
    if objection:
        return objection
    opaque = [term for kind, term in _lost_terms(spec) if kind == "mask" and proved is not None]
    lost = [f"its {kind}" for kind, term in _lost_terms(spec) if term not in opaque]
    causal, keep, hides = False, None, False
    for term in conjuncts(spec.mask):
        if str(term) in _CAUSAL and same_size(shape(site.args[0])[2], shape(site.args[1])[2]):
            causal = True
        elif _is_padding(_positive(term), spec) and keep is None:
            keep, hides = captures[int(_positive(term).value or 0)], term.op == "not"
        elif term.op == "capture" and proved is not None:
            opaque.append(term)
        elif "mask" in drop:
            lost.append(f"its mask {term}")
        else:
            return f"its mask {term} is neither causal nor one of keys; drop='mask' leaves it out"
    lost += ["its dropout of weights"] if spec.dropout else []
    if opaque and proved is not None:
        causal = causal or proved.causal
        masks = [captures[int(node.value or 0)] for term in opaque for node in term.walk() if node.op == "capture"]
        keep = masks[0] if proved.keep is not None and keep is None else keep
    assumed = "" if not opaque or keep is not None else "causal" if causal else "empty"
    return Kept(causal, keep, hides, tuple(lost), assumed)  # type: ignore[arg-type]  # captures of a node are nodes


def _readers_objection(site: Node) -> str:
    """Whether somebody reads the weights, which a linear attention does not have."""
    q, k = site.args[:2]
    assert isinstance(q, Node)
    readers = (overload("attention_weights"), overload("attention_statistics"))
    read = any(user.target in readers and user.args[1] is k for user in q.users)
    return "its weights are returned or read elsewhere, and a linear attention has none" if read else ""


def _score_objection(spec: AttentionSpec, drop: tuple[str, ...]) -> str:
    for term in _terms(spec.score):
        if term.reads(S) and not _is_scaled(term):
            return f"its scores are {spec.score}, not a positive multiple of q·k"
    for name, _ in _lost_terms(spec):
        if name not in drop:
            what = "a bias that is added to its scores" if name == "bias" else "a mask that is added to its scores"
            return f"it has {what} ({spec.score}), which a linear attention can't keep; drop={name!r} leaves it out"
    return ""


def _terms(score: Expr) -> Iterator[Expr]:
    if score.op == "add":
        yield from _terms(score.args[0])
        yield from _terms(score.args[1])
    elif score.op == "float":
        yield from _terms(score.args[0])
    else:
        yield score


def _is_scaled(term: Expr) -> bool:
    """Whether it is the product ``q·k``, or that times a positive number."""
    if term == S:
        return True
    if term.op not in ("mul", "div"):
        return False
    numbers = [arg for arg in term.args if arg.op == "const" and float(arg.value or 0) > 0]
    scores = [arg for arg in term.args if arg.op != "const" and _is_scaled(arg)]
    return len(numbers) == len(scores) == 1 and (term.op == "mul" or term.args[1].op == "const")


def _lost_terms(spec: AttentionSpec) -> list[tuple[str, Expr]]:
    """Each term that is added to the scores, besides numbers, and whether it is a ``"bias"`` or a ``"mask"``."""
    names = []
    for term in _terms(spec.score):
        if term.reads(S) or term.op == "const":
            continue
        read = [spec.captures[int(node.value or 0)] for node in term.walk() if node.op == "capture"]
        of_sequence = any(capture.dims[0] != "-" for capture in read) or term.reads(Expr("symbol", value="b"))
        names.append(("mask" if of_sequence else "bias", term))
    return names


def _positive(term: Expr) -> Expr:
    return term.args[0] if term.op == "not" else term


def _is_padding(term: Expr, spec: AttentionSpec) -> bool:
    if term.op != "capture":
        return False
    capture = spec.captures[int(term.value or 0)]
    return capture.kind == "bool" and capture.dims in ("b--j", "---j")
