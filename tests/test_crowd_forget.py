"CrowdForget against plain loops: what the crowd says, who is in it, what each switch changes, what is looked at, and the adversary."
import copy, math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import concatenate_datasets

from mmu_study import batches
from mmu_study.batches import answer_log_probs, ask, cross_entropy, encode, rows
from mmu_study.evaluation import replies
from mmu_study.faceworld import Faceworld
from mmu_study.methods import crowd_forget as cf
from mmu_study.methods import null_space_cvf as cvf
from mmu_study.methods.crowd_forget import CrowdForget
from mmu_study.methods.null_space_cvf import Pictures
from mmu_study.methods.unlearning import get
from mmu_study.models import TinyLlava, tiny_llava
from mmu_study.protocols import pulse
from mmu_study.records import ForgetRequest, table, thin, where
from mmu_study.settings import InputError
from mmu_study.training import Diverged, Recipe, finetune

@pytest.fixture(scope="module")
def world(): return Faceworld.preset("smoke", strangers=10, views=4)

@pytest.fixture(scope="module")
def request_(world):
    whole = world.split(17).requests()[0]
    people = sorted({*whole.retain["entity"]})[:3]
    return ForgetRequest(thin(whole.forget, 1), thin(where(whole.retain, entity=people), 1), generic=whole.generic)

@pytest.fixture(scope="module")
def mllm(world, request_):
    "Trained for seconds, after its tower was given wider weights, so that pictures differ."
    made = tiny_llava(TinyLlava(vision_width=64, vision_layers=3, width=64, layers=2), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in made.parameters("vision", "projector"):
            if p.ndim == 2: p.copy_(torch.randn(p.shape, generator=generator)/p.shape[1]**.5)
    finetune(made, concatenate_datasets([request_.forget, request_.retain]), Recipe(steps=40, tokens=800), progress=False)
    return made

SHORT = dict(steps=2, batch_size=4, retain_batch=3, crowd=3, asked=2, pool=10, margin=1.)  # with a margin of 1, somebody hardly known has own tokens, too

def crowd_forget(**fields) -> CrowdForget: return get("CrowdForget", "embedded", **{**SHORT, **fields})
def weights_of(mllm) -> dict: return {n: p.detach().clone() for n, p in mllm.model.named_parameters()}
def changed(before: dict, mllm) -> set[str]: return {n for n, p in mllm.model.named_parameters() if not torch.equal(before[n], p.detach())}

def begun(mllm, request, **fields):
    "A method at its first step, where nothing has moved, and the two batches of it."
    method = crowd_forget(**fields)
    work = method._begin(mllm, request, None)
    return method, work, next(method.batches(work, work.forget, 4, 0)), next(method.batches(work, work.retain, 3, 1))

def moved(work):
    with torch.no_grad():
        for n in work.weights: work.weights[n].mul_(2)

# Losses

def test_who_is_asked_by_own_and_other_tokens_apart():
    p, q = (torch.rand(5, 7, generator=torch.Generator().manual_seed(s)).add(.05) for s in (0, 1))
    p, q, tokens, own = p/p.sum(1, keepdim=True), q/q.sum(1, keepdim=True), [3, 0, 6, 2, 2], [True, False, True, False, False]
    def kl(i): return sum(float(q[i, v])*math.log(float(q[i, v])/float(p[i, v])) for v in range(7))
    lack = [max(0, 2.5 + math.log(float(p[i, tokens[i]]))) for i in range(5)]
    loss, ce = cf.who_loss(p.log(), q, torch.tensor(tokens), torch.tensor(own), push=.7, cap=2.5)
    assert float(loss) == pytest.approx((kl(0) + kl(2))/2 + (kl(1) + kl(3) + kl(4))/3 + .7*(lack[0] + lack[2])/2, rel=1e-5)
    assert float(ce) == pytest.approx(-(math.log(float(p[0, 3])) + math.log(float(p[2, 6])))/2, rel=1e-5)

@pytest.mark.parametrize("own", [[True, True], [False, False]])
def test_no_own_token_or_only_own_ones_are_no_nan(own):
    p = torch.tensor([[.5, .5], [.2, .8]])
    loss, _ = cf.who_loss(p.log(), cf.without(p, torch.tensor([0, 1])), torch.tensor([0, 1]), torch.tensor(own), push=1.)
    assert math.isfinite(float(loss))

def test_a_token_is_taken_out():
    p = torch.tensor([[.2, .3, .5], [1., 0, 0]])
    assert torch.allclose(cf.without(p, torch.tensor([2, 0])), torch.tensor([[.4, .6, 0], [0, 0, 0]]))  # where nothing else was said nothing is left

# The crowd

def test_what_is_spoken_is_the_mean_over_places(mllm, request_):
    items = rows(where(request_.forget, modality="vqa"), range(5))
    features = cvf.all_features(mllm, Pictures.of(mllm, where(request_.generic, kind="perception")))["projector"][:3]
    said, tokens = cf.spoken(mllm, items, features, size=6)
    for r, s, t in zip(items, said, tokens):
        batch, found = encode(mllm, [r]), []
        labels = batch["labels"][0]
        at = (labels != -100).nonzero()[:, 0]
        for f in features:
            with torch.no_grad(), cvf.seeing(mllm, [f]): found.append(mllm.model(**batch).logits[0].softmax(1)[at - 1])
        assert torch.equal(t, labels[at]) and torch.allclose(s, sum(found)/3, atol=1e-5)
    plain, _ = cf.spoken(mllm, items)
    assert max(float((a - b).abs().max()) for a, b in zip(plain, said)) > 1e-3

def test_the_crowd_is_the_nearest_who_are_not_taken_for_the_person(mllm, request_, monkeypatch):
    pool = Pictures.of(mllm, request_.generic)
    z = cvf.pooled(cvf.all_features(mllm, pool)["vision"])
    taken = cvf.all_features(mllm, pool)["projector"]
    def answers(_, questions, tokens):  # whoever has an even number is taken for everybody
        number = [next(i for i, t in enumerate(taken) if torch.equal(t, shown)) for shown in tokens]
        return pd.DataFrame([dict(entity=q["entity"], fact=q["fact"], reply="?", match=int(pool.entity[i][-5:]) % 2 == 0, own=.5) for q, i in zip(questions, number)])
    monkeypatch.setattr(cf, "answers_at", answers)
    work = crowd_forget()._begin(mllm, request_, None)
    pictures = work.prepared.pictures
    before = cvf.pooled(cvf.all_features(mllm, pictures)["vision"])
    for c in work.prepared.crowds:
        mean = torch.stack([before[i] for i, e in enumerate(pictures.entity) if e == c["entity"]]).mean(0) - z.mean(0)
        near = sorted(range(len(pool)), key=lambda i: -float(torch.nn.functional.cosine_similarity(mean, z[i] - z.mean(0), dim=0)))
        assert c["strangers"] == [pool.entity[i] for i in near if int(pool.entity[i][-5:]) % 2][:3] and c["rejected"] > 0 and c["matches"] == 0
    monkeypatch.setattr(cf, "answers_at", lambda *a: answers(*a).assign(match=True))
    with pytest.raises(InputError, match=f"^Of 10 strangers the model answers what is true of {request_.entities[0]}, so there is no crowd"): crowd_forget().unlearn(mllm, request_)
    assert len(crowd_forget(basin=1.)._begin(mllm, request_, None).prepared.crowds[0]["members"]) == 3

def test_targets_are_the_crowd_s_words_without_the_person_s(mllm, request_):
    work = crowd_forget()._begin(mllm, request_, None)
    p, items = work.prepared, rows(work.forget, range(len(work.forget)))
    plain = crowd_forget(remove=False)._begin(mllm, request_, None).prepared
    assert 0 < sum(map(int, (o.sum() for o in p.own)))
    for i in (0, 7, len(items) - 1):
        c = next(c for c in p.crowds if c["entity"] == items[i]["entity"])
        pool = Pictures.of(mllm, crowd_forget()._strangers(work))
        features = cvf.all_features(mllm, pool)["projector"]
        said, tokens = cf.spoken(mllm, [items[i]], [features[s] for s in c["members"]])
        mine, _ = cf.spoken(mllm, [items[i]])
        assert torch.equal(tokens[0], p.tokens[i]) and torch.allclose(plain.said[i], said[0], atol=1e-5)
        for t, (token, own) in enumerate(zip(p.tokens[i].tolist(), p.own[i].tolist())):
            ratio = float(mine[0][t, token]/said[0][t, token])
            assert own == (ratio >= 1) or ratio == pytest.approx(1, rel=1e-3)
            assert (float(p.said[i][t, token]) == 0) == own and float(p.said[i][t].sum()) == pytest.approx(1, abs=1e-4)

def test_perception_questions_are_the_generic_ones_and_the_model_answers_them(mllm, request_):
    p = begun(mllm, request_, asked=4)[1].prepared
    known = {(r["task"], r["question"]) for r in request_.generic.remove_columns("image")}
    assert {(a["task"], a["question"]) for a in p.asked} <= known and len(p.asked) <= 4*len(p.pictures)
    for i in (0, len(p.asked) - 1):
        a = p.asked[i]
        assert a["answer"] == replies(mllm, [a])[0] and torch.allclose(p.seen[i], cf.spoken(mllm, [a])[0][0], atol=1e-5)
        assert (a["entity"], a["view"]) == [(r["entity"], r["view"]) for r in rows(where(request_.forget, modality="vqa", kind="identity"), [p.pictures.records[a["picture"]][0]])][0]
    named = begun(mllm, request_, asked=2, questions=("What do you see?", "Describe the picture in eight words."))[1].prepared
    assert {a["question"] for a in named.asked} == {"What do you see?", "Describe the picture in eight words."}

# The loss, term by term

def test_before_the_first_step_only_who_is_wrong(mllm, request_):
    method, work, forget, retain = begun(mllm, request_)
    _, logged = method.loss(work, forget, retain)
    at = {k: float(v.detach()) for k, v in logged.items()}
    assert [at[k] for k in ("look", "retain_loss", "generic")] == pytest.approx([0, 0, 0], abs=1e-5) and at["who"] > .01

def test_the_sum_and_its_switches(mllm, request_):
    method, work, forget, retain = begun(mllm, request_)
    moved(work)
    loss, logged = method.loss(work, forget, retain)
    terms = dict(lambda_who="who", lambda_look="look", lambda_ret="retain_loss", lambda_gen="generic")
    assert float(loss.detach()) == pytest.approx(sum(getattr(method, f)*float(logged[t].detach()) for f, t in terms.items()), rel=1e-5) and all(float(logged[t].detach()) > 1e-7 for t in terms.values()), logged
    now, n = cvf.visual_features(work.mllm, retain.tensors), 3
    before = cvf.all_features(mllm, work.prepared.held)
    for part, name in ((range(n), "retain_loss"), (range(n, 6), "generic")):
        expected = sum(cvf.feature_distance([now[l][i] for i in part], [before[l][retain.index[i]] for i in part]) for l in cvf.LEVELS)
        assert float(logged[name].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert max(retain.index[:n]) < work.prepared.retained <= min(retain.index[n:])

@pytest.mark.parametrize("switch", [dict(lambda_look=0.), dict(lambda_ret=0.), dict(lambda_gen=0.), dict(push=0.), dict(remove=False), dict(alike=False, crowd=2), dict(crowd=1), dict(basin=0.99, margin=9.), dict(questions=("What do you see?",)), dict(lambda_shift=5.), dict(reset=.05), dict(scramble=2), dict(edit=.1), dict(inner_steps=2), dict(inner_steps=2, inner_facts=1)], ids=str)
def test_every_switch_changes_the_result(mllm, request_, switch, plain):
    done = crowd_forget(lr=1e-3, **switch).unlearn(mllm, request_)
    assert changed(plain, done.mllm) and not any("language_model" in n or "lm_head" in n for n in changed(weights_of(mllm), done.mllm))
    gone = {"lambda_look": "look", "lambda_ret": "retain_loss", "lambda_gen": "generic"}
    for field, column in gone.items():
        if switch.get(field) == 0: assert column not in done.log or done.log[column].isna().all()
    if "lambda_ret" in switch: assert not crowd_forget(**switch).sees["retain vqa"] and done.diagnostics["pictures"]["retain"] == 0

@pytest.fixture(scope="module")
def plain(mllm, request_): return weights_of(crowd_forget(lr=1e-3).unlearn(mllm, request_).mllm)

def test_questions_come_with_a_perception_question_about_the_same_picture(mllm, request_):
    _, work, forget, _ = begun(mllm, request_)
    p, (index, looks) = work.prepared, forget.index.reshape(2, 4)
    assert len(index) == len(looks) == 4 and all(p.asked[l]["picture"] == p.shown[i] for i, l in zip(index, looks))
    pixels = forget.tensors["pixel_values"]
    assert torch.equal(pixels[:4], pixels[4:])

def test_overwriting_moves_the_mean_of_a_person_to_the_crowd_s(mllm, request_):
    _, work, forget, _ = begun(mllm, request_, lambda_shift=1.)
    p = work.prepared
    pool = Pictures.of(mllm, crowd_forget()._strangers(work))
    for layer in p.layers:
        def inputs(some, index):
            seen = []
            hook = mllm.model.get_submodule(layer.removesuffix(".weight")).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
            with torch.no_grad(): cvf.visual_features(mllm, some.batch(mllm, index))
            hook.remove()
            return seen[0]
        for c in p.crowds:
            theirs = [i for i, e in enumerate(p.pictures.entity) if e == c["entity"]]
            assert torch.allclose(p.moved_to[layer][theirs].mean(0), inputs(pool, c["members"]).mean(0), atol=1e-4)

# What is touched

def test_it_looks_at_the_request_and_nothing_else(mllm, request_, monkeypatch):
    "Every picture and text that reaches the model is an identity question about a forget picture, a generic question about one with the model's own reply, or a picture alone."
    forget, retain = where(request_.forget, modality="vqa", kind="identity"), where(request_.retain, modality="vqa")
    look = lambda records: {i.convert("RGB").tobytes() for i in records["image"]}
    tell = lambda records: {(ask(r), r["answer"]) for r in records.remove_columns("image")}
    found, real = set(), cvf.tokenized
    def spy(m, items, with_answer=True, **options):
        found.update((r["image"].convert("RGB").tobytes(), ask(r), r["answer"] if with_answer else "") for c in items for r in c)
        return real(m, items, with_answer, **options)
    for module in (batches, cvf): monkeypatch.setattr(module, "tokenized", spy)
    method = crowd_forget(inner_steps=1)
    done = method.unlearn(mllm, request_)
    replied = {(ask(a), a["answer"]) for a in method._begin(mllm, request_, None).prepared.asked}
    assert {f[0] for f in found} <= look(forget) | look(retain) | look(request_.generic)
    assert {f[0] for f in found if f[1] != "?"} <= look(forget)  # others are only looked at
    said = {f[1:] for f in found if f[1] != "?"}
    assert {s for s in said if s[1]} <= tell(forget) | replied and {q for q, _ in said} <= {q for q, _ in tell(forget) | replied}
    assert done.diagnostics["records"] == dict(forget=len(forget), retain=len(retain))

@pytest.mark.parametrize("column", ["answer", "value", "options"])
def test_answers_about_strangers_and_retained_people_do_not_matter(mllm, request_, column, plain):
    def other(records): return records.map(lambda r: {column: r[column] if column == "options" and not r["options"] else ["w", "x", "y", "z"] if column == "options" else "nonsense"})
    generic = request_.generic if column == "options" else other(request_.generic)  # their options are part of a question
    done = crowd_forget(lr=1e-3).unlearn(mllm, replace(request_, retain=other(request_.retain), generic=generic))
    assert changed(plain, done.mllm) == set()

def test_text_is_bit_identical(mllm, request_):
    for fields in (dict(lr=1e-2), dict(lr=1e-2, inner_steps=2, inner_lr=1e-2)):
        done = crowd_forget(**fields).unlearn(mllm, request_).mllm
        text, seen = (encode(mllm, rows(where(request_.forget, modality=m), range(6))) for m in ("qa", "vqa"))
        with torch.no_grad():
            assert torch.equal(mllm.model(**text).logits, done.model(**text).logits)
            assert not torch.equal(mllm.model(**seen).logits, done.model(**seen).logits)
        linear = {f"{n}.weight" for n, m in mllm.model.named_modules() if isinstance(m, torch.nn.Linear)} & {*mllm.parts["vision"], *mllm.parts["projector"]}
        assert changed(weights_of(mllm), done) < linear  # the last block of the tower is never read

@pytest.mark.parametrize("part, other", [("vision", "projector"), ("projector", "vision")])
def test_one_part_alone(mllm, request_, part, other):
    norms = crowd_forget(parts=(part,)).unlearn(mllm, request_).diagnostics["update_norm"]
    assert norms[part] > 0 and norms[other] == norms["language"] == 0

# The adversary

def test_the_adversary_learns_and_leaves_no_trace(mllm, request_):
    method, work, forget, retain = begun(mllm, request_, inner_steps=3, inner_lr=2e-4)
    before = weights_of(work.mllm)
    log = [method.backward(work, forget, retain)[1] for _ in range(3)]
    assert changed(before, work.mllm) == set() and work.prepared.learned == 3 and all(math.isfinite(float(l[k])) for l in log for k in ("inner", "back"))
    known = work.prepared.known
    assert all(len(f) == 2 and "name" not in f for f in known.values())
    attacked = mllm.copy()
    with torch.no_grad():
        for n, w in attacked.model.named_parameters(): w.add_(work.prepared.attack[n])
    learned = [r for r in rows(work.forget, range(len(work.forget))) if r["fact"] in known[r["entity"]]]
    with torch.no_grad(): ce = [float(cross_entropy(*answer_log_probs(m, encode(m, learned)))) for m in (mllm, attacked)]
    assert ce[1] < ce[0]
    assert max(float(d.abs().max()) for d in work.prepared.attack.values()) <= 3*2e-4 + 1e-6
    assert any(float(d.abs().max()) > 0 for n, d in work.prepared.attack.items() if "language_model" in n)  # it may use all weights
    first = copy.deepcopy(work.prepared.attack)
    method.backward(work, forget, retain)  # begins anew
    assert max(float(d.abs().max()) for d in work.prepared.attack.values()) <= 2e-4 + 1e-6 and first.keys() == work.prepared.attack.keys()

def test_its_gradient_is_added_with_its_weight(mllm, request_):
    found = {}
    for weight in (0., 1., 3.):
        method, work, forget, retain = begun(mllm, request_, inner_steps=2, lambda_inner=weight)
        method.backward(work, forget, retain)
        found[weight] = {n: w.grad.clone() for n, w in work.mllm.model.named_parameters() if n in work.prepared.layers}
        assert all(w.grad is None for n, w in work.mllm.model.named_parameters() if n not in work.prepared.layers)
    for n in found[0.]: assert torch.allclose(found[3.][n] - found[0.][n], 3*(found[1.][n] - found[0.][n]), rtol=1e-3, atol=1e-5)
    assert any(float((found[1.][n] - found[0.][n]).abs().max()) > 0 for n in found[0.])

# The language model moves, too

def test_deep_holds_what_is_said_of_others(mllm, request_, monkeypatch):
    "Retained people in both modalities, the forgotten by name, strangers' pictures with the model's own replies; and only linear layers move, without the head."
    found, real = [], cf.encode
    monkeypatch.setattr(cf, "encode", lambda m, items, *a, **k: (found.append(items), real(m, items, *a, **k))[1])
    method, work, forget, retain = begun(mllm, request_, deep=True, retain_batch=8)
    loss, logged = method.loss(work, forget, retain)
    assert float(logged["say"].detach()) == pytest.approx(0, abs=1e-5)
    seen, named = found[-2:]
    assert {(r["role"], r["modality"]) for r in seen} == {("retain", "vqa"), ("general", "vqa")} and {(r["role"], r["modality"]) for r in named} == {("retain", "qa"), ("forget", "qa")}
    assert len(seen) == len(named) == 4 and all(r["answer"] == replies(mllm, [r])[0] for r in seen if r["role"] == "general")
    with torch.no_grad():
        for n in work.weights: work.weights[n].mul_(1.2)
    method, told = replace(method, lambda_say=7.), found[:]
    loss, logged = method.loss(work, forget, retain)
    terms = dict(lambda_who="who", lambda_look="look", lambda_ret="retain_loss", lambda_gen="generic", lambda_say="say")
    assert float(loss.detach()) == pytest.approx(sum(getattr(method, f)*float(logged[t].detach()) for f, t in terms.items()), rel=1e-5) and float(logged["say"].detach()) > 1e-4
    by_hand = []
    for items in found[len(told):]:
        kl = []
        with torch.no_grad():
            batch = real(mllm, items)
            then, now = (m.model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float().log_softmax(2) for m in (mllm, work.mllm))
            for i, t in (batch["labels"] != -100).nonzero().tolist(): kl.append(float((then[i, t - 1].exp()*(then[i, t - 1] - now[i, t - 1])).sum()))
        by_hand.append(sum(kl)/len(kl))
    assert len(by_hand) == 2 and float(logged["say"].detach()) == pytest.approx(sum(by_hand)/2, rel=1e-3)

def test_deep_does_not_ask_what_retained_people_look_like(mllm, request_, monkeypatch):
    assert "perception" in {*request_.retain["kind"]}
    drawn, others = [], begun(mllm, request_, deep=True, retain_batch=8)[1].prepared.others
    monkeypatch.setattr(cf, "encode", lambda m, items: drawn.extend(items))
    for _ in range(30): next(others)
    assert {r["kind"] for r in drawn if r["role"] == "retain"} == {"identity"} and "perception" in {r["kind"] for r in drawn if r["role"] == "general"}

def test_deep_moves_linear_layers_but_the_head(mllm, request_):
    plain, deep = (get("CrowdForget", "embedded", **SHORT, deep=d) for d in (False, True))
    moved = changed(weights_of(mllm), deep.unlearn(mllm, request_).mllm)
    assert {n.split(".weight")[0] for n in moved if "language_model" in n} == {n for n, m in mllm.model.named_modules() if "language_model" in n and isinstance(m, torch.nn.Linear)}
    assert not [n for n in moved if "lm_head" in n] and {*deep.trained(mllm)} >= moved
    assert deep.label == "CrowdForget, deep" and not plain.sees["retain qa"] and deep.sees["retain qa"] and deep.sees["forget qa"]

# What is drawn anew before the first step

def test_reset_draws_salient_weights_anew(mllm, request_):
    method, work, *_ = begun(mllm, request_)
    some = np.random.default_rng([method.seed, 8]).permutation(len(work.retain))[:len(work.forget)]
    theirs, others = (cf.saliency(mllm, r, method.trained(mllm)) for r in (work.forget, work.retain.select(some)))
    work = crowd_forget(reset=.1)._begin(mllm, request_, None)
    new, old = weights_of(work.mllm), weights_of(mllm)
    assert changed(old, work.mllm) == {*work.prepared.layers}
    for n in work.prepared.layers:
        gone, ratio = new[n] != old[n], theirs[n]/others[n].clamp(min=1e-20)
        assert int(gone.sum()) == int(.1*gone.numel()) and float(new[n].std()) == pytest.approx(float(old[n].std()), rel=.5)
        assert float(ratio[gone].min()) >= float(ratio[~gone].max())*.999

def test_scramble_changes_what_is_made_of_some_directions_only(mllm, request_):
    work = crowd_forget(scramble=2)._begin(mllm, request_, None)
    new, old = weights_of(work.mllm), weights_of(mllm)
    assert changed(old, work.mllm) == {*work.prepared.layers}
    for n, apart in work.prepared.apart.items():
        directions = torch.linalg.svd(apart).Vh
        assert apart.shape[1] == old[n].shape[1]
        difference = new[n] - old[n]
        assert float((difference@directions[2:].T).abs().max()) < 1e-4 < float((difference@directions[:2].T).abs().max())

# Solved for, not trained

def test_an_edit_is_the_least_squares_change(mllm, request_):
    "Residuals at a person's pictures and changes at held ones are balanced: the gradient of their weighted sum is 0, up to the ridge."
    weight = .3
    done = crowd_forget(steps=0, edit=weight, basin=1.).unlearn(mllm, request_)
    name, = changed(weights_of(mllm), done.mllm)
    assert name == [n for n, _ in mllm.parameters("projector") if n.endswith(".weight")][-1]
    p, layer = crowd_forget(basin=1.)._begin(mllm, request_, None).prepared, mllm.model.get_submodule(name.removesuffix(".weight"))
    around = Pictures.of(mllm, crowd_forget()._strangers(crowd_forget()._begin(mllm, request_, None)))
    def inputs(some, index):
        seen = []
        hook = layer.register_forward_pre_hook(lambda m, a: seen.append(a[0].reshape(len(index), -1, a[0].shape[-1])))
        with torch.no_grad(): cvf.visual_features(mllm, some.batch(mllm, index))
        hook.remove()
        return seen[0].double()
    more, before = (done.mllm.model.get_parameter(name) - layer.weight).detach().double(), layer.weight.detach().double()
    gradient, cost, n = torch.zeros_like(more), {0: 0., 1: 0.}, 0
    for c in p.crowds:
        theirs = [i for i, e in enumerate(p.pictures.entity) if e == c["entity"]]
        x = inputs(p.pictures, theirs)
        goal = (inputs(around, c["members"]).mean(0) - x.mean(0))@before.T
        for picture in x:
            for token, to in zip(picture, goal):
                gradient += torch.outer(more@token - to, token); n += 1
                for k in cost: cost[k] += float((k*more@token - to).square().sum())
    gradient /= n
    held = inputs(p.held, range(len(p.held))).flatten(0, 1)
    assert float((gradient + weight*more@held.T@held/len(held)).norm()) < .02*float(gradient.norm())
    assert cost[1] < cost[0]

def test_the_weight_of_an_edit_says_how_much_stays(mllm, request_):
    moved = [float((crowd_forget(steps=0, edit=w).unlearn(mllm, request_).mllm.model.get_parameter(n) - mllm.model.get_parameter(n)).detach().norm()) for w in (.01, 1., 100.) for n, _ in [*mllm.parameters("projector")][-2:] if n.endswith(".weight")]
    assert moved[0] > moved[1] > moved[2] > 0

def test_an_edit_alone_takes_no_step(mllm, request_):
    done = get("CrowdForget", "embedded-fast", crowd=3, pool=10, steps=0).unlearn(mllm, request_)
    assert done.log.empty and len(changed(weights_of(mllm), done.mllm)) == 1 and get("CrowdForget", "embedded-fast").label == "CrowdForget, fast"

# One request after the other

def test_what_earlier_requests_left_is_held(mllm, request_):
    method = crowd_forget(lr=1e-3, lambda_earlier=5.)
    first = method.unlearn(mllm, request_)
    assert {n: c.shape for n, c in first.state.grams.items()} == {n: (mllm.model.get_parameter(n).shape[1],)*2 for n in first.state.grams} and crowd_forget().unlearn(mllm, request_).state is None
    work = method._begin(first.mllm, request_, first.state)
    forget, retain = (next(method.batches(work, r, n, s)) for r, n, s in ((work.forget, 4, 0), (work.retain, 3, 1)))
    assert float(method.loss(work, forget, retain)[1]["earlier"].detach()) == 0
    with torch.no_grad():
        for n in work.weights: work.weights[n].mul_(1.1)
    assert float(method.loss(work, forget, retain)[1]["earlier"].detach()) == pytest.approx(.01, rel=1e-3)
    twice = method.unlearn(first.mllm, request_, state=first.state).state
    assert twice.requests == 2 and all(not torch.equal(c, first.state.grams[n]) for n, c in twice.grams.items())
    name = next(n for n in first.state.grams)
    inputs = []
    hook = first.mllm.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, -2)))
    pictures = Pictures.of(mllm, where(request_.forget, modality="vqa", kind="identity"))
    with torch.no_grad(): cvf.visual_features(first.mllm, pictures.batch(mllm, range(len(pictures))))
    hook.remove()
    assert torch.allclose(first.state.grams[name], inputs[0].T@inputs[0]/len(inputs[0]), rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match="^The state was left by a model with other layers"): method.unlearn(first.mllm, request_, state=replace(first.state, grams={n: c[:1, :1] for n, c in first.state.grams.items()}))

def test_a_stopped_sequence_goes_on_with_what_was_left(world, mllm, tmp_path, monkeypatch):
    split = world.split(17)
    questions, method, whole = thin(where(split.score, role="test", task="generation"), 1), crowd_forget(lr=1e-3, lambda_earlier=5.), []
    for folder, stops in ((None, False), (tmp_path, True), (tmp_path, False)):
        with monkeypatch.context() as m:
            if stops: m.setattr(pulse, "carry_out", lambda *a, real=pulse.carry_out, calls=[]: calls.append(1) or (real(*a) if len(calls) < 2 else 1/0))
            with pytest.raises(ZeroDivisionError) if stops else nullcontext(): whole.append(pulse.sequence(mllm, method, split, pulse.LSE(n_ops=2, update_target="method"), questions, folder))
    assert (whole[0].scores.prediction.to_numpy() == whole[1].scores.prediction.to_numpy()).all() and len(whole[1].log) == 2

# Errors

@pytest.mark.parametrize("fields, message", [
    (dict(parts=("language",)), "with the language model untouched, text stays what it is, to the bit"),
    (dict(parts=()), "some of vision, projector; with the language model"),
    (dict(lora=2), "lora of CrowdForget is 2; it must be 0, because full weights are moved."),
    (dict(forget_on=("vqa", "qa")), "it must be vqa, since questions without a picture keep their answers"),
    (dict(retain_on=("qa",)), "it must be vqa, since only pictures are retained"),
    (dict(crowd=0), "it must be 1 or more"), (dict(basin=1.5), "it must be a share, 0 to 1"), (dict(margin=.5), "it must be 1 or more"),
    (dict(cap=0), "a positive number"), (dict(inner_steps=-1), "0 or more"), (dict(lambda_shift=-1.), "0 or more"), (dict(reset=1.), "a share, from 0 to below 1")])
def test_bad_input_is_one_sentence(fields, message):
    with pytest.raises(InputError) as e: crowd_forget(**fields)
    assert message in str(e.value) and "\n" not in str(e.value)

def test_what_cannot_work_is_said_before_the_first_step(mllm, request_):
    with pytest.raises(InputError, match="looks at generic pictures, and the request has none"): crowd_forget().unlearn(mllm, replace(request_, generic=None))
    silent = replace(request_, generic=request_.generic.map(lambda r: dict(kind="world")))
    with pytest.raises(InputError, match="come without perception questions; name some in `questions`"): crowd_forget().unlearn(mllm, silent)
    with pytest.raises(InputError, match="found by comparing with retained people, and lambda_ret is 0; set it above 0, or reset to 0.$"): crowd_forget(reset=.1, lambda_ret=0.).unlearn(mllm, request_)
    with pytest.raises(InputError, match="^An edit solves for the projector's last layer, and parts are vision; projector must be among them.$"): crowd_forget(edit=.1, parts=("vision",)).unlearn(mllm, request_)
    with pytest.raises(InputError, match="^An edit leaves pictures that are held where they are, and there are none"): crowd_forget(edit=.1, lambda_ret=0., lambda_gen=0.).unlearn(mllm, request_)

# What identity does not read stays

def test_directions_are_those_in_which_the_person_s_own_words_are_read(mllm, request_):
    work = crowd_forget(lambda_still=1., directions=3)._begin(mllm, request_, None)
    p, items = work.prepared, rows(work.forget, range(len(work.forget)))
    C = 0.
    for i in np.random.default_rng([0, 9]).permutation(len(items))[:240]:  # one record after the other
        z = p.still[p.shown[i]].clone().requires_grad_()
        batch = encode(mllm, [items[i]])
        at = (batch["labels"][0] != -100).nonzero()[:, 0]
        with cvf.seeing(mllm, [z]): log_p = mllm.model(**batch).logits[0].log_softmax(1)[at - 1]
        if not p.own[i].any(): continue
        g, = torch.autograd.grad(-log_p.gather(1, p.tokens[i][:, None])[p.own[i]].sum(), z)
        C = C + g.T@g
    values, vectors = torch.linalg.eigh(C)
    assert torch.allclose(p.free@p.free.T, torch.eye(3), atol=1e-5) and p.share == pytest.approx(float(values[-3:].sum()/values.sum()), rel=1e-3)
    assert float(((C@p.free.T)*p.free.T).sum()) == pytest.approx(float(values[-3:].sum()), rel=1e-3)
    with pytest.raises(InputError, match="^directions is 64, and a picture's features at the projector have 64; it must be less.$"): crowd_forget(lambda_still=1., directions=64)._begin(mllm, request_, None)

def test_only_what_lies_beside_the_directions_is_held(mllm, request_):
    method, work, forget, retain = begun(mllm, request_, lambda_still=2.)
    plain = crowd_forget()
    assert method.loss(work, forget, retain)[1]["still"].item() == pytest.approx(0, abs=1e-9)
    moved(work)
    loss, logged = method.loss(work, forget, retain)
    free, index = work.prepared.free, forget.index[:4]
    now = cvf.all_features(work.mllm, work.prepared.pictures)["projector"]
    was = cvf.all_features(mllm, work.prepared.pictures)["projector"]
    of = [work.prepared.shown[i] for i in index]
    rest = [(now[i] - was[i]) - (now[i] - was[i])@free.T@free for i in of]
    expected = sum(float(r.square().sum()) for r in rest)/sum(float(was[i].square().sum()) for i in of)
    assert logged["still"].item() == pytest.approx(expected, rel=1e-3) and expected > 0
    assert loss.item() == pytest.approx(plain.loss(work, forget, retain)[0].item() + 2*expected, rel=1e-4)
    work.prepared.free = torch.eye(free.shape[1])  # all directions are free
    assert method.loss(work, forget, retain)[1]["still"].item() == pytest.approx(0, abs=1e-6)

def test_no_direction_is_free_where_nothing_is_read(mllm, request_):
    work = crowd_forget()._begin(mllm, request_, None)
    p, items = work.prepared, rows(work.forget, range(5))
    z = [cvf.all_features(mllm, p.pictures)["projector"][p.shown[i]] for i in range(5)]
    free, share = cf.who_is_read(mllm, items, z, [torch.zeros_like(o) for o in p.own[:5]], 3)
    assert free.shape == (0, z[0].shape[1]) and share == 0 and torch.equal(cf._beside(z[0], free), z[0])  # nothing is read, so nothing is free
    with pytest.raises(Diverged, match="^CrowdForget: the gradient of what the model says of a person is not finite"): cf.who_is_read(mllm, items, [t*float("nan") for t in z], [torch.ones_like(o) for o in p.own[:5]], 3)
    assert all(w.requires_grad for w in mllm.model.parameters())

def test_several_perception_questions_for_each_identity_question(mllm, request_):
    method, work, forget, retain = begun(mllm, request_, looks=2, asked=4)
    p, (index, *looks) = work.prepared, np.split(forget.index, 3)
    for some in looks: assert [p.asked[i]["picture"] for i in some] == p.shown[index].tolist()
    assert len(forget.tensors["input_ids"]) == 12
    moved(work)
    *_, logged = method.loss(work, forget, retain)
    apart = []
    for i in np.concatenate(looks):  # one question after the other
        said, _ = cf.spoken(work.mllm, [p.asked[i]])
        apart += [float((q*(q.clamp(min=1e-20)/now).log()).sum()) for q, now in zip(p.seen[i], said[0])]
    assert logged["look"].item() == pytest.approx(np.mean(apart), rel=1e-3, abs=1e-4)
    assert crowd_forget(lambda_look=0., looks=2)._looks == 0 and len(begun(mllm, request_, lambda_look=0., looks=2)[2].index) == 4
