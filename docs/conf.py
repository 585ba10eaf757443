"""Sphinx's settings; `scripts/build_site.py` stages the pages and calls it."""

project = "normlab"
author = "the authors of normlab"
extensions = ["myst_parser"]
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
exclude_patterns = ["extra"]
html_theme = "furo"
html_title = "normlab"
html_favicon = "learn/icon.svg"
html_logo = None
html_static_path = ["learn/site.css"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]  # raw results, scripts, notebooks, as they are
html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#00695c",
        "color-brand-content": "#00695c",
        "color-foreground-muted": "#595959",
    },
    "dark_css_variables": {
        "color-brand-primary": "#5ec9bd",
        "color-brand-content": "#5ec9bd",
        "color-foreground-muted": "#a8a8a8",
    },
}
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
nitpicky = True
