"""How long until the first step has been made, and what does the controller itself cost?

    python -m bench.bench_start configs/quickstart.yaml --repeats 3 [--set-up]

`imports` is from starting the command to a checked configuration, `workers` from there to workers
that are ready with their models, then the first step (which learns what things cost) and the
median of the others. The controller costs processor time (as a share of the step's wall time), and
devices wait for it where nobody recorded anything. With `--set-up`, also a new virtual environment
with everything installed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.record import Row, print_table, write_result

STEPS = 4
ROOT = Path(__file__).resolve().parents[1]


def start(config: str, overrides: list[str], folder: Path) -> dict[str, float]:
    """One short run, as a user starts it."""
    command = [sys.executable, "-m", "rlhfuse.cli.main", "train", config, *overrides, "--json"]
    settings = {
        "trainer.default_local_dir": folder,
        "trainer.total_training_steps": STEPS,
        "trainer.val_before_train": "false",
        "trainer.test_freq": 0,
        "fusion.audit_every": 0,
    }
    began_s = time.monotonic()
    done = subprocess.run(
        [*command, *(f"{key}={value}" for key, value in settings.items())],
        check=True,
        capture_output=True,
        text=True,
    )
    whole_s = time.monotonic() - began_s
    summary = json.loads(done.stdout)
    lines = (Path(summary["run"]) / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "timing_s/step" in row]
    later = [row["timing_s/step"] for row in steps[1:]]
    return {
        "imports_s": whole_s - summary["seconds"],
        "workers_s": summary["start_s"],
        "first_step_s": steps[0]["timing_s/step"],
        "later_step_s": statistics.median(later),
        "controller_cpu_share": _median(steps[1:], "perf/controller_share"),
        "devices_wait_for_controller": statistics.median(
            row["bubble/controller"] / row["perf/device_s"] for row in steps[1:]
        ),
    }


def _median(steps: list[dict[str, float]], name: str) -> float:
    return statistics.median(row[name] for row in steps)


def set_up(folder: Path) -> float:
    """Seconds to make a virtual environment with everything `make run` installs."""
    began_s = time.monotonic()
    subprocess.run(
        ["make", "setup", f"PYTHON={sys.executable}", f"VENV={folder / 'venv'}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return time.monotonic() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set-up", action="store_true")
    asked = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [start(asked.config, asked.overrides, folder / str(i)) for i in range(asked.repeats)]
        values = {key: [run[key] for run in runs] for key in runs[0]}
        if asked.set_up:
            values = {"set_up_s": [set_up(folder)], **values}
    for key, seen in values.items():
        rows.append(
            {
                "what": key,
                "median": statistics.median(seen),
                "least": min(seen),
                "greatest": max(seen),
            }
        )
    print_table(rows)
    print(write_result("bench_start", rows))


if __name__ == "__main__":
    main()
