"""What of a softmax attention a linear one can keep: nothing between its scores and its softmax but masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch.fx import Node

from fxopt.ir.attention import AttentionSpec, read_spec
from fxopt.ir.expression import Expr, S, call, conjuncts
from fxopt.ir.nodes import same_size, shape
from fxopt.ir.operators import overload

#: What the user may give up: terms added to the scores that are the same for all sequences, and whatever depends on
#: the sequence or hides keys.
DROPPABLE: Final = ("bias", "mask")
#: What is added to the scores of hidden keys is no more.
HIDDEN: Final = -1000.0
#: A bias that does not stay, in reports.
_BIAS: Final = "its bias"
_CAUSAL: Final = frozenset({"(j <= i)", "(i >= j)", "(j <= (i + (Sk - Sq)))", "(j <= ((Sk - Sq) + i))"})


@dataclass(frozen=True)
class KeyMask:
    """A mask of keys that an attention captures.

    Attributes:
        node: ``[B, 1, 1 or S, T]``, whose last row says which keys count: boolean, or a number that is added to scores.
        hides: whether a boolean one is true for the keys that do not count instead.
        unproved: whether numbers are known to be 0, or far below, only when the mask is there.
    """

    node: Node
    hides: bool = False
    unproved: bool = False


@dataclass(frozen=True)
class Kept:
    """What of an attention stays.

    Attributes:
        causal: whether a query reads earlier keys only.
        keys: the masks of keys; a key counts where all of them say so.
        padded: whether they hide keys, as far as the example arguments tell.
        dropped: what does not stay, for reports.
        assumed: what its mask is taken as, where only the example arguments tell.
    """

    causal: bool = False
    keys: tuple[KeyMask, ...] = ()
    padded: bool = False
    dropped: tuple[str, ...] = ()
    assumed: str = ""


@dataclass(frozen=True)
class Proof:
    """What the program of a whole model says of an attention that one module's program can't tell.

    Attributes:
        causal: whether it is causal, where its mask is that, one of keys, both or none; ``None`` for another mask.
        padded: whether there is a mask of keys.
        unread: whether nobody reads its weights.
        unproved: whether the numbers of a mask of keys, one of sequences, are known only when the mask is there.
        biased: whether a bias is given up beside its mask.
    """

    causal: bool | None = None
    padded: bool = False
    unread: bool = False
    unproved: bool = False
    biased: bool = False


def prove(site: Node, drop: tuple[str, ...]) -> Proof:
    """What the program of the whole model, to which the canonical attention ``site`` belongs, says of it."""
    kept = read_attention(site, tuple(kind for kind in drop if kind == "bias"), Proof(unread=True))
    unread = not weight_readers(site)
    if isinstance(kept, str):
        return Proof(unread=unread)
    unproved = any(mask.unproved for mask in kept.keys)
    return Proof(kept.causal, bool(kept.keys), unread, unproved, biased=_BIAS in kept.dropped)


def read_attention(site: Node, drop: tuple[str, ...], proof: Proof) -> Kept | str:
    """What of the canonical attention ``site`` a linear one keeps, or why it can't stand in its place.

    Args:
        site: of the program of one module, where a mask that the model made elsewhere is a tensor of any contents.
        drop: what may be given up.
        proof: what the program of the whole model says of the same attention.
    """
    spec, captures = read_spec(str(site.args[4])), site.args[3]
    assert isinstance(captures, list | tuple)
    objection = _objection(site, spec, proof)
    if objection:
        return objection
    masks, lost = _Masks(spec, captures, proof), []
    added, conditions = _added_terms(spec)
    keeping = [*conjuncts(spec.mask), *conditions]
    for kind, term in added:
        if masks.add(term, droppable=kind in drop):
            continue
        if kind not in drop:
            return _added_objection(kind, spec)
        lost.append(f"its {kind}")
    causal = False
    for term in keeping:
        if str(term) in _CAUSAL and same_size(shape(site.args[0])[2], shape(site.args[1])[2]):
            causal = True
        elif not masks.add(term) and "mask" in drop:
            lost.append(f"its mask {term}")
        elif not masks.holds(term):
            return f"its mask {term} is neither causal nor one of keys; drop='mask' leaves it out"
    lost += ["its dropout of weights"] if spec.dropout else []
    causal = causal or (masks.opaque > 0 and bool(proof.causal))
    assumed = ("causal" if causal else "one of keys") if masks.opaque else ""
    keys = tuple(masks.found.values())
    if "mask" not in drop and proof.biased and ((proof.causal and not causal) or (proof.padded and not keys)):
        return f"numbers are added to its scores ({spec.score}) of which none can be told to be its mask, not its bias"
    padded = len(keys) > masks.opaque or (bool(keys) and proof.padded)
    return Kept(causal, keys, padded, tuple(dict.fromkeys(lost)), assumed)


def _hiding(term: Expr) -> tuple[Expr, Expr] | None:
    """Where a term that is added to scores hides no key, if it is far below 0 elsewhere, and what it adds there."""
    if term.op != "where":
        return None
    condition, chosen, other = term.args
    if _is_hidden(other):
        return condition, chosen
    return (call("not", condition), other) if _is_hidden(chosen) else None


def _is_hidden(term: Expr) -> bool:
    return term.op == "const" and float(term.value or 0) <= HIDDEN


class _Masks:
    """The masks of keys among the terms of one specification; ``opaque`` of them are such by proof alone."""

    def __init__(self, spec: AttentionSpec, captures: Sequence[Any], proof: Proof) -> None:
        self._spec, self._captures, self._proof = spec, captures, proof
        self.found: dict[Expr, KeyMask] = {}
        self.opaque = 0

    def holds(self, term: Expr) -> bool:
        """Whether ``term`` was added."""
        return term in self.found

    def add(self, term: Expr, *, droppable: bool = False) -> bool:
        """Whether ``term`` is a mask of keys, which joins the others; unproved numbers only if not ``droppable``."""
        hides = term.op == "not"
        read = term.args[0] if hides else term
        if read.op != "capture":
            return False
        number = int(read.value or 0)
        capture = self._spec.captures[number]
        of_keys, of_sequences = capture.dims in ("b--j", "---j"), capture.dims == "b--j"
        proved = of_keys if capture.kind == "bool" else False
        opaque = not proved and self._proof.causal is not None and capture.dims[-1] == "j"
        # What holds such numbers, alone or merged with another mask, must be checked when it comes.
        opaque = opaque and not (self._proof.unproved and capture.dims[0] != "-")
        # What is given up beside a mask is none.
        opaque = opaque and not (self._proof.biased and droppable)
        unproved = not proved and not opaque and capture.kind == "float" and of_sequences and not droppable
        if term not in self.found and (proved or opaque or unproved):
            self.found[term] = KeyMask(self._captures[number], hides, unproved)
            self.opaque += opaque
        return term in self.found


def weight_readers(site: Node) -> list[Node]:
    """Who reads the weights of an attention, which a linear one does not have."""
    q, k = site.args[:2]
    assert isinstance(q, Node)
    readers = (overload("attention_weights"), overload("attention_statistics"))
    return [user for user in q.users if user.target in readers and user.args[1] is k]


def _objection(site: Node, spec: AttentionSpec, proof: Proof) -> str:
    if weight_readers(site) and not proof.unread:
        return "its weights are returned or read elsewhere, and a linear attention has none"
    wrong = any(term.reads(S) and not _is_scaled(term) for term in _terms(spec.score))
    return f"its scores are {spec.score}, not a positive multiple of q·k" if wrong else ""


def _added_objection(kind: str, spec: AttentionSpec) -> str:
    return (
        f"it has a {kind} that is added to its scores ({spec.score}), which a linear attention can't keep; "
        f"drop={kind!r} leaves it out"
    )


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


def _added_terms(spec: AttentionSpec) -> tuple[list[tuple[str, Expr]], list[Expr]]:
    """Each term that is added to the scores, besides numbers, with whether it is a ``"bias"`` or a ``"mask"``; and the
    conditions under which they hide no key.
    """
    found: list[tuple[str, Expr]] = []
    conditions: list[Expr] = []
    waiting = [term for term in _terms(spec.score) if not term.reads(S)]
    while waiting:
        term = waiting.pop(0)
        hiding = _hiding(term)
        if hiding is not None:
            conditions += conjuncts(hiding[0])
            waiting += _terms(hiding[1])
        elif term.op != "const":
            found.append((_kind(term, spec), term))
    return found, conditions


def _kind(term: Expr, spec: AttentionSpec) -> str:
    read = [spec.captures[int(node.value or 0)] for node in term.walk() if node.op == "capture"]
    of_sequence = any(capture.dims[0] != "-" for capture in read) or term.reads(Expr("symbol", value="b"))
    return "mask" if of_sequence else "bias"
