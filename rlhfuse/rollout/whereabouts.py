"""Where samples are: on which instance each is generated, and which are on their way to another."""

from collections.abc import Iterable


class Whereabouts:
    """Of the samples that some instance was told to generate and that have not ended."""

    def __init__(self) -> None:
        self._homes: dict[int, int] = {}  # sample -> instance
        self._moving: dict[int, tuple[int, int]] = {}  # sample -> source, destination instance

    def begin(self, sample_id: int, instance: int) -> None:
        """The instance is told to generate the sample, or to go on with it."""
        self._homes[sample_id] = instance

    def move(self, sample_ids: Iterable[int], source: int, destination: int) -> None:
        """The source is told to stop generating these."""
        self._moving.update(dict.fromkeys(sample_ids, (source, destination)))

    def stay(self, sample_id: int) -> None:
        """It had ended before it could leave."""
        self._moving.pop(sample_id, None)

    def end(self, sample_id: int) -> None:
        """Its response is complete."""
        del self._homes[sample_id]

    def leave(self, sample_id: int) -> int:
        """It is on no instance now; the one that it is to go to."""
        _, destination = self._moving.pop(sample_id)
        del self._homes[sample_id]
        return destination

    def lose(self, instance: int) -> set[int]:
        """An instance is gone; the samples that it was generating."""
        for sample_id, (source, _) in list(self._moving.items()):
            if source == instance:
                del self._moving[sample_id]
        lost = {sample_id for sample_id, home in self._homes.items() if home == instance}
        for sample_id in lost:
            del self._homes[sample_id]
        return lost
