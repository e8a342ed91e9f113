-- A role that can capture, dump, compare and check source {source}, and nothing more.
-- Run it as the owner of the tables (the first statement as one who may create roles), in database {database}.

-- Streaming needs REPLICATION. It lets nobody write, but it would also allow a copy of the whole server: keep that
-- out with a line `host replication {role_name} all reject` in pg_hba.conf.
create role {role} login replication;
-- In psql, `\password {role_name}` sets the password without leaving it in a history or a log.

grant connect on database {database} to {role};
{grants}

-- The tables' owner publishes, so the role needs no right to create anything.
{publication};

-- Only where a table has row-level security: a policy would hide rows from a dump that the log brings.
-- alter role {role} bypassrls;
