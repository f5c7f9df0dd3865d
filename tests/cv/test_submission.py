"`write_submission` against sample files in the forms Kaggle gives out"
import os
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from fastai_tricks.cv.submission import all_columns, Cells, plan_submission, submission_ids as ids_of, top_labels, write_planned, write_submission

BREEDS = ['affenpinscher','afghan_hound','basenji']
IDS = ['000621fb3cbb32d8935728e48679680e','00102ee9d8eb90812350685311fe5890','0012a730dfa437f5f3613fb75efcd4ce','001510bc8570bbeee98c8d80c8a95ec1']
P = torch.tensor([[.7,.2,.1],[.1,.6,.3],[.2,.3,.5],[.34,.33,.33]])

def sample(path, text): # A file
    path.write_text(text)
    return path

def test_a_column_a_class(tmp_path):
    "Dog Breed Identification: columns in an order of their own, ids in another"
    s = sample(tmp_path/'sample_submission.csv', 'id,basenji,affenpinscher,afghan_hound\n' + ''.join(f'{i},0.33,0.33,0.33\n' for i in IDS[::-1]))
    df = pd.read_csv(write_submission(P, IDS, BREEDS, tmp_path/'out'/'s.csv', sample=s))
    assert list(df.columns)==['id','basenji','affenpinscher','afghan_hound'] and df.id.tolist()==IDS[::-1]
    assert np.allclose(df[BREEDS].to_numpy()[::-1], P.numpy())
    assert write_submission(P, IDS, BREEDS, tmp_path/'t.csv', sample=s, topk=None).read_text()==(tmp_path/'out'/'s.csv').read_text()
    with pytest.raises(ValueError, match='must be left out where `sample` has a column for each class'): write_submission(P, IDS, BREEDS, tmp_path/'n.csv', sample=s, topk=2)
    with pytest.raises(ValueError, match="columns without a class: 'basenji'"): write_submission(P[:,:2], IDS, BREEDS[:2], tmp_path/'n.csv', sample=s)
    with pytest.raises(ValueError, match="classes without a column: 'cat'"): write_submission(torch.rand(4,4), IDS, [*BREEDS,'cat'], tmp_path/'n.csv', sample=s)

def test_one_label_and_ids_with_zeros(tmp_path):
    "Cassava and its like: one label, here a number; ids that a table would take for numbers"
    s = sample(tmp_path/'s.csv', 'image_id,label\n007,4\n0010,4\nNA,4\n')
    out = write_submission(P[:3], ['NA','007','0010'], [0,1,2], tmp_path/'o.csv', sample=s)
    assert out.read_text()=='image_id,label\n007,1\n0010,2\nNA,0\n'

def test_top_five_with_new_individual(tmp_path):
    "Humpback Whale, Happywhale: five labels, `new_individual` where the others are unlikely"
    vocab,p = [f'w_{i}' for i in range(6)],torch.tensor([[.5,.3,.1,.06,.03,.01],[.9,.05,.02,.01,.01,.01],[.2,.18,.17,.16,.15,.14]])
    s = sample(tmp_path/'s.csv', 'image,predictions\n' + ''.join(f'{c}.jpg,37c7aba965a5 114207cab555 a6e325d8e924 19fbb960f07d c995c043c353\n' for c in 'abc'))
    lines = write_submission(p, ['a.jpg','b.jpg','c.jpg'], vocab, tmp_path/'o.csv', sample=s, topk=5, threshold=.25, other='new_individual').read_text().splitlines()
    assert lines==['image,predictions','a.jpg,w_0 w_1 new_individual w_2 w_3','b.jpg,w_0 new_individual w_1 w_2 w_3','c.jpg,new_individual w_0 w_1 w_2 w_3']
    one = write_submission(p, ['a.jpg','b.jpg','c.jpg'], vocab, tmp_path/'o.csv', threshold=.25, other='new_individual').read_text().splitlines()
    assert one==['id,label','a.jpg,w_0','b.jpg,w_0','c.jpg,new_individual']

def test_several_labels(tmp_path):
    "Plant Pathology 2021: all labels that apply, separated by spaces; HPA: by |"
    s = sample(tmp_path/'s.csv', 'image,labels\nx.jpg,healthy\ny.jpg,healthy\nz.jpg,healthy\n')
    p = torch.tensor([[.9,.8,.1],[.1,.2,.3],[.5,.1,.6]])
    assert write_submission(p, ['x.jpg','y.jpg','z.jpg'], ['rust','scab','rot'], tmp_path/'o.csv', sample=s, threshold=.5).read_text()=='image,labels\nx.jpg,rust scab\ny.jpg,\nz.jpg,rot rust\n'
    assert write_submission(p, ['x.jpg','y.jpg','z.jpg'], ['rust','scab','rot'], tmp_path/'o.csv', sample=s, threshold=.5, topk=None, other='healthy', sep='|').read_text()=='image,labels\nx.jpg,rust|scab\ny.jpg,healthy\nz.jpg,rot|rust\n'
    assert write_submission(p, ['x.jpg','y.jpg','z.jpg'], ['rust','scab','rot'], tmp_path/'o.csv', threshold=.5, topk=2, other=None).read_text().splitlines()[1]=='x.jpg,rust scab'

@pytest.mark.parametrize('change,said', [
    (dict(ids=IDS[:3]), r'of shape \(3,3\)'), (dict(vocab=BREEDS[:2]), r'of shape \(4,2\)'), (dict(ids=[*IDS[:3],IDS[0]]), f"not '{IDS[0]}' twice"), (dict(vocab=['a','a','b']), "not 'a' twice"),
    (dict(preds=torch.full((4,3), float('nan'))), f"NaN or infinite as for '{IDS[0]}'.*and 1 more"), (dict(preds=P/0), 'must be finite'), (dict(topk=0), '`topk` must be 1 to 3'), (dict(topk=4), '`topk` must be'), (dict(topk=True), '`topk` must be'),
    (dict(threshold=2), r'`threshold` must be a probability'), (dict(other='new'), '`other` must be left out where there is no `threshold`'), (dict(preds=P*3, threshold=.5), r'`preds` must be probabilities in \[0,1\]'), (dict(preds=(P,P)), r'take the first, \[0\]'), (dict(sep=None), '`sep` must be'), (dict(path='s.csv.gz'), 'not compressed'), (dict(path='.'), 'no folder'), (dict(threshold=.5, other='basenji'), '`other` must be none of `vocab`'),
    (dict(vocab=['a b','c','d'], topk=2), "`sep` must be in none of the classes, not ' ' as in 'a b'"), (dict(sample=pd.DataFrame(dict(id=IDS))), 'at least one more'),
    (dict(sample=pd.DataFrame(dict(id=[*IDS[:3],IDS[2]], label=''))), f"`sample` must name each id once, not '{IDS[2]}' twice"),
    (dict(sample=pd.DataFrame(dict(id=[*IDS[:2],'x','y'], label=''))), "2 of the sample are missing: 'x', 'y'; 2 are not in the sample")])
def test_what_is_wrong_raises_and_leaves_the_old_file(tmp_path, change, said):
    file = write_submission(P, IDS, BREEDS, tmp_path/'s.csv')
    was = file.read_bytes()
    with pytest.raises(ValueError, match=said): write_submission(**{**dict(preds=P, ids=IDS, vocab=BREEDS, path=file), **change})
    assert file.read_bytes()==was and os.listdir(tmp_path)==['s.csv']

def test_whole_or_not_at_all(tmp_path, monkeypatch):
    file = write_submission(P, IDS, BREEDS, tmp_path/'s.csv')
    was = file.read_bytes()
    def full(*args): raise OSError('disk full')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError): write_submission(1-P, IDS, BREEDS, file)
    assert file.read_bytes()==was

def test_a_label_with_comma_and_quote_comes_back(tmp_path):
    vocab = ['a,b','say "x"','é']
    assert pd.read_csv(write_submission(P[:3], list('123'), vocab, tmp_path/'s.csv')).label.tolist()==[vocab[i] for i in P[:3].argmax(1)]

@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_order_gives_the_same_file(tmp_path_factory, data):
    n = data.draw(st.integers(1, 8))
    perm,wanted = data.draw(st.permutations(range(n))),data.draw(st.permutations(range(n)))
    p,ids = np.random.default_rng(n).random((n,4)),[f'i{i}' for i in range(n)]
    s = pd.DataFrame(dict(image=[ids[i] for i in wanted], label=''))
    d = tmp_path_factory.getbasetemp()
    a = write_submission(p, ids, list('wxyz'), d/'a.csv', sample=s, topk=2).read_text()
    b = write_submission(p[list(perm)], [ids[i] for i in perm], list('wxyz'), d/'b.csv', sample=s, topk=2).read_text()
    assert a==b and a.splitlines()[1:]==[f"{ids[i]},{' '.join(top_labels(p[i], 'wxyz', 2))}" for i in wanted]

def test_ids_of_test_items():
    df = pd.DataFrame(dict(n=[1,2], image=['a','b']))
    assert ids_of(df)==['1','2'] and ids_of(df, pd.DataFrame(dict(image=['b','a'], label='')))==['a','b']
    assert ids_of(['x/a.png'], pd.DataFrame(dict(i=['a.png'], l='')))==['a.png'] and ids_of([Path('x/a.png')], pd.DataFrame(dict(i=['a'], l='')))==['a']

def test_items_in_the_place_of_ids(tmp_path):
    s = pd.DataFrame(dict(image=['b','a'], label=''))
    for ids in ([Path('x/a.png'),Path('x/b.png')], pd.DataFrame(dict(n=[1,2], image=['a','b']))):
        assert write_submission(P[:2], ids, BREEDS, tmp_path/'s.csv', sample=s).read_text()=='image,label\nb,afghan_hound\na,affenpinscher\n'
        assert write_submission(P[:2], iter(['b','a']), BREEDS, tmp_path/'s.csv', sample=s).read_text()=='image,label\nb,affenpinscher\na,afghan_hound\n'
    # Texts are ids as they are
    assert write_submission(P[:1], ['x/a.png'], BREEDS, tmp_path/'s.csv').read_text().splitlines()[1]=='x/a.png,affenpinscher'

def test_a_plan_is_all_but_the_predictions(tmp_path):
    plan = plan_submission(IDS, BREEDS, cells=Cells(topk=2, sep='|'))
    assert (plan.header,plan.ids,plan.order,plan.columns,str(plan))==(['id','label'],IDS,[0,1,2,3],None,'4 rows of id and label')
    assert plan.cells_of(np.array([.1,.7,.2]))==['afghan_hound|basenji']
    assert write_planned(plan, P, tmp_path/'a.csv').read_text()==write_submission(P, IDS, BREEDS, tmp_path/'b.csv', topk=2, sep='|').read_text()
    assert plan_submission(IDS, BREEDS, cells=Cells(topk=None)).header==['id',*BREEDS]

# What is silent elsewhere ------------------------------------------------------

def test_classes_are_compared_as_text():
    p = torch.tensor([[.7,.3],[.4,.6]])
    assert torch.equal(all_columns(p, [2,0], ['0','1','2']), torch.tensor([[.3,0,.7],[.6,0,.4]]))
    assert torch.equal(all_columns(p, ['#na#','b'], ['a','b']), torch.tensor([[0,.3],[0,.6]]))
    with pytest.raises(ValueError, match="`vocab` must be classes of which some are in `full`, 'a', 'b'"): all_columns(p, [0,1], ['a','b'])
    with pytest.raises(ValueError, match="not '1' twice"): all_columns(p, [0,1], [0,1,'1'])

@pytest.mark.parametrize('dtype', [torch.float64,torch.float32,torch.float16,torch.bfloat16])
def test_any_precision(tmp_path, dtype):
    full = all_columns(P.to(dtype), BREEDS, [*BREEDS,'cat'])
    assert full.dtype==dtype and full.shape==(4,4)
    df = pd.read_csv(write_submission(full, IDS, [*BREEDS,'cat'], tmp_path/'s.csv', topk=None))
    assert np.allclose(df[BREEDS], P, atol=4e-3) and not df['cat'].any()

@pytest.mark.parametrize('bad', [None,float('nan'),np.nan,pd.NA,pd.NaT])
def test_ids_that_are_none_are_refused(tmp_path, bad):
    df = pd.DataFrame(dict(image=[*IDS[:3],bad]))
    for ids in ([*IDS[:3],bad], df):
        with pytest.raises(ValueError, match='`ids` must name each item, not None or NaN as at 3'): write_submission(P, ids, BREEDS, tmp_path/'s.csv')
    with pytest.raises(ValueError, match='`sample` must name each item'): write_submission(P, IDS, BREEDS, tmp_path/'s.csv', sample=df.assign(label=''))
    assert not list(tmp_path.iterdir())

def test_a_link_is_written_through_and_names_may_be_as_long_as_the_disk_allows(tmp_path):
    (tmp_path/'to').mkdir()
    (tmp_path/'s.csv').symlink_to(tmp_path/'to'/'real.csv')
    for _ in range(2): write_submission(P, IDS, BREEDS, tmp_path/'s.csv')
    assert (tmp_path/'s.csv').is_symlink() and (tmp_path/'to'/'real.csv').read_text().startswith('id,label')
    name = 'n'*251 + '.csv'
    write_submission(P, IDS, BREEDS, tmp_path/name)
    assert sorted(os.listdir(tmp_path))==sorted(['to','s.csv',name])
