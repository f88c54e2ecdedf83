"""TensorFlow as this project uses it: no start-up chatter, and the accelerators left to JAX.

Every module that needs TensorFlow imports it from here, so that the settings are in place before its first import.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# As fast on our graphs, and its notice is printed before any logging level applies.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf
from absl import logging

tf.config.set_visible_devices([], "GPU")
logging.set_verbosity(logging.ERROR)  # TFDS warns of its own deprecated parts, once for every field

__all__ = ["tf"]
