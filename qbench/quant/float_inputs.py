"""Which convolutions and linear layers compute on float inputs, and why: read off the graph of the quantized net."""

from torch import fx, nn

from qbench.quant.layers import QuantLayer
from qbench.quant.quantizer import Quantizer

# What leaves the values of its input on their grid.
KEEPS_THE_GRID = (nn.Identity, nn.Flatten, nn.Dropout, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.ReLU, nn.ReLU6)
FUNCTIONS = ("flatten", "view", "reshape", "contiguous", "dropout", "max_pool2d", "relu")


def _makes_a_grid(module: nn.Module) -> bool:
    """Whether what leaves the module was quantized: a quantizer, or a layer that ends in one."""
    return isinstance(module, Quantizer) or (isinstance(module, QuantLayer) and module.output_quantizer is not None)


class Tracer(fx.Tracer):
    """Sees layers, quantizers and every module without children as one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, (QuantLayer, Quantizer)) or not any(True for _ in m.children())
        return whole or super().is_leaf_module(m, module_qualified_name)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} of all convolutions and linear layers, quantized or not."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (QuantLayer, nn.Conv2d, nn.Linear))}


def float_inputs(model: nn.Module, kept: dict[str, str]) -> dict[str, str]:
    """{layer: why} for each convolution and linear layer whose input has not been quantized on any way to it.

    `kept` gives the reasons of layers that a rule leaves alone. A layer counts as quantized where it has an input
    quantizer, or where its input comes from a quantizer through nothing but pooling by maximum, flattening, ReLU and
    the like. A function in place of a module (F.relu) cannot be replaced by a rule, and is named.
    """
    all_layers = layers(model)
    open_ = {n: m for n, m in all_layers.items() if not (isinstance(m, QuantLayer) and m.input_quantizer is not None)}
    try:
        graph = Tracer().trace(model)
    except Exception as error:  # whatever a user's forward does with a tensor that has no values
        why = f"whether it reads quantized values is unknown: the net cannot be traced ({type(error).__name__})"
        return {name: kept.get(name, why) for name in open_}
    modules = dict(model.named_modules())
    found = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and name in open_ and (why := _float(node.all_input_nodes[0], modules)):
            found[name] = kept.get(name, why)
    return found


def input_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """{layer: the quantizer whose values it reads}, of the layers that do not compute on float inputs.

    Without a graph (a forward that cannot be traced) those that have an input quantizer of their own.
    """
    own = {n: getattr(m, "input_quantizer", None) for n, m in layers(model).items()}
    found = {n: q for n, q in own.items() if q is not None}
    try:
        graph = Tracer().trace(model)
    except Exception:  # whatever a user's forward does with a tensor that has no values
        return found
    modules = dict(model.named_modules())
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and name in own and name not in found:
            origin = modules.get(str(_origin(node.all_input_nodes[0], modules)[0].target))
            maker = origin.output_quantizer if isinstance(origin, QuantLayer) else origin
            if isinstance(maker, Quantizer):
                found[name] = maker
    return found


def _origin(node: fx.Node, modules: dict[str, nn.Module], relu: str = "") -> tuple[fx.Node, str]:
    """The node whose values `node` gives, but for what keeps a grid between them, and the ReLU met on the way to it."""
    name = str(node.target)
    if node.op == "call_module" and not _makes_a_grid(modules[name]) and isinstance(modules[name], KEEPS_THE_GRID):
        if type(modules[name]).__name__.startswith("ReLU"):
            relu = f"the ReLU '{name}' is not quantized"
        return _origin(node.all_input_nodes[0], modules, relu)
    function = _function(node)
    if node.op in ("call_function", "call_method") and function.rstrip("_") in FUNCTIONS:
        if function.startswith("relu"):
            relu = "the ReLU before it is a function, not a module that a rule could replace"
        return _origin(node.all_input_nodes[0], modules, relu)
    return node, relu


def _float(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Why what `node` gives is float, empty where it is quantized."""
    origin, relu = _origin(node, modules)
    name = str(origin.target)
    if origin.op == "call_module":
        if _makes_a_grid(modules[name]):
            return ""
        return relu or f"no ReLU before it: it reads '{name}' ({_kind(modules[name])})"
    if origin.op == "placeholder":
        return relu or "it reads the image"
    return relu or f"no ReLU before it: it reads the result of {_function(origin)}"


def _function(node: fx.Node) -> str:
    name = str(node.target)
    return name if node.op == "call_method" else getattr(node.target, "__name__", name)


def _kind(module: nn.Module) -> str:
    return "Conv2d" if isinstance(module, QuantLayer) and module.conv else type(module).__name__
