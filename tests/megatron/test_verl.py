"""verl's own Megatron engine, fused: its update loop, batching and post-processing, unchanged.

Only where verl is on the path (`make test` has it in a folder of its own: requirements-verl.txt).
The engine's model is ours: verl builds its own through a bridge that needs a GPU.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("verl.workers.engine.megatron.transformer_impl")

from tensordict import TensorDict
from verl.utils import tensordict_utils
from verl.workers.engine.megatron import transformer_impl

from rlhfuse.integrations.verl import update_actor_critic
from rlhfuse.megatron import ModelContext, install, uninstall
from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.fused import FusedScheduler
from rlhfuse.megatron.values import make_value_model
from tests.megatron.laws import Tensors, same
from tests.megatron.tiny import Setting, Trained, forward_step, init_parallel
from tests.training.ranks import run_ranks

ACTOR = Setting(num_microbatches=2)
CRITIC = Setting(num_microbatches=2, value_head=True, seed=1)


class Settings(SimpleNamespace):
    """verl's settings as far as they are named; everything else is off."""

    def __getattr__(self, name: str) -> None:
        return None


class Engine(transformer_impl.MegatronEngine):  # type: ignore[misc]
    """verl's engine around a model of ours."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.module, self.tf_config = trained.chunks, trained.config
        self.optimizer = trained.optimizer
        self.engine_config = Settings(
            context_parallel_size=1, router_replay=Settings(mode="disabled")
        )
        self.model_config = Settings(mtp=Settings(enable=False))

    def forward_step(self, batch_iter: Any, model: Any, **_: Any) -> Any:
        tokens = iter([next(batch_iter)["tokens"]])
        output, loss_func = forward_step(self.trained.setting, tokens, model)
        return output, partial(_reported, loss_func)


def _reported(loss_func: Any, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    loss, told = loss_func(output)
    return loss, {"loss": float(told["loss"]), "metrics": {"loss": float(told["loss"])}}


class Worker:
    """As verl's TrainingWorker: a loop over mini-batches."""

    def __init__(self, trained: Trained) -> None:
        self.engine = Engine(trained)

    def train_mini_batch(self, data: list[Any]) -> list[Any]:
        with on_cpu():
            return [self.engine.train_batch(one.clone(), None) for one in data]

    def weights(self) -> Tensors:
        return {
            name: parameter.detach().clone()
            for name, parameter in self.engine.trained.chunks[0].named_parameters()
        }


def mini_batches(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        tokens = torch.randint(0, 64, (4, 17), generator=generator)
        data = TensorDict({"tokens": tokens, "loss_mask": tokens > 0}, batch_size=[4])
        tensordict_utils.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=2)
        found.append(data)
    return found


def update(rank: int) -> tuple[list[bool], bool, set[str], list[str]]:
    with on_cpu():
        contexts = {
            "actor": ModelContext.create(partial(init_parallel, ACTOR)),
            "critic": ModelContext.create(partial(init_parallel, CRITIC), reverse=True),
        }
        data = {"actor": mini_batches(1), "critic": mini_batches(2)}

        def build() -> dict[str, Worker]:
            workers = {}
            for name, setting in (("actor", ACTOR), ("critic", CRITIC)):
                with contexts[name].active():
                    head = make_value_model if setting.value_head else None
                    trained = Trained(setting, head)
                    trained.config.variable_seq_lengths = True  # as verl sets it
                    workers[name] = Worker(trained)
            return workers

        serial, expected = build(), {}
        for name in ("critic", "actor"):
            with contexts[name].active():
                expected[name] = serial[name].train_mini_batch(data[name])
        fused = build()
        scheduler = FusedScheduler("fuse", record=True)
        actor, critic = update_actor_critic(
            fused["actor"], fused["critic"], data["actor"], data["critic"], scheduler, contexts
        )
        names = install()
        uninstall()
    equal = [same(serial[name].weights(), fused[name].weights()) for name in serial]
    results = same([expected["actor"], expected["critic"]], [actor, critic])
    pipelines = {str(span.args["pipeline"]) for span in scheduler.timeline.spans}
    return equal, results, pipelines, [name for name in names if name.startswith("verl.")]


@pytest.mark.slow
def test_verls_own_update_loop_fused_changes_nothing() -> None:
    for equal, results, pipelines, names in run_ranks(2, update, limit_s=90):
        assert equal == [True, True]
        assert results
        assert pipelines == {"actor", "critic"}
        assert "verl.workers.engine.megatron.transformer_impl.get_forward_backward_func" in names
