select
    movie_id,
    distributor,
    box_office_usd,
    home_release_on,
    website,
    poster_url,
    _committed_at as committed_at
from {{ source('studio', 'distribution') }}
