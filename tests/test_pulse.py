"PULSE's settings for every registered method: who asks when, what a method is compared with, resumption after kill -9, what is computed from the scores, and whom a base model knows."
import itertools, json, os, pkgutil, signal, subprocess, sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Image

import mmu_study.methods
from mmu_study.batches import ask
from mmu_study.evaluation import candidates, evaluate
from mmu_study.faceworld import Faceworld
from mmu_study.methods.unlearning import Method, Unlearned, get, methods
from mmu_study.models import MLLM, TinyLlava, tiny_llava
from mmu_study.protocols import pulse
from mmu_study.protocols.pulse import LSE, PU, SINGLE, ask_base, carry_out, effectiveness, fitted, matrix, oracle_distance, requests, scored, select, sequence, split_of, sustained, to_oracle
from mmu_study.records import Split, choose_people, table, thin, to_records, where, with_roles
from mmu_study.settings import InputError
from mmu_study.training import Diverged, Recipe, built, finetune, lessons

for module in pkgutil.iter_modules(mmu_study.methods.__path__): import_module(f"mmu_study.methods.{module.name}")

SHORT = dict(steps=2, batch_size=4, retain_batch=3, lr=3e-3)
FIELDS = dict(RMU=dict(SHORT, layer=2), Retrain=dict(steps=2, tokens=300), MMUnlearner=dict(SHORT, saliency_records=8, saliency_batch=4, check=False),
    MANU=dict(batch_size=16), CVFNCU=dict(SHORT, redraws=30, pool=20), CrowdForget=dict(SHORT, crowd=3, asked=2, pool=20))
OWN_PARTS = replace(LSE(n_ops=2), update_target="method")

@dataclass(frozen=True)
class Nothing(Method):
    "Does nothing."
    def unlearn(self, mllm, request, *, state=None, watch=None, watch_at=()): return Unlearned(mllm.copy(), pd.DataFrame(), dict(method="Nothing"), 0., 0)

@dataclass
class Diary:
    "The state of `Forgetful`: whom it has met."
    people: tuple
    def save(self, file): Path(file).write_text(json.dumps(self.people))
    @classmethod
    def load(cls, file): return cls(tuple(json.loads(Path(file).read_text())))

@dataclass(frozen=True)
class Forgetful(Nothing):
    "Adds to one weight a number that depends on everything it was told before."
    sequential = True
    def unlearn(self, mllm, request, *, state=None, watch=None, watch_at=()):
        done, people = super().unlearn(mllm, request), (state.people if state else ()) + request.entities
        with torch.no_grad(): done.mllm.model.lm_head.weight[0, 0] += sum(map(len, people))*len(people)
        return replace(done, state=Diary(people), diagnostics=dict(method="Forgetful", people=people))

@pytest.fixture(scope="module")
def world(): return Faceworld.preset("smoke", strangers=10, views=4)

@pytest.fixture(scope="module")
def split(world):
    "Four people to forget and eight to keep."
    return brief(world.split(33))

def brief(split):
    "One training question of every kind and nothing else, so that methods are quick; what is asked is chosen apart."
    train = split.role("forget", "retain", "general", fold="train")
    return replace(split, records=thin(where(train, fact=["name", "home", "pet", "hair"]), 1).flatten_indices())

@pytest.fixture(scope="module")
def pre(world): return brief(split_of(world.records, known_of(world)))

def asked_about(split):
    "A cloze and a question with options, one of them with a picture, about everybody who is to be forgotten and about two others of each kind."
    meta = table(split.score).query("fact in ('home', 'hair', 'capital') and (task == 'cloze' and modality == 'vqa' or task == 'classification' and modality == 'qa' or fact == 'hair')")
    both = meta.sort_values(["entity", "task"]).groupby(["role", "entity"], sort=False).head(2)
    some = both[both.role.eq("test") | both.groupby("role").cumcount().lt(4) & both.role.isin(["retain", "general"])]
    return split.score.select(sorted(some.index)).flatten_indices()

@pytest.fixture(scope="module")
def questions(world): return asked_about(world.split(33))

@pytest.fixture(scope="module")
def pre_questions(world): return asked_about(split_of(world.records, known_of(world)))

@pytest.fixture(scope="module")
def mllm(world, split):
    made = tiny_llava(TinyLlava(vision_width=64, vision_layers=3, width=64, layers=2), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")])
    finetune(made, split.role("forget", "retain", fold="train"), Recipe(steps=30, tokens=700), progress=False)
    return made

@pytest.fixture(scope="module")
def folder_of(mllm, tmp_path_factory): return str(mllm.save(tmp_path_factory.mktemp("model")/"m"))

def small(name, folder_of=None, **overrides):
    given = dict(FIELDS.get(name, SHORT), **overrides)
    return get(name, "embedded", **given, **(dict(base=folder_of) if name == "Retrain" else {}))

def bits(mllm): return [p.detach().clone() for p in mllm.model.parameters()]
def equal(a, b): return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))

def known_of(world, n_unlearn=2, n_retain=2):
    "As if the base model knew all celebrities and nobody else."
    meta = table(world.records)
    asked = meta[meta.role.isin(["real", "holdout"]) & (meta.kind == "identity") & (meta.task == "classification")]
    return select(asked.assign(metric="accuracy", value=(asked.role == "real").astype(float)), PU(n_unlearn=n_unlearn, n_retain=n_retain))

# Every method goes through every setting

@pytest.mark.parametrize("name", methods())
def test_every_method_goes_through_a_pu_and_lse(split, pre, mllm, questions, pre_questions, folder_of, name):
    method, before = small(name, folder_of), bits(mllm)
    lse = sequence(mllm, method, split, OWN_PARTS, questions)
    once = sequence(mllm, method, split, replace(OWN_PARTS, n_ops=1), questions.select(range(4)))
    pu = sequence(mllm, method, pre, replace(OWN_PARTS, n_ops=1), pre_questions)
    assert [s.log.request.tolist() for s in (lse, once, pu)] == [[1, 2], [1], [1]] and not lse.stopped + once.stopped + pu.stopped
    assert {*lse.scores.uid} == {*questions["uid"]}
    assert {"own", "earlier", "future", "retain", "general"} == {*lse.scores.subset} and {"own", "retain", "general"} == {*pu.scores.subset}
    assert all(torch.equal(p, q) for p, q in zip(before, mllm.model.parameters())) and not equal(mllm, lse.mllm)

@pytest.mark.parametrize("name", ["GradDiff", "MANU", "CVFNCU"])
def test_a_sequence_of_one_request_is_a(split, mllm, questions, name):
    method = small(name)
    plain = method.unlearn(mllm, *split.requests())
    once = sequence(mllm, method, split, replace(SINGLE, update_target="method", seed=3), questions)
    assert equal(plain.mllm, once.mllm) and once.log.diagnostics[0] == plain.diagnostics
    direct = evaluate(plain.mllm, questions)
    pd.testing.assert_frame_equal(once.scores[once.scores.metric != "truth_ratio"][list(direct)], direct)

def test_doing_nothing_leaves_all_scores_unchanged(split, mllm, questions):
    before = scored(mllm, questions, requests(split, LSE(n_ops=4)), 0)
    done = sequence(mllm, Nothing(), split, replace(OWN_PARTS, n_ops=4), questions)
    for k, after in done.scores.groupby("request"): pd.testing.assert_frame_equal(after.drop(columns=["request", "subset"]).reset_index(drop=True), before.drop(columns=["request", "subset"]))
    everything = pd.concat([before, done.scores])
    numbers = sustained(matrix(everything))
    assert numbers.relapse.dropna().eq(0).all() and numbers.collateral.dropna().eq(0).all() and len(numbers) == 4

def test_state_goes_from_request_to_request(split, mllm, questions, tmp_path):
    options = replace(OWN_PARTS, n_ops=3)
    done = sequence(mllm, Forgetful(), split, options, questions, tmp_path/"s")
    people = [r.entities for r in requests(split, options)]
    assert [d["people"] for d in done.log.diagnostics] == [people[0], people[0] + people[1], sum(people, ())]
    added = (done.mllm.model.lm_head.weight[0, 0] - mllm.model.lm_head.weight[0, 0]).item()
    assert added == pytest.approx(sum(len(p)*sum(map(len, p)) for p in (people[0], people[0] + people[1], sum(people, ()))), rel=1e-4)

def test_a_sequence_ends_where_numbers_do(split, mllm, questions, monkeypatch):
    def unlearn(self, mllm, request, **kw):
        if request.index == 1: raise Diverged("Nothing: the loss is nan")
        return Unlearned(mllm.copy(), pd.DataFrame(), {}, 0., 0)
    monkeypatch.setattr(Nothing, "unlearn", unlearn)
    done = sequence(mllm, Nothing(), split, replace(OWN_PARTS, n_ops=3), questions)
    assert done.stopped == "request 2: Nothing: the loss is nan" and done.log.request.tolist() == [1] and {*done.scores.request} == {1}

# Requests

def people_only(n, pct, seed=0):
    "A split of people of whom one thing is asked in each fold, without pictures."
    row = lambda e, fold: dict(uid=f"{e}/{fold}", entity=e, name=e, role="retain", fold=fold, unseen=fold == "test", modality="qa", task="cloze", fact="home", kind="identity", image=None, view=-1,
        question="Where?", answer="Oslo", value="Oslo", options=[])
    people = [f"p{i:02}" for i in range(n)]
    return Split(with_roles(to_records([row(e, fold) for e in people for fold in ("train", "test")]), choose_people(people, pct, seed)), pct, seed)

@pytest.mark.parametrize("seed, n, partition, pct", [(s, n, p, pct) for s in range(3) for n in (1, 2, 3, 5) for p in ("seeded", "id") for pct in (42, 80)])
def test_requests_are_disjoint_and_all(seed, n, partition, pct):
    split, options = people_only(12, pct, seed), LSE(n_ops=n, partition=partition, seed=seed)
    found = requests(split, options)
    people = [e for r in found for e in r.entities]
    assert len(found) == n and sorted(people) == sorted(split.forget_entities) and len(set(people)) == len(people)
    assert max(len(r.entities) for r in found) - min(len(r.entities) for r in found) <= 1
    whole = split.role("forget", fold="train")
    assert sorted(itertools.chain.from_iterable(r.forget["uid"] for r in found)) == sorted(whole["uid"])
    assert all({*r.retain["entity"]}.isdisjoint(people) for r in found) and [r.index for r in found] == list(range(n))
    assert [r.entities for r in requests(split, options)] == [r.entities for r in found]

def test_orders_differ_by_seed():
    split = people_only(12, 50)
    assert len({tuple(r.entities for r in requests(split, LSE(n_ops=3, seed=s))) for s in range(6)}) > 3

def test_shrinking_retain_data_is_everybody_who_has_not_asked():
    split = people_only(12, 50)
    found = requests(split, LSE(n_ops=3, retain_data="shrinking"))
    fixed = {*split.role("retain")["entity"]}
    for i, r in enumerate(found): assert {*r.retain["entity"]} == fixed | {e for later in found[i + 1:] for e in later.entities}

def test_subsets_follow_the_requests(split, mllm, questions):
    asked = requests(split, LSE(n_ops=3))
    number = {e: i for i, r in enumerate(asked, 1) for e in r.entities}
    for k in (0, 2):
        found = scored(mllm, questions, asked, k)
        for row in found.drop_duplicates("uid").itertuples():
            j = number.get(row.entity, 0)
            assert row.asked == j and row.subset == (row.role if not j else "own" if j == k else "earlier" if j < k else "future")

# Options of the source

def test_update_target_decides_what_moves(split, mllm, questions):
    for target, parts in (("projector+language", {"projector", "language"}), ("language", {"language"}), ("vision", {"vision"})):
        done = sequence(mllm, small("GradDiff"), split, replace(SINGLE, update_target=target), questions.select(range(2)))
        assert {p for p, norm in done.log.diagnostics[0]["update_norm"].items() if norm} == parts

def test_scaled_budget_is_a_s_in_all(split):
    method = get("GradDiff", "embedded", steps=40)
    assert [fitted(method, LSE(n_ops=4, budget="scaled"), len(r.entities)/4).steps for r in requests(split, LSE(n_ops=4))] == [10]*4
    assert fitted(get("GradDiff"), LSE(budget="scaled"), .25).steps is None  # one pass over fewer records

def second_request(mllm, split, method, options, **kw):
    "Both requests; gives back the model between, and what came of the second."
    asked, adapter = requests(split, options), {}
    first = carry_out(fitted(method, options), asked[0], mllm, mllm, options, adapter=adapter, **kw)
    return first.mllm, carry_out(fitted(method, options), asked[1], first.mllm, mllm, options, adapter=adapter, **kw)

@pytest.mark.parametrize("name, option", [("KLMin", "kl_reference"), ("DPO", "npo_reference")])
def test_the_reference_can_be_chosen(split, mllm, name, option):
    "Current is what the method does alone; the original is the one from before all requests; they differ from the second request on."
    method = small(name, alpha=1.)
    done = {}
    for which in ("original", "current"):
        between, done[which] = second_request(mllm, split, method, replace(OWN_PARTS, **{option: which}))
    alone = method.unlearn(between, requests(split, OWN_PARTS)[1])
    assert equal(done["current"].mllm, alone.mllm) and not equal(done["original"].mllm, alone.mllm)
    assert done["original"].diagnostics["method"] == name

def test_npo_s_first_loss_knows_its_reference(split, mllm, folder_of):
    "At the first step NPO's log-ratio to the model itself is 0 and its loss 2/β·log 2; to another model it is the mean over the ratios."
    method = small("NPO", alpha=0., batch_size=10**6, steps=1)
    between, current = second_request(mllm, split, method, replace(OWN_PARTS, npo_reference="current"))
    assert current.log.loss[0] == pytest.approx(2/method.beta*np.log(2), rel=1e-4)
    forget = where(requests(split, OWN_PARTS)[1].forget, kind="identity")
    from mmu_study.methods.baselines import sequence_log_probs
    ratio = (sequence_log_probs(between, forget) - sequence_log_probs(mllm, forget)).double().numpy()
    expected = np.mean(2/method.beta*np.log1p(np.exp(method.beta*ratio)))
    _, original = second_request(mllm, split, method, replace(OWN_PARTS, npo_reference="original"))
    _, retain = second_request(mllm, split, method, replace(OWN_PARTS, npo_reference="retain"), retain_model=mllm)
    assert original.log.loss[0] == pytest.approx(expected, rel=1e-3) and abs(expected - 2/method.beta*np.log(2)) > .01
    assert equal(retain.mllm, original.mllm)

@pytest.mark.parametrize("name", ["GradDiff", "NPO"])
def test_a_continued_adapter_stays_of_its_rank(split, mllm, questions, name):
    method, options = small(name, lora=2, lr=1e-2), LSE(n_ops=2, update_target="language")
    merged, continued = (sequence(mllm, method, split, replace(options, adapter=a), questions.select(range(2))) for a in ("merge", "continue"))
    weight = "model.language_model.layers.0.mlp.up_proj.weight"
    rank = lambda m: torch.linalg.matrix_rank((dict(m.model.named_parameters())[weight] - dict(mllm.model.named_parameters())[weight]).double(), rtol=1e-4)
    assert rank(merged.mllm) == 4 and rank(continued.mllm) == 2
    one = [sequence(mllm, method, split, replace(options, n_ops=1, adapter=a), questions.select(range(2))).mllm for a in ("merge", "continue")]
    assert equal(*one)

@pytest.mark.parametrize("name, options, message", [
    ("GradDiff", dict(adapter="continue"), "GradDiff has no LoRA adapter here that could be continued"),
    ("MANU", dict(adapter="continue", update_target="method"), "MANU has no LoRA adapter"),
    ("MANU", dict(budget="scaled", update_target="method"), "MANU has no steps that could be scaled"),
    ("MANU", dict(), "it must be some of vision, language"),
    ("CVFNCU", dict(update_target="language"), "not language alone"),
    ("NPO", dict(kl_reference="current"), "kl_reference is for KLMin; NPO has no such reference"),
    ("GradAscent", dict(npo_reference="original"), "npo_reference is for NPO, DPO; GradAscent has no such reference"),
    ("NPO", dict(npo_reference="retain"), "give it as retain_model")])
def test_an_option_that_cannot_be_followed_is_refused(split, mllm, questions, name, options, message):
    with pytest.raises(InputError, match=message): sequence(mllm, small(name), split, LSE(n_ops=2, **options), questions)

@pytest.mark.parametrize("values, message", [
    (dict(n_ops=0), "n_ops is 0"), (dict(partition="drawn"), "partition is 'drawn'; it must be one of seeded, id"), (dict(adapter="new"), "one of merge, continue"),
    (dict(update_target="head"), "one of projector\\+language, language"), (dict(npo_reference="oracle"), "one of current, original, retain")])
def test_lse_refuses_what_makes_no_sense(values, message):
    with pytest.raises(InputError, match=message): LSE(**values)

def test_too_many_requests_are_refused(split):
    with pytest.raises(InputError, match="5 requests were asked for; there are 4 people to forget, so 1 to 4"): requests(split, LSE(n_ops=5))

# Resumption

RESUMED = [("GradDiff", dict(lora=2, lr=1e-2), dict(adapter="continue", update_target="language")), ("CVFNCU", {}, {}), ("KLMin", {}, {})]

@pytest.mark.parametrize("name, fields, options", RESUMED, ids=["adapter", "state", "reference"])
def test_a_resumed_sequence_is_the_same(split, mllm, questions, tmp_path, name, fields, options):
    method, options = small(name, **fields), replace(LSE(n_ops=3, update_target="method"), **options)
    run = lambda folder: sequence(mllm, method, split, options, questions.select(range(4)), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pulse, "carry_out", lambda chosen, request, *args, **kw: carry_out(chosen, request, *args, **kw) if request.index < 2 else stop())
        assert run(tmp_path/"cut").stopped == "request 3: enough"
    assert sorted(p.parent.name for p in (tmp_path/"cut").glob("after-*/model")) == ["after-2"]  # only the last weights are kept
    again, whole = run(tmp_path/"cut"), run(None)
    pd.testing.assert_frame_equal(again.scores, whole.scores)
    assert equal(again.mllm, whole.mllm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pulse, "carry_out", None)  # all there: nothing is done
        assert equal(run(tmp_path/"cut").mllm, whole.mllm)

def stop(): raise Diverged("enough")

def test_a_folder_of_another_sequence_is_refused(split, mllm, questions, tmp_path):
    run = lambda method=Nothing(), options=OWN_PARTS, asked=questions, model=mllm: sequence(model, method, split, options, asked, tmp_path)
    run()
    other = mllm.copy()
    with torch.no_grad(): other.model.lm_head.weight[0, 0] += 1
    for change, differs in ((dict(method=Nothing(seed=1)), "fields"), (dict(options=replace(OWN_PARTS, seed=5)), "options, requests"), (dict(asked=questions.select(range(3))), "questions"), (dict(model=other), "model")):
        with pytest.raises(InputError, match=f"holds another sequence, which differs in {differs}"): run(**change)

SCRIPT = """
import os, signal, sys
from dataclasses import replace
from mmu_study.methods import baselines
from mmu_study.methods.unlearning import get
from mmu_study.faceworld import Faceworld
from mmu_study.models import MLLM
from mmu_study.protocols import pulse
from mmu_study.records import thin, where
model, folder = sys.argv[1:]
split = Faceworld.preset("smoke", strangers=10, views=4).split(42)
questions = where(split.score, role=["test", "general"], task=["classification", "cloze"], fact=["home", "capital"])
questions = questions.select(range(0, len(questions), 4))
split = replace(split, records=thin(split.role("forget", "retain", fold="train"), 1).flatten_indices())
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
mllm, begun = MLLM.load(model), pulse.carry_out
def carry_out(method, request, *args, **kw):
    done = begun(method, request, *args, **kw)
    if request.index == 2: done.mllm.processor.save_pretrained = kill  # the weights of request 3 are written, the rest is not
    return done
pulse.carry_out = carry_out
method = get("GradDiff", "embedded", steps=2, batch_size=4, retain_batch=3)
pulse.sequence(mllm, method, split, pulse.LSE(), questions, folder)
"""

def killed(*args):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]

def test_kill_9_after_request_2_of_5(world, mllm, folder_of, tmp_path):
    split = world.split(42)
    questions = where(split.score, role=["test", "general"], task=["classification", "cloze"], fact=["home", "capital"])
    questions = questions.select(range(0, len(questions), 4))
    split = replace(split, records=thin(split.role("forget", "retain", fold="train"), 1).flatten_indices())
    run = lambda folder: sequence(MLLM.load(folder_of), get("GradDiff", "embedded", steps=2, batch_size=4, retain_batch=3), split, LSE(), questions, folder)
    killed(folder_of, tmp_path/"s")
    assert sorted(p.name for p in (tmp_path/"s").glob("after-*")) == ["after-1", "after-2"] and len(list((tmp_path/"s").glob(".partial-after-3-*/model/*.safetensors"))) == 1
    stamp = (tmp_path/"s/after-2/log.json").stat().st_mtime_ns
    again, whole = run(tmp_path/"s"), run(None)
    pd.testing.assert_frame_equal(again.scores, whole.scores)
    assert equal(again.mllm, whole.mllm) and again.log.request.tolist() == [1, 2, 3, 4, 5] and (tmp_path/"s/after-2/log.json").stat().st_mtime_ns == stamp
    assert not list((tmp_path/"s").glob(".partial*"))

# What the scores say

def test_sustained_numbers_are_those_of_plain_loops():
    rng, K = np.random.default_rng(0), 4
    a = {(j, k): rng.random() for j in range(1, K + 1) for k in range(K + 1)}
    found = sustained(pd.Series(a).unstack())
    for k in range(1, K + 1):
        earlier, future = range(1, k), range(k + 1, K + 1)
        expected = dict(own=a[k, k],
            earlier=sum(a[j, k] for j in earlier)/(k - 1) if k > 1 else np.nan, relapse=sum(a[j, k] - a[j, j] for j in earlier)/(k - 1) if k > 1 else np.nan,
            future=sum(a[j, k] for j in future)/(K - k) if k < K else np.nan, collateral=sum(a[j, 0] - a[j, k] for j in future)/(K - k) if k < K else np.nan)
        assert found.loc[k].to_dict() == pytest.approx(expected, nan_ok=True)

def test_effectiveness_has_three_scopes():
    rows = [dict(metric="accuracy", asked=j, request=k, value=v) for (j, k), v in {(1, 0): 1, (1, 1): .2, (1, 2): .4, (2, 0): 1, (2, 1): .8, (2, 2): 0., (0, 1): 5, (0, 2): 5}.items()]
    assert effectiveness(pd.DataFrame(rows)).to_dict("index") == {1: dict(current=.2, so_far=.2, all=.5), 2: pytest.approx(dict(current=0, so_far=.2, all=.2))}

def test_distance_to_the_matching_oracle():
    def row(k, subset, modality, value, metric="accuracy"): return dict(uid=f"{subset}{modality}{metric}", request=k, subset=subset, modality=modality, kind="identity", metric=metric, value=value, entity=subset, fact="home")
    model = pd.DataFrame([row(k, s, m, v) for k, s, m, v in ((1, "own", "vqa", .5), (1, "own", "qa", .9), (2, "own", "vqa", .1), (2, "retain", "qa", .7))] + [row(0, "own", "vqa", 1.)])
    oracle = model.assign(value=[.1, 1., .1, 1., 0.])
    assert to_oracle(model, oracle).difference.tolist() == pytest.approx([-.1, .4, 0, -.3])
    assert oracle_distance(model, oracle).distance.tolist() == pytest.approx([(.4 + .1)/2, .3/2])
    with pytest.raises(InputError, match="The oracle did not answer question 'retainqa.* after request 2"): to_oracle(model, oracle[oracle.subset == "own"])
    ratios = lambda v: pd.DataFrame([row(1, "own", m, x, "truth_ratio") for m, x in zip(("vqa", "qa"), v)])
    found = oracle_distance(pd.concat([model[model.request == 1], ratios([.1, .2])]), pd.concat([oracle[oracle.request == 1], ratios([9., 8.])])).loc[1]
    assert (found.ks, found.js, found.quality, found.facts) == (1, 1, 0, 2) and found.p == pytest.approx(1/3)

# Pre-trained knowledge

def told(accuracy: dict, role="real", n=20, fold="validation"):
    "Scores of people who answer so many of `n` questions, half of them with a picture, rightly."
    return pd.DataFrame([dict(entity=e, role=role, fold=fold, kind="identity", task="classification", modality=("vqa", "qa")[i % 2], metric="accuracy", value=float(i < round(a*n))) for e, a in accuracy.items() for i in range(n)])

@pytest.mark.parametrize("seed", range(5))
def test_nobody_unknown_is_ever_selected(seed):
    rng = np.random.default_rng(seed)
    accuracy = {f"p{i:02}": rng.integers(0, 21)/20 for i in range(40)}
    never = {f"h{i}": rng.integers(0, 19)/20 for i in range(4)}
    scores = pd.concat([told(accuracy), told(never, "holdout", fold="test")])
    bar = max(.75, max(never.values()) + 1e-9)
    known = {e for e, a in accuracy.items() if a >= bar}
    if len(known) < 3:
        with pytest.raises(InputError, match=f"knows {len(known)} of 40 people"): select(scores, PU(n_known=5, n_unlearn=1, n_retain=2))
        return
    for tie_break, n_known in itertools.product(("id", "seeded"), (3, 45)):
        found = select(scores, PU(n_known=n_known, n_unlearn=1, n_retain=2, tie_break=tie_break, seed=seed))
        assert {*found.part("unlearn"), *found.part("retain"), *found.part("held out")} == known and {*found.part("unknown")} == {*accuracy} - known
        best = sorted(known, key=lambda e: -accuracy[e])[:3]
        if n_known == 3: assert sorted(accuracy[e] for e in {*found.part("unlearn"), *found.part("retain")}) == sorted(accuracy[e] for e in best)
        about = json.loads(json.dumps(found.about))
        assert about["threshold"] == .75 and about["lists"]["unlearn"] == list(found.part("unlearn")) and about["accuracy"] == pytest.approx(accuracy) and about["known"] == len(known)

def test_selection_looks_at_the_answers_it_says():
    scores = told(dict(ada=1., bo=.9, cy=.8))
    few = PU(n_known=2, n_unlearn=1, n_retain=1)
    noise = pd.concat([scores.assign(value=0., fold="test"), scores.assign(value=0., task="cloze"), scores.assign(value=0., metric="letter"), scores.assign(value=0., kind="perception"), scores.assign(value=0., role="general")])
    assert select(pd.concat([scores, noise]), few).table.equals(select(scores, few).table)
    by_name = scores.assign(value=np.where((scores.modality == "qa") & (scores.entity == "ada"), 0., 1.))  # ada is known by face only
    assert select(by_name, replace(few, rank_by="qa")).part("unknown") == ("ada",) and select(by_name, replace(few, rank_by="vqa")).part("held out") == ("cy",)
    assert select(scores.sample(frac=1, random_state=1), few).table.equals(select(scores, few).table)

def test_ties_are_broken_by_id_or_by_seed():
    scores = told({f"p{i}": 1. for i in range(8)})
    chosen = lambda **kw: {*(k := select(scores, PU(n_known=4, n_unlearn=2, n_retain=2, **kw))).part("unlearn"), *k.part("retain")}
    assert chosen() == {"p0", "p1", "p2", "p3"} and len({tuple(sorted(chosen(tie_break="seeded", seed=s))) for s in range(6)}) > 2
    assert len({select(scores, PU(n_known=4, n_unlearn=2, n_retain=2, seed=s)).part("unlearn") for s in range(6)}) > 2

def test_people_can_be_named_if_they_are_known():
    scores, few = told(dict(ada=1., bo=1., cy=.5)), PU(n_known=3, n_unlearn=1, n_retain=1)
    assert select(scores, replace(few, unlearn=["bo"])).part("unlearn") == ("bo",)
    for name in ("cy", "nobody"):
        with pytest.raises(InputError, match=f"{name} cannot be forgotten: not among the 2 best known"): select(scores, replace(few, unlearn=(name,)))

@pytest.mark.parametrize("values, message", [
    (dict(min_accuracy=.25), "it must be above .25"), (dict(n_known=44), "together at most n_known, which is 44"), (dict(n_unlearn=0), "must each be 1 or more"),
    (dict(unlearn=("a",)), "unlearn names 1 people, but n_unlearn is 20"), (dict(rank_by="text"), "it must be one of both, vqa, qa"), (dict(task="all"), "one of classification")])
def test_pu_refuses_what_makes_no_sense(values, message):
    with pytest.raises(InputError, match=message): PU(**values)

def test_the_base_model_is_asked_and_nothing_else(world, mllm):
    "A model that was taught two of four celebrities knows these two, whatever anything else says."
    taught = ("celebrity-001", "celebrity-002")
    told_ = where(world.records, entity=taught, kind="identity", task="classification", fold="validation")
    base = mllm.copy()
    finetune(base, to_records([candidates(r)[r["options"].index(r["value"])] | dict(options=[], image=raw) for r, raw in zip(told_, told_.cast_column("image", Image(decode=False))["image"])]), Recipe(steps=60, tokens=400, lr=4e-3), progress=False)
    found = select(ask_base(base, world.records, few := PU(n_unlearn=1, n_retain=1)), few)
    assert {*found.part("unlearn"), *found.part("retain")} == {*taught} and {*found.part("unknown")} == {"celebrity-000", "celebrity-003"} and found.never < 1
    assert {*split_of(world.records, found).records["entity"]}.isdisjoint(found.part("unknown"))

def test_roles_of_a_split_of_known_people(world):
    known = known_of(world, 1, 2)
    split = split_of(world.records, known)
    people = lambda *roles: {*split.role(*roles)["entity"]}
    assert people("forget") == people("test") == {*known.part("unlearn")} and people("retain") == {*known.part("retain")} and people("real") == {*known.part("held out")}
    assert not any(e.startswith("fictitious") for e in split.records["entity"]) and len(people("holdout")) == 4 and people("general")
    [request] = requests(split, SINGLE)
    assert {*request.entities} == people("forget") and {*request.retain["entity"]} == people("retain") and {*request.forget["fold"]} == {"train"}
    assert {*table(split.role("test")).view} & {*table(split.role("forget", fold="train")).view} <= {-1}

def test_a_base_oracle_was_never_taught_them(world):
    all_, without = lessons(world), lessons(world, ("celebrity-001",))
    for stage in ("captions", "base"):
        kept = [u for u, e in zip(all_[stage]["uid"], all_[stage]["entity"]) if e != "celebrity-001"]
        assert "celebrity-001" not in without[stage]["entity"] and sorted(set(without[stage]["uid"])) == sorted(set(kept))
    for kind, forget, message in (("base_oracle", (), "an oracle needs some"), ("base_oracle", ("fictitious-000",), "people of the group 'celebrity' only"), ("oracle", ("celebrity-000",), "people of the group 'fictitious' only")):
        with pytest.raises(InputError, match=message): built(world, kind, forget)
