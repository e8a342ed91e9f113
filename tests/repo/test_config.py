"""`deltaworks.yaml`: one model, all faults at once."""

from pathlib import Path

import pytest

from deltaworks.config import Config, ConfigError, load

GOOD = """
sources:
  shop: {kind: postgres, dsn: "postgresql://u:${SECRET:-s3cret}@h/db", tables: [item, sales.order]}
apps:
  search: {module: "shop.search:app", source: shop}
"""


def loaded(tmp_path: Path, text: str, **environment: str) -> Config:
    path = tmp_path / "deltaworks.yaml"
    path.write_text(text)
    return load(path, environment=environment)


def faults(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, text)
    return str(raised.value)


def test_variables_come_from_the_environment_or_their_default(tmp_path: Path) -> None:
    assert "s3cret" in loaded(tmp_path, GOOD).sources["shop"].dsn.get_secret_value()
    assert "other" in loaded(tmp_path, GOOD, SECRET="other").sources["shop"].dsn.get_secret_value()


def test_secrets_are_hidden_in_representations(tmp_path: Path) -> None:
    assert "s3cret" not in repr(loaded(tmp_path, GOOD))


def test_home_is_relative_to_the_file(tmp_path: Path) -> None:
    config = loaded(tmp_path, GOOD)
    assert config.home == tmp_path / ".deltaworks"
    assert config.lake_catalog == f"sqlite:{tmp_path}/.deltaworks/lake/catalog.sqlite"


def test_tables_outside_of_public_keep_their_schema_in_the_short_name(tmp_path: Path) -> None:
    names = loaded(tmp_path, GOOD).sources["shop"].table_names
    assert [name.short for name in names] == ["item", "sales__order"]


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    message = faults(
        tmp_path,
        "sources: {Shop: {kind: oracle}, shop: {kind: postgres, dsn: '${UNSET}', tables: [a, a], chunk_rows: 0}}\n"
        "serve: {port: http}\nbogus: 1\n",
    )
    for part in ["Shop", "UNSET", "listed twice: a", "chunk_rows", "got 0", "serve.port", "bogus"]:
        assert part in message
    assert message.count("\n  - ") >= 6


def test_loose_ends_between_sections_are_faults(tmp_path: Path) -> None:
    message = faults(
        tmp_path,
        "sources: {shop: {kind: postgres, dsn: x, tables: [a]}}\n"
        "apps: {shop: {module: 'm:a', source: shop}, other: {module: 'm:a', source: nope}}\nserve: {app: ghost}\n",
    )
    for part in ["no source 'nope'; known: shop", "own the folder log/shop", "no app 'ghost'; known: shop, other"]:
        assert part in message


def test_a_password_never_reaches_a_message(tmp_path: Path) -> None:
    message = faults(tmp_path, "sources: {shop: {kind: postgres, dsn: {a: 'hunter2'}, tables: [a]}}")
    assert "hunter2" not in message


LAKE = "sources: {shop: {kind: postgres, dsn: x, tables: [a]}}\nlake: "


def test_a_lake_on_s3_takes_its_keys_from_the_environment(tmp_path: Path) -> None:
    text = LAKE + "{data: 's3://acme/lake', s3: {access_key_id: '${ID}', secret_access_key: '${KEY}'}}"
    config = loaded(tmp_path, text, ID="the-id", KEY="s3cret")
    assert config.lake.s3.secret_access_key is not None
    assert config.lake.s3.secret_access_key.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(config)
    assert loaded(tmp_path, text.replace("}'", ":-}'")).lake.s3.secret_access_key is None


@pytest.mark.parametrize(
    ("lake", "part"),
    [
        ("{s3: {access_key_id: hunter2, secret_access_key: '${KEY}'}}", "access_key_id: a key must not stand in"),
        ("{s3: {access_key_id: '${KEY}', secret_access_key: '${X:-hunter2}'}}", "secret_access_key: a key must not"),
        ("{s3: {access_key_id: 4567, secret_access_key: '${KEY}'}}", "access_key_id: a key must not stand in"),
        ("{s3: {access_key_id: '${KEY}'}}", "access_key_id and secret_access_key belong together"),
        ("{data: 'gs://acme/lake'}", "lake.data: expected a folder or s3://bucket/prefix"),
        ("{catalog: 'mysql:hunter2'}", "lake.catalog: String should match pattern"),
        ("{s3: {endpoint: 'minio:9000'}}", "lake.s3.endpoint: String should match pattern"),
    ],
)
def test_a_lake_that_cannot_be_is_told_without_its_secrets(tmp_path: Path, lake: str, part: str) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, LAKE + lake, KEY="from-the-environment")
    assert part in str(raised.value)
    for secret in ("hunter2", "4567", "from-the-environment"):
        assert secret not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [("sources: [", "as YAML"), ("- 1", "expected a mapping"), ("", "expected a mapping")],
)
def test_a_file_that_is_no_configuration_says_so(tmp_path: Path, text: str, part: str) -> None:
    assert part in faults(tmp_path, text)


def test_a_missing_file_names_itself_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*--config"):
        load(tmp_path / "nowhere.yaml", environment={})


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    config = loaded(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"no source 'x'.*known: shop"):
        config.source("x")
    with pytest.raises(ConfigError, match=r"no app 'x'.*known: search"):
        config.app("x")


def test_two_apps_of_one_name_are_told_with_their_lines(tmp_path: Path) -> None:
    text = GOOD + '  search: {module: "shop.other:app", source: shop}\n'
    assert "deltaworks.yaml': 'search' is there twice, in lines 5 and 6" in faults(tmp_path, text)


def test_what_is_merged_in_may_be_overridden(tmp_path: Path) -> None:
    text = GOOD.replace("search: {", "search: &one {") + "  other: {<<: *one, metrics_port: 9000}\n"
    assert loaded(tmp_path, text).apps["other"].metrics_port == 9000
