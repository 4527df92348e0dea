"""Where the classes that old runs name lie today. No torch here.

An entry is a module or a class; the longest that fits counts. A run's name does not depend on it: see `identity`.
"""

MOVED = {
    "qbench.binary": "qbench.methods.shared.binary",
    "qbench.hooks": "qbench.quant.hooks",
    "qbench.layers": "qbench.quant.layers",
    "qbench.method": "qbench.quant.method",
    "qbench.methods.dorefa.DoReFaActivation": "qbench.methods.shared.dorefa_activation.DoReFaActivation",
    "qbench.methods.lsq": "qbench.methods.shared.lsq",
    "qbench.methods.pact": "qbench.methods.shared.pact",
    "qbench.methods.ptq": "qbench.methods.shared.fold",
    "qbench.quantizers": "qbench.quant.fixed_point",
    "qbench.quantizers.DoReFaWeight": "qbench.methods.shared.dorefa_weight.DoReFaWeight",
    "qbench.uniform": "qbench.quant.uniform",
    "qbench.xor_spec": "qbench.methods.shared.xor_spec",
}


def today(target: str) -> str:
    """The dotted path under which `target` is found now."""
    parts = target.split(".")
    for n in range(len(parts), 1, -1):
        if (found := MOVED.get(".".join(parts[:n]))) is not None:
            return ".".join([found, *parts[n:]])
    return target
