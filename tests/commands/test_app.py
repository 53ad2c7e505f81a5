"""`varlab app`: what cannot be served is said."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["max_batch=0"], "max_batch, max_upload_mb and refresh_s must be positive"),
        (["checkpoint=nowhere.ckpt"], "checkpoint nowhere.ckpt does not exist"),
        (["port=TAKEN"], "cannot be used"),
    ],
)
def test_what_cannot_be_served_is_said(page_models, page_url, settings, message):
    settings = [setting.replace("TAKEN", page_url.rsplit(":", 1)[1]) for setting in settings]
    command = [sys.executable, "-m", "varlab", "app", f"checkpoint={page_models / 'first'}", *settings]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 1 and message in answer.stdout
    assert "Traceback" not in answer.stdout + answer.stderr
