"""What the tests of kernels measure by."""

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton 3.6's interpreter multiplies bf16 matrices as the integers that hold them.
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the error over the norm of the float64 `truth`; nothing may be NaN."""
    assert not found.isnan().any()
    return float((found.detach().cpu().double() - truth).norm() / truth.norm().clamp_min(1e-30))
