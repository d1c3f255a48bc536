"""Messages through shared memory: what was sent comes, in order, and no more than two are ahead."""

import itertools
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from rlhfuse.training.channels import all_channels
from rlhfuse.training.local_link import PLACES, LocalLinks, on_one_machine
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
        open_sends = [link.send(way, message(0, i)) for i, way in mine]
        for number in range(len(FORMS)):
            more = []
            for i, way in mine if number + 1 < len(FORMS) else ():  # one message ahead
                given = message(number + 1, i)
                more.append(link.send(way, given))
                given.zero_()  # it has been copied
            for i, way in others:
                buffer = torch.empty_like(message(number, i))
                link.receive(way, buffer).wait()
                came += torch.equal(buffer, message(number, i))
            for pending in open_sends:
                pending.wait()
            open_sends = more
        link.close()
        return came

    assert run_ranks(2, run) == [2 * len(FORMS)] * 2


def test_a_third_message_waits_until_the_first_is_taken() -> None:
    def run(rank: int) -> bool:
        link, (way, *_) = links(rank, timeout_s=0.3), WAYS
        if rank == way.source:
            first, *_ = [link.send(way, torch.ones(4)) for _ in range(PLACES)]
            with pytest.raises(RuntimeError, match="nothing came within the time limit"):
                first.wait()
            dist.barrier()
            first.wait()
        else:
            dist.barrier()
            link.receive(way, torch.empty(4)).wait()
        dist.barrier()
        return True

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
        sends = rank == way.source
        pending = link.send(way, torch.ones(4)) if sends else link.receive(way, torch.empty(4))
        with pytest.raises(RuntimeError, match="the other end is gone"):
            pending.wait()
        return time.monotonic() - start

    assert max(run_ranks(2, run)) < 5.0
