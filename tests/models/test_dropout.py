"""What is dropped depends on a row's own key: not on its company, nor on how often it is asked."""

import numpy as np
import pytest
import torch
from torch import nn

from rlhfuse.models.dropout import RowDropout, Rows
from rlhfuse.models.packed import PackedBatch, pack
from rlhfuse.training.streams import draws, may_draw

WIDTH, RATE = 512, 0.25


def packed(*lengths: int, padded: bool = False) -> PackedBatch:
    return pack([np.ones(length, dtype=np.int32) for length in lengths], "cpu", padded=padded)


def dropped(batch: PackedBatch, ids: list[int], *, stream: int = 3, name: str = "a") -> list[int]:
    """Per sample, a number that stands for what survived of its first three rows."""
    rows = Rows()
    rows.set(batch, torch.tensor(ids), stream)
    out = RowDropout(RATE, name, rows)(torch.ones(1, batch.num_rows, WIDTH))[0]
    assert out.unique().tolist() == [0.0, pytest.approx(1 / (1 - RATE))]
    return [
        hash(tuple(part[:3].flatten().tolist())) for part in batch.split(out[: batch.num_tokens])
    ]


def test_a_sample_loses_the_same_in_any_company() -> None:
    alone = dropped(packed(5), [7])
    assert dropped(packed(9, 5, 4), [2, 7, 3])[1:2] == alone
    assert dropped(packed(5, 9, padded=True), [7, 2])[:1] == alone


def test_streams_layers_and_samples_lose_different_numbers() -> None:
    found = [
        dropped(packed(5), [7]),
        dropped(packed(5), [8]),
        dropped(packed(5), [7], stream=4),
        dropped(packed(5), [7], name="b"),
    ]
    assert len({one for (one,) in found}) == 4


def test_the_mean_stays_and_rows_differ() -> None:
    rows = Rows()
    rows.set(packed(2000), torch.tensor([1]), 0)
    out = RowDropout(RATE, "a", rows)(torch.ones(2000, WIDTH))
    assert float(out.mean()) == pytest.approx(1.0, abs=3e-3)  # four standard errors
    assert len(out.unique(dim=0)) == 2000


def test_gradients_pass_where_numbers_did() -> None:
    rows = Rows()
    rows.set(packed(16), torch.tensor([1]), 0)
    hidden = torch.ones(16, WIDTH, requires_grad=True)
    out = RowDropout(RATE, "a", rows)(hidden)
    out.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, out.detach())


def test_modules_that_draw_are_found() -> None:
    hugging_face = nn.Linear(2, 2)
    hugging_face.attention_dropout = 0.1  # type: ignore[assignment]
    plain, active = nn.Sequential(nn.Dropout(0.0)), nn.Sequential(nn.Dropout(0.1))
    found = [may_draw(m) for m in (nn.Linear(2, 2), plain, active, hugging_face)]
    assert [len(parts) for parts in found] == [0, 1, 1, 1]
    assert [draws(part) for parts in found for part in parts] == [False, True, True]
    active.eval()
    assert not draws(active[0])
