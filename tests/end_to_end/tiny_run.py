"""A run small enough for tests: random models, a word-level tokenizer, a few prompts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from ray.cluster_utils import Cluster as RayCluster
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import rlhfuse.config as c
from rlhfuse.config import Config

VOCABULARY = 48


def make_assets(folder: Path, *, hidden: int = 32, layers: int = 4) -> None:
    """Write policy/, reward/ and train.jsonl below `folder`."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    config.num_labels = 1
    torch.manual_seed(1)
    for name, kind in (
        ("policy", LlamaForCausalLM),
        ("reward", LlamaForSequenceClassification),
    ):
        kind(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    with (folder / "train.jsonl").open("w") as file:
        for i in range(40):
            prompt = " ".join(f"w{(i * 7 + k) % (VOCABULARY - 3)}" for k in range(3 + i % 4))
            row = {"prompt": prompt, "reward_model": {"style": "rule", "ground_truth": f"w{i}"}}
            file.write(json.dumps(row) + "\n")


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray cluster of one node."""
    head = {"num_cpus": 2, "include_dashboard": False}
    cluster = RayCluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def tiny_config(assets: Path, runs: Path, *, num_devices: int, ray_address: str = "") -> Config:
    """A PPO configuration over `make_assets`' files; by default on a private Ray cluster."""
    return Config(
        actor=c.ActorConfig(
            path=str(assets / "policy"),
            optim=c.OptimConfig(lr=1e-3),
            ppo_mini_batch_size=8,
            num_microbatches=2,
        ),
        critic=c.CriticConfig(
            path=str(assets / "reward"),
            optim=c.OptimConfig(lr=1e-3),
            ppo_mini_batch_size=8,
            num_microbatches=2,
        ),
        reward=c.RewardConfig(path=str(assets / "reward")),
        rollout=c.RolloutConfig(engine="torch", response_length=48, max_num_seqs=16),
        data=c.DataConfig(
            train_files=(str(assets / "train.jsonl"),),
            max_prompt_length=16,
            train_batch_size=16,
            validation=(
                c.ValidationConfig(
                    name="test", files=(str(assets / "train.jsonl"),), max_samples=8
                ),
            ),
        ),
        trainer=c.TrainerConfig(
            default_local_dir=str(runs),
            total_training_steps=2,
            logger=("jsonl",),
            wait_timeout_s=120.0,
        ),
        placement=c.PlacementConfig(device="cpu", num_devices=num_devices, ray_address=ray_address),
    )
