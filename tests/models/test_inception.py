"""The Inception network of the published scores."""

import pytest
import torch
from support.golden_rule import golden
from support.image_files import pattern

from varlab.models.inception import Inception, resize_as_tensorflow


def test_the_inceptions_three_outputs():
    network, images = Inception(is_random=True).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    pooled, spatial, probabilities = network.all_outputs(images)
    assert pooled.shape == (2, 2048) and spatial.shape == (2, 7 * 17 * 17) and (spatial >= 0).all()
    torch.testing.assert_close(pooled, network.pooled(images))
    torch.testing.assert_close(probabilities, (pooled @ network.fc.weight.T).softmax(dim=1))


def test_inception_gives_the_features_of_the_published_code():
    """Recorded from torch-fidelity 0.4 with the same random weights."""
    net, generator = Inception(is_random=True), torch.Generator().manual_seed(0)
    for name, value in net.named_buffers():
        if name.endswith(("running_var", "bn.weight")):
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.75)
        elif value.dtype.is_floating_point:
            std = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
            value.copy_(torch.randn(value.shape, generator=generator) * std)
    pooled = net.pooled(pattern(70))
    assert pooled[:, :8].tolist() == [pytest.approx(row, rel=1e-3, abs=1e-4) for row in golden("features")["inception"]]


def test_the_resize_of_tensorflow_begins_at_the_corner():
    row = torch.tensor([0.0, 4.0, 8.0, 4.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resize_as_tensorflow(row, 8)[0, 0, 0].tolist() == [0, 2, 4, 6, 8, 6, 4, 4]
