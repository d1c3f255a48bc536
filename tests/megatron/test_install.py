"""Installing rebinds the name wherever it is bound, verifies if asked, and leaves no trace."""

import contextlib
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import parallel_state, pipeline_parallel
from megatron.core.pipeline_parallel import schedules
from megatron.core.timers import Timers

import rlhfuse.megatron
from rlhfuse.megatron import Scheduler, install, installed, stock, uninstall
from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.model_run import ModelRun
from rlhfuse.schedules.formats import schedule_to_json, to_torch_csv
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.training.failure import StepFailed
from tests.megatron.laws import Tensors, differences, train
from tests.megatron.tiny import Setting, Trained, init_parallel
from tests.training.ranks import run_ranks


@pytest.fixture
def training_script() -> Any:
    """A module that has imported Megatron's function under its own name, as verl's has."""
    module = ModuleType("some_training_script")
    vars(module)["run"] = pipeline_parallel.get_forward_backward_func
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def bound() -> dict[str, Any]:
    """All that Megatron's scheduler modules and the package bind."""
    return {**vars(schedules), **vars(pipeline_parallel), **vars(rlhfuse.megatron)}


def test_install_rebinds_every_name_and_uninstall_restores_them(training_script: Any) -> None:
    before, own = bound(), training_script.run
    names = install()
    assert "some_training_script.run" in names
    assert "megatron.core.pipeline_parallel.get_forward_backward_func" in names
    assert "megatron.core.pipeline_parallel.schedules.get_forward_backward_func" in names
    assert training_script.run is schedules.get_forward_backward_func is not own
    again = install("zero-bubble")
    assert set(again) == set(names), "idempotent"
    late = ModuleType("imported_later")
    vars(late)["run"] = pipeline_parallel.get_forward_backward_func
    sys.modules["imported_later"] = late
    try:
        assert set(uninstall()) == {*names, "imported_later.run"}
    finally:
        del sys.modules["imported_later"]
    assert bound() == before
    assert training_script.run is vars(late)["run"] is own
    assert uninstall() == ()


def test_context_manager(training_script: Any) -> None:
    own = training_script.run
    with contextlib.suppress(KeyError), installed() as names:
        assert "some_training_script.run" in names
        assert training_script.run is not own
        raise KeyError
    assert training_script.run is own


class Careless(ModelRun):
    """Loses the last micro-batch's gradients."""

    def _backward(self, chunk: int, microbatch: int, gradient: Any) -> Any:
        by_input = super()._backward(chunk, microbatch, gradient)
        if microbatch == 1:
            for parameter in self._chunks[chunk].parameters():
                parameter.main_grad.zero_()  # type: ignore[attr-defined]
        return by_input


def verified(rank: int) -> tuple[list[str], list[str], str, int]:
    """Differences of a verified run and of one whose schedule is broken; the error; tasks."""
    setting = Setting(num_microbatches=2, steps=3)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rlhfuse.megatron.verify").addHandler(handler)
    with on_cpu():
        init_parallel(setting)
        expected = train(setting, stock.stock_func(None, None, None))
        with installed("zero-bubble", verify_steps=2):
            fine = train(setting, lambda **k: schedules.get_forward_backward_func()(**k))
        from rlhfuse.megatron import engine

        vars(engine)["ModelRun"] = Careless
        with installed("1f1b", verify_steps=2):
            broken = train(setting, lambda **k: schedules.get_forward_backward_func()(**k))
        parallel_state.destroy_model_parallel()
    return differences(expected, fine), differences(expected, broken), "".join(lines), len(lines)


@pytest.mark.slow
def test_verified_steps_change_nothing_and_a_wrong_schedule_is_refused() -> None:
    for fine, broken, text, _ in run_ranks(2, verified, limit_s=90):
        assert fine == []
        assert broken == [], "Megatron's own results stay"
        assert "Megatron's own schedule stays in use: step differs by" in text


def failing(rank: int) -> str:
    setting = Setting()
    with on_cpu():
        init_parallel(setting)
        model = Trained(setting)
        arguments = model.arguments()
        step, calls = arguments["forward_step_func"], [0]

        def forward_step(*data: Any) -> Any:
            calls[0] += 1
            if rank == 1 and calls[0] == 3:
                raise ZeroDivisionError("the model broke")
            return step(*data)

        try:
            run = Scheduler().get_forward_backward_func()
            run(**{**arguments, "forward_step_func": forward_step})
        except StepFailed as error:
            return str(error)
    return ""


@pytest.mark.slow
def test_a_step_that_raises_on_one_rank_ends_all_with_one_message() -> None:
    word = "rank 1 failed at model:1F2: ZeroDivisionError: the model broke"
    one, other = run_ranks(2, failing, timeout_s=60, limit_s=60)
    assert word in one
    assert one.startswith("rank 0 stopped at ")
    assert other.startswith(word)


def refusals(rank: int) -> list[str]:
    setting = Setting()
    messages = []
    with on_cpu():
        init_parallel(setting)
        model = Trained(setting)
        for ranks, count in ((4, 4), (2, 8)):
            alone = Pipeline.make("actor", range(ranks), count, 1, 2)
            run = Scheduler(one_f_one_b(Problem(ranks, (alone,)))).get_forward_backward_func()
            try:
                run(**model.arguments())
            except ValueError as error:
                messages.append(str(error))
    return messages


@pytest.mark.slow
def test_a_schedule_that_does_not_fit_is_refused_with_both_numbers() -> None:
    for stages, counts in run_ranks(2, refusals, limit_s=60):
        assert "has 4 stages, the model has 2" in stages
        assert "has 8 micro-batches, the call brings 4" in counts


def other_calls(path: str) -> tuple[tuple[bool, ...], list[str]]:
    """Forward-only and non-loss results as Megatron's; a schedule from a file; falling back; one
    micro-batch in flight under a memory cap."""
    setting = Setting()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rlhfuse.megatron.dropin").addHandler(handler)
    with on_cpu():
        init_parallel(setting)
        model = Trained(setting)
        own, ours = stock.stock_func(None, None, None), Scheduler(path, record=True)

        def both(run: Any = ours.get_forward_backward_func(), **more: Any) -> bool:  # noqa: B008
            model.zero()
            expected = own(**model.arguments(**more)), model.gradients()
            model.zero()
            found = run(**model.arguments(**more)), model.gradients()
            return differences([(*expected, Tensors())], [(*found, Tensors())]) == []

        evaluation = both(forward_only=True, first_val_step=True)
        evaluation = evaluation and len(ours.timeline.spans) == setting.num_microbatches
        raw = both(forward_only=True, collect_non_loss_data=True)
        from_file = both() and len(ours.timeline.spans) == 2 * setting.num_microbatches
        twice = both(adjust_tensor_shapes_fn=lambda a, b: (a, b)) and both(
            adjust_tensor_shapes_fn=lambda a, b: (a, b)
        )
        later = ours.get_forward_backward_func()(**model.arguments(brand_new=None))
        from_file = from_file and bool(later) == (model.chunks[0].module.post_process)
        torchs = Scheduler(Path(path).with_suffix(".csv"), record=True)
        from_file = from_file and both(torchs.get_forward_backward_func())
        from_file = from_file and len(torchs.timeline.spans) == 2 * setting.num_microbatches
        frugal = Scheduler(memory_cap=1.0, record=True)
        capped = both(frugal.get_forward_backward_func())
        kinds = "".join(span.kind.value for span in frugal.timeline.spans)
        capped = capped and kinds == "FB" * setting.num_microbatches
    return (evaluation, raw, from_file, twice, capped), lines


@pytest.mark.slow
def test_evaluation_files_and_falling_back(tmp_path: Any) -> None:
    path = tmp_path / "schedule.json"
    problem = Problem(2, (Pipeline.make("actor", (0, 1), 4, 1, 2),))
    path.write_bytes(schedule_to_json(one_f_one_b(problem)))
    path.with_suffix(".csv").write_text(to_torch_csv(one_f_one_b(problem)))
    for fine, lines in run_ranks(2, lambda rank: other_calls(str(path)), limit_s=60):
        assert fine == (True,) * 5
        assert lines == [
            "Megatron's own schedule is used: adjust_tensor_shapes_fn: several tensors in one "
            "message"
        ]


def timed(rank: int) -> tuple[list[int], list[float], float]:
    """How often the device is waited for under level 1 and 2; what level 2 measured; the call."""
    waits, elapsed, whole_s = [], [], 0.0
    with on_cpu():
        init_parallel(Setting())
        for level in (1, 2):
            model = Trained(Setting())
            timers = model.config.timers = Timers(level, "minmax")
            waited: list[None] = []
            torch.cuda.synchronize = lambda *_, waited=waited: waited.append(None)
            Scheduler("zero-bubble").get_forward_backward_func()(**model.arguments())
            waits.append(len(waited))
            assert model.config.timers is timers, "the user's own again"
        for name in ("forward-compute", "backward-compute"):
            elapsed.append(timers(name).elapsed(reset=False))
        whole_s = timers("forward-backward").elapsed()
    return waits, elapsed, whole_s


@pytest.mark.slow
def test_level_2_timers_do_not_hold_up_the_device() -> None:
    for waits, elapsed, whole_s in run_ranks(2, timed, limit_s=60):
        assert waits[1] == waits[0] > 0
        assert min(elapsed) > 0
        assert sum(elapsed) < whole_s


def left_out(rank: int) -> list[str]:
    """What is said where weight gradients that layers keep back would be lost."""
    setting = Setting(own_linears=True, delayed=True)
    messages = []
    with on_cpu():
        init_parallel(setting)
        model, deaf = Trained(setting), Trained(setting)
        deaf.chunks[0].ddp_config.delay_wgrad_compute = False
        several = model.arguments(adjust_tensor_shapes_fn=lambda a, b: (a, b))
        run = Scheduler().get_forward_backward_func()
        for call in (several, deaf.arguments()):
            try:
                run(**call)
            except (ValueError, StepFailed) as error:
                messages.append(str(error))
        try:
            with installed(verify_steps=1):
                schedules.get_forward_backward_func()(**model.arguments())
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.slow
def test_weight_gradients_that_layers_keep_back_are_never_left_out() -> None:
    for stock_schedule, deaf, verified in run_ranks(2, left_out, limit_s=60):
        assert stock_schedule.startswith("delay_wgrad_compute=True: Megatron's own schedule")
        assert "DistributedDataParallelConfig(delay_wgrad_compute=True)" in deaf
        assert verified == stock_schedule
