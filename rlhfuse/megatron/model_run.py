"""One model's part of a forward-backward call on one rank: its tasks, hooks and results."""

from contextlib import ExitStack, nullcontext
from typing import Any

import torch

from rlhfuse.megatron import stock
from rlhfuse.megatron.call import Call
from rlhfuse.megatron.delayed import DelayedLayers
from rlhfuse.megatron.groups import Groups
from rlhfuse.megatron.split import ProductStore, split_linears
from rlhfuse.megatron.sync import GradientSync
from rlhfuse.schedules.ir import Op, Task


class ModelRun:
    """Runs the tasks of one model through Megatron's own forward and backward steps."""

    def __init__(
        self, call: Call, groups: Groups, *, split: frozenset[int], in_flight: int
    ) -> None:
        """`split`: micro-batches whose backward is I and W, on any stage of this rank.
        `in_flight`: most forwards that this rank holds at a time (for
        ``num_microbatches_with_partial_activation_checkpoints``)."""
        self._call = call
        self._groups = groups
        self._config = call.config
        self._chunks = call.chunks
        self._iterators = call.data_iterators
        self._split = split
        self._in_flight = in_flight
        self._forwards = 0
        self._last_chunk = len(self._chunks) - 1
        self._sync = GradientSync(self._config, self._chunks, groups.first)
        self._held: dict[tuple[int, int], tuple[torch.Tensor | None, list[torch.Tensor]]] = {}
        self._products = [ProductStore(chunk) for chunk in self._chunks] if split else []
        training = [] if call.forward_only else self._chunks
        self._delayed = [DelayedLayers(chunk, self._config) for chunk in training]
        self._splitting = ExitStack()
        self._embedding: object = None
        self._tokens = torch.zeros([], dtype=torch.int, device=call.device)
        self.store: list[Any] = []
        """What the loss function reported, by micro-batch; empty but on the last stage."""

    def begin(self) -> None:
        """Before the first task."""
        if self._finalizes:
            self._embedding = stock.clear_embedding_buffers(
                self._config, self._chunks, self._groups.last
            )
        timers = self._config.timers
        if timers is not None:
            timers("forward-backward", log_level=1).start(barrier=self._config.barrier_with_L1_time)
        for chunk, products in zip(self._chunks, self._products, strict=False):
            self._splitting.enter_context(split_linears(chunk, products))
        self._sync.begin(self._call.forward_only)

    def compute(self, task: Task, received: torch.Tensor | None) -> torch.Tensor | None:
        """One task; what it sends on, if it does."""
        chunk = task.pp_stage // len(self._groups.pp_ranks)
        if task.op is Op.F:
            return self._forward(chunk, task, received)
        with self._sync.gradients(
            chunk, last=self._is_last(task), final=self._is_last(task) and task.op is not Op.I
        ):
            if task.op is Op.W:
                self._products[chunk].compute(task.microbatch)
                self._delayed[chunk].compute()
                return None
            deferring = task.op is Op.I
            with self._products[chunk].deferring(task.microbatch) if deferring else nullcontext():
                by_input = self._backward(chunk, task.microbatch, received)
            if not deferring:
                self._delayed[chunk].compute()
            return by_input

    def sent(self, task: Task) -> None:
        """The output of a forward is on its way: only its graph is needed from here on."""
        chunk = task.pp_stage // len(self._groups.pp_ranks)
        held = self._held.get((chunk, task.microbatch))
        if task.op is Op.F and held is not None:
            stock.deallocate(held[1][0], self._config)

    def end(self) -> list[Any]:
        """After the last task of all models: reduce gradients; what Megatron's schedule returns."""
        assert not self._held, f"micro-batches {list(self._held)} had no backward"
        self.close()
        if self._finalizes:
            stock.finish_embedding(
                self._config, self._embedding, self._groups.last, self._groups.collection.tp
            )
            stock.finalize(
                self._config,
                self._chunks,
                self._tokens if self._config.calculate_per_token_loss else None,
                self._groups.collection,
                self._call.force_all_reduce,
            )
        if self._config.timers is not None:
            self._config.timers("forward-backward").stop()
        return self.store

    def close(self) -> None:
        """Leave the model as it was, also after a failure."""
        self._sync.end()
        self._splitting.close()

    @property
    def _finalizes(self) -> bool:
        asked = self._config.finalize_model_grads_func is not None
        return asked and not self._call.forward_only

    def _is_last(self, task: Task) -> bool:
        return task.microbatch == self._call.num_microbatches - 1

    def _forward(
        self, chunk: int, task: Task, received: torch.Tensor | None
    ) -> torch.Tensor | None:
        call, first = self._call, task.microbatch == 0
        if first:
            self._sync.before_first_forward(chunk)
        if received is not None:
            received.requires_grad_()
        last_stage = self._groups.last and chunk == self._last_chunk
        output, tokens = stock.forward_step(
            forward_step_func=call.forward_step_func,
            data_iterator=self._iterators[chunk],
            model=self._chunks[chunk],
            num_microbatches=call.num_microbatches,
            input_tensor=[received],
            forward_data_store=self.store,
            config=self._config,
            cp_group_size=self._groups.cp_size,
            collect_non_loss_data=call.collect_non_loss_data,
            checkpoint_activations_microbatch=self._checkpoints(),
            is_first_microbatch=stock.first_validation(
                call.first_val_step, call.forward_only, first
            ),
            current_microbatch=task.microbatch,
            vp_stage=chunk if self._last_chunk else None,
            is_last_stage=last_stage,
        )
        self._tokens += tokens
        self._forwards += 1
        if not call.forward_only:
            self._held[chunk, task.microbatch] = (received, output)
        return None if last_stage else output[0]

    def _backward(
        self, chunk: int, microbatch: int, gradient: torch.Tensor | None
    ) -> torch.Tensor | None:
        received, output = self._held.pop((chunk, microbatch))
        return stock.backward_step(self._chunks[chunk], received, output, gradient, self._config)

    def _checkpoints(self) -> bool | None:
        """Whether all layers of the next forward are recomputed: of those that are held at a time,
        as many are not as the config says (with model chunks counted together, as Megatron)."""
        partial = self._config.num_microbatches_with_partial_activation_checkpoints
        if partial is None:
            return None
        return bool(self._forwards % self._in_flight >= partial)
