from __future__ import annotations

import pytest
import torch

from fxopt.testing import DISTINCT, DISTRIBUTIONS, SIZE_COLLISIONS, draw, padding_mask, row_mask


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_are_the_same_numbers_in_every_dtype(name: str) -> None:
    exact = draw((3, 5), name, dtype=torch.float64, seed=4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(draw((3, 5), name, dtype=dtype, seed=4), exact.to(dtype))
    assert exact.isfinite().all()


def test_distributions_do_what_they_say() -> None:
    assert len(torch.unique(draw((9,), "equal"))) == 1
    assert float(draw((1000,), "wide").abs().max() / draw((1000,), "wide").abs().min()) > 1000
    assert float(draw((1000,), "large").std()) > 10
    assert not torch.equal(draw((9,), seed=1), draw((9,), seed=2))


def test_unknown_distribution_lists_the_known() -> None:
    with pytest.raises(ValueError, match="normal, wide, large"):
        draw((1,), "cauchy")


def test_padding_mask_has_an_empty_row_only_on_request() -> None:
    assert padding_mask(3, 5).sum(-1).tolist() == [5, 4, 3]
    assert padding_mask(3, 5, empty=True).sum(-1).tolist() == [5, 4, 0]


def test_row_mask_empties_the_first_rows() -> None:
    mask = row_mask((2, 6, 9), empty_rows=2)
    assert not mask[:, :2].any()
    assert mask[:, 2:].any(-1).all() and not mask[:, 2:].all()


def test_collisions_collide() -> None:
    sizes = [*vars(DISTINCT).values(), DISTINCT.H // DISTINCT.G]
    assert len(set(sizes)) == len(sizes)
    for name, sizes_of in SIZE_COLLISIONS.items():
        assert sizes_of.H % sizes_of.G == 0
        left, right = name.split("=") if "=" in name else ("B", "D")
        assert getattr(sizes_of, left) == (int(right) if right.isdigit() else getattr(sizes_of, right))
