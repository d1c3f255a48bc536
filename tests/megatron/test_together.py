"""Two frameworks' training loops, fused mini-batch by mini-batch, give what each gives alone."""

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import parallel_state, pipeline_parallel

from rlhfuse.integrations import verl
from rlhfuse.integrations.slime import train_actor_critic
from rlhfuse.megatron import ModelContext, explain
from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.fused import FusedScheduler
from rlhfuse.megatron.support import Verdict, refusals
from rlhfuse.megatron.together import LoopStopped, run_together
from rlhfuse.megatron.values import make_value_model
from tests.megatron.laws import History, differences
from tests.megatron.tiny import Setting, Trained, config_for, init_parallel
from tests.training.ranks import run_ranks

ACTOR = Setting(num_microbatches=2)
CRITIC = Setting(num_microbatches=3, hidden=16, value_head=True, seed=1)


def framework() -> Any:
    """A module with a training loop, which binds Megatron's function at import as all do, beside
    the module that keeps the arguments of megatron.training."""
    arguments = ModuleType("megatron.training.global_vars")
    vars(arguments)["_GLOBAL_ARGS"] = SimpleNamespace(role="actor", decoder_seq_length=None)
    sys.modules[arguments.__name__] = arguments
    module = ModuleType("a_framework")
    vars(module)["get_args"] = lambda: vars(arguments)["_GLOBAL_ARGS"]
    vars(module)["set_args"] = partial(setattr, arguments, "_GLOBAL_ARGS")
    vars(module)["get_forward_backward_func"] = pipeline_parallel.get_forward_backward_func
    sys.modules[module.__name__] = module
    return module


def loop(module: Any, model: Trained, steps: int, breaks: bool = False) -> History:
    """As verl's ``train_mini_batch`` and slime's ``train``: per mini-batch zero, forward-backward,
    step; with slime's lists of one chunk, and its arguments from a global at every step."""
    history: History = []
    with on_cpu():  # modes belong to a thread
        for step in range(steps):
            model.zero()
            arguments = module.get_args()
            call = model.arguments(step, decoder_seq_length=arguments.decoder_seq_length)
            call["model"], call["data_iterator"] = model.chunks, [call["data_iterator"]]
            store = [*module.get_forward_backward_func()(**call), arguments.role]
            if breaks:
                raise ZeroDivisionError("the optimizer broke")
            gradients = model.gradients()
            history.append((store, gradients, model.step()))
            evaluated = module.get_forward_backward_func()(
                **model.arguments(step, forward_only=True)
            )
            history.append((evaluated, {}, {}))
    return history


def build(contexts: dict[str, ModelContext]) -> dict[str, Trained]:
    models = {}
    for name, setting in (("actor", ACTOR), ("critic", CRITIC)):
        with contexts[name].active():
            models[name] = Trained(setting, make_value_model if setting.value_head else None)
    return models


def together(rank: int) -> tuple[list[str], set[str], str, bool]:
    module = framework()
    with on_cpu():
        contexts = {
            "actor": ModelContext.create(partial(init_parallel, ACTOR)),
            "critic": ModelContext.create(partial(init_parallel, CRITIC), reverse=True),
        }
        with pytest.raises(ValueError, match="have the same get_args"):
            train_actor_critic(list, list, FusedScheduler(), contexts)
        with contexts["critic"].active():
            module.set_args(SimpleNamespace(role="critic", decoder_seq_length=16))
        steps = {"actor": 3, "critic": 2}
        expected = {}
        for name, model in build(contexts).items():
            with contexts[name].active():
                expected[name] = loop(module, model, steps[name])
        scheduler = FusedScheduler("fuse", record=True)
        models = build(contexts)
        loops: dict[str, Callable[[], History]] = {
            name: partial(loop, module, model, steps[name]) for name, model in models.items()
        }
        found = dict(
            zip(
                ("actor", "critic"),
                train_actor_critic(loops["actor"], loops["critic"], scheduler, contexts),
                strict=True,
            )
        )
        wrong = [w for name in expected for w in differences(expected[name], found[name])]
        fused = {str(span.args["pipeline"]) for span in scheduler.timeline.spans}
        own = module.get_forward_backward_func is pipeline_parallel.get_forward_backward_func
        loops["critic"] = partial(loop, module, models["critic"], 2, True)
        stopped = ""
        try:
            run_together(loops, scheduler, contexts)
        except (ZeroDivisionError, LoopStopped) as error:
            stopped = f"{type(error).__name__}: {error}"
    return wrong, fused, stopped, own


@pytest.mark.slow
def test_loops_of_different_length_fused() -> None:
    for wrong, fused, stopped, own in run_ranks(2, together, limit_s=90):
        assert wrong == []
        assert fused == {"actor", "critic"}
        assert stopped == "ZeroDivisionError: the optimizer broke"
        assert own, "the framework's name is Megatron's again"


class Engine:
    """As much of verl's Megatron engine as its settings."""

    def __init__(self, config: Any, replay: str = "disabled") -> None:
        self.tf_config = config
        self.engine_config = ModuleType("engine_config")
        vars(self.engine_config)["router_replay"] = ModuleType("router_replay")
        vars(self.engine_config.router_replay)["mode"] = replay
        self.module: list[torch.nn.Module] = []


def test_verl_engines_that_cannot_be_fused_are_refused() -> None:
    one, wide = config_for(Setting()), config_for(Setting(tp=2))
    verl.check(Engine(one), Engine(one))
    with pytest.raises(ValueError, match="is 1 for the actor and 2 for the critic"):
        verl.check(Engine(one), Engine(wide))
    with pytest.raises(ValueError, match=r"critic: router_replay\.mode is 'R2'"):
        verl.check(Engine(one), Engine(one, "R2"))
    with pytest.raises(ValueError, match=r"actor: engine object is not verl's Megatron engine"):
        verl.check(object(), Engine(one))


def test_explain_tells_what_becomes_of_each_setting() -> None:
    config = config_for(Setting(tp=2, chunks=2, per_token=True, experts=4))
    config.defer_embedding_wgrad_compute = True
    verdicts = {row.setting: row.verdict for row in explain(config)}
    assert verdicts["virtual_pipeline_model_parallel_size"] is Verdict.SUPPORTED
    assert verdicts["calculate_per_token_loss"] is Verdict.SUPPORTED
    assert "defer_embedding_wgrad_compute" not in verdicts
    split = {row.setting: row for row in explain(config, split_weight=True)}
    assert split["defer_embedding_wgrad_compute"].verdict is Verdict.FALLS_BACK
    config.overlap_moe_expert_parallel_comm = True
    config.cuda_graph_impl = "local"
    rows = {row.setting: str(row) for row in explain(config)}
    assert "falls back" in rows["overlap_moe_expert_parallel_comm"]
    assert "falls back" in rows["cuda_graph_impl"]
    verdicts = {row.setting: row.verdict for row in explain(everything_else())}
    assert verdicts == {
        "cuda_graph_impl": Verdict.FALLS_BACK,
        "fp8": Verdict.SUPPORTED,
        "transformer_impl": Verdict.SUPPORTED,
        "recompute_granularity": Verdict.SUPPORTED,
        "mtp_num_layers": Verdict.SUPPORTED,
        "context_parallel_size": Verdict.SUPPORTED,
        "expert_model_parallel_size": Verdict.SUPPORTED,
    }
    verdicts = {row.setting: row.verdict for row in explain(everything_else(), split_weight=True)}
    assert verdicts["fp8"] is Verdict.FALLS_BACK
    delayed = everything_else()
    delayed.delay_wgrad_compute = True
    verdicts = {row.setting: row.verdict for row in explain(delayed, split_weight=True)}
    assert verdicts["fp8"] is verdicts["delay_wgrad_compute"] is Verdict.SUPPORTED
    together = explain(everything_else(), fused_with=everything_else())
    assert {row.setting for row in together if row.verdict is Verdict.FALLS_BACK} == {
        "cuda_graph_impl",
        "fp8_recipe",
    }


def everything_else() -> Any:
    """A configuration with all that needs a GPU."""
    config = config_for(Setting(cp=2, ep=2, experts=4, recompute=True, mtp=1))
    config.deallocate_pipeline_outputs = False
    config.transformer_impl = "transformer_engine"
    config.cuda_graph_impl = "transformer_engine"
    config.fp8, config.fp8_recipe = "hybrid", "delayed"
    return config


def test_models_that_cannot_run_together_are_refused() -> None:
    one, alike, wide = (config_for(Setting(tp=tp)) for tp in (1, 1, 2))
    assert all(row.verdict is not Verdict.REFUSED for row in explain(one, fused_with=alike))
    for other, setting in ((one, "config"), (wide, "tensor_model_parallel_size")):
        refused = [
            row.setting for row in explain(one, fused_with=other) if row.verdict is Verdict.REFUSED
        ]
        assert refused == [setting]
        (line,) = refusals({"actor": one, "critic": other})
        assert line.startswith(f"actor and critic: {setting}=")
    one.pipeline_dtype = None
    assert "pipeline_dtype" in {r.setting for r in explain(one) if r.verdict is Verdict.REFUSED}


def test_state_outside_a_context_is_untouched() -> None:
    def make() -> None:
        vars(parallel_state)["_PIPELINE_GLOBAL_RANKS"] = [3, 2]

    before = dict(vars(parallel_state))
    context = ModelContext.create(make)
    assert dict(vars(parallel_state)) == before
    with context.active():
        assert parallel_state.get_pipeline_model_parallel_first_rank() == 3
        vars(parallel_state)["_PIPELINE_GLOBAL_RANKS"] = [5, 4]
    assert dict(vars(parallel_state)) == before
    with context.active():
        assert parallel_state.get_pipeline_model_parallel_first_rank() == 5
