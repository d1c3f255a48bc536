"""The training worker: one rank of the training pipelines of actor and critic."""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from rlhfuse import messages as m
from rlhfuse.config import Config
from rlhfuse.group_training import BatchSize
from rlhfuse.payloads import KEPT, REPLAYED, ROLLOUT, FloatArray, PayloadStore, fetch_floats
from rlhfuse.placement import WorkerSpec
from rlhfuse.scoring import Kept
from rlhfuse.timeline import Kind, Span
from rlhfuse.training.backend import MakeBackend
from rlhfuse.training.optimizer import choice
from rlhfuse.training.records import MiniBatchPlan, NonFiniteLoss, SampleData
from rlhfuse.training.snapshot import AsideWriter
from rlhfuse.training.torch_backend import TorchBackend
from rlhfuse.training.update import RankTrainer
from rlhfuse.transport import Link, PeerClient, PeerServer
from rlhfuse.weights.send import Outbox
from rlhfuse.workers.common import device_of, dtype_of, give_back, meet_on, run_guarded
from rlhfuse.workers.peaks import Peaks

logger = logging.getLogger(__name__)

_IDLE_POLL_S = 1.0
_BUSY_POLL_S = 0.02  # while a checkpoint is being written


def main(spec: WorkerSpec) -> None:
    """Live until `Shutdown`."""
    run_guarded(spec, lambda link: TrainingWorker(spec, link).run())


class TrainingWorker:
    """Commands in, events out. Every rank gets the same commands in the same order."""

    def __init__(self, spec: WorkerSpec, link: Link) -> None:
        self._config = spec.config
        self._name = spec.name
        self._rank = spec.index
        self._lane = f"rank{spec.index}"
        self._link = link
        device = self._device = device_of(spec.config.placement, spec.seat.local_index)
        meet_on(spec.seat.node.address)
        limit = timedelta(seconds=spec.config.trainer.wait_timeout_s)
        # The controller holds the store: no port can be taken by others, and it outlives us.
        store = TCPStore(*spec.store, is_master=False, timeout=limit)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=spec.index,
            world_size=spec.config.placement.num_devices,
            timeout=limit,
        )
        self._roles: tuple[m.Role, ...] = (
            ("actor", "critic") if "critic" in spec.pipelines else ("actor",)
        )
        # Only ranks with a loss need the per-token numbers.
        row = spec.index // spec.config.placement.tp
        self._needs_data = any(p.ranks[-1] == row for p in spec.pipelines.values())
        self._trainer = RankTrainer(
            spec.config,
            rank=spec.index,
            world_size=spec.config.placement.num_devices,
            pipelines=spec.pipelines,
            reference=spec.reference,
            device=device,
            dtype=dtype_of(spec.config.placement, device),
            total_steps=spec.total_optimizer_steps,
            make_backend=_backend(spec.config),
        )
        self._peaks = Peaks(spec, device, dtype_of(spec.config.placement, device))
        self._outbox = Outbox()
        self._server = PeerServer(
            PayloadStore(self._outbox.answer).answer, spec.keys, spec.seat.node.address
        )
        self._client = PeerClient(spec.config.trainer.wait_timeout_s, spec.keys)
        self._samples: list[SampleData] = []
        self._ahead: tuple[int, list[SampleData]] = (-1, [])  # step, samples trained ahead
        self._writer = AsideWriter()
        self._ticket = 0
        self._running = True
        link.send(
            m.Hello(
                worker=spec.name,
                protocol=m.PROTOCOL_VERSION,
                endpoint=self._server.endpoint,
                pid=os.getpid(),
                detail=f"{device}, {dtype_of(spec.config.placement, device)}, {choice(device)}",
            )
        )

    def run(self) -> None:
        while self._running:
            for command in self._link.receive(_BUSY_POLL_S if self._writer.busy else _IDLE_POLL_S):
                self._handle(command)
                self._tell_written()
            self._tell_written()
        self._trainer.close()
        self._server.close()
        self._client.close()
        dist.destroy_process_group()

    def _handle(self, command: m.Command) -> None:
        match command:
            case m.FetchSamples():
                self._fetch(command)
            case m.TrainGroup():
                self._train_group(command)
            case m.Train():
                self._train(command)
            case m.PrepareWeights():
                self._prepare_weights(command)
            case m.SaveCheckpoint():
                self._save(command)
            case m.LoadCheckpoint():
                self._trainer.load(Path(command.folder))
                self._link.send(m.Ack(command="LoadCheckpoint"))
            case m.KeepState():
                self._keep_state(command)
            case m.Shutdown():
                self._running = False
            case _:
                raise AssertionError(f"not a command to a training worker: {command}")

    def _fetch(self, command: m.FetchSamples) -> None:
        start_s = time.monotonic()
        floats: dict[tuple[str, int], FloatArray] = {}
        missing: set[str] = set()
        if self._needs_data:
            floats, missing = fetch_all(self._client, command.samples, self._config.replays)
        if not missing:
            self._samples = self._data(command.samples, floats)
        span = Span(self._lane, start_s, time.monotonic(), Kind.TRANSFER, "fetch scores", {})
        self._link.send(m.Spans(spans=(span,)))
        self._link.send(m.Fetched(step=command.step, missing=tuple(sorted(missing))))

    def _data(
        self, samples: Sequence[m.TrainSample], floats: dict[tuple[str, int], FloatArray]
    ) -> list[SampleData]:
        scored = self._config.rollout.old_log_probs == "recompute"
        return [_sample_data(sample, floats, scored, self._needs_data) for sample in samples]

    def _train_group(self, command: m.TrainGroup) -> None:
        """The weights stay as they are, and may be fetched all the while."""
        start_s = time.monotonic()
        floats, missing = fetch_all(self._client, command.samples, self._config.replays)
        spans = [Span(self._lane, start_s, time.monotonic(), Kind.TRANSFER, "fetch scores", {})]
        if not missing:
            samples = self._data(command.samples, floats)
            step, ahead = self._ahead
            self._ahead = command.step, [*(ahead if step == command.step else []), *samples]
            batch = command.batch
            plan = MiniBatchPlan(batch.microbatches, batch.rounds)
            self._peaks.ran(batch.rounds)
            self._trainer.accumulate(command.step, samples, plan, command.kl_coef, spans)
        ids = tuple(sample.tokens.sample_id for sample in command.samples)
        self._link.send(m.Spans(spans=tuple(spans)))
        self._link.send(
            m.GroupTrained(step=command.step, sample_ids=ids, missing=tuple(sorted(missing)))
        )

    def _train(self, command: m.Train) -> None:
        self._outbox.withdraw()
        spans: list[Span] = []
        samples, self._samples = self._samples, []
        (step, ahead), self._ahead = self._ahead, (-1, [])
        plans = [MiniBatchPlan(b.microbatches, b.rounds, b.forward) for b in command.minibatches]
        try:
            seen = self._trainer.update(
                command.step,
                samples,
                plans,
                command.kl_coef,
                spans,
                self._tell,
                BatchSize(*command.whole),
            )
        except NonFiniteLoss:
            mine = [*(ahead if step == command.step else []), *samples]
            self._keep_batch(command.step, mine)
            raise
        give_back(self._device)
        for plan in plans:
            self._peaks.ran(plan.rounds)
        self._link.send(m.Spans(spans=tuple(spans)))
        self._link.send(
            m.Trained(
                step=command.step,
                means=dict(seen.means),
                sums=dict(seen.sums),
                maxima={**seen.maxima, **self._peaks.take()},
            )
        )

    def _tell(self, done: int, total: int, losses: Mapping[str, float]) -> None:
        self._link.send(m.Training(done=done, total=total, losses=dict(losses)))

    def _prepare_weights(self, command: m.PrepareWeights) -> None:
        for role in command.roles:
            tensors = self._trainer.named_tensors(role)
            digests = self._outbox.offer(role, command.version, tensors)
            self._link.send(
                m.WeightsPrepared(
                    role=role,
                    version=command.version,
                    names=tuple(digests),
                    digests=tuple(digests.values()),
                    num_bytes=sum(t.nbytes for t in tensors.values()),
                )
            )

    def _save(self, command: m.SaveCheckpoint) -> None:
        self._writer.wait()  # of a checkpoint that was given up
        self._tell_written()
        snapshot = self._trainer.snapshot(self._roles, copy=command.aside)
        self._ticket = command.ticket
        self._writer.start(snapshot, Path(command.folder))
        if command.aside:
            self._link.send(m.Ack(command="SaveCheckpoint"))
        else:
            self._writer.wait()

    def _tell_written(self) -> None:
        result = self._writer.take()
        if result is not None:
            error, seconds = result
            self._link.send(m.Written(ticket=self._ticket, seconds=seconds, error=error))

    def _keep_state(self, command: m.KeepState) -> None:
        error = ""
        try:
            self._trainer.snapshot().write(Path(command.folder))
        except OSError as trouble:
            error = str(trouble)
        self._link.send(m.Kept(step=command.step, error=error))

    def _keep_batch(self, step: int, samples: Sequence[SampleData]) -> None:
        """Write the batch that broke the loss, for study."""
        trainer = self._config.trainer
        folder = Path(trainer.default_local_dir, trainer.project_name, trainer.experiment_name)
        path = folder / f"non_finite_step_{step}_rank{self._rank}.npz"
        arrays: dict[str, FloatArray] = {}
        for sample in samples:
            for name in ("prompt", "response", "old_logprobs", "reference_logprobs", "values"):
                values = getattr(sample, name)
                if values is not None:
                    arrays[f"{sample.sample_id}/{name}"] = values
        np.savez(path, allow_pickle=False, **arrays)
        logger.error("the batch of step %d is kept in %s", step, path)


def _backend(config: Config) -> MakeBackend:
    """Whose models are trained. Megatron-core is imported only where it is asked for."""
    if config.actor.backend == "torch":
        return TorchBackend
    from rlhfuse.megatron.backend import MegatronBackend

    return MegatronBackend


def fetch_all(
    client: PeerClient, samples: Sequence[m.TrainSample], replays: bool = False
) -> tuple[dict[tuple[str, int], FloatArray], set[str]]:
    """The per-token numbers of samples by (kind, sample id), each pulled once from its maker, and
    the endpoints of those that are gone. `replays`: also what the sampler kept."""
    wanted: dict[tuple[str, str], list[int]] = defaultdict(list)
    for sample in samples:
        if sample.rollout_endpoint:
            wanted[sample.rollout_endpoint, ROLLOUT].append(sample.tokens.sample_id)
        for role, endpoint in sample.endpoints.items():
            kinds = (role, REPLAYED, KEPT) if replays and role == "actor" else (role,)
            for kind in kinds:
                wanted[endpoint, kind].append(sample.tokens.sample_id)
    floats: dict[tuple[str, int], FloatArray] = {}
    missing: set[str] = set()
    for (endpoint, kind), ids in wanted.items():
        if endpoint in missing:
            continue
        try:
            found = fetch_floats(client, endpoint, kind, ids)
        except ConnectionError as error:
            logger.warning("%s", error)
            missing.add(endpoint)
            continue
        for sample_id, values in zip(ids, found, strict=True):
            floats[kind, sample_id] = values
    return floats, missing


def _sample_data(
    sample: m.TrainSample,
    floats: dict[tuple[str, int], FloatArray],
    scored: bool,
    with_data: bool,
) -> SampleData:
    """A rank without a loss gets empty arrays: it needs token ids and lengths alone."""
    sample_id = sample.tokens.sample_id
    rollout = np.zeros(0, dtype=np.float32)
    if with_data:
        lost = np.full(len(sample.tokens.response) // 4, np.nan, dtype=np.float32)
        rollout = floats.get((ROLLOUT, sample_id), lost)
    old = floats["actor", sample_id] if with_data and scored else rollout
    kept = None
    if (KEPT, sample_id) in floats:
        together = floats[KEPT, sample_id].view(np.int32)
        kept = Kept.apart(together, len(sample.tokens.response) // 4)
    return SampleData(
        sample_id=sample_id,
        group=sample.group,
        prompt=np.frombuffer(sample.tokens.prompt, dtype=np.int32),
        response=np.frombuffer(sample.tokens.response, dtype=np.int32),
        score=sample.score,
        old_logprobs=floats.get((REPLAYED, sample_id), old),
        rollout_logprobs=rollout,
        reference_logprobs=floats.get(("reference", sample_id)),
        values=floats.get(("critic", sample_id)),
        full_logprobs=old if kept is not None else None,
        kept=kept,
    )
