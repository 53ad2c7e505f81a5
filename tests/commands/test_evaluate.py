"""`varlab evaluate`: what cannot be scored is named."""

import pytest
from PIL import Image
from support.runs import score


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["samples={out}"], "reference=... is missing"),
        (["samples={out}", "reference={digits}"], "features=... is missing: inception"),
        (
            ["samples=nowhere", "reference={digits}", "features=efficientnet_lite0"],
            "nowhere is neither a folder of images",
        ),
        (["checkpoint=x"], "give checkpoint=FILE shards=FOLDER"),
        (
            ["samples={out}", "reference={digits}", "features=efficientnet_lite0", "preset=var_d99"],
            "preset='var_d99': choose one of",
        ),
        (["samples={mixed}", "reference={digits}", "features=efficientnet_lite0"], "scores need images of one size"),
    ],
)
def test_wrong_settings_are_named(settings, message, tmp_path, digits_folder, monkeypatch):
    monkeypatch.setenv("VARLAB_CACHE", str(tmp_path / "cache"))
    for name, sides in [("out", [16] * 5), ("mixed", [16, 8, 16, 16, 16])]:
        (tmp_path / name).mkdir()
        for i, side in enumerate(sides):
            Image.new("RGB", (side, side), (i, 2 * i, 0)).save(tmp_path / name / f"{i}.png")
    places = {"out": tmp_path / "out", "digits": digits_folder, "mixed": tmp_path / "mixed"}
    with pytest.raises(ValueError, match=message):
        score(tmp_path, *(setting.format(**places) for setting in settings))
