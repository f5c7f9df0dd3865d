"""Run tutorials on a folder of photos, in a folder of their own, and save what their cells show

    python tools/run_tutorial.py caltech101 nbs/tutorials/submission.ipynb

The photos are shaped like a competition first: `photos/train` with a folder for each class, `photos/test`,
`photos/sample_submission.csv`, and `photos/solution.csv`, which a competition keeps to itself."""
import base64, io, json, os, random, shutil, subprocess, sys, tempfile
from pathlib import Path

from PIL import Image

# Of Caltech-101: those that one may take for each other
CLASSES = '''chair cougar_body cougar_face crab crayfish crocodile crocodile_head elephant emu ferry flamingo flamingo_head ibis kangaroo ketch
             llama lobster lotus rhino schooner scorpion sunflower water_lilly windsor_chair'''.split()

def competition(src, dest, n_test=8, most=22, least=14, seed=42):
    "The photos as a competition gives them, one of them broken"
    rng,tests = random.Random(seed),[]
    for c in CLASSES:
        files = sorted((src/c).iterdir())
        rng.shuffle(files)
        (dest/'train'/c).mkdir(parents=True)
        for f in files[n_test:n_test+rng.randint(least, most)]: shutil.copy(f, dest/'train'/c/f.name)
        tests += [(f,c) for f in files[:n_test]]
    (dest/'train'/'emu'/'image_0000.jpg').write_text('<html>404 Not Found</html>') # As a download leaves them
    rng.shuffle(tests)
    (dest/'test').mkdir()
    rows = [f'{i:04}.jpg' for i in range(len(tests))]
    for (f,_),r in zip(tests, rows): shutil.copy(f, dest/'test'/r)
    (dest/'sample_submission.csv').write_text('\n'.join(['id,label', *(f'{r},{CLASSES[0]}' for r in rows)]) + '\n')
    (dest/'solution.csv').write_text('\n'.join(['id,label', *(f'{r},{c}' for r,(_,c) in zip(rows, tests))]) + '\n')

def small_pictures(file):
    "Saved pictures in 256 colours, a third of their bytes"
    nb = json.loads(file.read_text(encoding='utf-8'))
    for o in (o for c in nb['cells'] for o in c.get('outputs', []) if 'image/png' in o.get('data', {})):
        png = base64.b64decode(o['data']['image/png'])
        Image.open(io.BytesIO(png)).convert('RGB').quantize(256).save(out := io.BytesIO(), 'PNG', optimize=True)
        if out.tell()<len(png): o['data']['image/png'] = base64.b64encode(out.getvalue()).decode()
    file.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

def main():
    if len(sys.argv)<3: raise SystemExit(__doc__)
    src,*nbs = map(Path, sys.argv[1:])
    for nb in nbs:
        with tempfile.TemporaryDirectory() as d:
            d = Path(d)
            competition(src, d/'photos')
            shutil.copy(nb, d/nb.name)
            # Warnings of other packages would save the paths of this machine into the page
            env = {**os.environ, 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'', 'PYTHONPATH':os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get('PYTHONPATH', '')])}
            subprocess.run([sys.executable, '-m', 'jupyter', 'nbconvert', '--to', 'notebook', '--execute', '--inplace', nb.name], cwd=d, env=env, check=True)
            small_pictures(d/nb.name)
            shutil.copy(d/nb.name, nb)
    subprocess.run([Path(sys.executable).parent/'nbdev-clean'], check=True)

if __name__=='__main__': main()
