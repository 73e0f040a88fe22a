"Checks of what unlearning left: formulas by plain loops, and models of which is known what they know: one that was taught, one that was not, one whose head alone is silent."
import math, random, zlib
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from mmu_study.batches import answer_log_probs, ask, encode, rows
from mmu_study.evaluation import evaluate
from mmu_study.faceworld import FACTS, WORDINGS, Faceworld
from mmu_study.models import TinyLlava, TinyQwen2VL, tiny_llava, tiny_qwen2_vl
from mmu_study.protocols import robustness as rob
from mmu_study.protocols.robustness import (PICTURES, VARIATIONS, WORDS, Relearning, auc, auc_table, blocked, membership, min_k, probe, quantization, quantization_q, quantized, relearn, relearning_r, ridge,
    rounded, sampled, states, varied, vary)
from mmu_study.records import SHORT, ForgetRequest, table, thin, to_records, where
from mmu_study.settings import InputError
from mmu_study.training import Recipe, finetune

# A world of text: 16 people, of whom 4 are to be forgotten, and 4 whom nobody is taught; every value belongs to two of the 16, so that it can be told from others

PEOPLE, FORGET = [f"{a} {b}" for a, b in zip("Ada Bruno Carla Dario Edda Felix Greta Hugo Irma Jonas Karla Luca Mira Nils Olga Pablo Quentin Rosa Stefan Tilda".split(),
    "Abel Brandt Costa Dahl Engel Falk Grimm Holm Isler Jansen Keller Lund Moreau Novak Olsen Pohl Quast Riva Stern Thoma".split())], 4

def told():
    rng = np.random.default_rng(0)
    value = {f: [v[i] for i in np.concatenate([rng.permutation(8), rng.permutation(8), rng.permutation(4)])] for f, v in FACTS.items()}
    for p, name in enumerate(PEOPLE):
        for fact, fold in product(FACTS, ("train", "test")):
            role = "holdout" if p >= 16 else "retain" if p >= FORGET else "forget" if fold == "train" else "test"
            if role == "holdout" and fold == "train": continue
            w, v = WORDINGS[fact], value[fact][p]
            asked = [("generation", w.ask[i], w.say) for i in ((0, 1) if fold == "train" else (1,))] + [("generation", w.ask[2] + SHORT, "{v}")]*(fold == "train") + [("cloze", w.fill[0], "{v}")]
            for i, (task, question, answer) in enumerate(asked):
                yield dict(uid=f"{p}/{fact}/{fold}/{i}", entity=f"p{p:02}", name=name, role=role, fold=fold, unseen=fold == "test", modality="qa", task=task, fact=fact, kind="identity", image=None, view=-1,
                    question=question.format(s=name), answer=answer.format(s=name, v=v), value=v, options=[])

@pytest.fixture(scope="module")
def text(): return to_records(told())

@pytest.fixture(scope="module")
def request_(text): return ForgetRequest(where(text, role="forget"), where(text, role="retain", fold="train"))

@pytest.fixture(scope="module")
def questions(text): return where(text, role="test", task="generation")

@pytest.fixture(scope="module")
def models(text):
    "Vanilla was taught everybody, the oracle everybody but those to forget; blocked is vanilla with a silent head."
    corpus = [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in text]
    def taught(*roles):
        mllm = tiny_llava(TinyLlava(vision_width=32, vision_layers=2, width=64, layers=2), corpus)
        finetune(mllm, where(text, role=roles, fold="train"), Recipe(steps=90, tokens=800, lr=8e-3), parts=("language",), progress=False)
        return mllm
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    vanilla, oracle = taught("forget", "retain"), taught("retain")
    random.setstate(state[0]); np.random.set_state(state[1]); torch.set_rng_state(state[2])
    return dict(vanilla=vanilla, oracle=oracle, blocked=blocked(vanilla, where(text, role="forget")))

def right(scores, metric="accuracy"): return scores[scores.metric == metric].value.mean()
def bits(mllm): return [p.detach().clone() for p in mllm.model.parameters()]
def same(a, b): return all(map(torch.equal, a, b))
def rng_state(): return random.getstate(), tuple(np.random.get_state()[1]), tuple(torch.get_rng_state().tolist())

# Models of which is known what they know

def test_plain_accuracy_calls_the_silent_head_forgotten(models, questions):
    found = {name: right(evaluate(m, questions)) for name, m in models.items()}
    assert found["vanilla"] >= .9 and found["oracle"] <= .35 and found["blocked"] <= .1, found
    changed = [n for (n, p), q in zip(models["vanilla"].model.named_parameters(), models["blocked"].model.parameters()) if not torch.equal(p, q)]
    assert changed == ["lm_head.weight"]

ATTACK = Relearning(lr=5e-4, steps=20, at=(0, 20))

def test_relearning_tells_the_hidden_from_the_gone(models, request_, questions):
    found = {name: relearn(m, request_, questions, ATTACK) for name, m in models.items()}
    after = {name: right(s[(s.step == 20) & (s.part == "held out")]) for name, s in found.items()}
    assert min(after["blocked"], after["vanilla"]) >= after["oracle"] + .3, after
    assert relearning_r(found["oracle"], found["oracle"]) == 1 and relearning_r(found["blocked"], found["oracle"]) < .5

def test_the_value_is_read_off_hidden_states_of_who_knows(models, text, questions):
    train = where(text, role="retain", fold="train")
    found = {name: probe(m, train, questions, "value") for name, m in models.items()}
    deep = {name: right(s[s.layer == "2"]) for name, s in found.items()}
    assert deep["vanilla"] >= .6 and deep["oracle"] <= .4, deep
    assert found["blocked"].equals(found["vanilla"])  # nothing before the head differs

def test_membership_tells_who_was_taught(models, text):
    records = where(text, role=["test", "holdout"])
    found = pd.concat([membership(m, records, models["oracle"]).assign(method=name) for name, m in models.items()], ignore_index=True)
    numbers = auc_table(found, found[found.method == "oracle"], n_boot=200).set_index(["method", "metric"])
    assert numbers.auc.vanilla.mia_loss > .95 and numbers.auc.vanilla.min() > .75 and (numbers.auc.oracle.drop("mia_reference") - .5).abs().max() < .25 and numbers.auc.oracle.mia_reference == .5
    assert (numbers.gap.oracle == 0).all() and numbers.gap.vanilla.mia_loss > .2 and numbers.difference_low.vanilla.mia_loss > 0
    assert set(found.metric) == {*rob.ATTACKS} and not set(membership(models["vanilla"], records.select([0])).metric) & {"mia_reference"}

def test_sampling_finds_what_is_known(models, questions):
    found = {name: sampled(m, questions, n=6) for name, m in models.items()}
    assert right(found["vanilla"], "best_of_n") >= .9 and right(found["oracle"], "best_of_n") <= .8
    for s in found.values(): assert right(s, "best_of_n") >= right(s, "mean_of_n")
    one = found["oracle"].set_index(["metric", "uid"])
    for r in questions:
        hits = [r["value"].lower() in reply.lower().replace(".", " ").split() for reply in one.prediction["best_of_n", r["uid"]].split("\n")]
        assert len(hits) == 6 and one.value["best_of_n", r["uid"]] == max(hits) and one.value["mean_of_n", r["uid"]] == pytest.approx(sum(hits)/6)

def test_fine_rounding_changes_no_answer_and_coarse_does(models, questions):
    plain = evaluate(models["vanilla"], questions)
    found = quantization(models["vanilla"], questions, bits=(16, 2))
    assert right(found[found.bits == "16"]) == right(plain) and right(found[found.bits == "2"]) < right(plain) - .3

# What every check leaves alone, and gives back

def checks(text, request_, questions):
    few = questions.select(range(3))
    return dict(relearn=lambda m: relearn(m, request_, few, Relearning(steps=1, at=(0, 1))), quantization=lambda m: quantization(m, few), membership=lambda m: membership(m, few), varied=lambda m: varied(m, few, WORDS),
        probe=lambda m: probe(m, where(text, role="retain", fold="train", task="cloze"), questions, "value"), sampled=lambda m: sampled(m, few, n=2))

@pytest.mark.parametrize("check", ["relearn", "quantization", "membership", "varied", "probe", "sampled"])
def test_every_check_leaves_model_and_random_numbers_alone(models, text, request_, questions, check):
    mllm, run = models["vanilla"], checks(text, request_, questions)[check]
    mllm.model.train(); mllm.model.lm_head.eval()
    before, state, modes = bits(mllm), rng_state(), [m.training for m in mllm.model.modules()]
    scores = run(mllm)
    assert same(before, mllm.model.parameters()) and rng_state() == state and [m.training for m in mllm.model.modules()] == modes
    mllm.model.eval()
    columns = list(evaluate(mllm, questions.select([0])))
    assert list(scores)[:len(columns)] == columns and {"check"} < {*scores} and scores.value.notna().all()
    assert scores.drop(columns="prediction").equals(run(mllm).drop(columns="prediction"))

def test_blocked_and_quantized_are_copies(models, request_):
    before = bits(models["vanilla"])
    a, b = blocked(models["vanilla"], request_.forget), quantized(models["vanilla"], 4)
    with torch.no_grad():
        for p in (*a.model.parameters(), *b.model.parameters()): p.zero_()
    assert same(before, models["vanilla"].model.parameters())

def test_nf4_is_what_bitsandbytes_makes(models):
    bnb, m = pytest.importorskip("bitsandbytes").functional, models["vanilla"]
    done, name = quantized(m, "nf4", parts=("projector",)), "model.multi_modal_projector.linear_1.weight"
    was, now = (dict(x.model.named_parameters())[name] for x in (m, done))
    codes, state = bnb.quantize_4bit(was.detach(), quant_type="nf4")
    assert torch.equal(now, bnb.dequantize_4bit(codes, state)) and not torch.equal(now, was)
    assert max(len(set(b.tolist())) for b in now.detach().flatten()[:now.numel()//64*64].view(-1, 64)) <= 16
    assert same([p for n, p in m.parameters("vision", "language")], [p for n, p in done.parameters("vision", "language")])

def test_nf4_without_its_package(models, monkeypatch):
    monkeypatch.setattr(rob, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="^NF4 needs the package bitsandbytes, which is not installed here: pip install 'mmu_study\\[quantize\\]'.$"): quantized(models["vanilla"], "nf4")

# Relearning

@pytest.mark.parametrize("seed, facts", [*product(range(3), (1, 2, 4))])
def test_what_is_relearned_and_what_is_asked_are_disjoint(request_, seed, facts):
    options = Relearning(seed=seed, facts=facts)
    drawn = options.drawn(request_)
    used = table(options.forget_records(request_)).groupby("entity").fact.agg(lambda f: tuple(sorted(set(f))))
    assert used.to_dict() == drawn and all(len(f) == facts for f in drawn.values()) and {*drawn} == {*request_.entities}
    assert drawn == Relearning(seed=seed, facts=facts).drawn(request_)

def test_relearning_parts_and_steps(models, text, request_):
    asked = where(text, fold="test", role=["test", "retain"], task="cloze")
    found = relearn(models["vanilla"], request_, asked, options := Relearning(steps=2, at=(0, 2, 9)))
    assert sorted(set(found.step)) == [0, 2] and set(found.part) == {"relearned", "held out", "other"}
    for r in found.itertuples(): assert r.part == ("other" if r.role == "retain" else "relearned" if r.fact in options.drawn(request_)[r.entity] else "held out")
    plain = evaluate(models["vanilla"], asked)
    pd.testing.assert_frame_equal(found[found.step == 0][list(plain)].reset_index(drop=True), plain)

def test_names_are_never_relearned():
    world = Faceworld.preset("smoke", strangers=10, views=4)
    request = world.split(17).requests()[0]
    for seed in range(8): assert not any("name" in f for f in Relearning(seed=seed, facts=4).drawn(request).values())
    assert {*Relearning().forget_records(request)["kind"]} == {"identity"}

def table_of(values: dict, step=0): return pd.DataFrame([dict(uid=f"{u}", role="test", kind="identity", metric="accuracy", part="held out", step=step, value=v) for u, v in values.items()])

@pytest.mark.parametrize("before, after, oracle_after, r", [((0, 0), (1, 0), (0, 0), 0), ((0, 0), (1, 1), (1, 0), .5), ((0, 0), (0, 0), (1, 1), 1), ((1, 0), (0, 0), (0, 0), 1), ((0, 0), (1, 0), (1, 1), 1), ((1, 1), (1, 1), (0, 0), math.nan)])
def test_r_by_hand(before, after, oracle_after, r):
    both = lambda a, b: pd.concat([table_of(dict(enumerate(a))), table_of(dict(enumerate(b)), 40)])
    assert relearning_r(both(before, after), both((0, 0), oracle_after)) == pytest.approx(r, nan_ok=True)

@pytest.mark.parametrize("before, after, q", [((0, 0), (1, 0), .5), ((0, 0), (0, 0), 1), ((1, 0), (0, 0), 1), ((1, 1), (0, 0), math.nan)])
def test_q_by_hand(before, after, q):
    assert quantization_q(table_of(dict(enumerate(before))), table_of(dict(enumerate(after)))) == pytest.approx(q, nan_ok=True)

# Rounding

@pytest.mark.parametrize("b", [2, 4, 8])
def test_rounding_by_plain_loops(b):
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(b)); w[3] = 0
    found, top = rounded(w, b), 2**(b - 1) - 1
    for row, out in zip(w.tolist(), found.tolist()):
        s = max(map(abs, row))/top
        assert out == pytest.approx([min(range(-top, top + 1), key=lambda k: abs(v - k*s))*s if s else 0 for v in row], abs=1e-6)
    assert all(len(set(row)) <= 2*top + 1 for row in found.tolist())

def test_only_linear_layers_of_the_parts_are_rounded(models):
    m = models["vanilla"]
    changed = lambda q: {n for (n, p), r in zip(m.model.named_parameters(), q.model.parameters()) if not torch.equal(p, r)}
    all_, language = changed(quantized(m, 4)), changed(quantized(m, 4, parts=("language",)))
    linear = {f"{n}.weight" for n, l in m.model.named_modules() if isinstance(l, torch.nn.Linear)}
    assert all_ == linear - {"lm_head.weight"} and language == all_ & {*m.parts["language"]} and changed(quantized(m, 4, head=True)) == linear

# Membership

def test_attacks_by_plain_loops(models, text):
    mllm, records = models["oracle"], where(text, role=["test", "holdout"]).select(range(0, 60, 7))
    found = membership(mllm, records, models["vanilla"]).set_index(["metric", "uid"]).value
    for r in rows(records, range(len(records))):
        losses = {}
        for name, m in dict(own=mllm, ref=models["vanilla"]).items():
            batch = encode(m, [r])
            with torch.no_grad(): logits = m.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0].double()
            lp, plus = [], []
            for t in range(1, logits.shape[0]):
                if (label := int(batch["labels"][0, t])) < 0: continue
                logp = logits[t - 1] - torch.logsumexp(logits[t - 1], 0)
                p = logp.exp().tolist(); logp = logp.tolist()
                mu = sum(a*b for a, b in zip(p, logp))
                sigma = math.sqrt(sum(a*(b - mu)**2 for a, b in zip(p, logp)))
                lp.append(logp[label]); plus.append((logp[label] - mu)/sigma)
            losses[name] = -sum(lp)/len(lp)
            if name == "own": k = max(1, int(.2*len(lp))); own = dict(mia_min_k=-sum(sorted(lp)[:k])/k, mia_min_k_plus_plus=-sum(sorted(plus)[:k])/k)
        expected = own | dict(mia_loss=losses["own"], mia_zlib=losses["own"]/len(zlib.compress(r["answer"].encode())), mia_reference=losses["own"] - losses["ref"])
        for metric, value in expected.items(): assert found[metric, r["uid"]] == pytest.approx(value, rel=2e-3, abs=1e-4), metric

@pytest.mark.parametrize("n, k, taken", [(1, .2, 1), (4, .2, 1), (5, .2, 1), (10, .2, 2), (15, .2, 3), (10, 1., 10)])
def test_min_k_takes_the_lowest(n, k, taken):
    values = np.random.default_rng(n).normal(size=n)
    assert min_k(values, k) == pytest.approx(-sum(sorted(values)[:taken])/taken)

def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 9), rng.integers(1, 6, 7)
    assert auc(a, b) == pytest.approx(sum(1. if x < y else .5 if x == y else 0. for x in a for y in b)/63)
    assert auc([0], [1]) == 1 and auc([1], [0]) == 0 and auc([1, 2], [1, 2]) == .5

def attacked(members, others, **more):
    return pd.DataFrame([dict(uid=f"{role}{i}", entity=f"{role}{i}", fact="home", role=role, metric="mia_loss", value=float(v), method="m", **more) for role, vs in (("test", members), ("holdout", others)) for i, v in enumerate(vs)])

def test_auc_table_has_worlds_apart_and_intervals_that_cover():
    one, two = attacked([0, 1, 2, 3], [2, 3, 4, 5], seed=0), attacked([10, 11], [0, 10.5], seed=1)
    both = auc_table(pd.concat([one, two])).iloc[0]
    assert both.auc == pytest.approx((auc([0, 1, 2, 3], [2, 3, 4, 5]) + auc([10, 11], [0, 10.5]))/2)  # pairs across worlds would give another number
    rng, hits = np.random.default_rng(1), 0
    for _ in range(60):
        row = auc_table(attacked(rng.normal(0, 1, 25), rng.normal(1, 1, 25)), n_boot=200).iloc[0]
        hits += row.low <= .7602 <= row.high  # Φ(1/√2)
    assert 50 <= hits <= 60
    against = auc_table(one, one, n_boot=50).iloc[0]
    assert (against.gap, against.difference_low, against.difference_high) == (0, 0, 0)
    assert auc_table(one, attacked([5, 6, 7, 8], [0, 1, 2, 3], seed=0), n_boot=50).iloc[0].gap == pytest.approx(auc([0, 1, 2, 3], [2, 3, 4, 5]))

# Probes

def test_ridge_is_the_minimum_of_its_loss():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=g).double(), torch.nn.functional.one_hot(torch.randint(3, (40,), generator=g), 3).double()
    z = (x - x.mean(0))/x.std(0, correction=0)
    w, b = torch.zeros(6, 3, dtype=torch.double, requires_grad=True), torch.zeros(3, dtype=torch.double, requires_grad=True)
    step = torch.optim.LBFGS([w, b], max_iter=200, tolerance_grad=1e-12)
    def loss():
        step.zero_grad(); value = ((z@w + b - y)**2).sum()/40 + .3*(w**2).sum(); value.backward(); return value
    step.step(loss)
    new = torch.randn(5, 6, generator=g).double()
    assert torch.allclose(ridge(x, y, .3)(new), (new - x.mean(0))/x.std(0, correction=0)@w.detach() + b.detach(), atol=1e-5)

@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def seeing(request):
    "An untrained model with wider visual weights, so that pictures differ, and a world with pictures."
    world = Faceworld.preset("smoke", strangers=10, views=4)
    corpus = [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")]
    made = tiny_llava(TinyLlava(vision_width=32, vision_layers=2, width=32, layers=2), corpus) if request.param == "llava" else tiny_qwen2_vl(TinyQwen2VL(), corpus)
    with torch.no_grad():
        for n, p in made.parameters("vision", "projector"):
            if p.ndim == 2: p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1))/p.shape[1]**.5)
    return made, world.split(25)

def test_levels_are_what_the_model_passes_through(seeing):
    mllm, split = seeing
    items = rows(where(split.role("forget"), modality="vqa"), range(3))
    with torch.no_grad(): found, image = states(mllm, items), states(mllm, items, "image")
    batch = encode(mllm, items, with_answer=False)
    seen = []
    hook = mllm.model.model.language_model.layers[0].register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad(): mllm.model(**batch)
    hook.remove()
    assert list(found) == ["vision", "projector", "1", "2"] and torch.allclose(found["1"], seen[0][:, -1], atol=1e-5)
    token = mllm.tokenizer.convert_tokens_to_ids("<image>")
    for i, ids in enumerate(batch["input_ids"].tolist()): assert torch.allclose(image["1"][i], seen[0][i, [j for j, t in enumerate(ids) if t == token]].mean(0), atol=1e-5)
    with torch.no_grad(): one = states(mllm, items[1:2])
    assert all(torch.allclose(one[k][0], found[k][1], atol=1e-4) for k in found)  # padding changes nothing

def test_a_silent_head_lowers_the_values_and_nothing_else(seeing):
    mllm, split = seeing
    records = where(split.role("forget"), kind="identity", fold="train", fact="home").select(range(0, 60, 9))
    silent = blocked(mllm, records, by=5.)
    change = {n: (q - p).detach() for (n, p), q in zip(mllm.model.named_parameters(), silent.model.parameters()) if not torch.equal(p, q)}
    answers = [r for r in rows(records, range(len(records))) if not r["options"]]
    tokens = {t for r in answers for v in (r["value"], " " + r["value"]) for t in mllm.tokenizer(v)["input_ids"]}
    moved = change["lm_head.weight"].abs().sum(1).nonzero()[:, 0].tolist()
    assert list(change) == ["lm_head.weight"] and 0 < len(moved) and {*moved} <= tokens
    said = []
    for r in answers:
        batch = encode(mllm, [r])
        with torch.no_grad(): out = mllm.model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
        said += [out.hidden_states[-1][0, t - 1] for t in range(1, batch["labels"].shape[1]) if int(batch["labels"][0, t]) in moved]
    assert (torch.stack(said)@change["lm_head.weight"][moved].T).mean(0).tolist() == pytest.approx([-5.]*len(moved), rel=1e-3)

@pytest.mark.parametrize("at", ["last", "image"])
def test_faces_are_told_apart_and_only_theirs(seeing, at):
    mllm, split = seeing
    train, test = split.role("forget", "retain", fold="train"), where(split.role("test", "retain", fold="test"), unseen=[True])
    found = probe(mllm, train, test, at=at, penalty=1e-3)
    pictures = table(where(test, modality="vqa")).drop_duplicates(["entity", "view"])
    assert set(found.layer) == {"vision", "projector", "1", "2"} and (found.groupby("layer").uid.nunique() == len(pictures)).all() and {*found.prediction} <= {*train["entity"]}
    assert found[found.layer == "vision"].value.mean() > 3/12  # colours alone tell faces apart, chance is 1/12
    assert ((found.prediction == found.entity) == (found.value == 1)).all()
    again = probe(mllm, train, train.select(range(40)), at=at, penalty=1e-6)
    assert again[again.layer == "vision"].value.mean() > found[found.layer == "vision"].value.mean()

# Variations

def test_variations_change_what_they_say(seeing):
    _, split = seeing
    records = where(split.score, role="test", fact="home")
    for name in VARIATIONS:
        changed = vary(records, name)
        assert changed.features == records.features and changed["uid"] == records["uid"] and changed["answer"] == records["answer"]
        assert (changed["question"] == records["question"]) == (name in PICTURES)
        for a, b in zip(rows(records, range(len(records))), rows(changed, range(len(records)))):
            if a["image"] is not None: assert a["image"].size == b["image"].size and (a["image"].tobytes() == b["image"].tobytes()) == (name in WORDS)
    a, b = (np.asarray(r["image"], int) for r in (where(records, modality="vqa")[0], where(vary(records, "flip"), modality="vqa")[0]))
    assert (a[:, ::-1] == b).all()
    noisy = np.asarray(where(vary(records, "noise"), modality="vqa")[0]["image"], int) - a
    assert 8 < noisy[(a > 48) & (a < 207)].std() < 24 and vary(records, "noise")[0]["image"] != vary(records, "noise", seed=1)[0]["image"]

def test_varied_scores_pictures_where_there_are_some(seeing):
    mllm, split = seeing
    records = where(split.score, role="test", fact="home", task="cloze")
    found = varied(mllm, records, ["suffix", "flip"])
    assert found[found.variation == "suffix"].uid.nunique() == len(records) and {*found[found.variation == "flip"].modality} == {"vqa"} and {*zip(found.check, found.variation)} == {("words", "suffix"), ("pictures", "flip")}

# Errors

def test_bad_input_is_one_sentence(models, text, request_, questions, monkeypatch):
    m = models["vanilla"]
    for call, message in [
        (lambda: Relearning(facts=0), "facts of Relearning is 0"), (lambda: Relearning(at=()), "at of Relearning"), (lambda: Relearning(facts=5).drawn(request_), "5 facts of p00 were to be relearned; there are 5"),
        (lambda: quantized(m, 1), "bits is 1; it must be a number from 2 to 16"), (lambda: quantized(m, 4.5), "bits is 4.5"),
        (lambda: probe(m, request_.retain, questions, "name"), "A probe reads entity or value at last or image, not 'name'"), (lambda: probe(m, where(request_.retain, fact="pet"), where(questions, fact="home"), "value"), "No value of the test records is among"),
        (lambda: sampled(m, questions, n=0), "0 samples at temperature 1.0"), (lambda: sampled(m, questions, temperature=0.), "above 0"), (lambda: vary(questions, "louder"), "There is no variation 'louder'"),
        (lambda: membership(m, questions.select([])), "There are no records to check"), (lambda: auc_table(attacked([1], [])), "there are none of holdout"), (lambda: auc_table(attacked([1], [2]), attacked([1], [2, 3])), "different records"),
        (lambda: relearning_r(table_of({0: 1}), table_of({1: 1})), "answered different questions"), (lambda: quantization_q(table_of({0: 1}).assign(role="retain"), table_of({0: 1})), "no scores of accuracy about people to forget")]:
        with pytest.raises(InputError, match=message) as e: call()
        assert str(e.value).endswith(".") and "\n" not in str(e.value)
    tied = m.copy()
    tied.model.set_output_embeddings(torch.nn.Linear(1, 1)); tied.model.get_output_embeddings().weight = tied.model.get_input_embeddings().weight
    with pytest.raises(InputError, match="output head is its token embedding"): blocked(tied, request_.forget)
    choice = to_records([dict(rows(questions, [0])[0], task="classification", answer="A", options=[questions[0]["value"], "b", "c", "d"])])
    with pytest.raises(InputError, match="No answer of the records holds its value"): blocked(m, choice)
    with pytest.raises(InputError, match="Questions with options"): sampled(m, choice)
