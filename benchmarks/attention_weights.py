"""Attention whose weights are read besides its output, on one GPU: every way to have them, in the same run.

    python -m benchmarks.attention_weights [--case TEXT] [--output results.json]

bfloat16, as token pruning, graph reductions and models that return their weights read them. Eager and Inductor run what
the model says. *Apart* is the fastest kernel for the output (the first guess) and a kernel of its own, which walks the
scores twice, for each thing that is read; *walks* shares the attention's log-sum-exp with kernels that walk them once;
*one pass* writes all from the kernel that holds every key of a row. All run as CUDA graphs, and are checked first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from benchmarks.sweep import parser, sweep
from benchmarks.timing import Timing, cuda_graph, interleave
from fxopt.codegen.attention import kernels, reference
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.short import kernel as short
from fxopt.codegen.attention.weights import kernel as weights_kernel
from fxopt.codegen.attention.weights.operator import attention_weights_forward
from fxopt.codegen.attention.weights.reference import exact_weights
from fxopt.codegen.attention.weights.together import attention_and_weights_forward
from fxopt.codegen.attention.weights.wants import Want, printed, text_of_want
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import parse

_SINGLE: Final = torch.float32
_CLASS_ROW: Final = Want("weights", _SINGLE, (0, 1, 1))
_SUMS: Final = Want("column_sum", _SINGLE)
_DIAGONAL: Final = Want("diagonal", _SINGLE)
_WHOLE: Final = Want("weights", torch.bfloat16)
#: A few roundings to bfloat16 of results of the size of one, as a share of the largest.
_TOLERANCE: Final = 3e-2
Way = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """Sizes of one case, and what is read of its weights."""

    name: str
    batch: int
    heads: int
    length: int
    dim: int
    wants: tuple[Want, ...]

    @property
    def spec(self) -> AttentionSpec:
        """The attention of this case."""
        return AttentionSpec(parse(f"s * {self.dim**-0.5!r}"), out_dtype=torch.bfloat16)

    def problem(self, capability: tuple[int, int]) -> Problem:
        """The attention on operands of these sizes."""
        sizes = (self.batch, self.heads, self.heads, self.length, self.length)
        return Problem(self.spec, self.dim, self.dim, torch.bfloat16, capability, *sizes)


CASES: Final = (
    Case("ViT B128 S197 class row", 128, 12, 197, 64, (_CLASS_ROW,)),
    Case("ViT B128 S197 class row and column sums", 128, 12, 197, 64, (_CLASS_ROW, _SUMS)),
    Case("ViT B8 S197 class row and column sums", 8, 12, 197, 64, (_CLASS_ROW, _SUMS)),
    Case("ViT B128 S197 diagonal and column sums", 128, 12, 197, 64, (_DIAGONAL, _SUMS)),
    Case("ViT B64 S197 whole weights", 64, 12, 197, 64, (_WHOLE,)),
    Case("BERT B128 S128 column sums", 128, 12, 128, 64, (_SUMS,)),
    Case("ViT-384 B32 S577 class row and column sums", 32, 12, 577, 64, (_CLASS_ROW, _SUMS)),
    Case("long B2 S4096 D128 column sums", 2, 16, 4096, 128, (_SUMS,)),
    Case("long B2 S4096 D128 diagonal", 2, 16, 4096, 128, (_DIAGONAL,)),
)


def ways(case: Case, operands: Sequence[Tensor], capability: tuple[int, int]) -> dict[str, Way]:
    """Every way, by name."""
    q, k, v = operands
    spec, wants = str(case.spec), printed(case.wants)

    def eager() -> list[Tensor]:
        weights = (q @ k.transpose(-2, -1) * case.dim**-0.5).float().softmax(-1)
        return [weights.to(v.dtype) @ v, *(want.of(weights) for want in case.wants)]

    def apart(attention: str, walks: Sequence[str]) -> list[Tensor]:
        out = attention_forward(q, k, v, [], spec, attention, False)[0]
        texts = [text_of_want(spec, want, case.length) for want in case.wants]
        pairs = zip(case.wants, texts, walks, strict=True)
        return [out, *(attention_weights_forward(q[:, :, w.cut], k, [], t, w.kind, c) for w, t, c in pairs)]

    def together(config: str) -> list[Tensor]:
        out, _, *found = attention_and_weights_forward(q, k, v, [], spec, wants, config, False)
        return [out, *found]

    problem = case.problem(capability)
    attentions = kernels.candidates(problem)[0]
    walks = [str(_walks(case, want)[0]) for want in case.wants]
    found: dict[str, Way] = {"eager": eager, "inductor": torch.compile(eager)}
    found |= {f"fxopt apart {a}": lambda a=a: apart(a, walks) for a in attentions[:2]}  # type: ignore[misc]
    shared = [f"{a}|{','.join(walks)}" for a in attentions[:2]]
    found |= {f"fxopt walks {c}": lambda c=c: together(c) for c in shared}  # type: ignore[misc]
    once = short.candidates_with_weights(problem)
    return found | {f"fxopt one pass {c}": lambda c=c: together(c) for c in once}


def _walks(case: Case, want: Want) -> Sequence[object]:
    rows = case.length if want.rows is None else len(range(*want.rows))
    return weights_kernel.candidates(case.spec, case.dim, torch.bfloat16, rows)


def measure(case: Case, rounds: int, device: str = "cuda") -> dict[str, Timing]:
    """Milliseconds of every way that is right; those that are not are said."""
    torch.manual_seed(0)
    sizes = (case.batch, case.heads, case.length, case.dim)
    operands = [torch.randn(sizes, device=device, dtype=torch.bfloat16) for _ in range(3)]
    on_gpu = device == "cuda"
    capability = torch.cuda.get_device_capability() if on_gpu else (9, 0)
    with torch.no_grad():
        found = ways(case, operands, capability)
        right = {name: way for name, way in found.items() if _is_right(case, name, way, operands)}
        return interleave({n: cuda_graph(w) if on_gpu else w for n, w in right.items()}, device, rounds=rounds)


def _is_right(case: Case, name: str, way: Way, operands: Sequence[Tensor]) -> bool:
    """Whether the first sequence is what float64 gives."""
    q, k, v = (x[:1].double() for x in operands)
    weights = exact_weights(case.spec, q, k, [])
    exact = [reference.average(case.spec, weights, q, v), *(want.of(weights) for want in case.wants)]
    pairs = [(a[:1].double(), b.double()) for a, b in zip(way(), exact, strict=True)]
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    if error >= _TOLERANCE:
        print(f"  {name} is wrong: error {error:.3g}")
    return error < _TOLERANCE


def show(case: Case, timings: dict[str, Timing]) -> None:
    """Print milliseconds, and how much faster each is than the best that PyTorch has, and than the best apart."""
    print(f"\n{case.name}")
    peer = min(timing.median_ms for name, timing in timings.items() if "fxopt" not in name)
    apart = min((timing.median_ms for name, timing in timings.items() if "apart" in name), default=float("nan"))
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms):
        gains = f"{peer / timing.median_ms:6.2f}x PyTorch  {apart / timing.median_ms:5.2f}x apart"
        print(f"  {name:72} {timing.median_ms:8.4f} ms {gains}  ±{timing.spread:4.0%}", flush=True)


def main() -> None:
    """Parse the command line, run the cases, write the results."""
    options = parser(__doc__, "ViT").parse_args()
    sweep(options, CASES, lambda case: measure(case, options.rounds), show)


if __name__ == "__main__":
    main()
