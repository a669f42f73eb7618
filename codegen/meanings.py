"""Import this to give every canonical operator its meaning: it loads the reference module of each kind."""

from __future__ import annotations

from fxopt.codegen.attention import reference as attention
from fxopt.codegen.attention.weights import reference as weights
from fxopt.codegen.heads import reference as heads
from fxopt.codegen.linear_attention import reference as linear_attention
from fxopt.codegen.mlp import reference as mlp
from fxopt.codegen.norm import reference as norm
from fxopt.codegen.norm.residual_norm import reference as residual_norm

__all__ = ["attention", "heads", "linear_attention", "mlp", "norm", "residual_norm", "weights"]
