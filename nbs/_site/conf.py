"Settings of Sphinx for the web site; site_pages.py makes its sources and calls it."

import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parent))

import site_pages  # noqa: E402

import cola_tutorial  # noqa: E402

project = "cola_tutorial"
author = "The cola_tutorial authors"
copyright = f"{author}, Apache License 2.0"
version = release = cola_tutorial.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["_made", "CHANGELOG.md"]
smartquotes = False  # text as it was written: `--older` is two hyphens
nitpicky = True
nitpick_ignore_regex = [("py:(class|exc)", ".*")]  # types of other projects lead nowhere: their pages are not on this machine

# Notebooks show the outputs they were committed with.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js: dict = {}
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
myst_heading_slug_func = "site_pages.anchor"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 60

html_theme = "sphinx_book_theme"
html_title = "cola_tutorial"
html_context = {"default_mode": "auto"}
html_math_renderer = "mathml"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it would be fetched page by page, which a browser refuses for files opened without a server
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the side bar has the search already
    "show_toc_level": 2,
}
linkcheck_ignore = [r"\.\./"]  # links inside the site, which tests/test_docs.py follows
linkcheck_timeout = 30
linkcheck_retries = 2


def load_figures(app: Sphinx, page: str, template: str, context: dict, tree: object) -> None:
    "Only pages with a view's still load what brings it to life."
    if "cola-still" not in context.get("body", ""): return
    app.add_css_file("view.css")
    for script in ("plotly.min.js", "view.js", "awaken.js"): app.add_js_file(script, loading_method="defer")


def setup(app: Sphinx) -> dict:
    "Connect what site_pages.py knows."
    nothing = lambda writer, node: None
    app.add_html_math_renderer("mathml", (site_pages.inline_math, nothing), (site_pages.display_math, nothing))
    app.connect("autodoc-process-signature", site_pages.signature)
    app.connect("autodoc-process-docstring", site_pages.describe)
    app.connect("doctree-resolved", site_pages.dashes)
    app.connect("html-page-context", load_figures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
