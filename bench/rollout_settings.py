"""Settings on which rollout policies are compared: costs by formula, lengths by distribution.

GPU costs are a roofline of an H100 (989 Tflop/s bf16 dense, 3.35 TB/s, 80 GB; NVIDIA's data sheet)
at 45 % of its flops in scoring and training and 70 % of its bandwidth in decoding, with 1.5 ms of
a decode step spent outside kernels; key-value caches move at 40 GB/s. Simulation, not measurement.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from rlhfuse.cost import CostModel
from rlhfuse.rollout.policy import Policy

FLOPS, BYTES_S, MFU, MBU, LINK = 989e12, 3.35e12, 0.45, 0.7, 40e9
PPO = ("actor", "critic", "reference", "reward")
KNOTS = (1.0, 8.0, 32.0, 64.0, 128.0, 256.0, 512.0)


@dataclass(frozen=True, slots=True)
class Setting:
    """One kind of iteration. `train`: forward and backward of complete groups belong to it."""

    name: str
    cost: CostModel
    policy: Policy
    instances: int
    num_groups: int
    per_group: int
    prompt: int
    median: float
    sigma: float
    roles: tuple[str, ...]
    alike: float = 0.5  # part of the variance of log lengths that siblings share
    reward_s: float | None = None
    train: bool = False
    with_: dict[str, float] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return self.num_groups * self.per_group

    @property
    def groups(self) -> list[int]:
        return [i // self.per_group for i in range(self.num_samples)]

    @property
    def prompts(self) -> list[int]:
        return [self.prompt] * self.num_samples

    def lengths(self, seed: int, groups: int = 0) -> list[int]:
        """Lognormal, cut off at the response limit; siblings share a part of the variance."""
        rng = np.random.default_rng(seed)
        groups = groups or self.num_groups
        shared = self.alike if self.per_group > 1 else 0.0
        of_group = rng.standard_normal((groups, 1)) * shared**0.5
        own = rng.standard_normal((groups, self.per_group)) * (1.0 - shared) ** 0.5
        drawn = self.median * np.exp(self.sigma * (of_group + own))
        limit = self.policy.max_response_tokens
        return [int(n) for n in np.clip(drawn.ravel(), 2, limit)]


def gpu_cost(params: float, kv_bytes: float, gpus: int = 1, train_gpus: int = 1) -> CostModel:
    """A dense model of `params` weights in bf16, one instance on `gpus` GPUs; `kv_bytes` per token
    of cache. Rates of scoring and training are for `train_gpus` GPUs, the size of a block."""
    read_s = 2 * params / (gpus * BYTES_S * MBU)
    token_s = 2 * params / (gpus * FLOPS * MFU)
    steps = tuple(1.5e-3 + max(read_s, token_s * b) + 0.1 * min(read_s, token_s * b) for b in KNOTS)
    forward_s = 2 * params / (train_gpus * FLOPS * MFU)
    return CostModel(
        decode_batch=KNOTS,
        decode_step_s=steps,
        decode_context_s=kv_bytes / (gpus * BYTES_S * MBU),
        prefill_token_s=token_s,
        prefill_call_s=5e-3,
        score_token_s={**dict.fromkeys(PPO, forward_s), "train": 3.0 * forward_s},
        score_call_s=10e-3,
        migrate_token_s=kv_bytes / LINK,
        migrate_call_s=5e-3,
        weight_sync_s=1.0,
        swap_s=2 * params / (train_gpus * 50e9),  # from CPU memory over PCIe
        basis={"all": "roofline of an H100, see bench/rollout_settings.py"},
    )


def settings() -> list[Setting]:
    seven = gpu_cost(7.6e9, 57_344)  # Qwen2.5-7B: 28 layers, 4 key-value heads of 128
    seven_by_8 = gpu_cost(7.6e9, 57_344, train_gpus=8)
    thirteen = gpu_cost(13e9, 819_200, gpus=2, train_gpus=2)  # Llama-13B: 40 layers, 5120 wide
    small = Policy(max_response_tokens=2048, max_running=256, score_token_budget=32_768)
    long = Policy(max_response_tokens=32_768, max_running=256, score_token_budget=65_536)
    by_8 = replace(long, block=8)
    quick = replace(CostModel.default())
    cpu = Policy(max_response_tokens=512, max_running=64, score_token_budget=2048)
    return [
        Setting("PPO, quick start on 2 CPU workers", quick, cpu, 2, 64, 1, 16, 50, 0.75, PPO),
        Setting("PPO 13B, 2K", thirteen, small, 32, 512, 1, 200, 250, 0.9, PPO),
        Setting("PPO 7B, 2K, large batch", seven, small, 32, 4096, 1, 200, 250, 0.9, PPO),
        Setting("PPO 7B, 32K", seven, long, 32, 1024, 1, 300, 3000, 1.0, PPO),
        Setting(
            "GRPO 7B, 32K, rule", seven_by_8, by_8, 32, 128, 8, 300, 3000, 1.0, (), reward_s=0.05
        ),
        Setting(
            "GRPO 7B, 32K, rule, early training", seven_by_8, by_8, 32, 128, 8, 300, 3000, 1.0,
            ("actor",), reward_s=0.05, train=True,
        ),
        Setting(
            "GRPO 7B, 32K, reward model + KL", seven, long, 32, 128, 8, 300, 3000, 1.0,
            ("actor", "reference", "reward"),
        ),
        Setting(
            "GRPO 7B, 8K, reward model + KL, large batch", seven,
            replace(long, max_response_tokens=8192), 32, 512, 8, 300, 800, 1.0,
            ("actor", "reference", "reward"),
        ),
    ]  # fmt: skip
