"""vLLM claims what belongs to the whole process (torch's default group, its threads): its engine's
tests come after all others."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the order, but for those."""
    items.sort(key=lambda item: item.path.name.startswith("test_vllm"))
