"""The site in _docs from the pages in nbs: nbdev's processing of the pages, then Sphinx with myst-nb and furo.

Sphinx, because it comes from PyPI, needs no network and no quarto, and its search works from file:// too."""
import re, shutil, sys
from importlib import import_module
from pathlib import Path

import nbformat, yaml
from docutils.nodes import make_id
from fastcore.docments import DocmentTbl, DocmentText
from fastcore.nbio import read_nb
from nbdev import processors as procs
from nbdev.config import get_config, nbpath2html
from nbdev.doclinks import NbdevLookup, nbglob
from nbdev.showdoc import BasicMarkdownRenderer
from sphinx.cmd.build import build_main

root = Path(__file__).resolve().parents[1]
nbs,work,site = root/'nbs',root/'_proc'/'sphinx',root/'_docs'
stage,out = work/'pages',work/'out'
address = get_config(root).doc_url
# Name of the API -> where it is described
api = {}

def doc(nb): return nbpath2html(nb.relative_to(nbs)).with_suffix('').as_posix()

def groups(
    pages:list, # All of them
)->dict: # Pages by title of their group
    "The groups of nbs/sidebar.yml; each page must be in one"
    res = {}
    for g in yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']:
        if isinstance(g, str): g = {'section': '', 'contents': [g]}
        res[g['section']] = [p for o in g['contents'] for p in (sorted(nbs.glob(o['auto'])) if isinstance(o, dict) else [nbs/o])]
    listed = {p for ps in res.values() for p in ps}
    if lost := [str(p.relative_to(nbs)) for p in pages if p not in listed]: sys.exit(f'In no group of nbs/sidebar.yml: {", ".join(lost)}')
    if gone := [str(p.relative_to(nbs)) for p in listed - set(pages)]: sys.exit(f'In nbs/sidebar.yml, but not in nbs: {", ".join(gone)}')
    return res

class Api(BasicMarkdownRenderer):
    "As nbdev's, with a table of the parameters in place of comments in the signature"
    def _repr_markdown_(self):
        sig,tbl = self.dm,''
        if isinstance(sig, DocmentText):
            tbl = DocmentTbl(self.sym)._repr_markdown_()
            sig.maxline = 88
            if tbl:
                for d in sig.dm.values(): d['docment'] = ''
        code = NbdevLookup().code(self.fn)
        return '\n\n'.join(filter(None, [f"{'#'*self.title_level} {self.nm}", code and f'[source]({code}){{.source}}', f'```python\n{sig}\n```', self.docs, tbl]))

class ShowDocs(procs.Processor):
    "`show_doc` of what a page exports, from its module: nothing of the page is run"
    def begin(self):
        mod = [o for c in self.nb.cells if (o := c.directives_.get('default_exp'))]
        self.ns = {**(vars(import_module(f'{get_config().lib_name}.{mod[0]}')) if mod else {}), 'show_doc': Api}
    def cell(self, c):
        if c.cell_type!='code' or not c.source.startswith('show_doc('): return
        o = eval(c.source, self.ns)
        # A patch is found without its class too
        for nm in {o.nm, o.nm.split('.')[-1]}: api.setdefault(nm, f'/{doc(Path(self.nb.path_))}.ipynb#{make_id(o.nm)}')
        c.cell_type,c.source = 'markdown',o._repr_markdown_()

class Filter(procs.FilterDefaults):
    # FrontmatterProc loses what follows a subtitle in its cell; add_links makes links within links, and to another host
    skip = procs.FrontmatterProc, procs.insert_warning, procs.add_links, procs.clean_show_doc
    def base_procs(self): return [ShowDocs if p is procs.exec_show_docs else p for p in super().base_procs() if p not in self.skip]

def links(
    md:str, # Text of a cell
    nb:Path, # Its page
)->str:
    "Names of the API in backticks become links; links to other pages get the site's names and anchors"
    def name(m): return f'[{m[0]}]({api[m[1]]})' if m[1] in api else m[0]
    def page(m): return f']({"/" + doc((nb.parent/m[1]).resolve()) + ".ipynb" if m[1] else ""}{"#" + make_id(m[2][1:]) if m[2] else ""})'
    parts = re.split(r'(^```.*?^```|^#.*?$|\[[^\]]*\]\([^)]*\))', md, flags=re.M|re.S)
    # Even parts are outside of code, headings and links
    parts[::2] = [re.sub(r'`([^`\s]+?)(?:\(\))?`', name, p) for p in parts[::2]]
    parts[1::2] = [re.sub(r'\]\((?!https?:|/)([^)#\s]*\.ipynb)?(#[^)]*)?\)', lambda m: page(m) if m[1] or m[2] else m[0], p) for p in parts[1::2]]
    return ''.join(parts)

def is_bar(o):
    "Is an output nothing but fastprogress's styles or bar, or empty?"
    html = re.sub(r'<style>.*?</style>|\s+', '', ''.join(o.get('data', {}).get('text/html', 'x')), flags=re.S)
    return not html or '<progress' in html and '<table' not in html

def for_sphinx(nb, path):
    "Quarto's directives in the words of myst-nb"
    cells,md = [],lambda s: nbformat.v4.new_markdown_cell(links(''.join(s), path))
    for c in nb.cells:
        if c.cell_type=='markdown': cells.append(md(c.source))
        if c.cell_type!='code': continue
        opts = dict(re.findall(r'^#\|\s*([\w-]+):\s*(.+)$', c.source, re.M))
        src,outs = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M),[nbformat.from_dict(o) for o in c.get('outputs', []) if not is_bar(o)]
        if opts.get('include')=='false': continue
        if hidden := opts.get('echo')=='false':
            # What it shows as text becomes the page's, with its links
            cells += [md(o.data['text/markdown']) for o in outs if 'text/markdown' in o.get('data', {})]
            outs = [o for o in outs if 'text/markdown' not in o.get('data', {})]
        if outs or not hidden: cells.append(nbformat.v4.new_code_cell(src, outputs=outs, metadata={'tags': ['remove-input']} if hidden else {}))
    return nbformat.v4.new_notebook(cells=cells, metadata={'language_info': {'name': 'python', 'pygments_lexer': 'ipython3'},
                                                           'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})

def toctree(title, pages): return f'```{{toctree}}\n:hidden:\n:caption: {title}\n\n' + '\n'.join(map(doc, pages)) + '\n```'

def llms(tree, nbks):
    "The pages in one text, in the form of llmstxt.org, for readers that are programs"
    def head(nb): return re.search(r'^# (.+?)\s*$(?:\s*^> (.+?)\s*$)?', '\n\n'.join(c.source for c in nb.cells if c.cell_type=='markdown'), re.M)
    name,desc = head(nbks[nbs/'index.ipynb']).groups()
    parts = [f'# {name}\n\n> {desc}']
    for title,pages in tree.items():
        if title: parts.append(f'## {title}\n\n' + '\n'.join(f'- [{m[1]}]({address}{doc(p)}.html): {m[2]}' for p in pages if (m := head(nbks[p]))))
    return '\n\n'.join(parts) + '\n'

def main():
    tree = groups(pages := [Path(p).resolve() for p in nbglob(nbs, as_path=True)])
    shutil.rmtree(work, ignore_errors=True)
    # Pictures, and scripts that pages link to
    shutil.copytree(nbs, stage, ignore=shutil.ignore_patterns('*.ipynb', '*.yml', '.*', '_*'))
    nbks = {p:read_nb(p) for p in pages}
    for nb in nbks.values(): Filter()(nb)
    for p,nb in nbks.items():
        nb = for_sphinx(nb, p)
        if p==nbs/'index.ipynb': nb.cells.append(nbformat.v4.new_markdown_cell('\n\n'.join(toctree(t, ps) for t,ps in tree.items() if t)))
        nbformat.write(nb, stage/f'{doc(p)}.ipynb')
    if res := build_main(['-q', '-W', '--keep-going', '-c', str(root/'docs'), '-d', str(work/'doctrees'), str(stage), str(out)]): return res
    (out/'llms.txt').write_text(llms(tree, nbks), encoding='utf-8')
    # Whole or as it was
    shutil.rmtree(site, ignore_errors=True)
    out.rename(site)

if __name__=='__main__': sys.exit(main())
