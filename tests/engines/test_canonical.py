"""The judge of near ties: right, in float64, and loud where its assumption fails."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhfuse.engines.base import SamplingParams
from rlhfuse.engines.canonical import ALARM, canonical_logits, decide
from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head
from tests.models.tiny import FAMILIES, save_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    model = save_tiny(tmp_path, family)
    stage = load_model(tmp_path, head=Head.LM)
    prefix = np.random.default_rng(0).integers(1, 211, 45, dtype=np.int32)
    before = [parameter.clone() for parameter in stage.parameters()]
    ours = canonical_logits(stage, prefix)
    with torch.no_grad():
        theirs = model(torch.from_numpy(prefix.astype(np.int64))[None]).logits[0, -1]
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=2e-5)
    for parameter, old in zip(stage.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, old)


def test_noise_beyond_a_quarter_of_the_bound_raises_the_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, "llama")
    stage = load_model(tmp_path, head=Head.LM)
    prefix = np.arange(1, 20, dtype=np.int32)
    seen = canonical_logits(stage, prefix).float()
    params = SamplingParams(min_tokens=30, stop_token_ids=(3, 4))
    for noise, alarmed in ((ALARM * 0.9, False), (ALARM * 1.1, True)):
        off = seen.clone()
        off[[3, 4]] = -torch.inf
        off[50] += noise
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            token, logprob = decide(stage, prefix, off, seed=5, params=params, response_tokens=2)
        assert bool(caplog.records) == alarmed
        assert token not in (3, 4)
        assert logprob < 0
