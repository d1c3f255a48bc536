"""A weight update: each receiver pulls each tensor once from the rank that owns it, in bounded
pieces and with digests (ours), against gathering the model on one rank and broadcasting it whole.

    python -m bench.bench_weights [--layers 6] [--repetitions 5]

Two training ranks hold a pipeline stage each, two instances take the whole model, four processes of
one thread in all; a Llama 1024 wide, float32. Both ways in turn, in one run; after each, what has
arrived is compared. `extra`: the most that a process takes beyond what it holds anyway, as the
system counts it.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from bench.ranks import run_ranks
from bench.record import Row, print_table, spread, write_result
from rlhfuse.messages import TensorSource
from rlhfuse.payloads import PayloadStore
from rlhfuse.placement import RunKeys
from rlhfuse.transport import PeerClient, PeerServer
from rlhfuse.weights.plan import RankTensors, combined_digest, make_plan
from rlhfuse.weights.send import Inbox, Outbox, tensor_digest

TRAINING, INSTANCES = 2, 2
WIDTH, INNER, VOCAB = 1024, 2816, 16000
MIB = 2**20
KEYS = RunKeys(b"benchmark-token-")
Tensors = dict[str, torch.Tensor]


def shapes(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """Name -> shape for each pipeline stage."""
    stages: list[dict[str, tuple[int, ...]]] = [{"embed": (VOCAB, WIDTH)}, {}]
    for layer in range(layers):
        stage = stages[layer * TRAINING // layers]
        for name in "qkvo":
            stage[f"{layer}.{name}"] = (WIDTH, WIDTH)
        stage |= {f"{layer}.gate": (INNER, WIDTH), f"{layer}.up": (INNER, WIDTH)}
        stage |= {f"{layer}.down": (WIDTH, INNER), f"{layer}.norm": (WIDTH,)}
    stages[-1]["head"] = (VOCAB, WIDTH)
    return stages


class Peak:
    """The most memory that this process had since the start, beyond what it had then."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._start = self._read("VmRSS")

    @property
    def extra(self) -> int:
        return self._read("VmHWM") - self._start

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


class Rank:
    """One of the four processes, with the tensors that it has anyway."""

    def __init__(self, rank: int, layers: int) -> None:
        self.rank = rank
        self.sends = rank < TRAINING
        self.stages = shapes(layers)
        torch.manual_seed(rank)
        mine = (
            self.stages[rank] if self.sends else {k: s for p in self.stages for k, s in p.items()}
        )
        self.tensors: Tensors = {name: torch.randn(shape) for name, shape in mine.items()}
        self.receivers = dist.new_group([0, *range(TRAINING, TRAINING + INSTANCES)])
        self.outbox = Outbox()
        self.server = PeerServer(PayloadStore(self.outbox.answer).answer, KEYS)
        self.client = PeerClient(60.0, KEYS)

    def update(self) -> None:
        """As an optimizer's step would: all weights are others."""
        if self.sends:
            for tensor in self.tensors.values():
                tensor.add_(1.0)

    def pulled(self) -> None:
        """What `rlhfuse.weight_sync` does."""
        digests = self.outbox.offer("actor", 0, self.tensors) if self.sends else {}
        offers: list[tuple[str, dict[str, str]]] = [("", {})] * dist.get_world_size()
        dist.all_gather_object(offers, (self.server.endpoint, digests))
        if not self.sends:
            plan = make_plan([RankTensors(*offer) for offer in offers[:TRAINING]])
            inbox = Inbox(self.client, "actor", 0)
            for name, tensor in inbox.tensors([TensorSource(*source) for source in plan.sources]):
                self.tensors[name].copy_(tensor)
            assert inbox.digest() == plan.digest

    def gathered(self) -> None:
        """The whole model on rank 0, then as one to all; nothing is checked."""
        order = [(name, shape) for stage in self.stages for name, shape in stage.items()]
        if self.rank == 1:
            for tensor in self.tensors.values():
                dist.send(tensor, 0)
            return
        whole = torch.empty(sum(math.prod(shape) for _, shape in order))
        first = 0
        for name, shape in order:
            part = whole[first : first + math.prod(shape)].view(shape)
            first += part.numel()
            if self.rank == 0 and name in self.tensors:
                part.copy_(self.tensors[name])
            elif self.rank == 0:
                dist.recv(part, 1)
        dist.broadcast(whole, 0, group=self.receivers)
        if not self.sends:
            first = 0
            for name, shape in order:
                size = math.prod(shape)
                self.tensors[name].copy_(whole[first : first + size].view(shape))
                first += size

    def time(self, way: Callable[[], None]) -> tuple[float, int, dict[str, str]]:
        """Seconds until all have done it, bytes beyond what was there, and what is here then."""
        self.update()
        peak = Peak()
        dist.barrier()
        start_s = time.perf_counter()
        way()
        extra = peak.extra
        dist.barrier()
        seconds = time.perf_counter() - start_s
        return seconds, extra, {name: tensor_digest(t) for name, t in self.tensors.items()}


def measure(layers: int, repetitions: int) -> list[Row]:
    def body(number: int) -> dict[str, list[tuple[float, int, str]]]:
        rank = Rank(number, layers)
        found: dict[str, list[tuple[float, int, str]]] = {"pulled": [], "gathered": []}
        for _ in range(repetitions + 1):  # the first is not counted
            for name, way in (("pulled", rank.pulled), ("gathered", rank.gathered)):
                seconds, extra, digests = rank.time(way)
                senders: list[dict[str, str]] = [{}] * dist.get_world_size()
                dist.all_gather_object(senders, digests)
                sent = {k: v for part in senders[:TRAINING] for k, v in part.items()}
                assert all(part == sent for part in senders[TRAINING:]), "not what was sent"
                found[name].append((seconds, extra, combined_digest(sent)))
        rank.server.close()
        rank.client.close()
        return {name: values[1:] for name, values in found.items()}

    ranks = run_ranks(TRAINING + INSTANCES, body)
    size = sum(4 * math.prod(shape) for stage in shapes(layers) for shape in stage.values())
    rows: list[Row] = []
    for name in ("pulled", "gathered"):
        seconds = spread([max(r[name][i][0] for r in ranks) for i in range(repetitions)])
        extra = [max(extra for _, extra, _ in r[name]) / MIB for r in ranks]
        rows.append(
            {
                "way": {"pulled": "pulled by plan", "gathered": "gather and broadcast"}[name],
                "model_mib": size / MIB,
                "seconds": seconds[0],
                "least": seconds[1],
                "most": seconds[2],
                "extra_mib_training": max(extra[:TRAINING]),
                "extra_mib_instance": max(extra[TRAINING:]),
                "repetitions": repetitions,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repetitions", type=int, default=5)
    asked = parser.parse_args()
    rows = measure(asked.layers, asked.repetitions)
    print_table(rows)
    write_result("weights", rows)


if __name__ == "__main__":
    main()
