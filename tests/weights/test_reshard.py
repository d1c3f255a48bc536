"""Every row reaches every rank that needs it exactly once, for all parallel sizes up to 8."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from rlhfuse.models.stage import Head, ModelStage
from rlhfuse.weights.reshard import (
    Split,
    TrainRank,
    Transfer,
    language_model_splits,
    reshard,
    shard,
)
from tests.models.tiny import FAMILIES, tiny_config

Array = npt.NDArray[np.int64]
SIZES = (1, 2, 4, 8)
HEADS, KV_HEADS, LAYERS = 8, 2, 8


def tensors(family: str) -> dict[str, Array]:
    """Every parameter of a tiny model, each element a number of its own."""
    import torch

    config = tiny_config(family, layers=LAYERS)
    config.num_attention_heads, config.num_key_value_heads = HEADS, KV_HEADS
    config.intermediate_size = 104
    with torch.device("meta"):
        stage = ModelStage(config, head=Head.LM, layers=range(LAYERS), first=True, last=True)
    found: dict[str, Array] = {}
    start = 0
    for name, parameter in stage.named_hf_parameters():
        found[name] = np.arange(start, start + parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
    return found


def stage_of(name: str, stages: int) -> int:
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) * stages // LAYERS
    return 0 if "embed_tokens" in name else stages - 1


def piece(split: Split, tensor: Array, rank: int, ranks: int) -> Array:
    if split.dim is None:
        return tensor
    rows = shard(split, rank, ranks)
    return np.take(tensor, np.arange(rows.start, rows.stop), axis=split.dim)


def copy(transfer: Transfer, split: Split, source: Array, target: Array, written: Array) -> None:
    if split.dim is None:
        target[...] = source
        written += 1
        return
    here = [slice(None)] * target.ndim
    there = list(here)
    there[split.dim] = slice(transfer.source_start, transfer.source_start + transfer.length)
    here[split.dim] = slice(transfer.target_start, transfer.target_start + transfer.length)
    target[tuple(here)] = source[tuple(there)]
    written[tuple(here)] += 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_arrives_exactly_once(family: str) -> None:
    whole = tensors(family)
    shapes = {name: tensor.shape for name, tensor in whole.items()}
    splits = language_model_splits(shapes, num_heads=HEADS, num_kv_heads=KV_HEADS)
    assert {splits[n].dim for n in splits} == {0, 1, None}
    for pp, train_tp, generation_tp in itertools.product((1, 8), SIZES, SIZES):
        stages = [[s for n, s in splits.items() if stage_of(n, pp) == p] for p in range(pp)]
        plan = reshard(stages, train_tp=train_tp, generation_tp=generation_tp)
        targets = {
            (name, rank): np.full_like(piece(splits[name], tensor, rank, generation_tp), -1)
            for name, tensor in whole.items()
            for rank in range(generation_tp)
        }
        written = {key: np.zeros_like(target) for key, target in targets.items()}
        for transfer in plan:
            split = splits[transfer.name]
            assert transfer.source.pp_stage == stage_of(transfer.name, pp)
            source = piece(split, whole[transfer.name], transfer.source.tp_rank, train_tp)
            key = (transfer.name, transfer.target)
            copy(transfer, split, source, targets[key], written[key])
        for (name, rank), target in targets.items():
            assert (written[name, rank] == 1).all(), "each byte once, none missing"
            wanted = piece(splits[name], whole[name], rank, generation_tp)
            assert (target == wanted).all()


def test_every_combination_of_sizes_up_to_8() -> None:
    """Also those that no usual number of heads divides into: 840 pieces do."""
    sizes = range(1, 9)
    for pp, train_tp, generation_tp in itertools.product(sizes, sizes, sizes):
        layers = [
            (
                Split(f"{i}.row", 1, 840, 840),
                Split(f"{i}.vocabulary", 0, 500, 500, multiple=840),
                Split(f"{i}.norm", None),
            )
            for i in range(8)
        ]
        stages = [[s for i in range(8) if i * pp // 8 == p for s in layers[i]] for p in range(pp)]
        sent: dict[tuple[str, int], list[Transfer]] = {}
        for transfer in reshard(stages, train_tp=train_tp, generation_tp=generation_tp):
            sent.setdefault((transfer.name, transfer.target), []).append(transfer)
        for stage, splits in enumerate(stages):
            for split, target in itertools.product(splits, range(generation_tp)):
                parts = sent.pop((split.name, target), [])  # none: a rank of padding only
                assert all(part.source.pp_stage == stage for part in parts)
                if split.dim is None:
                    assert len(parts) == 1
                    continue
                held = {part: shard(split, part.source.tp_rank, train_tp).start for part in parts}
                arrived = [
                    (part.target_start + row, start + part.source_start + row)
                    for part, start in held.items()
                    for row in range(part.length)
                ]
                wanted = shard(split, target, generation_tp)
                assert sorted(arrived) == list(enumerate(wanted)), "each row once, in its place"
        assert not sent, "nothing else is sent"


def test_equal_layouts_send_straight_across_and_copies_share_the_work() -> None:
    column = Split("w", 0, 64, 8)
    plan = reshard([[column]], train_tp=4, generation_tp=4)
    assert [t.source for t in plan] == [TrainRank(0, rank) for rank in range(4)]
    assert [t.target for t in plan] == [0, 1, 2, 3]
    shared = reshard([[Split("norm", None)]], train_tp=4, generation_tp=4)
    assert sorted(t.source.tp_rank for t in shared) == [0, 1, 2, 3]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="6 pieces do not divide over 4"):
        reshard([[Split("w", 0, 6, 6)]], train_tp=1, generation_tp=4)
    with pytest.raises(ValueError, match="two pipeline stages"):
        reshard([[Split("w", None)], [Split("w", None)]], train_tp=1, generation_tp=1)
