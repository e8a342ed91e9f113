-- What capture asks the server. Each statement has a name and is asked for by it.

-- name: server
-- The server and the role, for the preflight.
select current_setting('server_version_num')::int as version,
       current_setting('wal_level') as wal_level,
       current_setting('max_replication_slots')::int as max_slots,
       (select count(*) from pg_catalog.pg_replication_slots) as used_slots,
       current_setting('max_wal_senders')::int as max_senders,
       (select count(*) from pg_catalog.pg_stat_replication) as used_senders,
       current_user::text as role,
       current_database()::text as database,
       has_database_privilege(current_database(), 'create') as may_create,
       (select rolsuper from pg_catalog.pg_roles where rolname = current_user) as is_superuser,
       (select rolreplication or rolsuper from pg_catalog.pg_roles where rolname = current_user)
         -- Managed servers grant replication by membership instead of the attribute.
         or exists (select 1 from pg_catalog.pg_roles
                    where rolname = 'rds_replication' and pg_has_role(current_user, oid, 'member')) as may_replicate

-- name: settings
-- Settings that decide what becomes of a slot; null where the version has none. Sizes in MB and kB, times in ms and s.
select max(s.setting) filter (where s.name = 'max_slot_wal_keep_size')::bigint as kept_mb,
       max(s.setting) filter (where s.name = 'wal_sender_timeout')::bigint as sender_timeout_ms,
       max(s.setting) filter (where s.name = 'idle_replication_slot_timeout')::bigint as idle_timeout_s,
       max(s.setting) filter (where s.name = 'logical_decoding_work_mem')::bigint as decoding_kb
from pg_catalog.pg_settings s

-- name: hidden
-- Those of the tables whose row-level security hides rows from this role.
select oid::bigint as oid from unnest(%(oids)s::oid[]) as asked (oid) where pg_catalog.row_security_active(oid)

-- name: generated
-- The generated columns of those tables that have any.
select asked.oid::bigint as oid, array_agg(a.attname::text order by a.attnum) as columns
from unnest(%(oids)s::oid[]) as asked (oid)
join pg_catalog.pg_attribute a on a.attrelid = asked.oid and a.attgenerated <> '' and not a.attisdropped
group by asked.oid

-- name: tables
-- The asked tables: identity, rights, and the columns of their key in key order.
select n.nspname::text as namespace,
       c.relname::text as name,
       c.oid::bigint as oid,
       c.relkind::text as kind,
       c.relpersistence::text as persistence,
       c.relreplident::text as identity,
       has_schema_privilege(n.oid, 'usage') as may_enter,
       has_table_privilege(c.oid, 'select') as may_select,
       pg_has_role(c.relowner, 'usage') as is_owner,
       coalesce((
         select array_agg(a.attname::text order by k.place)
         from pg_catalog.pg_index i
         cross join lateral unnest(i.indkey::int2[]) with ordinality as k (attnum, place)
         join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum
         where i.indrelid = c.oid and i.indisvalid and k.place <= i.indnkeyatts
           and case when c.relreplident = 'i' then i.indisreplident else i.indisprimary end
       ), '{}') as key
from unnest(%(namespaces)s::text[], %(names)s::text[]) with ordinality as asked (namespace, name, place)
join pg_catalog.pg_namespace n on n.nspname = asked.namespace
join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = asked.name
where c.relkind in ('r', 'p', 'v', 'm', 'f')
order by asked.place

-- name: matching
-- Tables of users whose names are like one of the patterns; partitions come under the name of their table.
select n.nspname::text as namespace, c.relname::text as name
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence = 'p'
  and n.nspname <> 'information_schema' and n.nspname !~ '^pg_'
  and exists (select from unnest(%(namespaces)s::text[], %(names)s::text[]) as asked (namespace, name)
              where n.nspname like asked.namespace and c.relname like asked.name)
order by n.nspname, c.relname

-- name: sizes
-- The size of tables on disk, that of their partitions included.
select asked.oid::bigint as oid,
       coalesce((select sum(pg_catalog.pg_table_size(part.relid)) from pg_catalog.pg_partition_tree(asked.oid) part),
                pg_catalog.pg_table_size(asked.oid))::bigint as bytes
from unnest(%(oids)s::oid[]) as asked (oid)

-- name: columns
-- The columns of tables, in their order. `published` is null where the publication does not name columns.
select a.attrelid::bigint as oid,
       a.attname::text as name,
       a.atttypid::bigint as type_oid,
       a.atttypmod as modifier,
       not a.attnotnull as nullable,
       a.attgenerated::text as generated
from pg_catalog.pg_attribute a
where a.attrelid = any(%(oids)s::oid[]) and a.attnum > 0 and not a.attisdropped
  -- Before 18 no publication sends a generated column, although the catalog lists it as published.
  and (a.attgenerated = '' or current_setting('server_version_num')::int >= 180000)
order by a.attrelid, a.attnum

-- name: stamp
-- Another text after every change in the catalog that a table's description is made of; no row when it is gone.
select concat_ws(' ', c.oid, c.xmin, c.relreplident,
         (select string_agg(concat_ws(':', a.attnum, a.xmin, t.xmin), ',' order by a.attnum)
          from pg_catalog.pg_attribute a left join pg_catalog.pg_type t on t.oid = a.atttypid
          where a.attrelid = c.oid and a.attnum > 0),
         (select string_agg(concat_ws(':', i.indexrelid, i.xmin), ',' order by i.indexrelid)
          from pg_catalog.pg_index i where i.indrelid = c.oid),
         p.oid, p.xmin, r.xmin) as stamp
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_publication p on p.pubname = %(publication)s
left join pg_catalog.pg_publication_rel r on r.prpubid = p.oid and r.prrelid = c.oid
where n.nspname = %(namespace)s and c.relname = %(table)s

-- name: versions
-- Which transactions last changed tables and their partitions in the catalog: `version` after whatever was altered
-- or truncated, `columns` after what changes how a row is read.
select c.oid::regclass::text as "table",
       concat_ws(' ', c.oid, c.xmin) as version,
       concat_ws(' ', c.relreplident, (select string_agg(concat_ws(':', a.attnum, a.xmin), ',' order by a.attnum)
                      from pg_catalog.pg_attribute a where a.attrelid = c.oid and a.attnum > 0)) as columns
from pg_catalog.pg_class c
where c.oid = any(%(oids)s::oid[])
   or c.oid in (select p.relid from unnest(%(oids)s::oid[]) as o, pg_catalog.pg_partition_tree(o) p)

-- name: types
-- Types with domains replaced by what they stand for, of the column and of the elements of an array.
with recursive asked as (
  select t.oid, t.modifier, t.place
  from unnest(%(oids)s::oid[], %(modifiers)s::int[]) with ordinality as t (oid, modifier, place)
), resolved as (
  select a.place, a.oid, a.modifier, false as is_array, 0 as step from asked a
  union all
  select r.place,
         case when t.typtype = 'd' then t.typbasetype else t.typelem end,
         -- The modifier of a domain is written at the domain; that of an array belongs to its elements.
         case when t.typtype = 'd' and r.modifier < 0 then t.typtypmod else r.modifier end,
         r.is_array or t.typtype <> 'd',
         r.step + 1
  from resolved r
  join pg_catalog.pg_type t on t.oid = r.oid
  -- int2vector and oidvector have elements and are no arrays: they print otherwise.
  where t.typtype = 'd'
     or (not r.is_array and t.oid = (select e.typarray from pg_catalog.pg_type e where e.oid = t.typelem))
)
select a.place,
       pg_catalog.format_type(a.oid, a.modifier) as source_type,
       case when n.nspname = 'pg_catalog' then t.typname::text end as base,
       r.modifier,
       r.is_array,
       coalesce(t.typdelim::text, ',') as delimiter
from asked a
join lateral (select * from resolved r where r.place = a.place order by step desc limit 1) r on true
left join pg_catalog.pg_type t on t.oid = r.oid
left join pg_catalog.pg_namespace n on n.oid = t.typnamespace
order by a.place

-- name: publication
-- What the publication sends, or no row when there is none.
select pubinsert and pubupdate and pubdelete and pubtruncate as sends_all,
       pubviaroot as is_via_root,
       pg_has_role(pubowner, 'usage') as is_owner
from pg_catalog.pg_publication where pubname = %(publication)s

-- name: published_tables
-- Tables in the publication, before server version 15.
select schemaname::text as namespace, tablename::text as name, null::text[] as columns, false as is_filtered
from pg_catalog.pg_publication_tables where pubname = %(publication)s

-- name: published_columns
-- Tables in the publication with the columns it sends, from server version 15 on.
select schemaname::text as namespace, tablename::text as name, attnames::text[] as columns,
       rowfilter is not null as is_filtered
from pg_catalog.pg_publication_tables where pubname = %(publication)s

-- name: slot
-- The slot, or no row when there is none. What newer versions know besides is null in older ones.
select s.plugin::text as plugin,
       s.database::text as database,
       s.active_pid,
       s.confirmed_flush_lsn::text as confirmed,
       s.wal_status,
       s.safe_wal_size::bigint as safe_bytes,
       pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), s.restart_lsn)::bigint as kept_bytes,
       (to_jsonb(s) ->> 'failover')::boolean as is_failover,
       to_jsonb(s) ->> 'invalidation_reason' as invalidation,
       pg_catalog.pg_current_wal_flush_lsn()::text as flushed,
       a.application_name::text as reader
from pg_catalog.pg_replication_slots s
left join pg_catalog.pg_stat_activity a on a.pid = s.active_pid
where s.slot_name = %(slot)s

-- name: running
-- The snapshot of now and since when the oldest transaction of any database runs. Our own transaction
-- gets an id after the snapshot was taken, so every one that had started before has a smaller id.
select pg_catalog.pg_current_snapshot()::text as snapshot,
       pg_catalog.pg_current_xact_id()::text::bigint as next_txid,
       least((select min(xact_start) from pg_catalog.pg_stat_activity
              where backend_xid is not null and pid <> pg_backend_pid()),
             (select min(prepared) from pg_catalog.pg_prepared_xacts)) as oldest_began_at,
       (select count(*) from pg_catalog.pg_stat_activity
        where backend_xid is not null and pid <> pg_backend_pid() and xact_start is null) as hidden

-- name: estimated_rows
-- The statistics' row count, -1 where there are none yet; the size tells whether counting is cheap.
select reltuples::bigint as estimated, pg_catalog.pg_relation_size(oid) as bytes
from pg_catalog.pg_class where oid = pg_catalog.to_regclass(%(table)s)

-- name: uncaptured
-- One row when the slot has an insert, update, delete or truncate of a published table. From version 15 on
-- transactions without any are left out by the server, so the first message decides.
select 1 as found
from pg_catalog.pg_logical_slot_peek_binary_changes(
       %(slot)s, null, case when current_setting('server_version_num')::int >= 150000 then 1 end,
       'proto_version', '1', 'publication_names', quote_ident(%(publication)s))
where pg_catalog.get_byte(data, 0) in (ascii('I'), ascii('U'), ascii('D'), ascii('T'))
limit 1

-- name: survey_source
-- Which server this is, its history, and the publication. The timeline is the first part of a WAL file's name.
select (select system_identifier::text from pg_catalog.pg_control_system()) as system,
       ('x' || left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 8))::bit(32)::int as timeline,
       (select oid || ':' || xmin from pg_catalog.pg_publication where pubname = %(publication)s) as publication

-- name: survey_position
-- After the survey was read: everything that it saw was committed before.
select pg_catalog.pg_current_wal_insert_lsn()::text as position

-- name: survey_columns
-- Columns by number. `xmin` is another one after each change of the entry; a rewrite of the rows leaves it alone.
select a.attrelid::bigint as oid,
       a.attnum as number,
       a.attname::text as name,
       pg_catalog.format_type(a.atttypid, a.atttypmod) as source_type,
       t.typname::text as base_type,
       not a.attnotnull as nullable,
       -- A partitioned table has no rows; its partitions have the default, perhaps under other numbers.
       a.atthasmissing or exists (select 1
                                  from pg_catalog.pg_partition_tree(a.attrelid) part
                                  join pg_catalog.pg_attribute p on p.attrelid = part.relid and p.attname = a.attname
                                  where p.atthasmissing) as is_filled,
       a.xmin::text as version,
       coalesce((select jsonb_object_agg(e.oid::text, e.enumlabel::text)
                 from pg_catalog.pg_enum e
                 -- A type's array and a domain have the labels of the type that they are made of.
                 where e.enumtypid = coalesce(nullif(t.typelem, 0), nullif(t.typbasetype, 0), t.oid)), '{}') as labels
from pg_catalog.pg_attribute a
join pg_catalog.pg_type t on t.oid = a.atttypid
where a.attrelid = any(%(oids)s::oid[]) and a.attnum > 0 and not a.attisdropped
  and (a.attgenerated = '' or (current_setting('server_version_num')::int >= 180000 and a.attgenerated = 's'))
order by a.attrelid, a.attnum

-- name: survey_parts
-- Where the rows of each table are: itself, or its partitions. A partition was made in place when its first
-- catalog entry and its place in the tree are of one command of one transaction; any other was attached, perhaps
-- with rows. (CREATE TABLE … PARTITION OF lies 2 command ids apart in 14 to 18, an ATTACH 6 or more.)
select root.oid::bigint as oid,
       part.oid::bigint as part,
       coalesce(pg_catalog.pg_relation_filenode(part.oid), 0)::bigint as file,
       exists (select 1
               from pg_catalog.pg_partition_ancestors(part.oid) as up (relid)
               join pg_catalog.pg_inherits i on i.inhrelid = up.relid
               join pg_catalog.pg_attribute a on a.attrelid = up.relid and a.attnum = -1
               where i.xmin::text <> a.xmin::text
                  or i.cmin::text::bigint - a.cmin::text::bigint not between 0 and 2) as is_attached
from unnest(%(oids)s::oid[]) as root (oid)
cross join lateral (
  select root.oid as oid from pg_catalog.pg_class c where c.oid = root.oid and c.relkind <> 'p'
  union all
  select t.relid from pg_catalog.pg_partition_tree(root.oid) t where t.isleaf and t.relid <> root.oid
) as part
order by root.oid, part.oid

-- name: survey_published
-- The entry by which each table is in the publication; its id is another one when it was taken out and put back.
select c.oid::bigint as oid,
       coalesce((select 'table ' || r.oid || ':' || r.xmin from pg_catalog.pg_publication_rel r
                 where r.prpubid = p.oid and r.prrelid = c.oid), 'schema or all') as entry
from pg_catalog.pg_publication p
join pg_catalog.pg_publication_tables t on t.pubname = p.pubname
join pg_catalog.pg_namespace n on n.nspname = t.schemaname
join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = t.tablename
where p.pubname = %(publication)s and c.oid = any(%(oids)s::oid[])

-- name: lease_holder
-- Who holds the lease, and for how long it has not been heard of. Ids of locks are unsigned here.
select l.pid, a.application_name::text as reader,
       extract(epoch from clock_timestamp() - greatest(a.state_change, a.backend_start))::float8 as silent_s
from pg_catalog.pg_locks l
left join pg_catalog.pg_stat_activity a on a.pid = l.pid
where l.locktype = 'advisory' and l.granted and l.objsubid = 2
  and l.database = (select oid from pg_catalog.pg_database where datname = current_database())
  and l.classid = %(classid)s::bigint::oid and l.objid = %(objid)s::bigint::oid

-- name: status
-- The end of the WAL, the clock, and the slot; null where there is no slot, or the version does not know.
with now as (
  select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn()
              else pg_catalog.pg_current_wal_flush_lsn() end as position
)
select now.position::text as position,
       pg_catalog.clock_timestamp() as at,
       s.active as is_active,
       s.wal_status,
       pg_catalog.pg_wal_lsn_diff(now.position, s.restart_lsn)::bigint as kept_bytes,
       s.safe_wal_size::bigint as safe_bytes,
       pg_catalog.pg_wal_lsn_diff(now.position, s.confirmed_flush_lsn)::bigint as unconfirmed_bytes,
       to_jsonb(s) ->> 'invalidation_reason' as invalidation,
       (to_jsonb(s) ->> 'inactive_since')::timestamptz as inactive_since
from now
left join pg_catalog.pg_replication_slots s on s.slot_name = %(slot)s

-- name: row_counts
-- The statistics' row counts of those of the tables that have any; a partitioned table's are its leaves'.
select asked.namespace, asked.name, sum(l.reltuples)::bigint as estimated
from unnest(%(namespaces)s::text[], %(names)s::text[]) as asked (namespace, name)
join pg_catalog.pg_namespace n on n.nspname = asked.namespace
join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = asked.name
cross join lateral (
  select c.reltuples where c.relkind = 'r'
  union all
  select p.reltuples from pg_catalog.pg_partition_tree(c.oid) t
  join pg_catalog.pg_class p on p.oid = t.relid
  where c.relkind = 'p' and t.isleaf
) l
group by asked.namespace, asked.name
having min(l.reltuples) >= 0
