"""A rank's state at one moment, as something that can be written later, beside training."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

Part = Callable[[Path], None]
"""Writes files into the folder of a checkpoint. Raises OSError, such as for a full disk."""

Keep = Callable[[torch.Tensor], torch.Tensor]
"""What to write for a tensor: the tensor, or a copy of what it is now."""


def shared(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself: to be written before it changes."""
    return tensor.detach()


class HostCopies:
    """Copies in host memory, one of each tensor however often it is asked for."""

    def __init__(self) -> None:
        # The originals too: an address means nothing once its tensor is gone.
        self._copies: dict[tuple[int, torch.Size], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.data_ptr(), tensor.shape)
        if key not in self._copies:
            self._copies[key] = (tensor, tensor.detach().to("cpu", copy=True))
        return self._copies[key][1]


class Snapshot:
    """The parts of one rank."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        for part in self._parts:
            part(folder)


class AsideWriter:
    """Writes snapshots on a thread of its own, one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error = ""
        self._seconds = 0.0

    @property
    def busy(self) -> bool:
        """A snapshot was given, and its end has not been taken yet."""
        return self._thread is not None

    def start(self, snapshot: Snapshot, folder: Path) -> None:
        """Begin to write."""
        assert not self.busy, "the snapshot before is still to be written"
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, folder), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until it is written, or cannot be."""
        if self._thread is not None:
            self._thread.join()

    def take(self) -> tuple[str, float] | None:
        """Once it is written, or cannot be: the error, empty if there is none, and the seconds
        that it took. None before."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        return self._error, self._seconds

    def _run(self, snapshot: Snapshot, folder: Path) -> None:
        start_s = time.monotonic()
        self._error = ""
        try:
            snapshot.write(folder)
        except Exception as error:
            logger.exception("writing a checkpoint")
            self._error = str(error) or type(error).__name__
        self._seconds = time.monotonic() - start_s
