-- The Movie Service's database: six tables, as a film studio would keep them.
-- `studio.database.load` runs this file once, in one transaction, on a database that has none of them.
-- Comments on tables and columns travel with the schema and are shown as descriptions downstream.

-- name: types
create type film_status as enum ('draft', 'announced', 'released', 'withdrawn');
comment on type film_status is
    'Where a film stands: draft is not public yet, withdrawn was public once.';

create type credit_role as enum ('director', 'writer', 'cast');
comment on type credit_role is 'What a person did for a film.';

-- name: movie
create table movie (
    movie_id     integer       primary key,
    imdb_id      text          check (imdb_id ~ '^tt[0-9]{7,8}$'),
    title        text          not null check (title <> ''),
    year         smallint      check (year between 1888 and 2100),
    certificate  text          check (certificate <> ''),
    runtime_min  numeric(6, 1) check (runtime_min > 0),
    released_on  date,
    languages    text[]        not null default '{}' check (array_position(languages, null) is null),
    countries    text[]        not null default '{}' check (array_position(countries, null) is null),
    awards       text          check (awards <> ''),
    oscars       smallint      not null default 0 check (oscars >= 0),
    status       film_status   not null,
    plot         text          check (plot <> ''),
    updated_at   timestamptz   not null default now()
);
create index movie_imdb_id on movie (imdb_id);
create index movie_year on movie (year);

comment on table movie is 'One row per film.';
comment on column movie.movie_id is 'The studio''s number of the film; for films of the catalogue, the source''s ID.';
comment on column movie.imdb_id is 'The film''s number at IMDb. Not unique: two pairs of cuts share one.';
comment on column movie.title is 'The title under which the film is shown.';
comment on column movie.year is 'The year of the first release.';
comment on column movie.certificate is 'The MPA rating as printed, e.g. PG-13; older films carry older marks such as GP.';
comment on column movie.runtime_min is 'Running time in minutes.';
comment on column movie.released_on is 'The day of the first release.';
comment on column movie.languages is 'Languages spoken, in the source''s order; empty where unknown.';
comment on column movie.countries is 'Countries of production, in the source''s order; empty where unknown.';
comment on column movie.awards is 'Awards in a sentence.';
comment on column movie.oscars is 'Academy Awards won.';
comment on column movie.status is 'draft, announced, released or withdrawn.';
comment on column movie.plot is 'What happens. The catalogue of the demo has none.';
comment on column movie.updated_at is 'When this row last changed.';

-- name: movie_genre
create table movie_genre (
    movie_id integer not null references movie on delete cascade,
    genre    text    not null check (genre <> ''),
    primary key (movie_id, genre)
);
create index movie_genre_genre on movie_genre (genre);

comment on table movie_genre is 'The genres of a film, one row each.';
comment on column movie_genre.movie_id is 'The film.';
comment on column movie_genre.genre is 'The genre in English, e.g. Sci-Fi.';

-- name: person
create table person (
    person_id  integer     primary key generated always as identity,
    name       text        not null unique check (name = btrim(name) and name <> ''),
    born_on    date,
    updated_at timestamptz not null default now()
);

comment on table person is
    'One row per name. The catalogue identifies people by name alone, so two people of one name are one row.';
comment on column person.person_id is 'The studio''s number of the person.';
comment on column person.name is 'The name as credited, e.g. Ed Begley, Jr.';
comment on column person.born_on is 'Date of birth. The catalogue of the demo has none.';
comment on column person.updated_at is 'When this row last changed.';

-- name: credit
create table credit (
    credit_id bigint      primary key generated always as identity,
    movie_id  integer     not null references movie on delete cascade,
    person_id integer     not null references person,
    role      credit_role not null,
    billing   smallint    not null check (billing > 0),
    unique (movie_id, person_id, role)
);
create index credit_person_id on credit (person_id);

comment on table credit is 'Who did what for a film: one row per film, person and role.';
comment on column credit.credit_id is 'The number of the credit.';
comment on column credit.movie_id is 'The film.';
comment on column credit.person_id is 'The person.';
comment on column credit.role is 'director, writer or cast.';
comment on column credit.billing is
    'Place in the list of that role, from 1. The catalogue lists names alphabetically: it is no measure of importance.';

-- name: rating
create table rating (
    movie_id      integer       primary key references movie on delete cascade,
    imdb_rating   numeric(3, 1) check (imdb_rating between 0 and 10),
    imdb_votes    integer       check (imdb_votes >= 0),
    metascore     smallint      check (metascore between 0 and 100),
    tomato_meter  smallint      check (tomato_meter between 0 and 100),
    tomato_rating numeric(3, 1) check (tomato_rating between 0 and 10),
    tomato_reviews integer      check (tomato_reviews >= 0),
    fresh         integer       check (fresh >= 0),
    rotten        integer       check (rotten >= 0),
    user_meter    smallint      check (user_meter between 0 and 100),
    user_rating   numeric(3, 2) check (user_rating between 0 and 5),
    user_reviews  integer       check (user_reviews >= 0),
    consensus     text          check (consensus <> ''),
    updated_at    timestamptz   not null default now(),
    constraint rating_reviews_add_up check (fresh + rotten = tomato_reviews)
);

comment on table rating is 'What the public and the critics think of a film; at most one row per film.';
comment on column rating.movie_id is 'The film.';
comment on column rating.imdb_rating is 'Mean of the votes at IMDb, 0 to 10. The catalogue of the demo has none; the stream of updates brings them.';
comment on column rating.imdb_votes is 'Number of votes at IMDb. The catalogue of the demo has none; the stream of updates brings them.';
comment on column rating.metascore is 'Metacritic''s score, 0 to 100.';
comment on column rating.tomato_meter is 'Share of fresh reviews at Rotten Tomatoes in percent.';
comment on column rating.tomato_rating is 'Mean mark of the reviews at Rotten Tomatoes, 0 to 10.';
comment on column rating.tomato_reviews is 'Number of reviews at Rotten Tomatoes: fresh + rotten.';
comment on column rating.fresh is 'Reviews that recommend the film.';
comment on column rating.rotten is 'Reviews that do not.';
comment on column rating.user_meter is 'Share of viewers who like it in percent. The catalogue of the demo has none.';
comment on column rating.user_rating is 'Mean mark of viewers, 0 to 5. The catalogue of the demo has none.';
comment on column rating.user_reviews is 'Number of viewers'' marks. The catalogue of the demo has none.';
comment on column rating.consensus is 'The critics'' view in a sentence. The catalogue of the demo has none.';
comment on column rating.updated_at is 'When this row last changed.';

-- name: distribution
create table distribution (
    movie_id        integer        primary key references movie on delete cascade,
    distributor     text           check (distributor <> ''),
    box_office_usd  numeric(14, 2) check (box_office_usd >= 0),
    home_release_on date,
    website         text           check (website <> ''),
    poster_url      text           check (poster_url <> '')
);

comment on table distribution is 'How a film reached its public; films of which nothing is known have no row.';
comment on column distribution.movie_id is 'The film.';
comment on column distribution.distributor is 'The companies behind the release, comma-separated where several.';
comment on column distribution.box_office_usd is 'Takings in US dollars.';
comment on column distribution.home_release_on is 'The day it came out on disc. The catalogue of the demo has none.';
comment on column distribution.website is 'The film''s own site. The catalogue of the demo has none.';
comment on column distribution.poster_url is 'Address of the poster. The catalogue of the demo has none.';

-- name: updated_at
-- The database sets the time itself, so that no client can forget it.
create function set_updated_at() returns trigger language plpgsql as $$
begin
    new.updated_at := now();
    return new;
end
$$;
create trigger movie_updated_at before update on movie for each row execute function set_updated_at();
create trigger person_updated_at before update on person for each row execute function set_updated_at();
create trigger rating_updated_at before update on rating for each row execute function set_updated_at();

-- name: catalogue_load
-- The loader's own mark. It stands in a schema of its own, outside of what is captured.
create schema studio_admin;
create table studio_admin.catalogue_load (
    only_row    boolean     primary key default true check (only_row),
    source_sha256 text      not null,
    started_at  timestamptz not null default now(),
    finished_at timestamptz
);
comment on table studio_admin.catalogue_load is
    'The load of the catalogue into these tables; finished_at stays empty until every table is in.';

-- name: reader role
-- What capture needs and nothing more: it may stream changes and read the six tables.
-- A publication must be created by the tables' owner, once: see docs/how-to/your-own-database.md.
do $$
begin
    create role deltaworks login replication;
exception when duplicate_object then
    -- Roles belong to the server; another database of it has created this one.
    null;
end
$$;
grant usage on schema public to deltaworks;
grant select on movie, movie_genre, person, credit, rating, distribution to deltaworks;
