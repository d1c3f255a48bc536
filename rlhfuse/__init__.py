"""RLHF training with inter-stage and intra-stage fusion: same samples, same update, less idle time.

Importing this package does no work: each submodule brings its own dependencies.
"""

__version__ = "0.1.0"
