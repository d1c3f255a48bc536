"""One role's Megatron model on one rank: its stage, optimizer, tasks and losses."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from rlhfuse.algorithms.tally import Stats
from rlhfuse.config import Config, OptimConfig
from rlhfuse.megatron.call import Call
from rlhfuse.megatron.groups import groups_of
from rlhfuse.megatron.hf_model import Packing, load_gpt, real_rows
from rlhfuse.megatron.hf_weights import hf_tensors
from rlhfuse.megatron.model_run import ModelRun
from rlhfuse.models.loading import load_trained_config
from rlhfuse.models.stage import Head
from rlhfuse.placement import StagePlacement, role_of
from rlhfuse.schedules.ir import Op, Task
from rlhfuse.training.backend import Key
from rlhfuse.training.batch import MicroBatch
from rlhfuse.training.losses import LossFunction, actor_loss, critic_loss
from rlhfuse.training.memory import Held
from rlhfuse.training.optimizer import learning_rate
from rlhfuse.training.trained_stage import model_config


class TrainedModel:
    """The stage of a pipeline that this rank holds. Every method wants the model's own parallel
    state to be in force."""

    def __init__(
        self,
        config: Config,
        key: Key,
        placement: StagePlacement,
        *,
        sharded: bool,
        device: torch.device,
        dtype: torch.dtype,
        total_steps: int,
    ) -> None:
        """Collective over the model's ranks. `sharded`: moments over data-parallel replicas.

        Raises:
            ValueError: Megatron cannot have the model (see `load_gpt`).
        """
        self.pipeline, self.pp_stage = key
        self.role = role_of(self.pipeline)
        self.last = self.pp_stage + 1 == len(placement.ranks)
        self.steps = 0
        self._config = config
        self._sharded = sharded
        self._device = device
        self._total_steps = total_steps
        self._model_config = model_config(config, self.role)
        self.groups = groups_of(None, None)
        self._vocab_size = load_trained_config(self._model_config.path).vocab_size
        self.gpt = load_gpt(
            self._model_config.path,
            head=Head.LM if self.role == "actor" else Head.SCALAR,
            layers=placement.layers,
            tp=config.placement.tp,
            device=device,
            dtype=dtype,
            recompute=self._model_config.gradient_checkpointing,
            new_head_seed=config.critic.init_seed if self.role == "critic" else None,
        )
        self.ddp = _in_ddp(self.gpt, sharded)
        self.optimizer = get_megatron_optimizer(
            _optimizer_config(self._model_config.optim, dtype, sharded), [self.ddp]
        )
        self._run: ModelRun | None = None
        self._loss: LossFunction | None = None
        self._seen: dict[int, tuple[torch.Tensor, Stats]] = {}

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self._model_config.optim, self.steps, self._total_steps)

    def begin(self, batches: Sequence[MicroBatch], num_tokens: int, num_samples: int) -> None:
        """See `Backend.begin`."""
        self._zero()
        self._seen = {}
        self._loss = self._make_loss(num_tokens, num_samples) if self.last else None
        numbers = range(len(batches))
        call = Call(
            forward_step_func=self._forward_step,
            data_iterator=iter(list(zip(numbers, batches, strict=True))),
            model=self.ddp,
            num_microbatches=len(batches),
            seq_length=max(batch.packed.num_rows for batch in batches),
            micro_batch_size=1,
        )
        split = frozenset(numbers) if self._config.fusion.split_weight else frozenset()
        self._run = ModelRun(call, self.groups, split=split, in_flight=1)
        self._run.begin()

    def compute(
        self, op: Op, microbatch: int, received: torch.Tensor | None
    ) -> torch.Tensor | None:
        """One task; messages are [rows, H] here and [rows, 1, H] in Megatron."""
        assert self._run is not None
        task = Task(self.pipeline, op, self.pp_stage, microbatch)
        made = self._run.compute(task, None if received is None else received[:, None])
        return None if made is None else made.detach()[:, 0]

    def finish_gradients(self) -> None:
        """Gradients become the sums of all replicas, and of both ends' tied embeddings."""
        assert self._run is not None
        self._run.end()
        self._run = None

    def norm(self) -> float:
        """Of the whole model's gradient. Collective."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def loss(self) -> float:
        """Sum of the micro-batches' losses; 0 where this rank does not count."""
        if self.groups.collection.tp.rank():
            return 0.0
        return sum(float(self._seen[mb][0]) for mb in sorted(self._seen))

    def stats(self) -> list[Stats]:
        """What the losses saw; once over tensor-parallel ranks."""
        if self.groups.collection.tp.rank():
            return []
        return [self._seen[mb][1] for mb in sorted(self._seen)]

    def step(self) -> None:
        """Clip and update. Collective."""
        for group in self.optimizer.param_groups:  # as Megatron's own parameter scheduler
            group["lr"] = self.lr
            group["weight_decay"] = self._model_config.optim.weight_decay * group["wd_mult"]
        self.optimizer.step()
        self.steps += 1
        self._zero()

    def forget_moments(self) -> None:
        """The optimizer is as before its first step, at the weights as they are now."""
        for inner in self._inner():
            inner.state.clear()
        self.optimizer.reload_model_params()

    def ready_for_moments(self) -> None:
        """Room for moments. Megatron's distributed optimizer makes it only for optimizers of
        Transformer Engine and Apex; torch's must seem to have stepped before it can load."""
        for inner in self._inner() if self._sharded else ():
            if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
                for parameter in (p for group in inner.param_groups for p in group["params"]):
                    inner.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }

    def load_moments(self, state: dict[str, Any]) -> None:
        """Restore the optimizer."""
        if not self._sharded:
            self.optimizer.load_state_dict(state)
            return
        moments = state.pop("param_state")
        self.optimizer.load_state_dict(state)
        (part,) = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        # Megatron looks for torch's step counts among the saved moments, where they are not; and
        # it gives all parameters one and the same, which Adam would count up for each of them.
        values = part.optimizer.state.values()
        steps = [value.pop("step", None) for value in values]
        part.load_parameter_state_from_fully_reshardable(moments)
        for value, step in zip(values, steps, strict=True):
            if step is not None:
                value["step"] = step.clone()

    def clear(self) -> None:
        """Give up the mini-batch."""
        if self._run is not None:
            self._run.close()
            self._run = None
        self._zero()

    def held(self) -> Held:
        """Bytes that this rank holds now, but for activations."""
        parameters = list(self.gpt.parameters())
        moments = (t for state in self.optimizer.state.values() for t in _tensors_of(state))
        return Held(
            weights=sum(p.nbytes for p in parameters),
            gradients=sum(p.main_grad.nbytes for p in parameters if hasattr(p, "main_grad")),
            optimizer=sum(t.nbytes for t in moments),
        )

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """This stage's weights by Hugging Face name, whole. Collective over tensor-parallel
        ranks."""
        group = self.groups.collection.tp
        return hf_tensors(self.gpt, group, vocab_size=self._vocab_size)

    def lm_head_weight(self) -> torch.Tensor:
        """See `LossHead`."""
        weight: torch.Tensor = self.gpt.shared_embedding_or_output_weight()
        rows = real_rows(self._vocab_size, weight.shape[0], self.groups.collection.tp)
        return weight if rows == weight.shape[0] else weight[:rows]

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `LossHead`."""
        weight: torch.Tensor = self.gpt.output_layer.weight
        return (hidden.float() * weight.float()).sum(-1)

    def _inner(self) -> list[Any]:
        """Torch's (or another's) optimizers within Megatron's."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [part.optimizer for part in parts]

    def _zero(self) -> None:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _make_loss(self, num_tokens: int, num_samples: int) -> LossFunction:
        counts = {"num_tokens": num_tokens, "num_samples": num_samples}
        if self.role == "critic":
            return critic_loss(self._config, self, **counts)
        return actor_loss(self._config, self, **counts, tp_group=self.groups.collection.tp)

    def _forward_step(self, data: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        """Megatron's ``forward_step_func``."""
        microbatch, batch = next(data)
        packed = batch.packed
        output = model(
            packed.token_ids[None],
            packed.position_ids[None],
            None,
            packed_seq_params=Packing.of(packed),
        )
        return output, partial(self._loss_of, microbatch, batch)

    def _loss_of(
        self, microbatch: int, batch: MicroBatch, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Megatron's ``loss_func``: (sum, count, report). The sum is divided already."""
        assert self._loss is not None
        hidden = output[0, : batch.packed.num_tokens].to(self.gpt.config.params_dtype)
        found = self._loss(batch, hidden)
        self._seen[microbatch] = (found.loss.detach(), found.stats)
        return found.loss, torch.ones((), dtype=torch.int, device=self._device), None


class ModelRunner:
    """A `StageRunner` over a `TrainedModel`; `enter` puts its parallel state in force."""

    def __init__(self, model: TrainedModel, enter: Callable[[], None]) -> None:
        self._model = model
        self._enter = enter

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        """See `StageRunner`."""
        return self._compute(Op.F, microbatch, received)

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """See `StageRunner`."""
        return self._compute(Op.B, microbatch, gradient)

    def input_gradient(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """See `StageRunner`."""
        return self._compute(Op.I, microbatch, gradient)

    def weight_gradient(self, microbatch: int) -> None:
        """See `StageRunner`."""
        self._compute(Op.W, microbatch, None)

    def _compute(
        self, op: Op, microbatch: int, received: torch.Tensor | None
    ) -> torch.Tensor | None:
        self._enter()
        return self._model.compute(op, microbatch, received)


def _tensors_of(state: Any) -> list[torch.Tensor]:
    values = state.values() if isinstance(state, dict) else ()
    return [value for value in values if isinstance(value, torch.Tensor)]


def _in_ddp(gpt: Any, sharded: bool) -> Any:
    config = gpt.config
    model = Float16Module(config, gpt) if config.bf16 else gpt
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=sharded, overlap_grad_reduce=False
        ),
        model,
    )
    config.no_sync_func = ddp.no_sync
    config.finalize_model_grads_func = _summed
    return ddp


def _summed(chunks: Any, num_tokens: Any = None, **given: Any) -> None:
    """Megatron's own, without its division by tokens: the losses are divided already."""
    finalize_model_grads(chunks, None, **given)


def _optimizer_config(optim: OptimConfig, dtype: torch.dtype, sharded: bool) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=sharded,
    )
