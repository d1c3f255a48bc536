"""A drop-in scheduler for Megatron-core: better schedules of one model, fused ones of two.

In a training script, change one import::

    from rlhfuse.megatron import get_forward_backward_func

or, without touching any script, call `install()` before training starts. An actor and a critic that
are trained together: `fused_forward_backward`. The names below are all that users need.
"""

from rlhfuse.megatron.api import fused_forward_backward, get_forward_backward_func
from rlhfuse.megatron.context import ModelContext
from rlhfuse.megatron.critic import Critic, build_reversed_critic
from rlhfuse.megatron.dropin import Scheduler
from rlhfuse.megatron.fused import FusedScheduler
from rlhfuse.megatron.install import install, installed, uninstall
from rlhfuse.megatron.orders import Costs
from rlhfuse.megatron.support import explain

__all__ = [
    "Costs",
    "Critic",
    "FusedScheduler",
    "ModelContext",
    "Scheduler",
    "build_reversed_critic",
    "explain",
    "fused_forward_backward",
    "get_forward_backward_func",
    "install",
    "installed",
    "uninstall",
]
