"""Files and overrides become the configuration that was meant, or an error that names the place."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse.config import Config, FusionConfig, RewardConfig, RewardFunctionConfig
from rlhfuse.config_file import dump, known_keys, load, parse_yaml


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "actor: {path: models/actor, optim: {lr: 1e-6}}\n"
        "data:\n"
        "  validation:\n"
        "  - {name: math, files: test.jsonl, n: 4}\n"
        "fusion: {inter_stage: on, intra_stage: false}\n"
    )
    return path


def _error(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError, match=":") as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_numbers_and_switches_from_a_file(file: Path) -> None:
    config = load(file)
    assert config.actor.optim.lr == 1e-6
    assert (config.fusion.inter_stage, config.fusion.intra_stage) == ("on", "off")
    assert config.data.validation[0].files == ("test.jsonl",)
    assert config.actor.path == "models/actor"


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", "1.e-6", ".000001"])
def test_a_small_number_is_a_number(file: Path, text: str) -> None:
    assert load(file, [f"actor.optim.lr={text}"]).actor.optim.lr == 1e-6


@pytest.mark.parametrize(
    ("text", "switch"),
    [("on", "on"), ("off", "off"), ("true", "on"), ("False", "off"), ("auto", "auto")],
)
def test_switches_take_yamls_booleans(file: Path, text: str, switch: str) -> None:
    assert load(file, [f"fusion.inter_stage={text}"]).fusion.inter_stage == switch
    file.write_text(f"fusion: {{inter_stage: {text}}}\nalgorithm: {{tis: {text}}}")
    config = load(file)
    assert (config.fusion.inter_stage, config.algorithm.tis) == (switch, switch)


@pytest.mark.parametrize(
    "items",
    [
        ["rollout.n=8"],
        ["+rollout.n=8"],
        ["++rollout.n=8"],
        ["--rollout.n", "8"],
        ["--rollout.n=8"],
        ["rollout={n: 8}"],
        ["rollout.n=2", "rollout.n=8"],
    ],
)
def test_all_spellings_of_an_override_mean_the_same(file: Path, items: list[str]) -> None:
    assert load(file, items).rollout.n == 8


def test_overrides_reach_lists_and_sections_that_are_not_there(file: Path) -> None:
    config = load(
        file,
        [
            "data.validation.0.n=2",
            "data.train_files=[a.jsonl, b.jsonl]",
            "reward.function.path=my/reward.py",
            "trainer.experiment_name=12",
            "reward.url=http://localhost:80/x=1",
        ],
    )
    assert config.data.validation[0].n == 2
    assert config.data.train_files == ("a.jsonl", "b.jsonl")
    assert config.reward.function == RewardFunctionConfig(path="my/reward.py")
    assert config.trainer.experiment_name == "12"
    assert config.reward.url == "http://localhost:80/x=1"


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("actor.optm.lr=1", "actor.optim"),
        ("rollout.temprature=1", "rollout.temperature"),
        ("trainer.ppo_mini_batch_size=4", "actor.ppo_mini_batch_size"),
        ("roll.n=4", "rollout"),
        ("fusion.interstage=on", "fusion.inter_stage"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, override: str, nearest: str) -> None:
    message = _error(file, override)
    assert override.split("=")[0].startswith(message.split(": ")[1])
    assert nearest in message
    file.write_text("{" + _nested(override) + "}")
    message = _error(file)
    assert message.startswith(str(file))
    assert nearest in message


def _nested(override: str) -> str:
    key, _, value = override.partition("=")
    text = value
    for part in reversed(key.split(".")):
        text = f"{part}: {text}" if text == value else f"{part}: {{{text}}}"
    return text


def test_every_unknown_key_of_a_file_is_named(file: Path) -> None:
    file.write_text("actor: {pth: x}\ndata: {validation: [{name: a, files: [b], nn: 1}]}")
    message = _error(file)
    assert "actor.pth: unknown key, the nearest is actor.path" in message
    assert "data.validation.0.nn: unknown key" in message


@pytest.mark.parametrize(
    ("override", "place", "expected"),
    [
        ("actor.clip_ratio=0", "actor.clip_ratio: got 0", "a number > 0"),
        ("rollout.n=1.5", "rollout.n: got 1.5", "a whole number >= 1"),
        ("rollout.n=many", "rollout.n: got 'many'", "a whole number"),
        ("rollout.top_p=1.1", "rollout.top_p: got 1.1", "> 0 and <= 1"),
        ("fusion.inter_stage=maybe", "fusion.inter_stage: got 'maybe'", "one of auto, off, on"),
        ("data.shuffle=1", "data.shuffle: got 1", "true or false"),
        ("actor.optim.betas=[0.9]", "actor.optim.betas: got [0.9]", "a list of 2 numbers"),
        ("data.validation.0.n=0", "data.validation.0.n: got 0", "a whole number >= 1"),
        ("data.validation=[{name: x}]", "data.validation.0.files: is missing", "no default"),
        ("reward.function=f.py", "reward.function: got 'f.py'", "path, name"),
        ("trainer.logger=[tensor]", "trainer.logger.0: got 'tensor'", "tensorboard"),
        ("actor=3", "actor: got 3", "keys: path"),
        ("trainer.seed=", "trainer.seed: got None", "a whole number"),
    ],
)
def test_a_wrong_value_names_place_value_and_what_is_expected(
    file: Path, override: str, place: str, expected: str
) -> None:
    message = _error(file, override)
    assert message.startswith(place)
    assert expected in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("actor: {path: a\n", "line 2"),
        ("actor:\n  path: a\n  path: b\n", "line 3: not valid YAML: the key 'path' stands twice"),
        ("- a\n", "expected keys and values"),
        ("3: 4\n", "expected keys and values"),
    ],
)
def test_a_broken_file_names_the_line(file: Path, text: str, part: str) -> None:
    file.write_text(text)
    message = _error(file)
    assert message.startswith(str(file))
    assert part in message


def test_a_missing_file_and_senseless_overrides(file: Path) -> None:
    assert "nowhere.yaml" in _error(file.with_name("nowhere.yaml"))
    assert "expected key=value" in _error(file, "rollout.n")
    assert "the value is missing" in _error(file, "--rollout.n")
    assert "no keys below" in _error(file, "rollout.n.m=1")
    assert "only 1 items" in _error(file, "data.validation.1.n=1")
    assert "cannot be deleted" in _error(file, "~rollout.n=1")


def test_empty_file_and_empty_sections_mean_the_defaults(file: Path) -> None:
    file.write_text("")
    assert load(file) == Config()
    file.write_text("actor:\nreward:\n")
    assert load(file) == Config()


TEXTS = st.text(max_size=12) | st.sampled_from(
    ["1e-6", "on", "null", "1_0", "~", "0x1", "1.", "", "\x85", "a\u2028b", "\ufeff", "a\rb"]
)


@settings(max_examples=60, deadline=None)
@given(
    path=TEXTS,
    url=TEXTS,
    lr=st.floats(min_value=0, allow_nan=False, allow_infinity=False),
    fusion=st.builds(FusionConfig, inter_stage=st.sampled_from(["auto", "on", "off"])),
)
def test_what_is_dumped_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, path: str, url: str, lr: float, fusion: FusionConfig
) -> None:
    config = Config(
        reward=RewardConfig(path=path, url=url, function=RewardFunctionConfig(path=path)),
        fusion=fusion,
    )
    optim = msgspec.structs.replace(config.actor.optim, lr=lr)
    config = msgspec.structs.replace(
        config, actor=msgspec.structs.replace(config.actor, optim=optim)
    )
    file = tmp_path_factory.mktemp("dump") / "run.yaml"
    file.write_text(dump(config), encoding="utf-8", newline="")
    assert load(file) == config


def test_known_keys_are_the_keys_of_the_default() -> None:
    def keys(tree: object, prefix: str) -> set[str]:
        if not isinstance(tree, dict):
            return set()
        below = [keys(value, f"{prefix}{key}.") for key, value in tree.items()]
        return {prefix + key for key in tree}.union(*below)

    default = Config(reward=RewardConfig(function=RewardFunctionConfig(path="")))
    assert set(known_keys()) == keys(msgspec.to_builtins(default), "")


def test_plain_text_that_looks_like_numbers() -> None:
    assert parse_yaml("1e5", "") == 1e5
    assert parse_yaml("e5", "") == "e5"
    assert parse_yaml("'1e5'", "") == "1e5"
    assert parse_yaml("1-2", "") == "1-2"
