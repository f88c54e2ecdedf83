"""The exported model as a TensorFlow SavedModel, by orbax-export: weights as variables, a batch of any size."""

import importlib.util
import pathlib

import jax

from ravar_jax.errors import UserError
from ravar_jax.export import PLATFORMS, ModelFunction

FOLDER = "saved_model"


def check_installed() -> None:
    """Does nothing.

    Raises:
        UserError: orbax-export is not installed.
    """
    if importlib.util.find_spec("orbax.export") is None:
        raise UserError("--saved_model needs orbax-export: pip install orbax-export")


def write_saved_model(folder: pathlib.Path, function: ModelFunction) -> None:
    """Writes `folder/saved_model`; inputs and outputs of its `serving_default` have the function's names."""
    from orbax import export as orbax_export

    from data_pipelines.quiet_tensorflow import tf

    signature = {
        name: tf.TensorSpec([None, *shape.shape[1:]], shape.dtype, name=name)
        for name, shape in function.inputs.items()
    }
    module = orbax_export.JaxModule(
        jax.tree.map(jax.numpy.asarray, function.weights),
        function.call,
        input_polymorphic_shape=dict.fromkeys(signature, "b, ..."),
        jax2tf_kwargs={"native_serialization_platforms": PLATFORMS},
    )
    serving = orbax_export.ServingConfig("serving_default", input_signature=[signature])
    orbax_export.ExportManager(module, [serving]).save(str(folder / FOLDER))
