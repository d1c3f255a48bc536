"""The Triton kernels in their own process, and the choice between implementations."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path as FilePath

import pytest
import torch

from rlhfuse.kernels.dispatch import Path, choose

ROOT = FilePath(__file__).resolve().parents[2]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_triton_kernels_equal_float64() -> None:
    """All in one process: to import Triton and torch's compiler takes as long as many a case."""
    environment = os.environ | {"RLHFUSE_KERNELS": "triton"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    cases = sorted(map(str, FilePath(__file__).parent.glob("triton_*cases.py")))
    assert len(cases) == 6
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


@needs_triton
@pytest.mark.slow
def test_triton_kernels_compile_for_absent_gpus_without_spills(tmp_path: FilePath) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    out = tmp_path / "compiled.json"
    command = [sys.executable, str(ROOT / "bench" / "compile_kernels.py"), "--json", str(out)]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    reports = json.loads(out.read_text())["kernels"]
    assert {report["target"] for report in reports} == {"sm_80", "sm_90", "sm_100"}
    for report in reports:
        assert report["spill_store_bytes"] == 0, report
        assert report["shared_bytes"] <= 160 * 1024, report


def test_the_choice_is_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("RLHFUSE_KERNELS", raising=False)
    assert choose(CPU) is Path.COMPILED
    assert choose(torch.device("meta")) is Path.TORCH
    monkeypatch.setenv("RLHFUSE_KERNELS", "reference")
    assert choose(CPU) is Path.REFERENCE
    monkeypatch.setenv("RLHFUSE_KERNELS", "triton")
    with pytest.raises(ValueError, match="triton"):
        choose(CPU)
    monkeypatch.setenv("RLHFUSE_KERNELS", "fast")
    with pytest.raises(ValueError, match="reference, triton or auto"):
        choose(CPU)


@needs_triton
def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHFUSE_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(CPU) is Path.TRITON
