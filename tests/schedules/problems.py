"""Random small problems with everything that the schedule language can say."""

from hypothesis import strategies as st

from rlhfuse.schedules.bounds import memory_bound
from rlhfuse.schedules.ir import Pipeline, Problem


@st.composite
def problems(draw: st.DrawFn, caps: bool = True) -> Problem:
    """One to four pipelines on one to four ranks, with any stage map, links, releases and caps."""
    num_ranks: int = draw(st.integers(1, 4))
    number: int = draw(st.integers(1, 4))
    names = ("actor", "critic", "reward", "reference")[:number]
    pipelines = tuple(draw(_pipelines(name, num_ranks)) for name in names)
    loose = Problem(num_ranks, pipelines)
    least = memory_bound(loose, float("inf"))
    cap: float | None = draw(st.sampled_from([None, 1.0, 1.5, 2.0]))
    if not (least and caps):
        cap = None
    pairs = [(a, b) for a in range(num_ranks) for b in range(a)]
    links: float | dict[tuple[int, int], float] = draw(st.sampled_from([0.0, 0.5]))
    each = draw(st.booleans())
    if pairs and each:
        links = {pair: draw(st.sampled_from([0.0, 0.25, 3.0])) for pair in pairs}
    return Problem(num_ranks, pipelines, None if cap is None else cap * least, links)


@st.composite
def _pipelines(draw: st.DrawFn, name: str, num_ranks: int) -> Pipeline:
    home = list(draw(st.permutations(range(num_ranks))))[: draw(st.integers(1, num_ranks))]
    shape = draw(st.sampled_from(["once", "once", "fold", "loop"]))
    stages = {"once": home, "fold": home + home[::-1], "loop": home * 2}[shape]
    m = draw(st.integers(1, 5))
    forward_only = name in ("reward", "reference") and draw(st.booleans())
    times = st.sampled_from([0.25, 1.0, 2.0, 3.7])
    backward = [0.0 if forward_only else 2 * draw(times) for _ in stages]
    activation = [draw(st.sampled_from([0.0, 1.0, 1.5])) for _ in stages]
    share, kept = draw(st.sampled_from([0.0, 0.3, 0.5])), draw(st.sampled_from([0.0, 0.5, 1.0]))
    return Pipeline.make(
        name,
        stages,
        m,
        [draw(st.sampled_from([0.0, 1.0, 2.0, 5.3])) for _ in stages],
        backward,
        weight=[b * share for b in backward],
        activation=activation,
        activation_after_input=[a * kept for a in activation],
        microbatch_weights=[draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(m)],
        release=draw(st.sampled_from([0.0, 3.0])),
        interleaved=shape != "once",
    )
