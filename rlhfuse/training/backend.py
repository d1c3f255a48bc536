"""What `RankTrainer` needs of the models that it trains, whoever runs them.

`rlhfuse.training.torch_backend` trains our own stages, `rlhfuse.megatron.backend` Megatron's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from rlhfuse.algorithms.tally import Stats
from rlhfuse.config import Config
from rlhfuse.placement import StagePlacement
from rlhfuse.training.batch import MicroBatch
from rlhfuse.training.control import Control
from rlhfuse.training.executor import StageRunner
from rlhfuse.training.memory import Held
from rlhfuse.training.numbers import Numbers
from rlhfuse.training.snapshot import Keep, Part

Key = tuple[str, int]
"""A stage: (pipeline, pp_stage)."""


class Backend(Protocol):
    """The stages of one rank, of every trained role. Messages between stages are [rows, hidden]."""

    @property
    def runners(self) -> Mapping[Key, StageRunner]:
        """What computes the tasks of this rank's stages."""

    def begin(
        self,
        key: Key,
        batches: Sequence[MicroBatch],
        num_tokens: int,
        num_samples: int,
        stream: int,
    ) -> None:
        """Get ready for a stage's micro-batches of one mini-batch; the counts are those of all
        replicas: what losses are divided by. `stream`: of the mini-batch's random numbers, the same
        on all ranks."""

    def gradients_complete(self, key: Key) -> None:
        """The stage has done its last micro-batch: its sums may start to travel to replicas."""

    def finish_gradients(self, roles: Sequence[str]) -> None:
        """Wait until all gradients are the sums of all replicas. Collective."""

    def settle(self, factor: float) -> None:
        """Where groups are trained one by one: losses and gradients are to be times `factor`, now
        that the batch's normaliser is known."""

    def numbers(self, roles: Sequence[str]) -> dict[str, Numbers]:
        """Gradient norm and loss of every role, the same on all ranks. Collective."""

    def stats(self, role: str) -> list[Stats]:
        """What the losses on this rank saw in the mini-batch."""

    def lr(self, role: str) -> float:
        """Learning rate of the next step."""

    def step(self, role: str, norm: float) -> None:
        """Clip to the configured norm, given the gradient's, and update. Collective."""

    def held(self) -> Held:
        """Bytes that the rank's stages hold now, by kind: told when memory runs out."""

    def clear(self) -> None:
        """Give up the mini-batch: no gradient and no saved activation remains."""

    def end_update(self) -> None:
        """The last mini-batch is done, or given up."""

    def named_tensors(self, role: str) -> dict[str, torch.Tensor]:
        """The weights of this rank's stages, by Hugging Face name. Collective."""

    def parts(self, keep: Keep) -> Sequence[Part]:
        """This rank's part of a checkpoint, to be written later: of what `keep` returns for each
        tensor, which may be a copy while training goes on."""

    def load(self, folder: Path) -> None:
        """Restore what `parts` wrote, also of other pipeline stages. Raises ValueError where a
        part is missing, damaged, or of another model."""

    def close(self) -> None:
        """Leave the process groups made for it; also in the middle of an update."""


class MakeBackend(Protocol):
    """Collective: all ranks make theirs at the same time."""

    def __call__(
        self,
        config: Config,
        *,
        rank: int,
        pipelines: Mapping[str, StagePlacement],
        device: torch.device,
        dtype: torch.dtype,
        total_steps: int,
        control: Control,
    ) -> Backend:
        """`control`: of all ranks. Raises ValueError where a model
        folder does not fit."""
