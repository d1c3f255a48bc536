"""Two pipelines in opposite directions on the same ranks: Chimera's and DualPipe's rules.

Both papers run one model against a copy of itself, and pay with its weights twice. Here the two
directions are two models (actor and critic), so nothing is held twice.
"""

from collections.abc import Iterator

from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule, Task
from rlhfuse.schedules.standard import checked

MOST_UNREAD = 2  # messages that may wait for a receiver, so that the channel check passes


def chimera(problem: Problem) -> Schedule:
    """Chimera (arXiv 2107.06925): pipelines merged slot by slot, as if F and B were equally long;
    of two tasks that want one slot, backwards go first, then what is further along.

    A pipeline has at most p/2 micro-batches in flight, as in the paper's basic unit (two equal
    models, m = p/2 each, p even), and goes on in the same way after it. Where F = B the bubble is
    (p/2-1)(F+B) for every multiple of the unit; where B = 2F it is 2(p-2)F for one unit, and units
    joined have more between them, as the paper says. Ranks hold p/2+1 to p micro-batches.
    Any number of pipelines and any maps.

    Raises:
        ValueError: more memory than the cap.
    """
    ranks: list[list[Task]] = [[] for _ in range(problem.num_ranks)]
    flows = [_Flow(pipe) for pipe in problem.pipelines]
    left = sum(len(flow.pipe.stages) * flow.per_stage for flow in flows)
    while left:
        chosen = [_most_urgent(flows, rank) for rank in range(problem.num_ranks)]
        for rank, task in enumerate(chosen):
            if task is not None:
                ranks[rank].append(task)
                next(flow for flow in flows if flow.pipe.name == task.pipeline).run(task)
                left -= 1
        assert any(chosen), "a slot in which nothing can run"
    return checked(Schedule(problem, tuple(tuple(row) for row in ranks)), "Chimera")


class _Flow:
    """How far one pipeline is: per stage, the next micro-batch of F and of B."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        self.per_stage = pipe.num_microbatches * (1 if pipe.forward_only else 2)
        self.next_f = [0] * pipe.num_stages
        self.next_b = [0] * pipe.num_stages

    def run(self, task: Task) -> None:
        (self.next_f if task.op is Op.F else self.next_b)[task.pp_stage] += 1

    def ready(self, stage: int) -> Iterator[tuple[tuple[int, int, int], Task]]:
        """What the stage could run now, with its rank in urgency."""
        last, name = self.pipe.num_stages - 1, self.pipe.name
        mb = self.next_b[stage]
        behind = self.next_f[stage] if stage == last else self.next_b[stage + 1]
        unread = 0 if stage == 0 else mb - self.next_b[stage - 1]
        if not self.pipe.forward_only and mb < behind and unread < MOST_UNREAD:
            yield (0, stage, mb), Task(name, Op.B, stage, mb)
        mb = self.next_f[stage]
        come = self.pipe.num_microbatches if stage == 0 else self.next_f[stage - 1]
        limit = min((last + 2) // 2, last + 1 - stage)
        held = 0 if self.pipe.forward_only else mb - self.next_b[stage]
        unread = 0 if stage == last else mb - self.next_f[stage + 1]
        if mb < come and held < limit and unread < MOST_UNREAD:
            yield (1, last - stage, mb), Task(name, Op.F, stage, mb)


def _most_urgent(flows: list[_Flow], rank: int) -> Task | None:
    ready = (
        option
        for flow in flows
        for stage, home in enumerate(flow.pipe.stages)
        if home == rank
        for option in flow.ready(stage)
    )
    return min(ready, default=(None, None), key=lambda option: option[0])[1]


def dualpipe(problem: Problem) -> Schedule:
    """DualPipe (DeepSeek-V3, arXiv 2412.19437) of two models with equally many micro-batches.

    Its eight phases, with a forward and a backward of the two directions next to each other where
    the original computes them at the same time. Bubble (p/2-1)(F + 2B - 3W), B the full backward;
    at most p + 1 micro-batches' activations on a rank. m >= p for each model, p even.

    Raises:
        ValueError: not two such models, or more memory than the cap.
    """
    down, up = _opposite_pair(problem)
    rows: list[tuple[Task, ...]] = [()] * problem.num_ranks
    for position, rank in enumerate(down.stages):
        rows[rank] = tuple(_DualRank(down, up, position).phases())
    return checked(Schedule(problem, tuple(rows)), "DualPipe")


def _opposite_pair(problem: Problem) -> tuple[Pipeline, Pipeline]:
    pipes = problem.pipelines
    if len(pipes) != 2 or any(pipe.forward_only for pipe in pipes):
        raise ValueError("DualPipe runs two trained pipelines, no more and no fewer")
    down, up = pipes
    p, m = down.num_stages, down.num_microbatches
    if up.stages != down.stages[::-1] or len(set(down.stages)) < p:
        raise ValueError(
            f"DualPipe: the stages of {up.name!r} must be those of {down.name!r} reversed, one on "
            "each rank"
        )
    if p % 2 or up.num_microbatches != m or m < p:
        raise ValueError(
            f"DualPipe needs an even number of ranks (here {p}) and for both models the same "
            f"number of micro-batches, at least as many as ranks (here {m} and "
            f"{up.num_microbatches})"
        )
    return down, up


class _DualRank:
    """One rank of DualPipe: `near` is the model whose first stage is closer, `far` the other."""

    def __init__(self, down: Pipeline, up: Pipeline, position: int) -> None:
        p = down.num_stages
        self.half, self.depth = p // 2, min(position, p - 1 - position)
        self.p, self.m = p, down.num_microbatches
        self.near, self.far = (down, up) if position < self.half else (up, down)
        self.stage = {self.near.name: self.depth, self.far.name: p - 1 - self.depth}
        self.count: dict[tuple[str, bool], int] = {}
        self.waiting: list[Task] = []  # weight gradients, oldest first

    def _next(self, pipe: Pipeline, op: Op) -> Task:
        key = (pipe.name, op is Op.F)
        mb = self.count.get(key, 0)
        self.count[key] = mb + 1
        return Task(pipe.name, op, self.stage[pipe.name], mb)

    def forward(self, pipe: Pipeline) -> Iterator[Task]:
        yield self._next(pipe, Op.F)

    def backward(self, pipe: Pipeline, split: bool = False) -> Iterator[Task]:
        if split and any(pipe.weight):
            task = self._next(pipe, Op.I)
            self.waiting.append(Task(pipe.name, Op.W, task.pp_stage, task.microbatch))
            yield task
        else:
            yield self._next(pipe, Op.B)

    def weight(self) -> Iterator[Task]:
        if self.waiting:
            yield self.waiting.pop(0)

    def phases(self) -> Iterator[Task]:
        near, far = self.near, self.far
        outward = self.half - 1 - self.depth  # ranks between this one and the middle
        for _ in range(2 * outward):  # 1: fill with the near model
            yield from self.forward(near)
        for _ in range(self.depth + 1):  # 2: both models forward
            yield from self.forward(near)
            yield from self.forward(far)
        for _ in range(outward):  # 3: the far model turns round
            yield from self.backward(far, split=True)
            yield from self.weight()
            yield from self.forward(far)
        for _ in range(self.m - self.p + self.depth + 1):  # 4: steady
            yield from self.forward(near)
            yield from self.backward(far)
            yield from self.forward(far)
            yield from self.backward(near)
        for _ in range(outward):  # 5: the last forwards
            yield from self.backward(far)
            yield from self.forward(far)
            yield from self.backward(near)
        yield from self._drain()

    def _drain(self) -> Iterator[Task]:
        """Phases 6 to 8: backwards, the second half split, and what weights are left."""
        outward, turns = self.half - 1 - self.depth, self.depth + 1
        for turn in range(turns):
            odd = self.depth % 2 == 1
            late = turn > turns // 2 or (turn == turns // 2 and odd)
            yield from self.backward(self.far, split=late)
            yield from self.backward(self.near, split=late or turn == turns // 2)
        for _ in range(outward):
            yield from self.weight()
            yield from self.backward(self.near, split=True)
        while self.waiting:
            yield from self.weight()
