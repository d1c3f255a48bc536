"""``rlhfuse doctor``: what this machine has, what is missing, and what that would enable."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import click
import msgspec
import psutil

from rlhfuse.cli.common import FAILURE, OK, emit_json, stdout_kept_clean
from rlhfuse.engines.vllm_setup import installed_version

GIB = 1024**3
Status = Literal["ok", "note", "missing", "problem"]
_MARKS: dict[Status, str] = {"ok": "ok", "note": "note", "missing": "-", "problem": "PROBLEM"}
# Import name -> distribution.
_REQUIRED = {
    "click": "click",
    "msgspec": "msgspec",
    "numba": "numba",
    "numpy": "numpy",
    "psutil": "psutil",
    "ray": "ray",
    "rich": "rich",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "torch": "torch",
    "transformers": "transformers",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}
# Import name -> distribution, what it enables, how to get it.
_OPTIONAL = {
    "vllm": (
        "vllm",
        "generation by vLLM (rollout.engine: vllm)",
        "see requirements-vllm-cpu.txt and requirements-vllm-cuda.txt",
    ),
    "triton": ("triton", "fused kernels on NVIDIA GPUs", "pip install 'rlhfuse[gpu]'"),
    "pyarrow": ("pyarrow", "data in Parquet files", "pip install 'rlhfuse[parquet]'"),
    "wandb": ("wandb", "logging to Weights & Biases", "pip install 'rlhfuse[wandb]'"),
    "megatron.core": (
        "megatron-core",
        "the drop-in scheduler for Megatron pipelines (rlhfuse.megatron)",
        "pip install megatron-core",
    ),
    "amp_C": (
        "apex",
        "apex's FusedAdam on GPUs, and its multi-tensor kernels in Megatron runs",
        "build NVIDIA apex",
    ),
}


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at. note: works, but look. missing: optional. problem: must be mended."""

    name: str
    status: Status
    detail: str
    enables: str = ""  # by what is missing


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check versions, devices, memory, ports and optional parts; exit 1 where a run would fail."""
    with stdout_kept_clean(as_json):
        findings = examine()
    problems = [finding for finding in findings if finding.status == "problem"]
    if as_json:
        emit_json({"ok": not problems, "findings": findings})
    else:
        _show(findings)
        click.echo()
        found = f"{len(problems)} problem(s): mend them first." if problems else "Ready to train."
        click.echo(found)
    ctx.exit(FAILURE if problems else OK)


def examine() -> list[Finding]:
    """Everything that is looked at; a check that fails by itself is a problem, not the end."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _required,
        _devices,
        _kernels,
        _resources,
        _ports,
        _optional,
    )
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            name = check.__name__.strip("_")
            findings.append(Finding(name, "problem", f"{type(error).__name__}: {error}"))
    return findings


def _show(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        gain = f" (would enable {finding.enables})" if finding.enables else ""
        mark = _MARKS[finding.status]
        click.echo(f"{mark:>7}  {finding.name:<{width}}  {finding.detail}{gain}")


def _python() -> Iterator[Finding]:
    status: Status = "ok" if sys.version_info >= (3, 11) else "problem"
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("python", status, f"{platform.python_version()} on {system}, 3.11 is needed")
    yield Finding("rlhfuse", "ok", _version("rlhfuse") or "from the working directory")


def _required() -> Iterator[Finding]:
    for module, distribution in _REQUIRED.items():
        version = _version(distribution)
        if version and importlib.util.find_spec(module) is not None:
            yield Finding(distribution, "ok", version)
        else:
            detail = f"not installed: pip install {distribution}"
            yield Finding(distribution, "problem", detail)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    enough = (cores or 1) >= 2
    yield Finding(
        "cpu cores",
        "ok" if enough else "note",
        f"{cores} to use" if enough else f"{cores} to use: two devices will share it",
    )
    if not torch.cuda.is_available():
        yield Finding("gpu", "note", "none that torch can use: placement.device is cpu")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        detail = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        yield Finding(f"gpu {index}", "ok", detail)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    available = torch.distributed.is_available() and (
        torch.distributed.is_nccl_available()
        if backend == "nccl"
        else torch.distributed.is_gloo_available()
    )
    detail = f"{backend} in torch" if available else f"this torch is built without {backend}"
    yield Finding("collectives", "ok" if available else "problem", detail)


def _kernels() -> Iterator[Finding]:
    import torch

    from rlhfuse.kernels.dispatch import describe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = os.environ.get("RLHFUSE_KERNELS", "auto")
    try:
        detail = f"{describe(device)} (RLHFUSE_KERNELS={asked})"
        yield Finding("kernels", "ok", detail)
    except ValueError as error:
        yield Finding("kernels", "problem", str(error))


def _resources() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield _room("memory", memory.available, memory.total, least=2 * GIB)
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        yield _room("shared memory", usage.free, usage.total, least=GIB // 2)
    else:
        yield Finding("shared memory", "note", "no /dev/shm: Ray uses the disk instead")
    usage = shutil.disk_usage(Path.cwd())
    yield _room("disk", usage.free, usage.total, least=GIB)
    writable = os.access(Path.cwd(), os.W_OK)
    detail = "writable" if writable else "not writable: set trainer.default_local_dir"
    yield Finding("working directory", "ok" if writable else "note", detail)


def _room(name: str, free: int, total: int, *, least: int) -> Finding:
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= least:
        return Finding(name, "ok", detail)
    return Finding(name, "note", f"{detail}: less than {least / GIB:.1f} GiB is little")


def _ports() -> Iterator[Finding]:
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            client.settimeout(5)
            client.connect(server.getsockname())
        yield Finding("ports", "ok", "local ports can be bound and reached")
    except OSError as error:
        detail = f"no local port can be bound and reached: {error}; look for a firewall or sandbox"
        yield Finding("ports", "problem", detail)


def _optional() -> Iterator[Finding]:
    for module, (distribution, enables, way) in _OPTIONAL.items():
        if _importable(module):
            found = installed_version() if module == "vllm" else _version(distribution)
            yield Finding(distribution, "ok", found or "installed")
        else:
            yield Finding(distribution, "missing", f"not installed: {way}", enables)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent package
        return False
