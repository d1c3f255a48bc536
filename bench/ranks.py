"""Ranks of a benchmark: forked processes of one thread that meet over gloo."""

import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


def run_ranks(world_size: int, function: Callable[[int], Result]) -> list[Result]:
    """`function(rank)` in every rank, each on a core of its own where there are enough."""
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(world_size)]
    with tempfile.TemporaryDirectory() as folder:

        def child(rank: int) -> None:
            torch.set_num_threads(1)
            cores = sorted(os.sched_getaffinity(0))
            if world_size <= len(cores):
                os.sched_setaffinity(0, {cores[rank]})
            gc.freeze()  # as workers do: what was imported stays
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/meeting",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=120),
            )
            ends[rank][1].send(function(rank))
            dist.barrier()
            os._exit(0)

        processes = [context.Process(target=child, args=(rank,)) for rank in range(world_size)]
        for process in processes:
            process.start()
        for _, writing in ends:
            writing.close()  # or a rank that dies would be waited for
        try:
            return [end.recv() for end, _ in ends]
        except EOFError as error:
            raise SystemExit("a rank failed: see its traceback above") from error
        finally:
            for process in processes:
                process.join(5.0)
                process.kill()


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Turns:
    """Rounds of measurement for as long as they fit into a time that all ranks agree on."""

    def __init__(self, most: int, limit_s: float) -> None:
        """At least two rounds and at most `most`; none is begun that would probably end after
        `limit_s` seconds."""
        self._most, self._limit_s = most, limit_s
        self._start_s = time.monotonic()
        self.done = 0

    def another(self, rank: int) -> bool:
        """Whether to begin another round. Collective: rank 0 decides."""
        spent_s = time.monotonic() - self._start_s
        fits = self.done < 2 or spent_s * (self.done + 1) / self.done <= self._limit_s
        verdict = torch.tensor([float(self.done < self._most and fits)])
        dist.broadcast(verdict, 0)
        self.done += 1
        if rank == 0 and verdict:
            say(f"  round {self.done} of {self._most} at most, {spent_s:.0f} s")
        return bool(verdict)
