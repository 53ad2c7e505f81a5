"""Export folders on the Hugging Face Hub: download by name, with its cache and offline mode, and upload.

Needs `pip install 'varlab[hub]'`. Only what an export folder consists of is downloaded, and nothing of it is unpickled or run.
"""

import re
from pathlib import Path

from varlab.files import reason_of

FILES = ("config.json", "*.safetensors", "README.md")
SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors", ".json", ".npz")  # of files, not of models
NAME = re.compile(r"(?P<repo>[\w][\w.-]*/[\w.-]*[\w])(?:@(?P<revision>[\w./-]+))?")


def is_hub_name(path: str | Path) -> bool:
    """Whether this reads as `user/name` or `user/name@revision`, and not as a path below an existing folder."""
    text = str(path)
    return bool(NAME.fullmatch(text)) and not text.endswith(SUFFIXES) and not Path(text.split("/")[0]).exists()


def download(name: str) -> Path:
    """The local folder of a model `user/name`, or `user/name@revision`; downloads what the cache lacks. `HF_TOKEN`,
    `HF_HOME` and `HF_HUB_OFFLINE=1` work as everywhere. Raises ValueError if it cannot be had, or is no export of varlab."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            GatedRepoError,
            HTTPError,  # pyright: ignore[reportPrivateImportUsage]
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise ValueError(
            f"checkpoint {name} does not exist here; to look for it on the Hugging Face Hub: pip install 'varlab[hub]'"
        ) from None
    found = NAME.fullmatch(name)
    assert found is not None
    repo, revision = found["repo"], found["revision"]
    try:
        folder = Path(HfApi().snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
    except GatedRepoError:
        raise ValueError(f"{repo} on the Hugging Face Hub asks for a login and for terms to be accepted") from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo} on the Hugging Face Hub has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"checkpoint {name} exists neither here nor, for this user, on the Hugging Face Hub (HF_TOKEN logs in)"
        ) from None
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise ValueError(
            f"checkpoint {name} does not exist here, and the Hugging Face Hub failed: {reason_of(error)}"
        ) from None
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} on the Hugging Face Hub is no export of varlab: it has no config.json")
    return folder


def check_name(name: str) -> None:
    """Raises ValueError unless this is `user/name`."""
    found = NAME.fullmatch(name)
    if found is None or found["revision"]:
        raise ValueError(f"{name!r} is not the name of a model on the Hugging Face Hub: give user/name")


def upload(folder: Path, name: str, private: bool | None = None, message: str | None = None) -> str:
    """Uploads an export folder as the model `user/name`, which is created if it does not exist; returns its address. Raises
    ValueError if that fails."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
    except ImportError:
        raise ValueError("the Hugging Face Hub needs: pip install 'varlab[hub]'") from None
    check_name(name)
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(FILES), commit_message=message)
    except (HTTPError, OSError) as error:
        raise ValueError(f"uploading to {name} failed: {reason_of(error)}") from None
    return str(address)
