"""The protocol of a generation engine, and the records that cross it.

Laws that every engine obeys (``tests/engines/conformance.py`` puts an engine through them):
the tokens of a request depend on its prompt, its seed, its sampling parameters and the weights,
and on nothing else: not on its batch, on migration, on abort and resubmission, or on a restart.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a response is drawn. ``temperature == 0`` is greedy.

    `max_tokens`, `min_tokens` and penalties count the whole response, also after a migration.
    `repetition_penalty` divides logits above 0 of tokens that prompt or response has (and
    multiplies those below); `frequency_penalty` is taken off for each time that the response has a
    token, `presence_penalty` once: transformers' and vLLM's definitions, before the temperature.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def penalises(self) -> bool:
        """Whether a draw depends on which tokens were drawn before."""
        return self.repetition_penalty != 1 or self.counts_response

    @property
    def counts_response(self) -> bool:
        """Whether it depends on which of them are the response's."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A sample to generate, or to go on with: `response` is what has been generated so far."""

    sample_id: int
    prompt: TokenIds
    seed: int
    params: SamplingParams
    response: TokenIds


@dataclass(frozen=True, slots=True)
class Output:
    """What one engine step added to one sample. `logprobs` are those of the truncated,
    temperature-scaled distribution that the token was drawn from, one per new token."""

    sample_id: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    finish_reason: str = ""  # "stop" or "length" when finished


@dataclass(frozen=True, slots=True)
class Running:
    """A running sample as it leaves an engine. `cache` is its key-value cache in the engine's
    own byte form, or empty: then the receiver prefills prompt and response again."""

    request: Request  # with the response so far
    logprobs: tuple[float, ...]
    cache: bytes = b""


@dataclass(slots=True)
class Counts:
    """What an engine's draws have come to: tokens, near ties among them, those that the batch's
    own logits had wrong, and the seconds that deciding near ties has taken."""

    tokens: int = 0
    near_ties: int = 0
    redrawn: int = 0
    exact_s: float = 0.0


class Engine(Protocol):
    """A generation replica: continuous batching over one model."""

    @property
    def counts(self) -> Counts:
        """Since the engine was made."""

    @property
    def policy_version(self) -> int:
        """Version of the weights in use; -1 before the first `load_weights`."""

    @property
    def num_running(self) -> int:
        """Samples accepted and not finished."""

    @property
    def free_cache_tokens(self) -> int:
        """Tokens of key-value cache that are not in use."""

    def add(self, request: Request, cache: bytes = b"") -> None:
        """Accept a sample. Raises ValueError where it can never fit."""

    def step(self) -> list[Output]:
        """Advance every admitted sample by at least one token; empty when there is nothing."""

    def abort(self, sample_ids: Sequence[int]) -> None:
        """Forget samples. Unknown ids are ignored: they may just have finished."""

    def export(self, sample_ids: Sequence[int], *, with_cache: bool) -> list[Running]:
        """Remove running samples and return them; ids that are not running are left out."""

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights (Hugging Face names). Refused while samples are running."""

    def sleep(self) -> None:
        """Give back the key-value memory. Refused while samples are running."""

    def wake(self) -> None:
        """Take the key-value memory again."""
