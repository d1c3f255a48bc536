"""Colours and words of the report, the same for timelines and charts.

Built on Okabe and Ito's palette, which people with any colour vision tell apart. Actor and critic
have a hue each, forward is its light and backward its dark tone.
"""

from dataclasses import dataclass

from rlhfuse.profiler.causes import IDLE, Cause


@dataclass(frozen=True, slots=True)
class Style:
    """How one sort of time is called and painted."""

    label: str
    color: str
    idle: bool = False


CAUSES: dict[Cause, Style] = {
    Cause.GENERATE: Style("generation", "#0072b2"),
    Cause.PREFILL: Style("prefill", "#56b4e9"),
    Cause.SCORE: Style("scoring", "#009e73"),
    Cause.REWARD: Style("reward", "#8fce9f"),
    Cause.ADVANTAGE: Style("advantages", "#b8b08d"),
    Cause.FORWARD: Style("forward", "#f0b73f"),
    Cause.BACKWARD: Style("backward", "#d55e00"),
    Cause.INPUT_GRADIENT: Style("input gradient", "#e07b39"),
    Cause.WEIGHT_GRADIENT: Style("weight gradient", "#a34700"),
    Cause.OPTIMIZER: Style("optimizer", "#5b6770"),
    Cause.COMPUTE: Style("compute", "#4a7fb5"),
    Cause.DP_SYNC: Style("data-parallel sync", "#77806a"),
    Cause.TRANSFER: Style("exposed transfer", "#9aa5ad"),
    Cause.MIGRATE: Style("migration", "#3b3bb3"),
    Cause.WEIGHTS: Style("weight transfer", "#7c8894"),
    Cause.SWAP: Style("model swap", "#a99ab8"),
    Cause.CHECKPOINT: Style("checkpoint", "#8a7f6d"),
    Cause.OTHER: Style("other work", "#b5b5b5"),
    Cause.LONG_TAIL: Style("long tail", "#d1495b"),
    Cause.STAGE_WAIT: Style("stage wait", "#edae49"),
    Cause.WARM_UP: Style("pipeline warm-up", "#00798c"),
    Cause.UPSTREAM: Style("waiting for upstream", "#66a5ad"),
    Cause.DOWNSTREAM: Style("waiting for downstream", "#3d5a80"),
    Cause.STRAGGLER: Style("straggling peer", "#c2562d"),
    Cause.COOL_DOWN: Style("pipeline cool-down", "#8ab6d6"),
    Cause.REWARD_WAIT: Style("waiting for rewards", "#7fb685"),
    Cause.WEIGHT_SYNC: Style("waiting for weights", "#9c89b8"),
    Cause.CHECKPOINT_WAIT: Style("waiting for checkpoint", "#b08968"),
    Cause.HOST_GAP: Style("host gap", "#d9b77e"),
    Cause.CONTROLLER: Style("controller, other", "#6c757d"),
}
CAUSES = {cause: Style(style.label, style.color, cause in IDLE) for cause, style in CAUSES.items()}

_CRITIC: dict[Cause, Style] = {
    Cause.FORWARD: Style("critic forward", "#dfa3c4"),
    Cause.BACKWARD: Style("critic backward", "#a8457f"),
    Cause.INPUT_GRADIENT: Style("critic input gradient", "#bf6a9b"),
    Cause.WEIGHT_GRADIENT: Style("critic weight gradient", "#7a2e5b"),
}


def style_of(cause: Cause, name: str | None) -> Style:
    """How to paint one piece of a lane; `name` of the work done, if any."""
    base = CAUSES[cause]
    if name is None or cause not in _CRITIC:
        return base
    pipeline, colon, _ = name.partition(":")
    if colon and pipeline == "critic":
        return _CRITIC[cause]
    return Style(f"{pipeline} {base.label}", base.color) if pipeline == "actor" else base
