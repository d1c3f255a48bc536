"""What vLLM runs for our samples: a request each, with the key-value blocks that come and go."""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlhfuse.engines import vllm_cache
from rlhfuse.engines.vllm_cache import HAND_OVER
from rlhfuse.engines.vllm_sample import VllmSample
from rlhfuse.engines.vllm_sampling import KeyedSample, mixed_seed

if TYPE_CHECKING:
    from rlhfuse.engines.vllm_engine import Grown, VllmCore

log = logging.getLogger(__name__)


class VllmRequests:
    """The requests of one engine. A sample may go through several: a request ends where its last
    token was wrong, or where the sample leaves, and the sample goes on with another."""

    def __init__(self, core: "VllmCore") -> None:
        self._core = core
        self._samples: dict[str, VllmSample] = {}  # request -> its sample
        self._submitted = 0
        self.version = -1  # of the weights that blocks are computed with

    def sample(self, request_id: str) -> VllmSample:
        """Whose request it is."""
        return self._samples[request_id]

    def submit(self, sample: VllmSample, cache: bytes = b"") -> None:
        """Give a sample to vLLM, from where it stands."""
        request, core, seed = sample.request, self._core, sample.request.seed
        transfer = vllm_cache.unpack_transfer(cache, self.version) if core.nixl else None
        blocks = self._blocks(sample, cache) if cache and core.connector is not None else None
        if core.draws is not None:
            core.draws.expect(
                KeyedSample(request.sample_id, seed, request.params, len(request.prompt))
            )
        elif not core.draws_by_position:
            # The seed starts a generator: a sample that goes on needs another one.
            seed = mixed_seed(seed, sample.length)
        sample.cache = cache
        self._start(sample, seed, transfer)
        self._samples[sample.request_id] = sample
        if blocks is not None:
            core.arrive(sample.request_id, blocks)

    def _start(self, sample: VllmSample, seed: int, transfer: dict[str, Any] | None) -> None:
        self._submitted += 1
        sample.request_id = str(self._submitted)
        self._core.submit(
            sample.request_id,
            sample.prefix.tolist(),
            sample.request.params,
            sample_id=sample.request.sample_id,
            seed=seed,
            response_tokens=len(sample.tokens),
            transfer=transfer,
        )

    def _blocks(self, sample: VllmSample, cache: bytes) -> vllm_cache.Blocks | None:
        """What a sample came with, where it is of use here."""
        header = vllm_cache.header_of(self._core.caches(), sample.prefix[:-1], self.version)
        blocks = vllm_cache.parse(cache, header)
        if isinstance(blocks, vllm_cache.Blocks):
            return blocks
        sample_id = sample.request.sample_id
        log.warning("sample %d: its cache is computed again: %s", sample_id, blocks)
        return None

    def withdraw(self, sample: VllmSample, *, running: bool) -> tuple[list[int], int]:
        """A sample's request is over (`running`: vLLM does not know yet); the sample may go on.
        Returns its blocks, which are whole until the next step, and the tokens in them."""
        blocks = self._core.forget(sample.request_id, running=running)
        self._samples.pop(sample.request_id)
        if self._core.draws is not None:
            self._core.draws.forget(sample.request.sample_id)
        return blocks

    def take_out(self, sample: VllmSample, *, running: bool) -> bytes:
        """As `withdraw`; its blocks as bytes: those that it came with where no step has used them
        yet; empty where vLLM has not computed all of its prefix."""
        block_ids, computed = self.withdraw(sample, running=running)
        prefix = sample.prefix[:-1]
        if computed < len(prefix) or self._core.connector is None:
            return sample.cache
        caches = self._core.caches()
        block_ids = block_ids[: -(-len(prefix) // self._core.block_tokens)]
        header = vllm_cache.header_of(caches, prefix, self.version)
        return vllm_cache.serialise(caches, block_ids, header)

    def hand_over(
        self, leaving: Sequence[VllmSample], meanwhile: Callable[["Grown"], None]
    ) -> list[bytes]:
        """NIXL lets another instance read the blocks of a request that ends by itself: each
        sample is submitted once more, for one token that is dropped (its blocks are in the prefix
        cache). `meanwhile` hears what other samples gain."""
        core = self._core
        waiting: dict[str, VllmSample] = {}
        transfers: dict[int, bytes] = {}
        for sample in leaving:
            core.forget(sample.request_id, running=True)
            self._samples.pop(sample.request_id)
            self._start(sample, sample.request.seed, HAND_OVER)
            waiting[sample.request_id] = sample
        while waiting:
            for grown in list(core.step()):
                done = waiting.pop(grown.request_id, None)
                if done is None:
                    meanwhile(grown)
                    continue
                self._samples[grown.request_id] = done
                self.withdraw(done, running=not grown.finished)
                packed = vllm_cache.pack_transfer(grown.transfer, self.version)
                transfers[done.request.sample_id] = packed
        return [transfers[sample.request.sample_id] for sample in leaving]
