"""Runs a net with its batch-norms, residual sums, activations and input quantizers fused; the net stays as it is.

The net's traced graph says what follows what. Modules are read when they are called, so that what a hook switches on or
off, or replaces, counts; whatever the kernels do not know runs as it stands in the net. Only networks of qbench.models
and plain sequences are looked into: their forward passes do not depend on anything but their modules.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qbench.kernels.backend import KINDS
from qbench.kernels.functions import fused, takes
from qbench.models.parts import Add
from qbench.quant import quantizer
from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Kernel

RELUS = {nn.ReLU: Kernel("relu", math.inf), nn.ReLU6: Kernel("relu", 6.0)}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = type(m) is nn.Sequential or type(m).__module__.startswith("qbench.models.")
        return not (inside and any(True for _ in m.children()))


class _Norm(nn.Module):
    """One batch-norm with what follows it; gives (y, q), of which one may be None.

    The modules are held outside of torch's registration: they belong to the net.
    """

    def __init__(
        self, bn: nn.BatchNorm2d, add: Add | None, act: nn.Module | None, layer: QuantLayer | None, want_y: bool
    ) -> None:
        super().__init__()
        self.held = (bn, add, act, layer)
        self.want_y = want_y

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        bn, add, act, layer = self.held
        behind = None if layer is None else layer.input_quantizer
        kernel = _kernel(act, x)
        if takes(x) and _known(bn, x) and (act is None or kernel is not None):
            own = kernel is not None and kernel.kind in KINDS  # what stands in place of the ReLU is all there is
            second = kernel if own else _kernel(behind, x)
            second = (
                None if second is not None and second.kind not in KINDS else second
            )  # one that bounds runs by itself
            want = (not own and (self.want_y or (behind is not None and second is None)), second is not None)
            fast, first = quantizer.fast.backend, None if own else kernel
            y, q = fused(fast, x, norm=bn, residual=residual, activation=first, quantizer=second, want=want)
            y, q = (q, None) if own else (y, q)
        else:
            y, q = bn(x), None
            y = y if add is None else add(y, residual)
            y = y if act is None else act(y)
        if behind is not None and q is None:
            q = behind(y)
        return (y if self.want_y else None), q


def _kernel(module: nn.Module | None, x: Tensor) -> Kernel | None:
    """What an activation or a quantizer does, where the kernels can do it now."""
    if module is None or not getattr(module, "enabled", True) or getattr(module, "watches", False):
        return None
    return RELUS[type(module)] if type(module) in RELUS else module.kernel(x.shape)  # type: ignore[operator, index, no-any-return]


def _known(bn: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether the kernels do what the batch-norm does now: with running statistics there is no backward pass.

    One value per channel has no statistics: torch's module refuses it.
    """
    if bn.training:
        return bn.momentum is not None and x.numel() > x.shape[1]
    return bn.momentum is not None and not (torch.is_grad_enabled() and x.requires_grad)


def _is_activation(module: nn.Module | None) -> bool:
    return type(module) in RELUS or callable(getattr(module, "kernel", None))


def _fusable(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats


def _takes_quantized(layer: nn.Module) -> bool:
    return (
        isinstance(layer, QuantLayer)
        and layer.input_quantizer is not None
        and (type(layer).forward is QuantLayer.forward or layer.sees_both)
    )


class Net:
    """A net that is called through its fused graph.

    Falls back to the net itself: without kernels, off the CPU, where it cannot be traced, and while anyone listens in
    with a forward or backward hook.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graph: Callable[[Tensor], Tensor] | None = None
        self.seen: list[tuple[dict[str, Any], str, nn.Module]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if quantizer.fast is None or x.device.type != "cpu" or not isinstance(self.model, nn.Module):
            return self.model(x)  # type: ignore[no-any-return]
        if self.seen is None or any(owner.get(name) is not module for owner, name, module in self.seen):
            self._build()
        if self.graph is None or any(_watched(module) for _, _, module in self.seen or ()):
            return self.model(x)  # type: ignore[no-any-return]
        return self.graph(x)

    def _build(self) -> None:
        self.seen = [
            (m._modules, name, c) for m in self.model.modules() for name, c in m._modules.items() if c is not None
        ]
        try:
            tracer = _Tracer()
            graph = tracer.trace(self.model)
        except Exception:  # whatever a strange net raises while it is traced: it runs as it is
            self.graph = None
            return
        new = _fuse(self.model, graph)
        self.graph = (
            fx.GraphModule({**dict(self.model.named_modules(remove_duplicate=False)), **new}, graph) if new else None
        )


def _watched(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def _fuse(model: nn.Module, graph: fx.Graph) -> dict[str, nn.Module]:
    """Replace what can be fused in `graph`; returns the new modules by name."""
    modules = dict(model.named_modules(remove_duplicate=False))

    def module(node: fx.Node) -> nn.Module | None:
        return modules.get(str(node.target)) if node.op == "call_module" else None

    def follower(node: fx.Node, wanted: Callable[[nn.Module | None], bool]) -> fx.Node | None:
        """The only user of `node`, if it is such a module."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        return user if user is not None and wanted(module(user)) else None

    for node in list(graph.nodes):
        if type(module(node)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    new: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        bn = module(node)
        if bn is None or not _fusable(bn) or (node.op, len(node.kwargs)) != ("call_module", 0):
            continue
        chain, residual = [node], None
        add = follower(node, lambda m: isinstance(m, Add))
        if add is not None:
            residual = next((a for a in add.args if a is not node), None)
            if residual is None:  # x + x
                add = None
            else:
                chain.append(add)
        act = follower(chain[-1], _is_activation)
        if act is not None:
            chain.append(act)
        last = chain[-1]
        quantized = [u for u in last.users if _takes_quantized(module(u)) and u.args == (last,)][:1]  # type: ignore[arg-type]
        want_y = len(last.users) > len(quantized) or any(module(u).sees_both for u in quantized)  # type: ignore[union-attr]
        name = f"fused_{len(new)}"
        new[name] = _Norm(
            bn,  # type: ignore[arg-type]
            module(add) if add is not None else None,  # type: ignore[arg-type]
            module(act) if act is not None else None,
            module(quantized[0]) if quantized else None,  # type: ignore[arg-type]
            want_y,
        )
        _rewire(graph, chain, residual, name, {u: module(u).sees_both for u in quantized})  # type: ignore[union-attr, misc]
    graph.lint()
    return new


def _rewire(graph: fx.Graph, chain: list[fx.Node], residual: Any, name: str, quantized: dict[fx.Node, bool]) -> None:
    """Put the module `name` in place of `chain`; its second output goes to the layer in `quantized`, or both do."""
    last = chain[-1]
    with graph.inserting_after(last):
        both = graph.call_module(name, (chain[0].args[0], *([] if residual is None else [residual])))
    with graph.inserting_after(both):
        y = graph.call_function(_first, (both,))
        q = graph.call_function(_second, (both,))
    for user, both_outputs in quantized.items():
        user.args, user.kwargs = (q,), {"quantized": True, **({"before": y} if both_outputs else {})}
    last.replace_all_uses_with(y)
    for node in reversed(chain):
        graph.erase_node(node)
    for node in (y, q):
        if not node.users:
            graph.erase_node(node)


def _first(both: tuple[Tensor, Tensor]) -> Tensor:
    return both[0]


def _second(both: tuple[Tensor, Tensor]) -> Tensor:
    return both[1]


def fuse(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """`model` as a function that runs fused while kernels are in use, and as it is otherwise."""
    return Net(model)
