-- The book of loads: one row for each log, which the next load of that log resumes after. It is replaced,
-- not appended to, so that two loads of one log at once collide on it and the second one starts over.
-- The history of loads is in the commit messages of the lake (`lake.snapshots()`).

-- name: create_schema
create schema if not exists lake.deltaworks;

-- name: create_book
create table if not exists lake.deltaworks.load (
    log varchar, from_sequence bigint, to_sequence bigint, from_offset bigint, to_offset bigint,
    position ubigint, changes bigint, loaded_at timestamptz
);

-- name: last
select to_sequence, to_offset, position, loaded_at from lake.deltaworks.load where log = ?;

-- name: last_at
select to_sequence, to_offset, position, loaded_at from lake.deltaworks.load at (version => {version}) where log = ?;

-- name: forget_last
delete from lake.deltaworks.load where log = ?;

-- name: remember
insert into lake.deltaworks.load values (?, ?, ?, ?, ?, ?, ?, ?);

-- name: history
select
    snapshot_id as version,
    cast(commit_extra_info ->> '$.to_sequence' as bigint) as sequence,
    cast(commit_extra_info ->> '$.to_offset' as bigint) as next_offset,
    cast(commit_extra_info ->> '$.position_value' as ubigint) as position,
    snapshot_time as loaded_at
from lake.snapshots()
where commit_message = ? and cast(commit_extra_info ->> '$.position_value' as ubigint) <= ?
order by snapshot_id desc limit 1;

-- name: taken
select commit_extra_info -> '$.taken'
from lake.snapshots()
where commit_message = ? and (commit_extra_info -> '$.taken') is not null
order by snapshot_id;
