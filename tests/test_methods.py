"The contract that every unlearning method keeps, and the formulas of the baselines against plain loops."
import inspect, json, math, random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets

from mmu_study.batches import answer_log_probs, ask, cross_entropy, encode, rows
from mmu_study.faceworld import Faceworld
from mmu_study.methods import baselines
from mmu_study.methods.unlearning import Batch, Method, Unlearned, Work, get, method_class, methods, passes, sees_table
from mmu_study.models import MLLM, PART_NAMES, TinyLlava, tiny_llava
from mmu_study.records import ForgetRequest, where
from mmu_study.settings import InputError
from mmu_study.training import Diverged, Recipe, finetune

SMALL = dict(steps=2, batch_size=4, retain_batch=3)
each_method = pytest.mark.parametrize("name", methods())
each_preset = pytest.mark.parametrize("name, preset", [(n, p) for n in methods() for p in method_class(n).PRESETS])
full_and_lora = pytest.mark.parametrize("weights", [dict(lora=0), dict(lora=2, lr=1e-2)], ids=["full", "lora"])

@pytest.fixture(scope="module")
def world(): return Faceworld.preset("smoke", strangers=10, views=4)

@pytest.fixture(scope="module")
def request_(world): return world.split(17).requests()[0]

@pytest.fixture(scope="module")
def mllm(world, request_):
    "Hardly trained: a contract does not depend on what a model knows; but the loss on forget records must be below the cap."
    made = tiny_llava(TinyLlava(vision_layers=3, layers=2), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")])
    finetune(made, concatenate_datasets([request_.forget, request_.retain]), Recipe(steps=30, tokens=800), progress=False)
    return made

def small(name, preset="embedded", **overrides): return get(name, preset, **{**SMALL, **overrides})

def weights_of(mllm) -> dict[str, torch.Tensor]: return {n: p.detach().clone() for n, p in mllm.model.named_parameters()}

def changed(before: dict, mllm) -> set[str]:
    "Names of the parameters that differ in a bit; the names themselves must be the same."
    after = dict(mllm.model.named_parameters())
    assert before.keys() == after.keys()
    return {n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].detach().view(torch.uint8))}

def rng_states(): return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()

# What every method does

@each_preset
@full_and_lora
def test_the_model_handed_in_is_untouched(mllm, request_, name, preset, weights):
    before, rng = weights_of(mllm), rng_states()
    done = small(name, preset, **weights).unlearn(mllm, request_)
    assert isinstance(done, Unlearned) and changed(before, mllm) == set() and rng_states() == rng
    assert not mllm.model.training and all(p.requires_grad and p.grad is None for p in mllm.model.parameters())
    assert not done.mllm.model.training and all(p.requires_grad and p.grad is None for p in done.mllm.model.parameters())
    assert not {p.data_ptr() for p in mllm.model.parameters()} & {p.data_ptr() for p in done.mllm.model.parameters()}

@each_method
@full_and_lora
@pytest.mark.parametrize("parts", [("language",), ("vision", "projector"), ()], ids=lambda p: "+".join(p) or "all")
def test_only_the_declared_parts_change(mllm, request_, name, parts, weights):
    done = small(name, parts=parts, **weights).unlearn(mllm, request_)
    moved = changed(weights_of(mllm), done.mllm)
    for part in PART_NAMES:
        assert bool(moved & {*mllm.parts[part]}) == (part in (parts or PART_NAMES)), part
        assert bool(done.diagnostics["update_norm"][part]) == (part in (parts or PART_NAMES)), part

@each_method
def test_lora_moves_linear_layers_by_its_rank(mllm, request_, name):
    done = small(name, lora=2, lr=1e-2, parts=("language",)).unlearn(mllm, request_)
    before = weights_of(mllm)
    moved = changed(before, done.mllm)
    linear = {f"{n}.weight" for n, m in mllm.model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert moved == {f"model.language_model.{n}" for n in linear} and "lm_head.weight" not in moved
    delta = dict(done.mllm.model.named_parameters())["model.language_model.layers.0.mlp.up_proj.weight"] - before["model.language_model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(delta.double(), rtol=1e-4) == 2
    assert done.diagnostics["trainable"] == 2*sum(sum(before[n].shape) for n in moved)
    assert not any("lora" in n or "base_layer" in n for n in done.mllm.model.state_dict())

@each_method
@full_and_lora
def test_a_run_is_deterministic_and_a_watched_one_the_same(mllm, request_, name, weights):
    seen = []
    def watch(step, m):
        seen.append((step, m.model.training, torch.is_grad_enabled(), weights_of(m)))
        torch.rand(2), np.random.rand(2), random.random(), m.model.train(), m.train_only("vision")
        with torch.enable_grad(): sum(p.sum() for p in m.model.parameters() if p.requires_grad).backward()
    method = small(name, steps=3, **weights)
    first = method.unlearn(mllm, request_)
    torch.rand(5)
    watched = method.unlearn(mllm, request_, watch=watch, watch_at=(0, 1))
    assert changed(weights_of(first.mllm), watched.mllm) == set() and first.log.equals(watched.log)
    assert [s[:3] for s in seen] == [(0, False, False), (1, False, False), (3, False, False)]
    assert changed(seen[0][3], mllm) == set() and changed(seen[1][3], mllm) and changed(seen[2][3], watched.mllm) == set()
    assert changed(weights_of(first.mllm), replace(method, seed=1).unlearn(mllm, request_).mllm)

@each_method
def test_watching_leaves_dropout_alone(mllm, request_, name):
    "In a model with dropout every step draws random numbers, so a watcher that draws some must not move them on."
    noisy = mllm.copy()
    for layer in noisy.model.model.language_model.layers: layer.self_attn.attention_dropout = .3
    method = small(name, lr=1e-3)
    alone, watched = (method.unlearn(noisy, request_, watch=w, watch_at=(0, 1) if w else ()) for w in (None, lambda step, m: torch.rand(3)))
    assert changed(weights_of(alone.mllm), watched.mllm) == set() and changed(weights_of(alone.mllm), method.unlearn(mllm, request_).mllm)

@each_method
@full_and_lora
def test_numbers_that_are_not_finite_stop_the_run(mllm, request_, name, weights):
    sick, rng = mllm.copy(), rng_states()
    with torch.no_grad(): sick.model.lm_head.weight[5] = float("nan")
    before = weights_of(sick)
    with pytest.raises(Diverged, match=rf"^{name}: .*nan"): small(name, **weights).unlearn(sick, request_)
    assert changed(before, sick) == set() and rng_states() == rng

@each_method
@full_and_lora
def test_saved_and_loaded_it_gives_the_same_logits(mllm, request_, name, weights, tmp_path):
    done = small(name, **weights).unlearn(mllm, request_).mllm
    again = MLLM.load(done.save(tmp_path/"model"))
    batch = encode(done, rows(request_.forget, range(3)))
    with torch.inference_mode(): assert torch.equal(done.model(**batch).logits, again.model(**batch).logits)

@each_method
def test_bf16(mllm, request_, name):
    low = mllm.copy()
    low.model.to(torch.bfloat16)
    done = small(name, lr=1e-3).unlearn(low, request_)
    assert {p.dtype for p in done.mllm.model.parameters()} == {torch.bfloat16} and done.diagnostics["dtype"] == "bfloat16"
    assert done.diagnostics["changed_share"] > 0 and done.log.loss.map(math.isfinite).all()

@each_method
def test_a_request_of_one_person(mllm, request_, name):
    [person, *_] = request_.entities
    one = ForgetRequest(where(request_.forget, entity=person), request_.retain)
    done = small(name).unlearn(mllm, one)
    assert done.diagnostics["changed_share"] > 0 and done.diagnostics["records"]["forget"] == len(where(one.forget, kind="identity"))

@each_preset
@pytest.mark.parametrize("modality", ["vqa", "qa"])
def test_a_request_of_one_modality(mllm, request_, name, preset, modality):
    method = small(name, preset)
    half = ForgetRequest(where(request_.forget, modality=modality), request_.retain)
    if modality in method.forget_on: assert method.unlearn(mllm, half).diagnostics["records"]["forget"] == len(where(half.forget, kind="identity"))
    else:
        with pytest.raises(InputError, match=f"^{name} forgets on [^.]* records, and the request has none of them.$"): method.unlearn(mllm, half)

@each_preset
def test_it_sees_what_it_says(mllm, request_, name, preset):
    "What a method does not look at can be exchanged without changing a bit; what it looks at cannot."
    method = small(name, preset, lora=0, parts=(), lr=1e-3)
    result = weights_of(method.unlearn(mllm, request_).mllm)
    for part in ("forget", "retain"):
        for modality in ("vqa", "qa"):
            records = getattr(request_, part)
            fewer = records.select([i for i, m in enumerate(records["modality"]) if m != modality or i % 2])
            other = method.unlearn(mllm, replace(request_, **{part: fewer})).mllm
            assert bool(changed(result, other)) == method.sees[f"{part} {modality}"], (part, modality)
    only_identity = replace(request_, forget=where(request_.forget, kind="identity"))
    assert changed(result, method.unlearn(mllm, only_identity).mllm) == set()

@each_preset
def test_the_report_is_complete(mllm, request_, name, preset):
    method = small(name, preset)
    done = method.unlearn(mllm, request_)
    report = json.loads(json.dumps(done.diagnostics))
    assert report["method"] == name and set(report["fields"]) == {f.name for f in fields(method)} and report["fields"]["lr"] == method.lr
    assert {"steps", "device", "dtype", "trainable", "changed_share", "update_norm", "records"} <= set(report)
    assert report["steps"] == 2 and report["trainable"] > 0 and 0 < report["changed_share"] <= 1 and set(report["update_norm"]) == set(PART_NAMES)
    assert list(done.log.columns) == ["step", "loss", "forget_loss", "retain_loss", "grad_norm", "lr"] and list(done.log.step) == [1, 2]
    assert done.log.drop(columns="retain_loss").notna().all(axis=None) and done.log.retain_loss.notna().all() == method.retains
    assert done.seconds > 0 and done.peak_bytes > 0 and done.state is None

@each_method
def test_no_steps_is_a_copy(mllm, request_, name):
    done = small(name, steps=0).unlearn(mllm, request_)
    assert changed(weights_of(mllm), done.mllm) == set() and len(done.log) == 0 and done.diagnostics["changed_share"] == 0

# Presets, grids, fields

@each_preset
def test_presets_and_grids_are_methods(name, preset):
    cls = method_class(name)
    assert {"paper", "embedded"} <= set(cls.PRESETS)
    grid = cls.grid(preset)
    assert len({get(name, preset, **g) for g in grid}) == len(grid) >= 3
    assert (name, preset) in sees_table().index

def test_every_field_has_its_source():
    "Fields say beside them where their values come from."
    for cls in {c for n in methods() for c in method_class(n).__mro__ if issubclass(c, Method)}:
        for line in inspect.getsource(cls).splitlines():
            if line.startswith("    ") and line[4:].split(":")[0] in cls.__annotations__: assert "  # " in line, line

@pytest.mark.parametrize("call, message", [
    (lambda: get("nonsense"), "There is no method 'nonsense'; there are GradAscent"),
    (lambda: get("npo", "nonsense"), "NPO has no preset 'nonsense'; there are paper, embedded"),
    (lambda: get("npo", nonsense=1), "NPO has no field nonsense; its fields are lr"),
    (lambda: get("npo", parts=("head",)), "must be some of vision, projector, language"),
    (lambda: get("npo", forget_on=()), "must be some of vqa, qa"),
    (lambda: get("npo", steps=-1), "it must be 0 or more"),
    (lambda: get("npo", beta=0), "it must be a positive number"),
    (lambda: get("graddiff", cap=-1), "it must be a positive number, or None for no end"),
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

# Formulas

@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(0)
    is_answer = torch.rand(5, 7, generator=generator) < .6
    return -5*torch.rand(5, 7, generator=generator)*is_answer, is_answer

def test_ga_loss_is_the_mean_over_answer_tokens(answers):
    tokens = [float(l) for row, mask in zip(*answers) for l, m in zip(row, mask) if m]
    mean = -sum(tokens)/len(tokens)
    assert float(baselines.ga_loss(*answers)) == pytest.approx(-mean)
    assert float(baselines.ga_loss(*answers, cap=4.)) == pytest.approx(max(0, 4 - mean))
    assert float(baselines.ga_loss(*answers, cap=.1)) == 0

@pytest.mark.parametrize("beta", [.1, .4, 2.])
def test_npo_loss_is_the_mean_over_sequences(beta):
    ratios = [-8., -1., 0., 3.]
    expected = sum(2/beta*math.log(1 + math.exp(r)**beta) for r in ratios)/4  # 2/β · log(1 + (π/π_ref)^β)
    assert float(baselines.npo_loss(torch.tensor(ratios), beta)) == pytest.approx(expected)

def start(mllm, request_, method) -> tuple[Work, Batch, Batch]:
    "A run before its first step, with one batch of each kind."
    work = method._begin(mllm, request_)
    batch = lambda records: Batch(np.arange(0, 40, 5), encode(work.mllm, rows(records, range(0, 40, 5))))
    return work, batch(work.forget), batch(work.retain) if work.retain else None

def gradient(work, loss):
    work.mllm.model.zero_grad(); loss.backward()
    return torch.cat([p.grad.flatten() for p in work.mllm.model.parameters() if p.grad is not None])

@pytest.mark.parametrize("beta", [.1, .4])
def test_npo_starts_as_ascent_on_the_sequences(mllm, request_, beta):
    method = get("NPO", "embedded", beta=beta, alpha=0.)
    work, forget, _ = start(mllm, request_, method)
    loss, _ = method.loss(work, forget, None)
    assert loss.item() == pytest.approx(2/beta*math.log(2), rel=1e-5)
    ascent = answer_log_probs(work.mllm, forget.tensors)[0].sum(1).mean()
    assert torch.allclose(gradient(work, loss), gradient(work, ascent), rtol=1e-3, atol=1e-5)

def test_the_retain_term_is_added_with_its_weight(mllm, request_):
    for name, weight in (("GradDiff", "alpha"), ("NPO", "alpha")):
        method = get(name, "embedded", **{weight: .5})
        work, forget, retain = start(mllm, request_, method)
        loss, logged = method.loss(work, forget, retain)
        alone, _ = method.loss(work, forget, None)
        assert loss.item() == pytest.approx(alone.item() + .5*logged["retain_loss"].item(), rel=1e-5)
        assert logged["retain_loss"].item() == pytest.approx(cross_entropy(*answer_log_probs(work.mllm, retain.tensors)).item())

def test_the_cap_ends_the_push(mllm, request_):
    method = get("GradDiff", "embedded", cap=.5, alpha=0.)  # the model is far above
    work, forget, _ = start(mllm, request_, method)
    loss, logged = method.loss(work, forget, None)
    assert loss.item() == 0 and logged["forget_loss"] > .5 and gradient(work, loss).count_nonzero() == 0

def test_grad_diff_without_forgetting_is_retain_fine_tuning(mllm, request_):
    method = get("GradDiff", "embedded", gamma=0., steps=3, batch_size=4)
    plain, order, losses = mllm.copy(), passes(len(request_.retain), 4, [method.seed, 1]), []
    weights = plain.train_only()
    optimizer = torch.optim.AdamW(weights, lr=method.lr, weight_decay=0.)
    for _ in range(3):
        loss = cross_entropy(*answer_log_probs(plain, encode(plain, rows(request_.retain, next(order)))))
        loss.backward(); torch.nn.utils.clip_grad_norm_(weights, method.clip); optimizer.step(); optimizer.zero_grad()
        losses.append(loss.item())
    done = method.unlearn(mllm, request_)
    assert done.log.retain_loss.tolist() == pytest.approx(losses, rel=1e-6)
    assert changed(weights_of(plain), done.mllm) == set()

def test_reference_log_probs_do_not_depend_on_the_batch(mllm, request_):
    some = request_.forget.select(range(9))
    whole, single = (baselines.sequence_log_probs(mllm, some, size) for size in (9, 1))
    assert torch.allclose(whole, single, atol=1e-4) and whole.shape == (9,)
