"Labels decode to the answers and to nothing else, in every modality and task, alone and in conversations."
import pytest

from mmu_study.batches import IGNORE, ask, encode
from mmu_study.faceworld import Faceworld
from mmu_study.models import TinyLlava, tiny_llava
from mmu_study.records import MODALITIES, TASKS, where


@pytest.fixture(scope="module")
def world():
    records = where(Faceworld(people=4, celebrities=2, holdout=2, strangers=8, views=4).records, role="retain", fold="train", kind="identity")
    texts = [f"USER: {ask(r)}\nASSISTANT: {r['answer']}</s>" for r in records.remove_columns("image")]
    return tiny_llava(TinyLlava(vision_width=32, vision_layers=2, width=32, layers=1, heads=2), texts), records


def labels(mllm, items):
    batch = encode(mllm, items)
    assert ((batch["labels"] == IGNORE) | (batch["labels"] == batch["input_ids"])).all()
    return [mllm.tokenizer.decode(row[row != IGNORE]) for row in batch["labels"]]


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("task", TASKS)
def test_only_the_answer_is_a_label(world, modality, task):
    mllm, records = world
    some = [dict(r) for r in where(records, modality=modality, task=task).select(range(6))]
    assert labels(mllm, some) == [f" {r['answer']}</s>" for r in some]


def test_every_answer_of_a_conversation_is_a_label(world):
    mllm, records = world
    talk = [dict(r) for r in where(records, modality="vqa").select(range(5))]
    assert labels(mllm, [talk, dict(where(records, modality="qa")[0])])[0] == "".join(f" {r['answer']}</s>" for r in talk)
