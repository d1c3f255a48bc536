"""The batch arithmetic of a `Config`: replicas, mini-batches, optimizer steps, the run's length."""

from rlhfuse.config import Config, TrainedModelConfig


def trained_models(config: Config) -> list[tuple[str, TrainedModelConfig]]:
    """(role, its configuration) of the models that a step trains."""
    critic: list[tuple[str, TrainedModelConfig]] = [("critic", config.critic)]
    return [("actor", config.actor), *(critic if config.uses_critic else [])]


def data_parallel(config: Config, role: str) -> int:
    """Data-parallel replicas of a trained role (1 where the stages do not divide the devices)."""
    place = config.placement
    devices = max(1, place.num_devices // place.tp)
    stages = (place.actor_pp if role == "actor" else place.critic_pp) or devices
    return max(1, devices // stages)


def num_optimizer_steps(config: Config, model: TrainedModelConfig) -> int:
    """Optimizer steps of one training step."""
    return model.ppo_epochs * (config.data.train_batch_size // model.ppo_mini_batch_size)


def total_steps(config: Config, num_rows: int) -> int:
    """Training steps of the run. Batches run on over the end of an epoch, so none is short.

    `trainer.total_training_steps`, or else as many full batches as `trainer.total_epochs` hold;
    none is a `ValueError`.
    """
    prompts, epochs = config.data.train_batch_size, config.trainer.total_epochs
    steps = config.trainer.total_training_steps or num_rows * epochs // prompts
    if steps == 0:
        raise ValueError(
            f"data.train_batch_size: {prompts} prompts a step, but {num_rows} rows in {epochs} "
            "epoch(s) fill no batch; lower it, or raise trainer.total_epochs"
        )
    return steps


def batch_arithmetic(config: Config, num_rows: int) -> list[str]:
    """The resolved batch sizes of a run over `num_rows` prompts, one fact a line."""
    prompts, responses = config.data.train_batch_size, config.rollout.n
    epochs, steps = config.trainer.total_epochs, total_steps(config, num_rows)
    lines = [
        f"step: {prompts} prompts x {responses} responses = {prompts * responses} samples",
        *(_model_line(config, role, model) for role, model in trained_models(config)),
        f"epoch: {num_rows} rows / {prompts} prompts = {num_rows / prompts:.4g} steps",
    ]
    used = steps * prompts
    reason = "trainer.total_training_steps"
    if not config.trainer.total_training_steps:
        reason = f"{epochs} epoch(s) x {num_rows} rows / {prompts} prompts"
        left = num_rows * epochs - used
        reason += f", {left} rows left over" if left else ""
    lines.append(
        f"run: {steps} steps ({reason}), {used * responses} samples, "
        + ", ".join(
            f"{steps * num_optimizer_steps(config, model)} {role} optimizer steps"
            for role, model in trained_models(config)
        )
    )
    return lines


def _model_line(config: Config, role: str, model: TrainedModelConfig) -> str:
    size, responses = model.ppo_mini_batch_size, config.rollout.n
    count = config.data.train_batch_size // size
    micro = (
        f"{model.num_microbatches} micro-batches"
        if model.num_microbatches
        else f"micro-batches of up to {model.ppo_max_token_len_per_gpu} tokens"
    )
    return (
        f"{role}: {model.ppo_epochs} epoch(s) x {count} mini-batches of {size} prompts "
        f"({size * responses} samples, in {micro}) = {num_optimizer_steps(config, model)} "
        "optimizer steps a step"
    )
