-- A join that loses or repeats a film would show here, in either direction.
select movie_id, count(*) as row_count
from (
    select movie_id from {{ ref('stg_movie') }}
    union all
    select movie_id from {{ ref('film') }}
) as both_sides
group by movie_id
having count(*) <> 2
