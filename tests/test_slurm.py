"The same grid through a real SLURM: Debian's slurm-wlm and munge, one node, started for this test."
import os, shutil, subprocess
from pathlib import Path

import pytest

from mmu_study import sweeps
from stub import folders, grid_file, leftovers, notebook, run, start, until

PATH = f"{os.environ['PATH']}:/usr/sbin"
missing = [c for c in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel") if not shutil.which(c, path=PATH)]
has_slurm = pytest.mark.skipif(bool(missing) or os.getuid() != 0, reason=f"a SLURM of one's own needs root and Debian's packages slurm-wlm and munge{'; there is no ' + ', '.join(missing) if missing else ''}")

@pytest.fixture
def cluster(project, tmp_path, monkeypatch):
    "A SLURM of one node."
    pytest.importorskip("submitit", reason="submitit, of the extra mmu_study[slurm], is not installed")
    script, folder = Path(__file__).with_name("slurm.sh"), tmp_path/"slurm"
    monkeypatch.setenv("SLURM_CONF", str(folder/"slurm.conf"))
    try:
        started = subprocess.run([script, "start", folder], capture_output=True, text=True, timeout=120)
        assert started.returncode == 0, started.stderr
        yield
    finally: subprocess.run([script, "stop", folder], check=True, timeout=60)

def jobs(): return subprocess.check_output(["squeue", "--noheader", "--array", "--format=%i %T"], text=True).split("\n")[:-1]

@has_slurm
def test_a_grid_a_cancelled_job_and_a_retry(tmp_path, cluster):
    notebook(tmp_path/"a.ipynb")
    grid_file(tmp_path/"g.yaml", "notebook: a.ipynb\nlist: [{what: hang}, {seed: 1}, {seed: 2}]\nslurm: {partition: none, time: 5, setup: [export FROM_SETUP=1]}")
    code, _, err = run("sweep", "g.yaml", "--executor", "slurm")
    assert code == 2 and err.splitlines()[-1].startswith("SLURM did not take the jobs: ") and "invalid partition specified: none" in err  # before it, sbatch's own words
    command = ["sweep", "g.yaml", "--executor", "slurm", "--partition", "main", "--jobs", 1]
    process = start(*command)
    until(lambda: Path("log").exists())
    shown = run("status", "g.yaml")[1]
    assert shown.startswith("g: 3 runs: 1 running, 2 missing")
    code, _, err = run(*command)
    assert (code, err) == (2, "SLURM still has 3 jobs of the grid g; wait for them, or end them with: scancel --name=mmu-g.\n")
    ids = sorted(line.split()[0] for line in jobs())
    assert len(ids) == 3
    for i in (2, 0): subprocess.run(["scancel", ids[i]], check=True)  # one that waits, one that runs
    out, err = process.communicate(timeout=180)
    found = sweeps.load_grid("g.yaml")
    table = sweeps.status(found)
    assert process.returncode == 1 and "g: 3 runs: 1 done, 2 failed" in out.splitlines(), out + err
    assert [*table.state] == ["failed", "done", "failed"] and "SIGTERM, as when a job is cancelled" in table.error[0] and table.error[2] == f"SLURM job {ids[2]} ended before its run did: it wrote nothing, as when it is cancelled while it waits"
    assert "FROM_SETUP" in "".join(p.read_text() for p in (tmp_path/"data/runs/.submitit").glob("*.sh"))
    Path("mended").touch()
    until(lambda: jobs() == [])  # a job ends a moment after its run
    code, out, err = run(*command, "--retry-failed", seconds=180)
    assert (code, out.splitlines()[-1]) == (0, "g: 3 runs: 3 done"), out + err
    assert folders("data/runs") == sorted(r.folder.name for r in found.runs) and leftovers("data/runs") == []
    assert Path("log").read_text().splitlines() == ["hang 0", "ok 1", "hang 0", "ok 2"]

def test_debug_executes_in_this_process(project, tmp_path):
    pytest.importorskip("submitit", reason="submitit, of the extra mmu_study[slurm], is not installed")
    notebook(tmp_path/"a.ipynb")
    grid_file(tmp_path/"g.yaml", "notebook: a.ipynb\nproduct: {what: [raise, ok]}")
    code, out, err = run("sweep", "g.yaml", "--executor", "debug")
    assert code == 1 and "g: 2 runs: 1 done, 1 failed" in out and "ValueError: not this one" in out, out + err
