"""The records of a batch: prompts from the data, each with its own seed."""

import hashlib

from rlhfuse.config import ValidationConfig
from rlhfuse.data import Prompt, PromptStream
from rlhfuse.resolve import Resolved
from rlhfuse.rollout.records import Record

_VALIDATION_IDS = 1 << 40  # apart from training samples


def sample_seed(*parts: object) -> int:
    """A seed of 63 bits from what identifies a sample: the same on every machine and run."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def training_records(run: Resolved, stream: PromptStream[Prompt], step: int) -> list[Record]:
    """The next batch: `rollout.n` samples for each of `data.train_batch_size` prompts."""
    config = run.config
    prompts = stream.next_batch()
    per_prompt = config.rollout.n
    first_id = (step - 1) * len(prompts) * per_prompt
    return [
        Record(
            sample_id=first_id + group * per_prompt + number,
            group=group,
            prompt=prompt.tokens,
            seed=sample_seed(config.trainer.seed, step, group, number),
            row=prompt.row,
        )
        for group, prompt in enumerate(prompts)
        for number in range(per_prompt)
    ]


def validation_records(run: Resolved, validation: ValidationConfig) -> list[Record]:
    """`validation.n` samples for each prompt of the set; the same seeds at every validation, so
    that what changes is the policy."""
    return [
        Record(
            sample_id=_VALIDATION_IDS + group * validation.n + number,
            group=group,
            prompt=prompt.tokens,
            seed=sample_seed(run.config.trainer.seed, validation.name, group, number),
            row=prompt.row,
        )
        for group, prompt in enumerate(run.validation_prompts[validation.name])
        for number in range(validation.n)
    ]
