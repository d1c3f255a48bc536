"""Ray places and starts the workers; nothing else in rlhfuse imports Ray.

Per device two processes: a rollout worker and a training worker, which share it in time. After the
start all control goes over ZMQ; Ray is asked only whether a worker still lives.
"""

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhfuse.placement import NodeInfo, WorkerSpec

_ray: Any = ray  # parts of it have no types
logger = logging.getLogger(__name__)

_THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_NODE_START_LIMIT_S = 120.0
_CONNECT_LIMIT_S = 5.0
_KILL_LIMIT_S = 5.0
_MOST_WORKERS = 64  # on one node, with those that are being replaced
_PR_SET_PDEATHSIG = 1


class Cluster:
    """A private local Ray cluster, or an existing one by address, with the workers of one run."""

    def __init__(self, address: str = "") -> None:
        """Raises ValueError where an address is given and no cluster answers there."""
        _check_address(address)
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
        except (ConnectionError, RuntimeError) as error:
            if not address:
                raise
            raise ValueError(f"placement.ray_address={address!r}: {error}") from error
        self._address = address
        self._nodes: dict[str, Any] = {}  # Ray node id -> its _Node actor
        self._lives: dict[str, ray.ObjectRef[str]] = {}  # by identity
        self._homes: dict[str, str] = {}  # identity -> Ray node id

    @property
    def spans_machines(self) -> bool:
        """Whether workers may be elsewhere: what binds must be reachable, and needs keys."""
        return bool(self._address)

    def own_address(self) -> str:
        """What workers reach the controller's machine by."""
        return str(_ray.util.get_node_ip_address()) if self._address else "127.0.0.1"

    def nodes(self) -> list[NodeInfo]:
        """The living nodes, the controller's own first."""
        own = ray.get_runtime_context().get_node_id()
        if not self._address:
            return [describe_node(own, "127.0.0.1")]
        alive = [node for node in _ray.nodes() if node["Alive"]]
        alive.sort(key=lambda node: (node["NodeID"] != own, node["NodeManagerAddress"]))
        asked = [
            self._actor(node["NodeID"]).describe.remote(node["NodeID"], node["NodeManagerAddress"])
            for node in alive
        ]
        gpus = [int(node["Resources"].get("GPU", 0)) for node in alive]
        found = [
            msgspec.msgpack.decode(data, type=NodeInfo)
            for data in ray.get(asked, timeout=_NODE_START_LIMIT_S)
        ]
        return [
            msgspec.structs.replace(node, num_gpus=count)
            for node, count in zip(found, gpus, strict=True)
        ]

    def start(self, spec: WorkerSpec) -> None:
        """Start a process; it connects to the controller by itself."""
        home = spec.seat.node.node_id
        encoded = msgspec.msgpack.encode(spec)
        self._homes[spec.identity] = home
        self._lives[spec.identity] = self._actor(home).live.remote(spec.identity, encoded)

    def kill(self, identity: str) -> None:
        """End a process at once, also one that is stopped. Returns before it has ended."""
        if identity in self._homes:
            self._actor(self._homes[identity]).kill.remote(identity)

    def dead(self) -> dict[str, str]:
        """Processes that have ended, by identity, with the reason; each is told once."""
        if not self._lives:
            return {}
        names = {ref: name for name, ref in self._lives.items()}
        ended, _ = ray.wait(list(names), num_returns=len(names), timeout=0)
        for ref in ended:
            del self._lives[names[ref]]
            if _node_is_gone(ref):
                self._nodes.pop(self._homes[names[ref]], None)
        return {names[ref]: _reason(ref) for ref in ended}

    def close(self) -> None:
        """End every worker of this run, and the private cluster with them."""
        killed = [node.kill_all.remote() for node in self._nodes.values()]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait(killed, num_returns=len(killed), timeout=_KILL_LIMIT_S) if killed else None
        for node in self._nodes.values():
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

    def _actor(self, node_id: str) -> Any:
        if node_id not in self._nodes:
            # Ray makes `remote` methods at run time: its own types do not know them.
            make: Any = ray.remote(_Node).options(
                num_cpus=0,
                max_concurrency=_MOST_WORKERS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            self._nodes[node_id] = make.remote()
        return self._nodes[node_id]


def _check_address(address: str) -> None:
    """Ray itself takes most of a minute to notice that nobody is there."""
    if not address or address == "auto":
        return
    place = f"placement.ray_address={address!r}"
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        raise ValueError(f"{place}: expected HOST:PORT of the cluster's head node, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_LIMIT_S).close()
    except OSError as error:
        raise ValueError(f"{place}: no Ray cluster answers there: {error}") from error


def describe_node(node_id: str, address: str) -> NodeInfo:
    """The machine that this process runs on."""
    memory = psutil.virtual_memory()
    limit, used = _container_memory()
    return NodeInfo(
        node_id,
        address,
        f"{os.uname().nodename} {psutil.boot_time():.0f}",
        tuple(psutil.Process().cpu_affinity()),
        memory_bytes=min(memory.total, limit),
        free_bytes=min(memory.available, max(0, limit - used)),
        gpu_bytes=_smallest_gpu(),
    )


def _container_memory() -> tuple[int, int]:
    """Limit and use in bytes of the control group (version 2) that this machine may be; without
    one, more than any machine has, and 0."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        return int(limit), int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return 1 << 62, 0


def _smallest_gpu() -> int:
    """Bytes of memory; 0 where no driver's tool tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return min((int(line) for line in told.stdout.split()), default=0) << 20
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.warning("the GPUs' memory is not known, and not checked: %s", error)
        return 0


def _reason(ref: "ray.ObjectRef[str]") -> str:
    try:
        return str(ray.get(ref))
    except ray.exceptions.RayError as error:
        return str(error).strip().splitlines()[-1]


def _node_is_gone(ref: "ray.ObjectRef[str]") -> bool:
    try:
        ray.get(ref)
    except ray.exceptions.RayError:
        return True
    return False


class _Node:
    """The Ray actor of a machine: its worker processes are forked from one that has imported
    torch and transformers (and, on a CPU, vLLM where it generates) already, so that the machine
    pays for the imports once."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._lock = threading.Lock()
        self._alive: dict[str, ForkServerProcess] = {}

    def describe(self, node_id: str, address: str) -> bytes:
        return msgspec.msgpack.encode(describe_node(node_id, address))

    def live(self, identity: str, encoded_spec: bytes) -> str:
        """Start a worker and stay until its process ends; says how it ended."""
        process = self._context.Process(target=live, args=(encoded_spec,), daemon=True)
        with self._lock:
            # Of effect before the first process only.
            self._context.set_forkserver_preload(_preloaded(encoded_spec))
            process.start()
            self._alive[identity] = process
        process.join()
        with self._lock:
            self._alive.pop(identity, None)
        code = process.exitcode or 0
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self, identity: str) -> None:
        with self._lock:
            process = self._alive.get(identity)
        if process is not None:
            process.kill()

    def kill_all(self) -> None:
        for identity in list(self._alive):
            self.kill(identity)


def _preloaded(encoded_spec: bytes) -> list[str]:
    """Modules that a worker like this one needs."""
    config = msgspec.msgpack.decode(encoded_spec, type=WorkerSpec).config
    modules = ["collector_off", "rollout", "training"]
    # vLLM looks at the devices when it is imported; with a GPU each process does so itself, as its
    # driver does not like to be forked.
    if config.rollout.engine == "vllm" and shutil.which("nvidia-smi") is None:
        modules.append("with_vllm")
    return [f"rlhfuse.workers.{module}" for module in modules]


def live(encoded_spec: bytes) -> None:
    """A worker process from start to end."""
    from rlhfuse.workers import rollout, training

    gc.freeze()
    gc.enable()
    _die_with_parent()
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    spec = msgspec.msgpack.decode(encoded_spec, type=WorkerSpec)
    if spec.kind == "rollout":
        rollout.main(spec)
    else:
        training.main(spec)


def _die_with_parent() -> None:
    """Let Linux end this process with its parent, even while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
