"What is written in a benchmark's form and read back is the same; whatever is wrong with a benchmark's files is one sentence."
import ast, base64, csv, io, json, shutil, zipfile
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset

from mmu_study import benchmarks, faceworld
from mmu_study.batches import ask
from mmu_study.benchmarks import BENCHMARKS, CAPTION_PROMPTS, NAME_PROMPT, benchmark_table, clear, fiubench, from_folder, load_benchmark, mllmu, mmbench, pope, umu, write_miniature
from mmu_study.evaluation import evaluate
from mmu_study.faceworld import Faceworld
from mmu_study.methods.baselines import GradDiff
from mmu_study.models import TinyLlava, tiny_llava
from mmu_study.records import table, where
from mmu_study.settings import InputError

CONFIGS = dict(Full_Set=12, ft_Data=12, Test_Set=12, Retain_Set=6, forget_5=1, forget_10=1, forget_15=2, retain_95=11, retain_90=11, retain_85=10)  # rows of the smoke world

@pytest.fixture(scope="module", autouse=True)
def study(tmp_path_factory):
    "Pictures are kept in a cache of these tests' own."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMU_STUDY_ROOT", str(root := tmp_path_factory.mktemp("study")))
        yield root

@pytest.fixture(scope="module")
def world(): return Faceworld.preset("smoke", celebrities=6, holdout=6, strangers=20, test_repeats=3)  # 18 questions a task on 4 test pictures: the round goes on across tasks

@pytest.fixture(scope="module")
def folder(world, tmp_path_factory): return world.export(tmp_path_factory.mktemp("export")/"world")

@pytest.fixture(scope="module")
def entity_of(folder):
    "What the reader calls somebody -> what the world does."
    rows = {group: pq.read_table(folder/config, columns=["ID", "Directory"]).to_pylist() for group, config in (("fictitious", "Full_Set"), ("celebrity", "Retain_Set"))}
    return {f"{group}-{r['ID']}": r["Directory"] for group, part in rows.items() for r in part}

def questions(records, entity_of=None) -> Counter:
    "The records without what the columns of the benchmark do not carry: names of facts, uids, numbers of views."
    pixels = lambda r: r["image"] and (r["image"].size, np.asarray(r["image"].convert("RGB")).tobytes())
    return Counter((entity_of[r["entity"]] if entity_of else r["entity"], r["name"], r["role"], r["modality"], r["task"], r["unseen"], r["question"], r["answer"], *r["options"], pixels(r)) for r in records)

@pytest.mark.parametrize("pct", [5, 10, 15])
def test_what_comes_back_is_what_the_world_holds(world, folder, entity_of, pct):
    own, back = world.split(pct), mllmu(folder, pct, retain_views=True)
    for role in ("forget", "test", "retain", "real"):
        expected = where(own.role(role, fold="test"), kind="identity", **dict(unseen=[False]) if role == "real" else {})
        assert len(expected) and questions(back.role(role, fold="test"), entity_of) == questions(expected), role
    assert {entity_of[e] for e in back.forget_entities} == set(own.forget_entities) and back.forget_pct == pct
    without = mllmu(folder, pct)  # the benchmark scores the people to retain on their profile questions only
    assert Counter(without.records["uid"]) == Counter(u for u, role, unseen in zip(*(back.records[c][:] for c in ("uid", "role", "unseen"))) if not (role == "retain" and unseen))

def test_values_and_facts(folder):
    for r in table(mllmu(folder).role("forget", "test", fold="test")).itertuples():
        assert r.value == (r.options["ABCD".index(r.answer)] if r.task == "classification" else r.answer) and r.fact.startswith(f"{r.task}-") and r.kind == "identity"
    mine = table(mllmu(folder).role("test")).query("task == 'generation'")
    assert list(mine[mine.modality == "vqa"].fact) == [f"generation-{i}" for i in range(18)] and list(mine[mine.modality == "vqa"].view) == [3, 4, *[1, 2, 3, 4]*4]
    assert list(mine[mine.modality == "qa"].fact) == [f"generation-{i}" for i in range(5)]

def test_training_pairs_are_the_worlds(world, folder, entity_of):
    own, back = world.split(10), mllmu(folder, 10)
    separate = mllmu(folder, 10, train=folder/"baseline_train_split")
    for role in ("forget", "retain"):
        train = lambda split, **c: where(split.role(role, fold="train"), **c)
        pairs = lambda records, name=lambda e: e: {(name(r.entity), r.question, r.answer) for r in table(records).itertuples()}
        assert pairs(train(back), entity_of.get) == pairs(train(own, modality="vqa", task="generation", kind="identity"))
        assert questions(train(back)) == questions(train(separate))
        profile = {r["entity"]: np.asarray(r["image"]) for r in where(back.role(role, fold="test"), modality="vqa", unseen=[False])}
        assert all((np.asarray(r["image"]) == profile[r["entity"]]).all() for r in train(back))
    assert {*back.role("forget", "retain", "test", "real", fold="train")["role"]} == {"forget", "retain"} and len(back.requests(1)[0].forget)

def test_exact_schema(folder, tmp_path):
    text = Value("string")
    choice = List(dict(Correct_Answer=text, Options=dict(A=text, B=text, C=text, D=text), Question=text))
    free = List(dict(Ground_Truth=text, Question=text, Type=text))
    asked = dict(biography=text, question=text, answer=text, Classification_Task=dict(Image_Textual_Questions=choice, Pure_Text_Questions=choice), Generation_Task=free, Mask_Task=free)
    schema = {config: dict(image=Image(), ID=text, **asked) for config in CONFIGS}
    schema |= dict.fromkeys(("Full_Set", "Retain_Set"), dict(image=Image(), ID=text, Directory=text, **asked))
    schema |= dict(Test_Set=dict(images=List(dict(bytes=Value("binary"), path=text)), ID=text, **asked), ft_Data=dict(image=Image(), ID=text, metadata=text))
    for config, rows in CONFIGS.items():
        data = load_dataset(str(folder), config, split="train", cache_dir=str(tmp_path))  # as on the hub
        assert data.features == Features(schema[config]) and data.column_names == list(schema[config]) and len(data) == rows, config
        assert [p.name for p in (folder/config).iterdir()] == ["train-00000-of-00001.parquet"]
    for config in ("forget_5", "forget_10", "forget_15", "retain_95", "retain_90", "retain_85"):
        data = load_dataset(str(folder/"baseline_train_split"), config, split="train", cache_dir=str(tmp_path))
        assert data.features == Features(image=Image(), ID=text, metadata=text) and data["ID"][:] == load_dataset(str(folder), config, split="train", cache_dir=str(tmp_path))["ID"][:]

def test_what_the_columns_hold(world, folder):
    rows = {config: pq.read_table(folder/config).to_pylist() for config in CONFIGS}
    person, people = rows["Full_Set"][0], world.population.set_index("entity")
    biography, truth = json.loads(person["biography"]), people.loc[person["Directory"]]
    assert (biography["Name"], biography["Employment"], biography["Residence"]) == (truth["name"], truth.occupation, truth.home)
    assert all(truth[f] in biography["Fun Facts"] for f in ("hobby", "food", "pet")) and set(biography) == {"Name", "Employment", "Residence", "Fun Facts", "Description"}
    assert all("__" in q["Question"] and q["Type"] in ("Image_Textual", "Pure_Text") for q in person["Mask_Task"])
    assert person["image"]["path"] == f"{person['ID']}.png" and rows["Test_Set"][0]["images"][2]["path"] == f"{person['ID']}_pose2_gen1.png"
    assert all(set(pair) == {"Question", "Answer"} and pair["Question"] and pair["Answer"] for pair in json.loads(rows["ft_Data"][0]["metadata"]))
    assert {r["Directory"].split("-")[0] for r in rows["Retain_Set"]} == {"celebrity"}
    ids = lambda *configs: [r["ID"] for c in configs for r in rows[c]]
    assert set(ids("forget_10")) < set(ids("forget_15")) and not set(ids("Full_Set")) & set(ids("Retain_Set"))
    for pct in (5, 10, 15): assert sorted(ids(f"forget_{pct}", f"retain_{100 - pct}")) == sorted(ids("Full_Set")) == sorted(ids("Test_Set")) == sorted(ids("ft_Data"))

def test_export_refuses_and_leaves_no_trace(world, folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no export schema 'clear'; choose one of mllmu"): world.export(tmp_path/"new", "clear")
    with pytest.raises(InputError, match="forget_pct 5 of 8 people selects nobody"): replace(world, people=8).export(tmp_path/"new")
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds something that is no export"): world.export(tmp_path/"mine")
    assert (tmp_path/"mine"/"thesis.tex").read_text() == "years of work" and not (tmp_path/"new").exists()
    shutil.copytree(folder, tmp_path/"old")
    before = (tmp_path/"old"/"forget_10"/"train-00000-of-00001.parquet").read_bytes()
    with monkeypatch.context() as m:
        m.setattr(faceworld, "_write_configs", lambda folder, *_: (folder/"half").mkdir() or (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"): world.export(tmp_path/"old", seed=1)
    assert not (tmp_path/"old"/"half").exists() and not list(tmp_path.glob(".partial-*"))
    world.export(tmp_path/"old")
    assert (tmp_path/"old"/"forget_10"/"train-00000-of-00001.parquet").read_bytes() == before  # byte-stable
    world.export(tmp_path/"old", seed=1)
    chosen = {r["Directory"] for r in pq.read_table(folder/"Full_Set").to_pylist() if r["ID"] in pq.read_table(tmp_path/"old"/"forget_15")["ID"].to_pylist()}
    assert chosen == set(world.split(15, seed=1).forget_entities)

def edited(folder, copy, config, change=None, drop=(), shards=1):
    "A copy of an export with one config changed: every row by `change`, columns dropped, rows dealt into several files."
    shutil.copytree(folder, copy)
    file, = (copy/config).glob("*.parquet")
    whole = pq.read_table(file)
    rows = whole.to_pylist()
    for r in rows if change else (): change(r)
    whole = whole.from_pylist(rows, whole.schema).drop_columns(list(drop))
    file.unlink()
    for i in range(shards): pq.write_table(whole.slice(i*len(rows)//shards, (i + 1)*len(rows)//shards - i*len(rows)//shards), copy/config/f"train-{i:05d}-of-{shards:05d}.parquet")
    return copy

def put(*path, value):
    "A change of one value deep in a row."
    def change(row):
        for key in path[:-1]: row = row[key]
        row[path[-1]] = value
    return change

CHOICE = ("Classification_Task", "Image_Textual_Questions", 1)
BROKEN = dict(
    column=("forget_10", dict(drop=["Mask_Task"]), r"The parquet of 'forget_10' has no column Mask_Task; it has Classification_Task, Generation_Task, ID, .*\."),
    columns=("Test_Set", dict(drop=["images", "ID"]), "The parquet of 'Test_Set' has no column ID, images; it has"),
    metadata_column=("ft_Data", dict(drop=["metadata"]), "The parquet of 'ft_Data' has no column metadata; it has ID, image"),
    option=("forget_10", dict(change=put(*CHOICE, "Options", "C", value=None)), r"forget_10, ID \d+, has no Classification_Task.Image_Textual_Questions.Options.C\."),
    options=("retain_90", dict(change=put(*CHOICE, "Options", value=None)), r"retain_90, ID \d+, has no Classification_Task.Image_Textual_Questions.Options\."),
    letter=("Test_Set", dict(change=put(*CHOICE, "Correct_Answer", value="AB")), r"Test_Set, ID \d+, has the Correct_Answer 'AB'; allowed are A, B, C, D\."),
    no_letter=("Retain_Set", dict(change=put(*CHOICE, "Correct_Answer", value=None)), r"Retain_Set, ID \d+, has no Classification_Task.Image_Textual_Questions.Correct_Answer\."),
    truth=("forget_10", dict(change=put("Mask_Task", 0, "Ground_Truth", value=None)), r"forget_10, ID \d+, has no Mask_Task.Ground_Truth\."),
    type=("forget_10", dict(change=put("Generation_Task", 3, "Type", value="Video")), r"forget_10, ID \d+, has a question of Type 'Video' in Generation_Task; allowed are Image_Textual, Pure_Text\."),
    null_image=("Retain_Set", dict(change=put("image", value=None)), r"Retain_Set, ID \d+, has no image\."),
    null_bytes=("forget_10", dict(change=put("image", "bytes", value=None)), r"forget_10, ID \d+, has no image.bytes\."),
    null_view=("Test_Set", dict(change=put("images", 1, value=None)), r"Test_Set, ID \d+, has no images.bytes\."),
    no_views=("Test_Set", dict(change=put("images", value=[])), r"Test_Set, ID \d+, has no images\."),
    image=("forget_10", dict(change=lambda r: r["image"].update(bytes=r["image"]["bytes"][:300])), r"forget_10, ID \d+, has a picture that cannot be decoded \(\w+\)\."),
    view=("Test_Set", dict(change=put("images", 3, "bytes", value=b"GIF89a")), r"Test_Set, ID \d+, has a picture that cannot be decoded"),
    pairs=("ft_Data", dict(change=put("metadata", value="[{'Question': 1}]")), r"ft_Data, ID \d+, has metadata that is no JSON list"),
    stranger=("ft_Data", dict(change=lambda r: r.update(ID="9" + r["ID"])), r"ft_Data, ID 9\d+, is in neither the forget nor the retain config"),
    untested=("Test_Set", dict(change=lambda r: r.update(ID="9" + r["ID"])), r"Test_Set lacks the IDs \d+ of forget_10\."),
)

@pytest.mark.parametrize("config, edit, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_row_is_one_sentence(folder, tmp_path, config, edit, message):
    copy = edited(folder, tmp_path/"copy", config, **edit)
    with pytest.raises(InputError, match=f"^{message}") as e: mllmu(copy)
    assert "\n" not in str(e.value) and (e.value.__cause__ is None and (e.value.__suppress_context__ or e.value.__context__ is None))

def test_a_broken_folder_is_one_sentence(folder, tmp_path):
    copy = tmp_path/"copy"
    shutil.copytree(folder, copy)
    shutil.copy(copy/"forget_10"/"train-00000-of-00001.parquet", copy/"retain_90"/"train-00001-of-00002.parquet")
    with pytest.raises(InputError, match=r"The IDs \d+ are both in forget_10 and in retain_90\."): mllmu(copy)
    (copy/"retain_90"/"train-00001-of-00002.parquet").write_bytes((folder/"retain_90"/"train-00000-of-00001.parquet").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"The file .*retain_90/train-00001-of-00002.parquet is no parquet, or is cut off or damaged") as e: mllmu(copy)
    assert e.value.__suppress_context__
    shutil.rmtree(copy/"forget_10"); (copy/"README.md").unlink()
    with pytest.raises(InputError, match="has no parquet files for the config 'forget_10'; its folders are Full_Set, Retain_Set"): mllmu(copy)
    for pct in (0, 7, 100, "10"):
        with pytest.raises(InputError, match=f"MLLMU-Bench has no forget_pct {pct!r}; choose 5, 10 or 15"): mllmu(folder, pct)
    for source in (tmp_path/"nowhere", "one-word", folder/"README.md"):
        with pytest.raises(InputError, match="is neither a folder nor the name of a data set on the hub"): mllmu(source)

def test_a_shard_without_a_column_is_found(folder, tmp_path):
    copy = edited(folder, tmp_path/"copy", "retain_90", shards=2)
    last = copy/"retain_90"/"train-00001-of-00002.parquet"
    pq.write_table(pq.read_table(last).drop_columns("Mask_Task"), last)
    with pytest.raises(InputError, match="The parquet of 'retain_90' has no column Mask_Task"): mllmu(copy)

def test_several_files_and_further_columns(folder, tmp_path):
    copy = edited(folder, tmp_path/"copy", "Test_Set", shards=2)
    for file in (copy/"Test_Set").iterdir():
        part = pq.read_table(file)
        pq.write_table(part.append_column("note", [["later"]*len(part)]), file)
    (copy/"README.md").unlink()  # a folder of parquet files is enough
    assert questions(mllmu(copy, 10, retain_views=True).records) == questions(mllmu(folder, 10, retain_views=True).records)

def test_celebrities_are_no_ones_namesakes(folder, tmp_path):
    number, = pq.read_table(folder/"forget_10")["ID"].to_pylist()
    others = iter(range(1000, 2000))
    copy = edited(folder, tmp_path/"copy", "Retain_Set", lambda r: r.update(ID=number if (n := next(others)) == 1000 else str(n)))
    split = mllmu(copy, 10)
    assert split.forget_entities == (f"fictitious-{number}",) and {*split.role("real")["entity"]} == {f"celebrity-{number}", *(f"celebrity-{n}" for n in range(1001, 1006))}
    assert not {*split.role("real")["entity"]} & {*split.role("forget", "test", "retain")["entity"]} and not {*split.role("real")["name"]} & {*split.role("retain")["name"]}

def test_a_picture_is_kept_once(folder, study, tmp_path):
    records = mllmu(folder, 10, retain_views=True).records
    kept = {p: p.stat().st_mtime_ns for p in (study/"data"/"cache"/"pictures").rglob("*") if p.is_file()}
    assert records.data.nbytes < 500*len(records)  # no bytes of pictures in the records
    mllmu(folder, 10, retain_views=True)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    assert len({np.asarray(r["image"]).tobytes() for r in where(records, modality="vqa")}) == 12*(1 + 4) + 6 <= len(kept)

def test_reading_is_deterministic(folder):
    one, two = mllmu(folder, 10), mllmu(str(folder), 10.)
    assert table(one.records).equals(table(two.records)) and table(one.records).uid.is_unique
    assert table(load_benchmark("mllmu", folder, forget_pct=10).records).equals(table(one.records))

def test_hub_id(folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot be reached: where there is a network run `hf download --repo-type dataset MLLMMU/MLLMU-Bench --local-dir FOLDER`, then give") as e: mllmu("MLLMMU/MLLMU-Bench")
    assert e.value.__suppress_context__ and "\n" not in str(e.value)
    with monkeypatch.context() as m:  # a hub with one data set
        m.setattr(benchmarks, "load_dataset", lambda path, config, split: load_dataset(str(folder), config, split=split, cache_dir=str(tmp_path)))
        there = mllmu("MLLMMU/MLLMU-Bench", 10)
        with pytest.raises(InputError, match="The config 'forget_99' of 'MLLMMU/MLLMU-Bench' cannot be read from the hub"): benchmarks._open("MLLMMU/MLLMU-Bench", "forget_99")
        pairs = "MLLMMU/baseline_train_split"  # which the hub takes for a model
        m.setattr(benchmarks, "snapshot_download", lambda source, repo_type, allow_patterns: str(folder/"baseline_train_split") if (source, repo_type) == (pairs, "model") and "forget_10/*" in allow_patterns else 1/0)
        assert questions(mllmu(folder, 10, train=pairs).records) == questions(there.records)
    assert questions(there.records) == questions(mllmu(folder, 10).records)
    with pytest.raises(InputError, match="run `hf download --repo-type model MLLMMU/baseline_train_split --local-dir FOLDER`"): mllmu(folder, 10, train=pairs)

def test_by_name(folder):
    with pytest.raises(InputError, match="no reader for the benchmark 'mlmu'; choose one of mllmu, clear, umu, fiubench"): load_benchmark("mlmu", folder)
    with pytest.raises(InputError, match="'mllmu' has no option percent; it has forget_pct, retain_views, train"): load_benchmark("mllmu", folder, percent=5)

# All benchmarks, as miniatures

WORLD = Faceworld.preset("smoke", views=4, strangers=9)

@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    "The folder of a benchmark's miniature, written once; it is not to be changed."
    root = tmp_path_factory.mktemp("miniatures")
    return lru_cache(None)(lambda name: write_miniature(name, root/name, WORLD))

@pytest.fixture
def copy_of(mini, tmp_path): return lambda name: shutil.copytree(mini(name), tmp_path/name)

def raw(folder, config): return pq.read_table(folder/config).to_pylist()
def pixels(data): return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")).tobytes()
def asked(records, *columns):
    "The records as tuples of some columns; a picture as its pixels."
    return Counter(tuple(r["image"] and np.asarray(r["image"].convert("RGB")).tobytes() if c == "image" else tuple(r[c]) if c == "options" else r[c] for c in columns) for r in records)

def with_pct(name): return dict(forget_pct=10) if "forget" in BENCHMARKS[name].roles else {}

@pytest.fixture(scope="module")
def mllm(mini):
    every = [load_benchmark(n, mini(n), **with_pct(n)).records.remove_columns("image") for n in BENCHMARKS]
    return tiny_llava(TinyLlava(vision_width=32, vision_layers=2, width=32, layers=1), [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for records in every for r in records])

@pytest.mark.parametrize("name", [n for n in BENCHMARKS if "forget" in BENCHMARKS[n].roles])
def test_from_a_benchmark_to_scores(mini, mllm, name):
    split = load_benchmark(name, mini(name), forget_pct=10, general=[f"mmbench:{mini('mmbench')}", f"pope:{mini('pope')}"])
    request, = split.requests(1)
    assert request.entities == split.forget_entities and {*request.forget["role"]} == {"forget"} and not {*request.retain["entity"]} & {*request.entities}
    done = GradDiff(steps=2, batch_size=2, retain_batch=2, lr=1e-3, parts=(), lora=0).unlearn(mllm, request)
    meta = table(split.score)
    some = split.score.select(np.sort(meta.groupby(["role", "modality", "task"]).head(2).index))
    scores = evaluate(done.mllm, some, max_new_tokens=3)
    assert {*scores.uid} == {*some["uid"]} and scores.value.between(0, 1).all()
    assert {*scores.role} == {*BENCHMARKS[name].roles, "general"}

def test_every_benchmark_is_in_the_table():
    about = benchmark_table()
    assert list(about.index) == list(BENCHMARKS) and about.loc["clear", "options"] == "forget_pct, released, seed" and "real_faces" in about.loc["clear", "roles"]

def test_miniatures_are_stable_and_spare_what_is_there(mini, tmp_path, monkeypatch):
    for name in ("umu", "fiubench"):
        again = write_miniature(name, tmp_path/name, WORLD)
        same = lambda folder: {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".zip"}
        assert same(again) == same(mini(name))
    write_miniature("fiubench", tmp_path/"fiubench", WORLD)  # replaces its own kind
    with pytest.raises(InputError, match="holds something that is no miniature of 'clear'"): write_miniature("clear", tmp_path/"fiubench")
    with pytest.raises(InputError, match="There is no benchmark 'nope'; choose one of mllmu, clear"): write_miniature("nope", tmp_path/"x")
    with monkeypatch.context() as m:
        m.setitem(BENCHMARKS, "clear", replace(BENCHMARKS["clear"], write=lambda world, folder: (folder/"half").mkdir() or 1/0))
        with pytest.raises(ZeroDivisionError): write_miniature("clear", tmp_path/"new", WORLD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fiubench", "umu"]

def test_general_questions_are_added(mini):
    alone, more = umu(mini("umu"), 10), load_benchmark("umu", mini("umu"), forget_pct=10, general=f"pope:{mini('pope')}")
    assert Counter(more.records["uid"]) == Counter(alone.records["uid"]) + Counter(pope(mini("pope")).records["uid"])
    for text in ("clear:x", "pope", "pope:", "nope:x"):
        with pytest.raises(InputError, match=f"General questions '{text}' cannot be added; name one of mmbench:SOURCE, pope:SOURCE"): load_benchmark("umu", mini("umu"), general=text)

# CLEAR

def test_clear_schema(mini, tmp_path):
    text, texts = Value("string"), List(Value("string"))
    plain, mixed = dict(image=Image(), caption=text, name=text), dict(image=Image(), caption=text, question=text, answer=text)
    perturbed = dict(**plain, perturbed_captions=texts, paraphrased_caption=text, perturbed_names=texts)
    schema = dict(real_faces=dict(image=Image(), answer=text, options=texts), real_world=dict(image=Image(), question=text, answer=text, options=texts), retain_perturbed=perturbed, default=plain, full=plain, **{"full+tofu": mixed})
    for nn in (1, 5, 10): schema |= {f"forget{nn:02d}": plain, f"retain{100 - nn}": plain, f"forget{nn:02d}+tofu": mixed, f"retain{100 - nn}+tofu": mixed, f"forget{nn:02d}_perturbed": perturbed}
    assert {p.name for p in mini("clear").iterdir() if p.is_dir()} == set(schema)
    for config, columns in schema.items(): assert load_dataset(str(mini("clear")), config, split="train", cache_dir=str(tmp_path)).features == Features(columns), config

@pytest.mark.parametrize("pct", [1, 5, 10])
def test_clear_is_what_was_written(mini, pct):
    split, folder = clear(mini("clear"), pct), mini("clear")
    for role, config, tests in (("forget", f"forget{pct:02d}", f"forget{pct:02d}_perturbed"), ("retain", f"retain{100 - pct}", "retain_perturbed")):
        captions, mixed, perturbed = raw(folder, config), raw(folder, f"{config}+tofu"), raw(folder, tests)
        train, test = (split.role(role, fold=f) for f in ("train", "test"))
        assert asked(where(train, modality="vqa"), "image", "answer", "name") == Counter((pixels(r["image"]["bytes"]), r["caption"], r["name"]) for r in captions)
        texts = [r for r in mixed if r["image"] is None]
        assert len(texts) and asked(where(train, modality="qa"), "question", "answer") == Counter((r["question"], r["answer"]) for r in texts)
        assert all(name in question + answer for question, answer, name in asked(where(train, modality="qa"), "question", "answer", "name"))
        pictures = where(test, modality="vqa")
        assert asked(pictures, "image", "question", "answer") == Counter(x for r in perturbed for x in ((pixels(r["image"]["bytes"]), CAPTION_PROMPTS[0], r["caption"]), (pixels(r["image"]["bytes"]), NAME_PROMPT, r["name"])))
        expected = {r["caption"]: (r["paraphrased_caption"], tuple(r["perturbed_captions"])) for r in perturbed} | {r["name"]: ("", tuple(r["perturbed_names"])) for r in perturbed}
        assert {r["answer"]: tuple(split.companion.loc[r["uid"], ["paraphrase", "perturbed"]]) for r in pictures} == expected
        people = {r["name"] for r in perturbed}  # texts are scored of those whose captions are
        assert asked(where(test, modality="qa"), "question") == Counter((r["question"],) for r in texts if any(n in r["question"] for n in people))
    for config, role in (("real_faces", "real"), ("real_world", "general")):
        rows, records = raw(folder, config), split.role(role)
        assert asked(records, "image", "question", "answer") == Counter((pixels(r["image"]["bytes"]), r.get("question", NAME_PROMPT), r["answer"]) for r in rows)
        assert [split.companion.perturbed[u] for u in records["uid"]] == [tuple(r["options"]) for r in rows]
    same = table(split.records).query("modality == 'vqa' and role != 'general'").assign(pixels=[np.asarray(r["image"]).tobytes() for r in split.records if r["modality"] == "vqa" and r["role"] != "general"])
    assert (same.groupby(["entity", "view"]).pixels.nunique() == 1).all() and (same.groupby(["entity", "pixels"]).view.nunique() == 1).all()

def test_clear_texts_to_forget_are_not_retained(copy_of):
    folder = copy_of("clear")
    secret = raw(folder, "forget05+tofu")[-1]
    n = len(raw(folder, "retain95+tofu"))
    last = lambda **new: lambda r, i=iter(range(n)): next(i) == n - 1 and r.update(new)
    clear(edited_rows(folder, "retain95+tofu", last(question=secret["question"])), 5)  # the same question with another answer is no secret
    edited_rows(folder, "retain95+tofu", last(answer=secret["answer"]))
    with pytest.raises(InputError, match=rf"^retain95\+tofu, row {n - 1}, has a question and answer that are also in forget05\+tofu: '.*'\.$"): clear(folder, 5)

def test_clear_authors_by_blocks_of_twenty():
    names, whom = ["Ana Sol", "Will Sol"], benchmarks._whom
    ana = ["What does Ana Sol write?"]*3 + ["She likes Will Sol."] + ["Where does she live?"]*16
    will, nobody = ["Who is it? Will."] + ["He paints."]*19, ["He paints."]*20
    assert whom(ana + will, names) == ["Ana Sol"]*20 + ["Will Sol"]*20  # who is named most, in the question that names another too
    assert whom(ana + nobody, names) == ["Ana Sol"]*20 + [""]*20 and whom(nobody + will, names) == [""]*20 + ["Will Sol"]*20  # nobody: not whoever was before
    assert whom(ana + ["Ana met Will."]*20, names)[20:] == [""]*20
    assert whom((ana + will)[:-1], names)[2:5] == ["Ana Sol", "Will Sol", "Will Sol"] == whom(ana, names)[2:5]  # no blocks: each question by itself

def test_clear_options_may_hold_the_answer(copy_of):
    folder = edited_rows(copy_of("clear"), "real_faces", lambda r: r["options"].append(r["answer"]))
    split = clear(folder)
    assert all(r["answer"] not in split.companion.perturbed[r["uid"]] for r in split.role("real"))

def test_clear_as_released(mini):
    one, two, other = (clear(mini("clear"), 10, released=True, seed=s) for s in (0, 0, 1))
    prompts = lambda split, **c: where(split.records, modality="vqa", role=["forget", "retain"], **c)["question"][:]
    assert prompts(one) == prompts(two) != prompts(other) and {*prompts(one, fold="train")} <= {*CAPTION_PROMPTS} and len({*prompts(one, fold="test")}) > 3
    plain = prompts(clear(mini("clear"), 10), fold="train")
    assert plain[3:12] == [*CAPTION_PROMPTS]  # after the three of the one to forget
    assert {*prompts(clear(mini("clear"), 10), fold="test")} == {CAPTION_PROMPTS[0], NAME_PROMPT}

def edited_rows(folder, config, change):
    "The rows of a config changed in place."
    file, = (folder/config).glob("*.parquet")
    whole = pq.read_table(file)
    rows = whole.to_pylist()
    for r in rows: change(r)
    pq.write_table(whole.from_pylist(rows, whole.schema), file)
    return folder

def first(change):
    "A change of the first row only."
    state = iter([change])
    return lambda row: next(state, lambda r: None)(row)

WRONG = dict(  # what is changed in a copy of a miniature -> the sentence
    clear_text=("clear", "forget05+tofu", lambda r: r.update(question=None), r"forget05\+tofu, row 3, has neither an image nor a question\."),
    clear_caption=("clear", "retain95", first(lambda r: r.update(caption=None)), r"retain95, row 0, has no caption\."),
    clear_picture=("clear", "retain95", first(lambda r: r.update(image=None)), r"retain95, row 0, has no image\."),
    clear_truncated=("clear", "forget05", first(lambda r: r["image"].update(bytes=r["image"]["bytes"][:200])), r"forget05, row 0, has a picture that cannot be decoded"),
    clear_stranger=("clear", "retain_perturbed", first(lambda r: r.update(name="Nobody")), r"retain_perturbed asks about 'Nobody', who is not in retain95\."),
    umu_json=("umu", "forget_5", first(lambda r: r.update(Cloze="{'unimodal': tru}")), r"forget_5, ID 0, has a Cloze that is no Python literal\."),
    umu_letter=("umu", "forget_5", first(lambda r: r.update(Classify=r["Classify"].replace("'answer': '", "'answer': '(", 1))), r"forget_5, ID 0, has in Classify.unimodal.home the answer '\(.*', which begins with no letter of A, B, C, D\."),
    umu_option=("umu", "forget_5", first(lambda r: r.update(Classify=r["Classify"].replace("'C': ", "'E': "))), r"forget_5, ID 0, has no Classify.unimodal.home.options.C\."),
    umu_key=("umu", "forget_5", first(lambda r: r.update(Generation=r["Generation"].replace("muitimodal", "mm"))), r"forget_5, ID 0, has a Generation without 'unimodal' and 'muitimodal'\."),
    umu_pair=("umu", "forget_5", first(lambda r: r.update(MM_QA="{'question': {'a': 'Who?'}, 'answer': {'b': 'He.'}}")), r"forget_5, ID 0, has in MM_QA a question without an answer or the other way round: a, b\."),
    umu_both=("umu", "forget_5", lambda r: r.update(ID="5"), r"The IDs 5 are both in forget_5 and in retain_95\."),
)

@pytest.mark.parametrize("name, config, change, message", WRONG.values(), ids=WRONG)
def test_a_wrong_row_is_one_sentence(copy_of, name, config, change, message):
    folder = edited_rows(copy_of(name), config, change)
    with pytest.raises(InputError, match=f"^{message}") as e: load_benchmark(name, folder, forget_pct=5)
    assert "\n" not in str(e.value) and (e.value.__cause__ is None and (e.value.__suppress_context__ or e.value.__context__ is None))

@pytest.mark.parametrize("name, config, column", [("clear", "retain_perturbed", "paraphrased_caption"), ("clear", "forget05+tofu", "image"), ("clear", "real_world", "options"), ("umu", "retain_95", "UM_QA"), ("umu", "Real_Person_Set", "ID")])
def test_missing_columns_are_named_and_others_ignored(copy_of, name, config, column):
    folder = copy_of(name)
    file, = (folder/config).glob("*.parquet")
    whole = pq.read_table(file)
    pq.write_table(whole.append_column("note", [["later"]*len(whole)]), file)
    load_benchmark(name, folder, forget_pct=5)
    pq.write_table(whole.drop_columns(column), file)
    with pytest.raises(InputError, match=f"^The parquet of '{config.replace('+', '.')}' has no column {column}; it has "): load_benchmark(name, folder, forget_pct=5)

@pytest.mark.parametrize("cut", [slice(None, 3000), "inside"])
def test_a_damaged_parquet_is_one_sentence_and_leaves_nothing(copy_of, tmp_path, monkeypatch, cut):
    folder = copy_of("umu")
    file, = (folder/"forget_5").glob("*.parquet")
    data = file.read_bytes()
    file.write_bytes(data[cut] if isinstance(cut, slice) else data[:4] + b"\xff"*(len(data)//2) + data[4 + len(data)//2:])  # the second one keeps its end, where the columns are
    monkeypatch.setenv("MMU_STUDY_ROOT", str(tmp_path))
    with pytest.raises(InputError, match=r"^The file .*forget_5/train-00000-of-00001.parquet is no parquet, or is cut off or damaged \(\w+\)\.$") as e: umu(folder, 5)
    assert e.value.__suppress_context__ and not (tmp_path/"data").exists()

def test_a_broken_picture_is_not_kept(copy_of, tmp_path, monkeypatch):
    folder = edited_rows(copy_of("umu"), "forget_5", lambda r: r["image"].update(bytes=r["image"]["bytes"][:300]))
    monkeypatch.setenv("MMU_STUDY_ROOT", str(tmp_path))
    with pytest.raises(InputError, match="forget_5, ID 0, has a picture that cannot be decoded"): umu(folder, 5)
    assert not (tmp_path/"data").exists()

def test_configs_are_found_through_the_readme(copy_of, mini, tmp_path):
    folder = copy_of("umu")
    (folder/"forget_5").rename(folder/"data_f5")
    with pytest.raises(InputError, match="The config 'forget_5' of .* cannot be read|has no parquet"): umu(folder, 5)
    (folder/"README.md").write_text((folder/"README.md").read_text().replace("path: forget_5/", "path: data_f5/"))
    assert Counter(umu(folder, 5).records["uid"]) == Counter(umu(mini("umu"), 5).records["uid"])

def test_hub_ids(mini, tmp_path, monkeypatch):
    for read, hub in ((clear, "therem/CLEAR"), (umu, "linbojunzi/UMU-bench"), (fiubench, "gray311/FIUBench")):
        with pytest.raises(InputError, match=f"where there is a network run `hf download --repo-type dataset {hub} --local-dir FOLDER`, then give that folder") as e: read(hub)
        assert e.value.__suppress_context__ and "\n" not in str(e.value)
    with monkeypatch.context() as m:  # hubs with one data set
        for read, hub, name in ((clear, "therem/CLEAR", "clear"), (umu, "linbojunzi/UMU-bench", "umu")):
            m.setattr(benchmarks, "load_dataset", lambda path, config, split: load_dataset(str(mini(name)), config, split=split, cache_dir=str(tmp_path)))
            assert asked(read(hub, 5).records, "uid", "image", "answer", "options") == asked(read(mini(name), 5).records, "uid", "image", "answer", "options")
        m.setattr(benchmarks, "snapshot_download", lambda source, repo_type, allow_patterns: str(mini("fiubench")) if (source, repo_type) == ("gray311/FIUBench", "dataset") and "SFHQ.zip" in allow_patterns else 1/0)
        assert fiubench("gray311/FIUBench").records["uid"][:] == fiubench(mini("fiubench")).records["uid"][:]

def test_forget_percentages():
    for read, pct, allowed in ((clear, 15, "1, 5 or 10"), (umu, 1, "5, 10 or 15"), (fiubench, 15, "1, 5 or 10")):
        with pytest.raises(InputError, match=f"has no forget_pct {pct}; choose {allowed}"): read("nowhere", pct)

# UMU-Bench

@pytest.mark.parametrize("pct", [5, 15])
def test_umu_is_what_was_written(mini, pct):
    split = umu(mini("umu"), pct)
    for role, config in (("forget", f"forget_{pct}"), ("retain", f"retain_{100 - pct}"), ("real", "Real_Person_Set")):
        rows, forms = raw(mini("umu"), config), dict(vqa="muitimodal", qa="unimodal")
        assert "muitimodal" in rows[0]["Classify"] and rows[0]["Classify"].startswith("{'unimodal'")  # Python, not JSON
        for modality, form in forms.items():
            part = lambda fold, task: where(split.role(role, fold=fold), modality=modality, task=task)
            picture = lambda r: pixels(r["image"]["bytes"]) if modality == "vqa" else None
            pairs = [(r, ast.literal_eval(r[dict(vqa="MM_QA", qa="UM_QA")[modality]])) for r in rows]
            assert asked(part("train", "generation"), "image", "fact", "question", "answer") == Counter((picture(r), k, p["question"][k], p["answer"][k]) for r, p in pairs for k in p["question"] if role != "real")
            tasks = {c: [(r, k, q) for r in rows for k, q in ast.literal_eval(r[c])[form].items()] for c in ("Classify", "Cloze", "Generation")}
            assert asked(part("test", "classification"), "image", "fact", "question", "answer", "value", "options") == Counter((picture(r), k, q["question"], q["answer"][0], q["answer"][3:], tuple(q["options"].values())) for r, k, q in tasks["Classify"])
            assert asked(part("test", "cloze"), "image", "fact", "question", "answer", "value") == Counter((picture(r), k, q["question"], q["answer"], q["answer"][:-1]) for r, k, q in tasks["Cloze"])
            assert asked(part("test", "generation"), "image", "fact", "question", "answer") == Counter((picture(r), k, q["question"], q["answer"]) for r, k, q in tasks["Generation"])

def test_umu_spelt_right_and_the_other_folder(copy_of, mini):
    folder = copy_of("umu")
    for config in ("forget_5", "retain_95"): edited_rows(folder, config, lambda r: r.update({c: r[c].replace("muitimodal", "multimodal") for c in ("Classify", "Cloze", "Generation")}))
    (folder/"Real_Person_Set").rename(folder/"real_person")
    strip = lambda split: asked(split.records, "entity", "role", "modality", "task", "question", "answer", "options")
    assert strip(umu(folder, 5)) == strip(umu(mini("umu"), 5))

def test_umu_schema(mini, tmp_path):
    for config in ("Full_Set", "Real_Person_Set", "forget_5", "forget_10", "forget_15", "retain_95", "retain_90", "retain_85"):
        assert load_dataset(str(mini("umu")), config, split="train", cache_dir=str(tmp_path)).features == Features(ID=Value("string"), image=Image(), **dict.fromkeys(("Biography", "MM_QA", "UM_QA", "Classify", "Cloze", "Generation"), Value("string")))

# FIUBench

def test_fiubench_is_what_was_written(mini):
    people, lists = (json.loads((mini("fiubench")/f).read_text()) for f in ("full.json", "split.json"))
    archive = zipfile.ZipFile(mini("fiubench")/"SFHQ.zip")
    forgettable = {*lists["forget1"], *lists["forget5"], *lists["forget10"]}
    assert len(forgettable) == sum(len(lists[f]) for f in ("forget1", "forget5", "forget10"))  # lists, not complements
    of = lambda ids: [(p, qa) for p in people if p["unique_id"] in ids for qa in p["qa_list"]]
    picture = lambda p: pixels(archive.read(f"SFHQ/{p['unique_id']}.png"))
    for pct, retain in ((1, "retain5"), (10, "retain15")):
        split, forget, rest = fiubench(mini("fiubench"), pct, retain), lists[f"forget{pct}"], {p["unique_id"] for p in people} - forgettable
        for role, fold, ids in (("forget", "train", forget), ("forget", "test", forget), ("retain", "train", rest), ("retain", "test", lists[retain])):
            assert asked(split.role(role, fold=fold), "image", "name", "question", "answer") == Counter((picture(p), p["name"], qa["question"], qa["answer"]) for p, qa in of(ids)), (role, fold)
        again = split.role("test")
        assert {*again["unseen"]} == {True} and asked(again, "question", "answer") == Counter((q, qa["answer"]) for _, qa in of(forget) for q in qa["paraphrased_question"])
        assert not {e.split("-")[1] for e in split.records["entity"]} & (forgettable - set(forget))
        found = {tuple(split.companion.loc[r["uid"], ["paraphrase", "perturbed", "keywords"]]) for r in split.role("forget", fold="test")}
        assert found == {(qa["paraphrased_answer"], tuple(qa["perturbed_answer"]), tuple(qa["keywords"])) for _, qa in of(forget)}

def test_fiubench_files_in_other_places(copy_of, mini):
    folder, ours = copy_of("fiubench"), asked(fiubench(mini("fiubench")).records, "uid", "image", "answer")
    people = json.loads((folder/"full.json").read_text())
    (folder/"full.json").unlink()
    (folder/"full.jsonl").write_text("".join(json.dumps(p) + "\n" for p in people))
    zipfile.ZipFile(folder/"SFHQ.zip").extractall(folder/"pictures")
    assert asked(fiubench(folder).records, "uid", "image", "answer") == ours  # packed and unpacked: the same picture twice
    (folder/"SFHQ.zip").unlink()
    assert asked(fiubench(folder).records, "uid", "image", "answer") == ours
    one = next((folder/"pictures").rglob("*.png"))
    (folder/"other"/"SFHQ").mkdir(parents=True); (folder/"other"/"SFHQ"/one.name).write_bytes(b"another")
    with pytest.raises(InputError, match=f"names the picture '.*{one.name}', and 2 different files of that name are below"): fiubench(folder)

@pytest.mark.parametrize("change, message", [
    (lambda people, lists: people[1]["qa_list"][2].pop("keywords"), r"full.json, row 1, has no qa_list.keywords\."),
    (lambda people, lists: lists.pop("retain15"), r"split.json of .* has no list retain15\."),
    (lambda people, lists: lists["retain15"].append("x"), r"split.json names people who are not among the first 400 of full.json: x\."),
    (lambda people, lists: lists["retain15"].append(lists["forget1"][0]), r"split.json has the people 00000000 both in retain15 and in a forget list\."),
    (lambda people, lists: people[1].update(image_path="SFHQ/7.png"), r"full.json, unique_id 00000001, names the picture 'SFHQ/7.png', which is neither below"),
    (lambda people, lists: people.extend([{}]*400), None)])
def test_fiubench_wrong_files(copy_of, change, message):
    folder = copy_of("fiubench")
    people, lists = (json.loads((folder/f).read_text()) for f in ("full.json", "split.json"))
    if message is None:  # only the first 400 people count
        change(people := people + [dict(people[0], unique_id=f"more-{i}") for i in range(400 - len(people))], lists)
    else: change(people, lists)
    for file, value in (("full.json", people), ("split.json", lists)): (folder/file).write_text(json.dumps(value))
    if message is None: assert len({*fiubench(folder).role("retain", fold="train")["entity"]}) == 400 - 4
    else:
        with pytest.raises(InputError, match=f"^{message}"): fiubench(folder)
        (folder/"full.json").write_text('[{"unique_id": 1},')
        with pytest.raises(InputError, match=r"full.json is no JSON: "): fiubench(folder)

def test_fiubench_as_released(mini):
    plain, capital = (table(fiubench(mini("fiubench"), released=r).records) for r in (False, True))
    assert capital.question.equals(plain.question.str.capitalize()) and capital.answer.equals(plain.answer.str.capitalize()) and not capital.answer.equals(plain.answer)

# General ability

def test_mmbench_is_what_was_written(mini):
    with open(mini("mmbench")/"mmbench_dev_en.tsv", newline="") as f: rows = list(csv.DictReader(f, delimiter="\t"))
    pictures = {r["index"]: r["image"] for r in rows}
    options = lambda r: tuple(r[l] for l in "ABCD" if r[l])
    plain, turned = mmbench(mini("mmbench")).records, mmbench(mini("mmbench")/"mmbench_dev_en.tsv", circular=True).records
    assert {len(o) for o in plain["options"]} >= {2, 4}
    assert asked(plain, "image", "question", "options", "answer") == Counter((pixels(base64.b64decode(pictures.get(r["image"], r["image"]))), "\n".join(filter(None, (r["hint"], r["question"]))), options(r), r["answer"]) for r in rows)
    whole = table(turned).groupby("entity")
    assert all({tuple(o) for o in of.options} == {tuple(of.options.iloc[0][k:]) + tuple(of.options.iloc[0][:k]) for k in range(len(of))} and len(of) == len(of.options.iloc[0]) and of.value.nunique() == 1 for _, of in whole)
    assert {*turned["role"]} == {"general"} and {*turned["fold"]} == {"test"}

def test_mmbench_rotated_beforehand(copy_of, mini):
    file = copy_of("mmbench")/"mmbench_dev_en.tsv"
    data = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
    two = data[data.question == "Is this a drawing?"]
    turned = two.assign(index=(two["index"].astype(int) + 10**6).astype(str), A=two.B, B=two.A, answer="B")
    pd.concat([data, turned]).to_csv(file, sep="\t", index=False)
    meta = table(mmbench(file).records)
    assert meta.groupby("entity").size().max() == 2 and meta.uid.is_unique and (meta.groupby("entity").value.nunique() == 1).all()
    with pytest.raises(InputError, match=r"^mmbench_dev_en.tsv, index 1000001, is a rotation of index 1: mmbench_dev_en.tsv holds the rotations already, so read it without circular\.$"): mmbench(file, circular=True)

@pytest.mark.parametrize("change, message", [
    (dict(answer="E"), r"mmbench_dev_en.tsv, index 0, has the answer 'E'; its options are A, B, C, D\."), (dict(B="", C="", D=""), r"mmbench_dev_en.tsv, index 0, has fewer than two options\."),
    (dict(B=""), r"mmbench_dev_en.tsv, index 0, has an option D and none for B, so its letters would shift\."), (dict(A="nan", B=" "), r"mmbench_dev_en.tsv, index 0, has an option D and none for A, B, "),
    (dict(image="no base64!"), r"mmbench_dev_en.tsv, index 0, has an image that is not in base64\."), (dict(image="aGVsbG8="), r"mmbench_dev_en.tsv, index 0, has a picture that cannot be decoded"), (None, r".*tsv has no column answer; it has index")])
def test_mmbench_wrong_rows(copy_of, change, message):
    file = copy_of("mmbench")/"mmbench_dev_en.tsv"
    data = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
    if change is None: data = data.drop(columns="answer")
    else: data.loc[0, list(change)] = list(change.values())
    data.to_csv(file, sep="\t", index=False)
    with pytest.raises(InputError, match=f"^{message}"): mmbench(file)

def test_pope_is_what_was_written(mini, tmp_path):
    rows = [dict(json.loads(line), set=s) for s in ("random", "popular", "adversarial") for line in (mini("pope")/f"coco_pope_{s}.json").read_text().splitlines()]
    of = lambda r: (mini("pope")/"val2014"/r["image"]).read_bytes()
    expected = Counter((pixels(of(r)), r["set"], r["text"], r["label"]) for r in rows)
    assert asked(pope(mini("pope")).records, "image", "fact", "question", "answer") == expected
    Dataset.from_list([dict(id=str(i), question=r["text"], answer=r["label"], category=r["set"], image=dict(bytes=of(r), path=None)) for i, r in enumerate(rows)]).cast_column("image", Image()).to_parquet(tmp_path/"test-00000-of-00001.parquet")
    assert asked(pope(tmp_path).records, "image", "fact", "question", "answer") == expected

def test_pope_wrong_files(copy_of, tmp_path):
    folder = copy_of("pope")
    (folder/"coco_pope_random.json").write_text('{"question_id": 1, "image": "a.png", "text": "Is it?", "label": "maybe"}\n')
    with pytest.raises(InputError, match="coco_pope_random.json, row 0, has the label 'maybe'; allowed are yes and no"): pope(folder)
    (folder/"coco_pope_random.json").write_text('{"question_id": 1, "image": "a.png", "text": "Is it?", "label": "Yes"}\n')
    with pytest.raises(InputError, match="coco_pope_random.json, row 0, names the picture 'a.png', which is neither below"): pope(folder)
    with pytest.raises(InputError, match="has no question file of POPE"): pope(folder/"val2014")

# People of one's own

def test_a_folder_is_what_was_written(mini):
    people = pd.read_csv(mini("folder")/"people.csv")
    facts = [c for c in people if c not in ("file", "name")]
    split = load_benchmark("folder", mini("folder"), forget=[*people.name.unique()[:2]])
    meta = table(split.records)
    assert {*meta.name} == {*people.name} and {*meta.role} == {"forget", "retain", "test"} and {*split.forget_entities} == {f"person-{n}" for n in people.name.unique()[:2]}
    one = people.drop_duplicates("name").set_index("name")
    assert all(r.value == (r.name if r.fact == "name" else one.loc[r.name, r.fact]) for r in meta.itertuples(index=False))
    for (_, modality, task), of in meta[meta.fold == "test"].groupby(["unseen", "modality", "task"]):
        assert Counter(zip(of.name, of.fact)) == Counter((n, f) for n in one.index for f in (*(["name"] if modality == "vqa" else []), *facts))
    choices = meta[meta.task == "classification"]
    pools = {f: {*one[f]} for f in facts} | dict(name={*one.index})
    assert all(len({*o}) == 4 and {*o} <= pools[f] and v in o for o, f, v in zip(choices.options, choices.fact, choices.value)) and choices.answer.nunique() == 4
    pictures = {n: [pixels((mini("folder")/f).read_bytes()) for f in of.file] for n, of in people.groupby("name")}
    shown = {(r["name"], r["fold"], r["unseen"]): np.asarray(r["image"].convert("RGB")).tobytes() for r in split.records if r["modality"] == "vqa"}
    for name, of in pictures.items():
        assert shown[name, "test", True] == of[-1] and shown[name, "test", False] == of[0] == shown[name, "train", False]
    words = {(fold, unseen): {q.replace(n, "X") for q, n in zip(of.question, of.name)} for (fold, unseen), of in meta.groupby(["fold", "unseen"])}
    assert not words["test", True] & words["train", False] and not words["validation", True] & (words["train", False] | words["test", True])
    again, other = (table(from_folder(mini("folder"), forget_pct=25, seed=s).records) for s in (0, 1))
    assert again.equals(table(from_folder(mini("folder"), forget_pct=25).records)) and {*again.entity[again.role == "forget"]} != {*other.entity[other.role == "forget"]}
    assert len(from_folder(mini("folder"), forget_pct=25).forget_entities) == 3

def csv_with(change):
    def write(folder):
        people = pd.read_csv(folder/"people.csv", dtype=str)
        change(people).to_csv(folder/"people.csv", index=False)
    return write

def cell(row, column, value):
    def change(people): people.loc[row, column] = value; return people
    return csv_with(change)

@pytest.mark.parametrize("damage, message", [
    (cell(2, "file", "gone.png"), r"people.csv, line 4, names the picture 'gone.png', which is not in "), (cell(2, "pet", ""), r"people.csv, line 4, has an empty pet\."), (cell(2, "pet", "yak"), r"people.csv gives '.*' different values of pet; one person has one\."),
    (csv_with(lambda p: p.assign(pet="cat", food=p.name.map({n: ("tea", "rice", "bread")[i % 3] for i, n in enumerate(p.name.unique())}))), r"people.csv has too few different values for 4 options: 3 of food, 1 of pet; add people or leave classification out"),
    (csv_with(lambda p: p.drop(columns=["name"])), r"people.csv has no column name; it has file, home"), (csv_with(lambda p: p[["file", "name"]]), r"people.csv has no column besides file and name"),
    (lambda folder: (folder/"people.csv").unlink(), r".* has no table people.csv: a row a picture"), (lambda folder: (folder/"1_0.png").write_bytes(b"GIF89a"), r"people.csv, picture 1_0.png, has a picture that cannot be decoded"),
    (lambda folder: (folder/"people.csv").write_text(""), r"people.csv cannot be read as a table: ")])
def test_a_wrong_folder_is_one_sentence(copy_of, damage, message):
    damage(folder := copy_of("folder"))
    with pytest.raises(InputError, match=f"^{message}") as e: from_folder(folder, forget_pct=25)
    assert "\n" not in str(e.value)

def test_whom_to_forget_in_a_folder(mini, copy_of):
    folder = mini("folder")
    names = [*pd.read_csv(folder/"people.csv").name.unique()]
    for options, message in ((dict(), "Name the people to forget"), (dict(forget=["A"], forget_pct=5), "Name the people to forget"), (dict(forget=["No One"]), "people.csv has nobody called No One"),
        (dict(forget=[]), "0 of 12 people are to be forgotten"), (dict(forget=names), "12 of 12 people are to be forgotten"), (dict(forget_pct=1), "forget_pct 1 of 12 people selects nobody"), (dict(forget_pct=25, tasks=("essay",)), "There is no task essay")):
        with pytest.raises(InputError, match=message): from_folder(folder, **options)
    few = copy_of("folder")
    csv_with(lambda p: p.assign(pet="cat"))(few)
    assert {*table(from_folder(few, forget_pct=25, tasks=("generation", "cloze")).records).task} == {"generation", "cloze"}
