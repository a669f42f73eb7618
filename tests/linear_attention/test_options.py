"""Settings of the wrong type are errors that name the setting."""

from __future__ import annotations

from typing import Any

import pytest

from fxopt.errors import OptionError
from fxopt.passes import LinearAttention, SimplifiedLinearAttention

SHARED: list[dict[str, Any]] = [{"steps": "3"}, {"steps": 2.5}, {"warmup": True}, {"eps": "1e-6"}, {"select": 5}]
GRID: list[dict[str, Any]] = [{"kernel": 5.0}, {"kernel": "5"}, {"class_tokens": 1.0}]
CASES = [(LinearAttention, options) for options in SHARED]
CASES += [(SimplifiedLinearAttention, options) for options in (*SHARED, *GRID)]  # type: ignore[misc] # of another class


@pytest.mark.parametrize(("made", "options"), CASES, ids=str)
def test_settings_of_the_wrong_type(made: Any, options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(OptionError, match=f"{name}={value!r} is not possible; give a"):
        made(**options)
