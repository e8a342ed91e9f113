select
    director.person_id as director_id,
    actor.person_id as actor_id,
    max(director.name) as director,
    max(actor.name) as actor,
    count(*)::integer as film_count,
    min(director.year)::smallint as first_year,
    max(director.year)::smallint as last_year,
    avg(director.tomato_rating)::decimal(4, 2) as mean_tomato_rating,
    list(director.title order by director.year, director.movie_id) as films
from {{ ref('int_credit') }} as director
inner join {{ ref('int_credit') }} as actor on actor.movie_id = director.movie_id
where
    director.role = 'director'
    and actor.role = 'cast'
    and director.status = 'released'
    and actor.person_id <> director.person_id
group by director.person_id, actor.person_id
having count(*) > 1
order by director_id, actor_id
