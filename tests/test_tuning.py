"What tuning chooses, from hand-made scores; presets quote what was chosen."
import json

import pandas as pd
import pytest

from mmu_study.runs import Run, save_scores
from mmu_study.settings import InputError
from mmu_study.tuning import choose, frontier_of

def run_of(tmp_path, strengths, fold="validation"):
    "strengths: name -> (forget vqa, retain vqa) of the last step; every other column is 1. A worse first step must not matter."
    rows = []
    for name, (forget, retain) in strengths.items():
        for step, (f, r) in ((1, (1, 0)), (2, (forget, retain))):
            for role, kind, modality, task, value in (("forget", "identity", "vqa", "generation", f), ("forget", "identity", "qa", "generation", 1), ("retain", "identity", "vqa", "generation", r),
                    ("retain", "identity", "qa", "generation", 1), ("forget", "perception", "vqa", "cloze", 1), ("general", "perception", "vqa", "cloze", 1), ("forget", "identity", "vqa", "cloze", .7)):
                rows.append(dict(uid=f"{role}{kind}{modality}{task}", entity="p", role=role, fold=fold, modality=modality, task=task, fact="x", kind=kind, view=0, metric="accuracy", value=value,
                    prediction="", step=step, strength=name, own=False, way=True, method="M"))
    save_scores(pd.DataFrame(rows), tmp_path)
    (tmp_path/"unlearned.json").write_text(json.dumps([dict(strength=n, overrides=dict(lr=i), seconds=1.) for i, n in enumerate(strengths)] + [dict(strength="bad", overrides={}, diverged="nan")]))
    return Run("k", tmp_path, dict(parameters=dict(preset="embedded")))

def test_the_last_step_of_every_strength_counts(tmp_path):
    table = frontier_of(run_of(tmp_path, dict(weak=(.9, 1), right=(.1, .8), strong=(0, .5))))
    assert table.strength.tolist() == ["weak", "right", "strong"] and table.chosen.tolist() == [False, True, False] and table.reached.all()
    assert table.forget_vqa.tolist() == [.9, .1, 0] and table.retain_vqa.tolist() == [1, .8, .5] and (table.forget_qa == 1).all()
    assert [json.loads(o) for o in table.overrides] == [dict(lr=0), dict(lr=1), dict(lr=2)]

def test_nobody_forgets(tmp_path):
    table = frontier_of(run_of(tmp_path, dict(weak=(.9, 1), strong=(.3, .1))))
    assert table.chosen.tolist() == [False, True] and not table.reached.any()

def test_test_questions_are_refused(tmp_path):
    with pytest.raises(InputError, match="asked questions of the folds test; tuning uses validation only"): frontier_of(run_of(tmp_path, dict(weak=(.9, 1)), fold="test"))

def test_equal_strengths_give_the_first():
    row = dict(forget_vqa=.05, retain_vqa=.9, retain_qa=.9, general=.9)
    assert choose(pd.DataFrame([row, row])) == 0
