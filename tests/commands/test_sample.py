"""A set of samples depends on seed and settings alone, not on how it was drawn."""

import pytest
from support.runs import draw


def test_classes_by_name_and_settings_by_scale(export_folder, tmp_path):
    images = draw(
        export_folder,
        tmp_path / "out",
        "classes=[tabby cat,0]",
        "num=4",
        "top_k=[1,1,2,12]",
        "cfg_scale=[0,1,1,2]",
        "precision=bf16",
    )
    assert [name[-6:-4] for name in images] == ["02", "00", "02", "00"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("classes=balanced", "num=7 is not a multiple of 3 classes"),
        ("classes=[fore]", "no class is called 'fore'"),
        ("top_k=[1,2]", r"top_k=\[1, 2\] has 2 entries, but the pyramid has 4 scales"),
        ("num=0", "num=0 and batch_size=50 must be positive"),
    ],
)
def test_a_wrong_setting_leaves_nothing_behind(setting, message, export_folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(export_folder, tmp_path / "out", setting)
    assert not (tmp_path / "out").exists()
