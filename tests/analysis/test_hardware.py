"""Slices by name, and what a GPU leaves to a program."""

import pytest

from llama_jax.analysis import hardware


@pytest.mark.parametrize(
    ("name", "devices", "hosts", "accelerator"),
    [
        ("a100_8", 8, 1, "8xA100"),
        ("h100-16", 16, 2, "2 nodes of 8xH100"),
        ("h100_24", 24, 3, "3 nodes of 8xH100"),
        ("a100_2048", 2048, 256, "256 nodes of 8xA100"),
    ],
)
def test_gpus_are_found_by_their_number(name, devices, hosts, accelerator):
    found = hardware.find_slice(name)
    assert (found.devices, found.hosts, found.accelerator) == (devices, hosts, accelerator)
    assert (found.slices, found.topology, found.kernel) == (1, "", "cudnn")


@pytest.mark.parametrize(
    ("name", "near"), [("h100_12", "16"), ("a100_4", "8"), ("h100_4096", "2048"), ("a100_0", "8")]
)
def test_a_part_of_a_node_is_refused_with_the_nearest_number(name, near):
    with pytest.raises(ValueError, match=f"whole nodes of 8 GPUs.*nearest: '{name[:4]}_{near}'"):
        hardware.find_slice(name)


@pytest.mark.parametrize(
    ("called", "name", "devices", "hosts"),
    [
        ("v5litepod-16", "v5e_16", 16, 4),
        ("v5litepod_4", "v5e_4", 4, 1),
        ("v6e-1", "v6e_1", 1, 1),
        ("v4-32", "v4_32", 16, 4),
        ("tpu7x-128", "v7x_128", 128, 16),  # 64 chips, of two devices each, four a host
    ],
)
def test_slices_are_found_by_the_clouds_names(called, name, devices, hosts):
    assert hardware.name_of(called) == name
    found = hardware.find_slice(called)
    assert found == hardware.SLICES[name]
    assert (found.devices, found.hosts) == (devices, hosts)
    assert hardware.name_of(found.accelerator) == name


def test_an_unknown_slice_of_the_clouds_name_is_refused_with_one_of_its_generation():
    with pytest.raises(ValueError, match=r"nearest: 'v5e_\d+'"):
        hardware.find_slice("v5litepod-15")


def test_every_slice_of_the_table_is_found():
    for name, slice_ in hardware.SLICES.items():
        assert hardware.find_slice(name) == slice_
    assert "h100_2048" in hardware.SLICES


def test_a_gpu_has_the_share_that_jax_is_told_to_take():
    """0.93 of the 79.1 GiB that CUDA reports of 80 GB, and of the 139.7 of 141 GB."""
    assert hardware.find("NVIDIA A100-SXM4-80GB").hbm_gib == 73.6
    assert hardware.find("NVIDIA H100 80GB HBM3").hbm_gib == 73.6
    assert hardware.find("NVIDIA H200").hbm_gib == 129.9
