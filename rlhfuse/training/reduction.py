"""Gradients that become sums over groups of ranks, while the ranks go on with other tasks."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

BUCKET_BYTES = 64 * 1024 * 1024
Key = tuple[str, int]
"""A stage: (role or model, pp_stage)."""


@dataclass(slots=True)
class _Bucket:
    """Gradients that travel together, flattened."""

    gradients: list[torch.Tensor]
    flat: torch.Tensor
    work: dist.Work


class Reductions:
    """The sums that are on their way on one rank."""

    def __init__(self) -> None:
        self._travelling: dict[Key, list[_Bucket]] = {}

    def start(self, key: Key, gradients: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
        """Begin to sum `gradients`, which are complete, over the ranks of `group`; all of them
        call it with as many of the same shapes."""
        assert key not in self._travelling, f"{key}: started twice"
        self._travelling[key] = [
            _Bucket(part, flat, _work(dist.all_reduce(flat, group=group, async_op=True)))
            for part in buckets(gradients)
            for flat in (flattened(part),)
        ]

    @torch.no_grad()
    def finish(self, key: Key) -> None:
        """Wait until the gradients of `key` are the sums; nothing where none were started."""
        for bucket in self._travelling.pop(key, []):
            bucket.work.wait()
            copy_back(bucket.flat, bucket.gradients)

    def clear(self) -> None:
        """Wait for nothing any more."""
        self._travelling.clear()


def buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type, together at most `BUCKET_BYTES` (or alone, where larger)."""
    for _, same in itertools.groupby(tensors, key=lambda t: t.dtype):
        bucket: list[torch.Tensor] = []
        for tensor in same:
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def flattened(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A copy of all, one after the other."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def copy_back(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """What `flattened` made of tensors like these, into them."""
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not part of the group"
    return work
