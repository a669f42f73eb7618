"""In which memory order an attention's result is wanted."""

from __future__ import annotations

import torch
from torch.fx import Node

from fxopt.ir.attention import OutLayout
from fxopt.ir.nodes import is_call, shape

aten = torch.ops.aten


def output_layout(output: Node) -> OutLayout:
    """``bshd`` when the only reader swaps heads and rows, as models do before they merge the heads."""
    users = tuple(output.users)
    if len(shape(output)) != 4 or len(users) != 1:
        return "bhsd"
    (user,) = users
    if is_call(user, aten.transpose.int) and {int(a) % 4 for a in user.args[1:3]} == {1, 2}:  # type: ignore[arg-type]
        return "bshd"
    if is_call(user, aten.permute.default) and list(user.args[1]) == [0, 2, 1, 3]:  # type: ignore[arg-type]
        return "bshd"
    return "bhsd"
