"""What W&B gets."""

import json

from support.runs import wandb_records


def test_wandb_gets_config_artifacts_and_the_loss_by_scale(resumed):
    text = json.dumps(wandb_records(resumed / "wandb"))
    assert "global_batch_size" in text and "git_commit" in text  # the config tree, the code's version
    assert "dataset-" in text and "tokenizer-" in text and "val/by_scale" in text
