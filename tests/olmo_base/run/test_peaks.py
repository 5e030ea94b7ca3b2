"""Peaks: the data sheets' figures under the names that the driver gives, and a measured one."""

import time

import pytest
import torch

from olmo_base.run.peaks import cpu_matmul_rate, gpu_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpus_peak_is_that_of_its_data_sheet(name, peak):
    assert gpu_peak(name) == peak


def test_a_cpus_peak_is_the_rate_of_its_own_products():
    found = peak_flops(torch.device("cpu"), bf16=False)
    assert found == cpu_matmul_rate(False, torch.get_num_threads())  # measured once
    left = torch.randn(1024, 1024)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        left @ left
        seconds.append(time.perf_counter() - started)
    rate = 2 * 1024**3 / min(seconds)
    assert found is not None and rate / 10 < found < rate * 10  # other work may slow either
