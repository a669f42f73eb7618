"""What folding the norms into the linear layers is worth: models with LayerNorm, with folded norms, without any.

    python -m benchmarks.folded_norms [--cases swin deit-s] [--quick] [--output results.json]

Each model runs with its own norms, with RepBatchNorm at the end of its training (`fxopt.prepare`, `fxopt.convert`:
the norms are in the weights), and with the norms deleted, which is the bound: no fold can be faster than no norm. All
run through Inductor and through fxopt, in turn in one process. Weights are random, those of language models scaled as
after training: norms cost the same trained.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import fxopt
from benchmarks.accuracy import Reference, compare, reference
from benchmarks.environment import environment
from benchmarks.model_cases import CASES as MODELS
from benchmarks.model_cases import Case, Inputs
from benchmarks.model_peers import PEERS, Forward, Peer, main_output
from benchmarks.progress import Progress
from benchmarks.timing import Timing, interleave
from fxopt.rewriter.progressive import exchange, progressive_modules
from fxopt.rewritten import RewrittenModule

_ERROR_LIMIT: Final = 2.5  # of a compiled model, in multiples of the eager one's own error against float64
_CALIBRATED: Final = 2  # steps in training: each moves the running statistics to those of the batch
_TINY: Final = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}

CASES: Final[dict[str, Case]] = {
    "deit-s": Case(
        name="deit-s", title="DeiT-S, 256 images", model_type="vit", inputs="images", batch=256, length=224,
        settings={"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
        quick={**_TINY, "image_size": 32, "patch_size": 8}, timm="deit_small_patch16_224",
    ),
    "deit-ti": Case(
        name="deit-ti", title="DeiT-Ti, 256 images", model_type="vit", inputs="images", batch=256, length=224,
        settings={"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
        quick={**_TINY, "image_size": 32, "patch_size": 8}, timm="deit_tiny_patch16_224",
    ),
    "swin": replace(MODELS["swin"], title="Swin-T, 64 images"),
    "swin-1": replace(MODELS["swin"], name="swin-1", title="Swin-T, 1 image, CUDA graphs", batch=1),
    "llama-350m": Case(
        name="llama-350m", title="LLaMA-350M shape, 16 x 1024 tokens", model_type="llama", inputs="tokens", batch=16,
        length=1024,
        settings={
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2736,
            "vocab_size": 32000, "use_cache": False,
        },
        quick={**_TINY, "vocab_size": 128},
    ),
}  # fmt: skip
#: The cases whose launches, one by one, would be what is timed.
_GRAPHED: Final = ("swin-1",)
#: Layers of transformers' decoders that write to the stream.
_WRITERS: Final = (".o_proj", ".down_proj")


@dataclass
class Arm:
    """One way to run a model: which norms it has and what compiles it; what came out.

    ``folded`` counts the norms of a converted model that are in its weights, and those that stay.
    """

    norms: str
    peer: str
    timing: Timing | None = None
    error: float = float("nan")
    eager_error: float = float("nan")
    reason: str = ""
    folded: Mapping[str, int] | None = None

    @property
    def name(self) -> str:
        """As tables and JSON have it."""
        return f"{self.norms}, {self.peer}"


#: A model as it runs, and the same model as plain modules, for the reference: a folded graph has its dtypes written in.
Pair = tuple[nn.Module, nn.Module]


def _own(model: nn.Module, inputs: Inputs, peer: Peer) -> Pair:
    return model, model


def _folded(model: nn.Module, inputs: Inputs, peer: Peer) -> Pair:
    student = _student(model, inputs).train()
    for _ in range(_CALIBRATED):
        student(**inputs)
        fxopt.advance(student)
    # Inductor knows PyTorch's attention, and not what fxopt makes of it.
    left_out = () if peer.backend == "fxopt" else ("fuse-sdpa", "fuse-attention")
    passes = [one for one in fxopt.passes.exact_pipeline() if one.name not in left_out]
    return fxopt.convert(student.eval(), passes=passes), student


def _deleted(model: nn.Module, inputs: Inputs, peer: Peer) -> Pair:
    student = _student(model, inputs)
    for module in progressive_modules(student).values():
        exchange(student, module, nn.Identity())
    return student, student


def _student(model: nn.Module, inputs: Inputs) -> nn.Module:
    # With α = 1, where it starts, the activations of a deep model of random weights would leave the numbers there are.
    one = fxopt.passes.RepBatchNorm(steps=0, momentum=1.0, alpha=0.0)
    return fxopt.prepare(model, (), inputs, passes=[one])


#: What becomes of the norms, by name.
NORMS: Final[Mapping[str, Callable[[nn.Module, Inputs, Peer], Pair]]] = {
    "own": _own, "folded": _folded, "deleted": _deleted,
}  # fmt: skip


def measure(case: Case, options: argparse.Namespace, progress: Progress) -> list[Arm]:
    """Build and check every arm of ``case``, then time them in turn; a failing arm loses only itself."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch._dynamo.reset()
    gc.collect()
    inputs = case.make_inputs(device, dtype, seed=0, quick=options.quick)
    arms, forwards = [], {}
    truth: dict[str, tuple[Reference, float]] = {}  # of every change of the norms, and eager's own error against it
    for norms, peer in product(options.norms, _peers(case, options)):
        with torch.no_grad():
            built = _steadied(case.build(device, dtype, quick=options.quick).eval())
            model, plain = NORMS[norms](built, inputs, peer)
            if norms not in truth:
                expected = reference(plain, inputs)
                truth[norms] = expected, compare(main_output(plain(**inputs)), expected).relative
        expected, eager_error = truth[norms]
        arm = Arm(norms, peer.name, eager_error=eager_error, folded=_folds(model))
        arms.append(arm)
        forward = _checked(arm, peer, model, inputs, expected)
        progress.say(f"{case.name}: {arm.name}: {arm.reason or f'relative error {arm.error:.2e}'} {arm.folded or ''}")
        if forward is not None:
            forwards[arm.name] = forward
    with torch.no_grad():
        candidates = {name: partial(forward, **inputs) for name, forward in forwards.items()}
        timings = interleave(candidates, device, rounds=options.rounds)
    for arm in arms:
        arm.timing = timings.get(arm.name)
    return arms


def _steadied(model: nn.Module) -> nn.Module:
    """A language model's weights scaled so that its branches add little to the stream, as they do after training.

    Token embeddings have standard deviation 1 and the N layers that write to the stream are divided by √N (GPT-2's
    initialisation). With branches as large as the stream nothing without a norm of each token is steady: gated layers
    square what is large, and 24 of them carry it out of the numbers there are.
    """
    writers = [m for name, m in model.named_modules() if name.endswith(_WRITERS) and isinstance(m, nn.Linear)]
    for writer in writers:
        writer.weight.div_(math.sqrt(len(writers)))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    return model


def _folds(model: nn.Module) -> dict[str, int] | None:
    """How many of its norms a converted model has in its weights, and how many stay."""
    if not isinstance(model, RewrittenModule):
        return None
    return {status: model.report.count("norm", status) for status in ("rewritten", "kept")}


def _peers(case: Case, options: argparse.Namespace) -> list[Peer]:
    graphed = case.name in _GRAPHED and options.device != "cpu"
    mode = {"inductor": "reduce-overhead", "fxopt": "fxopt-reduce-overhead"} if graphed else {}
    return [PEERS[mode.get(compiler, compiler)] for compiler in options.compilers]


def _checked(arm: Arm, peer: Peer, model: nn.Module, inputs: Inputs, expected: Reference) -> Forward | None:
    try:
        with torch.no_grad():
            forward = peer.compile(model, {})
            for _ in range(4):  # CUDA graphs are recorded at the second and third call
                forward(**inputs)
            arm.error = compare(main_output(forward(**inputs)), expected).relative
    except Exception as error:
        arm.reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return None
    if not arm.error <= _ERROR_LIMIT * max(arm.eager_error, torch.finfo(torch.float32).eps):
        arm.reason = f"wrong result: relative error {arm.error:.2e}, eager's {arm.eager_error:.2e}"
        return None
    return forward


def table(case: Case, arms: list[Arm]) -> Table:
    """Medians, against the model's own norms through Inductor, and against the same compiler's without norms."""
    medians = {arm.name: arm.timing.median_ms for arm in arms if arm.timing is not None}
    base = medians.get(arms[0].name)
    grid = Table(title=case.title, box=box.MARKDOWN)
    for heading in ("norms", "compiler", "median ms", "spread", "against Inductor", "of the bound"):
        grid.add_column(heading, justify="left" if heading in ("norms", "compiler") else "right")
    for arm in arms:
        if arm.timing is None:
            grid.add_row(arm.norms, arm.peer, "–", "–", "–", arm.reason)
            continue
        median, bound = arm.timing.median_ms, medians.get(f"deleted, {arm.peer}")
        against = f"{base / median:.3f}x" if base else "–"
        of_bound = f"{bound / median:.1%}" if bound else "–"
        grid.add_row(arm.norms, arm.peer, f"{median:.3f}", f"{arm.timing.spread:.1%}", against, of_bound)
    return grid


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, print a table of every model, write the results; 1 where an arm failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--norms", nargs="+", choices=list(NORMS), default=list(NORMS), help="what becomes of them")
    parser.add_argument("--compilers", nargs="+", choices=("inductor", "fxopt"), default=["inductor", "fxopt"])
    parser.add_argument("--quick", action="store_true", help="tiny models, for a smoke test")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each arm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON, after every model")
    options = parser.parse_args(arguments)
    progress, console = Progress(), Console(width=120)
    results: dict[str, Any] = {}
    failed = False
    for name in options.cases:
        arms = measure(CASES[name], options, progress)
        failed = failed or any(arm.timing is None for arm in arms)
        console.print(table(CASES[name], arms))
        results[name] = [asdict(arm) for arm in arms]
        if options.output:
            facts = {"environment": environment(options.device), "dtype": options.dtype, "results": results}
            options.output.write_text(json.dumps(facts, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
