"""What is said of the vLLM that is installed, before it is imported."""

import importlib.metadata
import importlib.util
import logging

import pytest

from rlhfuse.engines import vllm_setup


def test_an_untested_version_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for version in (*vllm_setup.TESTED_VERSIONS, "0.32.0+cpu"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=version: v)
        with caplog.at_level(logging.WARNING):
            assert vllm_setup.prepare() == version
        assert not caplog.records
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.8.7")
    with caplog.at_level(logging.WARNING):
        vllm_setup.prepare()
    assert "vLLM 9.8.7 has not been tested with rlhfuse (tested: 0.32.0)" in caplog.text


def test_without_vllm_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"rollout\.engine: vllm is not installed.*choose torch"):
        vllm_setup.prepare()
