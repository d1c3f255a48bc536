"""Which key-value blocks that came with requests are loaded, and when: what vLLM's scheduler asks
its connector, without vLLM."""

from collections.abc import Sequence
from typing import NamedTuple

from rlhfuse.engines.vllm_cache import Blocks


class Load(NamedTuple):
    """Blocks `first`, `first + 1`, ... of `blocks` go to `block_ids` of the paged cache."""

    blocks: Blocks
    first: int
    block_ids: list[int]


class Arrivals:
    """Requests that came with their cache. `loaded_tokens`: so far, not computed here because they
    came with a request."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._arrived: dict[str, Blocks] = {}
        self._had: dict[str, int] = {}  # request -> tokens that the prefix cache has
        self.loaded_tokens = 0

    def arrive(self, request_id: str, blocks: Blocks) -> None:
        """Call before the step that admits the request."""
        self._arrived[request_id] = blocks

    def offer(self, request_id: str, num_had: int) -> int:
        """How many tokens can be loaded after the `num_had` that the prefix cache has."""
        blocks = self._arrived.get(request_id)
        if blocks is None or num_had % self._block_tokens:
            return 0
        self._had[request_id] = num_had
        return max(0, blocks.header.num_tokens - num_had)

    def admit(self, request_id: str, block_ids: Sequence[int]) -> Load | None:
        """What to load of a request that the coming step begins with, into its paged blocks."""
        had = self._had.pop(request_id, None)
        if had is None:
            return None
        blocks = self._arrived.pop(request_id)
        self.loaded_tokens += blocks.header.num_tokens - had
        first = had // self._block_tokens
        last = -(-blocks.header.num_tokens // self._block_tokens)
        return Load(blocks, first, list(block_ids[first:last]))

    def forget(self, request_id: str) -> None:
        """Nothing is loaded for it, or it is over."""
        self._had.pop(request_id, None)
        self._arrived.pop(request_id, None)
