"""Parameter groups."""

from support.networks import make_var
from support.runs import fit

from varlab.checkpoints.load import read_checkpoint
from varlab.training.optimizers import is_hidden_matrix


def test_muP_like_rates_slow_the_matrices_that_read_the_width_alone(tmp_path, study):
    settings = [
        *study,
        "steps=3",
        "module.lr_reference_depth=1",
        "module.mup_lr_scaling=true",
        "module.warmup_tokens=null",
    ]
    fit(tmp_path / "run", *settings, "module.schedule.warmup=0.0")
    saved = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    rates = [group.get("lr_multiplier", 1.0) for group in saved["optimizer_states"][0]["param_groups"]]
    assert rates == [1.0, 1.0, 0.5]
    net = make_var()
    slowed = {name for name, parameter in net.named_parameters() if is_hidden_matrix(name, parameter)}
    assert {name.split(".")[-1] for name in slowed} == {"weight"}
    assert {"head.weight", "blocks.0.attention.qkv.weight", "head_modulation.linear.weight"} <= slowed
    assert not slowed & {"word_embed.weight", "class_embedding.weight", "position", "blocks.0.attention.q_bias"}
