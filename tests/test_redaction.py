"""Secrets in texts and in plain data are hidden, whatever form of URI they stand in."""

import itertools
import json

import pytest
from fsspec.utils import infer_storage_options
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from pipeline.redaction import redact, redact_values

SECRET = "Tr0ub4dor"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("http://user:word@host:5000/path", "http://***@host:5000/path"),
        ("failed: https://u:p@ss@host/x and more", "failed: https://***@host/x and more"),
        ("postgresql://u:word@db/mlflow", "postgresql://***@db/mlflow"),
        ("http://token@host/x", "http://***@host/x"),
        ("http://me@corp.com:pa/ss@host/x", "http://***@host/x"),
        ("mssql+pyodbc://u:w@dsn?PWD=x&driver=ODBC+17", "mssql+pyodbc://***@dsn?PWD=***&driver=ODBC+17"),
        ("s3://bucket/x?region=eu&secret_key=a/b+c&scheme=http", "s3://bucket/x?region=eu&secret_key=***&scheme=http"),
        ("dfine train x.yaml --token abc --name mine", "dfine train x.yaml --token *** --name mine"),
        ("{'password': 'a b', 'host': 'h'}", "{'password': ***, 'host': 'h'}"),
        ("Authorization: Bearer abc.def, next", "Authorization: Bearer *** next"),
    ],
)
def test_the_rest_of_a_text_stays(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "http://host/x?at=a@b:c",
        "http://host:5000/x?at=a@b",
        "http://[::1]:5000/x@y",
        "mail me@home",
        "sqlite:////tmp/a@b/mlflow.db",
        "file:///data/a@b:c",
        "s3://bucket/run/a:b@c",
        "abfss://container@account.dfs.core.windows.net/runs",
        "models:/name@champion",
        "databricks://profile",
        "--set schedule.epochs=12 loss.passes=3 model.tokens=5 bypass=1",
        "12 tokens: the tokenizer=bpe passed",
        "key=value keyboard=qwerty",
    ],
)
def test_a_text_without_a_secret_is_unchanged(text: str) -> None:
    assert redact(text) == text


AWKWARD = ["", "/", "?", "#", ":", "//", "%40", "&", "=", "'", '"', "%2F", "+", "[", "]", ";", "$", "!", "é"]
DATABASES = ["postgresql", "postgresql+psycopg2", "mysql+pymysql", "mssql+pyodbc", "oracle+oracledb", "sqlite"]


@pytest.mark.parametrize("awkward", [*AWKWARD, " "])
@pytest.mark.parametrize("scheme", DATABASES)
@pytest.mark.parametrize("rest", ["host/db", "host:5432/db?sslmode=require", "[::1]:5432/db", "/db?host=/var/run", ""])
def test_a_password_that_sqlalchemy_takes_is_hidden(scheme: str, awkward: str, rest: str) -> None:
    uri = f"{scheme}://someone:{SECRET}{awkward}{SECRET}@{rest}"
    assert SECRET in str(make_url(uri).password)  # SQLAlchemy reads it as one
    for text in (uri, f"cannot connect to {uri}: refused", f"--set 'tracking.uri={uri}'"):
        assert SECRET not in redact(text)


@pytest.mark.parametrize("awkward", AWKWARD)
@pytest.mark.parametrize(
    "scheme", ["http", "https", "ftp", "sftp", "smb", "s3", "gs", "hdfs", "webhdfs", "github", "abfss"]
)
def test_a_password_that_fsspec_or_mlflow_take_is_hidden(scheme: str, awkward: str) -> None:
    uri = f"{scheme}://someone:{SECRET}{awkward}{SECRET}@host:8021/path"
    assert SECRET not in redact(uri)
    assert SECRET not in redact(f"simplecache::{uri}: 404 (see {uri})")
    if scheme not in ("http", "https") and awkward in ("", "%40", "&", "=", "+", "$", "!", "é"):
        assert SECRET in infer_storage_options(uri)["password"]  # fsspec reads it as one


NAMES = [
    *("password", "PWD", "pwd", "Passwd", "sslpassword", "pass", "passphrase", "odbc_connect"),
    *("token", "access_token", "sas_token", "session_token", "aws_session_token", "X-Amz-Security-Token", "api_key"),
    *(
        "secret",
        "secret_key",
        "client_secret",
        "aws_secret_access_key",
        "AWS_SECRET_ACCESS_KEY",
        "access_key",
        "AWSAccessKeyId",
    ),
    *("AccountKey", "SharedAccessKey", "sig", "X-Amz-Signature", "X-Amz-Credential", "private_key", "apikey"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "form",
    [
        "postgresql://host/db?{name}={value}",
        "mysql://host/db?charset=utf8&{name}={value}&ssl=1",
        "https://host/x.pt?{name}={value}&Expires=5",
        "s3://bucket/key?region=eu&{name}={value}",
        "DRIVER=ODBC 17;UID=me;{name}={value};Server=h",
        "DRIVER=ODBC 17;{name}={{{value};x}};Server=h",
        "host=h dbname=d {name}='{value} {value}' port=5",
        "host=h {name} = {value}",
        "env {name}={value} command",
        "{{'{name}': '{value} {value}'}}",
        '{{"{name}":"{value}"}}',
    ],
)
def test_a_parameter_with_the_name_of_a_secret_is_hidden(form: str, name: str) -> None:
    for awkward in ("", "/", "#", "?", "%20", "+", "@"):
        text = form.format(name=name, value=f"{SECRET}{awkward}{SECRET}")
        assert SECRET in text
        assert SECRET not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {SECRET}",
        f"{{'Authorization': 'Basic {SECRET}='}}",
        f"x-ray-authorization: Bearer {SECRET}",
        f"X-Auth-Token: {SECRET}",
        f"--password {SECRET}",
        f"--api-key '{SECRET} {SECRET}'",
        f"mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BPWD%3D{SECRET}",
        f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}/x+y@bucket/key",
        f"zip://inner.csv::https://me:{SECRET}@host/x.zip",
    ],
)
def test_other_forms_of_secrets_are_hidden(text: str) -> None:
    assert SECRET not in redact(text)


def test_keys_of_known_form_are_hidden_without_a_name() -> None:
    assert redact("AKIAIOSFODNN7EXAMPLE and hf_abcdefghijklmnopqrstuvwx") == "*** and ***"


@given(
    st.text(alphabet="ab:/?#@[]&=;'\" {}*12\n", max_size=40),
    st.sampled_from(["http://", "postgresql://", "password=", "x "]),
)
@example("***'", "password=")
def test_a_redacted_text_stays_as_it_is(tail: str, head: str) -> None:
    assert redact(once := redact(head + tail)) == redact(redact(once))


def test_plain_data_keep_their_form() -> None:
    content = {
        "tracking": {"uri": f"postgresql://u:{SECRET}@h/d", "tags": {"a": "b"}},
        "sizes": [1, 2.5, None, True, (3,)],
    }
    redacted = redact_values(content)
    assert redacted == {
        "tracking": {"uri": "postgresql://***@h/d", "tags": {"a": "b"}},
        "sizes": [1, 2.5, None, True, [3]],
    }
    json.dumps(redacted)


def test_redaction_takes_linear_time() -> None:
    for part, tail in itertools.product(
        ("://a:", "password=", "a:b@", "postgresql://x:", "'token':", "pwd"), ("", "@")
    ):
        redact(part * 500 + tail)
