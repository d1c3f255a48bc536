"""One fused update of actor and critic in verl (0.9), in place of two calls one after the other.

verl's driver calls ``update_critic``, then ``update_actor``, each with mini-batches of its own. In
a process that holds both workers (verl's colocated worker groups), call `update_actor_critic`
instead, with the data of both::

    # a method of a worker class that owns both, registered like verl's own
    def update_actor_critic(self, actor_data, critic_data):
        return verl.update_actor_critic(self.actor_worker, self.critic_worker,
                                        actor_data, critic_data, self.scheduler)

Old log-probabilities and values are computed before, as verl does: both updates read only data.
During critic warm-up call verl's own ``train_mini_batch``.

All workers of one verl process share one parallel state, so both pipelines run in the same
direction: fusion then saves one of the two pipelines' fills and drains. A critic built inside
``with context.active()`` of a reversed `ModelContext` fills more; give its context here.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from rlhfuse.megatron.context import ModelContext
from rlhfuse.megatron.fused import FusedScheduler
from rlhfuse.megatron.support import fall_back_reasons_of
from rlhfuse.megatron.together import run_together

logger = logging.getLogger(__name__)


def update_actor_critic(
    actor: Any,
    critic: Any,
    actor_data: Any,
    critic_data: Any,
    scheduler: FusedScheduler,
    contexts: Mapping[str, ModelContext] | None = None,
) -> tuple[Any, Any]:
    """Train both on their mini-batches, the k-th of one with the k-th of the other.

    Args:
        actor: verl's ``ActorRolloutRefWorker`` or ``TrainingWorker``. critic: ``TrainingWorker``.
        actor_data, critic_data: what their ``train_mini_batch`` takes.
        contexts: for ``"critic"`` (and ``"actor"``), where they were built in their own.

    Returns:
        What ``train_mini_batch`` returns for the actor, and for the critic.

    Raises:
        ValueError: the two cannot be trained together; the message says which setting and why.
    """
    trainers = {"actor": getattr(actor, "actor", None) or actor, "critic": critic}
    check(trainers["actor"].engine, trainers["critic"].engine)
    loops = {
        "critic": lambda: trainers["critic"].train_mini_batch(critic_data),
        "actor": lambda: trainers["actor"].train_mini_batch(actor_data),
    }
    results = run_together(loops, scheduler, contexts)
    return results["actor"], results["critic"]


def check(actor: Any, critic: Any) -> None:
    """Refuse two verl engines that cannot share a schedule.

    Raises:
        ValueError: which setting, its values, and what to do.
    """
    for role, engine in (("actor", actor), ("critic", critic)):
        if not hasattr(engine, "tf_config"):
            raise ValueError(
                f"{role}: engine {type(engine).__name__} is not verl's Megatron engine; set "
                f"{role}.strategy to megatron"
            )
        replay = getattr(getattr(engine.engine_config, "router_replay", None), "mode", "disabled")
        if replay != "disabled":
            raise ValueError(
                f"{role}: router_replay.mode is {replay!r}, which keeps its state per process; "
                "disable it, or update actor and critic one after the other"
            )
        for reason in fall_back_reasons_of(engine.tf_config, split_weight=False):
            logger.warning("%s: actor and critic will not be fused: %s", role, reason)
    sizes = [engine.tf_config.tensor_model_parallel_size for engine in (actor, critic)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"tensor_model_parallel_size is {sizes[0]} for the actor and {sizes[1]} for the "
            "critic: verl's processes share one parallel state; make them equal"
        )
    _check_memory(actor, critic)


def _check_memory(actor: Any, critic: Any) -> None:
    """Both models' weights, gradients and optimizer states are on the device at once."""
    if not torch.cuda.is_available():
        return
    needed = sum(_offloaded_bytes(engine) for engine in (actor, critic))
    free, _ = torch.cuda.mem_get_info()
    if needed > free:
        raise ValueError(
            f"actor and critic together need {needed / 2**30:.1f} GiB more on the device, "
            f"{free / 2**30:.1f} GiB are free; update them one after the other, or shard more"
        )


def _offloaded_bytes(engine: Any) -> int:
    """What `engine` still has to bring to the device: weights, float32 gradients, Adam's state."""
    parameters = [p for chunk in engine.module for p in chunk.parameters()]
    away = [p for p in parameters if p.device.type == "cpu"]
    replicas = max(1, engine.get_data_parallel_size())
    return sum(p.numel() * (p.element_size() + 4 + 12 // replicas) for p in away)
