"""``rlhfuse schedule``: the best schedule for the pipelines in a problem file."""

import time
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from rlhfuse.cli.common import emit_json, stdout_kept_clean, user_errors
from rlhfuse.cli.schedule_plot import save_plot
from rlhfuse.schedules.formats import schedule_to_json
from rlhfuse.schedules.fused import Progress, fuse
from rlhfuse.schedules.ir import Problem, Schedule
from rlhfuse.schedules.problem_file import read_problem
from rlhfuse.schedules.summary import Summary, standard_policies, summarize
from rlhfuse.schedules.timing import check_channels

POLICIES = ("fused", *(policy.name for policy in standard_policies()))


@click.command()
@click.argument("problem_path", metavar="PROBLEM", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the schedule as JSON.")
@click.option("--memory-cap", type=float, help="Hard bound per rank; overrides the file's.")
@click.option("--budget-s", type=float, help="Search time in seconds (default 5).")
@click.option("--iterations", type=int, help="Search rounds: the same result every time.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--split-weight", is_flag=True, help="Allow I and W in place of B.")
@click.option("--policy", type=click.Choice(POLICIES), default="fused", show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the schedule (PNG or SVG).")
@click.option("--compare", is_flag=True, help="All policies side by side.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def schedule(
    problem_path: Path,
    output: Path | None,
    memory_cap: float | None,
    budget_s: float | None,
    iterations: int | None,
    seed: int,
    split_weight: bool,
    policy: str,
    plot: Path | None,
    compare: bool,
    as_json: bool,
) -> None:
    """Find the best schedule for the pipelines in PROBLEM (YAML or JSON)."""
    with user_errors(), stdout_kept_clean(as_json):
        _check_options(budget_s, iterations, plot)
        problem = read_problem(problem_path)
        if memory_cap is not None:
            problem = replace(problem, memory_cap=memory_cap)
        search = _Search(budget_s, iterations, seed, split_weight, quiet=as_json)
        best, summary = search.run(problem, policy)
        if output is not None:
            output.write_bytes(schedule_to_json(best))
        if plot is not None:
            save_plot(best, plot)
        others = search.compare(problem) if compare else []
    if as_json:
        emit_json(summary)
    else:
        _print_table([(policy, summary), *others])


class _Search:
    """The search options of one call."""

    def __init__(
        self,
        budget_s: float | None,
        iterations: int | None,
        seed: int,
        split_weight: bool,
        *,
        quiet: bool,
    ) -> None:
        self.budget_s = 5.0 if budget_s is None and iterations is None else budget_s
        self.iterations = iterations
        self.seed = seed
        self.split_weight = split_weight
        self.quiet = quiet

    def run(self, problem: Problem, policy: str) -> tuple[Schedule, Summary]:
        """A schedule by the named policy; valid and executable, or a ValueError."""
        start = time.monotonic()
        split = self.split_weight
        if policy == "fused":
            found = self._fuse(problem, split)
        else:
            chosen = next(p for p in standard_policies() if p.name == policy)
            found, split = chosen.make(problem), split or chosen.split
            found.validate()
            check_channels(found)
        seconds = time.monotonic() - start
        return found, summarize(found, split_weight=split, seconds=seconds, problem=problem)

    def compare(self, problem: Problem) -> list[tuple[str, Summary]]:
        """Every other policy; those that cannot keep the cap are left out, with a word."""
        lines = []
        for chosen in standard_policies():
            try:
                lines.append((chosen.name, self.run(problem, chosen.name)[1]))
            except ValueError as error:
                click.echo(f"{chosen.name}: {str(error).splitlines()[0]}", err=True)
        other = not self.split_weight
        start = time.monotonic()
        found = self._fuse(problem, other)
        seconds = time.monotonic() - start
        name = "fused, W split" if other else "fused, F and B"
        lines.append((name, summarize(found, split_weight=other, seconds=seconds)))
        return lines

    def _fuse(self, problem: Problem, split: bool) -> Schedule:
        return fuse(
            problem,
            budget_s=self.budget_s,
            iterations=self.iterations,
            seed=self.seed,
            split_weight=split,
            on_progress=None if self.quiet else _tell,
        )


def _check_options(budget_s: float | None, iterations: int | None, plot: Path | None) -> None:
    if budget_s is not None and not 0 < budget_s < float("inf"):
        raise ValueError(f"--budget-s is {budget_s}, expected a positive number of seconds")
    if iterations is not None and iterations < 0:
        raise ValueError(f"--iterations is {iterations}, expected at least 0")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot is {plot}, expected a name that ends in .png or .svg")


def _tell(progress: Progress) -> None:
    click.echo(
        f"{progress.seconds:6.1f} s  makespan {progress.makespan:g}"
        f"  (lower bound {progress.lower_bound:g})",
        err=True,
    )


def _print_table(lines: list[tuple[str, Summary]]) -> None:
    table = Table("policy", "makespan", "bound", "bubble", "peak memory", "vs serial", "search")
    for name, line in lines:
        table.add_row(
            name,
            f"{line.makespan:.6g}" + (" (optimal)" if line.proven_optimal else ""),
            f"{line.lower_bound:.6g}",
            f"{100 * line.bubble_fraction:.1f} %",
            f"{line.peak_memory:.5g} (>= {line.memory_lower_bound:.4g})",
            f"{line.serial_makespan / line.makespan:.3f}x" if line.makespan else "-",
            f"{line.seconds:.2f} s",
        )
    Console().print(table)
