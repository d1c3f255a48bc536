"""Messages through shared memory: what was sent comes, in order, and only so many are ahead."""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlhfuse.training.channels import all_channels
from rlhfuse.training.form import Form
from rlhfuse.training.links import Channel, Message, PeerLost
from rlhfuse.training.local_link import PLACES, TOLD, LocalLinks, on_one_machine
from tests.training.ranks import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SCHEDULES = ((1, 3), (2000, 16, 1), (5000, 2, 7))  # rows of messages; the memory grows twice
WAYS = all_channels({"actor": (0, 1), "critic": (1, 0)})
WAY = WAYS[0]
SMALL = Form((4,), torch.float32)


def links(rank: int, timeout_s: float = 10.0) -> LocalLinks:
    assert on_one_machine()
    return LocalLinks(rank, WAYS, timedelta(seconds=timeout_s))


def announced(way: Channel, forms: Sequence[Form]) -> list[tuple[Message, Form]]:
    return [(Message(way, 0, number), form) for number, form in enumerate(forms)]


def senders(
    link: LocalLinks, way: Channel, forms: Sequence[Form]
) -> Iterator[Callable[[torch.Tensor], None]]:
    return iter(link.source(way).senders(announced(way, forms)).values())


def receivers(
    link: LocalLinks, way: Channel, forms: Sequence[Form]
) -> Iterator[Callable[[], torch.Tensor]]:
    return iter(link.target(way).receivers(announced(way, forms)).values())


class Numbers:
    """One end of the first channel, whose messages carry their numbers."""

    def __init__(self, link: LocalLinks, rank: int, most: int = 20) -> None:
        self.sends = rank == WAY.source
        forms = [SMALL] * most
        self._senders = [*senders(link, WAY, forms)] if self.sends else []
        self._receivers = [] if self.sends else [*receivers(link, WAY, forms)]
        self.came: list[int] = []

    def move(self, count: int) -> None:
        for _ in range(count):
            number = len(self.came)
            if self.sends:
                self._senders[number](torch.full((4,), float(number)))
            else:
                number = int(self._receivers[number]()[0])
            self.came.append(number)


def content(form: Form, number: int) -> torch.Tensor:
    assert form.shape is not None
    generator = torch.Generator().manual_seed(number)
    return torch.randn(form.shape, generator=generator).to(form.dtype)


def test_every_message_comes_as_it_was_sent_and_in_order() -> None:
    """Schedule after schedule, of messages of all sizes and types."""

    def run(rank: int) -> bool:
        link, equal = links(rank), []
        for rows in SCHEDULES:
            forms = [Form((r, 33), dtype) for r in rows for dtype in DTYPES]
            mine = {way: senders(link, way, forms) for way in WAYS if way.source == rank}
            others = {way: receivers(link, way, forms) for way in WAYS if way.target == rank}
            for ahead in range(len(forms) + 1):  # one message ahead
                for way, give in mine.items() if ahead < len(forms) else ():
                    tensor = content(forms[ahead], 100 * ahead + WAYS.index(way))
                    next(give)(tensor)
                    tensor.zero_()  # it has been copied
                for way, take in others.items() if ahead else ():
                    expected = content(forms[ahead - 1], 100 * (ahead - 1) + WAYS.index(way))
                    equal.append(torch.equal(next(take)(), expected))
        link.close()
        return len(equal) == 2 * len(DTYPES) * sum(map(len, SCHEDULES)) and all(equal)

    assert all(run_ranks(2, run))


def mapped_bytes() -> list[int]:
    """Of each piece of memory that this process shares with another."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = (line.split()[0].split("-") for line in lines if "memfd:rlhfuse" in line)
    return [int(end, 16) - int(start, 16) for start, end in places]


def test_places_are_used_again_however_many_messages_and_schedules_come() -> None:
    form = Form((3, 1024), torch.float32)  # three pages

    def run(rank: int) -> list[list[int]]:
        link, found = links(rank), []
        for _ in range(3):
            give, take = (
                senders(link, WAYS[rank], [form] * 25),
                receivers(link, next(w for w in WAYS if w.target == rank), [form] * 25),
            )
            for _ in range(25):
                next(give)(torch.zeros(3, 1024))
                next(take)()
            found.append(mapped_bytes())
        return found

    for found in run_ranks(2, run):
        assert found == [[PLACES * 3 * 4096] * 2] * 3


def test_a_strided_tensor_is_sent_as_it_reads_another_shape_or_type_is_refused() -> None:
    def run(rank: int) -> bool:
        link, forms = links(rank), [Form((3, 5), torch.float32)] * 2
        tensor = torch.arange(15.0).view(5, 3)
        if rank == WAY.source:
            first, second = senders(link, WAY, forms)
            first(tensor.t())
            with pytest.raises(ValueError, match=r"has shape \(5, 3\), announced was \(3, 5\)"):
                second(tensor)
            with pytest.raises(ValueError, match=r"is of torch.float64, announced was .*float32"):
                second(tensor.t().double())
            return True
        return torch.equal(next(receivers(link, WAY, forms))(), tensor.t())

    assert all(run_ranks(2, run))


def test_one_more_message_waits_until_the_target_has_told_of_what_it_took() -> None:
    def run(rank: int) -> bool:
        link = links(rank, timeout_s=0.3)
        end = Numbers(link, rank)

        def expect_no_room() -> None:
            if end.sends:
                with pytest.raises(PeerLost, match="nothing came within the time limit"):
                    end.move(1)
            dist.barrier()

        if end.sends:
            end.move(PLACES)
        dist.barrier()
        expect_no_room()
        if not end.sends:
            end.move(TOLD - 1)
        dist.barrier()
        expect_no_room()  # nobody was told yet
        if not end.sends:
            end.move(1)
        dist.barrier()
        if end.sends:  # what could not be sent left no trace
            end.move(TOLD)
        dist.barrier()
        expect_no_room()
        if not end.sends:
            end.move(PLACES)
        return end.came == list(range(PLACES + TOLD))

    assert all(run_ranks(2, run))


@pytest.mark.parametrize("leaver", [0, 1])
def test_who_waits_for_a_process_that_leaves_hears_of_it_at_once(leaver: int) -> None:
    def run(rank: int) -> float:
        link = links(rank)
        if rank == leaver:
            time.sleep(0.2)
            link.close()
            return 0.0
        start = time.monotonic()
        with pytest.raises(PeerLost, match="the other end is gone"):
            Numbers(link, rank).move(PLACES + 1)
        return time.monotonic() - start

    assert max(run_ranks(2, run)) < 5.0


def test_what_was_sent_comes_though_the_sender_left_without_reading_all() -> None:
    def run(rank: int) -> bool:
        link = links(rank)
        end = Numbers(link, rank)
        if end.sends:
            end.move(PLACES)
            dist.barrier()  # the first two were told taken, which nobody here asks for
            link.close()
            dist.barrier()
            return True
        end.move(TOLD)
        dist.barrier()
        dist.barrier()
        end.move(PLACES - TOLD)
        with pytest.raises(PeerLost, match="the other end is gone"):
            end.move(1)
        return end.came == list(range(PLACES))

    assert all(run_ranks(2, run))


def test_a_target_that_waits_for_memory_says_so() -> None:
    def run(rank: int) -> bool:
        link = links(rank, timeout_s=0.2)
        if rank == WAY.target:
            with pytest.raises(PeerLost, match=r"memory of .*: nothing came within the time limit"):
                Numbers(link, rank)
        dist.barrier()
        return True

    assert all(run_ranks(2, run))
