import pytest

from compress.errors import ModelError
from compress.models.patterns import matching


def test_patterns():
    names = ["features.0", "features.1", "features.10", "head"]
    assert matching("features.1*", names, field="layers", place="x") == ["features.1", "features.10"]
    assert matching("re:features.\\d", names, field="layers", place="x") == ["features.0", "features.1"]
    with pytest.raises(ModelError, match=r"x: `layers: feature` matches no layer; close: features\.1"):
        matching("feature", names, field="layers", place="x")
