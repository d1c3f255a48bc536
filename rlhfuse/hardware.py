"""Devices and clusters as data: what a prediction without any measurement starts from.

Peak numbers are the makers'; `Efficiency` says which part of a peak is assumed to be reached, and
what small things cost. Whoever has measured something replaces it.
"""

from dataclasses import dataclass, field, replace

GB = 1e9
TFLOPS = 1e12


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Parts of peaks that are reached, and fixed costs. Defaults: our assumptions for GPUs.

    train and infer: of `Device.flops` in matrix products (published whole-step utilisations of
    large dense models on Hopper are 0.4 to 0.5, pipeline bubbles and communication included).
    collective_s: one small all-reduce inside a node. launch_s: host time per layer and pass where
    nothing is captured in a graph; graph_s: per layer and decode step where it is. step_s: an
    engine step's scheduling and sampling. task_s: any other command. sync_overlap: part of the
    gradient exchange that hides behind the backward pass.
    """

    train: float = 0.5
    infer: float = 0.55
    memory: float = 0.75
    link: float = 0.75
    network: float = 0.8
    collective_s: float = 10e-6
    launch_s: float = 50e-6
    graph_s: float = 10e-6
    step_s: float = 1.5e-3
    task_s: float = 5e-3
    sync_overlap: float = 0.5


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator. Bandwidths are bytes/s in one direction, `flops` dense at `value_bytes`."""

    name: str
    flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float  # to the other devices of its node
    network_bandwidth: float  # its share of the node's network, unless the plan says otherwise
    host_bandwidth: float  # to the host's memory
    source: str
    value_bytes: int = 2  # of a weight or activation
    efficiency: Efficiency = field(default_factory=Efficiency)


# SXM modules, dense bfloat16. Network: one ConnectX port per device as in the makers' reference
# systems (DGX A100 200 Gb/s; DGX H100, H200, B200 400 Gb/s). Host: PCIe 4, 5 and 6 x16, as used.
DEVICES: tuple[Device, ...] = (
    Device(
        "a100", 312 * TFLOPS, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, 25 * GB,
        "NVIDIA A100 80GB SXM data sheet: 312 TFLOPS bf16 dense, 2039 GB/s, NVLink 600 GB/s",
    ),
    Device(
        "h100", 989.4 * TFLOPS, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 50 * GB,
        "NVIDIA H100 SXM data sheet: 989.4 TFLOPS bf16 dense, 3.35 TB/s, NVLink 900 GB/s",
    ),
    Device(
        "h200", 989.4 * TFLOPS, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 50 * GB,
        "NVIDIA H200 SXM data sheet: 989.4 TFLOPS bf16 dense, 141 GB, 4.8 TB/s, NVLink 900 GB/s",
    ),
    Device(
        "b200", 2250 * TFLOPS, 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 50 * GB,
        "NVIDIA HGX B200 data sheet: 2.25 PFLOPS bf16 dense, 180 GB, 8 TB/s, NVLink 1.8 TB/s",
    ),
    Device(
        "cpu", 0.1 * TFLOPS, 8 * GB, 10 * GB, 5 * GB, 1.25 * GB, 5 * GB,
        "one server core, two 8-wide float32 FMA a cycle at 3 GHz: an order of magnitude",
        value_bytes=4,
        efficiency=Efficiency(
            train=0.45, infer=0.45, memory=0.7, collective_s=2e-4, launch_s=4e-4, graph_s=4e-4,
            step_s=1.5e-3,
        ),
    ),
)  # fmt: skip


def device(name: str) -> Device:
    """The device called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    for known in DEVICES:
        if known.name == name.lower():
            return known
    names = ", ".join(known.name for known in DEVICES)
    raise ValueError(f"plan.hardware: {name!r} is not known, choose one of {names}")


@dataclass(frozen=True, slots=True)
class Cluster:
    """`num_devices` of one kind, `devices_per_node` to a node."""

    device: Device
    num_devices: int
    devices_per_node: int

    def with_network(self, bytes_per_s: float) -> "Cluster":
        """The same cluster with another network per device."""
        return replace(self, device=replace(self.device, network_bandwidth=bytes_per_s))

    @property
    def node_size(self) -> int:
        return min(self.num_devices, self.devices_per_node)

    def between_s(self, num_bytes: float, span: int) -> float:
        """Sending `num_bytes` from each device to one `span` devices away."""
        device, efficiency = self.device, self.device.efficiency
        if span < self.node_size:
            return num_bytes / (device.link_bandwidth * efficiency.link)
        return num_bytes / (device.network_bandwidth * efficiency.network)

    def all_reduce_s(self, num_bytes: float, group: int) -> float:
        """Summing `num_bytes` over `group` devices of one node, by a ring."""
        if group < 2:
            return 0.0
        device, efficiency = self.device, self.device.efficiency
        moved = 2 * (group - 1) / group * num_bytes
        return efficiency.collective_s + moved / (device.link_bandwidth * efficiency.link)
