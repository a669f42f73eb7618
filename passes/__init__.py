"""The rewrites: a folder a family, a file a pass. The exact pipeline reads top to bottom in `exact_pipeline`."""

from __future__ import annotations

from fxopt.passes.attention.fuse_attention import FuseAttention
from fxopt.passes.attention.fuse_sdpa import FuseSdpa
from fxopt.passes.canonical.contractions import Contractions
from fxopt.passes.canonical.fold_constants import FoldConstants
from fxopt.passes.canonical.inactive_dropout import InactiveDropout
from fxopt.passes.canonical.no_ops import NoOps
from fxopt.passes.canonical.softmax import Softmax
from fxopt.rewriter.passes import Pass

__all__ = [
    "Contractions",
    "FoldConstants",
    "FuseAttention",
    "FuseSdpa",
    "InactiveDropout",
    "NoOps",
    "Softmax",
    "exact_pipeline",
]


def exact_pipeline() -> tuple[Pass, ...]:
    """The passes that `fxopt.optimize` and the backend run by default, in order. All are of the tier ``exact``."""
    return (
        NoOps(),
        InactiveDropout(),
        FoldConstants(),
        Contractions(),
        Softmax(),
        FuseSdpa(),
        FuseAttention(),
    )
