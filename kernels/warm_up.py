"""Compile the CPU's kernels, or load them from the cache on disk: part of `make setup`, so that no
first step waits some five seconds for it."""

from rlhfuse.kernels import compiled_rows, compiled_scans


def warm_up() -> None:
    """Call every compiled function on the smallest inputs."""
    compiled_rows.warm_up()
    compiled_scans.warm_up()


if __name__ == "__main__":
    warm_up()
