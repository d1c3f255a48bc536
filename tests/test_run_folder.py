"""A checkpoint is whole or not there; an older one survives a failed write."""

from pathlib import Path

import msgspec
import pytest

from rlhfuse.config import Config, TrainerConfig
from rlhfuse.data import StreamState
from rlhfuse.placement import StagePlacement
from rlhfuse.run_folder import RunFolder, StepLengths, TrainerState, load_state
from rlhfuse.session import resumed_state


def _state(step: int, best_step: int = 0) -> TrainerState:
    pipelines = {"actor": StagePlacement((0, 1), ((0, 2), (2, 4)))}
    return TrainerState(
        step=step,
        data=StreamState(epoch=1, index=3, num_rows=9, seed=1, shuffle=True),
        kl_coef=0.1,
        pipelines=pipelines,
        best_step=best_step,
    )


def _folder(tmp_path: Path, keep: int = 2) -> RunFolder:
    folder = RunFolder(TrainerConfig(default_local_dir=str(tmp_path), max_checkpoints=keep))
    folder.create("trainer: {}\n")
    return folder


def _write(folder: Path) -> None:
    (folder / "actor").mkdir()
    (folder / "actor" / "weights").write_bytes(b"w" * 100)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    assert folder.latest() is None
    folder.save(_state(4), _write)
    latest = folder.latest()
    assert latest is not None
    assert load_state(latest) == _state(4)


def test_a_resumed_run_cuts_its_models_as_before_unless_other_stages_are_asked_for(
    tmp_path: Path,
) -> None:
    folder = _folder(tmp_path)
    folder.save(_state(4), _write)
    latest = folder.latest()
    assert latest is not None
    as_of_today = {"actor": StagePlacement((0, 1), ((0, 3), (3, 4)))}
    state, told = resumed_state(Config(), Config(), as_of_today, latest)
    assert (state, told) == (_state(4), ())
    replace = msgspec.structs.replace
    more = replace(Config(), placement=replace(Config().placement, num_devices=4))
    state, told = resumed_state(Config(), more, as_of_today, latest)
    assert state == replace(_state(4), pipelines=as_of_today)
    assert "equal to rounding" in told[0]


def test_a_failed_write_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    folder.save(_state(1), _write)

    def fail(path: Path) -> None:
        _write(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        folder.save(_state(2), fail)
    latest = folder.latest()
    assert latest is not None
    assert load_state(latest).step == 1
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == [
        "global_step_1",
        "latest_checkpointed_iteration.txt",
    ]


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    saved = folder.save(_state(1), _write)
    (saved / "actor" / "weights").write_bytes(b"w" * 99)
    with pytest.raises(ValueError, match="actor/weights should have 100 bytes, it has 99"):
        folder.latest()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    for step in range(1, 6):
        folder.save(_state(step, best_step=2), _write)
    kept = sorted(p.name for p in folder.checkpoints.glob("global_step_*"))
    assert kept == ["global_step_2", "global_step_4", "global_step_5"]


def test_a_run_goes_on_from_what_is_newest(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    assert folder.newest() is None
    first = folder.keep(_state(1), _write)
    assert folder.newest() == first
    second = folder.keep(_state(2), _write)
    assert folder.newest() == second
    assert not first.exists()
    saved = folder.save(_state(3), _write)
    assert folder.newest() == saved
    assert not folder.restart.exists()
    later = folder.keep(_state(4), _write)
    assert folder.newest() == later
    assert folder.latest() == saved


def test_a_restart_state_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    kept = folder.keep(_state(1), _write)

    def fail(path: Path) -> None:
        _write(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        folder.keep(_state(2), fail)
    assert folder.newest() == kept
    assert load_state(kept) == _state(1)


def test_a_damaged_restart_state_is_passed_over(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    saved = folder.save(_state(1), _write)
    kept = folder.keep(_state(2), _write)
    (kept / "actor" / "weights").write_bytes(b"w" * 99)
    assert folder.newest() == saved


def test_a_checkpoint_that_is_being_written_does_not_exist(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    saved = folder.save(_state(1), _write)
    unfinished = folder.begin(_state(2))
    _write(unfinished.folder)
    kept = folder.keep(_state(3), _write)  # training has gone on meanwhile
    assert folder.latest() == saved
    final = folder.finish(unfinished)
    assert folder.latest() == final
    assert folder.newest() == kept
    lost = folder.begin(_state(4))
    lost.discard()
    assert folder.newest() == kept
    assert not list(folder.checkpoints.glob(".*"))


def test_lengths_of_a_step_that_ran_twice_are_the_last_and_cut_off_lines_are_left_out(
    tmp_path: Path,
) -> None:
    folder = _folder(tmp_path)
    first, again, other = (StepLengths(s, (n, 2), (3, 4)) for s, n in ((1, 5), (1, 6), (2, 7)))
    for row in (first, other, again):
        folder.add_lengths(row)
    with folder.lengths.open("ab") as file:
        file.write(b'{"step": 3, "len')
    assert folder.read_lengths() == {1: again, 2: other}
