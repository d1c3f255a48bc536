"""Scoring calls, and training of complete groups, for workers that are free."""

from dataclasses import dataclass

from rlhfuse.cost import CostModel
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.fleet import Fleet
from rlhfuse.rollout.groups import TRAIN, Groups
from rlhfuse.rollout.policy import Policy
from rlhfuse.rollout.scoring import ScoreBoard, place_call, spread

LEAST_CALLS = 10  # a call is at least so many times its overhead


@dataclass(slots=True)
class Inference:
    """Gives out what the board and the groups have pending."""

    fleet: Fleet
    board: ScoreBoard
    groups: Groups
    cost: CostModel
    policy: Policy

    def advance(self, out: list[ev.Command], fused: bool, num_open: int) -> None:
        """Fused: each free block is given a little at a time. Serial: all at once, evenly; then,
        when all is scored, training."""
        if not fused:
            self._serial(out, num_open)
            return
        while self.fleet.ready.place and (self.board.num_pending or self.groups.pending):
            found = place_call(
                self._waiting_s(), self.fleet.ready, self.cost.swap_s, self.policy.score_ahead
            )
            if found is None:
                return
            self._call(*found, out)

    def _serial(self, out: list[ev.Command], num_open: int) -> None:
        scorers = self.fleet.scorers()
        if self.board.num_pending and scorers:
            for worker, role, ids in spread(self.board, scorers, self.policy.score_token_budget):
                tokens = sum([self.board.tokens[s] for s in ids])
                self._give(worker, role, ids, tokens, out)
        while self.groups.pending and not num_open:
            able = [self.fleet.ready.any(calls) for calls in range(self.policy.score_ahead)]
            found = next((w for w in able if w is not None), None)
            if found is None:
                return
            self._train(found, out)

    def _waiting_s(self) -> dict[str, float]:
        rate = self.cost.score_token_s
        waiting = {
            role: rate[role] * tokens
            for role, tokens in self.board.pending_tokens.items()
            if self.board.pending[role]
        }
        if self.groups.pending:
            waiting[TRAIN] = rate[TRAIN] * self.groups.pending_tokens
        return waiting

    def _call(self, worker: int, role: str, out: list[ev.Command]) -> None:
        if role == TRAIN:
            self._train(worker, out)
        else:
            slowness = max(1.0, self.fleet.workers[worker].slowness)
            ids, tokens = self.board.take(role, self._call_tokens(role) / slowness)
            self._give(worker, role, ids, tokens, out)

    def _call_tokens(self, role: str) -> float:
        """Most tokens for the next call: what is pending is cut so that all scorers can share it
        and finish together, down to where the overhead of a call would weigh."""
        rate = self.cost.score_token_s[role]
        share_s = self.board.pending_s * self.policy.block / (2 * self.fleet.num_alive)
        least_s = LEAST_CALLS * self.cost.score_call_s
        return min(self.policy.score_token_budget, max(share_s, least_s) / max(rate, 1e-12))

    def _give(
        self, worker: int, role: str, ids: tuple[int, ...], tokens: int, out: list[ev.Command]
    ) -> None:
        self._sleep(worker, out)
        seconds = self.cost.score_s(role, tokens)
        self.board.give(worker, role, ids)
        self.fleet.call(worker, role, ids, seconds)
        out.append(ev.Score(worker, role, ids))

    def _train(self, worker: int, out: list[ev.Command]) -> None:
        for member in range(worker, worker + self.policy.block):
            self._sleep(member, out)
        ids, tokens = self.groups.take(worker)
        self.fleet.call(worker, TRAIN, ids, self.cost.score_s(TRAIN, tokens))
        out.append(ev.Train(worker, ids))

    def _sleep(self, worker: int, out: list[ev.Command]) -> None:
        state = self.fleet.workers[worker]
        if self.policy.sleep_when_free and not state.asleep:
            state.asleep = True
            out.append(ev.Sleep(worker))
