"""What a model benchmark found, as data, judged and as a table."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.accuracy import Error
from benchmarks.model_peers import PEERS
from benchmarks.timing import Timing

_ERROR_LIMIT = 4.0  # times eager's own relative error: beyond it a peer's result counts as wrong
_ERROR_LIMIT_ALONE = 0.1  # the relative error allowed where eager was not measured


@dataclass
class PeerResult:
    """What is known of one peer; ``status`` is "ok", "failed" or "skipped", and ``reason`` says why it is not ok.

    ``first_call_seconds`` contains the compilation; ``fxopt_seconds`` splits fxopt's part of it, "own" being what
    neither Inductor nor measuring candidates took. ``kernels`` are GPU kernels with their milliseconds in one call.
    """

    status: str = "ok"
    reason: str = ""
    first_call_seconds: float | None = None
    fxopt_seconds: dict[str, float] = field(default_factory=dict)
    graphs: int | None = None
    timing: Timing | None = None
    error: Error | None = None
    kernels: list[tuple[str, float]] = field(default_factory=list)

    def fail(self, error: BaseException) -> None:
        """Record ``error``, the end of its traceback included."""
        self.status = "failed"
        self.reason = "".join(traceback.format_exception(error))[-4000:]


@dataclass
class CaseResult:
    """What is known of one model.

    ``filled`` is the part of its tokens that is not padding; ``speedups`` are the best peer's median over those of
    fxopt and its modes.
    """

    model: str
    title: str
    source: str = ""
    inputs: dict[str, list[int]] = field(default_factory=dict)
    filled: float | None = None
    reference_dtype: str = ""
    best_peer: str = ""
    speedups: dict[str, float] = field(default_factory=dict)
    peers: dict[str, PeerResult] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether any peer failed."""
        return any(peer.status == "failed" for peer in self.peers.values())

    def to_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> CaseResult:
        """The inverse of ``to_json``."""
        return CaseResult(**{**data, "peers": {name: _peer(peer) for name, peer in data["peers"].items()}})


def judge(result: CaseResult) -> None:
    """Fail the peers whose output is wrong, then name the best peer, and the speed-ups of fxopt's modes over it."""
    eager = result.peers["eager"].error if "eager" in result.peers else None
    limit = _ERROR_LIMIT_ALONE if eager is None else _ERROR_LIMIT * eager.relative
    for peer in result.peers.values():
        if peer.error is not None and not peer.error.relative <= limit:
            peer.status = "failed"
            peer.reason = f"wrong result: relative error {peer.error.relative:.2e} beyond {limit:.2e}"
    medians = {
        name: peer.timing.median_ms
        for name, peer in result.peers.items()
        if peer.timing is not None and peer.status == "ok"
    }
    others = {name: median for name, median in medians.items() if PEERS[name].backend != "fxopt"}
    result.best_peer = min(others, key=others.__getitem__, default="")
    if others:
        own = (name for name in medians if name not in others)
        result.speedups = {name: others[result.best_peer] / medians[name] for name in own}


def table(results: Iterable[CaseResult]) -> Table:
    """One row a peer; "of best" is the median over the best peer's that is not fxopt, below 1 where it is faster."""
    columns = ("peer", "median ms", "spread", "of best", "first call s", "own s", "max error", "rel. error", "status")
    grid = Table("model", *columns, title="forward, interleaved medians", box=box.SIMPLE)
    for result in results:
        for name, peer in result.peers.items():
            grid.add_row(result.model, name, *_cells(result, peer))
        grid.add_section()
    return grid


def _cells(result: CaseResult, peer: PeerResult) -> tuple[str, ...]:
    best = result.peers[result.best_peer].timing if result.best_peer else None
    timing, error = peer.timing, peer.error
    return (
        f"{timing.median_ms:.3f}" if timing else "–",
        f"{timing.spread:.1%}" if timing else "–",
        f"{timing.median_ms / best.median_ms:.3f}" if timing and best else "–",
        "–" if peer.first_call_seconds is None else f"{peer.first_call_seconds:.2f}",
        f"{peer.fxopt_seconds['own']:.2f}" if peer.fxopt_seconds else "–",
        f"{error.maximal:.2e}" if error else "–",
        f"{error.relative:.2e}" if error else "–",
        f"{peer.status}, graphs: {peer.graphs}" if peer.graphs is not None else peer.status,
    )


def _peer(data: dict[str, Any]) -> PeerResult:
    timing = Timing(**data["timing"]) if data["timing"] else None
    error = Error(**data["error"]) if data["error"] else None
    return PeerResult(**{**data, "timing": timing, "error": error})
