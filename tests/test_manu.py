"MANU's statistics, formulas, selection and masks against plain loops and numbers by hand."
import itertools, json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmu_study.batches import answer_log_probs, ask, encode, rows
from mmu_study.faceworld import Faceworld
from mmu_study.methods.manu import (MANU, POOLS, READS, PruneMask, Site, aliased_scores, encoded, five_sums, importance, live, magnitudes, observations,
    paper_score, pruned_by, reading, released_score, select, sites, statistics, tally, taylor, weight_norms)
from mmu_study.methods.unlearning import get
from mmu_study.models import TinyLlava, TinyQwen2VL, tiny_llava, tiny_qwen2_vl
from mmu_study.records import ForgetRequest, thin, where
from mmu_study.settings import InputError
from mmu_study.training import Diverged

@pytest.fixture(scope="module")
def world(): return Faceworld.preset("smoke", strangers=10, views=4)

@pytest.fixture(scope="module")
def request_(world):
    whole = world.split(17).requests()[0]
    return ForgetRequest(thin(whole.forget, 1), thin(where(whole.retain, entity=sorted({*whole.retain["entity"]})[:4]), 1))

def made(world, make, size): return make(size, [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")])

@pytest.fixture(scope="module")
def mllm(world):
    "Never trained; biases are random, so that pruning them shows."
    found = made(world, tiny_llava, TinyLlava(vision_width=32, vision_layers=4, width=32, layers=3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in found.model.named_parameters():
            if n.endswith("bias"): p.copy_(torch.randn(p.shape, generator=generator)*.1)
            if "mlp" in n and n.endswith("weight"): p.mul_(8)  # untrained units hardly ever pass τ
    return found

@pytest.fixture(scope="module")
def qwen(world): return made(world, tiny_qwen2_vl, TinyQwen2VL())

def bits(mllm): return {n: p.detach().clone().view(torch.uint8) for n, p in mllm.model.named_parameters()}
def changed(before, mllm): return {n for n, b in bits(mllm).items() if not torch.equal(b, before[n])}
def logits(mllm, batch):
    with torch.no_grad(): return mllm.model(**{k: v for k, v in batch.items() if k != "labels"}).logits

# Where neurons are

def test_sites_are_found_by_structure(mllm):
    assert [(s.part, s.layer, s.width) for s in sites(mllm)] == [("vision", i, 128) for i in range(4)] + [("language", i, 85) for i in range(3)]
    rows_ = [(s.part, s.layer, s.name.rpartition(".")[2], s.width) for s in sites(mllm, "rows")]
    assert rows_ == [("vision", i, n, w) for i in range(4) for n, w in (("fc1", 128), ("fc2", 32))] + [("language", i, n, w) for i in range(3) for n, w in (("gate_proj", 85), ("up_proj", 85), ("down_proj", 32))]
    assert {s.part for s in sites(mllm, parts=("language",))} == {"language"}

def test_a_part_without_mlps_is_refused(mllm):
    with pytest.raises(InputError, match="^No MLP of linear layers .* was found in projector.$"): sites(mllm, parts=("projector",))

@pytest.mark.parametrize("unit", ["hidden", "rows"])
def test_dead_layers_are_no_candidates(mllm, request_, unit):
    everywhere = sites(mllm, unit)
    dead = [s for s in everywhere if s not in live(mllm, everywhere)]
    assert {(s.part, s.layer) for s in dead} == {("vision", 3)}  # LLaVA reads the tower's output before its last block
    batch, before = encode(mllm, rows(where(request_.forget, modality="vqa"), range(4))), bits(mllm)
    for layer, same in ((3, True), (2, False)):
        other = mllm.copy()
        PruneMask(unit, {s.name: np.arange(s.width) for s in everywhere if (s.part, s.layer) == ("vision", layer)}).apply(other)
        assert torch.equal(logits(other, batch), logits(mllm, batch)) == same
    assert changed(before, mllm) == set()

def test_logits_that_are_not_finite_are_noticed(mllm):
    sick = mllm.copy()
    with torch.no_grad(): sick.model.lm_head.weight[0] = float("nan")
    with pytest.raises(Diverged, match="^MANU: the model's logits are nan.$"): live(sick, sites(sick))

# Statistics

def plain_sums(values, tau): return [len(values), sum(values), sum(map(abs, values)), sum(v*v for v in values), sum(abs(v) > tau for v in values)]

def pooled(tokens, pool):
    if pool == "token": return list(tokens)
    return [dict(mean=sum(tokens)/len(tokens), last=tokens[-1], max=max(tokens))[pool]]

@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sums_see_no_padding(pool, side):
    generator = torch.Generator().manual_seed(0)
    z, lengths = torch.randn(6, 7, 3, generator=generator), [7, 1, 4, 2, 7, 5]
    valid = torch.tensor([[(t < n) if side == "right" else t >= 7 - n for t in range(7)] for n in lengths])
    z[~valid] = 1e4
    expected = [plain_sums([v for b in range(6) for v in pooled([float(z[b, t, h]) for t in range(7) if valid[b, t]], pool)], .5) for h in range(3)]
    np.testing.assert_allclose(five_sums(*observations(z, valid, pool), .5).T, expected, rtol=1e-5)

def test_sums_are_the_same_bits_for_any_batches_and_order():
    "On numbers whose sums fp64 holds exactly."
    generator = torch.Generator().manual_seed(0)
    z, lengths = torch.randint(-64, 64, (37, 8, 5), generator=generator)/16, torch.randint(0, 4, (37,), generator=generator)
    valid = torch.arange(8) >= 8 - 2**lengths[:, None]  # of 1, 2, 4 or 8 tokens, so that means are exact too
    for pool in POOLS:
        whole = five_sums(*observations(z, valid, pool), .3)
        for size, seed in itertools.product((1, 5, 32), (0, 1)):
            order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(sum(five_sums(*observations(z[i], valid[i], pool), .3) for i in order.split(size)), whole)

def read_one_by_one(mllm, records, site, tau, pool):
    "Sums of a site's neurons, a record at a time without padding, in plain numpy."
    seen, values = [], []
    module = mllm.model.get_submodule(site.linear)
    hook = (module.register_forward_hook(lambda m, x, y: seen.append(y)) if site.name == site.linear else module.register_forward_pre_hook(lambda m, x: seen.append(x[0])))
    for i in range(len(records)):
        logits(mllm, encode(mllm, rows(records, [i])))
        z = seen.pop().numpy().reshape(-1, site.width)
        values += [z] if pool == "token" else [dict(mean=z.mean(0), last=z[-1], max=z.max(0))[pool][None]]
    hook.remove()
    z = np.concatenate(values).astype(np.float64)
    return np.stack([np.full(site.width, len(z)), z.sum(0), np.abs(z).sum(0), (z**2).sum(0), (np.abs(z) > tau).sum(0)])

@pytest.mark.parametrize("unit, pool", [("hidden", "mean"), ("hidden", "last"), ("rows", "max"), ("rows", "token")])
def test_statistics_are_those_of_single_records(mllm, request_, unit, pool):
    records, where_ = request_.forget.select(range(0, len(request_.forget), 4)), [s for s in sites(mllm, unit) if s.layer == 1]
    expected = {(m, s): read_one_by_one(mllm, where(records, modality=m), s, .1, pool) for s in where_ for m in READS["paper"][s.part]}
    for size, shuffled in ((1, records), (5, records.shuffle(seed=1)), (32, records.shuffle(seed=2))):
        found = statistics(mllm, shuffled, where_, size=size, pool=pool)
        assert {(m, s) for m in found for s in found[m]} == set(expected)
        for (m, s), sums in expected.items():
            np.testing.assert_allclose(found[m][s][:4], sums[:4], rtol=2e-4, atol=2e-4)
            assert np.abs(found[m][s][4].numpy() - sums[4]).max() <= max(1, .002*sums[0, 0])  # a value on the edge of τ may fall either way

def test_pictures_in_one_row_of_tokens_are_told_apart(qwen, request_):
    "Qwen2-VL's tower has no batch dimension."
    records, where_ = where(request_.forget, modality="vqa").select(range(5)), sites(qwen, parts=("vision",))
    for pool in ("mean", "max", "token"):
        one, many = (tally(qwen, encoded(qwen, records, n), where_, pool=pool) for n in (1, 5))
        for s in where_:
            assert many[s][0, 0] == (5*16 if pool == "token" else 5)
            torch.testing.assert_close(one[s][:4], many[s][:4], rtol=1e-4, atol=1e-4)

def test_clamping_comes_before_the_sums(mllm, request_):
    site, batches = sites(mllm)[0], list(encoded(mllm, where(request_.forget, modality="vqa"), 8))
    free, cut = (tally(mllm, batches, [site], pool="token", clamp=c)[site] for c in (None, .05))
    assert free[4].sum() > 0 and cut[4].sum() == 0 and (cut[2] <= .05*cut[0] + 1e-6).all()

def test_no_sites_is_a_bare_forward_pass(mllm, request_): assert tally(mllm, encoded(mllm, request_.forget.select(range(2))), []) == {}

# Formulas

def plain_importance(multi, text, eps, counts=False, transcribed=False):
    "One neuron, the formulas written out."
    mean = lambda values: sum(values)/len(values) if values else 0.
    size, fired, square, var = [], [], [], []
    for zs in (multi, text):
        size.append(mean([abs(z) for z in zs]))
        fired.append(sum(abs(z) > .1 for z in zs)/(1 if counts else max(1, len(zs))))
        square.append(sum(z*z for z in zs)/(1 if counts else max(1, len(zs))))
        center = mean([abs(z) for z in zs]) if transcribed else mean(zs)
        var.append(mean([(z - center)**2 for z in zs]))
    gap = lambda v: abs(v[0] - v[1])/(v[0] + v[1] + eps)
    return [gap(size), gap(fired), sum(var)**.5, gap(square)**.5]

def sums_of(neurons): return torch.tensor([plain_sums(zs, .1) for zs in neurons], dtype=torch.float64).T if neurons[0] else torch.zeros(5, len(neurons), dtype=torch.float64)

@pytest.mark.parametrize("flags", [{}, dict(counts=True), dict(transcribed=True)], ids=str)
def test_importance_is_the_formulas(flags):
    rng = np.random.default_rng(0)
    multi, text = ([list(rng.normal(m, s, n)) for m, s in ((0, 1), (.5, .1), (-3, 2), (0, .05))] for n in (9, 5))
    for other in (text, [[]]*4):  # plain text never reaches a vision neuron
        found = importance(sums_of(multi), sums_of(other), 1e-5, **flags)
        np.testing.assert_allclose(found.T, [plain_importance(a, b, 1e-5, **flags) for a, b in zip(multi, other)], rtol=1e-6, atol=1e-9)

def test_importance_by_hand():
    "z = 2, 0 on pictures and 1, −1 on text: means of |z| 1 and 1, fires 1 of 2 and 2 of 2, variances 1 and 1, energies 2 and 1."
    found = importance(sums_of([[2., 0.]]), sums_of([[1., -1.]]), eps=0)[:, 0]
    assert found.tolist() == pytest.approx([0, .5/1.5, 2**.5, (1/3)**.5])
    assert importance(sums_of([[2., 0.]]), sums_of([[1., -1.]]), eps=0, transcribed=True)[2, 0] == pytest.approx((1 + 2)**.5)  # text around 1: (0² + 2²)/2
    assert magnitudes(sums_of([[2., 0.]]))[:, 0].tolist() == pytest.approx([1, .5, 1, 2**.5])

def test_a_silent_text_form_gives_no_nan():
    found = importance(sums_of([[2., -1.], [0., 0.]]), torch.zeros(5, 2, dtype=torch.float64))
    assert found.isfinite().all() and found[[0, 1, 3], 0].tolist() == pytest.approx([1, 1, 1], abs=1e-4) and found[:, 1].tolist() == [0, 0, 0, 0]

def test_one_observation_is_enough():
    assert importance(sums_of([[3.]]), sums_of([[-2.]])).isfinite().all() and magnitudes(sums_of([[3.]]))[:, 0].tolist() == pytest.approx([3, 1, 0, 3])

def test_scores_by_hand():
    forget, retain = (torch.tensor(v, dtype=torch.float64)[:, None] for v in ([.5, .2, 3., .3], [.25, .1, 1., .65]))
    assert paper_score(forget, retain, eps=0).item() == pytest.approx(4/2)
    assert paper_score(forget, retain, weights=(1, 0, 0, 1), eps=.1).item() == pytest.approx(.8/(.9 + .1))
    assert released_score(forget, retain, eps=0).item() == pytest.approx(2*(2 - 1) + 2*(3 - 1) + 2*(.3/.65 - 1))

def test_equal_data_give_equal_scores(mllm, request_):
    forget, where_ = where(request_.forget, kind="identity"), live(mllm, sites(mllm))
    for preset, score, expected in (("paper", paper_score, 1), ("released-fixed", released_score, 0)):
        method = get("MANU", preset, unit="hidden")
        sums = method.statistics(mllm, forget, where_)
        for s in where_:
            I = method.important(sums, s)
            assert (score(I, I, method.weights) - expected).abs().max() < .02 and (score(I, I, method.weights, 1e-12) - expected).abs().max() < 1e-6

def test_a_toy_of_two_layers():
    "From activations to pruned units: unit 1 of the first layer differs most between the forms on the forget side."
    sites_ = [Site(f"l{i}", "language", i, f"l{i}.down_proj", 2) for i in range(2)]
    z = dict(forget=([[[1., 1.], [1., 1.]], [[1., 1.], [1., 1.]]], [[[1., 1.], [.01, .01]], [[1., 1.], [.5, .5]]]),
        retain=([[[1., 1.], [1., 1.]], [[1., 1.], [1., 1.]]], [[[.5, .5], [.5, .5]], [[.5, .5], [.5, .5]]]))
    scores = {s: paper_score(*(importance(*(sums_of(form[i]) for form in z[who])) for who in ("forget", "retain"))) for i, s in enumerate(sites_)}
    # all constant, so no deviation. retain: 1/3 + 0 + sqrt(.6). forget: 0; .99/1.01 + 1 + sqrt(.9999/1.0001); 0; as retain
    r = 1/3 + .6**.5
    assert torch.cat([*scores.values()]).tolist() == pytest.approx([0, (.99/1.01 + 1 + (.9999/1.0001)**.5)/r, 0, 1], abs=1e-3)
    assert {s.layer: i.tolist() for s, i in select(scores, 50).items()} == {0: [1], 1: [1]}

# Selection

def scores_of(*values): return {Site(f"{part}{layer}", part, layer, f"{part}{layer}.x", len(v)): torch.tensor(v, dtype=torch.float64) for (part, layer), v in zip((("vision", 0), ("vision", 1), ("language", 0), ("language", 1)), values)}
def chosen(found): return {s.name: i.tolist() for s, i in found.items()}

def test_exactly_k_even_of_equal_scores():
    equal = scores_of([1.]*7, [1.]*6, [1.]*40, [1.]*60)
    for alpha in (7, 14, 29, 55, 57, 99.5, 100):
        for group, sizes in dict(part=(13, 100), all=(113,), layer=(7, 6, 40, 60)).items():
            if min(int(alpha*n/100) for n in sizes) == 0: continue
            found = select(equal, alpha, group)
            assert sum(map(len, found.values())) == sum(int(alpha*n/100 + 1e-9) for n in sizes), (alpha, group)
    assert len(select(scores_of([0.]), 100)) == 1

def test_ties_go_by_layer_then_index():
    scores = scores_of([1., 5., 5., 5.], [5., 9., 1., 1.])
    assert chosen(select(scores, 50)) == {"vision0": [1, 2, 3], "vision1": [1]}
    assert chosen(select(dict(reversed(scores.items())), 50)) == chosen(select(scores, 50))
    assert chosen(select(scores, 25, exact=False)) == {"vision0": [1, 2, 3], "vision1": [0, 1]}

def test_groups():
    scores = scores_of([1., 2.], [3., 4.], [5., 6.], [7., 8.])
    assert chosen(select(scores, 50)) == {"vision1": [0, 1], "language1": [0, 1]}
    assert chosen(select(scores, 50, "all")) == {"language0": [0, 1], "language1": [0, 1]}
    assert chosen(select(scores, 50, "layer")) == {"vision0": [1], "vision1": [1], "language0": [1], "language1": [1]}

def test_too_few_neurons_are_refused():
    with pytest.raises(InputError, match="^alpha 20 % of the 4 neurons in vision is none; it must be at least 25.$"): select(scores_of([1., 2.], [3., 4.]), 20)

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_stop(bad):
    with pytest.raises(Diverged, match="scores of vision1 are nan or infinite"): select(scores_of([1.], [bad]), 100)

# Masks

def some_mask(mllm, unit, **more): return PruneMask(unit, {s.name: np.arange(1, s.width, 3) for s in sites(mllm, unit)}, **more)

@pytest.mark.parametrize("unit", ["hidden", "rows"])
def test_pruned_units_are_silent_and_come_back(mllm, request_, unit, tmp_path):
    own, before, mask, where_ = mllm.copy(), bits(mllm), some_mask(mllm, unit), live(mllm, sites(mllm, unit))
    batch, seen = encode(mllm, rows(where(request_.forget, modality="vqa"), range(3))), {}
    mask.apply(own)
    with reading(own, where_, lambda s, z: seen.update({s: z})): logits(own, batch)
    for s in where_:
        cut = np.isin(np.arange(s.width), mask.units[s.name])
        assert seen[s][..., cut].count_nonzero() == 0 and (seen[s][..., ~cut] != 0).any()
    assert all("mlp" in n for n in changed(before, own)) and not torch.equal(logits(own, batch), logits(mllm, batch))
    if unit == "hidden":  # both sides of the unit: rows, biases and column
        parameters, name = dict(own.model.named_parameters()), "model.vision_tower.encoder.layers.1.mlp"
        for zeroed in (parameters[f"{name}.fc1.weight"][4], parameters[f"{name}.fc1.bias"][4], parameters[f"{name}.fc2.weight"][:, 4], parameters["model.language_model.layers.0.mlp.down_proj.weight"][:, 4]): assert not zeroed.any()
        assert parameters[f"{name}.fc2.bias"].all()
    again = PruneMask.load(mask.save(tmp_path/"mask.safetensors"))
    with pytest.raises(InputError, match="applied already"): mask.apply(own)
    again.undo(own)
    assert changed(before, own) == set() and again.removed == {}
    with pytest.raises(InputError, match="not applied"): again.undo(own)

def test_what_earlier_requests_pruned_is_no_candidate(mllm, request_):
    "In a long sequence a whole part may be gone; the others are still pruned, and a model without any live neuron is refused."
    def without(*parts):
        own = mllm.copy()
        gone = sites(own, "hidden", parts)
        PruneMask("hidden", {s.name: np.arange(s.width) for s in gone}).apply(own)
        return own
    done = MANU(alpha=20.).unlearn(without("vision"), request_)
    assert done.diagnostics["candidates"]["vision"] == 0 < done.diagnostics["candidates"]["language"] and not done.diagnostics["pruned"]["vision"] and done.diagnostics["pruned"]["language"]
    with pytest.raises(Diverged, match="^MANU: no neuron is left that the answer to a picture depends on.$"): MANU(alpha=20.).unlearn(without("vision", "language"), request_)

def test_undo_refuses_another_model(mllm):
    mask = some_mask(mllm, "hidden")
    mask.apply(mllm.copy())
    with pytest.raises(InputError, match="not the one that it pruned"): mask.undo(mllm.copy())

def test_a_unit_can_be_turned_down(mllm, request_):
    "Scaling a hidden unit by .9 is scaling what the next layer reads of it."
    mask, louder = some_mask(mllm, "hidden", keep=.9), mllm.copy()
    mask.apply(louder)
    batch = encode(mllm, rows(where(request_.forget, modality="vqa"), range(3)))
    hooked = mllm.copy()
    for s in sites(hooked):
        factor = torch.ones(s.width).index_fill(0, torch.as_tensor(mask.units[s.name]), .9)
        hooked.model.get_submodule(s.linear).register_forward_pre_hook(lambda m, x, f=factor: (x[0]*f,))
    torch.testing.assert_close(logits(louder, batch), logits(hooked, batch), rtol=1e-4, atol=1e-5)
    mask.undo(louder)
    assert changed(bits(mllm), louder) == set()

def test_a_mask_fits_its_model_only(mllm, tmp_path):
    for units, message in (({"model.nowhere.mlp": [0]}, "which this model does not have"), ({sites(mllm)[0].name: [500]}, "prunes neuron 500 of .* which has 128")):
        with pytest.raises(InputError, match=message): PruneMask("hidden", {n: np.array(i) for n, i in units.items()}).apply(mllm.copy())
    saved = mllm.save(tmp_path/"model")
    with pytest.raises(InputError, match="is no saved pruning mask"): PruneMask.load(saved/"model.safetensors")

def test_a_mask_says_where_it_prunes(mllm, tmp_path):
    mask = PruneMask("rows", {"model.language_model.layers.2.mlp.up_proj": np.array([1, 5])}, about=dict(alpha=2))
    again = PruneMask.load(mask.save(tmp_path/"m"))
    assert (again.unit, again.keep, again.about, len(again)) == ("rows", 0., dict(alpha=2), 2) and again.units["model.language_model.layers.2.mlp.up_proj"].tolist() == [1, 5]
    table = pruned_by(again, sites(mllm, "rows"))
    assert table[table.pruned > 0].to_dict("records") == [dict(part="language", layer=2, module="up_proj", pruned=2, width=85)]

# Controls

@pytest.mark.parametrize("unit", ["hidden", "rows"])
def test_taylor_is_the_slope_of_the_loss(mllm, request_, unit):
    "Against the loss with a unit's output a little up and down, record by record."
    double = mllm.copy()
    double.model.double()
    records, where_ = request_.forget.select([0, 7, len(request_.forget) - 1, len(request_.forget) - 5]), live(mllm, sites(mllm, unit))
    found, h = taylor(double, records, where_, size=3), .02  # losses are fp32: a smaller step drowns
    for s in (where_[0], where_[-1], where_[-2]):
        slopes = []
        for i in range(4):
            batch, losses = encode(double, rows(records, [i])), []
            for sign in (1, -1):
                factor = torch.ones(s.width, dtype=torch.float64); factor[3] += sign*h
                module = double.model.get_submodule(s.linear)
                hook = (module.register_forward_hook(lambda m, x, y: y*factor) if unit == "rows" else module.register_forward_pre_hook(lambda m, x: (x[0]*factor,)))
                with torch.no_grad(): log_probs, is_answer = answer_log_probs(double, batch)
                hook.remove(); losses.append(-(log_probs.double().sum()/is_answer.sum()).item())
            slopes.append(abs(losses[0] - losses[1])/2/h)
        assert found[s][3].item() == pytest.approx(sum(slopes)/4, rel=.05, abs=2e-5), s

def test_weight_norms_are_of_all_a_unit_has(mllm):
    hidden, rows_ = weight_norms(mllm, sites(mllm)), weight_norms(mllm, sites(mllm, "rows"))
    mlp = mllm.model.model.vision_tower.encoder.layers[2].mlp
    by_name = lambda norms, end: next(v for s, v in norms.items() if s.name.endswith(end) and "vision" in s.name)
    expected = sum(v**2 for v in (*mlp.fc1.weight[5].tolist(), mlp.fc1.bias[5].item(), *mlp.fc2.weight[:, 5].tolist()))**.5
    assert by_name(hidden, "layers.2.mlp")[5].item() == pytest.approx(expected, rel=1e-5)
    assert by_name(rows_, "layers.2.mlp.fc2")[5].item() == pytest.approx(sum(v**2 for v in (*mlp.fc2.weight[5].tolist(), mlp.fc2.bias[5].item()))**.5, rel=1e-5)

# The released code

def test_the_audit_prunes_the_same_rows_three_times(mllm, request_):
    mask = (method := get("MANU", "released")).mask(method.rank(mllm, request_)[0])
    assert {s.layer for s in sites(mllm, "rows") if s.part == "vision" and s.name in mask.units} == {1, 2, 3}  # the dead one too
    for kind in ("fc1", "gate_proj", "up_proj"):
        first, *others = [i.tolist() for n, i in mask.units.items() if n.endswith(kind)]
        assert others == [first, first], kind

def test_the_audit_s_statistics_on_one_batch(mllm, request_):
    "Per position over batch and layers, padding included, then over positions; the deviation is the unbiased one."
    forget, retain = (where(r, modality="qa", kind="identity").select(range(4)) for r in (request_.forget, request_.retain))
    found = aliased_scores(mllm, forget, retain, ("language",), seed=0)
    means = []
    for records in (forget, retain):
        texts = [f"{mllm.processor.apply_chat_template([dict(role='user', content=[dict(type='text', text=ask(r))]), dict(role='assistant', content=[dict(type='text', text=r['answer'])])])}" for r in rows(records, range(4))]
        seen = []
        hooks = [layer.mlp.up_proj.register_forward_hook(lambda m, x, y: seen.append(y)) for layer in mllm.model.model.language_model.layers]
        logits(mllm, mllm.processor(text=[t.rstrip() for t in texts], padding=True, padding_side="right", return_tensors="pt"))
        for h in hooks: h.remove()
        z = torch.cat(seen).numpy()  # [3·4, T, 85]
        means.append([np.abs(z).mean(0).mean(0), z.std(0, ddof=1).mean(0), np.sqrt((z**2).mean(0)).mean(0)])
    expected = sum(2*(f/(r + 1e-5) - 1) for f, r in zip(*means))
    names = [s for s in found if s.name.endswith("up_proj")]
    assert [s.layer for s in names] == [0, 1, 2]
    for s in names: np.testing.assert_allclose(found[s], expected, rtol=1e-3, atol=1e-4)

def test_an_audit_is_of_the_released_code():
    with pytest.raises(InputError, match="rank_by must be manu, unit rows and formulas released"): get("MANU", "released", unit="hidden")

# The method

def mask_of(mllm, request_, **fields):
    method = get("MANU", **{**dict(alpha=10), **fields})
    return method.mask(method.rank(mllm, request_)[0])

def same(a, b): return a.units.keys() == b.units.keys() and all(np.array_equal(i, b.units[n]) for n, i in a.units.items())

@pytest.mark.parametrize("preset", ["paper", "released-fixed"])
def test_the_mask_does_not_depend_on_batches(mllm, request_, preset):
    some = replace(request_, forget=request_.forget.select(range(0, len(request_.forget), 3)), retain=request_.retain.select(range(0, len(request_.retain), 5)))
    masks = [mask_of(mllm, r, **MANU.PRESETS[preset], batch_size=n) for n, r in ((1, some), (5, some), (32, replace(some, forget=some.forget.shuffle(seed=1))))]
    for other in masks[1:]:
        shared = sum(len({*i} & {*other.units.get(n, ())}) for n, i in masks[0].units.items())
        assert shared >= len(masks[0]) - 1  # two scores at the border may be equal but for rounding

def test_a_run_prunes_k_units_and_reports_them(mllm, request_):
    method = get("MANU", alpha=10)
    seen, done = [], None
    done = method.unlearn(mllm, request_, watch=lambda step, m: seen.append((step, bits(m))), watch_at=(0,))
    moved, report = changed(bits(mllm), done.mllm), json.loads(json.dumps(done.diagnostics))
    assert all(".mlp." in n and "layers.3" not in n.replace("language", "") for n in moved if "vision" in n) and not any("projector" in n for n in moved)
    assert report["candidates"] == dict(vision=3*128, language=3*85) and {p: sum(n.values()) for p, n in report["pruned"].items()} == dict(vision=38, language=25)
    assert [s for s, _ in seen] == [0, 1] and changed(seen[0][1], mllm) == set() and changed(seen[1][1], done.mllm) == set()
    assert done.log.to_dict("records") == [dict(step=1, pruned=63, candidates=639)]
    assert 0 < report["variance_share"]["vision"] < 1 and "vision neurons have no text statistics" in report["note"]
    scores, _ = method.rank(mllm, request_)
    for s, index in select(scores, 10).items(): assert not dict(done.mllm.model.named_parameters())[f"{s.linear}.weight"][:, index].any()

def test_controls_are_of_equal_size_and_see_what_they_say(mllm, request_):
    sizes = {rank_by: len(mask_of(mllm, request_, rank_by=rank_by)) for rank_by in ("manu", "random", "magnitude", "taylor")}
    assert set(sizes.values()) == {63}
    swapped = replace(request_, forget=request_.forget.select(range(30)), retain=request_.retain.select(range(30)))
    for rank_by in ("random", "magnitude"):
        assert not any(get("MANU", alpha=10, rank_by=rank_by).sees.values()) and same(mask_of(mllm, request_, rank_by=rank_by), mask_of(mllm, swapped, rank_by=rank_by))
    assert not same(mask_of(mllm, request_, rank_by="random"), mask_of(mllm, request_, rank_by="random", seed=1))
    assert get("MANU", alpha=10, rank_by="random").label != get("MANU", alpha=10).label == "MANU"

def test_the_last_layers_only(mllm, request_):
    mask = mask_of(mllm, request_, layers=1)
    assert [(s.part, s.layer) for s in sites(mllm) if s.name in mask.units] == [("vision", 2), ("language", 2)]  # of the tower the last that is live

def test_the_scores_are_the_formulas_on_the_records(mllm, request_):
    "Site by site with sums made a record at a time."
    method = get("MANU", alpha=10)
    scores, _ = method.rank(mllm, request_)
    site = next(s for s in scores if s.part == "language" and s.layer == 1)
    I = [importance(*(torch.tensor(read_one_by_one(mllm, where(r, modality=m, kind="identity"), site, .1, "mean")) for m in ("vqa", "qa"))) for r in (request_.forget, request_.retain)]
    torch.testing.assert_close(scores[site], I[0].sum(0)/(I[1].sum(0) + 1e-5), rtol=.05, atol=.02)
    assert (scores[site] - I[0].sum(0)/(I[1].sum(0) + 1e-5)).abs().median() < 1e-4

def test_how_many_retain_records_are_looked_at(request_):
    identity = {m: len(where(request_.forget, modality=m, kind="identity")) for m in ("vqa", "qa")}
    counts = lambda **fields: {m: len(where(get("MANU", alpha=10, **fields).retain_records(request_), modality=m)) for m in ("vqa", "qa")}
    assert counts() == {m: len(where(request_.retain, modality=m, kind="identity")) for m in identity}
    assert counts(retain_sample=0) == identity and counts(retain_sample=7) == dict(vqa=7, qa=7) and counts(retain_sample=10**6) == counts()
    some = lambda seed: get("MANU", alpha=10, retain_sample=7, seed=seed).retain_records(request_)["uid"]
    assert some(0) == some(0) != some(1)

def test_vision_alone_needs_no_text(mllm, request_):
    method = get("MANU", alpha=10, parts=("vision",))
    half = ForgetRequest(where(request_.forget, modality="vqa"), where(request_.retain, modality="vqa"))
    done = method.unlearn(mllm, half)
    assert method.sees["forget vqa"] and not method.sees["forget qa"] and done.diagnostics["update_norm"]["language"] == 0 < done.diagnostics["update_norm"]["vision"]
    batch = encode(mllm, rows(where(request_.forget, modality="qa"), range(3)))
    assert torch.equal(logits(done.mllm, batch), logits(mllm, batch))  # plain text passes no vision neuron

@pytest.mark.parametrize("fields, message", [
    (dict(alpha=None), "alpha of MANU is None; it must be a per cent above 0 and up to 100; there is no default."), (dict(alpha=0), "alpha of MANU is 0"), (dict(alpha=101), "up to 100"),
    (dict(rank_by="best"), "must be one of manu, random, magnitude, taylor"), (dict(unit="head"), "must be one of hidden, rows"), (dict(pool="sum"), "must be one of mean, last, max, token"),
    (dict(parts=("projector",)), "must be some of vision, language"), (dict(weights=(1, 1)), "four numbers"), (dict(weights=(0, 0, 0, 0)), "not all 0"), (dict(keep=1), "from 0 to below 1"),
    (dict(forget_on=("vqa",)), "MANU's paper formulas look at qa records here, so forget_on and retain_on must hold them."), (dict(layers=0), "1 or more, or None for all")])
def test_bad_fields_are_one_sentence(fields, message):
    with pytest.raises(InputError) as e: get("MANU", **fields)
    assert message in str(e.value) and "\n" not in str(e.value)

def test_a_class_by_itself_asks_for_alpha():
    with pytest.raises(InputError, match="there is no default"): MANU()

@pytest.mark.parametrize("missing, other", [("qa", "vqa"), ("vqa", "qa")])
def test_a_missing_form_is_named(mllm, request_, missing, other):
    for split, doing in (("forget", "forgets"), ("retain", "retains")):
        half = replace(request_, **{split: where(getattr(request_, split), modality=other)})
        with pytest.raises(InputError, match=f"^MANU {doing} on {missing} records, and the request has none of them.$"): get("MANU", alpha=10).unlearn(mllm, half)
