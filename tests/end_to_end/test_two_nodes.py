"""Two Ray nodes: the way to a cluster. Workers are spread, keys are used, and fused steps are the
serial ones of a single node, bit for bit."""

from pathlib import Path

import msgspec
import psutil
import pytest

from rlhfuse.cluster import Cluster
from rlhfuse.config import Config
from rlhfuse.fleet import Fleet
from rlhfuse.resolve import resolve
from rlhfuse.session import open_session
from rlhfuse.trainer import Fusions, StepResult, Trainer
from tests.end_to_end.tiny_run import make_assets, ray_cluster, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
replace = msgspec.structs.replace


def _steps(
    config: Config, *, fused: bool
) -> tuple[list[StepResult], set[str], list[psutil.Process]]:
    """Two steps, the nodes that workers were on, and the workers."""
    with open_session(resolve(config), resume=False) as session:
        trainer = Trainer(session, Fusions(inter_stage=fused, intra_stage=fused))
        trainer.sync_weights()
        results = [trainer.step(), trainer.step()]
        processes = [psutil.Process(pid) for pid in session.fleet.pids.values()]
        return results, _nodes(session.fleet), processes


def _nodes(fleet: Fleet) -> set[str]:
    return {member.spec.seat.node.node_id for member in fleet._members.values()}


def test_two_nodes_train_to_the_same_bits(tmp_path: Path, ray_address: str) -> None:
    make_assets(tmp_path)
    config = tiny_config(tmp_path, tmp_path / "runs", num_devices=2, ray_address=ray_address)
    alone, one, _ = _steps(config, fused=False)
    with ray_cluster() as cluster:
        cluster.add_node(num_cpus=2)
        placement = replace(config.placement, ray_address=cluster.address)
        trainer = replace(config.trainer, experiment_name="two-nodes")
        together, two, workers = _steps(
            replace(config, placement=placement, trainer=trainer), fused=True
        )
    assert (len(one), len(two)) == (1, 2)
    assert [(r.tokens, r.rewards, r.weights) for r in together] == [
        (r.tokens, r.rewards, r.weights) for r in alone
    ]
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


@pytest.mark.parametrize(
    ("address", "why"), [("127.0.0.1:1", "no Ray cluster answers"), ("ray://x:1", "HOST:PORT")]
)
def test_an_address_where_no_cluster_is_ends_with_a_clear_line(address: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"placement.ray_address='{address}': .*{why}"):
        Cluster(address)
