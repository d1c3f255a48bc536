"""Weights that come and go are the same ones each time, and what leaves takes no memory."""

from pathlib import Path

import numpy as np
import torch

from rlhfuse import scoring
from rlhfuse.messages import Role
from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head, ModelStage
from rlhfuse.workers.frozen import FrozenModels
from tests.models.tiny import save_tiny


def test_scores_are_those_of_a_model_that_stayed(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3", tied=True)  # with tied embeddings
    stayed = load_model(tmp_path, head=Head.LM)
    models: dict[Role, ModelStage] = {
        "reference": load_model(tmp_path, head=Head.LM),
        "reward": load_model(tmp_path, head=Head.SCALAR, new_head_seed=1),
    }
    samples = [
        scoring.Tokens(np.arange(1, 4, dtype=np.int32), np.arange(5, 5 + n, dtype=np.int32))
        for n in (3, 9)
    ]

    def score(model: ModelStage) -> list[bytes]:
        found = scoring.token_logprobs(model, samples, temperature=1.0, token_budget=64)
        return [logprobs.tobytes() for logprobs in found]

    frozen = FrozenModels(models, torch.device("cpu"))
    hosts = [p.data_ptr() for model in models.values() for p in model.parameters()]
    for _ in range(2):
        frozen.come_in()
        frozen.come_in()  # is here already
        there = [p.data_ptr() for model in models.values() for p in model.parameters()]
        assert not {*there} & {*hosts}
        for role in ("reference", "actor"):
            frozen.await_arrival(role)
        assert score(models["reference"]) == score(stayed)
        frozen.leave()
        assert [p.data_ptr() for m in models.values() for p in m.parameters()] == hosts
        frozen.leave()
