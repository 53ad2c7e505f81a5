"""Training of a VAR, from images (tokenized on the fly) or from a token cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from varlab.checkpoints.export_folder import tokenizer_fingerprint
from varlab.checkpoints.load import check_same_networks, load_tokenizer, networks_entry
from varlab.cost.flops import parameter_counts, six_nd, tokenizer_flops, training_flops
from varlab.data.images import ImageBatch
from varlab.data.token_cache import TokenBatch, TokenDataModule
from varlab.models import losses, scales
from varlab.models.transformer import ATTENTIONS, RECOMPUTES, AdaLNBlock
from varlab.models.var import VAR
from varlab.training.image_mean import ImageMean
from varlab.training.schedules import Progressive, Schedule, parameter_groups


class VARModule(LightningModule):
    """Next-scale cross entropy over all L tokens, each token weight 1/L (VAR, section 3; recipe of the released code).

    `net`: a VAR that still lacks what tokenizer and data decide. `tokenizer`: path of a tokenizer checkpoint, used frozen
    in fp32. The peak learning rate is base_lr * global batch / 256, and with `lr_reference_depth` times that depth over
    the network's own: for sweeps, where width and depth grow together. Weight decay moves to `weight_decay_end` if given.
    With `mup_lr_scaling` that factor acts on the matrices alone whose input grows with the width, not on embeddings, positions,
    biases (the rule of muP for Adam; initial weights stay the paper's).
    With `warmup_tokens` the warm-up lasts so many tokens for each parameter of the blocks, but at most 5 % of `full_steps`, the length
    of the whole run that this one may be a branch of (Porian et al. 2024).
    `recompute`: see `AdaLNBlock`. `attention`: see `VAR`. `loss_chunks`: logits and loss come in so many parts, of which only one is
    in memory at a time, for one more matrix product of the head. `is_compiled`: torch.compile for each block. `progressive`: scale by
    scale.
    """

    net: VAR

    def __init__(
        self,
        net: Callable[..., VAR],
        tokenizer: str,
        schedule: Schedule,
        base_lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        weight_decay_end: float | None = None,
        label_smoothing: float = 0.0,
        lr_reference_depth: int | None = None,
        recompute: str = "none",
        is_compiled: bool = False,
        progressive: Progressive | None = None,
        attention: str = "split",
        loss_chunks: int = 1,
        mup_lr_scaling: bool = False,
        warmup_tokens: float | None = None,
        full_steps: int = -1,
    ) -> None:
        super().__init__()
        if recompute not in RECOMPUTES:
            raise ValueError(f"module.recompute={recompute!r}: choose one of {', '.join(RECOMPUTES)}")
        if attention not in ATTENTIONS:
            raise ValueError(f"module.attention={attention!r}: choose one of {', '.join(ATTENTIONS)}")
        if loss_chunks < 1:
            raise ValueError(f"module.loss_chunks={loss_chunks}: give 1 or more")
        self.attention, self.loss_chunks = attention, loss_chunks
        self.make_net, self.recompute, self.is_compiled = net, recompute, is_compiled
        self.tokenizer_path = tokenizer
        self.tokenizer = load_tokenizer(tokenizer).requires_grad_(False)
        self.tokenizer_fingerprint = tokenizer_fingerprint(self.tokenizer)
        self.progressive = progressive
        self.schedule = schedule if progressive is None else progressive.schedule(schedule)
        self.mup_lr_scaling = mup_lr_scaling
        self.warmup_tokens, self.full_steps = warmup_tokens, full_steps
        self.base_lr, self.betas = base_lr, (betas[0], betas[1])
        self.weight_decay = (weight_decay, weight_decay if weight_decay_end is None else weight_decay_end)
        self.label_smoothing, self.lr_reference_depth = label_smoothing, lr_reference_depth
        self.trained_scales = num_scales = len(self.tokenizer.patch_nums)
        self.val_scores, self.val_scores_raw = ImageMean(2 * num_scales + 1), ImageMean(2 * num_scales + 1)

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        sizes = self.tokenizer.sizes
        self.class_names = data.class_names
        torch.manual_seed(torch.initial_seed())  # the same first weights whatever drew random numbers before
        self.net = self.make_net(
            patch_nums=self.tokenizer.patch_nums,
            codebook_size=sizes["codebook_size"],
            codebook_dim=sizes["codebook_dim"],
            num_classes=data.num_classes,
        )
        self.net.attention = self.attention
        self.schedule = self.warmed_up_by_size(data.global_batch_size)
        if self.progressive is not None and self.net.order == "raster":
            raise ValueError("module.progressive trains scale by scale: a network with order=raster has no such steps")
        if self.trainer.precision == "bf16-true":
            self.net.to(torch.bfloat16)
        for block in self.net.blocks:
            assert isinstance(block, AdaLNBlock)
            block.recompute = self.recompute
            if self.is_compiled:
                block.forward = torch.compile(block.forward)
        if self.device_mesh is not None:
            self.shard()

    def warmed_up_by_size(self, batch: int) -> Schedule:
        """The schedule with the warm-up that `warmup_tokens` asks for."""
        if self.warmup_tokens is None:
            return self.schedule
        if self.full_steps < 0:
            raise ValueError("module.warmup_tokens needs the length of the run in steps=N, not in epochs")
        parameters = parameter_counts(self.net.sizes)["params_main"]
        steps = self.warmup_tokens * parameters / (scales.num_tokens(self.net.patch_nums) * batch)
        return replace(self.schedule, warmup=float(max(1, round(min(steps, 0.05 * self.full_steps)))))

    def shard(self) -> None:
        """FSDP2, or HSDP on a mesh of two dimensions. Blocks are gathered in bf16 where they compute in bf16 anyway."""
        assert self.device_mesh is not None
        is_hybrid = self.device_mesh.ndim == 2 and "replicate" in (self.device_mesh.mesh_dim_names or ())
        mesh = self.device_mesh if is_hybrid else self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy()
        if self.trainer.precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.net, mesh=mesh)
        register_fsdp_forward_method(self.net, "predict_scale")  # sampling for pictures

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(data, TokenDataModule):
            if data.manifest["patch_nums"] != self.tokenizer.patch_nums:
                raise ValueError(
                    f"{data.path} holds tokens of patch_nums {data.manifest['patch_nums']}, the tokenizer has {self.tokenizer.patch_nums}"
                )
            if data.manifest["tokenizer"] != self.tokenizer_fingerprint:
                raise ValueError(
                    f"{data.path} was made by tokenizer {data.manifest['tokenizer']}, this one is {self.tokenizer_fingerprint}:"
                    " run `varlab tokenize` with it into another folder"
                )
        elif (data.resolution, data.resolution) != self.tokenizer.image_size:
            raise ValueError(
                f"data.resolution={data.resolution}, but the tokenizer codes images of {self.tokenizer.image_size} pixels"
            )

    @property
    def depth_share(self) -> float:
        """What `lr_reference_depth` makes of the learning rate."""
        return 1.0 if self.lr_reference_depth is None else self.lr_reference_depth / self.net.depth

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        by_depth = 1.0 if self.mup_lr_scaling else self.depth_share
        return by_depth * self.base_lr * self.trainer.datamodule.global_batch_size / 256  # pyright: ignore[reportAttributeAccessIssue]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        is_fused = self.device.type == "cuda"
        return torch.optim.AdamW(
            parameter_groups(self.net, self.depth_share if self.mup_lr_scaling else 1.0),
            lr=self.peak_lr,
            betas=self.betas,
            eps=1e-8,
            fused=is_fused,
        )

    @torch.no_grad()
    def tokens(self, batch: ImageBatch | TokenBatch) -> tuple[Tensor, list[Tensor]]:
        """The batch's sequence (B L) and token maps."""
        if isinstance(batch, ImageBatch):
            with torch.autocast(self.device.type, enabled=False):
                token_maps = self.tokenizer.encode(batch.images.float())
            return torch.cat(token_maps, dim=1), token_maps
        return batch.sequence, list(batch.sequence.split(scales.lengths(self.tokenizer.patch_nums), dim=1))

    @torch.no_grad()
    def inputs(self, token_maps: list[Tensor]) -> Tensor:
        """What the network sees of the true coarser scales."""
        return self.tokenizer.quantizer.teacher_forcing_inputs(token_maps, self.net.order)

    def logits(self, token_maps: list[Tensor], labels: Tensor) -> Tensor:
        """Logits of all tokens from the true coarser ones."""
        return self.net(self.inputs(token_maps), labels)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        total = int(self.trainer.estimated_stepping_batches)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.lr = self.schedule.apply(optimizer, self.global_step, total, self.peak_lr, self.weight_decay)

    def training_step(self, batch: ImageBatch | TokenBatch, batch_idx: int) -> Tensor:
        sequence, token_maps = self.tokens(batch)
        num_scales, newest_weight = self.active_scales()
        self.trained_scales = num_scales
        active = scales.scale_bounds(self.net.patch_nums)[num_scales - 1][1]
        target = sequence[:, :active]
        is_logged = (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # pyright: ignore[reportAttributeAccessIssue]

        def judge(logits: Tensor, place: slice) -> Tensor:
            """Loss to learn from; where it is logged, loss without smoothing and error besides. B l n"""
            loss = losses.cross_entropy(logits, target[:, place], self.label_smoothing)
            if not is_logged:
                return loss[..., None]
            with torch.no_grad():
                scores = losses.cross_entropy(logits, target[:, place]), losses.token_errors(logits, target[:, place])
            return torch.stack([loss, *scores], dim=-1)

        by_token, *scores = self.net(
            self.inputs(token_maps[:num_scales]), batch.labels, judge, self.loss_chunks
        ).unbind(dim=-1)
        if newest_weight != 1:
            newest = scales.lengths(self.net.patch_nums)[num_scales - 1]
            by_token = torch.cat([by_token[:, :-newest], newest_weight * by_token[:, -newest:]], dim=1)
        loss = by_token.sum(dim=1).mean() / sequence.shape[1]  # each token 1/L, however many are active
        if is_logged:
            scores = [losses.by_scale(score, self.net.patch_nums[:num_scales]).mean(dim=0) for score in scores]
            self.log_scores("train", *scores)
            self.log("lr", self.lr)
            if self.progressive is not None:
                self.log("train/num_scales", float(num_scales))
        return loss

    def active_scales(self) -> tuple[int, float]:
        """(number of scales that this step trains, weight of the finest of them): all and 1 but in progressive training."""
        num_scales = len(self.net.patch_nums)
        if self.progressive is None:
            return num_scales, 1.0
        total = int(self.trainer.estimated_stepping_batches)
        return self.progressive.stage(self.global_step, total, self.schedule.warmup_steps(total), num_scales)

    def log_scores(self, split: str, loss: Tensor, error: Tensor) -> None:
        """Loss (nats a token) and error (percent): over all (active) tokens, of the last scale, of each scale."""
        patch_nums = self.net.patch_nums[: len(loss)]
        for name, by_scale in [("loss", loss), ("err", error)]:
            self.log(f"{split}/{name}", losses.over_tokens(by_scale, patch_nums), prog_bar=True)
            self.log(f"{split}/{name}_last", by_scale[-1])
            self.log_dict({f"{split}/{name}_scale_{k:02d}": value for k, value in enumerate(by_scale)})

    def validation_step(self, batch: ImageBatch | TokenBatch, batch_idx: int) -> None:
        self.score(batch, self.val_scores)

    def validation_step_raw(self, batch: ImageBatch | TokenBatch) -> None:
        """The same for the weights as trained, where an average of them is validated (see `EMA`)."""
        self.score(batch, self.val_scores_raw)

    def score(self, batch: ImageBatch | TokenBatch, scores: ImageMean) -> None:
        """Adds loss and error of a batch, by scale, and the square of the loss."""
        sequence, token_maps = self.tokens(batch)
        found = losses.token_scores(self.logits(token_maps, batch.labels), sequence, self.net.patch_nums)
        square = losses.over_tokens(found.loss, self.net.patch_nums).square()
        scores.update(torch.cat([found.loss, found.error, square[:, None]], dim=1), batch.weight)

    def on_validation_epoch_end(self) -> None:
        num = len(self.net.patch_nums)
        for split, scores in [("val", self.val_scores), ("val_raw", self.val_scores_raw)]:
            if not scores.update_called:
                continue
            loss, error, square = scores.compute().tensor_split([num, 2 * num])
            self.log_scores(split, loss, error)
            variance = square[0] - losses.over_tokens(loss, self.net.patch_nums).square()
            num_images = self.trainer.datamodule.num_val  # pyright: ignore[reportAttributeAccessIssue]
            self.log(f"{split}/loss_se", (variance.clamp(min=0) / num_images).sqrt())
            scores.reset()

    def run_facts(self) -> dict[str, Any]:
        """What a row of the table of runs says about the network and its cost for one image."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        from_images, is_wsd = not isinstance(data, TokenDataModule), self.schedule.shape == "wsd"
        total = int(self.trainer.estimated_stepping_batches)
        return {
            "kind": "var",
            "depth": self.net.depth,
            "width": self.net.width,
            "order": self.net.order,
            **parameter_counts(self.net.sizes),
            **self.facts_per_image(len(self.net.patch_nums)),
            "flops_tokenizer_per_image": tokenizer_flops(self.tokenizer.sizes)["encode"] if from_images else 0,
            "tokenizer_id": self.tokenizer_fingerprint,
            "patch_nums": self.net.patch_nums,
            "codes": self.tokenizer.sizes["codebook_size"],
            "lr_peak": self.peak_lr,
            "schedule": self.schedule.shape,
            "warmup": self.schedule.warmup_steps(total) * data.global_batch_size,
            "cooldown": (total - self.schedule.cooldown_start(total)) * data.global_batch_size if is_wsd else 0,
            "weight_decay": self.weight_decay[0],
            "label_smoothing": self.label_smoothing,
            "sizes": self.net.sizes,
            **(data.marginal_entropies(self.net.sizes["codebook_size"]) if not from_images else {}),
        }

    def facts_per_image(self, num_scales: int) -> dict[str, int]:
        """Tokens and FLOPs of one image of which `num_scales` scales are trained."""
        sizes = {**self.net.sizes, "patch_nums": self.net.patch_nums[:num_scales]}
        return {
            "tokens_per_image": scales.num_tokens(sizes["patch_nums"]),
            "flops_exact_per_image": training_flops(sizes),
            "flops_6nd_per_image": six_nd(sizes),
        }

    def step_facts(self) -> dict[str, int]:
        """What of `run_facts` was different in this step."""
        return {} if self.progressive is None else self.facts_per_image(self.trained_scales)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["varlab"] = networks_entry(self.tokenizer, self.net, self.class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_networks(checkpoint, self.tokenizer, self.net)
