"The losses of the baselines against plain loops, and what they become in a run."
import json, math
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets

from mmu_study.batches import answer_log_probs, ask, cross_entropy, encode, rows
from mmu_study.faceworld import Faceworld
from mmu_study.methods import baselines
from mmu_study.methods.baselines import REFUSALS, read, refusing, sequence_log_probs
from mmu_study.methods.unlearning import Batch, get, passes
from mmu_study.models import MLLM, TinyLlava, TinyQwen2VL, tiny_llava, tiny_qwen2_vl
from mmu_study.records import ForgetRequest, thin, where
from mmu_study.settings import InputError
from mmu_study.training import Recipe, finetune

# Formulas, on numbers: every expected value is a loop over Python floats

B, K, V, D = 5, 7, 6, 4

@pytest.fixture
def tokens():
    "Log-probabilities of two models, the tokens that came, and which of them are an answer's."
    g = torch.Generator().manual_seed(0)
    before, now = (torch.randn(B, K, V, generator=g).log_softmax(2) for _ in range(2))
    is_answer = torch.rand(B, K, generator=g) < .6
    is_answer[:, 2] = True
    return before, now, torch.randint(V, (B, K), generator=g), is_answer

@pytest.fixture
def answers(tokens):
    _, now, target, is_answer = tokens
    return now.gather(2, target[..., None])[..., 0]*is_answer, is_answer

def sequences(log_probs, is_answer) -> list[list[float]]: return [[float(l) for l, a in zip(*r) if a] for r in zip(log_probs, is_answer)]
def mean(values): return sum(values)/len(values)
def log_sigmoid(x): return -math.log(1 + math.exp(-x))
def softmax(z): return [math.exp(v)/sum(math.exp(w) for w in z) for v in z]

def test_ga_loss_is_the_mean_over_answer_tokens(answers):
    ce = -mean([l for s in sequences(*answers) for l in s])
    assert float(baselines.ga_loss(*answers)) == pytest.approx(-ce)
    assert float(baselines.ga_loss(*answers, cap=4.)) == pytest.approx(max(0, 4 - ce))
    assert float(baselines.ga_loss(*answers, cap=.1)) == 0

@pytest.mark.parametrize("beta", [.1, .4, 2.])
def test_npo_and_dpo_are_means_over_sequences(beta):
    ratios, refused = [-8., -1., 0., 3.], [2., 0., -1., 5.]
    npo = mean([2/beta*math.log(1 + math.exp(r)**beta) for r in ratios])  # 2/β · log(1 + (π/π_ref)^β)
    assert float(baselines.npo_loss(torch.tensor(ratios), beta)) == pytest.approx(npo)
    dpo = mean([-2/beta*log_sigmoid(beta*(y - x)) for x, y in zip(ratios, refused)])
    assert float(baselines.dpo_loss(torch.tensor(refused), torch.tensor(ratios), beta)) == pytest.approx(dpo)

@pytest.mark.parametrize("beta, delta", [(4.5, 0.), (1., .7)])
def test_simnpo_normalises_by_length(answers, beta, delta):
    expected = mean([-2/beta*log_sigmoid(beta*(-sum(s)/len(s) - delta)) for s in sequences(*answers)])
    assert float(baselines.simnpo_loss(*answers, beta, delta)) == pytest.approx(expected, rel=1e-5)

def kl(p, q): return sum(math.exp(a)*(a - b) for a, b in zip(p.tolist(), q.tolist()))

def test_kl_is_a_mean_over_answers_and_the_released_one_a_sum_over_everything(tokens):
    before, now, _, is_answer = tokens
    each = {(b, k): kl(before[b, k], now[b, k]) for b in range(B) for k in range(K)}
    assert float(baselines.kl_loss(before, now, is_answer)) == pytest.approx(mean([v for (b, k), v in each.items() if is_answer[b, k]]), rel=1e-5)
    assert float(baselines.released_kl_loss(before, now)) == pytest.approx(sum(each.values())/B, rel=1e-5)
    assert float(baselines.kl_loss(now, now, is_answer)) == float(baselines.released_kl_loss(now, now)) == 0

@pytest.mark.parametrize("beta", [1., 10.])
def test_undial_distils_with_the_true_token_pushed_down(tokens, beta):
    before, now, target, is_answer = tokens
    found = {}
    for b in range(B):
        for k in range(K):
            z = before[b, k].tolist()
            if is_answer[b, k]: z[target[b, k]] -= beta
            found[b, k] = -sum(q*l for q, l in zip(softmax(z), now[b, k].tolist()))
    assert float(baselines.undial_loss(before, now, target, is_answer, beta)) == pytest.approx(mean([v for (b, k), v in found.items() if is_answer[b, k]]), rel=1e-5)
    assert float(baselines.undial_loss(before, now, target, is_answer, beta, everywhere=True)) == pytest.approx(mean(found.values()), rel=1e-5)

def test_rmu_is_a_mean_square_at_answers(tokens):
    is_answer, g = tokens[3], torch.Generator().manual_seed(1)
    hidden, other, point = torch.randn(B, K, D, generator=g), torch.randn(B, K, D, generator=g), torch.randn(D, generator=g)
    at = [(b, k) for b in range(B) for k in range(K) if is_answer[b, k]]
    assert float(baselines.rmu_loss(hidden, point, is_answer)) == pytest.approx(mean([(float(hidden[b, k, d]) - float(point[d]))**2 for b, k in at for d in range(D)]), rel=1e-5)
    assert float(baselines.rmu_loss(hidden, other, is_answer)) == pytest.approx(mean([(float(hidden[b, k, d]) - float(other[b, k, d]))**2 for b, k in at for d in range(D)]), rel=1e-5)

# On a model

@pytest.fixture(scope="module")
def world(): return Faceworld.preset("smoke", strangers=10, views=4)

@pytest.fixture(scope="module")
def request_(world):
    whole = world.split(17).requests()[0]
    return ForgetRequest(thin(whole.forget, 2), thin(where(whole.retain, entity=sorted({*whole.retain["entity"]})[:3]), 2))

@pytest.fixture(scope="module")
def texts(world): return [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")]

@pytest.fixture(scope="module")
def mllm(texts, request_):
    made = tiny_llava(TinyLlava(vision_width=64, vision_layers=3, width=64, layers=3), texts)
    finetune(made, concatenate_datasets([request_.forget, request_.retain]), Recipe(steps=40, tokens=800), progress=False)
    return made

@pytest.fixture(scope="module")
def qwen(texts): return tiny_qwen2_vl(TinyQwen2VL(), texts)

@pytest.fixture(scope="module")
def other(mllm):
    "The model, moved a little."
    moved = mllm.copy()
    with torch.no_grad():
        for p in moved.model.parameters(): p.add_(.02*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return moved

def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))

def start(mllm, request_, method):
    "A run before its first step, with one batch of each kind."
    work = method._begin(mllm, request_, None)
    batch = lambda records: Batch(np.arange(0, 40, 5), encode(work.mllm, rows(records, range(0, 40, 5))))
    return work, batch(work.forget), batch(work.retain) if work.retain else None

def gradient(work, loss):
    work.mllm.model.zero_grad(); loss.backward()
    return torch.cat([p.grad.flatten() for p in work.mllm.model.parameters() if p.grad is not None])

def test_reading_is_what_the_model_says_and_holds(mllm, qwen, request_):
    for model in (mllm, qwen):
        batch, seen = encode(model, rows(request_.forget, range(0, 40, 6))), []
        hook = model.model.model.language_model.layers[0].register_forward_hook(lambda module, x, y: seen.append(y[0] if isinstance(y, tuple) else y))
        with torch.no_grad(): found, whole, (log_probs, is_answer) = read(model, batch, layer=1), read(model, batch, everywhere=True, layer=1), answer_log_probs(model, batch)
        hook.remove()
        keep = found.is_answer.shape[1]
        assert (found.is_answer[:, :-1] == is_answer).all() and not found.is_answer[:, -1].any()
        picked = found.log_p.gather(2, found.target[..., None])[..., 0]
        assert torch.allclose(picked[:, :-1]*is_answer, log_probs, atol=1e-5) and torch.allclose(found.ce, cross_entropy(log_probs, is_answer))
        assert torch.equal(found.hidden, seen[0][:, -keep:]) and torch.equal(whole.hidden, seen[1])
        assert whole.log_p.shape[1] == batch["input_ids"].shape[1] > keep and torch.equal(whole.target[:, -keep:], found.target) and not whole.is_answer[:, :-keep].any()
        assert torch.allclose(whole.log_p[:, -keep:], found.log_p, atol=1e-5)

def test_reference_log_probs_do_not_depend_on_the_batch(mllm, request_):
    some = request_.forget.select(range(9))
    whole, single = (sequence_log_probs(mllm, some, size) for size in (9, 1))
    assert torch.allclose(whole, single, atol=1e-4) and whole.shape == (9,)

@pytest.mark.parametrize("name", ["GradDiff", "NPO", "SimNPO", "IDK", "DPO", "UNDIAL"])
def test_the_terms_are_added_with_their_weights(mllm, request_, name):
    method = get(name, "embedded", alpha=.5, gamma=.7)
    work, forget, retain = start(mllm, request_, method)
    loss, logged = method.loss(work, forget, retain)
    term, true = method.forget_term(work, forget)
    kept = cross_entropy(*answer_log_probs(work.mllm, retain.tensors))
    assert loss.item() == pytest.approx(.7*term.item() + .5*kept.item(), rel=1e-5)
    assert logged["retain_loss"].item() == pytest.approx(kept.item()) and logged["forget_loss"].item() == pytest.approx(true.item())
    assert true.item() == pytest.approx(cross_entropy(*answer_log_probs(work.mllm, forget.tensors)).item(), rel=1e-5)

@pytest.mark.parametrize("beta", [.1, .4])
def test_npo_and_dpo_start_as_ascent_on_the_sequences(mllm, request_, beta):
    for name in ("NPO", "DPO"):
        method = get(name, "embedded", beta=beta, alpha=0.)
        work, forget, _ = start(mllm, request_, method)
        loss, _ = method.loss(work, forget, None)
        assert loss.item() == pytest.approx(2/beta*math.log(2), rel=1e-4)
        ascent = answer_log_probs(work.mllm, forget.tensors)[0].sum(1).mean()
        if name == "DPO": ascent = ascent - answer_log_probs(work.mllm, encode(work.mllm, refusing(rows(work.forget, forget.index))))[0].sum(1).mean()
        assert torch.allclose(gradient(work, loss), gradient(work, ascent), rtol=1e-3, atol=1e-4)

def test_the_cap_ends_the_push(mllm, request_):
    for name in ("GradDiff", "KLMin"):
        method = get(name, "embedded", cap=.2, alpha=0.)  # the model is far above
        work, forget, _ = start(mllm, request_, method)
        loss, logged = method.loss(work, forget, None)
        assert loss.item() == 0 and logged["forget_loss"] > .2 and gradient(work, loss).count_nonzero() == 0

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
    assert done.log.retain_loss.tolist() == pytest.approx(losses, rel=1e-6) and same(plain, done.mllm)

def padded(batch, n):
    "The same batch with padding on the right."
    extra = dict(input_ids=2, attention_mask=0, labels=-100)  # 2 is <pad>
    return {k: torch.cat([v, torch.full((len(v), n), extra[k])], 1) if k in extra else v for k, v in batch.items()}

@pytest.mark.parametrize("whole", [False, True])
def test_only_the_released_kl_feels_padding_and_both_are_nothing_at_the_start(mllm, other, request_, whole):
    method = get("KLMin", "embedded", whole_kl=whole)
    work, _, retain = start(mllm, request_, method)
    here, _ = method.retain_term(work, retain)
    assert here.item() == 0 and gradient(work, here).abs().max() < 1e-6
    work.mllm = other
    with torch.no_grad(): short, long = (method.retain_term(work, Batch(retain.index, b))[0].item() for b in (retain.tensors, padded(retain.tensors, 20)))
    assert short > .01 and (long > 1.02*short if whole else long == pytest.approx(short, rel=1e-3))

def test_the_released_kl_min_adds_the_cross_entropy(mllm, other, request_):
    released = get("KLMin", "released")
    assert released.in_turn and released.ce == 1 and released.whole_kl
    work, _, retain = start(mllm, request_, replace(released, ce=0., lora=0))
    work.mllm = other
    with torch.no_grad(): (kl, ce), (both, _) = (m.retain_term(work, retain) for m in (replace(released, ce=0.), released))
    assert both.item() == pytest.approx(kl.item() + ce.item(), rel=1e-6)

@pytest.mark.parametrize("name", ["GradDiff", "KLMin"])
def test_in_turn_is_a_pass_of_each(mllm, request_, name):
    method = get(name, "released", batch_size=16, retain_batch=12, lora=0)
    forget, retain = (len(r) for r in (method.forget_records(request_), method.retain_records(request_)))
    n_f, n_r = math.ceil(forget/16), math.ceil(retain/12)
    assert method.planned_steps(request_) == n_f + n_r
    log = replace(method, steps=2*n_f + n_r).unlearn(mllm, request_).log
    turns = ["forget"]*n_f + ["retain"]*n_r + ["forget"]*n_f
    assert [("forget" if f else "retain") for f in log.forget_loss.notna()] == turns == [("retain" if r else "forget") for r in log.retain_loss.notna()]
    assert (log.loss[:n_f] < 0).all() and (log.loss[n_f:n_f + n_r] > 0).all()

def test_npo_against_another_model_and_by_batch_means(mllm, other, request_, tmp_path):
    released, folder = get("NPO", "released"), str(other.save(tmp_path/"other"))
    with pytest.raises(InputError, match="NPO's reference_model must be named here"): released.unlearn(mllm, request_)
    method = replace(released, reference_model=folder, lora=0)
    work, forget, _ = start(mllm, request_, method)
    with torch.no_grad():
        ce, ce_ref = (cross_entropy(*answer_log_probs(m, forget.tensors)).item() for m in (mllm, other))
        assert method.forget_term(work, forget)[0].item() == pytest.approx(-2/.4*log_sigmoid(.4*(ce - ce_ref)), rel=1e-4)
        ratios = (answer_log_probs(mllm, forget.tensors)[0] - answer_log_probs(other, forget.tensors)[0]).sum(1).tolist()
        assert replace(method, batch_mean=False).forget_term(work, forget)[0].item() == pytest.approx(mean([-2/.4*log_sigmoid(-.4*r) for r in ratios]), rel=1e-4)

def test_refusals_belong_to_records(mllm, request_):
    items = rows(request_.forget, range(30))
    refused = refusing(items)
    assert refused == refusing(items[::-1])[::-1] and {r["answer"] for r in refused} <= {*REFUSALS} and len({r["answer"] for r in refused}) > 3
    assert [{k: v for k, v in r.items() if k != "answer"} for r in refused] == [{k: v for k, v in r.items() if k != "answer"} for r in items]
    method = get("IDK", "paper", lora=0, forget_on=("vqa", "qa"))
    work, forget, _ = start(mllm, request_, method)
    batch = encode(mllm, refusing(rows(work.forget, forget.index)))
    assert method.forget_term(work, forget)[0].item() == pytest.approx(cross_entropy(*answer_log_probs(mllm, batch)).item(), rel=1e-6)

def test_undial_reads_answers_or_all_but_the_last(mllm, other, request_):
    for method in (get("UNDIAL", "embedded"), get("UNDIAL", "released", lora=0, forget_on=("vqa", "qa"))):
        work, forget, _ = start(mllm, request_, method)
        work.mllm, batch = other, forget.tensors
        with torch.no_grad():
            term, inputs = method.forget_term(work, forget)[0].item(), {k: v for k, v in batch.items() if k != "labels"}
            before, now = (m.model(**inputs).logits[:, :-1].log_softmax(2) for m in (mllm, other))
        labels, found = batch["labels"][:, 1:], []
        for b in range(labels.shape[0]):
            for t in range(labels.shape[1]):
                if labels[b, t] < 0 and not method.everywhere: continue
                z = before[b, t].clone()
                if labels[b, t] >= 0: z[labels[b, t]] -= method.beta
                found.append(-(z.softmax(0)*now[b, t]).sum().item())
        assert term == pytest.approx(mean(found), rel=1e-4)

def test_rmu_steers_one_layer_to_one_point(mllm, request_):
    method = get("RMU", "embedded", layer=2, steering=3.)
    work, forget, retain = start(mllm, request_, method)
    point = work.prepared
    assert point.norm().item() == pytest.approx(3.) and point.min() >= 0 and torch.equal(point, start(mllm, request_, replace(method, lr=1.))[0].prepared)
    assert not torch.equal(point, start(mllm, request_, replace(method, seed=1))[0].prepared)
    assert method.retain_term(work, retain)[0].item() == 0
    grad = {n for n, p in work.mllm.model.named_parameters() if p.grad is not None or (method.forget_term(work, forget)[0].backward() or p.grad is not None)}
    assert not any("layers.2" in n or "lm_head" in n for n in grad if "language_model" in n or "lm_head" in n) and any("layers.1" in n for n in grad)  # layer 2 is block 1, counted from 0
    with pytest.raises(InputError, match="RMU's layer is 9, but the language model has 3"): replace(method, layer=9).unlearn(mllm, request_)

def test_retrain_is_the_recipe_on_the_retain_records(mllm, other, request_, tmp_path, texts):
    folder = str(other.save(tmp_path/"base"))
    method = get("Retrain", "embedded", base=folder, steps=4, tokens=600)
    done, plain = method.unlearn(mllm, request_), MLLM.load(folder)
    finetune(plain, request_.retain, Recipe(steps=4, lr=method.lr, tokens=600, turns=method.turns), progress=False)
    assert same(done.mllm, plain) and done.diagnostics["records"] == dict(forget=0, retain=len(request_.retain)) and len(done.log) == 4
    assert not any(v for k, v in method.sees.items() if "forget" in k)
    with pytest.raises(InputError, match="give its folder as `base`"): replace(method, base="").unlearn(mllm, request_)
    small = str(tiny_llava(TinyLlava(width=32, layers=1), texts).save(tmp_path/"small"))
    with pytest.raises(InputError, match="is no checkpoint of the model that is to be unlearned"): replace(method, base=small).unlearn(mllm, request_)
    assert json.dumps(done.diagnostics)
