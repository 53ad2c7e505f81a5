"""The line of an audit in a model card."""

from varlab.evaluation.audit import card_line

CARD = """# model

- 3 classes
- val_loss: 3.2

Permitted use depends on the data it was trained on.
"""


def found(auc: float, tpr: float | None) -> dict:
    weak = {"auc": 0.5, "auc_interval": [0.4, 0.6], "tpr": 0.01}
    strong = {"auc": auc, "auc_interval": [auc - 0.1, auc + 0.1], "tpr": tpr}
    return {"membership": {"likelihood": weak, "condition_gain": strong, "control": {**strong, "auc": 0.99}}}


def test_the_line_is_the_last_bullet_and_replaces_an_earlier_one():
    card = card_line(CARD, found(0.7, 0.123))
    lines = card.splitlines()
    at = lines.index("- val_loss: 3.2") + 1
    assert lines[at].startswith(
        "- membership inference: AUC 0.700 (0.600 to 0.800; 0.5 is chance) from condition gain, 12.3 %"
    )
    assert lines[at + 1] == "" and card.endswith("trained on.\n")
    again = card_line(card, found(0.8, None))
    assert again.count("membership") == 1 and "AUC 0.800" in again and "%" not in again
