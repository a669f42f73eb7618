"""Which blocks of keys a block of query rows goes through, as a list: masks with holes between the keys they keep.

Two small kernels before the main one. The first tells of each block of rows and keys whether the mask keeps nothing, a
part or all of it: by its borders (`fxopt.codegen.attention.borders`), by its keys and the extremes of its rows
(`fxopt.codegen.attention.possible`), or by all rows and keys where these don't decide. The second gathers the blocks of
keys of a block of rows,

    list = [how many are kept in part, how many whole, the former …, …, the latter backwards],

and the loops of the main kernel go through them in order. There is one list for each block of rows that the mask tells
apart: by batch element and head only where it reads them. Nothing is read back by the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Final, Literal

from fxopt.codegen.attention.borders import Decision, borders, decision
from fxopt.codegen.attention.captured import CapturedTensor, captured_tensors
from fxopt.codegen.attention.cost import Sizes, device_of
from fxopt.codegen.attention.interval import key_range
from fxopt.codegen.attention.kept import kept_blocks, listed_blocks
from fxopt.codegen.attention.portable.possible_text import PossibleText, power_of
from fxopt.codegen.attention.portable.turned import turned_device, turned_host
from fxopt.codegen.attention.possible import possible_keys
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.printing import emit
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, S, capture, conjunction, conjuncts, const

LeftOut = Literal["many", "perhaps", "few"]
#: The part of the blocks that bounds leave which lists may keep at most, to be worth a try: whole blocks of a list ask
#: no mask, which otherwise most do. And the side of the blocks in which that is counted.
_WORTH, _SIDE = 0.95, 64
#: Seconds that those kernels take beside their work, and the cycles of a multiprocessor for each row and key of a block
#: that borders don't rule out: a dozen operations, of which it does 128 in a cycle.
_LAUNCHES, _LOOKED_AT = 5e-6, 12 / 128
#: Blocks of keys that one program of the first kernel looks at, and that one step of the second gathers.
_BLOCKS, _STEP = 8, 128
_KINDS: Final = '''
@triton.jit(do_not_specialize=$unspecialized)
def ${whose}_kinds_kernel(
    $parameters
):
    """What each block of $kept keeps of some blocks of $moving: 0 for nothing, 1 for a part, 2 for all.

    $maths
    """
    blocks, others = tl.cdiv(Sq, BLOCK_M), tl.cdiv(Sk, BLOCK_N)
    program = tl.program_id(0)
    first = program % blocks * BLOCK_M
    last = tl.minimum(first + BLOCK_M, Sq) - 1
    $place
    i = tl.minimum(first + tl.arange(0, $power), last)[:, None]
    $rows
    kinds = kinds_ptr + program.to(tl.int64) * others
    begin = tl.program_id(1) * BLOCKS
    for block in range(begin, tl.minimum(begin + BLOCKS, others)):
        start = block * BLOCK_N
        $told
        tl.store(kinds + block, kind)

'''
LISTS: Final = '''
@triton.jit(do_not_specialize=["length"])
def lists_kernel(kinds_ptr, lists_ptr, length, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The list of one block: the others that are kept in part, and from the end those that are kept whole."""
    blocks = tl.cdiv(length, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    kinds = kinds_ptr + program * blocks
    listed = lists_ptr + program * (blocks + 2)
    partly, wholly = 0, 0
    for begin in range(0, blocks, STEP):
        block = begin + tl.arange(0, STEP)
        kind = tl.load(kinds + block, mask=block < blocks, other=0)
        part, whole = (kind == 1).to(tl.int32), (kind == 2).to(tl.int32)
        tl.store(listed + 1 + partly + tl.cumsum(part, 0), block * BLOCK, mask=kind == 1)
        tl.store(listed + 2 + blocks - wholly - tl.cumsum(whole, 0), block * BLOCK, mask=kind == 2)
        partly += tl.sum(part, 0)
        wholly += tl.sum(whole, 0)
    tl.store(listed, partly)
    tl.store(listed + 1, wholly)
    # What needs a block to work on takes the first one, in part, where the mask keeps none.
    tl.store(listed + 2, 0, mask=partly + wholly == 0)

'''
_TOLD: Final = """\
end = tl.minimum(start + BLOCK_N, Sk) - 1
kind = {kind}
{narrowed}if kind == 1:
    {looked}"""
#: What the keys of a block that borders leave tell of it, beside the extremes of its rows.
_NARROWED: Final = """\
if kind > 0:
    {read}
    possible = (j < Sk) & ({possible})
{sure}    kind = tl.where(tl.max(possible.to(tl.int32)) == 0, 0, kind)
"""
_READ: Final = """\
j = (start + tl.arange(0, BLOCK_N))[None, :]
{keys}"""
_SURE: Final = """\
    sure = ((j >= 0) & ({0})).to(tl.int32)
    kind = tl.where({1}, kind, 1)
"""
_LOOKED: Final = """\
$read
kept = ((j < Sk) & ($mask)).to(tl.int32)
kind = tl.max(kept) + tl.min(kept)
"""
_ADDRESS: Final = "listed = {whose}_lists_ptr + ({plane}{block}).to(tl.int64) * (tl.cdiv(Sk, BLOCK_N) + 2)"
_COUNT: Final = "partly = tl.load(listed)"
#: The loops over blocks kept in part and whole; little is held over the first one for the second.
_LOOPS: Final = {
    True: """\
for place in range(0, partly):
    start = tl.multiple_of(tl.load(listed + 2 + place), BLOCK_N)
    {update}""",
    False: """\
wholly = tl.load(listed + 1)
listed += tl.cdiv(Sk, BLOCK_N) + 1
for place in range(0, wholly):
    start = tl.multiple_of(tl.load(listed - place), BLOCK_N)
    {update}""",
}
_ALLOCATE: Final = """\
{whose}_blocks, {whose}_list_count = -(-keys // {block_n}), {count}-(-rows // {block_m})
{whose}_kinds = torch.empty(({whose}_list_count, {whose}_blocks), dtype=torch.int8, device=q.device)
{whose}_lists = torch.empty(({whose}_list_count, {whose}_blocks + 2), dtype=torch.int32, device=q.device)"""
_LAUNCH: Final = """\
{whose}_kinds_kernel[({whose}_list_count, -(-{whose}_blocks // {blocks}))](
    {arguments}
)
lists_kernel[({whose}_list_count,)]({whose}_kinds, {whose}_lists, keys, BLOCK={block_n}, STEP={step}, num_warps=1)"""
#: What is said of the lists of either kind.
_KEPT: Final = {"key": {"kept": "query rows", "moving": "keys"}, "row": {"kept": "keys ``i``", "moving": "rows ``j``"}}


def can_list(spec: AttentionSpec) -> bool:
    """Whether a list can be made of the blocks that the mask of ``spec`` keeps."""
    return spec.mask is not None and not spec.mask.reads(S)


def left_out(spec: AttentionSpec, rows: int, keys: int) -> LeftOut:
    """How many of the blocks that the bounds of a mask leave a list would leave out.

    ``perhaps`` where captured vectors tell of rows and keys: documents, tokens that all rows keep.
    """
    rest = key_range(spec, further=True).rest
    if not rest or not can_list(spec):
        return "few"
    sizes = (spec, rows, keys, _SIDE, _SIDE)
    if sum(listed_blocks(*sizes)) <= _WORTH * sum(kept_blocks(*sizes)):
        return "many"
    return "perhaps" if may_have_holes(spec) else "few"


def may_have_holes(spec: AttentionSpec) -> bool:
    """Whether captured vectors tell, of rows and keys together, which ones are kept: documents, tokens kept by all."""
    # What is captured by row and key is a mask of any kind, and most are of parts everywhere.
    rest = (
        term for term in key_range(spec, further=True).rest if not any(_is_tile(leaf, spec) for leaf in term.leaves)
    )
    return any({"i", "j", "captured"} <= reads(term, spec) for term in rest)


def _is_tile(leaf: Expr, spec: AttentionSpec) -> bool:
    return leaf.op == "capture" and spec.captures[int(leaf.value or 0)].is_tile


def seconds(problem: Problem, block_m: int, block_n: int) -> float:
    """How long the lists of a problem should take to make, for blocks of these sizes."""
    sizes, device = Sizes.of(problem), device_of(problem.capability)
    counts = {"b": sizes.batch, "h": sizes.heads}
    blocks = sum(listed_blocks(problem.spec, sizes.rows, sizes.keys, block_m, block_n))
    blocks *= prod(counts[axis] for axis in planes(problem.spec))
    return _LAUNCHES + blocks * block_m * block_n * _LOOKED_AT / device.multiprocessors / device.clock


def planes(spec: AttentionSpec) -> tuple[str, ...]:
    """Which of batch (``b``) and head (``h``) tell lists apart."""
    found = set() if spec.mask is None else reads(spec.mask, spec)
    return tuple(axis for axis in ("b", "h") if axis in found)


def reads(term: Expr, spec: AttentionSpec) -> set[str]:
    """The indices that ``term`` reads, itself or through a captured tensor, and ``"captured"`` where there is one."""
    found = {str(leaf.value) for leaf in term.leaves if leaf.op == "symbol"}
    for leaf in term.leaves:
        if leaf.op == "capture":
            axes = captured_tensors(spec)[int(leaf.value or 0)].axes
            found |= {"captured", *axes, *(("i", "j") if "d" in axes else ())}
    return found


@dataclass(frozen=True)
class KeyLists:
    """The text around the lists of blocks of ``block_n`` keys for blocks of ``block_m`` rows.

    Lists of blocks of rows (``whose="row"``) are the same of a specification with rows and keys in each other's place.
    """

    spec: AttentionSpec
    block_m: int
    block_n: int
    whose: Literal["key", "row"] = "key"

    @property
    def kernel(self) -> str:
        """The first kernel, beside `LISTS`."""
        parameters = (*self._pointers, "kinds_ptr", *self._strides, *self._sizes, "BLOCK_M", "BLOCK_N", "BLOCKS")
        holes = {
            "unspecialized": "[" + ", ".join(f'"{name}"' for name in self._sizes) + "]",
            "parameters": listing(parameters, annotate=True),
            "maths": self._maths,
            "place": self._place,
            "power": "BLOCK_M" if power_of(self.block_m) == self.block_m else str(power_of(self.block_m)),
            "rows": "\n".join((*(c.base for c in self._read if not c.in_loop), *self._extremes)),
            "told": self._told,
            "whose": self.whose,
            **_KEPT[self.whose],
        }
        return fill(_KINDS, holes)

    @property
    def limits(self) -> str:
        """The lines of the main kernel that find the list of a block of rows, and how many blocks it keeps in part."""
        text = f"{self.address('first // BLOCK_M')}\n{_COUNT}"
        return text if self.whose == "key" else turned_device(text)

    def address(self, block: str) -> str:
        """The line of the main kernel that finds the list of a ``block`` of rows."""
        planes = {(): "", ("b",): "b * blocks + ", ("h",): "h * blocks + ", ("b", "h"): "(b * heads + h) * blocks + "}
        return _ADDRESS.format(plane=planes[self._planes], whose=self.whose, block=block)

    def loop(self, update: str, bounded: bool) -> str:
        """The loop of the main kernel, with this ``update``, over the blocks kept in part (``bounded``) or whole."""
        text = _LOOPS[bounded] if self.whose == "key" else turned_device(_LOOPS[bounded])
        return text.format(update=update.replace("\n", "\n    "))

    @property
    def allocate(self) -> str:
        """The launcher's lines that allocate the lists."""
        names = {"b": "batch * ", "h": "heads * "}
        count = "".join(names[axis] for axis in self._planes)
        text = _ALLOCATE.format(whose=self.whose, count=count, block_m=self.block_m, block_n=self.block_n)
        return text if self.whose == "key" else turned_host(text)

    @property
    def launch(self) -> str:
        """The launcher's lines that run the small kernels."""
        strides = [value for c in self._read for value in c.stride_values]
        values = {"heads": "heads", "Sq": "rows", "Sk": "keys"}
        values |= {name: f"{c.name}.shape[0]" for c in self._read for name in c.period}
        constants = (f"BLOCK_M={self.block_m}", f"BLOCK_N={self.block_n}", f"BLOCKS={_BLOCKS}")
        arguments = (
            *(c.name for c in self._read),
            f"{self.whose}_kinds",
            *strides,
            *map(values.__getitem__, self._sizes),
            *constants,
        )
        text = listing(arguments).replace("\n", "\n    ")
        text = _LAUNCH.format(whose=self.whose, blocks=_BLOCKS, arguments=text, block_n=self.block_n, step=_STEP)
        return text if self.whose == "key" else turned_host(text)

    @property
    def _extremes(self) -> Iterable[str]:
        return () if self._possible is None else self._possible.extremes

    @property
    def _mask(self) -> Expr:
        assert self.spec.mask is not None
        return self.spec.mask

    @cached_property
    def _decision(self) -> Decision:
        return decision(self._mask, self.spec.captures)

    @property
    def _told(self) -> str:
        """The lines that tell the kind of a block."""
        looked = fill(_LOOKED, {"read": self._keys, "mask": self._emit(self._mask)}).rstrip("\n")
        if not self._decision.decides and self._possible is None:
            return looked
        some, every, kind = self._decision.some, self._every, "1"
        if every != const(False):
            kind = f"tl.where(({self._emit(every)}) & (start + BLOCK_N <= Sk), 2, 1)"
        if some != const(True):
            kind = f"tl.where({self._emit(some)}, {kind}, 0)"
        return _TOLD.format(kind=kind, narrowed=self._narrowed, looked=looked.replace("\n", "\n    "))

    @property
    def _narrowed(self) -> str:
        """The lines that tell more of it by its keys."""
        if self._possible is None:
            return ""
        text, sure, whole = self._possible, self._possible.possible.sure, self._possible.possible.whole
        rows = "" if whole is None else f" & ({text.emit(whole)})"
        holes = {
            "read": self._keys.replace("\n", "\n    "),
            "possible": text.emit(text.possible.condition),
            "sure": "" if sure is None else _SURE.format(text.emit(sure), f"(tl.min(sure) == 1){rows}"),
        }
        return _NARROWED.format(**holes)

    @property
    def _keys(self) -> str:
        """The lines that read what varies with the keys of a block."""
        return _READ.format(keys="\n".join(_load_keys(c) for c in self._read if c.in_loop)).rstrip("\n")

    @cached_property
    def _possible(self) -> PossibleText | None:
        """What captured vectors tell of the keys of a block, by the extremes of its rows."""
        found = possible_keys(self.spec, sure=True)
        return None if found is None else PossibleText(self.spec, found)

    @cached_property
    def _every(self) -> Expr:
        """Where borders tell that all rows keep all keys, as far as keys and extremes of rows don't tell that later."""
        if self._possible is None or self._possible.possible.sure is None:
            return self._decision.every
        rest = key_range(self.spec, further=True).rest
        bounds = conjunction(tuple(term for term in conjuncts(self._mask) if term not in rest))
        return const(True) if bounds is None else decision(bounds, self.spec.captures).every

    @property
    def _maths(self) -> str:
        told = f"Told by every row and key: {self._mask}."
        if self._possible is not None:
            text = self._possible
            told = f"{text.maths}\n{told}"
        if not self._decision.decides and self._possible is None:
            return told
        named = {leaf: Expr("symbol", value=name) for leaf, name in self._borders.items()}
        some, every = (
            found.replace(lambda node: named.get(str(node), node)) for found in (self._decision.some, self._every)
        )
        return f"Borders: some keys can be kept where {some},\nall are where {every}.\n{told}"

    @property
    def _borders(self) -> dict[str, str]:
        """The variables of the borders, by the captures that stand for them."""
        names = ("first", "last", "start", "end")
        return {str(leaf): name for leaf, name in zip(borders(len(self.spec.captures)), names, strict=True)}

    @cached_property
    def _planes(self) -> tuple[str, ...]:
        """Which of batch and head tell lists apart."""
        return planes(self.spec)

    @property
    def _place(self) -> str:
        """The lines that find batch element and head of a program."""
        found = dict.fromkeys(self._planes, "program // blocks")
        if len(found) == 2:
            found = {"b": "program // blocks // heads", "h": "program // blocks % heads"}
        lines = [f"{axis} = {text}" for axis, text in found.items()]
        wide = [f"{axis}_wide = {axis}.to(tl.int64)" for axis in found if any(axis in c.axes for c in self._read)]
        return "\n".join((*lines, *wide))

    @cached_property
    def _read(self) -> tuple[CapturedTensor, ...]:
        return tuple(c for c in captured_tensors(self.spec) if self._mask.reads(capture(c.index)))

    @property
    def _pointers(self) -> Iterable[str]:
        return (f"{c.name}_ptr" for c in self._read)

    @property
    def _strides(self) -> Iterable[str]:
        return (name for c in self._read for name in c.strides)

    @property
    def _sizes(self) -> tuple[str, ...]:
        heads = ("heads",) if self._planes == ("b", "h") else ()
        return (*heads, "Sq", "Sk", *(name for c in self._read for name in c.period))

    def _emit(self, expr: Expr) -> str:
        return emit(expr, self._borders, (*self.spec.capture_kinds, "int", "int", "int", "int"))


def _load_keys(c: CapturedTensor) -> str:
    """The line that reads what varies with the keys ``j``, and with rows; what lies beyond the last key is zero."""
    if "i" not in c.axes and not c.capture.is_band:
        return c.load_keys
    places = {"i": f"i.to(tl.int64) * {c.name}_stride_i", "j": f"j.to(tl.int64) * {c.name}_stride_j"}
    places["d"] = f"(j - i + Sq - 1).to(tl.int64) * {c.name}_stride_d"
    address = " + ".join((c.head_address(), *(places[axis] for axis in c.axes if axis in places)))
    return f"{c.name} = {c.load(address, ', mask=j < Sk, other=0')}"
