"The benchmarks' own scores: formulas by hand, released prompts to the letter, and runs on miniatures that are the same twice and leave the model as it was."
import numpy as np
import pandas as pd
import pytest
import torch

from mmu_study import benchmark_scores
from mmu_study.batches import ask
from mmu_study.benchmark_scores import (SHOTS, bleu, circular_accuracy, clear_report, clear_tasks, companion_scores, compare_answers, draw_shots, exact_match, fiubench_report, first_sentence, pope_report,
    released_judge, released_prompt, released_scores, rouge_recall, umu_report)
from mmu_study.benchmarks import load_benchmark, write_miniature
from mmu_study.evaluation import evaluate, mean_log_probs, scoring_mode
from mmu_study.faceworld import Faceworld
from mmu_study.models import TinyLlava, tiny, tiny_llava
from mmu_study.records import Split, table, to_records, where
from mmu_study.settings import InputError

@pytest.fixture(scope="module", autouse=True)
def study(tmp_path_factory):
    "Pictures are kept in a cache of these tests' own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMU_STUDY_ROOT", str(tmp_path_factory.mktemp("study")))
        yield

@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    "Small parts of the miniatures: every role, three people each."
    root, world = tmp_path_factory.mktemp("miniatures"), Faceworld.preset("smoke", views=4, strangers=9)
    of = {name: load_benchmark(name, write_miniature(name, root/name, world), forget_pct=15 if name in ("mllmu", "umu") else 10) for name in ("mllmu", "clear", "umu", "fiubench")}
    def part(split):
        meta = table(split.records)
        kept = {e for _, entities in meta.groupby("role").entity.unique().items() for e in entities[:3]}
        some = np.sort(meta[meta.entity.isin(kept)].groupby(["role", "entity", "fold", "unseen", "modality", "task"]).head(2).index)
        return Split(split.records.select(some), split.forget_pct, split.seed, split.companion)
    return {name: part(split) for name, split in of.items()}

@pytest.fixture(scope="module")
def mllm(splits): return tiny_llava(TinyLlava(vision_width=32, vision_layers=2, width=32, layers=1), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for s in splits.values() for r in s.records.remove_columns("image")])

# Released words and counts

CHOICE = dict(task="classification", modality="vqa", question="Where?", answer="B", value="Rome", options=["Oslo", "Rome", "Paris", "Lima"], role="forget")
CLOZE = dict(task="cloze", modality="vqa", question="He is in __.", answer="St. Ives.", value="St. Ives", options=[], role="forget")
SAY = dict(task="generation", modality="vqa", question="Who?", answer="It is him.", value="It is him.", options=[], role="forget")
text = lambda r: dict(r, modality="qa")

def test_released_prompts():
    abcd, one = "A: Oslo\nB: Rome\nC: Paris\nD: Lima\n", "Just give ONE letter representing the answer directly.\nASSISTANT:"
    blank, say = "He is in [Blank].\nPlease **ONLY** provide the correct answer that should replace the [Blank].\nASSISTANT:", "Who?\nAnswer the question based on your trained knowledge in one sentence"
    expected = dict(
        mllmu=[(CHOICE, "USER: <image>\nWhere?\n" + abcd + one), (text(CHOICE), "USER:\nWhere?\n" + abcd + one), (CLOZE, "USER: <image>\n" + blank), (text(CLOZE), "USER: " + blank),
            (SAY, f"USER: <image>\n{say} accurately in ENGLISH.\nASSISTANT: "), (text(SAY), f"USER: {say} in ENGLISH.\nASSISTANT:")],
        umu=[(CHOICE, "USER: <image>\nWhere?\nSelect answer in ['Oslo', 'Rome', 'Paris', 'Lima']\nASSISTANT:"), (text(CHOICE), "USER:\nWhere?\nSelect answer in ['Oslo', 'Rome', 'Paris', 'Lima']\nASSISTANT:"),
            (text(CLOZE), "USER: He is in __.\nPlease **ONLY** provide the correct answer without any explanation\nASSISTANT:"), (SAY, f"USER: <image>\n{say} accurately in ENGLISH.\nASSISTANT: "), (text(SAY), f"USER: {say} in ENGLISH.\nASSISTANT:")])
    for benchmark, pairs in expected.items():
        for record, prompt in pairs: assert released_prompt(benchmark, record) == prompt
    shown = dict(CHOICE, question="Which?", answer="D")
    assert released_prompt("mllmu", CHOICE, [shown]) == "USER: <image>\nQuestion: Which?\n" + abcd + "Correct Answer: D\nUSER: <image>\nWhere?\n" + abcd + one
    assert released_prompt("mllmu", text(CLOZE), [text(CLOZE)]*2) == "USER: Question: He is in [Blank].\nCorrect Answer: St. Ives.\n"*2 + "USER: " + blank
    with pytest.raises(InputError, match="no released prompt for 'clear'; choose one of mllmu, umu"): released_prompt("clear", CHOICE)

def test_released_counts():
    right = lambda benchmark, record, reply, metric="accuracy": released_judge(benchmark, record, reply)[metric][0]
    assert [right("mllmu", CHOICE, r) for r in ("B", " b.", "Bob", "Rome", "E", "")] == [1, 1, 1, 0, 0, 0]
    assert [right("umu", CHOICE, r) for r in ("Rome", "rome", "Rome.", "B")] == [1, 0, 0, 0]
    assert [right("umu", CHOICE, r, "closest") for r in ("Rome", "It is Rome.", "Osl", "")] == [1, 1, 0, 0]
    assert [right("umu", dict(CHOICE, role="real"), r) for r in ("Rome.", "Osl")] == [1, 0]  # of real people the closest option counts
    assert [right("mllmu", CLOZE, r) for r in ("In ST. IVES, by the sea", "St")] == [1, 0]
    assert [right("umu", CLOZE, r) for r in ("St", "best")] == [1, 1]  # what is left of "St. Ives." up to the first full stop, in any word
    assert [round(right("mllmu", SAY, "Him it is", m), 6) for m in ("rouge_1", "rouge_2", "rouge_l")] == [1, .5, round(2/3, 6)]  # all words; one of two pairs; two in order

def test_bleu_is_nltks():
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # rouge_score brings it along
    rng, words = np.random.default_rng(0), "a b c d e".split()
    for _ in range(60):
        reply, answer = (" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(2))
        assert bleu(reply, answer) == pytest.approx(sentence_bleu([answer.split()], reply.split(), smoothing_function=SmoothingFunction().method1)), (reply, answer)
    assert bleu("", "a b") == 0

def test_draws_have_seeds_and_leave_somebody():
    people = [f"p{i}" for i in range(9)]
    assert draw_shots(people, 2, 0, 1) == draw_shots(reversed(people), 2, 0, 1) and len({draw_shots(people, 2, s, 1) for s in range(9)}) > 4 and len({draw_shots(people, 2, 0, o) for o in range(9)}) > 4
    with pytest.raises(InputError, match="2 people were to be shown as examples, and there are 2; nobody would be left"): draw_shots(people[:2], 2)

def test_few_shots_leave_the_shown_out(splits, mllm, monkeypatch):
    split, asked = splits["mllmu"], []
    monkeypatch.setattr(benchmark_scores, "SHOTS", dict(SHOTS, cloze=1))  # two people are forgotten here
    reply = benchmark_scores._reply
    monkeypatch.setattr(benchmark_scores, "_reply", lambda m, prompts, pictures, n: asked.extend(zip(prompts, map(len, pictures))) or reply(m, prompts, pictures, n))
    few = released_scores(mllm, split, "mllmu", max_new_tokens=2)
    assert all(prompt.count("<image>") == n for prompt, n in asked) and max(n for _, n in asked) == 3  # two questions with pictures are shown here
    for (role, task), of in table(split.score).groupby(["role", "task"]):
        left_out = {*of.entity} - {*few[(few.role == role) & (few.task == task)].entity}
        assert len(left_out) == (0 if role == "real" or task == "generation" else 1), (role, task)
        names = {split.records["name"][split.records["entity"].index(e)] for e in left_out}
        if left_out and task == "cloze": assert any(n in prompt.split("Correct Answer")[0] for prompt, _ in asked for n in names if "[Blank]" in prompt)
    assert few.equals(released_scores(mllm, split, "mllmu", max_new_tokens=2, size=1))  # the same draw, whatever the batches
    zero = released_scores(mllm, split, "mllmu", shots="zero", max_new_tokens=2)
    assert {*zero.uid} == {*split.score["uid"]} and {*few.uid} < {*zero.uid} and {*few[few.task == "generation"].uid} == {*zero[zero.task == "generation"].uid}
    assert list(few) == list(evaluate(mllm, split.score.select(range(2)), max_new_tokens=2)) and few.value.between(0, 1).all()

def test_released_scoring_refuses(splits, mllm):
    with pytest.raises(InputError, match="no released scoring for 'clear'"): released_scores(mllm, splits["clear"], "clear")
    with pytest.raises(InputError, match="shots must be few or zero, not 'two'"): released_scores(mllm, splits["mllmu"], shots="two")
    short = mllm.copy()
    short.model.config.text_config.max_position_embeddings = 40
    with pytest.raises(InputError, match=r"A prompt with its reply has \d+ tokens and the model reads 40; show fewer examples"): released_scores(short, splits["umu"], "umu")

def test_other_models_get_the_words_by_template(splits, monkeypatch):
    "Of a model with another image token than `<image>`, whose prompt the chat template ends."
    split = splits["umu"]
    made = tiny("internvl", [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in split.records.remove_columns("image")])
    few = Split(where(split.records, role="forget", fold="test", task="generation"), split.forget_pct, 0)
    template, given = made.processor.apply_chat_template, []
    monkeypatch.setattr(made.processor, "apply_chat_template", lambda talk, **more: given.append(talk[0]["content"][-1]["text"]) or template(talk, **more))
    assert {*released_scores(made, few, "umu", max_new_tokens=2).uid} == {*few.score["uid"]} and {*few.score["modality"]} == {"vqa", "qa"}
    assert len(given) == len(few.score) and all(t.endswith("ENGLISH.") and "USER" not in t for t in given)

# Compared answers

def test_compared_answers():
    found = compare_answers(np.log([.4, .5, .1, .3, .2]))
    assert found == pytest.approx(dict(probability=.4, share=.4, truth_ratio=.2/.5, truth_ratio_loss=(.1*.3*.2)**(1/3)/.5, paraphrase_loss=-np.log(.5), perturbed_loss=-np.log(.006)/3))
    far = compare_answers(np.array([-2000., -2000., -1000.]))  # probabilities are 0 in floating point
    assert far["share"] < 1e-300 and np.isfinite(far["truth_ratio"]) and far["truth_ratio"] > 1e300
    assert compare_answers(np.array([-1000., -1000., -2000.]))["share"] == 1
    assert exact_match("Born in ROME, a pilot", ["Rome", "pilot", "cat", "Lima"]) == .5
    with pytest.raises(InputError, match="needs keywords"): exact_match("a", [])
    assert [first_sentence(r) for r in ("A. B.", "A", "")] == ["A.", "", ""]
    assert rouge_recall("the dog and more of it", "the big dog") == pytest.approx(2/3)

@pytest.fixture(scope="module")
def compared(splits, mllm): return {name: companion_scores(mllm, splits[name], max_new_tokens=6) for name in ("clear", "fiubench")}

@pytest.mark.parametrize("name", ["clear", "fiubench"])
def test_what_is_compared(splits, mllm, compared, name):
    split, scores = splits[name], compared[name]
    known = {u for u, p in split.companion.perturbed.items() if p} & {*split.score["uid"]}
    assert {*scores.uid} == known and ({"exact_match"} <= {*scores.metric}) == (name == "fiubench")
    for r in split.score.select([i for i, u in enumerate(split.score["uid"]) if u in known][::5]):
        more, found = split.companion.loc[r["uid"]], scores[scores.uid == r["uid"]].set_index("metric").value
        with scoring_mode(mllm): likely = [mean_log_probs(mllm, [[dict(r, answer=a)]])[0, 0] for a in (r["answer"], more.paraphrase or r["answer"], *more.perturbed)]
        expected = compare_answers(np.array(likely, float))
        assert found[list(expected)].to_dict() == pytest.approx(expected, rel=1e-3)
        reply = scores[(scores.uid == r["uid"]) & (scores.metric == "rouge_l_recall")].prediction.item()
        assert found["rouge_l_recall"] == rouge_recall(reply, r["answer"]) and found.get("exact_match", 0) == (exact_match(reply, more.keywords) if more.keywords else 0)
    assert {*companion_scores(mllm, Split(split.score.select(range(4)), 10, 0, split.companion), max_new_tokens=6, cut=True).query("metric == 'rouge_l_recall'").prediction.map(lambda p: p == first_sentence(p))} == {True}

def test_models_are_left_as_they_were(splits, mllm):
    before = {n: p.clone() for n, p in mllm.model.named_parameters()}
    mllm.model.train()
    companion_scores(mllm, splits["fiubench"], max_new_tokens=1); released_scores(mllm, splits["umu"], "umu", max_new_tokens=1)
    assert mllm.model.training and all(torch.equal(before[n], p) for n, p in mllm.model.named_parameters())
    with pytest.raises(InputError, match="has no paraphrased and wrong answers"): companion_scores(mllm, splits["umu"])

def rows_of(task, **metrics):
    "Scores of one CLEAR task, a list of values a metric."
    role, fact = dict(real_faces=("real", "name"), real_world=("general", "world"), retain_captions=("retain", "caption"), retain_names=("retain", "name"), forget_captions=("forget", "caption"), forget_names=("forget", "name"))[task]
    return [dict(uid=f"{task}/{i}", entity=f"e{i}", role=role, fold="test", modality="vqa", task="generation", fact=f"{fact}-{i}", metric=m, value=v) for m, values in metrics.items() for i, v in enumerate(values)]

def by_hand(task, rouge, p, share, R, para, pert): return rows_of(task, rouge_l_recall=rouge, probability=p, share=share, truth_ratio=R, paraphrase_loss=para, perturbed_loss=pert)

NAMES = ("real_faces", "real_world", "retain_captions", "retain_names", "forget_captions", "forget_names")

def test_clear_by_hand():
    ln2 = np.log(2)
    scores = pd.DataFrame([r for t in NAMES for r in by_hand(t, [.2, .6], [.1, .3], [.5, .7], [.5, 2], [1*ln2, 2*ln2], [2*ln2, 6*ln2])])
    paper = clear_tasks(scores)
    assert list(paper.index) == list(NAMES) and paper.rouge.tolist() == pytest.approx([.4]*6) and paper.probability.tolist() == pytest.approx([.6]*6)
    assert paper.truth_ratio.tolist() == pytest.approx([.25]*4 + [.5]*2)  # of 0.5 and 2: max(0, 1 − R) is .5 and 0; min(R, 1/R) is .5 twice
    harmonic = lambda *v: len(v)/sum(1/x for x in v)
    assert clear_report(scores) == pytest.approx(dict(Real=harmonic(.4, .6, .25), Retain=harmonic(.4, .6, .25), Forget=harmonic(.4, .6, .5)))
    # released: the wrong answers' mean loss is 4 ln 2 for the whole task, so that R is 1/8 and 1/4 (by question it would be 1/2 and 1/16); captions count by their own probability
    released = clear_tasks(scores, "released")
    assert released.probability.to_dict() == pytest.approx(dict(zip(NAMES, [.6, .6, .2, .6, .2, .6]))) and released.truth_ratio.tolist() == pytest.approx([.8125]*4 + [.1875]*2)
    assert clear_report(scores, form="released") == pytest.approx(dict(Utility=harmonic(*[.4]*4, .6, .6, .2, .6, *[.8125]*4)))

def test_clear_forget_quality():
    scores = pd.DataFrame([r for t in NAMES for r in by_hand(t, [.5]*4, [.5]*4, [.5]*4, [1, 2, 3, 4], [.1, .2, .3, .4], [.5]*4)])
    like = clear_report(scores, scores)
    assert (like["ForgetQuality"], like["JS"], like["KS"], like["p"]) == (1, 0, 0, 1)
    far = scores.assign(value=scores.value.where(~((scores.metric == "truth_ratio") & (scores.role == "forget")), scores.value*1e6))
    unlike = clear_report(far, scores)
    assert unlike["KS"] == 1 and unlike["p"] == pytest.approx(2/70) and unlike["ForgetQuality"] == pytest.approx(0)  # 8 over 4 orders, of which two keep the samples apart
    assert clear_report(far, scores, "released")["KS"] == 0  # which goes by losses, and these are equal
    worse = scores.assign(value=scores.value.where(~((scores.metric == "paraphrase_loss") & (scores.fact.str.startswith("caption"))), scores.value + 9))
    released = clear_report(worse, scores, "released")
    assert released["ForgetQuality"] == released["p"] == pytest.approx(2/70) and (released["KS"], released["JS"]) == pytest.approx((1, 1))  # the code's name for p; 1 − JS would be 0
    other = scores.assign(value=scores.value.where(~((scores.metric == "truth_ratio") & scores.fact.str.startswith("name")), 1e6))
    assert clear_report(other, scores)["ForgetQuality"] == 1  # only captions are compared

def test_clear_refuses():
    scores = pd.DataFrame(by_hand("real_faces", [.5], [.5], [.5], [1], [1], [1]))
    with pytest.raises(InputError, match="in the form paper or released, not 'mine'"): clear_tasks(scores, "mine")
    with pytest.raises(InputError, match="The scores of real_faces have no share; `companion_scores` makes them"): clear_tasks(scores[scores.metric != "share"])
    with pytest.raises(InputError, match="There are no scores of real_world, retain_captions"): clear_report(scores)

def test_clear_tasks_are_told_apart(compared): assert list(clear_tasks(compared["clear"]).index) == list(NAMES)

def test_fiubench_by_hand():
    values = dict(rouge_l_recall=(.2, .6), probability=(.1, .3), share=(.5, .7), truth_ratio_loss=(.5, 2), exact_match=(0, 1))
    scores = pd.DataFrame([dict(uid=f"{role}/{i}", role=role, metric=m, value=v) for role in ("forget", "retain", "test") for m, vs in values.items() for i, v in enumerate(vs)])
    report = fiubench_report(scores, scores.assign(value=scores.value + .1))
    assert report == pytest.approx({"forget rouge": .4, "forget probability": .2, "forget truth ratio": .5, "forget exact match": .5, "retain rouge": .4, "retain probability": .6, "retain truth ratio": .25, "retain exact match": .5,
        "utility": 3/(1/.4 + 1/.6 + 1/.25), "APE": .5, "KS": .5, "p": 1})
    with pytest.raises(InputError, match="The scores have no exact_match of test questions"): fiubench_report(scores[(scores.role != "test")])
    with pytest.raises(InputError, match="answered different questions"): fiubench_report(scores, scores[~((scores.role == "forget") & (scores.uid == "forget/1"))])

def test_umu_by_hand():
    facts = dict(accuracy=[(1, 1), (1, 0), (0, 0), (0, 1)], rouge_l=[(.2, .6), (0, 0), (1, 1), (.5, 0)])
    scores = pd.DataFrame([dict(entity="p", role=role, fold="test", task=dict(accuracy="cloze", rouge_l="generation")[m], fact=str(f), kind="identity", modality=way, metric=m, value=v)
        for role in ("forget", "retain") for m, pairs in facts.items() for f, pair in enumerate(pairs) for way, v in zip(("vqa", "qa"), pair)])
    report = umu_report(scores)
    assert report.loc[("forget", "cloze"), ["AccR", "AccF"]].tolist() == [.25, .25] and report.loc[("retain", "generation"), "RLR"] == pytest.approx((.3 + 0 + 1 + 0)/4)
    assert report.loc[("retain", "generation"), "RLF"] == pytest.approx((.4/.8 + 0 + 1 + .5)/4) and report.loc[("forget", "cloze"), ["RLR", "RLF"]].isna().all()

# General ability

def test_circular_accuracy():
    scores = pd.DataFrame([dict(entity=e, metric="accuracy", value=v) for e, vs in (("mmbench-1", [1, 1, 1, 1]), ("mmbench-2", [1, 1, 0, 1]), ("mmbench-3", [1, 1]), ("person", [0])) for v in vs])
    assert circular_accuracy(scores) == pytest.approx(2/3)
    with pytest.raises(InputError, match="no letter of MMBench"): circular_accuracy(scores, "letter")

def test_pope_by_hand():
    # right yes twice, wrong yes once, wrong no once, right no once; then gibberish, which says yes
    answers = [("yes", "Yes."), ("yes", "Yes, a dog"), ("no", "yes"), ("yes", "No"), ("no", "There is not one.")]
    row = lambda i, kind, label: dict(uid=f"pope/{kind}/{i}", entity="e", name="", role="general", fold="test", unseen=False, modality="qa", task="generation", fact=kind, kind="perception", image=None, view=-1, question="?", answer=label, value=label, options=[])
    asked = [("random", *a) for a in answers] + [("popular", "no", "zxq")]
    records = to_records([row(i, kind, label) for i, (kind, label, _) in enumerate(asked)])
    scores = pd.DataFrame([dict(uid=f"pope/{kind}/{i}", fact=kind, metric="accuracy", prediction=reply) for i, (kind, _, reply) in enumerate(asked)])
    report = pope_report(scores, records)
    assert report.loc["random"].to_dict() == pytest.approx(dict(accuracy=3/5, precision=2/3, recall=2/3, f1=2/3, yes=3/5))
    assert report.loc["popular"].to_dict() == dict(accuracy=0, precision=0, recall=0, f1=0, yes=1)
    with pytest.raises(InputError, match="no answers to POPE"): pope_report(scores.assign(uid="x"), records)
