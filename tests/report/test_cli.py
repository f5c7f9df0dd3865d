"The command: the same as `tips_report`, on a folder or a CSV"
import numpy as np, pandas as pd, pytest
from fastai.vision.core import PILImage
from fastai_tricks import cli
from report_world import Pretend, bench, clock

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp('photos')
    for k in 'ab':
        (root/k).mkdir()
        for i in range(20): PILImage.create(np.random.default_rng(i).integers(0, 255, (40,40,3), dtype=np.uint8)).save(root/k/f'{i}.jpg')
    pd.DataFrame([(f'{k}/{i}.jpg', k) for k in 'ab' for i in range(20)], columns=['file','kind']).to_csv(root/'all.csv', index=False)
    return root

def half_a_second_per_image(self):
    clock.spend(.5*len(self.xb[0]))
    self.images += len(self.xb[0])

@pytest.mark.parametrize('csv', [False,True])
def test_command(tmp_path, photos, capsys, monkeypatch, csv):
    args = ['report', str(photos), '--arch', 'test_resnet', '--scratch', '--minutes', '3', '--seeds', '1', '--size', '32', '--bs', '4', '--tips', 'warmup', '--num-workers', '0', '--out', str(tmp_path/'out')]
    if csv: # Nothing is trained
        p = Pretend()
        monkeypatch.setattr(bench.Bench, 'train', lambda self, *args, **kwargs: p(*args, **kwargs))
        args += ['--csv', str(photos/'all.csv'), '--fn-col', 'file', '--label-col', 'kind', '--minutes', '5']
    else: monkeypatch.setattr(bench.TrainClock, 'after_batch', half_a_second_per_image)
    cli.main(args)
    out = capsys.readouterr().out
    assert (tmp_path/'out'/'report.html').exists() and 'warmup' in out and 'too few seeds' in out
    code = out[out.index('from fastai.vision.all import *'):out.rindex('learn.f')] # Without the fit
    names = {}
    exec(code, names)
    assert (len(names['dls'].train_ds), len(names['dls'].valid_ds), names['dls'].vocab)==(32, 8, ['a','b'])

def test_command_says_what_is_wrong(tmp_path, photos, capsys):
    for args,what in ((['no/such'], 'PATH must be a folder'), ([str(photos), '--csv', 'no.csv'], '--csv must be'), ([str(photos), '--csv', str(photos/'all.csv')], "no column 'image'"),
                      ([str(photos), '--arch', 'nonet', '--out', str(tmp_path/'x')], '`arch`'), ([str(photos), '--lr', '-1', '--out', str(tmp_path/'x')], '`lr`')):
        with pytest.raises(SystemExit) as e: cli.main(['report', *args])
        assert e.value.code==2 and what in capsys.readouterr().err

def test_defaults_of_the_command(photos, monkeypatch):
    seen = {}
    class Done(Exception): pass
    def fake(*args, **kwargs):
        seen.update(args=args, **kwargs)
        raise Done
    monkeypatch.setattr(cli, 'tips_report', fake)
    with pytest.raises(Done): cli.main(['report', str(photos), '--restart', '--lr', '.01', '--weights', 'w.pth'])
    assert seen['args'][1:]==(photos,'resnet34',20,'all',3) and seen['bs'] is None and seen['pretrained_cfg_overlay']==dict(file='w.pth')
    assert (seen['options'].lr,seen['options'].resume,seen['options'].data)==(.01,False,{})
