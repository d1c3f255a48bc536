"""Messages between processes of one machine: a copy in shared memory, and a word through a socket.

A receiver sleeps in its socket, and one word wakes it. gloo's way (TCP, a thread in every process
that wakes up a hundred times a second) takes more processor time and about twice as long between
tasks (`bench/bench_fidelity.py`).

Every channel has two places in memory that its source makes and its target maps, so at most two
messages are under way, and a third one waits until the first was taken: no earlier than by the rule
that `rlhfuse.schedules.timing.check_channels` proves schedules by.

The sockets are of Linux' abstract kind: they leave no file behind, and processes of other users are
turned away. When one end leaves or dies, the other one hears of it at once.
"""

import contextlib
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

from rlhfuse.training.carrier import Pending
from rlhfuse.training.links import Channel

PLACES = 2
"""Messages of a channel that may be under way."""
_PAGE = mmap.PAGESIZE
_WORD = struct.Struct("<qq")  # where in the memory, and how many bytes
_HELLO = struct.Struct("<q")  # which channel
_TAKEN = b"t"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class LocalLinks:
    """The channels between this process and others of its machine. See `Carrier`."""

    def __init__(self, rank: int, channels: Sequence[Channel], timeout: timedelta) -> None:
        """Collective over the default process group. `channels`: of all ranks, in one order."""
        self._sources: dict[Channel, _Source] = {}
        self._targets: dict[Channel, _Target] = {}
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
                    self._sources[way] = _Source(_limited(end, timeout))
            expected = sum(way.target == rank for way in channels)
            while len(self._targets) < expected:
                end, _ = door.accept()
                if _user(end) != os.getuid():
                    end.close()
                    continue
                (number,) = _HELLO.unpack(_limited(end, timeout).recv(_HELLO.size))
                self._targets[channels[number]] = _Target(end)

    @property
    def open_sends(self) -> int:
        """See `Carrier`."""
        return PLACES - 1

    def send(self, way: Channel, tensor: torch.Tensor) -> Pending:
        """`tensor` is copied at once."""
        return self._sources[way].put(tensor)

    def receive(self, way: Channel, buffer: torch.Tensor) -> Pending:
        """`buffer` is filled when the result is waited for."""
        return _Coming(self._targets[way], buffer)

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


class _Source:
    """The sending end of a channel; it owns the memory."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._given = 0
        self._taken = 0

    def put(self, tensor: torch.Tensor) -> Pending:
        assert self._given - self._taken < PLACES, "both places are taken"
        flat = tensor.reshape(-1).view(torch.uint8)
        size = flat.numel()
        shared = [self._grow(size)] if size * PLACES > self._memory.numel() else []
        offset = self._given % PLACES * (self._memory.numel() // PLACES)
        self._memory[offset : offset + size].copy_(flat)
        word = _WORD.pack(offset, size)
        try:
            if shared:
                socket.send_fds(self._end, [word], shared)
            else:
                self._end.send(word)
        except OSError as error:
            raise RuntimeError(f"the other end is gone: {error}") from error
        finally:
            for descriptor in shared:
                os.close(descriptor)
        self._given += 1
        return _Sent(self, self._given)

    def wait(self, number: int) -> None:
        """Until so many messages have been taken."""
        while self._taken < number:
            _hear(self._end)
            self._taken += 1

    def _grow(self, size: int) -> int:
        """New memory with room for messages of `size` bytes; what is under way stays in the old
        one, which lives until its last reader lets go."""
        each = -(-size // _PAGE) * _PAGE
        descriptor = os.memfd_create("rlhfuse", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, PLACES * each)
        self._memory = _mapped(descriptor)
        return descriptor

    def close(self) -> None:
        self._end.close()


class _Target:
    """The receiving end of a channel."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, buffer: torch.Tensor) -> None:
        word, shared = _hear(self._end)
        for descriptor in shared:
            self._memory = _mapped(descriptor)
            os.close(descriptor)
        offset, size = _WORD.unpack(word)
        flat = buffer.view(-1).view(torch.uint8)
        assert flat.numel() == size, f"{size} bytes came, {flat.numel()} were expected"
        flat.copy_(self._memory[offset : offset + size])
        with contextlib.suppress(OSError):  # a source that is gone waits for no word
            self._end.send(_TAKEN)

    def close(self) -> None:
        self._end.close()


class _Coming:
    """A message that is asked for."""

    def __init__(self, target: _Target, buffer: torch.Tensor) -> None:
        self._target = target
        self._buffer = buffer

    def wait(self) -> None:
        self._target.take(self._buffer)


class _Sent:
    """A message that has been copied; `number`: messages up to it."""

    def __init__(self, source: _Source, number: int) -> None:
        self._source = source
        self._number = number

    def wait(self) -> None:
        self._source.wait(self._number)


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


def _mapped(descriptor: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)


def _hear(end: socket.socket) -> tuple[bytes, list[int]]:
    """The next word of the other end, and the memory that it shares."""
    try:
        word, shared, _, _ = socket.recv_fds(end, _WORD.size, 1)
    except BlockingIOError as error:
        raise RuntimeError("nothing came within the time limit") from error
    except OSError as error:
        raise RuntimeError(f"the other end is gone: {error}") from error
    if not word:
        raise RuntimeError("the other end is gone")
    return word, shared
