"""Model folders in Hugging Face form: reading a stage's own tensors, and writing models.

safetensors and JSON only; nothing is unpickled and nothing is downloaded.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhfuse.models.stage import SCORE, Head, ModelConfig, ModelStage

log = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def load_config(path: Path | str) -> ModelConfig:
    """The config of a model folder. Raises ValueError for a missing folder, an architecture other
    than Llama, Qwen2 and Qwen3, or a feature of theirs that is not supported."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"model folder {path}: no config.json there; give a Hugging Face folder")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"model folder {path}: config.json is not readable: {error}") from error
    # By exact type: other families subclass these, with layers of their own.
    if type(config) not in (LlamaConfig, Qwen2Config, Qwen3Config):
        raise ValueError(
            f"model folder {path}: architecture {config.model_type!r} is not supported; "
            "supported are llama, qwen2 and qwen3"
        )
    assert isinstance(config, (LlamaConfig, Qwen2Config, Qwen3Config))
    _refuse_unsupported(path, config)
    return config


def load_trained_config(path: Path | str) -> ModelConfig:
    """`load_config` of a model that is to be trained. Raises ValueError also for dropout within
    attention, which would be another model than the one that samples and scores: the ratio of the
    two policies would not be 1 to begin with. (A model that only scores has none in any case.)"""
    config = load_config(path)
    if config.attention_dropout:
        raise ValueError(
            f"model folder {path}: attention_dropout {config.attention_dropout} is not supported "
            "in training: set it to 0.0 in config.json (sampling and scoring have none in any "
            "case); adapters may have dropout: lora_rank and lora_dropout"
        )
    return config


def _refuse_unsupported(path: Path, config: ModelConfig) -> None:
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"model folder {path}: sliding-window attention is not supported; "
            "set use_sliding_window to false if your sequences fit in the window"
        )
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in STATIC_ROPE_TYPES:
        # These change with the longest sequence of a batch: a sample would depend on its company.
        raise ValueError(
            f"model folder {path}: rope type {rope_type!r} is not supported; "
            f"supported are {', '.join(STATIC_ROPE_TYPES)}"
        )


def load_stage(
    path: Path | str,
    *,
    head: Head,
    layers: range,
    first: bool,
    last: bool,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    new_head_seed: int | None = None,
) -> ModelStage:
    """A pipeline stage from a model folder, reading only the tensors that it holds.

    `new_head_seed`: where a scalar head is asked for and the folder has none (it is a language
    model), draw one from this seed; without it that is a ValueError. ValueError too for what
    `load_config` refuses, for missing or misshapen tensors, and for the wrong kind of head.
    """
    path = Path(path)
    config = load_config(path)
    assert 0 <= layers.start < layers.stop <= config.num_hidden_layers, f"{layers=}"
    with torch.device("meta"):
        stage = ModelStage(config, head=head, layers=layers, first=first, last=last)
    for name, child in stage.named_children():
        if name != "rotary":  # its frequencies are computed, and stay in float32
            child.to(dtype).to_empty(device=device)
    stage.rotary.to(device=device)
    _fill(stage, path, new_head_seed)
    return stage


def load_model(
    path: Path | str,
    *,
    head: Head,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    new_head_seed: int | None = None,
) -> ModelStage:
    """A whole model as a single stage; see `load_stage`."""
    return load_stage(
        path,
        head=head,
        layers=range(load_config(path).num_hidden_layers),
        first=True,
        last=True,
        device=device,
        dtype=dtype,
        new_head_seed=new_head_seed,
    )


def _fill(stage: ModelStage, path: Path, new_head_seed: int | None) -> None:
    files = _tensor_files(path)
    if stage.head is Head.LM and SCORE in files:
        raise ValueError(
            f"model folder {path} is a reward or value model (it has {SCORE}); "
            "a language model is needed here"
        )
    wanted = stage.hf_names_to_load()
    tensors = _read(path, files, [name for name in wanted if name in files])
    if SCORE in wanted and SCORE not in files:
        if new_head_seed is None:
            raise ValueError(
                f"model folder {path} has no {SCORE}: it is no reward or value model; "
                "give one, or ask for a new head"
            )
        log.warning("%s: no scalar head there; drawing a new one, seed %d", path, new_head_seed)
        tensors = [*tensors, (SCORE, _new_head(stage.config.hidden_size, new_head_seed))]
    try:
        stage.load_tensors(tensors)
    except ValueError as error:
        raise ValueError(f"model folder {path}: {error}") from error


def _new_head(hidden_size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Small outputs on normed hidden states: the usual start of value heads (TRL's rule).
    weight = torch.randn(1, hidden_size, generator=generator)
    return weight.mul_((hidden_size + 1.0) ** -0.5)


def _tensor_files(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded model or the header of the one file."""
    if (path / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
        return weight_map
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"model folder {path}: no {WEIGHTS} there; convert it to safetensors")
    with safe_open(path / WEIGHTS, framework="pt") as reader:
        return {name: WEIGHTS for name in reader.keys()}  # noqa: SIM118 (not a dict)


def _read(
    path: Path, files: dict[str, str], names: Sequence[str]
) -> Iterable[tuple[str, torch.Tensor]]:
    for file in sorted({files[name] for name in names}):
        with safe_open(path / file, framework="pt") as reader:
            for name in names:
                if files[name] == file:
                    yield name, reader.get_tensor(name)


def save_pretrained(
    path: Path | str,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    tokenizer_from: Path | str | None,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write a model folder that transformers' Auto classes load: `tensors` with Hugging Face
    names, held in memory one shard at a time; the tokenizer's files copied from a folder."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total_bytes, dtype = 0, torch.float32
    for count, shard in enumerate(_shards(tensors, shard_bytes), start=1):
        file = f"model-{count:05d}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        dtype = next(iter(shard.values())).dtype
    if len(set(weight_map.values())) == 1:
        (path / "model-00001.safetensors").replace(path / WEIGHTS)
        (path / INDEX).unlink(missing_ok=True)
    else:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    save_description(
        path, config, scalar=SCORE in weight_map, dtype=dtype, tokenizer_from=tokenizer_from
    )


def save_description(
    path: Path,
    config: ModelConfig,
    *,
    scalar: bool,
    dtype: torch.dtype,
    tokenizer_from: Path | str | None,
) -> None:
    """What stands beside the tensors of a model folder: config.json and the tokenizer's files."""
    _save_config(path, config, scalar=scalar, dtype=dtype)
    if tokenizer_from is not None:
        for file in TOKENIZER_FILES:
            if (Path(tokenizer_from) / file).is_file():
                shutil.copyfile(Path(tokenizer_from) / file, path / file)


def _shards(
    tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        held += tensor.nbytes
    if not shard:
        raise ValueError("no tensors to save")
    yield shard


def _save_config(path: Path, config: ModelConfig, *, scalar: bool, dtype: torch.dtype) -> None:
    families = {LlamaConfig: "Llama", Qwen2Config: "Qwen2", Qwen3Config: "Qwen3"}
    kind = "ForSequenceClassification" if scalar else "ForCausalLM"
    values = config.to_dict()
    values["architectures"] = [families[type(config)] + kind]
    values["dtype"] = str(dtype).removeprefix("torch.")
    if scalar:
        values["id2label"], values["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
        # A scalar head has no second use for the embedding; transformers would tie it to `score`.
        values["tie_word_embeddings"] = False
    (path / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
