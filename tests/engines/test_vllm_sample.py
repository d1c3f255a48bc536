"""Which exactness is possible, and which is the default."""

import pytest
import torch

from rlhfuse.config import VllmConfig
from rlhfuse.engines.vllm_sample import exactness

OBSTACLES = {
    "the weights are torch.bfloat16": (torch.bfloat16, VllmConfig()),
    "speculative decoding is on": (torch.float32, VllmConfig(speculative_config={"method": "x"})),
    "rollout.vllm.position_keyed is off": (torch.float32, VllmConfig(position_keyed="off")),
}


@pytest.mark.parametrize("why", OBSTACLES)
def test_tokens_are_exact_by_default_wherever_they_can_be(why: str) -> None:
    assert exactness(None, torch.float32, VllmConfig())
    assert not exactness(False, torch.float32, VllmConfig())
    dtype, options = OBSTACLES[why]
    assert not exactness(None, dtype, options)
    assert not exactness(False, dtype, options)
    with pytest.raises(ValueError, match=f"token is not possible, {why}; choose distribution"):
        exactness(True, dtype, options)
