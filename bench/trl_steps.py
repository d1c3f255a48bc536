"""Steps of TRL's PPOTrainer on the comparison's workload; prints one JSON object.

Run by bench_trl_ppo in an environment that holds trl 1.12.0; it imports nothing of rlhfuse.

    python bench/trl_steps.py FOLDER --steps 4 --micro-batch 16
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl.experimental.ppo.ppo_trainer as module
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

BATCH, MINI_BATCH, RESPONSE_TOKENS = 64, 32, 256


class Clock(TrainerCallback):
    """Seconds of generation and of scoring, and the end of each step."""

    def __init__(self) -> None:
        self.spent = {"generation": 0.0, "scoring": 0.0}
        self.tokens = 0
        self.steps: list[dict[str, float]] = []
        self.since_s = time.perf_counter()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, its time counted as `name` where no gradients are recorded."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return call(*args, **kwargs)
            start_s = time.perf_counter()
            result = call(*args, **kwargs)
            self.spent[name] += time.perf_counter() - start_s
            return result

        return wrapper

    def count_tokens(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Count response tokens up to the end token."""

        def wrapper(stop: int, pad: int, responses: torch.Tensor) -> Any:
            ended = (responses == stop).int()
            self.tokens += int((ended.cumsum(1) - ended == 0).sum())
            return call(stop, pad, responses)

        return wrapper

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now_s = time.perf_counter()
        self.steps.append({"step": now_s - self.since_s, "tokens": self.tokens, **self.spent})
        self.spent = dict.fromkeys(self.spent, 0.0)
        self.since_s, self.tokens = now_s, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    module.batch_generation = clock.timed("generation", module.batch_generation)
    module.forward = clock.timed("scoring", module.forward)
    module.get_reward = clock.timed("scoring", module.get_reward)
    module.truncate_response = clock.count_tokens(module.truncate_response)
    tokenizer = AutoTokenizer.from_pretrained(asked.folder / "policy", padding_side="left")
    rows = [json.loads(line)["prompt"] for line in (asked.folder / "prompts.jsonl").open()]
    dataset = Dataset.from_list([{"input_ids": tokenizer(row)["input_ids"]} for row in rows])
    policy, reward = asked.folder / "policy", asked.folder / "reward"
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(asked.folder / "trl"),
            per_device_train_batch_size=asked.micro_batch,
            gradient_accumulation_steps=BATCH // asked.micro_batch,
            num_mini_batches=BATCH // MINI_BATCH,
            num_ppo_epochs=1,
            total_episodes=BATCH * asked.steps,
            local_rollout_forward_batch_size=BATCH,
            response_length=RESPONSE_TOKENS,
            stop_token="eos",
            temperature=1.0,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(policy),
        ref_model=AutoModelForCausalLM.from_pretrained(policy),
        reward_model=AutoModelForSequenceClassification.from_pretrained(reward),
        value_model=AutoModelForSequenceClassification.from_pretrained(reward),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(8)),
        callbacks=[clock],
    )
    clock.since_s = time.perf_counter()
    trainer.train()
    asked.out.write_text(json.dumps(clock.steps))


if __name__ == "__main__":
    main()
