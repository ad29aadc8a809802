"""Let pages link to files of the repository outside docs/, such as notebooks, pictures and configs.

A link from docs/how-to/losses.md to ../../notebooks/losses.ipynb works where the Markdown is read in the repository.
For the site, the file is copied into its folder `repository/`, and the link points there.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FOLDER = "repository"
# The target of a Markdown link or image, relative and leaving the folder of the page.
_TARGET = re.compile(r"(?<=\]\()(\.\./[^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    wanted = set()
    for page in files.documentation_pages():
        for link in _TARGET.findall(page.content_string):
            path = _outside(page.src_uri, link, docs.relative_to(root).as_posix())
            if path is not None and (root / path).is_file():
                wanted.add(path)
    for path in sorted(wanted):
        files.append(File.generated(config, f"{FOLDER}/{path}", abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links at the copies. A link to a file that does not exist stays as it is, and fails a strict build."""
    docs = Path(config.docs_dir).relative_to(Path(config.config_file_path).parent).as_posix()

    def replace(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match[1], docs)
        if path is None or files.get_file_from_path(f"{FOLDER}/{path}") is None:
            return match[1]
        return posixpath.relpath(f"{FOLDER}/{path}", posixpath.dirname(page.file.src_uri) or ".")

    return _TARGET.sub(replace, markdown)


def _outside(page: str, link: str, docs: str) -> str | None:
    """Return the path in the repository that a link of a page leads to, if it is outside docs/."""
    path = posixpath.normpath(posixpath.join(docs, posixpath.dirname(page), link))
    return None if path.startswith(("..", f"{docs}/")) else path
