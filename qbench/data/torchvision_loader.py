"""torchvision, imported late and also beside a PyTorch that its compiled operators do not fit."""

import importlib
import sys
from types import ModuleType

from qbench.errors import UserError

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []  # a torch.library.Library takes its operators with it when it is collected


def torchvision() -> ModuleType:
    """The torchvision package; imported on the first call (more than a second), so call it only where it is used.

    Its wheels hold C++ operators built for one build of PyTorch. Where they cannot be loaded (a CUDA wheel beside a
    CPU-only PyTorch) the import fails at `torchvision::nms`, although data sets, transforms and classifiers need no
    operator. Only then are the two names that its Python code decorates declared, without a kernel, and the import is
    tried again.

    Errors: UserError when torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise UserError(f"torchvision is needed here ({error}); install it with: pip install torchvision") from error
    except RuntimeError as error:
        if _declared or "torchvision::" not in str(error):
            raise
    import torch

    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the first attempt left half imported
    return importlib.import_module("torchvision")
