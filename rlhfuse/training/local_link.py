"""Messages between processes of one machine: a copy in shared memory, and a word through a socket.

A receiver sleeps in its socket, and one word wakes it. gloo's way (TCP, a thread in every process
that wakes up a hundred times a second) takes more processor time and longer between tasks
(`bench/bench_fidelity.py`). Whoever runs here has just slept, and every line of code that it needs
is cold: so there is little of it.

Every channel has four places in memory that its source makes and its target maps. The target says
in twos what it has taken, and at the latest after its task (`tell`): two messages may be under
way beside two that were taken untold, and one more waits. That is no earlier than by the rule that
`rlhfuse.schedules.timing.check_channels` proves schedules by.

The sockets are of Linux' abstract kind: they leave no file behind, and processes of other users are
turned away. When one end leaves or dies, the other one hears of it at once.
"""

import contextlib
import ctypes
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rlhfuse.training.links import Channel

PLACES = 4
"""Messages of a channel that were given and not yet told taken."""
TOLD = 2
"""So many taken messages are told of in one word."""
_PAGE = mmap.PAGESIZE
_WORD = struct.Struct("<qq")  # where in the memory, and how many bytes
_HELLO = struct.Struct("<q")  # which channel
_TAKEN = bytes([TOLD])
_NEW_MEMORY = b"m"  # comes twice, the second time with the memory's descriptor
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class LocalLinks:
    """The channels between this process and others of its machine, each first in, first out.

    Everything raises RuntimeError where the other end is gone, or silent for longer than the time
    limit.
    """

    def __init__(self, rank: int, channels: Sequence[Channel], timeout: timedelta) -> None:
        """Collective over the default process group. `channels`: of all ranks, in one order."""
        self._sources: dict[Channel, Source] = {}
        self._targets: dict[Channel, Target] = {}
        with _socket() as door:
            name = f"\0rlhfuse-{secrets.token_hex(16)}"
            door.bind(name)
            door.listen(len(channels) + 1)
            door.settimeout(timeout.total_seconds())
            names = [""] * dist.get_world_size()
            dist.all_gather_object(names, name)
            for number, way in enumerate(channels):
                if way.source == rank:
                    end = _socket()
                    end.connect(names[way.target])
                    end.send(_HELLO.pack(number))
                    self._sources[way] = Source(_limited(end, timeout))
            expected = sum(way.target == rank for way in channels)
            while len(self._targets) < expected:
                end, _ = door.accept()
                if _user(end) != os.getuid():
                    end.close()
                    continue
                (number,) = _HELLO.unpack(_limited(end, timeout).recv(_HELLO.size))
                self._targets[channels[number]] = Target(end)

    def source(self, way: Channel) -> "Source":
        """This process's end of a channel that leaves it."""
        return self._sources[way]

    def target(self, way: Channel) -> "Target":
        """This process's end of a channel that comes here."""
        return self._targets[way]

    def close(self) -> None:
        """Leave: whoever waits for this process fails at once."""
        while self._sources:
            self._sources.popitem()[1].close()
        while self._targets:
            self._targets.popitem()[1].close()


def on_one_machine() -> bool:
    """Whether all ranks can reach each other through `LocalLinks`. Collective over the default
    process group."""
    here = ""
    if hasattr(os, "memfd_create"):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        here = f"{boot} {Path('/proc/self/ns/net').readlink()} {os.getuid()}"
    places = [""] * dist.get_world_size()
    dist.all_gather_object(places, here)
    return bool(here) and len(set(places)) == 1


class _Memory:
    """Shared memory, mapped here. A copy in or out is one call."""

    def __init__(self, descriptor: int) -> None:
        """Takes over `descriptor`."""
        try:
            self._map = mmap.mmap(descriptor, 0)  # lives as long as this object
        finally:
            os.close(descriptor)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.each = len(self._map) // PLACES

    def write(self, offset: int, tensor: torch.Tensor, size: int) -> None:
        ctypes.memmove(self._address + offset, tensor.data_ptr(), size)

    def read(self, offset: int, tensor: torch.Tensor, size: int) -> None:
        ctypes.memmove(tensor.data_ptr(), self._address + offset, size)


class Source:
    """The sending end of a channel; it owns the memory."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._memory: _Memory | None = None
        self._given = 0
        self._taken = 0

    def put(self, tensor: torch.Tensor) -> None:
        """Send a contiguous tensor: it is copied at once, when a place is free."""
        while self._given - self._taken >= PLACES:
            self._taken += _hear(self._end)[0]
        size = tensor.nbytes
        try:
            memory = self._memory
            if memory is None or memory.each < size:
                memory = self._memory = self._share(size)
            offset = self._given % PLACES * memory.each
            memory.write(offset, tensor, size)
            self._end.send(_WORD.pack(offset, size))
        except OSError as error:
            raise RuntimeError(f"the other end is gone: {error}") from error
        self._given += 1

    def _share(self, size: int) -> _Memory:
        """New memory with room for messages of `size` bytes; what is under way stays in the old
        one, which lives until its last reader lets go."""
        each = -(-size // _PAGE) * _PAGE
        descriptor = os.memfd_create("rlhfuse", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, PLACES * each)
            self._end.send(_NEW_MEMORY)
            socket.send_fds(self._end, [_NEW_MEMORY], [descriptor])
        except OSError:
            os.close(descriptor)
            raise
        return _Memory(descriptor)

    def close(self) -> None:
        self._end.close()


class Target:
    """The receiving end of a channel."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._memory: _Memory | None = None
        self._untold = 0

    def take(self, buffer: torch.Tensor) -> None:
        """Fill a contiguous buffer, of the next message's form, when that is here. What was taken
        is told of by `tell`, and at the latest when a third message is asked for."""
        if self._untold:
            self.tell()
        word = _hear(self._end)
        if word == _NEW_MEMORY:
            _, (descriptor,), _, _ = socket.recv_fds(self._end, len(_NEW_MEMORY), 1)
            self._memory = _Memory(descriptor)
            word = _hear(self._end)
        offset, size = _WORD.unpack(word)
        assert self._memory is not None, "a message before its memory"
        assert buffer.nbytes == size, f"{size} bytes came, {buffer.nbytes} were expected"
        self._memory.read(offset, buffer, size)
        self._untold += 1

    def tell(self) -> None:
        """Say that places are free again. To be called before a rank waits for anything but a
        message, at best when nobody waits for it."""
        if self._untold < TOLD:
            return
        self._untold -= TOLD
        with contextlib.suppress(OSError):  # a source that is gone waits for no word
            self._end.send(_TAKEN)

    def close(self) -> None:
        self._end.close()


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _limited(end: socket.socket, timeout: timedelta) -> socket.socket:
    """The kernel's own limit: Python's would ask it twice for each word."""
    seconds = timeout.total_seconds()
    limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
    end.setblocking(True)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    return end


def _user(end: socket.socket) -> int:
    """Who is at the other end."""
    found = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(found)[1]
    return uid


def _hear(end: socket.socket) -> bytes:
    """The next word of the other end."""
    try:
        try:
            word = end.recv(_WORD.size)
        except ConnectionResetError:  # it left and did not read all: what it sent is still here
            word = end.recv(_WORD.size)
    except BlockingIOError as error:
        raise RuntimeError("nothing came within the time limit") from error
    except OSError as error:
        raise RuntimeError(f"the other end is gone: {error}") from error
    if not word:
        raise RuntimeError("the other end is gone")
    return word
