"""Every type that a column can have, as the server itself lists them: log, dump and snapshot give the server's text."""

from contextlib import closing
from typing import Any

import numpy as np
import psycopg
from conformance.values import row_texts
from psycopg import sql
from servers.postgres import Database

from deltaworks.capture.dump import streamed_changes, text_key
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.postgres.types import SESSION_OPTIONS
from deltaworks.capture.source import Slice
from deltaworks.position import START
from deltaworks.schema import TableName, TableSchema

OWN_TYPES = (
    "create type mood as enum ('happy', 'so so')",
    "create domain price as numeric(8, 2) check (value is null or value <> 0)",
    "create domain low_price as price check (value < 100 or value = 'NaN')",
    "create domain grid as int[]",
    'create type "Pair, of" as (a int, "b c" text, m mood)',
    "create type price_range as range (subtype = float8, multirange_type_name = price_ranges)",
)

SAMPLES: dict[str, tuple[str, ...]] = {
    "bool": ("t", "f"),
    "bytea": (r"\x", r"\x00ff5c22"),
    "char": ("a", "", r"\377"),
    "name": ("n", "a,b"),
    "int2": ("-32768", "32767"),
    "int4": ("-2147483648", "2147483647"),
    "int8": ("-9223372036854775808", "9223372036854775807"),
    "oid": ("0", "4294967295"),
    "float4": ("1.1", "NaN", "-Infinity", "1e-45", "3.4028235e+38", "-0"),
    "float8": ("0.1", "NaN", "Infinity", "5e-324", "1.7976931348623157e+308", "-0"),
    "numeric": ("1e100", "NaN", "0.10", "-1e-30"),
    "numeric(10,2)": ("12345678.90", "NaN", "-0.01"),
    "numeric(38,38)": ("0.00000000000000000000000000000000000001", "NaN"),
    "numeric(39,0)": ("999999999999999999999999999999999999999", "NaN"),
    "numeric(1000,500)": ("1e499", "-1e-500", "NaN"),
    "money": ("-92233720368547758.08", "1234.5"),
    "text": ("", 'é\n"\\\\,{}', "NULL", "\\x00", "\U0001f600"),
    "varchar": ("v", " "),
    "varchar(3)": ("abc",),
    "bpchar": ("ab ", ""),
    "char(5)": ("ab",),
    "json": ('{"a" : 1, "a": [null, 1e400]}', "null"),
    "jsonb": ('{"b": [1, 2.50], "a": null}', "null"),
    "jsonpath": ("$.a[*] ? (@ > 1)",),
    "xml": ("<a>&lt;é</a>", "plain"),
    "date": ("0001-01-01", "9999-12-31", "infinity", "-infinity", "0044-03-15 BC", "5874897-12-31", "10000-01-01"),
    "time": ("00:00:00", "24:00:00", "12:34:56.789"),
    "time(0)": ("12:34:56.789",),
    "timetz": ("12:34:56.789-15:59", "24:00:00+00"),
    "timestamp": ("0001-01-01", "9999-12-31 23:59:59.999999", "infinity", "0044-03-15 12:00 BC", "294276-12-31"),
    "timestamp(3)": ("2020-02-29 23:59:59.9999",),
    "timestamptz": ("0001-01-02 00:00+00", "2020-06-01 12:00:00.5+05:30", "-infinity", "12000-01-01", "4713-01-01 BC"),
    "interval": ("1 year 2 mons -3 days 04:05:06.7", "-00:00:00.000001", "178000000 years"),
    "interval day to second(2)": ("1 day 00:00:00.129",),
    "bit(3)": ("101",),
    "varbit": ("", "1" * 70),
    "bit": ("1",),
    "inet": ("::1", "192.168.2.0/12", "::ffff:1.2.3.4/128"),
    "cidr": ("192.168.100.128/25", "2001:db8::/32"),
    "macaddr": ("08:00:2b:01:02:03",),
    "macaddr8": ("08:00:2b:01:02:03:04:05",),
    "uuid": ("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",),
    "point": ("(1,1.5)", "(NaN,-Infinity)"),
    "lseg": ("[(0,0),(1,1)]",),
    "box": ("(2,2),(0,0)",),
    "line": ("{1,-1,0}",),
    "path": ("[(0,0),(1,1)]", "((0,0),(1,1))"),
    "polygon": ("((0,0),(1,1),(1,0))",),
    "circle": ("<(0,0),1>",),
    "tsvector": ("'a':1A 'b c':2", ""),
    "tsquery": ("'a' & !'b':*A",),
    "pg_lsn": ("16/B374D848", "0/0"),
    "pg_snapshot": ("10:20:10,14",),
    "txid_snapshot": ("10:20:10,14",),
    "xid": ("4294967295",),
    "xid8": ("18446744073709551615",),
    "cid": ("7",),
    "tid": ("(7,3)",),
    "int2vector": ("1 2 3", ""),
    "oidvector": ("1 2 3", ""),
    "refcursor": ("a cursor",),
    "aclitem": ("postgres=r/postgres",),
    "regclass": ("pg_class", "1"),
    "regcollation": ('"C"',),
    "regconfig": ("english",),
    "regdictionary": ("simple",),
    "regnamespace": ("pg_catalog",),
    "regoper": ("||/",),
    "regoperator": ("+(integer,integer)",),
    "regproc": ("now",),
    "regprocedure": ("abs(integer)",),
    "regrole": ("postgres",),
    "regdatabase": ("postgres",),
    "regtype": ("integer[]",),
    "int4range": ("[1,5)", "empty", "(,)"),
    "int8range": ("[1,)",),
    "numrange": ("[1.10,2.0]", "(,NaN]"),
    "daterange": ("[2020-01-01,infinity)", "[0044-03-15 BC,2020-01-01)"),
    "tsrange": ('["2020-01-01 00:00:00",infinity)',),
    "tstzrange": ('["2020-01-01 00:00:00+00",)',),
    "int4multirange": ("{[1,3),[5,7)}", "{}"),
    "int8multirange": ("{[1,)}",),
    "nummultirange": ("{[1.10,2.0]}",),
    "datemultirange": ("{[2020-01-01,infinity)}",),
    "tsmultirange": ('{["2020-01-01 00:00:00",infinity)}',),
    "tstzmultirange": ('{["2020-01-01 00:00:00+00",)}',),
    "mood": ("happy", "so so"),
    "price": ("9.90", "NaN"),
    "low_price": ("9.90", "NaN"),
    "grid": ("{1,NULL}", "{{1,2},{3,4}}", "[0:1]={7,8}"),
    "Pair, of": ('(1,"b, ""c""","so so")', "(,,)", '(,"",)'),
    "price_range": ("[1.5,NaN]",),
    "price_ranges": ("{[1.5,2.5)}",),
}
"""Texts of ordinary and extreme values by the type as SQL has it."""

EXTENSIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "hstore": {"hstore": ('"a"=>"1", "b c"=>NULL', "")},
    "citext": {"citext": ("ABC", "abc")},
    "vector": {"vector": ("[1,2.5,-3]",), "halfvec": ("[1,-0.5]",), "sparsevec": ("{1:1.5,3:-2}/5",)},
    "ltree": {"ltree": ("a.b.c", ""), "lquery": ("a.*{1,2}.!b",), "ltxtquery": ("a & !b",)},
    "cube": {"cube": ("(1, 2),(3, 4)",)},
}
"""Types of extensions with samples, by the extension's name; a server need not have it."""

WITHOUT_INPUT = {
    "ghstore",
    "ltree_gist",
    "gtsvector",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_ndistinct",
    "pg_node_tree",
}
"""Types that a column can have although no text reads as one of their values: the server makes them itself."""

ALL_TYPES = """
select t.typname::text, n.nspname::text = 'pg_catalog', t.typarray <> 0
from pg_type t join pg_namespace n on n.oid = t.typnamespace left join pg_class c on c.oid = t.typrelid
where n.nspname in ('pg_catalog', 'public') and t.typisdefined and t.typtype <> 'p'
  and (t.typrelid = 0 or c.relkind = 'c')
  and not exists (select from pg_type e where e.typarray = t.oid)
order by t.oid
"""
"""Types of the server and ours, without pseudo-types, rows of tables and arrays."""

EVERY = TableName("public", "every")


def extensions(database: Database) -> dict[str, tuple[str, ...]]:
    """Create the extensions that this server has; their types with samples."""
    there = {name for (name,) in database.rows("select name from pg_available_extensions")}
    present = {name: samples for name, samples in EXTENSIONS.items() if name in there}
    database.execute(*(f"create extension {name}" for name in present))
    return {kind: values for samples in present.values() for kind, values in samples.items()}


def columns(database: Database) -> list[tuple[str, tuple[str, ...]]]:
    """Every type as SQL, with its arrays, and samples for it."""
    samples = SAMPLES | extensions(database)
    if not reads_xml(database):
        samples["xml"] = ()
    found: dict[str, tuple[str, ...]] = {}
    listed = [(name, is_builtin) for name, is_builtin, _ in database.rows(ALL_TYPES)]
    missing = [name for name, _ in listed if name not in samples and name not in WITHOUT_INPUT]
    assert not missing, f"no samples of {', '.join(missing)}"
    has_array = {name for name, _, has_array in database.rows(ALL_TYPES) if has_array}
    with_modifier = {name: values for name, values in samples.items() if "(" in name}
    for name, is_builtin in listed:
        kind = f'pg_catalog."{name}"' if is_builtin else f'public."{name}"'
        found[kind] = samples.get(name, ())
        if name in has_array:
            found[kind + "[]"] = ()
    for kind, values in with_modifier.items():
        found[kind] = values
        found[kind + "[]"] = ()
    for kind, values in list(found.items()):
        if not values and kind.endswith("[]"):
            found[kind] = array_samples(database, kind, found[kind[:-2]])
    return list(found.items())


def reads_xml(database: Database) -> bool:
    """Whether the server was built with libxml; the wheel's was not, Debian's was."""
    try:
        database.rows("select '<a/>'::xml")
    except psycopg.errors.FeatureNotSupported:
        return False
    return True


def array_samples(database: Database, kind: str, elements: tuple[str, ...]) -> tuple[str, ...]:
    """Arrays of these elements as the server writes them: with a null, empty, of two dimensions, from 0 on."""
    if not elements:
        return ("{}",)
    listed = sql.SQL(", ").join(map(sql.Literal, elements))
    first = sql.Literal(elements[0])
    query = sql.SQL(
        "select array[{all}, null]::{kind}::text, array[array[{one}], array[{one}]]::{kind}::text,"
        " '[0:0]=' || array[{one}]::{kind}::text"
    ).format(all=listed, one=first, kind=sql.SQL(kind))  # type: ignore[arg-type]
    with database.connect() as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return ("{}", *row)


def fill(database: Database, kinds: list[tuple[str, tuple[str, ...]]]) -> int:
    """Write the n-th sample of every type into row n; returns the rows written."""
    count = max(len(samples) for _, samples in kinds)
    cast = sql.SQL(", ").join(sql.SQL("{}::" + kind).format(sql.Placeholder()) for kind, _ in kinds)  # type: ignore[arg-type]
    insert = sql.SQL("insert into every values (%s, {})").format(cast)
    with database.connect() as connection:
        for row in range(count + 1):
            values = [samples[row] if row < len(samples) else None for _, samples in kinds]
            connection.execute(insert, [row, *values])
    return count + 1


def server_texts(database: Database) -> dict[str, dict[str, str | None]]:
    """The rows as the server prints them, by id."""
    with psycopg.connect(database.dsn, options=SESSION_OPTIONS) as connection:
        cursor = connection.execute("select * from every")
        result = cursor.pgresult
        assert result is not None
        names = [column.name for column in cursor.description or ()]
        rows = [[text_at(result, row, at) for at in range(result.nfields)] for row in range(result.ntuples)]
    return {row[0] or "": dict(zip(names, row, strict=True)) for row in rows}


def text_at(result: psycopg.pq.abc.PGresult, row: int, column: int) -> str | None:
    value = result.get_value(row, column)
    return None if value is None else value.decode()


def texts(schema: TableSchema, rows: list[dict[str, Any]]) -> dict[str, dict[str, str | None]]:
    """Rows of Arrow as the server would print them, by id."""
    return {str(row["id"]): row_texts(schema, row) for row in rows}


def streamed(source: PostgresSource, write: Any) -> list[Slice]:
    """The slices of what `write` does."""
    with source.open(resume_after=START) as stream:
        write()
        source.mark("here")
        slices: list[Slice] = []
        while not slices or slices[-1].mark != "here":
            taken = stream.next(timeout_s=10)
            assert taken is not None
            slices.append(taken)
    return slices


def test_every_type_has_the_servers_text_in_log_dump_and_snapshot(database: Database) -> None:
    database.execute(*OWN_TYPES)
    kinds = columns(database)
    listed = ", ".join(f"c{at} {kind}" for at, (kind, _) in enumerate(kinds))
    database.execute(f"create table every (id int primary key, {listed})")
    with closing(database.source("every")) as source:
        source.prepare()
        count = 0

        def write() -> None:
            nonlocal count
            count = fill(database, kinds)

        slices = streamed(source, write)
        dumped = source.chunk(EVERY, after_key=None, up_to_key=("99",), limit=100)
        with source.snapshot() as snapshot:
            still = [row for rows in snapshot.read(EVERY) for row in rows.to_pylist()]
    expected = server_texts(database)
    assert len(expected) == count > 5
    schema = dumped.schema
    in_log = [row for taken in slices for batch in taken.batches for row in batch.rows.to_pylist()]
    assert {batch.schema for taken in slices for batch in taken.batches} == {schema}
    for where, rows in (("log", in_log), ("dump", dumped.rows.to_pylist()), ("snapshot", still)):
        found = texts(schema, rows)
        assert found.keys() == expected.keys()
        wrong = [
            (where, schema.column(name).source_type, found[key][name], text)
            for key, row in expected.items()
            for name, text in row.items()
            if not is_same(schema.column(name).source_type, found[key][name], text)
        ]
        assert wrong == []


def is_same(source_type: str, found: str | None, expected: str | None) -> bool:
    """Whether two texts are of one value: PostgreSQL and Python write some exponents differently."""
    if found == expected or found is None or expected is None:
        return found == expected
    width = np.float32 if source_type.startswith("real") else np.float64
    return source_type.startswith(("real", "double")) and floats(found, width) == floats(expected, width)


def floats(text: str, width: type[np.floating]) -> list[str]:
    return [part if part == "NULL" else repr(width(part)) for part in text.strip("{}").split(",")]


KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("uuid", ("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "00000000-0000-0000-0000-000000000001", "f" * 32)),
    ("bytea", (r"\x", r"\x00", r"\x5c78", r"\xff")),
    ("numeric", ("NaN", "1.0", "-Infinity", "1e100", "0.10")),
    ("numeric(10,2)", ("NaN", "1.5", "-1", "0")),
    ("numeric(20,18)", ("0", "1e-18", "NaN")),
    ("timestamptz", ("infinity", "-infinity", "2020-06-01 12:00:00.000001+00", "0044-03-15 BC", "20000-01-01")),
    ("timestamp(3)", ("infinity", "2020-06-01 12:00:00.129", "1999-01-01")),
    ("date", ("infinity", "2020-06-01", "0044-03-15 BC", "10000-01-01")),
    ("boolean", ("t", "f")),
    ("real", ("1.1", "NaN", "-Infinity", "3.4028235e+38", "1e-45")),
    ("double precision", ("0.1", "NaN", "Infinity", "1e15", "5e-324")),
    ("mood", ("happy", "so so", "sad")),
    ("price", ("9.90", "NaN", "1.00")),
    ('text collate "C"', ("a", "B", "b", "ä", "Z", "\\", '"')),
    ("char(5)", ("a", "ab", "")),
    ('"char"', ("a", "b", "")),
    ("name", ("a", "B", "_")),
    ("varchar(3)", ("a", "B", "abc")),
    ("int[]", ("{}", "{1,NULL}", "{{1,2},{3,4}}", "[0:1]={7,8}")),
    ("text[]", ("{}", '{"a,b",NULL,"NULL"}', '{"q\\"x",{}'.replace("{}", '""}'))),
    ("interval", ("1 day", "24:00:00.5", "-1 year")),
    ("inet", ("::1", "192.168.2.0/12", "10.0.0.1")),
    ("int4range", ("[1,5)", "empty", "(,)")),
    ("pair", ('(1,"b, c")', "(,)", "(2,)")),
    ("bit(3)", ("101", "000")),
    ("money", ("-1234.50", "1234.50", "0")),
    ("jsonb", ('{"a": 1}', "null", '"x"')),
    ("tsvector", ("'a':1", "")),
    ("pg_lsn", ("16/B374D848", "0/0")),
    ("macaddr8", ("08:00:2b:01:02:03:04:05",)),
    ("xid8", ("18446744073709551615", "3")),
    ("oid", ("4294967295", "3")),
    ("citext", ("a", "B", "c")),
)
"""Types of keys with values of them."""

ICU_KEYS = (
    ("text collate words", ("a", "B", "b", "ä", "Z", "'", "")),
    ("text collate no_case", ("a", "B", "c", "Z")),
)
"""The same under orders that are not that of bytes; the wheel's server is built without them, Debian's has them."""


def keys_of(database: Database) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The types of keys that this server can have."""
    try:
        database.execute(
            "create collation words (provider = icu, locale = 'und')",
            "create collation no_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        )
    except psycopg.errors.FeatureNotSupported:
        return KEYS
    return KEYS + ICU_KEYS


def test_every_key_type_is_read_chunk_by_chunk_and_by_key(database: Database) -> None:
    database.execute(
        *OWN_TYPES[:2],
        "create type pair as (a int, b text)",
        "alter type mood add value 'sad' before 'so so'",
        "create extension citext",
    )
    keys = {TableName("public", f"t{at}"): key for at, key in enumerate(keys_of(database))}
    for table, (kind, _) in keys.items():
        database.execute(f"create table {table} (k {kind} primary key, n int)")
    inserts = [
        f"insert into {table} values ({quote(value)}, {at})"
        for table, (_, values) in keys.items()
        for at, value in enumerate(values)
    ]
    with closing(database.source(*map(str, keys))) as source:
        source.prepare()
        slices = streamed(source, lambda: database.execute(*inserts))
        for table, (kind, values) in keys.items():
            ordered = [n for (n,) in database.rows(f"select n from {table} order by k")]
            assert read_in_chunks(source, table, count=len(values)) == ordered, kind
            changes = [batch for taken in slices for batch in taken.batches if batch.schema.name == table]
            # A repair read asks by the key that a change had.
            wanted = [text_key(change.key) for batch in changes for change in streamed_changes(batch)]
            assert source.rows(table, keys=wanted).rows.column("n").to_pylist() == ordered, kind


def read_in_chunks(source: PostgresSource, table: TableName, *, count: int) -> list[int]:
    """The rows in the order of their keys, read one by one and each again by its key."""
    last = source.last_key(table)
    assert last is not None
    seen: list[int] = []
    after: tuple[str, ...] | None = None
    for _ in range(count + 1):
        chunk = source.chunk(table, after_key=after, up_to_key=last, limit=1)
        seen += chunk.rows.column("n").to_pylist()
        after = chunk.last_key
        if after is None:
            break
        assert source.rows(table, keys=[after]).rows.column("n").to_pylist() == seen[-1:]
    return seen


def quote(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
