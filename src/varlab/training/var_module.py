"""Training of a VAR, from images (tokenized on the fly) or from a token cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from varlab.checkpoints.export_folder import tokenizer_fingerprint
from varlab.checkpoints.load import check_same_networks, load_tokenizer, networks_entry
from varlab.cost.flops import parameter_counts
from varlab.data.images import ImageBatch
from varlab.data.resolutions import height_and_width
from varlab.data.token_datamodule import TokenBatch, TokenDataModule
from varlab.models import losses, scales
from varlab.models.conditioning import embedder_arguments
from varlab.models.custom_classes import describe
from varlab.models.digits import over_digits
from varlab.models.quantizer import ResidualQuantizer
from varlab.models.transformer import AdaLNBlock, AttentionKind, Recompute
from varlab.models.var import VAR, HiddenStates
from varlab.training.image_mean import ImageMean
from varlab.training.initial_weights import Source, encoding_of, freeze, start_from
from varlab.training.optimizers import parameter_groups
from varlab.training.scheduled_module import FUSED_ADAMW, OptimizerFactory, ScheduledModule
from varlab.training.schedules import Progressive, Schedule
from varlab.training.tuning import LoRA, Objective


class VARModule(ScheduledModule):
    """Next-scale cross entropy over all L tokens, each with weight 1/L (VAR, section 3; recipe of the released code).

    `net`: a partial of a VAR that lacks the arguments given by tokenizer and data. `tokenizer`: path of a tokenizer
    checkpoint, used frozen in fp32. `loss`: logits (B l V) and tokens (B l) -> loss of each token (B l); for tokens of
    several digits, that of a digit, of which the sum is taken.

    `lr_reference_depth`: multiplies the peak learning rate by this depth divided by the network's, for sweeps, where
    width and depth grow together. `mup_lr_scaling`: applies that factor only to the matrices whose input dimension
    grows with the width, not to embeddings, positions, biases (muP's rule for Adam; the initialization stays the
    paper's). `weight_decay_end`: weight decay at the end of the run, by default unchanged. `warmup_tokens`: length of
    the warm-up in tokens per parameter of the blocks, at most 5 % of `full_steps`, the length of the whole run, of
    which this one may be a branch (Porian et al. 2024).

    `self_correction`: while training, each image has a share of digits of its tokens, drawn uniformly from 0 to this number,
    replaced at random in what the network sees, and the next scales are encoded anew (see
    `ResidualQuantizer.encode_with_errors`), so that a sample's own errors are corrected by finer scales. Needs images.

    `init_from`: a trained VAR whose weights the run starts from (see `start_from`).
    `reinitialized`: patterns of parameters that are not taken over. `frozen`: patterns of parameters that are not trained.
    `objective` and `adapter`: see training/tuning.py.

    `recompute`: see `AdaLNBlock`. `attention`: see `VAR`. `loss_chunks`: logits and loss are computed in this many
    chunks, with only one in memory at a time, at the cost of one more matrix product of the head. `is_compiled`:
    applies torch.compile to each block, None on a GPU only. `progressive`: trains scale by scale. `trust_code`: see
    `load`, for the tokenizer.
    """

    net: VAR

    def __init__(
        self,
        net: Callable[..., VAR],
        tokenizer: str,
        schedule: Schedule,
        optimizer: OptimizerFactory = FUSED_ADAMW,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        base_lr: float = 1e-4,
        weight_decay: float = 0.05,
        weight_decay_end: float | None = None,
        gradient_clip_val: float = 2.0,
        lr_reference_depth: int | None = None,
        mup_lr_scaling: bool = False,
        warmup_tokens: float | None = None,
        full_steps: int = -1,
        recompute: Recompute = "none",
        attention: AttentionKind = "split",
        loss_chunks: int = 1,
        is_compiled: bool | None = None,
        progressive: Progressive | None = None,
        self_correction: float = 0.0,
        init_from: str | None = None,
        reinitialized: Sequence[str] = (),
        frozen: Sequence[str] = (),
        objective: Objective | None = None,
        adapter: LoRA | None = None,
        trust_code: bool = False,
    ) -> None:
        if loss_chunks < 1:
            raise ValueError(f"module.loss_chunks={loss_chunks}: give 1 or more")
        if not 0 <= self_correction <= 1:
            raise ValueError(f"module.self_correction={self_correction}: give a share of the digits from 0 to 1")
        tokenizer_net = load_tokenizer(tokenizer, trust_code=trust_code).requires_grad_(False)
        super().__init__(
            optimizer,
            schedule if progressive is None else progressive.schedule(schedule),
            base_lr,
            (weight_decay, weight_decay if weight_decay_end is None else weight_decay_end),
            gradient_clip_val,
            num_scores=2 * len(tokenizer_net.patch_nums) + 3,
        )
        self.make_net = net
        self.loss = loss or losses.TokenCrossEntropy()
        self.tokenizer = tokenizer_net
        self.tokenizer_path = tokenizer
        self.tokenizer_fingerprint = tokenizer_fingerprint(self.tokenizer)
        self.lr_reference_depth = lr_reference_depth
        self.mup_lr_scaling = mup_lr_scaling
        self.warmup_tokens = warmup_tokens
        self.full_steps = full_steps
        self.recompute: Recompute = recompute
        self.attention: AttentionKind = attention
        self.loss_chunks = loss_chunks
        self.is_compiled = is_compiled
        self.progressive = progressive
        self.self_correction = self_correction
        self.init_from = init_from
        self.reinitialized = reinitialized
        self.frozen = frozen
        self.objective = objective
        self.adapter = adapter
        self.trust_code = trust_code
        self.trained_patch_nums = self.tokenizer.patch_nums
        self.of_shapes: dict[int, tuple[VAR, ResidualQuantizer]] = {}

    def configure_model(self) -> None:
        if hasattr(self, "net"):
            return
        self.class_names = self.data.class_names
        torch.manual_seed(torch.initial_seed())  # initial weights do not depend on earlier random numbers
        quantizer = self.tokenizer.quantizer
        with torch.device("cpu"):  # the same weights on any device and with any strategy
            self.net = self.make_net(
                patch_nums=quantizer.patch_nums,
                codebook_size=quantizer.codebook_size,
                codebook_dim=quantizer.codebook_dim,
                num_classes=self.data.num_classes,
                **quantizer.head_arguments(),
                **embedder_arguments(self.make_net, self.data.condition_shape, self.data.text),
                **({"pyramids": self.pyramids} if len(self.pyramids) > 1 else {}),
            )
        self.check_net()
        self.initialize()
        self.net.attention = self.attention
        self.schedule = self.warmed_up_by_size(self.data.global_batch_size)
        if self.trainer.precision == "bf16-true":
            self.net.to(torch.bfloat16)
        if self.compiles:  # training and validation are variants of each shape
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, 4 * len(self.pyramids))
        for block in self.net.blocks:
            assert isinstance(block, AdaLNBlock)
            block.recompute = self.recompute
            if self.compiles:
                block.forward = torch.compile(block.forward)
        if self.device_mesh is not None:
            self.shard()

    def initialize(self) -> None:
        """Takes over the weights of `init_from`, adds what tunes them, and freezes parts."""
        if self.init_from is not None:
            source = Source.read(self.init_from, self.net.patch_nums, self.trust_code)
            encoding = encoding_of(self.tokenizer)
            notes = start_from(source, self.net, self.class_names, encoding, self.reinitialized)
            if self.trainer.is_global_zero:
                print("; ".join([f"starts from the weights of {self.init_from}", *notes]), flush=True)
        if self.objective is not None:
            self.objective.prepare(self.net)
        if self.adapter is not None:
            self.adapter.apply(self.net)
        freeze(self.net, self.frozen)

    def check_net(self) -> None:
        """Raises ValueError for a network that a checkpoint could not rebuild or that does not match the data."""
        describe(self.net)
        takes, gets = self.net.embedder.condition_shape, tuple(self.data.condition_shape)
        if takes != gets:
            raise ValueError(
                f"data.condition={self.data.condition} gives conditions of shape {gets},"
                f" but {type(self.net.embedder).__name__} takes {takes}"
            )
        if self.net.codes_by_scale is not None and getattr(self.loss, "label_smoothing", 0):
            raise ValueError(
                "module.loss.label_smoothing spreads over all codes, but scales have tables of their own: set 0"
            )
        if self.objective is not None and (self.progressive is not None or self.loss_chunks > 1):
            raise ValueError(
                "module.objective needs all tokens at once: no module.progressive, and module.loss_chunks=1"
            )
        if (self.objective is not None or self.adapter is not None) and self.device_mesh is not None:
            raise ValueError(
                "module.objective and module.adapter do not support trainer=fsdp and hsdp: use trainer=ddp"
            )
        if len(self.pyramids) > 1:
            self.net.at(self.pyramids[1])  # raises if it cannot
            if self.objective is not None or self.device_mesh is not None:
                raise ValueError(
                    f"{self.data.path} holds images of several shapes, which module.objective, trainer=fsdp and hsdp do not support"
                )
        if self.progressive is not None and self.net.order == "raster":
            raise ValueError("module.progressive trains scale by scale: a network with order=raster has no such steps")

    def warmed_up_by_size(self, batch: int) -> Schedule:
        """The schedule with the warm-up set by `warmup_tokens`."""
        if self.warmup_tokens is None:
            return self.schedule
        if self.full_steps < 0:
            raise ValueError("module.warmup_tokens needs the length of the run as steps=N, not epochs=N")
        parameters = parameter_counts(self.net.sizes)["params_main"]
        steps = self.warmup_tokens * parameters / (scales.num_tokens(self.net.patch_nums) * batch)
        return replace(self.schedule, warmup=float(max(1, round(min(steps, 0.05 * self.full_steps)))))

    def shard(self) -> None:
        """Shards the network by FSDP2, or by HSDP on a two-dimensional mesh. With bf16-mixed, weights are gathered in
        bf16."""
        assert self.device_mesh is not None
        is_hybrid = self.device_mesh.ndim == 2 and "replicate" in (self.device_mesh.mesh_dim_names or ())
        mesh = self.device_mesh if is_hybrid else self.device_mesh["data_parallel"]
        policy = MixedPrecisionPolicy()
        if self.trainer.precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(self.net, mesh=mesh)
        for name in ("start_cache", "predict_scale"):  # sampling for images in the log
            register_fsdp_forward_method(self.net, name)

    def setup(self, stage: str) -> None:
        data = self.data
        if isinstance(data, TokenDataModule):
            if len(data.pyramids[0]) != len(self.tokenizer.patch_nums):
                raise ValueError(
                    f"{data.path} holds tokens of patch_nums {data.pyramids[0]},"
                    f" but the tokenizer has {self.tokenizer.patch_nums}"
                )
            if data.pyramids[0] != self.tokenizer.patch_nums:
                self.tokenizer = self.tokenizer.at(data.pyramids[0])
                self.tokenizer_fingerprint = tokenizer_fingerprint(self.tokenizer)
            for number, (folder, manifest) in enumerate(data.caches.items()):
                own = self.tokenizer_fingerprint
                if number > 0:
                    own = tokenizer_fingerprint(self.tokenizer.at(manifest["patch_nums"]))
                if manifest["tokenizer"] != own:
                    raise ValueError(
                        f"{folder} was made by tokenizer {manifest['tokenizer']}, but this one is {own}:"
                        " run `varlab tokenize` with it into another folder"
                    )
            if self.self_correction:
                raise ValueError(
                    f"module.self_correction={self.self_correction} encodes images anew in each step, but {data.path} holds"
                    " tokens: set data=images and data.path to shards of images, or module.self_correction=0"
                )
        elif height_and_width(data.resolution) != self.tokenizer.image_size:
            raise ValueError(
                f"data.resolution={data.resolution}, but the tokenizer encodes images of {self.tokenizer.image_size} pixels"
            )

    @property
    def pyramids(self) -> list[scales.PatchNums]:
        """patch_nums of all shapes of the images."""
        return self.data.pyramids if isinstance(self.data, TokenDataModule) else [self.tokenizer.patch_nums]

    def of_shape(self, batch: ImageBatch | TokenBatch) -> tuple[VAR, ResidualQuantizer]:
        """Network and quantizer for the pyramid of the batch, which share their weights with those of the module."""
        number = batch.shape if isinstance(batch, TokenBatch) else 0
        if number == 0:
            return self.net, self.tokenizer.quantizer
        if number not in self.of_shapes:
            pyramid = self.pyramids[number]
            self.of_shapes[number] = self.net.at(pyramid), self.tokenizer.quantizer.at(pyramid)
        return self.of_shapes[number]

    @property
    def depth_ratio(self) -> float:
        """Factor of the learning rate from `lr_reference_depth`."""
        return 1.0 if self.lr_reference_depth is None else self.lr_reference_depth / self.net.depth

    @property
    def peak_lr(self) -> float:
        return super().peak_lr * (1.0 if self.mup_lr_scaling else self.depth_ratio)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.net, self.depth_ratio if self.mup_lr_scaling else 1.0)

    @torch.no_grad()
    def tokens(self, batch: ImageBatch | TokenBatch, self_correction: float = 0.0) -> tuple[Tensor, list[Tensor]]:
        """The batch's sequence (B L), and the token maps that the network sees: those of the sequence, unless there is
        `self_correction`."""
        if isinstance(batch, TokenBatch):
            _, quantizer = self.of_shape(batch)
            return batch.sequence, list(batch.sequence.split(scales.lengths(quantizer.patch_nums), dim=1))
        images = batch.images.float()
        rates = self_correction * torch.rand(len(images), device=images.device) if self_correction else None
        with torch.autocast(self.device.type, enabled=False):
            features = self.tokenizer.features(images)  # `tokenizer.encode` waits for a check of the values
            token_maps, seen = self.tokenizer.quantizer.encode_with_errors(features, rates)
        return torch.cat(token_maps, dim=1), seen

    def training_step(self, batch: ImageBatch | TokenBatch, batch_idx: int) -> Tensor:
        net, quantizer = self.of_shape(batch)
        self.trained_patch_nums = net.patch_nums
        sequence, token_maps = self.tokens(batch, self.self_correction)
        if self.objective is not None:
            loss, logits, values = self.objective(
                net, quantizer.teacher_forcing_inputs(token_maps, net.order), sequence, batch.condition
            )
            if self.is_logged:
                found = losses.token_scores(logits.detach(), sequence, net.patch_nums, net.bases)
                means = found.loss.mean(dim=0), found.error.mean(dim=0)
                self.log_scores("train", *means, net.patch_nums, {"train/objective": loss, **values})
                self.log("lr", self.lr)
            return loss
        num_scales, newest_weight = self.active_scales()
        self.trained_patch_nums = net.patch_nums[:num_scales]
        num_active = scales.scale_bounds(net.patch_nums)[num_scales - 1][1]
        target, is_logged, bases = sequence[:, :num_active], self.is_logged, net.bases

        def loss_fn(logits: Tensor, token_slice: slice) -> Tensor:
            """Training loss and, on logged steps, cross entropy and error (B l n)."""
            tokens, logits = target[:, token_slice], net.within_scales(logits, token_slice.start)
            loss = over_digits(self.loss, logits, tokens, bases)
            if not is_logged:
                return loss[..., None]
            with torch.no_grad():
                entropy = over_digits(losses.cross_entropy, logits, tokens, bases)
                scores = entropy, losses.token_errors(logits, tokens, bases)
            return torch.stack([loss, *scores], dim=-1)

        inputs = quantizer.teacher_forcing_inputs(token_maps[:num_scales], net.order)
        hidden = net(inputs, batch.condition, returns_hidden=True)
        assert isinstance(hidden, HiddenStates)
        head = partial(net.predict, vector=hidden.vector)
        by_token, *scores = losses.in_chunks(head, hidden.x, loss_fn, self.loss_chunks).unbind(dim=-1)
        if newest_weight != 1:
            newest = scales.lengths(net.patch_nums)[num_scales - 1]
            by_token = torch.cat([by_token[:, :-newest], newest_weight * by_token[:, -newest:]], dim=1)
        loss = by_token.sum(dim=1).mean() / sequence.shape[1]  # weight 1/L per token, no matter how many are active
        if is_logged:
            loss_by_scale, error_by_scale = (
                losses.by_scale(score, self.trained_patch_nums).mean(dim=0) for score in scores
            )
            others = {"train/objective": loss}
            self.log_scores("train", loss_by_scale, error_by_scale, self.trained_patch_nums, others)
            self.log("lr", self.lr)
            if self.progressive is not None:
                self.log("train/num_scales", float(num_scales))
        return loss

    def active_scales(self) -> tuple[int, float]:
        """(number of scales that this step trains, weight of the finest one): (K, 1) except in progressive training."""
        num_scales = len(self.net.patch_nums)
        if self.progressive is None:
            return num_scales, 1.0
        warmup_steps = self.schedule.warmup_steps(self.total_steps)
        return self.progressive.stage(self.global_step, self.total_steps, warmup_steps, num_scales)

    def log_scores(
        self,
        split: str,
        loss: Tensor,
        error: Tensor,
        patch_nums: scales.PatchNums,
        others: dict[str, Tensor] | None = None,
    ) -> None:
        """Logs loss (nats per token, without label smoothing) and error (percent): over all active tokens, of the last
        scale, and of each scale."""
        overall = {f"{split}/{name}": losses.over_tokens(x, patch_nums) for name, x in [("loss", loss), ("err", error)]}
        self.log_by_scale(split, loss, error, {**overall, **(others or {})})

    def log_by_scale(self, split: str, loss: Tensor, error: Tensor, others: dict[str, Tensor]) -> None:
        """Logs loss and error of each scale, and other values."""
        values = dict(others)
        for name, by_scale in [("loss", loss), ("err", error)]:
            values[f"{split}/{name}_last"] = by_scale[-1]
            values |= {f"{split}/{name}_scale_{k:02d}": value for k, value in enumerate(by_scale)}
        self.log_means(values, prog_bar=(f"{split}/loss", f"{split}/err"))

    def score(self, batch: ImageBatch | TokenBatch, scores: ImageMean) -> None:
        """Adds loss and error of a batch per scale and over all tokens, and the square of the loss."""
        net, quantizer = self.of_shape(batch)
        sequence, token_maps = self.tokens(batch)
        logits = net(quantizer.teacher_forcing_inputs(token_maps, net.order), batch.condition)
        found = losses.token_scores(logits, sequence, net.patch_nums, net.bases)
        loss, error = losses.over_tokens(torch.stack(found), net.patch_nums)
        overall = torch.stack([loss, error, loss.square()], dim=1)
        scores.update(torch.cat([found.loss, found.error, overall], dim=1), batch.weight)

    def log_validation(self, split: str, means: Tensor) -> None:
        num_scales = len(self.net.patch_nums)
        by_scale_loss, by_scale_error, (loss, error, square) = means.tensor_split([num_scales, 2 * num_scales])
        standard_error = ((square - loss.square()).clamp(min=0) / self.data.num_val).sqrt()
        overall = {f"{split}/loss": loss, f"{split}/err": error, f"{split}/loss_se": standard_error}
        self.log_by_scale(split, by_scale_loss, by_scale_error, overall)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["varlab"] = networks_entry(self.tokenizer, self.net, self.class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        check_same_networks(checkpoint, self.tokenizer, self.net)
