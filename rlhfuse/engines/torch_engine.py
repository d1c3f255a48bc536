"""The embedded engine: continuous batching over Hugging Face layers, with a key-value cache.

Prefill packs several requests into one forward pass; decode is one batched step over the rows of
the cache, which finished samples leave without a gap. Small models on a CPU are what it is fast
for; it runs on CUDA as it is.
"""

import logging
import math
import time
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from rlhfuse.engines.base import Counts, Output, Request, Running, TokenIds
from rlhfuse.engines.cache_attention import DecodeAttention, PrefillAttention
from rlhfuse.engines.canonical import decide
from rlhfuse.engines.kv_cache import CacheShape, KVCache
from rlhfuse.engines.sampling import RowParams, draw, forbid_early_stop, penalise
from rlhfuse.models.packed import pack
from rlhfuse.models.stage import Head, ModelStage

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sequence:
    """A sample in the engine: its tokens so far, and what was drawn here."""

    request: Request
    tokens: TokenIds  # prompt and response, with room for the rest
    length: int
    cache: bytes = b""
    logprobs: list[float] = field(default_factory=list)

    @property
    def response_tokens(self) -> int:
        return self.length - len(self.request.prompt)

    @property
    def cached(self) -> int:
        """Tokens in the cache while running: all but the last, which the next step reads."""
        return self.length - 1

    @property
    def prefix(self) -> TokenIds:
        return self.tokens[: self.length]

    @property
    def checksum(self) -> int:
        return zlib.crc32(self.prefix.tobytes())


class TorchEngine:
    """`rlhfuse.engines.base.Engine` over a `ModelStage` that is a whole language model."""

    def __init__(
        self,
        model: ModelStage,
        *,
        max_num_seqs: int,
        max_model_len: int,
        cache_tokens: int | None = None,
        prefill_tokens: int = 4096,
        exact: bool | None = None,
        policy_version: int = -1,
    ) -> None:
        """`cache_tokens`: size of the cache (default: room for every row at full length).
        `prefill_tokens`: about how many are prefilled at once. `exact`: near ties are decided in
        float64, so that tokens never depend on the batch (default: in float32, its bound being
        float32's). Raises ValueError for sizes that cannot work."""
        weight = model.lm_head_weight()
        if exact is None:
            exact = weight.dtype == torch.float32
        if exact and weight.dtype != torch.float32:
            raise ValueError(f"engine: exact tokens need float32 weights, not {weight.dtype}")
        if cache_tokens is None:
            cache_tokens = max_num_seqs * max_model_len
        if cache_tokens < max_model_len:
            raise ValueError(
                f"engine: a cache of {cache_tokens} tokens cannot hold one sample of "
                f"max_model_len {max_model_len}; raise the one or lower the other"
            )
        assert model.first
        assert model.head is Head.LM
        self._model = model
        self._device = weight.device
        self._max_model_len = max_model_len
        self._prefill_tokens = prefill_tokens
        self._exact = exact
        self._version = policy_version
        self._cache_tokens = cache_tokens
        self._cache = KVCache(
            CacheShape.of(model.config, weight.dtype),
            cache_tokens=cache_tokens,
            max_rows=max_num_seqs,
            max_length=max_model_len,
            device=self._device,
        )
        self._waiting: deque[_Sequence] = deque()
        self._rows: list[_Sequence] = []
        self._counts = Counts()
        self._params: RowParams | None = None  # of self._rows; None when they have changed

    @property
    def policy_version(self) -> int:
        """Version of the weights in use; -1 before the first `load_weights`."""
        return self._version

    @property
    def counts(self) -> Counts:
        """Since the engine was made."""
        return self._counts

    @property
    def num_running(self) -> int:
        """Samples accepted and not finished."""
        return len(self._rows) + len(self._waiting)

    @property
    def free_cache_tokens(self) -> int:
        """Tokens of cache that no admitted sample occupies."""
        return self._cache_tokens - sum(sequence.cached for sequence in self._rows)

    def add(self, request: Request, cache: bytes = b"") -> None:
        """Accept a sample; it starts at a coming `step`. Raises ValueError where it can never fit,
        is running already, or has nothing left to generate."""
        place = f"sample {request.sample_id}"
        size = len(request.prompt) + request.params.max_tokens
        if size > self._max_model_len:
            raise ValueError(
                f"{place}: prompt of {len(request.prompt)} and max_tokens "
                f"{request.params.max_tokens} exceed max_model_len {self._max_model_len}"
            )
        if not len(request.prompt):
            raise ValueError(f"{place}: empty prompt")
        if len(request.response) >= request.params.max_tokens:
            raise ValueError(f"{place}: its response is complete at max_tokens already")
        if any(s.request.sample_id == request.sample_id for s in [*self._rows, *self._waiting]):
            raise ValueError(f"{place}: is running here already")
        start = np.concatenate([request.prompt, request.response])
        tokens = np.zeros(size, dtype=np.int32)
        tokens[: len(start)] = start
        self._waiting.append(_Sequence(request, tokens, len(start), cache))

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Every admitted sample draws one token. Waiting samples are admitted first."""
        if not self.num_running:
            return []
        assert self._cache.allocated, "step() while asleep"
        self._make_room()
        prefilling = self._admit()
        decoding = len(self._rows) - len(prefilling)
        hidden = []
        if decoding:
            hidden.append(self._decode(decoding))
        if prefilling:
            hidden.append(self._prefill(prefilling, first_row=decoding))
        outputs = self._sample(self._model.logits(torch.cat(hidden)))
        self._compact([s for s, o in zip(self._rows, outputs, strict=True) if o.finished])
        return outputs

    def abort(self, sample_ids: Sequence[int]) -> None:
        """Forget samples; unknown ids are ignored."""
        self._remove(set(sample_ids))

    def export(self, sample_ids: Sequence[int], *, with_cache: bool) -> list[Running]:
        """Remove running samples and return them, in the order given. `Running.logprobs` are
        those of the tokens drawn here (the end of the response)."""
        running: dict[int, Running] = {}
        wanted = set(sample_ids)
        for row, sequence in enumerate([*self._rows, *self._waiting]):
            if sequence.request.sample_id not in wanted:
                continue
            cache = b""
            if with_cache and row < len(self._rows):
                cache = self._cache.export_row(
                    row, sequence.cached, self._version, sequence.checksum
                )
            response = sequence.prefix[len(sequence.request.prompt) :].copy()
            request = replace(sequence.request, response=response)
            running[request.sample_id] = Running(request, tuple(sequence.logprobs), cache)
        self._remove(wanted)
        return [running[i] for i in dict.fromkeys(sample_ids) if i in running]

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights in place. Raises RuntimeError while samples are running, and
        ValueError for missing or misshapen tensors (the version then stays as it was)."""
        self._refuse_while_running("load_weights")
        self._model.load_tensors(tensors)
        self._version = version

    def sleep(self) -> None:
        """Give back the cache's memory. Raises RuntimeError while samples are running."""
        self._refuse_while_running("sleep")
        self._cache.free()

    def wake(self) -> None:
        """Take the cache's memory again."""
        if not self._cache.allocated:
            self._cache.allocate()

    def _refuse_while_running(self, what: str) -> None:
        if self.num_running:
            raise RuntimeError(f"{what} refused: {self.num_running} samples are running")

    def _make_room(self) -> None:
        """Every row is about to grow by a token: send the youngest back to wait where the cache
        cannot take them all (their tokens stay, their cache is computed again)."""
        if not self._rows:
            return
        longest = max(sequence.length for sequence in self._rows)
        allowed = self._cache.rows_at(longest)
        for sequence in self._rows[allowed:]:
            self._waiting.appendleft(sequence)
        if len(self._rows) > allowed:
            self._rows = self._rows[:allowed]
            self._params = None
        self._cache.reserve(longest, len(self._rows), longest - 1)

    def _admit(self) -> list[_Sequence]:
        """Move waiting samples to rows while they fit. Returns those to prefill, which are the
        last rows; those that brought a usable cache come before them."""
        prefilling: list[_Sequence] = []
        tokens = 0
        longest = max((sequence.length for sequence in self._rows), default=1)
        while self._waiting and tokens < self._prefill_tokens:
            sequence = self._waiting[0]
            longest = max(longest, sequence.length)
            num_rows = len(self._rows) + len(prefilling)
            if num_rows >= self._cache.rows_at(longest):
                break
            self._waiting.popleft()
            self._params = None
            used = max((s.cached for s in self._rows), default=0)
            self._cache.reserve(longest, len(self._rows), used)
            if sequence.cache and self._import(sequence):
                self._rows.append(sequence)
            else:
                prefilling.append(sequence)
                tokens += sequence.length
        self._rows.extend(prefilling)
        return prefilling

    def _import(self, sequence: _Sequence) -> bool:
        """Fill the next row from the cache a sample came with, if it is of use here."""
        cache, sequence.cache = sequence.cache, b""
        row, tokens = len(self._rows), sequence.cached
        refusal = self._cache.import_row(row, tokens, cache, self._version, sequence.checksum)
        if refusal:
            sample_id = sequence.request.sample_id
            log.warning("sample %d: its cache is computed again: %s", sample_id, refusal)
        return not refusal

    def _prefill(self, sequences: list[_Sequence], *, first_row: int) -> torch.Tensor:
        """Fill the rows from `first_row` on; returns the last hidden state of each, [n, H]."""
        batch = pack([sequence.prefix for sequence in sequences], self._device)
        attend = PrefillAttention(self._cache, batch, first_row)
        hidden = self._model.embed(batch.token_ids)
        hidden = self._model.transform(hidden, batch.position_ids, attend)
        return hidden[batch.cu_seqlens[1:].long() - 1]

    def _decode(self, num_rows: int) -> torch.Tensor:
        """One token of each of the first rows through the layers; returns hidden [num_rows, H]."""
        rows = self._rows[:num_rows]
        tokens = torch.tensor([s.tokens[s.cached] for s in rows], device=self._device).long()
        positions = torch.tensor([s.cached for s in rows], device=self._device)
        attend = DecodeAttention(
            self._cache, positions, longest=max(s.length for s in rows), dtype=self._dtype
        )
        return self._model.transform(self._model.embed(tokens), positions, attend)

    @property
    def _dtype(self) -> torch.dtype:
        return self._cache.shape.dtype

    def _sample(self, logits: torch.Tensor) -> list[Output]:
        rows = self._rows
        params = [sequence.request.params for sequence in rows]
        response_tokens = [sequence.response_tokens for sequence in rows]
        forbid_early_stop(logits, params, response_tokens)
        for row, sequence in enumerate(rows):
            if params[row].penalises:
                prompt = len(sequence.request.prompt)
                penalise(logits[row], params[row], sequence.prefix, prompt)
        if self._params is None:
            seeds = [sequence.request.seed for sequence in rows]
            self._params = RowParams.of(
                seeds, params, vocab_size=logits.shape[1], device=self._device
            )
        positions = torch.tensor([sequence.length for sequence in rows], device=self._device)
        drawn = draw(logits, positions, self._params)
        tokens, logprobs = drawn.tokens.tolist(), drawn.logprobs.tolist()
        self._counts.tokens += len(rows)
        for row in drawn.near_ties.nonzero()[:, 0].tolist() if self._exact else ():
            decided = self._decide(rows[row], logits[row])
            self._counts.redrawn += decided[0] != tokens[row]
            tokens[row], logprobs[row] = decided
        for sequence, logprob in zip(rows, logprobs, strict=True):
            if not math.isfinite(logprob):
                raise RuntimeError(
                    f"sample {sequence.request.sample_id}: logits are not finite at token "
                    f"{sequence.length}; the weights (version {self._version}) are broken"
                )
        return [_advance(*drawn) for drawn in zip(rows, tokens, logprobs, strict=True)]

    def _decide(self, sequence: _Sequence, seen: torch.Tensor) -> tuple[int, float]:
        start_s = time.perf_counter()
        decided = decide(
            self._model,
            sequence.prefix,
            seen,
            seed=sequence.request.seed,
            params=sequence.request.params,
            response_tokens=sequence.response_tokens,
        )
        self._counts.near_ties += 1
        self._counts.exact_s += time.perf_counter() - start_s
        return decided

    def _remove(self, sample_ids: set[int]) -> None:
        self._waiting = deque(s for s in self._waiting if s.request.sample_id not in sample_ids)
        self._compact([s for s in self._rows if s.request.sample_id in sample_ids])

    def _compact(self, leaving: list[_Sequence]) -> None:
        """Take sequences out of the rows; the last rows move into the gaps."""
        for sequence in leaving:
            row = next(i for i, other in enumerate(self._rows) if other is sequence)
            last = self._rows.pop()
            if last is not sequence:
                self._cache.move(len(self._rows), row, last.cached)
                self._rows[row] = last
            self._params = None


def _advance(sequence: _Sequence, token: int, logprob: float) -> Output:
    """Append a drawn token and say what became of the sample."""
    sequence.tokens[sequence.length] = token
    sequence.length += 1
    sequence.logprobs.append(logprob)
    params = sequence.request.params
    reason = ""
    if token in params.stop_token_ids:
        reason = "stop"
    elif sequence.response_tokens >= params.max_tokens:
        reason = "length"
    return Output(sequence.request.sample_id, (token,), (logprob,), bool(reason), reason)
