"""The most floating-point operations a second that the hardware can do: what MFU is a part of."""

import functools
import time

import torch

# Dense bf16 peak in FLOP/s as the data sheets say, found by the first part of a name that matches.
GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
CPU_SIDE = 512  # of the square matrices multiplied: 0.27 GFLOP
CPU_TRIES = 8


def gpu_peak(name: str) -> float | None:
    """The peak of a GPU of this name; None where it is not known."""
    return next((peak for part, peak in GPU_PEAKS.items() if part in name), None)


@functools.cache
def cpu_matmul_rate(bf16: bool, num_threads: int) -> float:
    """FLOP/s of the best of a few square products on this many threads; a few hundredths of a
    second, once a process."""
    assert num_threads == torch.get_num_threads()
    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.ones(CPU_SIDE, CPU_SIDE, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    seconds = []
    for _ in range(CPU_TRIES):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * CPU_SIDE**3 / min(seconds)


def peak_flops(device: torch.device, *, bf16: bool) -> float | None:
    """The most FLOP/s of one device: of a GPU its bf16 peak, of a CPU its own measured products.

    None where it is not known.
    """
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device))
    if device.type == "cpu":
        return cpu_matmul_rate(bf16, torch.get_num_threads())
    return None
