"""Checkpoints of training: safetensors and JSON, nothing pickled.

``ROLE/stage_S.safetensors`` holds a pipeline stage's weights and optimizer moments,
``ROLE/stage_S.json`` says what it is, with a digest of every tensor. Moments that data-parallel
replicas share out are in ``ROLE/shard_R_stage_S`` files beside it. ``rank_R.safetensors`` holds a
rank's random number states. Each rank writes its own files into a folder that the caller puts in
place when it is whole. Tensors are found by name, so a checkpoint also loads into other stages.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rlhfuse.models.loading import INDEX, load_config, save_description
from rlhfuse.models.stage import EMBEDDING, LM_HEAD, SCORE
from rlhfuse.placement import StagePlacement
from rlhfuse.training.optimizer import OptimizerState
from rlhfuse.training.snapshot import Keep, Part
from rlhfuse.training.trained_stage import TrainedStage

logger = logging.getLogger(__name__)

WEIGHT = "weight"
_CPU_STATE, _CUDA_STATE = "cpu", "cuda"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class StageRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stage's file holds. `layers`: of all stages; `tensors`: digest by name; `shards`:
    files that the stage's moments are spread over."""

    role: str
    pp_stage: int
    layers: tuple[tuple[int, int], ...]
    optimizer_steps: int
    tensors: dict[str, str]
    shards: int = 1


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 of type, shape and bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    head = f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"
    return hashlib.sha256(head.encode() + flat.numpy().tobytes()).hexdigest()


def stage_part(stage: TrainedStage, placement: StagePlacement, keep: Keep) -> Part:
    """One stage's file and record, to be written: the first replica all of it, the others their
    shards."""
    if stage.replica >= stage.num_shards:
        return lambda folder: None
    state = stage.optimizer.state()
    tensors = {}
    if stage.replica == 0:
        tensors = {f"{WEIGHT}/{name}": p.detach() for name, p in stage.stage.named_parameters()}
    held = {name: keep(tensor) for name, tensor in {**tensors, **state.tensors}.items()}
    record = StageRecord(
        role=stage.role,
        pp_stage=stage.pp_stage,
        layers=placement.layers,
        optimizer_steps=state.steps,
        tensors={},
        shards=stage.num_shards,
    )
    shard = f"shard_{stage.replica}_" if stage.replica else ""
    name = f"{stage.role}/{shard}stage_{stage.pp_stage}.safetensors"
    return lambda folder: _write_stage(folder / name, held, record)


def _write_stage(path: Path, held: Mapping[str, torch.Tensor], record: StageRecord) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    _write_tensors(path, tensors)
    record = msgspec.structs.replace(record, tensors=digests)
    path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(record)))


def _write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def load_stage_state(folder: Path, stage: TrainedStage) -> None:
    """Restore one stage's parameters and optimizer.

    Raises:
        ValueError: a tensor is missing or damaged, or has another shape or type.
    """
    records = read_records(folder, stage.role)
    if stage.layers not in records[0].layers:
        logger.warning(
            "%s: the %s was cut into layers %s, now into %s: results stay equal to rounding only",
            folder,
            stage.role,
            records[0].layers,
            stage.layers,
        )
    where = {
        name: (path.with_suffix(".safetensors"), digest)
        for path, record in _with_shards(folder / stage.role, records)
        for name, digest in record.tensors.items()
    }
    moments = {}
    with torch.no_grad():
        for name, parameter in stage.stage.named_parameters():
            saved = name
            if name == LM_HEAD and f"{WEIGHT}/{name}" not in where and stage.stage.tied:
                saved = EMBEDDING  # the copy of a tied embedding
            parameter.copy_(_read(where, f"{WEIGHT}/{saved}", parameter, parameter.dtype))
            for key in ("exp_avg", "exp_avg_sq", "master"):
                if f"{key}/{saved}" in where:
                    tensor = _read(where, f"{key}/{saved}", parameter, torch.float32)
                    moments[f"{key}/{name}"] = tensor
    stage.optimizer.restore(OptimizerState(records[0].optimizer_steps, moments))


def read_records(folder: Path, role: str) -> tuple[StageRecord, ...]:
    """The records of a role's stages, in stage order.

    Raises:
        ValueError: there is no such checkpoint, or a stage is missing.
    """
    paths = sorted((folder / role).glob("stage_*.json"), key=_stage_number)
    if not paths:
        raise ValueError(f"checkpoint {folder}: holds no {role}")
    records = tuple(_record(path) for path in paths)
    expected = list(range(len(records[0].layers)))
    if [record.pp_stage for record in records] != expected:
        raise ValueError(
            f"checkpoint {folder}: the {role} has {len(expected)} stages, but there are "
            f"{', '.join(path.stem for path in paths)}"
        )
    return records


def _with_shards(
    folder: Path, records: Sequence[StageRecord]
) -> Iterator[tuple[Path, StageRecord]]:
    """The files of all stages and of their shards, with their records."""
    for record in records:
        name = f"stage_{record.pp_stage}.json"
        yield folder / name, record
        for shard in range(1, record.shards):
            path = folder / f"shard_{shard}_{name}"
            if not path.is_file():
                raise ValueError(f"checkpoint {folder}: {path.name} is missing")
            yield path, _record(path)


def _record(path: Path) -> StageRecord:
    try:
        return msgspec.json.decode(path.read_bytes(), type=StageRecord)
    except msgspec.DecodeError as error:
        raise ValueError(f"checkpoint record {path} is damaged: {error}") from error


def rng_part(rank: int, device: torch.device) -> Part:
    """This rank's random number states, to be written."""
    states = {_CPU_STATE: torch.get_rng_state()}
    if device.type == "cuda":
        states[_CUDA_STATE] = torch.cuda.get_rng_state(device)
    return lambda folder: _write_tensors(folder / f"rank_{rank}.safetensors", states)


def load_rng(folder: Path, rank: int, device: torch.device) -> None:
    """Restore this rank's random number states, where the checkpoint has some."""
    path = folder / f"rank_{rank}.safetensors"
    if not path.is_file():
        logger.warning("%s has no random number states for rank %d", folder, rank)
        return
    try:
        states = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint file {path} is damaged: {error}") from error
    torch.set_rng_state(states[_CPU_STATE])
    if device.type == "cuda" and _CUDA_STATE in states:
        torch.cuda.set_rng_state(states[_CUDA_STATE], device)


def export_part(
    folder: str, weights: Mapping[str, torch.Tensor], pp_stage: int, num_stages: int, keep: Keep
) -> Part:
    """One stage's weights as one file of the Hugging Face model folder `folder`, to be written."""
    held = {name: keep(weight) for name, weight in weights.items()}
    name = f"model-{pp_stage + 1:05d}-of-{num_stages:05d}.safetensors"

    def write(base: Path) -> None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in held.items()}
        _write_tensors(base / folder / name, tensors, {"format": "pt"})

    return write


def complete_export(folder: Path, source: str) -> None:
    """When all stages are written: index, and config and tokenizer as in the folder `source`."""
    weight_map, total_bytes, dtype = {}, 0, torch.float32
    for path in sorted(folder.glob("model-*-of-*.safetensors")):
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                part = reader.get_slice(name)
                weight_map[name], dtype = path.name, _DTYPES[part.get_dtype()]
                total_bytes += math.prod(part.get_shape()) * dtype.itemsize
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    save_description(
        folder,
        load_config(source),
        scalar=SCORE in weight_map,
        dtype=dtype,
        tokenizer_from=source,
    )


def _read(
    where: dict[str, tuple[Path, str]], name: str, like: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """A tensor of a checkpoint, checked."""
    if name not in where:
        raise ValueError(f"checkpoint: there is no {name}; it is of another model")
    path, digest = where[name]
    try:
        with safe_open(path, framework="pt") as reader:
            tensor: torch.Tensor = reader.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint file {path}: {name} cannot be read: {error}") from error
    if tensor_digest(tensor) != digest:
        raise ValueError(f"checkpoint file {path}: {name} is damaged (its digest differs)")
    if tensor.shape != like.shape or tensor.dtype != dtype:
        raise ValueError(
            f"checkpoint file {path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, "
            f"here it is {dtype} {tuple(like.shape)}"
        )
    return tensor


def _stage_number(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])
