"""Messages through shared memory: what was sent comes, in order, and only so many are ahead."""

import itertools
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from rlhfuse.training.channels import all_channels
from rlhfuse.training.local_link import PLACES, TOLD, LocalLinks, on_one_machine
from tests.training.ranks import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ROWS = (1, 3, 2000, 16, 1, 5000)  # the memory grows twice
FORMS = list(itertools.product(ROWS, DTYPES))
WAYS = all_channels({"actor": (0, 1), "critic": (1, 0)})


def links(rank: int, timeout_s: float = 10.0) -> LocalLinks:
    assert on_one_machine()
    return LocalLinks(rank, WAYS, timedelta(seconds=timeout_s))


def message(number: int, channel: int) -> torch.Tensor:
    rows, dtype = FORMS[number]
    generator = torch.Generator().manual_seed(10 * number + channel)
    return torch.randn(rows, 33, generator=generator).to(dtype)


def test_every_message_comes_as_it_was_sent_and_in_order() -> None:
    def run(rank: int) -> int:
        link, came = links(rank), 0
        mine = [(i, way) for i, way in enumerate(WAYS) if way.source == rank]
        others = [(i, way) for i, way in enumerate(WAYS) if way.target == rank]
        for i, way in mine:
            link.source(way).put(message(0, i))
        for number in range(len(FORMS)):
            for i, way in mine if number + 1 < len(FORMS) else ():  # one message ahead
                given = message(number + 1, i)
                link.source(way).put(given)
                given.zero_()  # it has been copied
            for i, way in others:
                buffer = torch.empty_like(message(number, i))
                link.target(way).take(buffer)
                came += torch.equal(buffer, message(number, i))
                link.target(way).tell()
        link.close()
        return came

    assert run_ranks(2, run) == [2 * len(FORMS)] * 2


@pytest.mark.parametrize("tells", [False, True])
def test_the_next_message_waits_until_two_were_taken(tells: bool) -> None:
    """Told when asked to, or before it waits for a third."""

    def run(rank: int) -> bool:
        link, (way, *_) = links(rank, timeout_s=0.3), WAYS
        if rank == way.source:
            for number in range(PLACES):
                link.source(way).put(torch.full((4,), float(number)))
            dist.barrier()
            with pytest.raises(RuntimeError, match="nothing came within the time limit"):
                link.source(way).put(torch.full((4,), float(PLACES)))
            dist.barrier()
            dist.barrier()
            for number in range(PLACES, PLACES + TOLD):
                link.source(way).put(torch.full((4,), float(number)))
            with pytest.raises(RuntimeError, match="nothing came within the time limit"):
                link.source(way).put(torch.full((4,), -1.0))
            dist.barrier()
            return True
        dist.barrier()
        buffer, came = torch.empty(4), []
        for _ in range(TOLD):
            link.target(way).take(buffer)
            came.append(int(buffer[0]))
        dist.barrier()
        if tells:
            link.target(way).tell()
        else:
            link.target(way).take(buffer)
            came.append(int(buffer[0]))
        dist.barrier()
        dist.barrier()
        while len(came) < PLACES + TOLD:
            link.target(way).take(buffer)
            came.append(int(buffer[0]))
        return came == list(range(PLACES + TOLD))

    assert all(run_ranks(2, run))


@pytest.mark.parametrize("leaver", [0, 1])
def test_who_waits_for_a_process_that_leaves_hears_of_it_at_once(leaver: int) -> None:
    def run(rank: int) -> float:
        link, (way, *_) = links(rank), WAYS
        if rank == leaver:
            time.sleep(0.2)
            link.close()
            return 0.0
        start = time.monotonic()
        act = link.source(way).put if rank == way.source else link.target(way).take

        def until_full() -> None:
            for _ in range(PLACES + 1):
                act(torch.ones(4))

        with pytest.raises(RuntimeError, match="the other end is gone"):
            until_full()
        return time.monotonic() - start

    assert max(run_ranks(2, run)) < 5.0


def test_what_was_sent_comes_though_the_sender_left_without_reading_all() -> None:
    def run(rank: int) -> bool:
        link, (way, *_) = links(rank), WAYS
        if rank == way.source:
            for number in range(PLACES):
                link.source(way).put(torch.full((4,), float(number)))
            dist.barrier()  # the first two were told taken, which nobody here asks for
            link.close()
            dist.barrier()
            return True
        came = [torch.empty(4) for _ in range(PLACES)]
        for buffer in came[:TOLD]:
            link.target(way).take(buffer)
        link.target(way).tell()
        dist.barrier()
        dist.barrier()
        for buffer in came[TOLD:]:
            link.target(way).take(buffer)
        with pytest.raises(RuntimeError, match="the other end is gone"):
            link.target(way).take(torch.empty(4))
        return [int(buffer[0]) for buffer in came] == list(range(PLACES))

    assert all(run_ranks(2, run))
