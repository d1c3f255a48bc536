"""A made-up run folder with everything in it: numbers that look like a run's, known timelines."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from rlhfuse.profiler.attribution import attribute
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import simulate
from rlhfuse.timeline import Kind, Span, Timeline, save_chrome

VALIDATION = "val-core/held_out/reward/mean@1"
MakeRun = Callable[..., Path]


def synthetic_step(num_ranks: int, fused: bool, seed: int, decode_steps: int = 120) -> Timeline:
    """One PPO step: decode steps with a long tail, scoring, two training pipelines, weights."""
    rng = random.Random(seed)
    spans: list[Span] = []
    clock = [0.0] * num_ranks

    def work(rank: int, seconds: float, kind: Kind, name: str) -> None:
        start = clock[rank]
        # Never longer than planned: what follows in a simulated schedule stays possible.
        clock[rank] = start + seconds * rng.uniform(0.93, 1.0)
        spans.append(Span(f"rank{rank}", start, clock[rank], kind, name))

    longest = 1.0 if fused else 1.12
    for rank in range(num_ranks):
        share = (1.0 if rank == 0 else rng.uniform(0.45, 0.6)) * longest
        work(rank, 0.04, Kind.PREFILL, "prefill 32")
        for step in range(int(decode_steps * share)):
            work(rank, 1.8 / decode_steps, Kind.GENERATE, f"decode {max(1, 32 - step // 4)}")
    generated = max(clock)
    if not fused:
        clock = [generated] * num_ranks
    for rank in range(num_ranks):
        for role in ("reference", "critic", "reward"):
            work(rank, 0.14, Kind.SCORE, f"score {role}")
    clock = [max(clock) + 0.02] * num_ranks
    spans.append(Span("controller", clock[0] - 0.015, clock[0], Kind.ADVANTAGE, "advantages"))
    for _ in range(2):
        _train(work, clock, num_ranks, fused)
        for rank in range(num_ranks):
            work(rank, 0.03, Kind.OPTIMIZER, "step")
        clock[:] = [max(clock)] * num_ranks
    for rank in range(num_ranks):
        work(rank, 0.08 + 0.02 * (rank % 2), Kind.WEIGHTS, "actor weights")
    return Timeline(tuple(spans))


def _train(
    work: Callable[[int, float, Kind, str], None], clock: list[float], num_ranks: int, fused: bool
) -> None:
    """Actor down, critic up the ranks: one fused schedule, or each alone with a barrier between."""
    down = tuple(range(num_ranks))
    pipes = [Pipeline.make("actor", down, 4, 0.06, 0.12)]
    pipes.append(Pipeline.make("critic", down[::-1], 4, 0.06, 0.12))
    groups = [tuple(pipes)] if fused else [(pipe,) for pipe in pipes]
    for group in groups:
        problem = Problem(num_ranks, group)
        began = max(clock)
        schedule = fuse(problem, iterations=2) if fused else one_f_one_b(problem)
        for span in simulate(schedule).spans:
            rank = int(span.lane.removeprefix("rank"))
            clock[rank] = began + span.start_s
            work(rank, span.duration_s, span.kind, span.name)
        clock[:] = [max(clock)] * num_ranks


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a synthetic run folder below `tmp_path`; arguments replace texts in it."""

    def make(
        prompt: str = "Say something kind about a rainy day.",
        name: str = "quickstart",
        num_ranks: int = 2,
        decode_steps: int = 120,
    ) -> Path:
        folder = tmp_path / "sentiment" / name
        write_run(folder, prompt, num_ranks, decode_steps)
        return folder

    return make


def write_run(folder: Path, prompt: str, num_ranks: int = 2, decode_steps: int = 120) -> None:
    (folder / "timeline").mkdir(parents=True)
    rng = random.Random(7)
    rows = [{"step": 0, VALIDATION: 0.36}]
    for step in range(1, 31):
        fused = step % 10 != 0
        timeline = synthetic_step(num_ranks, fused, step, decode_steps)
        rows.append(_metrics(step, fused, timeline, rng))
        if step % 10 == 0:  # a validation has a row of its own
            rows.append({"step": step, VALIDATION: 0.36 + 0.45 * (1 - 0.9**step)})
        if step >= 29:
            save_chrome(timeline, folder / "timeline" / f"step_{step}.json")
    _write_lines(folder / "metrics.jsonl", rows)
    _write_lines(folder / "samples.jsonl", _samples(prompt))
    lengths = [
        {
            "step": s,
            "lengths": [min(256, int(rng.lognormvariate(3.9 - s / 99, 0.7))) for _ in range(64)],
        }
        for s in (1, 30)
    ]
    _write_lines(folder / "lengths.jsonl", lengths)
    (folder / "config.yaml").write_text(
        f"actor:\n  path: tiny\n# {prompt}\nfusion:\n  audit_every: 10\n"
    )
    environment = {
        "cpu": "AMD EPYC 9B14, 2 cores",
        "memory": "8 GB",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "rlhfuse": "0.1.0"},
        prompt: prompt,
    }
    (folder / "environment.json").write_text(json.dumps(environment))


def _metrics(step: int, fused: bool, timeline: Timeline, rng: random.Random) -> dict[str, float]:
    reward = 0.35 + 0.5 * (1 - 0.9**step) + rng.gauss(0, 0.03)
    kl = 0.08 * (1 - 0.93**step) + abs(rng.gauss(0, 0.004))
    row = {
        "step": step,
        "critic/rewards/mean": reward - kl,
        "critic/score/mean": reward,
        "critic/kl": kl,
        "actor/ppo_kl": abs(rng.gauss(0.01, 0.003)),
        "response_length/mean": 58 + rng.gauss(0, 3),
        "response_length/min": 3.0,
        "response_length/max": 200 + rng.randrange(56),
        "timing_s/step": timeline.wall_s,
        "memory/rank0/peak_gb": 1.5 if step == 2 else 1.0,
        "memory/rank0/planned_gb": 1.2,
        "timing_s/gen": 2.0 if fused else 2.2,
        "timing_s/score": 0.3 if fused else 0.45,
        "timing_s/update": 3.0 if fused else 4.1,
        **attribute(timeline).metrics(),
    }
    if not fused:
        row["fusion/measured_speedup"] = 1.31 + rng.gauss(0, 0.02)
    return row


def _samples(prompt: str) -> list[dict[str, object]]:
    prompts = [
        prompt,
        "Describe your morning.",
        "Tell me about the sea.",
        "A word on bread:",
        "Why?",
    ]
    answers = {
        0: "the the rain of and was it it it grey grey sky and and nobody came to the house",
        30: "What a gentle sound it makes; the garden will thank us, and so will the tea kettle.",
    }
    return [
        {
            "step": step,
            "set": "held_out",
            "prompt": text,
            "response": f"{answers[step]} {prompt if text == prompt else ''}".strip(),
            "score": round(0.3 + step / 60 + i / 50, 3),
        }
        for step in answers
        for i, text in enumerate(prompts)
    ]


def _write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Browser:
    """Headless Chromium, spoken to over its debugging pipe (DevTools protocol)."""

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --disable-background-networking"
        # The protocol's pipe is file descriptors 3 and 4 of the browser.
        script = f'exec 60<&{theirs_in} 61>&{theirs_out}; exec "$0" "$@" 3<&60 4>&61'
        size, data = "--window-size=1280,900", f"--user-data-dir={profile}"
        arguments = [*flags.split(), "--remote-debugging-pipe", data, size, "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, *arguments],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer = b""
        self._last = 0
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank", session="")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True, session="")
        self._session = str(attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    _session = ""

    def call(self, method: str, session: str | None = None, **params: object) -> dict[str, object]:
        """One protocol call; events that arrive meanwhile are looked through for errors."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if session is None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self._last:
                assert "error" not in reply, reply
                result = reply["result"]
                assert isinstance(result, dict)
                return result

    def _read(self) -> dict[str, object]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "the browser went away"
            self._buffer += chunk
        head, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, object] = json.loads(head)
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        told = json.dumps(message.get("params"))
        # Reading pixels back, as the tests do, draws a warning about speed; a page never does.
        if message.get("method") in bad and "readback" not in told:
            self.errors.append(told)
        return message

    def open(self, page: Path) -> None:
        """Load a page, and wait until its scripts ran and drew."""
        self.errors.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        wait = (
            "new Promise(done => { const f = () => document.readyState === 'complete' && "
            "location.href !== 'about:blank' ? requestAnimationFrame(() => "
            "requestAnimationFrame(() => done(1))) : setTimeout(f, 20); f(); })"
        )
        self.evaluate(wait)

    def evaluate(self, expression: str) -> object:
        """The value of an expression in the page; promises are awaited."""
        reply = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in reply, reply
        result = reply["result"]
        assert isinstance(result, dict)
        return result.get("value")

    def close(self) -> None:
        os.close(self._out)
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._in)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; tests that ask for it are skipped where none is installed."""
    program = next(
        (
            p
            for n in ("chromium", "chromium-browser", "google-chrome", "chrome")
            if (p := shutil.which(n))
        ),
        None,
    )
    if program is None:
        pytest.skip("no Chromium on PATH")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()
