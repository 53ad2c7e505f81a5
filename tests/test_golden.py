"""Our networks against figures recorded from the released code, on the same synthetic weights."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support import golden_rule as rule

from varlab.checkpoints.released_layout import released_key, to_released, tokenizer_from_released, var_from_released
from varlab.cost.flops import parameter_counts
from varlab.models import losses, scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import phi_of_scale
from varlab.models.var import VAR, block_causal_mask
from varlab.sampling.editing import box_mask, edit, keep_masks
from varlab.sampling.generate import decode, generate, generate_tokens
from varlab.sampling.token_sampling import Randomness, SamplingSettings, filter_logits, smooth_temperature
from varlab.training.optimizers import is_decayed

CASES = [("1", 0), ("1", 1), ("1", 2), ("2", 0), ("4", 0)]


DETAILED = [("1", 0), ("1", 1), ("4", 0)]


@cache
def tokenizer_of(case: str) -> MSVQVAE:
    record = rule.golden(f"reference_{case}")
    config = record["tokenizer_config"]
    state = rule.state(record["salt"], record["tokenizer_keys"], config["v_patch_nums"])
    return tokenizer_from_released(state, config["v_patch_nums"], using_znorm=config["using_znorm"]).eval()


@cache
def var_of(case: str, i: int) -> VAR:
    record = rule.golden(f"reference_{case}")
    patch_nums = record["tokenizer_config"]["v_patch_nums"]
    config = record["vars"][i]["config"]
    return var_from_released(
        rule.state(record["salt"], record["vars"][i]["keys"], patch_nums), patch_nums, config["num_heads"]
    ).eval()


@cache
def images_of(case: str) -> torch.Tensor:
    record = rule.golden(f"reference_{case}")
    return rule.images(record["salt"], record["tokenizer_config"]["side"])


@cache
def token_maps_of(case: str) -> list[torch.Tensor]:
    return [torch.tensor(tokens) for tokens in rule.golden(f"reference_{case}")["token_maps"]]


def labels_of(case: str) -> torch.Tensor:
    return torch.tensor([1, rule.golden(f"reference_{case}")["num_classes"] - 1])


@pytest.mark.parametrize("case", ["1", "2", "4"])
@torch.no_grad()
def test_tokenizer_gives_the_released_figures(case):
    record, tokenizer, images = rule.golden(f"reference_{case}"), tokenizer_of(case), images_of(case)
    rule.assert_stats(images, record["input_images"])
    f = tokenizer.features(images)
    rule.assert_stats(f, record["f"])
    token_maps = tokenizer.encode(images)
    assert [tokens.tolist() for tokens in token_maps] == record["token_maps"]
    for f_hat, stats in zip(tokenizer.quantizer.partial_sums(token_maps), record["f_hat_by_scale"], strict=True):
        rule.assert_stats(f_hat, stats)
    rule.assert_stats(tokenizer.decode(token_maps), record["reconstruction"])
    output = tokenizer(images)
    rule.assert_stats(output.images, record["input_to_decoder_unclamped"])
    assert output.vq_loss.item() == pytest.approx(record["vq_loss_mean_over_scales"], rel=1e-4)
    rule.assert_stats(tokenizer.quantizer.teacher_forcing_inputs(token_maps), record["teacher_forcing_input"])
    assert tokenizer.quantizer.phi_index == record["phi_index_by_scale"]


@pytest.mark.parametrize("case", ["1", "4"])
def test_tokenizer_details(case):
    record, details, tokenizer, images = (
        rule.golden(f"reference_{case}"),
        rule.golden(f"details_{case}"),
        tokenizer_of(case),
        images_of(case),
    )
    with torch.no_grad():
        rule.assert_stats(tokenizer.encoder(images), details["encoder_output"])
        for picture, stats in zip(
            tokenizer.filmstrip(token_maps_of(case)), details["reconstruction_by_scale"], strict=True
        ):
            rule.assert_stats(picture, stats)
        f = tokenizer.features(images)
        errors = [F.mse_loss(f_hat, f).item() for f_hat in tokenizer.quantizer.partial_sums(token_maps_of(case))]
        assert errors == pytest.approx(details["mse_f_hat_to_f_by_scale"], rel=1e-4)
    assert sum(p.numel() for p in tokenizer.parameters()) == details["parameters"]

    tokenizer.zero_grad()
    output = tokenizer(images)
    reconstruction = F.mse_loss(output.images, images)
    (reconstruction + output.vq_loss).backward()
    training = details["training_forward"]
    assert reconstruction.item() == pytest.approx(training["reconstruction_mse"], rel=1e-4)
    assert output.vq_loss.item() == pytest.approx(training["vq_loss"], rel=1e-4)
    norms = {
        released_key(name, tokenizer): p.grad.norm().item()
        for name, p in tokenizer.named_parameters()
        if p.grad is not None
    }
    for key, norm in training["grad_norms_of_sum"].items():
        assert norms[key] == pytest.approx(norm, rel=1e-3), key
    f = f.detach().requires_grad_()
    (grad,) = torch.autograd.grad(tokenizer.quantizer(f).vq_loss, f)
    rule.assert_stats(grad, training["grad_of_vq_loss_to_f"], rel=1e-3)
    assert [tokens.tolist() for tokens in output.token_maps] == record["token_maps"]


@pytest.mark.parametrize(("case", "i"), CASES)
def test_var_gives_the_released_figures(case, i):
    record, var, tokenizer = rule.golden(f"reference_{case}")["vars"][i], var_of(case, i), tokenizer_of(case)
    token_maps = token_maps_of(case)
    inputs, sequence = tokenizer.quantizer.teacher_forcing_inputs(token_maps).detach(), torch.cat(token_maps, dim=1)
    var.zero_grad()
    logits = var(inputs, labels_of(case))
    rule.assert_stats(logits.detach(), record["logits"])
    with torch.no_grad():
        rule.assert_stats(var(inputs, torch.full((2,), var.null_label)), record["logits_null_label"])
    scores = losses.token_scores(logits, sequence, var.patch_nums)
    assert scores.loss.mean(dim=0).tolist() == pytest.approx(record["cross_entropy_by_scale"], rel=1e-4)
    assert losses.over_tokens(scores.error, var.patch_nums).mean().item() == pytest.approx(
        100 * record["error_mean"], rel=1e-5
    )
    loss = losses.cross_entropy(logits, sequence).mean()
    assert loss.item() == pytest.approx(record["cross_entropy_mean"], rel=1e-4)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in var.parameters() if p.grad is not None]).norm().item()
    assert norm == pytest.approx(record["grad_norm_of_mean_cross_entropy"], rel=1e-3)


@pytest.mark.parametrize(("case", "i"), CASES)
@pytest.mark.parametrize("cfg", ["0", "1.5", "4"])
def test_greedy_samples_are_the_released_ones(case, i, cfg):
    record = rule.golden(f"reference_{case}")["vars"][i][f"greedy_cfg_{cfg}"]
    images, token_maps = generate(
        var_of(case, i), tokenizer_of(case), labels_of(case), cfg_scale=float(cfg), top_k=1, return_tokens=True
    )
    assert [tokens.tolist() for tokens in token_maps] == record["token_maps"]
    rule.assert_stats(images, record["image_0_1"])


@pytest.mark.parametrize(("case", "i"), DETAILED)
def test_var_details(case, i):
    details, var, tokenizer = rule.golden(f"details_{case}")["vars"][i], var_of(case, i), tokenizer_of(case)
    token_maps, labels = token_maps_of(case), labels_of(case)
    inputs, sequence = tokenizer.quantizer.teacher_forcing_inputs(token_maps).detach(), torch.cat(token_maps, dim=1)
    var.zero_grad()
    class_vector = var.embedder(labels)
    x = var.embed(inputs, class_vector, 0, len(var.step_bounds) - 1)
    rule.assert_stats(x.detach(), details["embedded_input"])
    cond = class_vector if var.shared_modulation is None else var.shared_modulation(class_vector)
    for block, stats in zip(var.blocks, details["after_each_block"], strict=True):
        x = block(x, cond, var.mask)
        rule.assert_stats(x.detach(), stats)
    logits = var.predict(x, class_vector)
    losses.cross_entropy(logits, sequence).mean().backward()
    norms = {released_key(name, var): p.grad.norm().item() for name, p in var.named_parameters() if p.grad is not None}
    assert norms == pytest.approx(details["grad_norms_of_mean_cross_entropy"], rel=1e-3, abs=1e-6)
    smoothed = losses.cross_entropy(logits, sequence, label_smoothing=0.1).mean().item()
    assert smoothed == pytest.approx(details["cross_entropy_label_smoothing_0.1"], rel=1e-4)
    scores = losses.token_scores(logits, sequence, var.patch_nums)
    assert scores.loss[:, -1].mean().item() == pytest.approx(details["tail_cross_entropy"], rel=1e-4)
    assert 100 - scores.error[:, -1].mean().item() == pytest.approx(details["tail_accuracy_percent"], abs=1e-3)
    assert 100 - losses.over_tokens(scores.error, var.patch_nums).mean().item() == pytest.approx(
        details["mean_accuracy_percent"], abs=1e-3
    )
    decayed = {released_key(name, var) for name, p in var.named_parameters() if is_decayed(name, p)}
    assert decayed == set(details["decayed_parameters"])


class RecordedNoise(Randomness):
    """The noise of the golden smooth samples."""

    def __init__(self, case: str, lengths: list[int]) -> None:
        super().__init__([0, 1], lengths)
        self.salt = rule.golden(f"reference_{case}")["salt"]

    def gumbel(self, k: int, codebook_size: int) -> torch.Tensor:
        shape = (2, self.uniform_by_scale[k].shape[1], codebook_size)
        return (-(-(1 - rule.uniform(self.salt, f"input.gumbel.{k}", shape)).log()).log()).float()


@pytest.mark.parametrize(("case", "i"), DETAILED)
def test_smooth_sampling_and_editing(case, i):
    details, var, tokenizer, labels = (
        rule.golden(f"details_{case}")["vars"][i],
        var_of(case, i),
        tokenizer_of(case),
        labels_of(case),
    )
    noise = RecordedNoise(case, scales.lengths(var.patch_nums))
    settings = SamplingSettings(cfg_scale=4.0, top_k=20, top_p=0.9, smooth=True)
    f_hat, _ = generate_tokens(var, tokenizer, labels, settings, randomness=noise)
    rule.assert_stats(decode(tokenizer, f_hat), details["smooth_cfg_4_top_k_20_top_p_0.9"], rel=1e-3)
    inside, nothing = box_mask((0.1, 0.1, 0.8, 0.8), tokenizer.quantizer.sides[-1]), torch.full((2,), var.null_label)
    for keep, whose, key in [
        (1 - inside, nothing, "inpaint_null_label"),
        (inside, nothing, "outpaint_null_label"),
        (1 - inside, labels, "inpaint_labels"),
    ]:
        edited = edit(var, tokenizer, images_of(case), keep, whose, cfg_scale=3.0, top_k=1)
        rule.assert_stats(edited, details[f"greedy_{key}_cfg_3_box_0.1_0.8"])


@pytest.mark.parametrize(("case", "i"), CASES)
def test_export_gives_back_the_released_state_to_the_letter(case, i):
    record = rule.golden(f"reference_{case}")
    patch_nums = record["tokenizer_config"]["v_patch_nums"]
    for network, shapes in [
        (tokenizer_of(case), record["tokenizer_keys"]),
        (var_of(case, i), record["vars"][i]["keys"]),
    ]:
        state, expected = to_released(network), rule.state(record["salt"], shapes, patch_nums)
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert state[key].dtype == value.dtype, key
            assert torch.equal(state[key], value), key


def test_tables():
    tables = rule.golden("tables")
    for key, expected in tables["phi_index"].items():
        num_phis, num_scales = (int(part.split("=")[1]) for part in key.split(","))
        assert phi_of_scale(num_phis, num_scales) == expected, key
    mask = [[str(int(seen)) for seen in row] for row in block_causal_mask([1, 2, 3]).tolist()]
    assert ["".join(row) for row in mask] == tables["attention_allowed_patch_nums_1_2_3"]
    assert scales.scale_of_token([1, 2, 3]) == tables["scale_of_each_token_patch_nums_1_2_3"]
    for depth, rates in tables["drop_path_by_block"].items():
        with torch.device("meta"):
            var = VAR(int(depth), [1, 2], 8, 4, 2)
        assert [block.drop_path.rate for block in var.blocks] == pytest.approx(rates, rel=1e-5)
    assert [1.5 * scales.progress(k, 10) for k in range(10)] == pytest.approx(
        tables["guidance_factor_by_scale_cfg_1.5_10_scales"]
    )
    assert [smooth_temperature(k, 10) for k in range(10)] == pytest.approx(
        tables["smooth_temperature_by_scale_10_scales"]
    )


@pytest.mark.parametrize("name", ["inpaint_256", "inpaint_512", "outpaint_256", "outpaint_512"])
def test_keep_masks_of_the_released_editing_box(name):
    patch_nums = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16] if name.endswith("256") else [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]
    inside = box_mask((0.1, 0.1, 0.8, 0.8), (patch_nums[-1], patch_nums[-1]))
    masks = keep_masks(inside if name.startswith("out") else 1 - inside, patch_nums)
    for pn, mask, rows in zip(patch_nums, masks, rule.golden("tables")["keep_masks_box_0.1_0.8"][name], strict=False):
        assert ["".join(str(int(keep)) for keep in row) for row in mask.view(pn, pn).tolist()] == rows


def survivors(logits: torch.Tensor, key: str) -> list[int]:
    top_k, top_p = (part.split("=")[1] for part in key.split(" ")[-1].split(","))
    return (filter_logits(logits, int(top_k), float(top_p)) > -torch.inf).nonzero().flatten().tolist()


def test_filters():
    for case in ["1", "2", "4"]:
        record = rule.golden(f"reference_{case}")
        logits = (6 * rule.uniform(record["salt"], "input.logits", (20,)) - 3).float()
        for key, kept in record["filters"]["kept"].items():
            assert survivors(logits, key) == kept, key
    for key, kept in rule.golden("tables")["filters_edge_cases_kept"].items():
        values = [float(value) for value in key[key.index("[") + 1 : key.index("]")].split(",")]
        assert survivors(torch.tensor(values), key) == kept, key


def test_parameter_counts_of_every_depth():
    record = rule.golden("parameter_counts")
    for depth, counts in record["var_by_depth"].items():
        is_d36 = depth == "36"
        patch_nums = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32] if is_d36 else [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
        with torch.device("meta"):
            var = VAR(int(depth), patch_nums, 4096, 32, 1000, shared_adaln=is_d36)
        total, blocks = (sum(p.numel() for p in part.parameters()) for part in (var, var.blocks))
        assert total == counts["total"]
        ours = parameter_counts(var.sizes)
        assert ours["params_total"] == total
        shared = sum(p.numel() for p in var.shared_modulation.parameters()) if is_d36 else 0
        assert ours["params_main"] == blocks + shared
        assert counts["blocks"] in (blocks, blocks + shared)
    with torch.device("meta"):
        tokenizer = MSVQVAE()
    counts = record["tokenizer_ch160_v4096_z32"]
    parts = {
        "total": tokenizer,
        "encoder": tokenizer.encoder,
        "decoder": tokenizer.decoder,
        "quantizer": tokenizer.quantizer,
    }
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == {
        name: counts[name] for name in parts
    }
