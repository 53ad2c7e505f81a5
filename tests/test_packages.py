"""What must not be installed, and what must not be imported at the start."""

import importlib.util

import pytest


@pytest.mark.parametrize("name", ["torchvision", "torch_fidelity"])
def test_packages_that_break_a_cpu_torch_are_absent(name):
    assert importlib.util.find_spec(name) is None, (
        f"{name} beside a CPU torch makes lightning or torchmetrics fail to import"
    )
