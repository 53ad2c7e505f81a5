"""What the transformer may see, how it starts, what it drops."""

import math

import pytest
import torch
from support.networks import PATCH_NUMS, make_tokenizer, make_var

from varlab.checkpoints.programs import StepProgram, step_example
from varlab.models import scales
from varlab.models.conditioning import TextEmbedder
from varlab.models.var import VAR, block_causal_mask, size_defaults

FORMS = [{}, {"shared_adaln": True}, {"qk_norm": False}, {"shared_adaln": True, "qk_norm": False}]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_finer_input_does_not_reach_a_coarser_logit(form, labels):
    var = make_var(**form).eval()
    inputs = torch.randn(2, 29, 6)
    before = var(inputs, labels)
    for k, (first, last) in enumerate(scales.scale_bounds(PATCH_NUMS)[1:], start=1):
        changed = inputs.clone()
        changed[:, first - 1 : last - 1] += 1
        after = var(changed, labels)
        assert torch.equal(before[:, :first], after[:, :first]), k
        assert not torch.allclose(before[:, first:], after[:, first:]), k


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_cached_logits_equal_the_masked_ones(form, token_maps, labels, tokenizer):
    var = make_var(**form).eval()
    inputs = tokenizer.quantizer.teacher_forcing_inputs(token_maps)
    expected = var(inputs, labels)
    cache = var.start_cache(labels)
    for k, (first, last) in enumerate(var.step_bounds):
        logits = var.predict_scale(k, inputs[:, first - 1 : last - 1] if k else None, cache)
        torch.testing.assert_close(logits, expected[:, first:last], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_shorter_sequence_gives_the_logits_of_its_scales(var, labels):
    inputs = torch.randn(2, 29, 6)
    torch.testing.assert_close(var(inputs[:, :13], labels), var(inputs, labels)[:, :14])
    with pytest.raises(ValueError, match="does not end at a scale boundary"):
        var(inputs[:, :12], labels)


def test_initial_weights_have_the_deviations_of_the_table():
    var = VAR(4, [1, 2, 3], 512, 16, 100, init_adaln_gamma=1e-3)
    std, width = math.sqrt(1 / (3 * 256)), 256
    block = var.blocks[1]
    expected = {
        "class table": (var.embedder.embedding.weight, std),
        "position": (var.position, std),
        "word_embed": (var.word_embed.weight, std),
        "head": (var.head.weight, 0.02 * std),
        "head modulation": (var.head_modulation.linear.weight, 0.5 * std),
        "qkv": (block.attention.qkv.weight, std),
        "proj": (block.attention.proj.weight, std / math.sqrt(8)),
        "fc1": (block.feed_forward.up.weight, std),
        "fc2": (block.feed_forward.down.weight, std / math.sqrt(8)),
        "gamma rows": (block.modulation.linear.weight[: 2 * width], 1e-3 * std),
        "other rows": (block.modulation.linear.weight[2 * width :], 0.5 * std),
    }
    for name, (weight, deviation) in expected.items():
        assert weight.std().item() == pytest.approx(deviation, rel=0.06), name
    assert block.attention.log_scale.tolist() == [pytest.approx(math.log(4))] * 4
    assert all(not p.any() for name, p in var.named_parameters() if name.endswith("bias"))
    shared = VAR(4, [1, 2, 3], 512, 16, 100, shared_adaln=True, init_adaln_gamma=1e-3)
    assert shared.shared_modulation.linear.weight.std().item() == pytest.approx(std, rel=0.05)
    offsets = torch.stack([b.modulation_offset for b in shared.blocks])
    assert offsets[:, :2].std().item() == pytest.approx(1e-3 / 16, rel=0.1)
    assert offsets[:, 2:].std().item() == pytest.approx(0.5 / 16, rel=0.1)


def test_the_residual_stream_is_fp32_under_autocast(var, labels):
    seen = []
    var.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        var(torch.randn(2, 29, 6), labels)
    assert seen == [torch.float32]


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="num_heads=3"):
        make_var(num_heads=3)
    with pytest.raises(ValueError, match="depth=0"):
        make_var(depth=0)


def test_one_batch_can_be_learnt_by_heart(labels, token_maps):
    tokenizer = make_tokenizer()
    var, sequence = make_var(label_dropout=0.0, drop_path=0.0), torch.cat(token_maps, dim=1)
    inputs = tokenizer.quantizer.teacher_forcing_inputs(token_maps).detach()
    optimizer = torch.optim.AdamW(var.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(var(inputs, labels).flatten(0, 1), sequence.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_logits_are_fp32_whatever_the_type_of_weights_and_products(var):
    inputs, labels = torch.randn(2, 29, 6), torch.tensor([0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = var(inputs, labels)
        true = var.to(torch.bfloat16)(inputs, labels)
    assert mixed.dtype == true.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", FORMS)
def test_flex_attention_gives_the_same_logits(form, labels):
    var = make_var(**form).eval().requires_grad_(False)
    inputs = torch.randn(2, 29, 6)
    var.attention = "masked"
    expected = var(inputs, labels), var(inputs[:, :13], labels)
    var.attention = "flex"
    found = var(inputs, labels), var(inputs[:, :13], labels)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_attentions_have_the_same_gradients_on_a_gpu(labels):
    var, inputs, found = make_var().eval().cuda(), torch.randn(2, 29, 6).cuda(), []
    for attention in ("masked", "split", "flex"):
        var.attention = attention
        var.zero_grad()
        var(inputs, labels.cuda()).square().mean().backward()
        found.append([p.grad.clone() for p in var.parameters() if p.grad is not None])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_initial_gates_by_depth_are_those_of_the_released_recipes():
    gates = {depth: size_defaults(depth).init_adaln_gamma for depth in (2, 16, 23, 24, 29, 30, 35, 36, 40)}
    assert gates == {2: 1e-3, 16: 1e-3, 23: 1e-3, 24: 1e-4, 29: 1e-4, 30: 1e-5, 35: 1e-5, 36: 5e-6, 40: 5e-6}
    found = size_defaults(24)
    assert (found.width, found.num_heads, found.drop_path, found.shared_adaln) == (1536, 24, pytest.approx(0.1), False)
    assert size_defaults(36).shared_adaln and not size_defaults(35).shared_adaln


def test_the_cache_has_room_for_all_scales(var):
    entries = var.start_cache(torch.tensor([0, 2, 3]), torch.bfloat16).blocks
    assert len(entries) == 2
    assert all(tensor.shape == (3, 2, 1 + 4 + 9 + 16, 16) for entry in entries for tensor in (entry.keys, entry.values))
    assert entries[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("order", ["scales", "raster"])
def test_a_prefix_is_seen_by_all_tokens_and_cached_as_it_is_masked(order):
    def embedder(**sizes):
        return TextEmbedder(dim=10, encoder="minilm", fingerprint="0", tokens=3, **sizes)

    var, condition = make_var(embedder=embedder, order=order, patch_nums=[1, 2, 8]).eval(), torch.randn(2, 4, 10)
    inputs = torch.randn(2, 68, var.codebook_dim)
    with torch.no_grad():
        logits = var(inputs, condition)
        for attention in ("masked", "flex", "split"):
            var.attention = attention
            torch.testing.assert_close(var(inputs, condition), logits)
        changed = condition.clone()
        changed[:, -1] += 1
        assert ((var(inputs, changed) - logits).abs().amax(dim=(0, 2)) > 1e-4).all()
        cache, found = var.start_cache(condition), []
        for k, (first, last) in enumerate(var.step_bounds):
            found.append(var.predict_scale(k, None if k == 0 else inputs[:, first - 1 : last - 1], cache))
        torch.testing.assert_close(torch.cat(found, dim=1), logits)
        cached = var.start_cache(condition)
        last = len(var.step_bounds) - 1
        for k, (first, end) in enumerate(var.step_bounds[:-1]):
            var.predict_scale(k, None if k == 0 else inputs[:, first - 1 : end - 1], cached)
        keys, values = (
            torch.stack([getattr(block, name)[:, :, : block.length] for block in cached.blocks])
            for name in ("keys", "values")
        )
        assert keys.shape == step_example(var, last)[2].shape
        step = StepProgram(var, last)(inputs[:, var.step_bounds[last][0] - 1 :], condition, keys, values)[0]
        torch.testing.assert_close(step, logits[:, var.step_bounds[last][0] :])
        short = var(inputs[:, :4], condition)
        torch.testing.assert_close(short, logits[:, :5])
    assert torch.equal(block_causal_mask([1, 2], num_prefix=2)[:2], torch.tensor([[True] * 2 + [False] * 5] * 2))
    assert torch.equal(block_causal_mask([1, 2], num_prefix=2)[2:, 2:], block_causal_mask([1, 2]))
    var.embedder.train()
    var.embedder.dropout = 1.0
    assert not var.embedder.drop(condition).any()
