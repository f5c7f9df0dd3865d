"Sphinx's settings; `make docs` (tools/docs.py) lays out what it reads"
from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = html_title = 'fastai_tricks'
extensions = ['myst_nb']
nb_execution_mode = 'off'
myst_enable_extensions = ['attrs_inline', 'dollarmath']
myst_heading_anchors = 4
myst_heading_slug_func = 'docutils.nodes.make_id'
# Quotes in text are often those of code
smartquotes = False
# Titles of the API are of level 3 wherever they stand
suppress_warnings = ['myst.header']

html_theme = 'furo'
html_static_path = ['static']
html_css_files = ['site.css']
html_js_files = ['site.js']
html_favicon = 'static/favicon.svg'
html_use_index = False
html_show_sphinx = html_show_copyright = html_copy_source = html_show_sourcelink = False
html_math_renderer = 'mathml'

def mathml(self, node):
    self.body.append(convert(node.astext(), display='block' if node.tagname=='math_block' else 'inline'))
    raise SkipNode

# Browsers draw MathML by themselves; MathJax would come from the network
def setup(app): app.add_html_math_renderer('mathml', inline_renderers=(mathml, None), block_renderers=(mathml, None))
