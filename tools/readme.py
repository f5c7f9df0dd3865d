"README.md from nbs/index.ipynb, as nbdev-readme makes it, where quarto is not at hand"
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parents[1]
nb = nbformat.read(root/'nbs'/'index.ipynb', 4)
nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*hide', c.source, re.M)]
for i, c in enumerate(nb.cells):
    # Quarto's `echo: false`: what the cell shows, without its code
    if re.search(r'^#\|\s*echo:\s*false', c.source, re.M):
        nb.cells[i] = nbformat.v4.new_markdown_cell('\n\n'.join(o['data']['text/markdown'] for o in c.outputs if 'text/markdown' in o.get('data', {})))
for c in nb.cells: c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
text, _ = MarkdownExporter().from_notebook_node(nb)
# Links and pictures are relative to nbs/, the README is one level up
text = re.sub(r'\]\((?!https?:|#)(images/|(?:\w+/)?\w+\.ipynb)', r'](nbs/\1', text)
(root/'README.md').write_text('<!-- made from nbs/index.ipynb by `make readme` -->\n\n' + text.strip() + '\n', encoding='utf-8')
