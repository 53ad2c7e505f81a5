"""The card describes the shards."""

from PIL import Image
from support.shards import make_shards

from varlab.data.dataset_card import write_card


def test_the_card_describes_the_shards(tmp_path):
    make_shards(tmp_path)
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| train | 48 | 3 |" in text and "| val | 11 | 1 |" in text and "| 28 x 28 | 48 |" in text
    assert Image.open(tmp_path / "samples.png").size[0] > 500
