"""The doctor finds what is there and what is not, and its exit code says whether a run could go."""

import json

import pytest

from rlhfuse.cli.common import run_command
from rlhfuse.cli.doctor import doctor, examine


def test_this_machine_can_train_and_every_gap_says_what_it_would_enable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(doctor, []) == 0
    text = capsys.readouterr().out
    assert "Ready to train." in text
    for finding in examine():
        assert finding.name in text
        assert bool(finding.enables) == (finding.status == "missing")
    names = {finding.name for finding in examine()}
    assert names >= {"python", "torch", "cpu cores", "memory", "shared memory", "ports", "kernels"}
    assert names >= {"vllm", "triton", "pyarrow", "wandb", "megatron-core", "apex"}


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(doctor, ["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is True
    known = [finding.name for finding in examine()]
    assert [finding["name"] for finding in printed["findings"]] == known


def test_a_problem_is_named_and_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHFUSE_KERNELS", "nonsense")
    assert run_command(doctor, []) == 1
    text = capsys.readouterr().out
    assert "PROBLEM  kernels" in text
    assert "'nonsense'" in text
    assert "1 problem(s)" in text
