"""The causes that a device's time is given to, and what each is called.

Every second of every lane has exactly one cause. A cause is *work* (computing what the algorithm
asks for), *movement* (bytes on their way, nothing computed) or *idle*.
"""

from enum import StrEnum

from rlhfuse.timeline import Kind


class Cause(StrEnum):
    """Exclusive: times of all causes of one lane add up to its wall time."""

    # work
    GENERATE = "generate"
    PREFILL = "prefill"
    SCORE = "score"
    REWARD = "reward"
    ADVANTAGE = "advantage"
    FORWARD = "forward"
    BACKWARD = "backward"
    INPUT_GRADIENT = "input_gradient"
    WEIGHT_GRADIENT = "weight_gradient"
    OPTIMIZER = "optimizer"
    COMPUTE = "compute"  # of unknown purpose
    # movement
    DP_SYNC = "dp_sync"  # collectives over data-parallel ranks, once all of them are there
    TRANSFER = "transfer"  # exposed: nothing was computed meanwhile
    MIGRATE = "migrate"
    WEIGHTS = "weights"
    SWAP = "swap"
    CHECKPOINT = "checkpoint"
    OTHER = "other"  # labelled, but as none of the above
    # idle
    LONG_TAIL = "long_tail"  # others still generate, and nothing could be scored here
    STAGE_WAIT = "stage_wait"  # a barrier: others finish, or scoring was ready but had to wait
    WARM_UP = "warm_up"  # before the lane's first task of a training round
    UPSTREAM = "wait_upstream"  # blocked on an activation
    DOWNSTREAM = "wait_downstream"  # blocked on a gradient
    STRAGGLER = "straggling_peer"  # in a collective, until the last of its ranks has come
    COOL_DOWN = "cool_down"  # after the lane's last task of a training round
    REWARD_WAIT = "reward_wait"
    WEIGHT_SYNC = "weight_sync_wait"
    CHECKPOINT_WAIT = "checkpoint_wait"
    HOST_GAP = "host_gap"  # between two pieces of its own work, with all inputs there
    CONTROLLER = "controller"  # nobody worked: the controller, or nothing known


WORK = (
    Cause.GENERATE,
    Cause.PREFILL,
    Cause.SCORE,
    Cause.REWARD,
    Cause.ADVANTAGE,
    Cause.FORWARD,
    Cause.BACKWARD,
    Cause.INPUT_GRADIENT,
    Cause.WEIGHT_GRADIENT,
    Cause.OPTIMIZER,
    Cause.COMPUTE,
)
MOVEMENT = (
    Cause.DP_SYNC,
    Cause.TRANSFER,
    Cause.MIGRATE,
    Cause.WEIGHTS,
    Cause.SWAP,
    Cause.CHECKPOINT,
    Cause.OTHER,
)
IDLE = tuple(cause for cause in Cause if cause not in WORK and cause not in MOVEMENT)

CAUSE_OF_KIND = {
    Kind.F: Cause.FORWARD,
    Kind.B: Cause.BACKWARD,
    Kind.I: Cause.INPUT_GRADIENT,
    Kind.W: Cause.WEIGHT_GRADIENT,
    Kind.GENERATE: Cause.GENERATE,
    Kind.PREFILL: Cause.PREFILL,
    Kind.SCORE: Cause.SCORE,
    Kind.REWARD: Cause.REWARD,
    Kind.MIGRATE: Cause.MIGRATE,
    Kind.WEIGHTS: Cause.WEIGHTS,
    Kind.SWAP: Cause.SWAP,
    Kind.ADVANTAGE: Cause.ADVANTAGE,
    Kind.OPTIMIZER: Cause.OPTIMIZER,
    Kind.CHECKPOINT: Cause.CHECKPOINT,
    Kind.TRANSFER: Cause.TRANSFER,
    Kind.COMPUTE: Cause.COMPUTE,
    Kind.OTHER: Cause.OTHER,
}

# Causes by number, for columns; the number is the place in `Cause`.
CAUSES = tuple(Cause)
CODE = {cause: code for code, cause in enumerate(CAUSES)}
