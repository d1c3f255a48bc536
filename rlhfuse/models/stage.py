"""One pipeline stage of a Hugging Face model, built from transformers' own decoder layers."""

import copy
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from rlhfuse.models.attention import ATTENTION_NAME, Attend, PackedAttention, register_attention
from rlhfuse.models.packed import PackedBatch

ModelConfig = LlamaConfig | Qwen2Config | Qwen3Config
Compute = Callable[[torch.Tensor], torch.Tensor]
AroundLayer = Callable[[Compute, torch.Tensor], torch.Tensor]
"""(a layer, hidden states) -> hidden states: how a layer is called, such as to be called again."""

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
SCORE = "score.weight"


class Head(Enum):
    """What stands on the last hidden state.

    LM: the vocabulary (``*ForCausalLM``). SCALAR: one number per token, a value or a reward
    (``*ForSequenceClassification`` with one label).
    """

    LM = "lm"
    SCALAR = "scalar"


class RMSNorm(nn.Module):
    """Hugging Face's RMSNorm, bit for bit, except that float64 stays float64 (theirs rounds to
    float32 inside, and near ties are decided in float64)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        normed = functional.rms_norm(wide, (wide.shape[-1],), eps=self._eps)
        return self.weight * normed.to(hidden.dtype)


class ModelStage(nn.Module):
    """Layers `layers` of a model; with the embedding if `first`, the final norm and head if `last`.

    Parameters carry their Hugging Face names (``model.layers.3.self_attn.q_proj.weight``).
    With tied embeddings, a last stage that is not also the first holds its own copy of the
    embedding: see `tied_parameter`.
    """

    def __init__(
        self, config: ModelConfig, *, head: Head, layers: range, first: bool, last: bool
    ) -> None:
        """Parameters are made on torch's current default device (use ``meta`` before loading)."""
        super().__init__()
        register_attention()
        # The config is the layers' own: it must name our attention and nobody else's model.
        config = copy.deepcopy(config)
        config._attn_implementation = ATTENTION_NAME
        self.config = config
        self.head = head
        self.layers = layers
        self.first = first
        self.last = last
        self.tied = head is Head.LM and bool(config.tie_word_embeddings)
        self.around_layer: AroundLayer = _at_once
        self.model = nn.Module()
        if first:
            self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleDict({str(i): _decoder_layer(config, i) for i in layers})
        if last:
            self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            if head is Head.SCALAR:
                self.score = nn.Linear(config.hidden_size, 1, bias=False)
            elif not (self.tied and first):
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.device("cpu"):  # its buffers are computed, not loaded
            self.rotary = _rotary_embedding(config)

    def forward(self, inputs: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """`inputs`: token ids [num_rows] on the first stage, else hidden states [num_rows, H].
        Returns hidden states [num_rows, H]; on the last stage those after the final norm, without
        the dummy rows: [num_tokens, H]."""
        hidden = self.embed(inputs) if self.first else inputs
        attend = PackedAttention(batch.lengths, batch.cu_seqlens, rectangular=batch.rectangular)
        hidden = self.transform(hidden, batch.position_ids, attend)
        return hidden[: batch.num_tokens] if self.last else hidden

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [rows] to hidden states [rows, H]."""
        hidden: torch.Tensor = self.model.get_submodule("embed_tokens")(token_ids)
        return hidden

    def transform(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Hidden states [rows, H] through this stage's layers (and final norm) -> [rows, H]."""
        hidden = hidden[None]
        positions = self.rotary(hidden, position_ids[None])
        for layer in self.decoder_layers():
            compute = partial(layer, position_embeddings=positions, attend=attend)
            hidden = self.around_layer(compute, hidden)
        hidden = hidden[0]
        return self.final_norm(hidden) if self.last else hidden

    def decoder_layers(self) -> Iterable[nn.Module]:
        """The decoder layers, in order."""
        return self.model.get_submodule("layers").children()

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm behind the last layer: [rows, H] -> [rows, H]."""
        normed: torch.Tensor = self.model.get_submodule("norm")(hidden)
        return normed

    def lm_head_weight(self) -> nn.Parameter:
        """[V, H], on the last stage of a language model."""
        assert self.last
        assert self.head is Head.LM
        name = EMBEDDING if self.tied and self.first else LM_HEAD
        return self.get_parameter(name)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Language model: hidden states [rows, H] -> float32 [rows, V], never rounded to less."""
        weight = self.lm_head_weight()
        if hidden.dtype == torch.float32 or not hidden.is_cuda:
            return functional.linear(hidden.float(), weight.float())
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scalar head: hidden states [rows, H] -> float32 [rows]. Each row by itself, whatever
        the number of rows: a matrix product would not promise that."""
        assert self.last
        assert self.head is Head.SCALAR
        return (hidden.float() * self.score.weight.float()).sum(-1)

    @property
    def tied_parameter(self) -> nn.Parameter | None:
        """This stage's part of a parameter that lives on two stages, or None.

        With tied embeddings and more than one stage: the embedding on the first stage, its copy
        (`lm_head_weight()`) on the last. After the last backward of a step, the gradients of the
        two are to be summed into both; in a global gradient norm the pair counts once (the copy is
        not among `named_hf_parameters()`). Equal gradients and optimizers keep the two equal.
        """
        if not self.tied or self.first == self.last:
            return None
        return self.get_parameter(EMBEDDING if self.first else LM_HEAD)

    def named_hf_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(Hugging Face name, parameter); over all stages, every parameter of the model once."""
        copied = self.last and not self.first and self.tied
        for name, parameter in self.named_parameters():
            if not (copied and name == LM_HEAD):
                yield name, parameter

    @torch.no_grad()
    def load_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy every parameter of this stage in place from Hugging Face-named tensors; those of
        other stages are passed over. Raises ValueError for wrong shapes, and where any is missing.
        """
        targets = self._load_targets()
        missing = set(targets)
        for name, tensor in tensors:
            if name not in targets:
                continue
            if targets[name].shape != tensor.shape:
                raise ValueError(
                    f"{name}: shape {tuple(tensor.shape)} where the model's config says "
                    f"{tuple(targets[name].shape)}"
                )
            targets[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"weights: missing {len(missing)} tensors, such as {min(missing)}")

    def hf_names_to_load(self) -> tuple[str, ...]:
        """The Hugging Face names that `load_tensors` needs."""
        return tuple(self._load_targets())

    def _load_targets(self) -> dict[str, nn.Parameter]:
        targets = dict(self.named_hf_parameters())
        if self.tied and self.last and not self.first:
            targets[EMBEDDING] = self.get_parameter(LM_HEAD)
        return targets


def _at_once(compute: Compute, hidden: torch.Tensor) -> torch.Tensor:
    return compute(hidden)


def _decoder_layer(config: ModelConfig, index: int) -> nn.Module:
    layer: nn.Module
    if isinstance(config, LlamaConfig):
        layer = modeling_llama.LlamaDecoderLayer(config, index)
    elif isinstance(config, Qwen2Config):
        layer = modeling_qwen2.Qwen2DecoderLayer(config, index)
    else:
        layer = modeling_qwen3.Qwen3DecoderLayer(config, index)
    for name, module in list(layer.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            weight = module.get_parameter("weight")
            layer.set_submodule(name, RMSNorm(weight.shape[0], config.rms_norm_eps))
    return layer


def _rotary_embedding(config: ModelConfig) -> nn.Module:
    if isinstance(config, LlamaConfig):
        return modeling_llama.LlamaRotaryEmbedding(config)
    if isinstance(config, Qwen2Config):
        return modeling_qwen2.Qwen2RotaryEmbedding(config)
    return modeling_qwen3.Qwen3RotaryEmbedding(config)
