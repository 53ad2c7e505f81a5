"""`varlab tokenize`: shards -> token cache."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import hydra_command
from varlab.files import FolderLock


def run(cfg: DictConfig) -> None:
    """Encodes every view of every image of a packed set; the work is split over the processes of torchrun."""
    from hydra.utils import instantiate

    from varlab.checkpoints.load import load_tokenizer
    from varlab.data.resolutions import different_shapes
    from varlab.data.token_cache import write_cache
    from varlab.distributed import WorkSplit, default_device, use_exact_fp32
    from varlab.models.text_encoder import TextEncoder

    if cfg.max_captions < 1 or not 0 <= cfg.text_tokens <= 512:
        raise ValueError(
            f"max_captions={cfg.max_captions} text_tokens={cfg.text_tokens}: give 1 or more captions, and 0 to 512 tokens"
        )
    if not isinstance(cfg.low_res, int):
        raise ValueError(
            f"low_res={cfg.low_res!r}: give a whole number, by which the sides of the images are divided; 0 for none"
        )
    given: Any = OmegaConf.to_container(cfg)
    shapes = different_shapes(given["shapes"])
    use_exact_fp32()
    share, device = WorkSplit.of_environment(), default_device(cfg.device)
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.patch_nums, trust_code=cfg.trust_code)
    with FolderLock(Path(cfg.out), "varlab tokenize", share.rank, share.num_ranks):
        manifests = write_cache(
            Path(cfg.out),
            cfg.shards,
            tokenizer,
            cfg.resize_ratio,
            cfg.crops,
            cfg.flips,
            cfg.seed,
            cfg.batch_size,
            device,
            cfg.part_images,
            share,
            instantiate(cfg.storage),
            None if cfg.text is None else TextEncoder(cfg.text, device, cfg.text_tokens),
            cfg.max_captions,
            shapes,
            cfg.low_res,
        )
    for folder, manifest in manifests.items():
        counts = ", ".join(f"{split['num_images']} {name}" for name, split in manifest["splits"].items())
        print(
            f"{folder}: {counts or 'parts of'} images x {len(manifest['views'])} views, tokenizer {manifest['tokenizer']}"
            + (
                ""
                if cfg.text is None
                else f"; up to {manifest['text']['captions']} captions each, encoded by {cfg.text}"
            )
        )


main = hydra_command("tokenize")(run)

if __name__ == "__main__":
    main()
