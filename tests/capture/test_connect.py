"""A connection is protected unless somebody says otherwise, and a refusal is understood in any language."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from servers.postgres import Database
from servers.tls import Authority, tls_before

from deltaworks.capture.postgres.connect import connect
from deltaworks.capture.postgres.refusal import sqlstate_of
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.source import SourceNotReadyError, SourceUnreachableError
from deltaworks.config import PostgresConfig
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import drain
from deltaworks.testing.postgres import PostgresServer, free_port

DEBIAN = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls_port(database: Database, authority: Authority) -> Iterator[int]:
    with tls_before(database.server.port, certificate=authority.issue("db.example")) as port:
        yield port


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGSSLMODE", "PGSSLROOTCERT", "PGHOST", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)


def dsn(database: Database, port: int, *, host: str = "db.example", **more: object) -> SecretStr:
    # The name decides how the connection is protected, the address only where it goes: so does a tunnel.
    parts = {"host": host, "hostaddr": "127.0.0.1", "port": port, "dbname": database.name, "user": "postgres", **more}
    return SecretStr(" ".join(f"{name}='{value}'" for name, value in parts.items()))


def opened(text: SecretStr) -> bool:
    """Connect; whether the connection is encrypted."""
    with connect(text, name="shop", application="test") as connection:
        return bool(connection.pgconn.ssl_in_use)


def test_a_server_on_another_machine_must_show_who_it_is(
    database: Database, tls_port: int, authority: Authority
) -> None:
    assert opened(dsn(database, tls_port, sslrootcert=authority.file))
    with pytest.raises(SourceNotReadyError, match=r"certificate verify failed; in sources\.shop\.dsn name the .*FILE"):
        opened(dsn(database, tls_port))
    with pytest.raises(SourceNotReadyError, match=r"'db\.other' with sslmode 'verify-full'.*does not match host name"):
        opened(dsn(database, tls_port, host="db.other", sslrootcert=authority.file))


def test_a_server_on_another_machine_without_encryption_is_refused_until_somebody_says_so(database: Database) -> None:
    with pytest.raises(SourceNotReadyError, match=r"does not support SSL.*where the network is yours.*sslmode=disable"):
        opened(dsn(database, database.server.port))
    assert not opened(dsn(database, database.server.port, sslmode="disable"))
    assert not opened(dsn(database, database.server.port, sslmode="prefer"))


def test_what_the_connection_string_says_holds(database: Database, tls_port: int) -> None:
    assert opened(dsn(database, tls_port, sslmode="require"))
    with pytest.raises(SourceUnreachableError):
        opened(dsn(database, tls_port, sslmode="disable"))


def test_what_the_environment_says_holds(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSSLMODE", "disable")
    assert not opened(dsn(database, database.server.port))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_server_on_this_machine_needs_no_encryption(database: Database, host: str) -> None:
    assert not opened(dsn(database, database.server.port, host=host))


def test_capture_runs_over_a_protected_connection(database: Database, tls_port: int, authority: Authority) -> None:
    database.execute("create table t (id int primary key)", "insert into t select generate_series(1, 500)")
    text = dsn(database, tls_port, sslrootcert=authority.file)
    config = PostgresConfig.model_validate({"kind": "postgres", "dsn": text, "tables": ["t"]})
    log = MemoryLog()
    with PostgresSource(database.name, config) as source, log.writer() as writer:
        assert drain(source, writer, log.reader()).reads == {"public.t": 500}
        database.execute("insert into t select generate_series(501, 3000)")
        assert drain(source, writer, log.reader()).changes == 2_500


# Refusals.


def refusal(text: str) -> tuple[type[Exception], str]:
    with pytest.raises((SourceNotReadyError, SourceUnreachableError)) as caught:
        connect(SecretStr(text), name="shop", application="test")
    return caught.type, str(caught.value)


def check_refusals(server: PostgresServer) -> None:
    assert refusal(server.dsn(user="ghost"))[0] is SourceNotReadyError
    assert refusal(server.dsn("ghost"))[0] is SourceNotReadyError
    kind, said = refusal(f"postgresql://locked:wr0ng@127.0.0.1:{server.port}/postgres")
    assert (kind, "wr0ng" in said) == (SourceNotReadyError, False)
    assert refusal(f"postgresql://locked@127.0.0.1:{server.port}/postgres")[0] is SourceNotReadyError
    assert refusal(f"postgresql://rejected@127.0.0.1:{server.port}/postgres")[0] is SourceNotReadyError
    with connect(SecretStr(server.dsn()), name="shop", application="test") as first:
        first.execute("alter role guest connection limit 1")
        with connect(SecretStr(server.dsn(user="guest")), name="shop", application="test"):
            # Too many now may be few enough later.
            assert refusal(server.dsn(user="guest"))[0] is SourceUnreachableError
    assert sqlstate_of(server.dsn("ghost")) == "3D000"
    assert sqlstate_of(server.dsn()) is None


def test_a_setting_that_means_nothing_is_for_a_person(database: Database) -> None:
    for setting in ("sslmode=verify", "port=nine", "target_session_attrs=best"):
        kind, said = refusal(f"{database.dsn}?{setting}")
        assert kind is SourceNotReadyError, said
        assert "mend sources.shop.dsn" in said


@pytest.fixture
def refusing_rules() -> str:
    return "host all locked all scram-sha-256\nhost all rejected all reject\n"


def started(folder: Path, rules: str, **options: object) -> PostgresServer:
    server = PostgresServer.start(folder, **options)  # type: ignore[arg-type]
    with connect(SecretStr(server.dsn()), name="shop", application="test") as connection:
        for role in ("locked", "rejected", "guest"):
            connection.execute(f"create role {role} login password 's3cret'")  # type: ignore[arg-type]
        hba = server.folder / "pg_hba.conf"
        hba.write_text(rules + hba.read_text())
        connection.execute("select pg_reload_conf()")
    return server


def test_refusals_are_told_from_outages(server_folder: Path, refusing_rules: str, pytestconfig: pytest.Config) -> None:
    binaries = pytestconfig.getoption("--postgres-binaries")
    settings = {"fsync": "off"}
    with started(server_folder / "refusing", refusing_rules, settings=settings, binaries=binaries) as server:
        check_refusals(server)
    assert refusal(f"postgresql://postgres@127.0.0.1:{free_port()}/postgres")[0] is SourceUnreachableError


@pytest.mark.server
def test_refusals_are_understood_in_the_servers_own_language(server_folder: Path, refusing_rules: str) -> None:
    # Debian's build has message catalogs; LANGUAGE chooses one under a locale that every machine has.
    german = {"LC_ALL": "C.UTF-8", "LANGUAGE": "de"}
    settings = {"fsync": "off", "lc_messages": "C.UTF-8"}
    with started(
        server_folder / "german", refusing_rules, settings=settings, environment=german, binaries=DEBIAN
    ) as server:
        assert "Datenbank »ghost« existiert nicht" in refusal(server.dsn("ghost"))[1]
        check_refusals(server)


@pytest.mark.server
def test_server_with_tls_of_its_own_is_captured_and_a_stranger_is_refused(
    server_folder: Path, authority: Authority, tmp_path: Path
) -> None:
    with PostgresServer.start(server_folder / "secured", settings={"fsync": "off"}, binaries=DEBIAN) as server:
        secure(server, certificate=authority.issue("db.secured"))
        database = Database(server, "postgres")
        local = server.dsn()
        database.execute(
            "create table t (id int primary key, v text)",
            "insert into t select g, 'x' from generate_series(1, 500) g",
        )
        trusted = dsn(database, server.port, host="db.secured", sslrootcert=authority.file)
        assert opened(trusted)
        with pytest.raises(SourceNotReadyError, match="does not match host name"):
            opened(dsn(database, server.port, sslrootcert=authority.file))
        stranger = Authority.create(tmp_path)
        with pytest.raises(SourceNotReadyError, match="name the authority with sslrootcert"):
            opened(dsn(database, server.port, host="db.secured", sslrootcert=stranger.file))
        with connect(SecretStr(local), name="shop", application="test") as connection:
            hba = server.folder / "pg_hba.conf"
            hba.write_text("hostnossl all guarded all reject\nhostssl all guarded all trust\n" + hba.read_text())
            connection.execute("create role guarded superuser login")
            connection.execute("select pg_reload_conf()")
        guarded = dsn(database, server.port, host="db.secured", sslrootcert=authority.file, user="guarded")
        with pytest.raises(SourceNotReadyError, match="no encryption"):
            opened(dsn(database, server.port, user="guarded", sslmode="disable"))
        config = PostgresConfig.model_validate({"kind": "postgres", "dsn": guarded, "tables": ["t"]})
        log = MemoryLog()
        with PostgresSource("secured", config) as source, log.writer() as writer:
            assert drain(source, writer, log.reader()).reads == {"public.t": 500}
            database.execute("insert into t select g, repeat('y', g) from generate_series(501, 3000) g")
            assert drain(source, writer, log.reader()).changes == 2_500


def secure(server: PostgresServer, *, certificate: Path) -> None:
    """Let a running server offer TLS with this key and certificate."""
    file, owner = server.folder / "server.pem", server.folder.stat()
    file.write_bytes(certificate.read_bytes())
    os.chown(file, owner.st_uid, owner.st_gid)
    file.chmod(0o600)
    with connect(SecretStr(server.dsn()), name="shop", application="test") as connection:
        for name in ("ssl_cert_file", "ssl_key_file"):
            connection.execute(f"alter system set {name} = 'server.pem'")
        connection.execute("alter system set ssl = on")
        connection.execute("select pg_reload_conf()")
    for _ in range(250):
        with connect(SecretStr(server.dsn()), name="shop", application="test") as connection:
            if connection.execute("select current_setting('ssl')").fetchone() == ("on",):
                return
    raise TimeoutError("the server did not take its certificate")
