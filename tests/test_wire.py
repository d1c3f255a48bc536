"""Whatever the bytes are: a message of this run, or `NotAMessage`. Nothing else comes of them."""

import ast
import re
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse import messages as m
from rlhfuse import payloads, placement, transport, wire
from rlhfuse import peer_messages as peer
from rlhfuse.placement import RunKeys
from rlhfuse.weights import send
from rlhfuse.wire import Codec, NotAMessage

KEYS = RunKeys(token=b"0123456789abcdef")
KINDS = (m.Command, m.Event, peer.PeerRequest, peer.PeerReply)
SAMPLES: list[object] = [
    m.BeginStep(step=3, policy_version=2),
    m.Generate(
        items=(m.GenerateItem(m.SampleTokens(1, b"\1\0\0\0", b""), seed=7, cache_from="tcp://a"),),
        sampling=m.Sampling(1.0, 0, 1.0, 0.0, 8, 0, (2,)),
    ),
    m.Grown(growths=(m.Growth(4, b"\0\0\0\0\1\1\1\1", 2, "stop"),)),
    peer.FetchFloats(kind="actor", sample_ids=(1, 2)),
    peer.Floats(values=(b"\0\0\0\0",)),
    m.Failed(worker="w", where="x", error="y", traceback="z"),
]
# Any JSON-like value, also the shapes of messages with values that do not belong there.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _codecs() -> list[Codec[object]]:
    return [Codec(kind, KEYS) for kind in KINDS]


@pytest.mark.parametrize("message", SAMPLES, ids=[type(s).__name__ for s in SAMPLES])
def test_what_was_sent_arrives(message: object) -> None:
    frame = _codecs()[0].encode(message)
    found = []
    for codec in _codecs():
        try:
            found.append(codec.decode(frame))
        except NotAMessage:
            continue
    assert found == [message]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_not_a_message(noise: bytes) -> None:
    for codec in _codecs():
        with pytest.raises(NotAMessage):
            codec.decode(noise)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.sampled_from(SAMPLES))
def test_foreign_values_never_get_through_as_something_else(value: object, sample: object) -> None:
    """A value, alone or in the place of each field of a message, decodes or is refused."""
    head = KEYS.token + bytes([m.PROTOCOL_VERSION])
    tree = msgspec.msgpack.decode(msgspec.msgpack.encode(sample))
    trees = [value, *({**tree, key: value} for key in tree if key != "type")]
    for changed in trees:
        try:
            frame = head + msgspec.msgpack.encode(changed)
        except OverflowError:  # an integer that msgpack has no room for
            continue
        for codec in _codecs():
            try:
                assert isinstance(codec.decode(frame), m.Message)
            except NotAMessage:
                continue


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_frames_are_messages_or_refused(sample: object, data: st.DataObject) -> None:
    frame = bytearray(_codecs()[0].encode(sample))
    at = data.draw(st.integers(0, len(frame) - 1))
    if data.draw(st.booleans()):
        frame[at] ^= data.draw(st.integers(1, 255))
    else:
        del frame[at:]
    for codec in _codecs():
        try:
            assert isinstance(codec.decode(bytes(frame)), m.Message)
        except NotAMessage:
            continue


def test_other_runs_and_versions_are_told_apart() -> None:
    frame = _codecs()[0].encode(SAMPLES[0])
    stranger: Codec[object] = Codec(m.Command, RunKeys(token=b"x" * 16))
    with pytest.raises(NotAMessage, match="not of this run"):
        stranger.decode(frame)
    newer = frame[:16] + bytes([m.PROTOCOL_VERSION + 1]) + frame[17:]
    with pytest.raises(NotAMessage, match="protocol"):
        _codecs()[0].decode(newer)


def test_numbers_that_are_cut_short_are_refused() -> None:
    """They would break whoever reads them as an array."""
    head = KEYS.token + bytes([m.PROTOCOL_VERSION])
    body = msgspec.msgpack.encode({"type": "Grown", "growths": [[1, b"\0\0\0", 1]]})
    with pytest.raises(NotAMessage, match="4-byte"):
        Codec[object](m.Event, KEYS).decode(head + body)
    nested = msgspec.msgpack.encode([[[[]]]] * 5000)
    with pytest.raises(NotAMessage):
        Codec[object](m.Event, KEYS).decode(head + nested)
    deep = b"\x91" * 100_000  # an array in an array in an array ...
    with pytest.raises(NotAMessage):
        Codec[object](m.Event, KEYS).decode(head + deep)


@pytest.mark.parametrize("module", [m, peer, payloads, placement, send, transport, wire])
def test_nothing_on_the_wire_s_way_can_unpickle(module: ModuleType) -> None:
    source = Path(str(module.__file__)).read_text()
    names = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in [*node.names, ast.alias(getattr(node, "module", "") or "")]
    }
    assert not names & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    assert not re.search(r"recv_pyobj|send_pyobj|torch\.load|allow_pickle=True|\beval\(", source)
