"""A verl configuration becomes ours, and every key of it is accounted for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from rlhfuse.config import Config
from rlhfuse.config_check import check
from rlhfuse.config_file import from_tree, parse_yaml
from rlhfuse.importers.verl_keys import (
    AR,
    CHANGES,
    COMBINED,
    DETAILS,
    RENAMED,
    RULES,
    RUNS_ONLY,
    From,
    Unsafe,
)

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
Status = Literal["mapped", "neutral", "runs_only", "unmapped", "unsafe"]


class Entry(msgspec.Struct, frozen=True):
    """What became of one verl key.

    mapped: it is `target` here. neutral: its value switches off what we do not have either.
    runs_only: it says how verl runs, not what it computes. unmapped: it has no counterpart, and we
    do not know what it would change. unsafe: it changes what is computed and we cannot follow.
    """

    key: str
    value: object
    status: Status
    target: str = ""
    becomes: object = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Imported:
    """Our configuration; one entry per given key, in order; what is still to be done by hand."""

    config: Config
    entries: tuple[Entry, ...]
    todo: tuple[str, ...]


def import_verl(given: Mapping[str, object]) -> Imported:
    """`given`: verl's settings, nested or with dotted keys; what is not given has verl's default.

    Raises:
        ValueError: a value has the wrong type for its key.
    """
    flat = resolve(flatten(given))
    known = {key: value for key, value in flat.items() if value is not None and not _open(value)}
    values = {RENAMED.get(key, key): value for key, value in known.items()}
    # What is given by its own name counts more than an older spelling.
    values.update({key: value for key, value in known.items() if key not in RENAMED})
    work = _Work(values)
    for rule in RULES:
        work.apply(rule.key, rule.target, work.value(rule.key, rule.default), rule.convert)
    _combine(work)
    entries = tuple(_entry(key, value, work) for key, value in flat.items())
    config = from_tree(work.tree)
    return Imported(config, entries, tuple(_todo(config, entries)))


class _Work:
    """Our configuration in the making, and what each verl key did to it."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values
        self.tree: dict[str, object] = {}
        self.done: dict[str, tuple[str, object, str]] = {}  # key -> target, value, error

    def value(self, key: str, default: object = None) -> object:
        """verl's value of `key`, by default its default."""
        if isinstance(default, From):
            rule = next(rule for rule in RULES if rule.key == default.key)
            default = self.value(rule.key, rule.default)
        found = self._values.get(key)
        return default if found is None else found

    def is_off(self, switch: str) -> bool:
        """Whether the feature behind `switch` is off, as it is where nothing is said."""
        value = self._values.get(switch)
        return value is None or value is False or _effect(switch, value) == ""

    def apply(self, key: str, target: str, value: object, convert: object = None) -> None:
        """Set our `target` because of verl's `key`."""
        try:
            ours = convert(value) if callable(convert) else value
        except Unsafe as error:
            self.done[key] = ("", None, str(error))
            return
        self.done[key] = (target, ours, "")
        self.set(target, ours)

    def set(self, target: str, value: object) -> None:
        here = self.tree
        *sections, name = target.split(".")
        for section in sections:
            inner = here.setdefault(section, {})
            assert isinstance(inner, dict)
            here = inner
        here[name] = value


# --- keys that belong together -------------------------------------------------------------


def _combine(work: _Work) -> None:
    """The keys of `COMBINED`."""
    get = {key: work.value(key, default) for key, default in COMBINED.items()}
    nodes, each = get["trainer.nnodes"], get["trainer.n_gpus_per_node"]
    if not isinstance(nodes, int) or not isinstance(each, int):
        raise ValueError("trainer.nnodes and trainer.n_gpus_per_node: expected whole numbers")
    for key in ("trainer.nnodes", "trainer.n_gpus_per_node"):
        work.apply(key, "placement.num_devices", nodes * each)
    folder = re.sub(r"/\$\{.*", "", str(get["trainer.default_local_dir"]))
    for name in ("experiment_name", "project_name"):
        # Ours adds project and experiment to the folder by itself.
        folder = folder.removesuffix("/" + str(work.value(f"trainer.{name}")))
    work.apply("trainer.default_local_dir", "trainer.default_local_dir", folder)
    if get["data.seed"] is not None:
        work.apply("data.seed", "trainer.seed", get["data.seed"])
    if get["data.filter_overlong_prompts"]:
        work.apply("data.filter_overlong_prompts", "data.overlong_prompts", "filter")
    if work.value("algorithm.adv_estimator") == "grpo" and work.value("algorithm.use_kl_in_reward"):
        reason = "with grpo the penalty belongs into the loss here (actor.use_kl_loss)"
        work.done["algorithm.use_kl_in_reward"] = ("", None, reason)
    _validation(work, get)
    _reward(work, get)


def _validation(work: _Work, get: Mapping[str, object]) -> None:
    files = get["data.val_files"]
    names = [str(name) for name in (files if isinstance(files, list) else [files])]
    sampling = f"{AR}.rollout.val_kwargs"
    limit, top_k = get["data.val_max_samples"], get[f"{sampling}.top_k"]
    greedy = not get[f"{sampling}.do_sample"]
    entry = {
        "name": "val",
        "files": [str(Path(name).expanduser()) for name in names],
        "n": get[f"{sampling}.n"],
        "temperature": 0.0 if greedy else get[f"{sampling}.temperature"],
        "top_k": max(top_k, 0) if isinstance(top_k, int) else top_k,
        "top_p": get[f"{sampling}.top_p"],
        "max_samples": max(limit, 0) if isinstance(limit, int) else limit,
    }
    work.set("data.validation", [entry])
    targets = {"data.val_files": "files", "data.val_max_samples": "max_samples"}
    targets |= {f"{sampling}.{key}": key for key in ("n", "temperature", "top_k", "top_p")}
    targets[f"{sampling}.do_sample"] = "temperature"
    for key, name in targets.items():
        work.done[key] = (f"data.validation.0.{name}", entry[name], "")


def _reward(work: _Work, get: Mapping[str, object]) -> None:
    path = get["reward.custom_reward_function.path"]
    name = get["reward.custom_reward_function.name"]
    if path is not None:
        expanded = str(Path(str(path)).expanduser())
        work.apply("reward.custom_reward_function.path", "reward.function.path", expanded)
        work.apply("reward.custom_reward_function.name", "reward.function.name", name)
    model = get["reward.reward_model.model_path"]
    if get["reward.reward_model.enable"] and model is not None:
        expanded = str(Path(str(model)).expanduser())
        if path is not None:
            reason = "a model and a function together; keep one"
            work.done["reward.reward_model.enable"] = ("", None, reason)
            work.done["reward.reward_model.model_path"] = ("", None, reason)
            return
        work.apply("reward.reward_model.enable", "reward.path", expanded)
        work.apply("reward.reward_model.model_path", "reward.path", expanded)


# --- the account ---------------------------------------------------------------------------


def _entry(key: str, value: object, work: _Work) -> Entry:
    if _open(value):
        return Entry(key, value, "unmapped", note="refers to what is not given")
    done = work.done.get(RENAMED.get(key, key))
    if done is not None and (value is not None or key not in RENAMED):
        target, becomes, error = done
        if error:
            return Entry(key, value, "unsafe", note=error)
        return Entry(key, value, "mapped", target, becomes)
    effect = _effect(key, value)
    if effect is not None:
        return Entry(key, value, "unsafe" if effect else "neutral", note=effect)
    if any(_below(key, prefix) and work.is_off(switch) for switch, prefix in DETAILS):
        return Entry(key, value, "neutral")
    if any(_below(key, prefix) for prefix in RUNS_ONLY) or key.endswith("_target_"):
        return Entry(key, value, "runs_only")
    if value is None or key in COMBINED or key in RENAMED:
        return Entry(key, value, "neutral")
    return Entry(key, value, "unmapped")


def _open(value: object) -> bool:
    """Whether `value` refers to something that is not given."""
    return isinstance(value, str) and (value == "???" or _REFERENCE.search(value) is not None)


def _effect(key: str, value: object) -> str | None:
    """What `value` of a key of `CHANGES` would change, empty for nothing; None for other keys."""
    for name, harmless, effect in CHANGES:
        if key == name or (name.endswith("*") and _below(key, name[:-1])):
            same = (v for v in harmless if isinstance(v, bool) == isinstance(value, bool))
            return "" if value in tuple(same) else effect
    return None


def _below(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(prefix + ".")


def _todo(config: Config, entries: Sequence[Entry]) -> list[str]:
    todo = []
    if not config.reward.path and config.reward.function is None:
        todo.append(
            "reward: verl scores by data_source with functions of its own; give "
            "reward.function.path, reward.path or reward.url"
        )
    try:
        check(config)
    except ValueError as error:
        problems = str(error).split("; ")
        todo += [problem for problem in problems if not problem.startswith("reward: no source")]
    todo += [
        f"{entry.key}={entry.value!s:.60}: {entry.note}" for entry in entries if _unsafe(entry)
    ]
    return todo


def _unsafe(entry: Entry) -> bool:
    return entry.status == "unsafe"


# --- reading -------------------------------------------------------------------------------


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings with dotted keys; empty sections and lists are values."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def resolve(flat: Mapping[str, object]) -> dict[str, object]:
    """Replace ``${key}``, ``${.key}`` and ``${oc.select:key,default}`` by values; what cannot be
    replaced stays."""
    return {key: _resolve(value, key, flat, frozenset([key])) for key, value in flat.items()}


def _resolve(value: object, key: str, flat: Mapping[str, object], trail: frozenset[str]) -> object:
    while isinstance(value, str):
        match = _REFERENCE.search(value)
        if match is None:
            return value
        name, _, default = match[1].removeprefix("oc.select:").partition(",")
        name = name.strip()
        if name.startswith("."):
            name = key.rpartition(".")[0] + name
        if name in trail:  # they refer to each other
            return value
        if name in flat:
            found = _resolve(flat[name], name, flat, trail | {name})
        elif default:
            found = parse_yaml(default.strip(), key)
        else:
            return value
        if match.span() == (0, len(value)):
            value = found
        else:
            value = value[: match.start()] + str(found) + value[match.end() :]
    return value
