"""Run the pages as `nbdev-test` does, several at once: `test_pages.py [--jobs 2] [PAGE ...]`, without pages all of them

Each runs in a process of its own, forked when all is imported: what a page defines or patches is not there for the next one. What a page that fails had to say
is shown when it ends."""
import argparse, gc, os, sys, tempfile, time
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

ROOT = Path(__file__).resolve().parents[1]

def fork(page, flags, out):
    "The id of a process that runs `page` and writes to `out`"
    if pid := os.fork(): return pid
    try:
        for fd in (1,2): os.dup2(out.fileno(), fd)
        ok,_ = test_nb(page, skip_flags=flags, basepath=ROOT)
    except BaseException as e: ok = print(f'{page}: {e!r}', file=sys.__stderr__)
    os._exit(not ok)

def run_all(pages, jobs, flags):
    "Seconds of each page, and those that failed"
    left,running,seconds,failed = list(pages),{},{},[]
    while left or running:
        while left and len(running)<jobs:
            page,out = left.pop(0),tempfile.TemporaryFile()
            running[fork(page, flags, out)] = page,out,time.time()
        pid,status = os.wait()
        page,out,began = running.pop(pid)
        seconds[page] = time.time()-began
        if status:
            failed.append(page)
            out.seek(0)
            sys.stderr.write(f'\n{page}, {seconds[page]:.0f} s: failed\n{out.read().decode(errors="replace")}\n')
        out.close()
    return seconds,failed

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('pages', nargs='*', type=Path)
    p.add_argument('--jobs', type=int, default=2)
    args = p.parse_args()
    # The longest first, as far as a page tells by its length
    pages = sorted((f.resolve() for f in args.pages or nbglob(ROOT/'nbs', as_path=True)), key=lambda f: -f.stat().st_size)
    import fastai.vision.all, fastai_tricks.all # noqa: F401 - once, before the processes part
    gc.freeze()
    seconds,failed = run_all(pages, args.jobs, get_config(ROOT).tst_flags.split())
    for page,s in sorted(seconds.items(), key=lambda o: -o[1]):
        if s>=5: print(f'{s:3.0f} s {page.relative_to(ROOT)}')
    if failed: sys.exit('Failed: ' + ', '.join(str(o.relative_to(ROOT)) for o in failed))
    print(f'{len(pages)} pages: all passed')

if __name__=='__main__': main()
