"""`varlab app`: a web page to sample, edit, inspect the tokenizer, monitor a sweep, compare two models."""

import logging
import os
import signal
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import hydra_command


def run(cfg: DictConfig) -> None:
    """Serves the page until Ctrl-C or SIGTERM, then removes uploads and generated images."""
    from varlab.app.session import Model, Sweep
    from varlab.distributed import default_device

    if cfg.max_batch < 1 or cfg.max_upload_mb <= 0 or cfg.refresh_s <= 0:
        raise ValueError("max_batch, max_upload_mb and refresh_s must be positive")
    device = default_device(cfg.device)
    given: Any = OmegaConf.to_container(cfg)
    model, other = (
        None if path is None else Model(str(path), device, cfg.trust_code, given["image_size"])
        for path in (cfg.checkpoint, cfg.compare)
    )
    assert model is not None
    with tempfile.TemporaryDirectory(prefix="varlab-app-") as folder:
        gradio = import_gradio(folder)
        from starlette.middleware import Middleware

        from varlab.app.guard import OwnRequests
        from varlab.app.ui import CSS, THEME, build

        sweep = None if cfg.runs is None else Sweep(str(cfg.runs), Path(folder))
        page = build(model, other, sweep, cfg.max_batch, cfg.refresh_s)
        if cfg.host not in ("127.0.0.1", "localhost"):
            print(f"warning: anyone who can reach {cfg.host}:{cfg.port} can use this page, since it has no password")
        try:
            _, url, _ = page.launch(
                server_name=cfg.host,
                server_port=cfg.port,
                max_file_size=int(cfg.max_upload_mb * gradio.FileSize.MB),
                theme=THEME,
                css=CSS,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=False,
                footer_links=[],
                app_kwargs={
                    "middleware": [Middleware(OwnRequests, host=cfg.host, allowed_hosts=list(cfg.allowed_hosts))]
                },
            )
        except OSError as error:
            raise ValueError(f"host={cfg.host} port={cfg.port} cannot be used: {error}") from None
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
        print(f"{url}  ({model.name}; Ctrl-C to stop)", flush=True)
        page.block_thread()


def import_gradio(folder: str) -> ModuleType:
    """Imports gradio with uploads in `folder` and all network access off; it reads these settings on import."""
    os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs the package gradio: pip install 'varlab[app]'") from None
    return gradio


main = hydra_command("app")(run)

if __name__ == "__main__":
    main()
