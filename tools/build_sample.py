"""Build the sample image data set: `python tools/build_sample.py SRC_DIR OUT_ZIP`

Source:  Debian package openclipart-png, version 1:0.18+dfsg-19 (the Open Clip Art Library, 0.18)
Licence: public domain (Creative Commons public domain dedication; see its debian/copyright)
Get it:  apt-get download openclipart-png=1:0.18+dfsg-19
         dpkg-deb -x openclipart-png_*.deb SRC_DIR
Needs:   pip install Pillow==13.0.0 ImageHash==4.3.2

Every picture is sorted into a class by the patterns of CLASSES, cropped to its drawing, shrunk
(never enlarged) to a short side of SIDE px with a ratio of at most 2, and dropped when nearly the
same as one already kept (see `same`). At most CAP a class are drawn with a fixed seed. The
PNGs have a palette whose RGB is the drawing over white, with the source's alpha (as a mask, all or nothing) beside it: so
`convert('RGB')` gives the drawing on white, and `convert('RGBA')` its mask. Same input and
versions, same bytes out.
"""
import io, random, sys, zipfile
from fnmatch import fnmatchcase
from pathlib import Path

import imagehash, numpy as np
from PIL import Image, ImageChops

SIDE, CAP, MIN, COLORS, SEED = 160, 30, 18, 64, 42
MAX_PIXELS, MIN_INK, MIN_ALPHA = 16_000_000, 11, 40  # a source's size; how far from white an image is on average; what's not transparent
MAX_HASH, MAX_THUMB, MAX_BOTH = 10, 10, 30  # see `same`

# class: patterns of the path below .../openclipart/png (`*` crosses folders); the first class that fits wins
CLASSES = {
    'stickmen': 'people/stickmen/* recreation/sports/sport_[HKMPps]* people/man0* people/woman0* people/dance*',
    'clothing': 'people/clothing/* food/toque* unsorted/vestito* unsorted/calzettoni* unsorted/borsetta* unsorted/guanti* unsorted/fiocco*',
    'body_parts': 'people/bodypart/* people/*eye* people/lips* shapes/red_lips* computer/icons/point* computer/point* signs_and_symbols/eye*',
    'faces': 'people/head* people/*girl_dirk* people/bach* people/beeth* people/handel* people/einst* people/maya* people/profile* '
             'people/cm1* people/man_face* people/man_chris* people/self_port* people/brozo* people/silvia* unsorted/ragazza_r* unsorted/signorina*',
    'people': 'people/* unsorted/carp* unsorted/princ* unsorted/trasl* unsorted/imb* unsorted/giard* unsorted/pesist* unsorted/donna*',
    'birds': 'animals/birds/* unsorted/colombo* unsorted/pinguino* unsorted/papera* unsorted/gabb* unsorted/struzzo* unsorted/anatra*',
    'bugs': 'animals/bugs/[!vc]* animals/bugs/c[!r]* animals/mosq* animals/scorp* unsorted/ape_*',
    'reptiles': 'animals/dinosaurs/* animals/*lucert* animals/az-liz* animals/lizard* animals/ramarro* animals/rana* animals/red-eye* animals/turtle* animals/lindworm* animals/amph*',
    'cats': 'animals/mammals/big_cats/* animals/mammals/housecats/* animals/mammals/*cat_* unsorted/set_gatti*',
    'mammals': 'animals/mammals/* unsorted/elefant* unsorted/cammello* unsorted/mucca* unsorted/pecor*',
    'houses': 'buildings/homes/* buildings/c*_* buildings/f*_* buildings/u* buildings/big* computer/home* computer/residential* unsorted/fattoria* unsorted/condom* unsorted/grattac*',
    'folders': 'computer/folders/* computer/icons/plastik* office/folder* office/dossier*',
    'hotel_signs': 'computer/icons/hotel_icon*',
    'phones': 'office/telephone/* office/*phone* computer/*phone* computer/pda* electronics/sony*',
    'computers': 'computer/hardware/* computer/network/* computer/connectors/* computer/*etiquette_* computer/crt* computer/server* computer/switch* computer/*port* '
                 'computer/router* computer/tft* computer/thin* computer/webcam* computer/pc_sp* computer/mouse_the* computer/icons/notebook*',
    'books_paper': 'education/books/* education/note* education/paper_* office/paper* office/note* office/parch* office/cert* education/cert* unsorted/blocco_n*',
    'stationery': 'education/[!s]* education/s[ct]* office/pen* office/scotch* office/pinz* office/punt* office/eraser* office/blue_st* unsorted/pinz* unsorted/tavolozza*',
    'drinks': 'food/beverages/* office/cup* unsorted/biberon*',
    'desserts': 'food/desserts/* unsorted/cornetto* food/cake* food/candied*',
    'fruit': 'food/fruit/* food/apple*',
    'meals': 'food/* unsorted/tramezz* unsorted/tacch*',
    'flowers': 'plants/flowers/* unsorted/ros[ae]* unsorted/van_gogh* computer/icons/lotus*',
    'trees_leaves': 'plants/* unsorted/fogli* recreation/holiday/christmas/xmas* decorations/lightly* decorations/*wreath*',
    'planets': 'geography/astronomy/* science/astronomy/* geography/*globe* geography/moon* geography/planet* geography/earth*',
    'maps': 'geography/*map* geography/*austral* geography/*europe* geography/*spain* geography/*a_0* geography/*queens* geography/*victoria* geography/*western* geography/*northern* '
            'geography/*world* geography/*ukrain* geography/*states* geography/state_of* geography/*carte* geography/castilla* geography/aragon*',
    'boats': 'transportation/boating/[!k]* transportation/vehicles/the_mad* transportation/vehicles/traw* computer/browser* recreation/holiday/sailing*',
    'road_signs': 'transportation/roadsigns/* transportation/vehicles/c[ruy]* transportation/airplane* transportation/bambi* transportation/bus_[lo]* transportation/c[ry]* transportation/cattle* '
                  'transportation/draw* transportation/end* transportation/ground* transportation/horse* transportation/kab* transportation/lor* transportation/no_* transportation/old_f* transportation/pass*',
    'vehicles': 'transportation/vehicles/* transportation/* unsorted/ambul* unsorted/cater* people/fire_engine*',
    'flags': 'signs_and_symbols/flags/africa/* signs_and_symbols/flags/asia/* signs_and_symbols/flags/europe/* signs_and_symbols/flags/america/*',
    'arrows': 'shapes/arrows/* office/arrow* computer/icons/*arrow*',
    'ornaments': 'decorations/* shapes/coke* shapes/orleans* recreation/games/cards/celtic*',
    'music': 'recreation/music/*',
    'party': 'recreation/party/* recreation/holiday/* unsorted/festoni* unsorted/ghirl*',
    'sports': 'recreation/sports/*',
    'toys_games': 'recreation/toys/* recreation/games/* recreation/d* computer/games/* tools/toys/* recreation/sled*',
    'tools': 'tools/[!wt]* tools/t[!o]* tools/wrench* unsorted/sega* unsorted/pittura* unsorted/metro*',
}
# Black-and-white twins, texts and blueprints, "image not found" pictures, photos of persons, logos, weapons, drugs and
# other content that isn't for everybody, and strays that don't show their folder's subject
EXCLUDE = '''food/vegetables/* food/pumpkin* food/zucca* food/pomod* food/champ* plants/mushroom* plants/toad*
*_bw* *bw_* *smok* *pantyhose* people/smilies/* buildings/furniture/* *hummer* *duck_yellow_i* *didier* *stylized_yoga*
*turkey_*pl* *thanksg* *sailing_jibe* *sailing_tack* *sailing_points* *olifant* *bible* *contour_bat* *mirjam* *cat_scr* *collection_of*
*folder_imp* *leisler* *hotel_icon_co* *emule* *gwen_ha* *sunwheel* *sportcar* *footprints* *dancer_brice* *00_moon* *southen* *school_in*
*inservice* *gallows* *burner* *cannabis* *bowsaw* *bypass* *fall_scene* *christmas_bal* */knot_* */anchor* *street_sign*
*suitcase* *otorway* *military* *blueprint* *soviet* *kallisti* *brown_hair* *rikva* *audio_cass* *pac?an* *packman* *pong*
*missis* *a_man_* *a_youngster* *grandpa* *grampa* *a_boy* *a_happy* *my_lovely* *bad_guy* *female_roll* *sexy* *portrait_of_a* *skull*
*crossbones* *hide_girl* *3_faces* *martin_luth* *coltrane* *jazz* *fireman_en* *xbox* *gameboy* *enthusiast*
*stripper* *silhouette_fem* *elfish* *numero_v* *nws_gov* *route_j* *human_h* *nievel* *buses_and* */lighthouse_0* *panel_fud* *kexi* *ragazza_seduta* *nunchaku*'''


def find(path):
    "The class of a file, or None"
    if any(fnmatchcase(path, o) for o in EXCLUDE.split()): return None
    return next((c for c, pats in CLASSES.items() if any(fnmatchcase(path, p) for p in pats.split())), None)

def load(file):
    "The drawing as (RGB over white, alpha), cropped and shrunk, or None when it doesn't fit"
    with Image.open(file) as im:
        if min(im.size) < SIDE or im.width*im.height > MAX_PIXELS: return None
        im = im.convert('RGBA')
    rgb = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    box = ImageChops.difference(rgb, Image.new('RGB', rgb.size, 'white')).convert('L').point(lambda v: 255*(v > 8)).getbbox()
    if not box or max(box[2]-box[0], box[3]-box[1]) < SIDE: return None
    w, h = box[2]-box[0], box[3]-box[1]
    size = max(w, SIDE, (h+1)//2), max(h, SIDE, (w+1)//2)  # a margin, where too narrow
    canvas, alpha = Image.new('RGB', size, 'white'), Image.new('L', size, 0)
    if im.getchannel('A').getextrema()[0] == 255: alpha.paste(255, (0, 0, *size))
    at = (size[0]-w)//2, (size[1]-h)//2
    canvas.paste(rgb.crop(box), at); alpha.paste(im.getchannel('A').crop(box), at)
    scale = SIDE/min(size)
    size = tuple(min(2*SIDE, round(s*scale)) for s in size)
    return canvas.resize(size, Image.Resampling.LANCZOS), alpha.resize(size, Image.Resampling.LANCZOS)

def same(a, b):
    "Near duplicates: by pHash distance (of 64 bits), mean difference of 16x16 thumbnails (of 255), or the two added up"
    bits = a[0]-b[0]
    if bits <= MAX_HASH: return True
    diff = np.abs(a[1]-b[1]).mean()
    return diff <= MAX_THUMB or bits+diff <= MAX_BOTH

def encode(rgb, alpha):
    "PNG bytes with a palette, one entry of which is the transparent white"
    # only one such entry: with more, Pillow warns at each `convert('RGB')`
    a = np.asarray(alpha) >= MIN_ALPHA
    px = np.asarray(rgb.quantize(COLORS, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE).convert('RGB')).copy()
    px[~a | (px.min(axis=2) > 250)] = 255
    keys, idx = np.unique(np.concatenate([a[..., None].astype(np.uint8), px], 2).reshape(-1, 4), axis=0, return_inverse=True)
    im = Image.fromarray(idx.reshape(a.shape).astype(np.uint8))
    im.putpalette(keys[:, 1:].tobytes())
    buf = io.BytesIO()
    im.save(buf, 'PNG', optimize=True, **({} if a.all() else {'transparency': 0}))
    return buf.getvalue()

def main(src, out):
    root = next(p for p in sorted(Path(src).rglob('openclipart/png')) if p.is_dir())
    Image.MAX_IMAGE_PIXELS, sets, kept = None, {c: [] for c in CLASSES}, []
    for f in sorted(root.rglob('*.png'), key=lambda p: p.relative_to(root).as_posix()):
        path = f.relative_to(root).as_posix()
        cls = None if f.is_symlink() else find(path)
        pair = load(f) if cls else None
        if pair is None or 255-np.asarray(pair[0]).mean() < MIN_INK: continue
        sig = imagehash.phash(pair[0]), np.asarray(pair[0].resize((16, 16), Image.Resampling.BOX)).astype(float)
        if any(same(sig, o) for o in kept): continue
        kept.append(sig)
        sets[cls].append((f'{path[:-4].rsplit("/", 1)[-1]}.png'.lower(), *pair))
    names = {}
    for cls, items in sorted(sets.items()):
        if len(items) < MIN: print(f'{cls:16}{len(items):5}  left out'); continue
        items = sorted(random.Random(SEED).sample(items, CAP), key=lambda o: o[0]) if len(items) > CAP else items
        before = len(names)
        for name, rgb, alpha in items: names.setdefault(f'{cls}/{name}', encode(rgb, alpha))
        size = sum(len(b) for n, b in names.items() if n.startswith(cls+'/'))
        print(f'{cls:16}{len(names)-before:5}{size/1000:9.1f} kB')
    total = len(names)
    names['SOURCE.txt'] = SOURCE.encode()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_STORED) as z:
        for name in sorted(names): z.writestr(zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0)), names[name])
    print(f'{total} images, {Path(out).stat().st_size} bytes')

SOURCE = '''Source: Debian package openclipart-png 1:0.18+dfsg-19, the Open Clip Art Library 0.18.
Licence: public domain (Creative Commons public domain dedication).

Built by tools/build_sample.py: a selection of the package's drawings in one folder a class, cropped
to the drawing, shrunk to a short side of 160 px, near duplicates left out, and saved as PNGs with a
palette. Their colours are the drawing over white; their alpha is the source's, as a mask.
'''

if __name__ == '__main__': main(*sys.argv[1:3])
