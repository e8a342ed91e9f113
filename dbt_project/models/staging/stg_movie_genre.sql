select
    movie_id,
    genre,
    _committed_at as committed_at
from {{ source('studio', 'movie_genre') }}
