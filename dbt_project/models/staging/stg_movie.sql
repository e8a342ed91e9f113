select
    movie_id,
    imdb_id,
    title,
    year,
    year - year % 10 as decade,
    certificate,
    runtime_min,
    released_on,
    languages,
    countries,
    awards,
    oscars,
    status,
    plot,
    updated_at,
    _committed_at as committed_at
from {{ source('studio', 'movie') }}
