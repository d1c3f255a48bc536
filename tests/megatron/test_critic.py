"""A reversed critic is built from a configuration and starts from a checkpoint's weights."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig

from rlhfuse.megatron import ModelContext, build_reversed_critic
from rlhfuse.megatron.checkpoint import writing_here
from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.critic import load_weights
from tests.megatron.tiny import VOCAB, Setting, config_for, init_parallel, layer_spec
from tests.training.ranks import run_ranks

SETTING = Setting()


def provider(seed: int, config: Any, first: bool, last: bool) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(SETTING),
        vocab_size=VOCAB,
        max_sequence_length=64,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
    )


def build(folder: Path, rank: int) -> tuple[list[int], dict[str, bool], bool]:
    warnings.simplefilter("ignore")
    with on_cpu():
        actor_state = ModelContext.create(partial(init_parallel, SETTING))
        config = config_for(SETTING)
        with actor_state.active():
            actor = provider(rank, config, rank == 0, rank == 1)
            if rank == 0:
                folder.mkdir()
            dist.barrier()
            state = {"model": actor.sharded_state_dict()}
            with writing_here():
                dist_checkpointing.save(state, str(folder))
        critic = build_reversed_critic(
            config,
            partial(provider, 7),
            partial(init_parallel, SETTING),
            ddp=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            optimizer=OptimizerConfig(optimizer="adam", lr=1e-3),
            checkpoint=folder,
            device=torch.device("cpu"),
        )
        with critic.context.active():
            order = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        # What the actor's other rank holds is what the critic has here.
        everything: list[Any] = [None, None]
        dist.all_gather_object(everything, dict(actor.named_parameters()))
        theirs = everything[1 - rank]
        mine = dict(critic.model.module.named_parameters())
        equal = {
            name: torch.equal(p, theirs[name])
            for name, p in mine.items()
            if not name.startswith("output_layer")
        }
        with pytest.raises(ValueError, match="no distributed checkpoint"):
            load_weights(critic.model, folder / "nowhere")
        return order, equal, config.no_sync_func is None


@pytest.mark.slow
def test_a_reversed_critic_starts_from_a_language_models_checkpoint(tmp_path: Path) -> None:
    for rank, (order, equal, hooks_apart) in enumerate(
        run_ranks(2, partial(build, tmp_path / "saved"), limit_s=60)
    ):
        assert order == [1, 0]
        assert equal, rank
        assert all(equal.values()), equal
        assert hooks_apart
