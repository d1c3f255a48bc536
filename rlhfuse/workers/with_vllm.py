"""For the process that workers are forked from: to import this is to import vLLM, so that a machine
pays for it once, and an instance that is started again not at all. Nothing else imports it."""

import contextlib

from rlhfuse.engines import vllm_setup

with contextlib.suppress(Exception):  # the worker that needs it meets the same, and tells
    vllm_setup.prepare()
    import rlhfuse.engines.vllm_engine  # noqa: F401
