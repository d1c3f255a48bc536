"""The Ray cluster of runs whose start is not what is tested."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.tiny_run import ray_cluster


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """HOST:PORT, for `placement.ray_address`. A cluster of its own costs each run five seconds; and
    once a process has had a private one, Ray no longer starts actors for it on others."""
    with ray_cluster() as cluster:
        yield cluster.address
