"""What the losses read of a batch: here, with what the sampler kept at each token."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rlhfuse.scoring import Kept
from rlhfuse.training.batch import ADVANTAGES, OLD, loss_data, make_microbatch
from rlhfuse.training.records import SampleData
from tests.training.tiny_update import Models, make_config, make_samples


def with_kept(sample: SampleData) -> SampleData:
    """Each position kept its token and up to three others."""
    rng = np.random.default_rng(sample.sample_id)
    lists = [
        np.array([token, *range(300, 300 + rng.integers(4))], np.int32) for token in sample.response
    ]
    counts = np.array([len(own) for own in lists], np.int32)
    return replace(
        sample,
        full_logprobs=sample.old_logprobs,
        old_logprobs=(sample.old_logprobs + 0.5).astype(np.float32),
        kept=Kept(counts, np.concatenate(lists)),
    )


def test_kept_tokens_follow_their_samples_and_kl_is_of_the_whole_distribution() -> None:
    config = make_config(Models(Path("a"), Path("c")))
    plain = make_samples(6)
    samples = [with_kept(sample) for sample in plain]
    data = loss_data(config, samples, 0.1, truncate=False)
    without = loss_data(config, plain, 0.1, truncate=False)
    for sample in samples:
        # Rewards have the KL of the whole distributions: advantages are the same.
        now, before = (d.columns[ADVANTAGES][sample.sample_id] for d in (data, without))
        assert torch.equal(now, before)
        assert data.columns[OLD][sample.sample_id].tolist() == sample.old_logprobs.tolist()
    some = [samples[i] for i in (4, 0, 2)]
    batch = make_microbatch(some, data, torch.device("cpu"))
    assert batch.kept is not None
    assert batch.kept.cu[-1] == batch.kept.ids.numel()
    lists = batch.kept.ids.split(batch.kept.cu.diff().tolist())
    assert [own[0] for own in lists] == batch.labels.tolist()
    assert [len(own) for own in lists] == [n for s in some if s.kept for n in s.kept.counts]
    assert make_microbatch(some, without, torch.device("cpu")).kept is None
    assert make_microbatch(some, None, torch.device("cpu")).kept is None
