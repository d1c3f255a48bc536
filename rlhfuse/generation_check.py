"""Rules between the keys of `Config` on how responses are generated (see `config_check`)."""

from collections.abc import Iterator

from rlhfuse.config import Config


def vllm(config: Config) -> Iterator[str]:
    """What vLLM cannot do, or not with what else is asked for."""
    rollout = config.rollout
    if rollout.vllm.speculative_config is not None and rollout.exactness == "token":
        yield (
            "rollout.exactness: token is not possible with rollout.vllm.speculative_config, "
            "choose distribution"
        )
    if config.placement.dtype == "bfloat16" and rollout.exactness == "token":
        yield (
            "rollout.exactness: token needs float32, and placement.dtype is bfloat16; choose "
            "distribution"
        )
    if rollout.vllm.speculative_config is not None and rollout.min_p:
        yield (
            "rollout.min_p: vLLM does not know it with rollout.vllm.speculative_config; set it to "
            "0, or use top_p"
        )
    if rollout.vllm.tensor_parallel_size > 1:
        yield (
            f"rollout.vllm.tensor_parallel_size: {rollout.vllm.tensor_parallel_size}, but an "
            "instance runs on one device (`rlhfuse plan` alone plans for more); set it to 1"
        )


def penalties(config: Config) -> Iterator[str]:
    """Where penalties cannot be counted, or would enter a loss on one side only."""
    rollout = config.rollout
    counts = rollout.presence_penalty or rollout.frequency_penalty
    own = rollout.vllm.speculative_config is not None or rollout.vllm.position_keyed == "off"
    if counts and own and rollout.engine != "torch":
        yield (
            "rollout.presence_penalty: neither it nor frequency_penalty is possible with "
            "rollout.vllm.speculative_config or rollout.vllm.position_keyed: off (vLLM's own "
            "sampler takes the response of a sample that moved for its prompt); set both to 0"
        )
    if config.penalises and rollout.old_log_probs == "engine":
        yield (
            "rollout.old_log_probs: engine gives those with penalties, and the update's are "
            "without; choose recompute"
        )
