"""What do smaller micro-batches cost on a GPU? A calculation from data sheets, nothing measured.

    python -m bench.bench_microbatch_cost

A serial 1F1B pipeline of `stages` GPUs has less bubble the more micro-batches the same tokens are
cut into, but each of them reads the weights in both passes, adds to the float32 gradients (reads
and writes 4 bytes a weight, and 2 of the new one twice), and launches every layer's kernels: on a
CPU with small models that is next to nothing, on a GPU it is not. A layer's pass takes the longer
of its products (at the part of the peak that `rlhfuse.hardware` assumes) and its traffic, and what
it launches; messages between stages are left out.

`work_over_least`: time of the tasks over that of the coarsest cut. `serial_over_least`: with the
bubble, in units of the coarsest cut's tasks. `no_bubble_gain`: what a schedule without a bubble at
this cut gains over serial 1F1B at its own best cut.
"""

import argparse

from bench.record import Row, print_table, write_result
from rlhfuse.hardware import Device, device
from rlhfuse.model_shape import ModelShape, shape_of

# Bytes of traffic per weight and micro-batch: both passes read it (the backward pass for the
# gradient of its input), and the gradient is written, read, and added to a float32 sum.
_READ_BYTES = 2 * 2
_GRADIENT_BYTES = 2 + 2 + 4 + 4


def microbatch_s(
    shape: ModelShape, on: Device, layers: int, tokens: float, context: float
) -> float:
    """Forward and backward of `layers` layers over a micro-batch, seconds."""
    reached = on.efficiency
    products = 3 * tokens * shape.layer_flops(context) / (on.flops * reached.train)
    moved = shape.layer_parameters * (_READ_BYTES + _GRADIENT_BYTES)
    traffic = moved / (on.memory_bandwidth * reached.memory)
    # Reading weights hides behind products, to add up gradients does not: it comes after them.
    read = traffic * _READ_BYTES / (_READ_BYTES + _GRADIENT_BYTES)
    return layers * (max(products, read) + traffic - read + 3 * reached.launch_s)


def rows_of(name: str, on: Device, tokens: float, stages: int, counts: list[int]) -> list[Row]:
    """One model, cut ever finer."""
    shape = shape_of(name)
    layers = shape.num_layers // stages
    work = {
        count: count * microbatch_s(shape, on, layers, tokens / count, 512.0) for count in counts
    }
    serial = {count: work[count] * (count + stages - 1) / count for count in counts}
    least, best = work[min(counts)], min(serial.values())
    return [
        {
            "model": name,
            "device": on.name,
            "stages": stages,
            "microbatches": count,
            "tokens_each": int(tokens / count),
            "work_s": work[count],
            "work_over_least": work[count] / least,
            "serial_over_least": serial[count] / least,
            "no_bubble_gain": best / work[count],
        }
        for count in counts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["qwen2.5-1.5b", "qwen2.5-7b", "llama-65b"])
    parser.add_argument("--device", default="h200")
    parser.add_argument("--tokens", type=float, default=65536, help="of an update and replica")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    asked = parser.parse_args()
    rows = [
        row
        for name in asked.models
        for row in rows_of(
            name, device(asked.device), asked.tokens, asked.stages, asked.microbatches
        )
    ]
    print_table(rows)
    print(write_result("microbatch_cost", rows))


if __name__ == "__main__":
    main()
