"""`varlab COMMAND [overrides]`: dispatches to the command."""

import io
import os
import runpy
import sys
from contextlib import suppress

COMMANDS = {
    "pack": "images -> webdataset shards with a manifest",
    "train": "train a tokenizer or a VAR: experiment=tokenizer_f8_64, experiment=var_d16, ...",
    "tune": "train a trained VAR further: contrastive alignment, low-rank adapters",
    "tokenize": "shards -> token cache, encoded once for all transformers",
    "evaluate": "scores of a tokenizer, a VAR's likelihood, or samples",
    "audit": "membership inference and memorization: what a VAR tells about its training images",
    "sample": "checkpoint -> PNG images, class grid, filmstrip of scales",
    "doctor": "compare a run's curves with the reference curves of its experiment",
    "export": "checkpoint -> safetensors folder, released layout, one file, ONNX",
    "import": "the authors' weights -> export folder",
    "sync": "upload runs that were logged offline to W&B",
    "edit": "inpainting, outpainting, class-conditional editing of an image",
    "app": "web page: sample, edit, inspect the tokenizer, monitor a sweep",
    "sweep": "status, resume, retry-failed, table of a multirun",
    "scaling": "runs -> table, power laws with intervals, figures",
}
MODULES = {"import": "import_released"}


def main() -> None:
    """Runs `varlab.commands.COMMAND` with the rest of the command line."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
        footer = "`varlab COMMAND --help` shows the settings of a command."
        usage = "\n".join(["varlab COMMAND [hydra overrides]", "", *lines, "", footer])
        if command in ("", "-h", "--help"):
            with suppress(BrokenPipeError):  # `varlab | head`
                print(usage, flush=True)
                return
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        sys.exit(f"varlab: there is no command {command!r}\n\n{usage}")
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    for stream in (sys.stdout, sys.stderr):  # a class name that the terminal cannot show stops nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.path.append("")  # custom classes are found in the current folder, as with `python -m`
    # as `python -m varlab.commands.COMMAND`: Lightning and Hydra start the processes of DDP by this name
    runpy.run_module(f"varlab.commands.{MODULES.get(command, command)}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
