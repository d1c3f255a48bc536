"""Our own stages as a `Backend`: Hugging Face layers, our optimizer, replicas and checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch

from rlhfuse.algorithms.tally import Stats
from rlhfuse.config import Config
from rlhfuse.placement import StagePlacement, replicas, role_of
from rlhfuse.training import checkpoint
from rlhfuse.training.backend import Key
from rlhfuse.training.batch import MicroBatch
from rlhfuse.training.control import Control
from rlhfuse.training.executor import StageRunner
from rlhfuse.training.memory import Held
from rlhfuse.training.numbers import Numbers, exchange
from rlhfuse.training.replicas import Replicas
from rlhfuse.training.snapshot import Keep, Part
from rlhfuse.training.tied import TiedEmbeddings
from rlhfuse.training.trained_stage import TrainedStage, model_config


class TorchBackend:
    """The `TrainedStage`s of one rank. See `Backend` for what its methods do."""

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
        self._config = config
        self._pipelines = dict(pipelines)
        self._control = control
        self._stages = {
            (name, s): TrainedStage(
                config,
                name,
                s,
                place,
                num_replicas=len(replicas(pipelines, role_of(name))),
                device=device,
                dtype=dtype,
                total_steps=total_steps,
            )
            for name, place in sorted(pipelines.items())
            for s, home in enumerate(place.ranks)
            if home == rank
        }
        timeout = timedelta(seconds=config.trainer.wait_timeout_s)
        self._tied = TiedEmbeddings(pipelines, rank, timeout)
        self._replicas = Replicas(pipelines, rank, timeout)

    @property
    def runners(self) -> Mapping[Key, StageRunner]:
        return {key: stage.runner for key, stage in self._stages.items()}

    def begin(
        self,
        key: Key,
        batches: Sequence[MicroBatch],
        num_tokens: int,
        num_samples: int,
        stream: int,
    ) -> None:
        self._stages[key].begin(batches, num_tokens, num_samples, stream)

    def gradients_complete(self, key: Key) -> None:
        self._stages[key].sums.fill()
        self._replicas.start(self._stages[key])

    def finish_gradients(self, roles: Sequence[str]) -> None:
        for stage in self._of(*roles):
            self._replicas.finish(stage)
        for stage in self._of(*roles):
            self._tied.sum_up(stage)

    def settle(self, factor: float) -> None:
        for stage in self._stages.values():
            stage.settle(factor)

    def numbers(self, roles: Sequence[str]) -> dict[str, Numbers]:
        stages = {role: len(self._pipelines[role].ranks) for role in roles}
        return exchange(list(self._of(*roles)), stages, self._control)

    def stats(self, role: str) -> list[Stats]:
        return [one for stage in self._of(role) for one in stage.stats()]

    def lr(self, role: str) -> float:
        return next(self._of(role)).optimizer.lr

    def step(self, role: str, norm: float) -> None:
        clip = model_config(self._config, role).optim.clip_grad
        for stage in self._of(role):
            stage.optimizer.step(min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
            self._replicas.share(stage)

    def held(self) -> Held:
        return sum((stage.held() for stage in self._stages.values()), Held())

    def clear(self) -> None:
        for stage in self._stages.values():
            stage.clear()

    def end_update(self) -> None:
        """Nothing is left to do."""

    def named_tensors(self, role: str) -> dict[str, torch.Tensor]:
        return {name: weight for stage in self._of(role) for name, weight in stage.weights()}

    def parts(self, keep: Keep) -> list[Part]:
        return [
            checkpoint.stage_part(stage, self._pipelines[stage.pipeline], keep)
            for stage in self._stages.values()
        ]

    def load(self, folder: Path) -> None:
        for stage in self._stages.values():
            checkpoint.load_stage_state(folder, stage)

    def close(self) -> None:
        self._replicas.close()
        self._tied.close()

    def _of(self, *roles: str) -> Iterator[TrainedStage]:
        return (stage for stage in self._stages.values() if stage.role in roles)
