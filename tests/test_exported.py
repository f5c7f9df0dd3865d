"What an exported Learner needs where it is loaded: the names of this package in the file, and what the tutorial says of them"
import json, pickletools, re, zipfile
from pathlib import Path
import pytest
from together import here, images, TRICKS, use

# Their own code is named in what `Learner.export` writes, until they are taken off
NEEDED = set('''PILImageDraft albu_transforms ProgressiveResize to_mixed CompiledTraining ChannelsLastBatch to_depthwise Distill EMA WatchCAM background_metrics
                grow_head'''.split())
PAGE = Path(__file__).resolve().parents[1]/'nbs'/'tutorials'/'kaggle.ipynb'

@pytest.fixture(scope='module')
def photos(tmp_path_factory): return images(tmp_path_factory.mktemp('photos'))

def names_in(file):
    "Modules of this package that a pickle asks for"
    with zipfile.ZipFile(file) as z: ops = list(pickletools.genops(z.read(next(n for n in z.namelist() if n.endswith('data.pkl')))))
    texts = [a for _,a,_ in ops if isinstance(a, str)]
    return {t.split(' ')[0] for t in texts if t.startswith('fastai_tricks.')}

@pytest.mark.parametrize('name', [o for o in TRICKS if here(o)])
def test_names_in_the_file(name, photos, tmp_path):
    learn = use((name,), photos, tmp_path).learn
    for m in learn.model.modules(): m._forward_hooks.clear() # Which the test hung in
    learn.path = tmp_path
    learn.export('l.pkl')
    assert bool(names_in(tmp_path/'l.pkl'))==(name in NEEDED)

def test_tutorial_says_so():
    text = next(s for c in json.loads(PAGE.read_text(encoding='utf-8'))['cells'] if '## Submit' in (s := ''.join(c['source'])))
    need,none = re.search(r'These need .*?: (.*?)\. These leave .*?: (.*?)\. ', text).groups()
    def named(s): return set(re.findall(r'`(\w+)`', s))
    ours = {o for o in TRICKS if here(o) and TRICKS[o].page}
    assert (named(need),named(none))==(NEEDED & ours,ours-NEEDED)
