"""Puts the pages that lie in the root of the repository into the site, with links as the site has them."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs once the files of docs/ are known."""
    for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG"):
        text = (Path(config.config_file_path).parent / f"{name}.md").read_text(encoding="utf-8")
        files.append(File.generated(config, f"{name.lower()}.md", content=text.replace("](docs/", "](")))
    return files
