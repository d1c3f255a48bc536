"""The rollout worker: one engine and the scorers of a device. All in it can be rebuilt.

It does one thing at a time: while samples run it steps the engine, and between steps it answers
commands; a `Score` command runs to its end before the next step.
"""

import logging
import math
import os
import time
from collections.abc import Sequence

import numpy as np

from rlhfuse import messages as m
from rlhfuse import scoring
from rlhfuse.engines import vllm_setup
from rlhfuse.engines.base import Output, Request, SamplingParams
from rlhfuse.payloads import (
    KEPT,
    REPLAYED,
    ROLLOUT,
    Departed,
    FloatArray,
    PayloadStore,
    fetch_departed,
)
from rlhfuse.placement import WorkerSpec
from rlhfuse.planner.memory import FROZEN_ROLES, swaps_frozen
from rlhfuse.timeline import Kind, Span
from rlhfuse.transport import Link, PeerClient, PeerServer
from rlhfuse.weights.send import Inbox
from rlhfuse.workers.burst import Newcomer, StepMeter
from rlhfuse.workers.common import device_of, dtype_of, give_back, run_guarded
from rlhfuse.workers.frozen import FrozenModels
from rlhfuse.workers.models import load_models, make_engine

logger = logging.getLogger(__name__)

_REPORT_EVERY_STEPS = 8
_IDLE_POLL_S = 1.0


def main(spec: WorkerSpec) -> None:
    """Live until `Shutdown`."""
    run_guarded(spec, lambda link: RolloutWorker(spec, link).run())


class RolloutWorker:
    """Commands in, events out."""

    def __init__(self, spec: WorkerSpec, link: Link) -> None:
        self._config = spec.config
        self._lane = f"rank{spec.index}"
        self._link = link
        self._device = device_of(spec.config.placement, spec.seat.local_index)
        dtype = dtype_of(spec.config.placement, self._device)
        self._models = load_models(spec.config, self._device, dtype)
        swapped = swaps_frozen(spec.config, cuda=self._device.type == "cuda")
        roles = FROZEN_ROLES if swapped else ()
        frozen = {role: model for role, model in self._models.items() if role in roles}
        self._frozen = FrozenModels(frozen, self._device)
        vllm_setup.reachable_at(spec.seat.node.address)
        self._engine = make_engine(spec.config, self._models["actor"])
        self._store = PayloadStore()
        self._server = PeerServer(self._store.answer, spec.keys, spec.seat.node.address)
        self._client = PeerClient(spec.config.trainer.wait_timeout_s, spec.keys)
        self._versions: dict[m.Role, int] = {}  # of the weights of trained models
        self._begun = False  # only what is up to date is told to begin
        self._asleep = False
        self._incomplete: set[int] = set()  # samples with log-probabilities that are lost
        self._growths: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._contexts: dict[int, int] = {}  # prompt tokens
        self._logprobs: dict[int, list[float]] = {}
        self._spans: list[Span] = []
        self._meter = StepMeter(self._lane)
        self._running = True
        link.send(
            m.Hello(
                worker=spec.name,
                protocol=m.PROTOCOL_VERSION,
                endpoint=self._server.endpoint,
                pid=os.getpid(),
                detail=f"{self._device} {dtype}",
            )
        )

    def run(self) -> None:
        """Step while there are samples; otherwise wait for commands without using the core."""
        while self._running:
            busy = self._engine.num_running > 0
            if not busy:
                self._send_spans()
            for command in self._link.receive(0.0 if busy else _IDLE_POLL_S):
                self._handle(command)
            if self._engine.num_running > 0:
                self._step()
        self._server.close()
        self._client.close()

    # --- commands --------------------------------------------------------------------------

    def _handle(self, command: m.Command) -> None:
        match command:
            case m.Reset():
                self._reset()
            case m.BeginStep():
                self._begin(command)
            case m.Generate():
                self._generate(command)
            case m.Export():
                self._export(command)
            case m.Score():
                self._score(command)
            case m.PullWeights():
                self._pull_weights(command)
            case m.Sleep():
                self._frozen.leave()
                self._engine.sleep()
                self._asleep = True
                give_back(self._device)
                self._link.send(m.Ack(command="Sleep"))
            case m.Wake():
                self._wake()
                self._link.send(m.Ack(command="Wake"))
            case m.Shutdown():
                self._running = False
            case _:
                raise AssertionError(f"not a command to a rollout worker: {command}")

    def _reset(self) -> None:
        self._engine.abort(list(self._lengths))
        self._forget()
        self._spans.clear()
        self._link.send(m.Ack(command="Reset"))

    def _begin(self, command: m.BeginStep) -> None:
        assert self._engine.num_running == 0, "a step begins while samples are running"
        versions = {self._engine.policy_version, *self._versions.values()}
        assert versions == {command.policy_version}, (
            f"weights are of versions {versions}, the step wants {command.policy_version}"
        )
        self._forget()
        self._wake()
        self._begun = True

    def _wake(self) -> None:
        if self._asleep:
            self._frozen.leave()
            give_back(self._device)  # of scoring
            self._engine.wake()
            self._asleep = False

    def _forget(self) -> None:
        self._begun = False
        self._meter.clear()
        self._store.clear()
        self._growths.clear()
        self._lengths.clear()
        self._contexts.clear()
        self._logprobs.clear()
        self._incomplete.clear()

    def _generate(self, command: m.Generate) -> None:
        assert self._begun, "told to generate without the weights of this step"
        self._wake()
        params = _sampling_params(command.sampling)
        for item in command.items:
            response = np.frombuffer(item.tokens.response, dtype=np.int32)
            sample_id = item.tokens.sample_id
            cache, logprobs = self._remains(item, len(response))
            tokens = len(item.tokens.prompt) // 4 + len(response)
            self._meter.enters(sample_id, Newcomer(tokens, cached=bool(cache)))
            self._logprobs[sample_id] = logprobs
            self._lengths[sample_id] = len(response)
            self._contexts[sample_id] = len(item.tokens.prompt) // 4
            self._engine.add(
                Request(
                    sample_id=sample_id,
                    prompt=np.frombuffer(item.tokens.prompt, dtype=np.int32),
                    seed=item.seed,
                    params=params,
                    response=response,
                ),
                cache,
            )

    def _remains(self, item: m.GenerateItem, length: int) -> tuple[bytes, list[float]]:
        """The cache and the log-probabilities that a sample brings. What died with the worker
        that had them is computed again, or marked as lost."""
        sample_id = item.tokens.sample_id
        self._incomplete.discard(sample_id)
        if item.cache_from:
            try:
                start_s = time.monotonic()
                remains = fetch_departed(self._client, item.cache_from, sample_id)
                if remains.cache:
                    tokens = len(item.tokens.prompt) // 4 + length
                    self._span(Kind.MIGRATE, "fetch", start_s, tokens=tokens)
                if any(map(math.isnan, remains.logprobs)):
                    self._incomplete.add(sample_id)
                return remains.cache, remains.logprobs.tolist()
            except ConnectionError as error:
                logger.warning("sample %d goes on without its cache: %s", sample_id, error)
        if length:
            self._incomplete.add(sample_id)
        return b"", [math.nan] * length

    def _export(self, command: m.Export) -> None:
        start_s = time.monotonic()
        left: list[m.Growth] = []
        cached = 0  # tokens whose keys and values leave too
        for running in self._engine.export(command.sample_ids, with_cache=command.with_cache):
            request = running.request
            logprobs = self._logprobs.pop(request.sample_id, [])
            self._store.depart(
                request.sample_id, Departed(running.cache, np.asarray(logprobs, dtype=np.float32))
            )
            left.append(self._growth(request.sample_id, ""))
            cached += bool(running.cache) * (len(request.prompt) + len(request.response))
        self._report()
        self._link.send(m.Exported(growths=tuple(left), requested=command.sample_ids))
        if cached:
            self._span(Kind.MIGRATE, "leave", start_s, samples=len(left), tokens=cached)
        else:
            self._span(Kind.MIGRATE, "leave", start_s, samples=len(left))

    def _score(self, command: m.Score) -> None:
        start_s = time.monotonic()
        self._frozen.come_in()
        self._frozen.await_arrival(command.role)
        samples = [
            scoring.Tokens(
                np.frombuffer(s.prompt, dtype=np.int32), np.frombuffer(s.response, dtype=np.int32)
            )
            for s in command.samples
        ]
        ids = tuple(s.sample_id for s in command.samples)
        model = self._models[command.role]
        budget = self._config.rollout.score_token_budget
        if command.role == "reward":
            scores = scoring.rewards(model, samples, token_budget=budget)
        elif command.role == "critic":
            values = scoring.values(model, samples, token_budget=budget)
            scores = self._keep(command.role, ids, values)
        elif command.role == "actor" and self._config.replays:
            params = _sampling_params(command.sampling)
            replayed = scoring.replayed_logprobs(model, samples, params, token_budget=budget)
            scores = self._keep(command.role, ids, [r.logprobs for r in replayed])
            for sample_id, found in zip(ids, replayed, strict=True):
                self._store.put(REPLAYED, sample_id, found.among_kept)
                self._store.put(KEPT, sample_id, found.kept.together)
        else:
            logprobs = scoring.token_logprobs(
                model, samples, temperature=command.sampling.temperature, token_budget=budget
            )
            scores = self._keep(command.role, ids, logprobs)
        tokens = sum(len(prompt) + len(response) for prompt, response in samples)
        self._span(
            Kind.SCORE, command.role, start_s, role=command.role, tokens=tokens, samples=len(ids)
        )
        self._link.send(m.Scored(role=command.role, sample_ids=ids, scores=tuple(scores)))

    def _keep(
        self, role: m.Role, ids: Sequence[int], per_token: Sequence[FloatArray]
    ) -> list[float]:
        for sample_id, values in zip(ids, per_token, strict=True):
            self._store.put(role, sample_id, values)
        return [float(values.mean()) if len(values) else 0.0 for values in per_token]

    def _pull_weights(self, command: m.PullWeights) -> None:
        start_s = time.monotonic()
        self._begun = False
        self._versions[command.role] = -1  # until all of them are here
        inbox = Inbox(self._client, command.role, command.version)
        tensors = inbox.tensors(command.sources)
        digest = error = ""
        try:
            if command.role == "actor":
                self._engine.load_weights(tensors, command.version)
            else:
                self._models[command.role].load_tensors(tensors)
            digest = inbox.digest()
        except ConnectionError as trouble:
            error = f"{command.role} weights of version {command.version}: {trouble}"
        if not error and digest != command.digest:
            error = (
                f"{command.role} weights of version {command.version} arrived damaged: "
                f"{digest[:12]} instead of {command.digest[:12]}"
            )
        if error:
            self._link.send(
                m.WeightsReady(
                    role=command.role, version=command.version, digest=digest, error=error
                )
            )
            return
        self._versions[command.role] = command.version
        self._span(Kind.WEIGHTS, f"weights {command.role}", start_s, version=command.version)
        self._send_spans()
        self._link.send(m.WeightsReady(role=command.role, version=command.version, digest=digest))

    # --- generation ------------------------------------------------------------------------

    def _step(self) -> None:
        start_s = time.monotonic()
        counts = self._engine.counts
        near_ties, exact_s = counts.near_ties, counts.exact_s
        outputs = self._engine.step()
        end_s = time.monotonic()
        self._meter.decided(counts.near_ties - near_ties, counts.exact_s - exact_s)
        finished = self._absorb(outputs)
        contexts = {
            o.sample_id: self._contexts[o.sample_id] + self._lengths[o.sample_id] for o in outputs
        }
        self._spans += self._meter.add(start_s, end_s, contexts)
        if finished or self._meter.steps >= _REPORT_EVERY_STEPS:
            self._report(finished)

    def _absorb(self, outputs: Sequence[Output]) -> dict[int, str]:
        finished: dict[int, str] = {}
        for output in outputs:
            self._growths.setdefault(output.sample_id, []).extend(output.tokens)
            self._lengths[output.sample_id] += len(output.tokens)
            self._logprobs.setdefault(output.sample_id, []).extend(output.logprobs)
            if output.finished:
                finished[output.sample_id] = output.finish_reason
                logprobs = self._logprobs.pop(output.sample_id)
                self._store.put(ROLLOUT, output.sample_id, np.asarray(logprobs, dtype=np.float32))
        return finished

    def _growth(self, sample_id: int, reason: str) -> m.Growth:
        tokens = np.asarray(self._growths.pop(sample_id, []), dtype=np.int32)
        whole = sample_id not in self._incomplete
        return m.Growth(sample_id, tokens.tobytes(), self._lengths[sample_id], reason, whole)

    def _report(self, finished: dict[int, str] | None = None) -> None:
        """Send what has grown, and close the span of the steps that grew it."""
        reasons = finished or {}
        ids = list(self._growths)
        if ids:
            growths = tuple(self._growth(i, reasons.get(i, "")) for i in ids)
            self._link.send(m.Grown(growths=growths))
        self._spans += self._meter.close()

    # --- spans -----------------------------------------------------------------------------

    def _span(self, kind: Kind, name: str, start_s: float, **args: int | float | str) -> None:
        self._spans.append(Span(self._lane, start_s, time.monotonic(), kind, name, args))

    def _send_spans(self) -> None:
        self._report()
        if self._spans:
            self._link.send(m.Spans(spans=tuple(self._spans)))
            self._spans = []


def _sampling_params(sampling: m.Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )
