-- The statements of bag.py, by name. `came` and `went` are the rows of a window; {values} are the table's own columns.

-- name: put
insert into {target} ({columns}) select {columns} from came;

-- name: wanted
-- What goes, and how often.
create or replace temp table wanted as
select {values}, count(*) as _times from went group by {values};

-- name: kept
-- Rows equal to one that goes, beyond as many as go; the oldest of them go first.
create or replace temp table kept as
select {columns} from (
    select {columns_of_t}, w._times, row_number() over (partition by {values_of_t} order by t._commit) as _nth
    from {target} as t join wanted as w on {t_is_w}
) where _nth > _times;

-- name: take
delete from {target} as t using wanted as w where {t_is_w};

-- name: put_back
insert into {target} ({columns}) select {columns} from kept;
