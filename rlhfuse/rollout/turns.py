"""Whose turn it is on a device: its rollout worker's, or its training worker's."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable

from rlhfuse import messages as m


class Turns:
    """Commands for devices, in order. A group is trained when the device's rollout worker has done
    what it was told before, and that worker gets its next command when all groups are trained."""

    def __init__(self, send: Callable[[int, m.Command], None]) -> None:
        """`send`: to the worker of a device whose command it is."""
        self._send = send
        self._kept: defaultdict[int, deque[m.Command]] = defaultdict(deque)
        self._rollout: Counter[int] = Counter()  # answers that are to come, by device
        self._training: Counter[int] = Counter()

    def tell(self, device: int, command: m.Command) -> None:
        """Now, or when it is the worker's turn."""
        self._kept[device].append(command)
        self._advance(device)

    def answered(self, device: int) -> None:
        """The rollout worker has scored, or sleeps; perhaps as it was told in a step before."""
        self._rollout[device] = max(0, self._rollout[device] - 1)
        self._advance(device)

    def trained(self, device: int) -> None:
        """The training worker has answered for a group."""
        self._training[device] -= 1
        self._advance(device)

    def lose(self, device: int) -> None:
        """The rollout worker is gone; what it was told goes nowhere. Training goes on."""
        self._rollout[device] = 0
        kept = self._kept[device]
        self._kept[device] = deque(c for c in kept if isinstance(c, m.TrainGroup))
        self._advance(device)

    def _advance(self, device: int) -> None:
        kept = self._kept[device]
        while kept:
            trains = isinstance(kept[0], m.TrainGroup)
            if (self._rollout if trains else self._training)[device] > 0:
                return
            command = kept.popleft()
            if trains:
                self._training[device] += 1
            elif isinstance(command, m.Score | m.Sleep):
                self._rollout[device] += 1
            self._send(device, command)
