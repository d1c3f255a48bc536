"""Who used the processors: this process and what it has started, or somebody else? Linux only."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal: /proc/stat, see proc(5)


@dataclass(frozen=True, slots=True)
class Used:
    """Processor seconds until `at_s`: of the whole machine (what a host took away included), and
    of this process with all its descendants that are alive."""

    at_s: float
    machine_s: float
    ours_s: float

    def others_share(self, since: "Used") -> float:
        """Part of all processors' time since then that was somebody else's."""
        elapsed_s = (self.at_s - since.at_s) * (os.cpu_count() or 1)
        others_s = (self.machine_s - since.machine_s) - (self.ours_s - since.ours_s)
        return max(0.0, others_s / elapsed_s)


def used() -> Used:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    machine_s = sum(int(fields[i]) for i in _BUSY) * _TICK_S
    seconds: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        seconds[int(entry.name)] = (int(stat[11]) + int(stat[12])) * _TICK_S
        children.setdefault(int(stat[1]), []).append(int(entry.name))
    ours_s, family = 0.0, [os.getpid()]
    while family:
        pid = family.pop()
        ours_s += seconds.get(pid, 0.0)
        family += children.get(pid, [])
    return Used(time.monotonic(), machine_s, ours_s)
