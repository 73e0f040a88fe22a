"Metrics and claims against hand-made tables and plain loops."
import itertools, math

import numpy as np
import pandas as pd
import pytest

from mmu_study.batches import ask, encode, answer_log_probs
from mmu_study.claims import Claim, judge, verdict, verdicts
from mmu_study.evaluation import candidates, scoring_mode
from mmu_study.faceworld import Faceworld
from mmu_study.metrics import AGGREGATES, aligned, forget_quality, harmonic_mean, js_distance, ks_test, truth_ratio, truth_ratios, utility
from mmu_study.models import TinyLlava, tiny_llava
from mmu_study.records import table, thin, where
from mmu_study.settings import InputError

def score(entity="ada", fact="home", modality="vqa", metric="accuracy", value=1., role="retain", task="classification", kind="identity", **more):
    row = dict(uid=f"{entity}/{fact}/{modality}/{task}/{more.get('view', 0)}", entity=entity, role=role, fold="test", modality=modality, task=task, fact=fact, kind=kind, view=0, metric=metric, value=float(value), prediction="")
    return row | more

# Truth ratio

def test_truth_ratio_averages_wrong_losses_or_probabilities():
    log_probs, right = np.log([[.5, .2, .05, .1], [.1, .1, .6, .3]]), [0, 3]
    for row, r, ratio, clear in zip(log_probs, right, truth_ratio(log_probs, right), truth_ratio(log_probs, right, "probability")):
        wrong = [x for i, x in enumerate(row) if i != r]
        assert ratio == pytest.approx(math.exp(sum(wrong)/3)/math.exp(row[r]))
        assert clear == pytest.approx(sum(map(math.exp, wrong))/3/math.exp(row[r]))

def test_truth_ratio_of_an_impossible_answer_is_a_number(): assert truth_ratio([-2000., -1.], 0) == pytest.approx(math.exp(700))

def test_aggregates():
    for R in (.2, 1., 5.):
        assert AGGREGATES["closer_to_1"](np.array([R]))[0] == pytest.approx(min(R, 1/R))
        assert AGGREGATES["true_better"](np.array([R]))[0] == pytest.approx(max(0, 1 - R))
        assert AGGREGATES["prob_mean"](np.array([R]))[0] == pytest.approx(1/(1 + R))

def test_truth_ratios_of_a_model_are_those_of_whole_texts():
    "Every option read on its own, one at a time, gives the same; questions without options are left out, the order of the records is kept."
    world = Faceworld.preset("smoke", strangers=10, views=4)
    asked = thin(where(world.records, entity=["fictitious-000", "fictitious-001"], fold="test", unseen=True), 1)
    mllm = tiny_llava(TinyLlava(vision_width=64, vision_layers=2, width=64, layers=2), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")])
    found = truth_ratios(mllm, asked, size=3)
    meta = table(asked)
    assert found.uid.tolist() == meta.uid[meta.task == "classification"].tolist() and {*found.metric} == {"truth_ratio"} and {*found.modality} == {"vqa", "qa"}
    for uid in found.uid.iloc[[0, 5, -1]]:
        record, means = dict(where(asked, uid=uid)[0]), []
        for candidate in candidates(record):
            with scoring_mode(mllm): log_probs, is_answer = answer_log_probs(mllm, encode(mllm, [candidate]))
            means.append(float(log_probs.sum()/is_answer.sum()))
        right = record["options"].index(record["value"])
        expected = math.exp(sum(m for i, m in enumerate(means) if i != right)/3 - means[right])
        assert found.value[found.uid == uid].item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(InputError, match="There is no classification question"): truth_ratios(mllm, where(asked, task="cloze"))

# Forget quality

def statistic(a, b):
    return max(abs(sum(v <= x for v in a)/len(a) - sum(v <= x for v in b)/len(b)) for x in [*a, *b])

@pytest.mark.parametrize("n, m, seed", [(3, 3, 0), (2, 5, 1), (4, 3, 2), (5, 5, 3)])
def test_ks_counts_all_orders(n, m, seed):
    "p is the share of all ways to deal the pooled values into samples of these sizes that are at least as far apart."
    values = np.random.default_rng(seed).permutation(n + m).astype(float)
    d, p = ks_test(values[:n], values[n:])
    assert d == pytest.approx(statistic(values[:n], values[n:]))
    dealt = [statistic(values[list(c)], np.delete(values, list(c))) for c in itertools.combinations(range(n + m), n)]
    assert p == pytest.approx(np.mean([x >= d - 1e-12 for x in dealt]))

def test_ks_of_equal_and_of_separate_samples():
    assert ks_test([1, 1, 2], [1, 1, 2]) == (0, 1)
    d, p = ks_test(range(60), range(100, 160))
    assert d == 1 and p == pytest.approx(2/math.comb(120, 60), rel=1e-6, abs=1e-12)
    with pytest.raises(InputError, match="none may be empty"): ks_test([], [1])

def test_js_distance_by_hand():
    a, b = [.1, .1, 3.], [.1, 3., 3., 40.]
    bins = lambda sample: [sum(int(20*(R/(1 + R))) == i for R in sample)/len(sample) for i in range(20)]
    p, q = bins(a), bins(b)
    kl = lambda p, m: sum(x*math.log2(x/y) for x, y in zip(p, m) if x)
    middle = [(x + y)/2 for x, y in zip(p, q)]
    assert js_distance(a, b) == pytest.approx(math.sqrt((kl(p, middle) + kl(q, middle))/2))
    assert js_distance(a, a) == 0 and js_distance([.1], [30.]) == 1 and js_distance(a, b) == js_distance(b, a)
    assert js_distance([math.exp(700)], [math.exp(700)]) == 0

def test_forget_quality_has_the_fact_as_unit():
    rng = np.random.default_rng(0)
    def model(shift): return pd.DataFrame([score(e, f, m, "truth_ratio", math.exp(v + shift), view=i) for (e, f, m), v in zip(itertools.product("abc", ("home", "pet"), ("vqa", "qa")), rng.normal(0, 1, 12)) for i in range(3)])
    oracle, far = model(0.), model(8.)
    assert forget_quality(oracle, oracle) == dict(ks=0, p=1, js=0, quality=1, facts=12)
    found = forget_quality(far, oracle)
    assert found["ks"] == 1 and found["p"] == pytest.approx(2/math.comb(24, 12)) and found["quality"] == pytest.approx(1 - found["js"])
    with pytest.raises(InputError, match="answered different questions"): forget_quality(far.iloc[1:], oracle)
    with pytest.raises(InputError, match="there are none among the scores"): forget_quality(far.assign(metric="accuracy"), oracle)

# Both modalities

@pytest.mark.parametrize("picture, name", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_fact_is_right_or_wrong_in_both(picture, name):
    found = aligned(pd.DataFrame([score(modality="vqa", value=picture), score(modality="qa", value=name)])).set_index("metric").value
    assert found["right_in_both"] == (picture and name) and found["wrong_in_both"] == (not picture and not name)

def test_aligned_keeps_models_facts_and_tasks_apart():
    rows = [dict(score("ada", f, m, value=v, task=t), method=k) for k, t, f, m, v in [
        ("x", "cloze", "home", "vqa", 1), ("x", "cloze", "home", "qa", 1), ("x", "cloze", "pet", "vqa", 0), ("x", "cloze", "pet", "qa", 0),
        ("x", "generation", "pet", "vqa", 1), ("y", "cloze", "home", "vqa", 1), ("y", "cloze", "home", "qa", 0), ("y", "cloze", "name", "vqa", 1)]]
    found = aligned(pd.DataFrame(rows), ("method",))
    assert found.groupby(["method", "metric"]).value.agg(["mean", "size"]).to_dict("index") == {
        ("x", "right_in_both"): dict(mean=.5, size=2), ("x", "wrong_in_both"): dict(mean=.5, size=2), ("y", "right_in_both"): dict(mean=0, size=1), ("y", "wrong_in_both"): dict(mean=0, size=1)}

def test_rouge_of_both():
    pairs = [(.2, .8), (1., 1.), (0., 0.), (0., .6)]
    rows = [score(f"p{i}", modality=m, metric="rouge_l", value=v, task="generation") for i, ab in enumerate(pairs) for m, v in zip(("vqa", "qa"), ab)]
    found = aligned(pd.DataFrame(rows)).pivot(index="entity", columns="metric", values="value")
    for (a, b), (_, row) in zip(pairs, found.iterrows()):
        assert row.rouge_harmonic == pytest.approx(2*a*b/(a + b) if a + b else 0)
        assert row.rouge_contraharmonic == pytest.approx((a*a + b*b)/(a + b) if a + b else 0)

# Utility

def test_harmonic_mean():
    assert harmonic_mean([.2, .5, 1.]) == pytest.approx(3/(5 + 2 + 1)) and harmonic_mean([0, 1]) == 0 and harmonic_mean([.3]*9) == pytest.approx(.3)
    for bad in ([], [-.1], [float("nan")]):
        with pytest.raises(InputError, match="one number or more"): harmonic_mean(bad)

def test_utility_is_the_harmonic_mean_of_nine_terms():
    terms = {role: (.5 + i/10, .6 + i/10, [.2 + i/10, 2.]) for i, role in enumerate(("retain", "real", "general"))}
    rows = []
    for role, (probability, rouge, ratios) in terms.items():
        rows += [score(role=role, task="generation", metric="probability", value=probability), score(role=role, task="generation", metric="rouge_l", value=rouge)]
        rows += [score(role=role, metric="truth_ratio", value=R) for R in ratios] + [score(role=role, metric="probability", value=.001), score(role="test", metric="truth_ratio", value=9)]
    total, found = utility(pd.DataFrame(rows))
    nine = [x for p, r, ratios in terms.values() for x in (p, r, sum(max(0, 1 - R) for R in ratios)/2)]
    assert found.to_numpy().ravel() == pytest.approx(nine) and total == pytest.approx(9/sum(1/x for x in nine))

# Claims

@pytest.mark.parametrize("bounds, expected", [((.1, .2), "supported"), ((-.2, -.1), "contradicted"), ((-.1, .1), "inconclusive"), ((0, .2), "inconclusive"), ((float("nan"),)*2, "inconclusive")])
def test_an_interval_decides(bounds, expected): assert verdict(*bounds) == expected

@pytest.mark.parametrize("parts, expected", [("ss", "supported"), ("si", "inconclusive"), ("sc", "contradicted"), ("ic", "contradicted"), ("ii", "inconclusive")])
def test_parts_of_a_claim_are_taken_together(parts, expected):
    bounds = dict(s=(.1, .2), c=(-.2, -.1), i=(-.1, .1))
    rows = [pd.DataFrame([dict(method=m, difference=0., low=bounds[p][0], high=bounds[p][1], facts=3, low_people=-1., high_people=1., people=2) for m in ("x", "y")]) for p in parts]
    found = judge(Claim("F9", "none", "It holds.", ("a − b", "c − d")), rows)
    assert verdicts(found).verdict.tolist() == [expected] and verdicts(found, ("claim", "method")).verdict.tolist() == [expected]*2
    assert found.part.tolist() == ["a − b"]*2 + ["c − d"]*2
