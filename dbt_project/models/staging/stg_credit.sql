select
    credit_id,
    movie_id,
    person_id,
    role,
    billing,
    _committed_at as committed_at
from {{ source('studio', 'credit') }}
