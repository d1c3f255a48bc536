"""What both kinds of worker share: pinning, device and type, and the outer command loop."""

import logging
import os
import sys
import traceback
from collections.abc import Callable

import psutil
import torch

from rlhfuse.config import PlacementConfig
from rlhfuse.messages import Failed
from rlhfuse.placement import WorkerSpec
from rlhfuse.transport import Link

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def settle(spec: WorkerSpec) -> None:
    """Make this process a good neighbour: one core, one thread, deterministic float32."""
    if spec.seat.core is not None:
        psutil.Process().cpu_affinity([spec.seat.core])
    torch.set_num_threads(1)
    # Sampling has its own seeds; this one is for whatever draws from torch's default generator.
    torch.manual_seed(spec.config.trainer.seed * 1000 + spec.index)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def meet_on(address: str) -> None:
    """Let torch.distributed use the network interface that has `address`: what a host's name
    resolves to may be unreachable, or nothing. The user's own choice comes first."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def device_of(placement: PlacementConfig, index: int) -> torch.device:
    """The torch device number `index` of this machine."""
    kind = placement.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind, index) if kind == "cuda" else torch.device("cpu")


def dtype_of(placement: PlacementConfig, device: torch.device) -> torch.dtype:
    """float32 on a CPU, bfloat16 on an accelerator, unless the configuration says."""
    if placement.dtype != "auto":
        return _DTYPES[placement.dtype]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def give_back(device: torch.device) -> None:
    """Let the device's other worker have what this one has freed. (A CPU's allocator does so by
    itself; CUDA's keeps it for its process.)"""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_guarded(spec: WorkerSpec, body: Callable[[Link], None]) -> None:
    """Run a worker's life; whatever ends it early is reported to the controller first."""
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s {spec.name} %(levelname)s %(message)s"
    )
    link = Link(spec.hub, spec.identity, spec.keys)
    try:
        settle(spec)
        body(link)
    except BaseException as error:
        # The controller decides what becomes of it, and what the user is to read.
        link.send(
            Failed(
                worker=spec.name,
                where=type(error).__name__,
                error=str(error),
                traceback=traceback.format_exc(),
                user_error=isinstance(error, ValueError),
            )
        )
        sys.exit(1)
    finally:
        link.close()
