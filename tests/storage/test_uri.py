"""URIs of storage: any name below any URI, and no secret in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from ssm_metarl.storage.uri import StorageError, below, for_arrow, is_uri, join, name_of, refuse_mangled, shown

NAMES = st.text(st.characters(exclude_categories=["C"], exclude_characters="/\\"), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@given(NAMES, NAMES)
def test_a_name_is_quoted_and_appended_to_the_path(parent: str, name: str) -> None:
    uri = join("file:///runs", parent, name)
    assert fs.FileSystem.from_uri(for_arrow(uri))[1] == f"/runs/{parent}/{name}"
    assert name_of(uri) == name


@pytest.mark.parametrize("name", ["my run", "ünï", "100%", "a#b", "a?b=c", "a&b", "50%25"])
def test_names_of_runs_stay_apart_and_the_query_stays(name: str) -> None:
    uri = join("s3://bucket/runs?region=us-east-1", name)
    assert uri.endswith("?region=us-east-1")
    assert fs.FileSystem.from_uri(for_arrow(uri))[1] == f"bucket/runs/{name}"


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("file:///tmp/my run/ünï", "/tmp/my run/ünï"),
        ("file:///tmp/100%/a#b/", "/tmp/100%/a#b"),
        ("file:///tmp/a%20b", "/tmp/a b"),
        ("FILE:///tmp/x", "/tmp/x"),
    ],
)
def test_a_uri_may_be_written_as_a_person_does(written: str, path: str) -> None:
    assert fs.FileSystem.from_uri(for_arrow(written))[1] == path


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIA:SECRET@bucket/runs?region=x",
        "s3://AKIA:SEC/RET+SECRET@bucket/runs",
        "s3://bucket/runs?access_key=AKIA&secret_key=SECRET&region=x",
        "job: train --storage 's3://bucket/runs?session_token=SECRET' --from s3://AKIA:SECRET@bucket/a",
        "abfs://AKIA:SECRET@host/x cannot be read",
    ],
)
def test_no_secret_is_shown(text: str) -> None:
    assert "SECRET" not in shown(text)
    assert "AKIA" not in shown(text)
    assert "bucket" in shown(text) or "host" in shown(text)


def test_what_is_no_secret_is_shown_as_it_is() -> None:
    text = "s3://bucket/my%20run?endpoint_override=127.0.0.1:5555&scheme=http&region=us-east-1"
    assert shown(text) == text


def test_below_a_path_or_a_uri() -> None:
    assert below("/runs", "a b") == "/runs/a b"
    assert below("s3://b/runs?x=1", "a b") == "s3://b/runs/a%20b?x=1"
    assert is_uri("s3://b")
    assert not is_uri(Path("s3:/b"))


def test_a_uri_that_became_a_path_is_refused() -> None:
    with pytest.raises(StorageError, match=r"^s3:/bucket/run was a URI and became a path: give s3://… as text\.$"):
        refuse_mangled(Path("s3://bucket/run"))
    refuse_mangled("C:/run")
    refuse_mangled("pretrained:cartpole")
