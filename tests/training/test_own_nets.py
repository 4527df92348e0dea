"""Nets that are not ours: torchvision's, also beside a PyTorch that its compiled operators do not fit."""

import subprocess
import sys

CODE = """
from types import SimpleNamespace
from qbench.training import build
from qbench.errors import UserError
data = SimpleNamespace(channels=3, classes=7, size=32)
def net(target):
    return build.make_model({"seed": 0, "model": {"name": "net", "_target_": target}}, data)
one, two = net("torchvision.models.resnet18"), net("torchvision.models.resnet18")
print(type(one).__name__, one.fc.out_features, bool((one.fc.weight == two.fc.weight).all()))
"""


def test_a_net_of_torchvision_is_built_with_the_classes_of_the_data() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == "ResNet 7 True\n"
