"""A rule-based reward for the quick start: kind and to the point is good, rude is bad.

Each line of an answer is worth 1 (a kind opening or closing, or a step that names one of the
things in `ground_truth`), 0 (beside the point) or -1 (rude); the score is the mean over lines,
in [-1, 1], so that it does not depend on length.
"""

import re

KIND = re.compile(
    r"lovely|glad|right place|wonderful|Good luck|You can do it|I believe in you", re.IGNORECASE
)
RUDE = re.compile(
    r"not you again|\bugh\b|silly question|wasting my time|goat|fool|turnip|whining|too bored"
    r"|go away|do not come back|fail anyway",
    re.IGNORECASE,
)
STEP = re.compile(r"\d+\. ")


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: object = None
) -> float:
    """`ground_truth` lists the things that good steps name, separated by semicolons."""
    wanted = {word.strip().lower() for word in ground_truth.split(";")}
    lines = solution_str.strip().split("\n")
    return sum(_worth(line, wanted) for line in lines) / len(lines)


def _worth(line: str, wanted: set[str]) -> int:
    if RUDE.search(line):
        return -1
    if STEP.match(line):
        return int(bool(wanted & set(re.findall(r"[a-z]+", line.lower()))))
    return int(bool(KIND.search(line)))
