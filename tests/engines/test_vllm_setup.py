"""What is said and made of the vLLM that is installed, before it is imported."""

import importlib.metadata
import importlib.util
import logging
from pathlib import Path

import msgspec
import pytest

from rlhfuse.engines import vllm_setup
from rlhfuse.resolve import resolve
from tests.end_to_end.tiny_run import make_assets, tiny_config


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


@pytest.mark.parametrize(("installed", "engine"), [(True, "vllm"), (False, "torch")])
def test_auto_takes_vllm_where_it_is_installed(
    installed: bool, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_assets(tmp_path)
    config = tiny_config(tmp_path, tmp_path, num_devices=2)
    auto = msgspec.structs.replace(config.rollout, engine="auto")
    usual = importlib.util.find_spec

    def find_spec(name: str) -> object:
        return installed or None if name == "vllm" else usual(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    run = resolve(msgspec.structs.replace(config, rollout=auto))
    assert run.config.rollout.engine == engine
