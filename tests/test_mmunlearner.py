"MMUnlearner against plain loops and hand-computed numbers: saliency, mask, step, files and refusals."
import copy, inspect, json, math, subprocess, sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets

from mmu_study.batches import IGNORE, ask, encode, rows
from mmu_study.faceworld import Faceworld
from mmu_study.methods import mmunlearner
from mmu_study.methods.mmunlearner import Mask, MMUnlearner, as_many, groups_of, labelled, pack, ratio_mask, saliency, unpack
from mmu_study.methods.unlearning import Batch, get
from mmu_study.models import MLLM, TinyLlava, TinyQwen2VL, tiny_llava, tiny_qwen2_vl
from mmu_study.records import ForgetRequest, where
from mmu_study.settings import InputError
from mmu_study.training import Diverged, Recipe, finetune

@pytest.fixture(scope="module")
def world(): return Faceworld.preset("smoke", strangers=10, views=4)

@pytest.fixture(scope="module")
def request_(world): return world.split(17).requests()[0]

@pytest.fixture(scope="module")
def mllm(world, request_):
    "Hardly trained."
    made = tiny_llava(TinyLlava(vision_layers=3, layers=2, vision_width=64, width=64), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")])
    finetune(made, concatenate_datasets([request_.forget, request_.retain]), Recipe(steps=30, tokens=800), progress=False)
    return made

def small(preset="paper", **overrides): return get("mmunlearner", preset, **{**dict(scope="both", steps=2, saliency_records=12, lr=1e-3), **overrides})

def weights_of(mllm): return {n: p.detach().clone() for n, p in mllm.model.named_parameters()}

def same_bits(a, b): return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))

def plain_loss(mllm, batch):
    "Mean negative log-probability of the labelled tokens, token by token."
    logits = mllm.model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
    found = [-logits[i, t - 1].log_softmax(0)[batch["labels"][i, t]] for i, t in zip(*np.nonzero(batch["labels"].numpy() != IGNORE))]
    return sum(found)/len(found)

def plain_gradients(mllm, batch) -> dict:
    named = dict(mllm.model.named_parameters())
    grads = torch.autograd.grad(plain_loss(mllm, batch), list(named.values()), allow_unused=True)
    return dict(zip(named, grads))

# Saliency

@pytest.mark.parametrize("unit, size", [("batch", 4), ("batch", 3), ("sample", 4)])
def test_saliency_is_the_mean_squared_gradient(mllm, request_, unit, size):
    records = concatenate_datasets([where(request_.forget, modality=m).select(range(5)) for m in ("vqa", "qa")])
    found = saliency(mllm, records, batch_size=size, unit=unit, seed=3)
    order, size = np.random.default_rng(3).permutation(10), size if unit == "batch" else 1
    batches = [order[i:i + size] for i in range(0, 10, size)]
    expected = {}
    for b in batches:
        for n, g in plain_gradients(mllm, encode(mllm, rows(records, b))).items():
            if g is not None: expected[n] = expected.get(n, 0) + g**2/len(batches)
    assert found.keys() == expected.keys() and found["lm_head.weight"].max() > 0
    for n in expected: assert torch.allclose(found[n], expected[n], rtol=1e-3, atol=1e-8*expected[n].max().item() + 1e-16), n

def test_saliency_looks_at_what_it_is_told(mllm, request_):
    names = {n for n in mllm.parts["vision"] if "layers.0" in n}
    both = saliency(mllm, request_.forget.select(range(6)))
    some = saliency(mllm, request_.forget.select(range(6)), names)
    assert some.keys() == names and all(torch.allclose(some[n], both[n], rtol=1e-4) for n in names)
    assert saliency(mllm, where(request_.forget, modality="qa").select(range(3)), names) == {}
    with pytest.raises(InputError, match="no parameter nonsense"): saliency(mllm, request_.forget, ["nonsense"])

def test_saliency_holds_one_gradient_at_a_time_and_leaves_no_trace(mllm, request_):
    held, before, modes = [], weights_of(mllm), [m.training for m in mllm.model.modules()]
    parameters = list(mllm.model.parameters())
    parameters[0].requires_grad_(False)
    mllm.model.train()
    hooks = [p.register_post_accumulate_grad_hook(lambda _: held.append(sum(q.grad is not None for q in parameters))) for p in parameters[1:]]
    try:
        saliency(mllm, request_.forget.select(range(8)))
        assert set(held) == {1} and mllm.model.training and not parameters[0].requires_grad
    finally:
        for h in hooks: h.remove()
        mllm.model.eval(); parameters[0].requires_grad_(True)
    assert all(p.grad is None and p.requires_grad for p in parameters) and modes == [m.training for m in mllm.model.modules()]
    assert all(same_bits(before[n], p.detach()) for n, p in mllm.model.named_parameters())
    plain_loss(mllm, encode(mllm, rows(request_.forget, range(2)))).backward()  # no hook is left that drops gradients
    assert parameters[-1].grad is not None
    mllm.model.zero_grad()

def test_saliency_switches_dropout_off(mllm, request_):
    noisy, some = mllm.copy(), request_.forget.select(range(4))
    for layer in noisy.model.model.language_model.layers: layer.self_attn.attention_dropout = .5
    noisy.model.train()
    assert torch.equal(saliency(noisy, some)["lm_head.weight"], saliency(mllm, some)["lm_head.weight"])

def test_saliency_is_summed_in_fp32(mllm, request_):
    low, some = mllm.copy(), request_.forget.select(range(16))
    low.model.to(torch.bfloat16)
    fine, own, exact = saliency(low, some), saliency(low, some, sums=None), saliency(mllm, some)
    assert {s.dtype for s in fine.values()} == {torch.float32} and {s.dtype for s in own.values()} == {torch.bfloat16}
    flat = lambda s: torch.cat([v.flatten().float() for v in s.values()])
    assert torch.corrcoef(torch.stack([flat(fine), flat(exact)]))[0, 1] > .95
    assert fine["lm_head.weight"].unique().numel() > 3*own["lm_head.weight"].unique().numel()

def test_losses_that_are_not_finite_stop_it(mllm, request_):
    sick = mllm.copy()
    with torch.no_grad(): sick.model.lm_head.weight[5] = float("nan")
    with pytest.raises(Diverged, match="^MMUnlearner: .*nan"): saliency(sick, request_.forget.select(range(4)))

def test_all_tokens_are_all_but_padding_and_the_first(mllm, request_):
    batch = encode(mllm, rows(where(request_.forget, modality="vqa"), (0, 30)) + rows(where(request_.forget, modality="qa"), range(2)))
    labels = labelled(batch, "all")["labels"]
    for ids, real, given in zip(batch["input_ids"], batch["attention_mask"], labels):
        start = int((real == 0).sum())
        assert given.tolist() == [IGNORE]*(start + 1) + ids[start + 1:].tolist()
    assert labelled(batch) is batch and (labels == mllm.model.config.image_token_id).sum() == 32  # two pictures of 16 tokens

# Mask

def plain_mask(t, p, beta, eps, zero_zero):
    out = []
    for a, b in zip(t, p):
        if a == b == 0 and zero_zero != "arithmetic": out.append(zero_zero == "selected")
        else: out.append((a + eps)/(b + eps) >= beta)
    return out

@pytest.mark.parametrize("beta", [.5, 1., 2.])
@pytest.mark.parametrize("zero_zero", ["masked", "selected", "arithmetic"])
def test_ratio_mask(beta, zero_zero):
    rng = np.random.default_rng(0)
    t, p = ([0., 0., 1., 1., 2., 1., *rng.exponential(1e-6, 200)] for _ in range(2))
    p[:6] = [0., 1., 0., 1., 1., 2.]
    found = ratio_mask(torch.tensor(t, dtype=torch.float64), torch.tensor(p, dtype=torch.float64), beta, 1e-15, zero_zero)
    assert found.tolist() == plain_mask(t, p, beta, 1e-15, zero_zero)

@pytest.mark.parametrize("dtype, zero", [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
def test_zero_by_zero_as_the_arithmetic_gives_it(dtype, zero):
    found = ratio_mask(torch.tensor([0., 1., 0.], dtype=dtype), torch.tensor([0., 0., 1.], dtype=dtype), zero_zero="arithmetic")
    assert found.tolist() == [zero, True, False]

def test_equal_target_and_preserve_set_select_every_weight_that_matters(mllm, request_):
    some = request_.forget.select(range(12))
    S_T, S_P = saliency(mllm, some), saliency(mllm, some)
    for n in S_T: assert torch.equal(ratio_mask(S_T[n], S_P[n]), S_T[n] > 0), n
    assert any((S == 0).any() for S in S_T.values())  # embeddings of other words

@pytest.mark.parametrize("sizes", [(40, 40), (24, 96)])
def test_two_random_halves_share_the_weights(mllm, request_, sizes):
    order = np.random.default_rng(1).permutation(len(request_.retain))
    parts = request_.retain.select(order[:sizes[0]]), request_.retain.select(order[sizes[0]:sum(sizes)])
    S_T, S_P = (saliency(mllm, p) for p in parts)
    alive = {n: (S_T[n] + S_P[n]) > 0 for n in S_T}
    share = sum(ratio_mask(S_T[n], S_P[n])[alive[n]].sum().item() for n in S_T)/sum(a.sum().item() for a in alive.values())
    assert .4 < share < .6

def test_controls_keep_as_many_weights_of_each_tensor(mllm, request_):
    made = {kind: small(mask=kind).mask_for(mllm, request_) for kind in ("ratio", "forget", "random", "none")}
    S_T = saliency(mllm, small().looked_at(request_)[0])
    for n in made["ratio"].bits:
        count, S = int(made["ratio"][n].sum()), S_T.get(n, torch.zeros(made["ratio"].shapes[n]))
        assert int(made["forget"][n].sum()) == int(made["random"][n].sum()) == count
        if 0 < count < S.numel(): assert S[made["forget"][n]].min() >= S[~made["forget"][n]].max()
        assert made["none"][n].all()
    big = "model.language_model.layers.0.mlp.up_proj.weight"
    overlap = (made["ratio"][big] & made["random"][big]).sum().item()
    expected = made["ratio"][big].sum().item()**2/made["ratio"][big].numel()
    assert overlap == pytest.approx(expected, rel=.15)

def test_the_mask_is_the_ratio_of_the_two_sets(mllm, request_):
    method = small(preserve=("forget qa", "retain vqa"), beta=2., unit="sample", seed=4)
    T, P = method.looked_at(request_)
    assert {*T["role"]} == {"forget"} and {*T["modality"]} == {"vqa"} and {*T["kind"]} == {"identity"}
    sets = [*zip(P["role"], P["modality"])]
    assert len(T) == 12 and sets.count(("forget", "qa")) == sets.count(("retain", "vqa")) == 12 and len(sets) == 24
    S_T, S_P = (saliency(mllm, r, unit="sample", seed=4) for r in (T, P))
    mask = method.mask_for(mllm, request_)
    for n in S_T: assert torch.equal(mask[n], ratio_mask(S_T[n], S_P[n], 2.)), n
    assert mask.made_from["target"]["forget vqa"] == mask.made_from["preserve"]["forget qa"] == mask.made_from["preserve"]["retain vqa"] == 12

def test_without_a_limit_it_looks_at_everything(request_):
    T, P = get("mmunlearner").looked_at(request_)
    assert [*T["uid"]] == where(request_.forget, modality="vqa", kind="identity")["uid"]
    assert sorted(P["uid"]) == sorted([*where(request_.forget, modality="qa")["uid"], *request_.retain["uid"]])

def test_packing_is_numpy_s():
    for shape in ((7,), (3, 5), (2, 3, 4), (1,), ()):
        mask = torch.rand(shape) < .5
        assert pack(mask).numpy().tolist() == np.packbits(mask.numpy().flatten()).tolist() and torch.equal(unpack(pack(mask), shape), mask)

def test_unread_tensors_are_masked_listed_and_exempt(mllm, request_):
    done = small("paper").unlearn(mllm, request_)
    report = json.loads(json.dumps(done.diagnostics))["mask"]
    last = {n for n in mllm.parts["vision"] if "layers.2." in n}
    assert last <= {*report["idle"]} and all("post_layernorm" in n for n in {*report["idle"]} - last)
    assert {*report["groups"]} == {"vision tower", "projector", "attention", "mlp", "norms", "embeddings", "head"} and not {*report["idle"]} & {*report["tensors"]}
    mask = small("paper").mask_for(mllm, request_)
    assert not any(mask[n].any() for n in report["idle"])
    read = [n for n in mask.bits if n not in report["idle"]]
    assert report["kept"] == pytest.approx(sum(mask[n].sum().item() for n in read)/sum(mask[n].numel() for n in read))
    heads = [n for n in read if "mlp" in n and "language" in n]
    assert report["groups"]["mlp"] == pytest.approx(sum(mask[n].sum().item() for n in heads)/sum(mask[n].numel() for n in heads))
    assert {groups_of(mllm)[n] for n in mllm.parts["vision"]} == {"vision tower"} and groups_of(mllm)["lm_head.weight"] == "head"

def test_as_many():
    assert as_many(torch.tensor([True, False, True, False]), torch.tensor([1., 3., 0., 2.])).tolist() == [False, True, False, True]

# Step

class SGD(MMUnlearner):
    def optimizer(self, weights): return torch.optim.SGD(weights, lr=self.lr)

@pytest.mark.parametrize("cls", [MMUnlearner, SGD])
@pytest.mark.parametrize("scope", ["both", "language"])
def test_forget_only_steps_leave_masked_weights_alone(mllm, request_, cls, scope):
    method = cls(scope=scope, gamma=0., lr=1e-2, steps=3, saliency_records=12)
    mask, after = method.mask_for(mllm, request_), method.unlearn(mllm, request_).mllm
    moved = 0
    for n, p in after.model.named_parameters():
        before = dict(mllm.model.named_parameters())[n].detach()
        free = mask[n] if n in mask.bits else torch.zeros_like(before, dtype=torch.bool)
        assert same_bits(p.detach()[~free], before[~free]), n
        moved += (p.detach()[free] != before[free]).sum().item()
    assert moved > .5*sum(mask[n].sum().item() for n in mask.bits)

def one_batch(mllm, records, n=6): return Batch(np.arange(n), encode(mllm, rows(records, range(n))))

def gradients_of(method, mllm, request_):
    "What `backward` leaves, for a forget and a retain batch of six."
    work = method._begin(mllm, request_, None)
    forget, retain = one_batch(work.mllm, work.forget), one_batch(work.mllm, work.retain) if work.retain else None
    loss, logged = method.backward(work, forget, retain)
    return {n: p.grad for n, p in work.mllm.model.named_parameters()}, forget, retain, loss, logged, work

@pytest.mark.parametrize("scope", ["vision", "language", "both"])
def test_the_gradient_is_that_of_the_equation(mllm, request_, scope):
    method = small(scope=scope, alpha=.7, gamma=.3)
    found, forget, retain, loss, logged, work = gradients_of(method, mllm, request_)
    up, down = plain_gradients(mllm, forget.tensors), plain_gradients(mllm, retain.tensors)
    for n, p in mllm.model.named_parameters():
        zero = torch.zeros_like(p)
        m = work.prepared[n] if n in work.prepared.bits else zero
        expected = -.7*m*(zero if up[n] is None else up[n]) + .3*(zero if down[n] is None else down[n])
        assert torch.allclose(zero if found[n] is None else found[n], expected, rtol=1e-3, atol=1e-6), n
    ce = [plain_loss(mllm, b.tensors).item() for b in (forget, retain)]
    assert loss.item() == pytest.approx(-.7*ce[0] + .3*ce[1], rel=1e-4) and [logged["forget_loss"].item(), logged["retain_loss"].item()] == pytest.approx(ce, rel=1e-4)

@pytest.mark.parametrize("scope", ["vision", "language"])
def test_outside_the_scope_there_is_no_forget_gradient(mllm, request_, scope):
    found, *_, work = gradients_of(small(scope=scope, gamma=0.), mllm, request_)
    assert {n for n in found if found[n] is not None and found[n].count_nonzero()} <= work.prepared.bits.keys()
    assert all(found[n] is None for n in found.keys() - work.prepared.bits.keys())

def test_unmasked_outside_is_the_released_code_s(mllm, request_):
    found, forget, *_, work = gradients_of(small("released", gamma=0., clip=1e9, scope="language"), mllm, request_)
    work.mllm.model.eval()
    full = plain_gradients(mllm, labelled(forget.tensors, "all"))
    free = {n for n in found if n not in work.prepared.bits and full[n] is not None}
    assert {"lm_head.weight", "model.language_model.norm.weight", "model.language_model.embed_tokens.weight"} <= free and {n for n in mllm.parts["vision"] if "layers.0" in n} <= free
    for n in free: assert torch.allclose(found[n], -full[n], rtol=1e-3, atol=1e-6), n
    assert all(any(c in n for c in ("proj", "fc", "linear", "mlp", "qkv")) and n in mllm.parts["language"] for n in work.prepared.bits)

def test_alpha_zero_is_retain_fine_tuning(mllm, request_):
    method = small(alpha=0., steps=3)
    plain, order = mllm.copy(), mmunlearner.GradientMethod.batches
    optimizer = torch.optim.AdamW(plain.train_only(), lr=1e-3, weight_decay=0., eps=1e-6)
    work = method._begin(mllm, request_, None)
    batches = method.batches(work, work.retain, 4, 1)
    for _ in range(3):
        batch = next(batches).tensors
        logits = plain.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.); optimizer.step(); optimizer.zero_grad()
    after = method.unlearn(mllm, request_).mllm
    for (n, p), q in zip(after.model.named_parameters(), plain.model.parameters()): assert torch.allclose(p, q, atol=2e-4), n
    assert work.prepared.kept(dict.fromkeys(work.prepared.bits, "all"))["all"] < .9  # there was a mask

def norm_of_change(method, mllm, request_):
    after = method.unlearn(mllm, request_).mllm
    return math.sqrt(sum((p - q).detach().square().sum().item() for p, q in zip(after.model.parameters(), mllm.model.parameters())))

def test_clipping_is_after_the_mask(mllm, request_):
    about = dict(scope="both", gamma=0., alpha=100., lr=1., steps=1, saliency_records=12)  # a step of SGD at rate 1 is the clipped gradient
    assert norm_of_change(SGD(**about), mllm, request_) == pytest.approx(1, rel=1e-3)
    assert norm_of_change(SGD(**about, clip_first=True), mllm, request_) < .9
    assert SGD(**about).unlearn(mllm, request_).log.grad_norm[0] > 1  # what is logged is the norm before

def test_the_cap_ends_the_push(mllm, request_):
    found, *_, loss, logged, work = gradients_of(small(cap=.01, gamma=0.), mllm, request_)
    assert loss == 0 and logged["forget_loss"] > .01 and not any(g is not None and g.count_nonzero() for g in found.values())

def test_alternating_steps_go_through_both_sets(mllm, request_, monkeypatch):
    method = get("mmunlearner", "released", scope="both", lr=1e-4, saliency_records=8, batch_size=48, retain_batch=48)
    n_f, n_r = (math.ceil(len(r)/48) for r in (method.forget_records(request_), method.retain_records(request_)))
    every = n_r//n_f
    assert method.planned_steps(request_) == n_r + math.ceil(n_r/every) and every > 1
    used = []
    monkeypatch.setattr(MMUnlearner, "backward", lambda self, work, f, r: (used.append((f, r)), (sum(p.sum() for p in work.mllm.model.parameters()).backward(), (torch.zeros(()), {}))[1])[1])
    log = method.unlearn(mllm, request_).log
    assert [f is not None for f, _ in used] == [i % (every + 1) == 0 for i in range(len(log))] == [r is None for _, r in used]
    assert sorted(np.concatenate([f.index for f, _ in used if f])[:len(method.forget_records(request_))]) == [*range(len(method.forget_records(request_)))]
    assert sorted(np.concatenate([r.index for _, r in used if r])[:len(method.retain_records(request_))]) == [*range(len(method.retain_records(request_)))]

def test_an_alternating_log_has_one_loss_a_step(mllm, request_):
    log = small("released", steps=3).unlearn(mllm, request_).log
    assert log.forget_loss.notna().tolist() == [True, False, False] and log.retain_loss.notna().tolist() == [False, True, True]
    assert log.loss.tolist() == pytest.approx([-log.forget_loss[0], *log.retain_loss[1:]])
    assert small(mode="alternating", gamma=0., steps=2).unlearn(mllm, request_).log.forget_loss.notna().all()

def test_without_fp32_copies_bf16_hardly_moves(mllm, request_):
    low = mllm.copy()
    low.model.to(torch.bfloat16)
    moved = {master: small(mask="none", master=master, lr=1e-5, steps=4).unlearn(low, request_).diagnostics["changed_share"] for master in (True, False)}
    assert 0 < moved[False] < .3
    done = small(lr=1e-3).unlearn(low, request_)
    assert done.diagnostics["dtype"] == "bfloat16" and {p.dtype for p in done.mllm.model.parameters()} == {torch.bfloat16} and 0 < done.diagnostics["mask"]["kept"] < 1

# Files

def test_a_mask_is_used_again(mllm, request_, tmp_path, monkeypatch):
    file = tmp_path/"masks"/"mine.safetensors"
    method = small(mask_file=str(file))
    first = method.unlearn(mllm, request_)
    weights = sum(p.numel() for p in mllm.model.parameters())
    assert weights/8 < file.stat().st_size < weights/8 + 40_000 and [*file.parent.iterdir()] == [file]
    monkeypatch.setattr(mmunlearner, "saliency", lambda *_, **__: pytest.fail("it was made again"))
    again = method.unlearn(mllm, request_)
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(first.mllm.model.parameters(), again.mllm.model.parameters()))
    assert json.dumps(again.diagnostics["mask"]) == json.dumps(first.diagnostics["mask"])
    replace(method, lr=1e-4, gamma=.5, cap=3., batch_size=2).unlearn(mllm, request_)  # the mask does not depend on these

def test_a_mask_of_something_else_is_refused(mllm, request_, tmp_path):
    method = small(mask_file=str(tmp_path/"m"), steps=1)
    method.mask_for(mllm, request_)
    other = mllm.copy()
    with torch.no_grad(): other.model.lm_head.weight[0, 0] += 1e-3
    refused = lambda words: pytest.raises(InputError, match=rf"^The mask in .* was made from other {words} than this run has; [^.]*\.$")
    with refused("model"): method.unlearn(other, request_)
    reads_otherwise = MLLM(mllm.model, copy.deepcopy(mllm.processor))
    reads_otherwise.processor.image_processor.image_mean = [.1, .2, .3]
    with refused("model"): method.unlearn(reads_otherwise, request_)
    with refused("beta"): replace(method, beta=2.).unlearn(mllm, request_)
    with refused("scope"): replace(method, scope="vision").unlearn(mllm, request_)
    with refused("preserve"): replace(method, preserve=("retain vqa",)).unlearn(mllm, request_)
    def without(modality):
        uids = request_.forget["uid"]
        dropped = where(request_.forget, modality=modality, kind="identity")["uid"][0]
        return ForgetRequest(request_.forget.select([i for i, u in enumerate(uids) if u != dropped]), request_.retain)
    with refused("preserve"): method.mask_for(mllm, without("qa"))
    with refused("target"): method.mask_for(mllm, without("vqa"))

def test_other_files_are_refused(mllm, request_, tmp_path):
    (tmp_path/"text").write_text("no mask")
    with pytest.raises(InputError, match="text cannot be read as a mask"): small(mask_file=str(tmp_path/"text")).mask_for(mllm, request_)
    torch.save({}, tmp_path/"pickle")
    with pytest.raises(InputError, match="pickle cannot be read as a mask"): small(mask_file=str(tmp_path/"pickle")).mask_for(mllm, request_)
    mllm.save(tmp_path/"model")
    with pytest.raises(InputError, match="holds tensors, but no mask"): small(mask_file=str(tmp_path/"model"/"model.safetensors")).mask_for(mllm, request_)

# Refusals

@pytest.mark.parametrize("fields, message", [
    (dict(lora=4), "lora of MMUnlearner is 4; it must be 0, because a low-rank change"),
    (dict(scope="head"), "one of vision, language, both"), (dict(mask="all"), "one of ratio, forget, random, none"),
    (dict(beta=0.), "a positive number"), (dict(preserve=()), "some of forget qa, retain vqa, retain qa"), (dict(preserve=("forget vqa",)), "some of forget qa"),
    (dict(unit="token"), "one of batch, sample"), (dict(mode="both"), "one of summed, alternating"), (dict(cap=-1.), "or None for no end")])
def test_fields_that_make_no_sense(fields, message):
    with pytest.raises(InputError) as e: get("mmunlearner", "paper", **fields)
    assert message in str(e.value) and "\n" not in str(e.value)

def test_a_mask_that_covers_nothing_that_trains(mllm, request_):
    with pytest.raises(InputError, match="^A mask of scope language .* covers no parameter that trains .vision, projector.*$"): small(scope="language", parts=("vision", "projector")).unlearn(mllm, request_)
    with pytest.raises(InputError, match="covers no parameter that trains"): small(covers=("lora_A",)).unlearn(mllm, request_)

def test_a_mask_that_tells_nothing_apart(mllm, request_):
    with pytest.raises(InputError, match="^The mask keeps 0% of the .*; take another beta"): small(beta=1e30).unlearn(mllm, request_)
    with pytest.raises(InputError, match="^The mask keeps 100% of the "): small(scope="vision", preserve=("forget qa",), zero_zero="selected").unlearn(mllm, request_)
    assert small(beta=1e30, check=False).unlearn(mllm, request_).diagnostics["mask"]["kept"] == 0
    assert small(mask="none").unlearn(mllm, request_).diagnostics["mask"]["kept"] == 1

def test_it_says_what_it_sees():
    all_four = {f"{r} {m}": True for r in ("forget", "retain") for m in ("vqa", "qa")}
    assert get("mmunlearner").sees == {**all_four, "reference model": False, "generic pictures": False}
    assert not get("mmunlearner", preserve=("retain vqa",)).sees["forget qa"]
    assert [k for k, v in get("mmunlearner", mask="none").sees.items() if v] == ["forget vqa", "retain vqa"]

def test_a_request_without_text_is_reported(mllm, request_):
    half = ForgetRequest(where(request_.forget, modality="vqa"), request_.retain)
    assert "forget qa" in small().mask_for(mllm, request_).made_from["preserve"]
    assert "forget qa" not in small().unlearn(mllm, half).diagnostics["mask"]["made_from"]["preserve"]
    with pytest.raises(InputError, match="^MMUnlearner preserves forget qa, and the request has none of them.$"): small(preserve=("forget qa",)).unlearn(mllm, half)

def test_presets():
    paper, released = get("mmunlearner"), get("mmunlearner", "released")
    assert (paper.lr, paper.batch_size, paper.steps, paper.beta, paper.eps, paper.alpha, paper.gamma, paper.cap, paper.clip, paper.adam_eps, paper.weight_decay, paper.lora) == (1e-5, 4, None, 1, 1e-15, 1, 1, None, 1, 1e-6, 0, 0)
    assert (paper.forget_on, paper.retain_on, paper.saliency_batch, paper.zero_zero, paper.mode, paper.outside, paper.loss_on) == (("vqa",), ("vqa",), 4, "masked", "summed", "masked", "answer")
    assert (released.mode, released.outside, released.loss_on, released.sums, released.clip_first, released.master, released.check) == ("alternating", "unmasked", "all", "parameter", True, False, False)
    assert len(MMUnlearner.grid("embedded")) == 6

def test_another_family(world, request_):
    made = tiny_qwen2_vl(TinyQwen2VL(), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")])
    done = small(check=False).unlearn(made, request_)
    report = done.diagnostics["mask"]
    assert 0 < report["kept"] < 1 and report["groups"].keys() == {"vision tower", "projector", "attention", "mlp", "norms", "embeddings", "head"}
    assert min(done.diagnostics["update_norm"].values()) > 0
