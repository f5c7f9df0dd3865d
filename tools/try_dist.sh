#!/usr/bin/env bash
# Install the wheel of dist/ in a new environment, which is deleted in the end, and use it from outside the clone
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONWARNINGS=ignore MPLBACKEND=agg
wheel=("$PWD"/dist/*.whl)
[ ${#wheel[@]} = 1 ] || { echo "dist/ must hold one wheel, not ${#wheel[@]}: delete it and build anew"; exit 1; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q "${wheel[0]}[demo]"
cd "$dir"
unset PYTHONPATH
env/bin/fastai-tricks --help
# The first example of the README, the beginning of an epoch of it
env/bin/python - <<'PY'
from fastai.vision.all import *
from fastai_tricks.all import *
import fastai_tricks
from importlib.metadata import version
print('fastai_tricks', version('fastai_tricks'), 'is installed' if 'site-packages' in fastai_tricks.__file__ else f'comes from {fastai_tricks.__file__}')
path = sample_images()
dls = ImageDataLoaders.from_folder(path, valid_pct=.2, seed=1, item_tfms=Resize(64), batch_tfms=aug_transforms(), num_workers=0)
# The weights that come with the extra, instead of a download
learn = vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=dict(file=str(lite0_weights())), metrics=accuracy)
with learn.no_bar(): learn.fit_fast(1, cbs=ShortEpochCallback(.05))
preds, _ = learn.get_preds(dl=learn.dls.test_dl(get_image_files(path)[:4], num_workers=0))
assert preds.shape==(4, dls.c)
PY
echo 'The wheel works'
