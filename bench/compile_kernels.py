"""Do the Triton kernels compile for GPUs that are not here, and what do they take?

    python bench/compile_kernels.py --json bench/results/kernels_compiled.json

Compiles each kernel for sm_80, sm_90 and sm_100 with no GPU present and asks ptxas for registers,
spills and shared memory.
"""

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlhfuse.kernels import (
    triton_gae,
    triton_gae_padded,
    triton_kept,
    triton_linear,
    triton_logprob,
    triton_meet,
    triton_value,
    triton_whiten,
)

TARGETS = (80, 90, 100)


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel, the types of its run-time arguments, its compile-time ones, and how it is
    launched."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, int | bool]
    options: Mapping[str, int] = field(default_factory=lambda: {"num_warps": 8})


@dataclass(frozen=True, slots=True)
class Report:
    kernel: str
    target: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int


def cases() -> list[Case]:
    logits = {
        "logits_ptr": "*bf16", "row_stride": "i32", "labels_ptr": "*i64",
        "temperatures_ptr": "*fp32", "temperature": "fp32", "saved_ptr": "*fp32",
        "entropy_ptr": "*fp32", "num_rows": "i32",
    }  # fmt: skip
    sizes: dict[str, int | bool] = {"VOCAB": 151_936, "PER_ROW": False, "BLOCK": 4096}
    scan = {
        "rewards_ptr": "*fp32", "logprobs_ptr": "*fp32", "ref_ptr": "*fp32", "scores_ptr": "*fp32",
        "values_ptr": "*fp32", "bootstrap_ptr": "*fp32", "cu_seqlens_ptr": "*i32",
        "advantages_ptr": "*fp32", "returns_ptr": "*fp32", "shaped_ptr": "*fp32",
        "moments_ptr": "*fp64", "gamma": "fp32", "decay": "fp32", "log2_decay": "fp32",
        "kl": "fp32", "num_tokens": "i32", "num_sequences": "i32",
    }  # fmt: skip
    blocks: dict[str, int | bool] = {"VALUES": True, "BLOCK": 2048, "AHEAD": 2048}
    padded = scan | {"mask_ptr": "*i1", "num_places": "i64", "length": "i32"}
    small = blocks | {"BLOCK": triton_gae_padded._MAX_BLOCK, "AHEAD": triton_gae_padded._AHEAD}
    white = {
        "values_ptr": "*fp32", "mask_ptr": "*i1", "parts_ptr": "*fp64", "counter_ptr": "*i32",
        "statistics_ptr": "*fp64", "above_ptr": "*fp32", "gradient_ptr": "*fp32",
        "out_ptr": "*fp32", "num_values": "i32", "num_parts": "i32", "eps": "fp32",
    }  # fmt: skip
    value = {
        "values_ptr": "*bf16", "old_ptr": "*fp32", "returns_ptr": "*fp32", "loss_ptr": "*fp32",
        "clipped_ptr": "*i8", "above_ptr": "*fp32", "gradient_ptr": "*bf16", "num_values": "i32",
        "clip": "fp32",
    }  # fmt: skip
    whole: dict[str, int | bool] = {"MASKED": True, "BLOCK": 2048}
    few = {"num_warps": triton_whiten._WARPS}
    merged = whole | {"SHIFT": True, "MERGED": triton_whiten._MERGED}
    head = {
        "hidden_ptr": "*bf16", "hidden_stride": "i32", "weight_ptr": "*bf16",
        "weight_stride": "i32", "bias_ptr": "*bf16", "labels_ptr": "*i64",
        "temperatures_ptr": "*fp32", "temperature": "fp32", "out_ptr": "*fp32",
        "num_tokens": "i32",
    }  # fmt: skip
    tiles: dict[str, int | bool] = {
        "VOCAB": 151_936, "HIDDEN": 4096, "SPLIT": 4864, "SPLITS": 32, "GROUP": 8,
        "BIAS": False, "PER_ROW": False,
        "BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 64,
    }  # fmt: skip
    slab = {
        "out_ptr": "*bf16", "entropy_ptr": "*fp32", "top_ptr": "*fp32", "total_ptr": "*fp32",
        "grad_logprob_ptr": "*fp32", "grad_entropy_ptr": "*fp32", "first": "i32",
    }  # fmt: skip
    backward = {
        "gradient_ptr": "*bf16", "gradient_stride": "i32",
        "grad_logprob_ptr": "*fp32", "grad_entropy_ptr": "*fp32",
    }  # fmt: skip
    return [
        *kept_cases(),
        Case(
            "token_logprob forward + entropy",
            triton_logprob._forward,
            logits | {"logprob_ptr": "*fp32"},
            sizes | {"ENTROPY": True},
        ),
        Case(
            "token_logprob backward + entropy",
            triton_logprob._backward,
            logits | backward,
            sizes | {"ENTROPY": True},
        ),
        Case("gae + moments", triton_gae._scan, scan, blocks | {"SHAPED": 0, "BOOTSTRAP": False}),
        Case(
            "gae + moments, k3 rewards",
            triton_gae._scan,
            scan,
            blocks | {"SHAPED": 3, "BOOTSTRAP": True},
        ),
        Case(
            "gae, padded + moments",
            triton_gae_padded._scan_padded,
            padded,
            small | {"SHAPED": 0, "BOOTSTRAP": False},
        ),
        Case(
            "gae, padded + moments, few tokens",
            triton_gae_padded._scan_padded,
            padded,
            small | {"SHAPED": 0, "BOOTSTRAP": False, "BLOCK": 128},
            {"num_warps": 2},
        ),
        Case(
            "gae, padded + moments, k3 rewards",
            triton_gae_padded._scan_padded,
            padded,
            small | {"SHAPED": 3, "BOOTSTRAP": True},
        ),
        Case("moments", triton_whiten._moments, white, whole, few),
        Case(
            "mean and variance forward",
            triton_whiten._statistics,
            white | {"out_ptr": "*fp64"},
            merged,
            few,
        ),
        Case(
            "mean and variance backward",
            triton_whiten._statistics_backward,
            white | {"above_ptr": "*fp64"},
            whole,
            few,
        ),
        Case("whiten by moments", triton_whiten._whiten, white, merged | {"GIVEN": True}, few),
        Case(
            "whiten forward",
            triton_whiten._whiten,
            white,
            merged | {"GIVEN": False},
            triton_meet.options(),
        ),
        Case(
            "whiten backward", triton_whiten._whiten_backward, white, merged, triton_meet.options()
        ),
        Case(
            "value loss forward", triton_value._value_forward, value, {"CLIP": True, "BLOCK": 2048}
        ),
        Case(
            "value loss backward",
            triton_value._value_backward,
            value,
            {"CLIP": True, "BLOCK": 2048},
        ),
        Case("linear_logprob forward", triton_linear._partials, head, tiles),
        Case(
            "linear_logprob backward + entropy",
            triton_linear._logit_gradient,
            head | slab,
            tiles | {"WIDTH": 16_384, "ENTROPY": True},
        ),
    ]


def kept_cases() -> list[Case]:
    """Log-probabilities among kept tokens."""
    rows = {
        "source_ptr": "*bf16", "stride": "i32", "hidden_ptr": "*bf16", "hidden_stride": "i32",
        "weight_ptr": "*bf16", "weight_stride": "i32", "bias_ptr": "*bf16", "labels_ptr": "*i64",
        "ids_ptr": "*i32", "cu_ptr": "*i64", "temperatures_ptr": "*fp32", "temperature": "fp32",
        "entropy_ptr": "*fp32", "top_ptr": "*fp32", "total_ptr": "*fp32",
        "grad_logprob_ptr": "*fp32", "grad_entropy_ptr": "*fp32", "slopes_ptr": "*fp32",
        "order_ptr": "*i64", "owners_ptr": "*i64", "bounds_ptr": "*i64", "out_ptr": "*fp32",
        "by_bias_ptr": "*fp32", "slab_ptr": "*bf16", "slab_stride": "i32", "num_rows": "i32",
        "first": "i32",
    }  # fmt: skip
    picked = rows | {"source_ptr": "*fp32"}
    head: dict[str, int | bool] = {
        "HEAD": True, "HIDDEN": 4096, "BIAS": False, "PER_ROW": False, "ENTROPY": True,
        "WIDTH": 18_992, "BLOCK_K": triton_kept._BLOCK_K, "BLOCK_H": triton_kept._BLOCK_H,
    }  # fmt: skip
    logits = head | {"HEAD": False, "HIDDEN": 1, "ENTROPY": False, "BLOCK_K": 128}
    wide = head | {"BLOCK_H": triton_kept._WIDE_H, "BIAS": True}
    few = {"num_warps": 4}
    return [
        Case("kept: forward from the head", triton_kept._fold, rows, head, few),
        Case("kept: forward from logits", triton_kept._fold, picked, logits, few),
        Case("kept: slopes from the head", triton_kept._slopes, rows, head, few),
        Case("kept: slopes from logits", triton_kept._slopes, picked, logits, few),
        Case("kept: gradient by hidden", triton_kept._by_hidden, rows, wide, few),
        Case("kept: gradient by weight", triton_kept._by_weight, rows, wide, few),
        Case("kept: added to logits' gradient", triton_kept._add, rows, logits, few),
    ]


def compile_case(case: Case, capability: int) -> Report:
    """Compile for one target and read ptxas's account of it."""
    order = {name: case.types.get(name, "constexpr") for name in case.kernel.arg_names}
    # As at run time: pointers and strides are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(order.items())
        if kind.startswith("*") or name.endswith("_stride")
    }
    constants = {name: value for name, value in case.constants.items() if name in order}
    source = ASTSource(fn=case.kernel, signature=order, constexprs=constants, attrs=aligned)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options=dict(case.options),
        )
    registers, stores, loads = account(told.getvalue())
    return Report(case.name, f"sm_{capability}", registers, stores, loads, compiled.metadata.shared)


def account(told: str) -> tuple[int, int, int]:
    """Registers, bytes of spill stores and of spill loads, as ptxas -v prints them."""
    used = re.search(r"Used (\d+) registers", told)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    assert used is not None, told
    assert spills is not None, told
    return int(used[1]), int(spills[1]), int(spills[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    options = parser.parse_args()
    triton.knobs.compilation.always_compile = True  # what comes from its cache has no account
    triton.knobs.nvidia.dump_ptxas_log = True
    reports = [
        compile_case(case, target)
        for case in cases()
        if options.only in case.name
        for target in TARGETS
    ]
    for report in reports:
        print(
            f"{report.kernel:34} {report.target:7} {report.registers:4} registers  "
            f"{report.spill_store_bytes:5} B spilled  {report.shared_bytes:7} B shared"
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        result = {"versions": versions, "kernels": [asdict(report) for report in reports]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
