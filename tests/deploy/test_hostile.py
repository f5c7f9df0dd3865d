"Files from elsewhere that are not what they say end in one line, soon, and nothing of them runs"
import gzip, json, os, pickle, random, struct, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fastai_tricks import cli
from fastai_tricks.deploy.file import NotOnnx, open_onnx, read_checked, sealed, write_onnx
from fastai_tricks.deploy.wire import check_wire, entries

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from onnx import TensorProto, helper, numpy_helper # noqa: E402

ABOUT = dict(classes=['cat','dog'], size=[32,32], task='classes', versions=dict(fastai_tricks='1'), activation='softmax')

def proto(tensors=(), nodes=None, image=(TensorProto.UINT8, ['b','h','w',3]), out=('probabilities', ['b',2]), inputs=('image',), opsets=(('',18),)):
    "Mean colour to two numbers"
    nodes = nodes if nodes is not None else [
        helper.make_node('Cast', ['image'], ['x'], to=TensorProto.FLOAT), helper.make_node('ReduceMean', ['x','axes'], ['m'], keepdims=0),
        helper.make_node('MatMul', ['m','w'], ['y']), helper.make_node('Softmax', ['y'], ['probabilities'], axis=1)]
    weights = [numpy_helper.from_array(np.array([1,2]), 'axes'), numpy_helper.from_array(np.float32([[0,1],[1,0],[.5,.5]]), 'w')]
    graph = helper.make_graph(nodes, 'g', [helper.make_tensor_value_info(k, *image) for k in inputs], [helper.make_tensor_value_info(out[0], TensorProto.FLOAT, out[1])], [*weights, *tensors])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*o) for o in opsets], ir_version=10)

def save(f, p, **about): return write_onnx(p, f, {k:v for k,v in {**ABOUT, **about}.items() if v is not None})

@pytest.fixture
def sound(tmp_path): return save(tmp_path/'sound.onnx', proto())

def test_sound(sound):
    session,about = open_onnx(sound)
    assert about['classes']==['cat','dog'] and session.run(None, {'image':np.zeros((1,4,5,3), np.uint8)})[0].shape==(1,2)

def external(location=None):
    t = numpy_helper.from_array(np.float32([1]), 'far')
    t.ClearField('raw_data')
    t.data_location = TensorProto.EXTERNAL
    for k,v in (dict(location=location, offset='0', length='4') if location else {}).items():
        e = t.external_data.add()
        e.key,e.value = k,v
    return t

def claims(*dims, data=b'\0'*4):
    t = TensorProto(name='big', data_type=TensorProto.FLOAT, raw_data=data)
    t.dims.extend(dims)
    return t

def sparse():
    values,indices = numpy_helper.from_array(np.float32([1]), 'v'),numpy_helper.from_array(np.array([0]), 'i')
    p = proto()
    p.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**12]))
    return p

def nested(f, sound):
    "Graphs in attributes of nodes, 1,000 deep"
    def entry(field, b):
        n,res = len(b),bytes([field<<3 | 2])
        while n>127: n,res = n>>7,res + bytes([n & 127 | 128])
        return res + bytes([n]) + b
    b = b''
    for _ in range(1000): b = entry(1, entry(5, entry(6, b)))
    f.write_bytes(sealed(b'\x08\x0a' + entry(7, b)))

def in_attribute(t): return proto(nodes=[helper.make_node('Constant', [], ['probabilities'], value=t)])

def text(t): return lambda f, sound: f.write_text(t)
def data(d): return lambda f, sound: f.write_bytes(d)
def cut(share): return lambda f, sound: f.write_bytes(sound[:int(len(sound)*share)])
def of(make, **about): return lambda f, sound: save(f, make(), **about)
def zipped(f, sound):
    import zipfile
    with zipfile.ZipFile(f, 'w') as z: z.writestr('data.pkl', pickle.dumps(Planted(f.with_name('it ran'))))
def program(f, sound): torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(1),)), Path(pt2 := str(f)[:-4]+'pt2')) or os.rename(pt2, f)
def tensors(f, sound):
    head = json.dumps(dict(w=dict(dtype='F32', shape=[1], data_offsets=[0,4]))).encode()
    f.write_bytes(struct.pack('<Q', len(head)) + head + b'\0'*4)
def changed(f, sound):
    b = bytearray(sound)
    b[len(b)//2] ^= 1
    f.write_bytes(b)
def sparse_file(f, sound):
    with open(f, 'wb') as o: o.truncate(2**40)
def junk(f, sound): f.write_bytes(b'\x08' + random.Random(0).randbytes(10**6))
def many_entries(f, sound): f.write_bytes(sealed(sound[:-76] + b'\x30\x01'*5_000_000))
def many_dims(f, sound): save(f, proto([claims(*[1]*200)]))

class Planted:
    def __init__(self, f): self.f = f
    def __reduce__(self): return os.mkdir, (str(self.f),)

FILES = {
    'empty': (data(b''), 'is empty'), 'one byte': (data(b'\x08'), 'not a whole ONNX file: it is cut off'), 'another byte': (data(b'x'), 'is not an ONNX file'),
    **{f'{s} of it': (cut(s), 'it is cut off|no checksum at its end') for s in (.01,.3,.5,.9,.99)},
    'without the checksum': (lambda f, sound: f.write_bytes(sound[:-76]), 'no checksum at its end'),
    'web page': (text('<!DOCTYPE html><html>404'), 'a text, such as a web page'), 'text': (text('hello'), 'is not an ONNX file'), 'json': (text('{"a":1}'), 'is not an ONNX file'),
    'pickle': (lambda f, sound: f.write_bytes(pickle.dumps(Planted(f.with_name('it ran')))), 'it is a pickle'), 'zip with a pickle': (zipped, 'it is a zip file'),
    'torch.save': (lambda f, sound: torch.save(Planted(f.with_name('it ran')), f), 'it is a zip file'), 'pt2': (program, 'it is a zip file'),
    'safetensors': (tensors, 'it is a file of safetensors'), 'jpeg': (lambda f, sound: Image.new('RGB', (9,9)).save(f, 'JPEG'), 'it is a JPEG'),
    'png': (lambda f, sound: Image.new('RGB', (9,9)).save(f, 'PNG'), 'it is a PNG'), 'gzip': (lambda f, sound: f.write_bytes(gzip.compress(sound)), 'a gzip file'),
    'lfs': (text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'), 'a pointer of Git LFS'),
    'changed byte': (changed, 'its checksum does not fit'), 'junk': (junk, 'is refused: |not a whole'), 'a terabyte': (sparse_file, 'more than 2 GB'),
    'not ours': (lambda f, sound: f.write_bytes(proto().SerializeToString()), 'no checksum'), 'no metadata': (lambda f, sound: f.write_bytes(sealed(proto().SerializeToString())), 'does not say its'),
    'outside': (of(lambda: proto([external('../../etc/passwd')])), "weights in another file, which is refused: '../../etc/passwd'"),
    'beside': (of(lambda: proto([external('weights.bin')])), "refused: 'weights.bin'"), 'absolute': (of(lambda: proto([external('/etc/passwd')])), "refused: '/etc/passwd'"),
    'somewhere': (of(lambda: proto([external()])), 'weights in another file'), 'outside, in an attribute': (of(lambda: in_attribute(external('../up'))), "refused: '../up'"),
    'claims 10^12': (of(lambda: proto([claims(10**12)])), 'claim 1000000000000 numbers'), 'claims 10^6 by 10^6': (of(lambda: proto([claims(10**6, 10**6)])), 'claim 1000000000000 numbers'),
    'claims 2^62 three times': (of(lambda: proto([claims(2**62, 2**62, 2**62)])), 'claim'), 'negative': (of(lambda: proto([claims(-1)])), 'a negative size'),
    'claims, in an attribute': (of(lambda: in_attribute(claims(10**12))), 'claim 1000000000000'), 'sparse': (of(sparse), 'sparse weights'), 'nested': (nested, 'nested too deeply'),
    'makes 10^13': (of(lambda: proto(nodes=[helper.make_node('ConstantOfShape', ['n'], ['probabilities'])], tensors=[numpy_helper.from_array(np.array([10**10,1000]), 'n')], out=('probabilities', [10**10,1000]))), 'something else than it says'),
    'many entries': (many_entries, 'more than 1000000 entries'),
    'custom operator': (of(lambda: proto(nodes=[helper.make_node('Run', ['image'], ['probabilities'], domain='evil.ops')], opsets=(('',18),('evil.ops',1)))), 'cannot be opened'),
    'unknown operator': (of(lambda: proto(nodes=[helper.make_node('NoSuchOp', ['image'], ['probabilities'])])), 'cannot be opened'),
    'floats': (of(lambda: proto(nodes=[helper.make_node('Identity', ['image'], ['probabilities'])], image=(TensorProto.FLOAT, ['b',2]))), 'something else than it says'),
    'rank': (of(lambda: proto(image=(TensorProto.UINT8, ['b','h','w','c','d']), nodes=[helper.make_node('Identity', ['w'], ['probabilities'])], out=('probabilities', [3,2]))), 'something else than it says'),
    'two inputs': (of(lambda: proto(inputs=('image','more'))), 'something else than it says'),
    'fewer classes': (of(proto, classes=['cat']), 'something else than it says: classes, 1 names'), 'another output': (of(proto, task='values', classes=[]), 'something else than it says'),
    **{f'metadata {k}={v!r}': (of(proto, **{k:v}), said) for k,v,said in (
        ('classes','cat','cannot be read'), ('classes',{'a':1},'make no sense: classes'), ('classes',[1,2],'make no sense: classes'), ('classes',['a','a'],'make no sense: classes'),
        ('size',[-1,32],'make no sense: size'), ('size',[32],'make no sense: size'), ('size',['a','b'],'make no sense: size'), ('size',None,'does not say its size'), ('task','run','make no sense: task'),
        ('versions',[1],'make no sense: versions'), ('threshold',2,'make no sense: threshold'), ('threshold','NaN','make no sense: threshold'), ('classes','['*100_000,'cannot be read'))}}

@pytest.mark.parametrize('name', FILES)
def test_one_line(name, sound, tmp_path, capfd):
    make,said = FILES[name]
    make(f := tmp_path/'model.onnx', sound.read_bytes())
    began,images = time.process_time(),tmp_path/'images'
    images.mkdir()
    with pytest.raises(NotOnnx, match=said) as e: open_onnx(f)
    assert 'model.onnx' in str(e.value) and '\n' not in str(e.value) and len(str(e.value))<500
    assert time.process_time()-began<3
    with pytest.raises(SystemExit) as e: cli.main(['predict', str(f), str(images)])
    err = capfd.readouterr().err
    assert e.value.code==2 and err.count('\n')==1 and err.startswith('fastai-tricks: error: '), err
    assert not (tmp_path/'it ran').exists()

def test_what_only_running_shows(tmp_path, capfd):
    "40 TB asked for when there is an image"
    n = numpy_helper.from_array(np.array([10**10,1000]), 'n')
    nodes = [helper.make_node('ConstantOfShape', ['n'], ['z']), helper.make_node('MatMul', ['z','z'], ['probabilities'])]
    f = save(tmp_path/'m.onnx', proto([n], nodes))
    Image.new('RGB', (9,9)).save(tmp_path/'a.png')
    with pytest.raises(SystemExit) as e: cli.main(['predict', str(f), str(tmp_path), '--out', str(tmp_path/'o.csv')])
    err = capfd.readouterr().err
    assert e.value.code==2 and err.startswith('fastai-tricks: error: ') and err.count('\n')==1 and not (tmp_path/'o.csv').exists(), err

@pytest.mark.parametrize('name', ['folder','fifo','device','nothing','link to a device','link to itself'])
def test_what_is_no_file(name, tmp_path):
    f = tmp_path/'model.onnx'
    if name=='folder': f.mkdir()
    if name=='fifo': os.mkfifo(f) # Opening it would wait for ever
    if name=='device': f = Path('/dev/zero')
    if name=='link to a device': f.symlink_to('/dev/zero')
    if name=='link to itself': f.symlink_to(f)
    with pytest.raises(NotOnnx, match='is not a file'): open_onnx(f)

def test_weights_may_read_like_anything(tmp_path):
    "What is found by walking is no accident of bytes"
    t = numpy_helper.from_array(np.frombuffer(b'external_data j\x08location\n\x08location../../etc/passwd....', np.uint8).copy(), 'odd')
    assert open_onnx(save(tmp_path/'m.onnx', proto([t])))[1]['task']=='classes'

def test_no_cut_passes(sound):
    "Wherever it ends"
    whole = sound.read_bytes()
    for n in range(len(whole)):
        sound.write_bytes(whole[:n])
        with pytest.raises(NotOnnx): read_checked(sound)

def test_any_bytes(tmp_path):
    "Walking ends for whatever bytes, with an error of one kind or none"
    rng,whole = random.Random(0),proto([claims(1)]).SerializeToString()
    for i in range(3000):
        b = bytearray(whole if i%2 else rng.randbytes(60))
        for _ in range(rng.randint(1, 5)): b[rng.randrange(len(b))] = rng.randrange(256)
        try: check_wire(bytes(b))
        except ValueError: pass

def test_walk_agrees_with_onnx(sound):
    "Field by field what the package reads"
    p = onnx.load(sound)
    b = sound.read_bytes()
    got = [(f,v if isinstance(v, int) else b[slice(*v)]) for f,v in entries(b)]
    assert [v for f,v in got if f==1]==[p.ir_version] and [v for f,v in got if f==7]==[p.graph.SerializeToString()]
    assert sum(f==14 for f,_ in got)==len(p.metadata_props)

def test_a_program_of_pytorch_may_run_code(tmp_path):
    "What the page says of .pt2, so that it is not said of more versions than it is true of"
    import zipfile
    f,evil = tmp_path/'m.pt2',tmp_path/'evil.pt2'
    torch.export.save(torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(1,1),)), f)
    with zipfile.ZipFile(f) as z: names = z.namelist()
    config = next((n for n in names if n.endswith('weights_config.json')), None)
    if config is None: pytest.skip('another format')
    with zipfile.ZipFile(f) as z, zipfile.ZipFile(evil, 'w') as to:
        for n in names:
            b = z.read(n)
            if n==config:
                d = json.loads(b)
                next(iter(d['config'].values()))['use_pickle'] = True
                b = json.dumps(d).encode()
            elif n.endswith('/weight_0'):
                torch.save(Planted(tmp_path/'it ran'), tmp_path/'w')
                b = (tmp_path/'w').read_bytes()
            to.writestr(n, b)
    try: torch.export.load(evil)
    except Exception: pass
    assert (tmp_path/'it ran').exists()
