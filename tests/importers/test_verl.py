"""Every verl key is accounted for, and what is mapped means the same."""

import json
from pathlib import Path

import pytest
import yaml

from rlhfuse.cli.common import run_command
from rlhfuse.cli.main import cli
from rlhfuse.config_file import known_keys, load
from rlhfuse.importers.verl import Entry, Imported, flatten, import_verl, resolve
from rlhfuse.importers.verl_keys import CHANGES, COMBINED, RENAMED, RULES, RUNS_ONLY, From

DEFAULTS = Path(__file__).with_name("verl_defaults.yaml")
AR = "actor_rollout_ref"


def _entry(imported: Imported, key: str) -> Entry:
    (found,) = [entry for entry in imported.entries if entry.key == key]
    return found


def test_our_defaults_are_verls() -> None:
    flat = flatten(yaml.safe_load(DEFAULTS.read_text()))
    values = resolve(flat)
    for rule in RULES:
        if values[rule.key] == "???":
            continue
        default = values[rule.default.key] if isinstance(rule.default, From) else rule.default
        assert values[rule.key] == default, rule.key
    for key, default in COMBINED.items():
        assert flat[key] == default, key


def test_verls_defaults_given_or_left_out_mean_the_same() -> None:
    given = import_verl(yaml.safe_load(DEFAULTS.read_text()))
    assert given.config == import_verl({}).config
    assert {entry.status for entry in given.entries} == {"mapped", "neutral", "unmapped"}
    unmapped = [entry.key for entry in given.entries if entry.status == "unmapped"]
    assert unmapped == [f"{AR}.rollout.name"]
    assert len(given.todo) == 1
    assert given.todo[0].startswith("reward: ")


def test_the_tables_are_consistent() -> None:
    rules = [rule.key for rule in RULES]
    keys = [*rules, *COMBINED, *RENAMED, *(name for name, _, _ in CHANGES), *RUNS_ONLY]
    assert sorted(keys) == sorted(set(keys))
    assert {rule.target for rule in RULES} <= set(known_keys())
    assert set(RENAMED.values()) <= {*rules, *COMBINED}


def test_a_usual_run() -> None:
    imported = import_verl(
        {
            "algorithm.adv_estimator": "grpo",
            "data.train_files": "gsm8k/train.parquet",
            "data.val_files": ["a.parquet", "b.parquet"],
            "data.filter_overlong_prompts": True,
            "data.truncation": "error",
            f"{AR}.model.path": "models/qwen",
            f"{AR}.actor.optim.lr": 3e-6,
            f"{AR}.actor.kl_loss_type": "low_var_kl",
            f"{AR}.actor.use_kl_loss": True,
            f"{AR}.actor.loss_agg_mode": "seq-mean-token-sum-norm",
            f"{AR}.actor.loss_scale_factor": 1024,
            f"{AR}.rollout.name": "vllm",
            f"{AR}.rollout.n": 5,
            f"{AR}.rollout.val_kwargs.do_sample": True,
            f"{AR}.rollout.val_kwargs.temperature": 0.6,
            f"{AR}.rollout.gpu_memory_utilization": 0.6,
            "trainer.logger": ["console", "wandb"],
            "trainer.nnodes": 2,
            "trainer.n_gpus_per_node": 4,
            "trainer.save_freq": 20,
            "custom_reward_function.path": "my_reward.py",
            "custom_reward_function.name": "score",
        }
    )
    config = imported.config
    assert imported.todo == ()
    assert (config.actor.path, config.actor.optim.lr, config.rollout.n) == ("models/qwen", 3e-6, 5)
    assert (config.actor.use_kl_loss, config.actor.kl_loss_type) == (True, "k3")
    for model in (config.actor, config.critic):
        assert model.loss_agg_mode == "seq-mean-token-sum-norm"
        assert model.loss_scale_factor == 1024
    assert (config.data.overlong_prompts, config.placement.num_devices) == ("filter", 8)
    assert config.data.validation[0].files == ("a.parquet", "b.parquet")
    assert config.data.validation[0].temperature == 0.6
    assert config.trainer.logger == ("jsonl", "console", "wandb")
    assert config.trainer.default_local_dir == "checkpoints"
    assert config.reward.function is not None
    assert config.reward.function.name == "score"
    statuses = {entry.key: entry.status for entry in imported.entries}
    assert statuses.pop(f"{AR}.rollout.gpu_memory_utilization") == "runs_only"
    assert statuses.pop("data.truncation") == "mapped"
    assert set(statuses.values()) == {"mapped"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{AR}.actor.policy_loss.loss_mode", "gspo"),
        (f"{AR}.actor.loss_agg_mode", "token-sum"),
        (f"{AR}.actor.kl_loss_type", "k3+"),
        (f"{AR}.actor.optim.lr_warmup_steps_ratio", 0.1),
        (f"{AR}.model.lora_rank", 32),
        (f"{AR}.rollout.name", "sglang"),
        (f"{AR}.rollout.multi_turn.enable", True),
        ("algorithm.adv_estimator", "remax"),
        ("algorithm.filter_groups.enable", True),
        ("algorithm.rollout_correction.rollout_is", "sequence"),
        ("data.truncation", "middle"),
        ("reward.reward_manager.name", "dapo"),
        ("trainer.v1.trainer_mode", "colocate_async"),
        ("trainer.logger", ["console", "mlflow"]),
        ("async_training.staleness_threshold", 0.1),
    ],
)
def test_what_changes_the_result_and_is_not_here_is_unsafe(key: str, value: object) -> None:
    imported = import_verl({key: value})
    entry = _entry(imported, key)
    assert entry.status == "unsafe"
    assert entry.note
    assert any(line.startswith(f"{key}=") for line in imported.todo)


def test_grpo_with_kl_in_the_reward_is_unsafe() -> None:
    given = {"algorithm.adv_estimator": "grpo", "algorithm.use_kl_in_reward": True}
    assert _entry(import_verl(given), "algorithm.use_kl_in_reward").status == "unsafe"


def test_no_key_disappears() -> None:
    given = {
        "nobody.knows": 1,
        f"{AR}.actor.policy_loss.clip_cov_lb": 2.0,
        f"{AR}.actor.fsdp_config.param_offload": True,
        f"{AR}.actor.grad_clip": 0.5,
        "trainer.total_training_steps": "${somewhere.else}",
    }
    imported = import_verl(given)
    assert {entry.key: entry.status for entry in imported.entries} == {
        "nobody.knows": "unmapped",
        f"{AR}.actor.policy_loss.clip_cov_lb": "neutral",
        f"{AR}.actor.fsdp_config.param_offload": "runs_only",
        f"{AR}.actor.grad_clip": "mapped",
        "trainer.total_training_steps": "unmapped",
    }
    assert imported.config.actor.optim.clip_grad == 0.5


def test_details_of_a_feature_that_is_on_are_not_called_neutral() -> None:
    given = {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "acc"}
    assert _entry(import_verl(given), "algorithm.filter_groups.metric").status == "unmapped"


def test_references_are_resolved() -> None:
    flat = {
        "a.b": 3,
        "a.c": "${.b}",
        "d": "x/${a.b}/${a.c}",
        "e": "${oc.select:nothing.here,7}",
        "f": "${oc.select:a.b,7}",
        "g": "${unknown}",
        "h": "${i}",
        "i": "${h}",
    }
    assert resolve(flat) == {
        **flat,
        "a.c": 3,
        "d": "x/3/3",
        "e": 7,
        "f": 3,
        "h": "${h}",
        "i": "${i}",
    }


def test_a_wrong_type_names_our_key() -> None:
    with pytest.raises(ValueError, match=r"rollout\.n: got 'many'"):
        import_verl({f"{AR}.rollout.n": "many"})


def test_the_command_writes_a_file_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ours.yaml"
    items = [str(DEFAULTS), f"+{AR}.rollout.n=4", f"{AR}.model.lora_rank=8", "-o", str(out)]
    assert run_command(cli, ["import", "verl", *items]) == 0
    text = capsys.readouterr().out
    assert f"{AR}.rollout.n=4" in text
    assert "-> rollout.n=4" in text
    assert "adapters instead of full training" in text
    assert load(out).rollout.n == 4


def test_the_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, ["import", "verl", "algorithm.gamma=0.9", "x.y=1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["algorithm"]["gamma"] == 0.9
    assert [entry["status"] for entry in printed["entries"]] == ["mapped", "unmapped"]


@pytest.mark.parametrize("items", [["nowhere.yaml"], ["lonely"], [f"{AR}.rollout.n=x"]])
def test_mistakes_are_one_line(items: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, ["import", "verl", *items]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
