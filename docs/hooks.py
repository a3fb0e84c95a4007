"""What the site does beside Markdown: pictures that lie outside docs/ come along, the log is not searched."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./(bench/[^)\s]+\.svg)\)")


def on_files(files, config):
    for page in [file for file in files if file.is_documentation_page()]:
        for path in OUTSIDE.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            if files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_path == "LOG.md":
        page.meta["search"] = {"exclude": True}
    return OUTSIDE.sub(r"](\1)", markdown)
