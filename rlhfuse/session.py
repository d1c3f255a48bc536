"""A run in progress: its workers, its folder, its place in the data."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from rlhfuse import messages as m
from rlhfuse.cluster import Cluster
from rlhfuse.config_file import dump
from rlhfuse.data import Prompt, PromptStream
from rlhfuse.fleet import Fleet
from rlhfuse.metrics import Loggers, cut_jsonl, open_loggers
from rlhfuse.placement import WorkerSpec
from rlhfuse.progress import Progress
from rlhfuse.resolve import Resolved
from rlhfuse.rewards import RewardSource, open_rewards
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.run_folder import RunFolder, TrainerState, load_state
from rlhfuse.transport import Hub, free_port
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
    roles: tuple[m.Role, ...] = field(default=("actor",))  # trained

    def load(self, checkpoint: Path) -> None:
        """Go to the state that a checkpoint of this run holds."""
        self.state = load_state(checkpoint)
        self.stream.restore(self.state.data)
        self.fleet.broadcast(
            self.fleet.training, m.LoadCheckpoint(folder=str(checkpoint.resolve()))
        )
        self.fleet.gather(m.Ack, self.fleet.training, f"checkpoint {checkpoint} to be loaded")


@contextlib.contextmanager
def open_session(run: Resolved, *, resume: bool) -> Iterator[Session]:
    """Start everything, and leave no process behind, whatever happens.

    Raises:
        ValueError: the user's mistake (a damaged checkpoint, a run that exists already, ...).
        WorkerFailed: a worker did not start.
    """
    config = run.config
    folder = RunFolder(config.trainer)
    checkpoint = folder.latest() if resume else None
    if not resume and folder.latest() is not None:
        raise ValueError(
            f"{folder.path} holds a run with checkpoints: go on with --resume, "
            "or choose another trainer.experiment_name"
        )
    state = load_state(checkpoint) if checkpoint else fresh_state(run)
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
        fleet = _start_fleet(run, state, stack)
        folder.write_workers(fleet.pids)
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
            roles=roles,
        )
        if checkpoint is not None:
            progress.note(f"resuming after step {state.step} from {checkpoint}")
            session.load(checkpoint)
        yield session


def fresh_state(run: Resolved) -> TrainerState:
    """The state before the first step."""
    return TrainerState(
        step=0,
        data=run.stream().state,
        kl_coef=run.config.algorithm.kl_ctrl.kl_coef,
        pipelines=run.pipelines,
    )


def _start_fleet(run: Resolved, state: TrainerState, stack: contextlib.ExitStack) -> Fleet:
    config = run.config
    hub = Hub()
    stack.callback(hub.close)
    cluster = stack.enter_context(Cluster(config.placement.ray_address))
    fleet = Fleet(hub, cluster, config.trainer.wait_timeout_s)
    stack.callback(fleet.shutdown)
    # Workers take seconds to start: compile, or load, what the first step needs meanwhile.
    warm = threading.Thread(target=warm_up, name="warm-up", daemon=True)
    warm.start()
    fleet.start(worker_specs(run, state, hub.endpoint))
    warm.join()
    return fleet


def worker_specs(run: Resolved, state: TrainerState, hub: str) -> list[WorkerSpec]:
    """Per device a rollout and a training worker, on one core each where they are pinned."""
    placement = run.config.placement
    port = free_port()
    cores = pinned_cores(placement.num_devices) if placement.pin_cpus else {}
    return [
        WorkerSpec(
            name=f"{kind}-{index}",
            kind=kind,
            index=index,
            hub=hub,
            config=run.config,
            core=cores.get(index),
            pipelines=state.pipelines,
            master_port=port,
            total_optimizer_steps=run.optimizer_steps,
        )
        for index in range(placement.num_devices)
        for kind in ("rollout", "training")
    ]


def pinned_cores(num_devices: int) -> dict[int, int]:
    """A core for each device where there are enough, and none where there are not."""
    available = psutil.Process().cpu_affinity()
    if len(available) < num_devices:
        logger.warning(
            "%d devices on %d cores: workers are not pinned", num_devices, len(available)
        )
        return {}
    return dict(enumerate(available[:num_devices]))
