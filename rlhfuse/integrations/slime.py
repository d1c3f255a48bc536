"""One fused update of actor and critic with slime's Megatron training functions.

slime runs actor and critic as separate processes on the same GPUs and trains the critic first. To
fuse them, one process must hold both models; their two calls of slime's
``slime.backends.megatron_utils.model.train`` then become one::

    train_actor_critic(
        partial(train, rollout_id, actor_model, actor_optimizer, ...),
        partial(train, rollout_id, critic_model, critic_optimizer, ...),
        scheduler,
        contexts,
    )

slime's functions read ``get_args()`` of megatron.training at every step, the kind of loss among
them, and a process has one such object: each role needs a `ModelContext` with its own::

    critic_state = ModelContext.create(initialize, reverse=True)
    with critic_state.active():
        set_args(critic_args)  # loss_type="value_loss"; then slime's setup of the critic
    contexts = {"actor": ModelContext.current(), "critic": critic_state}

The critic's values are computed before (slime's ``get_values``, forward only): the two training
passes do not depend on each other. slime is not on PyPI (a package of that name there is empty), so
this is tried against loops of the form of its ``train`` and ``train_one_step`` (their calls of
Megatron, arguments and globals), not against slime itself.
"""

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

from rlhfuse.megatron.context import ModelContext
from rlhfuse.megatron.fused import FusedScheduler
from rlhfuse.megatron.together import run_together

Result = TypeVar("Result")
ROUTING_REPLAY = ("ENABLE_ROUTING_REPLAY", "ROUTING_REPLAY_STAGE")


def train_actor_critic(
    train_actor: Callable[[], Result],
    train_critic: Callable[[], Result],
    scheduler: FusedScheduler,
    contexts: Mapping[str, ModelContext] | None = None,
) -> tuple[Result, Result]:
    """Run both training functions, their steps fused; what each returns.

    Raises:
        ValueError: routing replay is on: it keeps its state in the process's environment. Or both
            would be trained with the same arguments.
    """
    for name in ROUTING_REPLAY:
        if os.environ.get(name, "0") not in ("0", ""):
            raise ValueError(
                f"{name}={os.environ[name]}: routing replay is one state for the whole process; "
                "turn it off, or train actor and critic one after the other"
            )
    _check_arguments(contexts or {})
    loops = {"critic": train_critic, "actor": train_actor}
    results = run_together(loops, scheduler, contexts)
    return results["actor"], results["critic"]


def _check_arguments(contexts: Mapping[str, ModelContext]) -> None:
    here = ModelContext.current()
    of_actor, of_critic = (contexts.get(role, here).arguments for role in ("actor", "critic"))
    if of_actor is not None and of_actor is of_critic:
        raise ValueError(
            "actor and critic have the same get_args(): both would be trained with one loss; call "
            "set_args(critic_args) inside `with contexts['critic'].active()`"
        )
