"""Which slice of which tensor goes from which training rank to which generation rank. Pure.

Training splits a model over pipeline stages and, inside a stage, over tensor-parallel ranks; an
engine instance splits it over its own tensor-parallel ranks, in another number. Every generation
rank gets every row of its shards exactly once, from one rank that has it, and nothing else: no
tensor is gathered on the way, as in HybridFlow's zero-redundancy resharding (arXiv 2409.19256,
section 5.3). Both sides cut like Megatron and vLLM: contiguous, in rank order.

The instances that run today are not tensor-parallel: `weights.plan` is this plan for one
generation rank and whole tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Split:
    """How a tensor is cut. `dim`: the dimension, None where every rank holds it whole. `size`: its
    length in that dimension; `units`: indivisible pieces (heads, or rows): a rank holds some, or,
    where there are more ranks than units, ranks share one, as key-value heads do. `multiple`:
    `units` is padded to a multiple of it first (vLLM pads the vocabulary to 64 rows)."""

    name: str
    dim: int | None
    size: int = 0
    units: int = 0
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class TrainRank:
    """A training rank's place: its pipeline stage and its rank among the stage's `tp` ranks."""

    pp_stage: int
    tp_rank: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """`length` rows of a tensor's split dimension (0: the whole tensor, which is not split), from
    `source_start` in the source's shard to `target_start` in that of generation rank `target`."""

    name: str
    source: TrainRank
    target: int
    source_start: int = 0
    target_start: int = 0
    length: int = 0


def shard(split: Split, rank: int, ranks: int) -> range:
    """Rows of the split dimension that a rank holds; fewer (or none) where they are padding.

    Raises:
        ValueError: the units do not divide over the ranks, nor the ranks over the units.
    """
    assert split.dim is not None
    padded = -(-split.units // split.multiple) * split.multiple
    rows = split.size // split.units
    if padded % ranks == 0:
        per_rank = padded // ranks
        first = rank * per_rank
    elif ranks % padded == 0:
        per_rank, first = 1, rank * padded // ranks
    else:
        raise ValueError(
            f"{split.name}: {padded} pieces do not divide over {ranks} tensor-parallel ranks; "
            "choose a number of ranks that divides them"
        )
    last = min(first + per_rank, split.units)
    return range(min(first, split.units) * rows, last * rows)


def reshard(
    stages: Sequence[Sequence[Split]], *, train_tp: int, generation_tp: int
) -> list[Transfer]:
    """The transfers to one instance. `stages[s]`: the tensors of training pipeline stage `s`; one
    that two stages hold (tied embeddings) is listed with the first only.

    Raises:
        ValueError: a tensor that is listed twice, or cannot be cut.
    """
    names = [split.name for stage in stages for split in stage]
    twice = (
        {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    )
    if twice:
        raise ValueError(f"{min(twice)}: held by two pipeline stages; list it with one")
    return [
        transfer
        for stage, splits in enumerate(stages)
        for split in splits
        for target in range(generation_tp)
        for transfer in _to_rank(split, stage, train_tp, target, generation_tp)
    ]


def _to_rank(
    split: Split, stage: int, train_tp: int, target: int, generation_tp: int
) -> Iterator[Transfer]:
    if split.dim is None:
        # All ranks of the stage have it: they share the work.
        yield Transfer(split.name, TrainRank(stage, target % train_tp), target)
        return
    wanted = shard(split, target, generation_tp)
    held = [shard(split, rank, train_tp) for rank in range(train_tp)]
    at = wanted.start
    while at < wanted.stop:
        holders = [rank for rank, rows in enumerate(held) if at in rows]
        source = holders[target % len(holders)]
        end = min(wanted.stop, held[source].stop)
        yield Transfer(
            split.name,
            TrainRank(stage, source),
            target,
            at - held[source].start,
            at - wanted.start,
            end - at,
        )
        at = end


def language_model_splits(
    shapes: Mapping[str, Sequence[int]], *, num_heads: int, num_kv_heads: int
) -> dict[str, Split]:
    """How Megatron and vLLM cut a Llama's or Qwen's tensors, by their Hugging Face names."""
    columns = {
        "q_proj": num_heads,
        "k_proj": num_kv_heads,
        "v_proj": num_kv_heads,
        "gate_proj": 0,
        "up_proj": 0,
    }
    splits = {}
    for name, shape in shapes.items():
        module = name.split(".")[-2]
        if module in columns:
            splits[name] = Split(name, 0, shape[0], columns[module] or shape[0])
        elif module in ("o_proj", "down_proj") and name.endswith("weight"):
            units = num_heads if module == "o_proj" else shape[1]
            splits[name] = Split(name, 1, shape[1], units)
        elif module in ("embed_tokens", "lm_head"):
            splits[name] = Split(name, 0, shape[0], shape[0], multiple=64)
        else:
            splits[name] = Split(name, None)
    return splits
