"""The host side of generated linear attention, and the script that checks and times it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from fxopt.codegen.linear_attention import template_launch as template
from fxopt.codegen.linear_attention.kernels_text import KernelText, text
from fxopt.codegen.template import fill

if TYPE_CHECKING:
    from fxopt.codegen.linear_attention.source import LinearText

_LIKE: Final = {
    "bhsd": "return torch.empty((batch, heads, tokens, channels), dtype=dtype, device=x.device)",
    "bshd": "return torch.empty((batch, tokens, heads, channels), dtype=dtype, device=x.device).transpose(1, 2)",
}
_AXES: Final = {
    **dict.fromkeys(("q", "k"), "bhnd"), **dict.fromkeys(("v", "g", "o"), "bhne"), "positions": "hnd", "keep": "bn",
    "weight": "eyx", "bias": "e",
}  # fmt: skip
#: How many loads are under way: they don't run ahead. Triton 3.6 let them overwrite, in a buffer of one block, what
#: other warps had yet to read (gradients of the values, eight warps, on an H100).
_STAGES: Final = 1
_NOTHING: Final = "torch.empty(0, dtype=q.dtype, device=q.device)"


@dataclass(frozen=True)
class HostText:
    """The text of ``launch``, ``launch_backward`` and the script."""

    holes: Mapping[str, str]
    blocks: Mapping[str, tuple[int, ...]]
    kernels: Mapping[str, KernelText]
    of: LinearText

    def __str__(self) -> str:
        holes = {**self.holes, **self._optional, **self._forward, **self._backward, **self._script}
        return fill(template.LAUNCH, holes) + fill(template.MAIN, holes)

    @property
    def _optional(self) -> dict[str, str]:
        operands = self.of.operands
        names = [
            *(("positions",) if operands.positions else ()),
            *(("keep",) if operands.keep else ()),
            *operands.local,
        ]
        given = ", ".join(name for name in names if name != "keep")
        zeros = [f"torch.zeros_like({name})" for name in names if name != "keep"]
        return {
            "optional": "\n".join(f"{name}: torch.Tensor," for name in names),
            "gradients": ", " + given if given else "",
            "zeros": f" + [{', '.join(zeros)}]" if zeros else "",
            "like": _LIKE[self.of.spec.out_layout],
            "precision": '"ieee" if torch.backends.cuda.matmul.fp32_precision != "tf32" else "tf32"'
            if self.of.dtype is torch.float32
            # TF32 keeps as many bits of a sum as a result of float16 has, which is too few where sums cancel.
            else '"tf32x3"'
            if self.of.dtype is torch.float16
            else '"tf32"',
        }

    @property
    def _cut(self) -> int:
        """What the parts of a sequence are made of: whole blocks of every kernel that goes over one."""
        return max(block for block, *_ in self.blocks.values())

    @property
    def _forward(self) -> dict[str, str]:
        block, _, _, columns, _ = self.blocks["forward"]
        causal, quadratic = self.of.spec.causal, self.of.is_quadratic
        state = {"parts": "parts" if causal else "state_parts", "name": "keys"}
        cut = f"parts_of(Sk, batch * heads, {self._cut})"
        parts = "state_parts, state_length = " + ("parts, part_length" if causal else cut)
        values = {"SPLIT": f"{state['parts']} > 1", "SAVE": "with_sums", "r": "out", "o": "saved"}
        return {
            "block": str(block),
            "slots": self.of.places("forward", "Sq"),
            "group": str(self.of.config.group),
            "columns": str(columns),
            "fits": text(template.FITS, {"block": str(block)}) if quadratic else "",
            "attended": f"like(q, {self.of.value_dim}, q.dtype) if with_sums else {_NOTHING}"
            if self.of.operands.taps
            else _NOTHING,
            "cut": str(self._cut),
            "saved": "saved = attended if with_sums else out" if self.of.operands.taps else "",
            "state_parts": "" if quadratic else parts,
            "state": "" if quadratic else self._state({**state, "length": "state_length"}, "Sk"),
            "forward_arguments": self._arguments("forward_kernel", values),
        }

    def _state(self, given: dict[str, str], count: str) -> str:
        """The lines that sum over the parts of a sequence, where there are several."""
        columns = str(self.blocks["by_key_channel"][3])
        name = f"{given['name']}_state_kernel"
        values = {"parts": given["parts"], "part_length": given["length"], "o": "attended"}
        arguments = self._arguments(name, values)
        new = text(template.NEW_PARTS, {**self.holes, **given})
        return text(template.STATE, {**given, "new": new, "state_columns": columns, "arguments": arguments})

    @property
    def _backward(self) -> dict[str, str]:
        causal, quadratic, operands = self.of.spec.causal, self.of.is_quadratic, self.of.operands
        block, places = self.blocks["by_key_channel"][0], self.of.places("by_value_channel", "Sk")
        cuts = [f"parts, part_length = parts_of(Sq, batch * heads, {self._cut})"]
        cuts += [
            "key_parts, key_length = parts, part_length" if causal else
            f"key_parts, key_length = parts_of(Sk, batch * heads, {self._cut})"
        ]  # fmt: skip
        value_parts = "value_parts" if operands.taps else "key_parts"
        cuts += [f"value_parts, value_length = parts_of({places}, batch * heads, {self._cut})"] * bool(operands.taps)
        keys = {"state_parts": "key_parts", "SPLIT": "key_parts > 1", "r": "dq", "o": "attended"}
        rows = {"state_parts": "parts", "SPLIT": "parts > 1", "o": "attended"}
        rows |= {"parts": "key_parts", "part_length": "key_length"}
        values = {"parts": value_parts, "part_length": value_parts.replace("parts", "length")}
        return {
            "attended_parameter": "attended: torch.Tensor,",
            "fits_backward": text(template.FITS, {"block": str(block)}) if quadratic else "",
            "backward_parts": "\n".join(cuts),
            "backward_state": "" if quadratic else self._state(
                {"name": "keys", "parts": "key_parts", "length": "key_length"}, "Sk"
            ),
            "rows_state": "" if quadratic else self._state(
                {"name": "rows", "parts": "parts", "length": "part_length"}, "Sq"
            ),
            "backward_columns": str(self.blocks["by_key_channel"][3]),
            "values_columns": str(self.blocks["by_value_channel"][3]),
            "queries_arguments": self._arguments("queries_kernel", keys),
            "keys_arguments": self._arguments("keys_kernel", {**rows, "r": "dk"}),
            "value_parts": value_parts,
            "values_arguments": self._arguments(
                "values_kernel", {**rows, **values, "r": "dv"}
            ),
            "positions_gradient": "found.append(dk.sum(0, dtype=torch.float32).to(positions.dtype))"
            if operands.positions
            else "",
            "filters": self._filters if operands.taps else "",
        }  # fmt: skip

    @property
    def _filters(self) -> str:
        columns = str(self.blocks["by_value_channel"][3])
        arguments = self._arguments("filters_kernel", {"sums": "kept"})
        return text(template.FILTERS, {**self.holes, "filters_arguments": arguments, "values_columns": columns})

    def _arguments(self, name: str, values: Mapping[str, str]) -> str:
        kernel = self.kernels[name]
        block, keys, channels, columns, warps = self.blocks[kernel.kind]
        constants = {
            "BLOCK_N": str(block), "BLOCK_D": str(keys), "BLOCK_E": str(channels), "COLUMNS": str(columns),
            "GROUP": str(self.of.config.group), "EVEN_D": str(self.of.head_dim % keys == 0),
            "EVEN_E": str(self.of.value_dim % channels == 0), "PRECISION": "PRECISION",
        }  # fmt: skip
        result_axes = "bhnd" if kernel.kind == "by_key_channel" else "bhne"
        options = (f"num_warps={warps}", f"num_stages={_STAGES}")
        return kernel.arguments({**constants, **values}, {**_AXES, "r": result_axes}, options)

    @property
    def _script(self) -> dict[str, str]:
        operands, spec, width = self.of.operands, self.of.spec, self.of.value_dim
        drawn = [f"torch.randn(heads, tokens, {self.of.head_dim}, device=q.device)"] * operands.positions
        drawn += ["torch.rand(batch, tokens, device=q.device) < 0.8"] * operands.keep
        sizes = f"{width}, {operands.taps}, {operands.taps}"
        drawn += [f"torch.randn({sizes}, device=q.device)", f"torch.randn({width}, device=q.device)"] * bool(
            operands.taps
        )
        tokens = spec.first + spec.side**2 if operands.taps else 0
        short, long = (tokens, tokens) if tokens else (49, 49) if self.of.is_quadratic else (257, 2048)
        return {
            "reference_positions": "k = k + positions.double()" if operands.positions else "",
            "reference_keep": "k = k.masked_fill(~keep[:, None, :, None], 0.0)" if operands.keep else "",
            "reference_causal": "weights = weights.tril()" if spec.causal else "",
            "reference_local": text(template.REFERENCE_LOCAL, self.holes) if operands.taps else "",
            "cases": f"((2, 3, {short}), (64, 8, {long}))",
            "drawn": "\n".join(f"{each}," for each in drawn),
            "dtype": str(self.of.dtype).removeprefix("torch."),
        }
