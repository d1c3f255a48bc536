"""What may change between a run and its resumption: all changes are named, some refused."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from rlhfuse.config import Config

_MODEL = "the checkpoint is of that model"
_ARITHMETIC = "the batch arithmetic of a run is fixed"
_ORDER = "the run is in the middle of its prompts"
_REFUSED = {
    "actor.path": _MODEL,
    "critic.path": _MODEL,
    "critic.init_seed": _MODEL,
    "reference.path": "rewards are measured against that model",
    "algorithm.adv_estimator": "it decides which models are trained",
    "actor.backend": "the checkpoint is in the other one's format",
    "placement.dtype": "the checkpoint has numbers of that type",
    "data.train_batch_size": _ARITHMETIC,
    "rollout.n": _ARITHMETIC,
    "actor.ppo_mini_batch_size": _ARITHMETIC,
    "critic.ppo_mini_batch_size": _ARITHMETIC,
    "actor.ppo_epochs": _ARITHMETIC,
    "critic.ppo_epochs": _ARITHMETIC,
    "data.train_files": _ORDER,
    "data.shuffle": _ORDER,
    "trainer.seed": "samples and their order are drawn from it",
}
_STAGES = frozenset(
    {
        "placement.num_devices",
        "placement.actor_pp",
        "placement.critic_pp",
        "placement.tp",
        "placement.shard_optimizer",
    }
)
# What only decides when and where things run, or what is shown and kept.
_HARMLESS = (
    "fusion.",
    "data.validation",
    "trainer.",
    "placement.pin_cpus",
    "placement.ray_address",
    "reward.auth_env",
    "reward.batch_size",
    "reward.max_concurrency",
    "reward.num_workers",
    "reward.retries",
    "reward.timeout_s",
)
_ROUNDING = frozenset({"fusion.early_training"})
_SCHEDULED = frozenset({"trainer.total_training_steps", "trainer.total_epochs"})


@dataclass(frozen=True, slots=True)
class Changes:
    """`refused` and `told` are lines for people; `stages`: the pipelines are to be cut anew."""

    refused: tuple[str, ...]
    told: tuple[str, ...]
    stages: bool


def compare(before: Config, now: Config) -> Changes:
    """What differs between the configuration of a run and the one it is to be resumed with."""
    refused, told = [], []
    stages = False
    for key, old, new in _differences(before, now):
        change = f"{key}: {old!r} is now {new!r}"
        if key in _REFUSED:
            refused.append(f"{change} ({_REFUSED[key]})")
        elif key in _STAGES:
            stages = True
            told.append(f"{change}: pipeline stages are cut anew, results stay equal to rounding")
        elif key in _ROUNDING:
            told.append(f"{change}: results stay equal to rounding")
        elif key.startswith(_HARMLESS) and not (key in _SCHEDULED and _has_schedule(now)):
            told.append(f"{change}: results do not change")
        else:
            told.append(f"{change}: results change from here on")
    return Changes(tuple(refused), tuple(told), stages)


def check_resume(before: Config, now: Config) -> Changes:
    """As `compare`, but a `ValueError` names all that is refused."""
    changes = compare(before, now)
    if changes.refused:
        raise ValueError(
            f"cannot resume with a changed configuration: {'; '.join(changes.refused)}. Take the "
            "old values, or start a new run (trainer.experiment_name) from the exported model"
        )
    return changes


def _has_schedule(config: Config) -> bool:
    return any(
        optim.lr_scheduler != "constant" for optim in (config.actor.optim, config.critic.optim)
    )


def _differences(before: Config, now: Config) -> Iterator[tuple[str, object, object]]:
    old, new = (dict(_flat(msgspec.to_builtins(config), "")) for config in (before, now))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def _flat(value: object, place: str) -> Iterator[tuple[str, object]]:
    """Dotted keys and their values; a list is one value."""
    if not isinstance(value, dict):
        yield place, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{place}.{key}" if place else str(key))
