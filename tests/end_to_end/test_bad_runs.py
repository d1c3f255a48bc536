"""Rewards that fail, and losses that are not numbers: passing trouble changes nothing, lasting
trouble ends the run with one clear line, and nothing is lost or left behind."""

import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

import rlhfuse.config as c
from rlhfuse.config import Config
from rlhfuse.config_file import dump
from rlhfuse.resolve import resolve
from rlhfuse.reward_desk import RewardFailed
from rlhfuse.rewards import open_rewards
from rlhfuse.run_folder import RunFolder
from rlhfuse.session import Session, open_session
from rlhfuse.trainer import StepResult, Trainer
from tests.end_to_end.tiny_run import make_assets, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
replace = msgspec.structs.replace
ROOT = Path(__file__).resolve().parents[2]
SCORE = """
import os, signal, time
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(len(solution_str.split()) % 7)
def dies_once(data_source, solution_str, ground_truth, extra_info=None):
    mark = os.path.join(os.path.dirname(__file__), "died-" + ground_truth)
    if ground_truth in ("w3", "w7") and not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return compute_score(data_source, solution_str, ground_truth)
def hangs(data_source, solution_str, ground_truth, extra_info=None):
    while ground_truth == "w3":
        time.sleep(1)
    return float("nan") if ground_truth == "w7" else 0.0
"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    (folder / "rule.py").write_text(SCORE)
    return folder


class _Service(http.server.BaseHTTPRequestHandler):
    """Hangs, fails and drops the connection before it serves."""

    moods: tuple[str, ...] = ("hang", "500", "drop")
    asked = 0
    free = threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number, _Service.asked = _Service.asked, _Service.asked + 1
        mood = self.moods[number] if number < len(self.moods) else "serve"
        if mood == "hang":
            self.free.wait(20)
        if mood in ("hang", "drop"):
            self.connection.close()
            return
        results = [
            {"id": s["id"], "score": float(len(s["solution_str"].split()) % 7)}
            for s in body["samples"]
        ]
        reply = json.dumps({"results": results}).encode() if mood == "serve" else b"{}"
        self.send_response(200 if mood == "serve" else int(mood))
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def taken() -> Iterator[None]:
    """The ports that Ray and torch.distributed take by default are in use."""
    with ExitStack() as stack:
        for port in (6379, 8265, 10001, 29500, 29400):
            listener = stack.enter_context(socket.socket())
            with suppress(OSError):  # by somebody else: as good
                listener.bind(("127.0.0.1", port))
                listener.listen()
        yield


@pytest.fixture
def service() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Service) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
        _Service.free.set()
        server.shutdown()


def _config(
    assets: Path, runs: Path, name: str = "compute_score", ray_address: str = "", **reward: object
) -> Config:
    config = tiny_config(assets, runs, num_devices=2, ray_address=ray_address)
    function = c.RewardFunctionConfig(path=str(assets / "rule.py"), name=name)
    return replace(
        config,
        reward=replace(c.RewardConfig(function=function, timeout_s=1.0), **reward),
        data=replace(config.data, shuffle=False),
        trainer=replace(config.trainer, val_before_train=False, report=False),
    )


def test_passing_trouble_with_rewards_changes_no_bit(
    assets: Path, tmp_path: Path, service: str, ray_address: str
) -> None:
    config = _config(assets, tmp_path, ray_address=ray_address)
    with open_session(resolve(config), resume=False) as session:
        start = Trainer(session).save()
        undisturbed = _step(session, start, config)
        dying = _config(assets, tmp_path, "dies_once")
        assert _step(session, start, dying) == undisturbed
        assert (assets / "died-w3").exists()
        assert (assets / "died-w7").exists()
        remote = replace(config, reward=c.RewardConfig(url=service, timeout_s=1.0))
        assert _step(session, start, remote) == undisturbed
        assert _Service.asked > len(_Service.moods)
        tolerant = _config(assets, tmp_path, "hangs", on_error="score", error_score=-1.0)
        scores = _step(session, start, tolerant).metrics
        assert (scores["critic/score/min"], scores["critic/score/max"]) == (-1.0, 0.0)
        assert scores["critic/score/mean"] == pytest.approx(-2 / 16)
        with pytest.raises(RewardFailed, match=r"sample \d+ .*(longer than 1 s|returned nan)"):
            _step(session, start, _config(assets, tmp_path, "hangs"))


def _step(session: Session, start: Path, config: Config) -> "_Result":
    """The first step, with the rewards of `config`."""
    assert session.rewards is not None
    session.rewards.close()
    session.rewards = open_rewards(config.reward)
    session.load(start)
    trainer = Trainer(session)
    trainer.sync_weights()
    return _Result(trainer.step())


class _Result:
    """A step's digests, to compare, and its metrics."""

    def __init__(self, result: StepResult) -> None:
        self.digests = (result.tokens, result.rewards, result.weights)
        self.metrics = result.metrics

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Result) and self.digests == other.digests


def _train(config: Config, folder: Path) -> tuple[int, str]:
    """Exit code and stderr of `rlhfuse train`; no process may be left."""
    (folder / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "rlhfuse.cli.main", "train", str(folder / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    run = RunFolder(config.trainer).path
    pids = json.loads((run / "workers.json").read_text()).values()
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    return done.returncode, done.stderr


@pytest.mark.usefixtures("taken")
def test_a_hung_reward_function_ends_the_run_and_names_the_sample(
    assets: Path, tmp_path: Path
) -> None:
    code, told = _train(_config(assets, tmp_path, "hangs"), tmp_path)
    assert code == 2
    last = told.strip().splitlines()[-1]
    assert last.startswith("error: sample ")
    assert "reward.on_error=score" in last
    assert not [p for p in psutil.process_iter(["cmdline"]) if _runs(p, assets / "rule.py")]


def _runs(process: psutil.Process, script: Path) -> bool:
    return str(script) in (process.info["cmdline"] or [])


def test_a_loss_that_is_no_number_ends_the_run_with_its_batch_kept(
    assets: Path, tmp_path: Path
) -> None:
    config = _config(assets, tmp_path)
    # The first mini-batch throws the weights so far that the second one's loss is not finite.
    huge = replace(config.actor.optim, lr=1e30, clip_grad=0.0)
    code, told = _train(replace(config, actor=replace(config.actor, optim=huge)), tmp_path)
    assert code == 1
    last = told.strip().splitlines()[-1]
    assert "step 1, mini-batch 1, actor: the loss is nan" in last
    kept = list(RunFolder(config.trainer).path.glob("non_finite_step_1_rank*.npz"))
    assert kept
    with np.load(kept[0], allow_pickle=False) as batch:
        assert any(name.endswith("/response") for name in batch.files)
