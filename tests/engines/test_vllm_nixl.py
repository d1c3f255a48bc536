"""Migration through vLLM's NIXL connector, between two processes, on a CPU (UCX over shared
memory or TCP). Where the package nixl is installed: `pip install --no-deps nixl nixl-cu12`."""

import importlib.util
import multiprocessing
import multiprocessing.connection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhfuse.config import VllmConfig
from rlhfuse.engines import vllm_setup
from rlhfuse.engines.base import Running
from rlhfuse.engines.vllm_adapter import VllmEngine
from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head
from tests.engines import conformance
from tests.engines.test_vllm_engine import VOCAB, save_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        vllm_setup.installed_version() is None or importlib.util.find_spec("nixl") is None,
        reason="vLLM or nixl is not installed",
    ),
]


def make(path: Path) -> VllmEngine:
    return VllmEngine(
        load_model(path, head=Head.LM),
        path,
        max_num_seqs=8,
        max_model_len=160,
        policy_version=0,
        options=VllmConfig(kv_transfer="nixl"),
    )


def receiver(path: Path, pipe: multiprocessing.connection.Connection) -> None:
    """The other instance: goes on with what it is given, and answers with the tokens."""
    engine = make(path)
    pipe.send("ready")
    moved: list[Running] = pipe.recv()
    results = {running.request.sample_id: conformance.Result() for running in moved}
    for running in moved:
        engine.add(running.request, running.cache)
    conformance.collect(engine, results)
    pipe.send({sample_id: result.tokens for sample_id, result in results.items()})
    pipe.recv()


def test_tokens_survive_migration_over_nixl(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    other = context.Process(target=receiver, args=(tmp_path, there), daemon=True)
    other.start()
    engine = make(tmp_path)
    asked = conformance.requests(6, vocab_size=VOCAB)
    long = np.random.default_rng(3).integers(1, VOCAB, 100, dtype=np.int32)
    asked = [
        replace(request, prompt=(long + i) % (VOCAB - 1) + 1) for i, request in enumerate(asked)
    ]
    expected = conformance.run(engine, asked)
    engine.load_weights(load_model(tmp_path, head=Head.LM).named_hf_parameters(), 0)
    results = conformance.run(engine, asked, steps=5)
    moving = [i for i in list(results)[:4] if not results[i].finish_reason]
    moved = engine.export(moving, with_cache=True)
    assert all(running.cache for running in moved)
    assert here.poll(120)
    assert here.recv() == "ready"
    here.send(moved)
    conformance.collect(engine, results)
    assert here.poll(60), "the receiver does not answer"
    for sample_id, tokens in here.recv().items():
        results[sample_id].tokens += tokens
    assert {i: r.tokens for i, r in results.items()} == {i: r.tokens for i, r in expected.items()}
    engine.sleep()  # the blocks that were read are free
    here.send("done")
    other.join(30)
