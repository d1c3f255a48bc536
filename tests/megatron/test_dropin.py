"""Our schedules give what Megatron's own give on the same machine, to the last bit (float32)."""

import pytest

pytest.importorskip("megatron.core")

from rlhfuse.megatron.orders import Choice
from tests.megatron.laws import Found, compare, compare_all
from tests.megatron.tiny import Setting
from tests.training.ranks import run_ranks

Case = tuple[Setting, tuple[Choice, ...]]
ONE: tuple[Choice, ...] = ("1f1b",)
TWO: tuple[Choice, ...] = ("1f1b", "zero-bubble")
ALL: tuple[Choice, ...] = (*TWO, "fuse-split")
ENDS: tuple[Choice, ...] = ("1f1b", "fuse-split")

TWO_RANKS: dict[str, Case] = {
    "without DDP": (Setting(ddp=False), ALL),
    "DDP": (Setting(steps=2), ONE),
    "variable lengths, 3-tuple loss": (Setting(lengths=(16, 8, 24), three=True), ALL),
    "tied embeddings, outputs freed": (Setting(tied=True, deallocate=True), TWO),
    "gradients reduced in backward": (Setting(overlap=True, steps=2), TWO),
    "per-token loss, distributed optimizer": (
        Setting(per_token=True, distributed_optimizer=True),
        TWO,
    ),
    "virtual chunks": (Setting(chunks=2), ONE),
    "virtual chunks, reduced in backward": (Setting(chunks=2, overlap=True, steps=2), ONE),
    "partial checkpointing": (Setting(partial_checkpoints=1), ONE),
    "partial checkpointing, virtual chunks": (
        Setting(chunks=2, num_microbatches=6, partial_checkpoints=2),
        ONE,
    ),
    "recomputation": (Setting(recompute=True, num_microbatches=2), ENDS),
    "gradient accumulation fusion": (
        Setting(accumulation_fusion=True, tied=True, num_microbatches=2),
        ("zero-bubble",),
    ),
    "layers that keep weight gradients back": (
        Setting(own_linears=True, delayed=True, overlap=True, num_microbatches=3, steps=2),
        ENDS,
    ),
    "further tokens predicted": (Setting(mtp=1, num_microbatches=2), TWO),
    "one micro-batch": (Setting(num_microbatches=1), TWO),
    "experts": (Setting(experts=2, num_microbatches=3, steps=2), TWO),
    "timers, loss scale": (Setting(timers=True, loss_scale=4.0, ddp=False), TWO),
}
FOUR_RANKS: dict[str, Case] = {
    "pp=4": (Setting(pp=4, num_microbatches=5), ALL),
    "pp=4, fewer micro-batches than stages": (Setting(pp=4, num_microbatches=2), ONE),
    "dp=2": (Setting(num_microbatches=3), TWO),
    "dp=2, reduced in backward, distributed optimizer": (
        Setting(overlap=True, distributed_optimizer=True, num_microbatches=3, steps=2),
        TWO,
    ),
    "dp=2, virtual chunks, weights gathered while it computes": (
        Setting(chunks=2, num_microbatches=2, gather=True, steps=2),
        ONE,
    ),
    "tp=2": (Setting(tp=2, num_microbatches=2), TWO),
    "tp=2, sequence parallel": (Setting(tp=2, sequence_parallel=True, num_microbatches=2), ALL),
    "ep=2": (Setting(ep=2, experts=4, num_microbatches=3), TWO),
    "cp=2": (Setting(cp=2, num_microbatches=2), TWO),
}


def compare_case(case: Case) -> dict[str, tuple[list[str], int]]:
    return compare(*case)


@pytest.fixture(scope="module")
def two_ranks() -> list[Found]:
    return run_ranks(2, lambda rank: compare_all(TWO_RANKS, compare_case), timeout_s=30, limit_s=90)


@pytest.fixture(scope="module")
def four_ranks() -> list[Found]:
    return run_ranks(
        4, lambda rank: compare_all(FOUR_RANKS, compare_case), timeout_s=30, limit_s=120
    )


def check(found: list[Found], name: str, setting: Setting) -> None:
    for rank, results in enumerate(found):
        for choice, (wrong, num_tasks) in results[name].items():
            assert wrong == [], f"{name}, {choice}, rank {rank}"
            forwards = setting.num_microbatches * setting.chunks
            most = {"1f1b": 2 * forwards, "zero-bubble": 3 * forwards}
            assert 2 * forwards <= num_tasks <= 3 * forwards, f"{name}, {choice}"
            assert num_tasks == most.get(choice, num_tasks), f"{name}, {choice}"


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(two_ranks: list[Found], name: str) -> None:
    check(two_ranks, name, TWO_RANKS[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks(four_ranks: list[Found], name: str) -> None:
    check(four_ranks, name, FOUR_RANKS[name][0])
