"""Sphinx's settings for the site. `nbs/site/build_site.py` stages the sources and calls Sphinx with this file"""

import json
import os
import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAGE = Path(os.environ.get("SITE_STAGE", ROOT / "build/site"))  # Where build_site.py puts what this reads
sys.path.insert(0, str(HERE))
import site_math  # noqa: E402

settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["lib_name"]
author = settings["author"]
project_copyright = settings["copyright"]
version = release = settings["version"]
language = "en"

extensions = ["myst_nb", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["**.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
root_doc = "index"
nitpicky = True
smartquotes_action = "qe"  # Not dashes: options begin with two
add_module_names = False
maximum_signature_line_length = 60
python_display_short_literal_types = True
toc_object_entries = False

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
nb_execution_mode = "off"
nb_execution_cache_path = str(STAGE / "cache")
nb_merge_streams = True
nb_number_source_lines = False
# What a chapter shows is its first choice: a table before its text, a picture before both
nb_mime_priority_overrides = [("html", "text/html", 5), ("html", "image/png", 1), ("html", "image/jpeg", 2)]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_selector = "div.highlight pre"

html_theme = "pydata_sphinx_theme"
html_title = project
html_baseurl = f"{settings['doc_host']}{settings['doc_baseurl']}/"
html_static_path = [str(HERE / "static")]
html_extra_path = [str(STAGE / "extra")]
html_favicon = str(HERE / "static/favicon.svg")
html_css_files = ["site.css"]
html_js_files = [("tables.js", {"defer": "defer"})]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_math_renderer = "mathml"
html_context = {"default_mode": "auto"}
html_sidebars = {"index": []}
html_theme_options = {
    "github_url": settings["git_url"],
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_nav_level": 1,
    "show_toc_level": 2,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "back_to_top_button": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "article_header_start": ["breadcrumbs"],
    "logo": {"text": project},
}
html_context["descriptions"] = json.loads((STAGE / "descriptions.json").read_text(encoding="utf-8"))  # Of each page, for search engines


def describe(app, pagename, templatename, context, doctree) -> None:
    "A page's description in its head"
    from html import escape

    if text := html_context.get("descriptions", {}).get(pagename):
        context["metatags"] = context.get("metatags", "") + f'\n<meta name="description" content="{escape(text, quote=True)}">'


def setup(app) -> None:
    app.connect("html-page-context", describe)
    site_math.setup(app)
