"""One weight update: the training workers offer, the rollout workers pull, digests prove it."""

from collections.abc import Sequence

from rlhfuse import messages as m
from rlhfuse.fleet import Fleet
from rlhfuse.weights.plan import RankTensors, WeightPlan, make_plan


def sync_weights(fleet: Fleet, roles: Sequence[m.Role], version: int) -> dict[m.Role, WeightPlan]:
    """Bring every engine and scorer to `version`; each receiver pulls each tensor once from the
    rank that owns it. A rollout worker that starts later gets the same weights then.

    Raises:
        WorkerFailed: a worker failed, or what arrived is not what was sent.
    """
    plans: dict[m.Role, WeightPlan] = {}
    fleet.withdraw()
    for role in roles:
        fleet.broadcast(fleet.training, m.PrepareWeights(roles=(role,), version=version))
        prepared = fleet.gather(
            m.WeightsPrepared, fleet.training, f"{role} weights of version {version} to be offered"
        )
        plan = make_plan(
            [
                RankTensors(
                    fleet.endpoint(worker),
                    dict(zip(offer.names, offer.digests, strict=True)),
                )
                for worker, offer in prepared
            ]
        )
        sources = tuple(m.TensorSource(endpoint, names) for endpoint, names in plan.sources)
        fleet.offer(m.PullWeights(role=role, version=version, sources=sources, digest=plan.digest))
        fleet.await_weights(f"{role} weights of version {version} to arrive")
        plans[role] = plan
    return plans
