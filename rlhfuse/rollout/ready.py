"""Which blocks of workers can take scoring calls, by how many they have and what they hold."""

from collections.abc import Iterable, Sequence
from typing import Protocol


class _Worker(Protocol):
    @property
    def free(self) -> bool: ...
    @property
    def last_role(self) -> str: ...
    @property
    def calls(self) -> Sequence[object]: ...


class Ready:
    """Blocks whose workers are all free, found without looking at the others. A block goes by its
    first worker, which gets its calls. `note` after every change of a worker."""

    def __init__(self, workers: Sequence[_Worker], block: int, score_ahead: int) -> None:
        self._workers, self._block = workers, block
        # Free blocks by the calls they have, then by the role loaded; insertion order.
        self._by_calls: list[dict[str, dict[int, None]]] = [{} for _ in range(score_ahead)]
        self.place: dict[int, tuple[int, str]] = {}  # blocks that can take a call; see `note`
        self._was_free = [False] * len(workers)
        self._num_free = [0] * -(-len(workers) // block)
        self._loaded: dict[str, int] = {}  # role -> free blocks that hold it
        self._holds: dict[int, str] = {}
        for instance in range(len(workers)):
            self.note(instance)

    def note(self, instance: int) -> None:
        """File the worker's block by what it can take."""
        workers, number = self._workers, instance // self._block
        free = workers[instance].free
        if free != self._was_free[instance]:
            self._was_free[instance] = free
            self._num_free[number] += 1 if free else -1
        elif not free:
            return
        first = number * self._block
        size = min(self._block, len(workers) - first)
        whole = self._num_free[number] == size
        leader = workers[first]
        held = self._holds.get(first)
        if held is not None and (not whole or held != leader.last_role):
            self._loaded[held] -= 1
            del self._holds[first]
        if whole and first not in self._holds:
            self._holds[first] = leader.last_role
            self._loaded[leader.last_role] = self._loaded.get(leader.last_role, 0) + 1
        calls = len(leader.calls)
        place = (calls, leader.last_role) if whole and calls < len(self._by_calls) else None
        before = self.place.get(first)
        if place != before:
            if before is not None:
                del self._by_calls[before[0]][before[1]][first]
                del self.place[first]
            if place is not None:
                self._by_calls[place[0]].setdefault(place[1], {})[first] = None
                self.place[first] = place

    def num_holding(self, role: str) -> int:
        """Free blocks that have the role's model loaded, busy or not."""
        return self._loaded.get(role, 0)

    def holder(self, role: str, calls: int) -> int | None:
        """A block with so many calls that has `role` loaded."""
        return next(iter(self._by_calls[calls].get(role, ())), None)

    def any(self, calls: int, not_holding: Iterable[str] = ()) -> int | None:
        """A block with so many calls; if possible one that holds none of these roles."""
        found = None
        spared = set(not_holding)
        for role, blocks in self._by_calls[calls].items():
            first = next(iter(blocks), None)
            if first is not None and role not in spared:
                return first
            found = first if found is None else found
        return found

    def validate(self) -> None:
        """Assert that the files agree with the workers."""
        for first in range(0, len(self._workers), self._block):
            members = self._workers[first : first + self._block]
            whole = all(w.free for w in members)
            calls = len(members[0].calls)
            ready = whole and calls < len(self._by_calls)
            assert (first in self.place) == ready, f"worker {first}: {ready=}"
            assert not ready or self.place[first] == (calls, members[0].last_role)
            assert (first in self._holds) == whole
            assert not whole or self._holds[first] == members[0].last_role
        for role, count in self._loaded.items():
            assert count == sum(held == role for held in self._holds.values())
