"""The sizes of dense decoder models: parameters, operations and bytes from a Hugging Face config.

Good to about a per cent: norms and positions are counted, rotary tables and the like are not.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_KEYS = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "n_embed", "dim"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab_size": ("vocab_size",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim",),
}
# Families whose feed-forward part has two matrices; all others have a gate as a third.
_TWO_MATRICES = ("gpt2", "gpt_neox", "gpt_neo", "gptj", "opt", "bloom", "falcon", "phi", "mpt",
                 "starcoder2", "gpt_bigcode", "stablelm_epoch", "codegen")  # fmt: skip
_LEARNED_POSITIONS = ("gpt2", "opt", "gpt_neo", "gpt_bigcode")
_TIED_BY_DEFAULT = ("gpt2", "opt", "gpt_neo", "bloom", "falcon", "gemma", "gemma2", "gemma3_text",
                    "gpt_bigcode", "mpt", "starcoder2")  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder-only transformer. `num_parameters` of the language model; a model with a
    scalar head (critic, reward) has `vocab_size` fewer rows in its head."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    gated: bool = True
    tied: bool = False
    num_positions: int = 0  # learned position vectors

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        kv_size = self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * self.query_size + 2 * kv_size)
        mlp = (3 if self.gated else 2) * self.hidden_size * self.intermediate_size
        return attention + mlp + 2 * self.hidden_size

    def num_parameters(self, *, scalar_head: bool = False) -> int:
        head = self.hidden_size if scalar_head else 0 if self.tied else self.embedding_parameters
        positions = self.num_positions * self.hidden_size
        body = self.num_layers * self.layer_parameters + self.hidden_size
        return body + self.embedding_parameters + positions + head

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    def layer_flops(self, context_tokens: float) -> float:
        """Forward, per token: two operations per weight, and attention over the context."""
        return 2.0 * self.layer_parameters + 4.0 * self.query_size * context_tokens

    def head_flops(self, *, scalar_head: bool) -> float:
        """Forward, per token."""
        return 2.0 * self.hidden_size * (1 if scalar_head else self.vocab_size)

    def forward_flops(self, context_tokens: float, *, scalar_head: bool = False) -> float:
        """Per token of the whole model."""
        body = self.num_layers * self.layer_flops(context_tokens)
        return body + self.head_flops(scalar_head=scalar_head)

    def cache_values(self, tp: int = 1) -> float:
        """Key and value numbers per token on each of `tp` devices (heads are copied where there
        are fewer than devices)."""
        heads = max(1.0, self.num_kv_heads / tp)
        return 2.0 * self.num_layers * heads * self.head_dim

    def splits(self, tp: int) -> bool:
        """Whether attention heads divide over `tp` devices."""
        kv = self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0
        return self.num_heads % tp == 0 and kv


def _llama(name: str, layers: int, hidden: int, inner: int, heads: int) -> ModelShape:
    return ModelShape(name, layers, hidden, inner, heads, heads, hidden // heads, 32000)


# Models that can be named instead of given as a folder, from their published configs.
KNOWN: tuple[ModelShape, ...] = (
    _llama("llama-7b", 32, 4096, 11008, 32),
    _llama("llama-13b", 40, 5120, 13824, 40),
    _llama("llama-33b", 60, 6656, 17920, 52),
    _llama("llama-65b", 80, 8192, 22016, 64),
    ModelShape("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256),
    ModelShape("llama-3-70b", 80, 8192, 28672, 64, 8, 128, 128256),
    ModelShape("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 128, 151936, tied=True),
    ModelShape("qwen2.5-7b", 28, 3584, 18944, 28, 4, 128, 152064),
    ModelShape("qwen2.5-14b", 48, 5120, 13824, 40, 8, 128, 152064),
    ModelShape("qwen2.5-32b", 64, 5120, 27648, 40, 8, 128, 152064),
    ModelShape("qwen2.5-72b", 80, 8192, 29568, 64, 8, 128, 152064),
)


def shape_of(path: str) -> ModelShape:
    """The shape of the model in a Hugging Face folder, or of a known name (``llama-33b``).

    Raises:
        ValueError: neither a folder with a config.json nor a known name, or not dense.
    """
    for known in KNOWN:
        if known.name == path.lower():
            return known
    file = Path(path, "config.json")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(known.name for known in KNOWN)
        raise ValueError(
            f"model {path!r}: no folder with a config.json, and none of the known names {names}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: expected keys and values")
    return from_config(tree, path)


def from_config(config: Mapping[str, object], name: str) -> ModelShape:
    """The shape that a Hugging Face config.json describes.

    Raises:
        ValueError: a size is missing, or the model is a mixture of experts.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config = {**config, **inner}
    family = str(config.get("model_type", ""))
    for key in _EXPERTS:
        if _number(config, key, 0) > 1:
            raise ValueError(f"model {name!r}: {key}={config[key]}: only dense models are planned")
    sizes = {what: _first(config, keys) for what, keys in _KEYS.items()}
    for what in ("num_layers", "hidden_size", "num_heads", "vocab_size"):
        if not sizes[what]:
            raise ValueError(f"model {name!r}: its config gives no {' or '.join(_KEYS[what])}")
    hidden, heads = sizes["hidden_size"], sizes["num_heads"]
    kv_heads = 1 if config.get("multi_query") is True else sizes["num_kv_heads"] or heads
    positions = family in _LEARNED_POSITIONS
    return ModelShape(
        name=name,
        num_layers=sizes["num_layers"],
        hidden_size=hidden,
        intermediate_size=sizes["intermediate_size"] or 4 * hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=sizes["head_dim"] or hidden // heads,
        vocab_size=sizes["vocab_size"],
        gated=family not in _TWO_MATRICES,
        tied=bool(config.get("tie_word_embeddings", family in _TIED_BY_DEFAULT)),
        num_positions=_first(config, ("max_position_embeddings", "n_positions"))
        if positions
        else 0,
    )


def _first(config: Mapping[str, object], keys: tuple[str, ...]) -> int:
    return next((n for key in keys if (n := _number(config, key, 0))), 0)


def _number(config: Mapping[str, object], key: str, default: int) -> int:
    value = config.get(key, default)
    return value if isinstance(value, int) and not isinstance(value, bool) else default
