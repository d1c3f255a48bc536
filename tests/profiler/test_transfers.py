"""Messages and collectives between ranks: known waits are found, unknown traffic is not guessed."""

import json
from pathlib import Path

import pytest

from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace

Event = dict[str, object]
SEND_RECV = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
RCCL = "ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)"


class _Rank:
    """Writes one rank's trace; microseconds."""

    def __init__(self, rank: int, skew: float = 0.0) -> None:
        self.rank = rank
        self.events: list[Event] = []
        self._skew = skew
        self._number = 0

    def _add(self, cat: str, name: str, ts: float, dur: float, **args: object) -> None:
        self.events.append(
            {"ph": "X", "cat": cat, "name": name, "ts": 1e6 + ts + self._skew, "dur": dur}
            | {"pid": self.rank, "tid": 1, "args": args}
        )

    def compute(self, ts: float, dur: float) -> None:
        self._add("kernel", "gemm", ts, dur, stream=7)

    def message(
        self, ts: float, dur: float, *, to: int | None = None, of: int | None = None
    ) -> None:
        args = {"Collective name": "send" if of is None else "recv"}
        peer = {"Dst Rank": to} if of is None else {"Src Rank": of}
        self._add("kernel", SEND_RECV, ts, dur, **args, **peer)

    def batched(self, launch: float, ts: float, dur: float, *calls: tuple[str, int]) -> None:
        """What PyTorch writes for batch_isend_irecv: the kernel says nothing of its own."""
        self._number += 1
        for place, (what, peer) in enumerate(calls):
            name = "Dst Rank" if what == "send" else "Src Rank"
            args = {"Collective name": what, name: peer}
            self._add("cpu_op", "record_param_comms", launch - 9 + place, 0.5, **args)
        self._add("cuda_runtime", "cudaLaunchKernelExC", launch, 2, correlation=self._number)
        self._add("user_annotation", "nccl:coalesced", launch - 10, 15)
        self._add("kernel", SEND_RECV, ts, dur, correlation=self._number)

    def collective(self, ts: float, dur: float, what: str, group: str, purpose: str) -> None:
        args = {"Collective name": what, "Process Group Name": group}
        more = {"Process Group Description": purpose, "Process Group Ranks": "[0, 1]"}
        self._add("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", ts, dur, **args, **more)

    def save(self, folder: Path) -> None:
        info = {"backend": "nccl", "rank": self.rank, "world_size": 2}
        whole = {"schemaVersion": 1, "distributedInfo": info, "traceEvents": self.events}
        (folder / f"rank{self.rank}.json").write_text(json.dumps(whole))


def _causes(folder: Path, *ranks: _Rank) -> tuple[list[dict[str, float]], float | None, str]:
    for rank in ranks:
        rank.save(folder)
    _, summary = explain(open_trace([folder]), None, critic_scale=None)
    for rank_summary in summary.per_rank:
        assert sum(rank_summary.causes.values()) == rank_summary.wall_s
    rows = [{k: round(v * 1e6, 3) for k, v in r.causes.items()} for r in summary.per_rank]
    return rows, summary.bubble_fraction, " ".join(summary.warnings)


def _stages(batched: bool, skew: float = 0.0) -> tuple[_Rank, _Rank]:
    """Rank 0 computes 100 us, sends for 10, gets its gradient back; rank 1 waited all along."""
    zero, one = _Rank(0), _Rank(1, skew)
    zero.compute(0, 100)
    one.compute(110, 200)
    zero.compute(320, 80)
    if batched:
        zero.batched(-50, 100, 10, ("send", 1))
        one.batched(-40, 0, 110, ("recv", 0))
        zero.batched(-30, 110, 210, ("recv", 1))
        one.batched(-20, 310, 10, ("send", 0))
    else:
        zero.message(100, 10, to=1)
        one.message(0, 110, of=0)
        zero.message(110, 210, of=1)
        one.message(310, 10, to=0)
    one.compute(399, 1)
    return zero, one


@pytest.mark.parametrize("name", [SEND_RECV, RCCL])
@pytest.mark.parametrize("batched", [False, True])
def test_a_receive_is_wait_and_transfer(tmp_path: Path, batched: bool, name: str) -> None:
    ranks = _stages(batched)
    for event in (event for rank in ranks for event in rank.events):
        event["name"] = name if event["name"] == SEND_RECV else event["name"]
    (zero, one), bubble, _ = _causes(tmp_path, *ranks)
    assert zero == {"compute": 180, "transfer": 20, "wait_downstream": 200}
    assert one == {"compute": 201, "transfer": 20, "wait_upstream": 100, "host_gap": 79}
    assert bubble == pytest.approx(1 - (180 + 201) / 800)


@pytest.mark.parametrize("local", [False, True])
def test_names_of_messages_count_where_they_number_the_job(tmp_path: Path, local: bool) -> None:
    """PyTorch names a message by ranks within its group: both ranks being 0 says nothing."""
    ranks = _stages(True)
    for rank in ranks:
        for event in rank.events:
            args = event["args"]
            assert isinstance(args, dict)
            if event["name"] == "record_param_comms":
                what, own = args["Collective name"], 1 - rank.rank if local else rank.rank
                peer = args.get("Dst Rank", args.get("Src Rank"))
                arrow = "->" if what == "send" else "<-"
                event.update(cat="user_annotation", name=f"nccl:{what} {own}{arrow}{peer}")
    (zero, one), bubble, told = _causes(tmp_path, *ranks)
    if local:
        assert bubble is None
        assert "carry no peers" in told
    else:
        assert zero == {"compute": 180, "transfer": 20, "wait_downstream": 200}
        assert one["wait_upstream"] == 100


def test_clocks_that_disagree_are_aligned_on_messages(tmp_path: Path) -> None:
    rows, _, told = _causes(tmp_path, *_stages(True, skew=5000.0))
    assert rows[0] == pytest.approx({"compute": 180, "transfer": 20, "wait_downstream": 200})
    assert rows[1]["wait_upstream"] == pytest.approx(100, abs=0.01)
    assert "clocks disagree" in told


def test_kernels_that_say_nothing_are_not_guessed(tmp_path: Path) -> None:
    """Without the calls before the launch, the same traffic could be an all-to-all."""
    ranks = _stages(True)
    for rank in ranks:
        rank.events = [e for e in rank.events if e["name"] != "record_param_comms"]
    rows, bubble, told = _causes(tmp_path, *ranks)
    assert bubble is None
    assert rows[1]["transfer"] == 120
    assert "4 SendRecv kernels carry no peers" in told


def test_messages_without_a_partner_are_not_split(tmp_path: Path) -> None:
    zero, one = _stages(False)
    zero.events.pop(2)  # rank 0's send is lost: nobody knows which receive it belonged to
    rows, _, told = _causes(tmp_path, zero, one)
    assert "not matched" in told or rows[1].get("wait_upstream", 0) == 0


def test_a_straggler_is_told_from_the_sync_itself(tmp_path: Path) -> None:
    zero, one = _Rank(0), _Rank(1)
    zero.compute(0, 50)
    zero.collective(50, 100, "allreduce", "3", "DATA_PARALLEL_GROUP_WITH_CP")
    one.compute(0, 120)
    one.collective(120, 30, "allreduce", "3", "DATA_PARALLEL_GROUP_WITH_CP")
    zero.collective(150, 10, "allreduce", "4", "TENSOR_MODEL_PARALLEL_GROUP")
    one.collective(150, 10, "allreduce", "4", "TENSOR_MODEL_PARALLEL_GROUP")
    rows, bubble, _ = _causes(tmp_path, zero, one)
    assert rows[0] == {"compute": 50, "straggling_peer": 70, "dp_sync": 30, "transfer": 10}
    assert rows[1] == {"compute": 120, "dp_sync": 30, "transfer": 10}
    assert bubble is None  # no pipeline was seen
