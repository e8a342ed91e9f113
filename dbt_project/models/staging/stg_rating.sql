select
    movie_id,
    imdb_rating,
    imdb_votes,
    metascore,
    tomato_meter,
    tomato_rating,
    tomato_reviews,
    fresh,
    rotten,
    user_meter,
    user_rating,
    user_reviews,
    consensus,
    updated_at,
    _committed_at as committed_at
from {{ source('studio', 'rating') }}
