"""One pipeline stage of a trained model: layers, task runner, gradients, optimizer."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhfuse.algorithms.tally import Stats
from rlhfuse.config import Config, TrainedModelConfig
from rlhfuse.group_training import trains_groups
from rlhfuse.kernels.head_chunks import chunk_rows
from rlhfuse.kernels.keyed import key_of
from rlhfuse.models.dropout import Rows
from rlhfuse.models.loading import load_stage, load_trained_config
from rlhfuse.models.lora import add_adapters, merged_weights
from rlhfuse.models.stage import Compute, Head, ModelStage
from rlhfuse.placement import StagePlacement, replica_of, role_of
from rlhfuse.training.batch import MicroBatch
from rlhfuse.training.gradients import GradientSums
from rlhfuse.training.losses import LossFunction, actor_loss, critic_loss
from rlhfuse.training.memory import Held, logits_bytes
from rlhfuse.training.optimizer import StageOptimizer
from rlhfuse.training.split import WeightStore, split_linears
from rlhfuse.training.stage_runner import AutogradRunner


class TrainedStage:
    """A stage of a pipeline, read from its role's model folder."""

    def __init__(
        self,
        config: Config,
        pipeline: str,
        pp_stage: int,
        placement: StagePlacement,
        *,
        num_replicas: int = 1,
        device: torch.device,
        dtype: torch.dtype,
        total_steps: int,
    ) -> None:
        """Raises ValueError where the model folder does not fit (see `load_stage`), or has dropout
        that training does not support."""
        role = role_of(pipeline)
        model = model_config(config, role)
        load_trained_config(model.path)
        self._config = config
        self.pipeline = pipeline
        self.role = role
        self.replica = replica_of(pipeline)
        self.pp_stage = pp_stage
        self.layers = placement.layers[pp_stage]
        self.stage: ModelStage = load_stage(
            model.path,
            head=Head.LM if role == "actor" else Head.SCALAR,
            layers=range(*self.layers),
            first=pp_stage == 0,
            last=pp_stage == len(placement.ranks) - 1,
            device=device,
            dtype=dtype,
            new_head_seed=config.critic.init_seed if role == "critic" else None,
        )
        self._rows = Rows()
        self._drops = model.lora_dropout > 0
        self._stream = 0
        if model.lora_rank:
            add_adapters(
                self.stage,
                rank=model.lora_rank,
                alpha=model.lora_alpha,
                targets=model.target_modules,
                seed=config.trainer.seed,
                dropout=model.lora_dropout,
                rows=self._rows,
            )
        self._by_groups = trains_groups(config)
        self.sums = GradientSums(self.trained_parameters().values(), any_order=self._by_groups)
        store = WeightStore(self.sums) if config.fusion.split_weight else None
        if store is not None:
            split_linears(self.stage, store)
        if model.gradient_checkpointing:
            self.stage.around_layer = self._twice
        self.runner = AutogradRunner(self._compute, last=self.stage.last, weights=store)
        sharded = config.placement.shard_optimizer and num_replicas > 1
        self.num_shards = num_replicas if sharded else 1
        self.optimizer = StageOptimizer(
            self.trained_parameters(),
            self.sums,
            model.optim,
            total_steps,
            shard=self.replica if sharded else 0,
            num_shards=self.num_shards,
        )
        self._batches: Sequence[MicroBatch] = ()
        self._loss: LossFunction | None = None
        self._losses: dict[int, tuple[torch.Tensor, Stats]] = {}
        self._past: list[tuple[torch.Tensor, Stats]] = []  # of groups trained one by one
        self._factor = 1.0

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Those that the optimizer changes: all, or the adapters (and a scalar head)."""
        return {name: p for name, p in self.stage.named_parameters() if p.requires_grad}

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of the model as it computes: adapters merged in."""
        return merged_weights(self.stage)

    def begin(
        self, batches: Sequence[MicroBatch], num_tokens: int, num_samples: int, stream: int
    ) -> None:
        """Get ready for the micro-batches of one mini-batch; the counts are those of all
        replicas: what losses are divided by. `stream`: of its random numbers. Where groups are
        trained one by one, what came before stays, up to `clear`."""
        if self._by_groups:
            self._past += self._seen()
        self._batches = batches
        self._stream = key_of(self.role, stream)
        self._losses = {}
        if self.stage.last:
            make = actor_loss if self.role == "actor" else critic_loss
            self._loss = make(
                self._config,
                self.stage,
                num_tokens=num_tokens,
                num_samples=num_samples,
            )

    def loss(self) -> float:
        """Sum of the micro-batches' losses; 0 on a stage that is not the last."""
        return sum(float(loss) for loss, _ in self._past + self._seen()) * self._factor

    def stats(self) -> list[Stats]:
        """What the losses of the mini-batch saw."""
        return [stats for _, stats in self._past + self._seen()]

    def settle(self, factor: float) -> None:
        """All groups have been trained: their losses and gradients are to be times `factor`."""
        self._factor = factor
        self.sums.settle(factor)

    def _seen(self) -> list[tuple[torch.Tensor, Stats]]:
        return [self._losses[microbatch] for microbatch in sorted(self._losses)]

    def held(self) -> Held:
        """Bytes that the stage holds now, by kind."""
        parameters = list(self.stage.parameters())
        gradients = [g for p in parameters if (g := self.sums.of(p)) is not None]
        return Held(
            weights=sum(p.nbytes for p in parameters),
            gradients=sum(g.nbytes for g in gradients),
            optimizer=sum(t.nbytes for t in self.optimizer.state().tensors.values()),
            deferred=self.runner.deferred_bytes,
            logits=logits_bytes(self.stage, chunk_rows(self.stage.config.vocab_size)),
            microbatches=self.runner.num_held,
        )

    def clear(self) -> None:
        """Give up the mini-batch: no gradient and no saved activation remains."""
        self.runner.clear()
        self.sums.clear()
        self._losses, self._past, self._factor = {}, [], 1.0

    def _compute(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        batch = self._batches[microbatch]
        if self._drops:
            self._rows.set(batch.packed, batch.sample_ids, self._stream)
        inputs = batch.packed.token_ids if received is None else received
        output: torch.Tensor = self.stage(inputs, batch.packed)
        if self._loss is None:
            return output
        loss = self._loss(batch, output)
        self._losses[microbatch] = (loss.loss.detach(), loss.stats)
        return loss.loss

    def _twice(self, compute: Compute, hidden: torch.Tensor) -> torch.Tensor:
        """Holds only a layer's input, and computes it again in the backward pass: layer by layer,
        as a stage as a whole would then hold all that it saves at once, and with the same rows
        dropped, whatever micro-batch came in between."""
        keys = self._rows.keys

        def again(inputs: torch.Tensor) -> torch.Tensor:
            self._rows.keys = keys
            return compute(inputs)

        found: torch.Tensor = checkpoint(
            again, hidden, use_reentrant=False, preserve_rng_state=False
        )
        return found


def model_config(config: Config, role: str) -> TrainedModelConfig:
    """The configuration of a trained role."""
    return config.actor if role == "actor" else config.critic
