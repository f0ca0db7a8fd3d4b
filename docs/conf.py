"""Sphinx's settings: `python -m sphinx -W --keep-going docs outputs/site` builds the site, offline."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import reference  # noqa: E402

import mmft  # noqa: E402

project, author, copyright = "mmft", "the authors of mmft", "the authors of mmft"
release = version = mmft.__version__
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mmft"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
html_theme_options = {
    # the machine's own fonts, Chinese ones among them: nothing is fetched to show a page
    "light_css_variables": {
        "font-stack": "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif",
        "font-stack--monospace": "ui-monospace, 'SF Mono', Consolas, 'DejaVu Sans Mono', monospace",
    }
}


def setup(app):
    app.connect("builder-inited", lambda app: reference.write(HERE / "reference"))
