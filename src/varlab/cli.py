"""`varlab VERB [overrides]`: finds the verb, nothing else."""

import runpy
import sys

VERBS = {
    "pack": "images -> webdataset shards with a manifest",
    "train": "fit a tokenizer or a VAR: experiment=tokenizer_f8_64, experiment=var_d16, ...",
    "tokenize": "shards -> token cache, encoded once for all transformers",
    "evaluate": "tokenizer + shards -> PSNR, SSIM, perceptual and Frechet distance, by scale",
    "sample": "checkpoint -> class grid, filmstrip of scales, PNG images",
    "doctor": "a run's curves over the reference curves of its experiment: is it normal?",
    "export": "checkpoint -> safetensors folder, released layout, one file, ONNX",
    "import": "the authors' weights -> folder for use anywhere",
    "sync": "upload runs that were logged offline to W&B, resumed ones as one curve",
    "edit": "in-painting, out-painting, class-conditional editing of an image",
    "app": "a web page: sample, edit, look inside the tokenizer, watch a sweep",
    "sweep": "status, resume, retry-failed, table of a multirun",
    "scaling": "runs -> table, power laws with intervals, figure",
}
MODULES = {"scaling": "scaling_law", "import": "import_released"}


def main() -> None:
    """Runs `varlab.VERB` with the rest of the command line."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb not in VERBS:
        lines = [f"  {name:10} {what}" for name, what in VERBS.items()]
        usage = "\n".join(
            ["varlab VERB [hydra overrides]", "", *lines, "", "`varlab VERB --help` shows the settings of a verb."]
        )
        if verb in ("", "-h", "--help"):
            print(usage)
            return
        sys.exit(f"varlab: {verb!r} is no verb\n\n{usage}")
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    sys.path.append("")  # classes of your own are found in the current folder, as with `python -m`
    # as `python -m varlab.VERB`: processes that DDP starts run the same command again
    runpy.run_module(f"varlab.{MODULES.get(verb, verb)}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
