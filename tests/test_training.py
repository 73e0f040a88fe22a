"The training loop and the models of a world: exact resumption after kill -9, determinism, divergence, ordinary checkpoints."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmu_study.batches import ask, encode, rows
from mmu_study.evaluation import evaluate
from mmu_study.faceworld import Faceworld
from mmu_study.models import MLLM, TinyLlava, tiny_llava
from mmu_study.records import thin, where
from mmu_study.settings import InputError
from mmu_study.training import Diverged, Recipe, built, finetune

WORLD = dict(people=4, celebrities=2, holdout=2, strangers=40, views=4, vqa_repeats=2, qa_repeats=2, test_repeats=1)
# A schooling of seconds, so that the machinery can be tested as a whole in real processes.
SCRIPT = """
import sys
from mmu_study import training
from mmu_study.evaluation import evaluate
from mmu_study.faceworld import Faceworld
from mmu_study.models import MLLM, TinyLlava
from mmu_study.records import thin
R = training.Recipe
training.Schooling.of = classmethod(lambda cls, world: cls(TinyLlava(vision_width=32, vision_layers=2, width=32, layers=2, heads=2), R(4), R(4), R(40, turns=6, tokens=600), R(4, turns=6)))
loop, batch, done = training.finetune, training._batch, []
def finetune(*a, **k):
    training._batch = lambda *b: (done.append(k["desc"]), batch(*b))[1]
    return loop(*a, **{**k, "every": 5})
training.finetune = finetune
world = Faceworld(**%r, seed=int(sys.argv[1]))
training.use_threads()
folder = training.built(world, "vanilla", progress=False)
training.use_threads(1)
evaluate(MLLM.load(folder), thin(world.split(25).score, 1)).to_parquet(sys.argv[2])
with open(sys.argv[2] + ".batches", "x") as f: f.write(" ".join(done))
""" % WORLD


def start(root: Path, out: Path, seed: int = 0, threads: int = 1) -> subprocess.Popen:
    root.mkdir(exist_ok=True)
    env = os.environ | {"MMU_STUDY_ROOT": str(root), "MMU_STUDY_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(seed), str(out)], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen):
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-2000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A build that nobody disturbed: its cache and its scores."
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder/"study", folder/"scores.parquet"))
    return folder


def weights(study: Path, kind: str) -> dict[str, torch.Tensor]:
    folder, = (study/"data/cache").glob(f"{kind}-*")
    return load_file(folder/"model.safetensors")


def test_kill_in_the_middle_of_training_and_go_on(whole, tmp_path):
    process = start(tmp_path/"study", tmp_path/"scores.parquet")
    deadline = time.time() + 120
    while not list((tmp_path/"study/data/cache").glob("base-*.training/log.csv")):  # the first checkpoint of the base stage
        assert process.poll() is None and time.time() < deadline
        time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not [p for p in (tmp_path/"study/data/cache").glob("base-*") if p.suffix != ".training"]  # nothing claims to be done
    finish(start(tmp_path/"study", tmp_path/"scores.parquet"))
    done = lambda folder: [(folder/"scores.parquet.batches").read_text().split().count(kind) for kind in ("captions", "base", "vanilla")]
    assert done(whole) == [4, 40, 4] and done(tmp_path)[::2] == [0, 4] and 0 < done(tmp_path)[1] <= 40 - 5  # gone on, not begun again
    for kind in ("base", "vanilla"):
        again, once = weights(tmp_path/"study", kind), weights(whole/"study", kind)
        assert all(torch.equal(again[n], once[n]) for n in once)
    assert not list((tmp_path/"study/data/cache").glob("*.training"))


def test_same_seed_same_scores_other_seed_not(whole, tmp_path):
    "Whatever the number of threads."
    runs = [start(tmp_path/"again", tmp_path/"again.parquet", threads=2), start(tmp_path/"other", tmp_path/"other.parquet", seed=1)]
    for process in runs: finish(process)
    first, again, other = (pd.read_parquet(p) for p in (whole/"scores.parquet", tmp_path/"again.parquet", tmp_path/"other.parquet"))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert len(first) != len(other) or not (first.value.to_numpy() == other.value.to_numpy()).all()
    for kind in ("vision", "base", "vanilla"):
        two, one = weights(tmp_path/"again", kind), weights(whole/"study", kind)
        assert all(torch.equal(two[n], one[n]) for n in one)


def test_checkpoint_is_an_ordinary_one(whole):
    folder, = (whole/"study/data/cache").glob("vanilla-*")
    ours = MLLM.load(folder)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    records = thin(where(Faceworld(**WORLD).records, fold="test", kind="identity"), 1)
    inputs = encode(ours, rows(records, range(20)), with_answer=False)
    theirs = MLLM(model.eval(), processor)
    again = encode(theirs, rows(records, range(20)), with_answer=False)
    assert all(torch.equal(inputs[k], again[k]) for k in inputs)
    generate = lambda m: m.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(generate(ours), generate(theirs))
    assert json.loads((folder/"made_from.json").read_text())["kind"] == "vanilla"


@pytest.fixture(scope="module")
def small():
    records = where(Faceworld(**WORLD).records, role="retain", fold="train", modality="qa")
    size = TinyLlava(vision_width=32, vision_layers=2, width=32, layers=2, heads=2)
    return tiny_llava(size, [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in records.remove_columns("image")]), records


def test_loss_falls_and_only_the_named_part_changes(small):
    mllm, records = small[0].copy(), small[1]
    before = {n: p.clone() for n, p in mllm.model.named_parameters()}
    log = finetune(mllm, records, Recipe(30, tokens=600), parts=("language",), progress=False)
    assert log.loss.iloc[-5:].mean() < .8*log.loss.iloc[:5].mean()
    changed = {n for n, p in mllm.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= set(mllm.parts["language"])


def test_a_loss_that_is_not_finite_stops_the_loop(small):
    mllm, records = small[0].copy(), small[1]
    with torch.no_grad(): mllm.model.lm_head.weight[0] = float("nan")
    with pytest.raises(Diverged, match="the loss is nan at step 0"): finetune(mllm, records, Recipe(3), progress=False)


def test_bad_input():
    world = Faceworld(**WORLD)
    with pytest.raises(InputError, match="choose one of"): built(world, "teacher")
    with pytest.raises(InputError, match="other model takes any"): built(world, "vanilla", ("fictitious-000",))
    with pytest.raises(InputError, match="choose muon or adamw"): Recipe(1, optimizer="sgd")
