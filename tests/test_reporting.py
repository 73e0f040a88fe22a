"Intervals resample facts, files are whole and byte-stable, styles are fixed."
import hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
from mmu_study import reporting
from mmu_study.reporting import STYLE, compare, contrast, frontier, heatmap_knowledge, save_figure, save_table, style, summarize, trajectories, with_groups
from mmu_study.settings import InputError

def scores(method="vanilla", rate=.9, seeds=(0, 1), **columns):
    "Fabricated scores of one model: every role in both modalities, perception in pictures."
    rng = np.random.default_rng([*method.encode(), *str(columns).encode()])
    rows = [dict(uid=f"{role}-{i}-{fact}-{modality}-{view}", entity=f"{role}{i}", role=role, fold="test", modality=modality, task="generation", fact=fact, kind=kind,
                view=view, metric="accuracy", value=float(rng.random() < (rate if role in ("forget", "test") else .9)), prediction="", seed=seed)
            for seed in seeds for role in ("forget", "test", "retain", "real", "general") for i in range(4) for fact, kind in (("home", "identity"), ("hair", "perception"))
            for modality in (("vqa", "qa") if kind == "identity" else ("vqa",)) for view in range(2)]
    return pd.DataFrame(rows).assign(method=method, **columns)

@pytest.fixture(scope="module")
def table():
    runs = [scores("NPO", .9*.5**step, step=step, strength=s) for step in (0, 1, 2) for s in (.5, 1.)]
    return pd.concat([scores("vanilla"), scores("oracle", .1), *runs], ignore_index=True)

def test_a_fact_is_the_unit_of_resampling():
    one = scores()
    often = pd.concat([one.assign(uid=one.uid + f"-{i}") for i in range(7)])
    a, b = (summarize(s, ["role", "modality"]) for s in (one, often))
    pd.testing.assert_frame_equal(a.drop(columns="n"), b.drop(columns="n"))
    assert (b.n == 7*a.n).all() and (a.high > a.low).any()

def test_seeds_are_units_of_their_own():
    assert (summarize(scores(seeds=(0, 1, 2)), "role").facts == 3*summarize(scores(seeds=(0,)), "role").facts).all()
    assert summarize(scores(seeds=(0,)).query("entity == 'retain0' and fact == 'home'"), "role")[["low", "high"]].isna().all(axis=None)

def test_intervals_cover_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        fate = rng.random(60) < .6  # 60 facts, each asked five times with one fate
        s = pd.DataFrame(dict(entity=np.repeat(np.arange(60), 5), fact="home", metric="accuracy", value=np.repeat(fate, 5).astype(float)))
        row = summarize(s, [], n_boot=400).iloc[0]
        hits += row.low <= .6 <= row.high
    assert .90 <= hits/200 <= .99

def test_deterministic_whatever_the_order_and_the_company(table):
    shuffled = table.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(summarize(table, ["method", "role"]), summarize(shuffled, ["method", "role"]))
    alone = summarize(table[table.method == "oracle"], "role")
    pd.testing.assert_frame_equal(alone, summarize(table, ["method", "role"]).query("method == 'oracle'").drop(columns="method").reset_index(drop=True))

def test_contrast_is_paired():
    a = scores()
    b = a.assign(value=a.value*(a.entity != "retain0"))
    row = contrast(a, b).iloc[0]
    assert row.difference == pytest.approx(a.value.mean() - b.value.mean()) and row.low >= 0
    assert contrast(a, a).loc[0, ["difference", "low", "high"]].tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="no unit in common"): contrast(a, a.assign(fact="other"))
    with pytest.raises(InputError, match="Only one of the two arms"): contrast(a, a.drop(columns="seed"))

def test_people_are_drawn_with_all_their_facts():
    "Where the facts of a person share one fate, an interval over facts covers too rarely, one over people as often as it says."
    rng, over_facts, over_people = np.random.default_rng(0), 0, 0
    for _ in range(200):
        fate = np.repeat(rng.random(40) < .6, 6).astype(float)
        a = pd.DataFrame(dict(entity=np.repeat(np.arange(40), 6), fact=np.tile(np.arange(6), 40), metric="accuracy", value=fate))
        row = contrast(a, a.assign(value=0.), n_boot=400).iloc[0]
        over_facts += row.low <= .6 <= row.high; over_people += row.low_people <= .6 <= row.high_people
    assert (row.facts, row.people) == (240, 40) and over_facts/200 < .8 and .88 <= over_people/200 <= .99
    alone = contrast(a[a.entity == 0], a[a.entity == 0]).iloc[0]
    assert alone.low == 0 and np.isnan(alone.low_people)

def test_bad_input_is_one_sentence(table):
    with pytest.raises(InputError, match="no style for 'Nobody'; the table STYLE knows base, vanilla"): style("Nobody")
    with pytest.raises(InputError, match="no style for 'Nobody'"): trajectories(table.replace({"method": {"NPO": "Nobody"}}))
    with pytest.raises(InputError, match="No score has metric 'bleu'; there are accuracy"): summarize(table, "role", metric="bleu")
    with pytest.raises(InputError, match="no column 'colour'"): summarize(table, "colour")
    with pytest.raises(InputError, match="have no value"): summarize(table.assign(value=np.nan), "role")
    with pytest.raises(InputError, match="more than once; choose one step and strength"): compare(table)
    with pytest.raises(InputError, match="no scores of the reference model 'oracle'"): frontier(table[table.method != "oracle"])
    with pytest.raises(InputError, match="not 'size'"): frontier(table, along="size")
    assert len({s.color for s in STYLE.values()}) == len({s.marker for s in STYLE.values()}) == len(STYLE)

def test_perception_of_the_forgotten_is_apart(table):
    groups = with_groups(table).groupby("group", observed=True)
    assert set(groups.get_group("test").kind) == {"identity"} and set(groups.get_group("forget perception").role) == {"test"}
    final = table[table.step.isna() | (table.step == 2) & (table.strength == 1)]
    shown = compare(final)
    assert shown.loc["oracle", "distance to oracle ↓"] == 0 and (shown.loc[["vanilla", "NPO"], "distance to oracle ↓"] > 0).all()
    assert {"test qa ↓", "forget perception ↑"} < set(shown) and "test qa ↑" in compare(final, text="↑")
    kept = compare(final, text="↑")  # an oracle lacks the text that is to stay: the goal for it is vanilla
    assert "distance to oracle ↓" not in kept and kept.loc["oracle", "distance to goal ↓"] > 0
    numbers = compare(final, text="↑", numbers=True)
    means, goal = (numbers[[c for c in numbers if c.endswith(" mean")]] for _ in "ab")
    goal = goal.loc["oracle"].where(~goal.columns.isin(["forget qa mean", "test qa mean"]), goal.loc["vanilla"])
    assert kept.loc["NPO", "distance to goal ↓"] == pytest.approx((means.loc["NPO"] - goal).abs().mean())

def test_figures_and_tables_are_byte_stable(table, tmp_path):
    draw = dict(heat=lambda: heatmap_knowledge(table[table.method.isin(["vanilla", "oracle"])]), run=lambda: trajectories(table, groups=("test", "forget perception")), front=lambda: frontier(table))
    for name, figure in draw.items():
        for folder in "ab": save_figure(figure(), tmp_path/folder, name, seeds=np.arange(2))
        matplotlib.pyplot.close("all")
    for folder in "ab": save_table(summarize(table, "role"), tmp_path/folder, "roles", caption="50 % of a_b & c", better={"mean": "↑"})
    for a in sorted((tmp_path/"a").iterdir()):
        b = tmp_path/"b"/a.name
        if a.suffix != ".json": assert a.read_bytes() == b.read_bytes(), a.name; continue
        about = json.loads(a.read_text())
        assert {**about, "written": 0} == {**json.loads(b.read_text()), "written": 0} and about["provenance"] and about["note"]
        assert all(hashlib.sha256((a.parent/n).read_bytes()).hexdigest() == digest for n, digest in about["sha256"].items())
    assert b"CreationDate" not in (tmp_path/"a"/"front.pdf").read_bytes() and b"/Type3" not in (tmp_path/"a"/"front.pdf").read_bytes()

def test_tables_lose_nothing_and_escape(tmp_path):
    df = pd.DataFrame(dict(method=["CVF+NCU", "a_b & 5 %", "x|y"], acc=[1/3, .33333, np.nan], n=[1, 2, 3]))
    save_table(df, tmp_path, "t", caption="50 % → x_y", better=dict(acc="↑"), digits=3)
    csv, md, tex = ((tmp_path/f"t.{s}").read_text() for s in ("csv", "md", "tex"))
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/"t.csv"), df)
    assert [tex.count(r) for r in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{lrr}", r"\end{table}")] == [1]*5
    assert r"a\_b \& 5 \%" in tex and r"acc $\uparrow$" in tex and r"50 \% $\rightarrow$ x\_y" in tex and tex.isascii()
    assert tex.count(r"\textbf{0.333}") == md.count("**0.333**") == 2  # equal as far as shown: both are best
    assert "x\\|y" in md and len({line.replace("\\|", "").count("|") for line in md.splitlines() if line.startswith("|")}) == 1
    with pytest.raises(InputError, match="cannot be marked"): save_table(df, tmp_path, "t", better=dict(nothing="↑"))

def test_an_error_while_writing_leaves_no_trace(table, tmp_path, monkeypatch):
    save_table(table.head(), tmp_path, "t")
    monkeypatch.setattr(reporting, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"): save_table(table.tail(), tmp_path, "t")
    assert not (tmp_path/"t.json").exists()  # nothing claims that the files belong together
    with pytest.raises(InputError, match="cannot hold a set"): save_table(table.head(), tmp_path, "other", seeds={1})
    assert not list(tmp_path.glob("other*")) and not list(tmp_path.glob(".partial-*"))

_WRITER = """
import time, matplotlib; matplotlib.use("Agg")
from pathlib import Path
import matplotlib.pyplot as plt
from mmu_study.reporting import save_figure
fig, ax = plt.subplots(figsize=(2, 2)); ax.plot([0, 1]); save_figure(fig, {folder!r}, "f")
whole = Path.write_bytes
def half(path, content): whole(path, content[:len(content)//2]); whole(Path({folder!r})/"half", b""); time.sleep(600)
Path.write_bytes = half
save_figure(fig, {folder!r}, "f")
"""

def test_killed_in_the_middle_of_a_figure(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", _WRITER.format(folder=str(tmp_path))], env={**os.environ, "PYTHONPATH": str(Path(reporting.__file__).parents[1])})
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path/"half").exists() and process.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    finally: process.send_signal(signal.SIGKILL); process.wait()
    (tmp_path/"half").unlink()
    assert (tmp_path/"f.png").read_bytes().endswith(b"IEND\xaeB`\x82")  # the whole figure of before
    assert not (tmp_path/"f.json").exists() and list(tmp_path.glob(".partial-f.png-*"))
    save_figure(matplotlib.pyplot.figure(), tmp_path, "f")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.json", "f.pdf", "f.png"]
