"""From an attention specification to the source of its split kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final

import torch

from fxopt.codegen.attention.captured import CapturedTensor, captured_tensors
from fxopt.codegen.attention.frame import HEADER, REFERENCE
from fxopt.codegen.attention.portable.config import Config as Blocks
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.portable.loops import Span
from fxopt.codegen.attention.portable.source import KernelText
from fxopt.codegen.attention.portable.template import ATTEND
from fxopt.codegen.attention.portable.tiles import Tiles
from fxopt.codegen.attention.script import script_holes
from fxopt.codegen.attention.split import template
from fxopt.codegen.attention.split.config import Config, largest_tile
from fxopt.codegen.attention.split.limits import Limits
from fxopt.codegen.printing import helpers
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import AttentionSpec

_QUERY_HEAD: Final = {
    "group": "g * (heads // kv_heads) + member // Sq",
    "tile": "member // Sq * kv_heads + g",
}
#: All blocks of keys are masked: the loads take the time, and one loop keeps them in flight to the end.
_SPAN: Final = Span("from_key", "to_key", bounded=True)


@dataclass(frozen=True)
class SplitText(KernelText):
    """The portable kernel's block update within another schedule; ``split`` is the configuration."""

    split: Config
    further_bounds: ClassVar[bool] = False

    def __str__(self) -> str:
        holes = {**self._description, **self._attend, **self._limits.holes, **self._kernel, **self._launch}
        uneven = (template.TILE_AT,) if self._limits.uneven else ()
        parts = (ATTEND, template.LIMITS, *uneven, template.PARTS, template.KERNEL, template.LAUNCH)
        body = "".join(fill(part, holes) for part in parts)
        devices = "".join(f"\n{text}\n" for text in helpers(body))
        script = {**holes, **script_holes(self.spec, self.dtype, rows="rows")}
        return fill(HEADER, holes) + devices + body + fill(REFERENCE, script) + fill(template.MAIN, script)

    @cached_property
    def captures(self) -> tuple[CapturedTensor, ...]:
        """The captured tensors: copies of a band would be read once."""
        return captured_tensors(self.spec)

    @cached_property
    def _hull(self) -> None:
        """No kernel in front: limits that differ by batch shape the schedule itself."""

    @cached_property
    def _limits(self) -> Limits:
        return Limits(self.spec)

    @property
    def _block_e(self) -> int:
        """As wide as the keys' block at least: Triton 3.6.0 miscompiles masked blocks of values that are narrower."""
        return max(padded(self.head_dim), padded(self.value_dim))

    @property
    def _e_inside(self) -> str:
        return f"e[None, :] < {self.value_dim}" if self.value_dim != self._block_e else ""

    @cached_property
    def _tiles(self) -> Tiles:
        return Tiles(False, self._inside("d[:, None]", self.head_dim), self._e_inside)

    @property
    def _legend(self) -> str:
        return f"{self.split} (keys, warps, stages, programs per multiprocessor)"

    @property
    def _batches(self) -> tuple[str, ...]:
        return ("BATCHES",) if self._limits.uneven else ()

    @property
    def _kernel(self) -> dict[str, str]:
        """The holes of the kernel around the block update."""
        uneven = self._limits.uneven
        inside = "inside[:, None]"
        out_mask = f"{inside} & ({self._e_inside})" if self._e_inside else inside
        constants = dict.fromkeys(("BLOCK_M", *self._constants, "BLOCK_D", "BLOCK_E", "WIDE", "WITH_LSE"))
        sizes = ("batch", "heads", "kv_heads", "Sq", "Sk", *(p for c in self.captures for p in c.period))
        pointers = (*self._pointers, "scratch_ptr", "counter_ptr")
        parameters = (*pointers, *self._strides, *sizes, *constants, *self._batches)
        find = "tile_at({}, batches, counts, ends, tiles)"
        return {
            **super()._kernel,
            "unspecialized": "[" + ", ".join(f'"{name}"' for name in sizes) + "]",
            "kernel_parameters": listing(parameters, annotate=True),
            "schedule": self._limited(template.UNEVEN_SCHEDULE if uneven else template.EVEN_SCHEDULE),
            "place": self._limited(template.UNEVEN_PLACE if uneven else template.EVEN_PLACE),
            "first_tile": find.format("begin") if uneven else "begin // blocks",
            "stop_tile": f"{find.format('end - 1')} + 1" if uneven else "tl.cdiv(end, blocks)",
            "query_head": _QUERY_HEAD[self.spec.kv_map],
            "capture_bases": "\n".join(c.gathered_base for c in self.captures),
            "loop": self._loop(_SPAN),
            "out_mask": out_mask,
        }

    def _limited(self, text: str) -> str:
        return fill(text, self._limits.holes).rstrip("\n")

    @property
    def _launch(self) -> dict[str, str]:
        """The holes of the host side."""
        names = [c.name for c in self.captures]
        periods = [f"{c.name}.shape[0]" for c in self.captures if c.period]
        blocks = (f"BLOCK_N={self.split.block_n}", f"BLOCK_D={padded(self.head_dim)}", f"BLOCK_E={self._block_e}")
        switches = ('PRECISION="ieee" if exact else "tf32"', "FAST_TANH=fast", "EVEN=False", "WIDE=wide")
        batches = tuple(f"{name}=triton.next_power_of_2(max(batch, 16))" for name in self._batches)
        sizes = ("batch", "heads", "kv_heads", "rows", "keys", *periods)
        tensors = ("q", "k", "v", *names, "out", "lse", "scratch", "counter")
        constants = ("BLOCK_M=block_m", *blocks, *switches, "WITH_LSE=with_lse", *batches)
        arguments = (*tensors, *self._stride_values, *sizes, *constants, *self._options)
        many = f"{self.split.programs} * " if self.split.programs > 1 else ""
        return {
            **super()._launch,
            "programs": f"{many}multiprocessors(q.device)",
            "largest_tile": str(largest_tile(self.head_dim, self.value_dim)),
            "block_n": str(self.split.block_n),
            "block_e": str(self._block_e),
            "launch_arguments": listing(arguments),
        }

    @property
    def _reaches(self) -> list[tuple[int, str]]:
        keys = self.split.block_n
        tiles = [(keys, "k.stride(2)"), (padded(self.head_dim), "k.stride(3)")]
        tiles += [(keys, "v.stride(2)"), (self._block_e, "v.stride(3)"), (padded(self.head_dim), "q.stride(3)")]
        return tiles + [reach for c in self.captures for reach in c.reaches(0, keys) if reach[0]]


def text_of(spec: AttentionSpec, head_dim: int, value_dim: int, dtype: torch.dtype, config: Config) -> str:
    """The source of the module for one specification, pair of head dimensions, input dtype and configuration."""
    blocks = Blocks(16, config.block_n, config.num_warps, config.num_stages)
    return str(SplitText(spec, head_dim, value_dim, dtype, blocks, config))
