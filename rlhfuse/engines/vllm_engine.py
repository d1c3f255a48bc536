"""vLLM itself, in this process: the one file that imports it.

`VllmCore` is what `engines.vllm_adapter` needs of an `LLMEngine`; the logits processor and the
connector below are how its V1 model runner draws our tokens and how key-value blocks get in and
out. Call `vllm_setup.prepare` before importing this module. Written against vLLM 0.32.
"""

import dataclasses
import importlib
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm import EngineArgs, LLMEngine, ModelRegistry, SamplingParams, TokensPrompt
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

from rlhfuse.config import VllmConfig
from rlhfuse.engines import base, vllm_cache, vllm_setup
from rlhfuse.engines.kv_cache import CacheShape
from rlhfuse.engines.vllm_arrivals import Arrivals, Load
from rlhfuse.engines.vllm_sampling import KeyedDraws, of_each_draft
from rlhfuse.models.stage import ModelConfig

_BLOCK_TOKENS = 32  # what vLLM's attention on a CPU is built for
_HAND_OVER_S = 30.0  # longest wait for another instance to read its blocks


class KeyedProcessor(LogitsProcessor):  # type: ignore[misc]
    """`KeyedDraws` as vLLM's V1 logits processor: the drawn token gets an infinite logit, and
    vLLM's greedy sampling takes it."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.draws = KeyedDraws()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.draws.remove(row)
        for row, params, prompt, output in batch_update.added:
            self.draws.add(row, params.extra_args["sample_id"], prompt, output)
        for source, target, direction in batch_update.moved:
            self.draws.move(source, target, swap=direction == MoveDirectionality.SWAP)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.scatter_(1, self.draws.draw(logits)[:, None], math.inf)


@dataclass
class _Loads(KVConnectorMetadata):  # type: ignore[misc]
    """What the coming step fills from outside."""

    loads: list[Load] = field(default_factory=list)


class MigrationConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Key-value blocks in and out of vLLM's paged cache, through its connector interface.

    vLLM makes two of these: the scheduler's has `Arrivals` and notes the blocks of requests that
    end; the worker's copies, and has no state of its own.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.arrivals = Arrivals(vllm_config.cache_config.block_size)
        self.left: dict[str, tuple[list[int], int]] = {}  # request -> its blocks, tokens in them

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.arrivals.offer(request.request_id, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if not num_external_tokens:
            self.arrivals.forget(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> _Loads:
        requests = scheduler_output.scheduled_new_reqs
        loads = (self.arrivals.admit(one.req_id, one.block_ids[0]) for one in requests)
        return _Loads([load for load in loads if load is not None])

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.arrivals.forget(request.request_id)
        self.left[request.request_id] = (list(block_ids), request.num_computed_tokens)
        return False, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        layers = vllm_cache.of_layers(forward_context.no_compile_layers)
        for blocks, first, block_ids in self._get_connector_metadata().loads:
            blocks.write(list(layers.values()), block_ids, first=first)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        pass


class Grown(NamedTuple):
    """What a step of vLLM added to a request. `logprobs` is None where a processor draws;
    `transfer`: where a connector lets another instance read the ended request's blocks."""

    request_id: str
    tokens: list[int]
    logprobs: list[float] | None
    finished: bool
    transfer: dict[str, Any] | None


class VllmCore:
    """One `LLMEngine` in this process, asked for no more than we need.

    `draws`: the batch that `KeyedProcessor` draws, or None where vLLM's own sampler does.
    `draws_by_position`: that sampler keys its noise by (seed, position) itself.
    """

    def __init__(
        self,
        path: Path | str,
        config: ModelConfig,
        dtype: torch.dtype,
        options: VllmConfig,
        *,
        on_cpu: bool,
        max_num_seqs: int,
        max_model_len: int,
        cache_tokens: int,
    ) -> None:
        """Weights are dummies until `reload`."""
        _register(config)
        self.on_cpu = on_cpu
        self.block_tokens = options.block_size or _BLOCK_TOKENS
        # Each sample may leave most of a block unused; one more block is vLLM's own.
        blocks = -(-cache_tokens // self.block_tokens) + max_num_seqs + 1
        token_bytes = CacheShape.of(config, dtype).token_bytes
        speculative = options.speculative_config is not None
        if speculative and on_cpu:
            _mend_speculation()
        arguments = EngineArgs(
            model=str(path),
            load_format="dummy",
            dtype=str(dtype).removeprefix("torch."),
            skip_tokenizer_init=True,
            generation_config="vllm",
            seed=0,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens or None,
            block_size=self.block_tokens,
            kv_cache_memory_bytes=blocks * self.block_tokens * token_bytes,
            enforce_eager=vllm_setup.is_on(options.enforce_eager, on_cpu),
            enable_sleep_mode=not on_cpu,
            distributed_executor_backend="uni",
            disable_log_stats=True,
            logprobs_mode="processed_logprobs",
            speculative_config=options.speculative_config,
            kv_transfer_config=_kv_transfer(options, on_cpu),
        )
        second_runner = arguments.create_engine_config().use_v2_model_runner
        keyed = (
            vllm_setup.is_on(options.position_keyed, True) and not speculative and not second_runner
        )
        if keyed:
            arguments = dataclasses.replace(
                arguments, logits_processors=[KeyedProcessor], async_scheduling=False
            )
        with vllm_setup.hidden("llvmlite.binding.ffi"):
            self._engine = LLMEngine.from_engine_args(arguments)
        self._worker = self._engine.engine_core.engine_core.model_executor.driver_worker.worker
        self._tied = bool(config.tie_word_embeddings)
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self.draws = self._find_draws() if keyed else None
        self.draws_by_position = keyed or (second_runner and not speculative)
        connector = self._scheduler.connector
        self.connector = connector if isinstance(connector, MigrationConnector) else None
        self.nixl = options.kv_transfer == "nixl"
        self._names: dict[str, str] = {}  # our request id -> vLLM's own
        self._freed = vllm_cache.Freed()

    def _find_draws(self) -> KeyedDraws:
        batch = self._worker.model_runner.input_batch
        (processor,) = (p for p in batch.logitsprocs.all if isinstance(p, KeyedProcessor))
        draws: KeyedDraws = processor.draws
        return draws

    # --- requests --------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        tokens: list[int],
        params: base.SamplingParams,
        *,
        sample_id: int,
        seed: int,
        response_tokens: int,
        transfer: dict[str, Any] | None = None,
    ) -> None:
        """Generate after `tokens` (prompt and response so far); `params` count the response.
        `transfer`: of blocks to read (NIXL), or `vllm_cache.HAND_OVER`, to leave some behind."""
        handing_over = transfer == vllm_cache.HAND_OVER
        ours = {
            "max_tokens": 1 if handing_over else params.max_tokens - response_tokens,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.DELTA,
        }
        extra = {"sample_id": sample_id, "kv_transfer_params": transfer}
        if self.draws is not None:  # greedy: the processor has decided
            theirs = SamplingParams(temperature=0.0, extra_args=extra, **ours)
        else:
            theirs = SamplingParams(
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                repetition_penalty=params.repetition_penalty,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                seed=seed % (1 << 63),
                min_tokens=max(0, params.min_tokens - response_tokens),
                logprobs=0,
                extra_args=extra,
                **ours,
            )
        prompt = TokensPrompt(prompt_token_ids=tokens)
        self._names[request_id] = self._engine.add_request(request_id, prompt, theirs)

    def step(self) -> Iterator[Grown]:
        """One step; requests that gained nothing are left out."""
        for output in self._engine.step():
            completion = output.outputs[0]
            tokens = list(completion.token_ids)
            if not tokens or output.request_id not in self._names:
                continue
            logprobs = None
            if self.draws is None:
                entries = zip(tokens, completion.logprobs, strict=True)
                logprobs = [float(entry[token].logprob) for token, entry in entries]
            yield Grown(
                output.request_id, tokens, logprobs, output.finished, output.kv_transfer_params
            )

    def forget(self, request_id: str, *, running: bool) -> tuple[list[int], int]:
        """A request is over; vLLM is told where it does not know. Returns its blocks, which are
        whole until the next step, and how many tokens were computed into them."""
        if running:
            self._engine.abort_request([request_id])
        name = self._names.pop(request_id)
        return self.connector.left.pop(name, ([], 0)) if self.connector else ([], 0)

    # --- key-value blocks ------------------------------------------------------------------

    @property
    def free_tokens(self) -> int:
        """Tokens of cache that are not in use; those of ended requests are free."""
        blocks = self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return int(blocks) * self.block_tokens

    def caches(self) -> dict[str, torch.Tensor]:
        """Layer name -> paged cache [blocks, ...]."""
        context = self._engine.vllm_config.compilation_config.static_forward_context
        return vllm_cache.of_layers(context)

    def arrive(self, request_id: str, blocks: vllm_cache.Blocks) -> None:
        """The request that was just submitted comes with its cache."""
        assert self.connector is not None
        self.connector.arrivals.arrive(self._names[request_id], blocks)

    def drop_prefixes(self) -> None:
        """Forget keys and values of ended requests (they were computed with other weights)."""
        deadline = time.monotonic() + _HAND_OVER_S
        while not self._engine.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise RuntimeError("vLLM kept keys and values of ended requests")
            # Blocks that another instance has read are freed in a step.
            self._engine.engine_core.engine_core.step()
            time.sleep(0.001)

    # --- weights and memory ----------------------------------------------------------------

    def reload(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """All weights in place, Hugging Face names, by vLLM's own load path: a layer is packed
        for its kernels when its last tensor has come."""
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        model = self._worker.get_model()
        if self.on_cpu and self._tied:
            # No tensor comes by its name, so vLLM leaves a tied head with its old packed copy.
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

    def sleep(self) -> None:
        """Give back the cache. On a CPU vLLM's own sleep does nothing: it is emptied."""
        if not self.on_cpu:
            self._engine.sleep(level=1)
            return
        self._freed.free(self.caches())

    def wake(self) -> None:
        """Take the cache again."""
        if not self.on_cpu:
            self._engine.wake_up()
            return
        self._freed.restore(self.caches())

    def close(self) -> None:
        """End the engine, and every other of this process with it (vLLM's groups are global)."""
        self._engine.engine_core.shutdown()


def _register(config: ModelConfig) -> None:
    """Name the model's class to vLLM, which else imports itself in another process to look at it,
    and keeps what it saw in the user's home."""
    module = importlib.import_module(f"vllm.model_executor.models.{config.model_type}")
    assert config.architectures, "a model folder that passed load_config names its class"
    name = config.architectures[0]
    ModelRegistry.register_model(name, getattr(module, name))


def _mend_speculation() -> None:
    """vLLM 0.32 on a CPU gives draft tokens no temperature, top-k or top-p (its kernel writes them
    into a copy), so that draws follow another distribution; and top-k fails in a step without
    drafts."""
    module: Any = rejection_sampler
    constrain = module.apply_sampling_constraints
    if module.expand_batch_to_tokens is of_each_draft:
        return

    def constrain_drafts(logits: torch.Tensor, ends: torch.Tensor, metadata: Any) -> Any:
        return constrain(logits, ends, metadata) if len(logits) else logits

    module.expand_batch_to_tokens = of_each_draft
    module.apply_sampling_constraints = constrain_drafts


def _kv_transfer(options: VllmConfig, on_cpu: bool) -> KVTransferConfig | None:
    if options.kv_transfer == "nixl":
        os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_PORT", str(vllm_setup.free_port()))
        os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
        return KVTransferConfig(
            kv_connector="NixlConnector",
            kv_role="kv_both",
            kv_buffer_device="cpu" if on_cpu else "cuda",
        )
    if not options.moves_cache:
        return None
    return KVTransferConfig(
        kv_connector=MigrationConnector.__name__,
        kv_connector_module_path=__name__,
        kv_role="kv_both",
    )
