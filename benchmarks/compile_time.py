"""What compiling costs of fxopt's own: everything but the base compiler, and building and measuring candidates.

    python -m benchmarks.compile_time [--models swin llama] [--device cpu] [--base eager] [--clock cpu]

*cold* is the first compilation in a process whose cache is empty, *warm* the same with the cache that the cold one left
(a new process of a user), *again* one in a process that has compiled before. Each is the least of several runs, in
seconds: a busy machine only adds. With ``--clock cpu`` they are seconds of the processor, for a machine that others
use: waiting does not count. The parts are those of *again*: capture (the retrace of Dynamo's graph), passes (with their
verification) and the rest (copies, lowering). `--goal` makes a warm start that takes longer a failure.

Whole first calls are compared too, from ``torch.compile`` to the first results: those of fxopt, kernels built and
measured, with those of the base compiler alone (``--base inductor`` is what users have), each with caches of its own,
which are empty for *cold* (Triton's and Inductor's too) and left by a process before for *warm*. What is not fxopt's
own is said for each kind: seconds of the base compiler, seconds of building and measuring kernels, and what became of
the graphs in Inductor's caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.model_cases import CASES as MODELS
from benchmarks.model_cases import Case
from benchmarks.progress import Progress

_ENCODER: Final = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 12, "intermediate_size": 768}
_DECODER: Final = {
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 12, "head_dim": 32,
    "intermediate_size": 512, "vocab_size": 1000, "use_cache": False,
}  # fmt: skip
#: As deep as the models that people have; narrow, since neither width nor length costs time here.
_DEEP: Final[dict[str, Mapping[str, object]]] = {
    "bert-sdpa": {**_ENCODER, "vocab_size": 1000},
    "bert-eager": {**_ENCODER, "vocab_size": 1000},
    "t5": {"d_model": 192, "d_ff": 768, "num_heads": 3, "num_layers": 12, "vocab_size": 1000},
    "vit": _ENCODER,
    "swin": {},
    "llama": _DECODER,
    "gemma2": {**_DECODER, "sliding_window": 64},
}
CASES: Final = {
    name: replace(MODELS[name], settings={**MODELS[name].settings, **settings}, timm_settings={}, batch=2)
    for name, settings in _DEEP.items()
}
_PARTS: Final = ("capture", "passes")
_OTHERS: Final = ("inductor", "measurement")
_KINDS: Final = ("cold", "warm")
#: The variables that name the folders of all caches of compiled code.
_CACHES: Final = ("FXOPT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass
class Compilation:
    """Seconds of one compilation: of fxopt's own, parts of that, and of the whole first call.

    ``others`` has those of the whole that are not its own: of the base compiler, and of building and measuring kernels.
    ``cached`` says what became of the graphs in Inductor's caches, such as ``1 hit``.
    """

    own: float
    parts: dict[str, float]
    first_call: float
    others: dict[str, float]
    cached: str

    def __str__(self) -> str:
        others = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.others.items())
        return f"{self.own:.3f} s ({others}{self.cached and f'; Inductor has cached: {self.cached}'})"


@dataclass
class Result:
    """The least of all runs of one model.

    ``nodes`` counts those of the captured graph; ``alone`` has seconds of first calls of the base compiler alone.
    """

    model: str
    source: str
    nodes: int = 0
    cold: list[Compilation] = field(default_factory=list)
    warm: list[Compilation] = field(default_factory=list)
    again: list[Compilation] = field(default_factory=list)
    alone: dict[str, list[float]] = field(default_factory=dict)

    def best(self, kind: str) -> Compilation:
        """The fastest run of ``kind``: ``cold``, ``warm`` or ``again``."""
        runs: list[Compilation] = getattr(self, kind)
        return min(runs, key=lambda run: run.own)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark named by ``arguments`` (the command line's by default) and return the exit status."""
    options = _parser().parse_args(arguments)
    if options.worker:
        print(json.dumps(_work(CASES[options.models[0]], options)))
        return 0
    progress = Progress()
    facts = environment(options.device)
    facts["import beyond torch"] = f"{min(_import_seconds() for _ in range(options.processes)):.3f} s"
    progress.say(", ".join(f"{name} {value}" for name, value in facts.items()))
    # Not counted: who comes first waits for the disk, whatever it compiles.
    if not options.quick:
        _alone_once(CASES[options.models[0]], options, _KINDS[:1])
    results = []
    for name in options.models:
        results.append(_run(CASES[name], options, progress))
        _write(options.output, facts, results)
    Console(width=None if sys.stdout.isatty() else 120).print(_table(results))
    return int(options.goal is not None and any(result.best("warm").own > options.goal for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=CASES, default=list(CASES), metavar="MODEL", help=f"of {', '.join(CASES)}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    add("--base", default="eager", choices=("eager", "aot_eager", "inductor"), help="the base compiler; not counted")
    add("--clock", default="wall", choices=("wall", "cpu"), help="what passes, or what the process is given to compute")
    add("--processes", type=int, default=3, help="cold and warm processes of each model")
    add("--repeats", type=int, default=3, help="further compilations in each process")
    add("--quick", action="store_true", help="tiny models, for a smoke test")
    add("--goal", type=float, metavar="SECONDS", help="fail where a warm start takes longer")
    add("--output", type=Path, metavar="FILE", help="write the results as JSON, after every model")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run(case: Case, options: argparse.Namespace, progress: Progress) -> Result:
    result = Result(case.name, case.source(options.quick))
    for _ in range(options.processes):
        with tempfile.TemporaryDirectory() as cache:
            for kind in (result.cold, result.warm):
                found = _in_process(case, options, cache)
                first, *more = (Compilation(**run) for run in found["runs"])
                kind.append(first)
                result.again.extend(more)
                result.nodes = found["nodes"]
    seconds = ", ".join(f"{kind} {result.best(kind)}" for kind in ("cold", "warm", "again"))
    progress.say(f"{case.name} ({result.source}, {result.nodes} nodes): {seconds}")
    result.alone = _alone(case, options)
    both = (f"{kind} {result.best(kind).first_call:.1f} s ({min(result.alone[kind]):.1f} s)" for kind in _KINDS)
    progress.say(f"{case.name}, whole first calls ({options.base} alone): {', '.join(both)}")
    return result


def _alone(case: Case, options: argparse.Namespace) -> dict[str, list[float]]:
    """First calls of the base compiler alone, in seconds."""
    runs = [_alone_once(case, options, _KINDS) for _ in range(options.processes)]
    return {kind: [run[kind] for run in runs] for kind in _KINDS}


def _alone_once(case: Case, options: argparse.Namespace, kinds: Sequence[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        return {kind: _in_process(case, options, cache, "--alone")["first_call"] for kind in kinds}


def _in_process(case: Case, options: argparse.Namespace, cache: str, *switches: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--worker", *switches, "--models", case.name]
    command += ["--device", options.device, "--base", options.base, "--repeats", str(options.repeats)]
    command += ["--clock", options.clock]
    command += ["--quick"] if options.quick else []
    caches = {name: str(Path(cache, name.lower())) for name in _CACHES}
    done = subprocess.run(command, env={**os.environ, **caches}, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _work(case: Case, options: argparse.Namespace) -> dict[str, object]:
    if options.clock == "cpu":
        # This process does nothing but compile, and everything in it reads the time by this name.
        vars(time)["perf_counter"] = time.process_time
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = case.build(device, dtype, quick=options.quick)
    inputs = case.make_inputs(device, dtype, seed=0, quick=options.quick)
    with torch.no_grad():
        if options.alone:
            return {"first_call": _first_call(model, inputs, backend=options.base)}
        runs = []
        for _ in range(1 + options.repeats):
            runs.append(_compile(model, inputs, options.base))
            torch._dynamo.reset()
    return {"nodes": runs[-1][1], "runs": [asdict(run) for run, _ in runs]}


def _compile(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], base: str) -> tuple[Compilation, int]:
    """One compilation by a first call, and the nodes of all graphs that it captured."""
    start = time.perf_counter()
    # What the first import takes belongs to the first call.
    from fxopt.backend import COMPILE_SECONDS, collecting

    COMPILE_SECONDS.update(dict.fromkeys(COMPILE_SECONDS, 0.0))
    imports = time.perf_counter() - start
    with collecting() as (outcomes, _):
        seconds = _first_call(model, inputs, backend="fxopt", options={"strict": True, "base": base})
    first_call = imports + seconds
    others = {part: COMPILE_SECONDS[part] for part in _OTHERS}
    parts = {part: COMPILE_SECONDS[part] for part in _PARTS}
    nodes = sum(len(outcome.captured.graph.nodes) for outcome in outcomes)
    own = COMPILE_SECONDS["total"] - sum(others.values())
    return Compilation(own, parts, first_call, others, _cached()), nodes


def _cached() -> str:
    """What became of the graphs in Inductor's caches."""
    found: Mapping[str, int] = torch._dynamo.utils.counters.pop("aot_autograd", {})
    numbers = ((found.get(f"autograd_cache_{outcome}", 0), outcome) for outcome in ("hit", "miss", "bypass"))
    return ", ".join(f"{number} {outcome}" for number, outcome in numbers if number)


def _first_call(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], **settings: Any) -> float:
    """Seconds from ``torch.compile`` to the results of the first call."""
    start = time.perf_counter()
    torch.compile(model, **settings)(**inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _import_seconds() -> float:
    """Seconds that ``import fxopt`` takes where torch is imported already."""
    code = "import time, torch; start = time.perf_counter(); import fxopt; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def _write(path: Path | None, facts: Mapping[str, str], results: Sequence[Result]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": facts, "results": [asdict(r) for r in results]}, indent=1) + "\n")


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="Seconds of fxopt's own, and of whole first calls; the least of all runs")
    table.add_column("model")
    for name in ("nodes", "cold", "warm", "again", *_PARTS, "rest", "first call", "warm", "base alone", "warm"):
        table.add_column(name, justify="right")
    for result in results:
        again, parts = result.best("again"), result.best("again").parts
        seconds = [*(result.best(kind).own for kind in ("cold", "warm", "again")), *parts.values()]
        seconds += [again.own - sum(parts.values()), *(result.best(kind).first_call for kind in _KINDS)]
        seconds += [min(result.alone[kind]) for kind in _KINDS]
        table.add_row(result.model, str(result.nodes), *(f"{value:.3f}" for value in seconds))
    return table


if __name__ == "__main__":
    sys.exit(main())
