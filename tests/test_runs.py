"Runs: guards before, one folder per run, nothing half-written after a kill, one sentence for what is refused."
import json, os, re, shutil, signal, subprocess, sys
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest

import stub
from mmu_study import runs
from mmu_study.settings import InputError
from stub import leftovers, until

pytestmark = pytest.mark.usefixtures("project")
SETTINGS = "seed: int = 0  # which world\nlr: float = 1e-3\nmode: str = 'fast'"
DIR = "import os, pathlib\nfolder = pathlib.Path(os.environ['MMU_STUDY_RUN_DIR'])"

def notebook(path, *code, settings=SETTINGS, **kw): return stub.notebook(path, *(code or ("",)), settings=settings, **kw)

def command(*args, **kw):
    return subprocess.Popen([sys.executable, "-m", "mmu_study.runs", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def finished(process):
    "Exit code, standard output and the sentence on standard error (what comes before it is how far the run was)."
    out, err = process.communicate(timeout=60)
    return process.returncode, out, [*err.splitlines(), ""][:-1][-1:]

def folders(path): return sorted(p.name for p in (path/"data/runs").glob("[!.]*"))

def started(folder):
    "The kernel's process, once the notebook has written its id there."
    until(lambda: (folder/"started").exists() and (folder/"started").read_text())
    return psutil.Process(int((folder/"started").read_text()))

def ended(process): return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE

# Parameters and keys: no kernel is started

def test_parameters_are_read_with_default_type_and_help(tmp_path):
    found = runs.parameters_of(notebook(tmp_path/"a.ipynb", settings="names: list[str] = ['a#1', 'é']  # with # inside\nlimit: int | None = None\nfree = 2.5\nshift: float = -1"))
    assert found["names"] == runs.Parameter("names", ["a#1", "é"], "list[str]", "with # inside")
    assert (found["limit"].default, found["free"].type, found["shift"].default) == (None, "float", -1)

@pytest.mark.parametrize("tags", [(), ("other",)])
def test_a_missing_tag_is_refused(tmp_path, tags):
    with pytest.raises(InputError, match="no cells tagged 'parameters'"): runs.execute(notebook(tmp_path/"a.ipynb", tags=tags))
    assert folders(tmp_path) == []

def test_two_tags_code_in_the_cell_and_no_notebook_are_refused(tmp_path):
    twice = nbformat.read(notebook(tmp_path/"a.ipynb", "x = 1"), 4)
    twice.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(twice, tmp_path/"a.ipynb")
    with pytest.raises(InputError, match="2 cells tagged"): runs.parameters_of(tmp_path/"a.ipynb")
    for bad in ("n = 2*3", "import os", "a, b = 1, 2", "n: int"):
        with pytest.raises(InputError, match="only lines such as"): runs.parameters_of(notebook(tmp_path/"b.ipynb", settings=bad))
    with pytest.raises(InputError, match="not plain Python"): runs.parameters_of(notebook(tmp_path/"c.ipynb", settings="%matplotlib inline"))
    with pytest.raises(InputError, match="There is no notebook"): runs.parameters_of(tmp_path/"none.ipynb")
    (tmp_path/"text.ipynb").write_text("no json")
    with pytest.raises(InputError, match="not a Jupyter notebook"): runs.parameters_of(tmp_path/"text.ipynb")

@pytest.mark.parametrize("given, says", [
    (dict(sed=1), "no parameter 'sed'; it has seed, lr, mode"), (dict(seed="1"), "must be int; '1' is str"), (dict(seed=True), "must be int; True is bool"),
    (dict(seed=1.5), "must be int"), (dict(lr="high"), "must be float"), (dict(mode=3), "must be str"), (dict(lr=Path("x")), "no JSON value")])
def test_unknown_names_and_wrong_types_are_refused(tmp_path, given, says):
    with pytest.raises(InputError, match=says): runs.execute(notebook(tmp_path/"a.ipynb"), given)
    assert folders(tmp_path) == []

def test_the_key_holds_what_a_run_depends_on(tmp_path, monkeypatch):
    path = notebook(tmp_path/"a.ipynb", "seed + 1")
    key = runs.run_key(path)
    assert key == runs.run_key(path, dict(seed=0, lr=0.001, mode="fast"))  # defaults are filled in
    assert runs.run_key(path, dict(lr=1)) == runs.run_key(path, dict(lr=1.0)) != key
    assert key != runs.run_key(notebook(tmp_path/"b.ipynb", "seed + 2"))
    assert key != runs.run_key(notebook(tmp_path/"c.ipynb", "seed + 1", settings=SETTINGS.replace("0", "1", 1)))
    nb = nbformat.read(path, 4)
    nb.cells.append(nbformat.v4.new_markdown_cell("prose"))
    nb.cells[1].update(id="other", execution_count=3, outputs=[nbformat.v4.new_output("stream", text="1")])
    nbformat.write(nb, path)
    assert key == runs.run_key(path)  # outputs, ids and prose are not what a result depends on
    monkeypatch.setattr(runs, "source_hash", lambda code: "changed")
    assert key != runs.run_key(path)

def test_the_key_holds_the_modules_that_a_run_needs(tmp_path, monkeypatch):
    library = tmp_path/"mmu_study"
    shutil.copytree(Path(runs.__file__).parent, library, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(runs.mmu_study, "__file__", str(library/"__init__.py"))
    scores, study = notebook(tmp_path/"scores.ipynb", "from mmu_study.evaluation import evaluate"), notebook(tmp_path/"study.ipynb", "from mmu_study.arms import gather")
    def changed(*names):  # by an edit of these modules
        before = [runs.run_key(p) for p in (scores, study)]
        for n in names: (library/n).write_text((library/n).read_text() + "CHANGED = 1\n")
        return [a != b for a, b in zip(before, [runs.run_key(p) for p in (scores, study)])]
    assert changed("batches.py") == [True, True]  # which evaluation imports
    assert changed("cli.py", "arms.py", "methods/manu.py") == [False, True]  # a study depends on what it executes, and that on any module
    assert changed() == [False, False]

@pytest.mark.parametrize("line", ["from mmu_study.arms import gather", "from mmu_study import arms", "from mmu_study.runs import execute_all"])
def test_the_key_of_a_study_holds_the_pages_that_it_executes(tmp_path, line):
    (studies := tmp_path/"nbs/studies").mkdir(parents=True)
    study = notebook(tmp_path/"mine.ipynb", line + "\n'38_mine'")
    page = lambda name, code: notebook(studies/f"{name}.ipynb", code)
    page("38_mine", "1"), page("38_unlearn", "1"), page("38_other", "1")
    def changed(name, code):
        before = runs.run_key(study)
        page(name, code)
        return before != runs.run_key(study)
    assert changed("38_mine", "2  # to execute") and changed("38_unlearn", "2")  # named by the study, by the library
    assert not changed("38_other", "2")

def test_the_import_is_light():
    code = "import sys, mmu_study.runs; print([m for m in ('torch', 'transformers', 'papermill') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"

# Scores

def test_scores_are_checked_and_joined_with_the_parameters(tmp_path):
    df = pd.DataFrame([dict.fromkeys(runs.SCORE_COLUMNS, "x") | dict(view=0, value=.5, step=20, method="ga")])
    runs.save_scores(df, tmp_path)
    run = runs.Run("k", tmp_path, dict(parameters=dict(seed=3, method="all", grid=[1, 2])))
    assert run.scores().equals(df.assign(seed=3))
    assert leftovers(tmp_path) == []
    with pytest.raises(InputError, match="lack the column uid"): runs.save_scores(df.drop(columns="uid"), tmp_path)
    with pytest.raises(InputError, match="has no scores.parquet"): runs.load_scores(tmp_path/"none")

# Execution: a kernel takes a second or two to start

def test_a_run_is_made_once_and_shown_in_its_source(tmp_path, monkeypatch):
    other = tmp_path/"jupyter/kernels/python3/kernel.json"  # a kernel of the usual name that is another program is not used
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps(dict(argv=["false"], display_name="Python 3", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter"))
    path = notebook(tmp_path/"toy.ipynb", "from mmu_study.runs import run_dir\n(run_dir()/'made').write_text(mode)",
        "import os, sys\nsys.stderr.write('noise')\nprint(sys.executable, os.environ['OMP_WAIT_POLICY'], os.environ['CUDA_VISIBLE_DEVICES'], os.getcwd())\nseed")
    run = runs.execute(path, dict(seed=4), progress=False, environment=dict(CUDA_VISIBLE_DEVICES="GPU-b"))
    assert (run.skipped, run.path, (run.path/"made").read_text()) == (False, tmp_path/"data/runs"/run.key, "fast")
    assert run.info == json.loads((run.path/"run.json").read_text()) and run.info["parameters"] == dict(seed=4, lr=1e-3, mode="fast")
    assert set(run.info) == {"notebook", "parameters", "key", "processes", "seconds", "finished", *runs.provenance()} and run.info["commit"] is None
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.path.iterdir())
    assert [name for name, _ in before] == ["made", "notebook.ipynb", "run.json"]
    again = runs.execute(path, dict(seed=4, mode="fast"), progress=False)
    assert again.skipped and again.info == run.info and before == sorted((p.name, p.stat().st_mtime_ns) for p in run.path.iterdir())
    runs.show_outputs(run, path)
    shown = nbformat.read(path, 4)
    assert [c.source for c in shown.cells][0] == SETTINGS and len(shown.cells) == 3
    assert [o.output_type for o in shown.cells[2].outputs] == ["stream", "execute_result"]  # without stderr
    assert shown.cells[2].outputs[0].text == f"{sys.executable} PASSIVE GPU-b {tmp_path}\n" and shown.cells[2].outputs[1].data["text/plain"] == "4"
    assert runs.run_key(path, dict(seed=4)) == run.key
    with pytest.raises(InputError, match="has changed since the run"): runs.show_outputs(run, notebook(tmp_path/"toy.ipynb", "seed + 1"))

def test_what_a_failed_run_leaves_unfinished_is_there_at_the_next_attempt_and_gone_afterwards(tmp_path):
    path = notebook(tmp_path/"long.ipynb", """from mmu_study.runs import unfinished_dir
import os
(folder := unfinished_dir()).mkdir(parents=True, exist_ok=True)
done = sorted(p.name for p in folder.iterdir())
(folder/f'step {len(done)}').touch()
if not done: os._exit(9)
done""")
    with pytest.raises(runs.RunFailed, match="DeadKernel"): runs.execute(path, progress=False)
    assert [p.name for p in (tmp_path/"data/runs/unfinished"/runs.run_key(path)).iterdir()] == ["step 0"]
    run = runs.execute(path, progress=False)
    assert nbformat.read(run.path/"notebook.ipynb", 4).cells[-1].outputs[0].data["text/plain"] == "['step 0']"
    assert list((tmp_path/"data/runs/unfinished").iterdir()) == []

def test_a_failing_notebook_leaves_no_run(tmp_path):
    path = notebook(tmp_path/"bad.ipynb", "print('so far')", "raise KeyError('two\\nlines')", "print('never')")
    with pytest.raises(runs.RunFailed, match=r"^bad.ipynb failed: KeyError: 'two\\nlines' \(executed up to there: .*\)\.$") as e: runs.execute(path, progress=False)
    assert folders(tmp_path) == ["failed"] and e.value.copy == tmp_path/f"data/runs/failed/{runs.run_key(path)}.ipynb"
    assert "so far" in e.value.copy.read_text() and leftovers("data/runs") == []

def test_a_kernel_that_dies_and_one_that_takes_too_long(tmp_path):
    with pytest.raises(runs.RunFailed, match="DeadKernel"): runs.execute(notebook(tmp_path/"a.ipynb", "import os; os._exit(9)"), progress=False)
    with pytest.raises(runs.RunFailed, match="more than 2 seconds"): runs.execute(notebook(tmp_path/"b.ipynb", "import time; time.sleep(60)"), progress=False, timeout=2)
    assert folders(tmp_path) == ["failed"]

def test_exit_codes_and_sentences(tmp_path, monkeypatch, capsys):
    good, untagged = notebook(tmp_path/"a.ipynb"), notebook(tmp_path/"b.ipynb", tags=())
    failing = notebook(tmp_path/"c.ipynb", "from mmu_study.settings import InputError\nraise InputError('forget_pct 0 selects nobody.')")
    processes = command(failing), command(good, "-p", "sed", 1)
    assert finished(processes[0]) == (1, "", ["forget_pct 0 selects nobody."])  # the sentence of the notebook is the message
    assert finished(processes[1]) == (2, "", ["a.ipynb has no parameter 'sed'; it has seed, lr, mode."])
    assert folders(tmp_path) == ["failed"]
    for path, value, says in ((good, "many", "Parameter 'seed' of a.ipynb must be int; 'many' is str."), (good, "[", "The value '[' is not YAML."),
            (untagged, "1", "b.ipynb has no cells tagged 'parameters'; exactly one code cell must carry the tag.")):
        monkeypatch.setattr(sys, "argv", ["runs", str(path), "-p", "seed", value])
        with pytest.raises(SystemExit) as e: runs.main()
        assert e.value.code == 2 and capsys.readouterr().err == says + "\n"

@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_in_the_middle_and_the_same_command_again(tmp_path, processes):
    path = notebook(tmp_path/"a.ipynb", DIR + "  # not accelerate", "(folder/'half').write_text('half')\nif not (started := pathlib.Path('started')).exists():\n"
        "    started.write_text(str(os.getpid()))\n    import time; time.sleep(60)", "(folder/'half').write_text('whole')")
    argv = path, "-p", "lr", "1e-4", "--processes", processes
    first = command(*argv, start_new_session=True)
    started(tmp_path)
    below = psutil.Process(first.pid).children(recursive=True)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    until(lambda: all(map(ended, below)), 5)  # nothing goes on behind it
    assert folders(tmp_path) == []
    code, out, _ = finished(command(*argv))
    key, = runs.run_keys(path, [dict(lr=1e-4)], processes)
    assert code == 0 and out.startswith("a: executed in") and out.endswith(f"data/runs/{key}\n")
    assert folders(tmp_path) == [key] and (tmp_path/"data/runs"/key/"half").read_text() == "whole"
    assert leftovers("data/runs") == []

def test_an_interruption_ends_the_kernel_and_leaves_nothing(tmp_path):
    path = notebook(tmp_path/"a.ipynb", "import os, pathlib, time\npathlib.Path('started').write_text(str(os.getpid()))\ntime.sleep(60)")
    process = command(path)
    kernel = started(tmp_path)
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 143 and folders(tmp_path) == [] and leftovers("data/runs") == []
    until(lambda: ended(kernel), 5)

def test_two_processes_execute_once(tmp_path):
    path = notebook(tmp_path/"a.ipynb", "with open('log', 'a') as f: f.write('run\\n')\nimport time; time.sleep(1)")
    done = [finished(p) for p in [command(path), command(path)]]
    assert [code for code, *_ in done] == [0, 0] and (tmp_path/"log").read_text() == "run\n"
    assert sorted(out.split()[1] for _, out, _ in done) == ["executed", "skipped,"]

# Several processes: they share what two processes of a CPU can share

RANKS = """from accelerate import PartialState
from accelerate.utils import gather_object
from mmu_study.runs import run_dir
state, folder = PartialState(cpu=True), run_dir()
print(gather_object([(state.process_index, folder.name, os.environ['CUDA_VISIBLE_DEVICES'])]))
(folder/'mine').write_text(str(state.process_index))"""

def test_several_processes_make_one_run(tmp_path, monkeypatch):
    (config := tmp_path/"accelerate/default_config.yaml").parent.mkdir()
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\ngpu_ids: '6,7'\nnum_processes: 8\n")  # one's own settings of accelerate do not decide
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    path = notebook(tmp_path/"a.ipynb", "import os", RANKS)
    run = runs.execute(path, progress=False, processes=2, environment=dict(CUDA_VISIBLE_DEVICES="2,3"))
    assert sorted(p.name for p in run.path.iterdir()) == ["mine", "notebook.ipynb", "run.json"] and (run.path/"mine").read_text() == "0"
    shown = nbformat.read(run.path/"notebook.ipynb", 4).cells[-1].outputs[0].text
    assert re.fullmatch(r"\[\(0, '\.partial-.*', '2,3'\), \(1, 'rank1', '2,3'\)\]\n", shown), shown
    assert run.info["processes"] == 2 and [run.key] == runs.run_keys(path, [{}], 2) != [runs.run_key(path)]

def test_one_process_of_several_fails(tmp_path, capfd):
    path = notebook(tmp_path/"a.ipynb", "import os, pathlib, time  # not accelerate\nrank = os.environ['RANK']\npathlib.Path('kernel' + rank).write_text(str(os.getpid()))",
        "while not pathlib.Path('kernel0').exists(): time.sleep(.1)\nif rank == '1': raise ValueError('rank one\\nand more')\ntime.sleep(300)")
    with pytest.raises(runs.RunFailed, match="ValueError: rank one \\(executed") as e: runs.execute(path, progress=False, processes=2, timeout=60)
    assert "ValueError" in e.value.copy.read_text() and folders(tmp_path) == ["failed"] and leftovers("data/runs") == []
    until(lambda: all(not psutil.pid_exists(int((tmp_path/f"kernel{i}").read_text())) for i in (0, 1)), 5)
    assert "Traceback" not in capfd.readouterr().err

def test_work_that_is_not_shared_has_one_process(tmp_path):
    with pytest.raises(InputError, match="a.ipynb uses neither accelerate nor torch.distributed"): runs.execute(notebook(tmp_path/"a.ipynb"), processes=2)
    with pytest.raises(InputError, match="processes is 0"): runs.execute(notebook(tmp_path/"a.ipynb"), processes=0)
