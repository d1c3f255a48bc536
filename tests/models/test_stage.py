"""A model cut into stages computes what transformers computes, whatever it is packed with."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhfuse.engines.base import TokenIds
from rlhfuse.models.loading import load_model, load_stage
from rlhfuse.models.packed import pack
from rlhfuse.models.partition import partition
from rlhfuse.models.stage import Head, ModelStage
from tests.models.tiny import FAMILIES, save_tiny


def random_samples(lengths: Sequence[int], seed: int = 0) -> list[TokenIds]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 211, n, dtype=np.int32) for n in lengths]


def stages_of(path: Path, num_stages: int, head: Head) -> list[ModelStage]:
    return [
        load_stage(
            path, head=head, layers=layers, first=s == 0, last=s == num_stages - 1, device="cpu"
        )
        for s, layers in enumerate(partition(4, num_stages, layer_cost=1.0))
    ]


def results(stages: Sequence[ModelStage], samples: Sequence[TokenIds]) -> list[torch.Tensor]:
    """Per sample: logits [length, V], or values [length]."""
    batch = pack(samples, "cpu")
    hidden = batch.token_ids
    for stage in stages:
        hidden = stage(hidden, batch)
    if stages[-1].head is Head.SCALAR:
        return list(batch.split(stages[-1].values(hidden)))
    weight = stages[-1].lm_head_weight()
    # One sample's rows padded alike in every composition, as scoring does.
    return [
        torch.nn.functional.pad(rows, (0, 0, 0, 64 - len(rows))) @ weight.T
        for rows in batch.split(hidden)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("head", "tied"), [(Head.LM, False), (Head.LM, True), (Head.SCALAR, False)]
)
def test_stages_equal_transformers(tmp_path: Path, family: str, head: Head, tied: bool) -> None:
    model = save_tiny(tmp_path, family, head=head, tied=tied)
    samples = random_samples([1, 7, 33, 2])
    with torch.no_grad():
        whole = results(stages_of(tmp_path, 1, head), samples)
        for sample, result in zip(samples, whole, strict=True):
            ids = torch.from_numpy(sample.astype(np.int64))[None]
            theirs = model(ids).logits[0]
            if head is Head.LM:
                torch.testing.assert_close(result[: len(sample)], theirs, rtol=1e-5, atol=2e-5)
            else:
                torch.testing.assert_close(result[-1:], theirs, rtol=1e-5, atol=2e-5)
        for num_stages in (2, 4):
            chained = results(stages_of(tmp_path, num_stages, head), samples)
            for ours, one in zip(chained, whole, strict=True):
                assert torch.equal(ours, one)  # a cut moves numbers, it does not compute


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_does_not_depend_on_its_company(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path, family)
    stages = stages_of(tmp_path, 1, Head.LM)
    samples = random_samples([5, 1, 64, 17, 2, 40, 3])
    with torch.no_grad():
        alone = [results(stages, [sample])[0] for sample in samples]
        rng = np.random.default_rng(1)
        for _ in range(6):
            chosen = rng.permutation(len(samples))[: rng.integers(2, len(samples) + 1)]
            together = results(stages, [samples[i] for i in chosen])
            for i, result in zip(chosen, together, strict=True):
                assert torch.equal(result, alone[i])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_gradients_equal_transformers(
    tmp_path: Path, num_stages: int, tied: bool, family: str
) -> None:
    """Float32 rounding: 1e-5 of the largest gradient of each tensor."""
    model = save_tiny(tmp_path, family, tied=tied)
    samples = random_samples([9, 20, 4])
    for sample in samples:
        ids = torch.from_numpy(sample.astype(np.int64))[None]
        torch.log_softmax(model(ids).logits[0], -1)[:, 3].sum().backward()
    stages = stages_of(tmp_path, num_stages, Head.LM)
    batch = pack(samples, "cpu")
    hidden = batch.token_ids
    for stage in stages:
        hidden = stage(hidden, batch)
    torch.log_softmax(hidden @ stages[-1].lm_head_weight().T, -1)[:, 3].sum().backward()
    shared = [p for s in stages if (p := s.tied_parameter) is not None]
    assert len(shared) == (2 if tied and num_stages > 1 else 0)
    if shared:
        assert shared[0].grad is not None
        assert shared[1].grad is not None
        shared[0].grad += shared[1].grad
    ours = {name: p.grad for stage in stages for name, p in stage.named_hf_parameters()}
    theirs = {name: p.grad for name, p in model.named_parameters()}
    assert set(ours) == set(theirs)
    for name, grad in theirs.items():
        assert grad is not None
        torch.testing.assert_close(
            ours[name], grad, rtol=0, atol=1e-5 * float(grad.abs().max()) + 1e-7
        )


def test_half_precision_follows_transformers(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    # Not `model.bfloat16()`: that rounds the rotary frequencies too, loading does not.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    stage = load_model(tmp_path, head=Head.LM, dtype=torch.bfloat16)
    frequencies = stage.rotary.get_buffer("inv_freq")
    assert torch.equal(
        frequencies, load_model(tmp_path, head=Head.LM).rotary.get_buffer("inv_freq")
    )
    sample = random_samples([30])
    with torch.no_grad():
        theirs = model(torch.from_numpy(sample[0].astype(np.int64))[None]).logits[0].float()
        ours = results([stage], sample)[0][:30].float()
    # bf16 rounds at other places: the same to a few of its steps (2 ** -8) of the largest logit
    assert float((ours - theirs).abs().max()) < 4 * 2**-8 * float(theirs.abs().max())
