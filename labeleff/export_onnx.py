"""A predictor as a single ONNX file, for the runtimes of others. Needs ``labeleff[onnx]``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labeleff.backbones.outputs import accepts, copy_of
from labeleff.errors import RunError, one_line
from labeleff.evaluation.inference import evaluating
from labeleff.files import write_atomically
from labeleff.functional.norms import OnBatchStatistics
from labeleff.parity import TOLERANCE
from labeleff.predictor import Predictor

FILE = "model.onnx"
OPSET = 18
"""What torch's exporter is written for; later ones are converted from it, and older runtimes cannot read them."""
FIXED = frozenset({"unetr", "swin_unetr"})
"""Backbones that lay out positions and windows of attention for one size of image; all others are tried with any."""
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
LIMIT = 2**31 - 2**24
"""Bytes of weights that one file of ONNX can hold, a protocol buffer, with room for the graph."""
MOST = 32
"""Sizes vary by multiples of this at most: no network that is deeper is looked for."""


class OnnxNetwork(nn.Module):
    """An ONNX file as a network, computed by onnxruntime on the CPU.

    Args:
        content: Of the file.

    Raises:
        RuntimeError: The runtime cannot compute it.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's errors have no common base
            raise RuntimeError(str(error)) from error

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [B, K, *S] of [B, C, *S].

        Raises:
            RuntimeError: The runtime could not compute them.
        """
        try:
            (logits,) = self.session.run(["logits"], {"image": image.numpy()})
        except Exception as error:
            raise RuntimeError(str(error)) from error
        return torch.from_numpy(logits)


def need_packages() -> None:
    """Raise where a package is missing.

    Raises:
        RunError: It is.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise RunError(f"--to onnx needs {', '.join(missing)}, which is not installed: pip install 'labeleff[onnx]'")


def write_onnx(predictor: Predictor, place: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Write ``model.onnx`` into a folder; return it as a network, and a description of its input and output.

    The size of the batch is free, and so are those of the image, in multiples of a power of 2, where the network allows it
    and another size gives what the network gives.

    Raises:
        RunError: The network cannot be exported.
    """
    name, network, processing = predictor.recipe.backbone.name, predictor.network, predictor.processing
    if isinstance(network, OnBatchStatistics):
        raise RunError(
            f"{name} predicts with the statistics of each batch (norm_stats: batch), which ONNX has no inference for; use "
            "--to safetensors"
        )
    size = sum(p.numel() * p.element_size() for p in (*network.parameters(), *network.buffers()))
    if size > LIMIT:
        raise RunError(f"{name}: {size / 2**30:.1f} GiB of weights, and a file of ONNX holds 2; use --to safetensors")
    step = _step(predictor)
    other = tuple(n - step if n > 2 * step else n + step for n in processing.patch)
    content = None
    if name not in FIXED and step > 1 and accepts(network, processing.task, other):
        content = _tried(predictor, step, other)
    step = step if content is not None else 0
    try:
        content = content or _graph(predictor, step)
        again = OnnxNetwork(content)
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
        reason = one_line(_first_cause(error))
        raise RunError(
            f"{name} cannot be exported to ONNX by torch {torch.__version__.split('+')[0]} ({reason}); use --to safetensors"
        ) from error
    write_atomically(place / FILE, content)
    return again, _described(predictor, step)


def _step(predictor: Predictor) -> int:
    """Return the largest power of 2, up to :data:`MOST`, that divides every length of the patch: what the network may halve."""
    step = MOST
    while any(n % step for n in predictor.processing.patch):
        step //= 2
    return step


def _tried(predictor: Predictor, step: int, other: tuple[int, ...]) -> bytes | None:
    """Return a graph for images of any size, or None where there is none that computes another size rightly."""
    noise = torch.randn(1, predictor.processing.channels, *other, generator=torch.Generator().manual_seed(0))
    try:
        content = _graph(predictor, step)
        with evaluating(predictor.network):
            one = predictor.network(noise).float()
        two = OnnxNetwork(content)(noise)
        far = float((one - two).abs().max())
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError):
        return None
    return content if far <= TOLERANCE * max(1.0, float(one.abs().max())) else None


def _graph(predictor: Predictor, step: int) -> bytes:
    """Return the file of a graph whose image has any size of a multiple of a step, or with step 0 the patch's.

    Raises:
        torch.onnx.OnnxExporterError: The exporter gives up.
        RuntimeError: What it made takes one size of batch only.
    """
    processing = predictor.processing
    # lengths of two batches and two steps, since 1 is taken for a constant; of a copy, since some networks keep what they compute
    image = torch.zeros(2, processing.channels, *(max(n, 2 * step) for n in processing.patch))
    shapes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if step:
        shapes |= {
            axis: step * torch.export.Dim(f"size_{axis - 2}", min=1) for axis in range(2, 2 + processing.dimensions)
        }
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            copy_of(predictor.network).eval(),
            (image,),
            dynamo=True,
            opset_version=OPSET,
            optimize=True,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=(shapes,),
            verbose=False,
        )
    assert program is not None  # noqa: S101  what the exporter of graphs returns
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise RuntimeError(f"{value.name} would have batches of 2 only")
    _strip(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _strip(message: Any) -> None:
    """Take out of a protocol buffer, in place, what the exporter notes for developers: files and lines of this machine."""
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                _strip(part)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter tells developers from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_cause(error: BaseException) -> str:
    """Return the message of the error that an error came from: the exporter's own is a page."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _described(predictor: Predictor, step: int) -> dict[str, Any]:
    """Return what a caller must know of the file; sizes that are free are text."""
    processing = predictor.processing
    sizes: list[int | str] = [f"{step}*size_{axis}" if step else n for axis, n in enumerate(processing.patch)]
    return {
        "file": FILE,
        "opset": OPSET,
        "input": {"name": "image", "type": "float32", "shape": ["batch", processing.channels, *sizes]},
        "output": {"name": "logits", "type": "float32", "shape": ["batch", processing.task.num_classes, *sizes]},
    }
