"""Which ranks a model's pipeline runs on, and the process groups its hooks need."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

_NEEDED = ("tp", "cp", "embd", "pos_embd", "pp", "dp_cp")


@dataclass(frozen=True, slots=True)
class Groups:
    """Process groups of one model, as its Megatron call names them."""

    collection: Any
    pp_ranks: tuple[int, ...]
    """Global ranks in stage order: a reversed pipeline lists them reversed."""
    pp_rank: int
    cp_size: int
    tp_size: int

    @property
    def first(self) -> bool:
        return self.pp_rank == 0

    @property
    def last(self) -> bool:
        return self.pp_rank == len(self.pp_ranks) - 1


def groups_of(p2p_communicator: Any, pg_collection: Any) -> Groups:
    """The groups given with a call, or else those of parallel_state.

    Raises:
        ValueError: only one of the two is given, or a group is missing.
    """
    if (p2p_communicator is None) != (pg_collection is None):
        raise ValueError(
            "p2p_communicator and pg_collection: give both or neither, as for Megatron's schedule"
        )
    if pg_collection is None:
        pg_collection = _of_parallel_state()
    missing = [name for name in _NEEDED if not hasattr(pg_collection, name)]
    if missing:
        raise ValueError(f"pg_collection lacks {', '.join(missing)}; set to None what is not used")
    pp = pg_collection.pp if p2p_communicator is None else p2p_communicator.pp_group
    return Groups(
        pg_collection,
        tuple(dist.get_process_group_ranks(pp)),
        pp.rank(),
        pg_collection.cp.size(),
        pg_collection.tp.size(),
    )


def _of_parallel_state() -> Any:
    collection = ProcessGroupCollection()
    collection.tp = parallel_state.get_tensor_model_parallel_group()
    collection.cp = parallel_state.get_context_parallel_group()
    collection.embd = parallel_state.get_embedding_group(check_initialized=False)
    collection.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    collection.pp = parallel_state.get_pipeline_model_parallel_group()
    collection.dp_cp = parallel_state.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=False
    )
    return collection
