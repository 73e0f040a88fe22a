"The command `mmu-study`: every --help reads, every bad input is one sentence and exit code 2, and one's own checkpoint goes in and comes out."
import json, os, re, shutil, signal, subprocess, sys, tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch

import mmu_study
from mmu_study import cli
from mmu_study.batches import ask
from mmu_study.benchmarks import write_miniature
from mmu_study.faceworld import Faceworld
from mmu_study.models import MLLM, TinyLlava, tiny_llava
from mmu_study.settings import InputError
from stub import grid_file, notebook, run

COMMANDS = [function.__name__ for function in cli._COMMANDS]
ROOT = Path(__file__).parents[1]

@pytest.fixture(autouse=True)
def this_process(project):
    "What the command changes in the process that it ends."
    before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    yield
    signal.signal(signal.SIGTERM, before); torch.set_num_threads(threads)

@pytest.fixture(scope="module")
def benchmark(tmp_path_factory): return Faceworld.preset("smoke", celebrities=4, holdout=4, strangers=20).export(tmp_path_factory.mktemp("benchmark")/"world")

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    world = Faceworld.preset("smoke", celebrities=4, holdout=4, strangers=20)
    made = tiny_llava(TinyLlava(vision_width=32, vision_layers=2, width=32, layers=1, heads=2), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in world.records.remove_columns("image")])
    return made.save(tmp_path_factory.mktemp("checkpoint")/"model")

@pytest.fixture
def said(capsys):
    "Exit code, standard output and standard error of a command, in this process."
    def call(*argv):
        with pytest.raises(SystemExit) as e: cli.main([str(a) for a in argv])
        return e.value.code, *capsys.readouterr()
    return call

# Help and refusals

@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_argument_is(said, command):
    code, out, err = said(command, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: mmu-study {command}") and (getattr(cli, command).__doc__ in " ".join(out.split()))
    parser = next(a for a in cli._parser()._actions if a.choices).choices[command]
    assert all(a.help for a in parser._actions) and len(parser.format_usage()) > 10
    if example := cli._COMMANDS[getattr(cli, command)][0]:
        for line in example.splitlines(): cli._parser().parse_args([a.strip("'") for a in re.findall(r"'[^']*'|\S+", line.split(" | ")[0])][1:])  # what is shown is allowed

def test_the_console_script_is_this(said):
    assert tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]["scripts"] == {"mmu-study": "mmu_study.cli:main"}
    code, out, _ = said("--help")
    assert code == 0 and all(re.search(rf"^    {c} ", out, re.M) for c in COMMANDS)

def test_what_needs_no_model_imports_no_torch():
    code = "import sys, mmu_study.cli; print([m for m in ('torch', 'transformers', 'papermill', 'submitit', 'rfc3987_syntax') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"

def test_bad_input_is_one_sentence_and_exit_code_2(said, tmp_path, benchmark, checkpoint):
    notebook(tmp_path/"nbs/studies/41_toy.ipynb"); notebook(tmp_path/"nbs/studies/40_other.ipynb")
    grid_file(tmp_path/"g.yaml", "notebook: nbs/studies/41_toy.ipynb\nproduct: {seed: [0, 1]}")
    ours = ["--model", checkpoint, "--benchmark", benchmark]
    (tmp_path/"full").mkdir()
    for argv, says in [
            ([], "the following arguments are required: COMMAND"), (["swep"], "invalid choice: 'swep'"), (["sweep"], "arguments are required: GRID"), (["sweep", "g.yaml", "--job", "2"], "unrecognized arguments: --job 2"),
            (["sweep", "g.yaml", "--jobs", "two"], "argument --jobs: invalid whole number value: 'two'"), (["sweep", "g.yaml", "--jobs", "0"], "0 is not more than 0"), (["sweep", "g.yaml", "--executor", "cloud"], "invalid choice: 'cloud'"),
            (["sweep", "none.yaml"], "There is no grid file 'none.yaml'."), (["status", "g.yaml", "--preset", "big"], "g.yaml has no preset 'big'; it has none."), (["collect", "g.yaml", "--out", "s.parquet"], "2 of the 2 runs of g are not done; finish the sweep."),
            (["study", "none"], "There is no study 'none'; there are other, toy."), (["study", "toy", "--preset", "quick"], "The study toy has no presets"), (["study", "toy", "-p", "sede", "1"], "41_toy.ipynb has no parameter 'sede'; it has seed, what."),
            (["study", "toy", "-p", "seed", "["], "The value '[' is not YAML."), (["study", "toy", "-p", "seed", "x"], "must be int; 'x' is str"),
            (["build", "--world", "huge"], "There is no world preset 'huge'"), (["build", "--world", "smoke", "--forget-pct", "1"], "forget_pct 1.0 of 12 people selects nobody"),
            (["unlearn", *ours, "--method", "GradDif", "--out", "new"], "There is no method 'GradDif'; there are "), (["unlearn", *ours, "--method", "GradDiff", "--preset", "best", "--out", "new"], "GradDiff has no preset 'best'; there are paper"),
            (["unlearn", *ours, "--method", "GradDiff", "--set", "lr", "--out", "new"], "--set takes FIELD=VALUE"), (["unlearn", *ours, "--method", "GradDiff", "--set", "lr=-1", "--out", "new"], "lr of GradDiff is -1.0; it must be a positive number"),
            (["unlearn", *ours, "--method", "GradDiff", "--set", "rate=1", "--out", "new"], "GradDiff has no parameter 'rate'"), (["unlearn", *ours, "--method", "GradDiff", "--set", "steps=many", "--out", "new"], "must be int | None; 'many' is str"),
            (["unlearn", *ours, "--method", "GradDiff", "--out", "full"], "full exists"), (["unlearn", "--model", tmp_path/"full", "--benchmark", benchmark, "--method", "GradDiff", "--out", "new"], "holds no config.json"),
            (["evaluate", "--model", checkpoint, "--benchmark", "mmmu"], "There is no benchmark 'mmmu'; name a folder in the schema of MLLMU-Bench or with a people.csv, NAME:FOLDER_OR_HUB_ID with one of mllmu, clear"), (["evaluate", "--model", checkpoint, "--benchmark", tmp_path/"full"], "has no parquet files"),
            (["finetune", *ours, "--preset", "best", "--out", "new"], "There is no preset 'best' for fine-tuning; there are mllmu, clear"), (["finetune", *ours, "--preset", "umu", "--out", "new"], "learns from vqa and qa records"),
            (["finetune", *ours, "--preset", "mllmu", "--set", "rate=1", "--out", "new"], "Tuning has no parameter 'rate'"), (["finetune", *ours, "--preset", "mllmu", "--out", "full"], "full exists"),
            (["evaluate", *ours, "--option", "shots"], "--option takes NAME=VALUE"), (["evaluate", *ours, "--option", "shots=1"], "The benchmark 'mllmu' has no option shots; it has forget_pct"),
            (["evaluate", "--model", checkpoint, "--benchmark", "smoke", "--general", "pope:x"], "Options of a reader and general questions (--option, --general) are for benchmarks that are read"), (["evaluate", *ours, "--general", "mmmu:x"], "General questions 'mmmu:x' cannot be added"),
            (["evaluate", *ours, "--forget-pct", "7"], "MLLMU-Bench has no forget_pct 7"), (["evaluate", *ours, "--dtype", "int8"], "invalid choice: 'int8'")]:
        code, out, err = said(*argv)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1, (argv, err)
    assert not (tmp_path/"new").exists() and not (tmp_path/"data/runs").exists()

# Commands

def test_methods_shows_presets_and_what_each_may_see(said):
    code, out, _ = said("methods")
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in out.splitlines() if line.startswith("GradDiff")}
    assert code == 0 and out.splitlines()[0].split() == "forget vqa forget qa retain vqa retain qa reference model generic pictures".split()
    assert rows["GradDiff", "paper"] == ["yes", "-", "yes", "-", "-", "-"]

def test_studies_by_name_with_presets_and_parameters(tmp_path, said):
    path = notebook(tmp_path/"nbs/studies/41_toy.ipynb")
    grid_file(tmp_path/"data/grids/toy.yaml", "notebook: nbs/studies/41_toy.ipynb\npresets: {smoke: {}, quick: {product: {seed: [1, 2]}}}")
    plan = lambda name, preset=None, p=(): [r.given for r in cli._study(name, preset, p).runs]
    assert plan("toy") == plan("41_toy", "smoke") == [{}] and plan("toy", "quick") == [dict(seed=1), dict(seed=2)]
    assert plan("toy", "quick", [("what", "1e-4")]) == [dict(seed=1, what="1e-4"), dict(seed=2, what="1e-4")]  # a parameter that is text takes the words as they are
    code, out, err = run("study", "toy", "-p", "seed", 7)
    assert (code, out.splitlines()[-1]) == (0, "toy: 1 run: 1 done"), err
    assert Path("log").read_text() == "ok 7\n"
    assert said("study", "41_toy", "-p", "seed", 7)[:2] == (0, "toy: 1 run: 1 done\n")
    assert said("status", "toy")[1].splitlines()[0] == "toy: 1 run: 1 missing"  # a grid by its name

def test_a_study_says_where_its_figures_are(tmp_path, said):
    notebook(tmp_path/"nbs/studies/41_drawn.ipynb", "import os, pathlib\n(pathlib.Path('figures/drawn') if publish else pathlib.Path(os.environ['MMU_STUDY_RUN_DIR'])/'figures').mkdir(parents=True)", settings="publish: bool = False  # into figures/")
    for p, where in (((), r"data/runs/\w{12}/figures"), (("-p", "publish", "true"), "figures/drawn")):
        code, out, err = run("study", "drawn", *p)
        assert code == 0 and re.fullmatch(f"figures and tables: {where}", out.splitlines()[-1]), (out, err)

def test_a_plan_executes_nothing(tmp_path, said):
    leaf = notebook(tmp_path/"nbs/studies/38_leaf.ipynb")
    notebook(tmp_path/"nbs/studies/41_page.ipynb", f"from mmu_study.runs import execute_all\nexecute_all([({str(leaf)!r}, dict(seed=s)) for s in seeds])", settings="seeds: list = [1, 2]  # which")
    code, out, err = said("study", "page", "--plan")
    assert code == 0 and out.splitlines()[0] == "page: 2 runs: 2 missing" and out.splitlines()[-1] == "left: 2 runs, about 0 minutes one after the other, and 2 of unknown length", err
    assert not Path("log").exists() and not list(tmp_path.glob("data/runs/*/run.json"))
    assert run("study", "page")[0] == 0 and len(Path("log").read_text().splitlines()) == 2
    out = said("study", "page", "-p", "seeds", "[1, 2, 3]", "--plan")[1].splitlines()
    assert out[0] == "page: 3 runs: 2 done, 1 missing" and out[-1].startswith("left: 1 run, about 0 minutes") and "unknown" not in out[-1]
    assert said("study", "page", "-p", "seeds", "[]", "--plan")[1].splitlines()[::2] == ["page: 0 runs", "left: 0 runs, about 0 minutes one after the other"]

def test_ones_own_checkpoint_is_unlearned_and_scored(tmp_path, said, checkpoint, benchmark):
    code, out, _ = said("unlearn", "--model", checkpoint, "--benchmark", benchmark, "--method", "graddiff", "--set", "lora=0", "--set", "steps=2", "--set", "parts=[language]", "--set", "lr=1e-2", "--out", "new")
    assert code == 0 and re.fullmatch(r"new: GradDiff, 2 steps, \d+ s, [\d.]+ GiB at its peak; 1 people forgotten\n", out), out
    about = json.loads((tmp_path/"new/unlearned.json").read_text())
    assert (about["preset"], about["fields"]["lr"], about["fields"]["parts"], about["steps"], about["version"]) == ("paper", .01, ["language"], 2, mmu_study.__version__)
    assert (about["benchmark"], about["options"], about["general"], about["dtype"], about["forget_pct"], about["forget_seed"]) == (str(benchmark), [], [], "float32", 10, 0) and about["forget"] == [*cli._benchmark(str(benchmark), 10., 0).forget_entities]
    assert len(pd.read_csv(tmp_path/"new/unlearning_log.csv")) == 2
    before, after = MLLM.load(checkpoint), MLLM.load(tmp_path/"new")
    changed = {part: any(not torch.equal(p, dict(before.model.named_parameters())[n]) for n, p in after.parameters(part)) for part in before.parts}
    assert changed == dict(vision=False, projector=False, language=True)
    code, out, _ = said("evaluate", "--model", "new", "--benchmark", f"mllmu:{benchmark}", "--per-fact", 1, "--out", "scores.parquet")
    scores = pd.read_parquet("scores.parquet")
    assert code == 0 and {"forget", "test", "retain", "real"} == set(scores.role) and all(role in out for role in set(scores.role))

def test_a_folder_does_not_stand_for_a_world_of_its_name(tmp_path):
    (tmp_path/"smoke").mkdir()
    assert len(cli._benchmark("smoke", 25., 0).forget_entities) == 3
    with pytest.raises(InputError, match="has no parquet files"): cli._benchmark("./smoke", 10., 0)

def test_people_of_ones_own_by_name_and_general_questions(tmp_path, said, checkpoint):
    people, pope = write_miniature("folder", tmp_path/"people"), write_miniature("pope", tmp_path/"pope")
    ada = pd.read_csv(people/"people.csv").name[0]
    code, out, err = said("evaluate", "--model", checkpoint, "--benchmark", people, "--option", f"forget=[{ada}]", "--option", "tasks=[cloze]", "--general", f"pope:{pope}", "--per-fact", 1, "--out", "scores.parquet")
    assert code == 0, err
    scores = pd.read_parquet("scores.parquet")
    assert {*scores.entity[scores.role == "test"]} == {e for e in scores.entity if ada in e} != set() and {*scores.task[scores.role == "test"]} == {"cloze"} and scores.uid[scores.role == "general"].str.startswith("pope/").all()
    drawn = lambda seed: (said("evaluate", "--model", checkpoint, "--benchmark", f"folder:{people}", "--forget-seed", seed, "--option", "tasks=[cloze]", "--per-fact", 1, "--out", "s.parquet"), {*pd.read_parquet("s.parquet").query("role == 'test'").entity})[1]
    assert drawn(0) != drawn(1)
    code, out, err = said("finetune", "--model", checkpoint, "--benchmark", people, "--option", f"forget=[{ada}]", "--general", f"pope:{pope}", "--preset", "fiubench", "--set", "epochs=1", "--set", "batch_size=32", "--out", "taught")
    assert code == 0, err
    about = json.loads((tmp_path/"taught/finetuned.json").read_text())
    assert (about["options"], about["general"]) == ([f"forget=[{ada}]"], [f"pope:{pope}"]) and about["forget_pct"] == pytest.approx(100/pd.read_csv(people/"people.csv").name.nunique()) and {*about["forget"]} == {*scores.entity[scores.role == "test"]}

def test_ones_own_checkpoint_is_fine_tuned_and_goes_on_where_it_stopped(tmp_path, said, checkpoint, benchmark, monkeypatch):
    from mmu_study import training
    argv = lambda out: ["finetune", "--model", checkpoint, "--benchmark", benchmark, "--preset", "mllmu", "--set", "epochs=1", "--set", "batch_size=64", "--set", "lr=1e-3", "--every", 2, "--out", out]
    code, out, _ = said(*argv("once"))
    assert code == 0 and re.fullmatch(r"once: mllmu, \d+ steps on \d+ records; the loss went from [\d.]+ to [\d.]+\n", out), out
    about = json.loads((tmp_path/"once/finetuned.json").read_text())
    assert (about["preset"], about["fields"]["lora"], about["fields"]["lr"], about["version"]) == ("mllmu", 16, 1e-3, mmu_study.__version__) and about["steps"] == len(pd.read_csv(tmp_path/"once/training_log.csv")) > 4
    before, after = (dict(MLLM.load(f).model.named_parameters()) for f in (checkpoint, "once"))
    assert {n for n in after if not torch.equal(before[n], after[n])} == {f"model.language_model.layers.0.{n}.weight" for n in [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]} | {f"model.vision_tower.encoder.layers.0.self_attn.{x}_proj.weight" for x in "qkv"}
    keep = training._checkpoint
    def stop(accelerator, folder, log): keep(accelerator, folder, log); raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(training, "_checkpoint", stop)
        assert said(*argv("again"))[0] == 130 and not (tmp_path/"again").exists() and list(tmp_path.glob("again.*.training"))
    done, batch = [], training._batch
    monkeypatch.setattr(training, "_batch", lambda *a: (done.append(1), batch(*a))[1])
    assert said(*argv("again"))[0] == 0 and not list(tmp_path.glob("again.*.training"))
    assert len(done) == about["steps"] - 2  # after the first checkpoint
    assert all(torch.equal(p, after[n]) for n, p in MLLM.load("again").model.named_parameters())

def test_checkpoints_of_other_weights_records_or_code_are_not_gone_on_with(tmp_path, checkpoint, benchmark, monkeypatch):
    from mmu_study.training import TUNINGS
    model, records = shutil.copytree(checkpoint, tmp_path/"model"), cli._benchmark(str(benchmark), 10., 0).role("forget", fold="train")
    name = lambda records=records, dtype="float32", preset="mllmu": cli._unfinished(tmp_path/"new", model, dtype, records, TUNINGS[preset]).name
    first = name()
    reworded = records.map(lambda r, i: dict(answer="Nobody.") if i == 0 else r, with_indices=True, keep_in_memory=True)
    names = [first, name(reworded), name(dtype="bfloat16"), name(preset="clear")]
    monkeypatch.setattr(mmu_study, "__version__", "0")
    names.append(name())
    monkeypatch.undo()
    os.utime(model/"model.safetensors", (0, 0))
    assert len({*names, name()}) == 6 and first.startswith("new.") and first.endswith(".training")
    shutil.copystat(checkpoint/"model.safetensors", model/"model.safetensors")
    assert name() == first

def test_build_names_what_it_built(said, monkeypatch):
    from mmu_study import training
    asked = []
    monkeypatch.setattr(training, "built", lambda world, kind, forget=(): asked.append((world.people, world.seed, kind, len(forget))) or Path(kind))
    assert said("build", "--world", "smoke", "--seed", 3, "--forget-pct", 25)[:2] == (0, "base\nvanilla\noracle\n")
    assert asked == [(12, 3, "base", 0), (12, 3, "vanilla", 0), (12, 3, "oracle", 3)]

def test_a_closed_pipe_is_no_traceback(tmp_path):
    notebook(tmp_path/"a.ipynb")
    grid_file(tmp_path/"g.yaml", f"notebook: a.ipynb\nproduct: {{seed: {[*range(5000)]}}}")
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m mmu_study.cli status g.yaml | head -1"], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("g: 5000 runs: 5000 missing\n", "")
