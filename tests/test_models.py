"Every family, tiny: parts, prompts, labels, LoRA by path, methods, saving; loading with what can go wrong; fine-tuning recipes; memory."
import json, os, shutil, socket, subprocess, sys
from dataclasses import replace
from types import SimpleNamespace

import pytest, torch
from accelerate.utils import DistributedType
from PIL import Image
from transformers import LlavaConfig

from mmu_study import training
from mmu_study.batches import IGNORE, answer_log_probs, ask, encode, rows
from mmu_study.cli import _changes
from mmu_study.evaluation import mean_log_probs
from mmu_study.faceworld import Faceworld
from mmu_study.methods import baselines, manu, mmunlearner, null_space_cvf  # registers them
from mmu_study.methods.unlearning import get, memory_need, on_paper, without_dropout
from mmu_study.models import MLLM, PART_NAMES, PARTS, _positions, lora_layers, tiny, with_lora
from mmu_study.records import ForgetRequest, where
from mmu_study.settings import InputError
from mmu_study.training import TUNINGS, Tuning, finetune, share_of

each_family = pytest.mark.parametrize("family", PARTS)
CONVERSATION = "USER: {}\nASSISTANT: {}"

@pytest.fixture(scope="module")
def world(): return Faceworld(people=4, celebrities=2, holdout=2, strangers=4, views=2)

@pytest.fixture(scope="module")
def request_(world):
    [request] = world.split(25).requests()
    some = lambda records, n: records.select([i for m in ("vqa", "qa") for i in [j for j, (a, k) in enumerate(zip(records["modality"], records["kind"])) if a == m and k == "identity"][:n]])
    return ForgetRequest(some(request.forget, 4), some(request.retain, 4), generic=request.generic.select(range(6)))

@pytest.fixture(scope="module")
def models(world):
    "A model of every family, made once."
    texts, made = [CONVERSATION.format(ask(r), r["answer"]) for r in world.records.remove_columns("image").select(range(200))], {}
    return lambda family: made.setdefault(family, made.get(family) or tiny(family, texts))

PICTURE = Image.effect_noise((50, 40), 90).convert("RGB")  # not square, so that tall and wide are told apart
def question(answer="Lyon.", image=PICTURE, **more): return dict(modality="vqa" if image else "qa", image=image, task="generation", question="Where does the person live?", answer=answer, options=[], uid="q", **more)
def logits(mllm, batch):
    with torch.no_grad(): return mllm.model(**{k: v for k, v in batch.items() if k != "labels"}).logits

# Families

@each_family
def test_prompts_pictures_and_labels(models, family):
    mllm = models(family)
    items = [question(), question("Paris", None), [question("A"), question("Oslo, and utterance")]]
    batch = encode(mllm, items)
    ending = {"idefics": "<end_of_utterance>", "smolvlm": "<end_of_utterance>", "gemma3": "<end_of_turn>"}
    end = next((e for f, e in ending.items() if family.startswith(f)), "</s>")
    said = [mllm.tokenizer.decode(ids[ids != IGNORE]).replace(" ", "") for ids in batch["labels"]]
    assert said == [f"{a}{end}".replace(" ", "") for a in ("Lyon.", "Paris")] + [f"A{end}Oslo,andutterance{end}"]
    mark = mllm.model.config.image_token_id
    shown = (batch["input_ids"] == mark).sum(1)
    assert shown[0] == shown[2] > 0 == shown[1]  # one picture in a conversation, as many tokens as the model reads
    with torch.no_grad(): assert len(torch.cat([*mllm.model.model.get_image_features(**{k: v for k, v in batch.items() if k in null_space_cvf._PIXELS}, return_dict=True).pooler_output])) == shown.sum()
    assert (batch["input_ids"] == mllm.tokenizer.bos_token_id).sum(1).max() <= 1
    prompt = encode(mllm, items[:2], with_answer=False)
    assert "labels" not in prompt
    for i, item in enumerate(items[:2]):  # alone or together, padded or not
        assert torch.allclose(logits(mllm, encode(mllm, [item], with_answer=False))[0, -1], logits(mllm, prompt)[i, -1], atol=1e-4)
    out = mllm.model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert out.shape[1] <= prompt["input_ids"].shape[1] + 3 and torch.equal(out[:, prompt["input_ids"].shape[1]], logits(mllm, prompt)[:, -1].argmax(-1))

@each_family
def test_the_picture_is_read_and_likelihoods_agree(models, family):
    mllm, other = models(family), question(image=PICTURE.rotate(180))
    with torch.no_grad():
        here, there = (answer_log_probs(mllm, encode(mllm, [q])) for q in (question(), other))
        scored = mean_log_probs(mllm, [[question(), question("Paris")], [other, other]])
    assert not torch.allclose(here[0], there[0], atol=1e-6)
    assert scored[0, 0] == pytest.approx(float(here[0].sum()/here[1].sum()), abs=1e-4) and scored[1] == pytest.approx([float(there[0].sum()/there[1].sum())]*2, abs=1e-4)

# LoRA by path

@each_family
def test_lora_stays_in_its_part(models, family):
    mllm = models(family)
    for part in PART_NAMES:
        linear = {n for n, m in mllm.model.named_modules() if isinstance(m, torch.nn.Linear) and f"{n}.weight" in mllm.parts[part]}
        if part == "projector" and not linear:
            with pytest.raises(InputError, match="^There is no linear layer in projector"): lora_layers(mllm, (part,))
            continue
        assert {*lora_layers(mllm, (part,))} == linear - {"lm_head"}
        own = mllm.copy()
        lora = with_lora(own, 2, (part,))
        wrapped = {n.split("base_model.model.")[1].rsplit(".lora_A", 1)[0] for n, _ in lora.named_parameters() if ".lora_A." in n}
        assert wrapped == linear - {"lm_head"} and not any(w in n for n in wrapped for w in ("lm_head", "embed_tokens"))

def test_lora_on_single_layers_of_a_part(models):
    found = lora_layers(models("llava"), ("language", "vision:q_proj"))
    assert {n for n in found if "vision" in n} == {f"model.vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert len(found) == 2 + 2*7 and lora_layers(models("llava"), ("language:v_proj",)) == [f"model.language_model.layers.{i}.self_attn.v_proj" for i in (0, 1)]

def test_a_layer_that_is_not_there(models):
    "MLLMU-Bench's preset names layers of LLaVA's vision tower; a Qwen2-VL has query, key and value in one, to be named with --set."
    mllm, preset = models("qwen2_vl"), TUNINGS["mllmu"]
    with pytest.raises(InputError, match="^There is no linear layer 'q_proj' for LoRA in the vision part of this qwen2_vl model, which has fc1, fc2, proj, qkv.$"): lora_layers(mllm, preset.lora_on)
    named = replace(preset, **_changes(Tuning, ["lora_on=[language, vision:qkv]"]))
    assert [n for n in lora_layers(mllm, named.lora_on) if "visual" in n] == [f"model.visual.blocks.{i}.attn.qkv" for i in (0, 1)]

# Methods

STEPS, WHOLE = dict(steps=2, lr=1e-3, batch_size=2), dict(lora=0, parts=())
ONE = dict(GradDiff=STEPS | WHOLE, NPO=STEPS | WHOLE, MMUnlearner=dict(STEPS, scope="both"), MANU=dict(alpha=20.), CVFNCU=dict(STEPS, anchor="centroid", lambda_ret=1., threshold=.5, levels=("projector",)))
def method(name, **more): return get(name, {"CVFNCU": "reconstruction"}.get(name, "paper"), **{**ONE[name], **more})

@each_family
@pytest.mark.parametrize("name", ONE)
def test_methods(models, request_, family, name, tmp_path):
    mllm = models(family)
    before = {n: p.clone() for n, p in mllm.model.named_parameters()}
    done = method(name).unlearn(mllm, request_)
    assert all(torch.equal(p, before[n]) for n, p in mllm.model.named_parameters())
    norms = done.diagnostics["update_norm"]
    moved = {part for part, norm in norms.items() if norm > 0}
    assert moved == {"MANU": {"vision", "language"}, "CVFNCU": {"vision"} if family == "gemma3" else {"vision", "projector"}}.get(name, {*PART_NAMES})
    if name in ("NPO", "MANU"):
        again = MLLM.load(done.mllm.save(tmp_path/"x"))
        batch = encode(mllm, [question(), question(image=None)])
        assert all(torch.equal(v, encode(again, [question(), question(image=None)])[k]) for k, v in batch.items())
        assert torch.equal(logits(again, batch), logits(done.mllm, batch)) and not torch.equal(logits(mllm, batch), logits(done.mllm, batch))

@each_family
def test_features_are_what_the_language_model_reads_of_each_picture(models, family):
    mllm, other = models(family), question(image=PICTURE.rotate(90, expand=True).resize((50, 40)))
    batch, alone = encode(mllm, [question(), other]), [encode(mllm, [q]) for q in (question(), other)]
    try:
        with torch.no_grad(): features, apart = null_space_cvf.visual_features(mllm, batch), [null_space_cvf.visual_features(mllm, b) for b in alone]
    except InputError as e:
        assert family == "internvl" and "cut into several crops" in str(e)
        return
    with torch.no_grad(): out = mllm.model(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True)
    assert torch.allclose(out.hidden_states[0][batch["input_ids"] == mllm.model.config.image_token_id], torch.cat(features["projector"]), atol=1e-5)
    for level in null_space_cvf.LEVELS:
        assert len(features[level]) == 2
        for i in (0, 1): assert torch.allclose(features[level][i], apart[i][level][0], atol=1e-5)

def test_padded_pictures(models):
    "An Idefics2 pads smaller pictures of a batch: MANU does not count what was filled up, CVF refuses."
    mllm = models("idefics2")
    batch = encode(mllm, [question(), question(image=PICTURE.resize((40, 40))), question(image=None)])
    valid = manu._patches(batch, 8)  # 48 × 38 and 40 × 40 pixels, in 48 × 40, in patches of 8
    assert valid.sum(1).tolist() == [6*4, 5*5] and valid.view(2, 5, 6)[0, :4].all() and valid.view(2, 5, 6)[1, :, :5].all()
    with pytest.raises(InputError, match="^Pictures of different sizes were padded for this idefics2 model"): null_space_cvf.visual_features(mllm, batch)

# Loading

@pytest.fixture(scope="module")
def folder(models, tmp_path_factory): return models("llava").save(tmp_path_factory.mktemp("folder")/"llava")

@pytest.fixture
def broken(folder, tmp_path): return shutil.copytree(folder, tmp_path/"broken")

def refused(folder, match, **options):
    with pytest.raises(InputError, match=match) as e: MLLM.load(folder, **options)
    assert str(e.value).rstrip(".").count(". ") == 0 and "\n" not in str(e.value)  # one sentence

def test_a_missing_shard(models, tmp_path):
    models("llava").model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(p.name for p in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    (tmp_path/shards[1]).unlink()
    refused(tmp_path, f"lacks {shards[1]}, which its index names")

def test_pickled_weights(broken):
    (broken/"model.safetensors").rename(broken/"pytorch_model.bin")
    refused(broken, "as pickle .pytorch_model.bin., which can run any code")

def test_a_tokenizer_without_the_image_token(broken):
    config = json.loads((broken/"config.json").read_text())
    config["image_token_index"] = 10
    (broken/"config.json").write_text(json.dumps(config))
    refused(broken, "where the model has its image token .number 10., so it is not this model's")

def test_the_tokenizer_of_a_larger_vocabulary(models, broken):
    own = models("llava").copy()
    own.model.resize_token_embeddings(50)
    own.model.save_pretrained(broken)
    refused(broken, "tokens and the model only 50, so it is not this model's")

def test_the_processor_of_another_model(models, broken):
    models("llava_next").processor.save_pretrained(broken)
    refused(broken, "has a 'llava' model, but a LlavaNextProcessor, which belongs to llava_next")

def test_no_processor(broken):
    for p in broken.glob("*"):
        if p.name not in ("config.json", "generation_config.json", "model.safetensors"): p.unlink()
    refused(broken, "^The processor of .* cannot be loaded: ")

def test_quantization_that_cannot_be(folder, monkeypatch):
    refused(folder, "There is no quantization 'int4'; choose nf4 or int8", quantize="int4")
    with monkeypatch.context() as m:
        m.setattr("importlib.util.find_spec", lambda name: None)
        refused(folder, "needs the package bitsandbytes", quantize="int8")

@pytest.mark.parametrize("kind, off", [("nf4", .3), ("int8", .05)])
def test_rounded_by_bitsandbytes(folder, request_, kind, off, tmp_path):
    pytest.importorskip("bitsandbytes")
    exact, mllm = MLLM.load(folder), MLLM.load(folder, quantize=kind)
    batch, bytes_of = encode(exact, [question()]), lambda m: sum(p.numel()*p.element_size() for p in m.model.parameters())
    assert bytes_of(mllm) < .7*bytes_of(exact)
    with torch.no_grad(): assert mean_log_probs(mllm, [[question()]]) == pytest.approx(mean_log_probs(exact, [[question()]]), abs=.5)
    before, there = logits(mllm, batch), logits(exact, batch)
    assert 0 < (before - there).norm() < off*there.norm()
    for name in ("GradDiff", "NPO"):
        done = method(name, lora=2, steps=3, lr=1e-2).unlearn(mllm, request_)
        assert not torch.allclose(logits(done.mllm, batch), before, atol=1e-4)
    assert torch.allclose(logits(mllm, batch), before, atol=1e-5)  # it was left alone
    for name in ONE:
        with pytest.raises(InputError, match="weights, such as .*, were rounded by `quantize` and cannot be changed; use a method with LoRA"): method(name).unlearn(mllm, request_)
    again = MLLM.load(done.mllm.save(tmp_path/"kept"))
    assert torch.allclose(logits(again, batch), logits(done.mllm, batch), atol=1e-4)

def test_rounded_weights_are_not_trained(models):
    own = models("llava").copy()
    own.model.lm_head.weight = torch.nn.Parameter(own.model.lm_head.weight.to(torch.int8), requires_grad=False)  # as bitsandbytes holds them
    own.train_only("projector")
    with pytest.raises(InputError, match="^1 weights, such as lm_head.weight, were rounded by `quantize` and cannot be changed; use a method with LoRA, or load the model without `quantize`.$"): own.train_only("language")

def test_a_device_map_is_passed_through(folder, models):
    assert MLLM.load(folder, device_map={"": "meta"}).device.type == "meta"
    mllm = MLLM.load(folder, device_map="cpu")
    assert torch.equal(logits(mllm, batch := encode(mllm, [question()])), logits(models("llava"), batch))

CHECKPOINTED = {  # method and overrides, and forward passes that take a gradient
    "GradDiff": ("GradDiff", {}, 2*2), "saliency": ("MMUnlearner", dict(steps=0, check=False), 4), "taylor": ("MANU", dict(rank_by="taylor", batch_size=4), 4), "CVFNCU": ("CVFNCU", {}, 2)}

@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics2"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_is_honoured_and_changes_nothing(models, request_, family, name, tmp_path, monkeypatch):
    import transformers.modeling_utils as utils
    called, plain = [], utils.checkpoint
    monkeypatch.setattr(utils, "checkpoint", lambda *a, **k: (called.append(1), plain(*a, **k))[1])
    mllm = MLLM.load(models(family).save(tmp_path/"x"), checkpointing=True)
    name, fields, forwards = CHECKPOINTED[name]
    once = method(name, **fields).unlearn(models(family), request_)
    assert not called
    again = method(name, **fields).unlearn(mllm, request_)
    assert len(called) >= 2*forwards  # of two layers
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(once.mllm.model.parameters(), again.mllm.model.parameters()))
    if fields.get("steps") == 0: assert again.diagnostics["mask"]["groups"] == pytest.approx(once.diagnostics["mask"]["groups"], abs=.01)
    called.clear()
    logits(mllm, encode(mllm, [question()]))
    assert not called and not any(m.training for m in mllm.model.modules())

def test_without_dropout_nothing_is_dropped_also_where_activations_are_computed_twice(models):
    noisy, batch = models("llava").copy(), encode(models("llava"), [question()])
    for layer in noisy.model.model.language_model.layers: layer.self_attn.attention_dropout = .5
    noisy.checkpoint(); noisy.model.train(); noisy.model.lm_head.eval()
    before, expected = [m.training for m in noisy.model.modules()], logits(models("llava"), batch)
    assert not torch.equal(logits(noisy, batch), expected)
    with without_dropout(noisy): assert torch.equal(logits(noisy, batch), expected)
    assert before == [m.training for m in noisy.model.modules()]
    noisy.model.model.language_model.layers[0].dropout = .1  # as in layers that drop their own output
    with pytest.raises(InputError, match="^LlamaDecoderLayer drops 0.1 of its activations"), without_dropout(noisy): pass

def test_lora_next_to_rounded_weights(models, request_):
    mllm = models("llava").copy()
    mllm.model.model.language_model.norm.register_parameter("rounded", torch.nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    done = method("GradDiff", lora=2).unlearn(mllm, request_)
    assert done.diagnostics["update_norm"]["language"] > 0 and {p.requires_grad for n, p in done.mllm.model.named_parameters() if "rounded" not in n} == {True}
    moved = sum(int((p != dict(mllm.model.named_parameters())[n]).sum()) for n, p in done.mllm.model.named_parameters())
    assert done.diagnostics["changed_share"] == moved/sum(p.numel() for n, p in mllm.model.named_parameters() if "rounded" not in n)

def test_bf16_weights_are_moved_as_fp32(models, request_):
    "A step of 1e-5 is smaller than the distance of two bf16 numbers; a hundred of them are not."
    low = models("qwen2_5_vl").copy()
    low.model.to(torch.bfloat16)
    work = (gentle := method("GradDiff", lr=1e-5, steps=3))._begin(low, request_, None)
    assert {w.dtype for w in work.weights.values()} == {torch.float32} and {p.dtype for p in work.mllm.model.parameters()} == {torch.bfloat16}
    done = gentle.unlearn(low, request_)
    assert 0 < done.diagnostics["changed_share"] < .9 and {p.dtype for p in done.mllm.model.parameters()} == {torch.bfloat16}

# Fine-tuning

@pytest.fixture(scope="module")
def taught(request_): return request_.retain  # four questions with a picture, four without

@pytest.mark.parametrize("preset", TUNINGS)
def test_every_tuning_runs_and_changes_what_it_says(models, taught, preset):
    mllm, tuning = models("llava").copy(), replace(TUNINGS[preset], epochs=1, batch_size=2, accumulation=1, lr=1e-3)
    log = finetune(mllm, taught, tuning, progress=False)
    assert len(log) == (4 if tuning.modalities == ("vqa", "qa") and not tuning.paired else 2) == len(tuning.orders(taught))
    moved = {n for n, p in mllm.model.named_parameters() if not torch.equal(p, dict(models("llava").model.named_parameters())[n])}
    expected = {f"{n}.weight" for n in lora_layers(mllm, tuning.lora_on)} if tuning.lora else {n for part in tuning.parts for n in mllm.parts[part]}
    assert moved <= expected and {n for n in expected if "language" in n and "norm" not in n and "embed" not in n} <= moved
    assert {n for n in moved if "vision" in n} == {n for n in expected if "vision_tower.encoder.layers.0" in n}  # a LLaVA does not read the last layer of two

def test_accumulation_is_the_mean_of_batches_and_pairs_are_a_sum(models, taught):
    "A step on two accumulated batches of one record is a step on their mean loss; a pair adds its two losses."
    mllm = models("llava")
    loss = lambda *index: -(lambda l, a: l.sum()/a.sum())(*answer_log_probs(mllm, encode(mllm, rows(taught, index)))).item()
    one = Tuning(lr=1e-9, epochs=1, batch_size=1, accumulation=8, parts=("language",))
    assert finetune(mllm.copy(), taught, one, progress=False).loss.item() == pytest.approx(sum(loss(i) for i in range(8))/8, rel=1e-4)
    pair = replace(one, paired=True, batch_size=4, accumulation=1)
    assert finetune(mllm.copy(), taught, pair, progress=False).loss.item() == pytest.approx(loss(*range(4)) + loss(*range(4, 8)), rel=1e-4)
    everything = finetune(mllm.copy(), taught, replace(one, batch_size=8, accumulation=1, loss_on="all"), progress=False).loss.item()
    batch = encode(mllm, rows(taught, range(8)))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    with torch.no_grad(): assert everything == pytest.approx(mllm.model(**{**batch, "labels": labels}).loss.item(), rel=1e-4)  # but for the first token, which nothing predicts

@pytest.mark.parametrize("schedule, expected", [("linear", [1/2, 1, 1, 3/4, 2/4, 1/4]), ("cosine", [1/2, 1, 1, .853553, .5, .146447])])
def test_schedules(schedule, expected):
    tuning = Tuning(lr=1., epochs=1, batch_size=1, schedule=schedule, warmup=1/3)
    assert [tuning.factor(s, 6) for s in range(6)] == pytest.approx(expected, abs=1e-5)

def test_bad_tunings(taught):
    with pytest.raises(InputError, match="it must be answer or all"): Tuning(lr=1, epochs=1, batch_size=1, loss_on="prompt")
    with pytest.raises(InputError, match="must be positive"): Tuning(lr=1, epochs=0, batch_size=1)
    with pytest.raises(InputError, match="no part or modality audio"): Tuning(lr=1, epochs=1, batch_size=1, modalities=("audio",))
    with pytest.raises(InputError, match="^language is trained in full .parts. and has adapters .lora_on.; name it in one of the two.$"): Tuning(lr=1, epochs=1, batch_size=1, lora=2, lora_on=("language:q_proj",), parts=("projector", "language"))
    with pytest.raises(InputError, match="learns from vqa records"): Tuning(lr=1, epochs=1, batch_size=1, modalities=("vqa",)).orders(where(taught, modality="qa"))

def test_fine_tuning_in_bf16_moves_fp32_copies_and_goes_on_exactly(models, taught, tmp_path):
    "What is trained is moved in fp32, weights stay in bf16, and a run that stops goes on as if it had not."
    low = models("llava").copy()
    low.model.to(torch.bfloat16)
    tuning = Tuning(lr=1e-3, epochs=2, batch_size=2, parts=("language",))
    once, stopped, done = low.copy(), low.copy(), []
    finetune(once, taught, tuning, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmu_study.training._checkpoint", lambda a, folder, log, real=training._checkpoint: (real(a, folder, log), (_ for _ in ()).throw(KeyboardInterrupt) if len(log) == 5 else 0))
        with pytest.raises(KeyboardInterrupt): finetune(stopped, taught, tuning, checkpoint=tmp_path/"c", every=5, progress=False)
    again = low.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_batch", lambda *a, real=training._batch: (done.append(1), real(*a))[1])
        log = finetune(again, taught, tuning, checkpoint=tmp_path/"c", every=5, progress=False)
    assert len(log) == 8 == 5 + len(done) and {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, q) for p, q in zip(once.model.parameters(), again.model.parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(once.model.parameters(), low.model.parameters()))

def test_lora_on_a_model_with_rounded_weights(models, taught):
    own = models("llava").copy()
    layer = own.model.model.vision_tower.encoder.layers[1].mlp.fc1  # of the vision tower, which text does not reach
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)  # as bitsandbytes holds them
    finetune(own, where(taught, modality="qa"), Tuning(lr=1e-3, epochs=1, batch_size=4, lora=2), progress=False)
    assert all(p.requires_grad == p.is_floating_point() for p in own.model.parameters()) and not layer.weight.is_floating_point()

# Memory

FIT = dict(GradDiff=method("GradDiff"), LoRA=method("GradDiff", lora=4), MMUnlearner=method("MMUnlearner"), bare=method("MMUnlearner", master=False), CVFNCU=method("CVFNCU"))

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FIT)
def test_memory_is_what_the_tensors_take(models, request_, name, dtype, monkeypatch):
    mllm, chosen, seen = models("llava").copy(), FIT[name], {}
    mllm.model.to(dtype)
    bytes_of = lambda tensors: sum(t.numel()*t.element_size() for t in tensors)
    plain = type(chosen)._step
    def step(self, work, optimizer, forget, retain):
        logged = plain(self, work, optimizer, forget, retain)
        moved = [*work.weights.values()]
        parameters = dict(work.mllm.model.named_parameters())
        seen.update(low={n for n, w in work.weights.items() if w is not parameters[n]}, model=bytes_of(mllm.model.parameters()), AdamW=bytes_of(t for s in optimizer.state.values() for t in s.values()), moved=moved, work=work)
        return logged
    monkeypatch.setattr(type(chosen), "_step", step)
    chosen.unlearn(mllm, request_)
    need, work = memory_need(mllm, chosen), seen["work"]
    assert need["model"] == need["copy"] == seen["model"] and need["total"] == sum(v for k, v in need.items() if k != "total")
    low = seen["low"]
    copies, adapters = bytes_of(w for n, w in work.weights.items() if n in low), bytes_of(work.weights.values())
    if name == "LoRA": assert (need["adapters"], need["fp32 copies"]) == (adapters, 0) and not low
    if name in ("MMUnlearner", "bare"): assert need["mask"] == sum(len(b) for b in work.prepared.bits.values())
    if name == "CVFNCU":  # layers that nobody reads are counted, too
        unread = [n for n in chosen.trained(mllm) if n not in work.prepared.layers]
        assert unread and all("layers.1." in n for n in unread)
        assert need["start of layers"] == bytes_of(work.prepared.start.values()) + 4*sum(dict(mllm.model.named_parameters())[n].numel() for n in unread)
        assert need["second moments"] == bytes_of(work.prepared.moments.values()) + 4*sum(dict(mllm.model.named_parameters())[n].shape[1]**2 for n in unread if not n.endswith(("k_proj.weight", "v_proj.weight")))
        assert need["null spaces"] >= bytes_of(s.basis for s in work.prepared.spaces.values())
    else:
        state = bytes_of(t for t in seen["moved"])*2 + 4*len(seen["moved"])
        unread = [w for n, w in work.weights.items() if "vision_tower.encoder.layers.1." in n or "post_layernorm" in n]  # of a LLaVA; what no gradient reaches has no state
        assert need["AdamW"] == state and need["gradients"] == bytes_of(seen["moved"]) and need["fp32 copies"] == copies
        assert unread and need["AdamW"] - seen["AdamW"] == sum(2*bytes_of([w]) + 4 for w in unread)
        if name == "bare": assert not low and {w.dtype for w in seen["moved"]} == {dtype}

def test_memory_of_a_model_that_is_only_a_configuration():
    paper = on_paper(LlavaConfig())
    # a vocabulary of 32,000; the released checkpoint's has 64 more
    assert paper.device.type == "meta" and sum(p.numel() for p in paper.model.parameters()) == 7_062_902_784
    need = memory_need(LlavaConfig(), method("GradDiff", parts=("language",)))
    language = sum(p.numel() for _, p in paper.parameters("language"))
    assert need["model"] == 2*7_062_902_784 and need["AdamW"] == 8*language + 4*len(paper.parts["language"]) and need["fp32 copies"] == need["gradients"] == 4*language

# One process and several

def test_one_process_leaves_the_model_where_it_is(models):
    mllm = models("llava").copy()
    mllm.model.to("meta")  # in place of a second GPU
    accelerator = training._accelerator(mllm)
    assert accelerator.device.type != "meta" == accelerator.prepare(mllm.model).device.type

def test_shares_cover_a_batch_and_go_through_the_same_layers():
    pictured = torch.tensor([True, True, True, False, False, False, False]).numpy()
    talks = [[i] for i in (0, 3, 1, 4, 5, 2, 6)]
    for n in (1, 2, 4):
        shares = [share_of(talks, pictured, rank, n) for rank in range(n)]
        assert sorted(t[0] for s in shares for t, counts in s if counts) == [*range(7)]
        assert all({bool(pictured[t[0]]) for t, _ in s} == {True, False} for s in shares)
    assert share_of([[3]], pictured, 1, 2) == [([3], False)]

def test_a_sharded_qwen_is_a_qwen_again(models):
    mllm = models("qwen2_vl").copy()
    sharded = mllm.model
    training._whole(SimpleNamespace(distributed_type=DistributedType.FSDP, is_main_process=True, get_state_dict=lambda m: m.state_dict()), sharded, mllm)
    assert mllm.model is not sharded and _positions in mllm.model.model._forward_pre_hooks.values()

WORKER = """
import os, sys
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from datasets import load_from_disk
from mmu_study import training
from mmu_study.models import MLLM
folder, out = sys.argv[1:3]
if "sharded" in out:  # accelerate shards on GPUs only; this tells it to do so here, too
    make = training._accelerator
    def sharding(mllm):
        made = make(mllm)
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=["LlamaDecoderLayer", "CLIPEncoderLayer"], reshard_after_forward=True)
        for state in (made.state, PartialState()): state._shared_state["distributed_type"] = DistributedType.FSDP
        return made
    training._accelerator = sharding
mllm, done, batch = MLLM.load(folder + "/model"), [], training._batch
training._batch = lambda *a: (done.append(1), batch(*a))[1]
log = training.finetune(mllm, load_from_disk(folder + "/records"), training.Tuning(lr=1e-3, epochs=2, batch_size=3, accumulation=2), checkpoint=out + ".training", every=3, progress=False)
print("KIND", type(mllm.model).__name__, "BATCHES", len(done))
if PartialState().is_main_process:
    with open(out + ".log", "x") as f: f.write(" ".join(f"{l:.5f}" for l in log.loss))
    mllm.save(out)
"""

def test_two_processes_end_where_one_does(models, taught, tmp_path):
    "Replicated and sharded: the same losses and weights as alone, written by one process, and put together again."
    models("llava").save(tmp_path/"model"); taught.save_to_disk(tmp_path/"records")
    def start(out, rank, port):
        env = os.environ | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
        return subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(tmp_path/out)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with socket.socket() as a, socket.socket() as b:
        for s in (a, b): s.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in (a, b)]
    running = [start(out, rank, port) for out, port in zip(("replicated", "sharded"), ports) for rank in (0, 1)]
    alone = models("llava").copy()
    log = finetune(alone, taught, Tuning(lr=1e-3, epochs=2, batch_size=3, accumulation=2), progress=False)
    def finish(process):
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err[-2000:]
        return out
    said = [finish(process) for process in running]
    assert ["KIND FSDP" in out for out in said] == [False, False, False, True]  # only the main one has a sharded model as a whole
    assert all("BATCHES 6" in out for out in said)
    (tmp_path/"sharded.training").rename(tmp_path/"sharded_again.training")  # of the third step of four; the last has one batch
    running = [start("sharded_again", rank, ports[0]) for rank in (0, 1)]
    assert all("BATCHES 1" in finish(process) for process in running)
    for name in ("replicated", "sharded", "sharded_again"):
        assert [float(l) for l in (tmp_path/f"{name}.log").read_text().split()] == pytest.approx(log.loss.tolist(), abs=2e-5)
        there = dict(MLLM.load(tmp_path/name).model.named_parameters())
        assert all(torch.allclose(p, there[n], atol=2e-5) for n, p in alone.model.named_parameters())
        assert (tmp_path/f"{name}.training/log.csv").is_file() == (name != "sharded") and not list(tmp_path.glob(".sharing*"))
