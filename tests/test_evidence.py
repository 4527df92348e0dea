"""What counts as a test of a method, and what only looks like one."""

import pytest
from evidence import computing_tests

WHOLE = """
def make(**options):
    return LSQ(None, "weight", **options)

@pytest.fixture
def q():
    return make(bits=2)

def test_direct():
    assert LSQ(None, "weight")(x).tolist() == [1, 0]

def test_by_a_helper():
    torch.testing.assert_close(make(bits=4)(x), y)

def test_by_a_fixture(q):
    assert q(x).item() == pytest.approx(0.3)

def test_by_its_module():
    assert lsq.LSQ(None, "weight")(x).tolist() == [1, 0]

def test_handed_over():
    assert torch.equal(surgery(partial(LSQ, bits=2)), y)
"""


def test_numbers_that_come_from_the_class_count() -> None:
    names = ["test_direct", "test_by_a_helper", "test_by_a_fixture", "test_by_its_module", "test_handed_over"]
    assert computing_tests(WHOLE, {"LSQ"}) == names
    assert computing_tests(WHOLE, {"PACT"}) == []


def test_a_method_without_a_class_is_told_by_the_file_that_is_read() -> None:
    source = 'def test_x():\n    assert build(load("conf/method/gupta.yaml"))(x).tolist() == [0.5]'
    assert computing_tests(source, {"conf/method/gupta.yaml"}) == ["test_x"]


@pytest.mark.parametrize(
    "source",
    [
        '"""LSQ"""',
        "# LSQ\ndef test_x():\n    assert [1].tolist() == [1]",
        "def test_x():\n    LSQ(None, 'weight')",
        "def test_x():\n    assert LSQ",
        "def test_x(q: LSQ):\n    assert isinstance(q, LSQ)",
        "def test_x():\n    assert LSQ(None, 'weight')(x) is not None",
        "def test_x():\n    'LSQ'\n    assert torch.equal(x, x)",
        "def made():\n    return LSQ()\n\ndef test_x():\n    assert torch.equal(x, x)",
        "def test_x():\n    assert x.tolist() == [1]\n\ndef test_y():\n    LSQ()",
    ],
)
def test_what_only_names_the_class_does_not(source: str) -> None:
    assert computing_tests(source, {"LSQ"}) == []
