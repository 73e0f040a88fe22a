"The reconstruction of CVF+NCU against plain loops, hand-computed numbers and cases in which the null space is exact."
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from mmu_study.batches import answer_log_probs, ask, cross_entropy, encode, rows
from mmu_study.evaluation import replies
from mmu_study.faceworld import Faceworld
from mmu_study.methods import null_space_cvf as cvf
from mmu_study.methods.null_space_cvf import CVFNCU, Forgotten, NullSpace, Pictures
from mmu_study.methods.unlearning import get
from mmu_study.models import MLLM, PARTS, TinyLlava, tiny_llava
from mmu_study.records import where
from mmu_study.settings import InputError

@pytest.fixture(scope="module")
def world(): return Faceworld.preset("smoke", strangers=10, views=4)

@pytest.fixture(scope="module")
def request_(world): return world.split(17).requests()[0]

@pytest.fixture(scope="module")
def mllm(world):
    "Untrained, but for wider weights of the tower, so that pictures differ."
    made = tiny_llava(TinyLlava(vision_layers=3, layers=2), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in made.parameters("vision", "projector"):
            if p.ndim == 2: p.copy_(torch.randn(p.shape, generator=generator)/p.shape[1]**.5)
    return made

@pytest.fixture(scope="module")
def few(world):
    "Two requests with so few pictures that their tokens do not span any layer's inputs: one picture of one person each, two retained ones."
    def one_view(records, entities, n=1):
        records = where(records, entity=entities, modality="vqa", kind="identity")
        views = [where(where(records, entity=e), view=where(records, entity=e)[0]["view"]) for e in entities]
        return views[0] if n == 1 else views
    requests = world.split(17).requests(2)
    from datasets import concatenate_datasets
    retained = concatenate_datasets(one_view(requests[0].retain, sorted({*requests[0].retain["entity"]})[:2], 2))
    return [replace(r, forget=one_view(r.forget, r.entities[:1]), retain=retained) for r in requests]

EXACT = dict(rule="relative", threshold=1e-12, lambda_ret=0., lr=1e-3, steps=8, batch_size=2, retain_batch=2)

def cvfncu(**fields) -> CVFNCU: return get("CVFNCU", "embedded", **{**dict(steps=2, batch_size=4, retain_batch=3), **fields})
def weights_of(mllm) -> dict: return {n: p.detach().clone() for n, p in mllm.model.named_parameters()}
def changed(before: dict, mllm) -> set[str]: return {n for n, p in mllm.model.named_parameters() if not torch.equal(before[n], p.detach())}
def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def pictures_of(mllm, records): return Pictures.of(mllm, where(records, modality="vqa", kind="identity"))
def gap(a: list, b: list) -> float: return float((torch.cat(a) - torch.cat(b)).norm()/torch.cat(b).norm())

def inputs_of(mllm, pictures) -> dict[str, torch.Tensor]:
    "What every linear layer of tower and projector reads, [tokens, d]; recorded by replacing its forward."
    seen = {}
    layers = {n: m for n, m in mllm.model.named_modules() if isinstance(m, torch.nn.Linear) and ("vision_tower" in n or "projector" in n)}
    for n, m in layers.items(): m.forward = lambda x, n=n, m=m: (seen.setdefault(n, []).append(x.detach().reshape(-1, x.shape[-1])), torch.nn.functional.linear(x, m.weight, m.bias))[1]
    with torch.no_grad(): mllm.model.model.get_image_features(**pictures.batch(mllm, range(len(pictures))))
    for m in layers.values(): del m.forward
    return {f"{n}.weight": torch.cat(x).double() for n, x in seen.items()}

# Loss

def test_the_contrast_is_infonce_with_the_nearest_negatives():
    z, a, o, bank = (torch.nn.functional.normalize(rand(n, 5, seed=s), dim=1) for s, n in enumerate((3, 3, 3, 9)))
    own, tau, k, losses = [True, False, True], .2, 4, []
    for i in range(3):
        similarities = sorted((float(z[i]@m) for m in bank), reverse=True)[:k]
        positive = math.exp(float(z[i]@a[i])/tau)
        negatives = [math.exp(s/tau) for s in similarities] + [math.exp(float(z[i]@o[i])/tau)]*own[i]
        losses.append(-math.log(positive/(positive + sum(negatives))))
    assert float(cvf.contrast_loss(z, a, o, bank, tau, k, torch.tensor(own))) == pytest.approx(sum(losses)/3)
    assert float(cvf.contrast_loss(z, a, o, bank, tau, 99)) == pytest.approx(float(cvf.contrast_loss(z, a, o, bank, tau, 9)))

def test_features_are_compared_token_by_token():
    now, before, other = ([rand(2, 3, seed=s), rand(4, 3, seed=s + 1)] for s in (0, 2, 4))
    flat = lambda features: [t for f in features for t in f.tolist()]
    mean = sum(sum((x - y)**2 for x, y in zip(p, q)) for p, q in zip(flat(now), flat(before)))/6
    square = lambda features: sum(sum(x*x for x in t) for t in flat(features))/6
    assert float(cvf.feature_distance(now, before)) == pytest.approx(mean/square(before), rel=1e-5)
    assert float(cvf.feature_distance(now, before, other)) == pytest.approx(mean/square(other), rel=1e-5)

def test_a_picture_is_the_direction_of_its_mean_token():
    z = cvf.pooled([torch.tensor([[3., 0], [3, 8]]), torch.tensor([[0., -2]])])
    assert torch.allclose(z, torch.tensor([[.6, .8], [0, -1]]))

# Null space

@pytest.mark.parametrize("rule, threshold, null", [("tail", .04, 2), ("tail", .2, 4), ("tail", .005, 0), ("relative", .05, 4), ("relative", .04, 3), ("absolute", 2.5, 2), ("smallest", 2.5, 2), ("share", .61, 3)])
def test_the_rules_count_null_directions(rule, threshold, null):
    turn = torch.linalg.qr(rand(5, 5))[0]
    C = turn@torch.diag(torch.tensor([4., 1, 90, 2, 3], dtype=torch.float64))@turn.T
    space = cvf.null_space(C, rule, threshold)
    P = space.project(torch.eye(5, dtype=torch.float64))
    assert space.share == null/5 and space.tail == pytest.approx(sum(sorted((4, 1, 90, 2, 3))[:null])/100)
    assert torch.allclose(P, P.T, atol=1e-12) and torch.allclose(P@P, P, atol=1e-12) and float(P.trace()) == pytest.approx(null)
    expected = sum((torch.outer(turn[:, i], turn[:, i]) for i in (1, 3, 4, 0, 2)[:null]), torch.zeros(5, 5, dtype=torch.float64))  # ascending
    assert torch.allclose(P, expected, atol=1e-10)
    assert space.basis.shape[1] == min(null, 5 - null)

def test_either_basis_gives_the_same_projection():
    _, U = torch.linalg.eigh(rand(8, 8)@rand(8, 8).T)
    dW = rand(3, 8, seed=1)
    assert torch.allclose(NullSpace(U[:, :3], True, 0., 0.).project(dW), NullSpace(U[:, 3:], False, 0., 0.).project(dW), atol=1e-12)

def test_a_basis_does_not_hold_all_eigenvectors():
    for rank in (2, 6): assert (basis := cvf.null_space(torch.eye(8), "share", rank/8).basis).untyped_storage().nbytes() == 4*basis.numel() == 4*8*2

def test_room_and_drift_by_hand():
    space = cvf.null_space(torch.diag(torch.tensor([1., 2, 97], dtype=torch.float64)), "tail", .05)  # the first two
    C_forget = torch.tensor([[3., 1, 5], [1, 2, 0], [5, 0, 15]], dtype=torch.float64)
    assert cvf.room(space, C_forget) == pytest.approx((3 + 2)/20)
    assert cvf.drift(torch.tensor([[1., 2.]]), torch.tensor([[3., 0.]]), torch.tensor([[2., 1.], [1., 4.]])) == pytest.approx(math.sqrt((2 + 2*2 + 4*4)/18))

# Layers and their inputs

def test_layers_that_are_not_read_stay_out(mllm, request_):
    layers = cvf.read_linears(mllm.copy(), pictures_of(mllm, request_.forget).batch(mllm, [0]))
    block = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    expected = {f"model.vision_tower.encoder.layers.{i}.{n}.weight" for i in range(2) for n in block} | {f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2)}
    assert set(layers) == expected  # of three blocks

def test_second_moments_are_means_over_all_tokens(mllm, request_):
    pictures = pictures_of(mllm, request_.forget)
    layers = cvf.read_linears(mllm.copy(), pictures.batch(mllm, [0]))
    layers = {n: dict(mllm.model.named_modules())[n.removesuffix(".weight")] for n in layers}
    C, reads = cvf.second_moments(mllm, layers, pictures, size=3)
    inputs = inputs_of(mllm, pictures)
    for n in layers: assert torch.allclose(C[reads[n]], sum(torch.outer(x, x) for x in inputs[n])/len(inputs[n]), rtol=1e-4, atol=1e-6), n
    assert C["model.multi_modal_projector.linear_1.weight"].dtype == torch.float64
    assert len(inputs["model.multi_modal_projector.linear_1.weight"]) == 16*len(pictures) and len(inputs["model.vision_tower.encoder.layers.0.mlp.fc1.weight"]) == 17*len(pictures)
    assert sorted(n.split(".")[-2] for n in reads if reads[n] != n) == ["k_proj"]*2 + ["v_proj"]*2
    assert not any(m._forward_pre_hooks for m in layers.values())

def test_pictures_are_taken_once(mllm, request_):
    records = where(request_.forget, modality="vqa")
    pictures = Pictures.of(mllm, records)
    shown = [(r["entity"], r["view"]) for r in records]
    assert len(pictures) == len(set(shown)) < len(records) and pictures.entity == [e for e, _ in dict.fromkeys(shown)]
    assert [{shown[i] for i in group} for group in pictures.records] == [{s} for s in dict.fromkeys(shown)]
    batch = pictures.batch(mllm, [1, 0])["pixel_values"]
    for i in (0, 1): assert torch.equal(batch[1 - i], encode(mllm, [records[int(pictures.records[i][0])]])["pixel_values"][0])

def test_features_are_what_the_language_model_reads(mllm, request_):
    batch = encode(mllm, rows(where(request_.forget, modality="vqa"), range(3)))
    with torch.no_grad(): features, out = cvf.visual_features(mllm, batch), mllm.model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
    at = batch["input_ids"] == mllm.model.config.image_token_id
    assert torch.equal(out.hidden_states[0][at], torch.cat(features["projector"]))
    assert [f.shape for f in features["vision"]] == [(16, 128)]*3

@pytest.fixture
def qwen():
    "Vision tower and merger of a tiny Qwen2-VL, and two pictures of 4 × 4 and 4 × 8 patches."
    config = Qwen2VLConfig(text_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=50, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2])),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=4, temporal_patch_size=1))
    model = Qwen2VLForConditionalGeneration(config).eval()
    return MLLM(model, None), dict(pixel_values=rand(48, 3*16).float(), image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 8]]))

def test_another_family(qwen):
    mllm, pixels = qwen
    features = cvf.visual_features(mllm, pixels)
    assert [f.shape for f in features["vision"]] == [(16, 32), (32, 32)] and [f.shape for f in features["projector"]] == [(4, 16), (8, 16)]
    alone = cvf.visual_features(mllm, dict(pixel_values=pixels["pixel_values"][16:], image_grid_thw=pixels["image_grid_thw"][1:]))
    assert all(torch.allclose(features[l][1], alone[l][0], atol=1e-5) for l in cvf.LEVELS)
    layers = cvf.read_linears(mllm, pixels)
    assert set(layers) == {f"model.visual.blocks.{i}.{n}.weight" for i in range(2) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")} | {f"model.visual.merger.mlp.{i}.weight" for i in (0, 2)}

def test_an_unknown_family_is_one_sentence(mllm, monkeypatch):
    monkeypatch.setitem(PARTS, "llava", dict(projector=("a", "b")))
    with pytest.raises(InputError, match="^Features of a 'llava' model cannot be read; [^.]*.$"): cvf.projector_of(mllm)

# What the model answers at features

def test_answers_at_the_own_features_are_the_answers_to_the_picture(mllm, request_):
    questions = cvf.questions_of(where(request_.forget, modality="vqa", kind="identity"))
    assert len(questions) == 6*len(request_.entities) and not any(q["options"] for q in questions)
    with torch.no_grad(): features = cvf.visual_features(mllm, encode(mllm, questions))["projector"]
    found = cvf.answers_at(mllm, questions, features, size=5)
    with torch.no_grad(): log_probs, is_answer = answer_log_probs(mllm, encode(mllm, questions))
    assert list(found.reply) == replies(mllm, questions)
    assert found.own.tolist() == pytest.approx([math.exp(float(l.sum()/m.sum())) for l, m in zip(log_probs, is_answer)], rel=1e-4)
    assert not np.allclose(cvf.answers_at(mllm, questions, features[::-1]).own, found.own, rtol=1e-3)
    with pytest.raises(InputError, match="of 2 tokens cannot stand for pictures of 16"): cvf.answers_at(mllm, questions[:1], [features[0][:2]])

def pretend(monkeypatch, true_until: dict[str, int]):
    "Let the model answer truly about these people at their first so many strangers."
    asked = {}
    def answers_at(mllm, questions, tokens):
        for e in {q["entity"] for q in questions}: asked.setdefault(e, []).append(next(t for q, t in zip(questions, tokens) if q["entity"] == e))
        return pd.DataFrame([dict(entity=q["entity"], fact=q["fact"], reply="?", match=q["fact"] == "pet" and len(asked[q["entity"]]) <= true_until.get(q["entity"], 0), own=.1) for q in questions])
    monkeypatch.setattr(cvf, "answers_at", answers_at)
    return asked

def test_strangers_are_redrawn_until_nothing_matches(mllm, request_, monkeypatch):
    first, second = request_.entities
    asked = pretend(monkeypatch, {first: 2})
    done = cvfncu(steps=0).unlearn(mllm, request_)
    anchors = done.diagnostics["anchors"]
    assert [(a["entity"], a["draw"], a["matches"]) for a in anchors] == [(first, 0, 1), (first, 1, 1), (first, 2, 0), (second, 0, 0)]
    assert anchors[0]["answers"] == dict.fromkeys(("name", "home", "occupation", "hobby", "food", "pet"), "?")
    assert len(asked[first]) == 3 and len(asked[second]) == 1
    assert all(not torch.equal(a, b) for a, b in zip(asked[first], asked[first][1:]))  # another one each time

def test_the_last_stranger_is_the_anchor(mllm, request_, monkeypatch):
    asked, method = pretend(monkeypatch, {request_.entities[0]: 1}), cvfncu()
    work = method._begin(mllm, request_, None)
    goal = work.prepared.goal["projector"]
    assert all(torch.equal(g, asked[e][-1]) for g, e in zip(goal, work.prepared.forget.entity))  # fixed for a person

def test_a_person_who_is_recognised_everywhere_is_one_sentence(mllm, request_, monkeypatch):
    pretend(monkeypatch, {request_.entities[1]: 99})
    with pytest.raises(InputError, match=f"At the faces of 5 strangers .* true of {request_.entities[1]}; use "): cvfncu(redraws=4).unlearn(mllm, request_)

def test_a_reference_model_that_sees_the_same_is_refused(mllm, request_, tmp_path):
    same = mllm.copy()
    with torch.no_grad(): same.model.lm_head.weight.add_(1)
    folder = str(same.save(tmp_path/"reference"))
    with pytest.raises(InputError, match=r"mean cosine 1.000, .* use anchor='generic'.$"): cvfncu(anchor="reference", reference_model=folder).unlearn(mllm, request_)

def test_a_reference_model_that_sees_something_else_is_the_goal(mllm, request_, tmp_path):
    other = mllm.copy()
    with torch.no_grad(): other.model.model.vision_tower.embeddings.patch_embedding.weight.mul_(-1)
    method = cvfncu(anchor="reference", reference_model=str(other.save(tmp_path/"reference")), lambda_tok=2., lambda_ret=0.)
    work = method._begin(mllm, replace(request_, generic=None), None)
    p = work.prepared
    assert gap(p.goal["vision"], cvf.all_features(other, p.forget)["vision"]) == 0 and method.sees["retain-only model"] and not method.sees["generic pictures"]
    forget, retain = next(method.batches(work, work.forget, 4, 0)), next(method.batches(work, work.retain, 3, 1))
    loss, logged = method.loss(work, forget, retain)
    now = cvf.visual_features(work.mllm, forget.tensors)
    l_tok = sum(cvf.feature_distance(now[l], [p.goal[l][i] for i in forget.index], [p.before[l][i] for i in forget.index]) for l in cvf.LEVELS)
    assert loss.item() == pytest.approx((logged["forget_loss"] + 2*l_tok).item(), rel=1e-5) and l_tok.item() > 0

@pytest.mark.parametrize("anchor", ["nearest", "centroid", "neutral"])
def test_anchors_that_need_no_draw(mllm, request_, anchor):
    request = request_ if anchor != "neutral" else replace(request_, generic=None)
    work = cvfncu(anchor=anchor, nearest=3)._begin(mllm, request, None)
    goal, before = work.prepared.goal["vision"], cvf.all_features(mllm, work.prepared.forget)["vision"]
    if anchor == "neutral": expected = cvf.all_features(mllm, Pictures.of(mllm, work.forget, cvf.blurred))["vision"]
    else:
        crowd = cvf.all_features(mllm, Pictures.of(mllm, request.generic))["vision"]
        cosine = lambda f, g: float(torch.nn.functional.cosine_similarity(f.mean(0), g.mean(0), dim=0))
        expected = [sum(near)/len(near) for f in before for near in [sorted(crowd, key=lambda g: -cosine(f, g))[:3 if anchor == "nearest" else None]]]
    assert gap(goal, expected) < 1e-5 and gap(goal, before) > .01
    assert [a["entity"] for a in work.prepared.answered] == list(request.entities)

# Runs

def test_only_weights_of_read_linear_layers_change_and_text_is_bit_identical(mllm, request_):
    before = weights_of(mllm)
    done = cvfncu(lr=1e-2).unlearn(mllm, request_).mllm
    layers = cvf.read_linears(mllm.copy(), pictures_of(mllm, request_.forget).batch(mllm, [0]))
    assert changed(before, done) == set(layers)  # no bias, norm, embedding, convolution, nothing of the language model
    text, seen = (encode(mllm, rows(where(request_.forget, modality=m), range(6))) for m in ("qa", "vqa"))
    with torch.no_grad():
        assert torch.equal(mllm.model(**text).logits, done.model(**text).logits)
        assert not torch.equal(mllm.model(**seen).logits, done.model(**seen).logits)

@pytest.mark.parametrize("part, other", [("vision", "projector"), ("projector", "vision")])
def test_one_part_alone(mllm, request_, part, other):
    norms = cvfncu(parts=(part,)).unlearn(mllm, request_).diagnostics["update_norm"]
    assert norms[part] > 0 and norms[other] == norms["language"] == 0

def test_an_unfrozen_language_model_learns_by_the_answers(mllm, request_):
    method = cvfncu(parts=(), ncu="none", lambda_ret=0., lambda_tok=0., cap=50.)
    done = method.unlearn(mllm, request_)
    moved = changed(weights_of(mllm), done.mllm)
    assert {n for n in moved if "language_model" in n} == {f"{n}.weight" for n, m in mllm.model.named_modules() if isinstance(m, torch.nn.Linear) and "language_model" in n}
    assert not moved & {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    work = method._begin(mllm, request_, None)
    forget, retain = next(method.batches(work, work.forget, 4, 0)), next(method.batches(work, work.retain, 3, 1))
    loss, logged = method.loss(work, forget, retain)
    ce = cross_entropy(*answer_log_probs(mllm, forget.tensors))
    assert float(loss) == pytest.approx(float(logged["forget_loss"] + 50 - ce), rel=1e-5)

@pytest.mark.parametrize("objective", ["ce", "graddiff"])
def test_controls_on_the_same_weights(mllm, request_, objective):
    method = cvfncu(objective=objective, lambda_ret=7., cap=50.)
    work = method._begin(mllm, replace(request_, generic=None), None)
    forget, retain = next(method.batches(work, work.forget, 4, 0)), next(method.batches(work, work.retain, 3, 1))
    with torch.no_grad():  # otherwise retained features have not moved yet
        for n in work.weights: work.weights[n].mul_(1.1)
    loss, logged = method.loss(work, forget, retain)
    ce = lambda batch: cross_entropy(*answer_log_probs(work.mllm, batch.tensors))
    now = cvf.visual_features(work.mllm, retain.tensors)
    l_ret = sum(cvf.feature_distance(now[l], [cvf.all_features(mllm, work.prepared.retain)[l][i] for i in retain.index]) for l in cvf.LEVELS)
    expected = 50 - ce(forget) + 7*l_ret + (ce(retain) if objective == "graddiff" else 0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4) and float(logged["retain_loss"]) == pytest.approx(float(l_ret), rel=1e-4) and float(l_ret) > 1e-3
    assert changed(weights_of(mllm), method.unlearn(mllm, replace(request_, generic=None)).mllm) == set(work.prepared.layers)

def test_with_an_exact_null_space_retained_pictures_do_not_move(mllm, few):
    retained, forgotten = pictures_of(mllm, few[0].retain), pictures_of(mllm, few[0].forget)
    before, X = cvf.all_features(mllm, retained), inputs_of(mllm, retained)
    W0, moved = weights_of(mllm), {}
    for ncu in ("weights", "gradient", "none"):
        done = cvfncu(**EXACT, ncu=ncu).unlearn(mllm, few[0])
        outputs = {n: float(((W.double() - W0[n].double())@X[n].T).norm()/(W0[n].double()@X[n].T).norm()) for n, W in weights_of(done.mllm).items() if n in done.diagnostics["layers"]}
        moved[ncu] = max(outputs.values()), gap(cvf.all_features(done.mllm, retained)["projector"], before["projector"])
        assert max(d["drift"] for d in done.diagnostics["layers"].values()) == pytest.approx(moved[ncu][0], rel=.01, abs=5e-5)  # fp32
        assert gap(cvf.all_features(done.mllm, forgotten)["projector"], cvf.all_features(mllm, forgotten)["projector"]) > .02
    assert max(moved["weights"]) < 1e-5  # ‖ΔW X‖ relative to ‖W X‖, with AdamW
    assert min(moved["gradient"]) > 1e-3 and min(moved["none"]) > min(moved["gradient"])

def test_the_update_lies_in_the_null_space_after_every_step(mllm, request_):
    method, seen = cvfncu(steps=3, threshold=.05, lr=1e-2), []
    work = method._begin(mllm, request_, None)
    method.unlearn(mllm, request_, watch=lambda step, m: seen.append(weights_of(m)), watch_at=(1, 2))
    p = work.prepared
    for weights in seen:
        for n in p.layers:
            dW = weights[n] - p.start[n]
            assert (dW - p.spaces[p.reads[n]].project(dW)).norm() <= 1e-4*dW.norm() and dW.norm() > 0, n

def test_a_later_request_leaves_an_earlier_one_where_it_is(mllm, few):
    method, theirs = cvfncu(**EXACT), pictures_of(mllm, few[0].forget)
    first = method.unlearn(mllm, few[0])
    after = cvf.all_features(first.mllm, theirs)["projector"]
    held, free = (cvf.all_features(method.unlearn(first.mllm, few[1], state=state).mllm, theirs)["projector"] for state in (first.state, None))
    assert gap(held, after) < 1e-5 and gap(free, after) > 1e-3
    assert gap(cvf.all_features(replace(method, w_forgotten=0.).unlearn(first.mllm, few[1], state=first.state).mllm, theirs)["projector"], free) == 0

def test_second_moments_add_up_over_requests(mllm, few):
    method, model, state, expected = cvfncu(threshold=.5), mllm, None, {}
    for n, request in enumerate(few, 1):
        done = method.unlearn(model, request, state=state)
        model, state = done.mllm, done.state
        for name, x in inputs_of(model, pictures_of(model, request.forget)).items(): expected[name] = expected.get(name, 0) + x.T@x/len(x)  # under the weights of their own request
        assert state.requests == n and done.diagnostics["protected_requests"] == n - 1
        for name, g in state.grams.items(): assert torch.allclose(g, expected[name], rtol=1e-4, atol=1e-6), name
    assert not state.pixels and not state.features  # no picture is kept

def test_a_state_is_saved(mllm, few, tmp_path):
    state = cvfncu(threshold=.5, lambda_replay=1.).unlearn(mllm, few[0]).state
    state.save(tmp_path/"state.safetensors")
    again = Forgotten.load(tmp_path/"state.safetensors")
    assert again.requests == 1 and all(torch.equal(g, again.grams[n]) for n, g in state.grams.items()) and state.grams.keys() == again.grams.keys()
    assert all(torch.equal(a[k], b[k]) for a, b in zip(state.pixels, again.pixels, strict=True) for k in a)
    assert all(torch.equal(a, b) for l in cvf.LEVELS for a, b in zip(state.features[l], again.features[l], strict=True))
    Forgotten({"a": torch.ones(2, 2)}, 3).save(tmp_path/"small.safetensors")
    assert Forgotten.load(tmp_path/"small.safetensors").pixels == [] and Forgotten.load(tmp_path/"small.safetensors").requests == 3

def test_replay_keeps_pictures_and_holds_them(mllm, few):
    method = cvfncu(ncu="none", lambda_replay=5., lambda_ret=0., lambda_tok=0., steps=8, lr=1e-3)
    first = method.unlearn(mllm, few[0])
    theirs = pictures_of(mllm, few[0].forget)
    after = cvf.all_features(first.mllm, theirs)
    assert len(first.state.pixels) == 1 and all(gap(first.state.features[l], after[l]) == 0 for l in cvf.LEVELS)
    held, free = (gap(cvf.all_features(replace(method, lambda_replay=w).unlearn(first.mllm, few[1], state=first.state if w else None).mllm, theirs)["projector"], after["projector"]) for w in (50., 0.))
    assert held < free/2
    work = method._begin(first.mllm, few[1], first.state)
    with torch.no_grad():
        for n in work.weights: work.weights[n].mul_(1.1)
    forget, retain = next(method.batches(work, work.forget, 4, 0)), next(method.batches(work, work.retain, 3, 1))
    loss, logged = method.loss(work, forget, retain)
    now = cvf.all_features(work.mllm, theirs)
    expected = logged["forget_loss"] + 5*sum(cvf.feature_distance(now[l], after[l]) for l in cvf.LEVELS)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)

def test_a_drift_budget_ends_the_run(mllm, request_):
    log = cvfncu(steps=6, lr=1e-3, ncu="none").unlearn(mllm, request_).log
    budget = float(log.drift.iloc[2]) - 1e-7
    done = cvfncu(steps=6, lr=1e-3, ncu="none", budget=budget).unlearn(mllm, request_)
    assert len(done.log) == next(i for i, d in enumerate(log.drift, 1) if d > budget) < 6 and done.log.equals(log[:len(done.log)])

def test_the_report_names_every_layer(mllm, request_):
    done = cvfncu(threshold=.1).unlearn(mllm, request_)
    d = done.diagnostics
    assert len(d["layers"]) == 14 and d["pictures"]["forget"] == len(pictures_of(mllm, request_.forget))
    for layer in d["layers"].values(): assert 0 <= layer["tail"] < .1 and 0 <= layer["room"] <= 1 and 0 < layer["null_share"] < 1 and layer["drift"] > 0 and layer["inputs"] in (128, 512)
    assert done.log.drift.iloc[-1] == pytest.approx(max(l["drift"] for l in d["layers"].values()))
    free = cvfncu(ncu="none").unlearn(mllm, request_)
    assert {l["room"] for l in free.diagnostics["layers"].values()} == {1.} and free.state is None

def test_bf16_steps_are_projected_in_fp32(mllm, few):
    low = mllm.copy()
    low.model.to(torch.bfloat16)
    done = cvfncu(lr=1e-3, threshold=.5).unlearn(low, few[0])
    assert {p.dtype for p in done.mllm.model.parameters()} == {torch.bfloat16} and done.diagnostics["changed_share"] > 0
    assert all(g.dtype == torch.float64 for g in done.state.grams.values())

@pytest.mark.parametrize("fields, message", [
    (dict(lora=2), "lora of CVFNCU is 2; it must be 0, because the null space is one of full weights."),
    (dict(parts=("language",)), "some of vision, projector, language, but not language alone"),
    (dict(forget_on=("vqa", "qa")), "it must be vqa, since only pictures are looked at"),
    (dict(objective="npo"), "it must be one of contrast, ce, graddiff"),
    (dict(anchor="mean"), "it must be one of reference, generic, nearest, centroid, neutral"),
    (dict(anchor="reference"), "the anchor 'reference' needs the folder or hub id of a model"),
    (dict(reference_model="somewhere"), "no other anchor takes one"),
    (dict(rule="energy"), "it must be one of tail, relative, absolute, smallest, share"),
    (dict(ncu=True), "it must be one of none, gradient, weights"),
    (dict(levels=("text",)), "some of vision, projector"),
    (dict(budget=0), "a positive number, or None for no end"),
    (dict(tau=0), "a positive number")])
def test_bad_input_is_one_sentence(fields, message):
    with pytest.raises(InputError) as e: cvfncu(**fields)
    assert message in str(e.value) and "\n" not in str(e.value)

def test_what_cannot_work_is_said_before_the_first_step(mllm, request_, few):
    with pytest.raises(InputError, match="No layer has a null space by the rule 'share' with threshold 0.001"): cvfncu(rule="share", threshold=.001).unlearn(mllm, request_)
    with pytest.raises(InputError, match="looks at generic pictures, and the request has none"): cvfncu().unlearn(mllm, replace(request_, generic=None))
    state = cvfncu(parts=("projector",), threshold=.5).unlearn(mllm, few[0]).state
    with pytest.raises(InputError, match="by a run with other parts"): cvfncu().unlearn(mllm, few[1], state=state)
    with pytest.raises(InputError, match="keeps nothing between requests"): cvfncu(ncu="none").unlearn(mllm, few[1], state=state)
