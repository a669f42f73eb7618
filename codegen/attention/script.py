"""The part of a generated file that runs when it is run: a reference in plain PyTorch, a check and a timing."""

from __future__ import annotations

from typing import Final

import torch

from fxopt.codegen.attention.dropout import Dropout
from fxopt.codegen.printing import print_torch, without_parentheses
from fxopt.ir.attention import AttentionSpec, Capture, EmptyRows

_SERVED: Final = {
    "group": "head // (q.shape[1] // k.shape[1])",
    "tile": "head % k.shape[1]",
}
_SIZE: Final = {"b": "batch", "h": "8", "i": "{rows}", "j": "length", "-": "1", "p": "2", "d": "{rows} + length - 1"}
_INDEX: Final = {
    "b": "torch.arange(q.shape[0], device=q.device)[:, None, None, None]",
    "h": "head[:, None, None]",
    "i": "torch.arange(q.shape[2], device=q.device)[:, None]",
    "j": "torch.arange(k.shape[2], device=q.device)",
    "Sq": "torch.tensor(q.shape[2], device=q.device)",
    "Sk": "torch.tensor(k.shape[2], device=q.device)",
}
#: What bands are read at, less its least value.
_DISTANCE: Final = f"distance = {_INDEX['j']} - {_INDEX['i']}"
#: What the reference returns, by what a row without keys gives.
_RESULT: Final[dict[EmptyRows, str]] = {
    "nan": "out",
    "zero": 'torch.where((x == float("-inf")).all(-1, keepdim=True), 0.0, out)',
    "uniform": 'torch.where((x == float("-inf")).all(-1, keepdim=True), v[:, served].mean(2, keepdim=True), out)',
}


def script_holes(
    spec: AttentionSpec, dtype: torch.dtype, check: int = 257, timed: tuple[int, int] = (4, 4096), rows: str = "length"
) -> dict[str, str]:
    """What the script template wants to know of ``spec``.

    The check runs on two sequences of length ``check``, the timing on ``timed``, a batch of more than two and a length;
    ``rows`` is what the script calls the number of queries.
    """
    expressions = [e for e in (spec.score, spec.mask) if e is not None]
    read = {str(n.value) for e in expressions for n in e.walk() if n.op == "symbol"}
    symbols = [f"{name} = {text}" for name, text in _INDEX.items() if name in read]
    captures = [_DISTANCE] * any(c.is_band for c in spec.captures)
    captures += [_reading(n, c) for n, c in enumerate(spec.captures)]
    mask = ""
    if spec.mask is not None:
        mask = f'kept = {print_torch(spec.mask)}\nx = torch.where(kept, x, float("-inf"))'
    drawn = [_draw(c, rows) for c in spec.captures]
    return {
        "cases": f"((2, {check}), {timed})",
        "served": _SERVED[spec.kv_map],
        "reference_symbols": "\n".join(symbols + captures),
        "reference_score": without_parentheses(print_torch(spec.score)),
        "reference_mask": mask,
        "reference_result": _RESULT[spec.empty_rows],
        "dtype": str(dtype).removeprefix("torch."),
        "main_captures": _tuple(drawn),
        **Dropout(spec).script_holes,
    }


def _tuple(drawn: list[str]) -> str:
    if len(drawn) < 2:
        return f"captures = ({drawn[0]},)" if drawn else "captures = ()"
    listed = ",\n    ".join(drawn)
    return f"captures = (\n    {listed},\n)"


def _reading(index: int, capture: Capture) -> str:
    wide = ".double()" if capture.kind == "float" else ""
    periodic = f"[torch.arange(q.shape[0], device=q.device) % captures[{index}].shape[0]]"
    read = f"c{index} = captures[{index}]{periodic if capture.dims[0] == 'p' else ''}{wide}"
    return f"{read}\nc{index} = c{index}[:, :, 0, distance + q.shape[2] - 1]" if capture.is_band else read


def _draw(capture: Capture, rows: str) -> str:
    shape = ", ".join(_SIZE[letter].format(rows=rows) for letter in capture.dims)
    if capture.kind == "bool":
        return f'torch.rand({shape}, device="cuda") < 0.8'
    if capture.kind == "int":
        return f'torch.randint(1, 100, ({shape}), device="cuda", dtype={capture.dtype})'
    return f'torch.randn({shape}, device="cuda", dtype={capture.dtype})'
