"""TorchEngine keeps the laws of `conformance`, also where its cache is short."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlhfuse.engines.base import TokenIds
from rlhfuse.engines.torch_engine import TorchEngine
from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head
from tests.engines import conformance
from tests.models.tiny import save_tiny

VOCAB, MAX_LEN = 211, 80
Make = Callable[[], TorchEngine]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def hf_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model") / str(request.param)
    save_tiny(path, request.param, tied=request.param == "qwen3")
    return path


@pytest.fixture(params=["roomy", "short"])
def make(request: pytest.FixtureRequest, hf_model: Path) -> Make:
    def roomy() -> TorchEngine:
        model = load_model(hf_model, head=Head.LM)
        return TorchEngine(model, max_num_seqs=16, max_model_len=MAX_LEN, policy_version=0)

    def short() -> TorchEngine:
        model = load_model(hf_model, head=Head.LM)
        return TorchEngine(
            model,
            max_num_seqs=5,
            max_model_len=MAX_LEN,
            cache_tokens=300,  # four rows, and three once one of them is long
            prefill_tokens=30,
            policy_version=0,
        )

    return roomy if request.param == "roomy" else short


def test_tokens_do_not_depend_on_the_batch(make: Make) -> None:
    conformance.tokens_do_not_depend_on_the_batch(make, vocab_size=VOCAB)


@pytest.mark.parametrize("with_cache", [False, True])
def test_tokens_survive_migration(hf_model: Path, with_cache: bool) -> None:
    def make() -> TorchEngine:
        model = load_model(hf_model, head=Head.LM)
        return TorchEngine(model, max_num_seqs=16, max_model_len=MAX_LEN, policy_version=0)

    conformance.tokens_survive_migration(make, vocab_size=VOCAB, with_cache=with_cache)


def test_tokens_survive_abort_and_restart(make: Make) -> None:
    conformance.tokens_survive_abort_and_restart(make, vocab_size=VOCAB)


def test_logprobs_equal_a_plain_forward(make: Make, hf_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(hf_model)

    def reference(tokens: TokenIds) -> torch.Tensor:
        with torch.no_grad():
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            logits: torch.Tensor = model(ids).logits[0].double()
            return logits

    conformance.logprobs_equal_a_plain_forward(make, reference, vocab_size=VOCAB)


def test_stops_where_it_should(make: Make) -> None:
    conformance.stops_where_it_should(make, vocab_size=VOCAB)


def test_sleeps_wakes_and_takes_weights(make: Make, hf_model: Path) -> None:
    def weights() -> Mapping[str, torch.Tensor]:
        stage = load_model(hf_model, head=Head.LM)
        return {name: p.detach() for name, p in stage.named_hf_parameters()}

    conformance.sleeps_wakes_and_takes_weights(make, weights, vocab_size=VOCAB)


def test_refuses_what_can_never_fit(make: Make) -> None:
    conformance.refuses_what_can_never_fit(make, vocab_size=VOCAB, max_len=MAX_LEN)


def test_broken_weights_are_named(make: Make, hf_model: Path) -> None:
    engine = make()
    tensors = load_model(hf_model, head=Head.LM).named_hf_parameters()
    engine.load_weights(((name, p.detach() * torch.nan) for name, p in tensors), 1)
    with pytest.raises(RuntimeError, match="version 1"):
        conformance.run(engine, conformance.requests(1, vocab_size=VOCAB))


def test_a_used_cache_is_used_and_a_foreign_one_announced(
    hf_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(version: int) -> TorchEngine:
        model = load_model(hf_model, head=Head.LM)
        return TorchEngine(model, max_num_seqs=4, max_model_len=MAX_LEN, policy_version=version)

    (request,) = conformance.requests(1, vocab_size=VOCAB)
    engine = make(0)
    conformance.run(engine, [request], steps=4)
    (moved,) = engine.export([request.sample_id], with_cache=True)
    with caplog.at_level(logging.WARNING):
        other = make(0)
        other.add(moved.request, moved.cache)
        other.step()
    assert not caplog.records
    for engine, moved_request in (
        (make(1), moved.request),  # other weights
        (make(0), replace(moved.request, response=moved.request.response[:-1])),  # other tokens
    ):
        caplog.clear()
        engine.add(moved_request, moved.cache)
        with caplog.at_level(logging.WARNING):
            engine.step()
        assert "computed again" in caplog.text
    broken = make(0)
    broken.add(moved.request, b"\x04\x00\x00\x00junk" + moved.cache)
    with pytest.raises(ValueError, match="not the bytes"):
        broken.step()
