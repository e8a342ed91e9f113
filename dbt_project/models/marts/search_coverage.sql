select
    movie.status,
    count(*)::integer as film_count,
    count(document.movie_id)::integer as searchable_film_count
from {{ ref('stg_movie') }} as movie
left join {{ source('movie_search', 'movies') }} as document on document.movie_id = movie.movie_id
group by movie.status
order by movie.status
