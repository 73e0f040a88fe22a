"What the tests of runs and sweeps share: a notebook that does next to nothing, grid files, and the command."
import os, signal, subprocess, sys, time
from pathlib import Path

import nbformat

SETTINGS = "seed: int = 0  # which\nwhat: str = 'ok'  # what happens"
# Writes down that it ran, and does what `what` says until somebody makes the file `mended`.
WORK = """import os, pathlib, signal, time
folder = pathlib.Path(os.environ['MMU_STUDY_RUN_DIR'])
(folder/'half').write_text('half')
with open('log', 'a') as f: f.write(f'{what} {seed}\\n')
time.sleep(.1)
if not pathlib.Path('mended').exists():
    if what == 'raise': raise ValueError('not this one')
    if what == 'memory':
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
        bytearray(2**32)
    if what == 'killed': os.kill(os.getpid(), signal.SIGKILL)
    if what == 'hang': time.sleep(600)
(folder/'half').write_text('whole')"""

def notebook(path, *code, settings=SETTINGS, tags=("parameters",)):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (settings, *(code or (WORK,)))])
    nb.cells[0].metadata["tags"] = list(tags)
    nb.metadata["kernelspec"] = dict(name="python3", language="python", display_name="Python 3")
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path

def grid_file(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

def start(*args, **kw):
    "The command `mmu-study`, in a session of its own."
    return subprocess.Popen([sys.executable, "-m", "mmu_study.cli", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **kw)  # tests that run in the background of a shell would pass on that it ignores interruptions

def run(*args, seconds=120, **kw):
    "Exit code, standard output, standard error."
    process = start(*args, **kw)
    try: out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err

def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(.05)

def folders(runs): return sorted(p.name for p in Path(runs).glob("[!.]*") if p.name != "failed")

def leftovers(runs): return [p.name for p in Path(runs).rglob(".partial*")]
