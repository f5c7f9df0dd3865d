"""A folder of wheels to upload to Kaggle as a data set: this package, and what it needs beyond Kaggle's image (`kaggle_image` in settings.ini)

    python tools/kaggle.py dist/kaggle"""
import shutil, subprocess, sys, zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from versions import ROOT, kaggle, settings

# The weights of one network, for a notebook without internet
EXTRAS = 'demo','albumentations','distributed'

def lacks(req, image):
    "Does an image without this requirement need a wheel? An image with another version of it must not be changed"
    name = canonicalize_name(req.name)
    if name not in image: return True
    if req.specifier.contains(image[name]): return False
    raise SystemExit(f'{req} is required, and the image has {image[name]}: installing it would change what other packages there need')

def needs(wheel, extras=()):
    "What a wheel requires"
    with zipfile.ZipFile(wheel) as z: text = z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA'))).decode()
    python = settings()['kaggle_python']
    envs = [dict(extra=e, python_version=python, python_full_version=f'{python}.0') for e in ('',*extras)]
    reqs = map(Requirement, Parser().parsestr(text).get_all('Requires-Dist', []))
    return [r for r in reqs if not r.marker or any(map(r.marker.evaluate, envs))]

def build(folder):
    "The wheel of this package"
    subprocess.run([sys.executable, '-m', 'build', '--wheel', '--outdir', folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob('fastai_tricks-*.whl'))

def fetch(req, folder):
    "The wheel of a requirement, for the image's Python"
    was = set(folder.glob('*.whl'))
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary', ':all:', '--python-version', settings()['kaggle_python'],
                    '-d', folder, f'{req.name}{req.specifier}'], check=True)
    return (set(folder.glob('*.whl'))-was).pop()

def fill(folder):
    "Wheels until nothing is lacking"
    image = {canonicalize_name(r.name):next(iter(r.specifier)).version for r in map(Requirement, kaggle(settings()))}
    left = needs(build(folder), EXTRAS)
    while left:
        req = left.pop()
        if not lacks(req, image): continue
        wheel = fetch(req, folder)
        image[canonicalize_name(req.name)] = wheel.name.split('-')[1]
        left += needs(wheel)

def main():
    if len(sys.argv)!=2: raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fill(folder)
    for f in sorted(folder.iterdir()): print(f'{f.stat().st_size/1e6:5.1f} MB {f}')

if __name__=='__main__': main()
