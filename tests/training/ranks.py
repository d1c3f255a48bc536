"""Runs a function on several gloo ranks, each a forked process with one thread."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

Result = TypeVar("Result")


def stay_until_the_other_ended(rank: int, other: int, limit_s: float = 15.0) -> None:
    """Of two ranks that each call it at its end: so that no end of a process ends anything."""
    store = _get_default_store()
    store.set(f"ended/{rank}", "")
    store.wait([f"ended/{other}"], timedelta(seconds=limit_s))


def run_ranks(
    world_size: int,
    function: Callable[[int], Result],
    *,
    timeout_s: float = 20.0,
    limit_s: float = 90.0,
) -> list[Result]:
    """`function(rank)` of every rank, in rank order; what it returns must be picklable.

    Raises RuntimeError with the tracebacks of the ranks that failed.
    """
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(world_size)]
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"

        def child(rank: int) -> None:
            torch.set_num_threads(1)
            answer: tuple[bool, object]
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{meeting}",
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=timeout_s),
                )
                answer = (True, function(rank))
            except BaseException:
                answer = (False, traceback.format_exc())
            ends[rank][1].send_bytes(pickle.dumps(answer))  # by value, tensors too
            os._exit(0)  # no teardown of what the parent had imported

        processes = [context.Process(target=child, args=(rank,)) for rank in range(world_size)]
        for process in processes:
            process.start()
        for _, writing in ends:
            writing.close()
        deadline = time.monotonic() + limit_s
        answers: list[tuple[bool, Any]] = []
        for rank, process in enumerate(processes):
            try:
                in_time = ends[rank][0].poll(max(0.0, deadline - time.monotonic()))
                answers.append(
                    pickle.loads(ends[rank][0].recv_bytes())
                    if in_time
                    else (False, "no answer in time")
                )
            except EOFError:
                answers.append((False, "died"))
            process.join(2.0)
            process.kill()
    errors = [f"rank {rank}: {what}" for rank, (fine, what) in enumerate(answers) if not fine]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [what for _, what in answers]
