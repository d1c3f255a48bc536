"""A run in progress: its workers, its folder, its place in the data."""

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from torch._C._distributed_c10d import TCPStore

from rlhfuse import messages as m
from rlhfuse.cluster import Cluster, describe_node
from rlhfuse.config import Config
from rlhfuse.config_file import dump, load
from rlhfuse.data import Prompt, PromptStream
from rlhfuse.fleet import Fleet
from rlhfuse.logprob_sources import ratios
from rlhfuse.metrics import Loggers, cut_jsonl, open_loggers
from rlhfuse.placement import NodeInfo, Seat, StagePlacement, WorkerSpec, seats
from rlhfuse.planner.memory import check_room, memory_plan
from rlhfuse.planner.workload import workload_of
from rlhfuse.progress import Progress
from rlhfuse.resolve import Resolved
from rlhfuse.resume_check import check_resume
from rlhfuse.rewards import RewardSource, open_rewards
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.run_folder import RunFolder, TrainerState, load_state
from rlhfuse.transport import Hub, make_keys
from rlhfuse.warm_up import warm_up

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """What the trainer works with. `state` is replaced after every step."""

    run: Resolved
    folder: RunFolder
    fleet: Fleet
    stream: PromptStream[Prompt]
    state: TrainerState
    loggers: Loggers
    progress: Progress
    rewards: RewardSource | None
    lengths: LengthModel  # of the responses so far: predicts, decides nothing else
    meeting: "Meeting"
    roles: tuple[m.Role, ...] = field(default=("actor",))  # trained
    # Whether the training workers are at `state` exactly, so that it can be saved.
    settled: bool = True

    def load(self, checkpoint: Path) -> None:
        """Go to the state that a checkpoint of this run holds; pipelines stay as they are cut."""
        self.settled = False
        pipelines = self.state.pipelines
        self.state = msgspec.structs.replace(load_state(checkpoint), pipelines=pipelines)
        self.stream.restore(self.state.data)
        self.fleet.broadcast(
            self.fleet.training, m.LoadCheckpoint(folder=str(checkpoint.resolve()))
        )
        self.fleet.gather(m.Ack, self.fleet.training, f"checkpoint {checkpoint} to be loaded")
        self.settled = True

    def start_over(self) -> None:
        """The state before the first step, which new training workers are in."""
        self.state = fresh_state(self.run)
        self.stream.restore(self.state.data)
        self.settled = True

    def forget_rewards(self) -> None:
        """What was asked for in a step that is over must not be answered in another one."""
        if self.rewards is not None and self.rewards.outstanding:
            self.rewards.close()
            self.rewards = open_rewards(self.run.config.reward)

    def close_rewards(self) -> None:
        if self.rewards is not None:
            self.rewards.close()

    def rewind_logs(self, *, samples_until: int) -> None:
        """Forget what was logged of steps that will run again, and samples of later steps than
        `samples_until`."""
        self.loggers.rewind(self.state.step)
        cut_jsonl(self.folder.samples, samples_until)


class Meeting:
    """Where the training workers find each other: a store in the controller, on a port of its
    own choice, so that none can be taken. It outlives them."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._stores: list[TCPStore] = []

    def fresh(self) -> tuple[str, int]:
        """Host and port of a store that nobody has used."""
        self._stores.append(TCPStore(self._host, 0, is_master=True, wait_for_workers=False))
        return self._host, self._stores[-1].port


@contextlib.contextmanager
def open_session(run: Resolved, *, resume: bool) -> Iterator[Session]:
    """Start everything, and leave no process behind, whatever happens.

    Raises:
        ValueError: the user's mistake (a damaged checkpoint, a run that exists already, ...).
        WorkerFailed: a worker did not start.
    """
    config = run.config
    folder = RunFolder(config.trainer)
    checkpoint = folder.newest()
    if not resume and checkpoint is not None:
        raise ValueError(
            f"{folder.path} holds a run with checkpoints: go on with --resume, "
            "or choose another trainer.experiment_name"
        )
    reshaped = config.penalises or config.truncates
    if reshaped and not config.replays and config.algorithm.replay_truncation != "off":
        logger.warning("the policy's ratios are %s", ratios(config))
    if not config.placement.ray_address:  # else when the nodes are known
        for warning in check_memory(run, [describe_node("", "127.0.0.1")]):
            logger.warning("%s", warning)
    state, changes = fresh_state(run), tuple[str, ...]()
    if checkpoint is not None:
        before = load(folder.path / "config.yaml")
        state, changes = resumed_state(before, config, run.pipelines, checkpoint)
    with contextlib.ExitStack() as stack:
        folder.create(dump(config))
        # Samples of steps that will run again, or of an earlier run that never got to save.
        cut_jsonl(folder.samples, state.step if checkpoint else -1)
        progress = stack.enter_context(Progress(run.total_steps, done_steps=state.step))
        loggers = stack.enter_context(
            open_loggers(
                config.trainer.logger,
                folder.path,
                progress=progress,
                project=config.trainer.project_name,
                experiment=config.trainer.experiment_name,
                resume_step=state.step if checkpoint else None,
            )
        )
        rewards = open_rewards(config.reward)
        if rewards is not None:
            stack.callback(rewards.close)
        fleet, meeting = _start_fleet(run, state, folder, progress, stack)
        roles: tuple[m.Role, ...] = ("actor", "critic") if config.uses_critic else ("actor",)
        session = Session(
            run=run,
            folder=folder,
            fleet=fleet,
            stream=run.stream(),
            state=state,
            loggers=loggers,
            progress=progress,
            rewards=rewards,
            lengths=LengthModel(config.rollout.response_length),
            meeting=meeting,
            roles=roles,
        )
        stack.callback(session.close_rewards)  # they may be others by then
        if checkpoint is not None:
            progress.note(f"resuming after step {state.step} from {checkpoint}")
            for change in changes:
                progress.note(f"changed since: {change}")
            session.load(checkpoint)
        elif resume:
            progress.note(f"{folder.path} holds nothing to resume from: starting")
        yield session


def resumed_state(
    before: Config, now: Config, pipelines: dict[str, StagePlacement], checkpoint: Path
) -> tuple[TrainerState, tuple[str, ...]]:
    """The state to go on from, and what has changed in the configuration since. Models stay cut
    into stages as they were, as another cut rounds otherwise; only where another number of stages
    is asked for are they `pipelines`.

    Raises:
        ValueError: the checkpoint is damaged, or what has changed would break the run.
    """
    state = load_state(checkpoint)
    changes = check_resume(before, now)
    if changes.stages:
        state = msgspec.structs.replace(state, pipelines=pipelines)
    return state, changes.told


def fresh_state(run: Resolved) -> TrainerState:
    """The state before the first step."""
    return TrainerState(
        step=0,
        data=run.stream().state,
        kl_coef=run.config.algorithm.kl_ctrl.kl_coef,
        pipelines=run.pipelines,
    )


def _start_fleet(
    run: Resolved,
    state: TrainerState,
    folder: RunFolder,
    progress: Progress,
    stack: contextlib.ExitStack,
) -> tuple[Fleet, Meeting]:
    config = run.config
    cluster = stack.enter_context(Cluster(config.placement.ray_address))
    host = cluster.own_address()
    hub = Hub(make_keys(curve=cluster.spans_machines), host)
    stack.callback(hub.close)
    if config.placement.ray_address:
        for warning in check_memory(run, cluster.nodes()):
            progress.note(warning)
    meeting = Meeting(host)
    fleet = Fleet(hub, cluster, config.trainer, note=progress.note, changed=folder.write_workers)
    stack.callback(fleet.shutdown)
    # Workers take seconds to start: compile, or load, what the first step needs meanwhile.
    warm = threading.Thread(target=warm_up, name="warm-up", daemon=True)
    warm.start()
    fleet.start(worker_specs(run, state, hub, cluster, meeting))
    progress.note(f"training on {fleet.detail(fleet.training[0])}")
    warm.join()
    return fleet, meeting


def check_memory(run: Resolved, nodes: Sequence[NodeInfo]) -> tuple[str, ...]:
    """Whether generation, scoring and training have room on these nodes; warnings.

    Raises:
        ValueError: they have not.
    """
    config = run.config
    cuda = config.placement.device != "cpu" and any(n.num_gpus or n.gpu_bytes for n in nodes)
    plan = memory_plan(
        config, workload_of(config), run.pipelines, cuda=cuda, reference=run.reference
    )
    return check_room(plan, _homes(config, nodes), cuda=cuda)


def _homes(config: Config, nodes: Sequence[NodeInfo]) -> list[Seat]:
    placement = config.placement
    return seats(
        placement.num_devices,
        nodes,
        gpus=placement.device != "cpu" and any(node.num_gpus for node in nodes),
        pin=placement.pin_cpus,
    )


def worker_specs(
    run: Resolved, state: TrainerState, hub: Hub, cluster: Cluster, meeting: Meeting
) -> list[WorkerSpec]:
    """Per device a rollout and a training worker, on one core each where they are pinned."""
    placement = run.config.placement
    homes = _homes(run.config, cluster.nodes())
    if placement.pin_cpus and any(seat.core is None for seat in homes):
        logger.warning("more devices than cores: workers are not pinned")
    store = meeting.fresh()
    return [
        WorkerSpec(
            name=f"{kind}-{index}",
            kind=kind,
            index=index,
            seat=seat,
            hub=hub.endpoint,
            keys=hub.keys,
            config=run.config,
            pipelines=state.pipelines,
            reference=run.reference,
            store=store,
            total_optimizer_steps=run.optimizer_steps,
        )
        for index, seat in enumerate(homes)
        for kind in ("rollout", "training")
    ]
