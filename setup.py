"Metadata from settings.ini, version from the package: each field that pyproject.toml calls dynamic is set here"
import configparser, re
from pathlib import Path
from setuptools import find_packages, setup

cfg = configparser.ConfigParser()
cfg.read('settings.ini')
cfg = cfg['DEFAULT']
version = re.search(r"__version__ = ['\"](.+)['\"]", Path('fastai_tricks/__init__.py').read_text())[1]
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}
# `dev` runs every page, so it takes what the demo takes
extras['dev'] += extras['demo']

setup(
    version=version, description=cfg['description'], author=cfg['author'], author_email=cfg['author_email'],
    license=cfg['license'], keywords=cfg['keywords'].split(),
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3',
                 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=find_packages(include=['fastai_tricks*']), package_data={'fastai_tricks.data': ['*.zip']},
    install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points={'console_scripts': ['fastai-tricks = fastai_tricks.cli:main'], 'nbdev': [f"{cfg['lib_name']} = {cfg['lib_name']}._modidx:d"]})
