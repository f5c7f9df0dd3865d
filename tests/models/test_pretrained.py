"Whether pretrained weights can be had: from a cache without a network, with one, or not"
import socket, time
from pathlib import Path
import pytest, timm, torch, torchvision
from huggingface_hub import constants
from safetensors.torch import save_file
from fastai_tricks.models import pretrained
from fastai_tricks.models.pretrained import check_weights, fetch_pretrained, offline_hub, unreachable

@pytest.fixture
def tried(tmp_path, monkeypatch):
    "Empty caches, no network; what was to be connected to"
    seen = []
    def refused(at, *args):
        seen.append(at)
        raise ConnectionRefusedError(111, 'refused')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path/'torch'))
    monkeypatch.setattr(socket, 'create_connection', refused)
    for k in ('https_proxy','HTTPS_PROXY','all_proxy','ALL_PROXY','no_proxy','NO_PROXY'): monkeypatch.delenv(k, raising=False)
    return seen

def put_in_hub(folder, name, junk=False):
    "The weights of a network of timm, as the client of the hub keeps them"
    torch.manual_seed(1)
    cfg,model = timm.get_pretrained_cfg(name),timm.create_model(name)
    repo = Path(folder)/f"models--{cfg.hf_hub_id.replace('/','--')}"
    (repo/'refs').mkdir(parents=True)
    (repo/'refs'/'main').write_text('a'*40)
    (snap := repo/'snapshots'/('a'*40)).mkdir(parents=True)
    if junk: (snap/'model.safetensors').write_text('junk')
    else: save_file({k:v.contiguous() for k,v in model.state_dict().items()}, snap/'model.safetensors')
    return model

def test_cached_by_the_hub(tried):
    kept = put_in_hub(constants.HF_HUB_CACHE, 'test_resnet')
    began,state = time.monotonic(),torch.get_rng_state()
    fetch_pretrained('test_resnet')
    assert not tried and time.monotonic()-began<5 and not constants.HF_HUB_OFFLINE and torch.equal(state, torch.get_rng_state())
    with offline_hub(): model = timm.create_model('test_resnet', pretrained=True, num_classes=0)
    assert torch.equal(next(model.parameters()), next(kept.parameters()))

def test_damaged_in_the_cache(tried):
    put_in_hub(constants.HF_HUB_CACHE, 'test_resnet', junk=True)
    with pytest.raises(ValueError, match="weights of 'test_resnet' cannot be fetched or read"): fetch_pretrained('test_resnet')
    assert not tried

@pytest.mark.parametrize('arch,host', [
    ('test_resnet','huggingface.co'), ('gcvit_xxtiny','github.com'), (torchvision.models.alexnet,'download.pytorch.org')])
def test_neither_cached_nor_reachable(tried, monkeypatch, arch, host):
    monkeypatch.setattr(constants, 'ENDPOINT', 'https://huggingface.co')
    monkeypatch.setattr(pretrained, '_fetch', lambda *args: pytest.fail('fetched'))
    why = rf'not in the cache, and cannot be fetched \(no connection to {host}: refused\)'
    with pytest.raises(ValueError, match=why): fetch_pretrained(arch)
    assert tried==[(host,443)]

def test_offline_by_the_environment(tried, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(ValueError, match='HF_HUB_OFFLINE is set'): fetch_pretrained('test_resnet')
    put_in_hub(constants.HF_HUB_CACHE, 'test_resnet')
    fetch_pretrained('test_resnet')
    assert not tried and constants.HF_HUB_OFFLINE

def test_cached_by_torch(tried):
    model = torchvision.models.squeezenet1_1()
    (folder := Path(torch.hub.get_dir())/'checkpoints').mkdir(parents=True)
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    torch.save(model.state_dict(), folder/url.rsplit('/', 1)[1])
    fetch_pretrained(torchvision.models.squeezenet1_1)
    assert not tried

def test_reachable_is_fetched(tried, monkeypatch):
    seen = []
    monkeypatch.setattr(socket, 'create_connection', lambda *args: socket.socket())
    monkeypatch.setattr(pretrained, '_fetch', lambda arch, cached: seen.append((arch,cached)))
    fetch_pretrained('test_resnet')
    assert seen==[('test_resnet',False)]
    def fails(*args): raise OSError('the page\nis gone')
    monkeypatch.setattr(pretrained, '_fetch', fails)
    with pytest.raises(ValueError, match=r'cannot be fetched or read \(OSError: the page is gone\)'): fetch_pretrained('test_resnet')

def test_without_weights():
    with pytest.raises(ValueError, match="timm has no pretrained weights of 'coatnet_0_224'"): fetch_pretrained('coatnet_0_224')

@pytest.mark.parametrize('proxy,at', [('http://box:3128',('box',3128)), ('box:3128',('box',3128)), ('http://box',('box',80)), ('https://box',('box',443))])
def test_behind_a_proxy(tried, monkeypatch, proxy, at):
    monkeypatch.setenv('https_proxy', proxy)
    assert unreachable('https://huggingface.co')=='no connection to box: refused' and tried==[at]
    monkeypatch.setenv('no_proxy', 'huggingface.co')
    assert unreachable('https://huggingface.co') and tried[1:]==[('huggingface.co',443)]

def test_no_answer(monkeypatch):
    def slow(*args):
        time.sleep(2)
        return socket.socket()
    monkeypatch.setattr(socket, 'create_connection', slow)
    began = time.monotonic()
    assert unreachable('https://huggingface.co', .2)=='no answer from huggingface.co within 0.2 seconds' and time.monotonic()-began<1

@pytest.mark.parametrize('classes', [1000,7])
def test_file_of_weights(tmp_path, classes):
    model = timm.create_model('test_resnet', num_classes=classes)
    torch.save(model.state_dict(), file := tmp_path/'w.pth')
    state = torch.get_rng_state()
    check_weights('test_resnet', file)
    assert torch.equal(state, torch.get_rng_state())

def test_file_that_is_not(tmp_path):
    state = timm.create_model('test_resnet').state_dict()
    torch.save({f'encoder.{k}':v for k,v in state.items()}, other := tmp_path/'other.pth')
    with pytest.raises(ValueError, match="other.pth' holds 0 of the [0-9]+ weights of 'test_resnet'"): check_weights('test_resnet', other)
    (junk := tmp_path/'junk.pth').write_text('junk')
    for f in (junk,tmp_path/'no.pth'):
        with pytest.raises(ValueError, match="cannot be read as weights of 'test_resnet'") as e: check_weights('test_resnet', f)
        assert '\n' not in str(e.value)
