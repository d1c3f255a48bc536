"""The process that runs a user's `compute_score`: it may hang, crash or be killed at any time.

Started by `rlhfuse.reward_pool` as a plain script with a connection to answer on. It imports the
standard library only, so that it starts quickly, and ends when its parent does.
"""

import asyncio
import ctypes
import importlib.util
import inspect
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

_PR_SET_PDEATHSIG = 1
ScoreFunction = Callable[..., Any]
# (score or None, metrics, error): exactly one of score and error says something.
Answer = tuple[float | None, dict[str, float], str]
# What `compute_score` is called with, by keyword.
Call = dict[str, object]


def load_function(path: str, name: str) -> ScoreFunction:
    """The function `name` in the Python file `path`.

    Raises:
        ValueError: there is no such file or function, or the file cannot be imported.
    """
    spec = importlib.util.spec_from_file_location("rlhfuse_user_reward", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ValueError(f"reward.function.path: there is no Python file {path!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path[:0] = [str(Path(path).resolve().parent), os.getcwd()]
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"reward.function.path: {path} does not import: {tell(error)}") from error
    return _function(module, path, name)


def _function(module: ModuleType, path: str, name: str) -> ScoreFunction:
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward.function.name: {path} has no function {name!r}")
    found: ScoreFunction = function
    return found


def tell(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def call(function: ScoreFunction, arguments: Call, loop: asyncio.AbstractEventLoop) -> Answer:
    """Run `function`, awaiting its result where it is async, and read what it returned."""
    try:
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = loop.run_until_complete(_awaited(result))
    except Exception as error:
        return None, {}, f"raised {tell(error)}"
    return read_result(result)


async def _awaited(awaitable: Any) -> object:
    return await awaitable


def read_result(result: object) -> Answer:
    """A number, or a mapping with ``score``, whose other numbers are metrics."""
    if not isinstance(result, Mapping):
        score = _number(result)
        return (None, {}, f"returned {result!r:.60}") if score is None else (score, {}, "")
    score = _number(result.get("score"))
    if score is None:
        return None, {}, f"returned score {result.get('score')!r:.60}"
    metrics = {str(key): _number(value) for key, value in result.items() if key != "score"}
    return score, {key: value for key, value in metrics.items() if value is not None}, ""


def _number(value: object) -> float | None:
    if not isinstance(value, Real):
        item = getattr(value, "item", None)  # a tensor or array of one number
        try:
            value = item() if callable(item) else None
        except (RuntimeError, ValueError):
            value = None
    number = float(value) if isinstance(value, Real) else math.nan
    return number if math.isfinite(number) else None


def _end_with_parent(parent: int) -> None:
    """End this process and all it started as soon as `parent` is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _die_with_parent() -> None:
    """Let Linux end this process with its parent, even in a call that never lets go of Python's
    lock (a regular expression that backtracks for ever); elsewhere the thread must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(descriptor: int, parent: int, path: str, name: str) -> None:
    """Answer calls on the connection `descriptor` until it closes; the first message is an error
    text, empty when the function is loaded."""
    _die_with_parent()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    connection = Connection(descriptor)
    try:
        function = load_function(path, name)
    except ValueError as error:
        connection.send(str(error))
        return
    connection.send("")
    loop = asyncio.new_event_loop()
    while True:
        try:
            arguments = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(call(function, arguments, loop))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
