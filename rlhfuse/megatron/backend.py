"""Actor and critic as Megatron models under our launcher: ``actor.backend: megatron``.

Each role has a parallel state of its own, the critic's pipelines reversed. Tasks run through
Megatron's forward and backward steps, gradients through its DDP, updates through its optimizer,
states through its distributed checkpoint.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from rlhfuse.algorithms.tally import Stats
from rlhfuse.config import Config
from rlhfuse.megatron.checkpoint import load_model, save_state, state_of
from rlhfuse.megatron.context import ModelContext, Turns
from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.trained_model import ModelRunner, TrainedModel
from rlhfuse.placement import StagePlacement, replicas, role_of, roles_of
from rlhfuse.training.backend import Key
from rlhfuse.training.batch import MicroBatch
from rlhfuse.training.control import Control
from rlhfuse.training.executor import StageRunner
from rlhfuse.training.memory import Held
from rlhfuse.training.numbers import Numbers
from rlhfuse.training.snapshot import Keep, Part

logger = logging.getLogger(__name__)

# The order of our placement: tensor-parallel ranks are neighbours, then a pipeline's stages.
_RANK_ORDER = "tp-cp-ep-pp-dp"


class MegatronBackend:
    """The Megatron models of one rank. See `Backend` for what its methods do."""

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        pipelines: Mapping[str, StagePlacement],
        device: torch.device,
        dtype: torch.dtype,
        total_steps: int,
        control: Control,
    ) -> None:
        """See `MakeBackend`."""
        if device.type == "cpu":
            logger.warning("Megatron on a CPU (gloo): for tests and trials")
        self._control = control
        self._on_cpu = device.type == "cpu"
        row = rank // config.placement.tp
        minutes = math.ceil(config.trainer.wait_timeout_s / 60)
        self._models: dict[str, TrainedModel] = {}
        contexts: dict[str, ModelContext | None] = {}
        with self._shims():
            for role in roles_of(sorted(pipelines)):
                key = _own_stage(pipelines, role, row)
                context = ModelContext.create(
                    partial(
                        parallel_state.initialize_model_parallel,
                        tensor_model_parallel_size=config.placement.tp,
                        pipeline_model_parallel_size=len(pipelines[role].ranks),
                        distributed_timeout_minutes=minutes,
                        order=_RANK_ORDER,
                    ),
                    reverse=role == "critic",
                )
                sharded = config.placement.shard_optimizer and len(replicas(pipelines, role)) > 1
                with context.active():
                    self._models[role] = TrainedModel(
                        config,
                        key,
                        pipelines[role],
                        sharded=sharded,
                        device=device,
                        dtype=dtype,
                        total_steps=total_steps,
                    )
                contexts[role] = context
        self._turns = Turns(contexts)

    @property
    def runners(self) -> Mapping[Key, StageRunner]:
        return {
            (model.pipeline, model.pp_stage): ModelRunner(model, partial(self._turns.to, role))
            for role, model in self._models.items()
        }

    def begin(
        self,
        key: Key,
        batches: Sequence[MicroBatch],
        num_tokens: int,
        num_samples: int,
        stream: int,
    ) -> None:
        """These models are made without dropout: nothing is drawn."""
        with self._turn(role_of(key[0])) as model:
            model.begin(batches, num_tokens, num_samples)

    def gradients_complete(self, key: Key) -> None:
        """Megatron's DDP has begun by itself, where it overlaps."""

    def finish_gradients(self, roles: Sequence[str]) -> None:
        for role in roles:
            with self._turn(role) as model:
                model.finish_gradients()

    def settle(self, factor: float) -> None:
        """Never asked for."""
        raise AssertionError("groups are trained one by one by our own stages alone")

    def numbers(self, roles: Sequence[str]) -> dict[str, Numbers]:
        norms, losses = [], []
        for role in roles:
            with self._turn(role) as model:
                norms.append(model.norm())
                losses.append(model.loss())
        summed = torch.tensor(losses, dtype=torch.float64)
        self._control.sum_up(summed)
        return {
            role: Numbers(norm, float(loss))
            for role, norm, loss in zip(roles, norms, summed, strict=True)
        }

    def stats(self, role: str) -> list[Stats]:
        return self._models[role].stats()

    def lr(self, role: str) -> float:
        return self._models[role].lr

    def step(self, role: str, norm: float) -> None:
        """Megatron's optimizer clips by the norm that it measures itself, which is `norm`."""
        with self._turn(role) as model:
            model.step()

    def clear(self) -> None:
        for role in self._models:
            with self._turn(role) as model:
                model.clear()
        self._turns.end()

    def end_update(self) -> None:
        self._turns.end()

    def named_tensors(self, role: str) -> dict[str, torch.Tensor]:
        with self._turn(role) as model:
            return model.named_tensors()

    def parts(self, keep: Keep) -> list[Part]:
        """Written together by all ranks, over the default group: an update uses others."""
        found: list[Part] = []
        for role in self._models:
            with self._turn(role) as model:
                found.append(partial(self._write, role, state_of(model, keep)))
        return found

    def load(self, folder: Path) -> None:
        for role in self._models:
            with self._turn(role) as model:
                load_model(folder / role, model)

    def held(self) -> Held:
        return sum((model.held() for model in self._models.values()), Held())

    def _write(self, role: str, state: Mapping[str, Any], folder: Path) -> None:
        with self._shims():  # perhaps in a thread of its own
            save_state(state, folder / role)

    def close(self) -> None:
        self._turns.end()

    @contextlib.contextmanager
    def _turn(self, role: str) -> Iterator[TrainedModel]:
        """Within, Megatron's state is that of `role`; it stays so until another's turn."""
        self._turns.to(role)
        with self._shims():
            yield self._models[role]

    def _shims(self) -> contextlib.AbstractContextManager[None]:
        return on_cpu() if self._on_cpu else contextlib.nullcontext()


def _own_stage(pipelines: Mapping[str, StagePlacement], role: str, row: int) -> Key:
    """The one stage of `role` that the ranks of `row` hold."""
    found = [
        (name, place.ranks.index(row))
        for name in replicas(pipelines, role)
        for place in (pipelines[name],)
        if row in place.ranks
    ]
    assert len(found) == 1, f"row {row} holds {len(found)} stages of the {role}"
    return found[0]
