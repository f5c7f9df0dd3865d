"Files: several processes write one at the same time, one is killed while it writes, one fails"
import errno, os, signal, subprocess, time
import pytest, torch
from fastai_tricks.core.files import save_whole, write_json, write_text, write_whole

def forked(f):
    "Run `f` in a process of its own: its id"
    pid = os.fork()
    if pid: return pid
    try: f()
    except BaseException: os._exit(1)
    os._exit(0)

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def running(pid):
    "Is it still at work? Where it has ended, it ended well"
    p,status = os.waitpid(pid, os.WNOHANG)
    assert not status
    return not p

def test_two_processes_write_one_file(tmp_path):
    "Whoever looks sees one of the texts whole, and both end well"
    file,halves = tmp_path/'runs'/'a.txt',[c*100_000 for c in 'ab']
    def slowly(tmp, half):
        with open(tmp, 'w') as f:
            f.write(half); f.flush()
            time.sleep(.003) # Meanwhile the other one writes
            f.write(half)
    def write(half):
        while not (tmp_path/'go').exists(): time.sleep(.001)
        for _ in range(50): write_whole(file, lambda tmp: slowly(tmp, half), flush=False)
    pids,seen = [forked(lambda: write(half)) for half in halves],set()
    (tmp_path/'go').touch()
    while pids:
        if file.exists(): seen.add(file.read_text())
        pids = [p for p in pids if running(p)]
    assert seen | {file.read_text()}<={half*2 for half in halves} and [p.name for p in file.parent.iterdir()]==['a.txt']

@pytest.mark.parametrize('where', ['half written','written','flushed'])
def test_a_kill_while_writing_leaves_the_old_file(tmp_path, where):
    file = write_text('old', tmp_path/'a.txt')
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def write(tmp):
        tmp.write_text('ne' if where=='half written' else 'new')
        if where!='flushed': die()
        os.replace = lambda *args: die() # All is on the disk, but its name
    assert ended(forked(lambda: write_whole(file, write)))==-signal.SIGKILL
    assert file.read_text()=='old'
    # The next run writes as if nothing had been
    assert write_text('new', file).read_text()=='new'

@pytest.mark.parametrize('error', [OSError('disk full'), KeyboardInterrupt()], ids=['disk full','Ctrl-C'])
@pytest.mark.parametrize('at', ['write','fsync','replace'])
def test_an_error_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch, error, at):
    file = write_text('old', tmp_path/'a.txt')
    def fail(*args): raise error
    def write(tmp):
        tmp.write_text('new')
        if at=='write': fail()
    if at!='write': monkeypatch.setattr(os, at, fail)
    with pytest.raises(type(error)): write_whole(file, write)
    assert file.read_text()=='old' and [p.name for p in tmp_path.iterdir()]==['a.txt']

def test_the_temporary_file_has_the_suffix(tmp_path):
    "What chooses a format by it, such as `DataFrame.to_csv`, writes the same"
    seen = []
    write_whole(tmp_path/'a.csv.gz', lambda tmp: seen.append(tmp.name) or tmp.touch())
    assert seen[0].endswith('.csv.gz') and seen[0]!='a.csv.gz'

@pytest.mark.parametrize('write', [lambda f: save_whole({'a':torch.ones(2)}, f), lambda f: write_json({'a':1}, f), lambda f: write_text('a', f)], ids=['save','json','text'])
def test_folders_are_made(tmp_path, write):
    file = tmp_path/'a'/'b'/'c.x'
    assert write(str(file))==file and file.exists()

@pytest.fixture
def small_disk(tmp_path):
    "Of 1 MB, where this process may make one"
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount','-t','tmpfs','-o','size=1m','tmpfs',str(disk)], capture_output=True).returncode: pytest.skip('cannot mount')
    yield disk
    subprocess.run(['umount',str(disk)], check=True)

def test_a_disk_of_one_megabyte(small_disk):
    file = save_whole({'a':torch.ones(1000)}, small_disk/'a.pth')
    with pytest.raises(OSError, match=r"no space left on '.*disk' for 'a.pth', needs 4 MB") as e: save_whole({'a':torch.ones(10**6)}, file)
    assert e.value.errno==errno.ENOSPC
    with pytest.raises(OSError, match="no space left on '.*disk' for 'b.csv', needs 3 MB"): write_text('x'*(2*10**6+1), small_disk/'b.csv')
    assert [f.name for f in small_disk.iterdir()]==['a.pth'] and torch.load(file, weights_only=True)['a'].sum()==1000
