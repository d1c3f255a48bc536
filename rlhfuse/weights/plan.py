"""Who sends which tensor to whom after an update. Pure.

Training ranks hold disjoint stages; every engine and scorer needs all tensors of its role. Each
receiver pulls each tensor once, from the one rank that owns it: nothing is gathered first, and no
rank ever holds a second full copy.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankTensors:
    """The tensors of one role that one training rank owns: name -> sha256 of its bytes."""

    endpoint: str
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """`sources`: (endpoint, names) per owning rank; `digest`: of all tensors together."""

    sources: tuple[tuple[str, tuple[str, ...]], ...]
    digest: str


def make_plan(ranks: Sequence[RankTensors]) -> WeightPlan:
    """Every tensor exactly once, in rank order.

    A tensor that two ranks own (tied embeddings: first and last stage) is taken from the first,
    after a check that both hold the same bits.
    """
    owner: dict[str, str] = {}
    digests: dict[str, str] = {}
    sources: list[tuple[str, tuple[str, ...]]] = []
    for rank in ranks:
        mine: list[str] = []
        for name, digest in rank.digests.items():
            assert digests.setdefault(name, digest) == digest, (
                f"{name} differs between {owner[name]} and {rank.endpoint}"
            )
            if name not in owner:
                owner[name] = rank.endpoint
                mine.append(name)
        if mine:
            sources.append((rank.endpoint, tuple(mine)))
    return WeightPlan(tuple(sources), combined_digest(digests))


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of many tensors, independent of the order in which they are named."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name} {digests[name]}\n".encode())
    return whole.hexdigest()
