"""Law of set-up: no entry point of the compiled searches is left for a user's first command."""

from collections.abc import Sequence
from typing import Protocol, cast

import pytest

from rlhfuse.kernels import compiled_rows, compiled_scans
from rlhfuse.kernels.warm_up import warm_up as warm_up_kernels
from rlhfuse.rollout import engine_model, running
from rlhfuse.rollout.forecast import end_s
from rlhfuse.schedules.local import anneal
from rlhfuse.schedules.search import climbs
from rlhfuse.warm_up import warm_up


class _Compiled(Protocol):
    @property
    def signatures(self) -> Sequence[object]: ...


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    [
        end_s, running.remove, engine_model.lose, climbs, anneal, compiled_scans._scale,
    ],
    ids=["forecast", "fleet", "engines", "climbs", "anneal", "scans"],
)  # fmt: skip
def test_everything_is_compiled_at_set_up(entry: object) -> None:
    warm_up()
    warm_up_kernels()
    assert cast(_Compiled, entry).signatures


@pytest.mark.slow
def test_what_threads_run_is_compiled_at_set_up() -> None:
    warm_up_kernels()
    assert compiled_rows._entries.cache_info().currsize
