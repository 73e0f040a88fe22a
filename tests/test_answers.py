"Claims in figures/ are what the answers beside them say: recomputed here with other code and another random generator."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmu_study.claims import verdict

FIGURES = Path(__file__).parents[1]/"figures"
PICTURES, TEXT = dict(role="test", modality="vqa"), dict(role="test", modality="qa")
RETAINED, REAL = dict(role="retain"), dict(role="real")

def answers(study: str) -> pd.DataFrame:
    every = pd.read_parquet(FIGURES/study/"answers.parquet")
    return every[(every.task == "generation") & (every.kind == "identity")]

def of(every: pd.DataFrame, arm: str, role: str, modality=None) -> pd.DataFrame:
    "Right and asked of every fact of a person in a world, at 10 %."
    kept = every[(every.arm == arm) & (every.role == role) & (every.forget_pct == 10) & (True if modality is None else every.modality == modality)]
    return kept.groupby(["seed", "entity", "fact"])[["right", "asked"]].sum()

def interval(a: pd.DataFrame, b: pd.DataFrame, over: list[str]) -> tuple:
    "The difference of two arms on their common facts, its 95 % interval from 4,000 draws of facts or people, how many of these and how many seeds there are."
    both = a.merge(b, left_index=True, right_index=True, suffixes=("_a", "_b")).groupby(level=over).sum().to_numpy()
    drawn = both[np.random.default_rng(12345).integers(len(both), size=(4000, len(both)))].sum(axis=1)
    rates = np.vstack([both.sum(axis=0), drawn])
    difference = rates[:, 0]/rates[:, 1] - rates[:, 2]/rates[:, 3]
    return difference[0], *np.quantile(difference[1:], [.025, .975]), len(both), a.index.intersection(b.index).get_level_values("seed").nunique()

def scaled(part: pd.DataFrame, by: float) -> pd.DataFrame: return part.assign(right=by*part.right)

def half_gone(every, arm):
    "M1: halfway between vanilla and the oracle, minus what is left."
    vanilla, oracle = of(every, "vanilla", **PICTURES), of(every, "oracle", **PICTURES)
    return vanilla.assign(right=(vanilla.right + oracle.right)/2), of(every, arm, **PICTURES)

CLAIMS = [  # study, claim, arm as in claims.csv, which of its parts, the two sides from the answers
    ("mmunlearner", "M1", "10 %", 0, lambda e: half_gone(e, "MMUnlearner")),
    ("mmunlearner", "M2", "10 %", 0, lambda e: (of(e, "MMUnlearner", **TEXT), scaled(of(e, "vanilla", **TEXT), .95))),
    ("mmunlearner", "M5", "10 %", 0, lambda e: (of(e, "MMUnlearner", **TEXT), of(e, "no mask", **TEXT))),
    ("manu", "N5", "10 %, against GradDiff", 1, lambda e: (of(e, "MANU", **REAL), of(e, "GradDiff", **REAL))),
    ("manu", "N1", "10 %", 0, lambda e: (of(e, "vanilla", **PICTURES), of(e, "MANU", **PICTURES))),
    ("null_space_cvf", "C3", "10 %", 0, lambda e: (of(e, "CVF+NCU (reconstruction)", role="retain", modality="vqa"), scaled(of(e, "vanilla", role="retain", modality="vqa"), .95)))]

@pytest.mark.parametrize("unit, over, suffix", [("facts", ["seed", "entity", "fact"], ""), ("people", ["seed", "entity"], "_people")], ids=["facts", "people"])
@pytest.mark.parametrize("study, claim, arm, part, sides", CLAIMS, ids=[f"{c[0]} {c[1]}" for c in CLAIMS])
def test_a_claim_follows_from_the_stored_answers(study, claim, arm, part, sides, unit, over, suffix):
    found = pd.read_csv(FIGURES/study/"claims.csv")
    row = found[(found.claim == claim) & (found.arm == arm)].iloc[part]
    difference, low, high, units, seeds = interval(*sides(answers(study)), over)
    assert (units, seeds) == (row[unit], row.seeds)
    assert difference == pytest.approx(row.difference, abs=1e-4) and abs(low - row["low" + suffix]) < .02 and abs(high - row["high" + suffix]) < .02
    if min(abs(low), abs(high)) > .02: assert verdict(low, high) == row["verdict" + suffix]

def test_all_claims_of_the_studies_are_collected():
    every = pd.read_csv(FIGURES/"claims.csv", dtype=dict(paper=str))
    assert every.claim.nunique() >= 20 and {"2502.11051", "2502.15910", "2605.05909", "2507.01271"} <= {*every.paper}
    assert every[["difference", "facts", "seeds", "verdict"]].notna().all().all() and (every.low <= every.high).all()
    for study, part in every.groupby("study"):
        own = pd.read_csv(FIGURES/study/"claims.csv")
        assert len(part) == len(own) and np.allclose(part.difference, own.difference)
        assert (part.commit == json.loads((FIGURES/study/"claims.json").read_text())["provenance"]["commit"]).all()
