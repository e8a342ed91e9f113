with genres as (
    select
        movie_id,
        list(genre order by genre) as genres
    from {{ ref('stg_movie_genre') }}
    group by movie_id
),

people as (
    select
        movie_id,
        list(name order by billing) filter (where role = 'director') as directors,
        list(name order by billing) filter (where role = 'writer') as writers,
        list(name order by billing) filter (where role = 'cast') as actors
    from {{ ref('int_credit') }}
    group by movie_id
)

select
    film.movie_id,
    film.imdb_id,
    film.title,
    film.year,
    film.decade,
    film.status,
    film.released_on,
    film.certificate,
    film.runtime_min,
    film.languages,
    film.countries,
    coalesce(genres.genres, []) as genres,
    coalesce(people.directors, []) as directors,
    coalesce(people.writers, []) as writers,
    coalesce(people.actors, []) as actors,
    film.awards,
    film.oscars,
    film.imdb_rating,
    film.imdb_votes,
    film.metascore,
    film.tomato_meter,
    film.tomato_rating,
    film.tomato_reviews,
    film.distributor,
    film.box_office_usd,
    film.home_release_on,
    film.committed_at
from {{ ref('int_film') }} as film
left join genres on genres.movie_id = film.movie_id
left join people on people.movie_id = film.movie_id
