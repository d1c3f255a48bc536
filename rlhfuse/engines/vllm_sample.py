"""A sample as the vLLM engine keeps it, and what follows from its parameters. Pure."""

from dataclasses import dataclass, field

import numpy as np
import torch

from rlhfuse.config import VllmConfig
from rlhfuse.engines.base import Request, TokenIds


@dataclass(slots=True)
class VllmSample:
    """A sample in the engine: its tokens so far, and what was drawn here."""

    request: Request
    tokens: list[int]  # of the response
    logprobs: list[float] = field(default_factory=list)
    request_id: str = ""  # of the request that vLLM runs for it
    cache: bytes = b""  # that it came with, until its first token here

    @property
    def prefix(self) -> TokenIds:
        return np.concatenate([self.request.prompt, np.array(self.tokens, dtype=np.int32)])

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)


def exactness(exact: bool | None, dtype: torch.dtype, options: VllmConfig) -> bool:
    """Whether near ties are decided canonically; None asks for it where it is possible. Raises
    ValueError where it is asked for and not possible."""
    obstacles = {
        f"the weights are {dtype}": dtype != torch.float32,
        "speculative decoding is on": options.speculative_config is not None,
        "rollout.vllm.position_keyed is off": options.position_keyed == "off",
    }
    why = ", ".join(text for text, there in obstacles.items() if there)
    if exact and why:
        raise ValueError(f"rollout.exactness: token is not possible, {why}; choose distribution")
    return not why if exact is None else exact


def finish_reason(sample: VllmSample) -> str:
    """Why its last token ends it ("stop" or "length"), or an empty string."""
    params = sample.request.params
    if sample.tokens[-1] in params.stop_token_ids:
        return "stop"
    return "length" if len(sample.tokens) >= params.max_tokens else ""
