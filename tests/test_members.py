"""A worker counts as hung when it gives no sign of life, or stays at one thing for too long."""

from pathlib import Path

import pytest

from rlhfuse.config import Config
from rlhfuse.members import Member
from rlhfuse.messages import Pulse
from rlhfuse.placement import NodeInfo, RunKeys, Seat, WorkerSpec


@pytest.fixture
def member() -> Member:
    spec = WorkerSpec(
        name="rollout-1",
        kind="rollout",
        index=1,
        seat=Seat(NodeInfo("n", "127.0.0.1", "m", (0,)), 0, None),
        hub="tcp://127.0.0.1:1",
        keys=RunKeys(b"x" * 16),
        config=Config(),
        pipelines={},
        store=("127.0.0.1", 1),
        total_optimizer_steps=1,
    )
    return Member(spec, started_s=100.0)


def _trouble(member: Member, now_s: float) -> str:
    return member.trouble(now_s, silence_limit_s=5.0, wait_limit_s=60.0)


def test_nobody_is_blamed_without_cause(member: Member) -> None:
    assert not _trouble(member, 101.0)
    member.endpoint, member.heard, member.told_s = "tcp://x", True, 110.0
    member.pulse = Pulse(doing="Score", busy_s=59.0)
    member.silent_s = 4.9
    assert not _trouble(member, 169.0)


def test_silence_and_endless_work_are_named(member: Member) -> None:
    assert "did not start within 60 s" in _trouble(member, 161.0)
    member.endpoint, member.heard, member.told_s = "tcp://x", True, 110.0
    member.pulse = Pulse(doing="Score", busy_s=61.0)
    assert "61 s in Score (trainer.wait_timeout_s)" in _trouble(member, 171.0)
    # It reported something meanwhile: one long command may have many parts.
    member.told_s = 160.0
    assert not _trouble(member, 171.0)
    member.silent_s = 5.1
    assert "no sign of life for 5 s (trainer.heartbeat_timeout_s)" in _trouble(member, 171.0)


def test_another_process_starts_from_nothing(member: Member) -> None:
    member.endpoint, member.pid, member.heard, member.silent_s = "tcp://x", 7, True, 3.0
    member.asked["actor"] = member.held["actor"] = (3, "digest")
    member.begun = (1, 4, 3)
    before = member.spec.identity
    member.replace(200.0)
    assert member.spec.identity != before
    assert member.name == "rollout-1"
    assert not member.up
    assert not member.asked
    assert not member.held
    assert member.begun is None
    assert (member.heard, member.silent_s) == (False, 0.0)
    assert not _trouble(member, 201.0)


def test_the_names_of_limits_are_keys_of_the_configuration() -> None:
    text = Path(__file__).parents[1].joinpath("rlhfuse", "members.py").read_text()
    for key in ("heartbeat_timeout_s", "wait_timeout_s"):
        assert f"trainer.{key}" in text
        assert hasattr(Config().trainer, key)
