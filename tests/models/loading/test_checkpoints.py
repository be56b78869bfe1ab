"""Where weights are found, and whether they are mapped into memory."""

from pathlib import Path

import pytest

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.models.loading import checkpoints
from ourvidz_serverless.settings import MODEL_DIRS, Settings

REPOSITORY = "stabilityai/stable-diffusion-xl-base-1.0"

#: As on a RunPod worker: an image, a cached model on the host's disk, a network volume.
MOUNTS = """\
overlay / overlay rw,relatime 0 0
mfs#eu-1.example:9421 /runpod-volume fuse rw,nosuid,user_id=0,allow_other 0 0
/dev/nvme0n1p1 /runpod-volume/huggingface-cache/hub ext4 ro,relatime 0 0
nas:/models /mnt/our\\040models nfs4 rw 0 0
tmpfs /scratch tmpfs rw 0 0
"""


def cache(folder: Path, *revisions: str, main: str | None = None) -> Path:
    """A repository in a cache of the hub's layout; returns the first revision's folder."""
    home = folder / "models--stabilityai--stable-diffusion-xl-base-1.0"
    for revision in revisions:
        (home / "snapshots" / revision / "unet").mkdir(parents=True)
        (home / "snapshots" / revision / "unet" / "config.json").write_text("{}")
    if main:
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(main)
    return home / "snapshots" / revisions[0]


def find(name: str | Path, *folders: Path) -> Path:
    return checkpoints.find("SDXL_MODEL", name, folders)


def test_weights_are_looked_up_in_the_image_then_runpods_cache_then_the_volume() -> None:
    assert Settings().model_dirs == MODEL_DIRS
    assert [str(folder) for folder in MODEL_DIRS] == [
        "models",
        "/runpod-volume/huggingface-cache/hub",
        "/runpod-volume/models",
    ]


def test_model_dirs_is_a_comma_separated_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_DIRS", "/a, /b")

    assert Settings().model_dirs == (Path("/a"), Path("/b"))


def test_a_path_that_exists_is_used_directly(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()

    assert find(tmp_path / "x.safetensors") == tmp_path / "x.safetensors"


def test_a_repository_is_found_by_its_name(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "aaa")

    assert find(REPOSITORY, tmp_path) == snapshot


def test_a_file_in_a_repository_is_found_by_both_names(tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "aaa")

    assert find(f"{REPOSITORY}/unet/config.json", tmp_path) == snapshot / "unet/config.json"


def test_a_file_in_a_folder_is_found_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()

    assert find("x.safetensors", tmp_path) == tmp_path / "x.safetensors"


def test_the_first_folder_that_has_the_repository_wins(tmp_path: Path) -> None:
    baked, volume = tmp_path / "baked", tmp_path / "volume"
    cache(volume, "old")
    snapshot = cache(baked, "new")

    assert find(REPOSITORY, tmp_path / "none", baked, volume) == snapshot


def test_a_folder_without_the_file_does_not_hide_the_next(tmp_path: Path) -> None:
    cache(tmp_path / "cached", "aaa")
    snapshot = cache(tmp_path / "volume", "aaa")
    (snapshot / "x.safetensors").touch()

    found = find(f"{REPOSITORY}/x.safetensors", tmp_path / "cached", tmp_path / "volume")

    assert found == snapshot / "x.safetensors"


def test_of_several_revisions_the_main_one_is_used(tmp_path: Path) -> None:
    cache(tmp_path, "old", "new", main="new\n")

    assert find(REPOSITORY, tmp_path).name == "new"


def test_another_revision_is_named_with_an_at_sign(tmp_path: Path) -> None:
    cache(tmp_path, "old", "new", main="new")

    assert find(f"{REPOSITORY}@old", tmp_path).name == "old"
    assert find(f"{REPOSITORY}@old/unet/config.json", tmp_path).parts[-3] == "old"


def test_several_revisions_without_a_main_one_are_an_error(tmp_path: Path) -> None:
    cache(tmp_path, "old", "new")

    with pytest.raises(ModelLoadError, match=r"SDXL_MODEL: .* has several revisions"):
        find(REPOSITORY, tmp_path)


@pytest.mark.parametrize(
    "name", [REPOSITORY, f"{REPOSITORY}@older", f"{REPOSITORY}/no.json", "no.safetensors"]
)
def test_a_missing_checkpoint_is_reported_with_all_places_that_were_searched(
    name: str, tmp_path: Path
) -> None:
    cache(tmp_path / "other", "aaa")
    folders = (tmp_path / "image", tmp_path / "volume")

    with pytest.raises(ModelLoadError) as wrong:
        find(name, *folders)

    assert wrong.value.message == f"SDXL_MODEL: there is no {name} here nor in " + ", ".join(
        map(str, folders)
    )


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("/worker/models", False),
        ("/runpod-volume/models", True),
        ("/runpod-volume/huggingface-cache", True),
        ("/runpod-volume/huggingface-cache/hub/models--x--y", False),
        ("/mnt/our models/x.safetensors", True),
        ("/mnt/our", False),
        ("/scratch/x", False),
    ],
)
def test_a_network_file_system_is_recognised_by_its_mount(path: str, remote: bool) -> None:
    assert checkpoints.is_remote(Path(path), MOUNTS) is remote


def test_the_fuse_disk_of_a_rootless_container_is_local() -> None:
    assert not checkpoints.is_remote(Path("/x"), "x / fuse.fuse-overlayfs rw 0 0\n")


def test_a_link_to_a_network_volume_is_remote(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "volume")
    mounts = f"disk / ext4 rw 0 0\nmfs#x {tmp_path / 'volume'} fuse rw 0 0\n"

    assert checkpoints.is_remote(tmp_path / "models" / "x.safetensors", mounts)


def test_a_local_folder_is_mapped_by_the_machines_own_mounts(tmp_path: Path) -> None:
    assert checkpoints.is_mapped(tmp_path, "auto")


def test_a_system_without_a_table_of_mounts_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "MOUNTS", tmp_path / "none")

    assert checkpoints.is_mapped(tmp_path, "auto")


def test_the_setting_forces_or_forbids_mapping(tmp_path: Path) -> None:
    assert checkpoints.is_mapped(Path("/runpod-volume"), "always")
    assert not checkpoints.is_mapped(tmp_path, "never")
