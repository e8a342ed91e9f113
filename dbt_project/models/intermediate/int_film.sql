select
    movie.movie_id,
    movie.imdb_id,
    movie.title,
    movie.year,
    movie.decade,
    movie.certificate,
    movie.runtime_min,
    movie.released_on,
    movie.languages,
    movie.countries,
    movie.awards,
    movie.oscars,
    movie.status,
    rating.imdb_rating,
    rating.imdb_votes,
    rating.metascore,
    rating.tomato_meter,
    rating.tomato_rating,
    rating.tomato_reviews,
    distribution.distributor,
    distribution.box_office_usd,
    distribution.home_release_on,
    greatest(movie.committed_at, rating.committed_at, distribution.committed_at) as committed_at
from {{ ref('stg_movie') }} as movie
left join {{ ref('stg_rating') }} as rating on rating.movie_id = movie.movie_id
left join {{ ref('stg_distribution') }} as distribution on distribution.movie_id = movie.movie_id
