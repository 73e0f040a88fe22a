"Evaluation: the rules on made-up replies, the numbers against plain transformers, and nothing that depends on batches or stays behind."
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Image
from rouge_score.rouge_scorer import RougeScorer

from mmu_study import evaluation
from mmu_study.batches import ask, encode, prompt_of
from mmu_study.evaluation import accuracy_by, candidates, contains, evaluate, has_words, judge, letter_of, rouge_l
from mmu_study.faceworld import Faceworld
from mmu_study.models import MLLM, TinyLlava, tiny_llava
from mmu_study.records import SHORT, table, to_records, where
from mmu_study.runs import SCORE_COLUMNS
from mmu_study.settings import InputError
from mmu_study.training import Recipe, finetune

@pytest.fixture(scope="module")
def world(): return Faceworld.preset("smoke", strangers=9, views=4)

@pytest.fixture(scope="module")
def questions(world):
    "Every third profile question of two people, and some of what pictures show and of the world: all tasks and modalities."
    profile = where(world.records, entity=["fictitious-000", "fictitious-001"], fold="test")
    profile = profile.select(range(0, len(profile), 3))
    world_facts, perception = (where(world.records, role="general", fold="test", kind=k).select(range(12)) for k in ("world", "perception"))
    return to_records([r for part in (profile, world_facts, perception) for r in _raw(part)])

def _raw(records):
    "Rows with their pictures still encoded, as `to_records` takes them."
    return list(records.cast_column("image", Image(decode=False)))

@pytest.fixture(scope="module")
def mllm(world, questions):
    "A model that has read some of the answers, so that it writes words and ends, and not all, so that it is not always right."
    texts = [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image").select(range(1500))]
    made = tiny_llava(TinyLlava(vision_layers=2, layers=2), texts)
    known = where(questions, entity=["fictitious-000"])
    short = [dict(c, uid=f"{c['uid']}/short", options=[]) for r in _raw(known) for c in candidates(r) if r["options"] and c["answer"] == r["value"]]
    finetune(made, to_records(_raw(known) + short), Recipe(steps=100, tokens=1000), progress=False)
    return made

@pytest.fixture(scope="module")
def scores(mllm, questions): return evaluate(mllm, questions)

def aligned(scores): return scores.sort_values(["uid", "metric"]).reset_index(drop=True)

# The table

def test_columns_and_rows(questions, scores):
    assert list(scores) == [*SCORE_COLUMNS, "unseen"]
    assert scores.uid.drop_duplicates().tolist() == questions["uid"][:]  # in the order of the records
    metrics = dict(classification={"accuracy", "letter", "valid", "probability"}, generation={"accuracy", "rouge_l", "probability"}, cloze={"accuracy", "probability"})
    for (_, task), metric in scores.groupby(["uid", "task"]).metric: assert sorted(metric) == sorted(metrics[task])
    assert {*scores.groupby(["task", "modality"]).groups} == {(t, m) for t in metrics for m in ("vqa", "qa")}

def test_values_and_kinds_of_columns(questions, scores):
    assert scores.value.between(0, 1).all() and scores.value.dtype == float
    assert scores[scores.metric.isin(["accuracy", "letter", "valid"])].value.isin([0, 1]).all()
    assert scores.prediction.map(type).eq(str).all() and scores.unseen.dtype == bool
    meta = table(questions).set_index("uid")
    for column in ("entity", "role", "fold", "modality", "task", "fact", "kind", "view", "unseen"): assert (scores[column].to_numpy() == meta.loc[scores.uid, column].to_numpy()).all()

def test_learned_answers_are_right(scores):
    known = scores[(scores.entity == "fictitious-000") & ~scores.unseen]
    assert (accuracy_by(known, ("task",)) > .8).all().all()
    assert known[known.metric == "probability"].value.mean() > .8
    assert known[known.metric == "rouge_l"].value.mean() > .9
    stranger = scores[(scores.entity == "fictitious-001") & (scores.metric == "accuracy") & (scores.task != "classification")]
    assert stranger.value.mean() < .3

def test_a_split_means_what_it_scores(world, mllm, monkeypatch):
    split = world.split(25, 0)
    monkeypatch.setitem(split.__dict__, "score", where(split.score, entity=list(split.forget_entities)[:1], modality="qa", task="cloze"))
    scores = evaluate(mllm, split)
    assert scores.uid.drop_duplicates().tolist() == split.score["uid"][:] and {*scores.role} <= {"forget", "test"}

# Against plain transformers: every question alone, without padding, by the model's own loss and generate

def _alone(mllm, record, answer=None):
    "Prompt ids and, with an answer, the loss that transformers computes for it."
    prompt = mllm.processor(text=[prompt_of(mllm, record)], images=[record["image"]] if record["modality"] == "vqa" else None, return_tensors="pt")
    if answer is None: return prompt
    tail = mllm.tokenizer([f" {answer}</s>"], return_tensors="pt")["input_ids"]
    ids = torch.cat([prompt["input_ids"], tail], 1)
    labels = torch.cat([torch.full_like(prompt["input_ids"], -100), tail], 1)
    return mllm.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=prompt.get("pixel_values"), labels=labels).loss.item()

@torch.inference_mode()
def test_probability_is_exp_of_minus_the_loss(mllm, questions, scores):
    found = scores[scores.metric == "probability"].set_index("uid").value
    for r in questions:
        if not r["options"]: assert found[r["uid"]] == pytest.approx(np.exp(-_alone(mllm, r, r["answer"])), abs=1e-4)

@torch.inference_mode()
def test_options_are_compared_by_their_loss(mllm, questions, scores):
    found = scores[scores.task == "classification"].set_index(["uid", "metric"])
    for r in where(questions, task="classification"):
        question = dict(r, task="generation", question=r["question"] + SHORT)
        loss = [_alone(mllm, question, o) for o in r["options"]]
        assert found.prediction[r["uid"], "accuracy"] == r["options"][int(np.argmin(loss))]
        assert found.value[r["uid"], "probability"] == pytest.approx(np.exp(-loss[r["options"].index(r["value"])]), abs=1e-4)

@torch.inference_mode()
def test_replies_are_those_of_generate(mllm, questions, scores):
    found = scores[scores.metric.isin(["letter", "accuracy"])].drop_duplicates("uid", keep="last").set_index("uid").prediction  # of a classification question: `letter`
    for r in questions:
        prompt = _alone(mllm, r)
        out = mllm.model.generate(**prompt, max_new_tokens=5 if r["options"] else 24, do_sample=False)[0, prompt["input_ids"].shape[1]:]
        assert found[r["uid"]] == mllm.tokenizer.decode(out, skip_special_tokens=True).strip()

# Batches

@pytest.fixture(scope="module")
def many(world):
    "64 questions each of three groups."
    picks = [where(world.records, fold="test", task=t, modality=m) for t, m in (("classification", "vqa"), ("generation", "vqa"), ("cloze", "qa"))]
    return to_records([r for part in picks for r in _raw(part.select(np.linspace(0, len(part) - 1, 64).astype(int)))])

@pytest.fixture(scope="module")
def many_scores(mllm, many): return evaluate(mllm, many)

@pytest.mark.parametrize("tokens, size", [(1, 1), (300, 7), (10_000, 64)])
def test_batches_change_nothing(mllm, many, many_scores, tokens, size):
    batches = evaluation._batches(mllm, many, tokens)
    assert sorted(np.concatenate(batches)) == list(range(len(many)))
    assert .7*size <= np.mean([len(b) for b in batches]) <= 1.4*size
    _same(evaluate(mllm, many, tokens=tokens), many_scores)

@pytest.mark.parametrize("seed", [0, 1])
def test_order_changes_nothing(mllm, questions, scores, seed):
    shuffled = questions.shuffle(seed=seed)
    again = evaluate(mllm, shuffled, tokens=700)
    assert again.uid.drop_duplicates().tolist() == shuffled["uid"][:]
    _same(again, scores)

def _same(a, b):
    a, b = aligned(a), aligned(b)
    pd.testing.assert_frame_equal(a.drop(columns="value"), b.drop(columns="value"))
    np.testing.assert_allclose(a.value, b.value, atol=1e-4, rtol=0)

def test_the_same_call_gives_the_same_bits(mllm, questions, scores): pd.testing.assert_frame_equal(evaluate(mllm, questions), scores, check_exact=True)

def test_untrained_models_too(questions):
    raw = tiny_llava(TinyLlava(vision_layers=2, layers=2), [ask(r) for r in questions], seed=3)
    _same(evaluate(raw, questions, tokens=150, max_new_tokens=8), evaluate(raw, questions, max_new_tokens=8))

@pytest.mark.parametrize("modality", ["vqa", "qa"])
def test_one_question_alone(mllm, questions, scores, modality):
    one = where(questions, modality=modality).select([0])
    _same(evaluate(mllm, one), scores[scores.uid == one["uid"][0]])

def test_a_saved_checkpoint_scores_the_same(mllm, questions, scores, tmp_path):
    pd.testing.assert_frame_equal(evaluate(MLLM.load(mllm.save(tmp_path/"model")), questions), scores, check_exact=True)

# What stays behind

def test_the_model_is_left_as_it_was(mllm, questions, scores):
    model = mllm.copy()
    model.model.train(); model.model.lm_head.eval()  # a mixture, as when a part is frozen
    list(model.parameters("vision"))[0][1].requires_grad_(False)
    look = lambda: ([m.training for m in model.model.modules()], [p.requires_grad for p in model.model.parameters()], model.model.generation_config.to_dict(), torch.get_rng_state().tolist())
    weights, before = {k: v.clone() for k, v in model.model.state_dict().items()}, look()
    evaluate(model, questions)
    assert look() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.model.state_dict().items())
    assert all(p.grad is None for p in model.model.parameters())
    finetune(model, questions.select([0]), Recipe(steps=1), progress=False)  # no tensor made for inference is left where gradients pass

def test_modes_come_back_after_an_error(mllm, questions, monkeypatch):
    model = mllm.copy()
    model.model.train()
    monkeypatch.setattr(evaluation, "replies", lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): evaluate(model, questions)
    assert model.model.training and torch.is_grad_enabled()

def test_greedy_whatever_the_checkpoint_says(mllm, questions, scores):
    model = mllm.copy()
    model.model.generation_config.update(do_sample=True, temperature=5., num_beams=3)
    pd.testing.assert_frame_equal(evaluate(model, questions), scores, check_exact=True)

def test_replies_are_cut(mllm, questions, scores):
    cut = evaluate(mllm, where(questions, task="generation"), max_new_tokens=2)
    whole = scores[(scores.task == "generation")]
    assert all(w.startswith(c) for c, w in zip(cut.prediction, whole.prediction)) and cut.prediction.str.len().max() < whole.prediction.str.len().max()

# Rules

@pytest.mark.parametrize("reply, value, words, within", [
    ("Ada keeps an owl.", "owl", True, True), ("OWL", "owl", True, True), ("owl", "Owl", True, True), ("Ada likes bowling.", "owl", False, True), ("owls", "owl", False, True),
    ("", "owl", False, False), ("ice  cream", "ice cream", False, False), ("ice cream", "ice cream", True, True), ("nice creams", "ice cream", False, True),
    ("the U.S. army", "U.S.", True, True), ("UxSx", "U.S.", False, False), ("(owl)", "owl", True, True), ("snow_owl", "owl", False, True), ("Malmö", "Malm", False, True), ("it cost 150", "15", False, True)])
def test_whole_words_and_containment(reply, value, words, within): assert (has_words(reply, value), contains(reply, value)) == (words, within)

@pytest.mark.parametrize("reply, letter", [("A", "A"), ("d", "D"), (" B: Rome", "B"), ("Cairo", "C"), ("E", ""), ("", ""), ("(A)", ""), ("The answer is A", ""), ("ß", "")])
def test_letters(reply, letter): assert letter_of(reply) == letter

@pytest.mark.parametrize("reply, answer, value", [
    ("Ada lives in Oslo.", "Ada lives in Oslo.", 1), ("Ada lived in Oslo", "ada lives in oslo", 1), ("Oslo", "Ada lives in Oslo.", 2*1*.25/1.25), ("in Oslo Ada lives", "Ada lives in Oslo", .5),
    ("a b c d", "a x c y z", 2*(2/4)*(2/5)/(2/4 + 2/5)), ("", "Ada", 0), ("!", "Ada", 0)])
def test_rouge_by_hand(reply, answer, value): assert rouge_l(reply, answer) == pytest.approx(value)

def test_rouge_is_the_library_s(questions, scores):
    answer = dict(zip(questions["uid"], questions["answer"]))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for s in scores[scores.metric == "rouge_l"].itertuples(): assert s.value == scorer.score(answer[s.uid], s.prediction)["rougeL"].fmeasure

CHOICE = dict(task="classification", modality="qa", question="Which pet?", answer="C", value="owl", options=["cat", "dog", "owl", "cow"])

@pytest.mark.parametrize("p, reply, expected", [
    ([.1, .1, .7, .1], "C", dict(accuracy=1, letter=1, valid=1, probability=.7)),
    ([.1, .1, .7, .1], "cow", dict(accuracy=1, letter=1, valid=1, probability=.7)),  # the benchmark's rule: only the first character counts
    ([.4, .1, .3, .2], "A", dict(accuracy=0, letter=0, valid=1, probability=.3)),
    ([.4, .1, .3, .2], "owl", dict(accuracy=0, letter=0, valid=0, probability=.3))])
def test_multiple_choice(p, reply, expected):
    found = judge(CHOICE, np.log(p), reply)
    assert {m: v for m, (v, _) in found.items()} == pytest.approx(expected)
    assert found["accuracy"][1] == CHOICE["options"][int(np.argmax(p))] and found["letter"][1] == found["valid"][1] == reply

def test_options_are_asked_without_being_shown():
    asked = candidates(CHOICE)
    assert [c["answer"] for c in asked] == CHOICE["options"]
    assert {ask(c) for c in asked} == {"Which pet?\nAnswer briefly."}

@pytest.mark.parametrize("task, expected", [("generation", dict(accuracy=0, rouge_l=.5, probability=.25)), ("cloze", dict(accuracy=1, probability=.25))])
def test_free_replies(task, expected):
    record = dict(task=task, modality="qa", question="Which pet?", answer="owl" if task == "cloze" else "Ada keeps an owl", value="owl", options=[])
    assert candidates(record) == [record]
    assert {m: v for m, (v, _) in judge(record, [np.log(.25)], "Ada keeps snowowls forever").items()} == pytest.approx(expected)

# What is refused

def test_no_records(mllm, questions):
    with pytest.raises(InputError, match="There are no records to evaluate"): evaluate(mllm, questions.select([]))

@pytest.mark.parametrize("change", [dict(answer=""), dict(answer=" \n"), dict(value=""), dict(task="classification", answer="A", value="owl", options=["owl", "cat", "", "cow"])])
def test_nothing_to_compare_with(mllm, questions, change):
    row = next(r for r in _raw(questions) if r["task"] == "cloze")
    with pytest.raises(InputError, match=f"{row['uid']}' has an empty answer, value or option"): evaluate(mllm, to_records([dict(row, **change)]))

def test_weights_that_are_not_finite(mllm, questions):
    broken = mllm.copy()
    with torch.no_grad(): broken.model.lm_head.weight[5] = torch.nan
    with pytest.raises(InputError, match="its weights must be finite"): evaluate(broken, questions)

# Means

def test_accuracy_by():
    scores = pd.DataFrame([dict(role=role, task=task, metric=metric, value=value) for role, task, metric, value in [
        ("forget", "cloze", "accuracy", 1.), ("forget", "cloze", "accuracy", 0.), ("forget", "generation", "accuracy", 1.), ("retain", "cloze", "accuracy", 1.), ("retain", "cloze", "probability", .3)]])
    means = accuracy_by(scores, ("role", "task"))
    assert means.loc["forget"].to_dict() == dict(cloze=.5, generation=1.)
    assert means.loc["retain", "cloze"] == 1 and np.isnan(means.loc["retain", "generation"])
    assert accuracy_by(scores, ("role", "task"), "probability").loc["retain", "cloze"] == .3
    assert accuracy_by(scores, ("role",)).loc["accuracy"].to_dict() == dict(forget=2/3, retain=1.)
    with pytest.raises(InputError, match="No score has metric 'bleu'; there are accuracy, probability."): accuracy_by(scores, ("role",), "bleu")
    with pytest.raises(InputError, match="Scores have no column kind, view; there are role, task, metric, value."): accuracy_by(scores, ("kind", "role", "view"))
