"""Parameter groups, and Muon combined with AdamW for the parameters that Muon does not support."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

UNDECAYED = ("position", "position.linear.weight", "start_position", "scale_embedding.weight", "modulation_offset")


def is_decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to biases, other 1-D parameters, positions, scale embedding, AdaLN offsets."""
    return parameter.ndim > 1 and not name.endswith("bias") and not name.endswith(UNDECAYED)


def is_hidden_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix whose input dimension grows with the width: those of the blocks and the head."""
    return parameter.ndim > 1 and name.endswith("weight") and name.startswith(("blocks.", "head", "shared_modulation."))


def parameter_groups(net: nn.Module, lr_multiplier: float = 1.0) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters, with and without weight decay; the schedule reads `is_decayed`. With an
    `lr_multiplier` other than 1, the hidden matrices form separate groups, whose learning rate is multiplied by it."""
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    parts = [(named, 1.0)]
    if lr_multiplier != 1:
        matrices = [(name, p) for name, p in named if is_hidden_matrix(name, p)]
        rest = [(name, p) for name, p in named if not is_hidden_matrix(name, p)]
        parts = [(rest, 1.0), (matrices, lr_multiplier)]
    groups = []
    for chosen, multiplier in parts:
        own = {} if multiplier == 1 else {"lr_multiplier": multiplier}
        decayed = [p for name, p in chosen if is_decayed(name, p)]
        others = [p for name, p in chosen if not is_decayed(name, p)]
        groups.append({"params": decayed, "is_decayed": True, **own})
        groups.append({"params": others, "is_decayed": False, "weight_decay": 0.0, **own})
    return [group for group in groups if group["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for matrices with weight decay, torch.optim.AdamW for everything else, at one learning rate:
    Muon's updates are scaled to the size of AdamW's (`match_rms_adamw`, Liu et al. 2025).

    Takes the groups of `parameter_groups`. Matrices with more than `embedding_size` rows, such as head and class
    embedding, use AdamW.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        embedding_size: int = 1 << 30,
    ) -> None:
        groups = []
        for group in params:
            matrices = [
                p for p in group["params"] if group.get("is_decayed") and p.ndim == 2 and len(p) <= embedding_size
            ]
            chosen = {id(p) for p in matrices}
            others = [p for p in group["params"] if id(p) not in chosen]
            groups += [{**group, "params": matrices, "is_muon": True}] if matrices else []
            groups += [{**group, "params": others, "is_muon": False}] if others else []
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "is_muon": False})
        self.parts = []
        for is_muon in (True, False):
            own = [group for group in self.param_groups if group["is_muon"] == is_muon]
            if not own:
                continue
            plain = [{"params": group["params"]} for group in own]
            if is_muon:
                part = torch.optim.Muon(plain, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            else:
                part = torch.optim.AdamW(plain, lr=lr, betas=(betas[0], betas[1]), eps=eps)
            for group, inner in zip(own, part.param_groups, strict=True):
                group.update({key: value for key, value in inner.items() if key not in group})
            self.parts.append((is_muon, part))
        self.share_state()

    def share_state(self) -> None:
        """Makes both parts use this optimizer's groups and state, so that they are saved and scheduled as one."""
        for is_muon, part in self.parts:
            part.param_groups = [group for group in self.param_groups if group["is_muon"] == is_muon]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.share_state()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for _, part in self.parts:
            part.step()
        return loss
