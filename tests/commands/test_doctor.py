"""`varlab doctor`."""

import pytest
from support.runs import fit

from varlab.commands.doctor import main
from varlab.training.reference_curves import (
    references,
    report,
)


def test_a_run_is_compared_from_its_folder(tmp_path, var_overrides, capsys, monkeypatch):
    """A tiny run is not a run of the demo: the reference is given, the differing settings are named."""
    fit(tmp_path / "run", *var_overrides)
    (tmp_path / "run/.hydra").mkdir()
    (tmp_path / "run/.hydra/config.yaml").write_text("steps: 9\nmodule: {base_lr: 0.5}\n")
    said = report(tmp_path / "run", references() / "var_digits.csv")
    assert "steps=9 (reference 1200)" in said and "module.base_lr=0.5 (reference 0.002)" in said
    assert "module.weight_decay is not set (reference 0.05)" in said and "is_compiled" not in said
    assert "metrics" in said and (tmp_path / "run/doctor.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr("sys.argv", ["varlab", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"varlab doctor: .*metrics.csv holds no curves"):
        main()
    monkeypatch.setattr("sys.argv", ["varlab", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=r"hydra.yaml is missing, so the experiment of the run is unknown"):
        main()
