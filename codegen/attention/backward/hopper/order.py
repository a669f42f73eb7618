"""When a generated Hopper backward multiplies queries with keys: with the rest of a block of rows, or one block ahead.

Ahead of the rest, these products run while dq goes to memory, and a block begins with its weights.
"""

from __future__ import annotations

from typing import Final

#: The products of queries and keys where a block of rows begins with them.
_SCORE_NOW: Final = """\
s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
"""

#: The same, one block ahead: dq goes to memory meanwhile.
_SCORE_NEXT: Final = """\
dv, w = warpgroup_mma_wait(2, deps=[dv, w])
ahead = (step + 1) & (STAGES - 1)
mbarrier.wait(q_ready.index(ahead), ((step + 1) >> (STAGES // 2)) & 1)
q = q_tiles.index(ahead).reshape([BLOCK_M, WIDTH])
s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
"""

#: What is said to be there after the last block, so that all blocks are alike; its products are not read.
_LOAD_NOTHING: Final = """\
slot = step & (STAGES - 1)
mbarrier.wait(q_free.index(slot), ((step >> (STAGES // 2)) & 1) ^ 1)
mbarrier.arrive(q_ready.index(slot), count=1)
"""

#: The same for the first block of rows, if there is one.
_SCORE_FIRST: Final = """\
s = gl.zeros([64, BLOCK_M], gl.float32, layout=SCORES)
mbarrier.wait(q_ready.index(0), 0)
q = q_tiles.index(0).reshape([BLOCK_M, WIDTH])
s = warpgroup_mma(k, q.permute((1, 0)), s, use_acc=False, is_async=True)
s = warpgroup_mma_wait(0, deps=[s])
"""

_DK: Final = "dk = warpgroup_mma(u, q, dk, is_async=True)"
_Q_DONE: Final = "mbarrier.arrive(q_free.index(slot), count=1)"
_DOUT_DONE: Final = "mbarrier.arrive(dout_free.index(slot), count=1)"


def order_holes(ahead: bool) -> dict[str, str]:
    """The holes of the templates for either order."""
    holes = dict(_AHEAD if ahead else _TOGETHER)
    return {name: text.rstrip("\n") for name, text in holes.items()}


#: dk after dq, which leaves registers meanwhile.
_TOGETHER: Final = {
    "row_wait": "mbarrier.wait(q_ready.index(slot), phase)",
    "score_now": _SCORE_NOW,
    "score_wait": "s = warpgroup_mma_wait(1, deps=[s])",
    "dk_early": "",
    "dk_late": _DK,
    "score_next": "",
    "dq_wait": "dv, w, dq = warpgroup_mma_wait(1, deps=[dv, w, dq])",
    "dout_done": _DOUT_DONE,
    "q_done": f"dk, u = warpgroup_mma_wait(0, deps=[dk, u])\n{_Q_DONE}",
    "score_first": "",
    "score_done": "",
    "load_nothing": "",
}
#: dk before dq, and the next products of queries and keys after it.
_AHEAD: Final = {
    "row_wait": "",
    "score_now": "",
    "score_wait": "",
    "dk_early": _DK,
    "dk_late": "",
    "score_next": _SCORE_NEXT,
    "dq_wait": "dk, u, dq = warpgroup_mma_wait(1, deps=[dk, u, dq])",
    "dout_done": f"{_DOUT_DONE}\n{_Q_DONE}",
    "q_done": "",
    "score_first": _SCORE_FIRST,
    "score_done": "s = warpgroup_mma_wait(0, deps=[s])",
    "load_nothing": _LOAD_NOTHING,
}
