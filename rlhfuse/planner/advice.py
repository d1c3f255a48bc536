"""What a plan means, in words: does fusion pay, what limits the step, what was assumed."""

from rlhfuse.group_training import why_never
from rlhfuse.planner.evaluate import MOST_SAMPLES, Evaluated
from rlhfuse.planner.rollout import LEAST_GAIN, sliced
from rlhfuse.planner.summary import Worth, Worthwhile
from rlhfuse.schedules.timing import makespan

LEAST_INTRA_GAIN = 0.02  # of the step


def worthwhile(found: Evaluated) -> Worthwhile:
    """Each fusion alone against the serial step."""
    step_s = found.serial.step
    rollout = found.rollout
    inter_s = max(0.0, rollout.serial.end_s - rollout.fused.end_s)
    if found.early_pays:
        inter_s = step_s - found.fused.step
    serial_s, fused_s = found.minibatch_s
    intra_s = found.workload.num_minibatches * (serial_s - fused_s)
    return Worthwhile(
        _worth(inter_s / step_s, LEAST_GAIN, _inter_reason(found, inter_s)),
        _worth(intra_s / step_s, LEAST_INTRA_GAIN, _intra_reason(found, intra_s)),
    )


def _worth(saving: float, least: float, reason: str) -> Worth:
    return Worth(saving >= least, saving, reason)


def _inter_reason(found: Evaluated, saved_s: float) -> str:
    workload, serial = found.workload, found.serial
    if found.early_pays:
        return _early_reason(found)
    if not workload.scored:
        idle = "nothing is scored by a model: freed devices would have nothing to do"
        return f"{idle}, and {_why_no_early(found)}"
    share = serial.inference / serial.step
    roles = ", ".join(workload.scored)
    if saved_s < LEAST_GAIN * serial.step:
        longest = max(workload.lengths)
        mean = sum(workload.lengths) / workload.num_samples
        if share < LEAST_GAIN:
            return f"inference ({roles}) is only {share:.1%} of the serial step"
        return (
            f"the longest response is only {longest / mean:.1f} times the mean: there is no tail "
            "to hide inference behind"
            if longest < 1.5 * mean
            else f"devices become free too late to hide inference ({roles}, {share:.1%} of the "
            "serial step)"
        )
    hidden = saved_s / max(serial.inference, 1e-12)
    moved = found.rollout.fused.num_moved
    tail = f"{moved} samples move" if moved else "no sample needs to move"
    return f"hides {min(1.0, hidden):.0%} of inference ({roles}) behind the long tail; {tail}"


def _early_reason(found: Evaluated) -> str:
    later_s = found.without_early.step
    without = max(0.0, 1 - later_s / found.serial.step)
    return (
        f"freed devices train complete groups while others generate (fusion.early_training): "
        f"{1 - found.fused.step / later_s:.1%} of the step; scoring alone would save {without:.1%}"
    )


def _why_no_early(found: Evaluated) -> str:
    reason = why_never(found.config)
    if reason:
        return f"groups are trained together: {reason}"
    if found.early is None:
        return "no replica of the actor fits on devices that become free before all are"
    return "training complete groups early would gain nothing: devices become free too late"


def _intra_reason(found: Evaluated, saved_s: float) -> str:
    training, serial = found.training, found.serial
    if len(training.fused) == 1:
        return "there is no critic to fuse the actor with"
    share = serial.training / serial.step
    if saved_s < LEAST_INTRA_GAIN * serial.step:
        if share < 2 * LEAST_INTRA_GAIN:
            return f"training is only {share:.1%} of the serial step"
        if max(t.parallel.pp for t in training.serial) == 1:
            return "without pipeline stages there are no bubbles to fill"
        return "the serial pipelines have few bubbles to fill"
    ratio = training.serial_s / training.fused_s
    return f"training runs {ratio:.2f} times as fast, one model in the other's bubbles"


def recommendation(found: Evaluated) -> dict[str, int | float | str | bool]:
    """Keys of the configuration; planning with them again gives this plan."""
    told: dict[str, int | float | str | bool] = {"plan.rollout_tp": found.rollout.layout.tp}
    for trained in found.trained:
        role, parallel = trained.role, trained.parallel
        told[f"plan.{role}_tp"] = parallel.tp
        told[f"plan.{role}_pp"] = parallel.pp
        if not found.early_pays:  # a group is cut by its tokens alone
            told[f"{role}.num_microbatches"] = trained.num_microbatches
        if parallel.tp == 1:
            told[f"placement.{role}_pp"] = parallel.pp
    worth = worthwhile(found)
    told["fusion.inter_stage"] = "auto" if worth.inter_stage.worthwhile else "off"
    told["fusion.intra_stage"] = "auto" if worth.intra_stage.worthwhile else "off"
    told["fusion.migration"] = found.rollout.migration
    if len(found.workload.trained) == 1:
        told["fusion.early_training"] = "auto" if found.early_pays else "off"
    if found.early is not None and found.early_pays:
        told["fusion.migration"] = found.early.migration
    fused = makespan(found.training.schedule)
    told["fusion.split_weight"] = found.training.split_schedule_s < 0.99 * fused
    return told


def limits(found: Evaluated) -> list[str]:
    """What the fused step consists of, largest first."""
    fused, workload, cost = found.fused, found.workload, found.rollout.cost
    longest = max(workload.lengths)
    context = longest / 2 + max(workload.prompts)
    alone_s = longest * cost.step_s(1, context)
    samples = workload.num_samples / found.rollout.layout.instances
    told = [
        (
            fused.generation,
            f"generation: {samples:.0f} samples an instance; the longest response ({longest} "
            f"tokens) takes {alone_s:.3g} s even alone, {alone_s / fused.generation:.0%} of it",
        ),
        (fused.inference, "inference that is left after the last response"),
        (fused.training, _training_limit(found)),
        (
            fused.other,
            "weights to the engines"
            + (", training state to the host and back" if found.offload_s else ""),
        ),
    ]
    told.sort(key=lambda item: -item[0])
    step_s = fused.step
    return [f"{seconds / step_s:.0%} ({seconds:.3g} s) {text}" for seconds, text in told]


def _training_limit(found: Evaluated) -> str:
    if found.early_pays:
        return "training that is left after the last response, and the exchange of gradients"
    training = found.training
    chosen = training.fused if found.intra_pays else training.serial
    exchange = sum(t.exchange_s for t in chosen)
    total = found.minibatch_s[1]
    return (
        f"training: {found.workload.num_minibatches} mini-batches of {total:.3g} s; exchanging "
        f"gradients and the optimizer are {exchange / total:.0%} of it"
    )


def assumptions(found: Evaluated) -> list[str]:
    """What the numbers stand on."""
    device, efficiency = found.cluster.device, found.cluster.device.efficiency
    network = device.network_bandwidth * 8 / 1e9
    return [
        f"{'' if 'measured' in device.source else 'nothing was measured: '}{device.source}",
        f"parts of peaks reached: training {efficiency.train:.0%}, inference "
        f"{efficiency.infer:.0%}, memory {efficiency.memory:.0%}, links {efficiency.link:.0%}, "
        f"network {efficiency.network:.0%} of {network:.0f} Gb/s a device",
        f"{efficiency.sync_overlap:.0%} of the gradient exchange hides behind backward passes",
        found.workload.described,
        f"prompts of {found.workload.prompts[0]} tokens",
        "the scheduler has seen lengths of this distribution before, and its costs are right",
        *_slice(found),
    ]


def _slice(found: Evaluated) -> list[str]:
    some, small = sliced(found.workload, found.rollout.layout, MOST_SAMPLES)
    if some is found.workload:
        return []
    return [
        f"generation and inference are simulated on a slice of the cluster: {small.instances} of "
        f"{found.rollout.layout.instances} instances with {some.num_samples} samples"
    ]


def warnings(found: Evaluated) -> list[str]:
    """Where fusion does not pay, and what cannot be run as planned."""
    worth = worthwhile(found)
    told = [
        f"{name} fusion does not pay here ({one.saving_fraction:.1%} of the step): {one.reason}"
        for name, one in (("inter-stage", worth.inter_stage), ("intra-stage", worth.intra_stage))
        if not one.worthwhile
    ]
    if any(t.parallel.tp > 1 for t in found.trained) or found.rollout.layout.tp > 1:
        told.append(
            "tensor-parallel layouts are predicted; `rlhfuse train` itself does not run them yet"
        )
    early = found.early
    if found.early_pays and early and early.trained.parallel.tp * early.trained.parallel.pp > 1:
        told.append(
            "early training on replicas of several devices is predicted; `rlhfuse train` itself "
            "trains groups early on replicas of one device only"
        )
    paper = found.rollout.policies["paper"]
    if paper > 1.005 * found.rollout.policies["serial"]:
        told.append(
            f"a fixed migration threshold (fusion.migration=paper) would make it slower than "
            f"serial: {paper:.3g} s instead of {found.rollout.policies['serial']:.3g} s of "
            "generation and inference"
        )
    if found.offload_s:
        told.append(
            f"training state does not fit beside the engine: {found.offload_s:.3g} s a step to "
            "move it to the host and back are included"
        )
    return told
