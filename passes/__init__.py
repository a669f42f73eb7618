"""The rewrites: a folder a family, a file a pass. The exact pipeline reads top to bottom in `exact_pipeline`."""

from __future__ import annotations

from fxopt.passes.attention.fuse_attention import FuseAttention
from fxopt.passes.attention.fuse_sdpa import FuseSdpa
from fxopt.passes.canonical.contractions import Contractions
from fxopt.passes.canonical.fills import Fills
from fxopt.passes.canonical.fold_constants import FoldConstants
from fxopt.passes.canonical.gelu import Gelu
from fxopt.passes.canonical.glu import Glu
from fxopt.passes.canonical.inactive_dropout import InactiveDropout
from fxopt.passes.canonical.layer_norm import LayerNorm
from fxopt.passes.canonical.no_ops import NoOps
from fxopt.passes.canonical.repeat_heads import RepeatHeads
from fxopt.passes.canonical.rms_norm import RmsNorm
from fxopt.passes.canonical.rotary import Rotary
from fxopt.passes.canonical.silu import Silu
from fxopt.passes.canonical.softmax import Softmax
from fxopt.passes.canonical.synonyms import Synonyms
from fxopt.passes.linear.patch_embedding import PatchEmbedding
from fxopt.passes.linear_attention.linear_attention import LinearAttention
from fxopt.passes.linear_attention.simplified_linear_attention import SimplifiedLinearAttention
from fxopt.passes.mlp.fuse_mlp import FuseMlp
from fxopt.passes.norm.centre_residual import CentreResidual
from fxopt.passes.norm.fold_channel_affine import FoldChannelAffine
from fxopt.passes.norm.fold_norm_affine import FoldNormAffine
from fxopt.passes.norm.fuse_residual_norm import FuseResidualNorm
from fxopt.passes.norm.rep_batch_norm import RepBatchNorm
from fxopt.passes.norm.unified_norm import UnifiedNorm
from fxopt.rewriter.passes import Pass

__all__ = [
    "CentreResidual",
    "Contractions",
    "Fills",
    "FoldChannelAffine",
    "FoldConstants",
    "FoldNormAffine",
    "FuseAttention",
    "FuseMlp",
    "FuseResidualNorm",
    "FuseSdpa",
    "Gelu",
    "Glu",
    "InactiveDropout",
    "LayerNorm",
    "LinearAttention",
    "NoOps",
    "PatchEmbedding",
    "RepBatchNorm",
    "RepeatHeads",
    "RmsNorm",
    "Rotary",
    "Silu",
    "SimplifiedLinearAttention",
    "Softmax",
    "Synonyms",
    "UnifiedNorm",
    "exact_pipeline",
]


def exact_pipeline() -> tuple[Pass, ...]:
    """The passes that `fxopt.optimize` and the backend run by default, in order. All are of the tier ``exact``."""
    return (
        Synonyms(),
        Fills(),
        NoOps(),
        InactiveDropout(),
        FoldConstants(),
        Contractions(),
        Softmax(),
        LayerNorm(),
        RmsNorm(),
        Gelu(),
        Silu(),
        Glu(),
        Rotary(),
        RepeatHeads(),
        PatchEmbedding(),
        FuseSdpa(),
        FuseAttention(),
        FoldNormAffine(),
        FoldChannelAffine(),
    )
