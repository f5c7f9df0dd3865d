"The built site in a browser, on a phone's screen: every page, link, picture and request, and the search"
import functools, http.server, re, shutil, threading
from pathlib import Path
from urllib.parse import unquote, urldefrag
import pytest

sync_api = pytest.importorskip('playwright.sync_api', reason="needs the extra 'docs'")
yaml = pytest.importorskip('yaml')
ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/'_docs'
BROWSER = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)
if not BROWSER: pytest.skip('needs Chromium on the PATH', allow_module_level=True)
if not (SITE/'index.html').exists(): pytest.skip('needs the site: make docs', allow_module_level=True)
FLAGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
TIPS = ['Start at a low resolution','Start with few classes','Half precision','TPU, and several GPUs','Progressive resizing','Depthwise convolutions',
        'A changing learning rate','Warm-up','Augmentation, and looking']

# What one page shows. Wide things may scroll in a box of their own, which is not the page
LOOK = '''() => {
    const article = document.querySelector('article'), wide = []
    const scrolls = e => e && e!==article && article.contains(e) && (['auto','scroll'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
    for (const e of article.querySelectorAll('*'))
        if (e.getBoundingClientRect().right > innerWidth+1 && !scrolls(e)) wide.push(e.outerHTML.slice(0,120))
    return {hrefs: [...document.querySelectorAll('a[href]')].map(e => e.href), ids: [...document.querySelectorAll('[id]')].map(e => e.id),
            lost: [...document.images].filter(e => !(e.complete && e.naturalWidth)).map(e => e.src.slice(0,200)), wide,
            page: [document.documentElement.scrollWidth, innerWidth], font: parseFloat(getComputedStyle(document.body).fontSize),
            small: [...article.querySelectorAll('p')].filter(e => parseFloat(getComputedStyle(e).fontSize)<14).map(e => e.innerText.slice(0,80)),
            text: [...article.querySelectorAll('p,li,h1,h2,h3')].map(e => e.innerText).join('\\n'), h1: document.querySelectorAll('article h1').length}
}'''

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def url():
    server = http.server.ThreadingHTTPServer(('127.0.0.1',0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

@pytest.fixture(scope='module')
def page(url):
    "A phone's, with what went wrong while it was open"
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={'width':390,'height':844})
        page.errors,page.outside = [],[]
        page.on('console', lambda m: page.errors.append(f'{page.url}: {m.text}') if m.type in ('error','warning') else None)
        page.on('pageerror', lambda e: page.errors.append(f'{page.url}: {e}'))
        page.on('response', lambda r: page.errors.append(f'{r.status} {r.url}') if r.status>=400 else None)
        page.on('request', lambda r: None if r.url.startswith((url,'file:','data:')) else page.outside.append(f'{page.url}: {r.url}'))
        yield page
        browser.close()

@pytest.fixture(scope='module')
def seen(page, url):
    "What every page of the site shows"
    res = {}
    for f in sorted(SITE.rglob('*.html')):
        u = url + f.relative_to(SITE).as_posix()
        page.goto(u, wait_until='load')
        res[u] = page.evaluate(LOOK)
    return res

def test_all_pages_are_there(seen, url):
    from nbdev.config import nbpath2html
    pages = [f for f in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts]
    assert len(pages)>30 and not [f for f in pages if url+nbpath2html(f.relative_to(ROOT/'nbs')).as_posix() not in seen]

def test_links_and_anchors(seen, url):
    bad = set()
    for u,o in seen.items():
        for href in o['hrefs']:
            if not href.startswith(url): continue
            to,anchor = urldefrag(href)
            to = to.split('?')[0]
            if to.endswith('/'): to += 'index.html'
            if to in seen: ok = not anchor or unquote(anchor) in seen[to]['ids']
            else: ok = (SITE/unquote(to[len(url):])).is_file()
            if not ok: bad.add(f'{u} -> {href}')
    assert not bad, '\n'.join(sorted(bad))

def test_pictures(seen): assert not {u:o['lost'] for u,o in seen.items() if o['lost']}

def test_no_errors(seen, page): assert not page.errors

def test_nothing_from_elsewhere(seen, page): assert not page.outside

def test_fits_a_phone(seen):
    assert not {u:o['page'] for u,o in seen.items() if o['page'][0]>o['page'][1]}
    assert not {u:o['wide'] for u,o in seen.items() if o['wide']}
    assert not {u:(o['font'],o['small']) for u,o in seen.items() if o['font']<14 or o['small']}

def test_reads_as_text(seen):
    "One title a page, and no syntax that was meant for a renderer"
    assert not {u:o['h1'] for u,o in seen.items() if o['h1']!=1 and not u.endswith('search.html')}
    assert not {(u,s) for u,o in seen.items() for s in (':::','{target=','{.','#|','show_doc(','<br>','$','](') if s in o['text']}

def test_reference(page, url):
    page.goto(url+'resize/callback.html')
    api = page.locator('section').filter(has=page.locator('> h3', has_text=re.compile(r'^ProgressiveResize\W*$'))).last
    assert 'def ProgressiveResize(' in api.inner_text() and 'until' in api.locator('table').first.inner_text()
    assert page.locator('a[href="#progressiveresize"] code').count()

def test_navigation(page, url):
    page.goto(url)
    groups = page.locator('.sidebar-tree .caption-text').all_inner_texts()
    sidebar = yaml.safe_load((ROOT/'nbs'/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    assert groups==[g['section'] for g in sidebar if isinstance(g, dict)]
    assert [g for g in groups if g.startswith('Tip ')]==[f'Tip {i} · {t}' for i,t in enumerate(TIPS, 1)]
    page.goto(url+'train/schedule.html')
    assert page.locator('.sidebar-tree a.current').count()==2, 'tips 7 and 8'

@pytest.mark.parametrize('scheme', ('http','file'))
def test_search(page, url, scheme):
    page.errors.clear()
    page.goto((url if scheme=='http' else SITE.as_uri()+'/') + 'search.html?q=ProgressiveResize')
    page.wait_for_selector('#search-results li a')
    found = [a.get_attribute('href') for a in page.locator('#search-results li a').all()]
    assert any(h.startswith('resize/callback.html') for h in found[:2]), found
    page.wait_for_timeout(500)
    assert not page.errors and not page.outside
