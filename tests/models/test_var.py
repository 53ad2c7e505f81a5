"""What the transformer may see, how it starts, what it drops."""

import math
from functools import partial

import pytest
import torch
from support.networks import PATCH_NUMS, make_tokenizer, make_var

import varlab.models.var as models_var
from varlab.cost.flops import training_flops
from varlab.models import losses, scales
from varlab.models.transformer import DropPath, Split
from varlab.models.var import VAR

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
    cache = var.start_cache(2)
    for k, (first, last) in enumerate(var.step_bounds):
        logits = var.predict_scale(k, inputs[:, first - 1 : last - 1] if k else None, labels, cache)
        torch.testing.assert_close(logits, expected[:, first:last], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_shorter_sequence_gives_the_logits_of_its_scales(var, labels):
    inputs = torch.randn(2, 29, 6)
    torch.testing.assert_close(var(inputs[:, :13], labels), var(inputs, labels)[:, :14])
    with pytest.raises(ValueError, match="does not end at a scale boundary"):
        var(inputs[:, :12], labels)


def test_block_zero_never_drops_and_kept_branches_are_scaled():
    torch.manual_seed(1)
    drop, x = DropPath(0.25).train(), torch.ones(4000, 2, 3)
    y = drop(x)
    assert sorted(set(y.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert (y.flatten(1).std(dim=1) == 0).all()  # the whole sample at once
    assert torch.equal(DropPath(0.25).eval()(x), x)


def test_labels_are_dropped_in_training_only():
    var, labels = make_var(label_dropout=0.25), torch.zeros(4000, dtype=torch.long)
    dropped = var.train().embedder.drop(labels)
    assert set(dropped.tolist()) == {0, var.null_label}
    assert (dropped == var.null_label).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(var.eval().embedder.drop(labels), labels)


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


@pytest.mark.parametrize("depth", [2, 3, 6, 16])
@pytest.mark.parametrize("shared", [False, True])
def test_counted_flops_are_those_of_the_written_formula(depth, shared):
    with torch.device("meta"):
        sizes = VAR(depth, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], 4096, 32, 1000, shared_adaln=shared).sizes
    w, d, length, seen, pairs = 64 * depth, depth, 680, 0, 0
    for pn in sizes["patch_nums"]:
        seen += pn * pn
        pairs += pn * pn * seen
    adaln = 12 * w * w * (1 if shared else d)
    expected = 3 * (length * (24 * w * w * d + 2 * w * 4096) + 679 * 2 * 32 * w + adaln + 4 * w * w + 4 * w * d * pairs)
    assert training_flops(sizes) == expected


@torch.no_grad()
def test_counted_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        var, tokens = VAR(3, PATCH_NUMS, 64, 8, 5).eval(), 30
        with FlopCounterMode(display=False) as counter:
            var(torch.empty(1, 29, 8), torch.zeros(1, dtype=torch.long))
    causal = sum(pn**2 * sum(q**2 for q in PATCH_NUMS[: k + 1]) for k, pn in enumerate(PATCH_NUMS))
    counted = counter.get_total_flops()
    dense_attention = 4 * var.width * 3 * tokens**2
    without_attention = training_flops(var.sizes) // 3 - 4 * var.width * 3 * causal
    assert counted in (
        without_attention,
        without_attention + dense_attention,
    )  # torch leaves attention out on some devices


def test_published_ratios_to_6nd():
    for depth, ratio in [(2, 1.93), (4, 1.07), (8, 0.82), (16, 0.73), (30, 0.70)]:
        with torch.device("meta"):
            sizes = VAR(depth, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], 4096, 32, 1000).sizes
        paper_n = 18 * depth * (64 * depth) ** 2
        assert training_flops(sizes) / (6 * paper_n * 680) == pytest.approx(ratio, abs=0.006)


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


@pytest.mark.parametrize("num_chunks", [1, 4, 7])
def test_loss_in_chunks_has_the_same_gradients_and_keeps_fewer_logits(num_chunks, labels):
    """7 does not divide 30 tokens. What is kept for the backward pass is counted."""
    var, inputs, sequence = make_var().eval(), torch.randn(2, 29, 6), torch.randint(12, (2, 30))
    expected = losses.cross_entropy(var(inputs, labels), sequence)
    expected.mean().backward()
    gradients = {name: p.grad.clone() for name, p in var.named_parameters() if p.grad is not None}
    var.zero_grad()
    seen, kept = [], []

    def loss_fn(logits, token_slice):
        seen.append(logits.shape[1])
        return losses.cross_entropy(logits, sequence[:, token_slice])

    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x, vector = var(inputs, labels, returns_hidden=True)
        found = losses.in_chunks(partial(var.predict, vector=vector), x, loss_fn, num_chunks)
    assert len(seen) == num_chunks and sum(seen) == 30 and max(seen) - min(seen) <= 1
    assert any(x.shape[-1] == 12 for x in kept) == (num_chunks == 1)
    torch.testing.assert_close(found, expected)
    found.mean().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(var.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_split_attention_gives_the_same_logits_and_gradients(form, labels, monkeypatch):
    """Scales of four tokens and more in calls of their own; a sequence cut short as well."""
    monkeypatch.setattr(models_var, "SPLIT_FROM", 4)
    var = make_var(**form).eval()
    inputs = torch.randn(2, 29, 6)
    found = {}
    for attention in ("masked", "split"):
        var.attention = attention
        var.zero_grad()
        logits = var(inputs, labels)
        logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in var.named_parameters() if p.grad is not None}
        found[attention] = (logits, var(inputs[:, :13], labels), gradients)
    assert isinstance(var.visible(30), Split) and var.visible(30).bounds == ((1, 5), (5, 14), (14, 30))
    for a, b in zip(found["masked"][:2], found["split"][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name, gradient in found["masked"][2].items():
        torch.testing.assert_close(gradient, found["split"][2][name], rtol=1e-4, atol=1e-7, msg=name)
    monkeypatch.undo()
    assert isinstance(var.visible(30), torch.Tensor)  # scales as small as these are not worth a call
