"Every family, tiny: parts, prompts, labels, LoRA by path, methods, saving; loading with what can go wrong; fine-tuning recipes; memory."
import json, shutil, warnings

import pytest, torch
from PIL import Image

from mmu_study.batches import IGNORE, answer_log_probs, ask, encode
from mmu_study.evaluation import mean_log_probs
from mmu_study.faceworld import Faceworld
from mmu_study.methods import baselines, manu, mmunlearner, null_space_cvf  # registers them
from mmu_study.methods.unlearning import get
from mmu_study.models import MLLM, PART_NAMES, PARTS, lora_layers, tiny, with_lora
from mmu_study.records import ForgetRequest, where
from mmu_study.settings import InputError

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
