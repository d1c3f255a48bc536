"""Ranks of a benchmark: forked processes of one thread that meet over gloo."""

import multiprocessing
import os
import tempfile
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
        results = [end.recv() for end, _ in ends]
        for process in processes:
            process.join()
    return results
