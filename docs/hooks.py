"""Hooks of mkdocs: the site has the repository's own paths, so that a relative link works in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("README.md", "LICENSE", "constraints.txt", "benchmarks/README.md", "benchmarks/results/*", "docs/**/*.*")
LINKED = ("configs/**/*.*", "recipes/*.yaml")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of ``docs/`` by files under their path in the repository, and add those that pages link to."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    found = sorted({path for pattern in SHOWN + LINKED for path in ROOT.glob(pattern) if path.is_file()})
    own = [
        File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
        for path in found
        if path.suffix not in (".py", ".pyc")
    ]
    return Files([*theme, *own])
