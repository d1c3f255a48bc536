"""Tabu search again and again: from fresh list schedules and from the best, kicked, in turn."""

import numpy as np

from rlhfuse.schedules.compiled import Coded, Floats, Ints, Rows, draw
from rlhfuse.schedules.dispatch import Desk, Policy
from rlhfuse.schedules.local import anneal
from rlhfuse.schedules.paths import Bench
from rlhfuse.schedules.search import Ground, climbs, make_elite
from rlhfuse.schedules.tabu import descend, make_tabu

STARTS = 2  # rounds of climbs before a descent from fresh list schedules
KICK = (1.0, 2.5)  # temperature of a kick, in mean task durations; one move a task
PATIENCE = 30  # moves a task of a descent that bring nothing
LONGER = 4  # times that, for a fresh descent that is level with the best
NOISE = 0.015  # in mean task durations: breaks ties


class Descents:
    """Descents by tabu search (see `tabu`), each until it brings nothing for a while.

    One starts from the best of a few list schedules, the next from the best rows of the search,
    kicked by some hot moves (iterated local search, Lourenco, Martin and Stuetzle 2003). Works on
    the arrays of a `Search`, between its other rounds.
    """

    def __init__(
        self,
        coded: Coded,
        ground: Ground,
        desk: Desk,
        policy: Policy,
        bench: Bench,
        late: Floats,
        state: Ints,
    ) -> None:
        self._coded, self._ground, self._desk, self._policy = coded, ground, desk, policy
        self._bench, self._late, self._state = bench, late, state
        self._elite, self._tabu = make_elite(desk), make_tabu()
        self._rows = Rows(desk.tasks.copy(), desk.row_first)  # where the descent stands
        self._fresh, self._climbs = True, 0
        self._lowest, self._stale = np.inf, 0

    def restart(self, *, fresh: bool = True) -> None:
        """Begin another descent."""
        self._fresh, self._climbs = fresh, 0
        self._elite.length[0] = np.inf

    def round(self, best: float, base: Ints | None, count: int, moves: int) -> Ints | None:
        """`count` climbs or some `moves`; the tasks of something below `best`, if found.

        `base` are the tasks of the best, if they may be kicked.
        """
        if self._climbs < STARTS:
            if self._fresh or base is None:
                self._climb(count)
                return None
            self._climbs = STARTS
            found = self._kick(base)
        else:
            found = self._descend(moves)
            patience = PATIENCE * self._rows.tasks.shape[0]
            if self._fresh and self._lowest <= best:
                patience *= LONGER
            if self._stale >= patience:
                self.restart(fresh=not self._fresh)
        return self._bench.best.copy() if found < best else None

    def _climb(self, count: int) -> None:
        climbs(self._coded, self._ground, self._desk, self._policy, self._elite, count, self._state)
        self._lowest, self._stale = float(self._elite.length[0]), 0
        if self._lowest < np.inf:  # else nothing fitted: try again
            self._climbs += 1
            self._rows.tasks[:] = self._elite.tasks

    def _kick(self, base: Ints) -> float:
        """Move hotly from `base`; the best makespan on the way."""
        self._rows.tasks[:] = base
        self._lowest, self._stale = np.inf, 0
        hot = self._ground.unit * KICK[0] * (KICK[1] / KICK[0]) ** draw(self._state)
        cap, target, moves = self._policy.cap, self._ground.target, base.shape[0]
        return float(
            anneal(
                self._rows,
                self._coded,
                self._bench,
                self._late,
                cap,
                target,
                np.inf,
                hot,
                hot,
                moves,
                self._state,
            )
        )

    def _descend(self, moves: int) -> float:
        """Some moves; the makespan if it is the lowest of this descent, else infinite."""
        found = descend(
            self._rows,
            self._coded,
            self._bench,
            self._late,
            self._policy.cap,
            self._ground.target,
            self._lowest,
            NOISE * self._ground.unit,
            moves,
            self._tabu,
            self._state,
        )
        if found >= self._lowest:
            self._stale += moves
            return np.inf
        self._lowest, self._stale = float(found), 0
        return self._lowest
