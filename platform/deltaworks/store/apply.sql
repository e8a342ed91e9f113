-- The statements of apply.py, by name. `change` is the window's changes of one table, in order, with
-- their place `_place`. Braces are filled in by apply.py: {target} the table, {columns} all its columns,
-- {columns_of_c} the same of alias c, {key_of_c} the key columns, {c_is_k} equality of keys, and so on.
-- In tables made here a key is `key_0, key_1 ...` and other names are ours alone: a source may name its
-- columns as it likes.

-- name: late
-- Changes that a newer one of the same key has overtaken.
select c._place as place from change as c join {target} as t on {c_is_t} where c._commit < t._commit;

-- name: newest
-- The last change of every key: the whole story where each change carries its whole row.
create or replace temp table newest as
select max(c._place) as place from change as c group by {key_of_c};

-- name: delete_plain
-- Every key of the window goes ...
delete from {target} as t
using (select {key_as_numbered} from change as c join newest as z on z.place = c._place) as k
where {t_is_k};

-- name: insert_plain
-- ... and comes back unless its last change deleted it.
insert into {target} ({columns})
select {columns_of_c} from change as c join newest as z on z.place = c._place where c._op <> 'd';

-- name: touched
-- Every key that a change names, old keys included, under a small number.
create or replace temp table touched as
select row_number() over () as id, *
from (
    select {key_as_numbered} from change as c
    union
    select {old_key_as_numbered} from change as c where c._old_key is not null
);

-- name: step
-- The changes as numbers: which key, and which key before (none where `_old_key` is null).
create or replace temp table step as
select c._place as place, c._op as op, c._commit as commit_position, k.id as id, o.id as old_id
from change as c
join touched as k on {c_is_k}
left join touched as o on {old_c_is_o};

-- name: moved
-- Keys that a move left or reached; all changes on them are traced one by one.
create or replace temp table moved as
select old_id as id from step where old_id is not null
union select id from step where old_id is not null;

-- name: moved_steps
select place, commit_position, op, id, old_id from step semi join moved using (id) order by place;

-- name: moved_present
-- Those of them that have a row now.
select k.id from touched as k semi join moved as m on m.id = k.id semi join {target} as t on {t_is_k};

-- name: life
-- Which changes make up the final row of a key that never moved: those after its last delete.
create or replace temp table life as
select s.place, s.id as entity
from step as s
left join (select id, max(place) as place from step where op = 'd' group by id) as d on d.id = s.id
where s.op <> 'd' and (d.place is null or s.place > d.place) and s.id not in (select id from moved);

-- name: origin
-- The row it grew out of: the one in the table, unless a delete came in between.
create or replace temp table origin as
select distinct entity, entity as id from life
where entity not in (select id from step where op = 'd');

-- name: life_of_moved
insert into life select place, entity from traced_life;

-- name: origin_of_moved
insert into origin select entity, id from traced_origin;

-- name: last
-- The last change of each final row, and whether it left columns out.
create or replace temp table last as
select l.entity, l.place, coalesce(len(c._unchanged), 0) > 0 as is_partial
from (select entity, max(place) as place from life group by entity) as l
join change as c on c._place = l.place;

-- name: sent
-- What earlier changes of the window sent for the columns that a last change left out. A value is
-- wrapped, so that a null that was sent differs from nothing sent.
create or replace temp table sent as
select l.entity, {sent_columns}
from life as l
semi join (select entity from last where is_partial) as p on p.entity = l.entity
join change as c on c._place = l.place
group by l.entity;

-- name: stored
-- What the table holds for them.
create or replace temp table stored as
select o.entity, {stored_columns}
from origin as o
semi join (select entity from last where is_partial) as p on p.entity = o.entity
join touched as k on k.id = o.id
join {target} as t on {t_is_k};

-- name: final
create or replace temp table final as
select {final_columns}
from last as l
join change as c on c._place = l.place
left join sent as s on s.entity = l.entity
left join stored as b on b.entity = l.entity;

-- name: delete_touched
delete from {target} as t using touched as k where {t_is_k};

-- name: insert_final
insert into {target} ({columns}) select * from final;
