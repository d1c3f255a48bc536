"""The laws of a generation engine, as functions of a factory: put any engine through them.

A factory makes a fresh engine (version 0) over the same weights each time; `reference` gives the
log-probabilities of every next token by a plain forward pass, float64 [len(tokens), V].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from rlhfuse.engines.base import Engine, Request, SamplingParams, TokenIds

EngineFactory = Callable[[], Engine]
Reference = Callable[[TokenIds], torch.Tensor]
Weights = Callable[[], Mapping[str, torch.Tensor]]

NOTHING: TokenIds = np.zeros(0, dtype=np.int32)
PARAMS = (
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=24, repetition_penalty=1.3, frequency_penalty=0.4),
    SamplingParams(max_tokens=24, temperature=0.7, top_k=20),
    SamplingParams(max_tokens=24, top_p=0.8, min_tokens=5, stop_token_ids=(3, 4, 5, 6, 7, 8)),
    SamplingParams(max_tokens=24, temperature=0.0, presence_penalty=0.7, repetition_penalty=0.8),
    SamplingParams(max_tokens=24, min_p=0.1, temperature=1.3, stop_token_ids=tuple(range(9, 30))),
    SamplingParams(max_tokens=24, temperature=0.0),
)


@dataclass(slots=True)
class Result:
    """What an engine gave for one sample."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""


def requests(count: int, *, vocab_size: int) -> list[Request]:
    """Samples of all kinds; the prompts are short and long."""
    rng = np.random.default_rng(7)
    return [
        Request(
            sample_id=100 + i,
            prompt=rng.integers(1, vocab_size, 1 + (i * 13) % 40, dtype=np.int32),
            seed=(i * 0x9E3779B97F4A7C15) % 2**64,
            params=PARAMS[i % len(PARAMS)],
            response=NOTHING,
        )
        for i in range(count)
    ]


def run(engine: Engine, asked: Sequence[Request], steps: int | None = None) -> dict[int, Result]:
    """Add the requests and step (to the end, or `steps` times)."""
    results = {request.sample_id: Result() for request in asked}
    for request in asked:
        engine.add(request)
    collect(engine, results, steps)
    return results


def collect(engine: Engine, results: dict[int, Result], steps: int | None = None) -> None:
    """Step an engine and note what it gives."""
    while engine.num_running and (steps is None or steps > 0):
        for output in engine.step():
            result = results[output.sample_id]
            assert not result.finish_reason, "an output after the end"
            assert len(output.tokens) == len(output.logprobs) >= 1
            result.tokens += output.tokens
            result.logprobs += output.logprobs
            result.finish_reason = output.finish_reason
            assert output.finished == bool(output.finish_reason)
        steps = None if steps is None else steps - 1


def resumed(request: Request, result: Result) -> Request:
    """The request as the control plane sends it again: with the response so far."""
    return replace(request, response=np.array(result.tokens, dtype=np.int32))


def same_tokens(results: Mapping[int, Result], expected: Mapping[int, Result]) -> None:
    for sample_id, result in results.items():
        assert result.tokens == expected[sample_id].tokens
        assert result.finish_reason == expected[sample_id].finish_reason
        # log-probabilities may round by company; where a nucleus edge flips, a little more
        np.testing.assert_allclose(result.logprobs, expected[sample_id].logprobs, atol=1e-3)


def alone(make: EngineFactory, asked: Sequence[Request]) -> dict[int, Result]:
    engine = make()
    return {r.sample_id: run(engine, [r])[r.sample_id] for r in asked}


def tokens_do_not_depend_on_the_batch(make: EngineFactory, *, vocab_size: int) -> None:
    asked = requests(10, vocab_size=vocab_size)
    expected = alone(make, asked)
    assert len({tuple(r.tokens) for r in expected.values()}) == len(asked)
    same_tokens(run(make(), asked), expected)
    same_tokens(run(make(), asked[::-1]), expected)
    engine = make()  # late arrivals
    results = run(engine, asked[:4], steps=5)
    for request in asked[4:]:
        results[request.sample_id] = Result()
        engine.add(request)
        collect(engine, results, steps=2)
    collect(engine, results)
    same_tokens(results, expected)


def tokens_survive_migration(make: EngineFactory, *, vocab_size: int, with_cache: bool) -> None:
    asked = requests(10, vocab_size=vocab_size)
    expected = run(make(), asked)
    first, second = make(), make()
    results = run(first, asked[:7], steps=6)
    results |= run(second, asked[7:], steps=3)
    moving = [r.sample_id for r in asked[:5]] + [999]
    drawn = {i: len(results[i].tokens) for i in moving[:-1]}
    running = first.export(moving, with_cache=with_cache)
    still = [i for i in moving[:-1] if not results[i].finish_reason]
    assert [r.request.sample_id for r in running] == still
    for moved in running:
        sample_id = moved.request.sample_id
        assert moved.request.response.tolist() == results[sample_id].tokens
        assert list(moved.logprobs) == results[sample_id].logprobs
        assert drawn[sample_id] == len(moved.logprobs)
        assert bool(moved.cache) == with_cache
        second.add(moved.request, moved.cache)
    collect(first, results)
    collect(second, results)
    same_tokens(results, expected)


def tokens_survive_abort_and_restart(make: EngineFactory, *, vocab_size: int) -> None:
    asked = requests(6, vocab_size=vocab_size)
    expected = run(make(), asked)
    engine = make()
    results = run(engine, asked, steps=4)
    engine.abort([r.sample_id for r in asked] + [12345])
    assert engine.num_running == 0
    again = {r.sample_id: r for r in asked if not results[r.sample_id].finish_reason}
    for request in list(again.values())[::2]:  # resubmitted to the same engine
        engine.add(resumed(request, results[request.sample_id]))
    restarted = make()  # and to one that started anew
    for request in list(again.values())[1::2]:
        restarted.add(resumed(request, results[request.sample_id]))
    collect(engine, results)
    collect(restarted, results)
    same_tokens(results, expected)


def logprobs_equal_a_plain_forward(
    make: EngineFactory, reference: Reference, *, vocab_size: int
) -> None:
    """Untruncated requests: to 1e-4. Truncated ones can only be likelier, up to the mass kept."""
    asked = requests(10, vocab_size=vocab_size)
    results = run(make(), asked)
    for request in asked:
        params, result = request.params, results[request.sample_id]
        tokens = np.concatenate([request.prompt, np.array(result.tokens, dtype=np.int32)])
        rows = reference(tokens)[len(request.prompt) - 1 : -1]
        for place, row in enumerate(rows):
            penalise_plainly(row, params, request.prompt.tolist(), result.tokens[:place])
        rows /= params.temperature or 1.0
        if params.min_tokens:
            rows[: params.min_tokens, list(params.stop_token_ids)] = -torch.inf
        plain = torch.log_softmax(rows, -1)
        drawn = plain.gather(1, torch.tensor(result.tokens)[:, None])[:, 0].numpy()
        ours = np.array(result.logprobs)
        if params.top_k or params.min_p or params.top_p < 1:
            assert (ours >= drawn - 1e-4).all()
            assert (ours <= 1e-6).all()
            if params.top_p < 1:
                assert (ours <= drawn - np.log(params.top_p) + 1e-3).all()
            if params.top_k:
                kept = np.log(plain.exp().topk(params.top_k).values.sum(-1).numpy())
                np.testing.assert_allclose(ours, drawn - kept, atol=1e-4)
        else:
            np.testing.assert_allclose(ours, drawn, atol=1e-4)
        if params.temperature == 0:
            assert result.tokens == rows.argmax(-1).tolist()


def penalise_plainly(
    row: torch.Tensor, params: SamplingParams, prompt: list[int], response: list[int]
) -> None:
    """The definition, token by token."""
    for token in range(len(row)):
        if token in prompt or token in response:
            by = params.repetition_penalty
            row[token] = row[token] / by if row[token] > 0 else row[token] * by
        row[token] -= params.frequency_penalty * response.count(token)
        row[token] -= params.presence_penalty * (token in response)


def stops_where_it_should(make: EngineFactory, *, vocab_size: int) -> None:
    every = tuple(range(vocab_size // 2))
    base = SamplingParams(
        max_tokens=12,
        min_tokens=6,
        stop_token_ids=every,
        repetition_penalty=1.1,
        presence_penalty=0.3,
        frequency_penalty=0.4,
    )
    asked = [replace(r, params=base) for r in requests(6, vocab_size=vocab_size)]
    asked += [
        replace(
            r, sample_id=r.sample_id + 50, params=replace(base, stop_token_ids=(), max_tokens=n)
        )
        for n, r in enumerate(asked, start=1)
    ]
    results = run(make(), asked)
    for request in asked:
        result, params = results[request.sample_id], request.params
        if not params.stop_token_ids:
            assert result.finish_reason == "length"
            assert len(result.tokens) == params.max_tokens
            continue
        hits = [i for i, token in enumerate(result.tokens) if token in every]
        if result.finish_reason == "stop":
            assert hits == [len(result.tokens) - 1]
            assert len(result.tokens) > params.min_tokens
        else:
            assert not hits
            assert len(result.tokens) == params.max_tokens
    assert "stop" in {result.finish_reason for result in results.values()}
    # min_tokens, max_tokens and penalties count the whole response, also where it is continued
    for cut in (3, 7):
        for request in asked:
            result = results[request.sample_id]
            if len(result.tokens) > cut:
                begun = Result(result.tokens[:cut])
                rest = run(make(), [resumed(request, begun)])[request.sample_id]
                assert rest.tokens == result.tokens[cut:]
                assert rest.finish_reason == result.finish_reason


def sleeps_wakes_and_takes_weights(
    make: EngineFactory, weights: Weights, *, vocab_size: int
) -> None:
    asked = requests(4, vocab_size=vocab_size)
    engine = make()
    expected = run(engine, asked)
    free = engine.free_cache_tokens
    engine.sleep()
    engine.wake()
    assert engine.free_cache_tokens == free
    same_tokens(run(engine, asked), expected)

    run(engine, asked, steps=2)
    assert engine.num_running > 0
    with pytest.raises(RuntimeError, match="running"):
        engine.load_weights(weights().items(), 1)
    with pytest.raises(RuntimeError, match="running"):
        engine.sleep()
    (stale, *_) = engine.export([r.sample_id for r in asked], with_cache=True)
    assert engine.num_running == 0

    tensors = {name: tensor.clone() for name, tensor in weights().items()}
    some = sorted(tensors)[len(tensors) // 2]
    with pytest.raises(ValueError, match="missing"):
        engine.load_weights([(n, t) for n, t in tensors.items() if n != some], 1)
    changed = {name: tensor * 1.5 for name, tensor in tensors.items()}
    engine.load_weights(changed.items(), 1)
    assert engine.policy_version == 1
    renewed = run(engine, asked)
    assert any(renewed[i].tokens != expected[i].tokens for i in expected)
    # a cache of the old weights must not enter the new policy's samples
    fresh = run(engine, [stale.request])[stale.request.sample_id]
    engine.add(stale.request, stale.cache)
    results = {stale.request.sample_id: Result()}
    collect(engine, results)
    assert results[stale.request.sample_id].tokens == fresh.tokens
    engine.load_weights(tensors.items(), 2)
    same_tokens(run(engine, asked), expected)


def refuses_what_can_never_fit(make: EngineFactory, *, vocab_size: int, max_len: int) -> None:
    engine = make()
    (request,) = requests(1, vocab_size=vocab_size)
    with pytest.raises(ValueError, match=str(max_len)):
        engine.add(replace(request, params=SamplingParams(max_tokens=max_len)))
    with pytest.raises(ValueError, match="empty prompt"):
        engine.add(replace(request, prompt=NOTHING))
    assert engine.step() == []
    engine.add(request)
    with pytest.raises(ValueError, match="running"):
        engine.add(request)
