"""The names that `import varlab` offers."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch

import varlab


def test_every_public_name_is_the_object_of_its_module():
    assert set(varlab.PUBLIC) == set(varlab.__all__)
    for name, module in varlab.PUBLIC.items():
        assert getattr(varlab, name) is getattr(import_module(f"varlab.{module}"), name)
    assert set(varlab.__all__) < set(dir(varlab))


def test_importing_the_package_imports_no_torch():
    script = "import sys, varlab; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'varlab' has no attribute 'VQGAN'"):
        _ = varlab.VQGAN


def test_networks_convert_to_the_released_layout_and_back(tokenizer, var, token_maps, labels):
    inputs = tokenizer.quantizer.teacher_forcing_inputs(token_maps)
    back = varlab.load_released(varlab.to_released(var), var.patch_nums, num_heads=var.num_heads).eval()
    assert isinstance(back, varlab.VAR)
    assert torch.equal(back(inputs, labels), var(inputs, labels))
