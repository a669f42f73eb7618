"""Blocks of keys that no row needs, told from captured vectors when the kernel runs: padding, documents, lengths.

A small kernel before the main one writes, for each batch element (and block of query rows, where rows differ), the hull
of the keys that can possibly be kept: the first one, and one past the last. The main kernel's loops begin and end
there; blocks in between are computed as ever, but for those that a list leaves out
(`fxopt.codegen.attention.portable.hull_lists`). Nothing is read back by the host, so the vectors may change between
calls and between replays of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention.captured import CapturedTensor, captured_tensors
from fxopt.codegen.attention.portable.hull_lists import HullLists
from fxopt.codegen.attention.portable.possible_text import PossibleText, power_of
from fxopt.codegen.attention.possible import Possible
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import AttentionSpec

#: Keys that one step of the small kernel looks at.
_STEP: Final = 1024
#: Fewer blocks of keys than this are not worth a kernel that may save some.
_FEWEST_BLOCKS: Final = 4
_KERNEL: Final = '''
@triton.jit(do_not_specialize=$unspecialized)
def hull_kernel(
    $parameters
):
    """The hull of the keys that $whose can possibly keep: the first one, and one past the last.

    $maths
    """
    $early
    $place
    b_wide = b.to(tl.int64)
    $rows
    begin = tl.full([1, STEP], Sk, tl.int32)
    end = tl.full([1, STEP], 0, tl.int32)
    $sure_begin
    $list_begin
    for start in range(0, Sk, STEP):
        j = (start + tl.arange(0, STEP))[None, :]
        $keys
        possible = (j < Sk) & ($condition)
        begin = tl.minimum(begin, tl.where(possible, j, Sk))
        end = tl.maximum(end, tl.where(possible, j + 1, 0))
        $sure_first
        $list_blocks
    hull = $hull
    tl.store(hull, tl.min(begin))
    tl.store(hull + 1, tl.max(end))
    $sure_run
    $list_count

'''
#: The first run of keys that all rows keep: where it begins, and one past its end.
_SURE_FIRST: Final = "sure = tl.minimum(sure, tl.where((j < Sk) & ({condition}), j, Sk))"
_SURE_RUN: Final = """\
first_sure = tl.min(sure)
end = tl.full([1, STEP], Sk, tl.int32)
for start in range(0, Sk, STEP):
    j = (start + tl.arange(0, STEP))[None, :]
    {keys}
    beyond = (j > first_sure) & ~({condition})
    end = tl.minimum(end, tl.where(beyond, j, Sk))
tl.store(hull + 2, first_sure)
tl.store(hull + 3, {end})"""
#: Where a row keeps nothing, the run that others keep is told by a number below zero.
_PARTLY: Final = "tl.where({0}, tl.min(end), ~tl.min(end))"
_EARLY: Final = """\
if EARLY:
    # What follows may be launched now; it waits for the hulls.
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )"""
_PLACE: Final = """\
blocks = tl.cdiv(Sq, BLOCK_M)
b = tl.program_id(0) // blocks
first = tl.program_id(0) % blocks * BLOCK_M
i = tl.minimum(first + tl.arange(0, BLOCK_M), Sq - 1)[:, None]"""
_LIMITS: Final = """\
hull_start, hull_stop = 0, Sk
if HULL:
    $address
    hull_start = tl.load(hull) // BLOCK_N * BLOCK_N
    hull_stop = tl.cdiv(tl.load(hull + 1), BLOCK_N) * BLOCK_N"""
_SURE_LIMITS: Final = """
sure_start, sure_stop = Sk, 0
if HULL:
    sure_start = tl.cdiv(tl.load(hull + 2), BLOCK_N) * BLOCK_N
    sure_stop = tl.load(hull + 3) // BLOCK_N * BLOCK_N"""
_ALLOCATE: Final = """\
# Short rows of keys are not worth a kernel that finds out which blocks are needed.
hulled = keys >= {fewest}
hulls = {count}
hull = torch.empty((hulls, {numbers}) if hulled else (0,), dtype=torch.int32, device=q.device)"""
_LAUNCH: Final = """\
if hulled:
    hull_kernel[(hulls,)](
        $arguments
    )
"""


@dataclass(frozen=True, slots=True)
class Hull:
    """The text around one condition on keys, for blocks of ``block_m`` rows and ``block_n`` keys.

    ``ordered`` leaves room for the order of the hulls before them: there a tile is told where its limits are. With
    ``early`` the kernel behind the small one may be launched while that runs; it must wait for the hulls (sm_90 and
    later). Fewer than ``fewest`` blocks of keys are not worth the small kernel. A ``listed`` hull has a list of the
    blocks within it that some row may keep (`fxopt.codegen.attention.portable.hull_lists`).
    """

    spec: AttentionSpec
    possible: Possible
    block_m: int
    block_n: int
    ordered: bool = False
    early: bool = False
    fewest: int = _FEWEST_BLOCKS
    listed: bool = False

    @property
    def kernel(self) -> str:
        """The small kernel."""
        lists = ("hull_lists_ptr",) if self.listed else ()
        parameters = (*self._pointers, "hull_ptr", *lists, *self._strides, *self._sizes, *self._constants)
        holes = {
            "unspecialized": "[" + ", ".join(f'"{name}"' for name in self._sizes) + "]",
            "parameters": listing(parameters, annotate=True),
            "early": _EARLY if self.early else "",
            "whose": "a block of query rows" if self.by_rows else "any row of a batch element",
            "maths": self._text.maths,
            "place": self._place if self.by_rows else "b = tl.program_id(0)",
            "rows": "\n".join((*(c.base for c in self._read if not c.in_loop), *self._text.extremes)),
            "keys": self._keys,
            "condition": self._text.emit(self.possible.condition),
            "hull": self._address("tl.program_id(0)"),
            **self._sure,
            **({"list_begin": "", "list_blocks": "", "list_count": ""} if self.lists is None else self.lists.holes),
        }
        return fill(_KERNEL, holes)

    @property
    def _place(self) -> str:
        power = power_of(self.block_m)
        if power == self.block_m:
            return _PLACE
        return _PLACE.replace("arange(0, BLOCK_M), Sq", f"arange(0, {power}), tl.minimum(first + BLOCK_M, Sq)")

    @property
    def _keys(self) -> str:
        return "\n".join(c.load_keys for c in self._read if c.in_loop)

    @property
    def numbers(self) -> int:
        """How many numbers there are to a hull."""
        return self.own + self.further

    @property
    def own(self) -> int:
        """How many of them are its own: its limits, those of the keys that all rows keep, the length of its list.

        They are a power of two, as ranges must be.
        """
        return self._count * (2 if self.listed else 1)

    @property
    def _count(self) -> int:
        """How many stand before the length of its list."""
        return 2 if self.possible.sure is None else 4

    @property
    def further(self) -> int:
        """How many stand before them: how many hulls have keys, which one comes here in the order, its limits."""
        return (2 + self.own) * self.ordered

    @property
    def _sure(self) -> dict[str, str]:
        """The holes of what finds the keys that all rows keep."""
        if self.possible.sure is None:
            return {"sure_begin": "", "sure_first": "", "sure_run": ""}
        condition, whole = self._text.emit(self.possible.sure), self.possible.whole
        end = "tl.min(end)" if whole is None else _PARTLY.format(self._text.emit(whole))
        return {
            "sure_begin": "sure = tl.full([1, STEP], Sk, tl.int32)",
            "sure_first": _SURE_FIRST.format(condition=condition),
            "sure_run": _SURE_RUN.format(keys=self._keys.replace("\n", "\n    "), condition=condition, end=end),
        }

    @property
    def lists(self) -> HullLists | None:
        """The list of each of them."""
        return HullLists(self.spec, self.possible, self._count, self.block_n) if self.listed else None

    def _address(self, hull: str) -> str:
        return f"hull_ptr + {self.numbers} * {hull}{f' + {self.further}' * self.ordered}"

    @property
    def limits(self) -> str:
        """The lines of the main kernel that read the hull, in whole blocks."""
        address = self._address("(b * blocks + first // BLOCK_M)" if self.by_rows else "b")
        limits = fill(_LIMITS, {"address": "" if self.ordered else f"hull = {address}"}).rstrip("\n")
        return limits + (_SURE_LIMITS if self.possible.sure is not None else "")

    @property
    def allocate(self) -> str:
        """The launcher's lines that allocate the hulls."""
        count = f"batch * -(-rows // {self.block_m})" if self.by_rows else "batch"
        text = _ALLOCATE.format(fewest=self.fewest * self.block_n, count=count, numbers=self.numbers)
        return text if self.lists is None else f"{text}\n{self.lists.allocate}"

    @property
    def launch(self) -> str:
        """The launcher's lines that run the small kernel."""
        strides = [value for c in self._read for value in c.stride_values]
        periods = [f"{c.name}.shape[0]" for c in self._read if c.period]
        sizes = ("rows", "keys") if self.by_rows else ("keys",)
        values = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "STEP": _STEP, "EARLY": "q.is_cuda"}
        constants = (f"{name}={values[name]}" for name in self._constants)
        tensors = (*(c.name for c in self._read), "hull", *(("hull_lists",) if self.listed else ()))
        holes = {"arguments": listing((*tensors, *strides, *sizes, *periods, *constants))}
        return fill(_LAUNCH, holes).rstrip("\n")

    @property
    def by_rows(self) -> bool:
        """Whether blocks of rows of one batch element differ."""
        return bool(self.possible.rows)

    @property
    def _read(self) -> tuple[CapturedTensor, ...]:
        return tuple(c for c in captured_tensors(self.spec) if self.possible.reads(c.index))

    @property
    def _pointers(self) -> Iterable[str]:
        return (f"{c.name}_ptr" for c in self._read)

    @property
    def _strides(self) -> Iterable[str]:
        return (name for c in self._read for name in c.strides)

    @property
    def _sizes(self) -> tuple[str, ...]:
        sizes = ("Sq", "Sk") if self.by_rows else ("Sk",)
        return (*sizes, *(name for c in self._read for name in c.period))

    @property
    def _constants(self) -> Iterable[str]:
        found = {"BLOCK_M": self.by_rows, "BLOCK_N": self.listed, "STEP": True, "EARLY": self.early}
        return (name for name, wanted in found.items() if wanted)

    @property
    def _text(self) -> PossibleText:
        return PossibleText(self.spec, self.possible)
