"""A run's predictor for use elsewhere: weights, a MONAI bundle or ONNX, each compared with the run when it is written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save
from torch import nn

from labeleff import __version__, export_onnx
from labeleff.backbones.outputs import Unwrapped
from labeleff.backbones.weights import state_of
from labeleff.data.provenance import HEADER
from labeleff.errors import RunError
from labeleff.files import write_atomically, write_json
from labeleff.parity import compared, windows_of
from labeleff.predictor import Predictor, Processing, open_predictor, structure_of

Target = Literal["safetensors", "bundle", "onnx"]


def export(run: Path, to: Target, folder: Path, *, cache: Path | None = None) -> dict[str, Any]:
    """Write the predictor of a run into a new folder, whole or not at all, and return the comparison with the run.

    ``safetensors``: ``model.safetensors``, with all that the run's own file says of itself in its header. ``bundle``: a MONAI
    bundle (``configs/``, ``models/``) that needs MONAI and torch alone. ``onnx``: ``model.onnx``, image [B, C, *S] float32
    to logits [B, K, *S], whatever the predictor is made of. Beside each lies ``processing.json``: how images are prepared,
    what predictions mean, and the comparison. Where that is on noise, ``why`` says why; it is not written, since it may name
    files of this machine.

    Args:
        run: Its directory, or the file it left.
        to: Which of them.
        folder: Must not exist.
        cache: Where prepared images are kept; windows of one of the run's are compared, see
            :func:`labeleff.parity.windows_of`.

    Raises:
        RunError: The run has no predictor, the folder exists, the predictor is no single network of MONAI (bundle), cannot
            be exported or a package is missing (onnx), or what was written does not predict what the run does.
    """
    if folder.exists():
        raise RunError(f"{folder}: is there already; give another folder")
    if to == "onnx":
        export_onnx.need_packages()
    predictor = open_predictor(run)
    there = next(parent for parent in folder.absolute().parents if parent.is_dir())  # a refusal leaves no folder behind
    with tempfile.TemporaryDirectory(prefix=".labeleff-", dir=there) as scratch:
        place = Path(scratch) / "export"
        described: dict[str, Any] = {}
        if to == "safetensors":
            again = _write_weights(predictor, place)
        elif to == "bundle":
            again = _write_bundle(predictor, place, folder.name)
        else:
            again, described["onnx"] = export_onnx.write_onnx(predictor, place)
        windows = windows_of(predictor, run, cache)
        found = compared(predictor, again, windows)
        if not found["largest_difference"] <= found["tolerance"]:  # NaN too
            raise RunError(
                f"{folder}: not written: what was exported differs from the run by {found['largest_difference']:.2g} in a "
                f"logit, and {found['tolerance']:.2g} is allowed; please report this"
            )
        write_json(
            place / "processing.json",
            {
                "labeleff": __version__,
                "backbone": {"name": predictor.recipe.backbone.name, **predictor.recipe.backbone.options},
                "predictor": predictor.header["predictor"],
                "split": predictor.header["split"],
                **described,
                "processing": predictor.processing.as_plain(),
                "parity": found,
            },
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(place, folder)
    return found | {"why": windows.why}


def _write_weights(predictor: Predictor, place: Path) -> nn.Module:
    """Write the weights, and return the network that they give back."""
    header = {HEADER: json.dumps(predictor.header)}
    write_atomically(place / "model.safetensors", save(state_of(predictor.network), metadata=header))
    again = structure_of(predictor.recipe, predictor.processing.task, predictor.header["predictor"])
    again.load_state_dict(load_file(place / "model.safetensors"))
    return again


# -- MONAI bundle -------------------------------------------------------------------------------------------------------


def _write_bundle(predictor: Predictor, place: Path, name: str) -> nn.Module:
    """Write a bundle, and return the network that MONAI makes of it.

    Raises:
        RunError: The predictor is no network of MONAI's own.
    """
    from monai.bundle import ConfigParser

    processing = predictor.processing
    own = predictor.network.network if isinstance(predictor.network, Unwrapped) else predictor.network
    if not isinstance(getattr(own, "definition", None), dict):
        raise RunError(
            f"{name}: the predictor is a {type(own).__name__}, which a MONAI bundle cannot describe; use --to safetensors"
        )
    definition = json.loads(json.dumps(own.definition))
    (place / "models").mkdir(parents=True)
    torch.save(state_of(own), place / "models" / "model.pt")
    write_json(place / "configs" / "inference.json", _inference(definition, processing))
    write_json(place / "configs" / "metadata.json", _metadata(processing, name))
    parser = ConfigParser()
    parser.read_config(str(place / "configs" / "inference.json"))
    network: nn.Module = parser.get_parsed_content("network_def")
    try:
        network.load_state_dict(torch.load(place / "models" / "model.pt", map_location="cpu", weights_only=True))
    except RuntimeError as error:
        raise RunError(
            f"{name}: a stage has changed the structure of the network, which a MONAI bundle cannot describe; use "
            "--to safetensors"
        ) from error
    return network


def _inference(definition: Mapping[str, Any], processing: Processing) -> dict[str, Any]:
    """Return the configuration that prepares, predicts and brings back; probabilities are averaged, as in the run."""
    volume = processing.axes == 3
    transforms: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
    ]
    if volume and processing.orientation is not None:
        transforms.append({"_target_": "Orientationd", "keys": "image", "axcodes": processing.orientation})
    if processing.window is not None:
        ends = dict(zip(("a_min", "a_max", "b_min", "b_max"), processing.window * 2, strict=True))
        transforms.append({"_target_": "ScaleIntensityRanged", "keys": "image", **ends, "clip": True})
    if processing.spacing is not None:
        transforms.append(
            {"_target_": "Spacingd", "keys": "image", "pixdim": list(processing.spacing), "mode": "bilinear"}
        )
    if processing.normalise == "zscore":
        transforms.append({"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True})
    elif processing.normalise == "minmax":
        transforms.append({"_target_": "ScaleIntensityd", "keys": "image", "channel_wise": True})
    transforms.append({"_target_": "EnsureTyped", "keys": "image"})
    inferer: dict[str, Any] = {
        "_target_": "SlidingWindowInferer",
        "roi_size": list(processing.patch),
        "sw_batch_size": processing.window_batch,
        "overlap": processing.overlap,
        "mode": "gaussian",
    }
    if processing.dimensions < processing.axes:
        inferer |= {"_target_": "SliceInferer", "spatial_dim": processing.slice_axis}
    activation = "torch.nn.Softmax(1)" if processing.exclusive else "torch.nn.Sigmoid()"
    pattern = "*.nii.gz" if volume else "*.png"
    return {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "input_dir": "./input",
        "output_dir": "./output",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": dict(definition),
        "weights": "$torch.load(os.path.join(@bundle_root, 'models', 'model.pt'), map_location='cpu', weights_only=True)",
        "loaded": "$@network_def.load_state_dict(@weights)",
        "network": f"$torch.nn.Sequential(@network_def, {activation}).to(@device).eval()",
        "preprocessing": {"_target_": "Compose", "transforms": transforms},
        "inferer": inferer,
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": False,
                    "to_tensor": True,
                },
                {
                    "_target_": "AsDiscreted",
                    "keys": "pred",
                    **({"argmax": True} if processing.exclusive else {"threshold": 0.5}),
                },
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "label",
                    "output_dtype": "uint8",
                    "separate_folder": False,
                    "resample": False,
                },
            ],
        },
        "files": f"$sorted(glob.glob(os.path.join(@input_dir, '{pattern}')))",
        "predict": "$lambda data: {**data, 'pred': @inferer(data['image'][None].to(@device), @network)[0].cpu()}",
        "run": [
            "$@loaded",
            "$[torch.no_grad()(lambda f: @postprocessing(@predict(@preprocessing({'image': f}))))(f) for f in @files]",
        ],
    }


def _metadata(processing: Processing, name: str) -> dict[str, Any]:
    """Return what a bundle says of itself."""
    import monai

    size = list(processing.patch)
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json",
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by labeleff {__version__}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.split("+")[0],
        "numpy_version": "2.0.0",
        "task": f"segmentation of {', '.join(processing.classes[1:])}",
        "description": f"{name}: a network trained with labeleff",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "num_channels": processing.channels,
                    "spatial_shape": size,
                    "dtype": "float32",
                    "is_patch_data": True,
                    "channel_def": {str(i): f"channel {i}" for i in range(processing.channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": processing.task.num_classes,
                    "spatial_shape": size,
                    "dtype": "float32",
                    "is_patch_data": True,
                    "channel_def": {
                        str(i): name for i, name in enumerate(processing.classes[not processing.exclusive :])
                    },
                }
            },
        },
    }
