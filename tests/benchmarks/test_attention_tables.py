"""The index tables of the attention benchmark are those of the models that they are named after."""

from __future__ import annotations

import pytest
import torch

from benchmarks.attention_tables import document_ids, shift_mask, t5_band, t5_buckets

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


def test_t5_buckets_are_those_of_transformers() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-3000, 3000)
    assert torch.equal(t5_buckets(distance), t5.T5Attention._relative_position_bucket(distance))


def test_t5_band_holds_the_bias_of_key_j_at_query_i_at_their_distance() -> None:
    table = torch.randn(32, 3)
    band = t5_band(table, rows=20, keys=150)
    for i, j in ((0, 0), (19, 0), (0, 149), (7, 11)):
        assert torch.equal(band[:, j - i + 19], table[t5_buckets(torch.tensor(j - i))])


@pytest.mark.parametrize(("side", "window", "shift"), [(14, 7, 3), (56, 7, 3), (8, 4, 2)])
def test_shift_mask_is_that_of_transformers(side: int, window: int, shift: int) -> None:
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = pytest.importorskip("transformers").SwinConfig(window_size=window)
    layer = swin.SwinLayer(config, 24, (side, side), 3, shift_size=shift)
    expected = layer.get_attn_mask(side, side, torch.float32, torch.device("cpu"))
    assert torch.equal(shift_mask(side, window, shift), expected)


def test_documents_fill_every_row_in_order() -> None:
    ids = document_ids(5, 40, 8)
    assert ids.shape == (5, 40)
    assert (ids[:, 0] == 0).all()
    assert (ids[:, -1] == 7).all()
    assert set(ids.diff(dim=1).unique().tolist()) == {0, 1}
    assert not torch.equal(ids[0], ids[1])
