"Sweeps: a grid file becomes runs, every run is executed once, and whatever goes wrong the same command ends it."
import json, math, os, random, shlex, resource, signal, subprocess, sys, time
from pathlib import Path

import pandas as pd
import pytest, yaml
from filelock import FileLock

import mmu_study
from mmu_study import runs, settings, sweeps
from mmu_study.runs import SCORE_COLUMNS
from mmu_study.settings import InputError
from stub import folders, grid_file, leftovers, notebook, run, start, until

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("project")

def grid(tmp_path, text="", **options):
    notebook(tmp_path/"a.ipynb")
    return sweeps.load_grid(grid_file(tmp_path/"g.yaml", "notebook: a.ipynb\n" + text), **options)

def given(*args, **kw): return [r.given for r in grid(*args, **kw).runs]

def spent():
    "Seconds of processor time of the commands that have ended: what they would take on a machine that does nothing else."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

def finish(run, seconds=1.5, **scores):
    "Write what a finished run leaves, without executing it."
    run.folder.mkdir(parents=True)
    if scores: runs.save_scores(pd.DataFrame([dict.fromkeys(SCORE_COLUMNS, "x") | dict(view=0) | scores]), run.folder)
    (run.folder/"run.json").write_text(json.dumps(dict(parameters=dict(seed=0, what="ok") | run.given, seconds=seconds, key=run.folder.name)))

# Grid files

def test_product_list_and_both(tmp_path):
    assert given(tmp_path) == [{}]
    assert given(tmp_path, "product: {seed: [0, 1], what: [ok, bad]}") == [dict(seed=0, what="ok"), dict(seed=0, what="bad"), dict(seed=1, what="ok"), dict(seed=1, what="bad")]
    assert given(tmp_path, "list: [{seed: 5}, {}]\nparameters: {seed: 7}") == [dict(seed=5), dict(seed=7)]
    assert given(tmp_path, "list: [{what: a}, {what: b}]\nproduct: {seed: [1, 2]}") == [dict(what="a", seed=1), dict(what="a", seed=2), dict(what="b", seed=1), dict(what="b", seed=2)]

def test_presets_merge_mappings_and_replace_the_rest(tmp_path):
    text = "parameters: {what: x}\nlist: [{}, {what: y}]\nproduct: {seed: [0, 1]}\nslurm: {cpus: 1, memory: 4}\npresets:\n  none: {}\n  one: {product: {seed: [3]}, list: [{}], timeout: 9, slurm: {cpus: 2}}"
    assert given(tmp_path, text) == given(tmp_path, text, preset="none") and len(given(tmp_path, text)) == 4
    one = grid(tmp_path, text, preset="one")
    assert [r.given for r in one.runs] == [dict(what="x", seed=3)] and one.timeout == 9 and one.slurm == dict(cpus=2, memory=4)
    assert grid(tmp_path, text, preset="one", timeout=2.5, slurm=dict(time=7)).slurm == dict(cpus=2, memory=4, time=7)
    assert given(tmp_path, text, preset="one", parameters=dict(seed=8)) == [dict(what="x", seed=8)]

def test_the_same_run_twice_is_one_and_keys_are_those_of_runs(tmp_path):
    found = grid(tmp_path, "list: [{seed: 1}, {seed: 1, what: ok}, {seed: 2}, {}]")
    assert [r.folder.name for r in found.runs] == [runs.run_key(tmp_path/"a.ipynb", dict(seed=s)) for s in (1, 2, 0)]
    assert [r.folder.parent for r in found.runs] == [tmp_path/"data/runs"]*3

@pytest.mark.parametrize("text, says", [
    ("paramters: {seed: 1}", "g.yaml has no key 'paramters'; allowed are notebook, parameters, product, list, timeout, gpus, slurm, presets."),
    ("product: {seed: 1}", "product of g.yaml must hold lists of values; seed is 1."), ("product: {seed: []}", "seed is \\[\\]"), ("product: [1]", "product of g.yaml must be a mapping"),
    ("list: [1]", "list of g.yaml must hold mappings"), ("list: []", "list of g.yaml must hold mappings"), ("list: [{seed: 1}]\nproduct: {seed: [1]}", "seed is both in product and in list"),
    ("timeout: soon", "timeout of g.yaml must be a number"), ("timeout: -1", "must be more than 0"), ("timeout: true", "must be a number"), ("slurm: {cpu: 1}", "slurm of g.yaml has no key 'cpu'"), ("slurm: {cpus: 1.5}", "cpus of slurm of g.yaml must be a whole number"), ("gpus: 0", "gpus of g.yaml must be more than 0"),
    ("presets: {a: 1}", "The preset 'a' of g.yaml must be a mapping"), ("presets: {a: {presets: {}}}", "the preset 'a' of g.yaml has no key 'presets'"),
    ("parameters: {sed: 1}", "a.ipynb has no parameter 'sed'; it has seed, what"), ("product: {seed: [0, '1']}", "must be int; '1' is str"), ("parameters: {seed: 2020-01-01}", "no JSON value"),
    ("parameters: {seed: 1, seed: 2}", "'seed' occurs twice, line 2"), ("parameters: {[1]: 2}", "no parameter|unhashable"), ("parameters: {seed: [}", "cannot be read as plain YAML"), ("notebook: a.ipynb", "'notebook' occurs twice"),
    ("parameters: {what: !!python/object/apply:os.system [touch pwned]}", "cannot be read as plain YAML: could not determine a constructor"), ("parameters: {seed: 2020-13-45}", "cannot be read as plain YAML")])
def test_what_cannot_be_meant_is_refused(tmp_path, text, says):
    with pytest.raises(InputError, match=says) as e: grid(tmp_path, text)
    assert "\n" not in str(e.value) and not (tmp_path/"pwned").exists() and not (tmp_path/"data").exists()

def test_files_that_are_no_grids(tmp_path):
    for text, says in (("", "is no grid"), ("[1]", "is no grid"), ("product: {}", "names no notebook"), ("notebook: none.ipynb", "There is no notebook")):
        with pytest.raises(InputError, match=says): sweeps.load_grid(grid_file(tmp_path/"x.yaml", text))
    with pytest.raises(InputError, match="There is no grid file"): sweeps.load_grid("none.yaml")
    with pytest.raises(InputError, match="has no preset 'b'; it has a."): grid(tmp_path, "presets: {a: {}}", preset="b")

def test_the_grids_of_the_project_fit_their_notebooks(monkeypatch):
    monkeypatch.setenv("MMU_STUDY_ROOT", str(ROOT))
    for file in (ROOT/"data/grids").glob("*.yaml"):
        for preset in (None, *yaml.safe_load(file.read_text()).get("presets", {})): assert sweeps.load_grid(file, preset).runs
    assert len(sweeps.load_grid(ROOT/"data/grids/smoke.yaml").runs) == 24

# What is there

def test_status_tells_the_four_states(tmp_path):
    found = grid(tmp_path, "product: {seed: [0, 1, 2, 3]}")
    finish(found.runs[0], 12.5)
    settings.write_json(tmp_path/f"data/runs/failed/{found.runs[1].folder.name}.json", dict(error="ValueError: no", sentence="…", seconds=3.))
    runs.keep_failure(found.runs[2].folder, "Timeout", "…")
    (job := tmp_path/f"data/runs/.partial-{found.runs[2].folder.name}-1/job.json").parent.mkdir()
    job.touch(); os.utime(job, (time.time() - 100,)*2)  # what a run begins with
    with FileLock(tmp_path/f"data/runs/.{found.runs[2].folder.name}.lock"):
        table = sweeps.status(found)
        assert [*table.state] == ["done", "failed", "running", "missing"] and sweeps.total(table) == "4 runs: 1 done, 1 running, 1 failed, 1 missing"
        assert [*table.seconds[:2]] == [12.5, 3.] and 100 <= table.seconds[2] < 110 and math.isnan(table.seconds[3]) and table.error[1] == "ValueError: no"
        assert [*table.label] == ["seed=0", "seed=1", "seed=2", "seed=3"]
    assert sweeps.status(found).state[2] == "failed"

def test_a_run_is_running_while_build_once_builds_it_and_no_longer(tmp_path):
    seen = []
    settings.build_once(tmp_path/"r/k", lambda folder: seen.append(sweeps.held(tmp_path/"r/k")))
    assert seen == [True] and not sweeps.held(tmp_path/"r/k")
    code = "import sys, time\nfrom mmu_study.settings import build_once\nbuild_once(sys.argv[1], lambda folder: (print('in', flush=True), time.sleep(60)))"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path/"r/m"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n" and sweeps.held(tmp_path/"r/m")
    process.kill(); process.wait()
    assert not sweeps.held(tmp_path/"r/m")

def test_what_a_run_may_take_is_not_learned_from_another_model():
    done = [dict(notebook="nbs/page.ipynb", parameters=dict(model="", method="NPO"), seconds=5.)]
    likely = lambda **wanted: sweeps._likely(done, Path("page.ipynb"), wanted)
    assert likely(model="", method="IDK") == 5 and math.isnan(likely(model="llava-1.5-7b", method="NPO"))

def test_a_thousand_finished_runs_are_listed_in_three_seconds(tmp_path):
    for r in grid(tmp_path, f"product: {{seed: {[*range(1000)]}}}").runs: finish(r)
    begun = spent()
    code, out, err = run("status", "g.yaml")
    assert (code, err) == (0, "") and out.startswith("g: 1000 runs: 1000 done\n") and len(out.splitlines()) == 1002
    assert spent() - begun <= 3

def test_a_change_reruns_what_depends_on_it(tmp_path, monkeypatch):
    def missing(text="product: {seed: [0, 1, 2]}"):
        found = grid(tmp_path, text)
        return [r.given["seed"] for r, s in zip(found.runs, sweeps.status(found).state) if s == "missing"]
    for r in grid(tmp_path, "product: {seed: [0, 1, 2]}").runs: finish(r)
    assert missing() == [] and missing("product: {seed: [0, 1, 3]}") == [3] and missing("product: {seed: [0, 1]}\nparameters: {what: other}") == [0, 1]
    monkeypatch.setattr(mmu_study, "__version__", "9.9")
    assert missing() == [0, 1, 2]
    monkeypatch.undo(); monkeypatch.setenv("MMU_STUDY_ROOT", str(tmp_path)); monkeypatch.chdir(tmp_path)
    assert missing() == []
    notebook(tmp_path/"b.ipynb", "1 + 1")
    assert [*sweeps.status(sweeps.load_grid(grid_file(tmp_path/"b.yaml", "notebook: b.ipynb\nproduct: {seed: [0, 1]}"))).state] == ["missing"]*2

def test_a_run_costs_its_parent_next_to_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_papermill", lambda *_: 0)
    begun = time.process_time() + spent()
    sweeps.sweep(grid(tmp_path, "product: {seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}"), jobs=2)
    assert (time.process_time() + spent() - begun)/10 <= .5

def test_collect_wants_everything_or_is_told(tmp_path):
    found = grid(tmp_path, "product: {seed: [4, 5]}")
    with pytest.raises(InputError, match="2 of the 2 runs of g are not done; finish the sweep.$"): sweeps.collect(found, partial=True)
    finish(found.runs[1], value=.5)
    with pytest.raises(InputError, match="1 of the 2 runs of g are not done; finish the sweep, or collect"): sweeps.collect(found)
    assert len(sweeps.collect(found, partial=True)) == 1
    finish(found.runs[0], value=.25)
    sweeps.collect(found, tmp_path/"out/scores.parquet")
    scores = pd.read_parquet(tmp_path/"out/scores.parquet")
    assert [*scores.value] == [.25, .5] and [*scores.seed] == [4, 5] and [*scores.run] == [r.folder.name for r in found.runs] and set(scores.what) == {"ok"}
    assert leftovers(tmp_path) == []

# Executors without a kernel

@pytest.fixture
def together(monkeypatch):
    "What the runs see that are executed at the same time, at every start of one, on a machine with GPUs a, b, c, d and e; and the number of processes."
    seen, busy = [], []
    def attempt(run, environment, processes, **_):
        busy.append(mine := (environment["CUDA_VISIBLE_DEVICES"], processes)); seen.append(sorted(busy)); time.sleep(.05); busy.remove(mine)
        return dict(state="done", seconds=0., error="")
    monkeypatch.setattr(sweeps, "_attempt", attempt)
    monkeypatch.setattr(sweeps, "output_of", lambda *command: "a\nb\nc\nd\ne")
    return seen

def test_every_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch, together):
    found = grid(tmp_path, f"product: {{seed: {[*range(12)]}}}")
    sweeps.sweep(found)
    assert len(together) == 12 and max(together, key=len) == [(g, 1) for g in "abcde"]  # without --jobs, one run for each
    assert all(len(set(now)) == len(now) for now in together)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")  # those that a cluster gave, say
    together.clear(); sweeps.sweep(found, jobs=4)
    assert {g for now in together for g, _ in now} == {"3", "7"}

def test_several_gpus_for_each_run(tmp_path, monkeypatch, together):
    notebook(tmp_path/"b.ipynb", "from accelerate import Accelerator")
    found = sweeps.load_grid(grid_file(tmp_path/"b.yaml", "notebook: b.ipynb\nproduct: {seed: [0, 1, 2, 3]}\ngpus: 2"))
    sweeps.sweep(found)
    assert len(together) == 4 and max(together, key=len) == [("a,b", 2), ("c,d", 2)] and all(len(set(now)) == len(now) for now in together)  # nobody has e
    one = sweeps.load_grid("b.yaml", gpus=1)
    assert not {r.folder for r in one.runs} & {r.folder for r in found.runs}  # a batch is often multiplied by the number of processes
    assert [r.folder for r in one.runs] == [tmp_path/"data/runs"/runs.run_key("b.ipynb", dict(seed=s)) for s in range(4)]
    assert [shlex.split(c)[-5:] for c in sweeps.commands(found)] == [["-p", "seed", str(s), "--processes", "2"] for s in range(4)]
    plain = grid(tmp_path, "product: {seed: [0, 1]}\ngpus: 2")  # it knows nothing of processes: one, that sees both
    together.clear(); sweeps.sweep(plain)
    assert max(together, key=len) == [("a,b", 1), ("c,d", 1)] and "--processes" not in sweeps.commands(plain)[0]
    for visible, says in (("3", "A run of b needs 2 GPUs; here is 1."), ("", "here are none")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(InputError, match=says): sweeps.sweep(found)

def test_executors_and_jobs_that_are_not_there(tmp_path, monkeypatch):
    found = grid(tmp_path)
    with pytest.raises(InputError, match="no executor 'cloud'; choose one of local, slurm, debug"): sweeps.sweep(found, "cloud")
    with pytest.raises(InputError, match="jobs is 0"): sweeps.sweep(found, jobs=0)
    monkeypatch.setitem(sys.modules, "submitit", None)  # as if it were not installed
    with pytest.raises(InputError, match="needs submitit: pip install 'mmu_study\\[slurm\\]'"): sweeps.sweep(found, "slurm")
    monkeypatch.undo(); monkeypatch.setenv("PATH", str(tmp_path))
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match="There is no sbatch"): sweeps.sweep(found, "slurm")

# Execution: a kernel takes a second or two to start

def test_parameters_never_become_code_and_emitted_commands_execute(tmp_path):
    evil = ["__import__('os').system('touch pwned')", "'''\nimport os; os.system('touch pwned')\n'''", "\"; open('pwned', 'w'); \"", "\\\"); open('pwned', 'w') #", "{seed}", "$(touch pwned)", "`touch pwned`; touch pwned\n", "!touch pwned", "é\u2028"]
    notebook(tmp_path/"evil.ipynb", "import json, os\nwith open(os.path.join(os.environ['MMU_STUDY_RUN_DIR'], 'got'), 'w') as f: json.dump([text, many, named, rate], f)",
        settings="text: str = ''  # one\nmany: list[str] = []  # some\nnamed: dict = {}  # keys too\nrate: float = 1.  # a number")
    file = grid_file(tmp_path/"evil.yaml", json.dumps(dict(notebook="evil.ipynb", parameters=dict(text="".join(evil), many=evil, named={e: e for e in evil}, rate=1e-5))))  # JSON is YAML
    code, out, _ = run("sweep", "evil.yaml", "--emit")
    subprocess.run(["bash", "-c", out], check=True, capture_output=True)
    done, = sweeps.load_grid(file).runs
    assert json.loads((done.folder/"got").read_text()) == ["".join(evil), evil, {e: e for e in evil}, 1e-5]
    assert not (tmp_path/"pwned").exists() and run("sweep", "evil.yaml", "--emit")[:2] == (0, "")

def test_killed_ten_times_and_the_same_command_again(tmp_path):
    found = grid(tmp_path, "product: {seed: [0, 1, 2, 3]}")
    written, draw = {}, random.Random(0)
    for i in range(10):
        process = start("sweep", "g.yaml", "--jobs", 2)
        time.sleep(draw.uniform(.3, 3.5))
        if i % 2: os.killpg(process.pid, signal.SIGKILL)
        else: process.kill()
        process.communicate()
        assert all(written[f] == (tmp_path/f).stat().st_mtime_ns for f in written)  # what is done is not made again
        written |= {f.relative_to(tmp_path): f.stat().st_mtime_ns for f in (tmp_path/"data/runs").glob("[!.]*/run.json")}
    code, out, err = run("sweep", "g.yaml", "--jobs", 2)
    assert (code, out.splitlines()[-1]) == (0, "g: 4 runs: 4 done"), err
    assert folders("data/runs") == sorted(r.folder.name for r in found.runs) and leftovers("data/runs") == []
    for r in found.runs: assert (r.folder/"half").read_text() == "whole" and json.loads((r.folder/"run.json").read_text())["key"] == r.folder.name
    begun, ran = spent(), Path("log").read_text()
    assert run("sweep", "g.yaml")[:2] == (0, "g: 4 runs: 4 done\n") and Path("log").read_text() == ran
    assert spent() - begun <= 5

def test_faults_do_not_stop_the_others_and_retry_mends_them(tmp_path):
    found = grid(tmp_path, "product: {what: [hang, raise, memory, killed, ok]}\ntimeout: 20")
    code, out, err = run("sweep", "g.yaml", "--jobs", 2)
    assert code == 1 and "g: 5 runs: 1 done, 4 failed" in out.splitlines()
    why = dict(hang="Timeout: it took more than 20 seconds", memory="MemoryError", killed="DeadKernel: its process ended before its last cell, as when memory runs out", ok="", **{"raise": "ValueError: not this one"})
    table = sweeps.status(found)
    assert dict(zip(table.label.str.removeprefix("what="), table.error)) == why
    assert 20 <= table.seconds[0] < 25 and folders("data/runs") == [found.runs[4].folder.name] and leftovers("data/runs") == []
    shown = run("status", "g.yaml")[1].splitlines()
    assert len(shown) == 7 and all(shown[i].endswith(f"  {e}") for i, e in enumerate([why[w] for w in ("hang", "raise", "memory", "killed")], 2))
    ran = Path("log").read_text()
    assert run("sweep", "g.yaml", "--jobs", 2)[0] == 1 and Path("log").read_text() == ran  # not again by itself
    Path("mended").touch()
    code, out, _ = run("sweep", "g.yaml", "--jobs", 2, "--retry-failed")
    assert (code, out.splitlines()[-1]) == (0, "g: 5 runs: 5 done") and len(Path("log").read_text().splitlines()) == 9
    assert [*(tmp_path/"data/runs/failed").iterdir()] == []

def test_two_sweeps_at_once_execute_every_run_once(tmp_path):
    found = grid(tmp_path, "list: [{seed: 0}, {seed: 1}, {what: raise}]")
    both = [start("sweep", "g.yaml"), start("sweep", "g.yaml")]
    outs = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [1, 1] and sorted(Path("log").read_text().splitlines()) == ["ok 0", "ok 1", "raise 0"]
    assert all("g: 3 runs: 2 done, 1 failed" in o.splitlines() for o in outs)

def test_an_interruption_leaves_nothing(tmp_path):
    found = grid(tmp_path, "product: {what: [hang], seed: [0, 1]}")
    process = start("sweep", "g.yaml", "--jobs", 2)
    until(lambda: Path("log").exists() and len(Path("log").read_text().splitlines()) == 2)
    shown = sweeps.status(found)
    assert [*shown.state] == ["running"]*2 and all(0 < s < 60 for s in shown.seconds)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and folders("data/runs") == [] and leftovers("data/runs") == [] and not Path("data/runs/failed").exists()

def test_a_full_disk_is_said_and_nothing_is_torn(tmp_path):
    (tmp_path/"data/runs").mkdir(parents=True)
    mount = lambda *o: subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(o), "tmpfs", tmp_path/"data/runs"], capture_output=True, text=True)
    if (mounted := mount("size=1m")).returncode: pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        notebook(tmp_path/"a.ipynb", "import os\nwith open(os.path.join(os.environ['MMU_STUDY_RUN_DIR'], 'big'), 'wb') as f: f.write(bytes(2*2**20))")
        grid_file(tmp_path/"g.yaml", "notebook: a.ipynb\nproduct: {seed: [0, 1]}")
        code, out, err = run("sweep", "g.yaml")
        assert code == 1 and "No space left on device" in out + err and "Traceback" not in out + err
        assert folders("data/runs") == [] and leftovers("data/runs") == []
        assert mount("remount", "size=50m").returncode == 0
        code, out, err = run("sweep", "g.yaml", "--retry-failed")
        assert (code, out.splitlines()[-1]) == (0, "g: 2 runs: 2 done"), err
    finally: subprocess.run(["umount", tmp_path/"data/runs"], check=True)
