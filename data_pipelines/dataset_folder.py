"""Which folder of TFRecords a config means; MiniRefAVA is built there on first use."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from data_pipelines.mini_refava import mini_refava_dataset_builder
from ravar_jax.errors import UsageError, UserError


def dataset_folder(config: ConfigDict) -> epath.Path:
    """Returns the folder of the dataset that `config.data` names, building MiniRefAVA where it is absent.

    RefAVA is the folder of the highest version under `data_dir/refava/<config>/`, the newest where several have it.

    Raises:
        UserError: RefAVA has not been prepared.
        UsageError: the dataset is not one of `mini_refava` and `refava`.
    """
    data = config.data
    if data.dataset not in ("mini_refava", "refava"):
        raise UsageError(f"data.dataset={data.dataset!r} is not one of mini_refava, refava")
    if folder := existing_dataset_folder(config):
        return folder
    if data.dataset == "mini_refava":
        return epath.Path(
            mini_refava_dataset_builder.build(
                data.data_dir, data.seed, data.num_clips, data.stored_frames
            )
        )
    raise UserError(
        f"data.data_dir={data.data_dir} holds no RefAVA dataset; write one with "
        f"launch/prepare_refava.py --annotations DIR --videos DIR --data_dir {data.data_dir}"
    )


def existing_dataset_folder(config: ConfigDict) -> epath.Path | None:
    """Returns the folder of the dataset where it is at hand; None where it is not (and nothing is built)."""
    data = config.data
    if data.dataset == "refava":
        return _newest_refava(epath.Path(data.data_dir) / "refava")
    builder_config = mini_refava_dataset_builder.MiniRefavaConfig(
        seed=data.seed, num_clips=data.num_clips, stored_frames=data.stored_frames
    )
    version = mini_refava_dataset_builder.VERSION
    folder = epath.Path(data.data_dir) / "mini_refava" / builder_config.name / version
    return folder if (folder / "dataset_info.json").exists() else None


def dataset_identity(config: ConfigDict) -> dict[str, Any]:
    """Returns what names a dataset in a config, by config key."""
    data = config.data
    if data.dataset != "mini_refava":
        return {"data.dataset": data.dataset}
    return {
        "data.dataset": f"mini_refava {mini_refava_dataset_builder.VERSION}",
        "data.seed": data.seed,
        "data.num_clips": data.num_clips,
        "data.stored_frames": data.stored_frames,
    }


def _newest_refava(parent: epath.Path) -> epath.Path | None:
    found = []
    for configuration in parent.iterdir() if parent.is_dir() else ():
        for folder in configuration.iterdir() if configuration.is_dir() else ():
            version = folder.name.split(".")
            # The information is written last, so a half-built folder does not count.
            info = folder / "dataset_info.json"
            if all(part.isdecimal() for part in version) and info.exists():
                found.append((tuple(map(int, version)), info.stat().mtime, folder))
    return max(found)[-1] if found else None
