"""The laws of `tests/megatron` under several releases of megatron-core.

    python -m bench.bench_megatron_versions 0.16.1 0.16.0 0.15.3 [--tests tests/megatron]

Each release is installed without its dependencies into a temporary folder, in front of the one that
is there; everything else is the same. Writes megatron_versions. Tests that need what a release has
not skip themselves.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from bench.record import Row, print_table, write_result

ROOT = Path(__file__).resolve().parents[1]


def tried(version: str, tests: Sequence[str], folder: Path) -> Row:
    """How many tests pass under one release, and which do not."""
    subprocess.run(
        [*_PIP, "--no-deps", "--target", str(folder), f"megatron-core=={version}"], check=True
    )
    report = folder / "report.xml"
    path = os.pathsep.join([str(folder), str(ROOT)])
    began_s = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        check=False,  # what failed stands in the report
    )
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case.get("name", "") for case in cases if _has(case, "failure", "error")]
    skipped = [case for case in cases if _has(case, "skipped")]
    return {
        "megatron": version,
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": len(failed),
        "seconds": time.monotonic() - began_s,
        "names": ", ".join(failed),
    }


def _has(case: ElementTree.Element, *kinds: str) -> bool:
    return any(case.find(kind) is not None for kind in kinds)


_PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--tests", nargs="+", default=["tests/megatron"])
    asked = parser.parse_args(arguments)
    rows = []
    for version in asked.versions:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(tried(version, asked.tests, Path(folder)))
    print_table(rows)
    write_result("megatron_versions", rows)


if __name__ == "__main__":
    main()
