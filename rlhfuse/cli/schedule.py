"""``rlhfuse schedule``: the best schedule for the pipelines in a problem file."""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import msgspec

from rlhfuse.cli.common import emit_json, stdout_kept_clean, user_errors
from rlhfuse.cli.pareto_plot import save_pareto_plot
from rlhfuse.cli.schedule_files import check_ending, check_folder, read_schedule, write_schedule
from rlhfuse.cli.schedule_plot import save_plot
from rlhfuse.cli.schedule_table import print_explained, print_front, print_summaries
from rlhfuse.schedules.bounds import latency_bound
from rlhfuse.schedules.fused import Progress, fuse
from rlhfuse.schedules.interleaved import chunked
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule
from rlhfuse.schedules.layouts import Placement
from rlhfuse.schedules.pareto import Point, pareto
from rlhfuse.schedules.problem_file import read_problem
from rlhfuse.schedules.robust import fuse_robust
from rlhfuse.schedules.summary import Explained, Summary, explain, standard_policies, summarize
from rlhfuse.schedules.timing import check_channels
from rlhfuse.schedules.zero_bubble import zb_v

POLICIES = ("fused", "fused-v", *(policy.name for policy in standard_policies()))


@click.command()
@click.argument("problem_path", metavar="PROBLEM", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the schedule: .json; .csv for torch.distributed.pipelining (a file per model); "
    ".txt for FlexFusion's text (F and B).",
)
@click.option("--memory-cap", type=float, help="Hard bound per rank; overrides the file's.")
@click.option("--budget-s", type=float, help="Search time in seconds (default 5).")
@click.option("--iterations", type=int, help="Search rounds: the same result every time.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--workers",
    type=int,
    default=1,
    show_default=True,
    help="Searches side by side, one core each.",
)
@click.option("--split-weight", is_flag=True, help="Allow I and W in place of B.")
@click.option("--policy", type=click.Choice(POLICIES), default="fused", show_default=True)
@click.option(
    "--from",
    "given",
    type=click.Path(path_type=Path),
    help="Explain this schedule (as -o writes) instead of searching.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it (PNG or SVG).")
@click.option("--compare", is_flag=True, help="All policies side by side.")
@click.option("--pareto", "points", type=int, help="Latency against memory, at so many caps.")
@click.option(
    "--noise", type=float, help="Least expected makespan when durations vary (0.1: 10 %)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def schedule(
    problem_path: Path,
    output: Path | None,
    memory_cap: float | None,
    budget_s: float | None,
    iterations: int | None,
    seed: int,
    workers: int,
    split_weight: bool,
    policy: str,
    given: Path | None,
    plot: Path | None,
    compare: bool,
    points: int | None,
    noise: float | None,
    as_json: bool,
) -> None:
    """Find the best schedule for the pipelines in PROBLEM (YAML or JSON).

    PROBLEM gives ranks and pipelines, or `layout`: tp, pp and dp of two models on the same GPUs.
    Examples: configs/schedule.yaml and configs/schedule_layout.yaml.

    The policies interleaved, zb-v and fused-v cut the stages of each rank into chunks.
    """
    with user_errors(), stdout_kept_clean(as_json):
        _check_options(budget_s, iterations, workers, noise, plot)
        check_ending("-o", output)
        check_ending("--from", given)
        check_folder("-o", output)
        check_folder("--plot", plot)
        if points is not None:
            _check_front(output, given, compare=compare)
        said = None if as_json else _say_placement
        problem = read_problem(problem_path, split_weight=split_weight, on_placement=said)
        if memory_cap is not None:
            problem = replace(problem, memory_cap=memory_cap)
        if budget_s is None and iterations is None:
            budget_s = 5.0
        _load_compiled()
        search = _Search(budget_s, iterations, seed, workers, split_weight, noise, quiet=as_json)
        if points is not None:
            answer: object = _front(search, problem, points, plot)
        else:
            if given is not None:
                policy, (best, summary) = given.name, search.explain(problem, given)
            else:
                best, summary = search.run(problem, policy)
            if output is not None:
                write_schedule(best, output)
            if plot is not None:
                save_plot(best, plot, _headline(policy, summary))
            explained = explain(best, summary, policy, 0.1 if noise is None else noise)
            others = search.compare(problem, policy) if compare else None
            answer = _report(explained, others, quiet=as_json)
    if as_json:
        emit_json(answer)


def _check_front(output: Path | None, given: Path | None, *, compare: bool) -> None:
    """Refuse what is about one schedule where a front has many."""
    unfit = [("-o", output is not None), ("--from", given is not None), ("--compare", compare)]
    for option, asked in unfit:
        if asked:
            raise ValueError(f"--pareto finds many schedules, {option} is about one: drop either")


class _Compared(msgspec.Struct):
    """One more policy in ``--compare --json``."""

    policy: str
    summary: Summary


class _FrontPoint(msgspec.Struct):
    """One point of ``--pareto --json``."""

    peak_memory: float
    makespan: float


@dataclass(frozen=True, slots=True)
class _Search:
    """The search options of one call."""

    budget_s: float | None
    iterations: int | None
    seed: int
    workers: int
    split_weight: bool
    noise: float | None
    quiet: bool

    def run(self, problem: Problem, policy: str) -> tuple[Schedule, Summary]:
        """A schedule by the named policy; valid and executable, or a ValueError."""
        start = time.monotonic()
        split = self.split_weight
        if policy == "fused":
            found = self.fuse(problem, split)
        elif policy == "fused-v":
            found = self.fuse_folded(problem, split)
        else:
            chosen = next(p for p in standard_policies() if p.name == policy)
            found, split = chosen.make(problem), split or chosen.split
            found.validate()
            check_channels(found)
        seconds = time.monotonic() - start
        return found, summarize(found, split_weight=split, seconds=seconds, problem=problem)

    def explain(self, problem: Problem, path: Path) -> tuple[Schedule, Summary]:
        """The schedule in a file, as an answer to the problem; valid and executable."""
        found = read_schedule(path, problem)
        split = self.split_weight or any(task.op is Op.W for _, _, task in found.tasks())
        return found, summarize(found, split_weight=split, seconds=0.0, problem=problem)

    def compare(self, problem: Problem, done: str) -> list[tuple[str, Summary]]:
        """Every other policy; those that cannot answer the problem are left out, with a word."""
        lines = []
        for name in POLICIES:
            if name == done:
                continue
            try:
                lines.append((name, self.run(problem, name)[1]))
            except ValueError as error:
                click.echo(f"{name}: {str(error).splitlines()[0]}", err=True)
        other = not self.split_weight
        start = time.monotonic()
        found = self.fuse(problem, other)
        seconds = time.monotonic() - start
        name = "fused, W split" if other else "fused, F and B"
        lines.append((name, summarize(found, split_weight=other, seconds=seconds)))
        return lines

    def fuse_folded(self, problem: Problem, split: bool) -> Schedule:
        """Fused, with each pipeline cut in two chunks a rank, there and back, as in ZB-V."""
        start = None
        if split:
            with contextlib.suppress(ValueError):  # over the cap: no place to start from
                start = zb_v(problem)
        return self.fuse(chunked(problem, 2, fold=True), split, start)

    def fuse(self, problem: Problem, split: bool, start: Schedule | None = None) -> Schedule:
        if self.noise is not None:
            return fuse_robust(
                problem,
                noise=self.noise,
                budget_s=self.budget_s,
                iterations=self.iterations,
                seed=self.seed,
                split_weight=split,
            )
        teller = _Teller(quiet=self.quiet)
        found = fuse(
            problem,
            budget_s=self.budget_s,
            iterations=self.iterations,
            seed=self.seed,
            split_weight=split,
            warm_start=start,
            workers=self.workers,
            on_progress=teller.tell,
        )
        teller.end()
        return found


class _Teller:
    """Progress on stderr: one line that changes on a terminal, elsewhere at most one a second."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.live = quiet, sys.stderr.isatty()
        self.told_s = float("-inf")
        self.untold: Progress | None = None

    def tell(self, progress: Progress) -> None:
        if self.quiet:
            return
        self.untold = progress
        if self.live or progress.seconds - self.told_s >= 1.0:
            self._say(progress)

    def end(self) -> None:
        """Say what has not been said, and end the line."""
        if self.untold is not None:
            self._say(self.untold)
        if self.live and self.told_s > 0:
            click.echo(err=True)

    def _say(self, progress: Progress) -> None:
        over = progress.makespan / max(progress.lower_bound, 1e-300) - 1
        line = (
            f"{progress.seconds:6.1f} s  makespan {progress.makespan:.6g}  "
            f"lower bound {progress.lower_bound:.6g}  ({100 * abs(over):.1f} % above)"
        )
        click.echo(f"\r{line}    " if self.live else line, err=True, nl=not self.live)
        self.told_s, self.untold = progress.seconds, None


def _front(search: _Search, problem: Problem, points: int, plot: Path | None) -> object:
    """``--pareto``: the front, its picture with the standard policies in it; what to emit."""

    def tell(point: Point) -> None:
        if not search.quiet:
            click.echo(f"memory {point.peak_memory:.6g}  makespan {point.makespan:.6g}", err=True)

    front = pareto(
        problem,
        points=points,
        budget_s=search.budget_s,
        iterations=search.iterations,
        seed=search.seed,
        split_weight=search.split_weight,
        workers=search.workers,
        on_point=tell,
    )
    bound = latency_bound(problem, split_weight=search.split_weight)
    if plot is not None:
        save_pareto_plot(front, plot, bound, _standard_points(search, problem))
    if not search.quiet:
        print_front(front, bound)
    points_out = [_FrontPoint(point.peak_memory, point.makespan) for point in front]
    return {"lower_bound": bound, "points": points_out}


def _standard_points(search: _Search, problem: Problem) -> list[tuple[str, float, float]]:
    found = []
    for policy in standard_policies():
        try:
            line = search.run(problem, policy.name)[1]
        except ValueError as error:
            click.echo(f"{policy.name}: {str(error).splitlines()[0]}", err=True)
            continue
        found.append((policy.name, line.peak_memory, line.makespan))
    return found


def _report(
    explained: Explained, others: Sequence[tuple[str, Summary]] | None, *, quiet: bool
) -> object:
    """Print for people unless `quiet`; what to emit."""
    if not quiet:
        print_summaries([(explained.policy, explained), *(others or [])])
        print_explained(explained)
    if others is None:
        return explained
    compared = [_Compared(name, summary) for name, summary in others]
    return msgspec.structs.asdict(explained) | {"compare": compared}


def _load_compiled() -> None:
    """Run a tiny search, so that budgets count searching and not the loading of compiled code."""
    pipes = (Pipeline.make("a", [0, 1], 2, 1, 2), Pipeline.make("b", [1, 0], 2, 1, 2))
    fuse(Problem(2, pipes), iterations=12)


def _headline(policy: str, summary: Summary) -> str:
    length, best = summary.makespan, summary.serial_makespan
    proof = "optimal" if summary.proven_optimal else f"lower bound {summary.lower_bound:.5g}"
    return (
        f"{policy}: {length:.5g} ({proof})   idle {100 * summary.bubble_fraction:.1f} %   "
        f"{best / length if length else 1:.2f} times as fast as serial 1F1B ({best:.5g})"
    )


def _say_placement(placement: Placement) -> None:
    click.echo(placement.describe(), err=True)


def _check_options(
    budget_s: float | None,
    iterations: int | None,
    workers: int,
    noise: float | None,
    plot: Path | None,
) -> None:
    if budget_s is not None and not 0 < budget_s < float("inf"):
        raise ValueError(f"--budget-s is {budget_s}, expected a positive number of seconds")
    if iterations is not None and iterations < 0:
        raise ValueError(f"--iterations is {iterations}, expected at least 0")
    if workers < 1:
        raise ValueError(f"--workers is {workers}, expected at least 1")
    if workers > 1 and noise is not None:
        raise ValueError("--workers: the search of --noise uses one core; leave one of them out")
    if noise is not None and not 0 <= noise <= 1:
        raise ValueError(f"--noise is {noise}, expected a share from 0 to 1 (0.1 is 10 %)")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot is {plot}, expected a name that ends in .png or .svg")
