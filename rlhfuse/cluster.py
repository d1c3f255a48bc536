"""Ray places and starts the workers; nothing else in rlhfuse imports Ray.

Per device two actors: a rollout worker and a training worker, which share it in time. After the
start all control goes over ZMQ; Ray is asked only whether a worker still lives.
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Sequence
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
                logging_level=logging.ERROR,
                runtime_env={"env_vars": environment},
            )
        except ConnectionError as error:
            raise ValueError(f"placement.ray_address={address!r}: {error}") from error
        self._nodes: list[Any] = []
        self._lives: dict[str, ray.ObjectRef[str]] = {}

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Start one process per spec; each connects to the controller by itself."""
        # Ray makes `remote` methods at run time: its own types do not know them.
        make: Any = ray.remote(_Node).options(num_cpus=0, max_concurrency=len(specs) + 1)
        node = make.remote()
        self._nodes.append(node)
        for spec in specs:
            self._lives[spec.name] = node.live.remote(msgspec.msgpack.encode(spec))

    def dead(self) -> dict[str, str]:
        """Workers whose process has ended, with the reason."""
        if not self._lives:
            return {}
        names = {ref: name for name, ref in self._lives.items()}
        ended, _ = ray.wait(list(names), num_returns=len(names), timeout=0)
        return {names[ref]: _reason(ref) for ref in ended}

    def close(self) -> None:
        """End every worker of this run, and the private cluster with them."""
        for node in self._nodes:
            try:
                # Workers watch the process that started them, and end with it.
                ray.kill(node, no_restart=True)
            except ray.exceptions.RayError as error:
                logger.debug("a node was gone already: %s", error)
        self._nodes.clear()
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


def _reason(ref: "ray.ObjectRef[str]") -> str:
    try:
        return str(ray.get(ref))
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]


class _Node:
    """The Ray actor of a machine: its worker processes are forked from one that has imported
    torch and transformers already, so that the machine pays for the imports once."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["rlhfuse.workers.rollout", "rlhfuse.workers.training"]
        )

    def live(self, encoded_spec: bytes) -> str:
        """Start a worker and stay until its process ends; says how it ended."""
        process = self._context.Process(target=live, args=(encoded_spec,), daemon=True)
        process.start()
        process.join()
        code = process.exitcode or 0
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def live(encoded_spec: bytes) -> None:
    """A worker process from start to end."""
    from rlhfuse.workers import rollout, training

    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    spec = msgspec.msgpack.decode(encoded_spec, type=WorkerSpec)
    if spec.kind == "rollout":
        rollout.main(spec)
    else:
        training.main(spec)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
