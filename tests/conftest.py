"""What holds for all tests.

vLLM claims what belongs to the whole process (torch's default group, its threads): its engine's
tests come after all others. Property tests draw the same examples each time, so that a change is
judged by what it changed; HYPOTHESIS_PROFILE=explore draws new ones. Garbage is collected as rarely
as by the command line."""

import gc
import os

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
gc.set_threshold(100_000, 20, 100)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark vLLM's tests; keep the order, but for those."""
    for item in items:
        if item.path.name.startswith("test_vllm"):
            item.add_marker("vllm")
    items.sort(key=lambda item: item.get_closest_marker("vllm") is not None)
