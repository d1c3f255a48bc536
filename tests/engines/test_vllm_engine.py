"""The real vLLM, on a CPU, keeps the laws of `conformance`, and agrees with the embedded engine."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rlhfuse.config import VllmConfig
from rlhfuse.engines import vllm_setup
from rlhfuse.engines.base import Request, SamplingParams, TokenIds
from rlhfuse.engines.canonical import canonical_logits
from rlhfuse.engines.sampling import keep
from rlhfuse.engines.torch_engine import TorchEngine
from rlhfuse.engines.vllm_adapter import VllmEngine
from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head, ModelStage
from tests.engines import conformance

if vllm_setup.installed_version() is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

VOCAB, MAX_LEN = 211, 80


def save_model(path: Path, family: str) -> PreTrainedModel:
    """Like `tests.models.tiny`, with heads of a width that vLLM's attention has on a CPU."""
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    torch.manual_seed(1)
    config = kind(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=101,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=family == "qwen3",
        pad_token_id=0,
        initializer_range=0.15,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    model.eval()
    return model


ALIVE: list[VllmEngine] = []
"""Every engine of this process: where one is collected, vLLM ends what all of them share."""


def new_engine(path: Path, *, max_num_seqs: int = 4, **settings: Any) -> VllmEngine:
    model = load_model(path, head=Head.LM)
    engine = VllmEngine(
        model,
        path,
        max_num_seqs=max_num_seqs,
        max_model_len=MAX_LEN,
        policy_version=0,
        **settings,
    )
    ALIVE.append(engine)
    return engine


class Replicas:
    """Two real engines, handed out in turn as if new: nothing running, weights loaded again, and
    with them every cached prefix dropped. No law needs more than two at a time."""

    def __init__(self, path: Path, **sizes: int) -> None:
        self.path = path
        self.sizes = sizes
        self.engines: list[VllmEngine] = []
        self.handed_out = 0

    def new(self) -> VllmEngine:
        return new_engine(self.path, **self.sizes)

    def __call__(self) -> VllmEngine:
        if len(self.engines) < 2:
            self.engines.append(self.new())
        engine = self.engines[self.handed_out % 2]
        self.handed_out += 1
        engine.abort(range(1000))
        engine.load_weights(load_model(self.path, head=Head.LM).named_hf_parameters(), 0)
        return engine


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model") / "llama"
    save_model(path, "llama")
    return path


@pytest.fixture(scope="module", params=["llama", "llama short", "qwen2", "qwen3 short"])
def make(
    request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Replicas:
    """`short`: the cache holds two samples of full length, so vLLM preempts."""
    family, _, short = str(request.param).partition(" ")
    path = llama
    if family != "llama":
        path = tmp_path_factory.mktemp("model") / family
        save_model(path, family)
    if short:
        return Replicas(path, max_num_seqs=5, cache_tokens=100)
    return Replicas(path, max_num_seqs=16)


def test_tokens_do_not_depend_on_the_batch(make: Replicas) -> None:
    conformance.tokens_do_not_depend_on_the_batch(make, vocab_size=VOCAB)


@pytest.mark.parametrize("with_cache", [False, True])
def test_tokens_survive_migration(make: Replicas, with_cache: bool) -> None:
    conformance.tokens_survive_migration(make, vocab_size=VOCAB, with_cache=with_cache)


def test_tokens_survive_abort_and_restart(make: Replicas) -> None:
    conformance.tokens_survive_abort_and_restart(make, vocab_size=VOCAB)


def test_logprobs_equal_a_plain_forward(make: Replicas) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(make.path)

    def reference(tokens: TokenIds) -> torch.Tensor:
        with torch.no_grad():
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            logits: torch.Tensor = model(ids).logits[0].double()
            return logits

    conformance.logprobs_equal_a_plain_forward(make, reference, vocab_size=VOCAB)


def test_stops_where_it_should(make: Replicas) -> None:
    conformance.stops_where_it_should(make, vocab_size=VOCAB)


def test_sleeps_wakes_and_takes_weights(make: Replicas) -> None:
    def weights() -> Mapping[str, torch.Tensor]:
        stage = load_model(make.path, head=Head.LM)
        return {name: p.detach() for name, p in stage.named_hf_parameters()}

    conformance.sleeps_wakes_and_takes_weights(make, weights, vocab_size=VOCAB)


def test_refuses_what_can_never_fit(make: Replicas) -> None:
    conformance.refuses_what_can_never_fit(make, vocab_size=VOCAB, max_len=MAX_LEN)


def test_broken_weights_are_named(make: Replicas) -> None:
    engine = make()
    tensors = load_model(make.path, head=Head.LM).named_hf_parameters()
    engine.load_weights(((name, p.detach() * torch.nan) for name, p in tensors), 1)
    with pytest.raises(RuntimeError, match="version 1"):
        conformance.run(engine, conformance.requests(1, vocab_size=VOCAB))


def test_a_tensor_that_does_not_reach_vllm_is_found_and_nothing_is_drawn_with_it(
    make: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the probe after each update; so a stale or half-new instance never generates."""
    engine = make()
    asked = conformance.requests(3, vocab_size=VOCAB)
    expected = conformance.run(engine, asked)
    whole = {n: p.detach() for n, p in load_model(make.path, head=Head.LM).named_hf_parameters()}
    lost = "model.layers.2.mlp.down_proj.weight"
    core = engine._core
    reload = type(core).reload

    def lose(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        reload(core, ((name, t * 0.5 if name == lost else t) for name, t in weights))

    monkeypatch.setattr(core, "reload", lose)
    with pytest.raises(RuntimeError, match=r"version 1 are not what vLLM computes with: a probe"):
        engine.load_weights(whole.items(), 1)
    monkeypatch.undo()
    engine.add(asked[0])
    with pytest.raises(RuntimeError, match="nothing may be generated: weights of version 1"):
        engine.step()
    engine.abort([asked[0].sample_id])
    with pytest.raises(ValueError, match="missing"):
        engine.load_weights([(n, t) for n, t in whole.items() if n != lost], 2)
    engine.add(asked[0])
    with pytest.raises(RuntimeError, match="version 2 did not arrive whole"):
        engine.step()
    engine.abort([asked[0].sample_id])
    engine.load_weights(whole.items(), 3)
    conformance.same_tokens(conformance.run(engine, asked), expected)


def test_a_process_that_starts_anew_goes_on_with_the_same_tokens(make: Replicas) -> None:
    """And so does the embedded engine, with the same weights."""
    asked = conformance.requests(6, vocab_size=VOCAB)
    expected = conformance.run(make(), asked)
    begun = conformance.run(make(), asked, steps=4)
    embedded = TorchEngine(
        load_model(make.path, head=Head.LM), max_num_seqs=16, max_model_len=MAX_LEN
    )
    for engine in (make.new(), embedded):
        rest = [
            conformance.resumed(request, begun[request.sample_id])
            for request in asked
            if not begun[request.sample_id].finish_reason
        ]
        for sample_id, result in conformance.run(engine, rest).items():
            tokens = begun[sample_id].tokens + result.tokens
            assert tokens == expected[sample_id].tokens


def test_blocks_are_used_and_foreign_ones_announced(
    make: Replicas, caplog: pytest.LogCaptureFixture
) -> None:
    (request,) = conformance.requests(1, vocab_size=VOCAB)
    request = replace(request, prompt=np.arange(1, 41, dtype=np.int32))
    engine = make()
    conformance.run(engine, [request], steps=4)
    (moved,) = engine.export([request.sample_id], with_cache=True)
    assert moved.cache
    with caplog.at_level(logging.WARNING):
        other = make()
        before = other.loaded_cache_tokens
        other.add(moved.request, moved.cache)
        assert other.step()
    assert other.loaded_cache_tokens == before + 40 + 4 - 1, "only the last token is computed"
    assert not caplog.records
    shorter = replace(moved.request, response=moved.request.response[:-1])
    engine = make()
    engine.add(shorter, moved.cache)
    assert "computed again" in caplog.text
    with pytest.raises(ValueError, match="not the bytes"):
        make().add(moved.request, b"\x04\x00\x00\x00junk" + moved.cache)


def test_sleep_returns_the_cache_to_the_system(llama: Path) -> None:
    """64 MiB of it: resident bytes go down by as much, and come back."""
    engine = new_engine(llama, cache_tokens=64 * 1024)  # 1 KiB a token
    engine.sleep()
    engine.wake()  # now all of it has been touched
    process = psutil.Process()
    awake = process.memory_info().rss
    engine.sleep()
    asleep = process.memory_info().rss
    assert 60 < (awake - asleep) / 2**20 < 70
    first, second = conformance.requests(2, vocab_size=VOCAB)
    engine.add(first)
    with pytest.raises(AssertionError, match="asleep"):
        engine.step()
    engine.wake()
    engine.abort([first.sample_id])
    assert conformance.run(engine, [second])[second.sample_id].finish_reason


def test_vllm_s_own_sampler_draws_from_the_same_distribution(llama: Path) -> None:
    """One token each of 600 samples, against the exact probabilities: chi-square."""
    engine = new_engine(llama, max_num_seqs=64, options=VllmConfig(position_keyed="off"))
    prompt = np.arange(3, 15, dtype=np.int32)
    params = SamplingParams(max_tokens=1, temperature=1.5, top_k=8)
    asked = [
        Request(sample_id=i, prompt=prompt, seed=i * 7919, params=params, response=prompt[:0])
        for i in range(600)
    ]
    results = conformance.run(engine, asked)
    kept = (canonical_logits(load_model(llama, head=Head.LM), prompt) / 1.5).topk(8)
    expected = torch.softmax(kept.values, -1).numpy() * len(asked)
    drawn = [result.tokens[0] for result in results.values()]
    counts = np.array([drawn.count(token) for token in kept.indices.tolist()])
    assert counts.sum() == len(asked), "nothing outside the top 8"
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # 7 degrees of freedom, p = 0.001


def test_vllm_s_own_sampler_penalises_the_whole_response_or_refuses(llama: Path) -> None:
    """A repetition penalty does not ask which tokens are the response's, so a sample may go on
    anywhere; for the others it would take the response so far for prompt."""
    engine = new_engine(llama, options=VllmConfig(position_keyed="off"))
    (request,) = conformance.requests(1, vocab_size=VOCAB)
    params = SamplingParams(max_tokens=24, temperature=0.0, repetition_penalty=1.4)
    request = replace(request, params=params)
    embedded = TorchEngine(
        load_model(llama, head=Head.LM), max_num_seqs=4, max_model_len=MAX_LEN, policy_version=0
    )
    plain = conformance.run(embedded, [request])[request.sample_id]
    begun = conformance.Result(plain.tokens[:9])
    assert conformance.run(engine, [request])[request.sample_id].tokens == plain.tokens
    rest = conformance.run(engine, [conformance.resumed(request, begun)])[request.sample_id]
    assert rest.tokens == plain.tokens[9:]
    for counting in (replace(params, presence_penalty=0.1), replace(params, frequency_penalty=0.1)):
        with pytest.raises(ValueError, match="penalties need position-keyed draws"):
            engine.add(replace(request, params=counting))


CHAIN = [5, 6, 7, 8, 172, 3, 164, 83, 63, 60, 63, 2, 178, 119, 9, 142, 186, 113, 87, 198, 76, 17]
CHAIN += [92, 16, 118, 77, 18, 134, 35, 114, 161, 210, 56, 16, 137, 111, 175, 92, 137, 161, 73, 73]
CHAIN += [34, 173, 153, 179, 77, 93, 114, 114, 114, 130, 73, 180, 207, 73, 180, 67, 153, 73, 97]
CHAIN += [105, 73, 47]
"""What the model said after 5, 6, 7, 8: it is likely to repeat itself, so that drafts are good."""


@pytest.fixture(scope="module")
def speculating(llama: Path) -> VllmEngine:
    proposer: dict[str, str | int | float | bool] = {
        "method": "ngram",
        "num_speculative_tokens": 2,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    # Blocks may travel: vLLM's connector is one per process, and here there are other engines.
    options = VllmConfig(speculative_config=proposer, kv_transfer="blocks")
    with pytest.raises(ValueError, match="speculative"):
        new_engine(llama, exact=True, options=options)
    return new_engine(llama, max_num_seqs=64, options=options)


@pytest.mark.slow  # vLLM compiles its n-gram search first
def test_speculative_decoding_passes_through(llama: Path, speculating: VllmEngine) -> None:
    """vLLM's own sampler: greedy tokens, lengths and log-probabilities hold."""
    (request,) = conformance.requests(1, vocab_size=VOCAB)
    # A repetitive prompt, so that something is proposed; greedy, so that it is often right.
    request = replace(
        request,
        prompt=np.array([5, 6, 7, 8] * 6, dtype=np.int32),
        params=replace(request.params, temperature=0.0, max_tokens=40),
    )
    result = conformance.run(speculating, [request])[request.sample_id]
    model = load_model(llama, head=Head.LM)
    embedded = TorchEngine(model, max_num_seqs=4, max_model_len=MAX_LEN)
    plain = conformance.run(embedded, [request])[request.sample_id]
    assert result.tokens == plain.tokens
    np.testing.assert_allclose(result.logprobs, plain.logprobs, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "truncation", [SamplingParams(top_k=3), SamplingParams(top_p=0.6)], ids=["top-k", "top-p"]
)
def test_speculation_does_not_change_the_distribution(
    llama: Path, speculating: VllmEngine, truncation: SamplingParams
) -> None:
    """Three tokens each of 800 samples, against the exact probabilities of all that is possible;
    log-probabilities are those, too."""
    params = replace(truncation, temperature=0.4, max_tokens=4)
    prompt = np.array(CHAIN, dtype=np.int32)
    count, at_once, drawn = 800, 0, {i: conformance.Result() for i in range(800)}
    for i in drawn:
        speculating.add(
            Request(sample_id=i, prompt=prompt, seed=i * 7919, params=params, response=prompt[:0])
        )
    while speculating.num_running:
        for output in speculating.step():
            drawn[output.sample_id].tokens += output.tokens
            drawn[output.sample_id].logprobs += output.logprobs
            at_once += len(output.tokens) > 1
    assert at_once > 50, "drafts are taken"
    chances = _chances(load_model(llama, head=Head.LM), params, 3)
    seen = Counter(tuple(result.tokens[:3]) for result in drawn.values())
    assert seen.keys() <= chances.keys()
    for result in drawn.values():
        exact = np.log(chances[tuple(result.tokens[:3])])
        assert sum(result.logprobs[:3]) == pytest.approx(exact, abs=1e-3)
    often = {tokens: chance * count for tokens, chance in chances.items() if chance * count > 5}
    differences = [(seen[tokens] - wanted) ** 2 / wanted for tokens, wanted in often.items()]
    freedom = len(often)  # the rare ones together are one more
    assert (sum(differences) - freedom) / np.sqrt(2 * freedom) < 4


def _chances(
    model: ModelStage, params: SamplingParams, length: int, begun: tuple[int, ...] = ()
) -> dict[tuple[int, ...], float]:
    """The probability of each possible beginning of a response."""
    if len(begun) == length:
        return {begun: 1.0}
    logits = canonical_logits(model, np.array([*CHAIN, *begun], dtype=np.int32))[None]
    kept = keep(logits, params)[0]
    masses = torch.softmax(logits[0].masked_fill(~kept, -torch.inf) / params.temperature, -1)
    return {
        tokens: float(masses[token]) * chance
        for token in kept.nonzero()[:, 0].tolist()
        for tokens, chance in _chances(model, params, length, (*begun, token)).items()
    }
