"""Ray places and starts the workers; nothing else in rlhfuse imports Ray.

Per device two actors: a rollout worker and a training worker, which share it in time. After the
start all control goes over ZMQ; Ray is asked only whether a worker still lives.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import ray

from rlhfuse.placement import WorkerSpec

logger = logging.getLogger(__name__)

_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Cluster:
    """A private local Ray cluster, or an existing one by address, with the workers of one run."""

    def __init__(self, address: str = "") -> None:
        """Raises ValueError where an address is given and no cluster answers there."""
        # The driver's own Python path must reach the workers: a checkout needs no install.
        environment = {**_THREADS, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            ray.init(
                address=address or "local",
                include_dashboard=False if not address else None,
                log_to_driver=True,
                logging_level=logging.WARNING,
                configure_logging=True,
                runtime_env={"env_vars": environment},
            )
        except ConnectionError as error:
            raise ValueError(f"placement.ray_address={address!r}: {error}") from error
        self._actors: dict[str, ray.actor.ActorHandle[Any]] = {}
        self._lives: dict[str, ray.ObjectRef[None]] = {}

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Start one process per spec; each connects to the controller by itself."""
        resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        # Two workers share a device.
        gpus = 0.5 if resources.get("GPU", 0) > 0 else 0
        for spec in specs:
            # Ray makes `remote` methods at run time: its own types do not know them.
            make: Any = ray.remote(_Worker).options(num_cpus=0, num_gpus=gpus, name=spec.name)
            actor = make.remote()
            self._actors[spec.name] = actor
            self._lives[spec.name] = actor.live.remote(msgspec.msgpack.encode(spec))

    def dead(self) -> dict[str, str]:
        """Workers whose process has ended, with the reason."""
        if not self._lives:
            return {}
        names = {ref: name for name, ref in self._lives.items()}
        ended, _ = ray.wait(list(names), num_returns=len(names), timeout=0)
        return {names[ref]: _reason(ref) for ref in ended}

    def kill(self, name: str) -> None:
        """End one worker at once."""
        ray.kill(self._actors[name], no_restart=True)

    def close(self) -> None:
        """End every worker of this run, and the private cluster with them."""
        for name, actor in self._actors.items():
            try:
                ray.kill(actor, no_restart=True)
            except ray.exceptions.RayError as error:
                logger.debug("worker %s was gone already: %s", name, error)
        self._actors.clear()
        self._lives.clear()
        ray.shutdown()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _reason(ref: "ray.ObjectRef[None]") -> str:
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]
    return "it ended"


class _Worker:
    """The Ray actor: turns into a rollout or a training worker for good."""

    def live(self, encoded_spec: bytes) -> None:
        from rlhfuse.workers import rollout, training

        spec = msgspec.msgpack.decode(encoded_spec, type=WorkerSpec)
        if spec.kind == "rollout":
            rollout.main(spec)
        else:
            training.main(spec)
