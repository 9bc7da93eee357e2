"""Imported once by the server that runs are forked from: everything slow, nothing that starts a thread or asks for a device."""

import matplotlib.figure
import monai.inferers.utils
import monai.metrics.utils
import monai.networks.nets
import scipy.ndimage
import torch.utils.tensorboard

import labeleff.plugins
import labeleff.recipe_io
import labeleff.runner

# named, so that no tool takes the imports for forgotten ones: without them all works, only slowly
PRELOADED = (
    labeleff.plugins, labeleff.recipe_io, labeleff.runner, matplotlib.figure, monai.inferers.utils, monai.metrics.utils,
    monai.networks.nets, scipy.ndimage, torch.utils.tensorboard,
)  # fmt: skip
