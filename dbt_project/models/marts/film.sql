with genres as (
    select
        movie_id,
        list(genre order by genre) as genres
    from {{ ref('stg_movie_genre') }}
    group by movie_id
),

people as (
    select
        credit.movie_id,
        list(person.name order by credit.billing) filter (where credit.role = 'director') as directors,
        list(person.name order by credit.billing) filter (where credit.role = 'writer') as writers,
        list(person.name order by credit.billing) filter (where credit.role = 'cast') as actors
    from {{ ref('stg_credit') }} as credit
    inner join {{ ref('stg_person') }} as person on person.person_id = credit.person_id
    group by credit.movie_id
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
