"""A trained model's state as Megatron's distributed checkpoint: weights, moments, step count.

It can be loaded with other pipeline and tensor-parallel sizes. The format is Megatron's own:
the tensors are torch.distributed.checkpoint's, and what all ranks share is pickled (``common.pt``),
so load only checkpoints that you trust.
"""

import contextlib
import queue
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from rlhfuse.megatron.trained_model import TrainedModel
from rlhfuse.training.snapshot import Keep

FOLDER = "megatron"

# Moments that are sharded over replicas are written as whole tensors, which any sizes can load (the
# default shards cannot be written any more).
_WHOLE = {"distrib_optim_sharding_type": "fully_reshardable"}


def save_state(state: Mapping[str, Any], folder: Path) -> None:
    """Write `state_of` a model into ``FOLDER/`` below `folder`. Collective over the default group,
    of all ranks, which nothing else may use meanwhile. Raises OSError."""
    path = folder / FOLDER
    path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    try:
        with writing_here():
            dist_checkpointing.save(dict(state), str(path), strategy)
    except (CheckpointingException, RuntimeError) as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


def state_of(model: TrainedModel, keep: Keep) -> dict[str, Any]:
    """What to write of a model: what `keep` returns for each tensor. Collective."""
    state = _state(model, loading=False, stepped=model.steps > 0)
    _keep_all(state, keep)
    return state


def _keep_all(tree: Any, keep: Keep) -> None:
    for item in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(item, dict | list):
            _keep_all(item, keep)
        elif isinstance(item, ShardedTensor | ShardedTensorFactory) and item.data is not None:
            item.data = keep(item.data)


def load_model(folder: Path, model: TrainedModel) -> None:
    """Restore what `save_state` wrote. Collective over all ranks.

    Raises:
        ValueError: it is missing, damaged, or of another model or number of replicas.
    """
    path = folder / FOLDER
    if not path.is_dir():
        raise ValueError(f"checkpoint {folder.parent}: holds no Megatron {folder.name}")
    try:
        steps: int = dist_checkpointing.load_common_state_dict(str(path))["steps"]
        if steps:
            model.ready_for_moments()
        wanted = _state(model, loading=True, stepped=steps > 0)
        state: Any = dist_checkpointing.load(wanted, str(path))
    except (CheckpointingException, RuntimeError, KeyError, OSError) as error:
        raise ValueError(f"checkpoint {path}: does not fit or is damaged: {error}") from error
    model.gpt.load_state_dict(state["model"])
    if steps:
        model.load_moments(state["optimizer"])
    else:
        model.forget_moments()
    model.steps = steps


@contextlib.contextmanager
def writing_here() -> Iterator[None]:
    """Within, this process writes, which waits for it anyway. Megatron would fork writers, which
    our workers may not have, and start a process to hold their answers, and leave it behind."""
    writer: Any = filesystem_async.FileSystemWriterAsync
    forking, answers = writer.write_preloaded_data_multiproc, filesystem_async._results_queue
    writer.write_preloaded_data_multiproc = staticmethod(_write)
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        writer.write_preloaded_data_multiproc = staticmethod(forking)
        filesystem_async._results_queue = answers


def _write(transforms: Any, *rest: Any) -> None:
    """In place of ``write_preloaded_data_multiproc``, whose last two arguments are what to write
    and the queue for the answer."""
    *_, buckets, answers = rest
    found: dict[int, Any] = {}
    for index, bucket in enumerate(buckets):
        answer: queue.Queue[Any] = queue.Queue()
        count: queue.Queue[int] = queue.Queue()
        count.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, index, bucket, answer, count, True
        )
        found[index] = answer.get()[1]
        if isinstance(found[index], Exception):
            answers.put(found[index])
            return
    answers.put(found)


def _state(model: TrainedModel, *, loading: bool, stepped: bool) -> dict[str, Any]:
    """`stepped`: not before the first update, when there are no moments yet."""
    weights = model.gpt.sharded_state_dict()
    state = {"model": weights, "steps": model.steps}
    if stepped:
        state["optimizer"] = model.optimizer.sharded_state_dict(
            weights, is_loading=loading, metadata=_WHOLE
        )
    return state
