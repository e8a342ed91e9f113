select
    person_id,
    max(name) as name,
    count(*)::integer as film_count,
    min(year)::smallint as first_year,
    max(year)::smallint as last_year,
    count(tomato_rating)::integer as rated_film_count,
    avg(tomato_rating)::decimal(4, 2) as mean_tomato_rating,
    sum(oscars)::integer as oscars,
    sum(box_office_usd)::decimal(18, 2) as box_office_usd,
    first(title order by tomato_rating desc nulls last, movie_id) as best_film,
    max(tomato_rating) as best_tomato_rating
from {{ ref('int_credit') }}
where role = 'director' and status = 'released'
group by person_id
order by person_id
