"""Published scores and their protocols."""

import numpy as np
import pytest

from varlab.evaluation.image_sets import ImageSet
from varlab.evaluation.published_scores import PRESETS, compare


def test_the_same_protocol_is_called_so():
    drawn = {"cfg_scale": 1.5, "top_k": 900, "top_p": 0.96, "smooth": False}
    protocol = {"features": "inception", "num_samples": 50_000, "resolution": 256, "reference_statistics": "stored"}
    (line,) = compare("var_d30_256", {**protocol, "sampling": drawn})
    assert "FID 1.97" in line and line.endswith("same protocol")
    assert all(preset.num_samples == 50_000 for preset in PRESETS.values())
    with pytest.raises(ValueError, match=r"arr_0 is float64 of shape \(2,\), not uint8"):
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder) / "x.npz", arr_0=np.zeros(2))
            ImageSet(Path(folder) / "x.npz")
