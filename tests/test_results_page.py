"""The page of results says what the files say."""

import json
from pathlib import Path

from bench.results_page import PAGE, RESULTS, page


def test_the_page_shows_every_result_as_it_is() -> None:
    assert PAGE.read_text() == page(RESULTS), "run: python -m bench.results_page"


def test_every_command_is_one_that_anybody_can_run() -> None:
    records = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    commands = [str(record["command"]) for record in records if "command" in record]
    assert all(command.startswith(("python ", "bash ")) for command in commands), commands
    assert not [command for command in commands if " /" in command or "=/" in command]


def test_rows_of_one_kind_make_one_table(tmp_path: Path) -> None:
    rows = [{"ranks": 2, "ratio": 1.23456}, {"ranks": 4, "ratio": 0.5}, {"what": "a|b"}]
    record = {"command": "python -m bench.bench_step x", "commit": "abc", "rows": rows}
    (tmp_path / "one.json").write_text(json.dumps(record))
    (tmp_path / "one_repetitions.json").write_text("{}")
    text = page(tmp_path)
    assert "| ranks | ratio |\n|---|---|\n| 2 | 1.235 |\n| 4 | 0.5 |\n\n| what |" in text
    assert "a\\|b" in text
    assert "How much faster is one PPO step" in text
    assert "repetitions" not in text.split("## ", 1)[1]
