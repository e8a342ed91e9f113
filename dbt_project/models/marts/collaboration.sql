with directors as (
    select person_id, name, movie_id, title, year, tomato_rating
    from {{ ref('int_credit') }}
    where role = 'director' and status = 'released'
),

actors as (
    select credit.person_id, person.name, credit.movie_id
    from {{ ref('stg_credit') }} as credit
    inner join {{ ref('stg_person') }} as person on person.person_id = credit.person_id
    where credit.role = 'cast'
),

together as (
    select
        directors.person_id as director_id,
        actors.person_id as actor_id,
        directors.name as director,
        actors.name as actor,
        directors.movie_id,
        directors.title,
        directors.year,
        directors.tomato_rating
    from directors
    inner join actors on actors.movie_id = directors.movie_id and actors.person_id <> directors.person_id
    -- Nineteen pairs of twenty met once; they leave before the lists are made.
    qualify count(*) over (partition by directors.person_id, actors.person_id) > 1
)

select
    director_id,
    actor_id,
    max(director) as director,
    max(actor) as actor,
    count(*)::integer as film_count,
    min(year)::smallint as first_year,
    max(year)::smallint as last_year,
    avg(tomato_rating)::decimal(4, 2) as mean_tomato_rating,
    list(title order by year, movie_id) as films
from together
group by director_id, actor_id
order by director_id, actor_id
