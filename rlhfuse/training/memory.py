"""Out of memory: which tensors a rank holds, and what to change."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import psutil
import torch

from rlhfuse.models.stage import Head, ModelStage

GIB, MIB = 2**30, 2**20
# A CPU allocator's message of torch, and what the C library says of memory that it does not give.
_WORDS = re.compile(r"(can't|cannot) allocate memory|not enough memory", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes on one rank, by kind. `deferred`: between I and W of a split backward; `logits`: one
    chunk of them, where there is a language model's head. `microbatches`: between F and B."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    deferred: int = 0
    logits: int = 0
    microbatches: int = 0

    def __add__(self, other: "Held") -> "Held":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Held)}
        return Held(**sums)

    @property
    def known(self) -> int:
        """All but activations, and the chunk of logits, which comes and goes."""
        return self.weights + self.gradients + self.optimizer + self.deferred


@dataclass(frozen=True, slots=True)
class Ways:
    """What to change where most memory goes to one kind; `weights`: with their gradients."""

    activations: str
    deferred: str
    optimizer: str
    weights: str


_KEYS = Ways(
    activations="cut smaller micro-batches (a higher num_microbatches, or a lower "
    "ppo_max_token_len_per_gpu), or set gradient_checkpointing=true, of actor or critic",
    deferred="set fusion.split_weight=false",
    optimizer="train adapters (lora_rank), or use more devices: replicas share states "
    "(placement.shard_optimizer)",
    weights="use more pipeline stages (placement.actor_pp, placement.critic_pp, more devices), "
    "or train adapters (lora_rank)",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, in torch's CPU allocator, or in Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_WORDS.search(str(error)))


def in_use(device: torch.device) -> int:
    """Bytes that tensors (on a CPU: the process, which is more) take now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def take_peak(device: torch.device) -> int:
    """The most bytes that tensors have taken since the last call; on a CPU, that the process has
    ever taken."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def logits_bytes(stage: ModelStage, chunk_rows: int) -> int:
    """Of one float32 chunk of the logits of a stage, where it has a language model's head."""
    if not stage.last or stage.head is not Head.LM:
        return 0
    return 4 * chunk_rows * stage.lm_head_weight().shape[0]


def advice(
    error: BaseException, held: Held, total: int, device: torch.device, ways: Ways = _KEYS
) -> str:
    """The message of an allocation that failed, in one line: what was asked for, what is held by
    kind, and what changes most of it. `total`: bytes in use, from `in_use`."""
    what = " ".join(str(error).split()) or type(error).__name__
    rest = max(0, total - held.known)
    parts = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        f"activations of {held.microbatches} micro-batches and the rest": rest,
        "waiting for W": held.deferred,
        "a chunk of logits": held.logits,
    }
    told = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    where = "on the GPU" if device.type == "cuda" else "in the process"
    return f"out of memory ({what}); held {where}: {told}. {_way_out(held, rest, ways)}"


@contextmanager
def loading(what: str, device: torch.device) -> Iterator[None]:
    """While it is entered, models are read.

    Raises:
        ValueError: they do not fit: what to change.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"out of memory while reading the {what} ({words}), with {_size(in_use(device))} in "
            f"use on {device}: use more pipeline stages or devices (placement.num_devices, "
            "placement.actor_pp, placement.critic_pp), or placement.dtype=bfloat16"
        ) from error


def _way_out(held: Held, rest: int, ways: Ways) -> str:
    found = {
        "activations": (rest, ways.activations),
        "products that wait for W": (held.deferred, ways.deferred),
        "the optimizer's states": (held.optimizer, ways.optimizer),
        "weights and gradients": (held.weights + held.gradients, ways.weights),
    }
    name, (_, way) = max(found.items(), key=lambda item: item[1][0])
    return f"Most are {name}: {way}"


def _size(number: int) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / MIB:.1f} MiB"
