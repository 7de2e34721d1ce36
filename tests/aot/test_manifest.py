"""Whatever a manifest holds, it is one clear error or fits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockffn_compile.aot.bundle import load
from blockffn_compile.aot.manifest import BundleError, Manifest
from tests.aot.conftest import edit


@pytest.mark.usefixtures("_no_code")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 1, this version reads format 2"),
        ({"format": None}, "format None"),
        ({"hidden_size": None}, "field 'hidden_size' is missing"),
        ({"extra": 1}, "field 'extra' is unknown"),
        ({"hidden_size": "64"}, "field 'hidden_size' is not int"),
        ({"hidden_size": -64}, "field 'hidden_size' is not int"),
        ({"hidden_size": True}, "field 'hidden_size' is not int"),
        ({"layers": 2**64}, "field 'layers' is not int"),
        ({"stop_tokens": [300]}, "a stop token is not in the vocabulary"),
        ({"stop_tokens": [0.5]}, "field 'stop_tokens'"),
        ({"trunk_weights": "all"}, "field 'trunk_weights'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"compute_capability": "sm_87"}, "compute capability 'sm_87'"),
        ({"sizes": {"../../x": 1}, "sha256": {"../../x": "0" * 64}}, "files are not model.so"),
        ({"sizes": {"/etc/passwd": 1}, "sha256": {}}, "files are not model.so"),
        ({"sha256": {"model.so": "0" * 64}}, "each with its size and hash"),
        ({"trunk_weights": ["nothing"]}, "missing tensor nothing"),
    ],
)
def test_wrong_manifests(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(BundleError, match=message):
        load(copy)


@pytest.mark.usefixtures("_no_code")
@pytest.mark.parametrize(
    ("text", "message"),
    [("", "not valid JSON"), ("[1]", "format None"), ("[" * 10**6, "not valid JSON"), ("\xff", "")],
)
def test_manifests_that_are_none(copy, text, message):
    (copy / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=f"manifest.json: .*{message}"):
        load(copy)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(name=st.sampled_from([*Manifest.__dataclass_fields__]), value=JSON)
def test_any_value_of_any_field_is_an_error_or_fits(bundle, name, value):
    fields = json.loads((bundle / "manifest.json").read_text())
    fields[name] = value
    try:
        manifest = Manifest.from_json(json.dumps(fields))
    except BundleError:
        return
    assert getattr(manifest, name) == value
