"The environment of every test, set before anything imports torch: offline, one thread (the notebooks run beside), and workers that do not spin while they wait."
import os
from pathlib import Path

import pytest

os.environ.update(OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project folder of its own, which is the current one; `data/runs` is below it. Commands that are started there find this library."
    import mmu_study
    monkeypatch.setenv("MMU_STUDY_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(mmu_study.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]))
    for name in ("MMU_STUDY_RUN_DIR", "CUDA_VISIBLE_DEVICES"): monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
