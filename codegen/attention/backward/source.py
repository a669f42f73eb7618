"""From an attention specification to the source of its backward kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Final

import torch

from fxopt.codegen.attention.backward import empty_rows, plan, template
from fxopt.codegen.attention.backward.config import BackwardConfig
from fxopt.codegen.attention.backward.diagonals import BAND
from fxopt.codegen.attention.backward.folds import Folds
from fxopt.codegen.attention.backward.launcher import LAUNCH, MAIN, launch_holes, totals
from fxopt.codegen.attention.backward.plan import Flow, Weights
from fxopt.codegen.attention.backward.row_range import row_range_text
from fxopt.codegen.attention.dropout import Dropout
from fxopt.codegen.attention.interval import key_range
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.portable.key_lists import LISTS, KeyLists
from fxopt.codegen.attention.portable.loops import key_range_text
from fxopt.codegen.attention.portable.phases import PHASES, PhasedBand
from fxopt.codegen.attention.portable.turned import turn
from fxopt.codegen.attention.script import script_holes
from fxopt.codegen.attention.softmax import LOG2E
from fxopt.codegen.printing import emit, helpers
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import AttentionSpec

_KV_HEAD: Final = {"group": "h // GROUP", "tile": "h % kv_heads"}
_QUERY_HEAD: Final = {"group": "g * GROUP + turn", "tile": "turn * kv_heads + g"}
_KV_HEAD_MATHS: Final = {"group": "h // (H/G)", "tile": "h mod G"}
_STRIDES: Final = {
    "q": "bhid", "k": "bhjd", "v": "bhje", "out": "bhie", "dout": "bhie", "dq": "bhi", "dk": "bhj", "dv": "bhj",
}  # fmt: skip
_CONSTANTS: Final = (
    "GROUP", "BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_E", "PRECISION", "FAST_TANH", "EVEN", "WIDE", "WITH_DLSE",
)  # fmt: skip


@dataclass(frozen=True)
class BackwardText:
    """The source for one specification, pair of head dimensions, input dtype, configuration and wanted captures."""

    spec: AttentionSpec
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    config: BackwardConfig
    wanted: tuple[bool, ...]

    def __str__(self) -> str:
        holes = {**self._description, **self._folds.holes, **self._kernels}
        holes |= self._filled(holes)
        kernels = [template.PREPARE, template.FOLD_KEYS, template.DQ, template.FOLD_ROWS, template.DKDV]
        if self._weights.recounted:
            kernels.insert(0, template.RECOUNTED)
        texts = [fill(text, holes) for text in kernels]
        texts += [fill(template.TABLE, {**holes, **self._folds.table_holes(flow)}) for flow in self._tables]
        bands = [flow for flow in self.flows if flow.side == "band"]
        texts += [fill(BAND, {**holes, **self._folds.band_holes(flow, holes)}) for flow in bands]
        texts += dict.fromkeys(text for total in totals(self) for text in total.kernels)
        lists = [*(found.kernel for found in self.lists), LISTS] if self.lists else []
        texts = [self.dropout.function, PHASES if self.bands else "", *lists, *texts]
        body = "".join(texts) + fill(LAUNCH, {**holes, **launch_holes(self)})
        devices = "".join(f"\n{text}\n" for text in helpers(body))
        script = {**holes, **self._script}
        return fill(template.HEADER, holes) + devices + body + script["philox"] + fill(MAIN, script)

    @property
    def dropout(self) -> Dropout:
        """What dropout adds."""
        return Dropout(self.spec)

    @cached_property
    def flows(self) -> tuple[Flow, ...]:
        """The gradients of captured tensors that the kernels compute."""
        return plan.flows(self.spec, self.wanted)

    @property
    def bands(self) -> tuple[PhasedBand, ...]:
        """The captured bands, which the kernels read from their phases."""
        return tuple(c for c in self._folds.captures if isinstance(c, PhasedBand))

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the launcher passes for `pointers`."""
        given = {c.name: c.argument for c in self._folds.captures}
        return tuple(given.get(name, name) for name in self.pointers)

    @property
    def _tables(self) -> list[Flow]:
        return [flow for flow in self.flows if flow.side == "table"]

    @cached_property
    def _weights(self) -> Weights:
        return plan.weights(self.spec, self.dtype)

    @cached_property
    def _folds(self) -> Folds:
        d_inside, e_inside = self.inside("d", self.head_dim), self.inside("e", self.value_dim)
        # A block peeled off a loop of float32 products spills.
        peeled = self.dtype is not torch.float32
        return Folds(self.spec, self._weights, self.flows, d_inside, e_inside, peeled, self.lists)

    @cached_property
    def lists(self) -> tuple[KeyLists, KeyLists] | None:
        """The blocks of keys that blocks of rows keep, and the other way round, where the loops go through these."""
        if not self.config.listed:
            return None
        rows, keys = self.config.rows, self.config.keys
        return (
            KeyLists(self.spec, rows.block_m, rows.block_n),
            KeyLists(turn(self.spec), keys.block_n, keys.block_m, whose="row"),
        )

    @property
    def recounted(self) -> bool:
        """Whether rows of far logits are counted again."""
        return self._weights.recounted

    @property
    def spoils(self) -> bool:
        """Whether a row of NaN weights must be told to keys whose loops leave it out."""
        return self.config.listed or bool(self._folds.range.bounds)

    @property
    def averages(self) -> bool:
        """Whether rows without keys share their gradients among all values."""
        return plan.averages(self.spec)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the first kernel computes for every row."""
        return ("delta", "shift", "count") if self.recounted else ("delta",)

    @property
    def row_shape(self) -> str:
        """The shape of a tensor of `statistics`."""
        return "lse.shape"

    @property
    def _stored(self) -> str:
        """The lines that store `statistics`."""
        names = (*self.statistics[1:], self.statistics[0])
        return "\n".join(fill(template.STORED, {"statistic": name}).rstrip("\n") for name in names)

    @property
    def pointers(self) -> tuple[str, ...]:
        """The tensors that every kernel takes, by the names that the launcher gives them."""
        captures = tuple(c.name for c in self._folds.captures)
        statistics = (*self.statistics, *(("spoilt",) if self.spoils else ()))
        statistics += ("shares",) if self.averages else ()
        statistics += ("key_lists", "row_lists") if self.lists else ()
        results = ("dq", "dk", "dv", *(f"{flow.name}_grad" for flow in self.flows))
        return ("q", "k", "v", *captures, *self.dropout.tensors, "out", "lse", "dout", "dlse", *statistics, *results)

    @property
    def strides(self) -> dict[str, str]:
        """The strides that every kernel takes, and how the launcher reads them."""
        axes = {"b": 0, "h": 1, "i": 2, "j": 2, "d": 3, "e": 3}
        named = {f"{t}_stride_{a}": f"{t}.stride({axes[a]})" for t, letters in _STRIDES.items() for a in letters}
        captured = {n: v for c in self._folds.captures for n, v in zip(c.strides, c.stride_values, strict=True)}
        return named | captured

    @property
    def sizes(self) -> dict[str, str]:
        """The sizes that every kernel takes, and what the launcher calls them."""
        periods = {name: f"{c.name}.shape[0]" for c in self._folds.captures for name in c.period}
        parts = {"parts": "parts"} if any(flow.side in ("table", "band") for flow in self.flows) else {}
        return (
            {"batch": "batch", "heads": "heads", "kv_heads": "kv_heads", "Sq": "rows", "Sk": "keys"} | periods | parts
        )

    @property
    def reaches(self) -> list[tuple[int, str]]:
        """How far each axis of a block reaches: its extent and the stride, as the launcher writes it."""
        rows = max(self.config.keys.block_m, self.config.rows.block_m)
        keys = max(self.config.keys.block_n, self.config.rows.block_n)
        extents = {"i": rows, "j": keys, "d": padded(self.head_dim), "e": padded(self.value_dim)}
        tiles = [(extents[a], f"{t}.stride({2 if a in 'ij' else 3})")
                 for t, letters in _STRIDES.items() for a in letters[2:]]  # fmt: skip
        plain = [c for c in self._folds.captures if not c.capture.is_band]
        tiles += [reach for c in plain for reach in _reaches(c.axes, c.name, rows, keys)]
        return tiles + [reach for c in self.bands for reach in c.reaches(rows, keys)]

    @property
    def _description(self) -> dict[str, str]:
        spec = self.spec
        tables = " and ".join(flow.name for flow in self._tables)
        bands = " and ".join(flow.name for flow in self.flows if flow.side == "band")
        further = [f"One more for {tables}, an element for each row and key."] * bool(tables)
        further += [f"One more for {bands}, block by block along the diagonals of rows and keys."] * bool(bands)
        return {
            "version": version("fxopt"),
            "spec": "\n".join(f"    {field}" for field in str(spec).split("; ")),
            "config": str(self.config),
            "head_dim": str(self.head_dim),
            "value_dim": str(self.value_dim),
            "kv_head_maths": _KV_HEAD_MATHS[spec.kv_map],
            "score_maths": str(spec.score),
            "captures": "\n".join(c.description + self._wish(c.index) for c in self._folds.captures),
            "dropout_maths": f"\n{self.dropout.maths}" if self.dropout else "",
            "kept_maths": "M·P" if self.dropout else "P",
            "dropped_maths": ("M·" if self.dropout else "")
            + f"Σ_e dout[b,h,i,e]·v[b,{_KV_HEAD_MATHS[spec.kv_map]},j,e]",
            "kept": "" if spec.mask is None else f" with {spec.mask}",
            "tables": "\n".join(further),
        }

    def _wish(self, index: int) -> str:
        return ", whose gradient is wanted" if self.wanted[index] else ""

    @property
    def _kernels(self) -> dict[str, str]:
        """The holes of the kernels around the inner loops."""
        spec, found = self.spec, self._folds.range
        d_inside, e_inside = self._folds.d_inside, self._folds.e_inside
        factor = self._folds.slope[1]
        scaled = "({0} * " + repr(factor) + ")" if factor != 1.0 else "{0}"
        parameters = (*(f"{name}_ptr" for name in self.pointers), *self.strides, *self.sizes, *_CONSTANTS)
        also = ["Also the largest logit of rows, and how many keys share it, where lse is too coarse."] * self.recounted
        also += ["Also whether all weights of the block are finite."] * self.spoils
        also += ["Also what its rows without keys give to every dv."] * self.averages
        return {
            "unspecialized": "[" + ", ".join(f'"{name}"' for name in self.sizes) + "]",
            "kernel_parameters": listing(parameters, annotate=True),
            "also_prepared": "\n".join(also) or "Its gradient of a softmax is p·(dp − delta).",
            "kv_head": _KV_HEAD[spec.kv_map],
            "query_head": _QUERY_HEAD[spec.kv_map],
            "d_masked": f", mask={d_inside}, other=0.0" if d_inside else "",
            "e_masked": f", mask={e_inside}, other=0.0" if e_inside else "",
            "row_block": "blocks - 1 - program % blocks"
            if any(b.slope for b in key_range(spec).side("upper"))
            else "program % blocks",
            "capture_bases": "\n".join(c.base for c in self._folds.captures),
            "key_range": key_range_text(found, lambda e, names: emit(e, names, spec.capture_kinds)),
            "row_range": row_range_text(found, lambda e, names: emit(e, names, spec.capture_kinds)),
            "dq_result": scaled.format("dq"),
            "dk_result": scaled.format("dk"),
            "dq_mask": _both("rows[:, None] < Sq", d_inside),
            "dk_mask": _both("columns < Sk", d_inside),
            "dv_result": f"({self.dropout.scaled('dv')})" if self.dropout else "dv",
            "load_seed": self.dropout.load,
            "dv_mask": _both("columns < Sk", e_inside),
            "store_row_sums": "\n".join(_stored_by_row(f) for f in self.flows if f.side == "rows"),
            "store_key_sums": "\n".join(self._stored_by_key(f) for f in self.flows if f.side == "keys"),
            "prepared_rows": str(self.config.rows.block_m),
            "log2e": repr(LOG2E),
            "far": repr(self._weights.far),
            "count": self._weights.count,
            "no_count": self._weights.no_count,
            "first_key": "start_block" if found.side("lower") else "0",
        }

    def _filled(self, holes: dict[str, str]) -> dict[str, str]:
        """The holes that hold holes themselves."""
        empties = plan.empties_without_weights(self.spec)
        parts = {
            "indices": template.INDICES,
            "rows": template.ROWS,
            "load_q": template.LOAD_Q,
            "kv_bases": template.KV_BASES,
            "correction": template.CORRECTION if any(f.side == "rows" for f in self.flows) else "",
            "spoil_dv": empty_rows.SPOIL_DV if self.spoils else "",
            "share": empty_rows.SHARE if self.averages else "",
            "share_dv": empty_rows.SHARE_DV if self.averages else "",
        }
        found = {name: fill(text, holes).rstrip("\n") for name, text in parts.items()}
        found["store_statistics"] = self._stored
        empty = '{0} = tl.where({0} == float("-inf"), 0.0, {0})' if empties else ""
        found["empty_shift"], found["empty_peaks"] = empty.format("shift"), empty.format("peaks")
        load = f"{self.dropout.load}\n" if self.dropout else ""
        later = {
            "recount": load + template.RECOUNT if self.recounted else "",
            "spoil": empty_rows.SPOIL if self.spoils else "",
        }
        return found | {name: fill(text, holes | found).rstrip("\n") for name, text in later.items()}

    @staticmethod
    def _stored_by_key(flow: Flow) -> str:
        target, total = f"{flow.name}_target", f"{flow.name}_sum[:, None]"
        return f"""\
{target} = {flow.name}_grad_ptr + (b_wide * heads + h_wide) * Sk + columns
tl.store({target}, {total}.to({flow.name}_grad_ptr.dtype.element_ty), mask=columns < Sk)"""

    @property
    def _script(self) -> dict[str, str]:
        drawn = script_holes(self.spec, self.dtype)
        wanted = ", ".join(f"captures[{n}]" for n, want in enumerate(self.wanted) if want)
        return {**drawn, "wanted_captures": f", {wanted}" if wanted else ""}

    def inside(self, index: str, width: int) -> str:
        """The condition that a padded head dimension needs."""
        return f"{index}[None, :] < {width}" if width != padded(width) else ""


def _reaches(axes: tuple[str, ...], name: str, rows: int, keys: int) -> list[tuple[int, str]]:
    extents = {"i": (rows, 2), "j": (keys, 3)}
    return [(extents[a][0], f"{name}.stride({extents[a][1]})") for a in axes if a in extents]


def _stored_by_row(flow: Flow) -> str:
    name = flow.name
    pointer = f"{name}_grad_ptr"
    stored = f"tl.store({pointer} + row, {name}_sum.to({pointer}.dtype.element_ty), mask=rows < Sq)"
    if flow.sums_rows:
        stored = f"""\
{name}_target = {pointer} + (b_wide * heads + h_wide) * blocks + first // BLOCK_M
tl.store({name}_target, tl.sum(tl.where(rows < Sq, {name}_sum, 0.0), 0))"""
    # A row without keys has weights of NaN and nothing to correct.
    return f"""\
{name}_off = off * {name}_mean
{name}_sum -= tl.where({name}_off == {name}_off, {name}_off, 0.0)
{stored}"""


def _both(first: str, second: str) -> str:
    return f"({first}) & ({second})" if second else first
