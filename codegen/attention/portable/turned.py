"""Rows and keys in each other's place: what a block of rows asks of keys, asked by a block of keys of rows."""

from __future__ import annotations

import dataclasses
import re
from typing import Final

from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import I, J, symbol

_PLACES: Final = {I: J, J: I, symbol("Sq"): symbol("Sk"), symbol("Sk"): symbol("Sq")}
_HOST: Final = {"rows": "keys", "keys": "rows", "stride(2)": "stride(3)", "stride(3)": "stride(2)"}
_DEVICE: Final = {"Sq": "Sk", "Sk": "Sq", "BLOCK_M": "BLOCK_N", "BLOCK_N": "BLOCK_M"}


def turn(spec: AttentionSpec) -> AttentionSpec:
    """``spec`` with rows and keys in each other's place in its mask and captured tensors; its score stays as it is."""
    if spec.mask is None:
        return spec
    captures = tuple(_turned_capture(c) for c in spec.captures)
    return dataclasses.replace(spec, mask=spec.mask.replace(lambda node: _PLACES.get(node, node)), captures=captures)


def _turned_capture(captured: Capture) -> Capture:
    row, key = captured.dims[2], captured.dims[3]
    letters = {"i": "j", "j": "i"}
    return dataclasses.replace(captured, dims=f"{captured.dims[:2]}{letters.get(key, key)}{letters.get(row, row)}")


def turned_host(text: str) -> str:
    """Text of a launcher with sizes and strides of rows and keys in each other's place."""
    return re.sub(r"\b(rows|keys)\b|stride\([23]\)", lambda found: _HOST[found[0]], text)


def turned_device(text: str) -> str:
    """Text of a kernel with lengths and blocks of rows and keys in each other's place."""
    return re.sub(r"\b(Sq|Sk|BLOCK_M|BLOCK_N)\b", lambda found: _DEVICE[found[0]], text)
