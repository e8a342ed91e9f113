-- The book of releases, and what release.py asks of the lake.

-- name: create_schemas
create schema if not exists lake.deltaworks;

-- name: create_prod
create schema if not exists lake.prod;

-- name: create_book
create table if not exists lake.deltaworks.release (
    id bigint, version bigint, released_at timestamptz, views varchar, positions varchar,
    evidence varchar, evidence_hash varchar
);

-- name: newest
select id, version, released_at, views, positions, evidence, evidence_hash
from lake.deltaworks.release order by id desc limit ?;

-- name: remember
insert into lake.deltaworks.release values (?, ?, ?, ?, ?, ?, ?);

-- name: present_views
select view_name from duckdb_views() where database_name = 'lake' and schema_name = 'prod' order by view_name;

-- name: tables
select schema_name || '.' || table_name from duckdb_tables()
where database_name = 'lake' and schema_name not in ('deltaworks', 'prod') order by 1;

-- name: positions
-- How far each log was loaded in the version that is released.
select log, position from lake.deltaworks.load at (version => {version}) order by log;
