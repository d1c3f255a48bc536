"""Messages between processes of one machine: a copy in shared memory, and a word through a socket.

A receiver sleeps in its socket, and one word wakes it. gloo's way (TCP, a thread in every process
that wakes up a hundred times a second) takes more processor time and longer between tasks
(`bench/bench_fidelity.py`). Whoever runs here has just slept, and every line of code that it needs
is cold: so there is little of it.

Every channel has four places in memory that its source makes and its target maps. Both ends know
beforehand what is to come, in which order, and so where it will lie. The target says in twos what
it has taken: three messages may be under way beside one that was taken untold, and one more waits.
That is no earlier than by the rule that `rlhfuse.schedules.timing.check_channels` proves schedules
by.

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
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from rlhfuse.training.form import Form
from rlhfuse.training.links import Channel, Message, PeerLost

PLACES = 4
"""Messages of a channel that were given and not yet told taken."""
TOLD = 2
"""So many taken messages the source hears of in one word."""
_PAGE = mmap.PAGESIZE
_WORD = struct.Struct("<q")  # how many bytes
_HELLO = struct.Struct("<q")  # which channel
_TAKEN = bytes([TOLD])
_NEW_MEMORY = b"m"  # comes with the memory's descriptor
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class LocalLinks:
    """The channels between this process and others of its machine, each first in, first out.

    To wait for one raises `PeerLost` where it is gone, or silent for longer than the time limit.
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


Announced = Sequence[tuple[Message, Form]]
"""Messages of one channel in its order, and what they look like."""


class _Memory:
    """Shared memory, mapped here."""

    def __init__(self, descriptor: int) -> None:
        """Takes over `descriptor`."""
        try:
            self._map = mmap.mmap(descriptor, 0)  # lives as long as this object
        finally:
            os.close(descriptor)
        self.each = len(self._map) // PLACES
        self._first = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def lay(
        self, announced: Announced, number: int
    ) -> Iterator[tuple[Message, Form, int, int, bytes]]:
        """Each message, what it looks like, its address and bytes, and the word that tells that it
        is there. `number`: of the first one in the channel."""
        for at, (message, form) in enumerate(announced, number):
            address = self._first + at % PLACES * self.each
            yield message, form, address, form.size, _WORD.pack(form.size)


def _memmove() -> Callable[[int, int, int], None]:
    """C's (to, from, bytes), of addresses as numbers; `ctypes.memmove` takes twice as long to look
    at its arguments."""
    function = ctypes.CDLL(None).memmove
    function.argtypes = (ctypes.c_size_t,) * 3
    function.restype = None
    return function


class Source:
    """The sending end of a channel; it owns the memory."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._copy = _memmove()
        self._memory: _Memory | None = None
        self._given = 0
        self._taken = 0

    def senders(self, announced: Announced) -> dict[Message, Callable[[torch.Tensor], None]]:
        """What sends each of the channel's next messages, to be called in their order. A tensor is
        copied at once, when a place is free; it may change afterwards.

        Raises, as what it returns:
            ValueError: the tensor has another shape than announced.
            PeerLost: the target is gone, or took nothing within the time limit.
        """
        memory = self._room(max(form.size for _, form in announced), announced[0][0])
        return {laid[0]: partial(self._put, *laid) for laid in memory.lay(announced, self._given)}

    def _put(
        self,
        message: Message,
        form: Form,
        address: int,
        size: int,
        word: bytes,
        tensor: torch.Tensor,
    ) -> None:
        if self._given - self._taken >= PLACES:
            self._taken += _hear(self._end, _TO_SEND, message)[0]
        form.check(message, tensor)
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        self._copy(address, tensor.data_ptr(), size)
        try:
            self._end.send(word)
        except OSError as error:
            raise _lost(_SENDING, message, error) from error
        self._given += 1

    def _room(self, size: int, first: Message) -> _Memory:
        """Memory for messages of up to `size` bytes. What is under way stays in the old one, which
        lives until its last reader lets go."""
        if self._memory is None or self._memory.each < size:
            try:
                self._memory = self._share(-(-size // _PAGE) * _PAGE)
            except OSError as error:
                raise _lost(_SHARING, first, error) from error
        return self._memory

    def _share(self, each: int) -> _Memory:
        descriptor = os.memfd_create("rlhfuse", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, PLACES * each)
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
        self._copy = _memmove()
        self._memory: _Memory | None = None
        self.taken = 0

    def receivers(self, announced: Announced) -> dict[Message, Callable[[], torch.Tensor]]:
        """What returns each of the channel's next messages, when it is here; to be called in their
        order. The source hears of every `TOLD`. Waits for the source where messages are larger
        than all before.

        Raises, as what it returns:
            PeerLost: the source is gone, or sent nothing within the time limit.
        """
        memory = self._room(max(form.size for _, form in announced), announced[0][0])
        return {laid[0]: partial(self._take, *laid) for laid in memory.lay(announced, self.taken)}

    def _take(
        self, message: Message, form: Form, address: int, size: int, word: bytes
    ) -> torch.Tensor:
        assert form.shape is not None, "the shape is not known"
        tensor = torch.empty(form.shape, dtype=form.dtype)
        to = tensor.data_ptr()  # all that can be done before it comes
        came = _hear(self._end, _WAITING, message)
        assert came == word, f"{message}: announced {word!r}, came {came!r}"
        self._copy(to, address, size)
        self.taken += 1
        if self.taken % TOLD == 0:
            with contextlib.suppress(OSError):  # a source that is gone waits for no word
                self._end.send(_TAKEN)
        return tensor

    def _room(self, size: int, first: Message) -> _Memory:
        if self._memory is None or self._memory.each < size:
            self._memory = _hear_memory(self._end, first)
        return self._memory

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


class _Doing(NamedTuple):
    """What this end of a channel is at."""

    words: str
    sends: bool


_TO_SEND = _Doing("waiting to send", sends=True)
_SENDING = _Doing("sending", sends=True)
_SHARING = _Doing("sharing the memory of", sends=True)
_WAITING = _Doing("waiting for", sends=False)
_FOR_MEMORY = _Doing("waiting for the memory of", sends=False)


def _hear(end: socket.socket, doing: _Doing, message: Message) -> bytes:
    """The next word of the other end."""
    try:
        try:
            word = end.recv(_WORD.size)
        except ConnectionResetError:  # it left and did not read all: what it sent is still here
            word = end.recv(_WORD.size)
    except OSError as error:
        raise _lost(doing, message, error) from error
    if not word:
        raise _lost(doing, message)
    return word


def _hear_memory(end: socket.socket, first: Message) -> _Memory:
    """The source's memory, which comes before its `first` message."""
    size = len(_NEW_MEMORY)
    try:
        try:
            word, descriptors, _, _ = socket.recv_fds(end, size, 1)
        except ConnectionResetError:  # as above
            word, descriptors, _, _ = socket.recv_fds(end, size, 1)
    except OSError as error:
        raise _lost(_FOR_MEMORY, first, error) from error
    if not word:
        raise _lost(_FOR_MEMORY, first)
    assert word == _NEW_MEMORY, f"{first}: instead of its memory came {word!r}"
    return _Memory(descriptors[0])


def _lost(doing: _Doing, message: Message, error: OSError | None = None) -> PeerLost:
    peer = message.channel.target if doing.sends else message.channel.source
    if isinstance(error, BlockingIOError):
        text = f"{doing.words} {message}: nothing came within the time limit"
        return PeerLost(text, peer, silent=True)
    why = "" if error is None else f": {error}"
    return PeerLost(f"{doing.words} {message}: the other end is gone{why}", peer)
