"""Dropout of attention weights as text of generated kernels: which weights of a block stay.

What stays is told by Philox from a seed and the weight's place (`fxopt.codegen.attention.philox` says how in plain
PyTorch), so that the kernels of the backward, whose blocks are others, find the same weights without storing any.
Four weights 8 rows and 8 keys apart share one draw. In the layouts of tensor cores one thread holds all four, whichever
way round the block lies (unless warps share its rows, which small blocks on sm_80 make them do), so that nothing is
exchanged between threads.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention import philox
from fxopt.codegen.template import fill
from fxopt.ir.attention import AttentionSpec

_KEPT: Final = '''
@triton.jit
def stays(seed, b, h, row, key, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Whether each weight of a block of ROWS by KEYS from (row, key) stays: 32 random bits of its own say so.

    The bits are Philox(seed; j, i, h, b). Four weights, 8 rows and 8 keys apart, share one draw of four words.
    """
    m, n = tl.arange(0, ROWS // 2), tl.arange(0, KEYS // 2)
    i = (row + m // 8 * 16 + m % 8)[:, None]
    j = (key + n // 8 * 16 + n % 8)[None, :]
    left, right, left_below, right_below = tl.philox(seed, j.to(tl.int32), i.to(tl.int32), h, b)
    above = tl.join(left >= $lowest, right >= $lowest)
    below = tl.join(left_below >= $lowest, right_below >= $lowest)
    words = tl.reshape(tl.join(above, below), [ROWS // 16, 8, KEYS // 16, 8, 2, 2])
    return tl.reshape(tl.permute(words, [0, 5, 1, 2, 4, 3]), [ROWS, KEYS])

'''
_PARAMETERS: Final = (
    "q: torch.Tensor", "k: torch.Tensor", "v: torch.Tensor", "captures: Sequence[torch.Tensor] = ()",
)  # fmt: skip
_WITH_LSE: Final = "with_lse: bool = False"
SEED_MEANING: Final = "``seed`` is one int64 on the same device; with the same one the same weights are dropped."
_LEAVES: Final = "[x.requires_grad_(any(x is leaf for leaf in leaves)) for x in captures]"
_SIGNATURE: Final = """\
def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Sequence[torch.Tensor] = (), *, seed: torch.Tensor
) -> torch.Tensor:"""
#: The holes of the part that runs when a file is run, without dropout.
_SCRIPT: Final = {
    "philox": "",
    "draw_seed": "",
    "seeded": "",
    "reference_seed": "",
    "reference_signature": "def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, "
    "captures: Sequence[torch.Tensor] = ()) -> torch.Tensor:",
    "reference_drop": "",
    "reference_weights": "torch.softmax(x, -1)",
    "expect": "",
    "expected": "reference(q, k, v, captures)",
    "forward": f"reference(q, k, v, {_LEAVES})",
}


@dataclass(frozen=True, slots=True)
class Dropout:
    """The pieces of text that dropout adds to the kernels of ``spec``; all of them are empty where there is none."""

    spec: AttentionSpec

    def __bool__(self) -> bool:
        return self.spec.dropout > 0

    @property
    def kept(self) -> float:
        """The probability with which a weight stays."""
        return 1 - self.spec.dropout

    @property
    def function(self) -> str:
        """The device function that tells what stays."""
        return fill(_KEPT, {"lowest": str(philox.lowest_kept(self.spec.dropout))}) if self else ""

    @property
    def maths(self) -> str:
        """The line of a header that says what happens to the weights."""
        if not self:
            return ""
        drawn = f"0 with probability {self.spec.dropout!r}, as Philox(seed; j, i, h, b) tells"
        return f"    M[b,h,i,j] = {drawn}, else 1 / {self.kept!r}"

    @property
    def names(self) -> tuple[str, ...]:
        """What a block update needs to know to call the function."""
        return ("seed", "b", "h", "first", "start") if self else ()

    @property
    def blocks(self) -> tuple[str, ...]:
        """The compile-time constants that it needs."""
        return ("BLOCK_M", "BLOCK_N") if self else ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """What the kernels take besides."""
        return ("seed",) if self else ()

    @property
    def load(self) -> str:
        """The line of a kernel that reads the seed."""
        return "seed = tl.load(seed_ptr)" if self else ""

    def stay(self, by_key: bool = False) -> str:
        """The line that computes what stays of a block; ``by_key`` when keys run down, from ``first``, rows across."""
        if not self:
            return ""
        block = "tl.trans(stays(seed, b, h, start, first, BLOCK_M, BLOCK_N))"
        return f"stay = {block if by_key else 'stays(seed, b, h, first, start, BLOCK_M, BLOCK_N)'}"

    def dropped(self, name: str) -> str:
        """The elements of ``name`` that stay, 0 elsewhere."""
        return f"tl.where(stay, {name}, 0.0)" if self else name

    def drop(self, name: str) -> str:
        """The line that leaves of ``name`` only what stays."""
        return f"{name} = {self.dropped(name)}" if self else ""

    def drop_scaled(self, name: str) -> str:
        """The same, and divides the others by their probability."""
        return f"{name} = {self.dropped(self.scaled(name))}" if self else ""

    def scaled(self, name: str) -> str:
        """``name`` over the probability with which a weight stays."""
        return f"{name} * {1 / self.kept!r}" if self else name

    @property
    def launch_holes(self) -> dict[str, str]:
        """The holes of the launcher of a forward."""
        if not self:
            return {"launch_parameters": ", ".join((*_PARAMETERS, _WITH_LSE)), "seed_meaning": ""}
        lines = "".join(f"{line},\n" for line in (*_PARAMETERS, _WITH_LSE, "*", "seed: torch.Tensor"))
        return {"launch_parameters": lines.rstrip("\n"), "seed_meaning": SEED_MEANING}

    @property
    def script_holes(self) -> dict[str, str]:
        """The holes of the part of a generated file that runs when it is run."""
        return self._seeded_script if self else _SCRIPT

    @property
    def _seeded_script(self) -> dict[str, str]:
        functions = "\n\n\n".join(inspect.getsource(function).rstrip("\n") for function in philox.PRINTED)
        kept = f"kept_weights(p, seed, {philox.lowest_kept(self.spec.dropout)})"
        return {
            "philox": f"\n{functions}\n\n",
            "draw_seed": 'seed = torch.randint(2**63 - 1, (1,), device="cuda")',
            "seeded": ", seed=seed",
            "reference_seed": ", *, seed: torch.Tensor",
            "reference_signature": _SIGNATURE,
            "reference_drop": f"p = torch.softmax(x, -1)\np = p * {kept} / {self.kept!r}",
            "reference_weights": "p",
            "expect": "expected = reference(q, k, v, captures, seed=seed)",
            "expected": "expected",
            "forward": f"reference(\n            q, k, v, {_LEAVES}, seed=seed\n        )",
        }
