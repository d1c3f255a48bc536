"""The walls of the house: who may import whom, and which lines stay free of heavy libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhfuse"

# A module imports only from its own package, from what stands before it in its line, or from
# earlier lines. "a.b" places one module of package a apart from the rest of it.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "sample",
        "timeline",
        "schedules.ir",
        "config",
        "config_file",
        "group_training",
        "batch_sizes",
        "logprob_sources",
        "generation_check",
        "config_check",
        "file_check",
        "resume_check",
        "placement",
        "messages",
        "peer_messages",
    ),
    (
        "cost",
        "learned_cost",
        "hardware",
        "model_shape",
        "schedules",
        "packing",
        "update_plan",
        "group_plan",
        "weights.plan",
        "weights.reshard",
        "rollout",
        "profiler",
        "planner",
        "report",
        "warm_up",
        "evaluation",
        "importers",
    ),
    ("kernels", "algorithms"),
    ("data", "models", "engines", "scoring", "training", "megatron", "profiler.record"),
    (
        "quickstart",
        "wire",
        "transport",
        "payloads",
        "weights",
        "reward_process",
        "reward_desk",
        "reward_pool",
        "reward_service",
        "rewards",
        "workers",
        "cluster",
        "members",
        "roster",
        "fleet",
        "run_folder",
    ),
    (
        "progress",
        "metrics",
        "resolve",
        "rollout.records",
        "rollout.again",
        "rollout.ahead",
        "rollout.workers",
        "rollout.serving",
        "rollout.orders",
        "rollout.tally",
        "rollout.loop",
        "batches",
        "run_costs",
        "run_what_if",
        "dry_run",
        "session",
        "saving",
        "rollout.stage",
        "step_metrics",
        "validation",
        "weight_sync",
        "recovery",
        "trainer",
        "launch",
        "integrations",
        "cli",
    ),
)
PURE = LAYERS[0] + LAYERS[1]
HEAVY = ("torch", "ray", "vllm", "zmq", "triton", "transformers")
ONE_HOME = {"vllm": "engines/vllm_engine.py", "ray": "cluster.py", "zmq": "transport.py"}


def _place(module: str) -> tuple[int, int]:
    """(line, position) of a dotted module below rlhfuse: the longest matching entry counts."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for line, entries in enumerate(LAYERS):
            if name in entries:
                return line, entries.index(name)
    raise AssertionError(f"rlhfuse.{module} stands in no layer: add it to LAYERS")


def _modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    for folder in ("kernels", "schedules"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join((folder, *path.relative_to(ROOT / folder).with_suffix("").parts))
            if name not in dict(found):
                found.append((name, path))
    return [(name, path) for name, path in found if name]


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            # `from package import module` imports the module: name it in full.
            names.update(
                f"{node.module}.{alias.name}" if node.module.startswith("rlhfuse") else node.module
                for alias in node.names
            )
    return names


def _target(name: str) -> str:
    """`rlhfuse.a.b.Class` -> `a.b`, by what exists as a file or folder."""
    parts = name.split(".")[1:]
    while parts:
        path = PACKAGE.joinpath(*parts)
        if path.is_dir() or path.with_suffix(".py").exists():
            return ".".join(parts)
        parts.pop()
    return ""


@pytest.mark.parametrize(("module", "path"), _modules(), ids=[m for m, _ in _modules()])
def test_imports_point_down(module: str, path: Path) -> None:
    mine = _place(module)
    for name in _imports(path):
        target = _target(name) if name.split(".")[0] == "rlhfuse" else ""
        if not target or target.split(".")[0] == module.split(".")[0]:
            continue
        assert _place(target) < mine, f"rlhfuse.{module} must not import rlhfuse.{target}"


@pytest.mark.parametrize("library", ONE_HOME)
def test_each_heavy_library_has_one_home(library: str) -> None:
    homes = {
        str(path.relative_to(PACKAGE))
        for module, path in _modules()
        if not module.startswith(("kernels", "schedules"))
        and any(name.split(".")[0] == library for name in _imports(path))
    }
    assert homes <= {ONE_HOME[library]}, f"{library} is imported in {sorted(homes)}"


def test_vocabulary_and_planning_stay_light() -> None:
    names = [m for m, _ in _modules() if _is_pure(m)]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module('rlhfuse.' + name)\n"
        f"heavy = [n for n in {HEAVY!r} if n in sys.modules]\n"
        "assert not heavy, f'imported: {heavy}'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _is_pure(module: str) -> bool:
    line, _ = _place(module)
    return line < 2
