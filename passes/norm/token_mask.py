"""Which tokens count in statistics: the model's own mask argument, handed to the norms of one model.

A call of the model lasts as long as its forward, and what a checkpoint computes again in the backward pass belongs to
the call that it was computed in first. Autograd numbers the nodes that it makes, so a call is known by the numbers that
its forward used, and the node that asks for a computation again tells by its own number which call that was. Compiled
code can't ask; it reads `TokenMask.value`, which the backward pass sets on its way through the results of a call.
"""

from __future__ import annotations

import functools
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxopt.errors import MaskError
from fxopt.rewriter.progressive import StudentHook

#: How many calls are remembered whose graphs are gone, to tell them from what is no call of the model.
_REMEMBERED: Final = 64
#: Under this name nodes of autograd keep the mask of their call.
_KEEPS: Final = "fxopt token mask"

_LABELS: Final = "A tuple in convert's data holds positional arguments of the model: leave labels out of it"


def is_backward() -> bool:
    """Whether a backward pass runs: a forward in it computes again what was computed, and recorded, before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Held:
    """A mask, for as long as the graph of its call refers to it."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask


@dataclass
class _Call:
    """A call of the model with a mask: the nodes that it made have numbers from ``first`` up to but not ``end``, which
    is ``None`` while it runs.
    """

    held: weakref.ReferenceType[_Held]
    first: int
    end: int | None = None

    def made(self, number: int) -> bool:
        """Whether the node of this number is from this call."""
        return self.first <= number and (self.end is None or number < self.end)


@dataclass
class _Before:
    """What was before a call, to be again after it: the mask, the backward pass, and what the graph is to keep."""

    value: Tensor | None
    task: int
    held: _Held | None


@dataclass(frozen=True)
class _Again:
    """What is being computed again: in which backward pass, for which node and by which thread, from which number of
    nodes on, and with which mask. Backward passes inside of it are of the same call.
    """

    task: int
    node: int
    thread: int
    first: int
    held: _Held


@dataclass
class _Known:
    """What is known of calls outside of compiled code: those with masks, and those that run, the innermost last.

    ``task`` is the backward pass in which the innermost one began (−1: none), ``held`` its mask where it makes a graph.
    """

    calls: list[_Call] = field(default_factory=list)
    before: list[_Before] = field(default_factory=list)
    task: int = -1
    held: _Held | None = None
    again: _Again | None = None


class TokenMask:
    """The mask of the call that is running, shared by all norms of a model.

    ``value`` is ``[B, N]`` or any leading axes of what the norms read: boolean or integer, nonzero where a token
    counts; ``None`` where all do, and where no call runs. Masks live as long as the graphs of their calls; copies of
    the model don't take them along.
    """

    def __init__(self) -> None:
        _run_hooks_as_they_are()
        self.value: Tensor | None = None
        # Whether a call with a mask began in compiled code, where nodes have no numbers yet.
        self.compiled = False
        self._known = _Known()

    def __getstate__(self) -> dict[str, Any]:
        """Without the masks of calls."""
        return {"value": None, "compiled": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As new."""
        self.__init__()  # type: ignore[misc] # there is nothing to take over

    def over(self, x: Tensor) -> Tensor | None:
        """The mask as booleans ``[..., 1]`` that broadcast over ``x [..., C]``; ``None`` where all tokens count.

        Raises:
            MaskError: the mask is not one of tokens, or its axes are not the leading axes of ``x``; or a backward pass
                computes ``x`` again and it is not known for which call.
        """
        mask = self._again() if is_backward() else self.value
        if mask is None:
            return None
        if mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise MaskError(
                f"a mask of tokens is boolean or integer, nonzero where a token counts; this one is {mask.dtype}. "
                "Name another argument with mask=…, or mask=None to count all tokens"
            )
        leading = x.shape[:-1]
        if mask.dim() == 1 and len(leading) > 1 and mask.dtype != torch.bool:
            raise MaskError(
                f"{mask.dtype} {list(mask.shape)} is one number for each of {leading[0]} samples, as labels are, and "
                f"no mask of {list(leading)} tokens; a mask of whole samples is boolean. {_LABELS}"
            )
        if len(leading) == 1 and mask.numel() == leading[0]:
            mask = mask.reshape(-1)
        if leading[: mask.dim()] != mask.shape:
            raise MaskError(
                f"the mask {list(mask.shape)} does not lie over the leading axes of {list(x.shape)}; leave this norm "
                "out with select=…, or give mask=None to count all tokens"
            )
        return (mask != 0).reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))

    def check_values(self) -> None:
        """Ask what the mask holds, which takes the time of a synchronisation.

        Raises:
            MaskError: it holds negative numbers.
        """
        mask = self.value
        if mask is not None and mask.numel() and int(mask.min()) < 0:
            raise MaskError(f"the mask holds negative numbers, as labels do. {_LABELS}")

    def begin(self, mask: Tensor | None) -> None:
        """A call of the model with ``mask`` begins."""
        if torch.compiler.is_compiling():
            self.value = mask
            if mask is not None:
                self.compiled = True
            return
        known = self._known
        known.before.append(_Before(self.value, known.task, known.held))
        self.value, known.held, known.task = mask, None, torch._C._current_graph_task_id()
        if mask is not None and torch.is_grad_enabled():
            known.held = _Held(mask)
            gone, recent = known.calls[:-_REMEMBERED], known.calls[-_REMEMBERED:]
            known.calls = [call for call in gone if call.held() is not None] + recent
            known.calls.append(_Call(weakref.ref(known.held), torch._C._autograd._get_sequence_nr()))

    def end(self, result: Any) -> None:
        """The innermost call that runs ends, with ``result`` or by an error."""
        if torch.compiler.is_compiling() or not self._known.before:
            self.value = None
            return
        known, before = self._known, self._known.before.pop()
        if known.held is not None:
            own = known.held
            call = next(call for call in reversed(known.calls) if call.held() is own)
            call.end = torch._C._autograd._get_sequence_nr()
            for leaf in pytree.tree_leaves(result):
                self._lead_in(leaf, call, own)
        self.value, known.task, known.held = before.value, before.task, before.held

    def keep(self, y: Tensor) -> None:
        """Have the graph that computes ``y`` keep the mask of the call that runs."""
        if torch.compiler.is_compiling():
            return
        held = self._known.held
        if held is not None and y.grad_fn is not None and not is_backward():
            kept: Any = y.grad_fn.metadata  # typed as a method, and a dictionary
            kept[_KEEPS, id(self)] = held

    def _again(self) -> Tensor | None:
        """The mask of the call that the running backward pass computes something of again, or that runs inside it."""
        known = self._known
        if known.before and known.task == torch._C._current_graph_task_id():
            return self.value
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        inside = self._inside(number)
        if inside is not None:
            return inside.mask
        call = next((call for call in reversed(known.calls) if call.made(number)), None)
        if call is None and not self.compiled:
            if known.again is not None and known.again.task == torch._C._current_graph_task_id():
                known.again = None
            return None  # a call without a mask, or another method of the model
        held = None if call is None else call.held()
        if held is None:
            raise MaskError(
                "a checkpoint computes activations again and it is not known for which call of the model, so neither "
                "which mask of tokens they have. Let the forward return tensors in tuples, lists or dictionaries, "
                "give checkpoint use_reentrant=False, or compile the modules inside of it instead of the whole model; "
                "mask=None counts all tokens"
            )
        self._remember(number, held)
        return held.mask

    def _inside(self, number: int) -> _Held | None:
        """The mask of what is being computed again, if the node of this number was made by that: a reentrant checkpoint
        inside of another has a backward pass of its own.
        """
        again = self._known.again
        if again is None or again.task == torch._C._current_graph_task_id() or number < again.first:
            return None
        return again.held if again.thread == threading.get_ident() else None

    def _remember(self, number: int, held: _Held) -> None:
        task, before = torch._C._current_graph_task_id(), self._known.again
        if before is not None and (before.task, before.node) == (task, number):
            return
        # A checkpoint makes its node just before it computes what reads this mask.
        first = torch._C._autograd._get_sequence_nr() - 1
        self._known.again = _Again(task, number, threading.get_ident(), first, held)
        torch.autograd.Variable._execution_engine.queue_callback(self._forget)

    def _forget(self) -> None:
        """A backward pass that computed something again is over."""
        self._known.again = None

    def _lead_in(self, leaf: Any, call: _Call, held: _Held) -> None:
        """A backward pass that comes through ``leaf``, a result of ``call``, finds its mask in ``value`` from there on.

        It goes through a graph from the last node to the first, so through one call after the other.
        """
        node = leaf.grad_fn if isinstance(leaf, Tensor) else None
        if node is None or not call.made(node._sequence_nr()):
            return

        def enter(*_: Any) -> None:
            if not self._known.before:
                self.value = held.mask
                torch.autograd.Variable._execution_engine.queue_callback(self._leave)

        node.register_prehook(enter)

    def _leave(self) -> None:
        """A backward pass is over."""
        if not self._known.before:
            self.value = None


class MaskReader(StudentHook):
    """A forward pre-hook of the whole model: takes the mask out of the call's arguments."""

    def __init__(self, name: str, position: int | None, mask: TokenMask) -> None:
        self.name, self.position, self.mask = name, position, mask

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a call with the argument ``name``, or none."""
        given = kwargs.get(self.name)
        if self.position is not None and len(args) > self.position:
            given = args[self.position]
        self.mask.begin(given if isinstance(given, torch.Tensor) else None)


class MaskCloser(StudentHook):
    """A forward hook of the whole model, called after errors too: ends the call that `MaskReader` began."""

    def __init__(self, mask: TokenMask) -> None:
        self.mask = mask

    def __call__(self, model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """End the call."""
        self.mask.end(result)


@functools.cache
def _run_hooks_as_they_are() -> None:
    """Have ``torch.compile`` of a student not compile what its hooks do.

    It compiles them as functions of their own, and then nothing is known of the calls. Where a compiled model holds the
    student, they are parts of its graph as before.
    """
    from torch._dynamo import eval_frame, types

    # Both modules have these from their C part, without a word that they are for others too.
    frames: Any = types
    setter: Any = eval_frame
    skipped = frames.FrameExecStrategy(frames.FrameAction.SKIP, frames.FrameAction.SKIP)
    for hook in (MaskReader, MaskCloser):
        setter.set_code_exec_strategy(hook.__call__.__code__, skipped)
