"""One fused update of actor and critic with slime's Megatron training functions.

slime runs actor and critic as separate processes on the same GPUs and trains the critic first. To
fuse them, one process must hold both models; their two calls of slime's
``slime.backends.megatron_utils.model.train`` then become one::

    train_actor_critic(
        partial(train, rollout_id, actor_model, actor_optimizer, ...),
        partial(train, rollout_id, critic_model, critic_optimizer, ...),
        scheduler,
    )

The critic's values are computed before (slime's ``get_values``, forward only): the two training
passes do not depend on each other. slime is not on PyPI, so this is tried against loops of the same
form, not against slime itself.
"""

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

from rlhfuse.megatron.context import ModelContext
from rlhfuse.megatron.fused import FusedScheduler
from rlhfuse.megatron.together import run_together

Result = TypeVar("Result")
ROUTING_REPLAY = "ROUTING_REPLAY_STAGE"


def train_actor_critic(
    train_actor: Callable[[], Result],
    train_critic: Callable[[], Result],
    scheduler: FusedScheduler,
    contexts: Mapping[str, ModelContext] | None = None,
) -> tuple[Result, Result]:
    """Run both training functions, their steps fused; what each returns.

    Raises:
        ValueError: routing replay is on: it keeps its state in the process's environment.
    """
    if os.environ.get(ROUTING_REPLAY):
        raise ValueError(
            f"{ROUTING_REPLAY}={os.environ[ROUTING_REPLAY]}: routing replay is one state for the "
            "whole process; turn it off, or train actor and critic one after the other"
        )
    loops = {"critic": train_critic, "actor": train_actor}
    results = run_together(loops, scheduler, contexts)
    return results["actor"], results["critic"]
