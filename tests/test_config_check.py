"""Rules between keys: each broken rule is told, with the key and the way out."""

from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse import file_check
from rlhfuse.batch_sizes import batch_arithmetic, total_steps
from rlhfuse.config import Config
from rlhfuse.config_check import check
from rlhfuse.config_file import load
from rlhfuse.file_check import check_files
from rlhfuse.logprob_sources import ratios

GOOD = {
    "actor": {"path": "a"},
    "critic": {"path": "c"},
    "reward": {"path": "r"},
    "data": {"train_files": ["t.jsonl"]},
}


def _config(folder: Path, *overrides: str) -> Config:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    return load(file, overrides)


def test_a_plain_run_breaks_no_rule(tmp_path: Path) -> None:
    check(_config(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "key", "part"),
    [
        (["actor.path="], "actor.path", "is empty"),
        (["critic.path="], "critic.path", "critic.path=r"),
        (["placement.tp=2"], "placement.tp", "need actor.backend: megatron"),
        (["actor.backend=megatron", "placement.tp=3"], "placement.tp", "choose one of 1, 2"),
        (["actor.backend=megatron", "critic.lora_rank=4"], "critic.lora_rank", "use 0"),
        (["critic.lora_dropout=0.1"], "critic.lora_dropout", "critic.lora_rank"),
        (["rollout.old_log_probs=update"], "rollout.old_log_probs", "several optimizer steps"),
        (["reward.path="], "reward", "no source of scores"),
        (["reward.url=http://x"], "reward", "reward.path and reward.url exclude each other"),
        (["reward.path=", "reward.url=x"], "reward.url", "http://"),
        (["reward.auth_env=TOKEN"], "reward.auth_env", "only with reward.url"),
        (["data.train_batch_size=48"], "data.train_batch_size", "1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        (["critic.ppo_epochs=2"], "critic.ppo_epochs", "actor.ppo_epochs is 1"),
        (["actor.num_microbatches=33"], "actor.num_microbatches", "32 samples"),
        (["actor.ppo_max_token_len_per_gpu=9"], "actor.ppo_max_token_len_per_gpu", "768"),
        (["algorithm.adv_estimator=rloo"], "rollout.n", "rloo"),
        (["algorithm.adv_estimator=grpo"], "rollout.n", "grpo"),
        (["rollout.min_response_length=999"], "rollout.min_response_length", "256"),
        (["rollout.cache_tokens=9"], "rollout.cache_tokens", "768"),
        (
            ["rollout.vllm.tensor_parallel_size=2"],
            "rollout.vllm.tensor_parallel_size",
            "on one device",
        ),
        (
            ["rollout.frequency_penalty=0.2", "rollout.vllm.position_keyed=off"],
            "rollout.presence_penalty",
            "set both to 0",
        ),
        (
            ["rollout.exactness=token", "placement.dtype=bfloat16"],
            "rollout.exactness",
            "choose distribution",
        ),
        (
            ["rollout.min_p=0.1", "rollout.vllm.speculative_config={method: ngram}"],
            "rollout.min_p",
            "use top_p",
        ),
        (
            ["rollout.repetition_penalty=1.2", "rollout.old_log_probs=engine"],
            "rollout.old_log_probs",
            "choose recompute",
        ),
        (["placement.actor_pp=4"], "placement.actor_pp", "1, 2"),
        (["actor.clip_ratio_c=0.5"], "actor.clip_ratio_c", "above 1"),
        (["data.train_files=[]"], "data.train_files", "is empty"),
        (["trainer.test_freq=2"], "trainer.test_freq", "no validation set"),
        (["trainer.experiment_name=a/b"], "trainer.experiment_name", "one folder"),
        (["reward.error_score=.nan"], "reward.error_score", "finite"),
        (["algorithm.tis_floor=2"], "algorithm.tis_floor", "tis_cap"),
        (
            ["algorithm.replay_truncation=on", "rollout.top_p=0.9", "rollout.old_log_probs=engine"],
            "algorithm.replay_truncation",
            "recompute",
        ),
        (
            ["algorithm.adv_estimator=reinforce_plus_plus", "fusion.intra_stage=on"],
            "fusion.intra_stage",
            "use auto",
        ),
        (
            ["algorithm.adv_estimator=reinforce_plus_plus", "algorithm.critic_warmup=1"],
            "algorithm.critic_warmup",
            "no critic",
        ),
        (
            ["data.validation=[{name: a, files: x, n: 2}, {name: a, files: []}]"],
            "data.validation",
            "greedy",
        ),
    ],
)
def test_a_broken_rule_names_its_key(
    tmp_path: Path, overrides: list[str], key: str, part: str
) -> None:
    with pytest.raises(ValueError, match=":") as caught:
        check(_config(tmp_path, *overrides))
    message = str(caught.value)
    assert message.startswith(key)
    assert part in message
    assert "\n" not in message


def test_all_broken_rules_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"actor\.path.*critic\.path.*rollout\.cache_tokens"):
        check(_config(tmp_path, "actor.path=", "critic.path=", "rollout.cache_tokens=1"))


def test_without_a_critic_no_critic_is_wanted(tmp_path: Path) -> None:
    off = ["algorithm.adv_estimator=rloo", "rollout.n=2", "critic.path=", "critic.ppo_epochs=7"]
    check(_config(tmp_path, *off))


def test_missing_folders_files_and_variables_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    config = _config(tmp_path, "reward.path=", "reward.auth_env=NO_SUCH_TOKEN", "reward.url=http:")
    with pytest.raises(ValueError, match=":") as caught:
        check_files(config)
    message = str(caught.value)
    for part in ("actor.path: there is no folder 'a'", "config.json", "'t.jsonl'", "NO_SUCH_TOKEN"):
        assert part in message


def test_existing_files_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "acr":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "t.jsonl").write_text("{}")
    check_files(_config(tmp_path))


def test_a_package_that_is_asked_for_and_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_check, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"kv_transfer: nixl needs the package nixl .*use auto"):
        check_files(_config(tmp_path, "rollout.vllm.kv_transfer=nixl"))


def test_what_ratios_compare_is_told_where_the_sampler_truncates(tmp_path: Path) -> None:
    assert ratios(_config(tmp_path)) == ""
    assert not _config(tmp_path).replays
    for sampling in ("rollout.top_k=5", "rollout.top_p=0.9", "rollout.min_p=0.1"):
        assert _config(tmp_path, sampling).replays
        assert "keep" in ratios(_config(tmp_path, sampling))
    for off in (
        "algorithm.replay_truncation=off",
        "rollout.old_log_probs=engine",
        "placement.tp=2",
    ):
        config = _config(tmp_path, "rollout.top_p=0.9", off)
        assert not config.replays
        assert off.partition("=")[0] in ratios(config)


def test_what_ratios_compare_is_told_where_penalties_are(tmp_path: Path) -> None:
    penalised = _config(tmp_path, "rollout.repetition_penalty=1.1")
    assert "without penalties" in ratios(penalised)
    both = _config(tmp_path, "rollout.repetition_penalty=1.1", "rollout.top_p=0.9")
    assert not both.replays
    assert "penalties" in ratios(both)


def test_the_arithmetic_is_printed(tmp_path: Path) -> None:
    config = _config(tmp_path, "rollout.n=4", "actor.ppo_epochs=2", "trainer.total_epochs=3")
    assert batch_arithmetic(config, 100) == [
        "step: 64 prompts x 4 responses = 256 samples",
        "actor: 2 epoch(s) x 2 mini-batches of 32 prompts (128 samples, in micro-batches of up to "
        "16384 tokens) = 4 optimizer steps a step",
        "critic: 1 epoch(s) x 2 mini-batches of 32 prompts (128 samples, in micro-batches of up "
        "to 16384 tokens) = 2 optimizer steps a step",
        "epoch: 100 rows / 64 prompts = 1.562 steps",
        "run: 4 steps (3 epoch(s) x 100 rows / 64 prompts, 44 rows left over), 1024 samples, "
        "16 actor optimizer steps, 8 critic optimizer steps",
    ]


def test_too_few_rows_for_a_batch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.train_batch_size.*10 rows"):
        batch_arithmetic(_config(tmp_path), 10)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 500), epochs=st.integers(1, 5), batch=st.integers(1, 100))
def test_full_batches_use_all_rows_but_less_than_one_batch(
    rows: int, epochs: int, batch: int
) -> None:
    default = Config()
    config = Config(
        data=msgspec.structs.replace(default.data, train_batch_size=batch),
        trainer=msgspec.structs.replace(default.trainer, total_epochs=epochs),
    )
    if rows * epochs < batch:
        with pytest.raises(ValueError, match="fill no batch"):
            total_steps(config, rows)
        return
    left = rows * epochs - total_steps(config, rows) * batch
    assert 0 <= left < batch
