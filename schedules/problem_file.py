"""Problems as files: YAML or JSON by the contract, or two parallel layouts to place.

Every mistake in a file is a `ValueError` of one line that names the place.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlhfuse.config_file import read_yaml
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.layouts import ModelLayout, Placement, place

_PROBLEM_KEYS = ("ranks", "memory_cap", "pipelines", "link_latency")
_LAYOUT_KEYS = ("layout", "memory_cap", "link_latency")
_NUMBERS = ("forward", "backward", "weight", "activation", "activation_after_input")
_MODEL_KEYS = ("name", "tp", "pp", "dp", "microbatches", *_NUMBERS)
_PIPELINE_KEYS = (
    *("name", "stages", "microbatches", *_NUMBERS),
    *("microbatch_weights", "release", "deadline", "interleaved"),
)


def read_problem(
    path: str | Path,
    *,
    split_weight: bool = False,
    on_placement: Callable[[Placement], None] | None = None,
) -> Problem:
    """The problem in a YAML or JSON file.

    A file with `layout` in place of `ranks` and `pipelines` gives the sizes of two models on the
    same GPUs; their stages are placed by `layouts.place`, and `on_placement` is told where.

    Raises:
        ValueError: the file is not a problem; place, value and what is expected.
    """
    try:
        tree = read_yaml(path)
        if "layout" not in tree:
            return problem_from_tree(tree)
        placement = _placement(tree, split_weight)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error
    if on_placement is not None:
        on_placement(placement)
    return placement.problem


def _placement(tree: Mapping[str, object], split_weight: bool) -> Placement:
    _check_keys("problem", tree, _LAYOUT_KEYS, ("layout",))
    models = tree["layout"]
    if not isinstance(models, list) or len(models) != 2:
        raise ValueError("layout: expected a list of two models")
    first, second = (_model(f"layout[{i}]", value) for i, value in enumerate(models))
    cap = tree.get("memory_cap")
    return place(
        first,
        second,
        memory_cap=None if cap is None else _number("memory_cap", cap),
        link_latency=_number("link_latency", tree.get("link_latency", 0.0)),
        split_weight=split_weight,
    )


def _model(place: str, value: object) -> ModelLayout:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is {value!r}, expected name, tp, pp, dp, microbatches, ...")
    _check_keys(place, value, _MODEL_KEYS, ("name", "tp", "pp", "dp", "microbatches", "forward"))
    name = value["name"]
    if not isinstance(name, str):
        raise ValueError(f"{place}.name is {name!r}, expected a word")
    after = value.get("activation_after_input")
    tp, pp, dp, m = (_whole(f"{place}.{k}", value[k]) for k in ("tp", "pp", "dp", "microbatches"))
    return ModelLayout(
        name,
        tp,
        pp,
        dp,
        m,
        _numbers(f"{place}.forward", value["forward"]),
        _numbers(f"{place}.backward", value.get("backward", 0.0)),
        _numbers(f"{place}.weight", value.get("weight", 0.0)),
        _numbers(f"{place}.activation", value.get("activation", 1.0)),
        None if after is None else _numbers(f"{place}.activation_after_input", after),
    )


def problem_from_tree(tree: Mapping[str, object]) -> Problem:
    """A problem from the nested lists and mappings of a problem file.

    Raises:
        ValueError: as `read_problem`.
    """
    _check_keys("problem", tree, _PROBLEM_KEYS, ("ranks", "pipelines"))
    pipelines = tree["pipelines"]
    if not isinstance(pipelines, list):
        raise ValueError(f"pipelines is {pipelines!r}, expected a list of pipelines")
    cap = tree.get("memory_cap")
    return Problem(
        _whole("ranks", tree["ranks"]),
        tuple(_pipeline(f"pipelines[{i}]", value) for i, value in enumerate(pipelines)),
        None if cap is None else _number("memory_cap", cap),
        _links(tree.get("link_latency", 0.0)),
    )


def problem_to_tree(problem: Problem) -> dict[str, object]:
    """What `problem_from_tree` reads back as the same problem."""
    tree: dict[str, object] = {"ranks": problem.num_ranks}
    if problem.memory_cap is not None:
        tree["memory_cap"] = problem.memory_cap
    if isinstance(problem.link_latency, Mapping):
        tree["link_latency"] = [[a, b, s] for (a, b), s in problem.link_latency.items()]
    else:
        tree["link_latency"] = problem.link_latency
    tree["pipelines"] = [_pipeline_tree(pipe) for pipe in problem.pipelines]
    return tree


def _pipeline(place: str, value: object) -> Pipeline:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is {value!r}, expected name, stages, microbatches, ...")
    _check_keys(place, value, _PIPELINE_KEYS, ("name", "stages", "microbatches", "forward"))
    name = value["name"]
    if not isinstance(name, str):
        raise ValueError(f"{place}.name is {name!r}, expected a word")
    stages = value["stages"]
    if not isinstance(stages, list):
        raise ValueError(f"{place}.stages is {stages!r}, expected the rank of each stage")
    weights, deadline = value.get("microbatch_weights"), value.get("deadline")
    after = value.get("activation_after_input")
    interleaved = value.get("interleaved", False)
    if not isinstance(interleaved, bool):
        raise ValueError(f"{place}.interleaved is {interleaved!r}, expected true or false")
    return Pipeline.make(
        name,
        [_whole(f"{place}.stages[{i}]", rank) for i, rank in enumerate(stages)],
        _whole(f"{place}.microbatches", value["microbatches"]),
        _numbers(f"{place}.forward", value["forward"]),
        _numbers(f"{place}.backward", value.get("backward", 0.0)),
        weight=_numbers(f"{place}.weight", value.get("weight", 0.0)),
        activation=_numbers(f"{place}.activation", value.get("activation", 1.0)),
        activation_after_input=None
        if after is None
        else _numbers(f"{place}.activation_after_input", after),
        microbatch_weights=None
        if weights is None
        else _list(f"{place}.microbatch_weights", weights),
        release=_number(f"{place}.release", value.get("release", 0.0)),
        deadline=None if deadline is None else _number(f"{place}.deadline", deadline),
        interleaved=interleaved,
    )


def _pipeline_tree(pipe: Pipeline) -> dict[str, object]:
    tree: dict[str, object] = {
        "name": pipe.name,
        "stages": list(pipe.stages),
        "microbatches": pipe.num_microbatches,
    }
    for key in _NUMBERS:
        values: tuple[float, ...] = getattr(pipe, key)
        tree[key] = values[0] if len(set(values)) == 1 else list(values)
    if set(pipe.microbatch_weights) != {1.0}:
        tree["microbatch_weights"] = list(pipe.microbatch_weights)
    if pipe.release:
        tree["release"] = pipe.release
    if pipe.deadline is not None:
        tree["deadline"] = pipe.deadline
    if pipe.interleaved:
        tree["interleaved"] = True
    return tree


def _check_keys(
    place: str, tree: Mapping[str, object], known: Sequence[str], needed: Sequence[str]
) -> None:
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{place}: unknown key {key!r}; {hint}")
    for key in needed:
        if key not in tree:
            raise ValueError(f"{place}: the key {key!r} is missing")


def _whole(place: str, value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{place} is {value!r}, expected a whole number")
    return value


def _number(place: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place} is {value!r}, expected a number")
    return float(value)


def _list(place: str, value: object) -> list[float]:
    if not isinstance(value, list):
        raise ValueError(f"{place} is {value!r}, expected a list of numbers")
    return [_number(f"{place}[{i}]", item) for i, item in enumerate(value)]


def _numbers(place: str, value: object) -> float | list[float]:
    return _list(place, value) if isinstance(value, list) else _number(place, value)


def _links(value: object) -> float | dict[tuple[int, int], float]:
    if not isinstance(value, list):
        return _number("link_latency", value)
    links: dict[tuple[int, int], float] = {}
    for i, item in enumerate(value):
        if not isinstance(item, list) or len(item) != 3:
            raise ValueError(f"link_latency[{i}] is {item!r}, expected [from, to, seconds]")
        pair = (_whole(f"link_latency[{i}]", item[0]), _whole(f"link_latency[{i}]", item[1]))
        links[pair] = _number(f"link_latency[{i}]", item[2])
    return links
