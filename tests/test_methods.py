"The contract that every unlearning method keeps, from whichever module of `mmu_study.methods` it comes, on a LLaVA and on a Qwen2-VL."
import inspect, json, math, pkgutil, random
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from importlib import import_module

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets

import mmu_study.methods
from mmu_study.batches import answer_log_probs, ask, encode, rows
from mmu_study.evaluation import candidates, evaluate
from mmu_study.faceworld import Faceworld
from mmu_study.methods.unlearning import GradientMethod, Method, Unlearned, get, method_class, methods, passes, sees_table
from mmu_study.models import MLLM, PART_NAMES, TinyLlava, TinyQwen2VL, tiny_llava, tiny_qwen2_vl
from mmu_study.records import ForgetRequest, table, thin, where
from mmu_study.settings import InputError
from mmu_study.training import Diverged, Recipe, finetune

for module in pkgutil.iter_modules(mmu_study.methods.__path__): import_module(f"mmu_study.methods.{module.name}")

# What has to be known about a method beforehand

SHORT, FOLDER = dict(steps=2, batch_size=4, retain_batch=3), "the folder of the model that is to be unlearned"

@dataclass(frozen=True)
class Case:
    "How a method is run here, and what it refuses."
    fields: dict = field(default_factory=lambda: SHORT)  # make a run short, and possible on a model of two layers
    presets: dict = field(default_factory=dict)  # preset -> further fields
    seeing: dict = field(default_factory=lambda: dict(lora=0, parts=(), lr=1e-3, batch_size=8, retain_batch=8))  # make what it sees show in a bit
    reaches: tuple = PART_NAMES  # parts that it can change at all
    no_lora: str = ""  # the sentence that refuses LoRA; empty: it takes it
    no_parts: dict = field(default_factory=dict)  # parts -> the sentence that refuses them

CASES = dict(
    RMU=Case(dict(SHORT, layer=2)),
    NPO=Case(presets=dict(released=dict(reference_model=FOLDER))),
    Retrain=Case(dict(base=FOLDER, steps=2, tokens=300), seeing=dict(parts=()), no_lora="Retrain has no field lora", no_parts={("vision", "projector"): "with language among them"}),
    MMUnlearner=Case(dict(SHORT, saliency_records=16, saliency_batch=4, check=False), seeing=dict(lr=1e-3), no_lora="lora of MMUnlearner is 2; it must be 0, because a low-rank change"),
    MANU=Case(dict(batch_size=16), seeing={}, reaches=("vision", "language"), no_lora="MANU has no field lora", no_parts={("vision", "projector"): "must be some of vision, language"}),
    CVFNCU=Case(dict(SHORT, redraws=20), seeing=dict(lr=1e-2), no_lora="lora of CVFNCU is 2; it must be 0, because the null space", no_parts={("language",): "but not language alone"}),
    CrowdForget=Case(dict(SHORT, crowd=3, asked=2, pool=10), seeing=dict(lr=1e-3, batch_size=8, retain_batch=8), no_lora="lora of CrowdForget is 2; it must be 0, because full weights", no_parts={p: "text stays what it is" for p in (("language",), ())}))

def case(name) -> Case: return CASES.get(name, Case())

def small(name, mllm, preset="embedded", **overrides) -> Method:
    "A method whose run is short."
    values = {**case(name).fields, **case(name).presets.get(preset, {}), **overrides}
    return get(name, preset, **{k: str(folder_of(mllm)) if v is FOLDER else v for k, v in values.items()})

def steps_of(name) -> int: return 2 if name in STEPPING else 1

STEPPING = [n for n in methods() if issubclass(method_class(n), GradientMethod)]
WEIGHTS = dict(full={}, lora=dict(lora=2, lr=1e-2))
each_method = pytest.mark.parametrize("name", methods())
each_stepping = pytest.mark.parametrize("name", STEPPING)
each_preset = pytest.mark.parametrize("name, preset", [(n, p) for n in methods() for p in method_class(n).PRESETS])
each_sight = pytest.mark.parametrize("name, preset", {(n, *get(n, p).sees.items()): (n, p) for n in methods() for p in reversed(method_class(n).PRESETS)}.values())  # one preset of those that see the same
full_and_lora = pytest.mark.parametrize("name, weights", [(n, w) for n in methods() for w in WEIGHTS if w == "full" or not case(n).no_lora])

# Models, a request

@pytest.fixture(scope="module")
def world(): return Faceworld.preset("smoke", strangers=10, views=4)

@pytest.fixture(scope="module")
def request_(world):
    "Two people to forget and three to keep, every fact asked once in each way."
    whole = world.split(17).requests()[0]
    people = sorted({*whole.retain["entity"]})[:3]
    return ForgetRequest(thin(whole.forget, 1), thin(where(whole.retain, entity=people), 1), generic=whole.generic)

def taught(world, request_, make, size) -> MLLM:
    "Hardly trained: a contract does not depend on what a model knows; but the loss on forget records must be below a cap."
    made = make(size, [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")])
    finetune(made, concatenate_datasets([request_.forget, request_.retain]), Recipe(steps=40, tokens=800), progress=False)
    return made

@pytest.fixture(scope="module")
def mllm(world, request_): return taught(world, request_, tiny_llava, TinyLlava(vision_width=64, vision_layers=3, width=64, layers=2))

@pytest.fixture(scope="module")
def qwen(world, request_): return taught(world, request_, tiny_qwen2_vl, TinyQwen2VL())

FOLDERS = {}  # id of a model -> where it is saved; the model is kept, or its id might come again

@pytest.fixture(scope="module", autouse=True)
def _folders(tmp_path_factory):
    FOLDERS["new"] = lambda: tmp_path_factory.mktemp("model")/"m"
    yield
    FOLDERS.clear()

def folder_of(mllm):
    if id(mllm) not in FOLDERS: FOLDERS[id(mllm)] = mllm.save(FOLDERS["new"]()), mllm
    return FOLDERS[id(mllm)][0]

def in_bf16(mllm) -> MLLM:
    low = mllm.copy()
    low.model.to(torch.bfloat16)
    return low

def weights_of(mllm) -> dict[str, torch.Tensor]: return {n: p.detach().clone() for n, p in mllm.model.named_parameters()}

def changed(before: dict, mllm) -> set[str]:
    "Names of the parameters that differ in a bit; the names themselves must be the same."
    after = dict(mllm.model.named_parameters())
    assert before.keys() == after.keys()
    return {n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].detach().view(torch.uint8))}

def rng_states(): return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()

# What every method does

@pytest.fixture(scope="module")
def run(mllm, request_):
    "One short run of a method with a preset, and what was there before it; every test that asks for it gets the same."
    @lru_cache(None)
    def run(name, preset="embedded"):
        before, rng = weights_of(mllm), rng_states()
        return small(name, mllm, preset).unlearn(mllm, request_), before, rng == rng_states()
    return run

@each_preset
def test_the_model_handed_in_is_untouched(mllm, run, name, preset):
    done, before, rng_is_as_it_was = run(name, preset)
    assert isinstance(done, Unlearned) and changed(before, mllm) == set() and rng_is_as_it_was
    assert not mllm.model.training and all(p.requires_grad and p.grad is None for p in mllm.model.parameters())
    assert not done.mllm.model.training and all(p.requires_grad and p.grad is None for p in done.mllm.model.parameters())
    assert not {p.data_ptr() for p in mllm.model.parameters()} & {p.data_ptr() for p in done.mllm.model.parameters()}

@each_method
@pytest.mark.parametrize("parts", [("language",), ("vision", "projector"), ()], ids=lambda p: "+".join(p) or "all")
def test_only_the_declared_parts_change(mllm, request_, name, parts):
    if sentence := case(name).no_parts.get(parts):
        with pytest.raises(InputError, match=sentence): small(name, mllm, parts=parts)
        return
    done = small(name, mllm, parts=parts).unlearn(mllm, request_)
    moved = changed(weights_of(mllm), done.mllm)
    for part in PART_NAMES:
        may = part in (parts or PART_NAMES) and part in case(name).reaches
        assert bool(moved & {*mllm.parts[part]}) == may, part
        assert bool(done.diagnostics["update_norm"][part]) == may, part

@each_method
def test_lora_moves_linear_layers_by_its_rank_or_is_refused(mllm, request_, name):
    if sentence := case(name).no_lora:
        with pytest.raises(InputError, match=sentence): small(name, mllm, lora=2)
        return
    done = small(name, mllm, lora=2, lr=1e-2, parts=("language",)).unlearn(mllm, request_)
    before = weights_of(mllm)
    moved = changed(before, done.mllm)
    linear = {f"{n}.weight" for n, m in mllm.model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert moved == {f"model.language_model.{n}" for n in linear} and "lm_head.weight" not in moved
    delta = dict(done.mllm.model.named_parameters())["model.language_model.layers.0.mlp.up_proj.weight"] - before["model.language_model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(delta.double(), rtol=1e-4) == 2
    assert done.diagnostics["trainable"] == 2*sum(sum(before[n].shape) for n in moved)
    assert not any("lora" in n or "base_layer" in n for n in done.mllm.model.state_dict())

@pytest.mark.parametrize("name, weights", [*((n, "full") for n in methods()), ("GradDiff", "lora")])
def test_a_run_is_deterministic_and_a_watched_one_the_same(mllm, request_, run, name, weights):
    seen = []
    def watch(step, m):
        seen.append((step, m.model.training, torch.is_grad_enabled(), weights_of(m)))
        torch.rand(2), np.random.rand(2), random.random(), m.model.train(), m.train_only("vision")
        with torch.enable_grad(): sum(p.sum() for p in m.model.parameters() if p.requires_grad).backward()
    method = small(name, mllm, **WEIGHTS[weights])
    first = run(name)[0] if weights == "full" else method.unlearn(mllm, request_)
    torch.rand(5)
    last = steps_of(name)
    watched = method.unlearn(mllm, request_, watch=watch, watch_at=range(last))
    assert changed(weights_of(first.mllm), watched.mllm) == set() and first.log.equals(watched.log)
    assert [s[:3] for s in seen] == [(step, False, False) for step in range(last + 1)]
    assert changed(seen[0][3], mllm) == set() and changed(seen[0][3], watched.mllm) and changed(seen[-1][3], watched.mllm) == set()
    if name in STEPPING: assert changed(seen[1][3], watched.mllm) and changed(weights_of(first.mllm), replace(method, seed=1).unlearn(mllm, request_).mllm)
    with pytest.raises(InputError, match=f"the run has steps 0 to {last}"): method.unlearn(mllm, request_, watch=watch, watch_at=(last + 1,))

@each_stepping
def test_watching_leaves_dropout_alone(mllm, request_, name):
    "In a model with dropout every step draws random numbers, so a watcher that draws some must not move them on."
    noisy = mllm.copy()
    for layer in noisy.model.model.language_model.layers: layer.self_attn.attention_dropout = .3
    method = small(name, mllm, lr=1e-3)
    alone, watched = (method.unlearn(noisy, request_, watch=w, watch_at=(0, 1) if w else ()) for w in (None, lambda step, m: torch.rand(3)))
    assert changed(weights_of(alone.mllm), watched.mllm) == set()

@full_and_lora
def test_numbers_that_are_not_finite_stop_the_run(mllm, request_, name, weights):
    sick = mllm.copy()
    with torch.no_grad(): sick.model.model.language_model.layers[0].mlp.up_proj.weight[5] = float("nan") if weights == "full" else float("inf")
    method, before, rng = small(name, sick, **WEIGHTS[weights]), weights_of(sick), rng_states()
    with pytest.raises(Diverged, match=rf"^{name}: .*(nan|inf)"): method.unlearn(sick, request_)
    assert changed(before, sick) == set() and rng_states() == rng

@full_and_lora
def test_saved_and_loaded_it_gives_the_same_logits(mllm, request_, run, name, weights, tmp_path):
    check_reloads((run(name)[0] if weights == "full" else small(name, mllm, **WEIGHTS[weights]).unlearn(mllm, request_)).mllm, request_, tmp_path)

def check_reloads(done, request_, tmp_path):
    again = MLLM.load(done.save(tmp_path/"model"), done.dtype)
    for modality in ("vqa", "qa"):
        batch = encode(done, rows(where(request_.forget, modality=modality), range(3)))
        with torch.inference_mode(): assert torch.equal(done.model(**batch).logits, again.model(**batch).logits)

@each_method
def test_bf16(mllm, request_, name):
    low = in_bf16(mllm)
    done = small(name, low, **dict(lr=1e-3) if name in STEPPING else {}).unlearn(low, request_)
    assert {p.dtype for p in done.mllm.model.parameters()} == {torch.bfloat16} and done.diagnostics["dtype"] == "bfloat16"
    assert done.diagnostics["changed_share"] > 0

@each_stepping
def test_steps_that_bf16_cannot_hold_add_up(mllm, request_, name):
    "A step of 1e-5 is lost on every weight above .01; sixteen of them are not, if what is moved is a copy in fp32."
    low = in_bf16(mllm)
    done = small(name, low, lr=1e-5, steps=16, batch_size=2, retain_batch=1).unlearn(low, request_)
    after = dict(done.mllm.model.named_parameters())
    large = {n: w.float().abs() > .01 for n, w in weights_of(low).items() if w.ndim == 2 and n in changed(weights_of(low), done.mllm)}
    assert sum(int(((after[n] != w) & large[n]).sum()) for n, w in weights_of(low).items() if n in large) > .02*sum(int(l.sum()) for l in large.values()) > 0

@each_method
def test_on_a_qwen2_vl(qwen, request_, name, tmp_path):
    "Runs, repeats itself, leaves what came in alone, moves what it may, is saved and loaded; also in bf16."
    method, before = small(name, qwen), weights_of(qwen)
    done = method.unlearn(qwen, request_)
    moved = changed(before, done.mllm)
    assert changed(before, qwen) == set() and changed(weights_of(done.mllm), method.unlearn(qwen, request_).mllm) == set()
    for part in PART_NAMES: assert bool(moved & {*qwen.parts[part]}) == (part in (method.parts or PART_NAMES) and part in case(name).reaches), part
    check_reloads(done.mllm, request_, tmp_path)
    low = in_bf16(qwen)
    done = small(name, low).unlearn(low, request_)
    assert {p.dtype for p in done.mllm.model.parameters()} == {torch.bfloat16} and done.diagnostics["changed_share"] > 0

def test_scores_of_a_qwen2_vl_are_its_log_probabilities(qwen, request_):
    "Scoring goes on from a cache, after pictures, after text, in batches with padding; the losses read whole sequences."
    for records in (request_.forget, where(request_.forget, modality="qa"), request_.forget):
        some = thin(records, 1).select(range(12))
        found = evaluate(qwen, some).query("metric == 'probability'").set_index("uid").value
        for r in rows(some, range(12)):
            with torch.no_grad(): log_probs, is_answer = answer_log_probs(qwen, encode(qwen, [next(c for c in candidates(r) if c["answer"] in (r["answer"], r["value"]))]))
            assert found[r["uid"]] == pytest.approx(float((log_probs.sum()/is_answer.sum()).exp()), rel=1e-3)
    assert qwen.copy().copy().model.model._forward_pre_hooks.keys() == qwen.model.model._forward_pre_hooks.keys()  # counts positions once

@each_method
def test_a_request_of_one_person(mllm, request_, name):
    one = replace(request_, forget=where(request_.forget, entity=request_.entities[0]))
    done = small(name, mllm).unlearn(mllm, one)
    method = small(name, mllm)
    seen = [m for m in ("vqa", "qa") if m in method.forget_on]
    assert done.diagnostics["changed_share"] > 0 and done.diagnostics["records"]["forget"] in (0, len(where(one.forget, kind="identity", modality=seen)))

@each_sight
@pytest.mark.parametrize("modality", ["vqa", "qa"])
def test_a_request_of_one_modality(mllm, request_, name, preset, modality):
    "It runs, or says in one sentence which records it lacks."
    method = small(name, mllm, preset)
    half = replace(request_, forget=where(request_.forget, modality=modality))
    try: assert method.unlearn(mllm, half).diagnostics["changed_share"] > 0
    except InputError as e:
        assert method.sees[f"forget {dict(vqa='qa', qa='vqa')[modality]}"]
        assert str(e).startswith(f"{name} forgets on ") and str(e).endswith(" records, and the request has none of them.") and "\n" not in str(e)

@each_sight
def test_it_sees_what_it_says(mllm, request_, name, preset):
    "What a method does not look at can be left out without changing a bit; what it looks at cannot."
    method = small(name, mllm, preset, **case(name).seeing)
    result = weights_of(method.unlearn(mllm, request_).mllm)
    for part in ("forget", "retain"):
        for modality in ("vqa", "qa"):
            records = getattr(request_, part)
            meta, person = table(records), records[0]["entity"]
            fewer = records.select(np.flatnonzero((meta.modality != modality) | (meta.entity != person)))
            other = method.unlearn(mllm, replace(request_, **{part: fewer})).mllm
            assert bool(changed(result, other)) == method.sees[f"{part} {modality}"], (part, modality)
    only_identity = replace(request_, forget=where(request_.forget, kind="identity"), **dict(generic=None) if not method.sees["generic pictures"] else {})
    assert changed(result, method.unlearn(mllm, only_identity).mllm) == set()

@each_preset
def test_the_report_is_complete(mllm, run, name, preset):
    method, done = small(name, mllm, preset), run(name, preset)[0]
    report = json.loads(json.dumps(done.diagnostics))
    assert report["method"] == name and set(report["fields"]) == {f.name for f in fields(method)} - {"products", "mask_file"}
    assert {"steps", "device", "dtype", "changed_share", "update_norm", "records"} <= set(report)
    assert 0 < report["changed_share"] <= 1 and set(report["update_norm"]) == set(PART_NAMES) and report["steps"] >= 1
    assert set(report["records"]) == {"forget", "retain"} and bool(report["records"]["retain"]) == method.retains
    assert list(done.log.step) == [*range(1, len(done.log) + 1)] and len(done.log) >= 1
    assert done.seconds > 0 and done.peak_bytes > 0 and (done.state is not None) == method.sequential
    if name not in STEPPING: return
    assert report["steps"] == len(done.log) == 2 and report["trainable"] > 0 and report["fields"]["lr"] == method.lr
    assert {"loss", "forget_loss", "retain_loss", "grad_norm", "lr"} <= set(done.log)
    assert done.log[["loss", "grad_norm"]].map(math.isfinite).all(axis=None) and done.log.forget_loss.notna().any()
    if preset == "embedded": assert done.log.forget_loss.notna().all() and done.log.retain_loss.notna().all() == method.retains

@each_stepping
def test_no_steps_is_a_copy(mllm, request_, name):
    done = small(name, mllm, steps=0).unlearn(mllm, request_)
    assert changed(weights_of(mllm), done.mllm) == set() and len(done.log) == 0 and done.diagnostics["changed_share"] == 0

@each_method
def test_a_state_is_refused_where_none_is_kept(mllm, request_, name):
    if not small(name, mllm).sequential:
        with pytest.raises(InputError, match=f"^{name} keeps nothing between requests, but was given a state.$"): small(name, mllm).unlearn(mllm, request_, state={})

# Presets, grids, fields

@each_preset
def test_presets_and_grids_are_methods(mllm, name, preset):
    cls = method_class(name)
    assert "embedded" in cls.PRESETS
    if name == "Retrain": assert cls.GRIDS == {}; return  # an oracle has no strength
    grid = cls.grid(preset)
    assert len({get(name, preset, **g) for g in grid}) == len(grid) >= 3
    if preset == "embedded": assert len(grid) == 6
    assert (name, preset) in sees_table().index

def test_every_field_has_its_source():
    "Fields say beside them where their values come from."
    for cls in {c for n in methods() for c in method_class(n).__mro__ if issubclass(c, Method)}:
        for line in inspect.getsource(cls).splitlines():
            if line.startswith("    ") and line[4:].split(":")[0] in cls.__annotations__: assert "  # " in line, line

@pytest.mark.parametrize("call, message", [
    (lambda: get("nonsense"), "There is no method 'nonsense'; there are "),
    (lambda: get("npo", "nonsense"), "NPO has no preset 'nonsense'; there are paper, released, embedded"),
    (lambda: get("npo", nonsense=1), "NPO has no field nonsense; its fields are batch_size, parts"),
    (lambda: get("npo", parts=("head",)), "must be some of vision, projector, language"),
    (lambda: get("npo", forget_on=()), "must be some of vqa, qa"),
    (lambda: get("npo", steps=-1), "it must be 0 or more"),
    (lambda: get("npo", beta=0), "it must be a positive number"),
    (lambda: get("graddiff", cap=-1), "it must be a positive number, or None for no end"),
    (lambda: get("gradascent", alpha=1), "it must be 0; ascent with a retain term is GradDiff"),
    (lambda: method_class("npo").grid("nonsense"), "NPO has no grid for preset 'nonsense'")])
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(InputError) as e: call()
    assert message in str(e.value) and "\n" not in str(e.value)

def test_one_pass_is_the_paper_s_number_of_steps(request_):
    method = get("GradAscent")
    assert method.steps is None and method.planned_steps(request_) == math.ceil(len(where(request_.forget, kind="identity", modality="vqa"))/4)

def test_passes_use_every_record_equally_often():
    order = passes(7, 3, 0)
    assert sorted(np.concatenate([next(order) for _ in range(14)])) == sorted([*range(7)]*6)
    assert len(next(passes(2, 5, 0))) == 2
