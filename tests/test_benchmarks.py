"A world that is exported in a benchmark's columns and read back is the same world; whatever is wrong with a benchmark's files is one sentence."
import json, shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Features, Image, List, Value, load_dataset

from mmu_study import benchmarks, faceworld
from mmu_study.benchmarks import load_benchmark, mllmu
from mmu_study.faceworld import Faceworld
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
    with pytest.raises(InputError, match="The config 'retain_90' of .* has a file that is no parquet or is cut off") as e: mllmu(copy)
    assert e.value.__suppress_context__
    shutil.rmtree(copy/"forget_10")
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
    assert questions(there.records) == questions(mllmu(folder, 10).records)

def test_by_name(folder):
    with pytest.raises(InputError, match="no reader for the benchmark 'clear'; choose one of mllmu"): load_benchmark("clear", folder)
    with pytest.raises(InputError, match="'mllmu' has no option percent; it has forget_pct, retain_views, train"): load_benchmark("mllmu", folder, percent=5)
