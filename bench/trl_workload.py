"""The workload of the comparison with TRL: models, tokenizer and prompts for both systems.

Prompts of 16 tokens, responses with a constant chance of ending, so that lengths are geometric
(mean 60, at most 256) in both systems although each draws its own random numbers: one dimension of
the residual stream is constant, and the head's row of the end token reads it.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

VOCABULARY = 1024
PROMPT_TOKENS = 16
RESPONSE_TOKENS = 256
MEAN_RESPONSE_TOKENS = 60
BATCH = 64
MINI_BATCH = 32
END = 2


def make_workload(folder: Path, num_prompts: int) -> None:
    """Write ``policy/ reward/ prompts.jsonl`` below `folder`: the quick start's shape."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    config.num_labels = 1
    torch.manual_seed(1)
    policy = LlamaForCausalLM(config)
    reward = LlamaForSequenceClassification(config)
    give_constant_hazard(policy, 1 / MEAN_RESPONSE_TOKENS)
    policy.save_pretrained(folder / "policy")
    reward.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        fast.save_pretrained(folder / name)
    drawn = torch.randint(0, VOCABULARY - 3, (num_prompts, PROMPT_TOKENS)).tolist()
    with (folder / "prompts.jsonl").open("w") as file:
        for row in drawn:
            file.write(json.dumps({"prompt": " ".join(f"w{i}" for i in row), "answer": ""}) + "\n")


@torch.no_grad()
def give_constant_hazard(policy: LlamaForCausalLM, hazard: float) -> None:
    """Make `policy` end a response with about the same probability at every position."""
    policy.model.embed_tokens.weight[:, 0] = 1.0
    for layer in policy.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    policy.lm_head.weight[END] = 0.0
    probe = torch.randint(3, VOCABULARY, (16, 64))
    low, high = 0.0, 10.0
    for _ in range(30):
        scale = (low + high) / 2
        policy.lm_head.weight[END, 0] = scale
        seen = float(torch.softmax(policy(probe).logits, dim=-1)[..., END].mean())
        low, high = (scale, high) if seen < hazard else (low, scale)
