"""vLLM behind our protocol.

Tokens are position-keyed. Where vLLM runs its V1 model runner (always on a CPU, and on a GPU for
`exactness: token`), a logits processor draws every token and flags near ties; after the step they
are decided canonically here, and where the token was wrong it is dropped and the sample submitted
again (its blocks are still in the prefix cache). Where vLLM runs its second model runner, or
decodes speculatively, its own sampler draws by request seed: exact in distribution. What needs a
GPU has not been tried: there was none.
"""

import logging
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rlhfuse.config import VllmConfig
from rlhfuse.engines import vllm_setup
from rlhfuse.engines.base import Counts, Output, Request, Running, SamplingParams
from rlhfuse.engines.canonical import canonical_logits, decide
from rlhfuse.engines.sampling import NEAR_TIE
from rlhfuse.engines.vllm_requests import VllmRequests
from rlhfuse.engines.vllm_sample import VllmSample, exactness, finish_reason
from rlhfuse.engines.vllm_sampling import Drawn
from rlhfuse.models.stage import ModelStage

if TYPE_CHECKING:
    from rlhfuse.engines.vllm_engine import Grown

log = logging.getLogger(__name__)

_PROBE_ID = -1
_PROBE_TOKENS = 12
# How far a probe's log-probability may be from float64's.
_PROBE_BOUND = {torch.float32: NEAR_TIE, torch.float16: 0.05, torch.bfloat16: 0.25}


class VllmEngine:
    """`rlhfuse.engines.base.Engine` over vLLM. `model` is the same language model as a
    `ModelStage`, which the worker keeps for scoring: it decides near ties and checks updates."""

    def __init__(
        self,
        model: ModelStage,
        path: Path | str,
        *,
        max_num_seqs: int,
        max_model_len: int,
        cache_tokens: int | None = None,
        exact: bool | None = None,
        policy_version: int = -1,
        keyed: bool = False,
        options: VllmConfig | None = None,
    ) -> None:
        """`path`: the model folder, for its config; weights come from `model` and by
        `load_weights`. `exact`: near ties are decided in float64 (default: in float32). `keyed`:
        draws must be our processor's, exact or not. Raises ValueError for sizes and wishes that
        cannot go together."""
        vllm_setup.prepare()
        options = options or VllmConfig()
        weight = model.lm_head_weight()
        self._exact = exactness(exact, weight.dtype, options)
        if self._exact or keyed:
            # The second model runner takes no processor.
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        if cache_tokens is None:
            cache_tokens = max_num_seqs * max_model_len
        if cache_tokens < max_model_len:
            raise ValueError(
                f"engine: a cache of {cache_tokens} tokens cannot hold one sample of "
                f"max_model_len {max_model_len}; raise the one or lower the other"
            )
        from rlhfuse.engines.vllm_engine import VllmCore  # imports vLLM, which takes seconds

        self._core = VllmCore(
            path,
            model.config,
            weight.dtype,
            options,
            on_cpu=weight.device.type == "cpu",
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            cache_tokens=cache_tokens,
        )
        if self._core.draws is not None:
            self._core.draws.exact = self._exact
        self._model = model
        self._max_model_len = max_model_len
        self._version = -1
        self._broken = "no weights have been loaded"
        self._samples: dict[int, VllmSample] = {}
        self._requests = VllmRequests(self._core)
        self._early: list[Output] = []  # of steps that an export had to take
        self._asleep = False
        self._counts = Counts()
        if policy_version >= 0:
            self._install(policy_version)

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
        """Samples accepted, and not finished or with outputs that `step` has yet to return."""
        return len(self._samples.keys() | {output.sample_id for output in self._early})

    @property
    def free_cache_tokens(self) -> int:
        """Tokens of key-value cache that are not in use."""
        return self._core.free_tokens

    @property
    def loaded_cache_tokens(self) -> int:
        """Tokens so far that were not computed here because their cache came along."""
        connector = self._core.connector
        return connector.arrivals.loaded_tokens if connector is not None else 0

    # --- samples ---------------------------------------------------------------------------

    def add(self, request: Request, cache: bytes = b"") -> None:
        """Accept a sample; it starts at a coming `step`. Raises ValueError where it can never fit,
        is running already, or has nothing left to generate."""
        place = f"sample {request.sample_id}"
        if len(request.prompt) + request.params.max_tokens > self._max_model_len:
            raise ValueError(
                f"{place}: prompt of {len(request.prompt)} and max_tokens "
                f"{request.params.max_tokens} exceed max_model_len {self._max_model_len}"
            )
        if not len(request.prompt):
            raise ValueError(f"{place}: empty prompt")
        if len(request.response) >= request.params.max_tokens:
            raise ValueError(f"{place}: its response is complete at max_tokens already")
        if request.sample_id in self._samples:
            raise ValueError(f"{place}: is running here already")
        if request.params.counts_response and self._core.draws is None:
            # Where a sample goes on, that sampler would take its response for its prompt.
            raise ValueError(
                f"{place}: presence and frequency penalties need position-keyed draws, and here "
                "vLLM's own sampler draws"
            )
        sample = VllmSample(request, request.response.tolist())
        self._requests.submit(sample, cache)
        self._samples[request.sample_id] = sample

    def step(self) -> list[Output]:
        """One step of vLLM: every sample whose prefix is computed gains a token (or several, with
        speculative decoding)."""
        early, self._early = self._early, []
        if early or not self._samples:
            return early
        assert not self._asleep, "step() while asleep"
        if self._broken:
            raise RuntimeError(f"nothing may be generated: {self._broken}")
        # All of the step first: what follows submits and aborts.
        return [self._absorb(grown) for grown in list(self._core.step())]

    def _absorb(self, grown: "Grown") -> Output:
        sample = self._requests.sample(grown.request_id)
        tokens, logprobs = grown.tokens, grown.logprobs
        sample_id = sample.request.sample_id
        right = True
        if logprobs is None:
            assert self._core.draws is not None
            drawn = self._core.draws.take(sample_id)
            self._check_finite(sample, drawn.logprob)
            assert tokens == [drawn.token], "vLLM did not take the drawn token"
            token, logprob = self._decide(sample, drawn) if drawn.near_tie else drawn[:2]
            right = token == drawn.token
            tokens, logprobs = [token], [logprob]
            self._counts.redrawn += not right
        self._check_finite(sample, sum(logprobs))
        sample.cache = b""
        sample.tokens += tokens
        sample.logprobs += logprobs
        self._counts.tokens += len(tokens)
        reason = finish_reason(sample)
        if reason:
            del self._samples[sample_id]
        if reason or grown.finished or not right:
            if reason:
                self._requests.withdraw(sample, running=not grown.finished)
            else:
                cache = self._requests.take_out(sample, running=not grown.finished)
                self._requests.submit(sample, cache)
        return Output(sample_id, tuple(tokens), tuple(logprobs), bool(reason), reason)

    def _check_finite(self, sample: VllmSample, logprob: float) -> None:
        if not math.isfinite(logprob):
            raise RuntimeError(
                f"sample {sample.request.sample_id}: logits are not finite at token "
                f"{sample.length}; the weights (version {self._version}) are broken"
            )

    def _decide(self, sample: VllmSample, drawn: Drawn) -> tuple[int, float]:
        assert drawn.seen is not None
        self._counts.near_ties += 1
        start_s = time.perf_counter()
        decided = decide(
            self._model,
            sample.prefix,
            drawn.seen,
            seed=sample.request.seed,
            params=sample.request.params,
            response_tokens=len(sample.tokens),
        )
        self._counts.exact_s += time.perf_counter() - start_s
        return decided

    def abort(self, sample_ids: Sequence[int]) -> None:
        """Forget samples; unknown ids are ignored."""
        for sample_id in sample_ids:
            sample = self._samples.pop(sample_id, None)
            if sample is not None:
                self._requests.withdraw(sample, running=True)

    def export(self, sample_ids: Sequence[int], *, with_cache: bool) -> list[Running]:
        """Remove running samples and return them, in the order given. `Running.logprobs` are
        those of the tokens drawn here (the end of the response)."""
        wanted = [i for i in dict.fromkeys(sample_ids) if i in self._samples]
        leaving = [self._samples.pop(i) for i in wanted]
        if self._core.nixl and with_cache:
            # What other samples gain meanwhile is returned by the next `step`.
            caches = self._requests.hand_over(
                leaving, lambda grown: self._early.append(self._absorb(grown))
            )
        elif with_cache:
            caches = [self._requests.take_out(sample, running=True) for sample in leaving]
        else:
            caches = [b""] * len(leaving)
            for sample in leaving:
                self._requests.withdraw(sample, running=True)
        return [
            Running(
                replace(sample.request, response=np.array(sample.tokens, dtype=np.int32)),
                tuple(sample.logprobs),
                cache,
            )
            for sample, cache in zip(leaving, caches, strict=True)
        ]

    # --- weights and memory ----------------------------------------------------------------

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights in place, of `model` and of vLLM. Raises RuntimeError while samples
        are running, and ValueError for missing or misshapen tensors (the version then stays as it
        was, and nothing can be generated until a load succeeds)."""
        self._refuse_while_running("load_weights")
        self._broken = f"weights of version {version} did not arrive whole"
        self._model.load_tensors(tensors)
        self._install(version)

    def _install(self, version: int) -> None:
        """The weights of `model` into vLLM, by its own load path, layer by layer; then the same
        token's log-probability from both."""
        asleep = self._asleep
        self.wake()
        self._core.reload((name, p.detach()) for name, p in self._model.named_hf_parameters())
        self._core.drop_prefixes()
        self._broken = ""
        self._version = self._requests.version = version
        self._probe()
        if asleep:
            self.sleep()

    def _probe(self) -> None:
        """Raises RuntimeError where vLLM computes something else than `model`: a tensor that did
        not reach its place. (Weights that are not finite are named when a token is drawn.)"""
        prompt = np.linspace(1, self._model.config.vocab_size - 1, _PROBE_TOKENS, dtype=np.int32)
        params = SamplingParams(temperature=0.0, max_tokens=1)
        request = Request(
            sample_id=_PROBE_ID, prompt=prompt, seed=0, params=params, response=prompt[:0]
        )
        expected = torch.log_softmax(canonical_logits(self._model, prompt), -1)
        if not bool(expected.isfinite().all()):
            return
        outputs: list[Output] = []
        draws = self._core.draws
        if draws is not None:
            draws.exact = False  # what vLLM computes is wanted, not what would be decided
        self.add(request)
        try:
            while not outputs:
                outputs = self.step()
        finally:
            self.abort([_PROBE_ID])
            if draws is not None:
                draws.exact = self._exact
        (probe,) = outputs
        difference = abs(probe.logprobs[0] - float(expected[probe.tokens[0]]))
        if difference > _PROBE_BOUND[self._model.lm_head_weight().dtype]:
            self._broken = f"weights of version {self._version} are not what vLLM computes with"
            raise RuntimeError(
                f"{self._broken}: a probe's log-probability is off by {difference:.1e}"
            )

    def sleep(self) -> None:
        """Give back the key-value memory (on a GPU by vLLM's sleep level 1, which also moves the
        weights to the host). Raises RuntimeError while samples are running."""
        self._refuse_while_running("sleep")
        if not self._asleep:
            self._core.drop_prefixes()
            self._core.sleep()
            self._asleep = True

    def wake(self) -> None:
        """Take the key-value memory again."""
        if self._asleep:
            self._core.wake()
            self._asleep = False

    def close(self) -> None:
        """End vLLM's engine."""
        self._core.close()

    def _refuse_while_running(self, what: str) -> None:
        if self.num_running:
            raise RuntimeError(f"{what} refused: {self.num_running} samples are running")
