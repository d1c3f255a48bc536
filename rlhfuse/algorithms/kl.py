"""The KL coefficient: fixed, or adapted towards a target. Plain numbers, no tensors."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class KlControl:
    """State of the KL coefficient. `target` None keeps it fixed.

    `horizon` is in samples, as in Ziegler et al., arXiv 1909.08593, section 2.2.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000


def next_control(control: KlControl, *, kl: float, num_samples: int) -> KlControl:
    """The state after a step that saw mean KL `kl` over `num_samples` samples.

    coef grows by (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon).
    """
    if control.target is None:
        return control
    error = max(-0.2, min(0.2, kl / control.target - 1.0))
    return replace(control, coef=control.coef * (1.0 + error * num_samples / control.horizon))
