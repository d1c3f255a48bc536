"""What a `Config` names outside itself: folders, files, variables and packages must be there."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rlhfuse.batch_sizes import trained_models
from rlhfuse.config import Config


def check_files(config: Config) -> None:
    """Raise a `ValueError` that names every model folder, file or variable that is missing."""
    broken = [*_missing(config), *_not_installed(config)]
    if broken:
        raise ValueError("; ".join(broken))


def _missing(config: Config) -> Iterator[str]:
    folders = {"actor.path": config.actor.path, "reference.path": config.reference.path}
    folders["reward.path"] = config.reward.path
    folders["critic.path"] = config.critic.path if config.uses_critic else ""
    for place, folder in folders.items():
        if folder and not Path(folder).is_dir():
            yield f"{place}: there is no folder {folder!r}"
        elif folder and not (Path(folder) / "config.json").is_file():
            yield f"{place}: {folder!r} is no Hugging Face model folder: config.json is missing"
    files = [("data.train_files", name) for name in config.data.train_files]
    for index, entry in enumerate(config.data.validation):
        files += [(f"data.validation.{index}.files", name) for name in entry.files]
    if config.reward.function is not None:
        files.append(("reward.function.path", config.reward.function.path))
    for place, name in files:
        if not Path(name).is_file():
            yield f"{place}: there is no file {name!r}"
    variable = config.reward.auth_env
    if variable and not os.environ.get(variable):
        yield f"reward.auth_env: the environment variable {variable} is not set"


def _not_installed(config: Config) -> Iterator[str]:
    if config.actor.backend == "megatron" and find_spec("megatron") is None:
        yield "actor.backend: megatron needs the package megatron-core, or use torch"
    nixl = config.rollout.vllm.kv_transfer == "nixl" and config.rollout.engine != "torch"
    if nixl and find_spec("nixl") is None:
        yield (
            "rollout.vllm.kv_transfer: nixl needs the package nixl (pip install --no-deps nixl "
            "nixl-cu12), or use auto"
        )
    for role, model in trained_models(config):
        if model.lora_rank and find_spec("peft") is None:
            yield f"{role}.lora_rank: needs the package peft (pip install peft), or 0"
