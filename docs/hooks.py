"""Lets pages link to what lies beside docs/: studies with their pictures and tables, and source files."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
KINDS = {".md", ".png", ".csv", ".json", ".yaml", ".py"}


def on_files(files, config):
    """Studies become pages, other files are copied as they are."""
    for folder in ("experiments", "src"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in KINDS and "__pycache__" not in path.parts:
                files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Pages of docs/ lie one folder higher on the site than in the repository."""
    if page.file.src_uri.startswith("experiments/"):
        return markdown
    return re.sub(r"\]\(\.\./(experiments|src)/", r"](\1/", markdown)
