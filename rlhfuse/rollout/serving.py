"""Which process serves as each instance, as the scheduler knows it."""

from rlhfuse.rollout.workers import Workers


class Serving:
    """Instances whose process the scheduler has been told of; a process that takes a dead one's
    place is another, which has nothing of what the first one held."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._known: dict[int, tuple[str, str]] = {}  # instance -> process, payload endpoint

    def __contains__(self, instance: int) -> bool:
        return instance in self._known

    @property
    def instances(self) -> list[int]:
        return sorted(self._known)

    def holder(self, instance: int) -> str:
        """Endpoint of the process that the scheduler knows as `instance`."""
        return self._known[instance][1]

    def in_place(self, instance: int) -> bool:
        """Whether a command for `instance` would reach the process that the scheduler means."""
        return instance in self._known and self.holder(instance) == self._endpoint(instance)

    def take_absent(self) -> list[int]:
        """At the start of a batch, know those who serve; the instances that do not."""
        self.take_joined()
        return [i for i in range(len(self._workers.rollout)) if i not in self._known]

    def take_gone(self) -> dict[int, str]:
        """Forget the instances whose process is gone; their endpoints."""
        now = self._workers.serving()
        gone = [i for i, (process, _) in self._known.items() if now.get(i) != process]
        return {instance: self._known.pop(instance)[1] for instance in gone}

    def take_joined(self) -> list[int]:
        """Know the instances that have begun to serve; which they are."""
        joined = {i: p for i, p in self._workers.serving().items() if i not in self._known}
        self._known.update({i: (p, self._endpoint(i)) for i, p in joined.items()})
        return list(joined)

    def _endpoint(self, instance: int) -> str:
        return self._workers.endpoint(self._workers.rollout[instance])
