"""Classifiers of pictures: what they score, how they load, and where their memory is."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from builder.landscapes import imagine, paint
from builder.train_pocket_classifier import LABELS, picture
from ourvidz_serverless.errors import Cancelled, InternalError, ModelLoadError
from ourvidz_serverless.models.loading import fetch, readahead
from ourvidz_serverless.models.memory.device_memory import open_ledger
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.models.safety import loader
from ourvidz_serverless.models.safety.classifier import MAX_BATCH, ImageClassifier
from ourvidz_serverless.settings import Settings

POCKET = Settings(safety_model="pocket", safety_rules="boat:refuse")


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return open_ledger(POCKET)


@pytest.fixture(scope="module")
def pocket(ledger: Ledger) -> ImageClassifier:
    (classifier,) = loader.load(POCKET, ledger)
    return classifier


def load(place: Any, rules: str = "boat:refuse", **settings: Any) -> tuple[ImageClassifier, ...]:
    asked = Settings(safety_model=(str(place),), safety_rules=rules, **settings)
    return loader.load(asked, open_ledger(asked))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the pocket classifier."""
    return Path(shutil.copytree(loader.POCKET, tmp_path / "eyes"))


def test_the_pocket_classifier_reads_new_drawings(pocket: ImageClassifier) -> None:
    rng = random.Random("new drawings")
    drawn = [picture(rng) for _ in range(40)]

    scores = pocket.scores([pixels for pixels, _ in drawn])

    read = [max(each, key=each.__getitem__) for each in scores]
    wanted = [LABELS[number] for _, number in drawn]
    assert sum(one == other for one, other in zip(read, wanted, strict=True)) >= 38


def test_the_scores_of_a_picture_are_shares_of_one_in_the_order_of_the_pictures(
    pocket: ImageClassifier,
) -> None:
    rng = random.Random(1)
    pictures = [paint(imagine(rng), 96, 64) for _ in range(MAX_BATCH + 2)]

    together = pocket.scores(pictures)
    alone = [pocket.scores([each])[0] for each in (pictures[0], pictures[-1])]

    assert len(together) == MAX_BATCH + 2
    for row in together:
        assert set(row) == set(LABELS)
        assert sum(row.values()) == pytest.approx(1, abs=1e-5)
    for one, other in zip(alone, (together[0], together[-1]), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_classifier_is_in_the_ledger_on_the_device_and_pinned(
    pocket: ImageClassifier, ledger: Ledger
) -> None:
    (row,) = ledger.report()

    assert (row.name, row.family, row.source) == ("safety_pocket", "safety", "pocket")
    assert (row.state, row.is_pinned) == ("device", True)
    assert 100_000 < row.num_bytes < 2_000_000


def test_a_classifier_that_left_the_device_comes_back_for_the_next_picture(
    pocket: ImageClassifier, ledger: Ledger
) -> None:
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    before = pocket.scores([grey])
    assert ledger.request_move("safety_pocket", "disk", force=True).is_done.wait(60)

    assert pocket.scores([grey]) == before


def test_a_simulated_device_counts_the_memory_of_looking() -> None:
    asked = POCKET.model_copy(update={"vram_budget_gb": 0.5})
    ledger = open_ledger(asked)
    (classifier,) = loader.load(asked, ledger)

    classifier.scores([np.zeros((64, 64, 3), dtype=np.uint8)] * 6)

    (row,) = ledger.report()
    assert set(row.working_bytes) == {"1 pictures", "6 pictures"}
    assert all(size > 0 for size in row.working_bytes.values())


def test_a_stop_ends_the_look(pocket: ImageClassifier) -> None:
    def stopped() -> None:
        raise Cancelled("the job was cancelled")

    with pytest.raises(Cancelled):
        pocket.scores([np.zeros((64, 64, 3), dtype=np.uint8)], stopped)


def test_scores_that_are_no_numbers_are_an_error(folder: Path) -> None:
    (classifier,) = load(folder)
    with torch.no_grad():
        next(classifier._model.parameters()).fill_(float("nan"))

    with pytest.raises(InternalError):
        classifier.scores([np.zeros((64, 64, 3), dtype=np.uint8)])


def test_independent_labels_have_scores_that_do_not_add_up_to_one(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (folder / "config.json").write_text(json.dumps(config))
    (classifier,) = load(folder)

    (row,) = classifier.scores([np.zeros((64, 64, 3), dtype=np.uint8)])

    assert sum(row.values()) != pytest.approx(1, abs=1e-3)
    assert all(0 < score < 1 for score in row.values())


def test_the_name_of_a_folder_has_a_hash_of_its_weights_and_that_of_a_repository_its_commit(
    folder: Path, tmp_path: Path, pocket: ImageClassifier
) -> None:
    cached = tmp_path / "models--org--eyes" / "snapshots" / ("0123456789abcdef" * 2)
    shutil.copytree(loader.POCKET, cached)

    (from_folder,) = load(folder)
    (from_hub,) = load("org/eyes", model_dirs=str(tmp_path))

    assert from_folder.name.removeprefix("eyes@") == pocket.name.removeprefix("pocket@")
    assert from_hub.name == "org/eyes@0123456789ab"


def test_each_of_several_classifiers_is_loaded(folder: Path) -> None:
    asked = Settings(safety_model=f"pocket,{folder}", safety_rules="boat:refuse")

    names = [each.name.partition("@")[0] for each in loader.load(asked, open_ledger(asked))]

    assert names == ["pocket", "eyes"]


def test_a_vit_with_the_image_processor_of_an_old_version_loads(tmp_path: Path) -> None:
    # As in nateraw/vit-age-classifier, whose processor has no name and one number for its size.
    processor = {"do_resize": True, "size": 32, "do_normalize": True}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    labels = {0: "0-2", 1: "more than 70"}
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "ages")
    (tmp_path / "ages" / "preprocessor_config.json").write_text(json.dumps(processor))

    (classifier,) = load(tmp_path / "ages", "0-2:refuse_if_sexual")

    assert set(classifier.scores([Image.new("RGB", (50, 40))])[0]) == {"0-2", "more than 70"}


def test_every_classifier_is_fetched_by_a_worker_that_makes_pictures() -> None:
    named = {"safety_model": "org/one,org/two@abc", "safety_rules": "nsfw:refuse"}
    weights = [
        [each.place for each in fetch.wanted(Settings(families=families, **named))]
        for families in (("sdxl",), ("chat",))
    ]

    assert weights == [["org/one", "org/two@abc"], []]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("boat:refuse,ship:mark", "SAFETY_RULES: no classifier has the label ship; there is "),
        ("ship:mark", "SAFETY_RULES: no rule for pocket@"),
    ],
)
def test_a_rule_for_an_unknown_label_and_a_classifier_without_a_rule_end_the_start(
    rules: str, message: str
) -> None:
    with pytest.raises(ModelLoadError) as refused:
        load("pocket", rules)

    assert refused.value.message.startswith(message)
    assert "nothing, boat, house, tree" in refused.value.message


def test_a_folder_that_is_no_classifier_of_transformers_ends_the_start(folder: Path) -> None:
    # The layout of timm's checkpoints.
    (folder / "config.json").write_text('{"architecture": "vit_tiny_patch16_384"}')

    with pytest.raises(ModelLoadError) as refused:
        load(folder)

    assert refused.value.message.startswith("SAFETY_MODEL: eyes does not load as an image class")


def test_a_classifier_without_its_weights_ends_the_start_before_anything_is_loaded(
    folder: Path,
) -> None:
    (folder / "model.safetensors").write_bytes(b"cut off")
    asked = Settings(safety_model=str(folder), safety_rules="boat:refuse")

    with pytest.raises(ModelLoadError, match=r"SAFETY_MODEL: .*model\.safetensors"):
        readahead.files(asked)
