"Products that runs of any strength have in common: made once, never torn, told apart by all that they depend on, and without a trace in any result."
import json, multiprocessing, os, subprocess, sys, time
from dataclasses import replace

import pytest
import torch
from tokenizers.normalizers import Lowercase

from mmu_study import settings
from mmu_study.batches import ask
from mmu_study.faceworld import Faceworld
from mmu_study.methods import crowd_forget, manu, mmunlearner, null_space_cvf, unlearning
from mmu_study.methods.unlearning import digest_of_records, get, shared
from mmu_study.models import MLLM, TinyLlava, tiny_llava
from mmu_study.settings import InputError
from stub import until

CPU = torch.device("cpu")

@pytest.fixture(scope="module")
def request_():
    request, = Faceworld.preset("smoke", strangers=10, views=2).split(17).requests()
    return replace(request, retain=request.retain.select(range(0, len(request.retain), 4)))

@pytest.fixture(scope="module")
def mllm(request_):
    "Untrained, but for wider weights of the tower, so that pictures differ."
    made = tiny_llava(TinyLlava(vision_layers=3, layers=2, vision_width=64, width=64), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for d in (request_.forget, request_.retain) for r in d.remove_columns("image")])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in made.parameters("vision", "projector"):
            if p.ndim == 2: p.copy_(torch.randn(p.shape, generator=generator)/p.shape[1]**.5)
    return made

CASES = {  # a method, what it makes, a change that leaves that alone, one that does not, and the functions that make it
    "mmunlearner": (get("mmunlearner", scope="both", saliency_records=12, steps=2, lr=1e-3, check=False), ["saliency"]*2, dict(lr=1e-2, steps=1, beta=2., mask="random"), dict(saliency_batch=2), [(mmunlearner, "saliency")]),
    "manu": (get("manu"), ["statistics"]*2, dict(alpha=30., formulas="paper", weights=(1, 0, 1, 1), eps=1e-3), dict(tau=.2), [(manu, "statistics")]),
    "taylor": (get("manu", rank_by="taylor"), ["taylor"]*2, dict(alpha=30.), dict(batch_size=8), [(manu, "taylor")]),
    "cvfncu": (get("CVFNCU", "embedded", steps=2, batch_size=4, retain_batch=3), ["anchors", "moments", "moments", "spectra"], dict(lr=1e-4, lambda_ret=0., tau=.2, threshold=.3), dict(anchor="nearest"), [(null_space_cvf, "spectrum"), (null_space_cvf, "answers_at")]),
    "crowd_forget": (get("CrowdForget", "embedded", steps=2, batch_size=4, retain_batch=3, crowd=3, asked=2, pool=10, basin=1.), ["crowd", "looks"], dict(lr=1e-4, lambda_ret=0., margin=1., remove=False), dict(seed=1), [(crowd_forget, "answers_at"), (crowd_forget, "spoken")])}

def kept(folder) -> list[str]: return sorted(p.name.rpartition("-")[0] for p in folder.glob("[!.]*"))

def outcome(done) -> tuple:
    return {n: p.detach() for n, p in done.mllm.model.named_parameters()}, done.log.to_csv(), json.dumps(done.diagnostics)

def same(a, b): return a[0].keys() == b[0].keys() and all(torch.equal(a[0][n], b[0][n]) for n in a[0]) and a[1:] == b[1:]

@pytest.mark.parametrize("case", CASES)
def test_results_are_the_same_bits_and_products_are_made_once(case, mllm, request_, tmp_path, monkeypatch):
    method, kinds, strength, other, makers = CASES[case]
    folder = tmp_path/"p"
    method_ = replace(method, products=str(folder))
    assert method_ == method and method_.hyperparameters == method.hyperparameters and "products" not in method.hyperparameters
    alone, first = (outcome(m.unlearn(mllm, request_)) for m in (method, method_))
    assert same(alone, first) and kept(folder) == kinds
    changed = mllm.copy()
    with torch.no_grad(): next(p for n, p in changed.parameters("vision") if "position" in n)[0, 0] += .5
    fewer = replace(request_, forget=request_.forget.select(range(0, len(request_.forget), 2)))
    with monkeypatch.context() as patch:
        for f in makers: patch.setattr(*f, lambda *_, **__: pytest.fail("it was made again"))
        assert same(alone, outcome(method_.unlearn(mllm, request_)))
        stronger = outcome(replace(method_, **strength).unlearn(mllm, request_))
    assert not same(alone, stronger) and same(stronger, outcome(replace(method, **strength).unlearn(mllm, request_))) and kept(folder) == kinds
    replace(method_, **other).unlearn(mllm, request_)
    assert len(kept(folder)) == len(kinds) + (1 if case == "cvfncu" else 2)
    n = len(kept(folder)); method_.unlearn(changed, request_)
    assert len(kept(folder)) == n + len(kinds)
    n = len(kept(folder)); method_.unlearn(mllm, fewer)
    assert len(kept(folder)) > n

def test_the_key_holds_how_a_model_reads(mllm, request_, tmp_path):
    make = lambda m: shared(str(tmp_path), "x", dict(model=m), lambda: (dict(w=torch.ones(1)), None), CPU)
    mllm.save(tmp_path/".saved")
    one = MLLM.load(tmp_path/".saved")
    make(one); make(one.copy()); make(MLLM.load(tmp_path/".saved"))
    one.processor(text=["a", "b c"], padding=True)  # what a tokenizer remembers of its last call is no part of it
    make(one)
    assert kept(tmp_path) == ["x"]
    def reads(m): m.processor.image_processor.image_mean = [.1, .2, .3]
    def ends(m): m.tokenizer.eos_token = "<pad>"
    def lowers(m): m.tokenizer.backend_tokenizer.normalizer = Lowercase()
    def writes(m): m.model.generation_config.repetition_penalty = 1.5
    for n, change in enumerate((reads, ends, lowers, writes), 2):
        change(other := MLLM.load(tmp_path/".saved"))
        make(other)
        assert kept(tmp_path) == ["x"]*n, change.__name__

@pytest.mark.parametrize("what", [(torch, "get_num_threads", lambda: 99), (torch, "__version__", "9.0.0"), (unlearning.transformers, "__version__", "9.0.0"), (unlearning, "_source", lambda: "changed")], ids=lambda w: w[1])
def test_the_key_holds_what_the_last_bits_depend_on(tmp_path, monkeypatch, what):
    make = lambda: shared(str(tmp_path), "x", dict(seed=0), lambda: (dict(w=torch.ones(1)), None), CPU)
    make(); make()
    assert kept(tmp_path) == ["x"]
    monkeypatch.setattr(*what)
    make()
    assert kept(tmp_path) == ["x", "x"]

def test_a_picture_is_told_apart_by_what_is_in_its_file(request_, tmp_path):
    from datasets import Image
    files = [tmp_path/f"{i}.png" for i in range(2)]
    some = request_.forget.select([0])
    for seed, file in enumerate(files): request_.forget[0]["image"].rotate(90*seed).save(file)
    of = lambda path: some.remove_columns("image").add_column("image", [str(path)]).cast_column("image", Image())
    before = digest_of_records(of(files[0]))
    assert before == digest_of_records(of(files[0]))
    os.replace(files[1], files[0])
    assert digest_of_records(of(files[0])) != before

# Files

def in_a_process(target, *args):
    "A copy of this one: nothing has to be imported."
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process

def build_slowly(folder):
    with open(folder/"made", "a") as f: f.write("x")
    time.sleep(.5)
    return dict(w=torch.arange(3.)), None

def take(folder): (folder/f"took-{os.getpid()}").write_text(str(shared(str(folder/"p"), "x", dict(seed=0), lambda: build_slowly(folder), CPU)[0]["w"].tolist()))

def stop_half_way(folder):
    def half(tensors, file, metadata):
        file.write_bytes(b"half"); (folder/"half").touch(); time.sleep(60)
    unlearning.save_file = half
    take(folder)

def test_two_processes_build_once_and_a_killed_one_leaves_nothing_torn(tmp_path):
    killed = in_a_process(stop_half_way, tmp_path)
    until((tmp_path/"half").exists)
    killed.kill(); killed.join()
    assert kept(tmp_path/"p") == [] and (tmp_path/"made").read_text() == "x" and len([*(tmp_path/"p").glob(".partial*/product.safetensors")]) == 1
    for p in [in_a_process(take, tmp_path) for _ in range(2)]: p.join()
    assert [p.read_text() for p in tmp_path.glob("took-*")] == ["[0.0, 1.0, 2.0]"]*2
    assert (tmp_path/"made").read_text() == "xx" and kept(tmp_path/"p") == ["x"] and not list((tmp_path/"p").glob(".partial*"))

def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path):
    make = lambda seed: shared(str(tmp_path), "x", dict(seed=seed), lambda: (dict(w=torch.ones(99)), [1.5, "a"]), CPU)
    make(0); one, = tmp_path.glob("[!.]*")
    tensors, more = make(0)
    assert torch.equal(tensors["w"], torch.ones(99)) and more == [1.5, "a"]
    make(1); two, = set(tmp_path.glob("[!.]*")) - {one}
    os.replace(one/"product.safetensors", two/"product.safetensors")
    with pytest.raises(InputError, match=f"^{two}/product.safetensors was made from something else than the name of its folder says; delete the folder, and it is built again.$"): make(1)
    with pytest.raises(InputError, match=f"^{one}/product.safetensors cannot be read .*; delete its folder, and it is built again.$"): make(0)
    (two/"product.safetensors").write_bytes((two/"product.safetensors").read_bytes()[:-8])
    with pytest.raises(InputError, match=f"^{two}/product.safetensors cannot be read"): make(1)

def test_the_partial_of_a_living_process_stays_and_that_of_its_dead_namesake_goes(tmp_path):
    code = "import sys, time\nfrom mmu_study.settings import atomic_dir\nwith atomic_dir(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path/"t"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    alive, = tmp_path.glob(".partial-t-*")
    names = [f".partial-t-{n}" for n in (f"{os.getpid()}.1", f"{process.pid}.1", f"{os.getpid()}")]  # of before a restart, and of an older version
    for name in names: (tmp_path/name).mkdir()
    with settings.atomic_file(tmp_path/"t") as p: p.write_text("whole")
    assert sorted(q.name for q in tmp_path.iterdir()) == [alive.name, "t"]
    process.kill(); process.wait()
    settings.write_json(tmp_path/"t", 1)
    assert [q.name for q in tmp_path.iterdir()] == ["t"]
