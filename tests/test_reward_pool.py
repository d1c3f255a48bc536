"""Every sample gets exactly one answer, whatever a function does, and no process is left behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from rlhfuse.config import RewardConfig, RewardFunctionConfig
from rlhfuse.reward_desk import RewardFailed
from rlhfuse.reward_pool import RewardPool
from rlhfuse.rewards import open_rewards
from tests.reward_cases import collect, config, inputs

FUNCTIONS = """
import asyncio, os, re, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    print("noise on stdout")
    if solution_str == "raise": raise RuntimeError("boom")
    if solution_str == "hang": time.sleep(1000)
    if solution_str == "hang in C": re.match(r"(a+)+$", "a" * 60 + "b")
    if solution_str == "hang with a child":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1000)"])
    if solution_str == "crash": os._exit(7)
    if solution_str == "nan": return float("nan")
    if solution_str == "inf": return {"score": float("inf")}
    if solution_str == "none": return None
    if solution_str == "text": return "1.0"
    if solution_str == "dict": return {"score": True, "words": 3, "comment": "fine"}
    return float(solution_str == ground_truth) + extra_info.get("bonus", 0)

async def in_async(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.01)
    return {"score": 2.0}
"""


@pytest.fixture
def function(tmp_path: Path) -> RewardFunctionConfig:
    path = tmp_path / "my_reward.py"
    path.write_text(FUNCTIONS)
    return RewardFunctionConfig(path=str(path))


def _gone(pids: set[int], limit_s: float = 5) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if not any(_running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_what_a_function_returns_or_does_becomes_one_result_each(
    function: RewardFunctionConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _children()
    asked = ["right", "wrong", "raise", "crash", "nan", "inf", "none", "text", "dict", "right"]
    pool = RewardPool(function, config(error_score=-9.0))
    try:
        pool.submit(inputs(*asked))
        results = collect(pool, len(asked))
    finally:
        pool.close()
    assert _gone(_children() - before)
    assert [results[i].score for i in (0, 1, 8, 9)] == [1.0, 1.0, 1.0, 10.0]
    assert results[8].metrics == {"words": 3.0}
    for index, part in {
        2: "RuntimeError: boom",
        3: "exit code 7",
        4: "returned nan",
        5: "returned score inf",
        6: "returned None",
        7: "returned '1.0'",
    }.items():
        assert results[index].score == -9.0
        assert results[index].error.startswith(f"sample {index} (math): the reward function")
        assert part in results[index].error
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_hung_call_costs_its_own_sample_only(function: RewardFunctionConfig) -> None:
    before = _children()
    asked = ["hang", "hang in C", "hang with a child", *["right"] * 20]
    pool = RewardPool(function, config(num_workers=3))
    try:
        pool.submit(inputs(*asked))
        deadline = time.monotonic() + 1.2
        while time.monotonic() < deadline:
            children = _children() - before
        results = collect(pool, len(asked))
        assert all("took longer than 1.5 s" in results[i].error for i in range(3))
        assert [results[i].score for i in range(3, 23)] == [1.0 + i for i in range(3, 23)]
        assert _gone(children)  # the three that hung, and the child of one of them
    finally:
        pool.close()
    assert _gone(_children() - before)


def test_async_functions_are_awaited_and_scores_clipped(function: RewardFunctionConfig) -> None:
    pool = RewardPool(msgspec.structs.replace(function, name="in_async"), config(clip=1.5))
    try:
        pool.submit(inputs("a", "b"))
        assert [result.score for result in collect(pool, 2).values()] == [1.5, 1.5]
    finally:
        pool.close()


def test_the_policy_fail_names_the_sample(function: RewardFunctionConfig) -> None:
    pool = RewardPool(function, config(on_error="fail"))
    try:
        pool.submit(inputs("raise"))
        with pytest.raises(RewardFailed, match=r"sample 0 \(math\).*boom.*reward\.on_error"):
            pool.poll(10)
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("text", "name", "part"),
    [
        ("import no_such_module", "compute_score", "ModuleNotFoundError"),
        ("x = 1", "compute_score", "has no function 'compute_score'"),
        ("def f(: pass", "f", "SyntaxError"),
        ("import os; os._exit(3)", "f", "exit code 3"),
        (None, "f", "there is no Python file"),
    ],
)
def test_a_function_that_does_not_load_is_told_at_once(
    tmp_path: Path, text: str | None, name: str, part: str
) -> None:
    before = _children()
    path = tmp_path / "f.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"reward\.function") as caught:
        RewardPool(RewardFunctionConfig(path=str(path), name=name), config())
    assert part in str(caught.value)
    assert _gone(_children() - before)


def test_closing_in_the_middle_of_a_call_is_quick(function: RewardFunctionConfig) -> None:
    before = _children()
    pool = RewardPool(function, config(timeout_s=500.0))
    pool.submit(inputs("hang", "hang with a child", "right"))
    time.sleep(0.5)
    children = _children() - before
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 3
    assert children
    assert _gone(children)


@pytest.mark.parametrize("ending", ["sys.exit(0)", "os.kill(os.getpid(), 9)", "1 / 0"])
def test_no_process_outlives_the_interpreter(
    function: RewardFunctionConfig, tmp_path: Path, ending: str
) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, time, psutil\n"
        "from rlhfuse.config import RewardConfig, RewardFunctionConfig\n"
        "from rlhfuse.reward_desk import RewardInput\n"
        "from rlhfuse.reward_pool import RewardPool\n"
        f"pool = RewardPool(RewardFunctionConfig(path={function.path!r}), RewardConfig())\n"
        "pool.submit([RewardInput(0, 's', 'hang in C'), RewardInput(1, 's', 'hang')])\n"
        "time.sleep(0.6)\n"
        "print(*[c.pid for c in psutil.Process().children()], flush=True)\n"
        f"{ending}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=30
    )
    pids = {int(pid) for pid in done.stdout.split()}
    assert len(pids) == 2
    assert _gone(pids)


def test_the_configuration_chooses_a_function(function: RewardFunctionConfig) -> None:
    assert open_rewards(RewardConfig(path="models/reward")) is None
    source = open_rewards(RewardConfig(function=function))
    assert source is not None
    source.submit(inputs("right"))
    assert collect(source, 1)[0].score == 1.0
    source.close()
