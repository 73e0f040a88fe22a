"The run pages of unlearning, PULSE and robustness, and a paper's page, on benchmarks: miniatures, and a checkpoint that knows nobody."
import json
from pathlib import Path

import pytest
import torch

from mmu_study.batches import ask
from mmu_study.benchmarks import load_benchmark, write_miniature
from mmu_study.faceworld import Faceworld
from mmu_study.models import TinyLlava, tiny_llava
from mmu_study import arms
from mmu_study.runs import Run, load_scores, resolve
from mmu_study.settings import InputError

ROOT = Path(__file__).parents[1]
STEPS = dict(steps=1, batch_size=4, retain_batch=2)

@pytest.fixture(scope="module", autouse=True)
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMU_STUDY_ROOT", str(root := tmp_path_factory.mktemp("study")))
        yield root

@pytest.fixture(scope="module")
def given(study):
    "Parameters of a page, by benchmark."
    world = Faceworld.preset("smoke", views=4, strangers=9)
    lines = {name: f"{name}:{write_miniature(name, study/name, world)}" for name in ("mllmu", "clear")}
    texts = [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for line in lines.values() for r in load_benchmark(*line.split(":"), forget_pct=10).records.remove_columns("image")]
    tiny_llava(TinyLlava(vision_width=32, vision_layers=2, width=32, layers=1), texts).save(study/"tiny")
    return lambda name: dict(benchmark=lines[name], model=str(study/"tiny"), forget_pct=15 if name == "mllmu" else 10, overrides=STEPS)

@pytest.fixture
def scores_of(tmp_path, monkeypatch):
    def execute(page, folder=tmp_path, **parameters):
        "What a page scores, and all its names. It is executed in this process, which spares starting one."
        for name in ("RUN", "UNFINISHED"): monkeypatch.setenv(f"MMU_STUDY_{name}_DIR", str(folder))
        path, space = ROOT/f"nbs/studies/{page}.ipynb", {}
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] != "code": continue
            exec(compile("".join(cell["source"]), path.name, "exec"), space)
            if "parameters" in cell["metadata"].get("tags", []): space |= resolve(path, parameters)
        return load_scores(folder) if (folder/"scores.parquet").is_file() else None, space
    threads = torch.get_num_threads()
    yield execute
    torch.set_num_threads(threads)  # pages set them

def test_unlearning_on_a_benchmark(scores_of, given):
    about = dict(given("mllmu"), method="GradDiff", points=1, retain_people=1)
    every, _ = scores_of("38_unlearn", **about)
    some, _ = scores_of("38_unlearn", **about, tasks=["generation"])
    none, _ = scores_of("38_unlearn", **about | dict(overrides=STEPS | dict(steps=0)), tasks=["generation"])  # an arm without steps
    assert {*none.step} == {0} and {*none.uid} == {*some.uid}
    asked = lambda scores: {*scores[scores.kind == "identity"].task}
    assert {"forget", "retain"} <= {*every.role} and "holdout" not in {*every.role} and asked(some) == {"generation"} < asked(every)
    with pytest.raises(InputError, match="^tasks holds essays; there are classification, generation, cloze.$"): scores_of("38_unlearn", **about, tasks=["essays"])

def test_pulse_on_a_benchmark(scores_of, given):
    mine = given("mllmu") | dict(n_ops=2, settings=["A", "LSE"], asked_people=1)
    scores, space = scores_of("38_pulse", **mine)
    last = scores[scores.request == scores.setting.map(dict(A=1, LSE=2))]
    assert {*last.task} == {"classification"} and {*last.entity[last.asked > 0]} == {*space["split"].forget_entities} and {*scores.role} == {"test", "retain", "real"}
    assert {*scores.request[scores.setting == "LSE"]} == {1, 2} and scores.value.between(0, 1)[scores.metric != "truth_ratio"].all()
    told, _ = scores_of("38_pulse", **mine | dict(settings=["A"], task="generation", method="vanilla"))
    assert {*told.task} == {"generation"} and {*told.entity[told.asked > 0]} == {*last.entity[last.asked > 0]}
    with pytest.raises(InputError, match="^task is 'essays', in which nobody who is to be forgotten is asked about; there are classification, cloze, generation.$"): scores_of("38_pulse", **mine | dict(task="essays"))
    theirs, _ = scores_of("38_pulse", **mine | dict(method="oracle", oracle=mine["model"]))
    assert {*zip(theirs.setting, theirs.request)} == {("A", 1), ("LSE", 2)} and {*theirs.uid} == {*last.uid}
    for more, said in ((dict(method="oracle"), "there is none; give oracle"), (dict(settings=["PU"]), "PU needs base, .* give settings without PU"), (dict(settings=["PU"], base=mine["model"]), "The base model knows 0 of .* people"),
            (dict(settings=["PU"], method="oracle", oracle="x", base="x"), "which no benchmark has"), (given("clear") | dict(settings=["PU"], base=mine["model"]), "needs questions about real people"), (dict(model=""), "needs a model")):
        with pytest.raises(InputError, match=said): scores_of("38_pulse", **mine | more)

def test_robustness_on_a_benchmark(scores_of, given, capsys):
    mine = given("mllmu") | dict(retain_people=1, relearn_steps=1, samples=2)
    scores, space = scores_of("38_robustness", **mine)
    theirs = scores[scores.role == "test"]
    assert {*theirs.entity} == {*space["split"].forget_entities} and {*theirs.check} == {"plain", "relearn", "quantization", "membership", "probe entity", "words", "pictures", "sampled"}
    assert {*theirs.step.dropna()} == {0, 1} and "mia_reference" not in {*scores.metric} and "counts as held out" in capsys.readouterr().out
    with pytest.raises(InputError, match="there is none; give oracle"): scores_of("38_robustness", **mine | dict(method="oracle"))

def test_a_benchmark_without_options_and_unseen_questions(scores_of, given, capsys):
    scores, space = scores_of("38_pulse", **given("clear") | dict(settings=["A"], asked_people=1, method="vanilla"))
    assert {*scores.task} == {"generation"} and {*scores.entity[scores.role == "forget"]} == {*space["split"].forget_entities} and "those of generation" in capsys.readouterr().out

def test_a_paper_s_page_on_a_benchmark(scores_of, given, study, tmp_path, monkeypatch):
    "From `benchmark` and `model` to the tables and claims, without an oracle; the runs are made here, with one step each."
    (study/"data").mkdir(exist_ok=True)
    for name in ("nbs", "data/published.csv"): (study/name).symlink_to(ROOT/name)
    def made(several, jobs):
        runs = []
        for i, (page, parameters) in enumerate(several):
            (folder := tmp_path/str(i)).mkdir()
            if page.stem == "38_unlearn": parameters = parameters | dict(overrides=STEPS | parameters["overrides"], points=1)
            scores_of(page.stem, folder, **parameters)
            runs.append(Run(str(i), folder, dict(parameters=resolve(page, parameters), seconds=1.)))
        return runs
    monkeypatch.setattr(arms, "execute_all", made)
    monkeypatch.setitem(vars(__import__("builtins")), "display", print)
    mine = given("mllmu")
    _, space = scores_of("40_mmunlearner", benchmark=mine["benchmark"], model=mine["model"], forget_pct=[mine["forget_pct"]], others=[])
    assert {*space["found"].final.arm} == {"MMUnlearner", "GradAscent on pictures", "NPO on pictures"} and {*space["found"].models.method} == {"vanilla"}
    claims = (space["folder"]/"claims.md").read_text()
    assert "| M2 | MMUnlearner | 15 % |" in claims and "| M1 |" not in claims and "distance to vanilla" in (space["folder"]/"main.md").read_text()
